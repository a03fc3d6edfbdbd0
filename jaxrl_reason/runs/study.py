"""The runs of a comparison: their configurations, directories and results, and which of them a process does next.

    WORKDIR/seed-0/start/           the supervised start and the reward model that the rows of the seed share; no
                                    reward model if no row uses it
    WORKDIR/seed-0/method/          the recipe
    WORKDIR/seed-0/verifier_only/   the baseline "verifier only"

Each is a work directory, and is finished when it has a result.json. The process that works on it holds the lock of
WORKDIR/seed-0/method.lock.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
import dataclasses
import json
import pathlib
import re
from typing import Any, IO, NamedTuple

from jaxrl_reason import config as config_lib
from jaxrl_reason import methods
from jaxrl_reason.config import Config, ConfigError
from jaxrl_reason.runs import inputs, locks, results
from jaxrl_reason.runs.checkpoints import numbers_in

START, METHOD = "start", "method"  # the directories of the start that rows share, and of the recipe
_REWARD_MODEL = "reward_model/reward_model.json"  # of a start: its last file, see rewards/model_files.py


class Row(NamedTuple):
    """The recipe or a baseline."""

    name: str  # in tables; the name of its method for the recipe
    directory: str  # its name in the directory of a seed
    changes: Mapping[str, object]  # of a baseline
    config: Config  # with these changes, for any seed
    digest: str  # of `config`

    @property
    def is_recipe(self) -> bool:
        return self.directory == METHOD


class Unit(NamedTuple):
    """One run of a comparison, or the start that the rows of a seed share."""

    row: Row | None  # None for the start
    seed: int
    directory: pathlib.Path
    config: Config
    digest: str
    reward_model: bool = False  # whether the start has a reward model, which a row of the comparison uses

    @property
    def title(self) -> str:
        """The name of the run in messages."""
        if self.row is None:
            return "the start"
        return f"the method, {self.row.name}" if self.row.is_recipe else f"the baseline {self.row.name!r}"


@dataclasses.dataclass(frozen=True)
class Study:
    """The runs of a comparison."""

    workdir: pathlib.Path
    rows: Sequence[Row]  # the recipe comes first
    seeds: Sequence[int]
    units: Sequence[Unit]  # to run, in order
    entries: Mapping[tuple[str, int, str], results.Entry]  # of runs done elsewhere, by row, seed and digest

    def entry(self, row: Row, seed: int) -> results.Entry | None:
        """Returns the results of a finished run; None if it is not finished."""
        found = read_result(self.workdir / f"seed-{seed}" / row.directory)
        return found if found and found["config"] == row.digest else self.entries.get((row.name, seed, row.digest))

    def place(self, row: Row, seed: int) -> str:
        """Returns the report of a run, relative to the work directory; "" if there is none."""
        path = f"seed-{seed}/{row.directory}/report.html"
        return path if (self.workdir / path).exists() else ""

    def is_finished(self, unit: Unit) -> bool:
        """Returns whether a run is done; a start is done, too, if no run needs it any more."""
        if unit.row:
            return self.entry(unit.row, unit.seed) is not None
        return _is_made(unit) or all(self.is_finished(u) for u in self.units if u.row and u.seed == unit.seed)

    def unfinished(self) -> list[Unit]:
        """Returns the runs that are not done."""
        return [unit for unit in self.units if not self.is_finished(unit)]

    def take(self) -> tuple[Unit, IO[bytes]] | None:
        """Takes the first unfinished run whose start is made and that no other process works on; None if there is none.

        Returns the run, and its lock, to be closed at its end.
        """
        for unit in self.unfinished():
            if unit.row and not all(_is_made(u) for u in self.units if u.row is None and u.seed == unit.seed):
                continue
            if lock := locks.take(unit.directory.with_name(f"{unit.directory.name}.lock")):
                if not self.is_finished(unit):
                    return unit, lock
                lock.close()  # another process has finished it in the meantime
        return None

    def check_inputs(self, unit: Unit, found: inputs.Inputs) -> None:
        """Raises ConfigError if the inputs of a run differ from those of another one, finished or not, that names the same files."""
        others: list[tuple[str, Config, inputs.Inputs]] = []
        configs = {row.directory: row.config for row in self.rows} | {START: self.rows[0].config}
        for name, config in configs.items():
            places = (directory / name for directory in sorted(self.workdir.glob("seed-*")))
            others += [(str(place), config, inputs.read(place)) for place in places]
        for (name, seed, digest), entry in self.entries.items():
            for row in self.rows:
                if (row.name, row.digest) == (name, digest):
                    title = f"seed {seed} of {name!r} in the file of results"
                    others.append((title, row.config, entry.get("inputs", {})))
        own = configs[unit.directory.name]
        for title, config, known in others:
            kept = set(known)
            if (own.data, own.regression) != (config.data, config.regression):
                kept.discard("data")
            if own.reward_model.data != config.reward_model.data:
                kept.discard("pairs")
            inputs.check(unit.directory, found, title, {name: known[name] for name in kept})


def read_result(directory: pathlib.Path) -> dict[str, Any] | None:
    """Returns the content of a result.json; None if there is none. Raises ConfigError for a damaged file."""
    file = directory / "result.json"
    if not file.exists():
        return None
    try:
        found = json.loads(file.read_bytes(), parse_constant=lambda _: None)  # NaN is unknown
        found["config"]
        if "evaluations" in found:  # of a row, and not of the start
            results.check(found)
    except (ValueError, TypeError, LookupError, AttributeError) as e:
        raise ConfigError(f"{file} is damaged; remove it, and its run is completed again.") from e
    return found


def _check_result(unit: Unit) -> None:
    """Raises ConfigError for a run that has more steps, or is finished with another configuration.

    A run may have begun with fewer steps, and goes on then, unless its learning rates depend on their number.
    """
    assert unit.row is not None  # a start is no run to compare
    found, c = read_result(unit.directory), unit.config
    if not isinstance(c.steps, int) or not isinstance(c.supervised.steps, int):
        return  # `validate` refuses it
    if found is None:
        done = max(numbers_in(unit.directory / "checkpoints"), default=0) - c.supervised.steps
        if done > max(c.steps, 0):
            raise ConfigError(
                f"{unit.directory} holds {unit.title}, of which {done} steps are done, more than the {c.steps} to compare; choose another "
                "work directory, or remove this one."
            )
        if done > 0 and (begun := _old_fields(unit).get("steps", c.steps)) != c.steps:
            _check_goes_on(unit, f"began with {begun} steps")
        return
    if found["config"] == unit.digest:
        return
    done = found["evaluations"][-1]["step"] if "evaluations" in found else 0
    if found["config"] != results.digest(variant(unit.row.config, {"steps": done})) or done > unit.row.config.steps:
        raise ConfigError(
            f"{unit.directory} holds {unit.title}, which is finished with another configuration{_changes(unit)}; choose another work "
            "directory, or remove this one."
        )
    _check_goes_on(unit, f"is finished with {done:g} steps")


def _check_goes_on(unit: Unit, state: str) -> None:
    """Raises ConfigError if a run cannot go on to another number of steps; `state` says what it has."""
    if (schedule := unit.config.optimizer.schedule) != "constant":
        raise ConfigError(
            f"{unit.directory} holds {unit.title}, which {state}. Its learning rates depend on the number of steps "
            f"(config.optimizer.schedule is {schedule!r}), so it cannot go on to {unit.config.steps}; choose another work directory, or "
            "remove this one."
        )


def _old_fields(unit: Unit) -> dict[str, Any]:
    """Returns the fields of the configuration with which a run began, by name; {} if they are not known."""
    try:
        return dict(results.leaves(json.loads((unit.directory / "config.json").read_bytes())["config"]))
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return {}


def _changes(unit: Unit) -> str:
    """Returns the fields of a configuration that a finished run had otherwise, for a message; "" if they are not known."""
    if not (old := _old_fields(unit)):
        return ""
    new = dict(results.leaves(json.loads(json.dumps(config_lib.to_dict(unit.config)))))
    changed = [
        f"config.{name} was {old.get(name)!r} and is {new.get(name)!r}" for name in new if old.get(name) != new[name]
    ]
    return f" ({'; '.join(changed[:5])})" if changed else ""


def _is_made(start: Unit) -> bool:
    is_of_it = (read_result(start.directory) or {}).get("config") == start.digest
    return is_of_it and (not start.reward_model or (start.directory / _REWARD_MODEL).exists())


def variant(config: Config, changes: Mapping[str, object]) -> Config:
    """Returns a copy with other values for some fields; raises ConfigError for an unknown field.

    `changes` maps fields to values, such as {"method": {...}, "reward.weights": [...]}.
    """
    copy = config_lib.from_dict(config_lib.to_dict(config))
    for name, value in changes.items():
        *sections, leaf = name.split(".")
        at = copy
        for part in (*sections, leaf):
            if not dataclasses.is_dataclass(at) or not hasattr(at, part):
                keyword = "; give the whole method: {'method': {'name': ...}}" if sections == ["method"] else ""
                raise ConfigError(f"A baseline changes config.{name}, and there is no such field{keyword}.")
            at, parent = getattr(at, part), at
        setattr(parent, leaf, value)
    return copy


def plan(
    config: Config,
    baselines: Mapping[str, Mapping[str, object]],
    workdir: pathlib.Path,
    *,
    seeds: Sequence[int],
    only: Sequence[str] = (),
    done: Iterable[results.Entry] = (),
) -> Study:
    """Returns the runs of a recipe and its baselines with each seed, seed after seed; `only` names rows.

    Raises ConfigError for a baseline that changes an unknown field, the seed, or what the shared start has decided; for two
    rows of one name, for a name in `only` that is no row, and for results of another configuration in `done` or in `workdir`.
    """
    rows = _rows(config, baselines)
    names = [row.name for row in rows]
    for name in only:
        if name not in names:
            raise ConfigError(f"--only={name} is no row.{methods.nearest(name, names)}")
    digests, table = {row.name: row.digest for row in rows}, results.table_name(config)
    done = [entry for entry in done if results.table_of(entry) == table]
    for entry in done:
        if digests.get(entry["row"], entry["config"]) != entry["config"]:
            raise ConfigError(
                f"The file of --results has seed {entry['seed']} of {entry['row']!r} with another configuration; name another "
                "file, or remove such lines."
            )
    chosen = [row for row in rows if not only or row.name in only]
    units = [unit for seed in seeds for unit in _units(config, chosen, workdir / f"seed-{seed}", seed)]
    entries = {(entry["row"], entry["seed"], entry["config"]): entry for entry in done}
    for unit in units:
        if unit.row and (unit.row.name, unit.seed, unit.row.digest) not in entries:
            _check_result(unit)
    return Study(workdir, rows, seeds, units, entries)


def _rows(config: Config, baselines: Mapping[str, Mapping[str, object]]) -> list[Row]:
    recipe = str(config.method.get("name"))
    rows, taken = [Row(recipe, METHOD, {}, config, results.digest(config))], {START, METHOD}
    for name, changes in baselines.items():
        directory = re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")
        if not directory:
            raise ConfigError(f"The baseline {name!r} has no letter a-z or digit for its directory; rename it.")
        if directory in taken or name == recipe:
            raise ConfigError(f"The baseline {name!r} has the name or the directory of another row; rename it.")
        if "seed" in changes:
            raise ConfigError(f"The baseline {name!r} changes config.seed, which all rows share; use --seeds instead.")
        taken.add(directory)
        changed = variant(config, changes)
        rows.append(Row(name, directory, changes, changed, results.digest(changed)))
    return rows


def _units(config: Config, rows: Iterable[Row], directory: pathlib.Path, seed: int) -> Iterator[Unit]:
    """Yields the start of a seed, if there is something to train before RL, and the `rows`."""
    start, shared = directory / START, dict[str, object]()
    learns = _learned(config) and not config.reward_model.path
    using = [row for row in rows if learns and _learned(row.config) and not _sets_reward_model(row)]
    if config.supervised.steps or learns:
        own = variant(config, {"seed": seed, "checkpoint.keep_start": True})
        yield Unit(None, seed, start, own, results.digest(config, ("steps", "eval")), bool(using))
        shared = {"supervised.steps": 0, "supervised.start_from": str(start)}
    for row in rows:
        if shared:
            _check_start(config, row)
        changed = variant(config, {"seed": seed} | shared | dict(row.changes))
        if not _learned(changed):
            changed.reward_model = config_lib.RewardModel()
        elif row in using:
            changed.reward_model = config_lib.RewardModel(path=str(start / "reward_model"))
        yield Unit(row, seed, directory / row.directory, changed, row.digest)


def _check_start(config: Config, row: Row) -> None:
    """Raises ConfigError if a row changes what the start that all rows share has decided, and has no start of its own."""
    for name in row.changes:
        of_start = f"{name}.".startswith(("supervised.", "regression.encoder_", "regression.validation_"))
        of_start |= name == "regression"
        if of_start and not {"supervised.steps", "supervised.start_from"} & set(row.changes):
            raise ConfigError(
                f"The baseline {row.name!r} changes config.{name}, and begins with the start that all rows share, so this would have "
                "no effect; give it config.supervised.steps too, for a phase of its own."
            )
    if row.config.lora != config.lora and row.config.supervised.start_from == config.supervised.start_from:
        raise ConfigError(
            f"The baseline {row.name!r} changes config.lora, and the start that all rows share has other weights; compare it in a work "
            "directory of its own."
        )


def _sets_reward_model(row: Row) -> bool:
    return any(name.startswith("reward_model") for name in row.changes)


def _learned(config: Config) -> bool:
    return any(name.startswith("reward_model") for name in config.reward.functions)


def differing_fields(rows: Iterable[Row]) -> dict[str, dict[str, Any]]:
    """Returns row -> {field: value} of the fields of the configuration that differ between the rows.

    Keywords of a method have their defaults. One that a row's method does not have is shown if a row sets it.
    """
    own, given = {}, set()
    for row in rows:
        fields = config_lib.to_dict(row.config)
        keywords = dict(fields.pop("method"))
        given |= {name for name, _ in results.leaves(keywords, "method")}
        name, base = keywords["name"], keywords.get("base", "")
        defaults = methods.keywords(name, base)
        for key, value in keywords.items():  # of a stack: a dict per method
            known = defaults.get(key)
            defaults[key] = known | value if isinstance(known, dict) and isinstance(value, dict) else value
        own[row.name] = dict(results.leaves(fields | {"method": defaults}))
    names = dict.fromkeys(name for fields in own.values() for name in fields)
    chosen = []
    for name in names:
        values = [json.dumps(fields[name], default=str) for fields in own.values() if name in fields]
        if len(set(values)) > 1 or (name in given and len(values) < len(own)):
            chosen.append(name)
    return {row: {name: fields[name] for name in chosen if name in fields} for row, fields in own.items()}

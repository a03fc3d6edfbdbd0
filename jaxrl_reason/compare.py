"""Trains a method and its baselines from the same start, with several seeds, and compares their held-out metrics.

The recipe's `get_baselines()` names the baselines: {"verifier only": {"method": {"name": "grpo"}}, ...}, each a dict of
the configuration fields that differ. A seed sets the order of the data, the weights and the samples. All rows of a seed
begin with the same weights: the recipe's supervised start (and its reward model) is trained once per seed.

The table has the mean of each row with its 95 % interval, and the difference to the recipe, paired by seed. The
difference of the accuracy also has an interval for other held-out prompts, if all runs share the prompts.
The table is printed and written to DIR/comparison.json; DIR/comparison.png has the curves, and DIR/comparison.html
both. The same command again resumes. Several processes may give the same command: each takes the next run that no
other one works on. On the hosts of a slice, which jax connects, all processes do one run after the other together.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
import contextlib
import dataclasses
import json
import pathlib
import sys
import time
from typing import Any, NamedTuple

import jax
import rich.console

from jaxrl_reason import config as config_lib
from jaxrl_reason import tasks, train
from jaxrl_reason.config import Config, ConfigError
from jaxrl_reason.data.parsers import kind_of
from jaxrl_reason.methods import Method
from jaxrl_reason.rewards import RewardError
from jaxrl_reason.rewards.loading import file_digest
from jaxrl_reason.rl import hosts
from jaxrl_reason.runs import command, inputs, locks, pictures, results, study, summary
from jaxrl_reason.runs.files import finite, write_json
from jaxrl_reason.runs.report import write_comparison
from jaxrl_reason.runs.study import START, Study, Unit
from jaxrl_reason.runs.workdir import write_recipe

Rows = dict[str, dict[str, Any]]  # row -> metrics, see `summary.summarize`
_POLL = 1.0  # seconds between two looks at the runs of other processes


class Taken(NamedTuple):
    """A run that this process works on: set up, and locked until `lock` is closed."""

    unit: Unit
    lock: contextlib.AbstractContextManager  # of the first process
    run: train.Run


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Runs to compare."""

    study: Study
    method: Method  # of the recipe
    results_file: pathlib.Path | None
    recipe: dict[str, Any]  # its configuration, with the changes of the command line
    pending: list[Taken]  # the first run, set up; `train_all` takes it, so that it ends before others begin


def compare(
    config: Config,
    baselines: Mapping[str, Mapping[str, object]],
    workdir: str | pathlib.Path,
    *,
    seeds: Sequence[int] = (),
    only: Sequence[str] = (),
    results_file: pathlib.Path | None = None,
) -> Rows:
    """Trains a method and its baselines with each seed, each run in a work directory WORKDIR/seed-SEED/ROW.

    Args:
      config: that of the method.
      baselines: maps names of rows to the configuration fields that differ.
      seeds: by default the one of `config`.
      only: the rows to train; by default all. Rows that were trained before are compared too.
      results_file: a file of results; its runs count as trained, and the results of all finished runs are written to it.

    Returns:
      row -> metrics, as in comparison.json: see `summary.summarize`. The row "start" is the policy that all runs begin
      with. "differs" maps configuration fields to the values of a row, if rows have different ones.
    """
    return train_all(prepare(config, baselines, workdir, seeds=seeds, only=only, results_file=results_file))


def prepare(
    config: Config,
    baselines: Mapping[str, Mapping[str, object]],
    workdir: str | pathlib.Path,
    *,
    seeds: Sequence[int] = (),
    only: Sequence[str] = (),
    results_file: pathlib.Path | None = None,
) -> Comparison:
    """Makes the configurations and sets the first run up. Arguments: see `compare`.

    Raises ConfigError without evaluations to compare, for a row that cannot begin or changes an unknown field, for
    two rows of one name, and for a name in `only` that is no row.
    """
    if elsewhere := config_lib.remote(str(workdir)):
        raise ConfigError(f"The work directory is {str(workdir)!r}, and must be on this machine: {elsewhere}.")
    workdir = pathlib.Path(workdir).expanduser().resolve()  # the configurations of the rows hold it
    read = lambda: results.read(results_file) if results_file and hosts.is_first() else []
    done = hosts.agree(read, ConfigError, OSError)
    seeds = tuple(seeds) or (config.seed,)
    plan = lambda: study.plan(config, baselines, workdir, seeds=seeds, only=only, done=done)
    planned = hosts.agree(plan, ConfigError)
    comparison = Comparison(planned, config_lib.validate(config), results_file, config_lib.to_dict(config), [])
    for unit in planned.units:
        with _naming(unit):
            config_lib.validate(unit.config)
            if unit.row and not unit.config.eval.every:
                raise ConfigError("config.eval.every is 0, and a comparison needs held-out metrics; set it above 0.")
    if taken := _take(planned):
        comparison.pending.append(_set_up(*taken, comparison))
    return comparison


def _take(runs: Study) -> tuple[Unit, contextlib.AbstractContextManager] | None:
    """Takes the next run and its lock. The first of several processes chooses for all; the others have no lock."""
    taken = hosts.agree(lambda: runs.take() if hosts.is_first() else None, OSError)
    chosen = hosts.from_first([runs.units.index(taken[0])] if taken else [])
    return taken or ((runs.units[chosen[0]], contextlib.nullcontext()) if chosen else None)


def _unfinished(runs: Study) -> int:
    """Returns the number of runs that are not done, as the first process sees it."""
    return hosts.from_first([len(runs.unfinished()) if hosts.is_first() else 0])[0]


@contextlib.contextmanager
def _naming(unit: Unit) -> Iterator[None]:
    """Turns errors of a baseline's configuration, data or rewards into a ConfigError that names the baseline."""
    try:
        yield
    except (RewardError, ValueError, OSError) as e:
        if unit.row and not unit.row.is_recipe:
            raise ConfigError(f"The baseline {unit.row.name!r} cannot begin: {e}") from e
        raise


def _set_up(unit: Unit, lock: contextlib.AbstractContextManager, comparison: Comparison) -> Taken:
    """Sets a run up, and writes the recipe from which its report shows differences.

    Raises what `train.setup` raises, and ConfigError if files have changed since another run began; for a baseline, a
    ConfigError that names it. Nothing is written then.
    """
    found: dict[str, str] = {}

    def check(run: train.Run) -> None:
        if hosts.is_first():
            found.update(_inputs(unit, run))
            comparison.study.check_inputs(unit, found)

    with contextlib.ExitStack() as stack:
        stack.enter_context(lock)
        with _naming(unit):
            run = train.setup(unit.config, unit.directory, check=check)
            if hosts.is_first():
                inputs.write(unit.directory, found)
                if unit.row:
                    write_recipe(unit.directory, "the recipe of the comparison", comparison.recipe)
        stack.pop_all()  # the lock is held from here on
    return Taken(unit, lock, run)


def _inputs(unit: Unit, run: train.Run) -> dict[str, str]:
    """Returns the digests of the files that a run reads. TFDS names the version of its data, so it needs none."""
    c, start = run.config, unit.directory.parent / START
    found = {}
    if any(map(_is_file, (c.data.train, c.data.eval))):
        found["data"] = run.task.work.fingerprint
    if run.reward_phase and run.reward_phase.work and _is_file(c.reward_model.data):
        found["pairs"] = run.reward_phase.work.fingerprint
    elif unit.row and c.reward_model.path == str(start / "reward_model"):  # the pairs of the model that rows share
        found |= {name: digest for name, digest in inputs.read(start).items() if name == "pairs"}
    rewards = c.reward.functions if unit.row else ()  # a start uses no rewards
    return found | {spec: digest for spec in rewards if (digest := file_digest(spec))}


def _is_file(name: str) -> bool:
    return bool(kind_of(name)) or name.startswith("hf://")


def train_all(comparison: Comparison) -> Rows:
    """Trains all runs, and writes comparison.json, .png and .html. Returns the content of the first, see `compare`.

    Of several processes, the first one writes, and the others return nothing.
    """
    with hosts.preemption() as should_stop:  # around all runs: a signal in one of them ends the comparison
        _train_all(comparison, should_stop)
    return report(comparison) if hosts.is_first() else {}


def _train_all(comparison: Comparison, should_stop: Callable[[], bool]) -> None:
    runs, count = comparison.study, len(comparison.study.units)
    console, waits = rich.console.Console(highlight=False, markup=False, emoji=False, quiet=not hosts.is_first()), False
    say = lambda text: console.print(text, soft_wrap=True)
    if done := count - _unfinished(runs):
        say(f"{done} of {count} runs are finished.")
    while unfinished := _unfinished(runs):
        taken = comparison.pending.pop() if comparison.pending else None
        if taken is None and (free := _take(runs)):
            taken = _set_up(*free, comparison)
        if taken is None:
            if not waits:
                say(f"Other processes work on the runs that are left ({unfinished}); waiting for them.")
            waits = True
            if should_stop():
                raise hosts.Preempted("the last run of this process")
            time.sleep(_POLL)
            continue
        unit, waits, left = taken.unit, False, unfinished - 1
        follow = "none follows" if not left else "1 follows" if left == 1 else f"{left} follow"
        number = runs.units.index(unit) + 1
        say(f"Run {number} of {count}, seed {unit.seed}, {unit.title}, in {unit.directory}; {follow}.")
        with taken.lock:
            run = taken.run
            del taken  # else two runs are in memory
            _work(comparison, unit, run)
            del run
        jax.clear_caches()  # no other run uses its programs; a process with thousands of programs becomes slow
        if should_stop() and left:
            raise hosts.Preempted(f"the last step of the run in {unit.directory}")


def _work(comparison: Comparison, unit: Unit, run: train.Run) -> None:
    """Trains one run, or makes a start, and writes its result.json, with which it is finished."""
    baselines = {}
    if unit.row is None:
        train.make_start(run if unit.reward_model else dataclasses.replace(run, reward_phase=None))
        baselines = run.task.baselines()  # once per seed, because they have the settings of the supervised phase
    else:
        train.train(run)
    if hosts.is_first():
        _write_result(comparison, unit, run.task, baselines)


def _write_result(comparison: Comparison, unit: Unit, task: tasks.Task, baselines: dict[str, float]) -> None:
    directory = unit.directory
    if unit.row is None:
        phases = (directory / phase / "metrics.jsonl" for phase in ("supervised", "reward_model"))
        found = {"config": unit.digest, "seconds": results.seconds(*phases), "baselines": baselines}
        write_json(directory / "result.json", found)
        return
    metrics, start = directory / "metrics.jsonl", study.read_result(directory.parent / START) or {}
    evaluations = results.evaluations(metrics, ("eval/", *tasks.BASELINES))
    evaluations[0] |= {name: None if x is None else finite(x) for name, x in start.get("baselines", {}).items()}
    table = results.table_name(unit.config)
    entry = {
        "row": unit.row.name,
        "recipe": unit.row.is_recipe,
        "seed": unit.seed,
        "changes": json.loads(json.dumps(dict(unit.row.changes), default=dataclasses.asdict)),
        "config": unit.digest,
        "inputs": inputs.read(directory),
        "versions": results.versions(),
        "seconds": results.seconds(metrics),
        "start_seconds": start.get("seconds", 0.0),
        "evaluations": evaluations,
    } | ({"table": table} if table else {})
    if accuracies := results.accuracies(directory, evaluations[-1]["step"]):
        entry |= {"accuracies": accuracies, "prompts": results.digest_of_prompts(task.source[1], task.held_out)}
    write_json(directory / "result.json", entry)
    _keep(comparison, [entry])


def _keep(comparison: Comparison, entries: Sequence[results.Entry]) -> None:
    """Writes entries to the file of results, if there is one."""
    if file := comparison.results_file:
        with locks.held(file.with_name(f"{file.name}.lock")):  # next to it: other work directories write it too
            results.merge(file, entries)


def report(comparison: Comparison) -> Rows:
    """Writes comparison.json, .png and .html for all finished runs of the seeds. Returns the content of the first."""
    runs, entries = comparison.study, dict[str, dict[int, results.Entry]]()
    for row in runs.rows:
        if of_row := {seed: entry for seed in runs.seeds if (entry := runs.entry(row, seed))}:
            entries[row.name] = of_row
    _keep(comparison, [entry for of_row in entries.values() for entry in of_row.values()])
    rows = summary.summarize(entries, runs.rows[0].name, tasks.BASELINES)
    for name, values in study.differing_fields(row for row in runs.rows if row.name in rows).items():
        rows[name]["differs"] = values
    shown = tasks.headlines(comparison.method)
    names = _metrics(rows, shown)
    curves = {name: found for name in names if (found := summary.curves(entries, name))}
    places = {row.name: {seed: runs.place(row, seed) for seed in runs.seeds} for row in runs.rows}
    with locks.held(runs.workdir / "comparison.lock"):
        write_json(runs.workdir / "comparison.json", rows)
        pictures.plot_comparison(curves, runs.workdir / "comparison.png", title=runs.workdir.name)
        write_comparison(runs.workdir / "comparison.html", rows, curves, names, places, title=runs.workdir.name)
    return rows


def _metrics(rows: Rows, shown: tuple[str, ...]) -> list[str]:
    """Returns the metrics of the rows whose names, without "eval/", begin with `shown`."""
    return list(dict.fromkeys(n for row in rows.values() for n in row if n.removeprefix("eval/").startswith(shown)))


def print_rows(console: rich.console.Console, rows: Rows, shown: tuple[str, ...]) -> None:
    """Prints one column per row of a comparison: the fields that differ, and the metrics whose names begin with `shown`.

    A name is that without "eval/". A second table has the differences to the recipe. A sentence names the seeds.
    """
    names = _metrics(rows, shown)
    fields = list(dict.fromkeys(name for row in rows.values() for name in row.get("differs", {})))
    columns, differences, compared = {}, {}, summary.compared(rows, names)
    for heading, row in zip(summary.headings(rows).values(), rows.values()):
        half = row.get("half_width", {})
        values = [_field_cell(row["differs"].get(name)) if "differs" in row else "" for name in fields]
        columns[heading] = values + [pictures.cell_with_interval(n, row.get(n), half.get(n)) for n in names]
        if found := row.get("difference"):
            differences[heading] = [pictures.cell_of_difference(n, found.get(n)) for n in compared]
    labels = lambda names: [name.removeprefix("eval/").replace("_", " ") for name in names]
    pictures.print_table(console, fields + labels(names), columns)
    say = lambda text: console.print(text, soft_wrap=True)
    if note := pictures.unit_note(names):
        say(note)
    used = sorted({int(seed) for row in rows.values() for seed in row.get("runs", ())})
    if not used:
        return
    if len(used) < 2:
        say(f"Seed {used[0]} only, so there is no interval: a difference can be noise. Give --seeds=8.")
        return
    say(f"Means over the seeds {', '.join(map(str, used))} ± half-widths of their 95 % intervals (Student's t).")
    if differences:
        recipe = next(title for title, row in rows.items() if "runs" in row and not row["difference"])
        title = f"Difference to {recipe}, paired by seed, with its 95 % interval"
        pictures.print_table(console, labels(compared), differences, title=title)
        if len(compared) > len(names):
            say(summary.OTHER_PROMPTS_NOTE)


def _field_cell(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_field_cell, value)) or "-"
    return "-" if value in (None, "") else f"{value:g}" if isinstance(value, float) else str(value)


def read_seeds(text: str) -> tuple[int, ...]:
    """Returns the seeds of --seeds: "3" are 0, 1, 2; "0,3,5" are these, and "3," is 3."""
    wrong = ValueError("a number of seeds from 1 to 1000, or seeds such as 0,3,5")
    words = text.removesuffix(",").split(",")
    if not all(word.isascii() and word.isdigit() for word in words):
        raise wrong
    seeds = tuple(map(int, words))
    if len(set(seeds)) < len(seeds):
        raise wrong
    if "," in text:
        return seeds
    if not 1 <= int(text) <= 1000:
        raise wrong
    return tuple(range(int(text)))


COMMAND = command.Command(
    "compare",
    __doc__,
    (
        *command.TRAINING,
        command.Flag("seeds", "N|A,B,...", "the seeds 0 to N-1, or A, B, ...; by default config.seed", read_seeds),
        command.Flag("only", "ROW", "trains this row only; may be given several times", default=(), repeated=True),
        command.Flag(
            "results", "FILE", "results to go on from, and to add to: one line of JSON per row and seed", command.path
        ),
    ),
    "--config=configs/hero.py --workdir=/tmp/hero --seeds=8",
    errors=(RewardError,),
)


def main(argv: list[str] | None = None) -> int:
    """Runs the command and returns its exit code."""

    def begin(arguments: command.Arguments) -> Comparison:
        baselines = config_lib.load_baselines(arguments.config)
        if arguments.seeds and "seed" in arguments.fields:
            raise ConfigError("--seeds and --config.seed both set the seed; leave one of them out.")
        config = arguments.configuration()
        hosts.initialize(config.mesh.host_timeout, config.mesh.initialization_timeout)
        return prepare(
            config,
            baselines,
            arguments.training_workdir(),
            seeds=arguments.seeds or (),
            only=arguments.only,
            results_file=arguments.results,
        )

    def work(comparison: Comparison) -> None:
        rows, console = train_all(comparison), rich.console.Console(highlight=False, markup=False, emoji=False)
        if not hosts.is_first():
            return
        print_rows(console, rows, tasks.headlines(comparison.method))
        for name in ("comparison.json", "comparison.png", "comparison.html"):
            console.print(f"Written: {comparison.study.workdir / name}", soft_wrap=True)

    return command.run(COMMAND, argv, begin, work)


if __name__ == "__main__":
    sys.exit(main())

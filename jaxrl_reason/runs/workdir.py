"""A work directory: the configuration, data and tokenizer that its run began with, and the weights that it saved."""

from collections.abc import Callable, Iterator, Mapping
import contextlib
import json
import logging
import os
import pathlib
import shutil
from typing import Any, Protocol

from jaxrl_reason import config as config_lib
from jaxrl_reason import methods, models
from jaxrl_reason.config import Config, ConfigError
from jaxrl_reason.data import fitted, load_tokenizer, Tokenizer
from jaxrl_reason.data.parsers import kind_of
from jaxrl_reason.models.formats.weights import read_json
from jaxrl_reason.rl import hosts
from jaxrl_reason.runs import checkpoints, locks
from jaxrl_reason.runs.files import write_json, writing

_log = logging.getLogger(__name__)
# Fields that a resumed run may change: its length, its evaluation, its files, its devices and microbatches, its limits.
MAY_CHANGE = (
    *("steps", "mesh", "checkpoint", "eval", "log", "compilation_cache", "update.accumulation"),
    *("reward.workers", "reward.timeout_s", "reward.memory_mb", "reward.max_failure_share"),
    *("sampling.mismatch_limit", "optimizer.max_skipped"),
)


class Savable(Protocol):
    """A tokenizer, of text or of numbers."""

    def save(self, directory: pathlib.Path) -> None: ...


class Workdir:
    """A work directory, which only the configuration and data that began it may continue, up to `MAY_CHANGE`.

    The constructor reads only. `begin` writes, after everything else has accepted the run, and makes the directory if
    needed. The fingerprint is that of the training data. Raises ConfigError, which names every difference, for a
    directory of another configuration or other data, and for another file with the tokenizer's name.
    """

    def __init__(self, path: str | os.PathLike, config: Config, fingerprint: str):
        self.path, self.fingerprint = pathlib.Path(path).expanduser().resolve(), fingerprint
        self._file, self._tokenizer = self.path / "config.json", self.path / "tokenizer"
        self._identity = json.loads(json.dumps({"config": config_lib.to_dict(config), "data_fingerprint": fingerprint}))
        if self._file.exists():
            self._check_same_run()
        elif self._tokenizer.exists():
            raise ConfigError(
                f"{self._tokenizer} exists without {self._file}, which a run writes first; choose another --workdir."
            )

    def _check_same_run(self) -> None:
        try:
            old = json.loads(self._file.read_text())
        except ValueError as e:
            raise ConfigError(f"{self._file} is not valid JSON ({e}); restore it, or choose another --workdir.") from e
        if not isinstance(old, dict) or not isinstance(old.get("config"), dict):
            raise ConfigError(f"{self._file} is damaged: it has no config; restore it, or choose another --workdir.")
        free = tuple(f"config.{field}." for field in MAY_CHANGE)
        changes = [
            (name, a, b)
            for name, a, b in _differences(old | {"config": _with_new_fields(old["config"])}, self._identity)
            if not f"{name}.".startswith(free) and not self._is_moved_start(name, a, b)
        ]
        if changes:
            listed = "; ".join(
                "its data have changed since it began (a file, a split or a column)"
                if name == "data_fingerprint"
                else f"{name} was {a!r} and is {b!r}"
                for name, a, b in changes
            )
            raise ConfigError(
                f"{self.path} holds another run: {listed}. Restore the old data and values, or choose another --workdir."
            )

    def _is_moved_start(self, name: str, old: Any, new: Any) -> bool:
        """Returns whether both paths are the start that rows of a comparison share, which was moved with this run."""
        places = {"config.supervised.start_from": "start", "config.reward_model.path": "start/reward_model"}
        if name not in places or not (isinstance(old, str) and isinstance(new, str)):
            return False
        place = places[name]  # in WORKDIR/seed-0, which is above this row, or above the row of this reward model
        seeds = [*self.path.parents][:2]
        return any(new == str(seed / place) and old.endswith(f"/{seed.name}/{place}") for seed in seeds)

    @property
    def has_begun(self) -> bool:
        """Whether the directory holds a run."""
        return self._file.exists()

    def is_finished(self, steps: int) -> bool:
        """Returns whether there is a checkpoint after `steps` steps, those of the supervised phase included."""
        return max(checkpoint_numbers(self.path), default=-1) >= steps

    def tokenizer(self, make: Callable[[], Tokenizer]) -> Tokenizer:
        """Returns the tokenizer that the run began with; a new one, from `make`, if the run has not begun."""
        return tokenizer_of(self.path) if self._tokenizer.exists() else make()

    def lock(self) -> contextlib.AbstractContextManager:
        """Takes the lock of the run on the first process; leaving the returned context frees it.

        Raises ConfigError if another process holds the lock. A file system without locks gives none.
        """
        if not hosts.is_first():
            return contextlib.nullcontext()
        found = locks.take(self.path / "run.lock", needed=False)
        if found is None:
            raise ConfigError(
                f"Another process trains in {self.path}; wait for its end, end it, or choose another --workdir."
            )
        return found

    def begin(self, tokenizer: Savable, pretrained: models.Opened | None = None) -> None:
        """Writes the configuration and, if there is none, the tokenizer; each is complete or absent.

        The config.json of a pretrained model is written next to the tokenizer. Raises OSError on failure.
        """
        with writing(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
        write_json(self._file, self._identity)
        if not self._tokenizer.exists():
            with writing(self._tokenizer):
                self._write_tokenizer(tokenizer, pretrained)

    def check_shared(self) -> None:
        """Raises ConfigError when this process, which saves checkpoints too, does not see the first one's directory."""
        if not self._file.exists():
            raise ConfigError(
                f"{self.path} is not the directory of that name in which the first process has begun the run: all processes must see "
                "the same work directory."
            )

    def _write_tokenizer(self, tokenizer: Savable, pretrained: models.Opened | None) -> None:
        scratch = self.path / "tokenizer.tmp"
        shutil.rmtree(scratch, ignore_errors=True)  # from a run that was killed here
        try:
            tokenizer.save(scratch)
        except Exception as e:
            if type(e) is Exception:  # the tokenizers library reports a full disk so
                raise OSError(str(e)) from e
            raise
        if pretrained is not None:
            source = dict(pretrained.source)
            if tokenizer is pretrained.tokenizer:
                for name, content in pretrained.files.items():
                    (scratch / name).write_bytes(content)  # the original files hold more than is used here
            else:
                source = {name: x for name, x in source.items() if not name.endswith("_token_id")}
            (scratch / "config.json").write_text(json.dumps(source, indent=2) + "\n")
        scratch.rename(self._tokenizer)


def tokenizer_of(path: pathlib.Path) -> Tokenizer:
    """Returns the tokenizer that the run in a work directory began with, or raises as `data.load_tokenizer` does."""
    source, tokenizer = model_source(path), load_tokenizer(path / "tokenizer")
    return tokenizer if source is None else fitted(tokenizer, models.read_config(source).vocab_size)


_RECIPE = "recipe.json"


def write_recipe(workdir: pathlib.Path, name: str, values: Mapping[str, Any]) -> None:
    """Writes the name of the recipe of a run, and its configuration without the changes of the run, to recipe.json."""
    write_json(workdir / _RECIPE, {"recipe": name, "config": values})


def read_recipe(workdir: pathlib.Path) -> tuple[str, dict[str, Any]] | None:
    """Returns what `write_recipe` wrote; None if the run began without a recipe. Raises ValueError for a damaged file."""
    file = workdir / _RECIPE
    if not file.is_file():
        return None
    found = read_json(file)
    if not isinstance(found.get("recipe"), str) or not isinstance(found.get("config"), dict):
        raise ConfigError(f"{file} is damaged; remove it, and the report shows no differences to the recipe.")
    return found["recipe"], found["config"]


def model_source(path: pathlib.Path) -> dict[str, Any] | None:
    """Returns the config.json of the pretrained model that the run in a work directory began with; None without one."""
    file = path / "tokenizer" / "config.json"
    return read_json(file) if file.is_file() else None


def _with_new_fields(values: dict[str, Any]) -> dict[str, Any]:
    """Returns a saved configuration with the defaults of fields that a later version has added.

    A configuration that has a field which no longer exists is returned as it is: the field is then named as a difference.
    """
    try:
        return json.loads(json.dumps(config_lib.to_dict(config_lib.from_dict(values))))
    except (ConfigError, TypeError, AttributeError):
        return values


def _differences(old: Any, new: Any, name: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Yields (field, old value, new value) for every leaf that differs."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in dict.fromkeys([*old, *new]):
            yield from _differences(old.get(key), new.get(key), f"{name}.{key}" if name else key)
    elif old != new:
        yield name, old, new


def load_config(workdir: pathlib.Path, fields: Mapping[str, str]) -> Config:
    """Returns the configuration that the run in `workdir` began with, checked, with other values for some fields.

    `fields` maps the name of a field to the text of its new value. Raises ConfigError without a run in this directory,
    and for a configuration that cannot run.
    """
    file = workdir / "config.json"
    if not file.is_file():
        missing = "it holds no config.json" if workdir.is_dir() else "there is no such directory"
        raise ConfigError(f"{workdir} is not the work directory of a run: {missing}.")
    try:
        found = json.loads(file.read_bytes())
        if isinstance(found, dict) and "model_type" in found:
            raise ConfigError(f"{workdir} is a model, and not the work directory of a run: name it with --model.")
        config = config_lib.from_dict(found["config"])
    except ConfigError:
        raise
    except (ValueError, TypeError, KeyError) as e:
        raise ConfigError(f"{file} is damaged ({type(e).__name__}: {e}); restore it.") from e
    return with_fields(config, fields)


def with_fields(config: Config, fields: Mapping[str, str]) -> Config:
    """Sets fields of a configuration in place, to the values that texts spell, checks all, and returns it.

    Other held-out data without a split of their own are read whole (a file), or from their test split. At temperature 0
    there is one completion per prompt, if `fields` name no other number. Raises ConfigError for a configuration that
    cannot run.
    """
    for name, text in fields.items():
        config_lib.override(config, name, text)
    if "data.eval" in fields and "data.eval_split" not in fields:
        config.data.eval_split = "all" if kind_of(config.data.eval) else "test"
    if config.eval.temperature == 0 and "eval.samples" not in fields:
        config.eval.samples = 1  # greedy completions are all alike
    try:
        config_lib.validate(config)
    except ConfigError as e:
        used = [*str(config.method.get("name")).split("+"), config.method.get("base") or "grpo"]
        if all(name in methods.names() for name in used):
            raise
        raise ConfigError(f"{e} If the run's recipe registers it, name the recipe: --config=FILE.") from e
    return config


def checkpoint_numbers(workdir: pathlib.Path) -> list[int]:
    """Returns the numbers of the checkpoints of a run, newest first."""
    return checkpoints.numbers_in(workdir / "checkpoints")


def check_checkpoint(workdir: pathlib.Path, number: int | None) -> list[int]:
    """Returns the numbers of the complete checkpoints of a run, newest first.

    Raises ConfigError if there are no checkpoints, or if `number` is not among the complete ones; None chooses any.
    """
    numbers = checkpoint_numbers(workdir)
    if not numbers:
        raise ConfigError(f"The run in {workdir} has no checkpoint yet; train it first.")
    complete = [n for n in numbers if checkpoints.is_complete(workdir / "checkpoints" / str(n))]
    if number is not None and number not in complete:
        what = "only a part of checkpoint" if number in numbers else "no checkpoint"
        listed = ", ".join(map(str, complete)) or "none"
        raise ConfigError(f"The run in {workdir} has {what} {number}; it has {listed}.")
    return complete


def load_weights(
    workdir: pathlib.Path, number: int | None, like: models.Params, model: models.ModelConfig
) -> tuple[int, models.Params]:
    """Reads the policy's weights from a checkpoint, without the optimizer's state; changes nothing in the directory.

    `like` holds ShapeDtypeStructs of the weights of the decoder `model`, with shardings. No number chooses the newest
    checkpoint that can be read. Returns its number, and the weights. Raises ConfigError for a checkpoint that is
    missing, cannot be read, or has other shapes.
    """
    numbers, complete = checkpoint_numbers(workdir), check_checkpoint(workdir, number)
    directory = workdir / "checkpoints"
    trained, frozen = models.lora.split(model, like)
    wanted = {"trained": trained} | ({"frozen": frozen} if frozen else {})
    found, parts, faults = checkpoints.read_newest(directory, numbers if number is None else [number], wanted)
    messages = [f"Checkpoint {directory / str(bad)} cannot be read: {fault}" for bad, fault in faults.items()]
    if found is None:
        others = [str(n) for n in complete if n not in faults]
        raise ConfigError(messages[0] + (f" Choose another one: --checkpoint={' or '.join(others)}." if others else ""))
    for message in messages:
        _log.warning("%s", message)
    return found, models.lora.join(parts["trained"], parts.get("frozen", {}))

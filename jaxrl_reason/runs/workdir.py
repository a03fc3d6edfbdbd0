"""The work directory's identity: which configuration, data and tokenizer a run began with."""

from collections.abc import Callable
import json
import os
import pathlib
import shutil

from jaxrl_reason import config as config_lib
from jaxrl_reason import models
from jaxrl_reason.config import Config, ConfigError
from jaxrl_reason.data import fitted, load_tokenizer, Tokenizer
from jaxrl_reason.models.formats.weights import read_json
from jaxrl_reason.runs import writers

# What may differ when a run goes on: how long it is, how it is judged, what it writes, where it runs, what it bears.
MAY_CHANGE = (
    *("steps", "mesh", "checkpoint", "eval", "log"),
    *("reward.workers", "reward.timeout_s", "reward.memory_mb", "reward.max_failure_share"),
    *("sampling.mismatch_limit", "optimizer.max_skipped"),
)


class Workdir:
    """A work directory, looked at and not yet touched: `begin` writes, once nothing else can refuse the run.

    A directory that was begun is only continued by the configuration and the data that began it, up to `MAY_CHANGE`.

    Args:
      path: the directory; `begin` makes it where it does not exist.
      config: the configuration to run.
      fingerprint: of the training data.

    Raises:
      ConfigError: the directory belongs to another configuration or other data, and the message names every difference; or
        something else lies where the tokenizer would go.
    """

    def __init__(self, path: str | os.PathLike, config: Config, fingerprint: str):
        self.path = pathlib.Path(path).expanduser().resolve()
        self._file, self._tokenizer = self.path / "config.json", self.path / "tokenizer"
        self._identity = json.loads(json.dumps({"config": config_lib.to_dict(config), "data_fingerprint": fingerprint}))
        if self._file.exists():
            try:
                old = json.loads(self._file.read_text())
            except ValueError as e:
                raise ConfigError(
                    f"{self._file} is not valid JSON ({e}); restore it, or choose another --workdir."
                ) from e
            changes = [c for c in _differences(old, self._identity) if not _may_change(c[0])]
            if changes:
                listed = "; ".join(f"{name} was {a!r} and is {b!r}" for name, a, b in changes)
                raise ConfigError(
                    f"{self.path} holds another run: {listed}. Restore these, or choose another --workdir."
                )
        elif self._tokenizer.exists():
            raise ConfigError(
                f"{self._tokenizer} exists, and {self._file}, which a run writes before it, does not; choose another --workdir."
            )

    def tokenizer(self, make: Callable[[], Tokenizer]) -> Tokenizer:
        """The tokenizer this run began with, or a new one."""
        return tokenizer_of(self.path) if self._tokenizer.exists() else make()

    def begin(self, tokenizer: Tokenizer, pretrained: models.Opened | None = None) -> None:
        """Writes the configuration, and the tokenizer where there is none; each is complete or absent.

        Beside the tokenizer goes the config.json of the pretrained model that the run begins with, if any.

        Raises:
          OSError: one of them cannot be written.
        """
        with writers.writing(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
        writers.write_json(self._file, self._identity)
        if not self._tokenizer.exists():
            with writers.writing(self._tokenizer):
                self._write_tokenizer(tokenizer, pretrained)

    def check_shared(self) -> None:
        """Of several processes, on those that do not `begin`: each writes its part of a checkpoint where the first one writes.

        Raises:
          ConfigError: the first process's directory is not seen here.
        """
        if not self._file.exists():
            raise ConfigError(
                f"{self.path} is not the directory of that name in which the first process has begun the run: the work directory has "
                "to lie where all processes see it."
            )

    def _write_tokenizer(self, tokenizer: Tokenizer, pretrained: models.Opened | None) -> None:
        scratch = self.path / "tokenizer.tmp"
        shutil.rmtree(scratch, ignore_errors=True)  # of a run that was killed here
        try:
            tokenizer.save(scratch)
        except Exception as e:
            if type(e) is Exception:  # as the tokenizers library says that a disk is full
                raise OSError(str(e)) from e
            raise
        if pretrained is not None and tokenizer is pretrained.tokenizer:
            for name, content in pretrained.files.items():
                (scratch / name).write_bytes(content)  # as it came: it says more than is used here
        if pretrained is not None:
            source = dict(pretrained.source)
            if tokenizer is not pretrained.tokenizer:
                source = {name: x for name, x in source.items() if not name.endswith("_token_id")}
            (scratch / "config.json").write_text(json.dumps(source, indent=2) + "\n")
        scratch.rename(self._tokenizer)


def tokenizer_of(path: pathlib.Path) -> Tokenizer:
    """The tokenizer that the run in this work directory began with.

    Raises:
      FileNotFoundError, ValueError: as `data.load_tokenizer`.
    """
    source, tokenizer = model_source(path), load_tokenizer(path / "tokenizer")
    return tokenizer if source is None else fitted(tokenizer, models.read_config(source).vocab_size)


def model_source(path: pathlib.Path) -> dict | None:
    """The config.json of the pretrained model that the run in this work directory began with; None without one."""
    file = path / "tokenizer" / "config.json"
    return read_json(file) if file.is_file() else None


def _may_change(name: str) -> bool:
    return any(f"{name}.".startswith(f"config.{field}.") for field in MAY_CHANGE)


def _differences(old, new, name: str = ""):
    """(field, old value, new value) of all leaves that differ."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in dict.fromkeys([*old, *new]):
            yield from _differences(old.get(key), new.get(key), f"{name}.{key}" if name else key)
    elif old != new:
        yield name, old, new

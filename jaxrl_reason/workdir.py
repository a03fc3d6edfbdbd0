"""The work directory's identity: which configuration, data and tokenizer a run began with."""

from collections.abc import Callable
import json
import os
import pathlib

from jaxrl_reason import config as config_lib
from jaxrl_reason.config import Config, ConfigError
from jaxrl_reason.data import Tokenizer, load_tokenizer

# What may differ when a run goes on: how long it is, what it writes, where it runs.
MAY_CHANGE = ("steps", "mesh", "checkpoint", "eval", "log")


class Workdir:
    """Opens or begins a work directory.

    A directory that was begun is only continued by the configuration and the data that began it, up to `MAY_CHANGE`.

    Args:
      path: the directory; made where it does not exist.
      config: the configuration to run.
      fingerprint: of the training data.

    Raises:
      ConfigError: the directory belongs to another configuration or other data; the message names every difference.
    """

    def __init__(self, path: str | os.PathLike, config: Config, fingerprint: str):
        self.path = pathlib.Path(path).expanduser().resolve()
        file = self.path / "config.json"
        new = json.loads(json.dumps({"config": config_lib.to_dict(config), "data_fingerprint": fingerprint}))
        if file.exists():
            try:
                old = json.loads(file.read_text())
            except ValueError as e:
                raise ConfigError(f"{file} is not valid JSON ({e}); restore it, or choose another --workdir.") from e
            changes = [
                c for c in _differences(old, new) if not c[0].startswith(tuple(f"config.{m}" for m in MAY_CHANGE))
            ]
            if changes:
                listed = "; ".join(f"{name} was {a!r} and is {b!r}" for name, a, b in changes)
                raise ConfigError(
                    f"{self.path} holds another run: {listed}. Restore these, or choose another --workdir."
                )
        self.path.mkdir(parents=True, exist_ok=True)
        replacement = file.with_suffix(".tmp")
        replacement.write_text(json.dumps(new, indent=2) + "\n")
        replacement.replace(file)

    def tokenizer(self, make: Callable[[], Tokenizer]) -> Tokenizer:
        """The tokenizer this run began with, or a new one, which is kept."""
        directory = self.path / "tokenizer"
        if not (directory / "tokenizer_config.json").exists():  # written last
            make().save(directory)
        return load_tokenizer(directory)


def _differences(old, new, name: str = ""):
    """(field, old value, new value) of all leaves that differ."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in dict.fromkeys([*old, *new]):
            yield from _differences(old.get(key), new.get(key), f"{name}.{key}" if name else key)
    elif old != new:
        yield name, old, new

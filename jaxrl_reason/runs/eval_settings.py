"""The settings of the evaluation before training: only evaluations with equal settings are compared."""

import dataclasses
import pathlib
from typing import Any

from jaxrl_reason.config import Config, Eval
from jaxrl_reason.models.formats.weights import read_json
from jaxrl_reason.runs.files import write_json

_FILE = "eval_settings.json"
_EARLIER = "evaluation.json"  # its name in work directories of earlier versions


def write(workdir: pathlib.Path, config: Config) -> None:
    """Writes the settings of the evaluation before training."""
    write_json(workdir / _FILE, _settings(config))


def are_those_of(workdir: pathlib.Path, config: Config) -> bool:
    """Returns whether the evaluation before training had the settings of the configuration; False if there was none."""
    return _before(workdir) == _settings(config)


def have_changed(workdir: pathlib.Path, config: Config) -> bool:
    """Returns whether there was an evaluation before training, with other settings."""
    return _before(workdir) not in (None, _settings(config))


def _before(workdir: pathlib.Path) -> dict[str, Any] | None:
    if (file := workdir / _FILE).exists():
        return read_json(file)
    found = read_json(file) if (file := workdir / _EARLIER).exists() else None
    return found if found and found.keys() <= vars(Eval()).keys() else None  # else results that `evaluate` wrote there


def _settings(config: Config) -> dict[str, Any]:
    return dataclasses.asdict(config.eval) | {"every": None}

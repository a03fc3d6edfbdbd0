"""The files that a run of a comparison reads, by their digests. Runs that name the same file have to read the same."""

from collections.abc import Mapping
import json
import pathlib
from typing import Any

from jaxrl_reason.config import ConfigError
from jaxrl_reason.runs.files import write_json

Inputs = Mapping[str, str]  # "data", "pairs" (of a reward model) or the name of a reward in a file -> digest
_FILE = "inputs.json"
_WORDS = {"data": "other data", "pairs": "other pairs for the reward model"}


def write(directory: pathlib.Path, inputs: Inputs) -> None:
    """Writes the inputs of a run to its directory."""
    write_json(directory / _FILE, inputs)


def read(directory: pathlib.Path) -> Inputs:
    """Returns the inputs of a run; {} if it has not begun, or is of an earlier version. Raises ConfigError for a damaged file."""
    file = directory / _FILE
    if not file.exists():
        return {}
    try:
        found = json.loads(file.read_bytes())
    except ValueError:
        found = None
    if not is_valid(found):
        raise ConfigError(f"{file} is damaged; remove its directory, and the run is made again.")
    return found


def is_valid(found: Any) -> bool:
    """Returns whether an object of a file maps names to digests."""
    return isinstance(found, dict) and all(isinstance(digest, str) for digest in found.values())


def check(directory: pathlib.Path, inputs: Inputs, title: str, others: Inputs) -> None:
    """Raises ConfigError if the inputs of the run in a directory differ from those of another run, of this title."""
    for name, digest in others.items():
        if inputs.get(name, digest) == digest:
            continue
        what = _WORDS.get(name, f"another file of the reward {name!r}")
        if title == str(directory):
            raise ConfigError(
                f"{directory} holds a run that began with {what}; restore the file, or remove the directory to begin the run again."
            )
        raise ConfigError(
            f"{directory} would have {what} than {title}, because a file has changed in the meantime; restore the file, or choose "
            "another work directory and another file of results."
        )

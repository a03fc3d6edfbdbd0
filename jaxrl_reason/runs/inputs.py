"""The files that a run of a comparison reads, by their digests. All seeds of a row have to read the same."""

from collections.abc import Iterable, Mapping
import json
import pathlib

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
        return dict(json.loads(file.read_bytes()))
    except (ValueError, TypeError) as e:
        raise ConfigError(f"{file} is damaged ({e}); remove the directory, and its run is made again.") from e


def check(directory: pathlib.Path, inputs: Inputs, others: Iterable[tuple[str, Inputs]]) -> None:
    """Raises ConfigError if the inputs of the run in a directory differ from those of another run: (its title, its inputs)."""
    for title, of_other in others:
        for name, digest in of_other.items():
            if inputs.get(name, digest) != digest:
                what = _WORDS.get(name, f"another file of the reward {name!r}")
                raise ConfigError(
                    f"{directory} would have {what} than {title}, because a file has changed in the meantime; restore the file, or "
                    "choose another work directory and another file of results."
                )

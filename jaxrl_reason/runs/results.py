"""The results of a comparison: one entry per row and seed, and files of entries.

An entry is a JSON object:

    {"row": "GRPO", "recipe": false, "seed": 3, "changes": {...}, "config": digest, "versions": {...}, "seconds": 81.2,
     "start_seconds": 60.1, "inputs": {}, "evaluations": [{"step": 0, "eval/accuracy": ...}, ...]}

Entries of regression runs also have "table", the name of the training table: such a comparison is over several tables.
The others have "accuracies", the accuracy of each held-out prompt at the last evaluation, and "prompts", a digest of
these prompts. "inputs" has digests of data files and reward files. Older entries lack all three.
A file of results holds one entry per line. Such a file is committed, and a comparison goes on from it.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
import hashlib
from importlib import metadata
import json
import pathlib
import platform
import sys
from typing import Any

import jax

import jaxrl_reason
from jaxrl_reason import config as config_lib
from jaxrl_reason.config import Config, ConfigError
from jaxrl_reason.data import PromptBatch
from jaxrl_reason.runs import inputs, read_metrics
from jaxrl_reason.runs.files import write_text
from jaxrl_reason.runs.metrics_file import HELD_OUT_ACCURACY

Entry = dict[str, Any]
# Fields that change no result, or are given next to the digest.
_NOT_DIGESTED = ("seed", "mesh", "checkpoint", "log", "compilation_cache", "data.data_dir")


def digest(config: Config, without: Sequence[str] = ()) -> str:
    """Returns a digest of the fields of a configuration that decide its results, up to the seed and the fields `without`.

    Only fields without their default value count, so results stay valid when a version adds a field. Of `versions`, an
    entry has the version whose defaults it used. A .gguf file counts by its name, wherever it is installed.
    """
    fields, defaults = (dict(leaves(config_lib.to_dict(c))) for c in (config, Config()))
    if config.model.path.endswith(".gguf"):
        fields["model.path"] = pathlib.PurePath(config.model.path).name
    ignored = tuple(f"{name}." for name in (*_NOT_DIGESTED, *without))
    chosen = {
        name: value
        for name, value in fields.items()
        if value != defaults.get(name) and not f"{name}.".startswith(ignored)
    }
    return hashlib.sha256(json.dumps(chosen, sort_keys=True).encode()).hexdigest()[:16]


def leaves(fields: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields (name, value) of the values that are no dicts; names of nested ones are joined by dots."""
    for key, value in fields.items():
        name = f"{prefix}.{key}" if prefix else key
        if isinstance(value, dict) and value:
            yield from leaves(value, name)
        else:
            yield name, value


def versions() -> dict[str, str]:
    """Returns the versions that can change the last bits of a result, and the kind of the devices."""
    found = {name: metadata.version(name) for name in ("jax", "jaxlib", "optax", "numpy")}
    ours = {"jaxrl_reason": jaxrl_reason.__version__, "python": platform.python_version()}
    return ours | found | {"device": jax.devices()[0].device_kind}


def evaluations(metrics_path: pathlib.Path, prefixes: tuple[str, ...]) -> list[dict[str, float]]:
    """Returns step and metrics of each evaluation of a run; names of metrics begin with one of the prefixes."""
    chosen = [
        {name: x for name, x in line.items() if name == "step" or name.startswith(prefixes)}
        for line in read_metrics(metrics_path)
    ]
    return [line for line in chosen if len(line) > 1]


def accuracies(directory: pathlib.Path, step: float) -> list[float]:
    """Returns the accuracy of each held-out prompt at a step of a run; [] if the run has not recorded it."""
    file = directory / HELD_OUT_ACCURACY
    lines = read_metrics(file) if file.exists() else []
    if not all("accuracy" in line for line in lines):
        raise ConfigError(f'{file} has a line without "accuracy"; remove the file, and the result has no accuracies.')
    return next((line["accuracy"] for line in reversed(lines) if line["step"] == step), [])


def digest_of_prompts(fingerprint: str, batches: Iterable[PromptBatch]) -> str:
    """Returns a digest of held-out prompts: the fingerprint of their data, wherever they are, and their rows in order."""
    rows = [int(row) for batch in batches for row in batch.prompt_ids[batch.weight > 0]]
    return hashlib.sha256(json.dumps([fingerprint, rows]).encode()).hexdigest()[:16]


def seconds(*metrics_paths: pathlib.Path) -> float:
    """Returns the seconds of all steps in these files of metrics; a missing file has none."""
    lines = [line for path in metrics_paths if path.exists() for line in read_metrics(path)]
    return round(sum(line.get("perf/step_seconds") or 0.0 for line in lines), 1)


def read(path: pathlib.Path) -> list[Entry]:
    """Returns the entries of a file of results; none if there is no file. Raises ConfigError for a directory or a damaged file."""
    entries = []
    if path.is_dir():
        raise ConfigError(f"The file of results is {str(path)!r}, which is a directory; name a file.")
    for number, line in enumerate(path.read_bytes().splitlines() if path.exists() else (), start=1):
        try:
            entry = json.loads(line, parse_constant=lambda _: None)  # NaN is unknown
            check(entry)
        except (ValueError, TypeError, LookupError, AttributeError) as e:
            raise ConfigError(f"Line {number} of {path} is no result of compare; repair or remove the line.") from e
        entries.append(entry)
    return entries


def check(entry: Entry) -> None:
    """Raises ValueError, TypeError, LookupError or AttributeError for what is no entry."""
    if type(entry["seed"]) is not int or not inputs.is_valid(entry.get("inputs", {})):
        raise TypeError("the seed is no whole number, or an input no digest")
    texts = (entry["row"], entry["config"], entry.get("table", ""))
    if not all(isinstance(x, str) for x in texts) or not isinstance(entry["recipe"], bool):
        raise TypeError("the row, the digest or the table is no text, or recipe neither true nor false")
    if not entry["evaluations"] or not all(isinstance(line["step"], int) for line in entry["evaluations"]):
        raise TypeError("there is no evaluation, or one without a step")
    numbers = [entry["seconds"], entry["start_seconds"], *entry.get("accuracies", ())]
    numbers += [x for line in entry["evaluations"] for x in line.values() if x is not None]
    if not all(isinstance(x, (int, float)) and abs(x) <= sys.float_info.max for x in numbers):
        raise ValueError("a value is not a finite number")
    entry["versions"].items()


def merge(path: pathlib.Path, new: Sequence[Entry]) -> None:
    """Writes entries to a file of results. An entry replaces an older one of the same table, row and seed.

    The recipe comes first, then the other rows in the order in which they came; the entries of a row are in the order
    of tables and seeds.
    """
    entries = {(table_of(entry), entry["row"], entry["seed"]): entry for entry in (*read(path), *new)}
    rows = list(dict.fromkeys(row for _, row, _ in entries))
    ordered = sorted(entries.values(), key=lambda e: (not e["recipe"], rows.index(e["row"]), table_of(e), e["seed"]))
    text = "".join(json.dumps(entry) + "\n" for entry in ordered)
    if not path.exists() or path.read_text() != text:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, text)


def table_of(entry: Entry) -> str:
    """Returns the training table of a regression run; "" for other runs."""
    return entry.get("table", "")


def table_name(config: Config) -> str:
    """Returns the training table that an entry of this configuration names; "" for text problems."""
    return config.data.train if config.regression.tokenizer else ""

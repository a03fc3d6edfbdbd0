"""Two evaluations of the same prompts: the difference per metric, paired by prompt, with its interval."""

from collections.abc import Mapping
import json
import pathlib
from typing import Any

import numpy as np
from rich.table import Table

from jaxrl_reason import metrics
from jaxrl_reason.config import ConfigError
from jaxrl_reason.runs.files import finite
from jaxrl_reason.tasks import evaluation
from jaxrl_reason.tasks.journal import FILE, whole_lines

Record = Mapping[str, Any]


def is_results(directory: pathlib.Path) -> bool:
    """Returns whether a directory holds the results of an evaluation."""
    return (directory / "evaluation.json").is_file() and not (directory / "config.json").is_file()


def read_record(directory: pathlib.Path, ours: Record) -> Record:
    """Returns the record in a directory of results, if it can be compared with ours.

    Raises ConfigError if the evaluation is not finished, if it lacks one of our sets, or if its prompts or its verdict are
    others.
    """
    place = f"--against={directory}"
    try:
        theirs = json.loads((directory / "evaluation.json").read_bytes())
        if not isinstance(theirs, dict):
            raise TypeError("it is no object")
        found = _by_set(theirs)
        for label, mine in _by_set(ours).items():
            if label not in found:
                raise ConfigError(f"{place} has no evaluation of {label or 'a single set'}; it has {', '.join(found)}.")
            other = found[label]
            if "metrics" not in other or not (_folder(directory, label) / FILE).is_file():
                raise ConfigError(
                    f"{place} is not finished, or predicts numbers; finish an evaluation with verdicts first."
                )
            _numbers(_folder(directory, label))
            for name, key in (("data", "fingerprint"), ("verdict", "")):
                a, b = ((x[name][key] if key else x[name]) for x in (mine, other))
                if a != b:
                    what = "other data" if key else f"another verdict ({b!r}, not {a!r})"
                    raise ConfigError(
                        f"{place} has {what} for {other['data']['name']}, so the prompts cannot be paired."
                    )
    except (ValueError, TypeError, KeyError, AttributeError) as e:
        if isinstance(e, ConfigError):
            raise
        raise ConfigError(f"{place}/evaluation.json is not that of an evaluation ({type(e).__name__}: {e}).") from e
    return theirs


def compare(ours: pathlib.Path, theirs: pathlib.Path, record: Record) -> dict[str, dict[str, Any]]:
    """Returns, per set of `record`, the differences of two directories of results: metric -> mean, low, high.

    `prompts` is the number of prompts that both have. Metrics are compared if both have them: not pass@8 with pass@4.
    """
    out: dict[str, dict[str, Any]] = {}
    for label in _by_set(record):
        mine, other = (_numbers(_folder(directory, label)) for directory in (ours, theirs))
        common = sorted(mine.keys() & other.keys())
        if not common:
            raise ConfigError(f"{ours} and {theirs} have no prompt of {label or 'the data'} in common.")
        out[label] = {"prompts": len(common)}
        for name in mine[common[0]]:
            if name in other[common[0]]:
                a, b = ([numbers[row][name] for row in common] for numbers in (mine, other))
                mean, low, high = metrics.paired_difference(a, b)
                means = {"this": float(np.mean(a)), "other": float(np.mean(b))}
                out[label][name] = means | {"difference": mean, "low": finite(low), "high": finite(high)}
    return out


def other_settings(ours: Record, theirs: Record) -> str:
    """Returns a sentence about the settings of sampling in which two evaluations differ; "" if they have the same."""
    parts = []
    for label, mine in _by_set(ours).items():
        other = _by_set(theirs)[label]
        differ = [f"{name} {mine[name]} and {other.get(name)}" for name in _SETTINGS if mine[name] != other.get(name)]
        parts += [f"{label} {', '.join(differ)}".strip()] if differ else []
    return f"This and the other evaluation differ in their settings: {'; '.join(parts)}." if parts else ""


_SETTINGS = ("samples", "temperature", "top_k", "top_p", "max_completion_length", "seed")


def table(differences: Mapping[str, Mapping[str, Any]], title: str) -> Table:
    """Returns the table of differences in percentage points."""
    out = Table("", "this", "other", "difference", "95 % interval", title=title)
    for label, found in differences.items():
        for name, x in found.items():
            if name != "prompts":
                interval = "" if x["low"] is None else f"{100 * x['low']:+.1f} to {100 * x['high']:+.1f}"
                cells = [f"{100 * x[side]:.1f} %" for side in ("this", "other")]
                out.add_row(
                    f"{label} {name}".strip().replace("_", " "), *cells, f"{100 * x['difference']:+.1f}", interval
                )
        out.add_section()
    return out


def _by_set(record: Record) -> Mapping[str, Record]:
    return record["sets"] if "sets" in record else {"": record}


def _folder(directory: pathlib.Path, label: str) -> pathlib.Path:
    return directory / label if label else directory


def _numbers(folder: pathlib.Path) -> dict[int, dict[str, float]]:
    """Returns row -> metrics of the prompt, from completions.jsonl. Raises ConfigError if completions are missing."""
    file, record = folder / FILE, json.loads((folder / "evaluation.json").read_bytes())
    lines = whole_lines(file)
    rows = list(dict.fromkeys(line["row"] for line in lines))
    expected = [(row, k) for row in rows for k in range(record["samples"])]
    if len(rows) != record["prompts"] or [(line["row"], line["sample"]) for line in lines] != expected:
        raise ConfigError(
            f"{file} has not {record['samples']} completions of each of {record['prompts']} prompts, as "
            "evaluation.json says; evaluate again."
        )
    found = evaluation.parsed(lines, len(rows))
    numbers = evaluation.per_prompt(found)
    return {int(row): {name: float(x[i]) for name, x in numbers.items()} for i, row in enumerate(found.positions)}

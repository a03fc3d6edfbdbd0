"""The results of a comparison: one entry per row and seed, their summary over seeds, and tables of documents.

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
import re
from typing import Any

import jax

import jaxrl_reason
from jaxrl_reason import config as config_lib
from jaxrl_reason.config import Config, ConfigError
from jaxrl_reason.data import PromptBatch
from jaxrl_reason.runs import pictures, read_metrics
from jaxrl_reason.runs.files import write_text
from jaxrl_reason.runs.metrics_file import HELD_OUT_ACCURACY
from jaxrl_reason.runs.statistics import difference_over_prompts, Estimate, estimate, paired_difference

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
    return round(sum(line.get("perf/step_seconds", 0.0) for line in lines), 1)


def read(path: pathlib.Path) -> list[Entry]:
    """Returns the entries of a file of results; none if there is no file. Raises ConfigError for a directory or a damaged file."""
    entries = []
    if path.is_dir():
        raise ConfigError(f"The file of results is {str(path)!r}, which is a directory; name a file.")
    for number, line in enumerate(path.read_bytes().splitlines() if path.exists() else (), start=1):
        try:
            entry = json.loads(line)
            entry["row"], entry["recipe"], entry["config"], entry["evaluations"][-1]["step"]
            if type(entry["seed"]) is not int:
                raise TypeError("the seed is no whole number")
        except (ValueError, TypeError, LookupError) as e:
            raise ConfigError(f"Line {number} of {path} is no result of compare; repair or remove the line.") from e
        entries.append(entry)
    return entries


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


def summarize(rows: Mapping[str, Mapping[Any, Entry]], recipe: str, prefixes: tuple[str, ...]) -> dict[str, Any]:
    """Returns the row "start", a row per other approach, and the given rows, each with its metrics.

    Args:
      rows: row -> seed -> entry. `recipe` names the row with which the others are compared.
      prefixes: the prefixes of the metrics of other approaches: "pointwise/r2" at step 0 is eval/r2 of the row "pointwise".

    Returns:
      row -> {metric: mean over seeds, None if it is unknown for all of them}, and in each row
      "half_width" {metric: of the 95 % interval of the mean, or None}, "seeds" {metric: {seed: value}},
      "difference" {metric: {"mean", "low", "high"}}, paired by seed, from the row `recipe`, with `OTHER_PROMPTS` among its
      metrics if all compared entries have accuracies of the same prompts, and for trained rows
      "runs" {seed: {"config", "versions", "seconds", "start_seconds"}}.
    """
    first = rows.get(recipe) or next(iter(rows.values()), {})
    before = {seed: entry["evaluations"][0] for seed, entry in first.items()}
    values: dict[str, dict[int, dict[str, float]]] = {"start": {s: _of_eval(line) for s, line in before.items()}}
    for seed, line in before.items():
        for name, value in line.items():
            if name.startswith(prefixes):
                kind, _, metric = name.partition("/")
                values.setdefault(kind.replace("_", " "), {}).setdefault(seed, {})[f"eval/{metric}"] = value
    for row, entries in rows.items():
        values[row] = {seed: _of_eval(entry["evaluations"][-1]) for seed, entry in entries.items()}
    summary = {row: _summary(of_row, values.get(recipe, {}) if row != recipe else {}) for row, of_row in values.items()}
    for row, entries in rows.items():
        kept = ("config", "versions", "seconds", "start_seconds")
        summary[row]["runs"] = {str(seed): {k: entry[k] for k in kept} for seed, entry in entries.items()}
        if row != recipe and (found := _over_prompts(entries, rows.get(recipe, {}))):
            summary[row]["difference"][OTHER_PROMPTS] = bounds(found)
    return summary


OTHER_PROMPTS = "eval/accuracy, other prompts"
OTHER_PROMPTS_NOTE = "The interval of 'accuracy, other prompts' is for other seeds and other prompts. The other intervals are for other seeds only."


def compared(rows: Mapping[str, Mapping[str, Any]], names: Sequence[str]) -> list[str]:
    """Returns the metrics `names`, and `OTHER_PROMPTS` if it is among the differences of a row."""
    is_known = any(OTHER_PROMPTS in row.get("difference", {}) for row in rows.values())
    return [*names, OTHER_PROMPTS] if is_known else list(names)


def _over_prompts(entries: Mapping[Any, Entry], others: Mapping[Any, Entry]) -> Estimate | None:
    """Returns the difference of the accuracies over seeds and prompts; None if some are missing, or of other prompts."""
    common = [seed for seed in entries if seed in others]
    prompts = {of_row[seed].get("prompts") for of_row in (entries, others) for seed in common}
    counts = {len(of_row[seed].get("accuracies") or ()) for of_row in (entries, others) for seed in common}
    if len(prompts) != 1 or None in prompts or len(counts) != 1:
        return None
    return difference_over_prompts(*({seed: x[seed]["accuracies"] for seed in common} for x in (entries, others)))


def _of_eval(line: Mapping[str, float]) -> dict[str, float]:
    return {name: value for name, value in line.items() if name.startswith("eval/")}


def _summary(row: Mapping[int, Mapping[str, float]], recipe: Mapping[int, Mapping[str, float]]) -> dict[str, Any]:
    """Returns means, intervals and differences of a row: seed -> metric -> value."""
    means: dict[str, Any] = {}
    half_widths: dict[str, float | None] = {}
    differences: dict[str, dict[str, float | None]] = {}
    seeds: dict[str, dict[str, float]] = {}
    for name in _names(row):
        known = _known(row, name)
        means[name], half_widths[name] = estimate(list(known.values()))[:2] if known else (None, None)
        seeds[name] = {str(seed): value for seed, value in known.items()}
        if difference := paired_difference(known, _known(recipe, name)):
            differences[name] = bounds(difference)
    return means | {"half_width": half_widths, "seeds": seeds, "difference": differences}


def _known(row: Mapping[int, Mapping[str, float | None]], name: str) -> dict[int, float]:
    return {seed: value for seed, metrics in row.items() if (value := metrics.get(name)) is not None}


def bounds(found: Estimate) -> dict[str, float | None]:
    """Returns mean, low and high end of an estimate for JSON; the ends are None without an interval."""
    if found.half_width is None:
        return {"mean": found.mean, "low": None, "high": None}
    return {"mean": found.mean, "low": found.mean - found.half_width, "high": found.mean + found.half_width}


def curves(rows: Mapping[str, Mapping[int, Entry]], metric: str) -> dict[str, dict[int, Estimate]]:
    """Returns row -> step -> the mean over seeds of a metric of the evaluations, of rows that have the metric."""
    found: dict[str, dict[int, Estimate]] = {}
    for row, entries in rows.items():
        values: dict[int, list[float]] = {}
        for entry in entries.values():
            for line in entry["evaluations"]:
                if line.get(metric) is not None:
                    values.setdefault(int(line["step"]), []).append(line[metric])
        if values:
            found[row] = {step: estimate(values[step]) for step in sorted(values)}
    return found


def markdown(entries: Sequence[Entry], metrics: Sequence[str], prefixes: tuple[str, ...]) -> str:
    """Returns a table of the entries of one comparison: a line per row, a column per metric, and the seeds below.

    With several training tables, the means are over tables, each the mean over seeds. Raises ValueError if a row has
    entries of several configurations of one training table, and if rows have different seeds.
    """
    by_table = _by_table(entries)
    recipe = next(entry["row"] for entry in entries if entry["recipe"])
    several = len(by_table) > 1
    rows = _means_over_seeds(by_table) if several else next(iter(by_table.values()))
    found = summarize(rows, recipe, prefixes)
    heads = [name.replace("_", " ") for name in metrics]
    lines = [f"| | {' | '.join(heads)} |", f"|{'---|' * (len(heads) + 1)}"]
    for row, values in found.items():
        names = [f"eval/{name}" for name in metrics]
        cells = [pictures.cell_with_interval(n, values.get(n), values["half_width"].get(n)) for n in names]
        lines.append(f"| {row} | {' | '.join(cells)} |")
        if values["difference"]:
            cells = [pictures.cell_of_difference(n, values["difference"].get(n)) for n in names]
            if several:
                cells = [
                    c + _higher(values["seeds"].get(n, {}), found[recipe]["seeds"].get(n, {}))
                    for n, c in zip(names, cells)
                ]
            lines.append(f"| {row}, difference to {recipe} | {' | '.join(cells)} |")
    seeds = sorted({entry["seed"] for entry in entries})
    took = estimate([entry["seconds"] for entry in entries]).mean / 60
    note = "Means ± half-widths of 95 % intervals (Student's t over seeds); differences [95 % interval] are paired by seed."
    one = "One seed, so there is no interval."
    listed = f"Seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))}."
    if several:
        listed = f"{len(by_table)} tables. {listed}"
        note = one = (
            "Means over the tables, each the mean over the seeds, ± half-widths of 95 % intervals (Student's t over tables). Differences "
            f"[95 % interval] are paired by table and seed, and followed by the number of tables on which the row is above {recipe}."
        )
    known = {row: x for row, values in found.items() if (x := values["difference"].get(OTHER_PROMPTS))}
    note = note if len(seeds) > 1 else one
    if known:
        texts = "; ".join(f"{row} {pictures.cell_of_difference(OTHER_PROMPTS, x)}" for row, x in known.items())
        note += f" Accuracy less that of {recipe}, with its 95 % interval for other seeds and other prompts: {texts}."
    return "\n".join([*lines, "", f"{listed} {note} {took:.1f} minutes per run of RL."])


def markdown_by_table(entries: Sequence[Entry], metrics: Sequence[str], prefixes: tuple[str, ...]) -> str:
    """Returns, for each metric, a line per training table, and a column per row: means over seeds with their intervals."""
    recipe = next(entry["row"] for entry in entries if entry["recipe"])
    lines: list[str] = []
    for metric in metrics:
        name = f"eval/{metric}"
        found = {table: summarize(rows, recipe, prefixes) for table, rows in _by_table(entries).items()}
        rows = dict.fromkeys(row for of_table in found.values() for row in of_table)
        lines += ["", f"| {metric.replace('_', ' ')} | {' | '.join(rows)} |", f"|{'---|' * (len(rows) + 1)}"]
        for table, of_table in found.items():
            columns = [of_table.get(row, {"half_width": {}}) for row in rows]
            cells = [pictures.cell_with_interval(name, c.get(name), c["half_width"].get(name)) for c in columns]
            lines.append(f"| {table.rpartition('/')[2]} | {' | '.join(cells)} |")
    return "\n".join(lines[1:])


def _by_table(entries: Iterable[Entry]) -> dict[str, dict[str, dict[int, Entry]]]:
    """Returns training table -> row -> seed -> entry; raises what `markdown` raises."""
    found: dict[str, dict[str, dict[int, Entry]]] = {}
    for entry in entries:
        found.setdefault(table_of(entry), {}).setdefault(entry["row"], {})[entry["seed"]] = entry
    for table, rows in found.items():
        of = f" of {table}" if table else ""
        for row, by_seed in rows.items():
            if len({entry["config"] for entry in by_seed.values()}) > 1:
                raise ValueError(f"The row {row!r}{of} has results of several configurations; run its old ones again.")
        if len({tuple(sorted(by_seed)) for by_seed in rows.values()}) != 1:
            raise ValueError(f"The rows {list(rows)}{of} have not the same seeds; run the missing ones.")
    if len({tuple(rows) for rows in found.values()}) != 1:
        raise ValueError(f"The tables {list(found)} have not the same rows; run the missing ones.")
    return found


def _means_over_seeds(by_table: Mapping[str, Mapping[str, Mapping[int, Entry]]]) -> dict[str, dict[str, Entry]]:
    """Returns row -> training table -> an entry whose first and last evaluations are the means over its seeds."""
    found: dict[str, dict[str, Entry]] = {}
    for table, rows in by_table.items():
        for row, entries in rows.items():
            ends = [{seed: entry["evaluations"][i] for seed, entry in entries.items()} for i in (0, -1)]
            means = [
                {name: estimate(list(known.values())).mean for name in _names(lines) if (known := _known(lines, name))}
                for lines in ends
            ]
            found.setdefault(row, {})[table] = next(iter(entries.values())) | {"evaluations": means}
    return found


def _names(lines: Mapping[int, Mapping[str, Any]]) -> Iterable[str]:
    return dict.fromkeys(name for line in lines.values() for name in line)


def _higher(values: Mapping[str, float], others: Mapping[str, float]) -> str:
    """Returns ", 7 of 10": on how many of the common tables the values are higher than the others; "" without any."""
    common = [table for table in values if table in others]
    return f", {sum(values[t] > others[t] for t in common)} of {len(common)}" if common else ""


_TABLE = re.compile(r"(<!-- results( by table)?: (\S+): ([^>]+) -->\n).*?(<!-- end of results -->)", re.DOTALL)


def with_tables(text: str, directory: pathlib.Path, prefixes: tuple[str, ...]) -> str:
    """Returns a document with its tables written anew, from the files of results in a directory.

    A table is between `<!-- results: NAME: METRIC, METRIC -->`, for NAME.jsonl, and `<!-- end of results -->`. "results by
    table" makes those of `markdown_by_table`. Raises ConfigError for a file that is missing or damaged, and ValueError
    for results that make no table.
    """

    def table(match: re.Match) -> str:
        path, write = directory / f"{match[3]}.jsonl", markdown_by_table if match[2] else markdown
        if not (entries := read(path)):
            raise ConfigError(f"The document names the results {match[3]!r}, and {path} has none.")
        metrics = [name.strip() for name in match[4].split(",")]
        return f"{match[1]}{write(entries, metrics, prefixes)}\n{match[5]}"

    return _TABLE.sub(table, text)

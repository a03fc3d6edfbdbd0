"""The summary of a comparison: the mean of each row over seeds, the difference to the recipe, and their intervals."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from jaxrl_reason.runs.results import Entry
from jaxrl_reason.runs.statistics import difference_over_prompts, Estimate, estimate, paired_difference

OTHER_PROMPTS = "eval/accuracy, other prompts"
OTHER_PROMPTS_NOTE = "The interval of 'accuracy, other prompts' is for other seeds and other prompts. The other intervals are for other seeds only."


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


def seeds_of(row: Mapping[str, Any]) -> int:
    """Returns the number of seeds of a row of `summarize`; 0 if it has no metric."""
    return max(map(len, row.get("seeds", {}).values()), default=0)


def headings(rows: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """Returns the heading of each row of `summarize`: its name, and its number of seeds if other rows have more."""
    most = max(map(seeds_of, rows.values()), default=0)
    count = {name: seeds_of(row) for name, row in rows.items()}
    return {name: name if n in (0, most) else f"{name} ({n} of {most} seeds)" for name, n in count.items()}


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
    for name in metrics_of(row):
        known = values_of(row, name)
        means[name], half_widths[name] = estimate(list(known.values()))[:2] if known else (None, None)
        seeds[name] = {str(seed): value for seed, value in known.items()}
        if difference := paired_difference(known, values_of(recipe, name)):
            differences[name] = bounds(difference)
    return means | {"half_width": half_widths, "seeds": seeds, "difference": differences}


def values_of(row: Mapping[int, Mapping[str, float | None]], name: str) -> dict[int, float]:
    """Returns seed -> the value of a metric, without the seeds that have none."""
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


def metrics_of(lines: Mapping[int, Mapping[str, Any]]) -> Iterable[str]:
    """Returns the metrics that any of the lines has."""
    return dict.fromkeys(name for line in lines.values() for name in line)

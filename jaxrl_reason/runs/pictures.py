"""The pictures and tables of a run: the learning curve, and the table of metrics before and after training."""

from collections.abc import Mapping, Sequence
import io
import math
import os
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
import numpy as np
from rich.table import Column, Table

from jaxrl_reason.runs.files import writing
from jaxrl_reason.runs.metrics_file import read_metrics

# Metrics that are shown with three places.
_FINE = ("entropy", "r2", "rmse", "spearman", "spread", "density", "f1", "error", "loss", "margin")


def plot_learning_curve(metrics_path: str | os.PathLike, out_png: str | os.PathLike, *, title: str) -> None:
    """Draws reward, its running mean and held-out accuracy (or R2) over steps; below them the mean completion length.

    Reads the metrics `reward`, `eval/accuracy` or `eval/r2`, and `completions/mean_length` of a metrics.jsonl. A curve
    without data is left out. Raises MetricsError for damaged metrics, and OSError for a file that is missing or cannot
    be written.
    """
    records = read_metrics(metrics_path)
    figure = Figure(figsize=(8, 6), layout="constrained")  # not pyplot: no global state, no display
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=[2, 1])
    steps, rewards = _series(records, "reward")
    if steps:
        top.plot(steps, rewards, linewidth=0.7, alpha=0.4, color="tab:blue", label="reward")
        window = max(1, len(rewards) // 20)
        label = f"reward, mean of the last {window} steps"
        top.plot(steps, _running_mean(rewards, window), color="tab:blue", label=label)
    for name, label in (("eval/accuracy", "held-out accuracy"), ("eval/r2", "held-out R2")):
        steps, values = _series(records, name)
        if steps:
            top.plot(steps, values, "o-", color="tab:orange", label=label)
    if top.lines:
        top.legend(loc="best")
    top.set(ylabel="reward, held-out metric", title=title)
    steps, lengths = _series(records, "completions/mean_length")
    if steps:
        bottom.plot(steps, lengths, color="tab:green")
    bottom.set(xlabel="step", ylabel="mean length (tokens)")
    for axis in (top, bottom):
        axis.grid(alpha=0.3)
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=120, format="png")
    with writing(out_png):
        Path(out_png).write_bytes(drawn.getvalue())


def summary_table(before: Mapping[str, float | None], after: Mapping[str, float | None]) -> Table:
    """Returns the table that ends a run: one row per metric with its value before, its value after and the change.

    Accuracy and pass@k are shares, shown in percent. NaN and a metric that only one side has are shown as a dash. If
    one of the arguments is empty, the table has only the column of the other. Rows are in the order of `before`;
    metrics of `after` alone follow.
    An argument is for instance {"eval/accuracy": .41, "eval/pass@4": .6, "eval/mean_length": 37.2}.
    """
    columns = {"before": bool(before), "after": bool(after), "change": bool(before and after)}
    table = Table("", *(Column(heading, justify="right") for heading, shown in columns.items() if shown))
    for name in dict.fromkeys([*before, *after]):
        old, new = (math.nan if (x := side.get(name)) is None else x for side in (before, after))
        change = cell(name, new - old, signed=True).replace("%", "points")
        cells = [c for c, shown in zip((cell(name, old), cell(name, new), change), columns.values()) if shown]
        table.add_row(name.rpartition("/")[2].replace("_", " "), *cells)
    return table


def cell(name: str, value: float | None, *, signed: bool = False) -> str:
    """Formats a metric for a table: accuracies in percent, small numbers with three places, a dash for NaN and None."""
    if value is None or math.isnan(value):
        return "-"
    short = name.rpartition("/")[2]
    sign = "+" if signed else ""
    if short.endswith(("accuracy", "vote")) or short.startswith(("pass@", "maj@", "avg@")):
        return f"{100 * value:{sign}.1f} %"
    return f"{value:{sign}.3f}" if short.endswith(_FINE) else f"{value:{sign}.1f}"


def _series(records: Sequence[Mapping[str, Any]], name: str) -> tuple[list[int], list[float]]:
    """Returns the steps and values of a metric, without the steps that lack it."""
    points = [(record["step"], record[name]) for record in records if record.get(name) is not None]
    return [step for step, _ in points], [value for _, value in points]


def _running_mean(values: Sequence[float], window: int) -> np.ndarray:
    """Returns the mean of the last `window` values at each place; of fewer values at the start."""
    sums = np.concatenate([[0.0], np.cumsum(values)])
    end = np.arange(1, len(values) + 1)
    begin = np.maximum(end - window, 0)
    return (sums[end] - sums[begin]) / (end - begin)

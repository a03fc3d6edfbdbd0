"""The pictures and tables of a run: the learning curve, and the table of metrics before and after training."""

from collections.abc import Iterable, Mapping, Sequence
import io
import math
import os
from pathlib import Path
import textwrap
from typing import Any

import numpy as np
import rich.console
from rich.table import Column, Table

from jaxrl_reason.runs.files import writing
from jaxrl_reason.runs.metrics_file import mean_over_all, read_metrics
from jaxrl_reason.runs.statistics import Estimate

# Metrics that are shown with three places.
_FINE = ("entropy", "r2", "rmse", "spearman", "spread", "density", "f1", "auc", "within", "error", "loss", "margin")

# How matplotlib draws a name of a directory, of data or of a row: a dollar sign in it begins no formula.
AS_IT_IS: dict[str, Any] = {"parse_math": False}


def plot_learning_curve(metrics_path: str | os.PathLike, out_png: str | os.PathLike, *, title: str) -> None:
    """Draws reward, its running mean and held-out accuracy (or R2) over steps; below them the mean completion length.

    The held-out metric has an axis of its own at the right, accuracy in percent. If all rewards are shares as well,
    both axes have the same scale. Reads the metrics `reward`, `eval/accuracy` or `eval/r2`, and
    `completions/mean_length` of a metrics.jsonl. A curve without data is left out. Raises MetricsError for damaged
    metrics, and OSError for a file that is missing or cannot be written.
    """
    from matplotlib.figure import Figure  # costs a fifth of a second; needed only at the end of a run

    records = read_metrics(metrics_path)
    figure = Figure(figsize=(8, 6), layout="constrained")  # not pyplot: no global state, no display
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=[2, 1])
    steps, rewards = _series(records, "reward")
    if steps:
        top.plot(steps, rewards, linewidth=0.7, alpha=0.4, color="tab:blue", label="reward")
        window = max(1, len(rewards) // 20)
        label = f"reward, mean of the last {window} steps"
        top.plot(steps, _running_mean(rewards, window), color="tab:blue", label=label, **_dots(steps))
    _draw_held_out(top, records)
    lines = [line for axis in figure.axes for line in axis.lines]
    if lines:
        top.legend(handles=lines, loc="best")
    top.set(ylabel="reward")
    top.set_title(title, **AS_IT_IS)
    steps, lengths = _series(records, "completions/mean_length")
    if steps:
        bottom.plot(steps, lengths, color="tab:green", **_dots(steps))
    bottom.set(xlabel="step", ylabel="mean length (tokens)")
    for axis in (top, bottom):
        axis.grid(alpha=0.3)
    _save(figure, out_png)


def _draw_held_out(rewards: Any, records: Sequence[Mapping[str, Any]]) -> None:
    """Draws held-out accuracy or R2 on a second axis, next to the axis of the rewards."""
    for name, label, factor in (("eval/accuracy", "held-out accuracy (%)", 100), ("eval/r2", "held-out R2", 1)):
        steps, values = _series(records, name)
        if not steps:
            continue
        right = rewards.twinx()
        right.plot(steps, [factor * value for value in values], "o-", color="tab:orange", label=label)
        right.set(ylabel=label)
        _, drawn = _series(records, "reward")
        if factor == 100 and all(0 <= reward <= 1 for reward in drawn):
            rewards.set_ylim(-0.05, 1.05)
            right.set_ylim(-5, 105)


def plot_comparison(
    curves: Mapping[str, Mapping[str, Mapping[int, Estimate]]], out_png: str | os.PathLike, *, title: str
) -> None:
    """Draws one plot per metric, and in each a curve per row: the mean over seeds with its 95 % interval as a band.

    `curves` are metric -> row -> step -> mean. A mean without an interval has no band. Raises OSError for a file that
    cannot be written.
    """
    from matplotlib.figure import Figure

    columns = min(len(curves), 3)
    rows = -(-len(curves) // columns)
    figure = Figure(figsize=(4.5 * columns, 3.2 * rows + 0.6), layout="constrained")
    figure.suptitle(title, **AS_IT_IS)
    plots = figure.subplots(rows, columns, squeeze=False).flat
    colors: dict[str, str] = {}  # a row has one color in all plots
    for (metric, of_rows), axis in zip(curves.items(), plots):
        percent = is_share(metric)
        for row, points in of_rows.items():
            color = colors.setdefault(row, f"C{len(colors)}")
            steps, factor = list(points), 100 if percent else 1
            means = np.array([points[step].mean for step in steps]) * factor
            halves = np.array([points[step].half_width or 0.0 for step in steps]) * factor
            axis.plot(steps, means, "o-", markersize=3, color=color, label=row)
            axis.fill_between(steps, means - halves, means + halves, color=color, alpha=0.2, linewidth=0)
        name = metric.removeprefix("eval/").replace("_", " ")
        axis.set(xlabel="step")
        axis.set_ylabel(f"{name} (%)" if percent else name, **AS_IT_IS)
        axis.grid(alpha=0.3)
    for axis in plots:  # places without a metric
        axis.set_axis_off()
    if curves:
        for text in figure.axes[0].legend(loc="best", fontsize="small").get_texts():
            text.set(**AS_IT_IS)
    _save(figure, out_png)


def _save(figure: Any, out_png: str | os.PathLike) -> None:
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=120, format="png")
    with writing(out_png):
        Path(out_png).write_bytes(drawn.getvalue())


def print_summary(
    console: rich.console.Console, before: Mapping[str, float | None], after: Mapping[str, float | None]
) -> None:
    """Prints the table that ends a run: one row per metric with its value before, its value after and the change.

    Accuracy and pass@k are shares, shown in percent. NaN and a metric that only one side has are shown as a dash. If
    one of the arguments is empty, the table has only the column of the other. Rows are in the order of `before`;
    metrics of `after` alone follow.
    An argument is for instance {"eval/accuracy": .41, "eval/pass@4": .6, "eval/mean_length": 37.2}.
    """
    names = list(dict.fromkeys([*before, *after]))
    columns: dict[str, list[str]] = {}
    if before:
        columns["before"] = [cell(name, before.get(name)) for name in names]
    if after:
        columns["after"] = [cell(name, after.get(name)) for name in names]
    if before and after:
        columns["change"] = [_change(name, before.get(name), after.get(name)) for name in names]
    print_table(console, [name.rpartition("/")[2].replace("_", " ") for name in names], columns)


def _change(name: str, old: float | None, new: float | None) -> str:
    change = math.nan if old is None or new is None else new - old
    return cell(name, change, signed=True).replace("%", "points")


def print_table(
    console: rich.console.Console, labels: Sequence[str], columns: Mapping[str, Sequence[str]], *, title: str = ""
) -> None:
    """Prints a table with one row per label and one column of cells per heading.

    Headings wrap, and cells do not. Columns that do not fit in the width of the terminal follow in another table below.
    """
    endless = console.options.update(width=10_000)
    natural_width = lambda chosen: console.measure(_table(labels, columns, chosen, title), options=endless).maximum
    rest = list(columns)
    while rest:
        count = len(rest)
        while count > 1 and natural_width(rest[:count]) > console.width:
            count -= 1
        console.print(_table(labels, columns, rest[:count], title))
        rest = rest[count:]


def _table(labels: Sequence[str], columns: Mapping[str, Sequence[str]], chosen: Sequence[str], title: str) -> Table:
    """Returns a table with the chosen ones of the columns."""
    table = Table(Column("", overflow="fold"), title=title or None)
    for heading in chosen:
        width = max(12, *map(len, columns[heading]))
        table.add_column(textwrap.fill(heading, width), justify="right", no_wrap=True, overflow="fold")
    for row in zip(labels, *(columns[heading] for heading in chosen)):
        table.add_row(*row)
    return table


def is_share(name: str) -> bool:
    """Returns whether a metric is a share, which tables and pictures show in percent: accuracies, pass@k, ..."""
    short = name.rpartition("/")[2]
    is_mean_of_verdicts = short.startswith(("pass@", "maj@", "avg@", "best_of_"))
    return is_mean_of_verdicts or short.partition(",")[0].endswith(("accuracy", "vote", "_ratio"))


def unit_note(names: Iterable[str]) -> str:
    """Returns a sentence about the unit of errors of predicted numbers; "" without such metrics."""
    predicts = any(name.rpartition("/")[2] == "rmse" for name in names)
    return "rmse and spread are in standard deviations of the training targets." if predicts else ""


def cell(name: str, value: float | None, *, signed: bool = False) -> str:
    """Formats a metric for a table: shares in percent, small numbers with three places, a dash for NaN and None.

    Numbers from ten thousand on have no places, and from a million on an exponent: one prediction with a wrong exponent
    can make an R2 of -5.65e+23.
    """
    if value is None or math.isnan(value):
        return "-"
    kind = name.rpartition("/")[2].partition("@")[0]  # r2@8 is r2 of 8 samples
    sign = "+" if signed else ""
    if is_share(name):
        return f"{100 * value:{sign}.1f} %"
    if abs(value) >= 1e6:
        return f"{value:{sign}.2e}"
    if abs(value) >= 1e4:
        return f"{value:{sign},.0f}"
    return f"{value:{sign}.3f}" if kind.endswith(_FINE) else f"{value:{sign}.1f}"


def cell_with_interval(name: str, mean: float | None, half_width: float | None) -> str:
    """Formats a mean and the half-width of its interval: "76.3 ± 1.2 %"; without an interval as `cell`."""
    if mean is None or half_width is None:
        return cell(name, mean)
    number, *unit = cell(name, mean).split(" ")
    return " ".join([number, "±", cell(name, half_width).split(" ")[0], *unit])


def cell_of_difference(name: str, difference: Mapping[str, float | None] | None) -> str:
    """Formats a difference {"mean", "low", "high"}: "+15.4 [+12.0, +18.8] points"; low and high may be None."""
    if difference is None:
        return "-"
    number, *unit = cell(name, difference["mean"], signed=True).replace("%", "points").split(" ")
    if difference["low"] is None:
        return " ".join([number, *unit])
    low, high = (cell(name, difference[end], signed=True).split(" ")[0] for end in ("low", "high"))
    return " ".join([f"{number} [{low}, {high}]", *unit])


def reward_text(metrics: Mapping[str, Any]) -> str:
    """Returns the mean reward of a step as text for the progress bar; a dash if no completion has a reward."""
    reward = mean_over_all(metrics, "reward")
    return "reward -" if reward is None else f"reward {reward:.3f}"


def _series(records: Sequence[Mapping[str, Any]], name: str) -> tuple[list[int], list[float]]:
    """Returns the steps and values of a metric, see `mean_over_all`, without the steps that lack it."""
    points = [(record["step"], x) for record in records if (x := mean_over_all(record, name)) is not None]
    return [step for step, _ in points], [value for _, value in points]


def _dots(steps: Sequence[int]) -> dict[str, str]:
    """Returns the marker of a curve: a line of one point cannot be seen."""
    return {"marker": "o"} if len(steps) == 1 else {}


def _running_mean(values: Sequence[float], window: int) -> np.ndarray:
    """Returns the mean of the last `window` values at each place; of fewer values at the start."""
    sums = np.concatenate([[0.0], np.cumsum(values)])
    end = np.arange(1, len(values) + 1)
    begin = np.maximum(end - window, 0)
    return (sums[end] - sums[begin]) / (end - begin)

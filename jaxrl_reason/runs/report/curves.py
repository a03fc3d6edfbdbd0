"""Curves of a run: its metrics by step, in charts, thinned to a few hundred points."""

from array import array
from collections.abc import Mapping, Sequence
import fnmatch
import math
from typing import Any, NamedTuple

import numpy as np

POINTS = 500  # per curve, at most


class Chart(NamedTuple):
    """A chart, and the metrics that it shows: names or shell patterns. A metric is shown in the first chart that fits."""

    title: str
    metrics: tuple[str, ...]
    unit: str = ""
    log: bool = False  # a logarithmic axis
    main: bool = True  # the other charts are folded at first


_STD = "standard deviations of the training targets"
_PERCENT = "%"  # the unit of shares: the page multiplies them by 100
CHARTS = (
    Chart("Reward", ("reward", "rewards/*/mean", "dynamic_sampling/reward")),
    Chart(
        "Held-out accuracy", ("eval/*accuracy", "eval/pass@*", "eval/maj@*", "eval/best_of_*", "eval/*vote"), _PERCENT
    ),
    Chart("Held-out fit", ("*/r2", "eval/*r2", "*/spearman", "eval/*spearman")),
    Chart("Held-out fit of 1 and 8 samples", ("eval/*r2@*", "eval/*spearman@*"), main=False),
    Chart(
        "Held-out error and spread",
        ("*/rmse", "eval/*rmse", "eval/spread"),
        _STD,
    ),
    Chart("Held-out error of 1 and 8 samples", ("eval/*rmse@*",), _STD, main=False),
    Chart("Completion length", ("*/mean_length", "completions/mean_terminated_length"), "tokens"),
    Chart("Entropy", ("entropy", "eval/entropy"), "nats per token"),
    Chart("Gradient norm", ("grad_norm",)),
    Chart("Time of a step by part", ("perf/step_seconds", "perf/step_seconds/*"), "s", log=True),
    Chart("Memory", ("perf/*memory_gib",), "GiB"),
    Chart("Shares", ("*_ratio", "frac_*", "clip_ratio/*", "rewards/*_rate"), _PERCENT, main=False),
    Chart("Speed", ("perf/*_tokens_per_s",), "tokens/s", main=False),
    Chart("Largest difference of sampler and trainer", ("sampling/logp_difference_max",), "nats", True, False),
    Chart("Loss", ("loss",), main=False),
    Chart("Learning rate", ("learning_rate",), main=False),
)


class Curves:
    """The metrics of a run, fed line by line."""

    def __init__(self) -> None:
        self._points: dict[str, tuple[array, array]] = {}  # metric -> steps, values

    def add(self, line: Mapping[str, Any]) -> None:
        """Adds a line of metrics.jsonl. Unknown values (null) are left out, and what is no number."""
        for name, value in line.items():
            if name != "step" and isinstance(value, (int, float)):
                if name not in self._points:
                    self._points[name] = array("q"), array("d")
                steps, values = self._points[name]
                steps.append(line["step"])
                values.append(value)

    def charts(self) -> list[dict[str, Any]]:
        """Returns the charts as JSON: title, unit, "log", "main", and "curves" of `thinned` metrics by name.

        Metrics that no chart of `CHARTS` names share one chart per prefix.
        """
        of_chart: dict[Chart, list[str]] = {chart: [] for chart in CHARTS}
        for name in sorted(self._points):
            fits = (c for c in CHARTS if any(fnmatch.fnmatchcase(name, pattern) for pattern in c.metrics))
            own = Chart(name.partition("/")[0].replace("_", " "), (), main=False)
            of_chart.setdefault(next(fits, own), []).append(name)
        return [
            {"title": chart.title, "unit": chart.unit, "log": chart.log, "main": chart.main}
            | {"curves": [{"name": name} | thinned(*self._points[name]) for name in names]}
            for chart, names in of_chart.items()
            if names
        ]

    def last(self, name: str) -> float | None:
        """Returns the last value of a metric; None if there is none."""
        return self._points[name][1][-1] if name in self._points else None

    def first(self, name: str) -> float | None:
        """Returns the first value of a metric; None if there is none."""
        return self._points[name][1][0] if name in self._points else None

    def begins(self, name: str) -> int | None:
        """Returns the step of the first value of a metric; None if there is none."""
        return self._points[name][0][0] if name in self._points else None

    def total(self, name: str) -> float:
        """Returns the sum of a metric over all steps."""
        return math.fsum(self._points[name][1]) if name in self._points else 0.0


def thinned(steps: Sequence[int], values: Sequence[float]) -> dict[str, list]:
    """Returns {"steps", "values"} of a curve with at most `POINTS` points, values with five digits.

    A longer curve has one point per 2, 5, 10, 20, ... steps: the last step and the mean of the values. "low" and "high"
    are then their least and their greatest.

    Example:
      >>> thinned([0, 1], [0.5, 2 / 3])
      {'steps': [0, 1], 'values': [0.5, 0.66667]}
    """
    x, y = np.asarray(steps), np.asarray(values)
    if len(x) <= POINTS:
        return {"steps": x.tolist(), "values": rounded(y)}
    width, factors = 1, [2, 2.5, 2]
    while (x[-1] - 1) // width - (x[0] - 1) // width >= POINTS:
        width = int(width * factors[0])
        factors = factors[1:] + factors[:1]
    begins = np.flatnonzero(np.diff((x - 1) // width, prepend=-math.inf))
    ends = np.append(begins[1:], len(x)) - 1
    means = np.add.reduceat(y, begins) / (ends - begins + 1)
    low, high = (rounded(f.reduceat(y, begins)) for f in (np.minimum, np.maximum))
    return {"steps": x[ends].tolist(), "values": rounded(means), "low": low, "high": high}


def rounded(values: Sequence[float] | np.ndarray) -> list[float]:
    """Returns numbers with five significant digits."""
    return [float(f"{x:.5g}") for x in values]

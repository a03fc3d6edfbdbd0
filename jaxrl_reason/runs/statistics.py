"""Means over seeds with 95 % intervals by Student's t, and differences that are paired by seed."""

from collections.abc import Mapping, Sequence
import math
from typing import NamedTuple

import numpy as np
from scipy import special

LEVEL = 0.95


class Estimate(NamedTuple):
    """A mean over seeds."""

    mean: float
    half_width: float | None  # of the 95 % interval; None if there is no interval
    seeds: int  # their number


def estimate(values: Sequence[float]) -> Estimate:
    """Returns the mean of independent values and the half-width of its 95 % interval, t * std1 / sqrt(n).

    There is no interval for one value, or for equal values: their spread of 0 is no estimate of the true one. Raises
    ValueError without values, and for a value that is not finite.

    Example:
      >>> [round(x, 3) for x in estimate([1.0, 2.0, 3.0])]
      [2.0, 2.484, 3]
    """
    x = np.asarray(values, np.float64)
    if not len(x) or not np.isfinite(x).all():
        raise ValueError(f"A mean needs finite values, and these are {list(values)}.")
    if len(x) < 2 or x.min() == x.max():
        return Estimate(float(x[0]), None, len(x))
    quantile = special.stdtrit(len(x) - 1, (1 + LEVEL) / 2)
    return Estimate(float(x.mean()), float(quantile * x.std(ddof=1) / math.sqrt(len(x))), len(x))


def paired_difference(values: Mapping[int, float], others: Mapping[int, float]) -> Estimate | None:
    """Returns the mean of values[seed] - others[seed] over the common seeds, with its interval; None without any.

    Example:
      >>> paired_difference({0: 3.0, 1: 5.0, 2: 9.0}, {0: 2.0, 1: 4.0})
      Estimate(mean=1.0, half_width=None, seeds=2)
    """
    common = [seed for seed in values if seed in others]
    return estimate([values[seed] - others[seed] for seed in common]) if common else None

"""Means over seeds with 95 % intervals by Student's t, and differences that are paired by seed, or by seed and prompt."""

from collections.abc import Mapping, Sequence
import math
from typing import NamedTuple

import numpy as np
from scipy import special

LEVEL = 0.95
_NOISE = 1e-12  # numbers that differ by less, relative to the largest, are equal up to rounding


class Estimate(NamedTuple):
    """A mean over seeds."""

    mean: float
    half_width: float | None  # of the 95 % interval; None if there is no interval
    seeds: int  # their number


def estimate(values: Sequence[float]) -> Estimate:
    """Returns the mean of independent values and the half-width of its 95 % interval, t * std1 / sqrt(n).

    There is no interval for one value, or for values that are equal up to rounding: their spread of 0 is no estimate of the
    true one. Raises ValueError without values, and for a value that is not finite.

    Example:
      >>> [round(x, 3) for x in estimate([1.0, 2.0, 3.0])]
      [2.0, 2.484, 3]
    """
    x = np.asarray(values, np.float64)
    if not len(x) or not np.isfinite(x).all():
        raise ValueError(f"A mean needs finite values, and these are {list(values)}.")
    if len(x) < 2 or np.ptp(x) <= _NOISE * max(1.0, np.abs(x).max()):
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


def difference_over_prompts(
    values: Mapping[int, Sequence[float]], others: Mapping[int, Sequence[float]]
) -> Estimate | None:
    """Returns the mean of values[seed][prompt] - others[seed][prompt], with its 95 % interval for other seeds and other prompts.

    All seeds share the prompts, so Student's t over seeds says nothing about other prompts. Here, seeds and prompts are
    two crossed random effects. The variance of the mean is estimated from the mean squares of an analysis of variance,
    (MS_seeds + max(MS_prompts - MS_rest, 0)) / (S P), with the degrees of freedom of Satterthwaite (1946), at least S - 1. If
    prompts do not differ more than by chance, this is the interval over seeds. Resampling seeds and prompts instead (bootstrap) would
    be too narrow for five seeds, and too wide for few samples per prompt.

    Args:
      values, others: per seed, a number for each of P prompts: the same prompts in the same order.

    Returns:
      None with fewer than two common seeds or prompts. An estimate without interval if the differences are equal, up to
      1e-5, or if their standard error is below 1e-6: their spread is no estimate of the true one, and accuracies are rounded.

    Example:
      >>> found = difference_over_prompts({0: [1.0, 0.5], 1: [1.0, 1.0]}, {0: [0.5, 0.5], 1: [0.5, 0.25]})
      >>> found.mean, round(found.half_width, 3), found.seeds
      (0.4375, 2.382, 2)
    """
    common = [seed for seed in values if seed in others]
    d = np.array([np.subtract(values[seed], others[seed], dtype=np.float64) for seed in common])
    if min(d.shape, default=0) < 2 or d.ndim < 2:
        return None
    (S, P), mean = d.shape, float(d.mean())
    by_seed, by_prompt = d.mean(axis=1, keepdims=True) - mean, d.mean(axis=0, keepdims=True) - mean
    sums = P * (by_seed**2).sum(), S * (by_prompt**2).sum(), ((d - mean - by_seed - by_prompt) ** 2).sum()
    freedom = np.array([S - 1, P - 1, (S - 1) * (P - 1)])
    squares = np.array(sums) / freedom
    if squares[1] <= squares[2]:
        squares[1:] = 0.0
    variance = squares @ (1, 1, -1) / (S * P)
    if np.ptp(d) < 1e-5 or variance < 1e-12:
        return Estimate(mean, None, S)
    degrees = max((variance * S * P) ** 2 / (squares**2 / freedom).sum(), S - 1)
    return Estimate(mean, float(special.stdtrit(degrees, (1 + LEVEL) / 2) * math.sqrt(variance)), S)

"""Means over seeds with 95 % intervals by Student's t, and differences that are paired by seed, or by seed and prompt."""

from collections.abc import Mapping, Sequence
import math
from typing import NamedTuple

import numpy as np
from scipy import special

from jaxrl_reason.metrics import Interval

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


def difference_over_prompts(
    values: Mapping[int, Sequence[float]], others: Mapping[int, Sequence[float]], *, resamples: int = 2000
) -> Interval | None:
    """Returns the mean of values[seed][prompt] - others[seed][prompt], with its 95 % interval over seeds and prompts.

    All seeds share the prompts, so Student's t over seeds says nothing about other prompts. Here, both the seeds and the
    prompts are resampled (percentile bootstrap of two crossed factors, Owen 2007). Few seeds, resampled, vary less than
    new ones would: read this interval beside that of `paired_difference`.

    Args:
      values, others: per seed, a number for each of N prompts: the same prompts in the same order.
      resamples: number of resampled means.

    Returns:
      None with fewer than two common seeds, if the numbers of prompts differ, and if all differences are equal: their
      spread of 0 is no estimate of the true one.

    Example:
      >>> difference_over_prompts({0: [1.0, 0.5], 1: [1.0, 0.5]}, {0: [0.0, 0.5], 1: [0.0, 0.5]})
      Interval(mean=0.5, low=0.0, high=1.0)
    """
    common = [seed for seed in values if seed in others]
    if len(common) < 2 or len({len(x[seed]) for x in (values, others) for seed in common}) > 1:
        return None
    d = np.array([np.subtract(values[seed], others[seed], dtype=np.float64) for seed in common])
    if d.min() == d.max():
        return None
    rng = np.random.default_rng(0)
    seeds, prompts = (rng.multinomial(n, np.full(n, 1 / n), size=resamples) for n in d.shape)  # how often each is drawn
    means = np.einsum("rs,sp,rp->r", seeds, d, prompts, optimize=True) / d.size
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(float(d.mean()), float(low), float(high))

"""Lengths of completions as they are in reasoning: most are short, few are long."""

import numpy as np


def skewed_lengths(P: int, G: int, T: int, mean: float) -> np.ndarray:
    """Returns tokens per completion, int[P, G]: the quantiles of an exponential distribution, cut at T, in a fixed random order.

    The mean of the uncut distribution is chosen such that the mean of the cut one is `mean`.

    Raises:
      ValueError: the mean is not between 1 and T.

    Example:
      >>> skewed_lengths(1, 8, 256, 64).mean()
      np.float64(64.0)
    """
    if not 1 <= mean <= T:
        raise ValueError(f"The mean length is {mean:g}; it must be between 1 and the {T} tokens of a completion.")
    quantiles = (np.arange(P * G) + 0.5) / (P * G)
    cut = lambda scale: np.clip(np.round(-scale * np.log1p(-quantiles)), 1, T).astype(int)
    low, high = 0.0, 2.0 * P * G * T  # beyond it all are cut
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (low, middle) if cut(middle).mean() > mean else (middle, high)
    return np.random.default_rng(0).permutation(cut(low)).reshape(P, G)

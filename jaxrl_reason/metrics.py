"""Metrics of a policy's answers: how often they are correct, how valuable, how sure and how close.

All functions but `token_confidence` run on the host in float64, on anything that numpy can read. A ratio with an empty
denominator is NaN, as each docstring states. They raise ValueError for different shapes, and for an argument outside
the range that its docstring states.
"""

from collections import defaultdict
from collections.abc import Hashable, Sequence
import math
import statistics
from typing import NamedTuple

import chex
import jax
from jax import Array
import jax.numpy as jnp
from jaxtyping import Float, Float64, Int64, Shaped
import numpy as np
from numpy.typing import ArrayLike

FloatArray = Float64[np.ndarray, "..."]


class Interval(NamedTuple):
    """A mean with its interval."""

    mean: float
    low: float
    high: float


def pass_at_k(n: ArrayLike, c: ArrayLike, k: ArrayLike) -> FloatArray | np.float64:
    """Computes the probability that at least one of k samples is correct, of n samples of which c are correct.

    1 - C(n-c, k) / C(n, k): the unbiased estimator for k samples drawn without replacement (Chen et al. 2021, arXiv
    2107.03374), as a product of ratios, so that nothing overflows.

    Args:
      n: number of samples, a whole number or an array of them; the three arguments broadcast.
      c, k: number of correct samples, 0 <= c <= n, and of samples drawn, 1 <= k <= n.

    Example:
      >>> print(pass_at_k(10, 3, [1, 5]).round(2))
      [0.3  0.92]
    """
    n, c, k = np.broadcast_arrays(*(_whole(name, x) for name, x in (("n", n), ("c", c), ("k", k))))
    _refuse((c < 0) | (c > n), "c, the number of correct samples, must be between 0 and n", n=n, c=c, k=k)
    _refuse((k < 1) | (k > n), "k, the number drawn, must be between 1 and n", n=n, c=c, k=k)
    none_correct = np.ones(n.shape)
    # Draw i is incorrect too. The product is exactly 0 once no incorrect sample is left.
    for i in range(k.max(initial=0)):
        none_correct = np.where(i < k, none_correct * np.maximum(n - c - i, 0) / np.maximum(n - i, 1), none_correct)
    return (1.0 - none_correct)[()]


def human_aligned_accuracy(correct: ArrayLike, values: ArrayLike) -> float:
    """Computes H-Acc of RLEV, arXiv 2510.20187: the value of correctly answered questions over that of all questions.

    Args:
      correct: [N], whether each question is answered correctly, or the share of its samples that are correct.
      values: [N], human values, finite and not negative. If they sum to 0, the result is NaN.

    Example:
      >>> round(human_aligned_accuracy([True, False, True], [0.1, 0.02, 0.03]), 3)
      0.867
    """
    correct, values = _pair("correct", correct, "values", values)
    _refuse(~(values >= 0) | np.isinf(values), "values must be finite and not negative", values=values)
    _refuse(~((correct >= 0) & (correct <= 1)), "correct must be between 0 and 1", correct=correct)
    return _ratio((correct * values).sum(), values.sum())


def value_density(correct: ArrayLike, values: ArrayLike, lengths: ArrayLike) -> float:
    """Computes RLEV's value density, arXiv 2510.20187: H-Acc in percent, per token of the mean length.

    `lengths` is [N], the tokens per completion; see `human_aligned_accuracy` for the other arguments. The result is NaN
    if the values or the lengths sum to 0.

    Example:
      >>> value_density([True, False], [0.5, 0.5], [5, 15])
      5.0
    """
    lengths, _ = _pair("lengths", lengths, "values", values)
    return _ratio(100.0 * human_aligned_accuracy(correct, values), lengths.sum() / max(lengths.size, 1))


def self_verification_f1(scores: ArrayLike, correct: ArrayLike, threshold: float = 0.5) -> float:
    """Computes LaSeR's F1 of a self-verifier, arXiv 2510.14943.

    This is the harmonic mean of its accuracy on correct and its accuracy on incorrect answers, not the F1 of precision
    and recall. The verifier calls an answer correct if its score exceeds the threshold. A NaN score, which a truncated
    completion has, calls it incorrect. Both arrays are [N]. The result is in [0, 1]: 0 if both accuracies are 0, NaN if
    all answers are correct or all are incorrect.

    Example:
      >>> round(self_verification_f1([0.9, 0.2, 0.7, 0.1], [True, True, False, False]), 2)
      0.5
    """
    scores, correct = _pair("scores", scores, "correct", correct)
    predicted, correct = scores > threshold, correct.astype(bool)
    on_correct = _ratio((predicted & correct).sum(), correct.sum())
    on_incorrect = _ratio((~predicted & ~correct).sum(), (~correct).sum())
    both_zero = on_correct == on_incorrect == 0
    return 0.0 if both_zero else 2 * on_correct * on_incorrect / (on_correct + on_incorrect)


def pair_accuracy(scores: ArrayLike, correct: ArrayLike) -> float:
    """Computes the share of pairs of a correct and an incorrect answer in which the correct one has the higher score.

    This is the area under the ROC curve (AUC). A tie counts one half.

    Args:
      scores: [N] or [P, K], of all answers, or of K answers to each of P prompts: then only answers to one prompt are
        pairs. An answer whose score is NaN is in no pair.
      correct: the same shape, whether each answer is correct. If no pair is left, the result is NaN.

    Example:
      >>> pair_accuracy([[0.9, 0.2], [0.3, 0.7], [0.8, 0.8]], [[1, 0], [1, 0], [1, 0]])
      0.5
    """
    scores, correct = _pair("scores", scores, "correct", correct)
    won, pairs = 0.0, 0
    for x, right in zip(np.atleast_2d(scores), np.atleast_2d(correct.astype(bool))):
        x, right = x[~np.isnan(x)], right[~np.isnan(x)]
        high, low = int(right.sum()), int((~right).sum())
        if high and low:  # Mann and Whitney (1947): the ranks of the correct ones, less those among themselves
            won, pairs = won + _average_ranks(x)[right].sum() - high * (high + 1) / 2, pairs + high * low
    return _ratio(won, pairs)


def regression_scores(predictions: ArrayLike, targets: ArrayLike) -> dict[str, float]:
    """Computes how close predicted numbers, [N] with N >= 1, come to their targets, [N]; all are finite.

    Returns {"rmse", "r2", "spearman"}. r2 is 1 - SSE / SST, NaN for constant targets. spearman is the correlation of
    average ranks, NaN if the predictions or the targets are constant.

    Example:
      >>> print(regression_scores([1.0, 2.0, 4.0], [1.0, 3.0, 5.0])["r2"])
      0.75
    """
    predictions, targets = _pair("predictions", predictions, "targets", targets)
    if predictions.size == 0:
        raise ValueError("There are no predictions to score; give at least one.")
    for name, x in (("predictions", predictions), ("targets", targets)):
        _refuse(~np.isfinite(x), f"{name} must be finite; replace unparsable ones by a number", **{name: x})
    squared_error = np.sum((predictions - targets) ** 2)
    ranks, target_ranks = (x - x.mean() for x in (_average_ranks(predictions), _average_ranks(targets)))
    # Equality identifies constant targets: their computed variance need not be exactly 0.
    spread = np.sum((targets - targets.mean()) ** 2) if np.ptp(targets) > 0 else 0.0
    return {
        "rmse": float(np.sqrt(squared_error / targets.size)),
        "r2": 1.0 - _ratio(squared_error, spread),
        "spearman": _ratio((ranks * target_ranks).sum(), np.sqrt((ranks**2).sum() * (target_ranks**2).sum())),
    }


def majority_vote(answers: Sequence[Hashable | None], weights: Sequence[float] | None = None) -> int | None:
    """Returns the position of the first sample with the winning answer: maj@k, self-consistency (arXiv 2203.11171).

    Args:
      answers: one per sample, equal if they count as the same answer; None does not vote. The first answer wins a tie.
        The result is None if no sample votes.
      weights: weights of the votes, not negative. None: 1 each.

    Example:
      >>> majority_vote(["7", "8", None, "8"])
      1
    """
    if weights is not None:
        _refuse(~(np.asarray(weights, float) >= 0), "weights must not be negative", weights=np.asarray(weights, float))
    votes: dict[Hashable, float] = defaultdict(float)
    for answer, weight in zip(answers, [1.0] * len(answers) if weights is None else weights, strict=True):
        if answer is not None:
            votes[answer] += weight
    return list(answers).index(max(votes, key=lambda answer: votes[answer])) if votes else None


def calibration_error(scores: ArrayLike, correct: ArrayLike, bins: int = 10) -> float:
    """Computes the expected calibration error, arXiv 1706.04599, eq. 3; NaN if there are no samples.

    This is the mean over samples of |mean score - accuracy| in the bin of the sample.

    Args:
      scores, correct: [N], predicted probabilities, clipped to [0, 1], and whether each answer is correct.
      bins: number of bins, of equal width.

    Example:
      >>> round(calibration_error([0.9, 0.9, 0.1], [True, False, False]), 2)
      0.3
    """
    scores, correct = _pair("scores", scores, "correct", correct)
    if not scores.size:
        return float("nan")
    _refuse(np.isnan(scores), "scores must be numbers", scores=scores)
    clipped = np.clip(scores, 0.0, 1.0)
    place = np.minimum((clipped * bins).astype(int), bins - 1)
    gaps = np.bincount(place, clipped - correct, minlength=bins)
    return float(np.abs(gaps).sum() / clipped.size)


def mean_by_quantile(x: ArrayLike, values: ArrayLike, parts: int = 5) -> Float64[np.ndarray, " parts"]:
    """Computes means of x over equal shares of the items, from the lowest values to the highest.

    The order of items changes nothing: items of one value belong in equal measure to all shares that they span
    together. Shares are equal even if `parts` does not divide the number of items.

    Args:
      x: [N], N >= 1.
      values: [N], the values that order the items, not NaN.
      parts: number of shares, at least 1.

    Example:
      >>> print(mean_by_quantile([10, 20, 30, 40], [4, 3, 2, 1], parts=2))
      [35. 15.]
    """
    x, values = _pair("x", x, "values", values)
    if x.ndim != 1 or x.size == 0:
        raise ValueError(f"x has shape {x.shape}; there must be a list of at least one item to take means of.")
    if parts < 1:
        raise ValueError(f"parts is {parts}; it must be at least 1.")
    _refuse(np.isnan(values), "values must be numbers", values=values)
    ordered, edges = np.sort(values), np.arange(parts + 1)[:, None] / parts
    first = np.searchsorted(ordered, values, "left") / x.size
    last = np.searchsorted(ordered, values, "right") / x.size
    overlap = np.minimum(last, edges[1:]) - np.maximum(first, edges[:-1])
    shares = np.maximum(overlap, 0.0) / (last - first)
    return (shares * x).sum(axis=1) / shares.sum(axis=1)


def bootstrap_interval(
    x: ArrayLike, *, level: float = 0.95, resamples: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """Computes the percentile bootstrap interval (low, high) of a mean (Efron 1979), from other draws of the items.

    Args:
      x: [N], N >= 1, one finite number per independent item: for accuracy, an item is a prompt, not a completion.
      level: share of the resampled means inside the interval, in (0, 1).
      resamples, seed: number of resampled means, and seed of the resampling.

    Example:
      >>> low, high = bootstrap_interval([0.0, 1.0, 1.0, 0.0, 1.0])
      >>> 0 <= low < 0.6 < high <= 1
      True
    """
    x = np.asarray(x, np.float64)
    if x.ndim != 1 or x.size == 0:
        raise ValueError(f"x has shape {x.shape}; there must be a list of at least one item to resample.")
    if not 0 < level < 1:
        raise ValueError(f"level is {level}; it must be between 0 and 1.")
    _refuse(~np.isfinite(x), "x must be finite", x=x)
    means = _resampled_means(x, resamples, np.random.default_rng(seed))
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _resampled_means(x: FloatArray, resamples: int, rng: np.random.Generator) -> FloatArray:
    distinct, counts = np.unique(x, return_counts=True)
    # How often each distinct number is drawn: much smaller than the draws themselves.
    return rng.multinomial(x.size, counts / x.size, size=resamples) @ distinct / x.size


_NOISE = 1e-12  # numbers that differ by less are equal up to rounding


def mean_over_sets(sets: Sequence[ArrayLike], *, level: float = 0.95, resamples: int = 2000, seed: int = 0) -> Interval:
    """Computes the mean accuracy over several sets, each with equal weight, and its bootstrap interval.

    The prompts of each set are resampled within the set. Equal prompts would be equal in every draw, and add no width: the
    mean m of n equal prompts is drawn from Beta(n m + 1/2, n (1 - m) + 1/2) instead (Jeffreys' interval). The interval
    always holds the mean.

    Args:
      sets: [N] each, N >= 1, the accuracy of each prompt, in [0, 1].
      level, resamples, seed: as in `bootstrap_interval`.

    Example:
      >>> mean_over_sets([[0.0, 1.0], [1.0, 1.0, 1.0]]).mean
      0.75
    """
    arrays, rng = [np.asarray(x, np.float64) for x in sets], np.random.default_rng(seed)
    for x in arrays:
        bootstrap_interval(x, level=level, resamples=1)  # refuses what cannot be resampled
        _refuse((x < 0) | (x > 1), "x must be accuracies between 0 and 1", x=x)
    mean = float(np.mean([x.mean() for x in arrays]))

    def draw(x: FloatArray) -> FloatArray:
        if np.ptp(x) < _NOISE:
            n, m = x.size, float(x.mean())
            return rng.beta(n * m + 0.5, n * (1 - m) + 0.5, size=resamples)
        return _resampled_means(x, resamples, rng)

    means = np.mean([draw(x) for x in arrays], axis=0)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    # The mean of Beta is nearer to 1/2 than m, so with many sets the quantiles alone may leave the mean out.
    return Interval(mean, min(float(low), mean), max(float(high), mean))


def paired_difference(x: ArrayLike, y: ArrayLike, *, level: float = 0.95) -> Interval:
    """Computes the mean of x - y over paired items, and its bootstrap interval: pairs are resampled, not items.

    The interval is NaN if all differences are equal up to rounding: other draws of them say nothing about other items.

    Args:
      x, y: [N], N >= 1, of the same items in the same order.
      level: as in `bootstrap_interval`.

    Example:
      >>> paired_difference([1.0, 0.5], [0.5, 0.0])
      Interval(mean=0.5, low=nan, high=nan)
    """
    x, y = _pair("x", x, "y", y)
    difference = x - y
    interval = bootstrap_interval(difference, level=level)
    if np.ptp(difference) < _NOISE:
        interval = (math.nan, math.nan)
    return Interval(float(difference.mean()), *interval)


def accuracy_interval(x: ArrayLike, *, level: float = 0.95) -> tuple[float, float]:
    """Computes an interval (low, high) of a mean accuracy over prompts.

    It is `bootstrap_interval`, or Wilson's score interval (1927) if all prompts have the same accuracy: other draws of
    equal numbers are equal, which says nothing about other prompts.

    Args:
      x: [N], N >= 1, the accuracy of each prompt, in [0, 1].
      level: share of such intervals that hold the mean, in (0, 1).

    Example:
      >>> print([round(x, 3) for x in accuracy_interval([0.0, 0.0, 0.0, 0.0])])
      [0.0, 0.49]
    """
    x = np.asarray(x, np.float64)
    low, high = bootstrap_interval(x, level=level)
    _refuse((x < 0) | (x > 1), "x must be accuracies between 0 and 1", x=x)
    if x.min() < x.max():
        return low, high
    n, mean, z2 = x.size, float(x[0]), statistics.NormalDist().inv_cdf((1 + level) / 2) ** 2
    center, half = mean + z2 / (2 * n), math.sqrt(z2 * (mean * (1 - mean) + z2 / (4 * n)) / n)
    return min((center - half) / (1 + z2 / n), mean), min(max((center + half) / (1 + z2 / n), mean), 1.0)


def token_confidence(
    logprobs: Float[Array, "*batch T"], mask: Shaped[Array, "*batch T"], fraction: float = 0.2
) -> Float[Array, "*batch"]:
    """Computes c(o|q) of ProGRPO, arXiv 2602.05281: exp of the mean log-probability of the least probable tokens.

    Of n unmasked tokens the ceil(fraction * n) with the lowest log-probability count, at least one. With fraction 1 the
    result is the inverse perplexity, which is c(q) for prompt tokens. Traceable; no gradient flows.

    Args:
      logprobs, mask: log-probabilities, and nonzero on unmasked tokens; masked tokens may hold NaN. Raises AssertionError
        for different shapes.
      fraction: a Python number in (0, 1].

    Returns:
      float32. 0 for a row without an unmasked token (padding: finite, so that it can be masked later). NaN if an unmasked
      log-probability is NaN.

    Example:
      >>> print(token_confidence(jnp.log(jnp.array([0.9, 0.25, 0.8])), jnp.ones(3)).round(2))
      0.25
    """
    if not 0 < fraction <= 1:
        raise ValueError(f"fraction is {fraction}; it must be in (0, 1].")
    logprobs, mask = jnp.asarray(logprobs), jnp.asarray(mask)
    chex.assert_equal_shape([logprobs, mask])
    live = mask != 0
    # Ascending, dead tokens last. Ties are in order of position, which does not change the mean.
    lowest = jnp.sort(jnp.where(live, jax.lax.stop_gradient(logprobs).astype(jnp.float32), jnp.inf), axis=-1)
    # How many count, for every possible n. Rounded before the ceil: 0.07 * 100 is 7.000000000000001 and means 7.
    table = np.ceil(np.round(fraction * np.arange(logprobs.shape[-1] + 1), 9))
    count = jnp.asarray(np.maximum(table, 1), jnp.int32)[live.sum(axis=-1)]
    counted = jnp.arange(logprobs.shape[-1]) < count[..., None]
    confidence = jnp.exp(jnp.where(counted, lowest, 0.0).sum(axis=-1) / count)
    confidence = jnp.where(live.any(axis=-1), confidence, 0.0)
    # The sort puts NaN after the dead tokens, so the sum does not contain it.
    return jnp.where((jnp.isnan(logprobs) & live).any(axis=-1), jnp.nan, confidence)


def _whole(name: str, x: ArrayLike) -> Int64[np.ndarray, "..."]:
    x = np.asarray(x)
    if not np.issubdtype(x.dtype, np.number) or not np.all(np.equal(x, np.floor(x))):
        raise ValueError(f"{name} is {x}; it must be a whole number, or an array of them.")
    return x.astype(np.int64)


def _pair(name: str, x: ArrayLike, other_name: str, other: ArrayLike) -> tuple[FloatArray, FloatArray]:
    x, other = np.asarray(x, np.float64), np.asarray(other, np.float64)
    if x.shape != other.shape:
        raise ValueError(f"{name} has shape {x.shape} and {other_name} has shape {other.shape}; they must be the same.")
    return x, other


def _refuse(invalid: np.ndarray, rule: str, **arrays: np.ndarray) -> None:
    """Raises ValueError if an entry is invalid, with the first such entry of each array."""
    if invalid.any():
        index = tuple(np.argwhere(invalid)[0])
        place = f" at index {tuple(map(int, index))}" if index else ""
        raise ValueError(f"{rule}; {', '.join(f'{name} is {x[index]}' for name, x in arrays.items())}{place}.")


def _ratio(numerator: float | np.integer, denominator: float | np.integer) -> float:
    return float(numerator / denominator) if denominator != 0 else float("nan")


def _average_ranks(x: FloatArray) -> FloatArray:
    _, inverse, counts = np.unique(x, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)  # the highest rank among equals, counted from 1
    return (last - (counts - 1) / 2)[inverse.reshape(x.shape)]

"""Figures of merit: how often, how valuably, how surely and how closely the answers are right.

All but `token_confidence` run on the host in float64, on anything numpy can read. A ratio whose denominator is empty is NaN, as each
docstring says; inputs that cannot be meant raise ValueError.
"""

from collections import Counter
from collections.abc import Hashable, Sequence

import chex
import jax
import jax.numpy as jnp
import numpy as np


def pass_at_k(n, c, k):
    """The chance that at least one of k samples, drawn without replacement from n of which c are correct, is correct.

    1 - C(n-c, k) / C(n, k), the unbiased estimator of Chen et al. 2021 (arXiv 2107.03374), as a product of ratios so that nothing
    overflows.

    Args:
      n: number of samples, int scalar or array.
      c: number of correct ones, 0 <= c <= n.
      k: number drawn, 1 <= k <= n. The three broadcast.

    Returns:
      float64 of the broadcast shape, a scalar for scalars.

    Raises:
      ValueError: a number is not whole or out of its range.
    """
    n, c, k = np.broadcast_arrays(*(_whole(name, x) for name, x in (("n", n), ("c", c), ("k", k))))
    _refuse((c < 0) | (c > n), "c, the number of correct samples, must lie between 0 and n", n=n, c=c, k=k)
    _refuse((k < 1) | (k > n), "k, the number drawn, must lie between 1 and n", n=n, c=c, k=k)
    all_wrong = np.ones(n.shape)
    for i in range(
        k.max(initial=0)
    ):  # the i-th draw is wrong too; reaches exactly 0 once the wrong samples are used up
        all_wrong = np.where(i < k, all_wrong * np.maximum(n - c - i, 0) / np.maximum(n - i, 1), all_wrong)
    return (1.0 - all_wrong)[()]


def human_aligned_accuracy(correct, values):
    """H-Acc of RLEV (arXiv 2510.20187): the human value of the correctly answered questions over that of all questions.

    Args:
      correct: bool[N], or the share of a question's samples that are correct.
      values: float[N], not negative.

    Returns:
      A float in [0, 1]; NaN where the values sum to 0.

    Raises:
      ValueError: shapes differ, or a value is negative or not finite.
    """
    correct, values = _pair("correct", correct, "values", values)
    _refuse(~(values >= 0) | np.isinf(values), "values must be finite and not negative", values=values)
    return _ratio((correct * values).sum(), values.sum())


def value_density(correct, values, lengths):
    """H-Acc in percent per token of mean response length (RLEV).

    Args:
      correct: bool[N].
      values: float[N], not negative.
      lengths: number[N], completion lengths in tokens.

    Returns:
      A float; NaN where the values or the lengths sum to 0.

    Raises:
      ValueError: as `human_aligned_accuracy`, and for lengths of another shape.
    """
    lengths, _ = _pair("lengths", lengths, "values", values)
    return _ratio(100.0 * human_aligned_accuracy(correct, values), lengths.sum() / max(lengths.size, 1))


def self_verification_f1(scores, correct, threshold=0.5):
    """The harmonic mean of a self-verifier's accuracy on truly correct and on truly wrong answers (LaSeR, arXiv 2510.14943).

    An answer is predicted correct iff its score exceeds the threshold; a NaN score (a truncated completion has none) predicts wrong.

    Args:
      scores: float[N].
      correct: bool[N].
      threshold: a number.

    Returns:
      A float in [0, 1]; 0 where both accuracies are 0, NaN where there is no correct or no wrong answer to be accurate on.

    Raises:
      ValueError: shapes differ.
    """
    scores, correct = _pair("scores", scores, "correct", correct)
    predicted, correct = scores > threshold, correct.astype(bool)
    on_correct = _ratio((predicted & correct).sum(), correct.sum())
    on_wrong = _ratio((~predicted & ~correct).sum(), (~correct).sum())
    if on_correct == on_wrong == 0:
        return 0.0
    return 2 * on_correct * on_wrong / (on_correct + on_wrong)


def regression_scores(predictions, targets):
    """How close predicted numbers come.

    Args:
      predictions: float[N], N >= 1.
      targets: float[N].

    Returns:
      {"rmse", "r2", "spearman"}, floats. r2 is 1 - SSE / SST, NaN for constant targets; spearman is the correlation of average ranks,
      NaN where either side is constant.

    Raises:
      ValueError: shapes differ, nothing to score, or a number is not finite.
    """
    predictions, targets = _pair("predictions", predictions, "targets", targets)
    if predictions.size == 0:
        raise ValueError("There are no predictions to score; give at least one.")
    for name, x in (("predictions", predictions), ("targets", targets)):
        _refuse(
            ~np.isfinite(x), f"{name} must be finite; decide beforehand what stands for an unparsable one", **{name: x}
        )
    squared_error = np.sum((predictions - targets) ** 2)
    ranks, target_ranks = (x - x.mean() for x in (_average_ranks(predictions), _average_ranks(targets)))
    # Constant targets are told by equality: their computed variance need not be exactly 0.
    spread = np.sum((targets - targets.mean()) ** 2) if np.ptp(targets) > 0 else 0.0
    return {
        "rmse": float(np.sqrt(squared_error / targets.size)),
        "r2": 1.0 - _ratio(squared_error, spread),
        "spearman": _ratio((ranks * target_ranks).sum(), np.sqrt((ranks**2).sum() * (target_ranks**2).sum())),
    }


def majority_vote(answers: Sequence[Hashable | None], weights: Sequence[float] | None = None) -> int | None:
    """The position of the first sample that gave the winning answer: maj@k, or self-consistency (arXiv 2203.11171).

    Args:
      answers: one a sample, equal where they count as the same; None does not vote. Of equal sums the first seen wins.
      weights: of the votes, not negative; None: 1 each.

    Returns:
      An index into `answers`, or None where nobody votes.
    """
    votes = Counter()
    for answer, weight in zip(answers, [1] * len(answers) if weights is None else weights, strict=True):
        if answer is not None:
            votes[answer] += weight
    return list(answers).index(max(votes, key=votes.get)) if votes else None


def calibration_error(scores, correct, bins=10):
    """Expected calibration error (arXiv 1706.04599, eq. 3): how far scores in [0, 1] are from the accuracy they promise.

    Args:
      scores: float[N], clipped to [0, 1].
      correct: [N], 1 where right.
      bins: of equal width.

    Returns:
      The mean over samples of |mean score - accuracy| of a sample's bin; NaN for none.
    """
    scores, correct = _pair("scores", scores, "correct", correct)
    if not scores.size:
        return float("nan")
    scores = np.clip(scores, 0.0, 1.0)
    place = np.minimum((scores * bins).astype(int), bins - 1)
    gaps = np.bincount(place, scores - correct, minlength=bins)
    return float(np.abs(gaps).sum() / scores.size)


def mean_by_quantile(x, values, parts=5):
    """Means of x over equal shares of the items, from those of the lowest value to those of the highest.

    Items of one value are interchangeable: each belongs in equal measure to all the shares that they span together, so the order of
    the items changes nothing, and shares are equal where `parts` does not divide their number.

    Args:
      x: number[N], N >= 1.
      values: number[N], what the items are ordered by.
      parts: the number of shares, at least 1.

    Returns:
      float64[parts].

    Raises:
      ValueError: shapes differ, there are no items, a value is NaN, or `parts` is below 1.
    """
    x, values = _pair("x", x, "values", values)
    if x.ndim != 1 or x.size == 0:
        raise ValueError(f"x has shape {x.shape}; there must be a list of at least one item to take means of.")
    if parts < 1:
        raise ValueError(f"parts is {parts}; it must be at least 1.")
    _refuse(np.isnan(values), "values must be numbers", values=values)
    ordered, edges = np.sort(values), np.arange(parts + 1)[:, None] / parts
    first, last = (np.searchsorted(ordered, values, side) / x.size for side in ("left", "right"))
    overlap = np.minimum(last, edges[1:]) - np.maximum(first, edges[:-1])
    shares = np.maximum(overlap, 0.0) / (last - first)
    return (shares * x).sum(axis=1) / shares.sum(axis=1)


def bootstrap_interval(x, *, level=0.95, resamples=2000, seed=0):
    """The percentile bootstrap interval of a mean (Efron 1979): what other draws of the items could have given.

    Args:
      x: float[N], N >= 1, one number an independent item: for accuracy a prompt, not a completion.
      level: the share of the resampled means inside, in (0, 1).
      resamples: how many means are resampled.
      seed: of the resampling.

    Returns:
      (low, high), floats.

    Raises:
      ValueError: no items, or one that is not finite; or `level` is out of range.
    """
    x = np.asarray(x, np.float64)
    if x.ndim != 1 or x.size == 0:
        raise ValueError(f"x has shape {x.shape}; there must be a list of at least one item to resample.")
    if not 0 < level < 1:
        raise ValueError(f"level is {level}; it must lie between 0 and 1.")
    _refuse(~np.isfinite(x), "x must be finite", x=x)
    distinct, counts = np.unique(x, return_counts=True)
    # How often each distinct number is drawn: much smaller than the draws themselves.
    drawn = np.random.default_rng(seed).multinomial(x.size, counts / x.size, size=resamples)
    low, high = np.quantile(drawn @ distinct / x.size, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def token_confidence(logprobs: jax.Array, mask: jax.Array, fraction: float = 0.2) -> jax.Array:
    """exp of the mean log-probability over the least probable tokens: c(o|q) of ProGRPO (arXiv 2602.05281).

    Of n live tokens the ceil(fraction * n) with the lowest log-probability count, at least one. With fraction 1 it is the inverse
    perplexity, c(q) when applied to prompt tokens. Traceable; the result carries no gradient.

    Args:
      logprobs: float[..., T]; anything, NaN included, where the mask is 0.
      mask: [..., T], nonzero on live tokens.
      fraction: a Python number in (0, 1].

    Returns:
      float32[...]. 0 where no token is live (such a row is padding: finite, so that it can be masked out afterwards); NaN where a live
      log-probability is NaN.

    Raises:
      ValueError: fraction is out of range.
      AssertionError: shapes differ.
    """
    if not 0 < fraction <= 1:
        raise ValueError(f"fraction is {fraction}; it must lie in (0, 1].")
    logprobs, mask = jnp.asarray(logprobs), jnp.asarray(mask)
    chex.assert_equal_shape([logprobs, mask])
    live = mask != 0
    # Ascending, dead tokens last. Ties come in order of position, which the mean does not see.
    lowest = jnp.sort(jnp.where(live, jax.lax.stop_gradient(logprobs).astype(jnp.float32), jnp.inf), axis=-1)
    # How many count, for every possible n. Rounded before the ceil: 0.07 * 100 is 7.000000000000001 and means 7.
    table = np.ceil(np.round(fraction * np.arange(logprobs.shape[-1] + 1), 9))
    count = jnp.asarray(np.maximum(table, 1), jnp.int32)[live.sum(axis=-1)]
    counted = jnp.arange(logprobs.shape[-1]) < count[..., None]
    confidence = jnp.exp(jnp.where(counted, lowest, 0.0).sum(axis=-1) / count)
    confidence = jnp.where(live.any(axis=-1), confidence, 0.0)
    # A NaN sorts behind the dead tokens, where it would go unnoticed.
    return jnp.where((jnp.isnan(logprobs) & live).any(axis=-1), jnp.nan, confidence)


def _whole(name: str, x) -> np.ndarray:
    x = np.asarray(x)
    if not np.issubdtype(x.dtype, np.number) or not np.all(np.equal(x, np.floor(x))):
        raise ValueError(f"{name} is {x}; it must be a whole number, or an array of them.")
    return x.astype(np.int64)


def _pair(name: str, x, other_name: str, other) -> tuple[np.ndarray, np.ndarray]:
    x, other = np.asarray(x, np.float64), np.asarray(other, np.float64)
    if x.shape != other.shape:
        raise ValueError(f"{name} has shape {x.shape} and {other_name} has shape {other.shape}; they must be the same.")
    return x, other


def _refuse(wrong: np.ndarray, rule: str, **arrays: np.ndarray) -> None:
    if wrong.any():
        index = tuple(np.argwhere(wrong)[0])
        place = f" at index {tuple(map(int, index))}" if index else ""
        raise ValueError(f"{rule}; {', '.join(f'{name} is {x[index]}' for name, x in arrays.items())}{place}.")


def _ratio(numerator, denominator) -> float:
    return float(numerator / denominator) if denominator != 0 else float("nan")


def _average_ranks(x: np.ndarray) -> np.ndarray:
    _, inverse, counts = np.unique(x, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)  # the highest rank among equals, counted from 1
    return (last - (counts - 1) / 2)[inverse.reshape(x.shape)]

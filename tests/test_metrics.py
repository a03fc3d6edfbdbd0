"""Tests metrics against numbers by hand, brute force and scipy, which jax depends on."""

from fractions import Fraction
import itertools
import math
import random

from hypothesis import given, settings
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from jaxrl_reason import metrics


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 9), st.data())
def test_pass_at_k_is_the_share_of_subsets_with_a_correct_sample(n, data):
    c, k = data.draw(st.integers(0, n)), data.draw(st.integers(1, n))
    subsets = list(itertools.combinations([1] * c + [0] * (n - c), k))
    assert metrics.pass_at_k(n, c, k) == pytest.approx(np.mean([any(subset) for subset in subsets]))


@given(st.integers(1, 2000), st.data())
def test_pass_at_k_is_exact_even_if_binomials_overflow(n, data):
    c, k = data.draw(st.integers(0, n)), data.draw(st.integers(1, n))
    exact = 1 - math.comb(n - c, k) / math.comb(n, k)
    assert metrics.pass_at_k(n, c, k) == pytest.approx(exact, abs=1e-12)


def test_pass_at_k_broadcasts():
    assert metrics.pass_at_k(10, 3, 5) == pytest.approx(0.916667, abs=1e-6)
    values = metrics.pass_at_k(4, np.array([[0], [1], [4]]), jnp.array([1, 2]))
    np.testing.assert_allclose(values, [[0, 0], [0.25, 0.5], [1, 1]])
    assert values.dtype == np.float64
    assert metrics.pass_at_k(np.zeros(0, int), 0, 1).shape == (0,)


@pytest.mark.parametrize(
    "n, c, k, message",
    [
        (4, 1, 5, "k, the number drawn.*n is 4, c is 1, k is 5"),
        (4, 1, 0, "k, the number drawn"),
        (4, 5, 1, "c, the number of correct"),
        (4, -1, 1, "c, the number of correct"),
        (-4, 0, 1, "between"),
        (4, [1, 2, 5], 1, "c is 5, k is 1 at index .2,"),
        (4, 1.5, 1, "c is 1.5; it must be a whole number"),
        (4, math.nan, 1, "c is nan"),
    ],
)
def test_pass_at_k_raises(n, c, k, message):
    with pytest.raises(ValueError, match=message):
        metrics.pass_at_k(n, c, k)


def test_human_aligned_accuracy():
    assert metrics.human_aligned_accuracy([1, 0, 1], [0.1, 0.02, 0.03]) == pytest.approx(0.866667, abs=1e-6)
    assert metrics.human_aligned_accuracy([True, True], [0.5, 0.5]) == 1
    assert metrics.human_aligned_accuracy([True, False], [0, 0.5]) == 0
    assert math.isnan(metrics.human_aligned_accuracy([True], [0]))
    with pytest.raises(ValueError, match="values must be finite and not negative; values is -1.0 at index .1,"):
        metrics.human_aligned_accuracy([1, 1], [1, -1])
    with pytest.raises(ValueError, match="correct must be between 0 and 1; correct is 5.0 at index .0,"):
        metrics.human_aligned_accuracy([5, 7], [0.1, 0.2])
    with pytest.raises(ValueError, match="weights must not be negative; weights is -1.0"):
        metrics.majority_vote(["a", "b"], [1, -1])
    with pytest.raises(ValueError, match="scores must be numbers; scores is nan"):
        metrics.calibration_error([math.nan, 0.5], [True, False])
    with pytest.raises(ValueError, match="correct has shape .2,. and values has shape .3,."):
        metrics.human_aligned_accuracy([1, 1], [1, 1, 1])


def test_value_density():
    assert metrics.value_density([1, 0, 1], [0.1, 0.02, 0.03], [10, 20, 30]) == pytest.approx(86.666667 / 20)
    assert math.isnan(metrics.value_density([1], [1], [0]))
    with pytest.raises(ValueError, match="lengths has shape"):
        metrics.value_density([1], [1], [1, 2])


def test_self_verification_f1():
    scores = [0.9] * 9 + [0.1] + [0.2] * 6 + [0.8] * 4  # 9 of 10 correct and 6 of 10 incorrect answers recognized
    correct = [1] * 10 + [0] * 10
    assert metrics.self_verification_f1(scores, correct) == pytest.approx(0.72)
    assert metrics.self_verification_f1([1, 0], [1, 0]) == 1
    assert metrics.self_verification_f1([0, 1], [1, 0]) == 0
    assert metrics.self_verification_f1([1, 1], [1, 0]) == 0
    assert metrics.self_verification_f1([0.5, 0.4], [1, 0], threshold=0.45) == 1
    assert metrics.self_verification_f1([0.5, 0.4], [1, 0]) == 0  # a score at the threshold does not exceed it
    assert metrics.self_verification_f1([1, math.nan], [1, 0]) == 1
    assert math.isnan(metrics.self_verification_f1([1, 0], [1, 1]))
    assert math.isnan(metrics.self_verification_f1([1, 0], [0, 0]))
    with pytest.raises(ValueError, match="scores has shape"):
        metrics.self_verification_f1([1], [1, 0])


def test_pair_accuracy_by_hand():
    assert metrics.pair_accuracy([0.9, 0.2, 0.7, 0.1], [1, 1, 0, 0]) == 3 / 4
    assert metrics.pair_accuracy([0.5, 0.5], [1, 0]) == 1 / 2
    assert metrics.pair_accuracy([math.nan, 0.2, 0.3, 0.1], [0, 0, 1, 1]) == 1 / 2  # NaN is in no pair
    groups = [[0.9, 0.1, 0.2], [0.3, 0.8, 0.7], [0.5, 0.6, 0.4]]
    assert metrics.pair_accuracy(groups, [[1, 0, 0], [1, 0, 1], [0, 0, 0]]) == 2 / 4  # 2 of 2 pairs, and 0 of 2 pairs
    assert math.isnan(metrics.pair_accuracy([[1, 0], [0, 1]], [[1, 1], [0, 0]]))  # no prompt has a pair
    with pytest.raises(ValueError, match="scores has shape"):
        metrics.pair_accuracy([1], [1, 0])


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 4), st.integers(1, 6), st.data())
def test_pair_accuracy_is_that_of_all_pairs(P, K, data):
    numbers = lambda low, high: st.lists(st.integers(low, high), min_size=P * K, max_size=P * K)
    scores, correct = (np.array(data.draw(numbers(0, high))).reshape(P, K) for high in (3, 1))
    pairs = [(x - y) for s, c in zip(scores, correct) for x in s[c == 1] for y in s[c == 0]]
    expected = np.mean([(1 + np.sign(d)) / 2 for d in pairs]) if pairs else math.nan
    assert metrics.pair_accuracy(scores, correct) == pytest.approx(expected, nan_ok=True)


def test_regression_scores_by_hand():
    scores = metrics.regression_scores([1, 2, 4], [1, 3, 5])
    assert scores == {
        "rmse": pytest.approx(math.sqrt(2 / 3)),
        "r2": pytest.approx(1 - 2 / 8),
        "spearman": pytest.approx(1),
    }
    constant = metrics.regression_scores([0.1, 0.2, 0.3], [0.1, 0.1, 0.1])
    assert math.isnan(constant["r2"]) and math.isnan(constant["spearman"])
    assert metrics.regression_scores([2, 2], [1, 3])["r2"] == 0
    with pytest.raises(ValueError, match="no predictions"):
        metrics.regression_scores([], [])
    with pytest.raises(ValueError, match="predictions must be finite.*nan at index .1,"):
        metrics.regression_scores([1, math.nan], [1, 2])


@settings(max_examples=100, deadline=None)
@given(st.integers(2, 30), st.data())
def test_spearman_ranks_ties_by_their_average(n, data):
    x, y = (
        data.draw(st.lists(st.integers(0, 5), min_size=n, max_size=n).filter(lambda v: len(set(v)) > 1))
        for _ in range(2)
    )
    assert metrics.regression_scores(x, y)["spearman"] == pytest.approx(scipy.stats.spearmanr(x, y).statistic)


PROBABILITIES = np.array([0.99, 0.98, 0.3, 0.95, 0.5, 0.97, 0.99, 0.2, 0.96, 0.9])


def test_token_confidence_by_hand():
    logprobs, mask = np.log(PROBABILITIES), np.ones(10)
    for confidence in (metrics.token_confidence, jax.jit(metrics.token_confidence, static_argnames="fraction")):
        assert confidence(logprobs, mask) == pytest.approx(0.244949, abs=1e-6)
        assert confidence(logprobs, mask, fraction=1.0) == pytest.approx(0.685587, abs=1e-6)


def reference_confidence(logprobs, mask, fraction):
    live = sorted(logprobs[mask == 1])
    if not live:
        return 0.0
    count = max(1, math.ceil(round(fraction * len(live), 9)))
    return math.exp(np.mean(live[:count]))


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from([0.07, 0.2, 0.3, 0.5, 1.0]))
def test_token_confidence_agrees_with_lists(seed, fraction):
    rng = np.random.default_rng(seed)
    logprobs = np.round(np.log(rng.uniform(1e-3, 1, (2, 3, 30))), 1).astype(np.float32)  # rounded, for ties
    mask = rng.integers(0, 2, logprobs.shape) * (rng.uniform(size=(2, 3, 1)) > 0.1)
    expected = [[reference_confidence(logprobs[i, j], mask[i, j], fraction) for j in range(3)] for i in range(2)]
    poisoned = np.where(mask == 1, logprobs, rng.choice([np.nan, np.inf, -np.inf, -50.0], logprobs.shape))
    actual = metrics.token_confidence(poisoned, mask, fraction)
    assert actual.dtype == jnp.float32
    np.testing.assert_allclose(actual, expected, rtol=1e-5)


def test_token_confidence_counts_exactly():
    """0.07 * 100 is 7.000000000000001 in floating point, and counts as 7 tokens."""
    logprobs = -np.arange(100.0) / 100
    assert metrics.token_confidence(logprobs, np.ones(100), 0.07) == pytest.approx(math.exp(-0.96))
    n, position = np.arange(1, 200)[:, None], np.arange(200)
    lowest = position < -(
        -n // 5
    )  # the lowest ceil(n / 5) tokens are log 0.5, log 0.5 - 1, ..., so a wrong count changes the mean
    logprobs = np.where(lowest, math.log(0.5) - position, math.log(0.9))
    expected = [0.5 * math.exp(-(count - 1) / 2) for count in lowest.sum(axis=1)]
    np.testing.assert_allclose(metrics.token_confidence(logprobs, position < n), expected, rtol=1e-4)


def test_token_confidence_at_the_edges():
    assert metrics.token_confidence(np.array([np.nan, np.nan]), np.zeros(2)) == 0
    assert np.isnan(metrics.token_confidence(np.array([-1.0, -2.0, -3.0, np.nan, 0.0]), np.ones(5)))
    assert metrics.token_confidence(np.array([-np.inf, -1.0]), np.ones(2)) == 0
    assert metrics.token_confidence(jnp.array([-1.0], jnp.bfloat16), jnp.ones(1, bool)).dtype == jnp.float32
    gradient = jax.grad(lambda x: metrics.token_confidence(x, jnp.array([1, 1, 0])))(jnp.array([-1.0, -2.0, jnp.nan]))
    np.testing.assert_array_equal(gradient, [0, 0, 0])
    with pytest.raises(ValueError, match="fraction is 0"):
        metrics.token_confidence(np.zeros(3), np.ones(3), 0)
    with pytest.raises(AssertionError):
        metrics.token_confidence(np.zeros((2, 3)), np.ones(3))


@pytest.mark.parametrize(
    "answers, position",
    [
        (["a", "b", "b", "a", "b"], 1),
        (["a", "b", "b", "a"], 0),  # in a tie, the first answer wins
        ([None, None, "c"], 2),  # most samples do not vote
        ([Fraction(1, 2), "x", 0.5], 0),
        ([None, None], None),
        ([], None),
    ],
)
def test_majority_vote(answers, position):
    assert metrics.majority_vote(answers) == position


@settings(deadline=None)
@given(st.lists(st.sampled_from([None, "a", "b", "c"]), max_size=8))
def test_majority_vote_counts(answers):
    position = metrics.majority_vote(answers)
    counts = {answer: answers.count(answer) for answer in answers if answer is not None}
    if not counts:
        assert position is None
    else:
        tied = [answer for answer in counts if counts[answer] == max(counts.values())]
        assert position == min(answers.index(answer) for answer in tied)


def test_means_by_quantile_by_hand():
    x, values = [10, 20, 30, 40, 50], [0.2, 0.1, 0.4, 0.5, 0.3]
    np.testing.assert_allclose(metrics.mean_by_quantile(x, values), [20, 10, 50, 30, 40])
    np.testing.assert_allclose(
        metrics.mean_by_quantile([1, 2, 6], [1, 2, 3], parts=2), [(1 + 0.5 * 2) / 1.5, (0.5 * 2 + 6) / 1.5]
    )
    # The three items of value 2 cover the middle three fifths together.
    np.testing.assert_allclose(metrics.mean_by_quantile([1, 2, 6, 4, 5], [1, 2, 2, 2, 3]), [1, 4, 4, 4, 5])
    np.testing.assert_allclose(metrics.mean_by_quantile([3, 5], [7, 7]), [4] * 5)
    np.testing.assert_allclose(metrics.mean_by_quantile([3], [0]), [3] * 5)
    for x, values, parts, message in (
        ([], [], 5, "at least one"),
        ([1, 2], [1], 5, "x has shape"),
        ([1], [math.nan], 5, "must be numbers; values is nan at index .0,"),
        ([1], [1], 0, "parts is 0"),
    ):
        with pytest.raises(ValueError, match=message):
            metrics.mean_by_quantile(x, values, parts)


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.tuples(st.integers(-9, 9), st.integers(0, 3)), min_size=1, max_size=12), st.integers(1, 6), st.randoms()
)
def test_means_by_quantile_agree_with_copied_items(items, parts, random):
    """With `parts` copies of every item, shares hold whole items. The mean of a tie replaces its items."""
    level = lambda value: np.mean([x for x, v in items if v == value])
    copies = sorted(value for _, value in items for _ in range(parts))
    expected = [np.mean([level(v) for v in copies[i * len(items) : (i + 1) * len(items)]]) for i in range(parts)]
    shuffled = random.sample(items, len(items))
    np.testing.assert_allclose(metrics.mean_by_quantile(*zip(*shuffled), parts), expected, atol=1e-9)


def test_bootstrap_interval():
    assert metrics.bootstrap_interval([0.25] * 7) == (0.25, 0.25)
    x = np.random.default_rng(1).binomial(4, 0.3, size=400) / 4
    low, high = metrics.bootstrap_interval(x)
    error = 1.96 * x.std() / 20
    assert low == pytest.approx(x.mean() - error, abs=0.1 * error) and high == pytest.approx(
        x.mean() + error, abs=0.1 * error
    )
    assert metrics.bootstrap_interval(x) == (low, high)
    y = np.random.default_rng(2).normal(size=30)
    assert (
        metrics.bootstrap_interval(y)
        != metrics.bootstrap_interval(y, seed=1)
        != metrics.bootstrap_interval(y, seed=1, resamples=99)
    )
    narrow = metrics.bootstrap_interval(x, level=0.5)
    assert low < narrow[0] < x.mean() < narrow[1] < high
    for x, level, message in (
        ([], 0.95, "at least one"),
        ([1], 1, "level is 1"),
        ([0, math.nan], 0.95, "x is nan at index .1,"),
    ):
        with pytest.raises(ValueError, match=message):
            metrics.bootstrap_interval(x, level=level)


@pytest.mark.parametrize(
    "x, expected",
    [  # z**2 = 3.8415
        ([0.0] * 4, (0, 0.48989)),  # z**2 / (4 + z**2)
        ([1.0] * 4, (0.51011, 1)),
        ([0.0], (0, 0.79345)),
        ([1], (0.20655, 1)),
        ([0.0] * 1000, (0, 0.00383)),
        ([0.5] * 3, (0.12533, 0.87467)),  # 0.5 -+ sqrt(z**2 / 12 + z**4 / 36) / (1 + z**2 / 3)
        ([True] * 4, (0.51011, 1)),
    ],
)
def test_the_interval_of_equal_accuracies_is_wilsons(x, expected):
    low, high = metrics.accuracy_interval(x)
    assert (low, high) == pytest.approx(expected, abs=1e-5)
    assert low <= x[0] <= high and low < high
    narrow = metrics.accuracy_interval(x, level=0.5)
    assert low <= narrow[0] <= x[0] <= narrow[1] <= high and narrow[1] - narrow[0] < high - low


def test_the_interval_of_different_accuracies_is_the_bootstraps():
    x = np.random.default_rng(1).binomial(4, 0.3, size=40) / 4
    assert metrics.accuracy_interval(x) == metrics.bootstrap_interval(x)
    with pytest.raises(ValueError, match="between 0 and 1; x is 1.5 at index .1,"):
        metrics.accuracy_interval([0.0, 1.5])
    with pytest.raises(ValueError, match="at least one"):
        metrics.accuracy_interval([])


@pytest.mark.slow
def test_the_bootstrap_interval_has_its_nominal_coverage():
    rng = np.random.default_rng(0)
    inside = [
        low <= 0.3 <= high
        for low, high in (metrics.bootstrap_interval(rng.binomial(4, 0.3, 100) / 4, seed=i) for i in range(500))
    ]
    assert 0.91 < np.mean(inside) < 0.98


def slow_bootstrap(sets, resamples=4000, seed=5):
    """Draws items one by one, with another generator."""
    rng, means = random.Random(seed), []
    for _ in range(resamples):
        means.append(sum(sum(rng.choices(x, k=len(x))) / len(x) for x in sets) / len(sets))
    means.sort()
    return means[round(0.025 * resamples)], means[round(0.975 * resamples)]


def test_mean_over_sets_against_a_slow_loop():
    rng = np.random.default_rng(3)
    sets = [rng.integers(0, 5, 40) / 4, rng.integers(0, 2, 15), [1.0] * 6 + [0.0]]
    mean, low, high = metrics.mean_over_sets(sets)
    assert mean == pytest.approx((np.mean(sets[0]) + np.mean(sets[1]) + 6 / 7) / 3)
    assert (low, high) == pytest.approx(slow_bootstrap([list(x) for x in sets]), abs=0.012)
    assert low < mean < high and high - low > 0.05
    assert metrics.mean_over_sets([sets[0]])[1:] == metrics.bootstrap_interval(sets[0])
    assert metrics.mean_over_sets([[0.5, 0.5], [1.0]])[0] == 0.75
    with pytest.raises(ValueError, match="between 0 and 1"):
        metrics.mean_over_sets([[0.5], [1.5]])


def test_equal_prompts_have_a_width():
    """One prompt of accuracy 1/2 draws from Beta(1, 1), which is uniform; the mean of two such sets has a triangular density."""
    many = dict(resamples=200_000)
    assert metrics.mean_over_sets([[0.5]], **many) == (0.5, *(pytest.approx(x, abs=3e-3) for x in (0.025, 0.975)))
    edge = 0.0125**0.5  # where 2 x^2 = 0.025
    found = metrics.mean_over_sets([[0.5], [0.5]], **many)
    assert found == (0.5, *(pytest.approx(x, abs=3e-3) for x in (edge, 1 - edge)))
    # One correct prompt draws from Beta(3/2, 1/2): with p = sin(t)^2 its distribution function is (2 t - sin(2 t)) / pi.
    mean, low, high = metrics.mean_over_sets([[1.0]], **many)
    angle = 2 * np.arcsin(np.sqrt(low))
    assert mean == high == 1 and (angle - np.sin(angle)) / np.pi == pytest.approx(0.025, abs=3e-3)


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_the_interval_of_many_sets_of_equal_prompts_holds_their_mean(value):
    mean, low, high = metrics.mean_over_sets([[value] * 4] * 10)
    assert mean == value and low <= value <= high and high - low > 0.05


def test_paired_difference():
    """Three pairs differ by 1, 0 and -1/2. In 27 draws, the mean is -1/2 once and 1 once, each 3.7 % of the draws."""
    mean, low, high = metrics.paired_difference([1.0, 0.5, 0.0], [0.0, 0.5, 0.5])
    assert (mean, low, high) == (pytest.approx(1 / 6), pytest.approx(-0.5), pytest.approx(1.0))
    # Both sides vary much, but their difference varies little, because pairs are resampled.
    x = np.arange(50) % 2
    y = x.copy()
    y[:5] = 0
    mean, low, high = metrics.paired_difference(x, y)
    assert mean == pytest.approx(2 / 50) and (low, high) == pytest.approx(slow_bootstrap([list(x - y)]), abs=0.021)
    assert high - low < 0.15
    assert np.isnan(metrics.paired_difference([0.1 + 0.2, 0.5], [0.3, 0.5])[1:]).all()  # they differ by rounding
    assert metrics.paired_difference(x, x)[0] == 0 and np.isnan(metrics.paired_difference(x, x)[1:]).all()
    with pytest.raises(ValueError, match="shape"):
        metrics.paired_difference([1.0], [1.0, 2.0])

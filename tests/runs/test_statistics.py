"""Tests intervals over seeds against tables of Student's t and scipy."""

import numpy as np
import pytest
import scipy.stats

from jaxrl_reason.runs.statistics import difference_over_prompts, Estimate, estimate, paired_difference


@pytest.mark.parametrize("n, t", [(2, 12.706), (3, 4.303), (8, 2.365), (31, 2.042)])  # from a printed table
def test_the_half_width_is_t_times_the_standard_error(n, t):
    values = np.linspace(-1, 3, n) ** 2
    found = estimate(list(values))
    assert found.mean == pytest.approx(values.mean()) and found.seeds == n
    assert found.half_width * n**0.5 / values.std(ddof=1) == pytest.approx(t, abs=5e-4)
    low, high = scipy.stats.t.interval(0.95, n - 1, values.mean(), scipy.stats.sem(values))
    assert found.half_width == pytest.approx((high - low) / 2, rel=1e-12)


def test_intervals_cover_the_mean_in_95_of_100_cases():
    samples = np.random.default_rng(0).normal(size=(4000, 4))
    covered = [abs(e.mean) <= e.half_width for e in map(estimate, samples)]
    assert np.mean(covered) == pytest.approx(0.95, abs=0.01)  # 0.01 is three standard errors


@pytest.mark.parametrize("values", [[0.3], [1.0, 1.0], [0.1] * 8])
def test_one_value_and_equal_values_have_no_interval(values):
    assert estimate(values) == (values[0], None, len(values))


@pytest.mark.parametrize("values", [[], [float("nan")], [1.0, float("inf")]])
def test_values_without_a_mean_are_refused(values):
    with pytest.raises(ValueError, match="^A mean needs finite values"):
        estimate(values)


@pytest.mark.parametrize("first, second", [((0.55, 0.65), (0.45, 0.55)), ((0.3, 0.4, 0.7), (0.1, 0.2, 0.5))])
def test_differences_that_are_equal_up_to_rounding_have_no_interval(first, second):
    assert len({x - y for x, y in zip(first, second)}) > 1
    assert paired_difference(dict(enumerate(first)), dict(enumerate(second))).half_width is None


def test_differences_are_paired_by_seed():
    """The rows vary by 10 and their difference by 1. The paired interval is narrow, t(1) * .7071 / sqrt(2) = 6.353."""
    found = paired_difference({0: 10.0, 3: 21.0, 5: 7.0}, {3: 20.0, 0: 10.0, 9: 1.0})
    assert found.mean == 0.5 and found.seeds == 2
    assert found.half_width == pytest.approx(6.353, abs=1e-3)
    assert paired_difference({0: 1.0}, {1: 1.0}) is None
    assert paired_difference({0: 3.0}, {0: 1.0}) == Estimate(2.0, None, 1)


def test_the_interval_over_seeds_and_prompts_by_hand():
    """Mean squares: seeds 0, prompts .64, rest .04. Variance .6 / 4 = .15, degrees of freedom .36 / .4112, at least 1."""
    others = {0: [0.5, 0.25], 7: [0.0, 1.0], 8: [1.0, 1.0]}
    values = {0: [1.5, 0.25], 7: [0.8, 1.2], 9: [1.0, 1.0]}
    found = difference_over_prompts(values, others)
    assert found == (pytest.approx(0.5), pytest.approx(12.7062 * 0.15**0.5, rel=1e-5), 2)


def test_prompts_that_differ_by_chance_leave_the_interval_over_seeds():
    """All mean squares are .0625: prompts differ as much as the rest."""
    d, zeros = {0: [0.5, 0.0], 1: [0.5, 0.5]}, {0: [0.0, 0.0], 1: [0.0, 0.0]}
    assert difference_over_prompts(d, zeros) == pytest.approx(paired_difference({0: 0.25, 1: 0.5}, {0: 0.0, 1: 0.0}))


@pytest.mark.parametrize(
    "S, K, seeds, prompts", [(5, 4, 0.0, 0.0), (5, 4, 0.05, 0.05), (5, 32, 0.02, 0.1), (2, 4, 0.05, 0.05)]
)
def test_intervals_over_seeds_and_prompts_cover_the_mean_in_95_of_100_cases(S, K, seeds, prompts):
    """Accuracies of K samples, whose difference is .05 on average and varies by seed and by prompt."""
    rng, covered = np.random.default_rng(2), []
    for _ in range(1000):
        true = 0.05 + rng.normal(0, seeds, (S, 1)) + rng.normal(0, prompts, (1, 60))
        a, b = (rng.binomial(K, 0.5 + sign * true / 2) / K for sign in (1, -1))
        found = difference_over_prompts(dict(enumerate(a)), dict(enumerate(b)))
        covered.append(abs(found.mean - 0.05) <= (found.half_width or 0.0))
    assert np.mean(covered) == pytest.approx(0.95, abs=0.025)


def test_one_seed_one_prompt_and_equal_differences_have_no_interval_over_prompts():
    assert difference_over_prompts({0: [1.0, 0.0], 1: [1.0, 1.0]}, {0: [0.0, 0.0], 2: [0.0, 0.0]}) is None
    assert difference_over_prompts({0: [1.0], 1: [0.5], 2: [0.0]}, {0: [0.0], 1: [0.0], 2: [0.0]}) is None
    assert difference_over_prompts({0: [1.0, 1.0]}, {1: [0.0, 0.0]}) is None
    # Seeds with equal means: what is left of the variance of their mean is rounding.
    turned = {s: np.roll([0.333333, 0.666667, 1.0, 0.0, 0.333333], s).tolist() for s in range(4)}
    assert difference_over_prompts(turned, {s: [0.1] * 5 for s in range(4)}).half_width is None
    thirds = {0: [0.333333, 1.0], 1: [0.333333, 0.666667]}
    assert difference_over_prompts(thirds, {0: [0.0, 0.666667], 1: [0.0, 0.333333]}).half_width is None

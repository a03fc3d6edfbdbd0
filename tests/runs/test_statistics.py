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


def test_differences_are_paired_by_seed():
    """The rows vary by 10 and their difference by 1. The paired interval is narrow, t(1) * .7071 / sqrt(2) = 6.353."""
    found = paired_difference({0: 10.0, 3: 21.0, 5: 7.0}, {3: 20.0, 0: 10.0, 9: 1.0})
    assert found.mean == 0.5 and found.seeds == 2
    assert found.half_width == pytest.approx(6.353, abs=1e-3)
    assert paired_difference({0: 1.0}, {1: 1.0}) is None
    assert paired_difference({0: 3.0}, {0: 1.0}) == Estimate(2.0, None, 1)


@pytest.mark.parametrize("d", [[[1.0, 0.0], [1.0, 0.0]], [[1.0, 1.0], [0.0, 0.0]]])
def test_seeds_and_prompts_are_resampled(d):
    """With a difference of 1 for one of two prompts, or seeds, the resampled means are 0, 1/2 and 1: 1/4, 1/2, 1/4 of them."""
    others = {0: [0.5, 0.25], 7: [0.0, 1.0], 8: [1.0, 1.0]}
    values = {seed: np.add(others[seed], x) for seed, x in zip((0, 7), d)}
    assert difference_over_prompts(values, others) == (0.5, 0.0, 1.0)


def test_the_interval_has_the_variance_of_seeds_and_of_prompts():
    """For d[s, p] = a[s] + b[p], the variance of a resampled mean is var0(a) / S + var0(b) / P."""
    rng = np.random.default_rng(1)
    a, b = rng.normal(0.1, 0.2, 40), rng.normal(0.0, 0.3, 50)
    found = difference_over_prompts(dict(enumerate(a[:, None] + b)), dict.fromkeys(range(40), np.zeros(50)))
    half = 1.96 * (a.var() / 40 + b.var() / 50) ** 0.5
    assert found.mean == pytest.approx(a.mean() + b.mean())
    assert (found.high - found.mean, found.mean - found.low) == pytest.approx((half, half), rel=0.08)


def test_one_seed_other_prompts_and_equal_differences_have_no_interval_over_prompts():
    assert difference_over_prompts({0: [1.0, 0.0], 1: [1.0, 1.0]}, {0: [0.0, 0.0], 2: [0.0, 0.0]}) is None
    assert difference_over_prompts({0: [1.0, 0.0], 1: [1.0, 1.0]}, {0: [0.0, 0.0], 1: [0.0]}) is None
    assert difference_over_prompts({0: [1.0], 1: [0.5]}, {0: [0.5], 1: [0.0]}) is None

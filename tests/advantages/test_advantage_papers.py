"""Tests the transformations of HERO, LaSeR, RLEV and ProGRPO against numbers worked by hand and numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from helpers import reference_methods as reference
from helpers.advantage_batches import (
    a_batch,
    compute,
    either_way,
    INF,
    inputs_of,
    MIX,
    NAN,
    presence,
    REWEIGH,
    SCALE,
    SELF_REWARDS,
    SKIP,
    STRATIFY,
    WEIGH,
    WIDE,
)
from jaxrl_reason import advantages

CENTERED = advantages.reweight_by_confidence(0.5, center=True)
CORRECT_ONLY = advantages.reweight_by_confidence(0.5, correct_only=True)
CENTERED_CORRECT = advantages.reweight_by_confidence(0.5, center=True, correct_only=True)

# -- HERO by hand ----------------------------------------------------------------------------------


@either_way
@pytest.mark.parametrize(
    "scores, verdicts, expected",
    [
        ([4, 1, -2, 0.5], [1, 1, 0, 0], [1.05, 0.95, -0.05, 0.05]),
        ([3, 1, 2, 0], [1, 0, 0, 0], [0.95, 0, 0.05, -0.05]),  # a stratum of one gets its lowest reward
        ([3, 1, 2, 0], [0, 0, 0, 0], [0.05, -0.016667, 0.016667, -0.05]),
        ([3, 1, 2, 0], [1, 1, 1, 1], [1.05, 0.983333, 1.016667, 0.95]),
        ([7, 7, 7, 7], [1, 1, 0, 0], [0.95, 0.95, -0.05, -0.05]),  # so do tied strata
        ([9, 0, -9, 9], [0, 1, 1, 0], [-0.05, 1.05, 0.95, -0.05]),  # the reward model may disagree
    ],
)
def test_strata_by_hand(scores, verdicts, expected, compiled):
    inputs = inputs_of([verdicts], model_scores=[scores], verdicts=[verdicts])
    got, _ = compute(STRATIFY, inputs, compiled=compiled)
    np.testing.assert_allclose(got, [expected], atol=2e-6)
    assert got.dtype == np.float32
    without, _ = compute(STRATIFY, inputs._replace(verdicts=None), compiled=compiled)  # rewards > .5
    np.testing.assert_array_equal(without, got)


def test_eps_of_a_stratum_is_a_parameter():
    transform = advantages.stratify_by_verifier(0.1, 0.2, eps=1.0)
    got, _ = compute(transform, inputs_of([[1, 1, 0, 0]], model_scores=[[3, 0, 1, 0]]))
    np.testing.assert_allclose(got, [[0.8 + 0.4 * 3 / 4, 0.8, -0.1 + 0.2 / 2, -0.1]], atol=1e-6)


def test_missing_completions_are_in_no_stratum():
    inputs = inputs_of([[1, NAN, 1, 0, 0, 0]], model_scores=[[1, 100, 2, 5, NAN, 4]], verdicts=[[1, 1, 1, 0, 0, 0]])
    got, _ = compute(STRATIFY, inputs)
    np.testing.assert_allclose(got, [[0.95, 0, 1.05, 0.05, 0, -0.05]], atol=2e-6)


@either_way
@pytest.mark.parametrize("w_min, w_max, k, expected", [(0.5, 2.0, 5.0, 1.864685), (0.4, 3.0, 6.0, 2.847159)])
def test_weight_by_hand(w_min, w_max, k, expected, compiled):
    transform = advantages.weight_by_score_spread(w_min, w_max, k)
    inputs = inputs_of([[1, 1, 0, 0]], model_scores=[[4, 1, -2, 0.5]])
    # The first batch sets the mean to the spread of its group. The weight is half way between the two bounds.
    got, state = compute(transform, inputs, start=[[1.0, -2, 0, 1]], compiled=compiled)
    np.testing.assert_allclose(got, (w_min + w_max) / 2 * np.array([[1, -2, 0, 1]]), rtol=1e-6)
    np.testing.assert_allclose(state[0].mean, 2.462214, rtol=1e-6)
    # This batch moves the mean (2 - .1 sigma) / .9 to 2.
    state = (advantages.SpreadState(jnp.float32((2 - 0.2462214) / 0.9), jnp.bool_(True)),)
    got, state = compute(transform, inputs, start=[[1.0, -2, 0, 1]], state=state, compiled=compiled)
    np.testing.assert_allclose(state[0].mean, 2, rtol=1e-6)
    np.testing.assert_allclose(got, expected * np.array([[1, -2, 0, 1]]), rtol=1e-5)


@either_way
def test_the_first_batch_sets_the_running_mean_and_each_later_one_moves_it_by_a_tenth(compiled):
    spread = lambda *scales: inputs_of(np.zeros((len(scales), 2)), model_scores=np.outer(scales, [1, -1]) / 2**0.5)
    lonely = inputs_of([[1, NAN], [NAN, NAN]], model_scores=[[1, 2], [3, 4]])
    broken = inputs_of([[1, 0], [1, 0]], model_scores=[[1, NAN], [INF, 4]])
    state, means = None, []
    for batch in (lonely, spread(1, 3), broken, spread(4, 4), lonely, spread(0, 1)):
        _, state = compute(WEIGH, batch, state=state, compiled=compiled)
        means.append(float(state[0].mean))
    # no mean yet; 2; the same; 1.8 + .4; the same; 1.98 + .05
    np.testing.assert_allclose(means, [0, 2, 2, 2.2, 2.2, 2.03], rtol=1e-6)
    assert state[0].seen


def test_the_state_is_two_scalars_that_keep_their_types():
    state = WEIGH.init()
    after = jax.eval_shape(WEIGH.update, jnp.ones((1, 2)), state, inputs_of([[1, 0]], model_scores=[[1, 0]]))[1]
    kinds = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)
    assert kinds(state) == kinds(after) == advantages.SpreadState(((), jnp.float32), ((), jnp.bool_))


# -- LaSeR, RLEV, ProGRPO, GenRe2 by hand ----------------------------------------------------------


@either_way
def test_mixed_advantage_by_hand(compiled):
    start = np.array([[0.866024, -0.866024, 0.866024, -0.866024]], np.float32)
    inputs = inputs_of([[1, 0, 1, 0]], self_rewards=SELF_REWARDS, truncated=[[0, 0, 0, 0]])
    own, _ = compute(advantages.mix_self_reward(tau=1.0), inputs, start, compiled=compiled)
    np.testing.assert_allclose(own, [[1.305582, -0.783349, 0.261116, -0.783349]], atol=2e-6)
    got, _ = compute(MIX, inputs, start, compiled=compiled)
    np.testing.assert_allclose(got, [[0.909980, -0.857756, 0.805533, -0.857756]], atol=2e-6)


def test_a_truncated_completion_counts_as_zero_in_the_statistics_and_for_itself():
    start = np.zeros((1, 3), np.float32)
    inputs = inputs_of([[1, 0, 1]], self_rewards=[[1, 0.5, 9]], truncated=[[0, 0, 1]])  # 1, .5, 0: std1 .5
    own, _ = compute(advantages.mix_self_reward(tau=1.0), inputs, start)
    np.testing.assert_allclose(own, [[1, 0, -1]], atol=1e-6)
    for value in (NAN, INF, -INF):  # values that are not finite count 0, too
        odd = inputs._replace(self_rewards=np.array([[1, 0.5, value]], np.float32), truncated=None)
        np.testing.assert_allclose(compute(advantages.mix_self_reward(tau=1.0), odd, start)[0], own, atol=1e-6)


def test_a_group_with_little_spread_keeps_its_advantages():
    edge = 0.5 + np.array([[0.0999, -0.0999], [0.1001, -0.1001]]) / 2**0.5  # std1 of +-x / sqrt 2 is x
    start = np.array([[0.5, -0.5]] * 2, np.float32)
    got, _ = compute(MIX, inputs_of([[1, 0]] * 2, self_rewards=edge), start)
    np.testing.assert_array_equal(got[0], start[0])
    np.testing.assert_allclose(got[1], [0.45 + 0.1 / 2**0.5, -0.45 - 0.1 / 2**0.5], rtol=1e-5)
    exact = inputs_of([[1, 0, 0]], self_rewards=[[1, 0.5, 0]])  # std1 exactly .5
    start = np.array([[2.0, 3.0, 4.0]], np.float32)
    np.testing.assert_array_equal(compute(advantages.mix_self_reward(min_std=0.5), exact, start)[0], start)
    assert (compute(advantages.mix_self_reward(min_std=0.499), exact, start)[0] != start).all()
    beyond = inputs_of([[1, 0, 1, 0]], self_rewards=[[1, 3, 1.5, 70]])  # all 1 after clipping
    start = np.array([[1.0, 2.0, 4.0, 8.0]], np.float32)
    np.testing.assert_array_equal(compute(MIX, beyond, start)[0], start)


def test_scale_by_hand():
    values = [0, 0.02, 0.05, 0.1, 0.3, 1.0]
    scaled, _ = compute(SCALE, inputs_of(np.ones((6, 2)), values=values))
    np.testing.assert_allclose(scaled[:, 0], [1, 1.2, 1.5, 2, 2, 2], rtol=1e-6)
    np.testing.assert_array_equal(scaled[:, 0], scaled[:, 1])
    scaled, _ = compute(advantages.scale_by_value(alpha=4.0, clip=3.0), inputs_of(np.ones((6, 2)), values=values))
    np.testing.assert_allclose(scaled[:, 0], [1, 1.08, 1.2, 1.4, 2.2, 4], rtol=1e-6)
    incorrect, _ = compute(SCALE, inputs_of(np.zeros((1, 2)), values=[0.3]))
    np.testing.assert_array_equal(incorrect, 0)  # an incorrect answer has no value


def test_reweighting_by_hand():
    confidence = [[0.9, 0.1], [0.2, 0.6], [0.5, 0.5]]
    inputs = inputs_of([[1, 0], [0, 0], [1, 1]], prompt_confidence=[0.5, 0.5, 0.25], answer_confidence=confidence)
    start = np.array([[1, -1], [0, 0], [0, 0]], np.float32)
    expected = [[1 - 0.12, -1 + 0.12], [0, 0], [-0.075, -0.075]]
    np.testing.assert_allclose(compute(REWEIGH, inputs, start)[0], expected, atol=1e-6)
    expected = [[1 - 0.2, -1 + 0.2], [0, 0], [0, 0]]
    np.testing.assert_allclose(compute(SKIP, inputs, start)[0], expected, atol=1e-6)
    # Only completions with a reward count. All of them are correct in the first group, and none in the second.
    inputs = inputs._replace(rewards=np.array([[1, NAN], [NAN, 0], [NAN, NAN]], np.float32))
    np.testing.assert_allclose(compute(REWEIGH, inputs, start)[0], [[0.88, 0], [0, 0], [0, 0]], atol=1e-6)
    np.testing.assert_allclose(compute(SKIP, inputs, start)[0], [[1, 0], [0, 0], [0, 0]], atol=1e-6)


def test_centered_and_correct_only_reweighting_by_hand():
    """alpha is .5. Confidences of correct completions: .8 and .2 (mean .5) in the first group, .6 in the second."""
    confidence = [[0.8, 0.2, 0.1], [0.6, 0.1, 0.2], [0.5, 0.1, 0.9]]
    inputs = inputs_of([[1, 1, 0], [1, 0, 0], [0, 0, 0]], prompt_confidence=[0.5, 0, 0.9], answer_confidence=confidence)
    start = np.array([[1, 1, -2], [2, -1, -1], [0, 0, 0]], np.float32)
    only = [[1 - 0.15, 1 + 0.15, -2], [2 - 0.3, -1, -1], [0, 0, 0]]
    np.testing.assert_allclose(compute(CORRECT_ONLY, inputs, start)[0], only, atol=1e-6)
    both = [[1 - 0.15, 1 + 0.15, -2], [2, -1, -1], [0, 0, 0]]
    np.testing.assert_allclose(compute(CENTERED_CORRECT, inputs, start)[0], both, atol=1e-6)
    # over all completions, the mean confidences are 11 / 30 and .3
    third = 0.5 / 30
    centered = [[1 - 13 * third, 1 + 5 * third, -2 + 8 * third], [2 - 0.15, -1 + 0.1, -1 + 0.05], [0, 0, 0]]
    got = compute(CENTERED, inputs, start)[0]
    np.testing.assert_allclose(got, centered, atol=1e-6)
    np.testing.assert_allclose(got.sum(axis=1), start.sum(axis=1), atol=1e-6)


# -- against numpy ---------------------------------------------------------------------------------


@either_way
@pytest.mark.parametrize("seed", range(4))
def test_strata_follow_their_definition(seed, compiled):
    x = a_batch(seed)
    for transform, options in ((STRATIFY, {}), (WIDE, dict(alpha=0.3, beta=0.6))):
        got, _ = compute(transform, x, compiled=compiled)
        expected = reference.strata(x.model_scores, x.verdicts, presence(x), **options)
        np.testing.assert_allclose(got, np.nan_to_num(expected), atol=1e-5)
        assert (got[~presence(x)] == 0).all()


@either_way
@pytest.mark.parametrize("per_token", [False, True], ids=["PG", "PGT"])
def test_weights_follow_their_definition_step_by_step(per_token, compiled):
    mean, state = None, None
    for seed in range(4):
        x = a_batch(seed)
        shape = x.completion_mask.shape if per_token else x.rewards.shape
        start = np.random.default_rng(seed).normal(size=shape).astype(np.float32)
        got, state = compute(WEIGH, x, start, state, compiled)
        weights, mean = reference.spread_weights(x.model_scores, presence(x), mean)
        spread = lambda v, like: v.reshape(v.shape + (1,) * (like.ndim - v.ndim))
        np.testing.assert_allclose(
            got, np.where(spread(presence(x), start), start * spread(weights, start), 0), rtol=2e-5, atol=1e-6
        )
        np.testing.assert_allclose(state[0].mean, mean, rtol=1e-5)
    assert np.ptp(weights) > 0.5


CHANGES = {
    "scale": (
        SCALE,
        lambda start, x, there: start * reference.value_scale(x.values).reshape(-1, *[1] * (start.ndim - 1)),
    ),
    "mix": (MIX, lambda start, x, there: reference.mixed(start, x.self_rewards, x.truncated, there)),
    "reweigh": (
        REWEIGH,
        lambda start, x, there: reference.reweighted(
            start, x.prompt_confidence, x.answer_confidence, x.verdicts & there, there
        ),
    ),
    **{
        name: (
            transform,
            lambda start, x, there, options=options: reference.reweighted(
                start, x.prompt_confidence, x.answer_confidence, x.verdicts & there, there, 0.5, **options
            ),
        )
        for name, transform, options in (
            ("center", CENTERED, {"center": True}),
            ("correct only", CORRECT_ONLY, {"correct_only": True}),
            ("center correct", CENTERED_CORRECT, {"center": True, "correct_only": True}),
        )
    },
    "skip": (
        SKIP,
        lambda start, x, there: reference.reweighted(
            start, x.prompt_confidence, x.answer_confidence, x.verdicts & there, there, 0.5, True
        ),
    ),
}


@either_way
@pytest.mark.parametrize("per_token", [False, True], ids=["PG", "PGT"])
@pytest.mark.parametrize("change", CHANGES)
def test_the_other_transformations_follow_their_definitions(change, per_token, compiled):
    transform, expected = CHANGES[change]
    changed = 0
    for seed in range(4):
        x = a_batch(seed)
        start = np.random.default_rng(seed).normal(size=(x.completion_mask if per_token else x.rewards).shape)
        start = start.astype(np.float32)
        got, _ = compute(transform, x, start, compiled=compiled)
        there = presence(x)
        want = np.where(there.reshape(there.shape + (1,) * per_token), expected(start, x, there), 0)
        np.testing.assert_allclose(got, want, rtol=2e-5, atol=2e-6)
        assert got.dtype == np.float32 and got.shape == start.shape
        changed += np.abs(got - start)[there].max() > 1e-2
    assert changed == 4


@either_way
def test_rewards_are_the_verdicts_by_default(compiled):
    x = a_batch(2)._replace(verdicts=None, truncated=None, model_scores=None)
    there = ~np.isnan(x.rewards)
    start = np.random.default_rng(0).normal(size=x.rewards.shape).astype(np.float32)
    mixed, _ = compute(MIX, x, start, compiled=compiled)
    none = np.zeros(x.rewards.shape, bool)
    expected = np.where(there, reference.mixed(start, x.self_rewards, none, there), 0)
    np.testing.assert_allclose(mixed, expected, rtol=2e-5, atol=2e-6)
    added, _ = compute(SKIP, x, start, compiled=compiled)
    correct = x.rewards > 0.5
    expected = reference.reweighted(start, x.prompt_confidence, x.answer_confidence, correct, there, 0.5, True)
    np.testing.assert_allclose(added, np.where(there, expected, 0), rtol=2e-5, atol=2e-6)

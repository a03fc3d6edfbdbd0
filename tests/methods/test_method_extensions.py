"""What the five methods add to an estimator, against numbers worked by hand and their definitions in numpy."""

import functools
import json
import os
import subprocess
import sys
import textwrap

from hypothesis import given, settings
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from helpers import reference_methods as reference
from jaxrl_reason import advantages, losses, methods
from jaxrl_reason.advantages import AdvantageInputs
from jaxrl_reason.data import numbers
from jaxrl_reason.metrics import human_aligned_accuracy, pass_at_k, self_verification_f1, token_confidence

NAN, INF = float("nan"), float("inf")
EXTENSIONS = ("genre2", "hero", "laser", "rlev", "progrpo")
either_way = pytest.mark.parametrize("compiled", [False, True], ids=["eager", "jit"])
every_base = pytest.mark.parametrize("base", reference.ESTIMATORS)


def inputs_of(rewards, lengths=None, T=4, **signals):
    """AdvantageInputs of numpy arrays; completions of two tokens where nothing is said."""
    rewards = np.asarray(rewards, np.float32)
    lengths = np.full(rewards.shape, 2) if lengths is None else np.asarray(lengths)
    mask = np.arange(T) < lengths[..., None]
    kinds = dict(verdicts=bool, truncated=bool)
    signals = {name: np.asarray(x, kinds.get(name, np.float32)) for name, x in signals.items()}
    return AdvantageInputs(rewards, mask, **signals)


@functools.cache
def jitted(transform):
    return jax.jit(advantages.chain(transform).update)


def compute(transform, inputs, start=None, state=None, compiled=True):
    """The transform in a chain that starts from `start` (None: the rewards) -> (advantages, state) as numpy."""
    chain = advantages.chain(transform)
    update = jitted(transform) if compiled else chain.update
    state = chain.init() if state is None else state
    out, state = update(None if start is None else jnp.asarray(start), state, jax.tree.map(jnp.asarray, inputs))
    return np.asarray(out), state


# Built once, so that each is compiled once a shape.
STRATIFY, MIX, SCALE = advantages.stratify_by_verifier(), advantages.mix_self_reward(), advantages.scale_by_value()
WEIGH, REWEIGH = advantages.weight_by_score_spread(), advantages.reweight_by_confidence()
WIDE, SKIP = advantages.stratify_by_verifier(0.3, 0.6), advantages.reweight_by_confidence(0.5, skip_all_correct=True)


def a_batch(seed=0, P=6, G=5, T=4, missing=True):
    """Everything a chain can read: strata of every size, ties, truncation, rewards and scores that are missing."""
    rng = np.random.default_rng(seed)
    right = rng.random((P, G)) < 0.5
    right[0], right[1], right[2] = True, False, np.arange(G) == 1  # all right, all wrong, one right
    rewards = right.astype(np.float32)
    scores = rng.normal(size=(P, G)).astype(np.float32) * rng.choice([0.3, 1.0, 4.0], (P, 1)).astype(np.float32)
    scores[3] = scores[3, 0]  # tied
    if missing:
        rewards[4, 0], rewards[0, 2], scores[5, 1], scores[5, 3], scores[1, 4] = NAN, NAN, NAN, INF, -INF
    lengths = rng.integers(1, T + 1, (P, G))
    mask = np.arange(T) < lengths[..., None]
    return AdvantageInputs(
        rewards,
        mask,
        verdicts=right,
        greedy_rewards=rng.integers(0, 2, P).astype(np.float32),
        model_scores=scores,
        values=rng.choice([0, 0.02, 0.05, 0.3, 1.0], P).astype(np.float32),
        self_rewards=rng.normal(0.5, 0.6, (P, G)).astype(np.float32)
        * rng.choice([0.02, 1.0], (P, 1)).astype(np.float32),
        prompt_confidence=rng.random(P).astype(np.float32),
        answer_confidence=rng.random((P, G)).astype(np.float32),
        truncated=rng.random((P, G)) < 0.3,
        kl=rng.normal(size=mask.shape).astype(np.float32),
    )


def presence(x):
    return ~np.isnan(x.rewards) & np.isfinite(x.model_scores)


# -- HERO by hand ----------------------------------------------------------------------------------


@either_way
@pytest.mark.parametrize(
    "scores, verdicts, expected",
    [
        ([4, 1, -2, 0.5], [1, 1, 0, 0], [1.05, 0.95, -0.05, 0.05]),
        ([3, 1, 2, 0], [1, 0, 0, 0], [0.95, 0, 0.05, -0.05]),  # a stratum of one sits on its floor
        ([3, 1, 2, 0], [0, 0, 0, 0], [0.05, -0.016667, 0.016667, -0.05]),
        ([3, 1, 2, 0], [1, 1, 1, 1], [1.05, 0.983333, 1.016667, 0.95]),
        ([7, 7, 7, 7], [1, 1, 0, 0], [0.95, 0.95, -0.05, -0.05]),  # ties do too
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


def test_the_smoothing_of_a_stratum_is_a_parameter():
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
    # The first batch sets the mean, which is the group's own spread: half way between the weights.
    got, state = compute(transform, inputs, start=[[1.0, -2, 0, 1]], compiled=compiled)
    np.testing.assert_allclose(got, (w_min + w_max) / 2 * np.array([[1, -2, 0, 1]]), rtol=1e-6)
    np.testing.assert_allclose(state[0].mean, 2.462214, rtol=1e-6)
    # A mean that this batch moves to 2: (2 - .1 sigma) / .9.
    state = (advantages.SpreadState(jnp.float32((2 - 0.2462214) / 0.9), jnp.bool_(True)),)
    got, state = compute(transform, inputs, start=[[1.0, -2, 0, 1]], state=state, compiled=compiled)
    np.testing.assert_allclose(state[0].mean, 2, rtol=1e-6)
    np.testing.assert_allclose(got, expected * np.array([[1, -2, 0, 1]]), rtol=1e-5)


@either_way
def test_the_running_mean_starts_at_the_first_batch_moves_by_a_tenth_and_waits_where_nothing_can_be_compared(compiled):
    spread = lambda *scales: inputs_of(np.zeros((len(scales), 2)), model_scores=np.outer(scales, [1, -1]) / 2**0.5)
    lonely = inputs_of([[1, NAN], [NAN, NAN]], model_scores=[[1, 2], [3, 4]])
    broken = inputs_of([[1, 0], [1, 0]], model_scores=[[1, NAN], [INF, 4]])
    state, means = None, []
    for batch in (lonely, spread(1, 3), broken, spread(4, 4), lonely, spread(0, 1)):
        _, state = compute(WEIGH, batch, state=state, compiled=compiled)
        means.append(float(state[0].mean))
    # nothing yet; 2; kept; 1.8 + .4; kept; 1.98 + .05
    np.testing.assert_allclose(means, [0, 2, 2, 2.2, 2.2, 2.03], rtol=1e-6)
    assert state[0].seen


def test_the_state_is_two_scalars_that_keep_their_types():
    state = WEIGH.init()
    after = jax.eval_shape(WEIGH.update, jnp.ones((1, 2)), state, inputs_of([[1, 0]], model_scores=[[1, 0]]))[1]
    kinds = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)
    assert kinds(state) == kinds(after) == advantages.SpreadState(((), jnp.float32), ((), jnp.bool_))


# -- LaSeR, RLEV, ProGRPO, GenRe2 by hand ----------------------------------------------------------

SELF_REWARDS = [[1, 0, 0.5, -0.2]]  # .1 (log pi + 23) for log pi of -13, -23, -18, -25


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
    for value in (NAN, INF, -INF):  # so does one that is not a number
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
    wrong, _ = compute(SCALE, inputs_of(np.zeros((1, 2)), values=[0.3]))
    np.testing.assert_array_equal(wrong, 0)  # s times correct


def test_reweighting_by_hand():
    confidence = [[0.9, 0.1], [0.2, 0.6], [0.5, 0.5]]
    inputs = inputs_of([[1, 0], [0, 0], [1, 1]], prompt_confidence=[0.5, 0.5, 0.25], answer_confidence=confidence)
    start = np.array([[1, -1], [0, 0], [0, 0]], np.float32)
    expected = [[1 - 0.12, -1 + 0.12], [0, 0], [-0.075, -0.075]]
    np.testing.assert_allclose(compute(REWEIGH, inputs, start)[0], expected, atol=1e-6)
    expected = [[1 - 0.2, -1 + 0.2], [0, 0], [0, 0]]
    np.testing.assert_allclose(compute(SKIP, inputs, start)[0], expected, atol=1e-6)
    # With a missing reward the others decide: all right; nothing is right.
    inputs = inputs._replace(rewards=np.array([[1, NAN], [NAN, 0], [NAN, NAN]], np.float32))
    np.testing.assert_allclose(compute(REWEIGH, inputs, start)[0], [[0.88, 0], [0, 0], [0, 0]], atol=1e-6)
    np.testing.assert_allclose(compute(SKIP, inputs, start)[0], [[1, 0], [0, 0], [0, 0]], atol=1e-6)


def test_confidences_and_figures_of_merit_by_hand():
    p = np.array([0.99, 0.98, 0.3, 0.95, 0.5, 0.97, 0.99, 0.2, 0.96, 0.9])
    everywhere = jnp.ones(10)
    np.testing.assert_allclose(token_confidence(jnp.log(p), everywhere), 0.244949, atol=1e-6)
    np.testing.assert_allclose(token_confidence(jnp.log(p), everywhere, fraction=1.0), 0.685587, atol=1e-6)
    assert pass_at_k(10, 3, 5) == pytest.approx(0.916667, abs=1e-6)
    assert human_aligned_accuracy([1, 0, 1], [0.1, 0.02, 0.03]) == pytest.approx(0.866667, abs=1e-6)
    scores, correct = np.repeat([1, 0, 1, 0], [9, 1, 4, 6]), np.repeat([1, 1, 0, 0], [9, 1, 4, 6])  # .9 and .6
    assert self_verification_f1(scores, correct) == pytest.approx(0.72)


@either_way
def test_genre2_by_hand_from_digits_to_the_loss(compiled):
    """Samples .5 .75 .25 .4 of a unit interval that stands for [-1.5, 2.5], truth .5, greedy .6; on ReMax."""
    tokenizer = numbers.make_tokenizer("normalized", base=10, digits=2)
    decoded = np.asarray(tokenizer.decode(jnp.array([[[5, 0], [7, 5], [2, 5], [4, 0], [6, 0]]])))
    z = decoded * 4 - 1.5
    rewards = -((z - 0.5) ** 2)
    np.testing.assert_allclose(rewards, [[0, -1, -1, -0.16, -0.16]], atol=1e-6)
    method = methods.create("genre2")
    assert method.signals == {"greedy_rewards"}

    def run(rewards, logprobs):
        inputs = AdvantageInputs(rewards[:, :4], jnp.ones((1, 4, 2), bool), greedy_rewards=rewards[:, 4])
        adv, _ = method.advantage.update(None, method.advantage.init(), inputs)
        return adv, losses.policy_loss(
            logprobs, logprobs, adv, inputs.completion_mask, **method.loss.policy_keywords()
        )[0]

    logprobs = -jnp.array([[[1.0, 2], [3, 4], [5, 6], [7, 8]]])
    adv, loss = (jax.jit(run) if compiled else run)(jnp.asarray(rewards), logprobs)
    np.testing.assert_allclose(adv, [[0.16, -0.84, -0.84, 0]], atol=1e-6)
    # minus the mean over samples of (sum of log p) A: (3 .16 - 7 .84 - 11 .84) / 4
    np.testing.assert_allclose(loss, (0.48 - 5.88 - 9.24) / 4, rtol=1e-5)


def test_genre2_on_grpo_is_the_standardized_advantage_with_the_same_loss():
    method = methods.create("genre2", base="grpo")
    rewards = np.array([[0, -1, -1, -0.16]], np.float32)
    adv, _ = method.advantage.update(None, method.advantage.init(), inputs_of(rewards))
    np.testing.assert_allclose(adv, (rewards - rewards.mean()) / rewards.std(ddof=1), rtol=1e-5)
    assert (method.loss.aggregation, method.loss.ratio, method.loss.auxiliary) == ("sequence_sum", "token", ())
    assert methods.create("genre2", expert_coefficient=0.05).loss.find("expert").coefficient == 0.05


def test_expert_targets_by_hand():
    truth = jnp.array([[5, 3, 7, 1]])
    rollouts = {6000: 5000, 4999: 5999, 5402: 5300, 5369: 5379, 5371: 5371}
    digits = lambda n: [int(c) for c in str(n)]
    got = numbers.expert_targets(jnp.array([digits(n) for n in rollouts]), jnp.repeat(truth, 5, axis=0), 10)
    np.testing.assert_array_equal(got, [digits(n) for n in rollouts.values()])


# -- against numpy ---------------------------------------------------------------------------------


@either_way
@pytest.mark.parametrize("seed", range(4))
def test_strata_are_those_of_the_definition(seed, compiled):
    x = a_batch(seed)
    for transform, options in ((STRATIFY, {}), (WIDE, dict(alpha=0.3, beta=0.6))):
        got, _ = compute(transform, x, compiled=compiled)
        expected = reference.strata(x.model_scores, x.verdicts, presence(x), **options)
        np.testing.assert_allclose(got, np.nan_to_num(expected), atol=1e-5)
        assert (got[~presence(x)] == 0).all()


@either_way
@pytest.mark.parametrize("per_token", [False, True], ids=["PG", "PGT"])
def test_weights_are_those_of_the_definition_step_by_step(per_token, compiled):
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


LAWS = {
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
    "skip": (
        SKIP,
        lambda start, x, there: reference.reweighted(
            start, x.prompt_confidence, x.answer_confidence, x.verdicts & there, there, 0.5, True
        ),
    ),
}


@either_way
@pytest.mark.parametrize("per_token", [False, True], ids=["PG", "PGT"])
@pytest.mark.parametrize("law", LAWS)
def test_each_change_of_the_advantage_is_that_of_the_definition(law, per_token, compiled):
    transform, expected = LAWS[law]
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
def test_without_the_optional_signals_the_rewards_are_the_verdicts(compiled):
    x = a_batch(2)._replace(verdicts=None, truncated=None, model_scores=None)
    there = ~np.isnan(x.rewards)
    start = np.random.default_rng(0).normal(size=x.rewards.shape).astype(np.float32)
    mixed, _ = compute(MIX, x, start, compiled=compiled)
    none = np.zeros(x.rewards.shape, bool)
    expected = np.where(there, reference.mixed(start, x.self_rewards, none, there), 0)
    np.testing.assert_allclose(mixed, expected, rtol=2e-5, atol=2e-6)
    added, _ = compute(SKIP, x, start, compiled=compiled)
    right = x.rewards > 0.5
    expected = reference.reweighted(start, x.prompt_confidence, x.answer_confidence, right, there, 0.5, True)
    np.testing.assert_allclose(added, np.where(there, expected, 0), rtol=2e-5, atol=2e-6)


# -- after -----------------------------------------------------------------------------------------


@either_way
@pytest.mark.parametrize("steps", [0, 1, 3])
def test_a_delayed_transform_passes_advantages_by_and_keeps_its_own_state(steps, compiled):
    def counting():
        return advantages.AdvantageTransform(lambda: jnp.int32(0), lambda adv, n, inputs: (adv * (10 + n), n + 1))

    chain = advantages.chain(advantages.after(steps, counting()))
    update = jax.jit(chain.update) if compiled else chain.update
    state, seen = chain.init(), []
    for _ in range(5):
        adv, state = update(None, state, inputs_of([[1, 0]]))
        seen.append(float(adv[0, 0]))
    assert seen == [1.0 if n < steps else 10.0 + n for n in range(5)]  # its state moves from the first update on


@pytest.mark.parametrize("warmups", [(0, 0), (2, 0), (0, 2), (1, 2)])
def test_laser_mixes_after_both_warmups(warmups):
    method = methods.create("laser", reasoning_warmup=warmups[0], self_reward_warmup=warmups[1])
    inputs = inputs_of([[1, 0, 1, 0]], self_rewards=SELF_REWARDS, truncated=[[0, 0, 0, 0]], verdicts=[[1, 0, 1, 0]])
    state, seen = method.advantage.init(), []
    for _ in range(5):
        adv, state = method.advantage.update(None, state, inputs)
        seen.append(np.asarray(adv)[0, 0])
    expected = [0.866024 if n < sum(warmups) else 0.909980 for n in range(5)]
    np.testing.assert_allclose(seen, expected, atol=2e-6)
    assert method.loss.find("self_reward").warmup_steps == warmups[0]


def test_an_infinite_or_missing_signal_of_the_warmup_does_not_reach_the_advantages():
    method = methods.create("laser", reasoning_warmup=3)
    inputs = inputs_of([[1, 0]], self_rewards=[[NAN, INF]], truncated=[[0, 0]], verdicts=[[1, 0]])
    adv, _ = method.advantage.update(None, method.advantage.init(), inputs)
    np.testing.assert_allclose(adv, [[0.707106, -0.707106]], atol=2e-6)


# -- off switches ----------------------------------------------------------------------------------


def signals_of(x, method):
    """x with nothing that the method does not ask for."""
    keep = {"rewards", "completion_mask", *method.signals}
    return AdvantageInputs(*(value if name in keep else None for name, value in zip(x._fields, x)))


def bits(x):
    return np.asarray(x).view(np.uint32)


OFF = {
    "weight": ("hero", dict(w_min=1.0, w_max=1.0)),
    "mix": ("laser", dict(tau=0.0, reasoning_warmup=0, self_reward_warmup=0)),
    "warmup": ("laser", dict(reasoning_warmup=1)),
    "values": ("rlev", dict(alpha=0.0)),
    "clip": ("rlev", dict(clip=0.0)),
    "confidence": ("progrpo", dict(alpha=0.0)),
}


@either_way
@every_base
@pytest.mark.parametrize("switch", OFF)
def test_switched_off_a_method_is_its_base_to_the_last_bit(switch, base, compiled):
    name, options = OFF[switch]
    off, plain = methods.create(name, base=base, **options), methods.create(base)
    x = a_batch(1, missing=name != "hero")  # a score that is not finite leaves its completion out, on or off
    if name == "hero":  # with a = b = 0 its reward is the verdict
        off = methods.create(name, base=base, alpha=0.0, beta=0.0, **options)

    def run(method):
        x_of = jax.tree.map(jnp.asarray, signals_of(x, method))
        return method.advantage.update(None, method.advantage.init(), x_of)[0]

    if compiled:  # one program: what is compared is what the chain computes, not how XLA groups it
        ours, theirs = run_both(off, plain, x)
    else:
        ours, theirs = run(off), run(plain)
    np.testing.assert_array_equal(bits(jnp.where(ours == 0, 0.0, ours)), bits(jnp.where(theirs == 0, 0.0, theirs)))
    assert np.abs(theirs).max() > 0.1


def run_both(off, plain, x):
    one = jax.jit(lambda x: off.advantage.update(None, off.advantage.init(), x)[0])
    two = jax.jit(lambda x: plain.advantage.update(None, plain.advantage.init(), x)[0])
    return one(signals_of(x, off)), two(signals_of(x, plain))


@pytest.mark.parametrize("name", ["hero", "laser", "rlev", "progrpo"])
def test_switched_on_each_changes_every_base(name):
    now = {"laser": dict(reasoning_warmup=0, self_reward_warmup=0)}.get(name, {})
    x = a_batch(1)
    for base in reference.ESTIMATORS:
        on, plain = methods.create(name, base=base, **now), methods.create(base)
        run = lambda m: np.asarray(m.advantage.update(None, m.advantage.init(), signals_of(x, m))[0])
        assert np.abs(run(on) - run(plain)).max() > 1e-2, base


# -- properties ------------------------------------------------------------------------------------

finite = st.floats(-1e6, 1e6, width=32)


@st.composite
def graded(draw, values=finite):
    """(scores, verdicts, rewards) of a batch of 2 groups of 4, some rewards missing."""
    several = lambda of: np.array(draw(st.lists(of, min_size=8, max_size=8))).reshape(2, 4)
    verdicts = several(st.booleans())
    missing = several(st.sampled_from([False, False, False, True]))
    return several(values).astype(np.float32), verdicts, np.where(missing, NAN, verdicts).astype(np.float32)


@settings(max_examples=60, deadline=None)
@given(graded(st.one_of(finite, st.sampled_from([0.0, 1.0, -1e37, 1e37, 1e-40]))))
def test_every_right_answer_stands_above_every_wrong_one_whatever_the_scores(batch):
    scores, verdicts, rewards = batch
    for transform, alpha, beta in ((STRATIFY, 0.05, 0.05), (WIDE, 0.3, 0.6)):
        got, _ = compute(transform, inputs_of(rewards, model_scores=scores, verdicts=verdicts))
        there = ~np.isnan(rewards)
        assert np.isfinite(got).all() and (got[~there] == 0).all()
        for p in range(2):
            right, wrong = got[p][there[p] & verdicts[p]], got[p][there[p] & ~verdicts[p]]
            assert (right >= 1 - beta - 1e-6).all() and (right <= 1 + beta + 1e-6).all()
            assert (wrong >= -alpha - 1e-6).all() and (wrong <= alpha + 1e-6).all()
            if right.size and wrong.size:
                assert right.min() > wrong.max()
            order = lambda at: np.argsort(scores[p][at], kind="stable")
            for at in (there[p] & verdicts[p], there[p] & ~verdicts[p]):
                assert (np.diff(got[p][at][order(at)]) >= -1e-7).all()  # within a stratum the score decides


@settings(max_examples=30, deadline=None)
@given(graded(st.integers(-9, 9)), st.integers(-1000, 1000))
def test_only_differences_of_scores_matter(batch, shift):
    scores, verdicts, rewards = batch
    for transform in (STRATIFY, WEIGH):
        inputs = inputs_of(rewards, model_scores=scores, verdicts=verdicts)
        moved = inputs._replace(model_scores=scores + np.float32(shift))  # exact: these are whole numbers
        np.testing.assert_allclose(compute(transform, inputs)[0], compute(transform, moved)[0], rtol=1e-5, atol=1e-6)


EVERY = [STRATIFY, WEIGH, SCALE, MIX, REWEIGH, SKIP]


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**31), st.permutations(range(6)), st.permutations(range(5)))
def test_order_of_groups_and_of_completions_in_a_group_does_not_matter(seed, groups, members):
    x = a_batch(seed % 50)
    groups, members = np.array(groups), np.array(members)
    shuffle = lambda v: v[groups] if v.ndim == 1 else v[groups][:, members]
    start = np.random.default_rng(seed).normal(size=x.rewards.shape).astype(np.float32)
    for transform in EVERY:
        got, state = compute(transform, x, start)
        other, other_state = compute(transform, jax.tree.map(shuffle, x), shuffle(start))
        np.testing.assert_allclose(other, shuffle(got), rtol=1e-5, atol=1e-6)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), state, other_state)
        assert np.isfinite(got).all()


def test_a_group_sees_its_neighbours_only_through_the_running_mean():
    x, y = a_batch(3), a_batch(4)
    head = lambda a, b: np.concatenate([a[:1], b[1:]])
    other = jax.tree.map(head, x, y)
    for transform in EVERY:
        one, two = compute(transform, x)[0], compute(transform, other)[0]
        assert np.array_equal(one[0], two[0]) == (transform is not WEIGH)
    state = (advantages.SpreadState(jnp.float32(1.0), jnp.bool_(True)),)
    still = advantages.weight_by_score_spread(momentum=0.9999999)
    np.testing.assert_allclose(
        compute(still, x, state=state)[0][0], compute(still, other, state=state)[0][0], rtol=1e-5
    )


def test_everything_missing_is_zero_and_finite():
    x = a_batch(0)
    nothing = x._replace(rewards=np.full_like(x.rewards, NAN))
    for transform in EVERY:
        got, state = compute(transform, nothing)
        assert (got == 0).all() and all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state))
    broken = x._replace(model_scores=np.full_like(x.rewards, NAN))
    for transform in EVERY:
        assert (compute(transform, broken)[0] == 0).all()


def test_no_gradient_flows_through_any_of_them():
    x = a_batch(0, missing=False)
    fields = ("model_scores", "values", "self_rewards", "prompt_confidence", "answer_confidence")
    chain = advantages.chain(*EVERY)

    def total(*values):
        adv, _ = chain.update(None, chain.init(), x._replace(**dict(zip(fields, values))))
        return (adv * np.arange(30.0).reshape(6, 5)).sum()

    value, gradients = jax.jit(jax.value_and_grad(total, tuple(range(5))))(
        *(jnp.asarray(getattr(x, f)) for f in fields)
    )
    assert value != 0 and all((g == 0).all() for g in gradients)


def test_signals_of_half_precision_are_computed_in_float32():
    x = a_batch(0, missing=False)
    half = jax.tree.map(lambda v: jnp.asarray(v, jnp.bfloat16) if v.dtype == np.float32 else jnp.asarray(v), x)
    full = jax.tree.map(lambda v: v.astype(jnp.float32) if v.dtype == jnp.bfloat16 else v, half)
    for transform in EVERY:
        a, b = compute(transform, half)[0], compute(transform, full)[0]
        assert a.dtype == np.float32
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6)


# -- refusals --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "build, message",
    [
        (lambda: advantages.stratify_by_verifier(0.5, 0.5), "alpha is 0.5 and beta is 0.5; .* their sum below 1"),
        (lambda: advantages.stratify_by_verifier(0.9, 0.2), "every right answer above every wrong one"),
        (lambda: advantages.stratify_by_verifier(-0.1, 0.2), "both must be at least 0"),
        (lambda: advantages.stratify_by_verifier(0.1, -0.2), "both must be at least 0"),
        (lambda: advantages.stratify_by_verifier(eps=0.0), "eps is 0.0; .* greater than 0"),
        (lambda: advantages.weight_by_score_spread(2.0, 1.0), "w_min is 2.0 and w_max is 1.0"),
        (lambda: advantages.weight_by_score_spread(-1.0, 1.0), "0 <= w_min <= w_max"),
        (lambda: advantages.weight_by_score_spread(k=-1.0), "k is -1.0; it must be at least 0"),
        (lambda: advantages.weight_by_score_spread(momentum=1.0), r"momentum is 1.0; it must lie in \[0, 1\)"),
        (lambda: advantages.weight_by_score_spread(momentum=-0.1), "momentum is -0.1"),
        (lambda: advantages.scale_by_value(-1.0), "alpha is -1.0 and clip is 1.0"),
        (lambda: advantages.scale_by_value(1.0, -1.0), "clip is -1.0"),
        (lambda: advantages.mix_self_reward(1.1), r"tau is 1.1; .* must lie in \[0, 1\]"),
        (lambda: advantages.mix_self_reward(-0.1), "tau is -0.1"),
        (lambda: advantages.mix_self_reward(min_std=-0.1), "min_std is -0.1"),
        (lambda: advantages.reweight_by_confidence(-0.1), "alpha is -0.1; it must be at least 0"),
        (lambda: advantages.after(-1, SCALE), "steps is -1; it must be at least 0"),
        (lambda: methods.create("hero", alpha=0.6, beta=0.4), "their sum below 1"),
        (lambda: methods.create("laser", alpha=-1.0), "alpha is -1.0 .* both must be at least 0"),
        (lambda: methods.create("laser", reasoning_warmup=-1), "reasoning_warmup is -1"),
        (lambda: methods.create("laser", self_reward_warmup=-1), "self_reward_warmup is -1"),
        (lambda: methods.create("laser", beta_v=0.0), "beta_v is 0.0; it must be greater than 0"),
        (lambda: methods.create("laser", reference="mean"), "reference is 'mean'; it must be 'constant' or 'exact'"),
        (lambda: methods.create("genre2", expert_coefficient=-1.0), "expert_coefficient is -1.0"),
        (
            lambda: methods.create("hero", weight_on="rewards"),
            "weight_on is 'rewards'; it must be 'reward' or 'advantage'",
        ),
        (lambda: methods.create("rlev", scale_on="loss"), "scale_on is 'loss'; it must be 'reward' or 'advantage'"),
    ],
)
def test_parameters_out_of_range_are_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()


@pytest.mark.parametrize(
    "transform, field",
    [
        (STRATIFY, "model_scores"),
        (WEIGH, "model_scores"),
        (SCALE, "values"),
        (MIX, "self_rewards"),
        (REWEIGH, "prompt_confidence"),
        (REWEIGH, "answer_confidence"),
    ],
)
def test_a_missing_signal_is_named_and_a_wrong_shape_refused(transform, field):
    x = jax.tree.map(lambda v: v[:3, :3, :3] if v.ndim == 3 else v[:3, :3] if v.ndim == 2 else v[:3], a_batch(0))
    with pytest.raises(ValueError, match=f"{field}, which is None"):
        compute(transform, x._replace(**{field: None}), compiled=False)
    per_prompt = field in ("values", "prompt_confidence")
    for shape in ((3, 3), (3, 1), (), (1,), (2,)) if per_prompt else ((3,), (3, 1), (1, 3), (3, 3, 1), ()):
        with pytest.raises((AssertionError, ValueError, TypeError)):
            compute(transform, x._replace(**{field: np.ones(shape, np.float32)}), compiled=False)


def test_a_group_of_one_has_no_self_reward_to_compare():
    with pytest.raises(ValueError, match="mix_self_reward .* group_size is 1; it must be at least 2"):
        compute(MIX, inputs_of([[1], [0]], self_rewards=[[1], [0]]), compiled=False)


# -- eight devices ---------------------------------------------------------------------------------

EIGHT_DEVICES = """
    import json
    import jax, numpy as np
    from jax.sharding import Mesh, NamedSharding, PartitionSpec
    from jaxrl_reason import losses, methods
    import test_method_extensions as tests

    batches = [tests.a_batch(seed, P=8) for seed in range(2)]
    at_once = dict(reasoning_warmup=0, self_reward_warmup=0)
    made = [methods.stack("hero", "rlev", "progrpo", "laser", base=base, laser=at_once)
            for base in ("grpo", "reinforce_pp", "rloo")]

    @jax.jit
    def everything(batches):
        out = []
        for method in made:
            state = method.advantage.init()
            for x in batches:
                adv, state = method.advantage.update(None, state, x)
            out.append((adv, state))
        x = batches[0]
        valid = ~x.truncated
        loss = lambda r: losses.self_reward_loss(r, x.verdicts, valid)
        return out, jax.value_and_grad(loss)(x.self_rewards)

    one = everything(jax.device_put(batches, jax.devices()[0]))
    spread = NamedSharding(Mesh(np.array(jax.devices()), ("prompts",)), PartitionSpec("prompts"))
    eight = everything(jax.device_put(batches, spread))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), one, eight)
    print(json.dumps({"devices": len(eight[1][1].sharding.device_set), "spread": [float(a.std()) for a, _ in one[0]],
                      "loss": float(one[1][0])}))
"""


def test_the_same_numbers_on_eight_devices_as_on_one():
    here = os.path.dirname(os.path.abspath(__file__))
    env = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0",
        "PYTHONPATH": os.pathsep.join([here, os.path.dirname(here), *filter(None, [os.environ.get("PYTHONPATH")])]),
    }
    script = [sys.executable, "-c", textwrap.dedent(EIGHT_DEVICES)]
    done = subprocess.run(script, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    seen = json.loads(done.stdout)
    assert seen["devices"] == 8 and min(seen["spread"]) > 0.1 and seen["loss"] > 0.1


# -- the self-reward loss --------------------------------------------------------------------------

LOSS = losses.self_reward_loss
grad_loss = jax.jit(jax.value_and_grad(lambda r, v, ok, total=None: LOSS(r, v, ok, total=total)))


@either_way
@pytest.mark.parametrize("verdicts, expected", [([1, 0, 1, 0], 0.0725), ([1, 1, 1, 0], 0.228333)])
def test_self_reward_loss_by_hand(verdicts, expected, compiled):
    f = jax.jit(LOSS) if compiled else LOSS
    rewards = 0.1 * (jnp.array([[-13.0, -23, -18, -25]]) + 23)
    np.testing.assert_allclose(rewards, [[1, 0, 0.5, -0.2]], atol=1e-6)
    got = f(rewards, jnp.array([verdicts], bool), jnp.ones((1, 4)))
    np.testing.assert_allclose(got, expected, atol=1e-6)
    assert got.dtype == jnp.float32 and got.shape == ()
    assert reference.self_reward_loss(rewards, [verdicts], np.ones((1, 4))) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("seed", range(6))
def test_self_reward_loss_and_gradient_are_those_of_the_definition(seed):
    rng = np.random.default_rng(seed)
    rewards = rng.normal(0.5, 1, (3, 4)).astype(np.float32)
    verdicts, valid = rng.random((3, 4)) < [0.5, 0, 1, 0.2, 0.5, 0.9][seed], rng.random((3, 4)) < 0.7
    loss, gradient = grad_loss(rewards, verdicts, valid)
    assert float(loss) == pytest.approx(reference.self_reward_loss(rewards, verdicts, valid), rel=1e-5)
    for at in np.ndindex(3, 4):
        shift = np.zeros((3, 4))
        shift[at] = 1e-5
        value = lambda sign: reference.self_reward_loss(rewards.astype(np.float64) + sign * shift, verdicts, valid)
        assert float(gradient[at]) == pytest.approx((value(1) - value(-1)) / 2e-5, rel=1e-4, abs=1e-7)
        assert valid[at] or gradient[at] == 0


def test_an_empty_class_weighs_nothing_and_nothing_valid_is_zero():
    rewards, valid = jnp.array([[0.5, 0.2]]), jnp.array([[1, 1]])
    # one class: w = N / 2N = 1/2, so half the mean squared error
    assert float(LOSS(rewards, jnp.array([[True, True]]), valid)) == pytest.approx((0.25 + 0.64) / 4)
    assert float(LOSS(rewards, jnp.array([[False, False]]), valid)) == pytest.approx((0.25 + 0.04) / 4)
    loss, gradient = grad_loss(rewards, jnp.array([[True, False]]), 0 * valid)
    assert loss == 0 and (gradient == 0).all()


@pytest.mark.parametrize("junk", [NAN, INF, -INF, 1e30])
def test_invalid_places_may_hold_anything(junk):
    rewards, verdicts = (
        np.array([[0.5, 0.2, junk], [junk, 0.9, 0.1]], np.float32),
        np.array([[1, 0, 1], [0, 1, 0]], bool),
    )
    valid = np.isin(rewards, np.float32([0.5, 0.2, 0.9, 0.1]))
    loss, gradient = grad_loss(rewards, verdicts, valid)
    clean, clean_gradient = grad_loss(np.where(valid, rewards, 0), verdicts, valid)
    assert loss == clean > 0
    np.testing.assert_array_equal(gradient, clean_gradient)
    assert np.isfinite(gradient).all()


def test_parts_with_the_counts_of_the_whole_add_up():
    rng = np.random.default_rng(0)
    rewards, verdicts, valid = (
        rng.normal(size=(4, 3)).astype(np.float32),
        rng.random((4, 3)) < 0.4,
        rng.random((4, 3)) < 0.8,
    )
    verdicts[2], valid[3] = True, False  # parts with one class, and with nothing
    loss, gradient = grad_loss(rewards, verdicts, valid)
    total = losses.class_totals(jnp.asarray(verdicts), jnp.asarray(valid))
    assert (total.right, total.wrong) == ((verdicts & valid).sum(), (~verdicts & valid).sum())
    parts = [grad_loss(rewards[i : i + 1], verdicts[i : i + 1], valid[i : i + 1], total) for i in range(4)]
    assert sum(float(part[0]) for part in parts) == pytest.approx(float(loss), rel=1e-6)
    np.testing.assert_allclose(np.concatenate([part[1] for part in parts]), gradient, rtol=1e-5)


def test_the_loss_takes_its_verdicts_and_its_mask_in_any_dtype_and_refuses_other_shapes():
    rewards, verdicts = jnp.array([[0.5, 0.2, 0.7]], jnp.bfloat16), np.array([[1, 0, 1]])
    every = [
        LOSS(rewards, jnp.asarray(verdicts, a), jnp.asarray([[1, 1, 0]], b))
        for a in (bool, int, float)
        for b in (bool, float)
    ]
    assert len({float(x) for x in every}) == 1 and every[0].dtype == jnp.float32
    ok = jnp.ones((3, 3))
    for bad in (jnp.ones(3), jnp.ones((3, 1)), jnp.ones((1, 3)), jnp.ones((3, 3, 1))):
        for args in ((bad, ok, ok), (ok, bad, ok), (ok, ok, bad)):
            with pytest.raises(AssertionError):
                LOSS(*args)


# -- keywords --------------------------------------------------------------------------------------

OTHER = {
    "genre2": dict(expert_coefficient=0.05, base="grpo"),
    "hero": dict(
        alpha=0.3, beta=0.4, strata_eps=1.0, w_min=0.9, w_max=4.0, k=1.0, momentum=0.5, weight_on="reward", base="rloo"
    ),
    "laser": dict(
        alpha=0.5,
        beta_v=0.3,
        tau=0.5,
        min_std=0.45,
        reasoning_warmup=1,
        self_reward_warmup=1,
        reference="exact",
        token="z",
        base="rloo",
    ),
    "rlev": dict(alpha=1.0, clip=0.1, scale_on="advantage", base="rloo"),
    "progrpo": dict(alpha=0.9, skip_all_correct=True, base="rloo"),
}
OWN = {name: set(inner) for name, inner in OTHER.items()}


def behaviour(name, **options):
    """(advantages of two steps, the loss) under a method, of one batch."""
    now = dict(reasoning_warmup=0, self_reward_warmup=0) if name == "laser" else {}
    method = methods.create(name, **now | options)
    state, seen = method.advantage.init(), []
    for seed in (1, 2):
        adv, state = method.advantage.update(None, state, signals_of(a_batch(seed), method))
        seen.append(np.asarray(adv))
    return np.stack(seen), method.loss


@pytest.mark.parametrize("name, key", [(name, key) for name in EXTENSIONS for key in OTHER[name]])
def test_every_keyword_changes_what_the_method_does(name, key):
    assert set(methods.keywords(name)) >= OWN[name]
    needs = (
        dict(base="reinforce_pp_baseline") if key == "weight_on" else {}
    )  # the usual base cannot have it on the reward
    plain, changed = behaviour(name, **needs), behaviour(name, **needs | {key: OTHER[name][key]})
    assert plain[1] != changed[1] or np.abs(plain[0] - changed[0]).max() > 1e-4


def test_a_keyword_of_the_base_that_genre2_overrules_is_refused():
    for base in ("remax", "grpo"):
        with pytest.raises(ValueError, match="aggregation"):
            methods.create("genre2", base=base, aggregation="sequence_mean")


def test_every_keyword_of_an_extension_is_tried():
    for name in EXTENSIONS:
        base = methods.keywords(name)["base"]
        assert set(methods.keywords(name)) - set(methods.keywords(base)) <= OWN[name]

"""Tests properties of the transformations of HERO, LaSeR, RLEV and ProGRPO on random batches, and their errors."""

from hypothesis import given, settings
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from helpers.advantage_batches import (
    a_batch,
    compute,
    EVERY,
    inputs_of,
    MIX,
    NAN,
    REWEIGH,
    SCALE,
    STRATIFY,
    WEIGH,
    WIDE,
)
from jaxrl_reason import advantages

# -- properties ------------------------------------------------------------------------------------

finite = st.floats(-1e6, 1e6, width=32)


@st.composite
def graded(draw, values=finite):
    """Draws (scores, verdicts, rewards) of 2 groups of 4, with missing rewards."""
    several = lambda of: np.array(draw(st.lists(of, min_size=8, max_size=8))).reshape(2, 4)
    verdicts = several(st.booleans())
    missing = several(st.sampled_from([False, False, False, True]))
    return several(values).astype(np.float32), verdicts, np.where(missing, NAN, verdicts).astype(np.float32)


@settings(max_examples=60, deadline=None)
@given(graded(st.one_of(finite, st.sampled_from([0.0, 1.0, -1e37, 1e37, 1e-40]))))
def test_every_correct_answer_outranks_every_incorrect_one_for_all_scores(batch):
    scores, verdicts, rewards = batch
    for transform, alpha, beta in ((STRATIFY, 0.05, 0.05), (WIDE, 0.3, 0.6)):
        got, _ = compute(transform, inputs_of(rewards, model_scores=scores, verdicts=verdicts))
        there = ~np.isnan(rewards)
        assert np.isfinite(got).all() and (got[~there] == 0).all()
        for p in range(2):
            correct, incorrect = got[p][there[p] & verdicts[p]], got[p][there[p] & ~verdicts[p]]
            assert (correct >= 1 - beta - 1e-6).all() and (correct <= 1 + beta + 1e-6).all()
            assert (incorrect >= -alpha - 1e-6).all() and (incorrect <= alpha + 1e-6).all()
            if correct.size and incorrect.size:
                assert correct.min() > incorrect.max()
            order = lambda at: np.argsort(scores[p][at], kind="stable")
            for at in (there[p] & verdicts[p], there[p] & ~verdicts[p]):
                assert (np.diff(got[p][at][order(at)]) >= -1e-7).all()  # within a stratum the score decides


@settings(max_examples=30, deadline=None)
@given(graded(st.integers(-9, 9)), st.integers(-1000, 1000))
def test_only_differences_of_scores_matter(batch, shift):
    scores, verdicts, rewards = batch
    for transform in (STRATIFY, WEIGH):
        inputs = inputs_of(rewards, model_scores=scores, verdicts=verdicts)
        moved = inputs._replace(model_scores=scores + np.float32(shift))  # the sum of whole numbers is exact
        np.testing.assert_allclose(compute(transform, inputs)[0], compute(transform, moved)[0], rtol=1e-5, atol=1e-6)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**31), st.permutations(range(6)), st.permutations(range(5)))
def test_the_order_of_groups_and_of_completions_does_not_matter(seed, groups, members):
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


def test_a_group_depends_on_other_groups_only_through_the_running_mean():
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


# -- errors ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "build, message",
    [
        (lambda: advantages.stratify_by_verifier(0.5, 0.5), "alpha is 0.5 and beta is 0.5; .* their sum below 1"),
        (lambda: advantages.stratify_by_verifier(0.9, 0.2), "an incorrect answer could outrank a correct one"),
        (lambda: advantages.stratify_by_verifier(-0.1, 0.2), "both must be at least 0"),
        (lambda: advantages.stratify_by_verifier(0.1, -0.2), "both must be at least 0"),
        (lambda: advantages.stratify_by_verifier(eps=0.0), "eps is 0.0; .* greater than 0"),
        (lambda: advantages.weight_by_score_spread(2.0, 1.0), "w_min is 2.0 and w_max is 1.0"),
        (lambda: advantages.weight_by_score_spread(-1.0, 1.0), "0 <= w_min <= w_max"),
        (lambda: advantages.weight_by_score_spread(k=-1.0), "k is -1.0; it must be at least 0"),
        (lambda: advantages.weight_by_score_spread(momentum=1.0), r"momentum is 1.0; it must be in \[0, 1\)"),
        (lambda: advantages.weight_by_score_spread(momentum=-0.1), "momentum is -0.1"),
        (lambda: advantages.scale_by_value(-1.0), "alpha is -1.0 and clip is 1.0"),
        (lambda: advantages.scale_by_value(1.0, -1.0), "clip is -1.0"),
        (lambda: advantages.mix_self_reward(1.1), r"tau is 1.1; .* must be in \[0, 1\]"),
        (lambda: advantages.mix_self_reward(-0.1), "tau is -0.1"),
        (lambda: advantages.mix_self_reward(min_std=-0.1), "min_std is -0.1"),
        (lambda: advantages.reweight_by_confidence(-0.1), "alpha is -0.1; it must be at least 0"),
        (lambda: advantages.after(-1, SCALE), "steps is -1; it must be at least 0"),
        (lambda: advantages.after(2**31, SCALE), "steps is 2147483648; .* at most 2147483647"),
    ],
)
def test_a_parameter_out_of_range_raises(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_a_stratum_needs_a_group():
    inputs = advantages.AdvantageInputs(jnp.ones((2, 1)), jnp.ones((2, 1, 3)), model_scores=jnp.ones((2, 1)))
    with pytest.raises(ValueError, match="compares the completions of a prompt .* group_size is 1"):
        STRATIFY.update(inputs.rewards, (), inputs)


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
def test_a_missing_signal_or_a_wrong_shape_raises(transform, field):
    x = jax.tree.map(lambda v: v[:3, :3, :3] if v.ndim == 3 else v[:3, :3] if v.ndim == 2 else v[:3], a_batch(0))
    with pytest.raises(ValueError, match=f"{field}, which is None"):
        compute(transform, x._replace(**{field: None}), compiled=False)
    per_prompt = field in ("values", "prompt_confidence")
    for shape in ((3, 3), (3, 1), (), (1,), (2,)) if per_prompt else ((3,), (3, 1), (1, 3), (3, 3, 1), ()):
        with pytest.raises((AssertionError, ValueError, TypeError)):
            compute(transform, x._replace(**{field: np.ones(shape, np.float32)}), compiled=False)


def test_self_rewards_of_a_group_of_one_raise():
    with pytest.raises(ValueError, match="mix_self_reward .* group_size is 1; it must be at least 2"):
        compute(MIX, inputs_of([[1], [0]], self_rewards=[[1], [0]]), compiled=False)

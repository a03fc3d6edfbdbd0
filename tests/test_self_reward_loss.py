"""Tests LaSeR's loss against numbers worked by hand and its definition in numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from helpers import reference_methods as reference
from helpers.advantage_batches import either_way, INF, NAN
from jaxrl_reason import losses

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
def test_loss_and_gradient_follow_the_definition(seed):
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


def test_an_empty_class_weighs_nothing():
    rewards, valid = jnp.array([[0.5, 0.2]]), jnp.array([[1, 1]])
    # with one class, w = N / 2N = 1/2, so the loss is half of the mean squared error
    assert float(LOSS(rewards, jnp.array([[True, True]]), valid)) == pytest.approx((0.25 + 0.64) / 4)
    assert float(LOSS(rewards, jnp.array([[False, False]]), valid)) == pytest.approx((0.25 + 0.04) / 4)
    loss, gradient = grad_loss(rewards, jnp.array([[True, False]]), 0 * valid)
    assert loss == 0 and (gradient == 0).all()


@pytest.mark.parametrize("junk", [NAN, INF, -INF, 1e30])
def test_invalid_entries_may_hold_anything(junk):
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


def test_microbatches_add_up_to_the_batch():
    rng = np.random.default_rng(0)
    rewards, verdicts, valid = (
        rng.normal(size=(4, 3)).astype(np.float32),
        rng.random((4, 3)) < 0.4,
        rng.random((4, 3)) < 0.8,
    )
    verdicts[2], valid[3] = True, False  # one part has one class, and one part is empty
    loss, gradient = grad_loss(rewards, verdicts, valid)
    total = losses.class_totals(jnp.asarray(verdicts), jnp.asarray(valid))
    assert (total.correct, total.incorrect) == ((verdicts & valid).sum(), (~verdicts & valid).sum())
    parts = [grad_loss(rewards[i : i + 1], verdicts[i : i + 1], valid[i : i + 1], total) for i in range(4)]
    assert sum(float(part[0]) for part in parts) == pytest.approx(float(loss), rel=1e-6)
    np.testing.assert_allclose(np.concatenate([part[1] for part in parts]), gradient, rtol=1e-5)


def test_verdicts_and_mask_may_have_any_dtype_but_not_another_shape():
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

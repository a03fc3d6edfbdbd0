"""Tests chains of transformations, and transformations that start later."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from helpers.advantage_batches import compute, either_way, inputs_of
from jaxrl_reason import advantages

# -- the chain -------------------------------------------------------------------------------------


def test_the_chain_starts_from_the_rewards_and_applies_in_order():
    inputs = inputs_of([[3, 1, 2]], [[1, 2, 3]])
    plus = advantages.stateless(lambda adv, inputs: adv + inputs.rewards)
    double = advantages.stateless(lambda adv, inputs: 2 * adv)
    for parts, expected in (((), [3, 1, 2]), ((plus, double), [12, 4, 8]), ((double, plus), [9, 3, 6])):
        np.testing.assert_array_equal(compute(advantages.chain(*parts), inputs)[0], [expected])
    chain = advantages.chain(double)
    np.testing.assert_array_equal(chain.update(jnp.array([[1.0, 0, 5]]), chain.init(), inputs)[0], [[2, 0, 10]])


@either_way
def test_the_chain_carries_the_state_of_each_part(compiled):
    def counting(step):
        return advantages.AdvantageTransform(lambda: jnp.int32(0), lambda adv, n, inputs: (adv + n, n + step))

    chain = advantages.chain(counting(1), advantages.chain(counting(10), advantages.center_by_group()))
    update = jax.jit(chain.update) if compiled else chain.update
    state, inputs = chain.init(), inputs_of([[1, 0]])
    for _ in range(3):
        adv, state = update(None, state, inputs)
    assert jax.tree.leaves(state) == [3, 30]
    np.testing.assert_array_equal(adv, [[0.5, -0.5]])
    with pytest.raises(ValueError, match="1 parts and the chain 2"):
        chain.update(None, state[:1], inputs)


def test_no_gradient_flows_through_advantages():
    rewards = jnp.array([[1.0, 0.25, -2.0]])

    def total(rewards, kl, greedy):
        inputs = advantages.AdvantageInputs(rewards, jnp.ones((1, 3, 2)), greedy_rewards=greedy, kl=kl)
        chain = advantages.chain(
            advantages.subtract_greedy(), advantages.standardize_by_group(), advantages.whiten_by_token(0.1)
        )
        return (chain.update(None, chain.init(), inputs)[0] * jnp.arange(6.0).reshape(1, 3, 2)).sum()

    kl, greedy = jnp.arange(6.0).reshape(1, 3, 2), jnp.array([0.5])
    value, gradients = jax.jit(jax.value_and_grad(total, (0, 1, 2)))(rewards, kl, greedy)
    assert value != 0
    for gradient in gradients:
        assert (gradient == 0).all()


def test_advantages_are_float32_for_rewards_of_every_dtype():
    for dtype in (jnp.bfloat16, jnp.float16, jnp.int32, bool):
        inputs = inputs_of([[1, 0, 0, 1]])
        inputs = inputs._replace(rewards=inputs.rewards.astype(dtype), completion_mask=jnp.ones((1, 4, 2), bool))
        got, _ = compute(advantages.standardize_by_group(), inputs)
        assert got.dtype == np.float32
        np.testing.assert_allclose(got, [[0.866024, -0.866024, -0.866024, 0.866024]], atol=2e-6)


def test_vmap_gives_the_same_advantages():
    rewards = np.random.default_rng(0).integers(0, 2, (4, 2, 3)).astype(np.float32)
    mask, greedy = np.ones((4, 2, 3, 5), np.float32), np.random.default_rng(1).random((4, 2)).astype(np.float32)
    chain = advantages.chain(advantages.subtract_greedy(), advantages.center_by_group(), advantages.whiten_by_token())
    update = lambda r, m, g: chain.update(None, chain.init(), advantages.AdvantageInputs(r, m, greedy_rewards=g))[0]
    alone = jax.jit(update)
    one_by_one = [alone(r, m, g) for r, m, g in zip(rewards, mask, greedy)]
    np.testing.assert_allclose(jax.jit(jax.vmap(update))(rewards, mask, greedy), one_by_one, atol=1e-6)


# -- after -----------------------------------------------------------------------------------------


@either_way
@pytest.mark.parametrize("steps", [0, 1, 3])
def test_a_delayed_transformation_leaves_advantages_alone_and_updates_its_state(steps, compiled):
    def counting():
        return advantages.AdvantageTransform(lambda: jnp.int32(0), lambda adv, n, inputs: (adv * (10 + n), n + 1))

    chain = advantages.chain(advantages.after(steps, counting()))
    update = jax.jit(chain.update) if compiled else chain.update
    state, seen = chain.init(), []
    for _ in range(5):
        adv, state = update(None, state, inputs_of([[1, 0]]))
        seen.append(float(adv[0, 0]))
    assert seen == [1.0 if n < steps else 10.0 + n for n in range(5)]  # its state changes from the first update on


def test_a_delayed_transformation_may_be_per_token():
    """Two prompts of two completions of two tokens: these shapes broadcast in wrong ways too."""
    transform = advantages.after(1, advantages.whiten_by_token(kl_coef=0.1))
    kl = jnp.arange(8.0).reshape(2, 2, 2)
    inputs = advantages.AdvantageInputs(jnp.array([[1.0, 0.0], [0.0, 1.0]]), jnp.ones((2, 2, 2)), kl=kl)
    first, state = transform.update(inputs.rewards, transform.init(), inputs)
    np.testing.assert_array_equal(first, np.repeat(inputs.rewards[..., None], 2, axis=-1))
    second, _ = transform.update(inputs.rewards, state, inputs)
    np.testing.assert_allclose(second, advantages.whiten_by_token(kl_coef=0.1).update(inputs.rewards, (), inputs)[0])

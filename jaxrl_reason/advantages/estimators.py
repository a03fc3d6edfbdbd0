"""Transformations of the general estimators, from rewards to advantages.

Statistics of a group are over the completions with a reward. std1 divides by n - 1. With G < 2, the `update` of a group
estimator (standardize_by_group, center_by_group, leave_one_out) raises ValueError.
"""

import chex
import jax
import jax.numpy as jnp

from jaxrl_reason.advantages.groups import group_deviation, has_reward, require, require_group
from jaxrl_reason.advantages.types import AdvantageInputs, Advantages, AdvantageTransform, PerCompletion, stateless


def standardize_by_group(eps: float = 1e-6) -> AdvantageTransform:
    """Computes (r - mean_G r) / (std1_G r + eps): GRPO, arXiv 2402.03300, eq. 4.

    eps >= 0 keeps the division finite; a negative one raises ValueError. A tied group gives exactly 0 for every eps.

    Example:
      >>> inputs = AdvantageInputs(jnp.array([[1.0, 0.0, 0.0, 1.0]]), jnp.ones((1, 4, 3)))
      >>> print(standardize_by_group().update(inputs.rewards, (), inputs)[0].round(2))
      [[ 0.87 -0.87 -0.87  0.87]]
    """
    if eps < 0:
        raise ValueError(f"eps is {eps}; it keeps a division finite and must be at least 0.")

    def update(advantages: PerCompletion, inputs: AdvantageInputs) -> PerCompletion:
        require_group("standardize_by_group", advantages)
        deviation, std = group_deviation(advantages, has_reward(inputs))
        return jnp.where(std > 0, deviation / (std + eps), 0.0)

    return stateless(update)


def center_by_group() -> AdvantageTransform:
    """Computes r - mean_G r: Dr.GRPO, arXiv 2503.20783, section 3.2.

    Example:
      >>> inputs = AdvantageInputs(jnp.array([[1.0, 0.0, 0.0, 0.0]]), jnp.ones((1, 4, 3)))
      >>> print(center_by_group().update(inputs.rewards, (), inputs)[0])
      [[ 0.75 -0.25 -0.25 -0.25]]
    """

    def update(advantages: PerCompletion, inputs: AdvantageInputs) -> PerCompletion:
        require_group("center_by_group", advantages)
        return group_deviation(advantages, has_reward(inputs))[0]

    return stateless(update)


def divide_by_group_mean(eps: float = 1e-6) -> AdvantageTransform:
    """Computes (r - mean_G r) / (mean_G r + eps) for rewards in [0, 1]: MaxRL, arXiv 2602.02710.

    A correct completion of a prompt that is rarely solved weighs most: 1 of 4 correct gives 3 and -1. A tied group gives
    exactly 0. A group with a negative reward gives NaN, because its mean is no share of correct completions. eps >= 0
    keeps the division finite; a negative one raises ValueError.

    Example:
      >>> inputs = AdvantageInputs(jnp.array([[1.0, 0.0, 0.0, 0.0]]), jnp.ones((1, 4, 3)))
      >>> print(divide_by_group_mean().update(inputs.rewards, (), inputs)[0].round(2))
      [[ 3. -1. -1. -1.]]
    """
    if eps < 0:
        raise ValueError(f"eps is {eps}; it keeps a division finite and must be at least 0.")

    def update(advantages: PerCompletion, inputs: AdvantageInputs) -> PerCompletion:
        require_group("divide_by_group_mean", advantages)
        present = has_reward(inputs)
        deviation, std = group_deviation(advantages, present)
        count = jnp.maximum(present.sum(axis=1, keepdims=True), 1)
        mean = jnp.where(present, advantages, 0.0).sum(axis=1, keepdims=True) / count
        negative = (present & (advantages < 0)).any(axis=1, keepdims=True)
        return jnp.where(negative, jnp.nan, jnp.where(std > 0, deviation / (mean + eps), 0.0))

    return stateless(update)


def leave_one_out() -> AdvantageTransform:
    """Subtracts the mean of the *other* completions, n / (n - 1) (r - mean_G r): RLOO, arXiv 2402.14740, eq. 8.

    Example:
      >>> inputs = AdvantageInputs(jnp.array([[3.0, 0.0, 0.0]]), jnp.ones((1, 3, 4)))
      >>> print(leave_one_out().update(inputs.rewards, (), inputs)[0])
      [[ 3.  -1.5 -1.5]]
    """

    def update(advantages: PerCompletion, inputs: AdvantageInputs) -> PerCompletion:
        require_group("leave_one_out", advantages)
        present = has_reward(inputs)
        count = present.sum(axis=1, keepdims=True)
        return group_deviation(advantages, present)[0] * count / jnp.maximum(count - 1, 1)

    return stateless(update)


def subtract_greedy() -> AdvantageTransform:
    """Subtracts the reward of the greedy completion of the same prompt: ReMax, arXiv 2310.10505, eq. 6.

    A prompt whose greedy completion has no reward (NaN) has no baseline: its advantages are 0. `update` raises
    ValueError without inputs.greedy_rewards.

    Example:
      >>> inputs = AdvantageInputs(jnp.array([[1.0, 0.0]]), jnp.ones((1, 2, 3)), greedy_rewards=jnp.array([0.25]))
      >>> print(subtract_greedy().update(inputs.rewards, (), inputs)[0])
      [[ 0.75 -0.25]]
    """

    def update(advantages: PerCompletion, inputs: AdvantageInputs) -> PerCompletion:
        baseline = require("subtract_greedy", inputs, "greedy_rewards")
        chex.assert_rank([advantages, baseline], [2, 1])
        chex.assert_equal_shape_prefix([advantages, baseline], 1)
        return jnp.where(jnp.isnan(baseline)[:, None], 0.0, advantages - baseline[:, None])

    return stateless(update)


def whiten_by_token(kl_coef: float = 0.0) -> AdvantageTransform:
    """Whitens over all completion tokens of the global batch: REINFORCE++, arXiv 2501.03262.

    Computes (R - mean) * rsqrt(var + 1e-8), with mean = sum(R m) / sum(m) and the unbiased variance over the N masked
    tokens. Without KL, R is the reward on every token of a completion, and the result is f32[P, G]. With kl_coef > 0,
    -kl_coef * kl enters the reward of each token, R is the return-to-go (gamma 1), and the result is f32[P, G, T]. It
    is 0 on masked tokens and on completions whose KL is not finite. Raises ValueError for a negative kl_coef,
    and `update` for a positive one without inputs.kl.

    Example:
      >>> inputs = AdvantageInputs(jnp.array([[1.0, 0.0]]), jnp.array([[[1, 0], [1, 1]]]))
      >>> print(whiten_by_token().update(inputs.rewards, (), inputs)[0].round(2))
      [[ 1.15 -0.58]]
    """
    if kl_coef < 0:
        raise ValueError(f"kl_coef is {kl_coef}; it must be at least 0 (a negative one rewards divergence).")

    def update(advantages: PerCompletion, inputs: AdvantageInputs) -> Advantages:
        chex.assert_rank(advantages, 2)
        present = has_reward(inputs)
        mask = inputs.completion_mask.astype(bool) & present[..., None]
        returns = jnp.where(present, advantages, 0.0)[..., None]
        if kl_coef:
            kl = require("whiten_by_token(kl_coef > 0)", inputs, "kl")
            chex.assert_equal_shape([kl, inputs.completion_mask])
            # A completion with a broken KL would spoil the statistics of the whole batch.
            mask &= ~(mask & ~jnp.isfinite(kl)).any(axis=-1, keepdims=True)
            penalty = kl_coef * jnp.where(mask, kl, 0.0)
            returns = returns - jnp.cumsum(penalty[..., ::-1], axis=-1)[..., ::-1]
        returns = jnp.broadcast_to(returns, mask.shape)
        count = mask.sum()
        tied = jnp.where(mask, returns, -jnp.inf).max() <= jnp.where(mask, returns, jnp.inf).min()
        mean = jnp.where(mask, returns, 0.0).sum() / jnp.maximum(count, 1)
        deviation = jnp.where(tied, 0.0, returns - mean)
        # In units of the largest deviation, if it is above 1, no square overflows.
        unit = jnp.maximum(jnp.where(mask, jnp.abs(deviation), 0.0).max(), 1.0)
        scaled = deviation / unit
        variance = jnp.where(mask, jnp.square(scaled), 0.0).sum() / jnp.maximum(count - 1, 1)
        whitened = scaled * jax.lax.rsqrt(variance + 1e-8 / unit**2)
        return jnp.where(mask, whitened, 0.0) if kl_coef else whitened[..., 0]

    return stateless(update)


def soft_overlong_penalty(max_length: int, cache_length: int) -> AdvantageTransform:
    """Adds a penalty on length to the reward: DAPO, arXiv 2503.14476, eq. 13.

    The penalty is 0 up to max_length - cache_length tokens (the end token included), falls linearly to -1 at
    max_length, and is -1 beyond. Raises ValueError for a cache_length outside 1..max_length.

    Example:
      >>> inputs = AdvantageInputs(jnp.ones((1, 2)), jnp.array([[[1, 1, 0, 0], [1, 1, 1, 0]]]))
      >>> print(soft_overlong_penalty(max_length=4, cache_length=2).update(inputs.rewards, (), inputs)[0])
      [[1.  0.5]]
    """
    if not 0 < cache_length <= max_length:
        raise ValueError(
            f"soft_overlong_penalty: cache_length is {cache_length}; it must be in 1..max_length ({max_length})."
        )

    def update(advantages: PerCompletion, inputs: AdvantageInputs) -> PerCompletion:
        chex.assert_rank(advantages, 2)
        lengths = inputs.completion_mask.astype(jnp.float32).sum(axis=-1)
        return advantages + jnp.clip((max_length - cache_length - lengths) / cache_length, -1.0, 0.0)

    return stateless(update)

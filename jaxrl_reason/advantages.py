"""The shared advantage computation: a chain of pure transformations, in the manner of optax.

    transform = chain(soft_overlong_penalty(512, 128), standardize_by_group())
    state = transform.init()
    advantages, state = transform.update(inputs.rewards, state, inputs)

A group is axis 1: P prompts, G completions each, T tokens each. A completion whose reward is NaN has
no reward ("leave this sample out"): it enters no statistic and its advantage is 0. Advantages are
constants: no gradient flows through any transformation.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp


class AdvantageInputs(NamedTuple):
    """What a chain can read. Every field but the first two may be None.

    Attributes:
      rewards: f32[P, G] verifier verdict or scalar reward; NaN where there is none.
      completion_mask: [P, G, T], 1 on sampled tokens, end token included.
      verdicts: bool[P, G] right or wrong, where `rewards` is shaped or summed; None: rewards > 0.5.
      greedy_rewards: f32[P] reward of the greedy completion.
      model_scores: f32[P, G] reward-model scores.
      values: f32[P] human value in [0, 1].
      self_rewards: f32[P, G].
      prompt_confidence: f32[P].
      answer_confidence: f32[P, G].
      truncated: bool[P, G], no end token within the budget.
      kl: f32[P, G, T] per-token logp - logp_ref, where KL enters the reward.
    """

    rewards: jax.Array
    completion_mask: jax.Array
    verdicts: jax.Array | None = None
    greedy_rewards: jax.Array | None = None
    model_scores: jax.Array | None = None
    values: jax.Array | None = None
    self_rewards: jax.Array | None = None
    prompt_confidence: jax.Array | None = None
    answer_confidence: jax.Array | None = None
    truncated: jax.Array | None = None
    kl: jax.Array | None = None


class AdvantageTransform(NamedTuple):
    """A pair of pure functions; the state is a pytree that is checkpointed with the run.

    Attributes:
      init: () -> state.
      update: (advantages f32[P, G] or f32[P, G, T], state, inputs) -> (advantages, state).
    """

    init: Callable[[], Any]
    update: Callable[[jax.Array, Any, AdvantageInputs], tuple[jax.Array, Any]]


def stateless(function: Callable[[jax.Array, AdvantageInputs], jax.Array]) -> AdvantageTransform:
    """A transform from a function (advantages, inputs) -> advantages."""
    return AdvantageTransform(lambda: (), lambda adv, state, inputs: (function(adv, inputs), state))


def chain(*transforms: AdvantageTransform) -> AdvantageTransform:
    """Applies transforms in order. The chain starts from `inputs.rewards` where it is given None."""

    def init():
        return tuple(t.init() for t in transforms)

    def update(advantages, state, inputs):
        chex.assert_rank([inputs.rewards, inputs.completion_mask], [2, 3])
        chex.assert_equal_shape_prefix([inputs.rewards, inputs.completion_mask], 2)
        if len(state) != len(transforms):
            raise ValueError(
                f"The advantage state has {len(state)} parts and the chain {len(transforms)}: "
                "it was made by another chain."
            )
        advantages = inputs.rewards if advantages is None else advantages
        advantages = jnp.asarray(advantages, jnp.float32)
        new = []
        for transform, part in zip(transforms, state):
            advantages, part = transform.update(advantages, part, inputs)
            new.append(part)
        present = has_reward(inputs).reshape(inputs.rewards.shape + (1,) * (advantages.ndim - 2))
        return jax.lax.stop_gradient((jnp.where(present, advantages, 0.0), tuple(new)))

    return AdvantageTransform(init, update)


# -- group statistics ------------------------------------------------------------------------------


def has_reward(inputs: AdvantageInputs) -> jax.Array:
    """bool[P, G]: False where a completion's reward is missing."""
    return ~jnp.isnan(inputs.rewards)


def group_tied(x: jax.Array, present: jax.Array) -> jax.Array:
    """bool[P, 1]: fewer than two present values, or all of them equal (exactly: no rounding enters)."""
    return jnp.where(present, x, -jnp.inf).max(axis=1, keepdims=True) <= jnp.where(present, x, jnp.inf).min(
        axis=1, keepdims=True
    )


def group_deviation(x: jax.Array, present: jax.Array) -> tuple[jax.Array, jax.Array]:
    """x minus its group's mean over present values, and their std1 (n - 1); both 0 in a tied group.

    Two passes: the deviations are squared, not the values, so that [1, 1.00001] has a spread.
    """
    count = present.sum(axis=1, keepdims=True)
    live = present & ~group_tied(x, present)
    mean = jnp.where(present, x, 0.0).sum(axis=1, keepdims=True) / jnp.maximum(count, 1)
    deviation = jnp.where(live, x - mean, 0.0)
    variance = jnp.square(deviation).sum(axis=1, keepdims=True) / jnp.maximum(count - 1, 1)
    return deviation, jnp.sqrt(variance)


def _require_group(name: str, advantages: jax.Array) -> None:
    chex.assert_rank(advantages, 2)
    if advantages.shape[1] < 2:
        raise ValueError(
            f"{name} compares the completions of a prompt with each other, and group_size is "
            f"{advantages.shape[1]}; it must be at least 2."
        )


def _require(name: str, field: str, value) -> None:
    if value is None:
        raise ValueError(f"{name} needs AdvantageInputs.{field}, which is None.")


# -- transformations -------------------------------------------------------------------------------


def standardize_by_group(eps: float = 1e-6) -> AdvantageTransform:
    """(r - mean_G r) / (std1_G r + eps): GRPO, arXiv 2402.03300, eq. 4. A tied group gives exactly 0."""
    if eps < 0:
        raise ValueError(f"eps is {eps}; it keeps a division finite and must be at least 0.")

    def update(advantages, inputs):
        _require_group("standardize_by_group", advantages)
        deviation, std = group_deviation(advantages, has_reward(inputs))
        return jnp.where(std > 0, deviation / (std + eps), 0.0)

    return stateless(update)


def center_by_group() -> AdvantageTransform:
    """r - mean_G r: Dr.GRPO, arXiv 2503.20783, section 3.2."""

    def update(advantages, inputs):
        _require_group("center_by_group", advantages)
        return group_deviation(advantages, has_reward(inputs))[0]

    return stateless(update)


def leave_one_out() -> AdvantageTransform:
    """r minus the mean of the *other* completions: n/(n-1) * (r - mean), RLOO, arXiv 2402.14740, eq. 8."""

    def update(advantages, inputs):
        _require_group("leave_one_out", advantages)
        present = has_reward(inputs)
        count = present.sum(axis=1, keepdims=True)
        return group_deviation(advantages, present)[0] * count / jnp.maximum(count - 1, 1)

    return stateless(update)


def subtract_greedy() -> AdvantageTransform:
    """r - r(greedy completion of the same prompt): ReMax, arXiv 2310.10505, eq. 6.

    A prompt whose greedy completion has no reward (NaN) has no baseline: its advantages are 0.
    """

    def update(advantages, inputs):
        _require("subtract_greedy", "greedy_rewards", inputs.greedy_rewards)
        chex.assert_rank([advantages, inputs.greedy_rewards], [2, 1])
        chex.assert_equal_shape_prefix([advantages, inputs.greedy_rewards], 1)
        advantages = advantages - inputs.greedy_rewards[:, None]
        return jnp.where(jnp.isnan(inputs.greedy_rewards)[:, None], 0.0, advantages)

    return stateless(update)


def whiten_by_token(kl_coef: float = 0.0) -> AdvantageTransform:
    """REINFORCE++'s whitening over all completion tokens of the global batch, arXiv 2501.03262.

    mean = sum(R m) / sum(m), unbiased variance over the N masked tokens, (R - mean) * rsqrt(var + 1e-8).
    With kl_coef > 0, -kl_coef * kl enters each token's reward, R is the return-to-go (gamma 1), and the
    result is per token, f32[P, G, T], 0 where masked and on completions whose KL is not finite; otherwise R is the same on every token of a
    completion, and the result is f32[P, G].
    """
    if kl_coef < 0:
        raise ValueError(f"kl_coef is {kl_coef}; it must be at least 0 (a negative one rewards divergence).")

    def update(advantages, inputs):
        chex.assert_rank(advantages, 2)
        present = has_reward(inputs)
        mask = inputs.completion_mask.astype(bool) & present[..., None]
        returns = jnp.where(present, advantages, 0.0)[..., None]
        if kl_coef:
            _require("whiten_by_token(kl_coef > 0)", "kl", inputs.kl)
            chex.assert_equal_shape([inputs.kl, inputs.completion_mask])
            # A completion with a broken KL would spoil the statistics of the whole batch.
            mask &= ~(mask & ~jnp.isfinite(inputs.kl)).any(axis=-1, keepdims=True)
            penalty = kl_coef * jnp.where(mask, inputs.kl, 0.0)
            returns = returns - jnp.cumsum(penalty[..., ::-1], axis=-1)[..., ::-1]
        returns = jnp.broadcast_to(returns, mask.shape)
        count = mask.sum()
        tied = jnp.where(mask, returns, -jnp.inf).max() <= jnp.where(mask, returns, jnp.inf).min()
        mean = jnp.where(mask, returns, 0.0).sum() / jnp.maximum(count, 1)
        deviation = jnp.where(tied, 0.0, returns - mean)
        variance = jnp.where(mask, jnp.square(deviation), 0.0).sum() / jnp.maximum(count - 1, 1)
        whitened = deviation * jax.lax.rsqrt(variance + 1e-8)
        return jnp.where(mask, whitened, 0.0) if kl_coef else whitened[..., 0]

    return stateless(update)


def soft_overlong_penalty(max_length: int, cache_length: int) -> AdvantageTransform:
    """DAPO's length penalty, arXiv 2503.14476, eq. 13, added to the reward.

    0 up to max_length - cache_length tokens, then linear to -1 at max_length, -1 beyond.
    """
    if not 0 < cache_length <= max_length:
        raise ValueError(
            f"soft_overlong_penalty: cache_length is {cache_length}; it must lie in 1..max_length ({max_length})."
        )

    def update(advantages, inputs):
        chex.assert_rank(advantages, 2)
        lengths = inputs.completion_mask.astype(jnp.float32).sum(axis=-1)
        return advantages + jnp.clip((max_length - cache_length - lengths) / cache_length, -1.0, 0.0)

    return stateless(update)

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
import numpy as np


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
        present = _over_tokens(has_reward(inputs), advantages)
        return jax.lax.stop_gradient((jnp.where(present, advantages, 0.0), tuple(new)))

    return AdvantageTransform(init, update)


# -- group statistics ------------------------------------------------------------------------------


def has_reward(inputs: AdvantageInputs) -> jax.Array:
    """bool[P, G]: False where a completion's reward is missing, or a reward model's score of it is not finite."""
    present = ~jnp.isnan(inputs.rewards)
    return present if inputs.model_scores is None else present & jnp.isfinite(inputs.model_scores)


def is_right(inputs: AdvantageInputs) -> jax.Array:
    """bool[P, G]: the verdicts, by default rewards > 0.5; False where the reward is missing."""
    verdicts = inputs.rewards > 0.5 if inputs.verdicts is None else inputs.verdicts.astype(bool)
    return verdicts & has_reward(inputs)


def group_tied(x: jax.Array, present: jax.Array) -> jax.Array:
    """bool[P, 1]: fewer than two present values, or all of them equal (exactly: no rounding enters)."""
    return jnp.where(present, x, -jnp.inf).max(axis=1, keepdims=True) <= jnp.where(present, x, jnp.inf).min(
        axis=1, keepdims=True
    )


def group_deviation(x: jax.Array, present: jax.Array) -> tuple[jax.Array, jax.Array]:
    """x minus its group's mean over present values, and their std1 (n - 1); both 0 in a tied group.

    Two passes: the deviations are squared, not the values, so that [1, 1.00001] has a spread. And squared in units of the
    largest, so that 1e20 does not overflow.
    """
    count = present.sum(axis=1, keepdims=True)
    live = present & ~group_tied(x, present)
    mean = jnp.where(present, x, 0.0).sum(axis=1, keepdims=True) / jnp.maximum(count, 1)
    deviation = jnp.where(live, x - mean, 0.0)
    largest = jnp.abs(deviation).max(axis=1, keepdims=True)
    unit = jnp.where(largest > 0, largest, 1.0)
    variance = jnp.square(deviation / unit).sum(axis=1, keepdims=True) / jnp.maximum(count - 1, 1)
    return deviation, unit * jnp.sqrt(variance)


def _require_group(name: str, advantages: jax.Array) -> None:
    chex.assert_rank(advantages, 2)
    if advantages.shape[1] < 2:
        raise ValueError(
            f"{name} compares the completions of a prompt with each other, and group_size is "
            f"{advantages.shape[1]}; it must be at least 2."
        )


def _require(name: str, inputs: AdvantageInputs, *fields: str) -> None:
    for field in fields:
        if getattr(inputs, field) is None:
            raise ValueError(f"{name} needs AdvantageInputs.{field}, which is None.")


def _over_tokens(x: jax.Array, advantages: jax.Array) -> jax.Array:
    """x [P] or [P, G] with the axes it lacks to meet advantages [P, G] or [P, G, T]."""
    return x.reshape(x.shape + (1,) * (advantages.ndim - x.ndim))


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
        _require("subtract_greedy", inputs, "greedy_rewards")
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
            _require("whiten_by_token(kl_coef > 0)", inputs, "kl")
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


def stratify_by_verifier(alpha: float = 0.05, beta: float = 0.05, eps: float = 1e-6) -> AdvantageTransform:
    """HERO's reward, arXiv 2510.07242: the verifier gates, the reward model grades.

    Per group and per stratum of the verdict, z = (s - min) / (max - min + eps) over the reward model's scores s;
    wrong: -alpha + 2 alpha z, right: 1 - beta + 2 beta z. A stratum of one, or all tied, sits on its floor.
    The result takes the place of the reward.

    Raises:
      ValueError: alpha or beta is negative or alpha + beta >= 1, where a wrong answer could outrank a right one.
    """
    if min(alpha, beta) < 0 or np.float32(alpha) + np.float32(beta) >= 1:
        raise ValueError(
            f"stratify_by_verifier: alpha is {alpha} and beta is {beta}; both must be at least 0 and their sum below 1, "
            "which is what keeps every right answer above every wrong one."
        )
    if eps <= 0:
        raise ValueError(f"stratify_by_verifier: eps is {eps}; it keeps a division finite and must be greater than 0.")

    def update(advantages, inputs):
        chex.assert_rank(advantages, 2)
        _require("stratify_by_verifier", inputs, "model_scores")
        chex.assert_equal_shape([advantages, inputs.model_scores])
        present, right = has_reward(inputs), is_right(inputs)

        def position(stratum):
            """z of each score within its stratum; 0 where the stratum is tied."""
            scores = jnp.where(stratum, inputs.model_scores.astype(jnp.float32), 0.0)
            low = jnp.where(stratum, scores, jnp.inf).min(axis=1, keepdims=True)
            high = jnp.where(stratum, scores, -jnp.inf).max(axis=1, keepdims=True)
            occupied = stratum.any(axis=1, keepdims=True)
            low, high = jnp.where(occupied, low, 0.0), jnp.where(occupied, high, 0.0)
            return (scores - low) / (high - low + eps)

        graded_right = 1 - beta + 2 * beta * position(right)
        graded_wrong = -alpha + 2 * alpha * position(present & ~right)
        return jnp.where(right, graded_right, graded_wrong)

    return stateless(update)


class SpreadState(NamedTuple):
    """Running mean over steps of the groups' score spread: f32 scalar, and whether a batch has been seen."""

    mean: jax.Array
    seen: jax.Array


def weight_by_score_spread(
    w_min: float = 0.5, w_max: float = 2.0, k: float = 5.0, momentum: float = 0.9
) -> AdvantageTransform:
    """HERO's variance-aware weight of a prompt, arXiv 2510.07242.

    w = w_min + (w_max - w_min) sigmoid(k (sigma - sigma_bar)): sigma is the std1 of the group's raw scores, sigma_bar their
    running mean over steps (this one included; the first initialises it), which is the state. The weight
    multiplies what the chain has so far: behind a division by the group's std, for in front of one it cancels.
    """
    if not 0 <= w_min <= w_max:
        raise ValueError(
            f"weight_by_score_spread: w_min is {w_min} and w_max is {w_max}; 0 <= w_min <= w_max must hold."
        )
    if k < 0:
        raise ValueError(
            f"weight_by_score_spread: k is {k}; it must be at least 0 (steeper for prompts with more spread)."
        )
    if not 0 <= momentum < 1:
        raise ValueError(f"weight_by_score_spread: momentum is {momentum}; it must lie in [0, 1).")

    def init():
        return SpreadState(jnp.float32(0.0), jnp.bool_(False))

    def update(advantages, state, inputs):
        _require("weight_by_score_spread", inputs, "model_scores")
        chex.assert_equal_shape([inputs.rewards, inputs.model_scores])
        present = has_reward(inputs)
        _, sigma = group_deviation(inputs.model_scores.astype(jnp.float32), present)
        counted = present.sum(axis=1, keepdims=True) > 1  # one score has no spread
        batch_mean = jnp.where(counted, sigma, 0.0).sum() / jnp.maximum(counted.sum(), 1)
        moved = jnp.where(state.seen, momentum * state.mean + (1 - momentum) * batch_mean, batch_mean)
        state = SpreadState(jnp.where(counted.any(), moved, state.mean), state.seen | counted.any())
        weight = w_min + (w_max - w_min) * jax.nn.sigmoid(k * (sigma - state.mean))
        return advantages * _over_tokens(weight[:, 0], advantages), state

    return AdvantageTransform(init, update)


def scale_by_value(alpha: float = 10.0, clip: float = 1.0) -> AdvantageTransform:
    """RLEV's scale of a prompt, arXiv 2510.20187: s = 1 + min(alpha v, clip), v in [0, 1] its human value.

    Multiplies what the chain has so far: the reward, or, behind a division by the group's std (which would cancel it), the
    advantage.
    """
    if alpha < 0 or clip < 0:
        raise ValueError(f"scale_by_value: alpha is {alpha} and clip is {clip}; both must be at least 0.")

    def update(advantages, inputs):
        _require("scale_by_value", inputs, "values")
        chex.assert_rank(inputs.values, 1)
        chex.assert_equal_shape_prefix([advantages, inputs.values], 1)
        scale = 1 + jnp.minimum(alpha * inputs.values.astype(jnp.float32), clip)
        return advantages * _over_tokens(scale, advantages)

    return stateless(update)


def mix_self_reward(tau: float = 0.1, min_std: float = 0.1) -> AdvantageTransform:
    """LaSeR's mixed advantage, arXiv 2510.14943: (1 - tau) A + tau A_s.

    A_s standardises (std1) the self-rewards clipped to [0, 1] by group; where their std is at most min_std, A stays. A
    completion without a self-reward (truncated, or not finite) counts as 0, in the statistics and for itself.
    """
    if not 0 <= tau <= 1:
        raise ValueError(f"mix_self_reward: tau is {tau}; it is the share of the self-reward and must lie in [0, 1].")
    if min_std < 0:
        raise ValueError(f"mix_self_reward: min_std is {min_std}; it must be at least 0.")

    def update(advantages, inputs):
        _require_group("mix_self_reward", inputs.rewards)
        _require("mix_self_reward", inputs, "self_rewards")
        chex.assert_equal_shape([inputs.rewards, inputs.self_rewards])
        has_one = jnp.isfinite(inputs.self_rewards)
        if inputs.truncated is not None:
            has_one &= ~inputs.truncated.astype(bool)
        clipped = jnp.clip(jnp.where(has_one, inputs.self_rewards.astype(jnp.float32), 0.0), 0.0, 1.0)
        deviation, std = group_deviation(clipped, has_reward(inputs))
        spread = std > min_std
        own = _over_tokens(deviation / jnp.where(spread, std, 1.0), advantages)
        return jnp.where(_over_tokens(spread[:, 0], advantages), (1 - tau) * advantages + tau * own, advantages)

    return stateless(update)


def reweight_by_confidence(alpha: float = 0.3, skip_all_correct: bool = False) -> AdvantageTransform:
    """ProGRPO's re-weighting, arXiv 2602.05281: A + alpha (c(q) - c(o|q)).

    A group without a right answer keeps its A; with skip_all_correct one without a wrong answer too. The added
    term is not re-centred.
    """
    if alpha < 0:
        raise ValueError(f"reweight_by_confidence: alpha is {alpha}; it must be at least 0.")

    def update(advantages, inputs):
        _require("reweight_by_confidence", inputs, "prompt_confidence", "answer_confidence")
        chex.assert_rank(inputs.prompt_confidence, 1)
        chex.assert_equal_shape_prefix([inputs.rewards, inputs.prompt_confidence], 1)
        chex.assert_equal_shape([inputs.rewards, inputs.answer_confidence])
        right = is_right(inputs)
        applies = right.any(axis=1, keepdims=True)
        if skip_all_correct:
            applies &= (~right & has_reward(inputs)).any(axis=1, keepdims=True)
        gap = (inputs.prompt_confidence[:, None] - inputs.answer_confidence).astype(jnp.float32)
        return advantages + _over_tokens(jnp.where(applies, alpha * gap, 0.0), advantages)

    return stateless(update)


def after(steps: int, transform: AdvantageTransform) -> AdvantageTransform:
    """`transform` from update number `steps` on; until then the chain passes by it. The count is checkpointed state."""
    if steps < 0:
        raise ValueError(f"after: steps is {steps}; it must be at least 0.")
    if steps == 0:
        return transform

    def init():
        return jnp.int32(0), transform.init()

    def update(advantages, state, inputs):
        count, inner = state
        changed, inner = transform.update(advantages, inner, inputs)
        return jnp.where(count >= steps, changed, advantages), (count + 1, inner)

    return AdvantageTransform(init, update)

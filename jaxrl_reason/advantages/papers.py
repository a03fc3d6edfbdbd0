"""Transformations of HERO, RLEV, LaSeR and ProGRPO. std1 divides by n - 1."""

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float
import numpy as np

from jaxrl_reason.advantages.groups import group_deviation, has_reward, is_correct, over_tokens, require, require_group
from jaxrl_reason.advantages.types import AdvantageInputs, Advantages, AdvantageTransform, PerCompletion, stateless


def stratify_by_verifier(alpha: float = 0.05, beta: float = 0.05, eps: float = 1e-6) -> AdvantageTransform:
    """Replaces the reward by HERO's: the verifier gates, the reward model grades, arXiv 2510.07242.

    A stratum is the completions of a group that have the same verdict. With z = (s - min) / (max - min + eps) over the
    scores s of a stratum, the reward is -alpha + 2 alpha z for incorrect and 1 - beta + 2 beta z for correct
    completions. A stratum of one, or with equal scores, gets its lowest reward.

    Args:
      alpha, beta: half the width of the rewards of incorrect and of correct completions, at least 0.
      eps: keeps the division finite, greater than 0.

    Raises:
      ValueError: alpha or beta is negative, or alpha + beta >= 1: an incorrect answer could outrank a correct one. From
        `update`: inputs.model_scores is None, or G < 2.

    Example:
      >>> scores = jnp.array([[4.0, 1.0, -2.0, 0.5]])
      >>> inputs = AdvantageInputs(jnp.array([[1.0, 1.0, 0.0, 0.0]]), jnp.ones((1, 4, 3)), model_scores=scores)
      >>> print(stratify_by_verifier().update(inputs.rewards, (), inputs)[0].round(2))
      [[ 1.05  0.95 -0.05  0.05]]
    """
    if min(alpha, beta) < 0 or np.float32(alpha) + np.float32(beta) >= 1:
        raise ValueError(
            f"stratify_by_verifier: alpha is {alpha} and beta is {beta}; both must be at least 0 and their sum below 1. "
            "Otherwise an incorrect answer could outrank a correct one."
        )
    if eps <= 0:
        raise ValueError(f"stratify_by_verifier: eps is {eps}; it keeps a division finite and must be greater than 0.")

    def position(scores: PerCompletion, stratum: Bool[jax.Array, "P G"]) -> PerCompletion:
        """Returns z of each score within its stratum; 0 if the stratum is tied."""
        scores = jnp.where(stratum, scores, 0.0)
        occupied = stratum.any(axis=1, keepdims=True)
        low = jnp.where(occupied, jnp.where(stratum, scores, jnp.inf).min(axis=1, keepdims=True), 0.0)
        high = jnp.where(occupied, jnp.where(stratum, scores, -jnp.inf).max(axis=1, keepdims=True), 0.0)
        return (scores - low) / (high - low + eps)

    def update(advantages: PerCompletion, inputs: AdvantageInputs) -> PerCompletion:
        require_group("stratify_by_verifier", advantages)
        scores = require("stratify_by_verifier", inputs, "model_scores").astype(jnp.float32)
        chex.assert_equal_shape([advantages, scores])
        correct = is_correct(inputs)
        graded_correct = 1 - beta + 2 * beta * position(scores, correct)
        graded_incorrect = -alpha + 2 * alpha * position(scores, has_reward(inputs) & ~correct)
        return jnp.where(correct, graded_correct, graded_incorrect)

    return stateless(update)


class SpreadState(NamedTuple):
    """State of `weight_by_score_spread`."""

    mean: Float[jax.Array, ""]  # running mean over steps of the standard deviations of the groups' scores
    seen: Bool[jax.Array, ""]  # whether a batch has set the mean


def weight_by_score_spread(
    w_min: float = 0.5, w_max: float = 2.0, k: float = 5.0, momentum: float = 0.9
) -> AdvantageTransform:
    """Multiplies by HERO's variance-aware weight of each prompt, arXiv 2510.07242.

    w = w_min + (w_max - w_min) sigmoid(k (sigma - sigma_bar)), with sigma the std1 of the raw scores of the group.
    sigma_bar is the running mean of sigma over steps; it includes the current step, and the first step sets it. A later
    division by the std of the group cancels the weight, so put it after the division. Raises ValueError for a parameter
    out of range, and `update` without inputs.model_scores.

    Args:
      w_min, w_max: lowest and highest weight, 0 <= w_min <= w_max.
      k: steepness, at least 0.
      momentum: weight of earlier steps in sigma_bar, in [0, 1).

    Example:
      >>> inputs = AdvantageInputs(jnp.ones((1, 2)), jnp.ones((1, 2, 3)), model_scores=jnp.array([[3.0, -1.0]]))
      >>> transform = weight_by_score_spread()
      >>> print(transform.update(inputs.rewards, transform.init(), inputs)[0])
      [[1.25 1.25]]
    """
    name = "weight_by_score_spread"
    if not 0 <= w_min <= w_max:
        raise ValueError(f"{name}: w_min is {w_min} and w_max is {w_max}; 0 <= w_min <= w_max must hold.")
    if k < 0:
        raise ValueError(f"{name}: k is {k}; it must be at least 0 (steeper for prompts with more spread).")
    if not 0 <= momentum < 1:
        raise ValueError(f"{name}: momentum is {momentum}; it must be in [0, 1).")

    def init() -> SpreadState:
        return SpreadState(jnp.float32(0.0), jnp.bool_(False))

    def update(advantages: Advantages, state: SpreadState, inputs: AdvantageInputs) -> tuple[Advantages, SpreadState]:
        scores = require(name, inputs, "model_scores").astype(jnp.float32)
        chex.assert_equal_shape([inputs.rewards, scores])
        present = has_reward(inputs)
        _, sigma = group_deviation(scores, present)
        counted = present.sum(axis=1, keepdims=True) > 1  # one score has no spread
        batch_mean = jnp.where(counted, sigma, 0.0).sum() / jnp.maximum(counted.sum(), 1)
        moved = jnp.where(state.seen, momentum * state.mean + (1 - momentum) * batch_mean, batch_mean)
        state = SpreadState(jnp.where(counted.any(), moved, state.mean), state.seen | counted.any())
        weight = w_min + (w_max - w_min) * jax.nn.sigmoid(k * (sigma - state.mean))
        return advantages * over_tokens(weight[:, 0], advantages), state

    return AdvantageTransform(init, update)


def scale_by_value(alpha: float = 10.0, clip: float = 1.0) -> AdvantageTransform:
    """Multiplies by RLEV's scale of each prompt, s = 1 + min(alpha v, clip), arXiv 2510.20187.

    v in [0, 1] is the human value of the prompt. The scale multiplies the reward, or, after a division by the std of
    the group (which would cancel the scale), the advantage. Raises ValueError for a negative alpha or clip,
    and `update` without inputs.values.

    Example:
      >>> inputs = AdvantageInputs(jnp.ones((2, 2)), jnp.ones((2, 2, 3)), values=jnp.array([0.05, 0.3]))
      >>> print(scale_by_value().update(inputs.rewards, (), inputs)[0].tolist())
      [[1.5, 1.5], [2.0, 2.0]]
    """
    if alpha < 0 or clip < 0:
        raise ValueError(f"scale_by_value: alpha is {alpha} and clip is {clip}; both must be at least 0.")

    def update(advantages: Advantages, inputs: AdvantageInputs) -> Advantages:
        values = require("scale_by_value", inputs, "values")
        chex.assert_rank(values, 1)
        chex.assert_equal_shape_prefix([advantages, values], 1)
        return advantages * over_tokens(1 + jnp.minimum(alpha * values.astype(jnp.float32), clip), advantages)

    return stateless(update)


def mix_self_reward(tau: float = 0.1, min_std: float = 0.1) -> AdvantageTransform:
    """Computes LaSeR's mixed advantage (1 - tau) A + tau A_s, arXiv 2510.14943.

    A_s standardizes (std1) the self-rewards, clipped to [0, 1], within each group. A group whose std is at most min_std
    keeps A. A completion without a self-reward (truncated, or not finite) counts as 0, in the statistics and for
    itself. Raises ValueError for tau outside [0, 1] or a negative min_std, and `update` without inputs.self_rewards or
    with G < 2.

    Example:
      >>> own = jnp.array([[1.0, 0.0, 0.5, -0.2]])
      >>> inputs = AdvantageInputs(jnp.array([[0.9, -0.9, 0.9, -0.9]]), jnp.ones((1, 4, 3)), self_rewards=own)
      >>> print(mix_self_reward().update(inputs.rewards, (), inputs)[0].round(2))
      [[ 0.94 -0.89  0.84 -0.89]]
    """
    if not 0 <= tau <= 1:
        raise ValueError(f"mix_self_reward: tau is {tau}; it is the share of the self-reward and must be in [0, 1].")
    if min_std < 0:
        raise ValueError(f"mix_self_reward: min_std is {min_std}; it must be at least 0.")

    def update(advantages: Advantages, inputs: AdvantageInputs) -> Advantages:
        require_group("mix_self_reward", inputs.rewards)
        self_rewards = require("mix_self_reward", inputs, "self_rewards")
        chex.assert_equal_shape([inputs.rewards, self_rewards])
        has_one = jnp.isfinite(self_rewards)
        if inputs.truncated is not None:
            has_one &= ~inputs.truncated.astype(bool)
        clipped = jnp.clip(jnp.where(has_one, self_rewards.astype(jnp.float32), 0.0), 0.0, 1.0)
        deviation, std = group_deviation(clipped, has_reward(inputs))
        spread = std > min_std
        own = over_tokens(deviation / jnp.where(spread, std, 1.0), advantages)
        return jnp.where(over_tokens(spread[:, 0], advantages), (1 - tau) * advantages + tau * own, advantages)

    return stateless(update)


def reweight_by_confidence(
    alpha: float = 0.3, skip_all_correct: bool = False, *, center: bool = False, correct_only: bool = False
) -> AdvantageTransform:
    """Computes ProGRPO's advantage A + alpha (c(q) - c(o|q)), arXiv 2602.05281.

    A group without a correct answer keeps A. With skip_all_correct, a group without an incorrect answer keeps A too.
    With correct_only, incorrect completions keep A. With center, the mean of the added term over the completions of the
    group that have it is subtracted, so c(q) cancels. A completion whose confidence is not finite keeps A, and is in no
    mean. Raises ValueError for a negative alpha, and `update` without inputs.prompt_confidence or inputs.answer_confidence.

    Example:
      >>> confidence = dict(prompt_confidence=jnp.array([0.5]), answer_confidence=jnp.array([[0.9, 0.1]]))
      >>> inputs = AdvantageInputs(jnp.array([[1.0, 0.0]]), jnp.ones((1, 2, 3)), **confidence)
      >>> print(reweight_by_confidence().update(inputs.rewards, (), inputs)[0].round(2))
      [[0.88 0.12]]
    """
    if alpha < 0:
        raise ValueError(f"reweight_by_confidence: alpha is {alpha}; it must be at least 0.")

    def update(advantages: Advantages, inputs: AdvantageInputs) -> Advantages:
        of_prompt = require("reweight_by_confidence", inputs, "prompt_confidence")
        of_answer = require("reweight_by_confidence", inputs, "answer_confidence")
        chex.assert_rank(of_prompt, 1)
        chex.assert_equal_shape_prefix([inputs.rewards, of_prompt], 1)
        chex.assert_equal_shape([inputs.rewards, of_answer])
        correct = is_correct(inputs)
        applies = correct.any(axis=1, keepdims=True)
        if skip_all_correct:
            applies &= (~correct & has_reward(inputs)).any(axis=1, keepdims=True)
        gap = (of_prompt[:, None] - of_answer).astype(jnp.float32)
        chosen = (correct if correct_only else has_reward(inputs)) & jnp.isfinite(gap)
        if center:
            gap = group_deviation(gap, chosen)[0]
        return advantages + over_tokens(jnp.where(applies & chosen, alpha * gap, 0.0), advantages)

    return stateless(update)

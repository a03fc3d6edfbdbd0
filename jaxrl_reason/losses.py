"""Policy losses, KL estimators and aggregations: pure functions of log-probabilities.

P prompts have G completions of T tokens each, V is the size of the vocabulary. A mask is nonzero on the entries that
count, in any dtype. Denominators are global: a caller with a part of a batch (a microbatch) passes the counts of the
whole batch, and the losses, gradients and metrics of the parts add up to the batch's.
"""

from typing import NamedTuple, TypeAlias

import chex
import jax
from jax import Array
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int, Shaped

RATIOS = ("token", "sequence", "cispo", "none")
AGGREGATIONS = ("token_mean", "sequence_mean", "sequence_sum", "constant")
KL_KINDS = ("k1", "k2", "k3")

Scalar: TypeAlias = Float[Array, ""]
Logprobs: TypeAlias = Float[Array, "P G T"]
Mask: TypeAlias = Shaped[Array, "P G T"]
Verdicts: TypeAlias = Shaped[Array, "P G"]


class Totals(NamedTuple):
    """The denominators of the losses of a batch, each at least 1."""

    tokens: Scalar  # number of unmasked tokens
    sequences: Scalar  # number of completions with at least one unmasked token


def totals(mask: Mask) -> Totals:
    """Returns the counts of a mask.

    Example:
      >>> tokens, sequences = totals(jnp.array([[[1, 1, 0], [0, 0, 0]]]))
      >>> print(tokens, sequences)
      2.0 1.0
    """
    mask = mask.astype(bool)
    return Totals(*(jnp.maximum(x.sum(), 1).astype(jnp.float32) for x in (mask, mask.any(axis=-1))))


def masked_sum(values: Shaped[Array, "..."], mask: Bool[Array, "..."], axis: int | None = None) -> Array:
    """Sums the unmasked entries; masked ones may hold NaN or inf.

    Example:
      >>> print(masked_sum(jnp.array([1.0, jnp.nan, 2.0]), jnp.array([True, False, True])))
      3.0
    """
    return jnp.where(mask, values, 0.0).sum(axis=axis)


def drop_nonfinite(mask: Mask, *logprobs: Logprobs) -> tuple[Bool[Array, "P G T"], Scalar]:
    """Masks the completions that have a non-finite log-probability on an unmasked token, under any of the policies.

    Returns the mask without the broken completions, and their number.

    Example:
      >>> mask, dropped = drop_nonfinite(jnp.ones((1, 2, 2)), jnp.array([[[-1.0, -2.0], [-1.0, jnp.nan]]]))
      >>> print(mask[0, :, 0], dropped)
      [ True False] 1.0
    """
    mask = mask.astype(bool)
    broken = jnp.zeros((*mask.shape[:-1], 1), bool)
    for x in logprobs:
        broken |= (mask & ~jnp.isfinite(x)).any(axis=-1, keepdims=True)
    return mask & ~broken, broken.sum().astype(jnp.float32)


def aggregate(
    values: Shaped[Array, "P G T"], mask: Mask, kind: str, constant: float | None = None, total: Totals | None = None
) -> Scalar:
    """Averages values of tokens over a batch. Completions without an unmasked token do not count.

    Args:
      values, mask: one number per token, and the tokens that count; masked tokens may hold NaN.
      kind: "token_mean": sum / tokens. "sequence_mean": mean over completions of the means over their tokens.
        "sequence_sum": mean over completions of the sums over their tokens. "constant": sum / (completions * constant).
      constant: the length that divides each completion, for "constant" only. None means T, the maximal length:
        Dr.GRPO, arXiv 2503.20783.
      total: counts of the whole batch, if `values` is a part of it.

    Raises:
      ValueError: kind is unknown, or constant is not positive or given with another kind.

    Example:
      >>> losses, mask = jnp.array([[[4.0, 0.0], [1.0, 3.0]]]), jnp.array([[[1, 0], [1, 1]]])
      >>> print(aggregate(losses, mask, "sequence_mean"), aggregate(losses, mask, "constant", constant=8))
      3.0 0.5
    """
    chex.assert_rank([values, mask], 3)
    chex.assert_equal_shape([values, mask])
    mask = mask.astype(bool)
    total = totals(mask) if total is None else total
    if constant is not None and kind != "constant":
        raise ValueError(f"constant={constant} has no effect with aggregation={kind!r}; set aggregation='constant'.")
    if constant is not None and constant <= 0:
        raise ValueError(f"constant is {constant}; it is a length in tokens and must be positive.")
    if kind == "token_mean":
        return masked_sum(values, mask) / total.tokens
    if kind == "sequence_mean":
        means = masked_sum(values, mask, axis=-1) / jnp.maximum(mask.sum(axis=-1), 1)
        return means.sum() / total.sequences
    if kind == "sequence_sum":
        return masked_sum(values, mask) / total.sequences
    if kind == "constant":
        return masked_sum(values, mask) / (total.sequences * (mask.shape[-1] if constant is None else constant))
    raise ValueError(f"aggregation is {kind!r}; it must be one of {AGGREGATIONS}.")


def policy_loss(
    logprobs: Logprobs,
    old_logprobs: Logprobs,
    advantages: Float[Array, "P G"] | Float[Array, "P G T"],
    mask: Mask,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
    ratio: str = "token",
    aggregation: str = "token_mean",
    constant: float | None = None,
    total: Totals | None = None,
) -> tuple[Scalar, dict[str, Scalar]]:
    """Computes the clipped policy-gradient loss. A completion with a non-finite log-probability is left out.

    With rho = exp(logprobs - old_logprobs) and A the advantage, the loss of a token is, by `ratio`:

      "token":    l = max(-A rho, -A clip(rho, 1 - clip_low, 1 + clip_high)), PPO, arXiv 1707.06347, eq. 7. With
                  dual_clip c, tokens with A < 0 have min(l, -A c), arXiv 1912.09729, eq. 4.
      "sequence": the same with rho = exp(mean log ratio of the completion's tokens), GSPO, arXiv 2507.18071, eq. 7.
      "cispo":    -stop_gradient(min(rho, 1 + clip_high)) A logprobs, arXiv 2506.13585, eq. 4. The clipped ratio is a
                  constant weight, so every token keeps a gradient. clip_low is not used.
      "none":     -A logprobs, REINFORCE; nothing is clipped.

    Args:
      logprobs: log-probabilities under the policy that is trained.
      old_logprobs, advantages: log-probabilities under the policy that sampled, and advantages; constants.
      mask: the tokens that count; masked tokens may hold NaN.
      aggregation, constant, total: see `aggregate`.

    Returns:
      The loss, and metrics: the number of completions left out (`nonfinite_completions`), and the shares of tokens on
      which clip_low and clip_high stop the gradient or cap the weight (`clip_ratio/low_mean`, `high_mean`, `region_mean`).

    Raises:
      ValueError: ratio or aggregation is unknown, clip_low or clip_high is negative, or dual_clip <= 1.

    Example:
      >>> old, advantages = jnp.log(jnp.array([[[0.5, 0.5], [0.5, 0.5]]])), jnp.array([[1.0, -1.0]])
      >>> loss, metrics = policy_loss(old + 0.3, old, advantages, jnp.ones((1, 2, 2)))
      >>> print(loss.round(3), metrics["clip_ratio/high_mean"])
      0.075 0.5
    """
    chex.assert_rank([logprobs, old_logprobs, mask], 3)
    chex.assert_equal_shape([logprobs, old_logprobs, mask])
    chex.assert_rank(advantages, {2, 3})
    chex.assert_equal_shape_prefix([logprobs, advantages], advantages.ndim)
    mask, dropped = drop_nonfinite(mask, logprobs, old_logprobs)
    clips = (clip_low, clip_high, dual_clip)
    per_token, low, high = _token_losses(logprobs, old_logprobs, advantages, mask, *clips, ratio)
    total = totals(mask) if total is None else total
    share = lambda x: masked_sum(x.astype(jnp.float32), mask) / total.tokens
    metrics = {
        "clip_ratio/low_mean": share(low),
        "clip_ratio/high_mean": share(high),
        "clip_ratio/region_mean": share(low | high),
        "nonfinite_completions": dropped,
    }
    return aggregate(per_token, mask, aggregation, constant, total), metrics


def _token_losses(
    logprobs: Logprobs,
    old_logprobs: Logprobs,
    advantages: Float[Array, "P G"] | Float[Array, "P G T"],
    mask: Bool[Array, "P G T"],
    clip_low: float,
    clip_high: float,
    dual_clip: float | None,
    ratio: str,
) -> tuple[Logprobs, Bool[Array, "P G T"], Bool[Array, "P G T"]]:
    """Computes the loss of each token by `policy_loss`, and whether the lower and the upper clip act on it."""
    if ratio not in RATIOS:
        raise ValueError(f"ratio is {ratio!r}; it must be one of {RATIOS}.")
    if dual_clip is not None and dual_clip <= 1:
        raise ValueError(f"dual_clip is {dual_clip}; it must be greater than 1.")
    if min(clip_low, clip_high) < 0:
        raise ValueError(f"clip_low is {clip_low} and clip_high is {clip_high}; both must be at least 0.")
    # Cleaned before anything is computed from them: a gradient through jnp.where alone would still be NaN.
    logprobs = jnp.where(mask, logprobs.astype(jnp.float32), 0.0)
    old_logprobs = jax.lax.stop_gradient(jnp.where(mask, old_logprobs.astype(jnp.float32), 0.0))
    advantages = advantages[..., None] if advantages.ndim == 2 else advantages
    advantages = jax.lax.stop_gradient(jnp.where(mask, advantages.astype(jnp.float32), 0.0))
    log_ratio = logprobs - old_logprobs
    if ratio == "sequence":
        lengths = jnp.maximum(mask.sum(axis=-1, keepdims=True), 1)
        log_ratio = jnp.broadcast_to(log_ratio.sum(axis=-1, keepdims=True) / lengths, mask.shape)
    rho = jnp.exp(jnp.minimum(log_ratio, 80.0))  # beyond it exp overflows, and 0 * inf is NaN
    never = jnp.zeros_like(mask)
    if ratio == "none":
        return -advantages * logprobs, never, never
    if ratio == "cispo":
        weight = jax.lax.stop_gradient(jnp.minimum(rho, 1 + clip_high))
        return -weight * advantages * logprobs, never, rho > 1 + clip_high
    per_token = jnp.maximum(-advantages * rho, -advantages * jnp.clip(rho, 1 - clip_low, 1 + clip_high))
    if dual_clip is not None:
        per_token = jnp.where(advantages < 0, jnp.minimum(per_token, -advantages * dual_clip), per_token)
    return per_token, (rho < 1 - clip_low) & (advantages < 0), (rho > 1 + clip_high) & (advantages > 0)


def kl_penalty(logprobs: Logprobs, ref_logprobs: Logprobs, kind: str = "k3") -> Logprobs:
    """Estimates KL(policy || reference) of each token from sampled tokens.

    With d = logprobs - ref_logprobs: k1 = d, k2 = d^2 / 2, k3 = exp(-d) + d - 1 (Schulman, "Approximating KL
    divergence", 2020). All three have the *gradient* of k2, d * grad(logprobs): its expectation over the policy's
    samples is the gradient of KL(policy || reference). A naive derivative of k1 is 0 in expectation, and of k3 it is
    that of KL(reference || policy) (arXiv 2506.09477). ref_logprobs are constants. The result is float32, and NaN with
    gradient 0 for a token with an input that is not finite. Raises ValueError for an unknown kind.

    Example:
      >>> logprobs, ref_logprobs = jnp.array([[[-1.0, -1.3]]]), jnp.array([[[-1.3, -1.0]]])
      >>> print(kl_penalty(logprobs, ref_logprobs, "k1").round(3))
      [[[ 0.3 -0.3]]]
    """
    if kind not in KL_KINDS:
        raise ValueError(f"KL kind is {kind!r}; it must be one of {KL_KINDS}.")
    chex.assert_equal_shape([logprobs, ref_logprobs])
    # A masked position may hold anything: cleaned first, or its gradient would be 0 * NaN.
    finite = jnp.isfinite(logprobs) & jnp.isfinite(ref_logprobs)
    clean = lambda x: jnp.where(finite, x.astype(jnp.float32), 0.0)
    d = clean(logprobs) - jax.lax.stop_gradient(clean(ref_logprobs))
    k2 = jnp.square(d) / 2
    value = {"k1": d, "k2": k2, "k3": jnp.expm1(-d) + d}[kind]
    return jnp.where(finite, jax.lax.stop_gradient(value - k2) + k2, jnp.nan)


def token_logprobs(
    logits: Float[Array, "*batch V"], tokens: Int[Array, "*batch"]
) -> tuple[Float[Array, "*batch"], Float[Array, "*batch"]]:
    """Computes the log-probability of each token and the entropy of its distribution, in nats and float32.

    The logits are already divided by the temperature, and -inf on illegal tokens.

    Example:
      >>> logprob, entropy = token_logprobs(jnp.log(jnp.array([[0.5, 0.25, 0.25]])), jnp.array([0]))
      >>> print(jnp.exp(logprob), entropy.round(2))
      [0.5] [1.04]
    """
    logits = logits.astype(jnp.float32)
    top = jax.lax.stop_gradient(logits.max(axis=-1))
    weights = jnp.exp(logits - top[..., None])
    log_total = jnp.log(weights.sum(axis=-1))
    chosen = jnp.take_along_axis(logits, tokens[..., None], axis=-1)[..., 0]
    shifted = jnp.where(weights > 0, logits - top[..., None], 0.0)  # 0 * -inf on illegal tokens
    entropy = log_total - (weights * shifted).sum(axis=-1) * jnp.exp(-log_total)
    return chosen - top - log_total, entropy


class ClassTotals(NamedTuple):
    """The denominators of a class-balanced loss: the number of valid completions with each verdict."""

    correct: Scalar
    incorrect: Scalar


def class_totals(verdicts: Verdicts, valid: Verdicts) -> ClassTotals:
    """Counts valid completions by verdict; nonzero means correct, and valid.

    Example:
      >>> print(*class_totals(jnp.array([[True, True, False]]), jnp.array([[True, False, True]])))
      1.0 1.0
    """
    verdicts, valid = verdicts.astype(bool), valid.astype(bool)
    return ClassTotals((valid & verdicts).sum().astype(jnp.float32), (valid & ~verdicts).sum().astype(jnp.float32))


def self_reward_loss(
    self_rewards: Float[Array, "P G"], verdicts: Verdicts, valid: Verdicts, *, total: ClassTotals | None = None
) -> Scalar:
    """Computes LaSeR's class-balanced squared error of self-rewards against verdicts, arXiv 2510.14943.

    sum_i w_i (r_i - v_i)^2 / N over the N valid completions, with w = N / (2 N_correct) or N / (2 N_incorrect). Each
    class weighs one half, an empty class 0. Without valid completions, the loss is 0.

    Args:
      self_rewards: the gradient flows through them; invalid ones may hold NaN.
      verdicts, valid: nonzero for correct completions, and for completions that ended; only the latter count.
      total: counts of the whole batch, if the completions are a part of it.

    Example:
      >>> rewards, verdicts = jnp.array([[1.0, 0.0, 0.5, -0.2]]), jnp.array([[True, False, True, False]])
      >>> print(self_reward_loss(rewards, verdicts, jnp.ones((1, 4))).round(4))
      0.0725
    """
    chex.assert_rank([self_rewards, verdicts, valid], 2)
    chex.assert_equal_shape([self_rewards, verdicts, valid])
    verdicts, valid = verdicts.astype(bool), valid.astype(bool)
    total = class_totals(verdicts, valid) if total is None else total
    error = jnp.square(jnp.where(valid, self_rewards.astype(jnp.float32), 0.0) - verdicts)
    correct, incorrect = masked_sum(error, valid & verdicts), masked_sum(error, valid & ~verdicts)
    # N cancels: N / (2 N_class) / N.
    return (correct / jnp.maximum(total.correct, 1) + incorrect / jnp.maximum(total.incorrect, 1)) / 2

"""Policy losses, KL estimators and how tokens are averaged. Pure functions of log-probabilities.

Shapes: P prompts, G completions each, T tokens each. Denominators are global: a caller that sees only
part of a batch (a microbatch) passes the `Totals` of the whole, and partial losses then add up to the
loss of the whole batch, gradients and metrics included.
"""

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

RATIOS = ("token", "sequence", "cispo", "none")
AGGREGATIONS = ("token_mean", "sequence_mean", "sequence_sum", "constant")
KL_KINDS = ("k1", "k2", "k3")


class Totals(NamedTuple):
    """What the losses of a batch are divided by; f32 scalars, at least 1.

    Attributes:
      tokens: unmasked tokens.
      sequences: completions with at least one unmasked token.
    """

    tokens: jax.Array
    sequences: jax.Array


def totals(mask: jax.Array) -> Totals:
    """Counts of mask [P, G, T]."""
    mask = mask.astype(bool)
    return Totals(
        jnp.maximum(mask.sum(), 1).astype(jnp.float32), jnp.maximum(mask.any(axis=-1).sum(), 1).astype(jnp.float32)
    )


def masked_sum(values: jax.Array, mask: jax.Array, axis=None) -> jax.Array:
    """Sum over unmasked entries; masked ones may hold NaN or inf."""
    return jnp.where(mask, values, 0.0).sum(axis=axis)


def drop_nonfinite(mask: jax.Array, *logprobs: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Masks completions that hold a non-finite log-probability on an unmasked token, and counts them.

    Returns:
      (bool[P, G, T], f32 scalar).
    """
    mask = mask.astype(bool)
    broken = jnp.zeros((*mask.shape[:-1], 1), bool)
    for x in logprobs:
        broken |= (mask & ~jnp.isfinite(x)).any(axis=-1, keepdims=True)
    return mask & ~broken, broken.sum().astype(jnp.float32)


def aggregate(
    values: jax.Array, mask: jax.Array, kind: str, constant: float | None = None, total: Totals | None = None
) -> jax.Array:
    """Averages per-token values [P, G, T] over a batch.

    Args:
      values: f32[P, G, T].
      mask: [P, G, T].
      kind: "token_mean": sum / tokens. "sequence_mean": mean over completions of their token means.
        "sequence_sum": mean over completions of their sums. "constant": sum / constant.
      constant: the denominator of "constant". None: completions * T, which is Dr.GRPO's (T is the
        maximal completion length; a completion that is masked out entirely does not count).
      total: the counts of the whole batch, where `values` is a part of it.

    Returns:
      f32 scalar.
    """
    chex.assert_rank([values, mask], 3)
    chex.assert_equal_shape([values, mask])
    mask = mask.astype(bool)
    total = totals(mask) if total is None else total
    if constant is not None and kind != "constant":
        raise ValueError(
            f"constant={constant} has no effect with aggregation={kind!r}; it goes with aggregation='constant'."
        )
    if kind == "token_mean":
        return masked_sum(values, mask) / total.tokens
    if kind == "sequence_mean":
        means = masked_sum(values, mask, axis=-1) / jnp.maximum(mask.sum(axis=-1), 1)
        return means.sum() / total.sequences
    if kind == "sequence_sum":
        return masked_sum(values, mask) / total.sequences
    if kind == "constant":
        if constant is not None and constant <= 0:
            raise ValueError(f"constant is {constant}; a denominator must be positive.")
        return masked_sum(values, mask) / (total.sequences * mask.shape[-1] if constant is None else constant)
    raise ValueError(f"aggregation is {kind!r}; it must be one of {AGGREGATIONS}.")


def policy_loss(
    logprobs: jax.Array,
    old_logprobs: jax.Array,
    advantages: jax.Array,
    mask: jax.Array,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
    ratio: str = "token",
    aggregation: str = "token_mean",
    constant: float | None = None,
    total: Totals | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The clipped policy-gradient loss and its relatives.

    With rho = exp(logprobs - old_logprobs) and A the advantage, per token:

      "token":    max(-A rho, -A clip(rho, 1 - clip_low, 1 + clip_high)), PPO, arXiv 1707.06347, eq. 7;
                  with dual_clip c, where A < 0: min(that, -A c), arXiv 1912.09729, eq. 4.
      "sequence": the same with rho = exp(mean over the completion's tokens of the log ratio), GSPO,
                  arXiv 2507.18071, eq. 7.
      "cispo":    -stop_gradient(min(rho, 1 + clip_high)) A logprobs, arXiv 2506.13585, eq. 4: the clipped
                  ratio is a constant weight, so every token keeps a gradient. clip_low is not used.
      "none":     -A logprobs (REINFORCE); nothing is clipped.

    A completion with a non-finite log-probability on an unmasked token is left out and counted.

    Args:
      logprobs: f32[P, G, T] under the policy being trained.
      old_logprobs: f32[P, G, T] under the policy that sampled.
      advantages: f32[P, G] or f32[P, G, T], constants.
      mask: [P, G, T], 1 on tokens that count; masked positions may hold NaN.
      clip_low, clip_high, dual_clip, ratio: see above.
      aggregation, constant, total: see `aggregate`.

    Returns:
      The loss, an f32 scalar, and metrics: `clip_ratio/low_mean`, `clip_ratio/high_mean`,
      `clip_ratio/region_mean` (shares of tokens on which clipping stops the gradient, or caps the weight)
      and `nonfinite_completions`.

    Raises:
      ValueError: an unknown ratio or aggregation, or dual_clip <= 1.
    """
    if ratio not in RATIOS:
        raise ValueError(f"ratio is {ratio!r}; it must be one of {RATIOS}.")
    if dual_clip is not None and dual_clip <= 1:
        raise ValueError(f"dual_clip is {dual_clip}; it must be greater than 1.")
    chex.assert_rank([logprobs, old_logprobs, mask], 3)
    chex.assert_equal_shape([logprobs, old_logprobs, mask])
    chex.assert_rank(advantages, {2, 3})
    chex.assert_equal_shape_prefix([logprobs, advantages], advantages.ndim)

    mask, dropped = drop_nonfinite(mask, logprobs, old_logprobs)
    # Cleaned before anything is computed from them: a gradient through where() alone would still be NaN.
    logprobs = jnp.where(mask, logprobs.astype(jnp.float32), 0.0)
    old_logprobs = jax.lax.stop_gradient(jnp.where(mask, old_logprobs.astype(jnp.float32), 0.0))
    advantages = advantages[..., None] if advantages.ndim == 2 else advantages
    advantages = jax.lax.stop_gradient(jnp.where(mask, advantages.astype(jnp.float32), 0.0))

    log_ratio = logprobs - old_logprobs
    if ratio == "sequence":
        lengths = jnp.maximum(mask.sum(axis=-1, keepdims=True), 1)
        log_ratio = jnp.broadcast_to(log_ratio.sum(axis=-1, keepdims=True) / lengths, mask.shape)
    rho = jnp.exp(jnp.minimum(log_ratio, 80.0))  # beyond it exp overflows, and 0 * inf is NaN
    low, high = jnp.zeros_like(mask), jnp.zeros_like(mask)
    if ratio == "none":
        per_token = -advantages * logprobs
    elif ratio == "cispo":
        per_token = -jax.lax.stop_gradient(jnp.minimum(rho, 1 + clip_high)) * advantages * logprobs
        high = rho > 1 + clip_high
    else:
        per_token = jnp.maximum(-advantages * rho, -advantages * jnp.clip(rho, 1 - clip_low, 1 + clip_high))
        if dual_clip is not None:
            per_token = jnp.where(advantages < 0, jnp.minimum(per_token, -advantages * dual_clip), per_token)
        low = (rho < 1 - clip_low) & (advantages < 0)
        high = (rho > 1 + clip_high) & (advantages > 0)

    total = totals(mask) if total is None else total
    share = lambda x: masked_sum(x.astype(jnp.float32), mask) / total.tokens
    metrics = {
        "clip_ratio/low_mean": share(low),
        "clip_ratio/high_mean": share(high),
        "clip_ratio/region_mean": share(low | high),
        "nonfinite_completions": dropped,
    }
    return aggregate(per_token, mask, aggregation, constant, total), metrics


def kl_penalty(logprobs: jax.Array, ref_logprobs: jax.Array, kind: str = "k3") -> jax.Array:
    """Per-token estimate of KL(policy || reference) from sampled tokens; f32, shape of logprobs.

    With d = logprobs - ref_logprobs: k1 = d, k2 = d^2 / 2, k3 = exp(-d) + d - 1 (Schulman, "Approximating
    KL divergence", 2020). All three have the *gradient* of k2, d * grad(logprobs), whose expectation
    over the policy's samples is the gradient of KL(policy || reference). Differentiated naively, k1 has
    gradient 0 in expectation and k3 that of KL(reference || policy) (arXiv 2506.09477). Where an input is
    not finite the result is NaN, and its gradient 0.
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


def token_logprobs(logits: jax.Array, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Log-probability of each token and entropy of its law, in nats: f32[...], f32[...].

    Args:
      logits: f32[..., V], already divided by the temperature, -inf on illegal tokens.
      tokens: int[...].
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
    """How many completions a class-balanced loss is over; f32 scalars.

    Attributes:
      right, wrong: valid completions of each verdict.
    """

    right: jax.Array
    wrong: jax.Array


def class_totals(verdicts: jax.Array, valid: jax.Array) -> ClassTotals:
    """Counts of verdicts bool[P, G] where valid [P, G]."""
    verdicts, valid = verdicts.astype(bool), valid.astype(bool)
    return ClassTotals((valid & verdicts).sum().astype(jnp.float32), (valid & ~verdicts).sum().astype(jnp.float32))


def self_reward_loss(
    self_rewards: jax.Array, verdicts: jax.Array, valid: jax.Array, *, total: ClassTotals | None = None
) -> jax.Array:
    """LaSeR's class-balanced squared error of self-rewards against verdicts, arXiv 2510.14943.

    sum_i w_i (r_i - v_i)^2 / N over valid completions, w = N / (2 N_right) or N / (2 N_wrong): each class weighs one half,
    an empty one 0.

    Args:
      self_rewards: f32[P, G]; the gradient flows through them. Invalid ones may hold NaN.
      verdicts: bool[P, G].
      valid: [P, G], 1 on completions that count: those that ended.
      total: the counts of the whole batch, where these are a part of it.

    Returns:
      f32 scalar; 0 where nothing is valid.
    """
    chex.assert_rank([self_rewards, verdicts, valid], 2)
    chex.assert_equal_shape([self_rewards, verdicts, valid])
    verdicts, valid = verdicts.astype(bool), valid.astype(bool)
    total = class_totals(verdicts, valid) if total is None else total
    error = jnp.square(jnp.where(valid, self_rewards.astype(jnp.float32), 0.0) - verdicts)
    right, wrong = masked_sum(error, valid & verdicts), masked_sum(error, valid & ~verdicts)
    # N cancels: N / (2 N_class) / N.
    return (right / jnp.maximum(total.right, 1) + wrong / jnp.maximum(total.wrong, 1)) / 2

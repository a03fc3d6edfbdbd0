"""The distribution that samples, and one token drawn from it; sampling and training share both."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

_BLOCK = 128  # vocabulary entries per partial sum of probabilities


def sampling_noise(
    key: Key[Array, ""], prompt_ids: Int[Array, " P"], group: int, length: int
) -> Float[Array, "P {group} {length}"]:
    """Returns one uniform number in [0, 1) per token.

    Each key is folded from (key, prompt id, sample, position), in this order. So a sample does not depend on the other prompts of its batch, on
    the number of devices, or on earlier calls.
    """
    fold = jax.random.fold_in
    each = lambda p, g, t: jax.random.uniform(fold(fold(fold(key, p), g), t))
    over = jax.vmap(jax.vmap(jax.vmap(each, (None, None, 0)), (None, 0, None)), (0, None, None))
    return over(prompt_ids, jnp.arange(group), jnp.arange(length))


def scale_logits(
    logits: Float[Array, "*batch V"],
    temperature: Float[Array, "*#batch"] | float,
    legal: Bool[Array, "*#batch V"] | None,
) -> Float[Array, "*batch V"]:
    """Returns the unnormalised distribution that samples: f32 logits / temperature, -inf on illegal tokens.

    Temperature 0 (greedy) leaves the logits unchanged.
    """
    temperature = jnp.asarray(temperature, jnp.float32)[..., None]
    logits = logits.astype(jnp.float32) / jnp.where(temperature > 0, temperature, 1.0)
    return logits if legal is None else jnp.where(legal, logits, -jnp.inf)


def sample_token(
    logits: Float[Array, "*batch V"],
    noise: Float[Array, "*batch"],
    greedy: Bool[Array, "*#batch"],
    top_k: Int[Array, "*batch"] | None = None,
    top_p: Float[Array, "*batch"] | None = None,
) -> tuple[Int[Array, "*batch"], Float[Array, "*batch"]]:
    """Draws one token per row by inverting the cumulative distribution.

    The token is the first one whose cumulative probability exceeds the row's `noise` in [0, 1). This takes one random number per row instead of
    Gumbel noise over the vocabulary. The sum runs over blocks of the vocabulary first, then inside the block that holds the token. Illegal
    tokens have logits of -inf; `greedy` rows take the most probable token, and ignore `top_k` and `top_p`.

    Returns:
      The tokens and their log-probabilities under the distribution that sampled, see `truncate`.
    """
    V = logits.shape[-1]
    top = logits.max(axis=-1, keepdims=True)
    weights = truncate(
        jnp.exp(logits - top),
        None if top_k is None else jnp.where(greedy, 0, top_k),
        None if top_p is None else jnp.where(greedy, 1.0, top_p),
    )
    padded = jnp.pad(weights, [(0, 0)] * (weights.ndim - 1) + [(0, -V % _BLOCK)])
    blocks = padded.reshape(*padded.shape[:-1], -1, _BLOCK)
    ends = jnp.cumsum(blocks.sum(axis=-1), axis=-1)  # [..., V / block]
    total = ends[..., -1]
    aim = noise * total
    block = _first_above(blocks.sum(axis=-1), ends, aim)
    start = jnp.where(block > 0, pick(ends, jnp.maximum(block - 1, 0)), 0.0)
    inside = jnp.take_along_axis(blocks, block[..., None, None], axis=-2)[..., 0, :]
    sampled = block * _BLOCK + _first_above(inside, jnp.cumsum(inside, axis=-1), aim - start)
    # On CPU an argmax over the vocabulary takes half of the time of sampling, so it runs only if a row is greedy.
    take_best = lambda: jnp.where(greedy, jnp.argmax(logits, axis=-1), sampled)
    tokens = jax.lax.cond(jnp.any(greedy), take_best, lambda: sampled).astype(jnp.int32)
    return tokens, pick(logits, tokens) - top[..., 0] - jnp.log(total)


def truncate(
    weights: Float[Array, "*batch V"], top_k: Int[Array, "*batch"] | None, top_p: Float[Array, "*batch"] | None
) -> Float[Array, "*batch V"]:
    """Returns weights in [0, 1] with 0 for the tokens that truncated sampling leaves out.

    Top-k comes first and keeps the k largest weights. Top-p then keeps the fewest largest weights whose share of the sum is at least p. Weights
    that equal the smallest one kept are kept too, so the order of the vocabulary has no influence.

    Args:
      weights: probabilities relative to the most probable token, f32; legal tokens and temperature are included.
      top_k: k; 0 keeps all. top_p: p; 1 keeps all. None compiles nothing.
    """
    count, share = lambda kept, _: kept.sum(axis=-1), lambda kept, weights: jnp.where(kept, weights, 0.0).sum(axis=-1)
    if top_k is not None:
        weights = _largest(weights, count, top_k, top_k > 0)
    if top_p is not None:
        weights = _largest(weights, share, top_p * weights.sum(axis=-1), top_p < 1.0)
    return weights


def _largest(weights: Array, measure: Callable[[Array, Array], Array], need: Array, on: Array) -> Array:
    """Keeps the fewest largest weights whose measure, a function of (kept, weights), is at least `need`; all if a row is not `on`.

    Bits of floats that are not negative have the order of the floats. So the smallest weight to keep is found bit by bit, in 30 passes over
    the vocabulary. Each is a reduction, which a split vocabulary computes in place; a sort would gather it.
    """
    bits = jax.lax.bitcast_convert_type(weights, jnp.int32)

    def with_bit(i, least):
        higher = least | jnp.left_shift(1, 29 - i)
        return jnp.where(measure(bits >= higher[..., None], weights) >= need, higher, least)

    def search():
        least = jax.lax.fori_loop(0, 30, with_bit, jnp.zeros(weights.shape[:-1], jnp.int32))
        return jnp.where((bits >= least[..., None]) | ~on[..., None], weights, 0.0)

    return jax.lax.cond(jnp.any(on), search, lambda: weights)


def pick(x: Array, index: Int[Array, "*batch"]) -> Array:
    """Returns x[..., index], one entry of the last axis per row."""
    return jnp.take_along_axis(x, index[..., None], axis=-1)[..., 0]


def _first_above(weights: Array, ends: Array, aim: Array) -> Array:
    """Returns the first index with a positive weight whose cumulative sum exceeds the aim; the last index with a weight if none does.

    Rounding can move the aim to the total or below 0, and a long float32 sum need not be monotone. So entries without weight are excluded
    explicitly.
    """
    has_weight = weights > 0
    above = has_weight & (ends > aim[..., None])
    last = weights.shape[-1] - 1 - jnp.argmax(has_weight[..., ::-1], axis=-1)
    return jnp.where(above.any(axis=-1), jnp.argmax(above, axis=-1), last)

"""Parts of the decoder as pure functions: matrix products, RMSNorm, rotary positions, group attention; caches of keys and values."""

from collections.abc import Sequence
import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxrl_reason.models import sharding
from jaxrl_reason.models.config import ModelConfig

_FLOAT32 = jax.lax.Precision.HIGHEST  # accelerators would multiply float32 operands in bfloat16 or TF32
_NEVER = -1e30  # finite: if a query sees nothing, its softmax is uniform, never NaN


class Int8(NamedTuple):
    """A rounded array, values * scale. Decoding reads it many times; no gradient flows through it."""

    values: Int[Array, "..."]  # int8
    scale: Float[Array, "..."]  # float32, with size 1 along the axis whose entries share a scale

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape

    def astype(self, dtype: str) -> Array:
        """Returns the values without their scale: the caller multiplies its product by the scale."""
        return self.values.astype(dtype)


KeysValues = tuple[Array | Int8, Array | Int8]
Rotary = tuple[Float[Array, "*batch half_head_dim"], Float[Array, "*batch half_head_dim"]]  # cosines and sines


def quantize(x: Float[Array, "..."], axis: int) -> Int8:
    """Rounds to 255 steps between minus and plus the largest magnitude along `axis`; entries along `axis` share a scale."""
    x = x.astype(jnp.float32)
    scale = jnp.max(jnp.abs(x), axis=axis, keepdims=True) / 127
    return Int8(jnp.round(x / jnp.where(scale > 0, scale, 1.0)).astype(jnp.int8), scale)


@jax.custom_vjp
def _dot_bfloat16(x, w):
    return jax.lax.dot(x, w, preferred_element_type=jnp.float32)


def _dot_bfloat16_fwd(x, w):
    # Not a call of _dot_bfloat16: a rematerialisation policy that keeps products does not look into it.
    return jax.lax.dot(x, w, preferred_element_type=jnp.float32), (x, w)


def _dot_bfloat16_bwd(residuals, g):
    # jax would multiply the float32 cotangent with a bfloat16 operand, which is a float32 product.
    x, w = residuals
    g = g.astype(jnp.bfloat16)
    dx = jax.lax.dot_general(g, w, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)
    dw = jax.lax.dot_general(x, g, (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32)
    return dx.astype(x.dtype), dw.astype(w.dtype)


_dot_bfloat16.defvjp(_dot_bfloat16_fwd, _dot_bfloat16_bwd)


def dot(x: Float[Array, "*batch D"], w: Float[Array, "D F"] | Int8, dtype: str) -> Float[Array, "*batch F"]:
    """Returns x @ w in float32, with operands in `dtype` and float32 sums. An Int8 matrix has one scale per column."""
    if isinstance(w, Int8):
        return dot(x, w.astype(dtype), dtype) * w.scale[0]
    # Two dimensions only: XLA on CPU has no bfloat16 product with two contracted dimensions, and the weight gradient would be one.
    flat = x.reshape(-1, x.shape[-1]).astype(dtype)
    w = w.astype(dtype)
    y = jax.lax.dot(flat, w, precision=_FLOAT32) if dtype == "float32" else _dot_bfloat16(flat, w)
    return y.reshape(*x.shape[:-1], w.shape[-1])


def rms_norm(
    x: Float[Array, "*batch D"], scale: Float[Array, " D"], eps: float, offset: float
) -> Float[Array, "*batch D"]:
    """Returns x / rms(x) * (scale + offset) over the last axis, computed in float32, in the dtype of x."""
    y = x.astype(jnp.float32)
    y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + eps)
    return (y * (scale.astype(jnp.float32) + offset)).astype(x.dtype)


def rotary_frequencies(config: ModelConfig, sliding: bool) -> Float[Array, " half_head_dim"]:
    """Returns the rotary frequencies in radians per position, f32[head_dim / 2], of sliding or of global layers."""
    local = sliding and config.local_rope_theta
    theta = config.local_rope_theta if local else config.rope_theta
    half = config.head_dim // 2
    freqs = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    scaling = None if local else config.rope_scaling
    if scaling is None:
        return freqs
    if scaling.kind == "linear":
        return freqs / scaling.factor
    low, high, length = scaling.low_freq_factor, scaling.high_freq_factor, scaling.original_length
    waves = 2 * math.pi / freqs  # wavelengths in positions
    smooth = (length / waves - low) / (high - low)
    blended = (1 - smooth) * freqs / scaling.factor + smooth * freqs
    return jnp.where(waves > length / low, freqs / scaling.factor, jnp.where(waves < length / high, freqs, blended))


def rotary_angles(positions: Int[Array, "*batch"], config: ModelConfig, sliding: bool) -> Rotary:
    """Returns cosines and sines of the rotary angles at `positions`, of sliding or of global layers."""
    angles = positions[..., None].astype(jnp.float32) * rotary_frequencies(config, sliding)
    return jnp.cos(angles), jnp.sin(angles)


def rotate(
    x: Float[Array, "*batch heads head_dim"], cos: Float[Array, "..."], sin: Float[Array, "..."]
) -> Float[Array, "*batch heads head_dim"]:
    """Rotates pairs (i, i + head_dim / 2) of each head, as Llama does, in float32; cos and sin broadcast to [*batch, head_dim / 2]."""
    x1, x2 = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos[..., None, :], sin[..., None, :]
    return jnp.concatenate([x1 * cos - x2 * sin, x2 * cos + x1 * sin], axis=-1)


def group_attention(
    q: Float[Array, "P G T H K"],
    own: Sequence[KeysValues],
    own_mask: Bool[Array, "#P #G #T C"],
    prompt: KeysValues | None = None,
    prompt_mask: Bool[Array, "#P #G #T S"] | None = None,
    *,
    scale: float,
    dtype: str,
) -> Float[Array, "P G T H*K"]:
    """Computes softmax attention of G samples per prompt over their own keys and one shared prompt.

    The prompt's keys are read once per group: one dense product serves the queries of all G samples, with G * T * H / N
    rows per key head. One softmax covers all parts. Sums, the softmax and the result are float32.

    Args:
      own: pieces of the samples' own keys and values. A piece has keys [P, G, N, K, c] and values [P, G, N, c, K] of N
        key/value heads; an Int8 has a scale [P, G, N, 1, c]. The sizes c add up to C.
      prompt: keys [P, N, K, S] and values [P, N, S, K], or None. An Int8 has a scale [P, N, 1, S].
      own_mask, prompt_mask: True if the query sees the key.
      scale, dtype: factor on the scores, and dtype of the operands of products.
    """
    P, G, T, H, K = q.shape
    N = own[0][0].shape[2]
    R = H // N
    q = (q * scale).astype(dtype).reshape(P, G, T, N, R, K)
    precision = _FLOAT32 if dtype == "float32" else None
    product = functools.partial(jnp.einsum, precision=precision, preferred_element_type=jnp.float32)

    q_own = q.transpose(0, 1, 3, 2, 4, 5).reshape(P, G, N, T * R, K)
    scores, seen = [], 0
    for keys, _ in own:
        s = _scaled(product("pgnmk,pgnkc->pgnmc", q_own, keys.astype(dtype)), keys).reshape(P, G, N, T, R, -1)
        mask = own_mask[..., seen : seen + s.shape[-1]]
        seen += s.shape[-1]
        scores.append(jnp.where(mask[:, :, None, :, None, :], s, _NEVER))
    top = functools.reduce(jnp.maximum, [s.max(axis=-1) for s in scores])  # [P, G, N, T, R]
    if prompt is not None:
        assert prompt_mask is not None
        prompt_keys, prompt_values = (x.astype(dtype) for x in prompt)
        q_prompt = q.transpose(0, 3, 1, 2, 4, 5).reshape(P, N, G * T * R, K)
        s_prompt = _scaled(product("pnmk,pnks->pnms", q_prompt, prompt_keys), prompt[0]).reshape(P, N, G, T, R, -1)
        s_prompt = jnp.where(prompt_mask[:, None, :, :, None, :], s_prompt, _NEVER)
        top = jnp.maximum(top, s_prompt.max(axis=-1).swapaxes(1, 2))
    top = jax.lax.stop_gradient(top)

    total, out = jnp.zeros_like(top), jnp.float32(0)
    for s, (_, values) in zip(scores, own):
        e = jnp.exp(s - top[..., None])
        total += e.sum(axis=-1)
        e = _scaled(e.reshape(P, G, N, T * R, -1), values).astype(dtype)
        out += product("pgnmc,pgnck->pgnmk", e, values.astype(dtype)).reshape(P, G, N, T, R, K)
    if prompt is not None:
        e_prompt = jnp.exp(s_prompt - top.swapaxes(1, 2)[..., None])
        total += e_prompt.sum(axis=-1).swapaxes(1, 2)
        e_prompt = _scaled(e_prompt.reshape(P, N, G * T * R, -1), prompt[1]).astype(dtype)
        seen_in_prompt = product("pnms,pnsk->pnmk", e_prompt, prompt_values)
        out += seen_in_prompt.reshape(P, N, G, T, R, K).swapaxes(1, 2)
    out = out / total[..., None]
    return out.transpose(0, 1, 3, 2, 4, 5).reshape(P, G, T, H * K)


def _scaled(x: Array, operand: Array | Int8) -> Array:
    """Returns x, times the scale of `operand` if that is rounded."""
    return x * operand.scale if isinstance(operand, Int8) else x


class PromptCache(NamedTuple):
    """Keys and values of P prompts, computed once per prompt and shared by its group. N key/value heads of size K.

    Keys are rotated. After `Decoder.unstack`, keys and values are tuples with one entry [P, N, K, S] or [P, N, S, K] per layer.
    With config.attention "splash", padding comes first and the tokens of each prompt are at the end, wherever the caller had padding.
    """

    keys: Float[Array, "layers P N K S"] | tuple[Array | Int8, ...]
    values: Float[Array, "layers P N S K"] | tuple[Array | Int8, ...]
    mask: Bool[Array, "P S"]  # True on real tokens
    positions: Int[Array, "P S"]  # padding repeats a position of its neighbour
    lengths: Int[Array, " P"]  # real tokens per prompt


class SampleCache(NamedTuple):
    """Keys and values of the samples' own tokens, per layer in pieces of c positions; an Int8 has one scale per position."""

    # Rotated, [P, G, N, K, c] per piece: the layout of the product with a query.
    keys: tuple[tuple[Array | Int8, ...], ...]
    values: tuple[tuple[Array | Int8, ...], ...]  # [P, G, N, c, K] per piece


def empty_cache(
    config: ModelConfig, prompts: int, group: int, length: int, int8: bool = False, pieces: int = 1
) -> SampleCache:
    """Makes the cache of zeros for `group` samples of `length` tokens per prompt; with int8, of rounded entries.

    The positions are cut into `pieces` of equal size; the last one is padded.
    """
    lead = prompts, group, config.kv_heads
    size = -(-length // pieces)

    def split(shape, dtype):
        return sharding.constrain(jnp.zeros(shape, dtype), "prompts", None, "kv_heads")

    def zeros(*shape):
        if int8:
            return Int8(split((*lead, *shape), jnp.int8), split((*lead, 1, size), jnp.float32))
        return split((*lead, *shape), config.compute_dtype)

    empty = lambda *shape: tuple(tuple(zeros(*shape) for _ in range(pieces)) for _ in range(config.layers))
    return SampleCache(empty(config.head_dim, size), empty(size, config.head_dim))


def write_cache(
    pieces: Sequence[KeysValues], new: tuple[Array, Array], index: Int[Array, ""] | int
) -> tuple[KeysValues, ...]:
    """Returns one layer's cache with new entries from position `index` along C, rounded if the cache is.

    With several pieces, `new` is one position.
    """
    keys, values = round_to_int8(*new) if isinstance(pieces[0][0], Int8) else new
    size, count = values_of(pieces[0][1]).shape[3], len(pieces)

    def put(old, new, axis, i):
        if count == 1:
            return jax.lax.dynamic_update_slice_in_dim(old, new, index, axis)
        at = jnp.clip(index - i * size, 0, size - 1)
        # Pieces that do not hold the position write the entry that they have, so that all are updated in place.
        held = jax.lax.dynamic_slice_in_dim(old, at, 1, axis)
        return jax.lax.dynamic_update_slice_in_dim(old, jnp.where(index // size == i, new, held), at, axis)

    def put_all(old, new, axis, i):
        if not isinstance(old, Int8):
            return put(old, new, axis, i)
        return Int8(put(old.values, new.values, axis, i), put(old.scale, new.scale, 4, i))

    return tuple((put_all(k, keys, 4, i), put_all(v, values, 3, i)) for i, (k, v) in enumerate(pieces))


def values_of(x: Array | Int8) -> Array:
    """Returns the array, without the scale of a rounded one."""
    return x.values if isinstance(x, Int8) else x


def round_to_int8(keys: Float[Array, "*lead K C"], values: Float[Array, "*lead C K"]) -> tuple[Int8, Int8]:
    """Rounds keys and values, each with one scale per position in the shape [*lead, 1, C]."""
    rounded = quantize(values, axis=-1)
    return quantize(keys, axis=-2), rounded._replace(scale=rounded.scale.swapaxes(-1, -2))

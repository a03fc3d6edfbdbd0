"""Pieces of the decoder as pure functions: products, RMSNorm, rotary positions, group attention."""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxrl_reason.models.config import ModelConfig

_FLOAT32 = jax.lax.Precision.HIGHEST  # accelerators would multiply float32 operands in bfloat16 or TF32
_NEVER = -1e30  # finite: a row that may see nothing gets a uniform softmax, never NaN


class Int8(NamedTuple):
    """A rounded array: values * scale, for what decoding reads over and over. Never differentiated."""

    values: jax.Array  # int8
    scale: jax.Array  # float32, 1 along the axis that shares it

    @property
    def shape(self):
        return self.values.shape

    def astype(self, dtype):
        """The values alone: products with them are multiplied by the scale."""
        return self.values.astype(dtype)


def quantize(x: jax.Array, axis: int) -> Int8:
    """Rounds to 255 steps between plus and minus the largest magnitude along `axis`, which shares a scale."""
    x = x.astype(jnp.float32)
    scale = jnp.max(jnp.abs(x), axis=axis, keepdims=True) / 127
    return Int8(jnp.round(x / jnp.where(scale > 0, scale, 1.0)).astype(jnp.int8), scale)


@jax.custom_vjp
def _dot_bfloat16(x, w):
    return jax.lax.dot(x, w, preferred_element_type=jnp.float32)


def _dot_bfloat16_fwd(x, w):
    # Not _dot_bfloat16 again: a rematerialisation policy that keeps products does not look into it.
    return jax.lax.dot(x, w, preferred_element_type=jnp.float32), (x, w)


def _dot_bfloat16_bwd(residuals, g):
    # jax would multiply the float32 cotangent with a bfloat16 operand, which is a float32 product.
    x, w = residuals
    g = g.astype(jnp.bfloat16)
    dx = jax.lax.dot_general(g, w, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)
    dw = jax.lax.dot_general(x, g, (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32)
    return dx.astype(x.dtype), dw.astype(w.dtype)


_dot_bfloat16.defvjp(_dot_bfloat16_fwd, _dot_bfloat16_bwd)


def dot(x: jax.Array, w: jax.Array | Int8, dtype: str) -> jax.Array:
    """x[..., D] @ w[D, F] -> f32[..., F], operands in `dtype`, sums in float32. An Int8 matrix has a scale a column."""
    if isinstance(w, Int8):
        return dot(x, w.astype(dtype), dtype) * w.scale[0]
    # Two dimensions only: XLA on CPU has no bfloat16 product with two contracted dimensions, which
    # the weight gradient would be.
    flat = x.reshape(-1, x.shape[-1]).astype(dtype)
    w = w.astype(dtype)
    y = jax.lax.dot(flat, w, precision=_FLOAT32) if dtype == "float32" else _dot_bfloat16(flat, w)
    return y.reshape(*x.shape[:-1], w.shape[-1])


def rms_norm(x: jax.Array, scale: jax.Array, eps: float, offset: float) -> jax.Array:
    """x / rms(x) * (scale + offset) over the last axis, in float32, returned in x's dtype."""
    y = x.astype(jnp.float32)
    y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + eps)
    return (y * (scale.astype(jnp.float32) + offset)).astype(x.dtype)


def rotary_frequencies(config: ModelConfig, sliding: bool) -> jax.Array:
    """Rotary frequencies f32[head_dim / 2] in radians per position."""
    local = sliding and config.local_rope_theta
    theta = config.local_rope_theta if local else config.rope_theta
    half = config.head_dim // 2
    freqs = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    scaling = None if local else config.rope_scaling
    if scaling is None:
        return freqs
    if scaling.kind == "linear":
        return freqs / scaling.factor
    wavelengths = 2 * math.pi / freqs
    low = scaling.original_length / scaling.low_freq_factor
    high = scaling.original_length / scaling.high_freq_factor
    smooth = (scaling.original_length / wavelengths - scaling.low_freq_factor) / (
        scaling.high_freq_factor - scaling.low_freq_factor
    )
    blended = (1 - smooth) * freqs / scaling.factor + smooth * freqs
    return jnp.where(wavelengths > low, freqs / scaling.factor, jnp.where(wavelengths < high, freqs, blended))


def rotary_angles(positions: jax.Array, config: ModelConfig, sliding: bool):
    """positions int[...] -> (cos, sin), each f32[..., head_dim / 2]."""
    angles = positions[..., None].astype(jnp.float32) * rotary_frequencies(config, sliding)
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotates x[..., heads, head_dim] by angles [..., head_dim / 2]; halves split, as in Llama."""
    x1, x2 = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos[..., None, :], sin[..., None, :]
    return jnp.concatenate([x1 * cos - x2 * sin, x2 * cos + x1 * sin], axis=-1)


def group_attention(q, own, own_mask, prompt=None, prompt_mask=None, *, scale: float, dtype: str):
    """Softmax attention of G samples per prompt over their own keys and one shared prompt.

    The prompt's keys are read once per group: the queries of all G samples meet them in a single
    dense product, with G * T * heads / kv_heads rows per key head. One softmax runs over both parts.

    Args:
      q: [P, G, T, H, K] queries.
      own: keys [P, G, N, K, C] and values [P, G, N, C, K]: the samples' own positions, N key/value heads. Each may be an Int8 whose
        scale is [P, G, N, 1, C].
      own_mask: bool, broadcastable to [P, G, T, C]; True where a query may look.
      prompt: keys [P, N, K, S] and values [P, N, S, K], or None; Int8 with a scale [P, N, 1, S].
      prompt_mask: bool, broadcastable to [P, G, T, S].
      scale: factor on the scores.
      dtype: dtype of the operands of the products; sums and the softmax are float32.

    Returns:
      f32[P, G, T, H * K].
    """
    P, G, T, H, K = q.shape
    N = own[0].shape[2]
    R = H // N
    q = (q * scale).astype(dtype).reshape(P, G, T, N, R, K)
    precision = _FLOAT32 if dtype == "float32" else None
    product = functools.partial(jnp.einsum, precision=precision, preferred_element_type=jnp.float32)

    keys, values = (x.astype(dtype) for x in own)
    q_own = q.transpose(0, 1, 3, 2, 4, 5).reshape(P, G, N, T * R, K)
    s_own = _scaled(product("pgnmk,pgnkc->pgnmc", q_own, keys), own[0]).reshape(P, G, N, T, R, -1)
    s_own = jnp.where(own_mask[:, :, None, :, None, :], s_own, _NEVER)
    top = s_own.max(axis=-1)  # [P, G, N, T, R]
    if prompt is not None:
        prompt_keys, prompt_values = (x.astype(dtype) for x in prompt)
        q_prompt = q.transpose(0, 3, 1, 2, 4, 5).reshape(P, N, G * T * R, K)
        s_prompt = _scaled(product("pnmk,pnks->pnms", q_prompt, prompt_keys), prompt[0]).reshape(P, N, G, T, R, -1)
        s_prompt = jnp.where(prompt_mask[:, None, :, :, None, :], s_prompt, _NEVER)
        top = jnp.maximum(top, s_prompt.max(axis=-1).swapaxes(1, 2))
    top = jax.lax.stop_gradient(top)

    e_own = jnp.exp(s_own - top[..., None])
    total = e_own.sum(axis=-1)
    out = product("pgnmc,pgnck->pgnmk", _scaled(e_own.reshape(P, G, N, T * R, -1), own[1]).astype(dtype), values)
    out = out.reshape(P, G, N, T, R, K)
    if prompt is not None:
        e_prompt = jnp.exp(s_prompt - top.swapaxes(1, 2)[..., None])
        total += e_prompt.sum(axis=-1).swapaxes(1, 2)
        e_prompt = _scaled(e_prompt.reshape(P, N, G * T * R, -1), prompt[1]).astype(dtype)
        seen = product("pnms,pnsk->pnmk", e_prompt, prompt_values)
        out += seen.reshape(P, N, G, T, R, K).swapaxes(1, 2)
    out = out / total[..., None]
    return out.transpose(0, 1, 3, 2, 4, 5).reshape(P, G, T, H * K)


def _scaled(x, of):
    """x, times the scale of a rounded operand."""
    return x * of.scale if isinstance(of, Int8) else x

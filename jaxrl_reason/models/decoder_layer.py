"""One layer of the decoder, attention and MLP, in Flax NNX; its weights are stacked over all layers."""

from collections.abc import Callable
import dataclasses
import functools
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxrl_reason.models import layers as L
from jaxrl_reason.models.config import ModelConfig


def normal_weight(rngs: nnx.Rngs, config: ModelConfig, shape: tuple[int, ...], axes: tuple[str, ...], std: float):
    """Returns a parameter with normally distributed entries and logical axes, in the dtype of the weights."""
    value = jax.random.normal(rngs.params(), shape, jnp.float32) * std
    return nnx.Param(value.astype(config.param_dtype), axes=axes)


def constant_weight(config: ModelConfig, shape: tuple[int, ...], axes: tuple[str, ...], value: float):
    """Returns a parameter with equal entries and logical axes, in the dtype of the weights."""
    return nnx.Param(jnp.full(shape, value, config.param_dtype), axes=axes)


class DecoderLayer(nnx.Module):
    """Attention and MLP. It is built with the weights of all layers, and called on the slice of one layer."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        self.config = c = config
        n, D, F, K = c.layers, c.width, c.mlp_width, c.head_dim
        weight = lambda i, o, axes, scale=1.0: normal_weight(rngs, c, (n, i, o), ("layers", *axes), scale / i**0.5)
        norm = lambda size, axis: constant_weight(c, (n, size), ("layers", axis), 1.0 - c.norm_offset)
        bias = lambda size, axis: constant_weight(c, (n, size), ("layers", axis), 0.0)
        residual_scale = (2 * n) ** -0.5  # keeps the variance of the residual stream independent of depth
        self.attention_norm = norm(D, "embed")
        self.q = weight(D, c.heads * K, ("embed", "heads"))
        self.k = weight(D, c.kv_heads * K, ("embed", "kv_heads"))
        self.v = weight(D, c.kv_heads * K, ("embed", "kv_heads"))
        self.o = weight(c.heads * K, D, ("heads", "embed"), residual_scale)
        if c.qkv_bias:
            self.q_bias = bias(c.heads * K, "heads")
            self.k_bias, self.v_bias = bias(c.kv_heads * K, "kv_heads"), bias(c.kv_heads * K, "kv_heads")
        if c.qk_norm:
            self.q_norm, self.k_norm = norm(K, "head_dim"), norm(K, "head_dim")
        self.mlp_norm = norm(D, "embed")
        self.gate = weight(D, F, ("embed", "mlp"))
        self.up = weight(D, F, ("embed", "mlp"))
        self.down = weight(F, D, ("mlp", "embed"), residual_scale)
        if c.post_norms:
            self.post_attention_norm, self.post_mlp_norm = norm(D, "embed"), norm(D, "embed")
        for name in c.lora_projections if c.lora_rank else ():
            (_, i, o), (_, of_in, of_out) = getattr(self, name).shape, getattr(self, name).get_metadata()["axes"]
            wide = dataclasses.replace(c, param_dtype="float32")  # trained weights are float32
            a = normal_weight(rngs, wide, (n, i, c.lora_rank), ("layers", of_in, "rank"), (3 * i) ** -0.5)
            setattr(self, f"{name}_a", a)
            setattr(self, f"{name}_b", constant_weight(wide, (n, c.lora_rank, o), ("layers", "rank", of_out), 0.0))

    def __call__(
        self,
        x: Float[Array, "P G T D"],
        rotary: L.Rotary,
        attend: Callable[[Array, Any], Array],
        cache: tuple[L.KeysValues, ...] | None = None,
        index: Int[Array, ""] | int = 0,
    ) -> tuple[Float[Array, "P G T D"], Any]:
        """Computes one layer: the residual stream, and own keys [P, G, N, K, C] and values [P, G, N, C, K].

        `rotary` broadcasts to [P, G, T, head_dim / 2]. `attend` is a function of queries [P, G, T, H, K] and of own
        keys and values to [P, G, T, H * K]. `cache` has pieces of own keys and values, which this call updates from
        position `index` along C and which are own keys and values then; without it, they are those of this call.
        """
        c = self.config
        P, G, T, _ = x.shape
        norm = lambda y, scale: L.rms_norm(y, scale[...], c.norm_eps, c.norm_offset)
        dot = self._dot

        y = norm(x, self.attention_norm)
        q, k, v = dot(y, "q"), dot(y, "k"), dot(y, "v")
        if c.qkv_bias:
            q, k, v = q + self.q_bias[...], k + self.k_bias[...], v + self.v_bias[...]
        q = q.reshape(P, G, T, c.heads, c.head_dim)
        k, v = (y.reshape(P, G, T, c.kv_heads, c.head_dim) for y in (k, v))
        if c.qk_norm:
            q, k = norm(q, self.q_norm), norm(k, self.k_norm)
        q, k = L.rotate(q, *rotary), L.rotate(k, *rotary)
        new = k.transpose(0, 1, 3, 4, 2).astype(c.compute_dtype), v.swapaxes(2, 3).astype(c.compute_dtype)
        own: Any = new if cache is None else L.write_cache(cache, new, index)
        y = dot(attend(q, own), "o").astype(x.dtype)
        x = x + (norm(y, self.post_attention_norm) if c.post_norms else y)

        y = norm(x, self.mlp_norm)
        act = jax.nn.silu if c.activation == "silu" else functools.partial(jax.nn.gelu, approximate=True)
        y = dot(act(dot(y, "gate")) * dot(y, "up"), "down").astype(x.dtype)
        return x + (norm(y, self.post_mlp_norm) if c.post_norms else y), own

    def _dot(self, y, name):
        """Returns y times the matrix of this name, its adapter included."""
        c = self.config
        weight = lambda name: getattr(self, name).get_value()
        out = L.dot(y, weight(name), c.compute_dtype)
        if c.lora_rank and name in c.lora_projections:
            narrow = L.dot(y, weight(f"{name}_a"), c.compute_dtype)
            out += c.lora_scale * L.dot(narrow, weight(f"{name}_b"), c.compute_dtype)
        return out

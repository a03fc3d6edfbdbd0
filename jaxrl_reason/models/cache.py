"""Caches of keys and values: one per prompt, shared by its group, and one per sample; in floats or rounded to int8."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxrl_reason.models import sharding
from jaxrl_reason.models.config import ModelConfig
from jaxrl_reason.models.layers import Int8, KeysValues, quantize


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
    """Keys and values of the samples' own tokens, one entry per layer.

    Keys have the layout of the product with a query, because each step of decoding reads all of them for a few rows of queries. An
    entry can be an Int8 with one scale per position.
    """

    keys: tuple[Array | Int8, ...]  # rotated, [P, G, N, K, T] per layer
    values: tuple[Array | Int8, ...]  # [P, G, N, T, K] per layer


def empty_cache(config: ModelConfig, prompts: int, group: int, length: int, int8: bool = False) -> SampleCache:
    """Makes the cache of zeros for `group` samples of `length` tokens per prompt; with int8, of rounded entries."""
    lead = prompts, group, config.kv_heads

    def split(shape, dtype):
        return sharding.constrain(jnp.zeros(shape, dtype), "prompts", None, "kv_heads")

    def zeros(*shape):
        if int8:
            return Int8(split((*lead, *shape), jnp.int8), split((*lead, 1, length), jnp.float32))
        return split((*lead, *shape), config.compute_dtype)

    empty = lambda *shape: tuple(zeros(*shape) for _ in range(config.layers))
    return SampleCache(empty(config.head_dim, length), empty(length, config.head_dim))


def write(cache: KeysValues, new: tuple[Array, Array], index: Int[Array, ""] | int) -> KeysValues:
    """Returns the cache of one layer, keys [P, G, N, K, C] and values [P, G, N, C, K], with new entries, rounded if the cache is.

    New keys and values have a smaller C, and begin at position `index` along C.
    """
    update = jax.lax.dynamic_update_slice_in_dim

    def put(old, new, axis):
        if not isinstance(old, Int8):
            return update(old, new, index, axis)
        return Int8(update(old.values, new.values, index, axis), update(old.scale, new.scale, index, 4))

    keys, values = round_to_int8(*new) if isinstance(cache[0], Int8) else new
    return put(cache[0], keys, 4), put(cache[1], values, 3)


def round_to_int8(keys: Float[Array, "*lead K C"], values: Float[Array, "*lead C K"]) -> tuple[Int8, Int8]:
    """Rounds keys and values, each with one scale per position in the shape [*lead, 1, C]."""
    rounded = quantize(values, axis=-1)
    return quantize(keys, axis=-2), rounded._replace(scale=rounded.scale.swapaxes(-1, -2))

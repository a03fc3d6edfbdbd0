"""Digests of arrays, by which a checkpoint knows a single wrong bit in its files: those of arrays have no checksums of their own.

They are summed where the arrays live, and are the same on every mesh.
"""

from collections.abc import Mapping
import functools
from typing import Any

import jax
import jax.numpy as jnp

from jaxrl_reason.rl import hosts


def of(parts: Mapping[str, Any]) -> dict[str, jax.Array]:
    """For each part that has arrays a digest of every one, in the order of its leaves: u32[arrays]."""
    leaves = {name: found for name, tree in parts.items() if (found := jax.tree.leaves(tree))}
    # One array after the other: CPUs hold all hashes of what they sum, and are not to add up several over the processes at once.
    one = lambda x: jax.block_until_ready(_compiled(_replicated(x))(x))
    return {name: jnp.stack([one(x) for x in found]) for name, found in leaves.items()}


def abstract(parts: Mapping[str, Any]) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes and shardings of `of(parts)`, whose leaves may be ShapeDtypeStructs."""
    return {
        name: jax.ShapeDtypeStruct((len(leaves),), jnp.uint32, sharding=_replicated(leaves[0]))
        for name, tree in parts.items()
        if (leaves := jax.tree.leaves(tree))
    }


def first_difference(found: Mapping[str, jax.Array], saved: Mapping[str, jax.Array]) -> tuple[str, int] | None:
    """The part and the number of the first array in it whose digests differ."""
    for name, digests in found.items():
        other = hosts.whole(digests) != hosts.whole(saved[name])
        if other.any():
            return name, int(other.argmax())
    return None


def _replicated(x: jax.Array | jax.ShapeDtypeStruct) -> jax.sharding.Sharding:
    """On all devices that hold a part of x."""
    named = isinstance(x.sharding, jax.NamedSharding)
    return jax.NamedSharding(x.sharding.mesh, jax.sharding.PartitionSpec()) if named else x.sharding


@functools.lru_cache
def _compiled(sharding: jax.sharding.Sharding):
    return jax.jit(digest, out_shardings=sharding)


def digest(x: jax.Array) -> jax.Array:
    """u32: the sum of a hash of every element's bits and place, modulo 2**32. It is exact, and so the same on every mesh.

    Elements are numbers of 8, 16 or 32 bits. One wrong element always shows, for the hash is a bijection; several do but for one case in 2**32.
    """
    bits = x.astype(jnp.uint8) if x.dtype == bool else x
    bits = jax.lax.bitcast_convert_type(bits, f"uint{8 * bits.dtype.itemsize}").astype(jnp.uint32)
    place, stride = jnp.uint32(0), 1
    for axis in reversed(range(x.ndim)):
        place += jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis) * jnp.uint32(stride % 2**32)
        stride *= x.shape[axis]
    return jnp.sum(_mixed(bits ^ _mixed(place)), dtype=jnp.uint32)


def _mixed(h: jax.Array) -> jax.Array:
    """MurmurHash3's last step, a bijection of u32."""
    h = (h ^ (h >> 16)) * jnp.uint32(0x85EBCA6B)
    h = (h ^ (h >> 13)) * jnp.uint32(0xC2B2AE35)
    return h ^ (h >> 16)

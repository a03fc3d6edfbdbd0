"""Digests of arrays: they show a single wrong bit in a checkpoint, whose array files have no checksums.

A digest is computed on the devices of its array, and is equal on every mesh.
"""

from collections.abc import Mapping
import functools
import hashlib
from typing import Any

import jax
import jax.numpy as jnp

from jaxrl_reason.rl import hosts


def of(parts: Mapping[str, Any]) -> dict[str, jax.Array]:
    """Returns, for each part with arrays, the digests of its leaves in order: u32[arrays]."""
    leaves = {name: found for name, tree in parts.items() if (found := jax.tree.leaves(tree))}
    # One array after the other: CPUs hold all hashes of a sum, and must not reduce several arrays over the processes at once.
    one = lambda x: jax.block_until_ready(_compiled(_replicated(x))(x))
    return {name: jnp.stack([one(x) for x in found]) for name, found in leaves.items()}


def of_all(params: Any) -> str:
    """Returns one digest of all leaves, a short hex, on all processes."""
    (found,) = of({"": params}).values()
    return hashlib.sha256(hosts.to_host(found).tobytes()).hexdigest()[:16]


def abstract(parts: Mapping[str, Any]) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns the shapes and shardings of `of(parts)`; the leaves of `parts` may be ShapeDtypeStructs."""
    return {
        name: jax.ShapeDtypeStruct((len(leaves),), jnp.uint32, sharding=_replicated(leaves[0]))
        for name, tree in parts.items()
        if (leaves := jax.tree.leaves(tree))
    }


def first_difference(found: Mapping[str, jax.Array], saved: Mapping[str, jax.Array]) -> tuple[str, int] | None:
    """Returns the part and the number of its first array whose digests differ; None if all are equal."""
    for name, digests in found.items():
        other = hosts.to_host(digests) != hosts.to_host(saved[name])
        if other.any():
            return name, int(other.argmax())
    return None


def _replicated(x: jax.Array | jax.ShapeDtypeStruct) -> jax.sharding.Sharding:
    """Returns the sharding that holds a copy on every device of x."""
    if isinstance(x.sharding, jax.NamedSharding):
        return jax.NamedSharding(x.sharding.mesh, jax.sharding.PartitionSpec())
    return x.sharding


@functools.lru_cache
def _compiled(sharding: jax.sharding.Sharding):
    return jax.jit(digest, out_shardings=sharding)


def digest(x: jax.Array) -> jax.Array:
    """Computes u32: the sum modulo 2**32 of a hash of every element's bits (8, 16, 32, or a bool) and index.

    The sum is exact, so it is equal on every mesh. One wrong element always changes it, because the hash is a
    bijection; several wrong elements do so in all but one of 2**32 cases.
    """
    bits = x.astype(jnp.uint8) if x.dtype == bool else x
    bits = jax.lax.bitcast_convert_type(bits, f"uint{8 * bits.dtype.itemsize}").astype(jnp.uint32)
    index, stride = jnp.uint32(0), 1
    for axis in reversed(range(x.ndim)):
        index += jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis) * jnp.uint32(stride % 2**32)
        stride *= x.shape[axis]
    return jnp.sum(_mixed(bits ^ _mixed(index)), dtype=jnp.uint32)


def _mixed(h: jax.Array) -> jax.Array:
    """Computes MurmurHash3's last step, a bijection of u32."""
    h = (h ^ (h >> 16)) * jnp.uint32(0x85EBCA6B)
    h = (h ^ (h >> 13)) * jnp.uint32(0xC2B2AE35)
    return h ^ (h >> 16)

"""Meshes with four axes, and one table from the logical axes of arrays to mesh axes.

slice   TPU slices, joined by a data-centre network, the slowest link; prompts are split over them
data    copies of the weights; each copy has its share of the prompts
fsdp    weights are split, and gathered layer by layer when they are used; prompts are split too
tensor  heads, MLP and vocabulary are split; all devices of the axis have the same prompts
"""

from collections.abc import Callable, Sequence
import functools
from typing import Any

import jax
from jax.experimental import mesh_utils
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec
import numpy as np

AXES = ("slice", "data", "fsdp", "tensor")
PROMPT_AXES = ("slice", "data", "fsdp")
AnyMesh = Mesh | AbstractMesh

RULES: dict[str, str | tuple[str, ...] | None] = {
    # weights
    "layers": None,
    "vocab": "tensor",
    "embed": "fsdp",
    "heads": "tensor",
    "kv_heads": "tensor",
    "head_dim": None,
    "mlp": "tensor",
    "features": None,
    "prefix": None,
    "rank": None,
    # all arrays with a prompt axis: rollouts, rewards, KV caches; a group is never split
    "prompts": PROMPT_AXES,
    # the samples of a group, only while tokens are drawn from logits whose vocabulary was split
    "samples": "tensor",
}


def spec(*axes: str | None) -> PartitionSpec:
    """Returns the PartitionSpec of logical axes; None: not split."""
    return PartitionSpec(*(RULES[axis] if axis else None for axis in axes))


def make_mesh(
    data: int = 1, fsdp: int = -1, tensor: int = 1, slices: int = 1, *, devices: Sequence[jax.Device] | None = None
) -> Mesh:
    """Makes a mesh over all devices, or the given ones. On TPUs, neighbours in the mesh are neighbours in the torus of the slice.

    `data`, `fsdp` and `tensor` are sizes of axes of each slice, `slices` of the axis "slice". At most one size is -1: it takes all devices
    that the other sizes leave. Raises ValueError if the product is not the number of devices, or `slices` not the number of TPU slices.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = dict(zip(AXES, (slices, data, fsdp, tensor)))
    text = ", ".join(f"mesh.{k}={v}" for k, v in sizes.items())
    if any(v < 1 and v != -1 for v in sizes.values()) or list(sizes.values()).count(-1) > 1:
        raise ValueError(f"{text}: each size must be at least 1, or -1 for the remaining devices; only one can be -1.")
    known = int(np.prod([v for v in sizes.values() if v != -1]))
    if len(devices) % known or (-1 not in sizes.values() and known != len(devices)):
        raise ValueError(
            f"{text} needs {'a multiple of ' if -1 in sizes.values() else ''}{known} devices, and there are {len(devices)}; "
            "set one of them to -1 to use all devices."
        )
    shape = [len(devices) // known if v == -1 else v for v in sizes.values()]
    if devices[0].platform != "tpu":
        return Mesh(np.array(devices).reshape(shape), AXES)
    found = len({getattr(d, "slice_index", 0) for d in devices})
    if found != shape[0]:
        raise ValueError(f"mesh.slice is {shape[0]}, and the devices belong to {found} TPU slices; set it to {found}.")
    if found == 1:
        return Mesh(mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True), AXES)
    own, joined = [1, *shape[1:]], [found, 1, 1, 1]
    return Mesh(mesh_utils.create_hybrid_device_mesh(own, joined, devices, allow_split_physical_axes=True), AXES)


def rollout_mesh(mesh: Mesh, tensor: int) -> Mesh:
    """Makes the mesh for decoding: the devices of the update's mesh in the same order, without `fsdp`.

    The update gathers weights that are split by fsdp. A decoding step would gather them for a single token, so here weights are
    whole, or split by tensor: `tensor` devices share a prompt. Raises ValueError if `tensor` does not divide the devices of a slice.
    """
    slices, rest = mesh.shape["slice"], mesh.devices.size // mesh.shape["slice"]
    if rest % tensor:
        fits = [n for n in range(1, rest + 1) if rest % n == 0]
        raise ValueError(
            f"mesh.rollout_tensor is {tensor}, which does not divide the {rest} devices of a slice; sizes that do: {fits}."
        )
    if rest // tensor == mesh.shape["data"] and tensor == mesh.shape["tensor"]:
        return mesh
    return Mesh(mesh.devices.reshape(slices, rest // tensor, 1, tensor), AXES)


def batch_sharding(mesh: AnyMesh) -> NamedSharding:
    """Returns the sharding that splits only the leading (prompt) axis."""
    return NamedSharding(mesh, spec("prompts"))


def replicated(mesh: AnyMesh) -> NamedSharding:
    """Returns the sharding that splits no axis."""
    return NamedSharding(mesh, PartitionSpec())


def num_shards(mesh: AnyMesh) -> int:
    """Returns into how many shards the mesh splits the prompts of a batch."""
    return int(np.prod([mesh.shape[axis] for axis in PROMPT_AXES]))


def check_batch(mesh: AnyMesh, name: str, size: int) -> None:
    """Raises a ValueError if the mesh cannot split a batch of `size` prompts, configured as `name`, evenly."""
    n = num_shards(mesh)
    if size % n:
        near = [x for x in (size // n * n, -(-size // n) * n) if x]
        raise ValueError(
            f"{name} is {size}, which mesh.slice x mesh.data x mesh.fsdp = {n} devices cannot share evenly; near it, "
            f"{' and '.join(map(str, near))} can be shared."
        )


def microbatches(mesh: AnyMesh, size: int, parts: int) -> int:
    """Returns the largest divisor of `parts` that cuts `size` prompts into microbatches which the mesh splits evenly; at least 1."""
    return next(n for n in range(parts, 0, -1) if parts % n == 0 and size % (n * num_shards(mesh)) == 0 or n == 1)


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Constrains the leading dimensions of a traced array to logical axes (None: not split) on the mesh of `jax.set_mesh`, if any."""
    mesh = jax.sharding.get_abstract_mesh()
    return x if mesh.empty or mesh.size == 1 else jax.lax.with_sharding_constraint(x, spec(*axes))


def on_mesh(mesh: Mesh, function: Callable[..., Any]) -> Callable[..., Any]:
    """Returns `function` with `mesh` as the ambient mesh of its trace, which `constrain`, `by_prompt` and attention kernels read."""

    @functools.wraps(function)
    def traced(*args, **keywords):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return function(*args, **keywords)

    return traced


def by_prompt(function: Callable[..., Any]) -> Callable[..., Any]:
    """Returns `function(whole, *split)`, computed by each device for its own prompts if the ambient mesh splits prompts.

    The first argument, and leaves of the others whose leading size is 1, are gathered once and are whole on every device. All other
    leaves, and all results, are split along their leading axis. The gradient of the first argument is summed once, on
    CPUs in float32: XLA ends the process at a sum of bfloat16 over CPU devices.
    """
    mesh = jax.sharding.get_abstract_mesh()
    axes = tuple(a for a in PROMPT_AXES if a in mesh.shape and mesh.shape[a] > 1)
    if not axes:
        return function

    on_cpu = mesh.abstract_device is not None and mesh.abstract_device.platform == "cpu"

    def copied(x):
        wide = x.astype(jnp.float32) if on_cpu and x.dtype == jnp.bfloat16 else x
        return jax.lax.pcast(wide, axes, to="varying").astype(x.dtype)

    def own(whole, *split):
        # From here on each device has its own copy: gradients add up on the copy, and are summed over devices at the cast.
        return function(jax.tree.map(copied, whole), *split)

    def mapped(whole, *split):
        of = lambda x: PartitionSpec(axes) if x.ndim and x.shape[0] > 1 else PartitionSpec()
        specs = jax.tree.map(lambda _: PartitionSpec(), whole), *jax.tree.map(of, split)
        return jax.shard_map(own, in_specs=specs, out_specs=PartitionSpec(axes), axis_names=set(axes))(whole, *split)

    return mapped


def num_vocab_shards() -> int:
    """Returns into how many shards the ambient mesh splits the vocabulary."""
    return jax.sharding.get_abstract_mesh().shape.get("tensor", 1)


def num_prompt_shards() -> int:
    """Returns into how many shards the ambient mesh splits prompts."""
    shape = jax.sharding.get_abstract_mesh().shape
    return int(np.prod([shape.get(axis, 1) for axis in PROMPT_AXES]))

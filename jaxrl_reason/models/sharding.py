"""Where arrays live: a mesh with four axes, and one table from logical axes to mesh axes.

slice   TPU slices joined by a data-centre network: as data, the slowest link
data    copies of the weights, each with its share of the prompts
fsdp    weights split, prompts split too; gathered layer by layer where they are used
tensor  heads, MLP and vocabulary split; the same prompts on every device of the axis
"""

import functools

import jax
from jax.experimental import mesh_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec
import numpy as np

from jaxrl_reason.models.config import ModelConfig

AXES = ("slice", "data", "fsdp", "tensor")

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
    # everything with a prompt axis: rollouts, rewards, KV caches; groups stay whole
    "prompts": ("slice", "data", "fsdp"),
    # a group's samples, for a moment: where tokens are drawn from logits whose vocabulary was split
    "samples": "tensor",
}


def spec(*axes: str | None) -> PartitionSpec:
    """The PartitionSpec of logical axes; None: whole."""
    return PartitionSpec(*(RULES[axis] if axis else None for axis in axes))


def make_mesh(data: int = 1, fsdp: int = -1, tensor: int = 1, slices: int = 1, *, devices=None) -> Mesh:
    """A mesh over all devices; -1 (at most once) stands for the devices that the others leave.

    On TPUs neighbours in the mesh are neighbours in the slice's torus, and `slices` are what the data-centre network joins.

    Raises:
      ValueError: the sizes do not multiply to the number of devices, or `slices` is not how many there are.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = dict(zip(AXES, (slices, data, fsdp, tensor)))
    text = ", ".join(f"mesh.{k}={v}" for k, v in sizes.items())
    if any(v < 1 and v != -1 for v in sizes.values()) or list(sizes.values()).count(-1) > 1:
        raise ValueError(f"{text}: each size is at least 1, and at most one of them is -1 (the rest).")
    known = int(np.prod([v for v in sizes.values() if v != -1]))
    if len(devices) % known or (-1 not in sizes.values() and known != len(devices)):
        raise ValueError(
            f"{text} asks for {'a multiple of ' if -1 in sizes.values() else ''}{known} devices and there "
            f"are {len(devices)}; set one of them to -1 to use them all."
        )
    shape = [len(devices) // known if v == -1 else v for v in sizes.values()]
    if devices[0].platform != "tpu":
        return Mesh(np.array(devices).reshape(shape), AXES)
    found = len({getattr(d, "slice_index", 0) for d in devices})
    if found != shape[0]:
        raise ValueError(f"mesh.slice is {shape[0]}, and these devices lie on {found} TPU slices; set it to {found}.")
    if found == 1:
        return Mesh(mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True), AXES)
    hybrid = mesh_utils.create_hybrid_device_mesh(
        [1, *shape[1:]], [found, 1, 1, 1], devices, allow_split_physical_axes=True
    )
    return Mesh(hybrid, AXES)


def rollout_mesh(mesh: Mesh, tensor: int) -> Mesh:
    """The same devices in the order of `mesh`, for decoding: `tensor` of them share a prompt, and no weight is gathered while it runs.

    What is split by fsdp for the update is whole here (or split by tensor): a decoding step would gather it for a single token.

    Raises:
      ValueError: `tensor` does not divide the devices of a slice.
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


def ways(mesh: Mesh) -> int:
    """How many devices share the prompts of a batch."""
    return int(np.prod([mesh.shape[axis] for axis in RULES["prompts"]]))


def check_batch(mesh: Mesh, name: str, size: int) -> None:
    """Raises a ValueError where the devices that share prompts cannot share `size` of them evenly."""
    n = ways(mesh)
    if size % n:
        near = [x for x in (size // n * n, -(-size // n) * n) if x]
        raise ValueError(
            f"{name} is {size}, which mesh.slice x mesh.data x mesh.fsdp = {n} devices cannot share evenly; near it, "
            f"{' and '.join(map(str, near))} can be shared."
        )


def microbatches(mesh: Mesh, size: int, parts: int) -> int:
    """The most microbatches of `size` prompts, a divisor of `parts`, that the devices can share evenly each."""
    return next(n for n in range(parts, 0, -1) if parts % n == 0 and size % (n * ways(mesh)) == 0 or n == 1)


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Tells the compiler where a traced array lives, by the ambient mesh (`jax.set_mesh`); without one it decides alone."""
    mesh = jax.sharding.get_abstract_mesh()
    return x if mesh.empty or mesh.size == 1 else jax.lax.with_sharding_constraint(x, spec(*axes))


def on_mesh(mesh: Mesh, function):
    """`function`, traced with this mesh around it: what `constrain`, `by_prompt` and the attention kernels ask for."""

    @functools.wraps(function)
    def traced(*args, **keywords):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return function(*args, **keywords)

    return traced


def by_prompt(function):
    """`function(whole, *split)`, computed by each device for its own prompts, where the ambient mesh has several.

    The first argument and leaves without a prompt axis (whose leading size is 1) are whole on every device, gathered once; all others are
    split along their leading axis, as is what is returned. What flows back to the first is summed once.
    """
    mesh = jax.sharding.get_abstract_mesh()
    axes = tuple(a for a in RULES["prompts"] if a in mesh.shape and mesh.shape[a] > 1)
    if not axes:
        return function

    def own(whole, *split):
        # From here on a device's own: gradients add up on it and are summed over the devices where this was one array.
        return function(jax.tree.map(lambda x: jax.lax.pcast(x, axes, to="varying"), whole), *split)

    def mapped(whole, *split):
        of = lambda x: PartitionSpec(axes) if x.ndim and x.shape[0] > 1 else PartitionSpec()
        specs = jax.tree.map(lambda _: PartitionSpec(), whole), *jax.tree.map(of, split)
        return jax.shard_map(own, in_specs=specs, out_specs=PartitionSpec(axes), axis_names=set(axes))(whole, *split)

    return mapped


def tensor_ways() -> int:
    """Over how many devices of the ambient mesh the vocabulary is split."""
    return jax.sharding.get_abstract_mesh().shape.get("tensor", 1)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Splits the leading (prompt) axis; the others are whole."""
    return NamedSharding(mesh, spec("prompts"))


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def param_shardings(config: ModelConfig, mesh: Mesh):
    """A NamedSharding a weight, in the structure of the parameters.

    Raises:
      ValueError: a mesh axis does not divide the dimension it splits (the size is named).
    """
    from jaxrl_reason.models import decoder  # which asks this module where its activations live

    counts = {"heads": config.heads, "kv_heads": config.kv_heads}  # whole heads, not slices of one

    def one(axes, shape):
        split = []
        for name, size in zip(axes, shape.shape):
            axis = RULES[name]
            n = mesh.shape[axis] if axis else 1
            size = counts.get(name, size)
            if size % n:
                fits = [k for k in range(1, size + 1) if size % k == 0]
                near = [*[k for k in fits if k < n][-3:], *[k for k in fits if k > n][:1]]
                raise ValueError(
                    f"mesh.{axis} is {n}, which does not divide the model's {name!r} dimension ({size}); sizes near it that do: {near}."
                )
            split.append(axis if n > 1 else None)
        return NamedSharding(mesh, PartitionSpec(*split))

    return jax.tree.map(
        one, decoder.logical_axes(config), decoder.abstract_params(config), is_leaf=lambda x: isinstance(x, tuple)
    )

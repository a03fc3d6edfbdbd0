"""Where arrays live: a mesh with three axes, and one table from logical axes to mesh axes.

data    copies of the weights, each with its share of the prompts
fsdp    weights split, prompts split too; gathered layer by layer where they are used
tensor  heads, MLP and vocabulary split; the same prompts on every device of the axis
"""

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
import numpy as np

from jaxrl_reason.models import decoder
from jaxrl_reason.models.config import ModelConfig

AXES = ("data", "fsdp", "tensor")
BATCH = PartitionSpec(("data", "fsdp"))  # the prompt axis of every rollout array: groups stay whole

RULES: dict[str, str | None] = {
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
}


def make_mesh(data: int = 1, fsdp: int = -1, tensor: int = 1, devices=None) -> Mesh:
    """A mesh over all devices; -1 (at most once) stands for the devices that the others leave.

    Raises:
      ValueError: the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = dict(zip(AXES, (data, fsdp, tensor)))
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
    return Mesh(np.asarray(devices).reshape(shape), AXES)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Splits the leading (prompt) axis; the others are whole."""
    return NamedSharding(mesh, BATCH)


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def param_shardings(config: ModelConfig, mesh: Mesh):
    """A NamedSharding a weight, in the structure of the parameters.

    Raises:
      ValueError: a mesh axis does not divide the dimension it splits (the size is named).
    """
    counts = {"heads": config.heads, "kv_heads": config.kv_heads}  # whole heads, not slices of one

    def one(axes, shape):
        spec = []
        for name, size in zip(axes, shape.shape):
            axis = RULES[name]
            ways = mesh.shape[axis] if axis else 1
            size = counts.get(name, size)
            if size % ways:
                fits = [n for n in range(1, ways) if size % n == 0]
                raise ValueError(
                    f"mesh.{axis} is {ways}, which does not divide the model's {name!r} dimension "
                    f"({size}); sizes below it that do: {fits}."
                )
            spec.append(axis if ways > 1 else None)
        return NamedSharding(mesh, PartitionSpec(*spec))

    return jax.tree.map(
        one, decoder.logical_axes(config), decoder.abstract_params(config), is_leaf=lambda x: isinstance(x, tuple)
    )

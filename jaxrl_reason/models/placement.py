"""Shardings of the weights: the logical axes that the decoder declares, by the rules of `sharding`, checked on a mesh."""

import jax
from jax.sharding import NamedSharding, PartitionSpec

from jaxrl_reason.models import decoder
from jaxrl_reason.models.config import ModelConfig
from jaxrl_reason.models.sharding import AnyMesh, RULES


def param_shardings(config: ModelConfig, mesh: AnyMesh) -> decoder.Params:
    """Returns a NamedSharding per weight, in the structure of the parameters.

    Args:
      config: the decoder.
      mesh: a mesh of `sharding.make_mesh` or `sharding.rollout_mesh`.

    Raises:
      ValueError: if a mesh axis does not divide the dimension that it splits; heads are counted whole.
    """
    counts = {"heads": config.heads, "kv_heads": config.kv_heads}

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

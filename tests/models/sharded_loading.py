"""Checks on eight devices that shards of a pretrained model are read one by one, and that an invalid mesh raises."""

import pathlib
import sys

import jax
import numpy as np

from jaxrl_reason import models
from jaxrl_reason.models import PretrainedError, sharding
from jaxrl_reason.models.formats import weights

golden = pathlib.Path(sys.argv[1])
read, sizes = weights.SafetensorsDirectory.read, []


def counted(self, name, part):
    found = read(self, name, part)
    sizes.append(found.size)
    return found


weights.SafetensorsDirectory.read = counted
for name in ("llama", "gemma3", "qwen2_reward"):
    load = models.load_reward_model if "reward" in name else models.load_pretrained
    whole = load(golden / name)
    total = sum(x.size for x in jax.tree.leaves(whole.params))
    for axes in (dict(data=2, fsdp=2, tensor=2), dict(data=1, fsdp=8, tensor=1)):
        sizes.clear()
        policy = load(golden / name, mesh=sharding.make_mesh(**axes))
        jax.tree.map(np.testing.assert_array_equal, policy.params, whole.params)
        embedding = policy.params.get("decoder", policy.params)["embedding"]
        shards = axes["fsdp"] * axes["tensor"]
        assert embedding.addressable_shards[0].data.size == embedding.size // shards
        assert max(sizes) == embedding.size // shards  # at most one shard at once
        assert sum(sizes) == total  # a shard that several devices hold is read once
    print(name)

try:
    models.load_pretrained(golden / "llama", mesh=sharding.make_mesh(data=1, fsdp=2, tensor=4))
except PretrainedError as e:
    assert "does not divide the model's 'kv_heads' dimension" in str(e), e
else:
    raise AssertionError("a mesh that does not divide the heads was accepted")

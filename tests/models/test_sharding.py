"""Samples, loss and weights are equal on every mesh, and invalid meshes and shardings raise."""

import os
import pathlib
import subprocess
import sys

import jax
from jax.sharding import AbstractMesh, PartitionSpec
import numpy as np
import pytest

from jaxrl_reason import models
from jaxrl_reason.models import ModelConfig, sharding

CONFIG = ModelConfig(
    vocab_size=24,
    width=16,
    layers=2,
    heads=4,
    kv_heads=2,
    mlp_width=20,
    qkv_bias=True,
    qk_norm=True,
    tied_embedding=False,
)


def abstract_mesh(data, fsdp, tensor):
    return AbstractMesh((1, data, fsdp, tensor), sharding.AXES)


@pytest.mark.parametrize(
    "sizes, shape",
    [
        ((1, -1, 1), (1, 8, 1)),
        ((8, 1, 1), (8, 1, 1)),
        ((2, 2, 2), (2, 2, 2)),
        ((-1, 2, 2), (2, 2, 2)),
        ((1, 4, -1), (1, 4, 2)),
        ((), (1, 8, 1)),
    ],
)
def test_minus_one_takes_the_devices_that_the_others_leave(sizes, shape):
    mesh = sharding.make_mesh(*sizes, devices=np.array(jax.devices()[:1] * 8))
    assert tuple(mesh.shape[axis] for axis in ("data", "fsdp", "tensor")) == shape


@pytest.mark.parametrize("sizes", [(3, -1, 1), (2, 2, 1), (16, 1, 1), (-1, -1, 1), (0, 1, 1), (-2, 1, 1), (1, 1, 9)])
def test_sizes_whose_product_is_not_the_number_of_devices_raise(sizes):
    data, fsdp, tensor = sizes
    with pytest.raises(ValueError, match=rf"mesh\.data={data}, mesh\.fsdp={fsdp}, mesh\.tensor={tensor}.*\.$"):
        sharding.make_mesh(*sizes, devices=np.array(jax.devices()[:1] * 8))


def test_weights_are_split_by_their_logical_axes():
    specs = jax.tree.map(lambda s: s.spec, models.param_shardings(CONFIG, abstract_mesh(2, 2, 2)))
    assert jax.tree.structure(specs) == jax.tree.structure(models.abstract_params(CONFIG))
    want = {
        "q": (None, "fsdp", "tensor"),
        "k": (None, "fsdp", "tensor"),
        "v": (None, "fsdp", "tensor"),
        "o": (None, "tensor", "fsdp"),
        "gate": (None, "fsdp", "tensor"),
        "up": (None, "fsdp", "tensor"),
        "down": (None, "tensor", "fsdp"),
        "q_bias": (None, "tensor"),
        "q_norm": (None, None),
        "mlp_norm": (None, "fsdp"),
    }
    for name, spec in want.items():
        assert specs["layers"][name] == PartitionSpec(*spec), name
    assert specs["embedding"] == PartitionSpec("tensor", "fsdp") and specs["head"] == PartitionSpec("fsdp", "tensor")
    alone = jax.tree.map(lambda s: s.is_fully_replicated, models.param_shardings(CONFIG, abstract_mesh(8, 1, 1)))
    assert all(jax.tree.leaves(alone))  # `data` copies the weights


def test_prompts_are_split_over_data_and_fsdp_and_not_over_tensor():
    assert sharding.batch_sharding(abstract_mesh(2, 2, 2)).shard_shape((8, 3, 5)) == (2, 3, 5)
    assert sharding.replicated(abstract_mesh(2, 2, 2)).shard_shape((8, 3, 5)) == (8, 3, 5)


@pytest.mark.parametrize(
    "sizes, axis, dimension, size",
    [((1, 3, 1), "fsdp", "embed", 16), ((1, 1, 4), "tensor", "kv_heads", 2), ((1, 1, 3), "tensor", "heads", 4)],
)
def test_a_mesh_axis_that_does_not_divide_its_dimension_raises(sizes, axis, dimension, size):
    with pytest.raises(ValueError, match=rf"mesh\.{axis} is \d, which does not divide .*\((\d+)\)") as error:
        models.param_shardings(CONFIG, abstract_mesh(*sizes))
    if axis == "fsdp":
        assert f"{dimension!r} dimension ({size})" in str(error.value)


@pytest.fixture(scope="module")
def learnt(tmp_path_factory):
    """Returns a function from meshes to the results of sharded_learning, from a process with 8 simulated devices."""
    folder = tmp_path_factory.mktemp("sharded")
    script = pathlib.Path(__file__).with_name("sharded_learning.py")
    root = str(pathlib.Path(models.__file__).resolve().parents[2])
    env = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0",
        "PYTHONPATH": os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])]),
    }
    done = {}

    def of(*meshes):
        if missing := [mesh for mesh in meshes if mesh not in done]:
            out = folder / f"{missing[0]}.npz"
            command = [sys.executable, str(script), str(out), *missing]
            run = subprocess.run(command, env=env, capture_output=True, text=True)
            assert run.returncode == 0, run.stderr[-3000:]
            with np.load(out) as arrays:
                for mesh in missing:
                    done[mesh] = {k.split("/")[1]: v for k, v in arrays.items() if k.startswith(mesh + "/")}
        return [done[mesh] for mesh in meshes]

    return of


@pytest.mark.processes
@pytest.mark.parametrize(
    "mesh, shards",
    [
        ("2,2,2", (4, 4, 4)),
        pytest.param("2,2,2,adapters", (4, 4, 4), marks=pytest.mark.slow),
        pytest.param("2,2,2,int8", (4, 4, 4), marks=pytest.mark.slow),
        pytest.param("8,1,1", (8, 1, 1), marks=pytest.mark.slow),
        pytest.param("1,8,1", (8, 8, 8), marks=pytest.mark.slow),
    ],
)
def test_samples_loss_and_weights_of_eight_devices_equal_those_of_one(learnt, mesh, shards):
    one, eight = learnt(",".join(["1,1,1", *mesh.split(",")[3:]]), mesh)
    assert (one["devices"], eight["devices"]) == (1, 8) and tuple(eight["shards"]) == shards
    assert 0 < one["truncated"].sum() < one["truncated"].size  # some completions end, others do not
    np.testing.assert_array_equal(eight["tokens"], one["tokens"])
    np.testing.assert_array_equal(eight["mask"], one["mask"])
    np.testing.assert_array_equal(eight["truncated"], one["truncated"])
    np.testing.assert_allclose(eight["logprobs"], one["logprobs"], atol=1e-5)
    np.testing.assert_allclose(eight["metrics"], one["metrics"], atol=1e-5, rtol=1e-5)
    np.testing.assert_allclose(eight["params"], one["params"], atol=1e-5)
    assert np.abs(one["params"] - one["before"]).max() > 1e-2


@pytest.mark.processes
def test_bfloat16_weights_learn_on_eight_cpu_devices(learnt):
    """XLA ends the process at a sum of bfloat16 over CPU devices, so the gradient of the head is summed in float32."""
    one, eight = learnt("1,1,1,bfloat16", "8,1,1,bfloat16")
    assert eight["devices"] == 8
    np.testing.assert_array_equal(eight["tokens"], one["tokens"])
    np.testing.assert_allclose(eight["params"], one["params"], atol=2**-8, rtol=2**-7)
    assert np.abs(one["params"] - one["before"]).max() > 1e-1

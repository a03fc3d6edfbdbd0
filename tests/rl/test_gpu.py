"""The programs of a step lower for CUDA. No GPU is needed, and no GPU has run them."""

import jax
import jax.export
import jax.numpy as jnp
import pytest

from helpers.tiny_runs import tiny
from jaxrl_reason.plan.step import open_step
from jaxrl_reason.rl import programs

# The lengths suffice for blockwise attention and waves. `rl.devices` chooses the same remat and waves on GPUs.
STEP = dict(
    max_prompt_length=128,
    max_completion_length=192,
    prompts_per_step=2,
    group_size=2,
    model__layers=2,
    model__heads=4,
    model__sliding_window=32,
    model__sliding_period=2,
    model__compute_dtype="bfloat16",
    model__remat="layer",
    update__wave_tokens=4096,
    update__kl_coefficient=0.1,
)


@pytest.fixture(scope="module")
def step():
    return open_step(tiny("rows.jsonl", **STEP), jax.devices("cpu")[:1])


def arguments(step, name):
    """Returns the shapes of the arguments of a program."""
    shape, state = jax.ShapeDtypeStruct, step.programs.abstract_state
    P, G, S, _ = step.rollout_sizes
    scalar = shape((), jnp.float32)
    return {
        "rollout": (
            *(step.decoding_params, shape((P, S), jnp.int32), shape((P, S), bool), shape((P,), jnp.int32), None),
            *(shape((), jnp.int32), shape((G,), jnp.float32), programs.SEED),
        ),
        "score": (state.params, step.experience.rollout, scalar),
        "update": (state, step.experience, scalar, programs.SEED),
    }[name]


@pytest.mark.parametrize("name", ["rollout", "score", "update"])
def test_a_program_lowers_for_cuda(name, step):
    assert step.model.attention == "blockwise" and step.model.kv_heads < step.model.heads
    exported = jax.export.export(step.programs.jitted[name], platforms=["cuda"])(*arguments(step, name))
    assert exported.platforms == ("cuda",)
    text = exported.mlir_module()
    assert "stablehlo.while" in text and "bf16" in text
    assert "tpu_custom_call" not in text and "lapack" not in text  # kernels of other devices

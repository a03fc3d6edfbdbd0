"""Draws samples and does one update on meshes, which are given as data,fsdp,tensor.

    python sharded_learning.py OUT.npz 1,1,1 8,1,1

test_sharding runs it in a process with 8 devices. A fourth word selects a variant: 2,2,2,adapters trains adapters,
2,2,2,int8 decodes with rounded weights and caches, and 8,1,1,bfloat16 has bfloat16 weights.
"""

import dataclasses
import functools
import pathlib
import sys

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import optax

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
from helpers import reference_decoder as reference
from jaxrl_reason import models
from jaxrl_reason.methods import PolicyLoss
from jaxrl_reason.models import lora, ModelConfig, sharding
from jaxrl_reason.models.decoding.rollout import generate
from jaxrl_reason.rl import learner
from jaxrl_reason.rl import optimizer as optimizers
from jaxrl_reason.rl.types import Experience, TrainState

P, G, S, T, V = 8, 3, 4, 5, 24
CONFIG = ModelConfig(
    vocab_size=V,
    width=16,
    layers=2,
    heads=4,
    kv_heads=2,
    mlp_width=16,
    head_dim=4,
    qkv_bias=True,
    qk_norm=True,
    tied_embedding=False,
)
OPTIONS = learner.UpdateOptions(loss=PolicyLoss(), kl_coefficient=0.3, entropy_coefficient=0.1, accumulation=1)


def learn(sizes, kind):
    config = dataclasses.replace(CONFIG, lora_rank=2) if kind == "adapters" else CONFIG
    devices = jax.devices()[: int(np.prod(sizes))]
    mesh = sharding.make_mesh(*sizes, devices=devices)
    weights, batch = models.param_shardings(config, mesh), sharding.batch_sharding(mesh)
    whole = sharding.replicated(mesh)
    params = reference.random_params(config, scale=0.3)
    if kind == "bfloat16":
        config = dataclasses.replace(config, param_dtype=kind, compute_dtype=kind)
        params = jax.tree.map(lambda x: x.astype(kind), params)
    params = jax.device_put(params, weights)
    rng = np.random.default_rng(0)
    prompts, mask = rng.integers(0, V, (P, S)), np.arange(S) >= rng.integers(0, S, (P, 1))
    advantages, old = rng.normal(size=(P, G)), -2 + 0.5 * rng.normal(size=(P, G, T))
    narrow = lambda x: jnp.asarray(x, jnp.float32 if x.dtype == float else None)
    put = lambda *xs: tuple(jax.device_put(narrow(x), batch) for x in xs)

    run = jax.jit(
        sharding.on_mesh(
            mesh,
            functools.partial(
                generate, config, group_size=G, max_length=T, eos_ids=(3, 7), pad_id=0, int8=kind == "int8"
            ),
        ),
        out_shardings=batch,
    )
    rollout = run(
        params,
        *put(prompts, mask, np.arange(P)),
        jax.device_put(jax.random.key(0), whole),
        temperature=jax.device_put(jnp.float32(1.2), whole),
    )

    experience = Experience(rollout, rollout.mask, *put(advantages, old, old - 0.1))
    optimizer = optax.sgd(1.0)
    state = TrainState(
        *jax.device_put((jnp.int32(0),), whole),
        *lora.split(config, params),
        optimizers.init_opt_state(optimizer, lora.split(config, params)[0]),
        (),
        *jax.device_put((jnp.int32(0),), whole),
    )
    step = jax.jit(sharding.on_mesh(mesh, learner.make_update(config, OPTIONS, optimizer)))
    state, metrics, _ = step(state, experience, jnp.float32(1.2), jax.random.key(1))
    flat = lambda tree: jax.flatten_util.ravel_pytree(jax.device_get(tree))[0].astype(jnp.float32)
    shards = lambda x: len({str(s.index) for s in x.addressable_shards})
    return {
        "tokens": rollout.tokens,
        "mask": rollout.mask,
        "logprobs": rollout.logprobs,
        "truncated": rollout.truncated,
        "params": flat(state.params),
        "metrics": np.array([metrics[name] for name in sorted(metrics)]),
        "before": flat(params),
        "shards": np.array([shards(rollout.tokens), shards(params["layers"]["q"]), shards(params["layers"]["down"])]),
        "devices": len(rollout.tokens.sharding.device_set),
    }


if __name__ == "__main__":
    out, *meshes = sys.argv[1:]
    np.savez(
        out,
        **{
            f"{text}/{name}": np.asarray(value)
            for text in meshes
            for name, value in learn([int(x) for x in text.split(",")[:3]], *text.split(",")[3:] or [""]).items()
        },
    )

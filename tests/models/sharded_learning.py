"""Samples and one update on the mesh sizes given as data,fsdp,tensor: run by test_sharding in a process with 8 devices.

python sharded_learning.py OUT.npz 1,1,1 8,1,1
"""

import functools
import pathlib
import sys

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import optax

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
import reference_decoder as reference
from jaxrl_reason import learner
from jaxrl_reason.methods import PolicyLoss
from jaxrl_reason.models import ModelConfig, sharding
from jaxrl_reason.rollout import generate

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


def learn(sizes):
    devices = jax.devices()[: int(np.prod(sizes))]
    mesh = sharding.make_mesh(*sizes, devices=devices)
    weights, batch = sharding.param_shardings(CONFIG, mesh), sharding.batch_sharding(mesh)
    whole = sharding.replicated(mesh)
    params = jax.device_put(reference.random_params(CONFIG, scale=0.3), weights)
    rng = np.random.default_rng(0)
    prompts, mask = rng.integers(0, V, (P, S)), np.arange(S) >= rng.integers(0, S, (P, 1))
    advantages, old = rng.normal(size=(P, G)), -2 + 0.5 * rng.normal(size=(P, G, T))
    narrow = lambda x: jnp.asarray(x, jnp.float32 if x.dtype == float else None)
    put = lambda *xs: tuple(jax.device_put(narrow(x), batch) for x in xs)

    run = jax.jit(
        functools.partial(generate, CONFIG, group_size=G, max_length=T, eos_ids=(3, 7), pad_id=0), out_shardings=batch
    )
    rollout = run(
        params,
        *put(prompts, mask, np.arange(P)),
        jax.device_put(jax.random.key(0), whole),
        temperature=jax.device_put(jnp.float32(1.2), whole),
    )

    experience = learner.Experience(rollout, rollout.mask, *put(advantages, old, old - 0.1))
    optimizer = optax.sgd(1.0)
    state = learner.TrainState(
        *jax.device_put((jnp.int32(0),), whole),
        params,
        learner.init_opt_state(optimizer, params),
        (),
        *jax.device_put((jnp.int32(0),), whole),
    )
    step = jax.jit(learner.make_update(CONFIG, OPTIONS, optimizer))
    state, metrics = step(state, experience, jnp.float32(1.2), jax.random.key(1))
    shards = lambda x: len({str(s.index) for s in x.addressable_shards})
    return {
        "tokens": rollout.tokens,
        "mask": rollout.mask,
        "logprobs": rollout.logprobs,
        "truncated": rollout.truncated,
        "params": jax.flatten_util.ravel_pytree(jax.device_get(state.params))[0],
        "metrics": np.array([metrics[name] for name in sorted(metrics)]),
        "before": jax.flatten_util.ravel_pytree(jax.device_get(params))[0],
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
            for name, value in learn([int(x) for x in text.split(",")]).items()
        },
    )

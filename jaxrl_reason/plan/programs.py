"""The programs that a training step runs: how to lower each, its cost and the contents of its memory."""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import functools
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_reason.config import Config
from jaxrl_reason.models import sharding
from jaxrl_reason.plan import costs
from jaxrl_reason.plan.step import bytes_per_device, open_step, Step
from jaxrl_reason.rewards import learned, model_files, model_training
from jaxrl_reason.rl import programs as programs_lib
from jaxrl_reason.rl.devices import microbatches, update_sizes


@dataclasses.dataclass(frozen=True)
class Part:
    """One program of a training step. Bytes are per device."""

    name: str  # "reshard", "rollout", "reward model", "score" or "update"
    lower: Callable[[], jax.stages.Lowered]
    cost: costs.Cost  # on all devices
    kernel_flops: float  # share of cost.flops in Pallas kernels, which the text of the compiled program does not show
    resident: float  # bytes of the run's other arrays, which stay in memory while the program runs
    contents: Mapping[str, float]  # bytes in the program's own memory, without activations and the compiler's copies
    donated: float = 0.0  # bytes that the program should overwrite
    times: float = 1.0  # runs per step


def parts_of(config: Config, devices: Sequence[jax.Device], mean_length: float | None = None) -> list[Part]:
    """Returns the programs of a training step in the order in which they run; for errors see `open_step`.

    The costs are those of completions of `mean_length` tokens, see `skewed_lengths`; None: all have the most.
    """
    step = dataclasses.replace(open_step(config, devices), mean_length=mean_length)
    parts = [_reshard(step), _rollout(step), _reward_model(step), _score(step), _update(step)]
    return [part for part in parts if part is not None]


def _lowering(program: Callable, *arguments: Any) -> Callable[[], jax.stages.Lowered]:
    """Returns a function that lowers a jitted program."""
    return lambda: cast(jax.stages.Wrapped, program).lower(*arguments)


def _kernel_flops(step: Step, cost: costs.Cost) -> float:
    """Returns the FLOPs of a forward or update that splash kernels compute."""
    return cost.attention_flops if step.model.attention == "splash" else 0.0


def _reshard(step: Step) -> Part | None:
    """The copy of the weights to the layout in which rollouts read them; None if both layouts are equal."""
    if not step.programs.moves_weights:
        return None
    m = step.memory
    lower = _lowering(step.programs.jitted["reshard"], step.programs.abstract_state.params)
    cost, resident = costs.Cost(bytes=(m.weights + m.copy) * step.mesh.size), m.optimizer + m.reference + m.reward_model
    return Part("reshard", lower, cost, 0.0, resident, {"weights": m.weights, "their copy": m.copy})


def _rollout(step: Step) -> Part:
    config, model, m = step.config, step.model, step.memory
    P, G, S, T = step.rollout_sizes
    by_prompt, whole = sharding.batch_sharding(step.decoding), sharding.replicated(step.decoding)
    of = functools.partial(jax.ShapeDtypeStruct, sharding=by_prompt)
    prompts = of((P, S), jnp.int32), of((P, S), bool), of((P,), jnp.int32)
    features = of((P, model.features), jnp.float32) if model.features else None
    index, temperatures = of((), jnp.int32, sharding=whole), of((G,), jnp.float32, sharding=whole)
    pieces, halvings = programs_lib.sampling_sizes(config)
    rollout = functools.partial(costs.rollout, model, P, G, S, attention=step.attention)
    lengths: dict[str, Any] = dict(pieces=pieces, halvings=halvings, completions=step.completions(P, G))
    prompt_logprobs, int8 = step.programs.needs.prompt_logprobs, bool(config.sampling.quantize)
    replicas = sharding.num_shards(step.decoding)
    cost = rollout(T, replicas=replicas, prompt_logprobs=prompt_logprobs, probe=step.probe, int8=int8, **lengths)
    prompts_kv, samples_kv = _cache_bytes(step)
    return Part(
        "rollout",
        _lowering(
            step.programs.jitted["rollout"], step.decoding_params, *prompts, features, index, temperatures, index
        ),
        cost,
        _kernel_flops(step, rollout(1)),  # kernels only in the prefill
        (m.weights if m.copy else 0.0) + m.optimizer + m.reference + m.reward_model,
        {"weights": bytes_per_device(step.decoding_params), "prompts' KV": prompts_kv, "samples' KV": samples_kv},
        times=config.sampling.parts,
    )


def _cache_bytes(step: Step) -> tuple[float, float]:
    """Returns the bytes per device of the prompts' and of the samples' keys and values, all layers together."""
    model, decoding = step.model, step.decoding
    P, G, S, T = step.rollout_sizes
    itemsize = jnp.dtype(model.compute_dtype).itemsize
    token = 2 * model.layers * model.kv_heads * model.head_dim * itemsize / decoding.shape["tensor"]
    prompts, samples = (tokens * token / sharding.num_shards(decoding) for tokens in (P * S, P * G * T))
    if step.config.sampling.quantize:
        # One byte per number and a float32 scale per head and position. The prompts' unrounded cache stays in memory.
        rounded = (model.head_dim + 4) / (model.head_dim * itemsize)
        prompts, samples = prompts * (1 + rounded), samples * rounded
    return prompts, samples


def _reward_model(step: Step) -> Part | None:
    """The scoring by a learned reward model; None if the run has none."""
    model, config, m = step.reward_config, step.config, step.memory
    if model is None:
        return None
    P, G, S, T = step.rollout_sizes
    pieces, replicas = sharding.microbatches(step.mesh, P, step.pieces), sharding.num_shards(step.mesh)
    waves = update_sizes(model, config, step.mesh)
    options: dict[str, Any] = dict(attention=step.attention, replicas=replicas, parts=pieces, **waves)
    completions = step.completions(P, G)
    path, by_prompt = config.reward_model.path, step.programs.sharding
    if path and not model_files.is_ours(path):
        # The texts are in the reward model's own tokens and share no prompt.
        L = config.reward_model.max_length
        of = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.int32, sharding=by_prompt)
        score = learned.scoring_program(model, by_prompt, **waves)
        texts = None if completions is None else np.clip(completions + S, 1, L)
        cost = costs.reward_model(model, P, G, 0, L, completions=texts, **options)
        lower = _lowering(score, step.reward_params, of((P, G, L)), of((P, G)), pieces)
    else:
        score = model_training.group_scoring_program(model, step.mesh, pieces, **waves)
        share = lambda x: jax.ShapeDtypeStruct((P, *x.shape[1:]), x.dtype, sharding=x.sharding)
        lower = _lowering(score, step.reward_params, jax.tree.map(share, step.rollout))
        cost = costs.reward_model(model, P, G, S, T, completions=completions, **options)
    resident = m.weights + m.copy + m.optimizer + m.reference
    contents = {"weights": m.reward_model}
    return Part("reward model", lower, cost, _kernel_flops(step, cost), resident, contents, times=config.sampling.parts)


def _score(step: Step) -> Part | None:
    """The scoring under the reference policy and under the policy itself; None if the run needs neither."""
    needs, m = step.programs.needs, step.memory
    times = int(needs.reference) + (needs.old_logprobs and not needs.exact_sampler)
    if not times:
        return None
    cost = costs.score(step.model, *step.sizes, parts=step.pieces, **_scoring_options(step))
    temperature = jax.ShapeDtypeStruct((), jnp.float32, sharding=sharding.replicated(step.decoding))
    params, rollout = step.programs.abstract_state.params, step.experience.rollout
    lower = _lowering(step.programs.jitted["score"], params, rollout, temperature)
    resident, contents = m.optimizer + m.reference + m.reward_model, {"weights": m.weights}
    return Part("score", lower, cost, _kernel_flops(step, cost), resident, contents, times=times)


def _scoring_options(step: Step) -> dict[str, Any]:
    """Returns the arguments that `costs.score` and `costs.update` share."""
    return dict(
        attention=step.attention,
        replicas=sharding.num_shards(step.mesh),
        logprob_chunk=step.config.update.logprob_chunk,
        probe=step.probe,
        tensor=step.mesh.shape["tensor"],
        completions=step.completions(*step.sizes[:2]),
        **update_sizes(step.model, step.config, step.mesh),
    )


def _update(step: Step) -> Part:
    mesh, m, u = step.mesh, step.memory, step.config.update
    cost = costs.update(
        step.model,
        *step.sizes,
        copies=mesh.shape["slice"] * mesh.shape["data"],
        epochs=u.epochs,
        minibatches=u.minibatches,
        accumulation=microbatches(step.model, step.config, mesh),
        optimizer_slots=3 if step.config.optimizer.float32_master else 2,
        **_scoring_options(step),
    )
    scalar = functools.partial(jax.ShapeDtypeStruct, (), sharding=sharding.replicated(mesh))
    state = step.programs.abstract_state
    lower = _lowering(
        step.programs.jitted["update"], state, step.experience, scalar(dtype=jnp.float32), scalar(dtype=jnp.int32)
    )
    contents = {"weights": m.weights, "optimizer": m.optimizer, "rollouts": bytes_per_device(step.rollout)}
    resident, donated = m.reference + m.reward_model, bytes_per_device(state)
    return Part("update", lower, cost, _kernel_flops(step, cost), resident, contents, donated)

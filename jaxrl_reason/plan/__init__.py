"""What a run will do on TPUs, before they are rented: python -m jaxrl_reason.plan --config=FILE --topology=v5e:4x4 [--search]

Every program of a training step is compiled for the slice by the real compiler, which needs no TPU: whether it fits and what fills a chip's
memory is the compiler's answer; FLOPs and bytes come from `costs` and are checked against the compiled program (`hlo`); times are rooflines,
the least that these FLOPs, bytes and collectives can take. Nothing is run, and of pretrained models only config.json is read.

  --topology=NAME        v5e:4x4, v6e:4x4, v5p:2x2x2, v4:2x2x2, tpu7x:2x2x1, ...: chips in a slice
  --slices=N             so many slices (config.mesh.slice), 1 without it
  --search               also find the most prompts, completions a prompt and tokens a completion that fit, each with the others as they are
  --out=FILE             where the figures go as JSON; plan.json without it
  --config.field=value   as in training
"""

from collections.abc import Callable, Mapping
import dataclasses
import functools
import importlib.util
import json
import math
import os
import pathlib
import re
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import rich.console
import rich.table

from jaxrl_reason import config as config_lib
from jaxrl_reason import models, reward_training
from jaxrl_reason.config import Config, ConfigError
from jaxrl_reason.methods import Method
from jaxrl_reason.models import reward_model, sharding
from jaxrl_reason.plan import costs, hlo
from jaxrl_reason.rewards import learned
from jaxrl_reason.rewards.scorer import LEARNED
from jaxrl_reason.rl import experience
from jaxrl_reason.rl import programs as programs_lib
from jaxrl_reason.rl.rollout import Rollout

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """One device of a TPU generation, from its data sheet.

    Attributes:
      hbm: GiB that the compiler gives to a program.
      flops: bfloat16 products, a second.
      bandwidth: of the memory, bytes a second.
      links: of all its links to other chips of the slice together, bytes a second in one direction.
    """

    hbm: float
    flops: float
    bandwidth: float
    links: float


CHIPS = {
    "v2": Chip(7.48, 46e12 / 2, 700e9 / 2, 248e9 / 2),  # two devices a chip
    "v3": Chip(15.48, 123e12 / 2, 900e9 / 2, 328e9 / 2),
    "v4": Chip(30.75, 275e12, 1228e9, 300e9),
    "v5e": Chip(15.75, 197e12, 819e9, 200e9),
    "v5p": Chip(95.73, 459e12, 2765e9, 600e9),
    "v6e": Chip(31.24, 918e12, 1640e9, 400e9),
    "tpu7x": Chip(94.74, 2307e12 / 2, 7370e9 / 2, 600e9 / 2),  # two devices a chip
}


def devices_of(topology: str, slices: int = 1) -> list:
    """The devices of a slice (or several), for compiling only.

    Raises:
      ConfigError: there is no such slice, or no compiler for it is installed.
    """
    kind = topology.partition(":")[0]
    if kind not in CHIPS or not re.fullmatch(r"\w+:\d+(x\d+)+", topology):
        raise ConfigError(
            f"--topology is {topology!r}; give a generation and the shape of a slice in chips, such as v5e:4x4 or v5p:2x2x2. Generations are "
            f"{', '.join(CHIPS)}."
        )
    if importlib.util.find_spec("libtpu") is None:
        raise ConfigError(
            "The compiler for TPUs is not installed, and needs no TPU: pip install 'jaxrl_reason[tpu]' (from a clone: pip install -e '.[tpu]')."
        )
    # libtpu looks for a TPU around it unless it is told what to be, and locks itself against a second process.
    quiet = {"TPU_ACCELERATOR_TYPE": "v5litepod-4", "TPU_WORKER_HOSTNAMES": "localhost", "TPU_LOG_DIR": "disabled"}
    for name, value in (quiet | {"ALLOW_MULTIPLE_LIBTPU_LOAD": "true"}).items():
        os.environ.setdefault(name, value)
    from jax.experimental import topologies

    options: dict[str, Any] = {"num_slices": slices} if slices > 1 else {}
    if kind == "v4":
        options["chip_config_name"] = "megacore"  # one device a chip
    if math.prod(map(int, topology.partition(":")[2].split("x"))) == 1:
        options["chips_per_host_bounds"] = (1, 1, 1)
    try:
        return list(topologies.get_topology_desc(platform="tpu", topology_name=topology, **options).devices)
    except Exception as e:  # what libtpu says of a shape that it does not know has no class of its own
        raise ConfigError(
            f"--topology={topology} with --slices={slices} is no slice that libtpu knows: {_first_line(e)}"
        ) from e


# -- what a step runs ------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Part:
    """One program of a training step.

    Attributes:
      name: "rollout", ...
      lower: () -> jax.stages.Lowered.
      cost: on all devices, see `costs`.
      in_kernels: of its FLOPs those in Pallas kernels, which the compiled text does not show.
      beside: bytes a chip of what lies in its memory meanwhile and is not the program's.
      filled: what the program's own memory holds, name -> bytes a chip; the rest are activations, with the compiler's own copies.
      donated: bytes a chip that the program should write over.
      loop_trips: how often its loop of unknown length runs.
      times: runs a step.
    """

    name: str
    lower: Callable
    cost: costs.Cost
    in_kernels: float
    beside: float
    filled: Mapping[str, float]
    donated: float = 0.0
    loop_trips: int | None = None
    times: float = 1.0


def sizes_of(config: Config) -> tuple[models.ModelConfig, models.ModelConfig | None]:
    """The policy's decoder, and the reward model's where there is one, from what describes the models or from the configuration.

    Raises:
      ConfigError: their description cannot be had, or says what cannot be.
    """
    try:
        source = models.read_source(config.model.path) if config.model.path else None
        vocabulary = models.read_config(source).vocab_size if source else config.data.vocab_size
        policy = config_lib.model_config(config, vocabulary, source)
        if not LEARNED.keys() & set(config.reward.functions):
            return policy, None
        if not config.reward_model.path:
            return policy, models.lora.base_of(policy)
        if reward_training.is_ours(config.reward_model.path):
            return policy, reward_training.described(config.reward_model.path)
        judge = models.read_config(models.read_source(config.reward_model.path))
    except ConfigError:
        raise
    except ValueError as e:
        raise ConfigError(f"A plan needs the sizes of the models: {e}") from e
    of_policy = dict(param_dtype=config.model.param_dtype, compute_dtype=config.model.compute_dtype, remat="none")
    return policy, dataclasses.replace(judge, **of_policy)


def step_shapes(
    config: Config, method: Method, programs: programs_lib.Programs, model: models.ModelConfig, columns=None
):
    """What goes through a step, as ShapeDtypeStructs with shardings: (rollout, experience).

    Args:
      config, method, programs, model: of the run.
      columns: name -> ShapeDtypeStruct of the data's columns that the method needs; None: f32[P] values.
    """
    P, S = config.prompts_per_step, config.max_prompt_length
    shape = jax.ShapeDtypeStruct
    prompts = [shape((P, S), jnp.int32), shape((P, S), bool), shape((P,), jnp.int32)]
    features = shape((P, model.features), jnp.float32) if model.features else None
    G = config.group_size + ("greedy_rewards" in method.signals)
    state = programs.abstract_state
    whole = [shape((), jnp.int32), shape((G,), jnp.float32)]
    bare = lambda tree: jax.tree.map(lambda x: shape(x.shape, x.dtype), tree)
    rollout = jax.eval_shape(programs.jitted["rollout"], bare(state.params), *prompts, features, *whole)
    names = {name.rpartition(":")[2] for name in config.reward.functions}
    columns = {"values": shape((P,), jnp.float32)} if columns is None else columns
    columns = {name: columns[name] for name in programs_lib.columns_of(method) if name in columns}
    rewards = {name: shape((P, G), jnp.float32) for name in names}
    groups = experience.Groups(rollout, rewards, columns)
    self_reward = method.loss.self_reward
    learnt_rollout = jax.eval_shape(functools.partial(experience.trained, method=method), rollout)
    kl = shape(learnt_rollout.logprobs.shape, jnp.float32) if "kl" in method.signals else None
    c_ref = shape((), jnp.float32) if self_reward else None
    learnt, _, _ = jax.eval_shape(programs.prepare, groups, bare(state.advantage_state), kl, c_ref)
    per_token = shape(learnt.mask.shape, jnp.float32)
    if programs_lib.needs_old_logprobs(config, method):
        learnt = learnt._replace(old_logprobs=per_token)
    if config.update.kl_coefficient:
        learnt = learnt._replace(ref_logprobs=per_token)
    by_prompt = lambda tree: jax.tree.map(
        lambda x: shape(x.shape, x.dtype, sharding=programs.sharding if x.ndim else None), tree
    )
    return by_prompt(rollout), by_prompt(learnt)


def parts_of(config: Config, devices) -> list[Part]:
    """The programs of a training step on these devices.

    Raises:
      ConfigError: the configuration cannot run there.
    """
    method = config_lib.validate(config)
    if config.regression.tokenizer:
        raise ConfigError(
            "A plan is made for runs on text: a regression run's sizes (config.regression) depend on its table, which is not read here."
        )
    policy, judge = sizes_of(config)
    try:
        mesh = programs_lib.mesh_of(config, devices)
        verdict = config.reward.verdict or config.reward.functions[0]
        programs = programs_lib.build(
            config,
            method,
            policy,
            mesh,
            eos_ids=(1,),
            pad_id=0,
            weights={name.rpartition(":")[2]: 1.0 for name in config.reward.functions},
            verdict=verdict.rpartition(":")[2],
            probe_token=2 if method.loss.self_reward else None,
        )
    except ConfigError:
        raise
    except ValueError as e:
        raise ConfigError(f"config.{e}" if str(e).startswith("mesh.") else str(e)) from e
    try:
        judges = reward_model.param_shardings(judge, mesh) if judge else None
    except ValueError as e:
        raise ConfigError(f"The reward model cannot be split over the mesh: config.{e}") from e
    model = programs_lib.with_attention(policy, config, mesh)
    rollout, learnt = step_shapes(config, method, programs, model)
    state, u = programs.abstract_state, config.update
    P, S, T = config.prompts_per_step, config.max_prompt_length, config.max_completion_length
    G, K, part = config.group_size, rollout.tokens.shape[1], P // config.sampling.parts
    decoding = sharding.rollout_mesh(mesh, config.mesh.rollout_tensor or mesh.shape["tensor"])
    replicas, copies = sharding.num_shards(mesh), mesh.shape["slice"] * mesh.shape["data"]
    splash = model.attention == "splash"
    on = lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s)
    whole, by_decoding = sharding.replicated(decoding), sharding.batch_sharding(decoding)
    scalar = lambda dtype, shape=(): jax.ShapeDtypeStruct(shape, dtype, sharding=whole)

    # What lies in a chip's memory, in bytes.
    weights, opt_state = a_chip(state.params), a_chip(state.opt_state)
    trained, _ = models.lora.split(model, state.params)
    needs_reference = programs_lib.needs_reference(config, method)
    reference = a_chip(trained) if needs_reference else 0.0
    params = state.params
    if programs.for_rollouts:
        bare = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state.params)
        params = jax.tree.map(
            on,
            jax.eval_shape(programs.jitted["reshard"], bare),
            models.param_shardings(model, decoding),
        )
    copy = a_chip(params) if programs.for_rollouts else 0.0
    judge_params = {}
    if judge:
        judge = programs_lib.with_attention(judge, config, mesh)
        judge_params = jax.tree.map(on, reward_model.abstract_params(judge), judges)
    judging = a_chip(judge_params)
    rollouts = a_chip(rollout)

    # A cache holds keys and values of every layer, in compute_dtype.
    number = jnp.dtype(model.compute_dtype).itemsize
    token = 2 * model.layers * model.kv_heads * model.head_dim * number / decoding.shape["tensor"]
    prompts_kv, samples_kv = (x * token / sharding.num_shards(decoding) for x in (part * S, part * K * T))
    if (
        config.sampling.quantize
    ):  # a byte a number and a float32 scale a head and place; the prompts' beside what they are rounded from
        rounded = (model.head_dim + 4) / (model.head_dim * number)
        prompts_kv, samples_kv = prompts_kv * (1 + rounded), samples_kv * rounded

    probe = method.loss.self_reward is not None
    decode = costs.rollout(
        model,
        part,
        K,
        S,
        T,
        attention=model.attention,
        replicas=sharding.num_shards(decoding),
        prompt_logprobs="prompt_confidence" in method.signals,
        probe=probe,
        int8=bool(config.sampling.quantize),
    )
    prefill = costs.rollout(model, part, K, S, 1, attention=model.attention).attention_flops
    prompts = [
        jax.ShapeDtypeStruct((part, *rest), dtype, sharding=by_decoding)
        for rest, dtype in (((S,), jnp.int32), ((S,), bool), ((), jnp.int32))
    ]
    features = (
        jax.ShapeDtypeStruct((part, model.features), jnp.float32, sharding=by_decoding) if model.features else None
    )
    parts = []
    if programs.for_rollouts:
        moved = lambda: programs.jitted["reshard"].lower(state.params)
        read = costs.Cost(bytes=(weights + copy) * mesh.size)
        parts.append(
            Part("reshard", moved, read, 0.0, opt_state + reference + judging, {"weights": weights, "their copy": copy})
        )
    parts.append(
        Part(
            "rollout",
            lambda: programs.jitted["rollout"].lower(
                params, *prompts, features, scalar(jnp.int32), scalar(jnp.float32, (K,))
            ),
            decode,
            prefill if splash else 0.0,
            (weights if copy else 0.0) + opt_state + reference + judging,
            {"weights": a_chip(params), "prompts' KV": prompts_kv, "samples' KV": samples_kv},
            loop_trips=T - 1 + probe,
            times=config.sampling.parts,
        )
    )
    pieces = u.accumulation * u.minibatches
    if judge:
        split = sharding.microbatches(mesh, part, pieces)
        if config.reward_model.path and not reward_training.is_ours(config.reward_model.path):
            L = config.reward_model.max_length
            texts = jax.ShapeDtypeStruct((part, K, L), jnp.int32, sharding=programs.sharding)
            lengths = jax.ShapeDtypeStruct((part, K), jnp.int32, sharding=programs.sharding)
            scoring = learned.scoring_program(judge, programs.sharding)
            lower = lambda: scoring.lower(judge_params, texts, lengths, split)
            # Texts in the reward model's own tokens share no prompt: each is a whole prompt.
            cost = costs.reward_model(
                judge, part * K, 1, L, 0, attention=judge.attention, replicas=replicas, parts=split
            )
        else:
            scoring = reward_training.group_scoring_program(judge, mesh, split)
            some = jax.tree.map(
                lambda x: jax.ShapeDtypeStruct((part, *x.shape[1:]), x.dtype, sharding=x.sharding), rollout
            )
            lower = lambda: scoring.lower(judge_params, some)
            cost = costs.reward_model(judge, part, K, S, T, attention=judge.attention, replicas=replicas, parts=split)
        beside = weights + copy + opt_state + reference
        in_kernels = cost.attention_flops if splash else 0.0
        parts.append(
            Part("reward model", lower, cost, in_kernels, beside, {"weights": judging}, times=config.sampling.parts)
        )
    again = programs_lib.needs_old_logprobs(config, method) and not programs_lib.sampler_is_exact(config)
    scorings = int(needs_reference) + again
    if scorings:
        lower = lambda: programs.jitted["score"].lower(state.params, learnt.rollout, scalar(jnp.float32))
        keywords = dict(attention=model.attention, replicas=replicas, parts=pieces, logprob_chunk=u.logprob_chunk)
        keywords["tensor"] = mesh.shape["tensor"]
        cost = costs.score(model, P, G, S, T, probe=probe, **keywords)
        in_kernels = cost.attention_flops if splash else 0.0
        beside = opt_state + reference + judging
        parts.append(Part("score", lower, cost, in_kernels, beside, {"weights": weights}, times=scorings))
    cost = costs.update(
        model,
        P,
        G,
        S,
        T,
        attention=model.attention,
        replicas=replicas,
        copies=copies,
        epochs=u.epochs,
        minibatches=u.minibatches,
        accumulation=u.accumulation,
        logprob_chunk=u.logprob_chunk,
        probe=probe,
        tensor=mesh.shape["tensor"],
        optimizer_slots=3 if config.optimizer.float32_master else 2,
    )
    parts.append(
        Part(
            "update",
            lambda: programs.jitted["update"].lower(
                state, learnt, jax.ShapeDtypeStruct((), jnp.float32, sharding=sharding.replicated(mesh))
            ),
            cost,
            cost.attention_flops if splash else 0.0,
            reference + judging,
            {"weights": weights, "optimizer": opt_state, "rollouts": rollouts},
            donated=a_chip(state),
        )
    )
    return parts


def a_chip(tree) -> float:
    """Bytes of these ShapeDtypeStructs that one device holds."""
    shard = lambda x: math.prod(x.sharding.shard_shape(x.shape) if x.sharding else x.shape)
    return float(sum(shard(x) * x.dtype.itemsize for x in jax.tree.leaves(tree)))


# -- what the compiler says ------------------------------------------------------------------------


def measure(part: Part, chip: Chip, devices: int) -> dict[str, Any]:
    """Compiles a part and reads the executable; what does not fit is a result too."""
    begin = time.perf_counter()
    limit, own = chip.hbm * GIB, None
    try:
        compiled = part.lower().compile()
    except jax.errors.JaxRuntimeError as e:
        own = _asked_for(e)
        if own is None:
            raise
        compiled = None
    found: dict[str, Any] = {"name": part.name, "compile_seconds": time.perf_counter() - begin, "times": part.times}
    if compiled is not None:
        memory = compiled.memory_analysis()
        own = float(memory.peak_memory_in_bytes)
    rest = own - sum(part.filled.values())
    found |= {
        "fits": compiled is not None and own + part.beside <= limit,
        "limit_gib": chip.hbm,
        "compiled": compiled is not None,
        "peak_gib": own / GIB,
        "beside_gib": part.beside / GIB,
        "total_gib": (own + part.beside) / GIB,
        "filled_gib": {name: x / GIB for name, x in part.filled.items()} | {"activations": max(rest, 0.0) / GIB},
        "flops": part.cost.flops,
        "attention_flops": part.cost.attention_flops,
        "recomputed_flops": part.cost.recomputed_flops,
        "bytes": part.cost.bytes,
    }
    seconds = {
        "compute": part.cost.flops / devices / chip.flops,
        "memory": part.cost.bytes / devices / chip.bandwidth,
    }
    if compiled is not None:
        program = hlo.read(compiled.as_text(), loop_trips=part.loop_trips)
        walked = (program.flops + program.reduced_flops) * devices
        seconds["links"] = sum(x.bytes for x in program.collectives.values()) / chip.links
        found |= {
            "hlo_flops": walked,
            "flops_in_kernels": part.in_kernels,
            "flops_over_hlo": (part.cost.flops - part.in_kernels) / walked if walked else None,
            "collectives": {kind: {"count": x.count, "gib": x.bytes / GIB} for kind, x in program.collectives.items()},
            "donation": None if not part.donated else min(memory.alias_size_in_bytes / part.donated, 1.0),
        }
    found |= {"roofline_seconds": seconds, "bound_by": max(seconds, key=seconds.get), "seconds": max(seconds.values())}
    return found


def _asked_for(error: Exception) -> float | None:
    """Bytes a chip of a program that the compiler could not fit, or of its temporaries alone, where these are too much and it says no
    more; None where it failed for another reason."""
    text = str(error)
    used = re.search(r"(?:Used |HLO temporaries \()([\d.]+)([KMGT])(?: of [\d.]+[KMGT] hbm|\) exceeds)", text)
    if "RESOURCE_EXHAUSTED" not in text:
        return None
    if used is None:
        raise ConfigError(
            f"The compiler has no room for a program, and does not say how much it asked for: {_first_line(error)}"
        )
    return float(used[1]) * 2 ** {"K": 10, "M": 20, "G": 30, "T": 40}[used[2]]


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0][:300] or type(error).__name__


def make_plan(config: Config, topology: str, devices, say: Callable[[str], None] = lambda text: None) -> dict[str, Any]:
    """Compiles the step's programs one after another.

    Args:
      config: of the run, with config.mesh for these devices.
      topology: their name.
      devices: from `devices_of`.
      say: is told what is compiled.

    Returns:
      JSON-able: the run's sizes, "parts" (see `measure`), "fits", "step": the estimate of a step with its assumptions.
    """
    chip = CHIPS[topology.partition(":")[0]]
    parts = []
    for part in parts_of(config, devices):
        say(f"compiling {part.name} ...")
        parts.append(measure(part, chip, len(devices)))
    seconds = sum(part["seconds"] * part["times"] for part in parts)
    tokens = config.prompts_per_step * config.group_size * config.max_completion_length
    return {
        "topology": topology,
        "devices": len(devices),
        "mesh": dict(programs_lib.mesh_of(config, devices).shape) | {"rollout_tensor": config.mesh.rollout_tensor},
        "prompts_per_step": config.prompts_per_step,
        "group_size": config.group_size,
        "max_prompt_length": config.max_prompt_length,
        "max_completion_length": config.max_completion_length,
        "fits": all(part["fits"] for part in parts),
        "parts": parts,
        "step": {
            "seconds_at_least": seconds,
            "completion_tokens_per_second_at_most": tokens / seconds,
            "assumptions": [
                "each program takes as long as the slowest of its FLOPs, its least memory traffic and its collectives at the chip's peak rates, "
                "and these overlap entirely: a bound from below",
                "every prompt and every completion is as long as it may be",
                "links carry all collectives of a program at the rate of all a chip's links in one direction; networks between slices are not "
                "counted",
                "the supervised phase, evaluations (prompts_per_step x eval.samples completions at once) and a reward model's training are not "
                "compiled: whether they fit is not said here",
                "rewards on the host, reading data and checkpoints take no time; no group is drawn again",
            ],
        },
    }


def search(config: Config, topology: str, devices, say: Callable[[str], None] = lambda text: None) -> dict[str, int]:
    """The most that fits of prompts_per_step, group_size and max_completion_length, each with the others as configured; 0: nothing does."""
    mesh = programs_lib.mesh_of(config, devices)
    decoding = sharding.rollout_mesh(mesh, config.mesh.rollout_tensor or mesh.shape["tensor"])
    pieces, parts = config.update.minibatches * config.update.accumulation, config.sampling.parts
    ways = sharding.num_shards(mesh)
    grains = {
        "prompts_per_step": math.lcm(ways * pieces, ways * parts, sharding.num_shards(decoding) * parts),
        "group_size": 1,
        "max_completion_length": 128,
    }
    chip = CHIPS[topology.partition(":")[0]]

    def fits(name: str, value: int) -> bool:
        other = config_lib.from_dict(config_lib.to_dict(config) | {name: value})
        say(f"trying {name} = {value} ...")
        # The largest first: what does not fit is refused in seconds.
        parts = sorted(parts_of(other, devices), key=lambda part: part.name not in ("update", "rollout"))
        return all(measure(part, chip, len(devices))["fits"] for part in parts)

    return {
        name: largest(functools.partial(fits, name), getattr(config, name), grain) for name, grain in grains.items()
    }


def largest(fits: Callable[[int], bool], start: int, grain: int, limit: int = 2**20) -> int:
    """The largest multiple of `grain` that fits, by doubling from `start` and halving the gap; to a sixteenth of itself at least."""
    lowest = 2 * grain if grain == 1 else grain  # a group has two
    low, high = 0, max(start // grain * grain, lowest)
    while high <= limit and fits(high):
        low, high = high, 2 * high
    if not low:
        while high > lowest and not low:
            above, high = high, max(high // 2 // grain * grain, lowest)
            if fits(high):
                low, high = high, above
        if not low:
            return 0
    while high - low > max(grain, low // 16):
        middle = (low + high) // 2 // grain * grain
        if middle in (low, high):
            break
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


# -- for people ------------------------------------------------------------------------------------


def table(plan: Mapping[str, Any]) -> rich.table.Table:
    """A column a program."""
    parts = plan["parts"]
    out = rich.table.Table(title=f"{plan['devices']} x {plan['topology'].partition(':')[0]} ({plan['topology']})")
    out.add_column("", no_wrap=True)
    for part in parts:
        out.add_column(part["name"], justify="right", no_wrap=True)
    row = lambda name, cell: out.add_row(name, *map(cell, parts))
    row("fits", lambda p: "yes" if p["fits"] else "NO")
    row("memory of a chip", lambda p: f"{p['total_gib']:.2f} of {p['limit_gib']} GiB")
    row("  the program's peak", lambda p: f"{p['peak_gib']:.2f}")
    for name in dict.fromkeys(name for p in parts for name in p["filled_gib"]):
        row(f"    {name}", lambda p: f"{p['filled_gib'][name]:.2f}" if name in p["filled_gib"] else "")
    row("  beside it", lambda p: f"{p['beside_gib']:.2f}")
    row("FLOPs", lambda p: f"{p['flops']:.3g}")
    row("  formula / compiled", lambda p: "" if not p.get("flops_over_hlo") else f"{p['flops_over_hlo']:.3f}")
    row("memory traffic", lambda p: f"{p['bytes'] / GIB:.4g} GiB")
    for kind in dict.fromkeys(kind for p in parts for kind in p.get("collectives", ())):
        row(
            f"{kind}, a chip",
            lambda p: f"{p['collectives'][kind]['gib']:.3g} GiB" if kind in p.get("collectives", ()) else "",
        )
    row("donation", lambda p: "" if p.get("donation") is None else f"{100 * p['donation']:.0f} %")
    row("seconds at least", lambda p: f"{p['seconds'] * p['times']:.3g}")
    row("  bound by", lambda p: p["bound_by"])
    row("compiled in", lambda p: f"{p['compile_seconds']:.0f} s" + ("" if p["compiled"] else ", refused"))
    return out


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit code: 0 also where the run does not fit, which is an answer."""
    argv = sys.argv[1:] if argv is None else list(argv)
    if not argv or "--help" in argv or "-h" in argv:
        print(__doc__)
        return 0
    console = rich.console.Console(highlight=False, markup=False)
    if not console.is_terminal:
        console.width = 140  # a file has no edge
    say = lambda text: console.print(text, style="dim")
    try:
        own, rest, flags = {"topology": "", "slices": "1", "out": "plan.json"}, [], iter(argv)
        for flag in flags:
            name, equals, value = flag.removeprefix("--").partition("=")
            if name in own:
                own[name] = value if equals else next(flags, "")  # --flag value
            elif flag != "--search":
                rest.append(flag)
        if not own["slices"].isdigit() or not int(own["slices"]):
            raise ConfigError(f"--slices is {own['slices']!r}; give a number of slices.")
        jax.config.update("jax_platforms", "cpu")  # here nothing runs
        out = pathlib.Path(own["out"]).expanduser()
        if not out.parent.is_dir() or out.is_dir():  # before the minutes that the compiler takes
            raise ConfigError(f"--out is {own['out']!r}; name a file in a directory that exists.")
        devices = devices_of(own["topology"], int(own["slices"]))
        config, _ = config_lib.parse_args(rest)
        if int(own["slices"]) > 1:
            config.mesh.slice = int(own["slices"])
        plan = make_plan(config, own["topology"], devices, say)
        out.write_text(json.dumps(plan, indent=2) + "\n")
        if "--search" in argv:
            plan["largest"] = search(config, own["topology"], devices, say)
            out.write_text(json.dumps(plan, indent=2) + "\n")
    except (ConfigError, models.PretrainedError, OSError) as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    console.print(table(plan))
    step = plan["step"]
    fits = (
        "It fits."
        if plan["fits"]
        else "It does NOT fit: lower the batch or raise update.accumulation, split more, or take larger chips."
    )
    console.print(
        f"{fits} A step takes at least {step['seconds_at_least']:.3g} s, at most {step['completion_tokens_per_second_at_most']:.4g} completion "
        "tokens a second, if:",
        soft_wrap=True,
    )
    for assumption in step["assumptions"]:
        console.print(f"  - {assumption}", soft_wrap=True)
    for name, value in plan.get("largest", {}).items():
        console.print(f"Largest {name} that fits, the rest as it is: {value or 'none'}")
    console.print(f"Figures: {out}", soft_wrap=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())

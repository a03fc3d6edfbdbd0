"""Compiles the programs of a step: whether they fit, their peak memory, and the least time that they take.

Peak memory is the compiler's. FLOPs and bytes come from `costs`, and FLOPs are compared with the compiled program
(`hlo`). Times are rooflines: the least that the FLOPs, bytes and collectives can take. Nothing is run.
"""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import functools
import math
import re
import time
from typing import Any

import jax

from jaxrl_reason import config as config_lib
from jaxrl_reason.config import Config, ConfigError
from jaxrl_reason.models import sharding
from jaxrl_reason.plan import hlo
from jaxrl_reason.plan.chips import Chip, chip_of, first_line
from jaxrl_reason.plan.host_memory import checkpoint_bytes, chips_per_host, COPIES
from jaxrl_reason.plan.programs import Part, parts_of
from jaxrl_reason.plan.step import open_step, sizes_of
from jaxrl_reason.rl import programs as programs_lib
from jaxrl_reason.rl.devices import check_waves, for_devices

GIB = 2**30
ASSUMPTIONS = (
    "Each program takes as long as the slowest of its FLOPs, its least memory traffic and its collectives at the chip's "
    "peak rates; the three overlap entirely. This is a lower bound.",
    "Every prompt has the maximum length.",
    "Collectives use all links of a chip in one direction. Networks between slices are not counted.",
    "Not compiled, so they may not fit: the supervised phase, evaluations (prompts_per_step x eval.samples completions at "
    "once) and the training of a reward model.",
    "Rewards on the host, reading data and checkpoints take no time; no group is drawn again.",
)
FULL = "Every completion has the maximum length."
LENGTHS = (
    "Completions have {:g} tokens in the mean: quantiles of an exponential distribution, cut at the maximum. Collectives are those of "
    "completions of the maximum length."
)


def make_plan(
    config: Config,
    topology: str,
    devices: Sequence[jax.Device],
    say: Callable[[str], None] = lambda text: None,
    mean_length: float | None = None,
) -> dict[str, Any]:
    """Compiles the programs of a step one after another.

    `devices` are the `chips.devices_of` the slice, such as "v5e:4x4", and config.mesh is for these devices. `say`
    receives a line before each program is compiled. `mean_length` is the mean number of tokens per completion, whose
    lengths are skewed; None: all have the most. Returns a JSON-able dict: the run's sizes, the "attention" and "remat"
    of the policy as `rl.devices` has chosen them, "parts" (see `measure_part`), "fits", "host" with the memory of a host
    while it writes a checkpoint, and "step" with the least time and its assumptions. Raises ConfigError if the configuration
    cannot run on the devices.
    """
    mesh = programs_lib.make_mesh(config, devices)
    check_waves(sizes_of(config)[0], config, mesh)
    parts = []
    for part in parts_of(config, devices, mean_length):
        say(f"compiling {part.name} ...")
        parts.append(measure_part(part, chip_of(topology), len(devices), full=mean_length is None))
    seconds = sum(part["seconds"] * part["times"] for part in parts)
    tokens = config.prompts_per_step * config.group_size * (mean_length or config.max_completion_length)
    sizes = ("prompts_per_step", "group_size", "max_prompt_length", "max_completion_length")
    model = for_devices(sizes_of(config)[0], config, mesh)
    per_host = chips_per_host(topology, devices)
    share = checkpoint_bytes(open_step(config, devices).programs.abstract_state, devices, per_host)
    return {
        "topology": topology,
        "devices": len(devices),
        "mesh": dict(mesh.shape) | {"rollout_tensor": config.mesh.rollout_tensor},
        **{name: getattr(config, name) for name in sizes},
        "mean_length": mean_length,
        "attention": model.attention,
        "remat": model.remat,
        "fits": all(part["fits"] for part in parts),
        "parts": parts,
        "host": {"chips": per_host, "state_gib": share / GIB, "checkpoint_gib_at_most": COPIES * share / GIB},
        "step": {
            "seconds_at_least": seconds,
            "completion_tokens_per_second_at_most": tokens / seconds,
            "assumptions": [*ASSUMPTIONS, LENGTHS.format(mean_length) if mean_length else FULL],
        },
    }


def measure_part(part: Part, chip: Chip, devices: int, *, full: bool = True) -> dict[str, Any]:
    """Compiles a program for a number of devices and returns JSON-able numbers of the executable.

    "fits" and "compiled" are False if the compiler finds no room; "peak_gib" is then the memory that it asked for.
    "total_gib" is the sum of "peak_gib" and "beside_gib", the run's other arrays. Sizes and seconds are per device and
    run, "flops" and "bytes" of all devices.

    `full` tells whether all completions have the maximum length. The compiled program always counts them so: if they are
    shorter, its FLOPs are not compared with the formula's, and its collectives bound no time.
    """
    begin = time.perf_counter()
    compiled, peak = _compile(part)
    seconds_to_compile = time.perf_counter() - begin
    activations = max(peak - sum(part.contents.values()), 0.0)
    contents = {name: x / GIB for name, x in part.contents.items()} | {"activations": activations / GIB}
    found: dict[str, Any] = {
        "name": part.name,
        "compile_seconds": seconds_to_compile,
        "times": part.times,
        "fits": compiled is not None and peak + part.resident <= chip.hbm * GIB,
        "limit_gib": chip.hbm,
        "compiled": compiled is not None,
        "peak_gib": peak / GIB,
        "beside_gib": part.resident / GIB,
        "total_gib": (peak + part.resident) / GIB,
        "filled_gib": contents,
        **dataclasses.asdict(part.cost),
    }
    seconds = {"compute": part.cost.flops / devices / chip.flops, "memory": part.cost.bytes / devices / chip.bandwidth}
    if compiled is not None:
        program = hlo.read(compiled.as_text() or "", unlimited=0)  # loops over short completions do not run
        found |= _compare(part, program, devices)
        if full:
            seconds["links"] = sum(x.bytes for x in program.collectives.values()) / chip.links
        else:
            found["flops_over_hlo"] = None
        aliased = _memory(compiled).alias_size_in_bytes
        found["donation"] = min(aliased / part.donated, 1.0) if part.donated else None
    bound_by = max(seconds, key=lambda name: seconds[name])
    return found | {"roofline_seconds": seconds, "bound_by": bound_by, "seconds": seconds[bound_by]}


def _compile(part: Part) -> tuple[jax.stages.Compiled | None, float]:
    """Returns the executable (None if the compiler finds no room), and the bytes per device that it needs."""
    try:
        compiled = part.lower().compile()
    except jax.errors.JaxRuntimeError as e:
        asked = requested_bytes(e)
        if asked is None:
            raise
        return None, asked
    return compiled, float(_memory(compiled).peak_memory_in_bytes)


def _memory(compiled: jax.stages.Compiled) -> Any:
    memory = compiled.memory_analysis()
    if memory is None:
        raise ConfigError("This compiler does not report the memory of its programs.")
    return memory


def _compare(part: Part, program: hlo.Program, devices: int) -> dict[str, Any]:
    """Returns the FLOPs of the compiled program on all devices, next to the formula's, and its collectives."""
    flops = (program.flops + program.reduced_flops) * devices
    return {
        "hlo_flops": flops,
        "flops_in_kernels": part.kernel_flops,
        "flops_over_hlo": (part.cost.flops - part.kernel_flops) / flops if flops else None,
        "collectives": {kind: {"count": x.executions, "gib": x.bytes / GIB} for kind, x in program.collectives.items()},
    }


def requested_bytes(error: Exception) -> float | None:
    """Returns the bytes per device of a program for which the compiler found no room; None for any other error.

    If the temporaries alone are too large, the compiler reports only their size. Raises ConfigError if it reports none.
    """
    if "RESOURCE_EXHAUSTED" not in str(error):
        return None
    used = re.search(r"(?:Used |HLO temporaries \()([\d.]+)([KMGT])(?: of [\d.]+[KMGT] hbm|\) exceeds)", str(error))
    if used is None:
        raise ConfigError(
            f"The compiler has no room for a program and does not report its size: {first_line(error)} Lower "
            "prompts_per_step or max_completion_length."
        )
    return float(used[1]) * 2 ** {"K": 10, "M": 20, "G": 30, "T": 40}[used[2]]


def find_largest(
    config: Config, topology: str, devices: Sequence[jax.Device], say: Callable[[str], None] = lambda text: None
) -> dict[str, int]:
    """Returns the largest value of each size (see `_grains`) that fits with the others as configured; 0: none fits."""
    chip = chip_of(topology)

    def fits(name: str, value: int) -> bool:
        fields = config_lib.to_dict(config) | {name: value}
        if name == "max_completion_length":
            fields["method"] = _with_longest(fields["method"], value)
        other = config_lib.from_dict(fields)
        say(f"trying {name} = {value} ...")
        # The largest programs first: the compiler rejects them in seconds.
        parts = sorted(parts_of(other, devices), key=lambda part: part.name not in ("update", "rollout"))
        return all(measure_part(part, chip, len(devices))["fits"] for part in parts)

    return {
        name: largest_that_fits(functools.partial(fits, name), getattr(config, name), grain)
        for name, grain in _grains(config, devices).items()
    }


def _with_longest(method: Mapping[str, Any], length: int) -> dict[str, Any]:
    """Returns the keywords of a method, or of a stack, whose penalty on length ends at `length`; no size depends on it."""
    found: dict[str, Any] = {
        name: _with_longest(x, length) if isinstance(x, Mapping) else x for name, x in method.items()
    }
    if found.get("overlong_max_length"):
        found |= {"overlong_max_length": length, "overlong_cache_length": length}
    return found


def _grains(config: Config, devices: Sequence[jax.Device]) -> dict[str, int]:
    """Returns the number of which each searched size has to be a multiple."""
    mesh = programs_lib.make_mesh(config, devices)
    decoding = sharding.rollout_mesh(mesh, config.mesh.rollout_tensor or mesh.shape["tensor"])
    pieces, parts = config.update.minibatches * max(config.update.accumulation, 1), config.sampling.parts
    ways = sharding.num_shards(mesh)
    prompts = math.lcm(ways * pieces, ways * parts, sharding.num_shards(decoding) * parts)
    return {"prompts_per_step": prompts, "group_size": 1, "max_completion_length": 128}


def largest_that_fits(fits: Callable[[int], bool], start: int, grain: int, limit: int = 2**20) -> int:
    """Returns the largest multiple of `grain` that fits, or one at most a sixteenth smaller.

    If no multiple fits, the result is `start` if that fits, and 0 otherwise.
    The first size, `start`, is doubled while it fits, then the interval is bisected. No size above `limit` is tried. If
    `grain` is 1 the least size is 2, that of a group.
    """
    lowest = 2 * grain if grain == 1 else grain
    low, high = 0, max(start // grain * grain, lowest)
    while high <= limit and fits(high):
        low, high = high, 2 * high
    if not low:
        while high > lowest and not low:
            above, high = high, max(high // 2 // grain * grain, lowest)
            if fits(high):
                low, high = high, above
        if not low:
            return start if start < lowest and fits(start) else 0
    while high - low > max(grain, low // 16):
        middle = (low + high) // 2 // grain * grain
        if middle in (low, high):
            break
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low

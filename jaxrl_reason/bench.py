"""Measures the speed of a training step, and prints it as one JSON line.

A step samples P prompts x G completions at temperature 1, computes a trivial reward from decoded text on the host, and
makes one AdamW update over all of them, with random weights. Completions have exactly `new` tokens, or, with
--lengths=mixed, between 1 and `new` tokens and a quarter of it on average. The line holds completion
tokens per second of rollout, update and step, compile seconds, peak memory, and the share of the machine's float32 peak
(measured by a 2048^3 product in the same process). Steps during which other processes took 6 % of the machine or more
are left out if any other step remains; else the least disturbed third of the steps counts.

With --compare, the command measures the other flags, then the same with the flags of each --compare, each setting in a
process of its own, and all of them again in the same order: --rounds times. It prints every JSON line, then a table of
medians over the rounds, with their ratios to the first setting.
"""

from collections.abc import Callable
import dataclasses
import json
import os
import resource
import shlex
import statistics
import subprocess
import sys
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import rich.console

from jaxrl_reason import config as config_lib
from jaxrl_reason import models
from jaxrl_reason.config import Config, ConfigError, Model, Optimizer, Sampling, Update
from jaxrl_reason.data import PromptBatch
from jaxrl_reason.models import sharding
from jaxrl_reason.plan.lengths import skewed_lengths
from jaxrl_reason.rewards.host import compute_rewards, HostReward
from jaxrl_reason.rl import programs as programs_lib
from jaxrl_reason.rl.ahead import compile_ahead
from jaxrl_reason.rl.devices import check_waves, for_devices, microbatches
from jaxrl_reason.rl.types import Groups, TrainState
from jaxrl_reason.runs import command, pictures
from jaxrl_reason.runs.command import Flag, integer, number

SIZES: dict[str, tuple[int, dict[str, Any]]] = {  # vocabulary size, and sizes of the model
    "tiny": (512, dict(width=128, layers=2, heads=4, kv_heads=2, mlp_width=384)),
    "mid": (2048, dict(width=256, layers=4, heads=8, kv_heads=4, mlp_width=768)),
    "small": (8192, dict(width=512, layers=8, heads=8, kv_heads=4, mlp_width=1536)),
    "smollm": (49152, dict(width=576, layers=30, heads=9, kv_heads=3, mlp_width=1536)),
}
DTYPES, REMAT = ("float32", "bfloat16"), ("auto", "none", "dots", "layer")
ATTENTION = ("auto", "plain", "blockwise")
COMPARED = ("rollout_seconds", "train_seconds", "step_seconds", "compile_seconds", "peak_rss_mb")
UNDISTURBED = 0.06  # share of the machine that other processes may take during a step


def share_of_even_ids(completions: list[str], **_: Any) -> list[float]:
    """Returns the reward of the benchmark, computed from text as a user's reward."""
    ids = [[int(word) for word in text.split()] for text in completions]
    return [sum(i % 2 == 0 for i in row) / max(len(row), 1) for row in ids]


def step_flops(model: models.ModelConfig, prompts: int, group: int, prompt_length: int, new: int) -> dict[str, float]:
    """Returns the floating-point operations of a rollout and of an update, which compute each prompt once per group.

    A multiply-add counts as two, causal scores count half, the backward pass costs twice the forward pass; nothing is
    recomputed. `prompts` and `group` are P and G; `prompt_length` and `new` are the tokens per prompt and per
    completion.
    """
    c = model
    head = c.vocab_size * c.width
    body = c.layers * (2 * c.width * c.head_dim * (c.heads + c.kv_heads) + 3 * c.width * c.mlp_width)
    scores = lambda queries, keys: 4 * c.layers * c.heads * c.head_dim * queries * keys
    prefill = prompts * (2 * body * prompt_length + scores(prompt_length, prompt_length) / 2)
    samples = prompts * group
    forward = prefill + samples * (2 * body * (new - 1) + 2 * head * new + scores(new - 1, prompt_length + new / 2))
    return {"rollout": forward, "update": 3 * forward}


def measured_peak() -> float:
    """Measures the float32 operations per second of a large product, the best of five."""
    x = jnp.ones((2048, 2048), jnp.float32)
    f = jax.jit(lambda x: jnp.dot(x, x, precision=jax.lax.Precision.HIGHEST))  # as the model multiplies float32
    f(x).block_until_ready()
    times = []
    for _ in range(5):
        begin = time.perf_counter()
        f(x).block_until_ready()
        times.append(time.perf_counter() - begin)
    return 2 * 2048**3 / min(times)


def _busy_seconds() -> float:
    """Returns the CPU seconds that the whole machine has spent working; 0 if the system does not tell."""
    try:
        with open("/proc/stat") as f:
            v = [int(x) for x in f.readline().split()[1:9]]
    except OSError:
        return 0.0
    return (sum(v) - v[3] - v[4]) / os.sysconf("SC_CLK_TCK")


class Timing(NamedTuple):
    """One measured step: seconds f64[3] of rollout, reward, update, and the share of the machine that others took."""

    seconds: np.ndarray
    disturbance: float


@dataclasses.dataclass(frozen=True)
class Bench:
    """A training step to measure: name of the size, configuration, decoder, compiled functions, the most steps."""

    size: str
    config: Config
    model: models.ModelConfig
    programs: programs_lib.Programs
    max_steps: int
    tokens: int  # of all completions of a step
    microbatches: int  # per update

    def prompts(self, i: int) -> PromptBatch:
        """Returns the random prompts of step `i`."""
        P, S = shape = self.config.prompts_per_step, self.config.max_prompt_length
        random = np.random.default_rng([self.config.seed, i])
        tokens = random.integers(3, self.model.vocab_size - 1, shape).astype(np.int32)
        ids = np.arange(P, dtype=np.int32) + i * P
        return PromptBatch(tokens, np.ones((P, S), bool), ids, np.ones(P, np.float32), [])

    def step(self, state: TrainState, i: int) -> tuple[TrainState, np.ndarray]:
        """Makes one step on random prompts; returns the new state, and the seconds of rollout, reward and update."""
        P, programs, times = self.config.prompts_per_step, self.programs, [time.perf_counter()]
        rollout = jax.block_until_ready(programs.generate(state.params, self.prompts(i), state.step))
        times.append(time.perf_counter())
        completions = jax.device_get(rollout.tokens).tolist()
        texts = [[" ".join(map(str, row)) for row in group] for group in completions]
        table = compute_rewards([HostReward("even", share_of_even_ids)], [""] * P, texts, completions, {})
        rewards = {"even": jax.device_put(table.per_reward["even"], programs.sharding)}
        times.append(time.perf_counter())
        learned, advantage_state, _ = programs.make_experience(Groups(rollout, rewards), state.advantage_state)
        updated = programs.update(state._replace(advantage_state=advantage_state), learned)
        state = jax.block_until_ready(updated).state
        times.append(time.perf_counter())
        return state, np.diff(times)


def configuration(arguments: command.Arguments) -> tuple[Config, int]:
    """Returns the configuration of a training run, and its steps at most; raises ConfigError for sizes that do not fit together."""
    a = arguments
    most = a.steps if a.max_steps is None else a.max_steps
    if most < a.steps:
        raise ConfigError(f"--max-steps={most} is less than --steps={a.steps}; raise it, or lower --steps.")
    _, sizes = SIZES[a.size]
    config = Config(
        seed=a.seed,
        steps=a.steps,
        prompts_per_step=a.prompts,
        group_size=a.group,
        max_prompt_length=a.prompt_length,
        max_completion_length=a.new,
        model=Model(**sizes, compute_dtype=a.compute_dtype, remat=a.remat, attention=a.attention),
        method={"name": "grpo"},
        optimizer=Optimizer(learning_rate=1e-4),
        sampling=Sampling(halvings=a.halvings, cache_pieces=a.cache_pieces),
        update=Update(accumulation=a.accumulation, lengths=a.update_lengths, wave_tokens=a.wave_tokens),
    )
    config_lib.validate(config)
    return config, most


def prepare(arguments: command.Arguments) -> Bench:
    """Builds the programs of a training run; raises ConfigError as `configuration` does, and for what the device cannot run."""
    a = arguments
    config, most = configuration(a)
    method, (vocab_size, _) = config_lib.validate(config), SIZES[a.size]
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    model = for_devices(config_lib.model_config(config, vocab_size), config, mesh)
    check_waves(model, config, mesh)
    lengths = skewed_lengths(a.prompts, a.group, a.new, max(a.new / 4, 1)) if a.lengths == "mixed" else None
    end_at, eos = (None, -1) if lengths is None else (lengths - 1, vocab_size - 1)
    programs = programs_lib.build(
        config, method, model, mesh, eos_ids=(eos,), pad_id=0, weights={"even": 1.0}, verdict="even", end_at=end_at
    )
    tokens = a.prompts * a.group * a.new if lengths is None else int(lengths.sum())
    return Bench(a.size, config, model, programs, most, tokens, microbatches(model, config, mesh))


def measure(bench: Bench) -> tuple[float, list[Timing]]:
    """Returns the seconds until the end of the first step, which compiles, and the timings of all later steps."""
    begin = time.perf_counter()
    compile_ahead(bench.programs, prompts=bench.prompts(0), rewards=("even",))
    state, _ = bench.step(bench.programs.init(), 0)
    first = time.perf_counter() - begin
    timings: list[Timing] = []
    clocks: Callable[[], np.ndarray] = lambda: np.array([time.perf_counter(), time.process_time(), _busy_seconds()])
    while len(timings) < bench.max_steps and len(_undisturbed(timings)) < bench.config.steps:
        before = clocks()
        state, seconds = bench.step(state, len(timings) + 1)
        wall, own, busy = clocks() - before
        timings.append(Timing(seconds, max(0.0, busy - own) / (wall * (os.cpu_count() or 1))))
    return first, timings


def _undisturbed(timings: list[Timing]) -> list[Timing]:
    return [timing for timing in timings if timing.disturbance < UNDISTURBED]


def results(bench: Bench, first: float, timings: list[Timing]) -> dict[str, Any]:
    """Returns the results, from the medians of the undisturbed steps; `first` and `timings` are from `measure`."""
    c = bench.config
    clean = _undisturbed(timings)
    used = clean or sorted(timings, key=lambda t: t.disturbance)[: max(1, len(timings) // 3)]
    rollout, reward, update = (statistics.median(float(t.seconds[i]) for t in used) for i in range(3))
    step = statistics.median(float(t.seconds.sum()) for t in used)
    P, G, S, T = c.prompts_per_step, c.group_size, c.max_prompt_length, c.max_completion_length
    tokens, peak, flops = bench.tokens, measured_peak(), step_flops(bench.model, P, G, S, T)
    share = lambda rate: round(rate / peak, 3) if tokens == P * G * T else None  # the operations are of full lengths
    work = {"prompts": P, "group": G, "prompt_len": S, "new": T, "tokens": tokens, "padding": P * G * T - tokens}
    return {
        "peer": "jaxrl_reason",
        "size": bench.size,
        "compute_dtype": c.model.compute_dtype,
        "n_params": models.param_count(bench.model),
        "work": work
        | {"micro": P * G // bench.microbatches, "remat": bench.model.remat, "attention": bench.model.attention},
        "versions": {"jax": jax.__version__, "python": sys.version.split()[0]},
        "rollout_tokens_per_s": round(tokens / rollout, 1),
        "update_tokens_per_s": round(tokens / update, 1),
        "step_tokens_per_s": round(tokens / step, 1),
        "train_tokens_per_s": round((P * G * S + tokens) / update, 1),
        "rollout_seconds": round(rollout, 4),
        "reward_seconds": round(reward, 4),
        "train_seconds": round(update, 4),
        "step_seconds": round(step, 4),
        "compile_seconds": round(first - step, 2),
        "peak_rss_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
        "peak_gflops": round(peak / 1e9, 1),
        "rollout_share_of_peak": share(flops["rollout"] / rollout),
        "update_share_of_peak": share(flops["update"] / update),
        "timed_steps": len(timings),
        "clean_steps": len(clean),
        "others_share": round(statistics.median(t.disturbance for t in used), 3),
    }


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Settings to measure in turn: name -> the flags of a process."""

    settings: dict[str, list[str]]
    rounds: int


def prepare_comparison(arguments: command.Arguments) -> Bench | Comparison:
    """Returns what the flags ask for: one measurement, or a comparison. Checks the flags and fields of every setting.

    A comparison leaves the devices alone: a TPU serves one process, and each setting has its own process, which checks
    what depends on the devices.
    """
    a = arguments
    if not a.compare:
        return prepare(a)
    if not a.rounds:
        raise ConfigError("--rounds is 0; give the number of rounds, at least 1.")
    own = [
        f"--{flag.name}={getattr(a, flag.attribute)}" for flag in _MEASURED if getattr(a, flag.attribute) is not None
    ]
    check = lambda flags: configuration(command.parse(dataclasses.replace(COMMAND, flags=_MEASURED), flags))
    check(own)
    settings = {"as given": own}
    for text in a.compare:
        try:
            settings[text] = [*own, *shlex.split(text)]
            check(settings[text])
        except ValueError as e:  # also a quotation without an end
            raise ConfigError(f"--compare={text!r}: {e}") from e
        if settings[text] == own:
            raise ConfigError(
                f"--compare={text!r} has no flags, so nothing differs; give flags, such as '--halvings=0'."
            )
    return Comparison(settings, a.rounds)


def compare(comparison: Comparison) -> None:
    """Measures the settings in turn, prints each result as a JSON line, and then the table. Raises OSError if a process fails."""
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in comparison.settings}
    for _ in range(comparison.rounds):
        for name, flags in comparison.settings.items():
            child = subprocess.run(
                [sys.executable, "-m", "jaxrl_reason.bench", *flags], stdout=subprocess.PIPE, text=True
            )
            if child.returncode:
                raise OSError(f"The process that measured {name!r} has ended with exit code {child.returncode}.")
            print(child.stdout, end="", flush=True)
            found[name].append(json.loads(child.stdout))
    console = rich.console.Console(highlight=False, markup=False, emoji=False)
    pictures.print_table(console, list(COMPARED), ratios(found))


def ratios(found: dict[str, list[dict[str, Any]]]) -> dict[str, list[str]]:
    """Returns the column of each setting: medians over the rounds, with their ratios to the first setting."""
    medians = {
        name: [statistics.median(line[key] for line in lines) for key in COMPARED] for name, lines in found.items()
    }
    first = next(iter(medians.values()))
    cell = lambda x, y: f"{x:.4g} ({x / y:.2f})" if y else f"{x:.4g}"
    return {name: [cell(x, y) for x, y in zip(values, first)] for name, values in medians.items()}


_MEASURED = (
    Flag("size", "SIZE", "the size of the model", default="tiny", choices=tuple(SIZES)),
    Flag("prompts", "P", "prompts per step", number, 8),
    Flag("group", "G", "completions per prompt", number, 8),
    Flag("prompt-length", "S", "tokens per prompt", number, 32, alias="prompt-len"),
    Flag("new", "T", "tokens per completion", number, 64),
    Flag(
        "lengths",
        "KIND",
        "full: T tokens each; mixed: a skewed distribution of mean T/4",
        default="full",
        choices=("full", "mixed"),
    ),
    Flag("halvings", "N", "see config.sampling.halvings", integer, -1),
    Flag("cache-pieces", "N", "see config.sampling.cache_pieces", integer, 0),
    Flag("update-lengths", "N", "see config.update.lengths", integer, 0),
    Flag("wave-tokens", "N", "see config.update.wave_tokens", integer, 0),
    Flag("accumulation", "N", "see config.update.accumulation", integer, 0),
    Flag("compute-dtype", "DTYPE", "dtype of the operands of products", str, "float32", choices=DTYPES),
    Flag("remat", "POLICY", "the values that the backward pass computes again", str, "auto", choices=REMAT),
    Flag("attention", "KIND", "the attention of prompts and updates", str, "auto", choices=ATTENTION),
    Flag("steps", "N", "undisturbed steps to measure", number, 6),
    Flag("max-steps", "N", "steps at most, --steps by default", number),
    Flag("seed", "N", "seed of weights, prompts and samples", number, 0),
)
COMMAND = command.Command(
    "bench",
    __doc__,
    (
        *_MEASURED,
        Flag("compare", "FLAGS", "flags of a further setting; may be repeated", default=(), repeated=True),
        Flag("rounds", "N", "with --compare: how often each setting is measured", number, 2),
    ),
    "--size=small --accumulation=4",
)


def main(argv: list[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    measured = lambda bench: print(json.dumps(results(bench, *measure(bench))), flush=True)
    work = lambda asked: compare(asked) if isinstance(asked, Comparison) else measured(asked)
    return command.run(COMMAND, argv, prepare_comparison, work)


if __name__ == "__main__":
    sys.exit(main())

"""How fast a step is: python -m jaxrl_reason.bench --size=small [--prompts=8 --group=8 --prompt-length=32 --new=64]

A step is P prompts x G completions of exactly `new` tokens at temperature 1, a trivial reward from decoded
text on the host, and one AdamW update over all of them, with random weights. Prints one JSON line: completion
tokens/s of rollout, update and step, compile seconds, peak memory, and the share of the machine's float32 peak
(measured by a 2048^3 product in the same process). Steps during which other processes took more than 6 % of
the machine are left out where enough others remain.
"""

import argparse
import json
import os
import resource
import statistics
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_reason import config as config_lib
from jaxrl_reason import models
from jaxrl_reason.config import Config, Model, Optimizer, Update
from jaxrl_reason.data import PromptBatch
from jaxrl_reason.models import sharding
from jaxrl_reason.rewards.host import compute_rewards, HostReward
from jaxrl_reason.rl import programs as programs_lib
from jaxrl_reason.rl.types import Groups

SIZES = {  # vocabulary size and the rest of the model
    "tiny": (512, dict(width=128, layers=2, heads=4, kv_heads=2, mlp_width=384)),
    "mid": (2048, dict(width=256, layers=4, heads=8, kv_heads=4, mlp_width=768)),
    "small": (8192, dict(width=512, layers=8, heads=8, kv_heads=4, mlp_width=1536)),
    "smollm": (49152, dict(width=576, layers=30, heads=9, kv_heads=3, mlp_width=1536)),
}
UNDISTURBED = 0.06


def share_of_even_ids(completions, **_):
    """The reward of the benchmark, from text as a user's would be."""
    ids = [[int(word) for word in text.split()] for text in completions]
    return [sum(i % 2 == 0 for i in row) / max(len(row), 1) for row in ids]


def step_flops(model: models.ModelConfig, prompts: int, group: int, prompt_length: int, new: int) -> dict[str, float]:
    """Floating-point operations that a rollout and an update need, each prompt computed once a group.

    Two a multiply-add; half of the causal scores; backward twice the forward; no recomputation.
    """
    c = model
    head = c.vocab_size * c.width
    body = c.layers * (2 * c.width * c.head_dim * (c.heads + c.kv_heads) + 3 * c.width * c.mlp_width)
    scores = lambda queries, keys: 4 * c.layers * c.heads * c.head_dim * queries * keys
    prefill = prompts * (2 * body * prompt_length + scores(prompt_length, prompt_length) / 2)
    samples = prompts * group
    decode = samples * (2 * body * (new - 1) + 2 * head * new + scores(new - 1, prompt_length + new / 2))
    forward = prefill + samples * (2 * body * (new - 1) + 2 * head * new + scores(new - 1, prompt_length + new / 2))
    return {"rollout": prefill + decode, "update": 3 * forward}


def measured_peak() -> float:
    """float32 operations per second of a large product, the best of five."""
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
    """CPU seconds that the whole machine has spent working; 0 where the system does not say."""
    try:
        with open("/proc/stat") as f:
            v = [int(x) for x in f.readline().split()[1:9]]
    except OSError:
        return 0.0
    return (sum(v) - v[3] - v[4]) / os.sysconf("SC_CLK_TCK")


def run(args: argparse.Namespace) -> dict:
    """Builds the programs of a training run, runs steps, and returns the figures."""
    vocab_size, sizes = SIZES[args.size]
    config = Config(
        seed=args.seed,
        steps=args.steps,
        prompts_per_step=args.prompts,
        group_size=args.group,
        max_prompt_length=args.prompt_length,
        max_completion_length=args.new,
        model=Model(**sizes, compute_dtype=args.compute_dtype, remat=args.remat),
        method={"name": "grpo"},
        optimizer=Optimizer(learning_rate=1e-4),
        update=Update(accumulation=args.accumulation),
    )
    method = config_lib.validate(config)
    model = config_lib.model_config(config, vocab_size)
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    reward = HostReward("even", share_of_even_ids)
    programs = programs_lib.build(
        config, method, model, mesh, eos_ids=(-1,), pad_id=0, weights={"even": 1.0}, verdict="even"
    )
    state = programs.init()
    rng = np.random.default_rng(args.seed)
    shape = (args.prompts, args.prompt_length)

    def step(state, i):
        times = [time.perf_counter()]
        tokens = rng.integers(3, vocab_size - 1, shape).astype(np.int32)
        batch = PromptBatch(
            tokens,
            np.ones(shape, bool),
            np.arange(args.prompts, dtype=np.int32) + i * args.prompts,
            np.ones(args.prompts, np.float32),
            [],
        )
        rollout = jax.block_until_ready(programs.generate(state.params, batch, state.step))
        times.append(time.perf_counter())
        ids = jax.device_get(rollout.tokens).tolist()
        texts = [[" ".join(map(str, row)) for row in group] for group in ids]
        table = compute_rewards([reward], [""] * args.prompts, texts, ids, {})
        rewards = {"even": jax.device_put(table.per_reward["even"], programs.sharding)}
        times.append(time.perf_counter())
        groups = Groups(rollout, rewards)
        learnt, advantage_state, _ = programs.make_experience(groups, state.advantage_state)
        state, *_ = jax.block_until_ready(programs.update(state._replace(advantage_state=advantage_state), learnt))
        times.append(time.perf_counter())
        return state, np.diff(times)

    state, first = step(state, 0)
    records = []
    while len(records) < args.max_steps:
        clean = [r for r in records if r[1] < UNDISTURBED]
        if len(records) >= args.steps and len(clean) >= args.steps:
            break
        before = time.perf_counter(), time.process_time(), _busy_seconds()
        state, parts = step(state, len(records) + 1)
        wall, cpu, busy = (b - a for a, b in zip(before, (time.perf_counter(), time.process_time(), _busy_seconds())))
        records.append((parts, max(0.0, busy - cpu) / (wall * os.cpu_count())))
    clean = [r for r in records if r[1] < UNDISTURBED]
    used = clean or sorted(records, key=lambda r: r[1])[: max(1, len(records) // 3)]
    rollout, reward_time, update = (statistics.median(r[0][i] for r in used) for i in range(3))
    step_seconds = statistics.median(r[0].sum() for r in used)
    tokens, peak = args.prompts * args.group * args.new, measured_peak()
    flops = step_flops(model, args.prompts, args.group, args.prompt_length, args.new)
    return {
        "peer": "jaxrl_reason",
        "size": args.size,
        "compute_dtype": args.compute_dtype,
        "n_params": models.param_count(model),
        "work": dict(
            prompts=args.prompts,
            group=args.group,
            prompt_len=args.prompt_length,
            new=args.new,
            micro=args.prompts * args.group // args.accumulation,
            remat=args.remat,
        ),
        "versions": {"jax": jax.__version__, "python": sys.version.split()[0]},
        "rollout_tokens_per_s": round(tokens / rollout, 1),
        "update_tokens_per_s": round(tokens / update, 1),
        "step_tokens_per_s": round(tokens / step_seconds, 1),
        "train_tokens_per_s": round(args.prompts * args.group * (args.prompt_length + args.new) / update, 1),
        "rollout_seconds": round(rollout, 4),
        "reward_seconds": round(reward_time, 4),
        "train_seconds": round(update, 4),
        "step_seconds": round(step_seconds, 4),
        "compile_seconds": round(float(first.sum()) - step_seconds, 2),
        "peak_rss_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
        "peak_gflops": round(peak / 1e9, 1),
        "rollout_share_of_peak": round(flops["rollout"] / rollout / peak, 3),
        "update_share_of_peak": round(flops["update"] / update / peak, 3),
        "timed_steps": len(records),
        "clean_steps": len(clean),
        "others_share": round(statistics.median(r[1] for r in used), 3),
    }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        "jaxrl_reason.bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=list(SIZES), default="tiny")
    parser.add_argument("--prompts", type=int, default=8, help="prompts a step")
    parser.add_argument("--group", type=int, default=8, help="completions a prompt")
    parser.add_argument("--prompt-length", "--prompt-len", type=int, default=32, help="tokens of a prompt")
    parser.add_argument("--new", type=int, default=64, help="tokens of a completion")
    parser.add_argument("--accumulation", type=int, default=1, help="microbatches an update")
    parser.add_argument(
        "--compute-dtype", choices=("float32", "bfloat16"), default="float32", help="operands of products"
    )
    parser.add_argument("--remat", choices=("none", "dots", "layer"), default="layer")
    parser.add_argument("--steps", type=int, default=6, help="undisturbed steps wanted")
    parser.add_argument("--max-steps", type=int, default=0, help="steps at most (0: no more than --steps)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    args.max_steps = max(args.max_steps, args.steps)
    try:
        print(json.dumps(run(args)), flush=True)
    except config_lib.ConfigError as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

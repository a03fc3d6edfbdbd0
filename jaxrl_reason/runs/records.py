"""Looks at completions of a step: sample tables, the token with the largest mismatch, a step saved for replay."""

from collections.abc import Callable, Mapping
import functools
import pathlib

import jax
from jax.sharding import Sharding
import numpy as np
import rich.console

from jaxrl_reason.config import Config
from jaxrl_reason.data import Tokenizer
from jaxrl_reason.rl import experience, hosts
from jaxrl_reason.rl.programs import Programs
from jaxrl_reason.rl.types import Experience, Mismatch, Step, TrainState
from jaxrl_reason.runs import checkpoints
from jaxrl_reason.runs.metrics_file import SampleTable
from jaxrl_reason.runs.watch import Watch


def observer(
    config: Config,
    table: SampleTable,
    programs: Programs,
    tokenizer: Tokenizer,
    weights: Mapping[str, float],
    console: rich.console.Console,
    past: list[dict[str, float]],
) -> Callable[[int, dict[str, float], Step], None]:
    """Returns what is called with each written step: it prints warnings, and writes samples every `log.samples_every` steps.

    `weights` belong to the rewards, by name; `past` are the metrics of the steps done before.
    """
    c, exact = config, programs.needs.exact_sampler
    limit = c.sampling.mismatch_limit or (0.01 if exact else 1.0)  # in nats per token
    watch = Watch(functools.partial(console.print, soft_wrap=True), limit, past)

    def written(done: int, metrics: dict[str, float], step: Step) -> None:
        watch.look(metrics, lambda: describe_mismatch(step.batch, step.mismatch, tokenizer, programs.sharding))
        if hosts.is_first() and c.log.samples_every and (done % c.log.samples_every == 0 or done == c.steps):
            prompts = -(-c.log.samples // c.group_size)
            hidden = c.reward.skip_special_tokens
            write_samples(table, done, step, prompts, tokenizer, weights, programs.sharding, hidden)

    return written


def write_samples(
    table: SampleTable,
    number: int,
    step: Step,
    prompts: int,
    tokenizer: Tokenizer,
    weights: Mapping[str, float],
    sharding: Sharding,
    skip_special: bool = False,
) -> None:
    """Writes the completions of this process's first `prompts` prompts, with their rewards and advantages, to `table`."""
    batch = step.batch
    rollout, rewards, advantages, mask = jax.tree.map(
        lambda x: hosts.rows_to_host(x, sharding)[:prompts],
        (batch.rollout, step.groups.rewards, batch.advantages, batch.mask),
    )
    if advantages.ndim == 3:  # per token: their mean over the completion
        advantages = (advantages * mask).sum(-1) / np.maximum(mask.sum(-1), 1)
    rewards = {name: r[:, : rollout.tokens.shape[1]] for name, r in rewards.items()}
    live = lambda tokens, masks: [t[m].tolist() for t, m in zip(tokens, masks)]
    table.write(
        number,
        tokenizer.decode_batch(live(rollout.prompt_tokens, rollout.prompt_mask), skip_special),
        [tokenizer.completions(live(*group), skip_special) for group in zip(rollout.tokens, rollout.mask)],
        rewards={name: np.asarray(r) for name, r in rewards.items()},
        total=np.asarray(experience.total_reward(rewards, weights)),
        advantages=advantages,
        lengths=rollout.mask.sum(-1),
        truncated=rollout.truncated,
    )


def describe_mismatch(batch: Experience, mismatch: Mismatch, tokenizer: Tokenizer, sharding: Sharding) -> str:
    """Returns a sentence about the token on which sampler and trainer differ most; its text only on its process."""
    difference, p, g, t = (x.item() for x in jax.device_get(mismatch))
    place = f"token {t} of completion {g} of prompt {p}"
    mine = hosts.local_rows_of(batch.mask)
    if p not in mine:
        return f"{place}, which is on another process."
    rollout = jax.tree.map(lambda x: hosts.rows_to_host(x, sharding)[np.searchsorted(mine, p)], batch.rollout)
    ids = [rollout.tokens[g][rollout.mask[g]].tolist(), [int(rollout.tokens[g, t])]]
    completion, token = tokenizer.decode_batch(ids, skip_special=False)
    sampled = float(rollout.logprobs[g, t])
    # repr escapes control characters of a terminal.
    return (
        f"{place}, {token!r} in {completion!r:.300}, was sampled at {sampled:.3g}, and the "
        f"trainer computes {sampled + difference:.3g}."
    )


def save_for_replay(workdir: pathlib.Path, number: int, state: TrainState, step: Step) -> str:
    """Writes the weights and the batch of a step to WORKDIR/replay/STEP. Returns a sentence about the result."""
    directory = workdir / "replay" / str(number)
    replay = f"python -m jaxrl_reason.replay --workdir={workdir}"
    result = f"Its weights and batch are in {directory}: {replay} names the cause."
    batch, rewards = jax.tree.map(hosts.to_host, (step.batch, step.groups.rewards))
    try:
        checkpoints.save_params(directory / "params", state.params)
        if hosts.is_first():
            checkpoints.save_batch(directory / "batch.npz", batch, rewards)
    except (checkpoints.CheckpointError, OSError) as e:
        result = f"It could not be saved for replay: {e}"
    hosts.barrier("saved for replay")  # no process ends while another one writes
    return result

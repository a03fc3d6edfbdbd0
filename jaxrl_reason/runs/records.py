"""Looks at completions of a step: sample tables, the token with the largest mismatch, a step saved for replay."""

from collections.abc import Callable, Mapping
import functools
import pathlib
import shlex

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
from jaxrl_reason.runs.report import Report
from jaxrl_reason.runs.watch import mismatch_limit, Watch


def observer(
    config: Config,
    table: SampleTable,
    programs: Programs,
    tokenizer: Tokenizer,
    weights: Mapping[str, float],
    verdict: str,
    report: Report,
    console: rich.console.Console,
    past: list[dict[str, float]],
) -> Callable[[int, dict[str, float], Step], None]:
    """Returns what is called with each written step.

    It prints warnings, writes samples every `log.samples_every` steps, and brings the report up to date after each
    evaluation and each checkpoint.

    Args:
      config, programs, tokenizer, console: of the run.
      table: takes the samples.
      weights: of the rewards, by name.
      verdict: the reward whose value > 0.5 means correct; empty: there is none.
      report: of the run.
      past: the metrics of the steps done before.
    """
    c = config
    watch = Watch(functools.partial(console.print, soft_wrap=True), mismatch_limit(c, programs.needs), past)
    report.write()

    def written(done: int, metrics: dict[str, float], step: Step) -> None:
        watch.look(metrics, lambda: describe_mismatch(step.batch, step.mismatch, tokenizer, programs.sharding))
        if hosts.is_first() and c.log.samples_every and (done % c.log.samples_every == 0 or done == c.steps):
            prompts = -(-c.log.samples // c.group_size)
            hidden = c.reward.skip_special_tokens
            write_samples(table, done, step, prompts, tokenizer, weights, programs.sharding, hidden, verdict)
        if any(every and done % every == 0 for every in (c.eval.every, c.checkpoint.every)):
            report.write()

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
    verdict: str = "",
) -> None:
    """Writes the completions of this process's first `prompts` prompts, with rewards, advantages and log-probabilities.

    Places that dynamic sampling could not fill are left out. With a `verdict`, the lines of the table also say which
    completions are correct. The prompt of a row of numbers shows its scaled features.
    """
    batch = step.batch
    rows = jax.tree.map(
        lambda x: hosts.rows_to_host(x, sharding), (batch.rollout, step.groups.rewards, batch.advantages, batch.mask)
    )
    chosen = np.flatnonzero(rows[0].mask.any(axis=(1, 2)))[:prompts]
    if not len(chosen):
        return
    rollout, rewards, advantages, mask = jax.tree.map(lambda x: x[chosen], rows)
    if advantages.ndim == 3:  # per token: their mean over the completion
        advantages = (advantages * mask).sum(-1) / np.maximum(mask.sum(-1), 1)
    rewards = {name: r[:, : rollout.tokens.shape[1]] for name, r in rewards.items()}
    live = lambda tokens, masks: [t[m].tolist() for t, m in zip(tokens, masks)]
    ids = [live(*group) for group in zip(rollout.tokens, rollout.mask)]
    prompt_texts = tokenizer.decode_batch(live(rollout.prompt_tokens, rollout.prompt_mask), skip_special)
    if rollout.features is not None:  # rows of a table, whose prompts have the same tokens
        prompt_texts = [f"(features {', '.join(f'{x:.4g}' for x in row)})" for row in rollout.features]
    table.write(
        number,
        prompt_texts,
        [tokenizer.completions(group, skip_special) for group in ids],
        rewards={name: np.asarray(r) for name, r in rewards.items()},
        total=np.asarray(experience.total_reward(rewards, weights)),
        advantages=advantages,
        lengths=rollout.mask.sum(-1),
        truncated=rollout.truncated,
        correct=rewards[verdict] > 0.5 if verdict else None,
        tokens=[[tokenizer.pieces(row, skip_special) for row in group] for group in ids],
        logprobs=[live(*group) for group in zip(rollout.logprobs, rollout.mask)],
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
    replay = f"python -m jaxrl_reason.replay --workdir={shlex.quote(str(workdir))}"
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

"""Looks at completions of a step: sample tables, the token with the largest mismatch, a step saved for replay."""

from collections.abc import Mapping
import pathlib

import jax
from jax.sharding import Sharding
import numpy as np

from jaxrl_reason.data import Tokenizer
from jaxrl_reason.rl import experience, hosts
from jaxrl_reason.rl.types import Experience, Groups, Mismatch, TrainState
from jaxrl_reason.runs import checkpoints
from jaxrl_reason.runs.metrics_file import SampleTable


def write_samples(
    table: SampleTable,
    step: int,
    groups: Groups,
    batch: Experience,
    *,
    prompts: int,
    tokenizer: Tokenizer,
    weights: Mapping[str, float],
    sharding: Sharding,
) -> None:
    """Writes the completions of this process's first `prompts` prompts, with their rewards and advantages, to `table`.

    `groups` and `batch` are the scored groups and the data of the update; `weights` belong to the rewards, by name, and
    `sharding` to the prompt axis.
    """
    rollout, groups, advantages, mask = jax.tree.map(
        lambda x: hosts.rows_to_host(x, sharding)[:prompts], (batch.rollout, groups, batch.advantages, batch.mask)
    )
    if advantages.ndim == 3:  # per token: their mean over the completion
        advantages = (advantages * mask).sum(-1) / np.maximum(mask.sum(-1), 1)
    rewards = {name: r[:, : rollout.tokens.shape[1]] for name, r in groups.rewards.items()}
    decode = lambda tokens, masks: tokenizer.decode_batch([t[m].tolist() for t, m in zip(tokens, masks)])
    table.write(
        step,
        decode(rollout.prompt_tokens, rollout.prompt_mask),
        [decode(*group) for group in zip(rollout.tokens, rollout.mask)],
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
    completion, token = tokenizer.decode_batch(ids)
    sampled = float(rollout.logprobs[g, t])
    # repr escapes control characters of a terminal.
    return (
        f"{place}, {token!r} in {completion!r:.300}, was sampled at {sampled:.3g}, and the "
        f"trainer computes {sampled + difference:.3g}."
    )


def save_for_replay(workdir: pathlib.Path, step: int, state: TrainState, groups: Groups, batch: Experience) -> str:
    """Writes the weights and the batch of a step to WORKDIR/replay/STEP. Returns a sentence about the result."""
    directory = workdir / "replay" / str(step)
    replay = f"python -m jaxrl_reason.replay --workdir={workdir}"
    result = f"Its weights and batch are in {directory}: {replay} names the cause."
    batch, rewards = jax.tree.map(hosts.to_host, (batch, groups.rewards))
    try:
        checkpoints.save_params(directory / "params", state.params)
        if hosts.is_first():
            checkpoints.save_batch(directory / "batch.npz", batch, rewards)
    except (checkpoints.CheckpointError, OSError) as e:
        result = f"It could not be saved for replay: {e}"
    hosts.barrier("saved for replay")  # no process ends while another one writes
    return result

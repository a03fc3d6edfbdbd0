"""Turns sampled and scored groups into the data of an update: total rewards, advantages, masks, metrics; and fills batches for dynamic sampling."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxrl_reason.advantages import group_deviation, group_tied
from jaxrl_reason.methods import Method
from jaxrl_reason.rl import auxiliary, signals
from jaxrl_reason.rl.signals import mean_where
from jaxrl_reason.rl.types import Experience, Groups, Prepared, Rollout


def total_reward(rewards: Mapping[str, Float[Array, "P G"]], weights: Mapping[str, float]) -> Float[Array, "P G"]:
    """Computes the weighted sum of the rewards that are present; NaN if no reward of non-zero weight is.

    Weights are found by name: a dict that has passed through jit returns in another order.
    """
    total = jnp.zeros_like(next(iter(rewards.values())))
    present = jnp.zeros(total.shape, bool)
    for name, values in rewards.items():
        if weights[name]:
            total += jnp.where(jnp.isnan(values), 0.0, weights[name] * values)
            present |= ~jnp.isnan(values)
    return jnp.where(present, total, jnp.nan)


def make_experience(
    groups: Groups,
    advantage_state: Any,
    kl: Float[Array, "P G T"] | None = None,
    probe_reference: Float[Array, ""] | Float[Array, "P G"] | None = None,
    *,
    method: Method,
    weights: Mapping[str, float],
    verdict: str,
    mask_truncated: bool,
    expert: Callable[[Array, Array], Array] | None = None,
) -> Prepared:
    """Computes advantages and everything else that an update needs. Pure; jit it with the keywords bound.

    Args:
      groups, advantage_state: scored completions, and the state of the method's chain.
      kl: log pi - log pi_ref per token, if the run measures it.
      probe_reference: c_ref of LaSeR, if the method has it.
      method, weights: the method, and the rewards' weights by name.
      verdict: the name of the reward whose value > 0.5 means correct.
      mask_truncated: leave completions without an end token out of the loss, but not out of the statistics.
      expert: (tokens [P, G, T], digits [P, 1, T]) -> the targets of GenRe2's expert term, if the method has it.
    """
    rollout = drop_greedy(groups.rollout, method)
    G = rollout.tokens.shape[1]
    rewards = {name: r[:, :G] for name, r in groups.rewards.items()}
    total = total_reward(groups.rewards, weights)
    verdicts = rewards[verdict] > 0.5
    if probe_reference is not None:
        probe_reference = jnp.broadcast_to(probe_reference, verdicts.shape)
    inputs = signals.compute_inputs(
        signals.SignalInputs(
            method,
            rollout,
            rewards,
            total[:, :G],
            total[:, -1] if total.shape[1] > G else None,
            verdict,
            groups.columns,
            kl,
            probe_reference,
        )
    )
    advantages, advantage_state = method.advantage.update(None, advantage_state, inputs)

    present = ~jnp.isnan(inputs.rewards)
    broken = (rollout.mask & ~jnp.isfinite(rollout.logprobs)).any(axis=-1)
    if kl is not None:
        broken |= (rollout.mask & ~jnp.isfinite(kl)).any(axis=-1)
    counts = present & ~broken & ~(rollout.truncated & mask_truncated)
    experience = Experience(
        rollout,
        rollout.mask & counts[..., None],
        advantages,
        auxiliary=auxiliary.make_data(
            method.loss,
            auxiliary.AuxiliaryInputs(rollout, verdicts, counts, groups.columns, probe_reference, expert),
        ),
    )
    real = rollout.mask.any(axis=-1)  # places that dynamic sampling could not fill are empty
    is_zero = (advantages.reshape(*present.shape, -1) == 0).all(axis=-1) | ~present
    metrics = {
        **_rollout_metrics(rollout, inputs.rewards, real),
        "completions/left_out_ratio": mean_where(1.0 - counts, real),
        "frac_advantage_zero": mean_where(is_zero.all(axis=1).astype(jnp.float32), real.any(axis=1)),
        "sampling/nonfinite_completions": broken.sum().astype(jnp.float32),
        **{f"rewards/{name}/mean": mean_where(r, ~jnp.isnan(r)) for name, r in rewards.items()},
        **{f"rewards/{name}/std": _std_where(r, ~jnp.isnan(r)) for name, r in rewards.items()},
        **signals.signal_metrics(inputs, method, real & present),
    }
    return Prepared(experience, advantage_state, metrics)


def _rollout_metrics(
    rollout: Rollout, total: Float[Array, "P G"], real: Bool[Array, "P G"]
) -> dict[str, Float[Array, ""]]:
    """Computes the metrics of total rewards and lengths, with TRL's names."""
    lengths, present = rollout.mask.sum(axis=-1).astype(jnp.float32), ~jnp.isnan(total)
    real_groups = real.any(axis=1, keepdims=True)
    _, std = group_deviation(total, present)
    return {
        "reward": mean_where(total, present),
        "reward_std": mean_where(std, present.any(axis=1, keepdims=True)),
        "frac_reward_zero_std": mean_where(group_tied(total, present).astype(jnp.float32), real_groups),
        "completions/mean_length": mean_where(lengths, real),
        "completions/min_length": jnp.where(real, lengths, jnp.inf).min(),
        "completions/max_length": lengths.max(),
        "completions/mean_terminated_length": mean_where(lengths, real & ~rollout.truncated),
        "completions/clipped_ratio": mean_where(rollout.truncated.astype(jnp.float32), real),
        "completions/missing_reward_ratio": mean_where(1.0 - present, real),
    }


def drop_greedy(rollout: Rollout, method: Method) -> Rollout:
    """Returns the completions that are learnt from: all but each group's greedy one, if the method has one."""
    if "greedy_rewards" not in method.signals:
        return rollout
    grouped = ("tokens", "mask", "logprobs", "truncated", "probe_logprobs")
    values = {name: getattr(rollout, name) for name in grouped}
    cut: dict[str, Any] = {name: None if x is None else x[:, :-1] for name, x in values.items()}
    return rollout._replace(**cut)


@jax.jit
def log_ratio(rollout: Rollout, ref_logprobs: Float[Array, "P G T"]) -> Float[Array, "P G T"]:
    """Computes log pi - log pi_ref per token; 0 on masked tokens."""
    return jnp.where(rollout.mask, rollout.logprobs - ref_logprobs, 0.0)


def empty_like(groups: Groups) -> Groups:
    """Returns groups of the same shapes without content: every token masked, every reward missing."""
    rollout = groups.rollout._replace(mask=jnp.zeros_like(groups.rollout.mask))
    return groups._replace(
        rollout=rollout, rewards={name: jnp.full_like(r, jnp.nan) for name, r in groups.rewards.items()}
    )


def mean_reward(groups: Groups, weights: Mapping[str, float], group_size: int) -> Float[Array, ""]:
    """Computes the mean total reward of the first `group_size` completions of each group; NaN if all are missing."""
    total = total_reward({name: r[:, :group_size] for name, r in groups.rewards.items()}, weights)
    return mean_where(total, ~jnp.isnan(total))


def mean_length(groups: Groups, group_size: int) -> Float[Array, ""]:
    """Computes the mean number of tokens of the first `group_size` completions of each group."""
    return groups.rollout.mask[:, :group_size].sum(axis=-1).mean(dtype=jnp.float32)


def fill(
    buffer: Groups, filled: Int[Array, ""], new: Groups, verdict: str, group_size: int | None = None
) -> tuple[Groups, Int[Array, ""], Float[Array, ""]]:
    """Writes the informative groups of `new` after the first `filled` groups of `buffer`, for dynamic sampling.

    A group is informative if some but not all of its completions are correct (DAPO, arXiv 2503.14476, eq. 11). The verdict decides, not the
    shaped reward, which may differ between correct answers. Only the first `group_size` completions decide (a greedy one may follow); None: all.

    Returns:
      The buffer, the number of groups in it (at most P), and the share of new groups that are informative.
    """
    verdicts = new.rewards[verdict][:, :group_size]
    known = ~jnp.isnan(verdicts)
    correct = ((verdicts > 0.5) & known).sum(axis=1)
    keep = (correct > 0) & (correct < known.sum(axis=1))
    P = keep.shape[0]
    places = jnp.where(keep, filled + jnp.cumsum(keep) - 1, P)  # P and larger: dropped
    buffer = jax.tree.map(lambda old, x: old.at[places].set(x, mode="drop"), buffer, new)
    return buffer, jnp.minimum(filled + keep.sum(), P), keep.mean(dtype=jnp.float32)


def _std_where(x: Array, where: Array) -> Float[Array, ""]:
    deviation = jnp.where(where, x - mean_where(x, where), 0.0)
    std = jnp.sqrt(jnp.square(deviation).sum() / jnp.maximum(where.sum() - 1, 1))
    return jnp.where(where.any(), std, jnp.nan)

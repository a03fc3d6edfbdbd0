"""From sampled and scored groups to what an update learns from: rewards, advantages, masks, metrics."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxrl_reason.advantages import AdvantageInputs, group_deviation, group_tied
from jaxrl_reason.learner import Experience
from jaxrl_reason.methods import Method
from jaxrl_reason.rollout import Rollout


class Groups(NamedTuple):
    """P scored groups. Where a method asks for a greedy completion, it is the group's last.

    Attributes:
      rollout: [P, G, ...] arrays (G + 1 with a greedy completion).
      rewards: name -> f32[P, G], unweighted; NaN where a reward gave none.
    """

    rollout: Rollout
    rewards: dict[str, jax.Array]


def total_reward(rewards: Mapping[str, jax.Array], weights: Mapping[str, float]) -> jax.Array:
    """Weighted sum over the rewards that are present; NaN where none of non-zero weight is. f32[P, G].

    Weights go by name: a dict that has been through jit comes back in another order.
    """
    total = jnp.zeros_like(next(iter(rewards.values())))
    present = jnp.zeros(total.shape, bool)
    for name, values in rewards.items():
        if weights[name]:
            total += jnp.where(jnp.isnan(values), 0.0, weights[name] * values)
            present |= ~jnp.isnan(values)
    return jnp.where(present, total, jnp.nan)


def make_prepare(method: Method, weights: Mapping[str, float], verdict: str, *, mask_truncated: bool) -> Callable:
    """The pure function between scoring and learning, to be jitted.

    Args:
      method: its chain computes the advantages.
      weights: reward name -> weight.
      verdict: the reward whose value > 0.5 means right.
      mask_truncated: leave completions without an end token out of the loss (not out of the statistics).

    Returns:
      prepare(groups, advantage_state, kl=None) -> (Experience, advantage_state, metrics), kl f32[P, G, T]
      being per-token logp - logp_ref where the method asks for it.
    """

    def prepare(groups: Groups, advantage_state, kl=None):
        rollout, rewards = groups
        total = total_reward(rewards, weights)
        verdicts = rewards[verdict] > 0.5
        greedy = None
        rollout = trained(rollout, method)
        if "greedy_rewards" in method.signals:
            greedy = total[:, -1]
            total, verdicts = total[:, :-1], verdicts[:, :-1]
            rewards = {name: r[:, :-1] for name, r in rewards.items()}
        inputs = AdvantageInputs(
            rewards=total,
            completion_mask=rollout.mask,
            verdicts=verdicts,
            greedy_rewards=greedy,
            truncated=rollout.truncated,
            kl=kl,
        )
        advantages, advantage_state = method.advantage.update(None, advantage_state, inputs)

        present = ~jnp.isnan(total)
        broken = (rollout.mask & ~jnp.isfinite(rollout.logprobs)).any(axis=-1)
        if kl is not None:
            broken |= (rollout.mask & ~jnp.isfinite(kl)).any(axis=-1)
        counts = present & ~broken & ~(rollout.truncated & mask_truncated)
        experience = Experience(rollout, rollout.mask & counts[..., None], advantages)

        lengths = rollout.mask.sum(axis=-1).astype(jnp.float32)
        real = lengths > 0  # places that dynamic sampling could not fill hold nothing
        real_groups = real.any(axis=1, keepdims=True)
        _, std = group_deviation(total, present)
        metrics = {
            "reward": _mean(total, present),
            "reward_std": _mean(std, present.any(axis=1, keepdims=True)),
            "frac_reward_zero_std": _mean(group_tied(total, present).astype(jnp.float32), real_groups),
            "completions/mean_length": _mean(lengths, real),
            "completions/min_length": jnp.where(real, lengths, jnp.inf).min(),
            "completions/max_length": lengths.max(),
            "completions/mean_terminated_length": _mean(lengths, real & ~rollout.truncated),
            "completions/clipped_ratio": _mean(rollout.truncated.astype(jnp.float32), real),
            "completions/missing_reward_ratio": _mean(1.0 - present, real),
            "sampling/nonfinite_completions": broken.sum().astype(jnp.float32),
            **{f"rewards/{name}/mean": _mean(r, ~jnp.isnan(r)) for name, r in rewards.items()},
            **{f"rewards/{name}/std": _std(r, ~jnp.isnan(r)) for name, r in rewards.items()},
        }
        return experience, advantage_state, metrics

    return prepare


def trained(rollout: Rollout, method: Method) -> Rollout:
    """The completions that are learnt from: all but each group's last, greedy one, where there is one."""
    if "greedy_rewards" not in method.signals:
        return rollout
    return rollout._replace(**{k: getattr(rollout, k)[:, :-1] for k in ("tokens", "mask", "logprobs", "truncated")})


@jax.jit
def log_ratio(rollout: Rollout, ref_logprobs: jax.Array) -> jax.Array:
    """Per-token log pi - log pi_ref, f32[P, G, T]; 0 where masked."""
    return jnp.where(rollout.mask, rollout.logprobs - ref_logprobs, 0.0)


def empty_like(groups: Groups) -> Groups:
    """Groups of the same shapes that teach nothing: every token masked, every reward missing."""
    rollout = groups.rollout._replace(mask=jnp.zeros_like(groups.rollout.mask))
    return Groups(rollout, {name: jnp.full_like(r, jnp.nan) for name, r in groups.rewards.items()})


def fill(buffer: Groups, filled: jax.Array, new: Groups, verdict: str):
    """Dynamic sampling: puts the informative groups of `new` behind the first `filled` of `buffer`.

    A group informs if some but not all of its completions are right: the verdict counts, not the shaped
    reward, which may differ between answers that are all right. DAPO, arXiv 2503.14476, eq. 11.

    Returns:
      (buffer, filled int32 scalar <= P, the share of new groups that inform).
    """
    verdicts = new.rewards[verdict]
    known = ~jnp.isnan(verdicts)
    right = ((verdicts > 0.5) & known).sum(axis=1)
    keep = (right > 0) & (right < known.sum(axis=1))
    P = keep.shape[0]
    places = jnp.where(keep, filled + jnp.cumsum(keep) - 1, P)  # P and beyond: dropped
    buffer = jax.tree.map(lambda old, x: old.at[places].set(x, mode="drop"), buffer, new)
    return buffer, jnp.minimum(filled + keep.sum(), P), keep.mean(dtype=jnp.float32)


def _mean(x, where):
    return jnp.where(where, x, 0.0).sum() / where.sum()  # NaN where nothing counts: there is no mean


def _std(x, where):
    deviation = jnp.where(where, x - _mean(x, where), 0.0)
    return jnp.sqrt(jnp.square(deviation).sum() / jnp.maximum(where.sum() - 1, 1))

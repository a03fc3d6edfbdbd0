"""From sampled and scored groups to what an update learns from: rewards, advantages, masks, metrics."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxrl_reason.advantages import AdvantageInputs, group_deviation, group_tied
from jaxrl_reason.methods import Method
from jaxrl_reason.metrics import token_confidence
from jaxrl_reason.rl.learner import Experience
from jaxrl_reason.rl.rollout import Rollout


class Groups(NamedTuple):
    """P scored groups. Where a method asks for a greedy completion, it is the group's last.

    Attributes:
      rollout: [P, G, ...] arrays (G + 1 with a greedy completion).
      rewards: name -> f32[P, G], unweighted; NaN where a reward gave none.
      columns: name -> [P, ...], arrays of the data that a method needs: `values`, f32[P]; `digits`, int32[P, T].
    """

    rollout: Rollout
    rewards: dict[str, jax.Array]
    columns: dict[str, jax.Array] = {}


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


def make_prepare(
    method: Method,
    weights: Mapping[str, float],
    verdict: str,
    *,
    mask_truncated: bool,
    expert: Callable[[jax.Array, jax.Array], jax.Array] | None = None,
) -> Callable:
    """The pure function between scoring and learning, to be jitted.

    Args:
      method: its chain computes the advantages.
      weights: reward name -> weight.
      verdict: the reward whose value > 0.5 means right.
      mask_truncated: leave completions without an end token out of the loss (not out of the statistics).
      expert: (tokens [P, G, T], digits [P, 1, T]) -> the targets of GenRe2's dense term, where the method has it.

    Returns:
      prepare(groups, advantage_state, kl=None, probe_reference=None) -> (Experience, advantage_state, metrics), kl f32[P, G, T]
      being per-token logp - logp_ref where the method asks for it, and probe_reference LaSeR's c_ref, an f32 scalar or [P, G].
    """

    def prepare(groups: Groups, advantage_state, kl=None, probe_reference=None):
        rollout = trained(groups.rollout, method)
        G = rollout.tokens.shape[1]
        rewards = {name: r[:, :G] for name, r in groups.rewards.items()}
        total = total_reward(rewards, weights)
        verdicts = rewards[verdict] > 0.5
        signals = {
            "verdicts": verdicts,
            "truncated": rollout.truncated,
            "kl": kl,
            "values": groups.columns.get("values"),
        }
        if "greedy_rewards" in method.signals:
            signals["greedy_rewards"] = total_reward(groups.rewards, weights)[:, -1]
        if "verdicts" in method.signals:  # without one, a completion is neither right nor wrong
            total = jnp.where(jnp.isnan(rewards[verdict]), jnp.nan, total)
        if "model_scores" in method.signals:
            signals["model_scores"] = rewards["reward_model"]
            total = jnp.where(jnp.isfinite(rewards["reward_model"]), total, jnp.nan)
        if "self_rewards" in method.signals:
            probe_reference = jnp.broadcast_to(probe_reference, verdicts.shape)
            signals["self_rewards"] = method.loss.self_reward.beta * (rollout.probe_logprobs - probe_reference)
        if "answer_confidence" in method.signals:
            signals["answer_confidence"] = token_confidence(rollout.logprobs, rollout.mask)
            signals["prompt_confidence"] = prompt_confidence(rollout)
        inputs = AdvantageInputs(rewards=total, completion_mask=rollout.mask, **signals)
        advantages, advantage_state = method.advantage.update(None, advantage_state, inputs)

        present = ~jnp.isnan(total)
        broken = (rollout.mask & ~jnp.isfinite(rollout.logprobs)).any(axis=-1)
        if kl is not None:
            broken |= (rollout.mask & ~jnp.isfinite(kl)).any(axis=-1)
        counts = present & ~broken & ~(rollout.truncated & mask_truncated)
        experience = Experience(rollout, rollout.mask & counts[..., None], advantages)
        if method.loss.self_reward:
            judged = counts & ~rollout.truncated & rollout.mask.any(axis=-1)
            experience = experience._replace(verdicts=verdicts, judged=judged, probe_reference=probe_reference)
        if expert is not None:
            experience = experience._replace(expert_tokens=expert(rollout.tokens, groups.columns["digits"][:, None]))

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
            **method_metrics(inputs, method.signals, real & present),
        }
        return experience, advantage_state, metrics

    return prepare


def prompt_confidence(rollout: Rollout) -> jax.Array:
    """ProGRPO's c(q), f32[P]: exp of the mean log-probability of the prompt's tokens, the first left out; 1 for a prompt of one."""
    mask = rollout.prompt_mask
    predicted = mask & (jnp.cumsum(mask, axis=1) > 1)
    mean = jnp.where(predicted, rollout.prompt_logprobs, 0.0).sum(axis=1) / jnp.maximum(predicted.sum(axis=1), 1)
    return jnp.exp(mean)


def method_metrics(inputs: AdvantageInputs, signals: frozenset[str], real: jax.Array) -> dict[str, jax.Array]:
    """What a method's own signals look like on this batch; f32 scalars.

    Args:
      inputs, signals: what the method asked for and got.
      real: bool[P, G], completions that exist and have a reward.
    """
    right, wrong = real & inputs.verdicts, real & ~inputs.verdicts
    metrics = {}
    if "model_scores" in signals:
        scores = inputs.model_scores
        _, spread = group_deviation(scores, real)
        metrics |= {
            "hero/score_spread": _mean(spread, real.sum(axis=1, keepdims=True) > 1),
            "hero/score_right": _mean(scores, right),
            "hero/score_wrong": _mean(scores, wrong),
        }
    if "values" in signals:
        values = jnp.broadcast_to(inputs.values[:, None], real.shape)
        worth = jnp.where(real, values, 0.0).sum()
        metrics |= {
            "rlev/value": _mean(values, real),
            "rlev/h_acc": jnp.where(right, values, 0.0).sum() / worth,
        }
    if "self_rewards" in signals:
        ended = ~inputs.truncated
        says_right = (inputs.self_rewards > 0.5).astype(jnp.float32)
        on_right, on_wrong = _mean(says_right, right & ended), _mean(1 - says_right, wrong & ended)
        metrics |= {
            "self_reward/right": _mean(inputs.self_rewards, right & ended),
            "self_reward/wrong": _mean(inputs.self_rewards, wrong & ended),
            "self_reward/accuracy_right": on_right,
            "self_reward/accuracy_wrong": on_wrong,
            "self_reward/f1": jnp.where(on_right + on_wrong == 0, 0.0, 2 * on_right * on_wrong / (on_right + on_wrong)),
        }
    if "answer_confidence" in signals:
        metrics |= {
            "progrpo/prompt_confidence": _mean(inputs.prompt_confidence[:, None], real.any(axis=1, keepdims=True)),
            "progrpo/answer_confidence": _mean(inputs.answer_confidence, real),
        }
    return metrics


def trained(rollout: Rollout, method: Method) -> Rollout:
    """The completions that are learnt from: all but each group's last, greedy one, where there is one."""
    if "greedy_rewards" not in method.signals:
        return rollout
    grouped = ("tokens", "mask", "logprobs", "truncated", "probe_logprobs")
    cut = {name: getattr(rollout, name) for name in grouped}
    return rollout._replace(**{name: None if x is None else x[:, :-1] for name, x in cut.items()})


@jax.jit
def log_ratio(rollout: Rollout, ref_logprobs: jax.Array) -> jax.Array:
    """Per-token log pi - log pi_ref, f32[P, G, T]; 0 where masked."""
    return jnp.where(rollout.mask, rollout.logprobs - ref_logprobs, 0.0)


def empty_like(groups: Groups) -> Groups:
    """Groups of the same shapes that teach nothing: every token masked, every reward missing."""
    rollout = groups.rollout._replace(mask=jnp.zeros_like(groups.rollout.mask))
    return groups._replace(
        rollout=rollout, rewards={name: jnp.full_like(r, jnp.nan) for name, r in groups.rewards.items()}
    )


def mean_reward(groups: Groups, weights: Mapping[str, float], group_size: int) -> jax.Array:
    """The mean total reward of the first `group_size` completions of each group, f32 scalar; NaN where all are missing."""
    total = total_reward({name: r[:, :group_size] for name, r in groups.rewards.items()}, weights)
    return _mean(total, ~jnp.isnan(total))


def fill(buffer: Groups, filled: jax.Array, new: Groups, verdict: str, group_size: int | None = None):
    """Dynamic sampling: puts the informative groups of `new` behind the first `filled` of `buffer`.

    A group informs if some but not all of its completions are right: the verdict counts, not the shaped
    reward, which may differ between answers that are all right. DAPO, arXiv 2503.14476, eq. 11. Only the first
    `group_size` completions are asked (a greedy one may ride along); None: all.

    Returns:
      (buffer, filled int32 scalar <= P, the share of new groups that inform).
    """
    verdicts = new.rewards[verdict][:, :group_size]
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

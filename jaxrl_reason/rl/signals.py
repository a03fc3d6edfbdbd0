"""The signals that methods ask for beyond rewards: one table entry per field of AdvantageInputs, with its metrics.

To add a signal, add a field to `advantages.AdvantageInputs` and an entry to `SIGNALS`. A method that does not name a signal compiles without it.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxrl_reason.advantages import AdvantageInputs, group_deviation
from jaxrl_reason.methods import Method
from jaxrl_reason.metrics import token_confidence
from jaxrl_reason.rl.types import Rollout


class SignalInputs(NamedTuple):
    """The data from which signals are computed."""

    method: Method  # the method that asks
    rollout: Rollout  # the completions that are learnt from
    rewards: Mapping[str, Float[Array, "P G"]]  # unweighted, by name; NaN if missing
    total: Float[Array, "P G"]  # the weighted total reward; NaN if missing
    greedy_total: Float[Array, " P"] | None  # the total reward of each group's greedy completion
    verdict: str  # the name of the reward whose value > 0.5 means correct
    columns: Mapping[str, Array]  # columns of the data by name
    kl: Float[Array, "P G T"] | None  # log pi - log pi_ref per token
    probe_reference: Float[Array, "P G"] | None  # c_ref of LaSeR


class Signal(NamedTuple):
    """How one signal is computed, and its requirements."""

    compute: Callable[[SignalInputs], Array | None]  # the field of AdvantageInputs
    # bool[P, G]; a completion without the signal counts as one without a reward. None: all have it.
    known: Callable[[SignalInputs], Array] | None = None
    # (inputs, bool[P, G] of the completions that have a reward) -> f32 scalars by name
    metrics: Callable[[AdvantageInputs, Array], dict[str, Array]] | None = None
    columns: tuple[str, ...] = ()  # columns of the data that `compute` reads
    rollout: str = ""  # the record that the sampler keeps for it: "greedy", "prompt_logprobs" or "probe"


def prompt_confidence(rollout: Rollout) -> Float[Array, " P"]:
    """Computes ProGRPO's c(q): exp of the mean log-probability of the prompt's tokens without the first; 1 for a prompt of one token."""
    mask = rollout.prompt_mask
    predicted = mask & (jnp.cumsum(mask, axis=1) > 1)
    mean = jnp.where(predicted, rollout.prompt_logprobs, 0.0).sum(axis=1) / jnp.maximum(predicted.sum(axis=1), 1)
    return jnp.exp(mean)


def _self_rewards(x: SignalInputs) -> Float[Array, "P G"]:
    return x.method.loss.find("self_reward").beta * (x.rollout.probe_logprobs - x.probe_reference)


def _score_metrics(inputs: AdvantageInputs, real: Bool[Array, "P G"]) -> dict[str, Array]:
    scores = inputs.model_scores
    _, spread = group_deviation(scores, real)
    return {
        "hero/score_spread": mean_where(spread, real.sum(axis=1, keepdims=True) > 1),
        "hero/score_correct": mean_where(scores, real & inputs.verdicts),
        "hero/score_incorrect": mean_where(scores, real & ~inputs.verdicts),
    }


def _value_metrics(inputs: AdvantageInputs, real: Bool[Array, "P G"]) -> dict[str, Array]:
    values = jnp.broadcast_to(inputs.values[:, None], real.shape)
    worth = jnp.where(real, values, 0.0).sum()
    return {
        "rlev/value": mean_where(values, real),
        "rlev/h_acc": jnp.where(real & inputs.verdicts, values, 0.0).sum() / worth,
    }


def _self_reward_metrics(inputs: AdvantageInputs, real: Bool[Array, "P G"]) -> dict[str, Array]:
    ended = ~inputs.truncated
    correct, incorrect = real & inputs.verdicts & ended, real & ~inputs.verdicts & ended
    predicts_correct = (inputs.self_rewards > 0.5).astype(jnp.float32)
    on_correct, on_incorrect = mean_where(predicts_correct, correct), mean_where(1 - predicts_correct, incorrect)
    f1 = jnp.where(on_correct + on_incorrect == 0, 0.0, 2 * on_correct * on_incorrect / (on_correct + on_incorrect))
    return {
        "self_reward/correct": mean_where(inputs.self_rewards, correct),
        "self_reward/incorrect": mean_where(inputs.self_rewards, incorrect),
        "self_reward/accuracy_correct": on_correct,
        "self_reward/accuracy_incorrect": on_incorrect,
        "self_reward/f1": f1,
    }


def _confidence_metrics(inputs: AdvantageInputs, real: Bool[Array, "P G"]) -> dict[str, Array]:
    of_prompts, of_answers = inputs.prompt_confidence[:, None], inputs.answer_confidence
    return {
        "progrpo/prompt_confidence": mean_where(of_prompts, real.any(axis=1, keepdims=True) & jnp.isfinite(of_prompts)),
        "progrpo/answer_confidence": mean_where(of_answers, real & jnp.isfinite(of_answers)),
    }


SIGNALS: dict[str, Signal] = {
    "verdicts": Signal(
        lambda x: x.rewards[x.verdict] > 0.5,
        known=lambda x: (
            ~jnp.isnan(x.rewards[x.verdict])
        ),  # without a verdict, a completion is neither correct nor incorrect
    ),
    "truncated": Signal(lambda x: x.rollout.truncated),
    "kl": Signal(lambda x: x.kl),
    "greedy_rewards": Signal(lambda x: x.greedy_total, rollout="greedy"),
    "values": Signal(lambda x: x.columns["values"], metrics=_value_metrics, columns=("values",)),
    "model_scores": Signal(
        lambda x: x.rewards["reward_model"],
        known=lambda x: jnp.isfinite(x.rewards["reward_model"]),
        metrics=_score_metrics,
    ),
    "self_rewards": Signal(_self_rewards, metrics=_self_reward_metrics, rollout="probe"),
    "prompt_confidence": Signal(lambda x: prompt_confidence(x.rollout), rollout="prompt_logprobs"),
    "answer_confidence": Signal(
        lambda x: token_confidence(x.rollout.logprobs, x.rollout.mask), metrics=_confidence_metrics
    ),
}
ALWAYS = ("verdicts", "truncated", "kl")  # supplied to every method, kl only if the run measures it: they cost nothing


def compute_inputs(x: SignalInputs) -> AdvantageInputs:
    """Computes the signals of `x.method`; a completion without one of them has no reward."""
    asked = [name for name in SIGNALS if name in x.method.signals]
    total = x.total
    for name in asked:
        if known := SIGNALS[name].known:
            total = jnp.where(known(x), total, jnp.nan)
    fields = {name: SIGNALS[name].compute(x) for name in dict.fromkeys((*ALWAYS, *asked))}
    return AdvantageInputs(rewards=total, completion_mask=x.rollout.mask, **fields)


def signal_metrics(inputs: AdvantageInputs, method: Method, real: Bool[Array, "P G"]) -> dict[str, jax.Array]:
    """Computes the metrics of the signals of a method. `real` completions exist and have a reward."""
    tables = (SIGNALS[name].metrics for name in SIGNALS if name in method.signals)
    return {name: value for table in tables if table for name, value in table(inputs, real).items()}


def mean_where(x: Array, where: Array) -> Float[Array, ""]:
    """Returns the mean over the entries for which `where` holds; NaN if there are none."""
    return jnp.where(where, x, 0.0).sum() / where.sum()

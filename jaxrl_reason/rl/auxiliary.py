"""The auxiliary losses: terms that a method adds to its policy loss, one table entry each, with their metrics.

To add one, add its settings to a method's `PolicyLoss.auxiliary` (a frozen dataclass with a `name`, see `methods.SelfReward`) and an entry to
`AUXILIARY`. A method without auxiliary losses compiles without them.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxrl_reason import losses
from jaxrl_reason.methods import ExpertDigits, PolicyLoss, SelfReward
from jaxrl_reason.rl.types import LogProbs, Rollout


class AuxiliaryInputs(NamedTuple):
    """The scored groups from which an auxiliary loss takes its data."""

    rollout: Rollout  # the completions that are learnt from
    verdicts: Bool[Array, "P G"]  # whether each is correct
    counts: Bool[Array, "P G"]  # completions that count in the loss
    columns: Mapping[str, Array]  # columns of the data by name
    probe_reference: Float[Array, "P G"] | None  # c_ref of LaSeR
    expert: (
        Callable[[Array, Array], Array] | None
    )  # (tokens [P, G, T], digits [P, 1, T]) -> targets of GenRe2's expert term


class AuxiliaryLoss(NamedTuple):
    """How one auxiliary loss is computed.

    `settings` is the method's entry. `data` is an array [P, G] or [P, G, T], or a (nested) dict of such arrays.
    """

    data: Callable[[Any, AuxiliaryInputs], Any]  # (settings, inputs) -> data, kept in `Experience.auxiliary`
    # (settings, data, LogProbs, mask [P, G, T], Totals, counts) -> f32 scalar: a sum over part of a minibatch, divided by counts of the
    # whole minibatch. So the losses of microbatches add up.
    loss: Callable[..., jax.Array]
    # (data, mask [P, G, T]) -> data without the completions that the mask leaves out
    restrict: Callable[[Any, Array], Any] = lambda data, mask: data
    counts: Callable[[Any], Any] = lambda data: ()  # counts of the whole minibatch, a pytree of scalars
    # The number of training steps before the loss begins; until then `restrict`, which such a loss needs, gets an empty mask.
    from_step: Callable[[Any], int] = lambda settings: 0
    # int32[P, G, T], other tokens whose log-probabilities the loss reads at the same positions; None: no tokens
    targets: Callable[[Any], Array] | None = None
    columns: tuple[str, ...] = ()  # columns of the data set that `data` reads
    rollout: str = ""  # the record that the sampler and the trainer keep for it: "probe", or "" for none


def _judged(settings: SelfReward, x: AuxiliaryInputs) -> dict[str, Array]:
    """Returns the verdicts that the self-rewards predict, the completions that ended and count, and c_ref."""
    valid = x.counts & ~x.rollout.truncated & x.rollout.mask.any(axis=-1)
    return {"verdicts": x.verdicts, "valid": valid, "reference": x.probe_reference}


def _self_reward_loss(settings: SelfReward, data: dict, logprobs: LogProbs, mask, totals, counts) -> jax.Array:
    valid = data["valid"] & jnp.isfinite(logprobs.probe_logprobs)
    self_rewards = settings.beta * (jnp.where(valid, logprobs.probe_logprobs, 0.0) - data["reference"])
    return losses.self_reward_loss(self_rewards, data["verdicts"], valid, total=counts)


def _expert_tokens(settings: ExpertDigits, x: AuxiliaryInputs) -> Int[Array, "P G T"]:
    return x.expert(x.rollout.tokens, x.columns["digits"][:, None])


def _expert_loss(settings: ExpertDigits, data, logprobs: LogProbs, mask, totals: losses.Totals, counts) -> jax.Array:
    return -losses.masked_sum(logprobs.targets[settings.name], mask) / totals.tokens


AUXILIARY: dict[str, AuxiliaryLoss] = {
    SelfReward.name: AuxiliaryLoss(
        data=_judged,
        loss=_self_reward_loss,
        restrict=lambda data, mask: data | {"valid": data["valid"] & mask.any(axis=-1)},
        counts=lambda data: losses.class_totals(data["verdicts"], data["valid"]),
        from_step=lambda settings: settings.warmup_steps,
        rollout="probe",
    ),
    ExpertDigits.name: AuxiliaryLoss(
        data=_expert_tokens, loss=_expert_loss, targets=lambda data: data, columns=("digits",)
    ),
}


def make_data(loss: PolicyLoss, x: AuxiliaryInputs) -> dict[str, Any]:
    """Returns the data of every auxiliary loss of a method, by name.

    Raises ValueError for an array that is not [P, G] or [P, G, T]: an update takes single completions out of it.
    """
    data = {settings.name: AUXILIARY[settings.name].data(settings, x) for settings in loss.auxiliary}
    allowed = x.counts.shape, x.rollout.tokens.shape
    for name, tree in data.items():
        if wrong := [leaf.shape for leaf in jax.tree.leaves(tree) if leaf.shape not in allowed]:
            raise ValueError(
                f"The data of the auxiliary loss {name!r} have the shape {wrong[0]}, which must be [P, G] = {allowed[0]} or "
                f"[P, G, T] = {allowed[1]}; broadcast values of prompts over their group."
            )
    return data


def restrict(auxiliary: Mapping[str, Any], mask: Bool[Array, "P G T"]) -> dict[str, Any]:
    """Returns the data without the completions that the mask leaves out."""
    return {name: AUXILIARY[name].restrict(data, mask) for name, data in auxiliary.items()}


def at_step(loss: PolicyLoss, auxiliary: Mapping[str, Any], mask: Bool[Array, "P G T"], step: Any) -> dict[str, Any]:
    """Returns the data for step number `step`, from 0. Before a loss begins, its data contain no completions.

    Raises ValueError for a loss that begins later and has no `restrict`.
    """
    found, defaults = dict(auxiliary), AuxiliaryLoss._field_defaults
    for settings in loss.auxiliary:
        entry = AUXILIARY[settings.name]
        if entry.from_step is not defaults["from_step"] and entry.restrict is defaults["restrict"]:
            raise ValueError(
                f"The auxiliary loss {settings.name!r} has from_step and no restrict, so it cannot begin later; give its entry a restrict."
            )
        active = mask & (step >= entry.from_step(settings))
        found[settings.name] = entry.restrict(found[settings.name], active)
    return found


def targets(auxiliary: Mapping[str, Any]) -> dict[str, Int[Array, "P G T"]]:
    """Returns the other tokens to be scored, by the name of the loss that reads them."""
    return {name: AUXILIARY[name].targets(data) for name, data in auxiliary.items() if AUXILIARY[name].targets}


def needs_probe(loss: PolicyLoss) -> bool:
    """Returns whether an auxiliary loss reads the log-probability of the probe token."""
    return any(AUXILIARY[settings.name].rollout == "probe" for settings in loss.auxiliary)


def loss_and_metrics(
    loss: PolicyLoss,
    auxiliary: Mapping[str, Any],
    logprobs: LogProbs,
    mask: Bool[Array, "P G T"],
    totals: losses.Totals,
    counts: Mapping[str, Any],
) -> tuple[Float[Array, ""] | float, dict[str, jax.Array]]:
    """Computes the weighted sum of the auxiliary losses, and each of them as the metric `<name>/loss`.

    `totals` and `counts` are of the whole minibatch, `counts` by the name of the auxiliary loss; `mask` is True on tokens that count.
    """
    total, metrics = 0.0, {}
    for settings in loss.auxiliary:
        name = settings.name
        term = AUXILIARY[name].loss(settings, auxiliary[name], logprobs, mask, totals, counts[name])
        metrics[f"{name}/loss"] = term
        total += settings.coefficient * term
    return total, metrics

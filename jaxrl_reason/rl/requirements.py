"""The requirements of a run, computed once from its configuration and its method."""

import dataclasses

from jaxrl_reason.config import Config
from jaxrl_reason.methods import Method
from jaxrl_reason.rl.auxiliary import AUXILIARY, AuxiliaryLoss
from jaxrl_reason.rl.signals import Signal, SIGNALS


@dataclasses.dataclass(frozen=True)
class Requirements:
    """The signals that the sampler records, the columns of the data, and the forwards that a step computes."""

    greedy: bool  # each group has one more completion, the greedy one
    prompt_logprobs: bool  # the sampler records the log-probabilities of the prompts
    probe: bool  # the sampler and the trainer record the log-probability of the probe token
    columns: tuple[str, ...]  # columns of the data that belong to each group
    old_logprobs: bool  # the updates read log-probabilities under the policy before the first of them
    # The sampler's own log-probabilities serve as old ones. A float32 sampler agrees with the trainer to 1e-5; the completions of other
    # samplers are scored again.
    exact_sampler: bool
    kl: bool  # a step measures KL(policy || reference)
    reference: bool  # a step scores its completions under the reference policy


def requirements(config: Config, method: Method) -> Requirements:
    """Returns the requirements of a run with this method."""
    signals = [signal for name, signal in SIGNALS.items() if name in method.signals]
    auxiliary = [AUXILIARY[settings.name] for settings in method.loss.auxiliary]
    entries: list[Signal | AuxiliaryLoss] = [*signals, *auxiliary]
    recorded = {entry.rollout for entry in entries}
    quantized, model = bool(config.sampling.quantize), config.model
    exact_sampler = model.compute_dtype == model.param_dtype == "float32" and not quantized
    kl = config.update.kl_coefficient > 0 or "kl" in method.signals
    self_reward = method.loss.find("self_reward")
    return Requirements(
        greedy="greedy" in recorded,
        prompt_logprobs="prompt_logprobs" in recorded,
        probe="probe" in recorded,
        columns=tuple(dict.fromkeys(name for entry in entries for name in entry.columns)),
        old_logprobs=config.update.epochs * config.update.minibatches > 1
        or ("kl" in method.signals and not exact_sampler),
        exact_sampler=exact_sampler,
        kl=kl,
        reference=kl or bool(self_reward and self_reward.reference == "exact"),
    )

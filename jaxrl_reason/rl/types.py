"""The arrays of one training step, from sampling to the update: P prompts, G completions per prompt, S prompt tokens, T completion tokens."""

from typing import Any, NamedTuple

import jax
from jaxtyping import Array, Bool, Float, Int

from jaxrl_reason import models


class Rollout(NamedTuple):
    """G completions for each of P prompts, with at most T tokens per completion.

    Attributes:
      prompt_tokens: prompts, padded on the left or the right.
      prompt_mask: True on real prompt tokens.
      tokens: completions, `pad_id` after the end.
      mask: True on sampled tokens, the end token included.
      logprobs: log-probability of each token under the distribution that sampled it (temperature and legal tokens included; greedy
        completions: at temperature 1). 0 if the mask is False.
      truncated: True if the budget ran out before an end token. False throughout if no token ends a completion (numbers of a fixed length).
      features: numbers that belong to the prompts in addition to their tokens, or None.
      prompt_logprobs: log-probability of each prompt token given its prefix, at temperature 1. 0 on the first real token and if
        prompt_mask is False. None unless asked for.
      probe_logprobs: log-probability of the probe token right after the end token, at the probe temperature. 0 if truncated. None unless
        asked for.
    """

    prompt_tokens: Int[Array, "P S"]
    prompt_mask: Bool[Array, "P S"]
    tokens: Int[Array, "P G T"]
    mask: Bool[Array, "P G T"]
    logprobs: Float[Array, "P G T"]
    truncated: Bool[Array, "P G"]
    features: Float[Array, "P F"] | None = None
    prompt_logprobs: Float[Array, "P S"] | None = None
    probe_logprobs: Float[Array, "P G"] | None = None


class Groups(NamedTuple):
    """P scored groups. If a method asks for a greedy completion, it is the last one of each group.

    Attributes:
      rollout: the completions, G + 1 per prompt with a greedy one.
      rewards: the unweighted rewards by name; NaN if a reward gave none.
      columns: columns of the data that a method needs, by name: `values`, f32[P]; `digits`, int32[P, T].
    """

    rollout: Rollout
    rewards: dict[str, Float[Array, "P G"]]
    columns: dict[str, Array] = {}


class Experience(NamedTuple):
    """The data of an update.

    Attributes:
      rollout: the completions.
      mask: tokens that count in the loss: rollout.mask without completions that are left out (missing rewards, truncated completions if
        configured, padding groups).
      advantages: one number per completion or per token.
      old_logprobs: under the policy before the first update. None with one update per rollout: then they are the current
        log-probabilities, and the ratio is exactly 1.
      ref_logprobs: under the reference policy, or None.
      auxiliary: the data of each auxiliary loss by its name, with leading axis P, see `rl.auxiliary`.
    """

    rollout: Rollout
    mask: Bool[Array, "P G T"]
    advantages: Float[Array, "P G"] | Float[Array, "P G T"]
    old_logprobs: Float[Array, "P G T"] | None = None
    ref_logprobs: Float[Array, "P G T"] | None = None
    auxiliary: dict[str, Any] = {}


class LogProbs(NamedTuple):
    """Log-probabilities of P x G completions. Values after the end of a completion have no meaning.

    Attributes:
      logprobs: of every token under the distribution that samples.
      entropy: of that distribution, in nats.
      targets: of other tokens at the same positions, by the name of the auxiliary loss that asked for them.
      probe_logprobs: of the probe token right after the end token, or None. Values of truncated completions have no meaning.
    """

    logprobs: Float[Array, "P G T"]
    entropy: Float[Array, "P G T"]
    targets: dict[str, Float[Array, "P G T"]] = {}
    probe_logprobs: Float[Array, "P G"] | None = None


class Mismatch(NamedTuple):
    """The unmasked token on whose log-probability the sampler and the trainer differ most.

    Attributes:
      difference: the trainer's log-probability minus the sampler's, in nats.
      prompt, sample, position: its indices in [P, G, T].
    """

    difference: Float[Array, ""]
    prompt: Int[Array, ""]
    sample: Int[Array, ""]
    position: Int[Array, ""]


class TrainState(NamedTuple):
    """Everything that a run carries from step to step; the content of a checkpoint.

    Attributes:
      step: steps done in the current phase.
      trained: the weights that the optimizer changes: all of them, or the LoRA adapters.
      frozen: the other weights; empty if all are trained.
      opt_state: optax state, in float32 whatever the weights are.
      advantage_state: state of the method's advantage chain.
      data_position: prompt batches drawn from the data so far.
    """

    step: Int[Array, ""]
    trained: models.Params
    frozen: models.Params
    opt_state: Any
    advantage_state: Any
    data_position: Int[Array, ""]

    @property
    def params(self) -> models.Params:
        """All weights of the policy."""
        return models.lora.join(self.trained, self.frozen)


class UpdateResult(NamedTuple):
    """The result of an update: the new state, f32 scalars by metric name, and the token with the largest mismatch before the update."""

    state: TrainState
    metrics: dict[str, jax.Array]
    mismatch: Mismatch


class Prepared(NamedTuple):
    """The result of `make_experience`: the data of the update, the new state of the advantage chain, and metrics."""

    experience: Experience
    advantage_state: Any
    metrics: dict[str, jax.Array]


class Gradient(NamedTuple):
    """The gradient of one minibatch.

    Attributes:
      grads: of the trained weights, their structure.
      metrics: f32 scalars by name.
      difference: per completion, the largest difference between the trainer's and the sampler's log-probability of a token.
      position: the position of that token.
    """

    grads: Any
    metrics: dict[str, jax.Array]
    difference: Float[Array, "P G"]
    position: Int[Array, "P G"]

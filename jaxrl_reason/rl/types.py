"""The arrays of one training step, from sampling to the update: P prompts, G completions per prompt, S prompt tokens, T completion tokens."""

from typing import Any, NamedTuple

import jax
from jaxtyping import Array, Bool, Float, Int

from jaxrl_reason import models
from jaxrl_reason.models.decoding.rollout import Rollout


class Groups(NamedTuple):
    """P scored groups. If a method asks for a greedy completion, it is the last one of each group."""

    rollout: Rollout  # G + 1 completions per prompt with a greedy one
    rewards: dict[str, Float[Array, "P G"]]  # unweighted, by name; NaN if a reward gave none
    columns: dict[str, Array] = {}  # columns of the data that a method needs: `values`, f32[P]; `digits`, int32[P, T]


class Experience(NamedTuple):
    """The data of an update."""

    rollout: Rollout
    # Tokens that count in the loss: rollout.mask without completions that are left out (missing rewards, truncated completions if
    # configured, padding groups).
    mask: Bool[Array, "P G T"]
    advantages: Float[Array, "P G"] | Float[Array, "P G T"]
    # Under the policy before the first update. None with one update per rollout: then they are the current ones, and the ratio is 1.
    old_logprobs: Float[Array, "P G T"] | None = None
    ref_logprobs: Float[Array, "P G T"] | None = None  # under the reference policy
    auxiliary: dict[str, Any] = {}  # data of each auxiliary loss by its name, see `rl.auxiliary`


class LogProbs(NamedTuple):
    """Log-probabilities of P x G completions. Values after the end of a completion have no meaning."""

    logprobs: Float[Array, "P G T"]  # of every token under the distribution that samples
    entropy: Float[Array, "P G T"]  # of that distribution, in nats
    targets: dict[str, Float[Array, "P G T"]] = {}  # of other tokens at the same positions, by auxiliary loss
    probe_logprobs: Float[Array, "P G"] | None = None  # of the probe token right after the end; no meaning if truncated


class Mismatch(NamedTuple):
    """The unmasked token on whose log-probability the sampler and the trainer differ most, by its indices in [P, G, T]."""

    difference: Float[Array, ""]  # the trainer's log-probability minus the sampler's, in nats
    prompt: Int[Array, ""]
    sample: Int[Array, ""]
    position: Int[Array, ""]


class TrainState(NamedTuple):
    """Everything that a run carries from step to step; the content of a checkpoint."""

    step: Int[Array, ""]  # steps done in the current phase
    trained: models.Params  # the weights that the optimizer changes: all of them, or the LoRA adapters
    frozen: models.Params  # the other weights; empty if all are trained
    opt_state: Any  # optax state, in float32 whatever the weights are
    advantage_state: Any  # state of the method's advantage chain
    data_position: Int[Array, ""]  # prompt batches drawn from the data so far

    @property
    def params(self) -> models.Params:
        """All weights of the policy."""
        return models.lora.join(self.trained, self.frozen)


class UpdateResult(NamedTuple):
    """The result of an update."""

    state: TrainState
    metrics: dict[str, jax.Array]  # f32 scalars
    mismatch: Mismatch  # before the update


class Prepared(NamedTuple):
    """The result of `make_experience`."""

    experience: Experience
    advantage_state: Any  # the new state of the advantage chain
    metrics: dict[str, jax.Array]  # f32 scalars


class Gradient(NamedTuple):
    """The gradient of one minibatch, and per completion the token with the largest mismatch."""

    grads: Any  # structure of the trained weights
    metrics: dict[str, jax.Array]  # f32 scalars
    difference: Float[Array, "P G"]  # the trainer's log-probability of that token minus the sampler's
    position: Int[Array, "P G"]  # the position of that token


class Step(NamedTuple):
    """The result of one training step."""

    state: TrainState
    groups: Groups
    batch: Experience
    mismatch: Mismatch  # before the update
    metrics: dict[str, float]

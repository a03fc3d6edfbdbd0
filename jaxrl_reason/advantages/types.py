"""The types of advantage transformations: their inputs, and a pair of pure functions."""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

from jax import Array
from jaxtyping import Bool, Float, Shaped

PerCompletion: TypeAlias = Float[Array, "P G"]
Advantages: TypeAlias = Float[Array, "P G *T"]  # per completion, or per token: [P, G, T]


class AdvantageInputs(NamedTuple):
    """The arrays that a chain may read. Every field but the first two may be None.

    Attributes:
      rewards: verdict of the verifier or scalar reward; NaN if the completion has no reward.
      completion_mask: nonzero on sampled tokens, the end token included.
      verdicts: whether each completion is correct, if rewards are shaped or summed. None means rewards > 0.5.
      greedy_rewards: reward of the greedy completion of each prompt (ReMax); NaN if it has none.
      model_scores: scores of a reward model (HERO).
      values: human value of each prompt, in [0, 1] (RLEV).
      self_rewards: the policy's own score of each completion (LaSeR).
      prompt_confidence, answer_confidence: c(q) and c(o|q) (ProGRPO).
      truncated: whether a completion has no end token within the budget.
      kl: log-probability minus reference log-probability of each token, if KL enters the reward.
    """

    rewards: Float[Array, "P G"]
    completion_mask: Shaped[Array, "P G T"]
    verdicts: Bool[Array, "P G"] | None = None
    greedy_rewards: Float[Array, " P"] | None = None
    model_scores: Float[Array, "P G"] | None = None
    values: Float[Array, " P"] | None = None
    self_rewards: Float[Array, "P G"] | None = None
    prompt_confidence: Float[Array, " P"] | None = None
    answer_confidence: Float[Array, "P G"] | None = None
    truncated: Bool[Array, "P G"] | None = None
    kl: Float[Array, "P G T"] | None = None


class AdvantageTransform(NamedTuple):
    """A pair of pure functions. The state is a pytree that is checkpointed with the run."""

    init: Callable[[], Any]  # () -> state
    update: Callable[[Any, Any, AdvantageInputs], tuple[Advantages, Any]]  # of (advantages, state, inputs)


def stateless(function: Callable[[Any, AdvantageInputs], Advantages]) -> AdvantageTransform:
    """Returns a transformation without state, from a function (advantages, inputs) -> advantages.

    Example:
      >>> inputs = AdvantageInputs(jnp.array([[1.0, 0.0]]), jnp.ones((1, 2, 3)))
      >>> print(stateless(lambda advantages, inputs: 2 * advantages).update(inputs.rewards, (), inputs)[0])
      [[2. 0.]]
    """
    return AdvantageTransform(lambda: (), lambda adv, state, inputs: (function(adv, inputs), state))

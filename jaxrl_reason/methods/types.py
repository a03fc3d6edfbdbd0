"""The types of methods: frozen values that the registry builds."""

from collections.abc import Mapping
import dataclasses
from typing import Any, ClassVar

from jaxrl_reason.advantages import AdvantageInputs, AdvantageTransform, chain
from jaxrl_reason.losses import AGGREGATIONS, RATIOS


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExpertDigits:
    """GenRe2's expert term, arXiv 2512.06533: cross-entropy on the digits that bring a prefix nearest to the target."""

    name: ClassVar[str] = "expert"
    coefficient: float  # its weight

    def __post_init__(self):
        if self.coefficient < 0:
            raise ValueError(f"method.expert_coefficient is {self.coefficient}; it must be at least 0.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SelfReward:
    """LaSeR's self-reward beta_v * (log pi(z | x, y, <end>) - c_ref) and its loss, arXiv 2510.14943.

    Attributes:
      coefficient, beta: weight of `losses.self_reward_loss`, and beta_v.
      warmup_steps: number of training steps before the loss starts.
      reference: c_ref. "constant" is its mean over completions of the policy at the start of RL, "exact" the
        log-probability under the reference policy for each completion.
      token: z, as text of one token; empty means the tokenizer's padding token.
    """

    name: ClassVar[str] = "self_reward"
    coefficient: float = 0.1
    beta: float = 0.1
    warmup_steps: int = 200
    reference: str = "constant"
    token: str = ""

    def __post_init__(self):
        if self.coefficient < 0 or self.warmup_steps < 0:
            raise ValueError(
                f"laser: alpha is {self.coefficient} and reasoning_warmup is {self.warmup_steps}; both must be at least 0."
            )
        if self.beta <= 0:
            raise ValueError(f"laser: beta_v is {self.beta}; it must be greater than 0.")
        if self.reference not in ("constant", "exact"):
            raise ValueError(f"laser: reference is {self.reference!r}; it must be 'constant' or 'exact'.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PolicyLoss:
    """The keywords of `losses.policy_loss`, as a value, and the auxiliary losses, which `rl.auxiliary` computes."""

    clip_low: float = 0.2
    clip_high: float = 0.2
    dual_clip: float | None = None
    ratio: str = "token"
    aggregation: str = "token_mean"
    constant: float | None = None
    auxiliary: tuple[Any, ...] = ()  # settings: frozen dataclasses with a `name` and a `coefficient`

    def __post_init__(self):
        for field, value, allowed in (("ratio", self.ratio, RATIOS), ("aggregation", self.aggregation, AGGREGATIONS)):
            if value not in allowed:
                raise ValueError(f"method.{field} is {value!r}; it must be one of {allowed}.")
        if self.clip_low < 0 or self.clip_high < 0:
            raise ValueError(
                f"method.clip_low and method.clip_high are {self.clip_low} and {self.clip_high}; "
                "they are widths around 1 and must be at least 0."
            )
        if self.dual_clip is not None and self.dual_clip <= 1:
            raise ValueError(f"method.dual_clip is {self.dual_clip}; it must be greater than 1.")

    def find(self, name: str) -> Any:
        """Returns the settings of an auxiliary loss by its name; None if the method does not have it."""
        return next((settings for settings in self.auxiliary if settings.name == name), None)

    def policy_keywords(self) -> dict[str, Any]:
        """Returns the keywords of `losses.policy_loss`."""
        return {k: getattr(self, k) for k in ("clip_low", "clip_high", "dual_clip", "ratio", "aggregation", "constant")}


@dataclasses.dataclass(frozen=True)
class Method:
    """An advantage chain, a policy loss, and what both need.

    Attributes:
      advantage: the chain from rewards to advantages. A bare transformation becomes a chain.
      signals: the fields of AdvantageInputs that the chain needs beyond rewards and completion_mask.
      dynamic_sampling: whether the run keeps a group only if some but not all of its completions are correct, and
        refills the batch with further prompts (DAPO, arXiv 2503.14476, section 3.2).
      divides_by_group_std: whether the chain divides by the standard deviation of a group, or by its mean. A factor on
        the rewards of a prompt then cancels, so a weight of prompts has to multiply the advantage.
      nonnegative_rewards: whether negative rewards are refused.
      name: the name that created it.
    """

    advantage: AdvantageTransform
    loss: PolicyLoss
    signals: frozenset[str] = frozenset()
    dynamic_sampling: bool = False
    divides_by_group_std: bool = False
    nonnegative_rewards: bool = False
    name: str = ""

    def __post_init__(self):
        object.__setattr__(self, "signals", frozenset(self.signals))  # from a set or a list too: a method is hashed
        unknown = sorted(self.signals - set(AdvantageInputs._fields))
        if unknown:
            raise ValueError(f"A method asks for the signals {unknown}, which AdvantageInputs does not have.")
        object.__setattr__(self, "advantage", chain(self.advantage))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Extension:
    """The part that a method adds to its estimator: at most one transformation per slot, and fields of the loss.

    A stack applies the slots in this order, with the estimator between the second and the third. Several methods of a
    stack that fill one slot apply in the order of their names.

    Attributes:
      replace_reward: puts another reward in place of the reward.
      scale_reward, scale_advantage: weigh the reward, or the advantage.
      add, mix: add to the advantage, or mix it with another one.
      loss: values of fields of PolicyLoss.
      auxiliary: settings of auxiliary losses, added to the estimator's.
      judges: whether it needs verdicts (correct or incorrect).
      gives_reward: whether it brings a reward without verdicts.
    """

    replace_reward: AdvantageTransform | None = None
    scale_reward: AdvantageTransform | None = None
    scale_advantage: AdvantageTransform | None = None
    add: AdvantageTransform | None = None
    mix: AdvantageTransform | None = None
    loss: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    auxiliary: tuple[Any, ...] = ()
    signals: frozenset[str] = frozenset()
    judges: bool = False
    gives_reward: bool = False

"""Methods: an advantage chain, a policy loss and the signals both need, a dozen lines each.

To add one, decorate a function with keyword-only parameters; its name becomes `config.method.name`
and its parameters become `config.method.*`:

    @register
    def centered_reinforce(*, clip: float = 0.2):
      '''REINFORCE with a group baseline.'''
      return Method(chain(center_by_group()), PolicyLoss(clip_low=clip, clip_high=clip))
"""

from collections.abc import Callable
import dataclasses
import difflib
import inspect

from jaxrl_reason.advantages import (
    AdvantageInputs,
    AdvantageTransform,
    center_by_group,
    chain,
    leave_one_out,
    soft_overlong_penalty,
    standardize_by_group,
    subtract_greedy,
    whiten_by_token,
)
from jaxrl_reason.losses import AGGREGATIONS, RATIOS


@dataclasses.dataclass(frozen=True, kw_only=True)
class PolicyLoss:
    """The keywords of `losses.policy_loss`, as a value."""

    clip_low: float = 0.2
    clip_high: float = 0.2
    dual_clip: float | None = None
    ratio: str = "token"
    aggregation: str = "token_mean"
    constant: float | None = None

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


@dataclasses.dataclass(frozen=True)
class Method:
    """What distinguishes one method from another.

    Attributes:
      advantage: the chain from rewards to advantages.
      loss: the policy loss.
      signals: fields of AdvantageInputs that the chain needs beyond rewards and completion_mask.
      dynamic_sampling: keep a group only if some but not all of its completions are right, and refill
        the batch with further prompts (DAPO, arXiv 2503.14476, section 3.2).
      name: what it was created as.
    """

    advantage: AdvantageTransform
    loss: PolicyLoss
    signals: frozenset[str] = frozenset()
    dynamic_sampling: bool = False
    name: str = ""

    def __post_init__(self):
        unknown = sorted(set(self.signals) - set(AdvantageInputs._fields))
        if unknown:
            raise ValueError(f"A method asks for the signals {unknown}, which AdvantageInputs does not have.")


_REGISTRY: dict[str, Callable[..., Method]] = {}


def register(factory: Callable[..., Method]) -> Callable[..., Method]:
    """Makes `factory(**keywords) -> Method` available to `create` under its function name."""
    if factory.__name__ in _REGISTRY:
        raise ValueError(f"A method named {factory.__name__!r} is registered already.")
    for parameter in inspect.signature(factory).parameters.values():
        if parameter.kind is not parameter.KEYWORD_ONLY or parameter.default is parameter.empty:
            raise TypeError(
                f"Method {factory.__name__!r}: parameter {parameter.name!r} must be keyword-only and have a default."
            )
    _REGISTRY[factory.__name__] = factory
    return factory


def names() -> tuple[str, ...]:
    """The registered methods, in order of registration."""
    return tuple(_REGISTRY)


def keywords(name: str) -> dict[str, object]:
    """The parameters of a method and their defaults."""
    if name not in _REGISTRY:
        raise ValueError(f"There is no method {name!r}.{nearest(name, _REGISTRY)}")
    return {k: p.default for k, p in inspect.signature(_REGISTRY[name]).parameters.items()}


def create(name: str, **options) -> Method:
    """The method `name` with its parameters set.

    Raises:
      ValueError: unknown name or parameter (naming the nearest valid ones), or a value out of range.
    """
    known = keywords(name)
    for key in options:
        if key not in known:
            raise ValueError(f"Method {name!r} has no parameter {key!r}.{nearest(key, known)}")
    return dataclasses.replace(_REGISTRY[name](**options), name=name)


def nearest(word: str, known) -> str:
    """ " Did you mean ...?" or a list of what there is."""
    close = difflib.get_close_matches(word, known, n=3, cutoff=0.5)
    if close:
        return " Did you mean " + " or ".join(repr(c) for c in close) + "?"
    return " There are: " + ", ".join(known) + "." if known else " It has none."


# -- estimators ------------------------------------------------------------------------------------


@register
def grpo(
    *,
    eps: float = 1e-6,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
    aggregation: str = "sequence_mean",
):
    """Group Relative Policy Optimization, arXiv 2402.03300."""
    return Method(
        chain(standardize_by_group(eps)),
        PolicyLoss(clip_low=clip_low, clip_high=clip_high, dual_clip=dual_clip, aggregation=aggregation),
    )


@register
def dr_grpo(*, clip_low: float = 0.2, clip_high: float = 0.2):
    """GRPO without its length and difficulty biases, arXiv 2503.20783."""
    return Method(chain(center_by_group()), PolicyLoss(clip_low=clip_low, clip_high=clip_high, aggregation="constant"))


@register
def dapo(
    *,
    eps: float = 1e-6,
    clip_low: float = 0.2,
    clip_high: float = 0.28,
    dynamic_sampling: bool = True,
    overlong_max_length: int = 0,
    overlong_cache_length: int = 0,
):
    """DAPO, arXiv 2503.14476: clip-higher, token-mean loss, dynamic sampling, soft overlong penalty.

    The penalty is on where overlong_max_length > 0 (normally max_completion_length).
    """
    if bool(overlong_max_length) != bool(overlong_cache_length):
        raise ValueError(
            "method.overlong_max_length and method.overlong_cache_length go together: set both or neither."
        )
    penalty = (soft_overlong_penalty(overlong_max_length, overlong_cache_length),) if overlong_max_length else ()
    return Method(
        chain(*penalty, standardize_by_group(eps)),
        PolicyLoss(clip_low=clip_low, clip_high=clip_high),
        dynamic_sampling=dynamic_sampling,
    )


@register
def gspo(*, eps: float = 1e-6, clip_low: float = 3e-4, clip_high: float = 4e-4):
    """Group Sequence Policy Optimization, arXiv 2507.18071: one ratio a completion."""
    return Method(
        chain(standardize_by_group(eps)),
        PolicyLoss(clip_low=clip_low, clip_high=clip_high, ratio="sequence", aggregation="sequence_mean"),
    )


@register
def cispo(*, eps: float = 1e-6, clip_high: float = 5.0):
    """CISPO, arXiv 2506.13585: the clipped ratio is a constant weight (clip_high from arXiv 2510.13786)."""
    return Method(chain(standardize_by_group(eps)), PolicyLoss(clip_high=clip_high, ratio="cispo"))


@register
def rloo(*, clip_low: float = 0.2, clip_high: float = 0.2):
    """REINFORCE leave-one-out, arXiv 2402.14740, with a clipped ratio for further updates on a rollout."""
    return Method(chain(leave_one_out()), PolicyLoss(clip_low=clip_low, clip_high=clip_high))


@register
def reinforce_pp(*, kl_coef: float = 0.0, clip_low: float = 0.2, clip_high: float = 0.2):
    """REINFORCE++, arXiv 2501.03262: advantages whitened over the global batch's tokens."""
    return Method(
        chain(whiten_by_token(kl_coef)),
        PolicyLoss(clip_low=clip_low, clip_high=clip_high),
        signals=frozenset({"kl"}) if kl_coef else frozenset(),
    )


@register
def reinforce_pp_baseline(*, kl_coef: float = 0.0, clip_low: float = 0.2, clip_high: float = 0.2):
    """REINFORCE++ with the group mean subtracted before the whitening."""
    return Method(
        chain(center_by_group(), whiten_by_token(kl_coef)),
        PolicyLoss(clip_low=clip_low, clip_high=clip_high),
        signals=frozenset({"kl"}) if kl_coef else frozenset(),
    )


@register
def remax(*, aggregation: str = "token_mean"):
    """ReMax, arXiv 2310.10505: the greedy completion's reward is the baseline; no ratio, no std."""
    return Method(
        chain(subtract_greedy()),
        PolicyLoss(ratio="none", aggregation=aggregation),
        signals=frozenset({"greedy_rewards"}),
    )

"""The estimators: methods by themselves, and the base of the others."""

import dataclasses

from jaxrl_reason.advantages import (
    center_by_group,
    chain,
    divide_by_group_mean,
    leave_one_out,
    soft_overlong_penalty,
    standardize_by_group,
    subtract_greedy,
    whiten_by_token,
)
from jaxrl_reason.methods.registry import register
from jaxrl_reason.methods.types import Method, PolicyLoss


@register
def grpo(
    *,
    eps: float = 1e-6,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
    aggregation: str = "sequence_mean",
) -> Method:
    """Builds GRPO, Group Relative Policy Optimization, arXiv 2402.03300."""
    loss = PolicyLoss(clip_low=clip_low, clip_high=clip_high, dual_clip=dual_clip, aggregation=aggregation)
    return Method(chain(standardize_by_group(eps)), loss, divides_by_group_std=True)


@register
def dr_grpo(*, clip_low: float = 0.2, clip_high: float = 0.2) -> Method:
    """Builds Dr.GRPO: GRPO without its length and difficulty biases, arXiv 2503.20783."""
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
) -> Method:
    """Builds DAPO, arXiv 2503.14476: clip-higher, token-mean loss, dynamic sampling, soft overlong penalty.

    The penalty is on if overlong_max_length > 0 (normally max_completion_length).
    """
    if bool(overlong_max_length) != bool(overlong_cache_length):
        raise ValueError("method.overlong_max_length and method.overlong_cache_length: set both or neither.")
    penalty = (soft_overlong_penalty(overlong_max_length, overlong_cache_length),) if overlong_max_length else ()
    loss = PolicyLoss(clip_low=clip_low, clip_high=clip_high)
    advantage = chain(*penalty, standardize_by_group(eps))
    return Method(advantage, loss, dynamic_sampling=dynamic_sampling, divides_by_group_std=True)


@register
def gspo(*, eps: float = 1e-6, clip_low: float = 3e-4, clip_high: float = 4e-4) -> Method:
    """Builds GSPO, Group Sequence Policy Optimization, arXiv 2507.18071: one ratio per completion."""
    loss = PolicyLoss(clip_low=clip_low, clip_high=clip_high, ratio="sequence", aggregation="sequence_mean")
    return Method(chain(standardize_by_group(eps)), loss, divides_by_group_std=True)


@register
def cispo(*, eps: float = 1e-6, clip_high: float = 5.0) -> Method:
    """Builds CISPO, arXiv 2506.13585: the clipped ratio is a constant weight (clip_high from arXiv 2510.13786)."""
    loss = PolicyLoss(clip_high=clip_high, ratio="cispo")
    return Method(chain(standardize_by_group(eps)), loss, divides_by_group_std=True)


@register
def rloo(*, clip_low: float = 0.2, clip_high: float = 0.2) -> Method:
    """Builds RLOO, REINFORCE leave-one-out, arXiv 2402.14740, with a clipped ratio for further updates on a rollout."""
    return Method(chain(leave_one_out()), PolicyLoss(clip_low=clip_low, clip_high=clip_high))


@register
def reinforce_pp(*, kl_coef: float = 0.0, clip_low: float = 0.2, clip_high: float = 0.2) -> Method:
    """Builds REINFORCE++, arXiv 2501.03262: advantages whitened over the tokens of the global batch."""
    signals = frozenset({"kl"} if kl_coef else ())
    return Method(chain(whiten_by_token(kl_coef)), PolicyLoss(clip_low=clip_low, clip_high=clip_high), signals)


@register
def reinforce_pp_baseline(*, kl_coef: float = 0.0, clip_low: float = 0.2, clip_high: float = 0.2) -> Method:
    """Builds REINFORCE++ with a baseline, arXiv 2501.03262: the group mean is subtracted before the whitening."""
    plain = reinforce_pp(kl_coef=kl_coef, clip_low=clip_low, clip_high=clip_high)
    return dataclasses.replace(plain, advantage=chain(center_by_group(), whiten_by_token(kl_coef)))


@register
def remax(*, aggregation: str = "token_mean") -> Method:
    """Builds ReMax, arXiv 2310.10505: the reward of the greedy completion is the baseline; no ratio, no std."""
    loss = PolicyLoss(ratio="none", aggregation=aggregation)
    return Method(chain(subtract_greedy()), loss, signals=frozenset({"greedy_rewards"}))


@register
def maxrl(
    *, eps: float = 1e-6, clip_low: float = 0.2, clip_high: float = 0.2, aggregation: str = "token_mean"
) -> Method:
    """Builds MaxRL, arXiv 2602.02710: the advantage is divided by the group's mean reward, so rare successes weigh most.

    Rewards must be in [0, 1]; negative ones are refused.
    """
    loss = PolicyLoss(clip_low=clip_low, clip_high=clip_high, aggregation=aggregation)
    return Method(chain(divide_by_group_mean(eps)), loss, divides_by_group_std=True, nonnegative_rewards=True)

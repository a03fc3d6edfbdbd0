"""Advantages: a chain of pure transformations of arrays, in the manner of optax.

    inputs = AdvantageInputs(rewards, completion_mask)
    transform = chain(soft_overlong_penalty(512, 128), standardize_by_group())
    advantages, state = transform.update(inputs.rewards, transform.init(), inputs)

P prompts have G completions of T tokens each, and a group is axis 1. A completion whose reward is NaN has no reward
("leave this sample out"): it enters no statistic and its advantage is 0. Advantages are constants: no gradient flows
through any transformation.
"""

from jaxrl_reason.advantages.combinators import after, chain
from jaxrl_reason.advantages.estimators import (
    center_by_group,
    divide_by_group_mean,
    leave_one_out,
    soft_overlong_penalty,
    standardize_by_group,
    subtract_greedy,
    whiten_by_token,
)
from jaxrl_reason.advantages.groups import group_deviation, group_tied, has_reward, is_correct
from jaxrl_reason.advantages.papers import (
    mix_self_reward,
    reweight_by_confidence,
    scale_by_value,
    SpreadState,
    stratify_by_verifier,
    weight_by_score_spread,
)
from jaxrl_reason.advantages.types import AdvantageInputs, Advantages, AdvantageTransform, stateless

"""Rewards: on the device (`device`), on the host (`host`, with the built-in `functions`), exact numeric verdicts (`numeric`).

`rewards.scorer` puts them together for a run; it stands above `data` and `rollout` and is imported by its own name, and so is
`device`: the processes that judge answers (`pool`) import this package and do without jax.
"""

from jaxrl_reason.rewards.functions import accuracy_reward, format_reward, last_number_reward
from jaxrl_reason.rewards.host import HostReward, load_reward, RewardError, RewardTable, score
from jaxrl_reason.rewards.numeric import extract_answer, numeric_verdict, parse_number

__all__ = [
    "HostReward",
    "RewardError",
    "RewardTable",
    "accuracy_reward",
    "extract_answer",
    "format_reward",
    "last_number_reward",
    "load_reward",
    "numeric_verdict",
    "parse_number",
    "score",
]

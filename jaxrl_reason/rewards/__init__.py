"""Rewards: on the device (`device`), on the host (`host`, with the built-in `functions`), exact numeric verdicts (`numeric`).

`rewards.scorer` puts them together for a run; it stands above `data` and `rollout` and is imported by its own name.
"""

from jaxrl_reason.rewards.device import DeviceReward, match_answer_tokens
from jaxrl_reason.rewards.functions import accuracy_reward, format_reward
from jaxrl_reason.rewards.host import HostReward, RewardError, RewardTable, load_reward, score
from jaxrl_reason.rewards.numeric import extract_answer, numeric_verdict, parse_number

__all__ = [
    "DeviceReward",
    "HostReward",
    "RewardError",
    "RewardTable",
    "accuracy_reward",
    "extract_answer",
    "format_reward",
    "load_reward",
    "match_answer_tokens",
    "numeric_verdict",
    "parse_number",
    "score",
]

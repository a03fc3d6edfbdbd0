"""Rewards: completions in, numbers out.

`numeric`: exact numeric verdicts. `functions`, `task_rewards` and `math`: the built-in host rewards. `host`: loads and
calls host rewards. `isolated`: calls a user's function in the worker processes of `pool`. `device`: rewards that are
traced into the step. `learned`: a pretrained reward model. `scorer`: all rewards of a run.

Import `device`, `learned` and `scorer` by their own names. They need JAX, and the workers, which import this package,
do without.
"""

from jaxrl_reason.rewards.functions import accuracy_reward, format_reward, last_number_reward
from jaxrl_reason.rewards.host import compute_rewards, HostReward, load_reward, RewardError, RewardTable
from jaxrl_reason.rewards.numeric import extract_answer, numeric_verdict, parse_number

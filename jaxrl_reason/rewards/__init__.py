"""Rewards: completions in, numbers out. `scorer` computes all rewards of a run.

`functions`, `task_rewards` and `math` are the built-in host rewards. `answers` finds the final answer, `numeric` gives
exact numeric verdicts, and `latex` rewrites LaTeX for math-verify. `loading` finds host rewards by name, and `host`
calls them. `isolated` calls a user's function in the worker processes of `pool`, which print to the file of `output`.
On the device run `device`, rewards that are traced into the step, and `learned`, a pretrained reward model. Import
`device`, `learned` and `scorer` by their own names: they need JAX, and the workers, which import this package, do
without.
"""

from jaxrl_reason.rewards.answers import extract_answer
from jaxrl_reason.rewards.functions import accuracy_reward, format_reward, last_number_reward
from jaxrl_reason.rewards.host import compute_rewards, HostReward, RewardError, RewardTable
from jaxrl_reason.rewards.loading import load_reward
from jaxrl_reason.rewards.numeric import numeric_verdict, parse_number

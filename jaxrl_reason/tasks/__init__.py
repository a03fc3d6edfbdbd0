"""The task of a run: its data, its rewards and its evaluation.

`opening` opens a `Task` for training, or for evaluation with held-out data only: text problems (`text`), or tables of
numbers that are predicted digit by digit (`regression`, GenRe2). `pretrained` loads the model that a run begins with,
and `supervised` trains it before RL. `policies` opens the policy of a run or a model, to sample from it. `evaluation`
samples, judges and averages held-out completions, and `reporting` shows the results as tables, pictures and files.
`self_reward` has LaSeR's probe token, constant and self-rewards.

Of the evaluate command, `asked` has the configuration per set, `evaluating` runs the evaluations of a policy, `journal`
keeps their completions to continue from, and `comparison` pairs two evaluations by prompt.
"""

from jaxrl_reason.tasks.opening import open_for_evaluation, open_task
from jaxrl_reason.tasks.reporting import BASELINES, headlines
from jaxrl_reason.tasks.task import build_programs, Judged, Task, TrainingTask

"""The task of a run: its data, its rewards and its evaluation.

task.py          Task, TrainingTask, and the programs of a task
opening.py       opens a task for training, or for evaluation with held-out data only
text.py          text problems
regression/      tables of numbers, predicted digit by digit (GenRe2)
pretrained.py    the pretrained model that a run begins with
evaluation.py    held-out completions: sampled, judged, averaged
self_reward.py   LaSeR's probe token, constant and self-rewards
reporting.py     tables on the screen, pictures, and the files of an evaluation
"""

from jaxrl_reason.tasks.opening import open_for_evaluation, open_task
from jaxrl_reason.tasks.reporting import BASELINES, headlines
from jaxrl_reason.tasks.task import build_programs, Judged, Task, TrainingTask

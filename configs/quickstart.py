"""GRPO on word problems, from random weights, on two CPU cores.

    python -m jaxrl_reason.train --config=configs/quickstart.py --workdir=/tmp/quickstart

Takes one to two minutes: 800 supervised steps, then 36 steps of RL. In the training data, half of the solutions are
worked and half are bare answers. Expect the accuracy on held-out problems to rise by about 32 points, most often from 54 % to
90 %, and the mean length from 18 to 31 tokens: the policy learns that working an answer out pays.
"""

from jaxrl_reason.config import Checkpoint, Config, Data, Eval, Model, Optimizer, Supervised, Update


def get_config() -> Config:
    return Config(
        steps=36,
        prompts_per_step=32,
        group_size=8,
        max_prompt_length=40,
        max_completion_length=36,
        model=Model(width=128, layers=2, heads=4, kv_heads=2, mlp_width=384, qk_norm=True),
        data=Data(train="word_problems/chains"),
        supervised=Supervised(steps=800, batch_size=32, learning_rate=3e-3),
        method={"name": "grpo"},
        optimizer=Optimizer(learning_rate=5e-4, schedule="linear", warmup_steps=5),
        update=Update(accumulation=4),
        checkpoint=Checkpoint(every=100, keep=2),
        eval=Eval(every=18, prompts=256, samples=4),
    )

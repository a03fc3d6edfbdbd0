"""The estimators on word problems, all from the same start and with the same settings, on two CPU cores.

    python -m jaxrl_reason.compare --config=configs/estimators.py --workdir=/tmp/estimators --seeds=8

The recipe is that of quickstart.py. Takes about 7 minutes per seed. Hyper-parameters are the defaults of each estimator,
with the learning rate of GRPO for all, so that the table compares implementations at work, and ranks no method.
"""

from collections.abc import Mapping

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


def get_baselines() -> Mapping[str, Mapping[str, object]]:
    names = ("dr_grpo", "dapo", "gspo", "cispo", "rloo", "reinforce_pp", "reinforce_pp_baseline", "remax", "maxrl")
    return {name: {"method": {"name": name}} for name in names}

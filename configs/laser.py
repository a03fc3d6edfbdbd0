"""LaSeR (arXiv 2510.14943) on tries that are checked: the policy also learns to judge its answers by one log-probability.

    python -m jaxrl_reason.compare --config=configs/laser.py --workdir=/tmp/laser

Takes minutes on two CPU cores. The paper has alpha 0.1 and warm-ups of 200 steps each; this run of 60 steps has alpha 1,
and 0 and 30 steps. Expect a self-verification F1 above 0.9, and an accuracy near GRPO's.
"""

from collections.abc import Mapping

from jaxrl_reason.config import Checkpoint, Config, Data, Eval, Model, Optimizer, Supervised


def get_config() -> Config:
    return Config(
        steps=60,
        prompts_per_step=32,
        group_size=8,
        max_prompt_length=20,
        max_completion_length=30,
        model=Model(width=128, layers=3, heads=4, kv_heads=2, mlp_width=384, qk_norm=True),
        data=Data(train="checked_tries"),
        supervised=Supervised(steps=600, batch_size=32, learning_rate=3e-3),
        method={"name": "laser", "base": "grpo", "alpha": 1.0, "reasoning_warmup": 0, "self_reward_warmup": 30},
        optimizer=Optimizer(learning_rate=2e-4, warmup_steps=5),
        checkpoint=Checkpoint(every=50, keep=2),
        eval=Eval(every=20, prompts=256, samples=8),
    )


def get_baselines() -> Mapping[str, Mapping[str, object]]:
    return {"GRPO": {"method": {"name": "grpo"}}}

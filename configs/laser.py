"""LaSeR (arXiv 2510.14943) on word problems: the policy also learns to judge its answers by one log-probability.

    python -m jaxrl_reason.compare --config=configs/laser.py --workdir=/tmp/laser

Takes minutes on two CPU cores. The warm-ups of the paper, 200 steps each, are scaled to a run of 100 steps. Expect the
accuracy of GRPO, and a self-verification F1 that rises from 0.1 to 0.5.
"""

from collections.abc import Mapping

from jaxrl_reason.config import Checkpoint, Config, Data, Eval, Model, Optimizer, Supervised


def get_config() -> Config:
    return Config(
        steps=100,
        prompts_per_step=32,
        group_size=8,
        max_prompt_length=40,
        max_completion_length=40,
        model=Model(width=128, layers=3, heads=4, kv_heads=2, mlp_width=384, qk_norm=True),
        data=Data(train="word_problems/chains"),
        supervised=Supervised(steps=700, batch_size=32, learning_rate=3e-3),
        method={"name": "laser", "base": "grpo", "reasoning_warmup": 10, "self_reward_warmup": 30},
        optimizer=Optimizer(learning_rate=2e-4, warmup_steps=5),
        checkpoint=Checkpoint(every=50, keep=2),
        eval=Eval(every=20, prompts=256, samples=8),
    )


def get_baselines() -> Mapping[str, Mapping[str, object]]:
    return {"GRPO": {"method": {"name": "grpo"}}}

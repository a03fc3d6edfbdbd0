"""LaSeR (arXiv 2510.14943) on tries that no word judges: the policy has to compare two sums in its own solution.

    python -m jaxrl_reason.compare --config=configs/laser_silent.py --workdir=/tmp/laser_silent

Takes minutes on two CPU cores. It is laser.py with other data. Expect an F1 between 0.5 and 0.8, by the seed.
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
        data=Data(train="checked_tries/silent"),
        supervised=Supervised(steps=600, batch_size=32, learning_rate=3e-3),
        method={"name": "laser", "base": "grpo", "alpha": 1.0, "reasoning_warmup": 0, "self_reward_warmup": 30},
        optimizer=Optimizer(learning_rate=2e-4, warmup_steps=5),
        checkpoint=Checkpoint(every=50, keep=2),
        eval=Eval(every=20, prompts=256, samples=8),
    )


def get_baselines() -> Mapping[str, Mapping[str, object]]:
    return {"GRPO": {"method": {"name": "grpo"}}}

"""Word problems from scratch on two CPU cores: a minute of supervised start, then GRPO."""

from jaxrl_reason.config import Checkpoint, Config, Eval, Model, Optimizer, Supervised


def get_config() -> Config:
    return Config(
        steps=60,
        prompts_per_step=16,
        group_size=8,
        max_prompt_length=32,
        max_completion_length=32,
        model=Model(width=128, layers=4, heads=4, kv_heads=2, mlp_width=384),
        supervised=Supervised(steps=300, batch_size=64, learning_rate=2e-3),
        method={"name": "grpo"},
        optimizer=Optimizer(learning_rate=3e-4),
        checkpoint=Checkpoint(every=50, keep=2),
        eval=Eval(every=20, prompts=128, samples=4),
    )

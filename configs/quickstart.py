"""Word problems from scratch on two CPU cores: a minute of supervised start, then GRPO."""

from jaxrl_reason.config import Checkpoint, Config, Data, Eval, Model, Optimizer, Supervised


def get_config() -> Config:
    return Config(
        steps=40,
        prompts_per_step=32,
        group_size=8,
        max_prompt_length=40,
        max_completion_length=40,
        model=Model(width=128, layers=3, heads=4, kv_heads=2, mlp_width=384, qk_norm=True),
        data=Data(train="word_problems/chains"),
        supervised=Supervised(steps=900, batch_size=32, learning_rate=3e-3),
        method={"name": "grpo"},
        optimizer=Optimizer(learning_rate=2e-4, warmup_steps=5),
        checkpoint=Checkpoint(every=20, keep=2),
        eval=Eval(every=10, prompts=256, samples=4),
    )

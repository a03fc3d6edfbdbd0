"""GenRe2 (arXiv 2512.06533) on a synthetic table of known noise: regression by decoding binary digits.

    python -m jaxrl_reason.compare --config=configs/genre2.py --workdir=/tmp/genre2

Takes minutes on two CPU cores: 1,500 steps of cross-entropy, then 300 steps of ReMax on the squared error. Expect the spread
of the samples to halve, and the error of their mean to change little.

Other tables: --config.data.train=diabetes (needs the extra `tables`), or a .csv with --config.regression.target=COLUMN and
slices as splits.
"""

from collections.abc import Mapping

from jaxrl_reason.config import Checkpoint, Config, Data, Eval, Model, Optimizer, Regression, Reward, Supervised


def get_config() -> Config:
    return Config(
        steps=300,
        prompts_per_step=32,
        group_size=16,
        max_prompt_length=1,
        max_completion_length=8,
        model=Model(width=64, layers=2, heads=4, kv_heads=2, mlp_width=192, qk_norm=True),
        data=Data(train="synthetic"),
        supervised=Supervised(steps=1500, batch_size=64, learning_rate=2e-3),
        regression=Regression(tokenizer="normalized", tokenizer_options={"base": 2, "digits": 8}),
        reward=Reward(functions=["squared_error"]),
        method={"name": "genre2", "base": "remax"},
        optimizer=Optimizer(learning_rate=1e-4, warmup_steps=5),
        checkpoint=Checkpoint(every=200, keep=2),
        eval=Eval(every=50, prompts=512, samples=128),
    )


def get_baselines() -> Mapping[str, Mapping[str, object]]:
    return {
        "genre2 on GRPO": {"method": {"name": "genre2", "base": "grpo"}},
        "with the expert term": {"method": {"name": "genre2", "base": "remax", "expert_coefficient": 0.05}},
    }

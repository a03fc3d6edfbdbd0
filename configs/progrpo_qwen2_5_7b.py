"""ProGRPO (arXiv 2602.05281) with Qwen2.5-7B on DAPO-Math-17k.

    python -m jaxrl_reason.train --config=configs/progrpo_qwen2_5_7b.py --workdir=DIR

For 32 chips or more. Needs the extra `math`, and the internet once. It was never run to the end.

From the paper: clip 0.2 / 0.28, token-mean loss, no KL. The paper does not give alpha; 0.3 is a first guess. Group size, batch
size, learning rate and lengths are ours.

Training data: open-r1/DAPO-Math-17k-Processed. Checked in the program that made it, and in its list of files: the configurations
all, en and cn; the columns prompt (text) and solution (the answer alone); Parquet files such as all/train-00000-of-00001.parquet.
Not checked: the name of the file in en/.

Held-out data: HuggingFaceH4/MATH-500. Checked: its list of files has test.jsonl; programs that read it, and cards of its copies,
have the columns problem, answer, solution, subject, level and unique_id. Not checked: its own card, which was not found.
"""

from jaxrl_reason.config import Checkpoint, Config, Data, Eval, Model, Optimizer, Reward, Update


def get_config() -> Config:
    return Config(
        steps=400,
        prompts_per_step=128,
        group_size=8,
        max_prompt_length=1024,
        max_completion_length=4096,
        model=Model(path="Qwen/Qwen2.5-7B", param_dtype="bfloat16", compute_dtype="bfloat16"),
        data=Data(
            train="hf://datasets/open-r1/DAPO-Math-17k-Processed/en/train-*.parquet",
            train_split="all",
            columns={"question": "prompt", "answer": "solution"},
            eval="hf://datasets/HuggingFaceH4/MATH-500/test.jsonl",
            eval_split="all",
            eval_columns={"question": "problem"},
            template="boxed",
            on_bad_row="skip",
            on_long_prompt="skip",
        ),
        reward=Reward(functions=["math_verify"]),
        method={"name": "progrpo", "base": "grpo", "alpha": 0.3, "clip_high": 0.28, "aggregation": "token_mean"},
        optimizer=Optimizer(learning_rate=1e-6, warmup_steps=10, float32_master=True),
        update=Update(accumulation=16),
        checkpoint=Checkpoint(every=50, keep=2),
        eval=Eval(every=50, prompts=500, samples=16),
    )

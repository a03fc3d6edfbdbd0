"""HERO (arXiv 2510.07242) in the setting of the paper: Qwen3-4B-Base, OpenMathReasoning, AceMath-7B-RM and math-verify.

    python -m jaxrl_reason.train --config=configs/hero_qwen3_4b.py --workdir=DIR

For 32 chips or more. Needs the extra `math`, and the internet once, for the models and one file of the data; set
--config.data.train to name more files. It was never run to the end.

From the paper: 8 completions per prompt, 512 prompts per step in minibatches of 128, learning rate 1e-6, clip 0.2 / 0.28, no
KL, alpha = beta = 0.05, temperature 1, and a cold start. The cold start has 4,000 worked solutions once; the paper takes 2,000
twice. Lengths are ours; rows with a solution longer than a completion can be are left out.

Training data: nvidia/OpenMathReasoning. Checked in cards of its excerpts and in articles on it: the columns problem,
expected_answer (for some problems a majority vote of models) and generated_solution, a split cot, and Parquet files. Not
checked: its own card, which was not found, and the name of its first file; excerpts use data/cot-*.

Held-out data: HuggingFaceH4/MATH-500. Checked: its list of files has test.jsonl; programs that read it, and cards of its copies,
have the columns problem, answer, solution, subject, level and unique_id. Not checked: its own card, which was not found.
"""

from jaxrl_reason.config import (
    Checkpoint,
    Config,
    Data,
    Eval,
    Model,
    Optimizer,
    Reward,
    RewardModel,
    Supervised,
    Update,
)


def get_config() -> Config:
    return Config(
        steps=200,
        prompts_per_step=512,
        group_size=8,
        max_prompt_length=1024,
        max_completion_length=4096,
        model=Model(path="Qwen/Qwen3-4B-Base", param_dtype="bfloat16", compute_dtype="bfloat16"),
        data=Data(
            train="hf://datasets/nvidia/OpenMathReasoning/data/cot-00000-of-*.parquet",
            train_split="all",
            columns={"question": "problem", "answer": "expected_answer", "solution": "generated_solution"},
            eval="hf://datasets/HuggingFaceH4/MATH-500/test.jsonl",
            eval_split="all",
            eval_columns={"question": "problem"},
            template="boxed",
            on_bad_row="skip",
            on_long_prompt="skip",
        ),
        supervised=Supervised(steps=62, batch_size=64, learning_rate=1e-5),
        reward=Reward(functions=["math_verify", "reward_model"], weights=[1.0, 0.0]),
        reward_model=RewardModel(
            path="nvidia/AceMath-7B-RM",
            system="Please reason step by step, and check your final answer within \\boxed{}.",
            max_length=6144,
        ),
        method={"name": "hero", "base": "grpo", "clip_high": 0.28, "aggregation": "token_mean"},
        optimizer=Optimizer(learning_rate=1e-6, float32_master=True),
        update=Update(minibatches=4, accumulation=4),
        checkpoint=Checkpoint(every=20, keep=2),
        eval=Eval(every=20, prompts=500, samples=1),
    )

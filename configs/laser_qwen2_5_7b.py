"""LaSeR (arXiv 2510.14943) in the setting of the paper: Qwen2.5-7B, DeepMath-103K and math-verify.

    python -m jaxrl_reason.train --config=configs/laser_qwen2_5_7b.py --workdir=DIR

For 32 chips or more. Needs the extra `math`, and the internet once. It was never run to the end.

From the paper: 8 completions per prompt, 128 prompts per step, learning rate 1e-6, clip 0.2, temperature 1, beta and alpha 0.1,
tau 0.1, warm-ups of 200 steps each. The self-reward is read at a token that text never uses. Lengths are ours.

Training data: zwhe99/DeepMath-103K. Checked in its card: the columns question and final_answer (next to difficulty, topic and
three solutions), 103,110 rows; in its list of files: data/train-00000-of-00010.parquet to 00009, 2.1 GB.

Held-out data: HuggingFaceH4/MATH-500. Checked: its list of files has test.jsonl; programs that read it, and cards of its copies,
have the columns problem, answer, solution, subject, level and unique_id. Not checked: its own card, which was not found.
"""

from jaxrl_reason.config import Checkpoint, Config, Data, Eval, Model, Optimizer, Reward, Update


def get_config() -> Config:
    return Config(
        steps=1000,
        prompts_per_step=128,
        group_size=8,
        max_prompt_length=1024,
        max_completion_length=4096,
        model=Model(path="Qwen/Qwen2.5-7B", param_dtype="bfloat16", compute_dtype="bfloat16"),
        data=Data(
            train="hf://datasets/zwhe99/DeepMath-103K/data/train-*.parquet",
            train_split="all",
            columns={"answer": "final_answer"},
            eval="hf://datasets/HuggingFaceH4/MATH-500/test.jsonl",
            eval_split="all",
            eval_columns={"question": "problem"},
            template="boxed",
            on_bad_row="skip",
            on_long_prompt="skip",
        ),
        reward=Reward(functions=["math_verify"]),
        method={
            "name": "laser",
            "base": "grpo",
            "token": "<|vision_start|>",
            "reasoning_warmup": 200,
            "self_reward_warmup": 200,
        },
        optimizer=Optimizer(learning_rate=1e-6, float32_master=True),
        update=Update(accumulation=16),
        checkpoint=Checkpoint(every=50, keep=2),
        eval=Eval(every=50, prompts=500, samples=4),
    )

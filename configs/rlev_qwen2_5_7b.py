"""RLEV (arXiv 2510.20187) in the paper's setting: Qwen2.5-7B on exam questions that are worth different points.

From the paper: one epoch, 128 prompts a step, learning rate 5e-7, prompts and responses of 1,024 tokens, alpha 10. The paper lets a
language model judge the answers; here the final answer has to be the reference's words, so name a judge of your own in
--config.reward.functions=FILE.py:FUNCTION. The data are the paper's, as JSONL with question, answer, score and exam. For 32 chips and more.
"""

from collections.abc import Sequence
import re

from jaxrl_reason.config import Checkpoint, Config, Data, Eval, Model, Optimizer, Reward, Update
from jaxrl_reason.rewards import extract_answer


def same_words(completions: Sequence[str], answer: Sequence[str | int | float], **_) -> list[float]:
    """1.0 where the final answer is the reference, up to spaces, case and punctuation, else 0.0."""
    words = lambda text: re.findall(r"\w+", str(text).lower())
    found = [extract_answer(completion) for completion in completions]
    return [float(text is not None and words(text) == words(gold)) for text, gold in zip(found, answer, strict=True)]


def get_config() -> Config:
    return Config(
        steps=780,
        prompts_per_step=128,
        group_size=8,
        max_prompt_length=1024,
        max_completion_length=1024,
        model=Model(path="Qwen/Qwen2.5-7B", param_dtype="bfloat16", compute_dtype="bfloat16"),
        data=Data(
            train="hf://datasets/sarosavo/RLEV/*train*.jsonl",
            train_split="all",
            eval="hf://datasets/sarosavo/RLEV/*test*.jsonl",
            eval_split="all",
            columns={"points": "score"},
            template="boxed",
            on_bad_row="skip",
            on_long_prompt="skip",
        ),
        reward=Reward(functions=[f"{__file__}:same_words"]),
        method={"name": "rlev", "base": "rloo", "alpha": 10.0},
        optimizer=Optimizer(learning_rate=5e-7, float32_master=True),
        update=Update(accumulation=8),
        checkpoint=Checkpoint(every=50, keep=2),
        eval=Eval(every=50, prompts=1024, samples=1),
    )

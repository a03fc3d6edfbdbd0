"""RLEV (arXiv 2510.20187) in the setting of the paper: Qwen2.5-7B on exam questions of different values.

    python -m jaxrl_reason.train --config=configs/rlev_qwen2_5_7b.py --workdir=DIR

For 32 chips or more. Needs the internet once. It was never run to the end.

From the paper: one epoch, 128 prompts per step, learning rate 5e-7, prompts and responses of 1,024 tokens, alpha 10. In the
paper a language model judges the answers. Here the final answer must have the words of the reference;
--config.reward.functions=FILE.py:FUNCTION names another judge.

Data: sarosavo/RLEV, of the paper. Checked in its card: the columns query, label, score (points of the question) and total
(points of its exam), a "JSON list using chat-template", 100,000 and 8,000 rows split by exam, English and Chinese. Not checked,
because the card does not say it: the names of the files, so the patterns below match any JSON file with "train" or "test" in
its name, of both languages; and whether a query is a text or a list of turns, so both are read (chat=True). A row with a
system turn of its own keeps it.
"""

from collections.abc import Sequence
import re

from jaxrl_reason.config import Checkpoint, Config, Data, Eval, Model, Optimizer, Reward, Update
from jaxrl_reason.rewards import extract_answer


def same_words(completions: Sequence[str], answer: Sequence[str | int | float], **_) -> list[float]:
    """Returns 1.0 if the final answer equals the reference up to spaces, case and punctuation, else 0.0."""
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
            train="hf://datasets/sarosavo/RLEV/*train*.json*",
            train_split="all",
            eval="hf://datasets/sarosavo/RLEV/*test*.json*",
            eval_split="all",
            columns={"question": "query", "answer": "label", "points": "score", "exam_total": "total"},
            template="boxed",
            chat=True,
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

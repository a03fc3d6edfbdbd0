"""The built-in host rewards, by TRL's signature: `f(prompts, completions, completion_ids, **columns) -> list[float | None]`.

They are called by keyword, so each names the arguments it uses and takes the rest as `**_`.
"""

from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any

from jaxrl_reason.rewards.numeric import extract_answer, numeric_verdict, parse_number


def accuracy_reward(completions: Sequence[str], answer: Sequence[str | int | float], **_) -> list[float]:
    """1.0 where the completion's final answer is exactly the reference number of the column `answer`, else 0.0.

    Args:
      completions: N texts.
      answer: N reference numbers, as `numeric_verdict` takes them.

    Raises:
      ValueError: a reference is not a number.
    """
    return [
        float(numeric_verdict(completion, reference)) for completion, reference in zip(completions, answer, strict=True)
    ]


def last_number_reward(completions: Sequence[str], answer: Sequence[str | int | float], **_) -> list[float]:
    """`accuracy_reward` for models that mark no answer: without a marker, the last number of the completion counts."""
    return [
        float(numeric_verdict(completion, reference, fallback="last_number"))
        for completion, reference in zip(completions, answer, strict=True)
    ]


def _last_number(completion: str, row: Mapping[str, Any]) -> Fraction | None:
    del row
    text = extract_answer(completion, fallback="last_number")
    return None if text is None else parse_number(text)


last_number_reward.answer_of = _last_number


def format_reward(completions: Sequence[str], **_) -> list[float]:
    r"""1.0 where the completion states one final answer in the agreed form, right or wrong, else 0.0.

    The agreed form is one marker in the whole text and a number in it: either "#### x" as the last line, or one "\boxed{x}".

    Args:
      completions: N texts.
    """
    return [float(_states_one_answer(completion)) for completion in completions]


def _states_one_answer(text: str) -> bool:
    boxes = text.count(r"\boxed{")
    if text.count("####") + boxes != 1:
        return False
    answer = extract_answer(text)
    if answer is None or parse_number(answer) is None:
        return False
    return boxes == 1 or text.rstrip().rpartition("\n")[2].startswith("#### ")

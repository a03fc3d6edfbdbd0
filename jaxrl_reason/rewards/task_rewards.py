"""Host rewards of the embedded data sets, by TRL's signature: of `data.builders.many_answers` and `answer_forms`."""

from collections.abc import Mapping, Sequence
from fractions import Fraction
from numbers import Integral
import re
from typing import Any

from jaxrl_reason.rewards.answers import extract_answer, plain, without_announcement
from jaxrl_reason.rewards.functions import with_answer_of
from jaxrl_reason.rewards.numeric import MAX_NUMBER_LENGTH, parse_number

_WHOLE = re.compile(r"-?[0-9]{1,9}")
_BETWEEN = re.compile(r", and |,| and ")
_OVER = r" ?(?:\{ ?[0-9]{1,9} ?\}|[0-9])"
_MIXED = re.compile(
    rf"(?P<sign>[-+]?)(?P<whole>[0-9]{{1,9}})(?:\\[,;: ]| )?(?P<part>(?<= )[0-9]{{1,9}}/[0-9]{{1,9}}|\\[dtc]?frac{_OVER}{_OVER})"
)

# (the numbers named, ascending; the target) -> whether they meet the constraint
_CONSTRAINTS = {
    "sum": lambda numbers, target: len(numbers) == 2 and sum(numbers) == target,
    "difference": lambda numbers, target: len(numbers) == 2 and numbers[1] - numbers[0] == target,
    "multiple": lambda numbers, target: len(numbers) == 1 and numbers[0] % target == 0,
}


def canonical_answer(completion: str, *, kind: str, target: int, low: int, high: int, **_) -> str | None:
    """Returns the canonical text of a correct answer, by which distinct answers are counted: "5, 7" for "7 and 5".

    The final answer, as `extract_answer` finds it, lists whole numbers. `kind`, `target`, `low` and `high` are the
    constraint, as in the columns of the data set. The result is None if the answer violates it or cannot be read.
    Raises ValueError if `kind` is unknown, another column is not a whole number, or the target of a multiple is 0.
    """
    if kind not in tuple(_CONSTRAINTS):  # a tuple, because a value in the data may have no hash
        raise ValueError(
            f"The column 'kind' holds {kind!r:.80}; many_answers can judge {', '.join(_CONSTRAINTS)}: correct that row."
        )
    for name, value in dict(target=target, low=low, high=high).items():
        if not isinstance(value, Integral) or (name, kind, value) == ("target", "multiple", 0):
            raise ValueError(
                f"The column {name!r} holds {value!r:.80}, so no answer of the kind {kind!r} can be judged; "
                "correct that row."
            )
    numbers = _named_numbers(completion)
    if not numbers or not low <= numbers[0] <= numbers[-1] <= high or not _CONSTRAINTS[kind](numbers, target):
        return None
    return ", ".join(map(str, numbers))


def _numbers_text(completion: str, row: Mapping[str, Any]) -> str | None:
    del row
    return ", ".join(map(str, _named_numbers(completion))) or None


@with_answer_of(_numbers_text)
def many_answers_reward(
    completions: Sequence[str], kind: Sequence[str], target: Sequence[int], low: Sequence[int], high: Sequence[int], **_
) -> list[float]:
    """Returns 1.0 if the numbers of the final answer satisfy the row's constraint, else 0.0; see `canonical_answer`."""
    rows = zip(completions, kind, target, low, high, strict=True)
    return [float(canonical_answer(text, kind=k, target=t, low=lo, high=hi) is not None) for text, k, t, lo, hi in rows]


def strict_reward(completions: Sequence[str], answer: Sequence[str], **_) -> list[float]:
    """Returns 1.0 if the final answer and the reference of the column `answer`, stripped, are equal texts, else 0.0.

    Like many verifiers, it compares characters: "0.75", "6/8" and "75%" are all incorrect if the reference is "3/4".
    The reference may be a worked solution with its answer in a marker.
    Raises ValueError if a reference is missing.
    """
    if any(reference is None for reference in answer):
        raise ValueError("A row has no reference in its column 'answer', and \"None\" is no answer; correct that row.")
    return [float(extract_answer(text) == _stated(gold)) for text, gold in zip(completions, answer, strict=True)]


def judge_reward(completions: Sequence[str], answer: Sequence[str], **_) -> list[float]:
    """Returns 1.0 if the final answer has exactly the value of the reference in the column `answer`, else 0.0.

    Reads every form that `parse_number` reads, and mixed numbers ("1 1/2"). A percent sign divides by 100: 75% is 3/4
    and is not 75. The reference may be a worked solution. Raises ValueError if its final answer is not a number.
    """
    verdicts = []
    for completion, reference in zip(completions, answer, strict=True):
        correct = _exact_value(_stated(reference))
        if correct is None:
            raise ValueError(f"The reference answer {reference!r:.80} is not a number; correct that row's answer.")
        extracted = extract_answer(completion)
        verdicts.append(float(extracted is not None and _exact_value(extracted) == correct))
    return verdicts


def _named_numbers(completion: str) -> list[int]:
    """Returns the whole numbers of the final answer, ascending; empty unless the answer is one or two whole numbers."""
    answer = extract_answer(completion)
    if answer is None or len(answer) > MAX_NUMBER_LENGTH:
        return []
    parts = [part.strip() for part in _BETWEEN.split(answer.removesuffix("."))]
    if len(parts) > 2 or not all(map(_WHOLE.fullmatch, parts)):
        return []
    return sorted(map(int, parts))


def _stated(reference: Any) -> str:
    """Returns the final answer of a reference: a worked solution with a marker, "The answer is 18.", or the answer alone."""
    text = str(reference).strip()
    return extract_answer(text) or without_announcement(text)


def _exact_value(text: str) -> Fraction | None:
    """Returns the value of a number in any form, mixed numbers included; None for anything else."""
    mixed = None
    if len(text) <= MAX_NUMBER_LENGTH and ("/" in text or "frac" in text):
        mixed = _MIXED.fullmatch(plain(text).replace("\N{MINUS SIGN}", "-"))
    if mixed is None:
        return parse_number(text)
    part = parse_number(mixed["part"])
    if part is None:  # a division by zero
        return None
    return (int(mixed["whole"]) + part) * (-1 if mixed["sign"] == "-" else 1)

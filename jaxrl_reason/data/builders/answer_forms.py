"""Sums whose answers are correct in several forms: a TFDS builder without network, for HERO (arXiv 2510.07242).

    family      a question of it                  a solution                           the other forms of its answer
    fractions   What is 3/8 + 7/8 of a mile?      3/8 + 7/8 = 10/8, then #### 10/8     5/4   1 1/4   1.25
    decimals    What is 0.4 + 1.2 of a mile?      0.4 + 1.2 = 1.6, then #### 1.6       160%  8/5
    percents    What is 35% + 45% of a mile?      35% + 45% = 80%, then #### 80%       0.8   4/5

The reference answer is always the fraction in lowest terms. `strict_reward` of `rewards.task_rewards` accepts only its
text and so rejects half of the correct solutions: one in ten for fractions, nine in ten for decimals and percents.
`judge_reward` accepts every form of the value. It does not take part in training and gives the true verdict.
"""

from collections.abc import Callable, Iterator, Sequence
import dataclasses
from fractions import Fraction
import itertools
import random
from typing import Any

import numpy as np

from jaxrl_reason.data.builders import word_problems
from jaxrl_reason.data.builders.offline import endless, OfflineBuilder
from jaxrl_reason.data.builders.word_problems import Numbers

_ORDER = ("fractions", "decimals", "fractions", "percents")  # families in turn
_THINGS = ("cake", "cup", "field", "jar", "loaf", "mile", "pie", "pound", "ton", "yard")
_INCORRECT = 0.35  # share of incorrect solutions
_MISCOPIED = 1 / 3  # share of incorrect solutions whose step is correct and whose answer is not


def _decimal(value: Fraction) -> str | None:
    """Returns "1.05", "1.5" or "2"; None if two places are not enough."""
    if 100 % value.denominator:
        return None
    hundredths = int(value * 100)
    return f"{hundredths // 100}.{hundredths % 100:02}".rstrip("0").rstrip(".")


@dataclasses.dataclass(frozen=True)
class _Family:
    """One kind of sum. Numbers are (left, right, unit): left and right count parts, and `unit` parts make a whole."""

    numbers: Sequence[Numbers]  # all with left >= right
    write: Callable[[int, int], str | None]  # writes (count, unit) as questions and steps do
    slips: tuple[int, ...]  # the errors of incorrect results, in parts
    forms: dict[str, int]  # form of the answer -> relative frequency, among the forms that the value has


_FAMILIES = {
    "fractions": _Family(
        [(a, b, unit) for unit in range(3, 10) for a in range(1, unit) for b in range(1, a + 1)],
        lambda count, unit: f"{count}/{unit}",
        (-2, -1, 1, 2),
        {"lowest": 16, "unreduced": 3, "mixed": 2, "decimal": 1},
    ),
    "decimals": _Family(
        [(a, b, 10) for a in range(2, 14) for b in range(1, a + 1)],
        lambda count, unit: _decimal(Fraction(count, unit)),
        (-10, -2, -1, 1, 2, 10),
        {"decimal": 15, "percent": 3, "lowest": 2},
    ),
    "percents": _Family(
        [(a, b, 20) for a in range(2, 14) for b in range(1, a + 1)],
        lambda count, unit: f"{count * 100 // unit}%",
        (-2, -1, 1, 2),
        {"percent": 15, "decimal": 3, "lowest": 2},
    ),
}


def _forms(count: int, unit: int) -> dict[str, str]:
    """Returns the forms of a value by name; one is always the fraction in lowest terms."""
    value = Fraction(count, unit)
    forms = {"lowest": str(value)}
    if value.denominator < unit:
        forms["unreduced"] = f"{count}/{unit}"
    if value > 1 and value.denominator > 1:
        forms["mixed"] = f"{value // 1} {value % 1}"
    if decimal := _decimal(value):
        forms |= {"decimal": decimal, "percent": f"{_decimal(value * 100)}%"}
    return forms


def _solution(family: str, numbers: Numbers, operator: str, correct: bool, rng: random.Random) -> str:
    """Returns one step and the answer in some form. An incorrect one is plausible: the slip is in the step or in the answer."""
    spec, (left, other, unit) = _FAMILIES[family], numbers
    answer = result = left + other if operator == "+" else left - other
    if not correct:
        answer += rng.choice([slip for slip in spec.slips if result + slip > 0])
        result = result if rng.random() < _MISCOPIED else answer
    forms = _forms(answer, unit)
    names = [name for name in spec.forms if name in forms]
    (form,) = rng.choices(names, [spec.forms[name] for name in names])
    left_text, right_text, result_text = (spec.write(count, unit) for count in (left, other, result))
    return f"{left_text} {operator} {right_text} = {result_text}\n#### {forms[form]}"


def _sums(family: str, split: str) -> Iterator[tuple[str, Numbers, str]]:
    """Yields the (operator, numbers, thing) of a split; results are positive and not whole numbers."""
    for operator, numbers, thing in itertools.product("+-", _FAMILIES[family].numbers, _THINGS):
        left, right, unit = numbers
        result = left + right if operator == "+" else left - right
        if result % unit and word_problems.split_of(f"{family} {operator}", numbers, thing) == split:
            yield operator, numbers, thing


def _rows(split: str, size: int) -> Iterator[dict[str, Any]]:
    """Yields `size` rows. Every sum of a family appears before any of them repeats, with another solution."""
    rng = random.Random(split)
    sums = endless(rng, {family: _sums(family, split) for family in _FAMILIES})
    for family in itertools.islice(itertools.cycle(_ORDER), size):
        operator, numbers, thing = next(sums[family])
        left, right, unit = numbers
        if operator == "+" and rng.random() < 0.5:
            left, right = right, left
        write = _FAMILIES[family].write
        correct = rng.random() >= _INCORRECT
        solve = lambda correct: _solution(family, (left, right, unit), operator, correct, rng)
        yield {
            "question": f"What is {write(left, unit)} {operator} {write(right, unit)} of a {thing}?",
            "solution": solve(correct),
            "solution_right": int(correct),
            "answer": str(Fraction(left + right if operator == "+" else left - right, unit)),
            "chosen": solve(True),
            "rejected": solve(False),
            "family": family,
        }


class AnswerForms(OfflineBuilder):
    """Sums and differences of fractions, decimals and percents, solved in mixed forms, with a preference pair each.

    Columns: `question`; `solution`, a step and `#### x` with x in some form, one in three incorrect; `solution_right`,
    1 or 0; `answer`, the correct fraction in lowest terms; `chosen` and `rejected`, a correct and an incorrect
    completion with the same distribution of forms, so that the form tells little; `family`.
    """

    DESCRIPTION = "Sums with answers in several forms; no numbers of a thing occur in two splits of a family."
    SIZES = {"train": 12_000, "validation": 1_000, "test": 1_000}
    COLUMNS = {
        **dict.fromkeys(("question", "solution", "answer", "chosen", "rejected", "family"), str),
        "solution_right": np.int64,
    }

    def rows(self, split: str) -> Iterator[dict[str, Any]]:
        return _rows(split, self.SIZES[split])

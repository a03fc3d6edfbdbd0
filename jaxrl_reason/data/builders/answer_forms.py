"""Sums whose answers are right in several forms, as a TFDS builder that needs no network: for HERO (arXiv 2510.07242).

    family      a question of it                  a solution                           the other forms of its answer
    fractions   What is 3/8 + 7/8 of a mile?      3/8 + 7/8 = 10/8, then #### 10/8     5/4   1 1/4   1.25
    decimals    What is 0.4 + 1.2 of a mile?      0.4 + 1.2 = 1.6, then #### 1.6       160%  8/5
    percents    What is 35% + 45% of a mile?      35% + 45% = 80%, then #### 80%       0.8   4/5

The reference answer is always the fraction in lowest terms. `strict_reward` of `rewards.task_rewards` accepts that text
alone and so misses half of the right solutions: one in ten where fractions are added, nine in ten elsewhere.
`judge_reward` accepts every form of the same value; it is kept out of training and tells what was really right.
"""

from collections.abc import Callable, Iterator
import dataclasses
from fractions import Fraction
import itertools
import random

import numpy as np
import tensorflow_datasets as tfds

from jaxrl_reason.data.builders import word_problems
from jaxrl_reason.data.builders.word_problems import Numbers

_SIZES = {"train": 12_000, "validation": 1_000, "test": 1_000}
_ORDER = ("fractions", "decimals", "fractions", "percents")  # families in turn
_THINGS = ("cake", "cup", "field", "jar", "loaf", "mile", "pie", "pound", "ton", "yard")
_WRONG = 0.35  # share of wrong solutions
_MISCOPIED = 1 / 3  # share of wrong solutions that go wrong after the step, in the answer itself


def _decimal(value: Fraction) -> str | None:
    """As "1.05", "1.5" or "2"; None where two places do not hold it."""
    if 100 % value.denominator:
        return None
    hundredths = int(value * 100)
    return f"{hundredths // 100}.{hundredths % 100:02}".rstrip("0").rstrip(".")


@dataclasses.dataclass(frozen=True)
class _Family:
    """One kind of sum. Its numbers are (left, right, unit): both counted in units, of which `unit` make a whole.

    Attributes:
      numbers: all of them, with left >= right.
      write: (count, unit) to text, as the questions and steps have it.
      slips: by how many units a wrong result is off.
      forms: how often an answer has which form, among those that its value can have.
    """

    numbers: Callable[[], Iterator[Numbers]]
    write: Callable[[int, int], str]
    slips: tuple[int, ...]
    forms: dict[str, int]


_FAMILIES = {
    "fractions": _Family(
        lambda: ((a, b, unit) for unit in range(3, 10) for a in range(1, unit) for b in range(1, a + 1)),
        lambda count, unit: f"{count}/{unit}",
        (-2, -1, 1, 2),
        {"lowest": 16, "unreduced": 3, "mixed": 2, "decimal": 1},
    ),
    "decimals": _Family(
        lambda: ((a, b, 10) for a in range(2, 14) for b in range(1, a + 1)),
        lambda count, unit: _decimal(Fraction(count, unit)),
        (-10, -2, -1, 1, 2, 10),
        {"decimal": 15, "percent": 3, "lowest": 2},
    ),
    "percents": _Family(
        lambda: ((a, b, 20) for a in range(2, 14) for b in range(1, a + 1)),
        lambda count, unit: f"{count * 100 // unit}%",
        (-2, -1, 1, 2),
        {"percent": 15, "decimal": 3, "lowest": 2},
    ),
}


def _forms(count: int, unit: int) -> dict[str, str]:
    """The forms that a value can have, by name; the fraction in lowest terms is always one."""
    value = Fraction(count, unit)
    forms = {"lowest": str(value)}
    if value.denominator < unit:
        forms["unreduced"] = f"{count}/{unit}"
    if value > 1 and value.denominator > 1:
        forms["mixed"] = f"{value // 1} {value % 1}"
    if _decimal(value):
        forms |= {"decimal": _decimal(value), "percent": f"{_decimal(value * 100)}%"}
    return forms


def _solution(family: str, numbers: Numbers, operator: str, right: bool, rng: random.Random) -> str:
    """One step and the answer in some form; if wrong, then plausibly: in the step, or in the answer alone."""
    spec, (left, other, unit) = _FAMILIES[family], numbers
    result = left + other if operator == "+" else left - other
    said = result
    if not right:
        said += rng.choice([slip for slip in spec.slips if result + slip > 0])
        result = result if rng.random() < _MISCOPIED else said
    forms = _forms(said, unit)
    names = [name for name in spec.forms if name in forms]
    (form,) = rng.choices(names, [spec.forms[name] for name in names])
    step = f"{spec.write(left, unit)} {operator} {spec.write(other, unit)} = {spec.write(result, unit)}"
    return f"{step}\n#### {forms[form]}"


def _sums(family: str, split: str) -> Iterator[tuple[str, Numbers, str]]:
    """The (operator, numbers, thing) of a split whose result is positive and no whole number."""
    for operator, numbers, thing in itertools.product("+-", _FAMILIES[family].numbers(), _THINGS):
        left, right, unit = numbers
        result = left + right if operator == "+" else left - right
        if result % unit and word_problems.split_of(f"{family} {operator}", numbers, thing) == split:
            yield operator, numbers, thing


def _rows(split: str, size: int) -> Iterator[dict]:
    """`size` rows; every sum of a family and split appears before any appears again, with another solution."""
    rng = random.Random(split)
    endless = {}
    for family in _FAMILIES:
        mine = list(_sums(family, split))
        rng.shuffle(mine)
        endless[family] = itertools.cycle(mine)
    for family in itertools.islice(itertools.cycle(_ORDER), size):
        operator, numbers, thing = next(endless[family])
        left, right, unit = numbers
        if operator == "+" and rng.random() < 0.5:
            left, right = right, left
        write = _FAMILIES[family].write
        wrong = rng.random() < _WRONG
        solve = lambda good: _solution(family, (left, right, unit), operator, good, rng)
        yield {
            "question": f"What is {write(left, unit)} {operator} {write(right, unit)} of a {thing}?",
            "solution": solve(not wrong),
            "solution_right": int(not wrong),
            "answer": str(Fraction(left + right if operator == "+" else left - right, unit)),
            "chosen": solve(True),
            "rejected": solve(False),
            "family": family,
        }


class AnswerForms(tfds.core.GeneratorBasedBuilder):
    """Sums and differences of fractions, decimals and percents, solved in mixed forms, with a preference pair each.

    Features: `question`; `solution`, a step and `#### x` with x in some form, one in three wrong; `solution_right`, 1
    or 0; `answer`, the right fraction in lowest terms; `chosen` and `rejected`, a right and a wrong completion in forms
    drawn alike, so that the form tells little; `family`.
    """

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "Initial release."}

    def _info(self) -> tfds.core.DatasetInfo:
        names = ("question", "solution", "answer", "chosen", "rejected", "family")
        text = {name: tfds.features.Text() for name in names}
        return tfds.core.DatasetInfo(
            builder=self,
            description="Sums with answers in several forms; no numbers of a thing occur in two splits of a family.",
            features=tfds.features.FeaturesDict({**text, "solution_right": tfds.features.Scalar(np.int64)}),
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager):
        del dl_manager  # nothing to download
        return {split: self._generate_examples(split, size) for split, size in _SIZES.items()}

    def _generate_examples(self, split: str, size: int) -> Iterator[tuple[str, dict]]:
        for i, row in enumerate(_rows(split, size)):
            yield f"{split}-{i}", row

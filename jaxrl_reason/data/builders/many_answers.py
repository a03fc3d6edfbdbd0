"""Prompts with many right answers, as a TFDS builder that needs no network: for ProGRPO (arXiv 2602.05281).

Any whole numbers that meet the constraint are right, and each right answer is as likely in the solutions as any other,
so that a policy that imitates them is diverse. `rewards.task_rewards` has the verdict and the canonical form by which
right answers are told apart.

    kind         a question of it                                   right answers, of 5 and more
    sum          Name two numbers from 3 to 24 whose sum is 27.     3, 24   4, 23   ...   13, 14
    difference   Name two numbers from 3 to 24 that are 7 apart.    3, 10   4, 11   ...   17, 24
    multiple     Name a multiple of 6 from 20 to 75.                24   30   ...   72
"""

from collections.abc import Iterator
import itertools
import random

import numpy as np
import tensorflow_datasets as tfds

from jaxrl_reason.data.builders import word_problems
from jaxrl_reason.data.builders.word_problems import Numbers

_SIZES = {"train": 12_000, "validation": 1_000, "test": 1_000}
_WRONG = 0.3  # share of solutions that break the constraint
_LEAST = 5  # right answers of every prompt

_QUESTIONS = {
    "sum": "Name two numbers from {low} to {high} whose sum is {target}.",
    "difference": "Name two numbers from {low} to {high} that are {target} apart.",
    "multiple": "Name a multiple of {target} from {low} to {high}.",
}


def right_answers(kind: str, target: int, low: int, high: int) -> list[Numbers]:
    """All right answers of a constraint, each with its numbers ascending, in order.

    Args:
      kind: "sum": two numbers with the sum `target`; "difference": two numbers `target` apart; "multiple": one multiple
        of `target`.
      target: see `kind`.
      low, high: least and greatest number that may be named.

    Raises:
      ValueError: another `kind`.
    """
    if kind == "sum":
        return [(a, target - a) for a in range(low, high + 1) if a <= target - a <= high]
    if kind == "difference":
        return [(a, a + target) for a in range(low, high - target + 1)]
    if kind == "multiple":
        return [(a,) for a in range(-(-low // target) * target, high + 1, target)]
    raise ValueError(f"kind is {kind!r}; it has to be one of {', '.join(_QUESTIONS)}.")


def _constraints(kind: str) -> Iterator[Numbers]:
    """All (target, low, high) that are asked for: with enough right answers, and small numbers."""
    if kind == "multiple":
        lows = itertools.product(range(2, 7), range(1, 21))
        every = ((m, low, high) for m, low in lows for high in range(low + 5 * m, low + 5 * m + 8))
    else:
        bounds = ((low, high) for low in range(1, 6) for high in range(low + 8, 19))
        targets = range(2, 10) if kind == "difference" else range(6, 31)
        every = ((target, low, high) for low, high in bounds for target in targets)
    return (constraint for constraint in every if len(right_answers(kind, *constraint)) >= _LEAST)


def _wrong_answer(kind: str, target: int, low: int, high: int, rng: random.Random) -> list[int]:
    """Numbers that nearly meet the constraint, in the order in which they are written."""
    if rng.random() < 1 / 3:  # out of range
        beyond = rng.randint(1, 3)
        if kind == "sum":
            least = max(right_answers(kind, target, low, high)[0][0] - beyond, 0)
            return [least, target - least]
        if kind == "difference":
            return [high + beyond, high + beyond - target]
        return [high // target * target + target]
    numbers = list(rng.choice(right_answers(kind, target, low, high)))[::-1]
    slips = [n for n in (-3, -2, -1, 1, 2, 3) if numbers[0] + n > 0 and (kind != "multiple" or n % target)]
    numbers[0] += rng.choice(slips)
    return numbers


def _solution(kind: str, target: int, numbers: list[int]) -> str:
    """The claim that these numbers meet the constraint, true or not, and the numbers."""
    if kind == "multiple":
        step = f"{target} * {numbers[0] // target} = {numbers[0]}"
    else:
        step = f"{numbers[0]} {'+' if kind == 'sum' else '-'} {numbers[1]} = {target}"
    return f"{step}\n#### {', '.join(map(str, numbers))}"


def _prompts(split: str, size: int) -> Iterator[dict]:
    """`size` rows, equally many of each kind; every constraint of the split appears before any appears again."""
    rng = random.Random(split)
    endless = {}
    for kind in _QUESTIONS:
        mine = [c for c in _constraints(kind) if word_problems.split_of(kind, c) == split]
        rng.shuffle(mine)
        endless[kind] = itertools.cycle(mine)
    for kind in itertools.islice(itertools.cycle(_QUESTIONS), size):
        target, low, high = next(endless[kind])
        answers = right_answers(kind, target, low, high)
        wrong = rng.random() < _WRONG
        right = list(rng.choice(answers))[:: 1 if kind == "sum" and rng.random() < 0.5 else -1]
        numbers = _wrong_answer(kind, target, low, high, rng) if wrong else right
        yield {
            "question": _QUESTIONS[kind].format(target=target, low=low, high=high),
            "solution": _solution(kind, target, numbers),
            "solution_right": int(not wrong),
            "answer": ", ".join(map(str, sorted(right))),
            "answers": len(answers),
            "kind": kind,
            "target": target,
            "low": low,
            "high": high,
        }


class ManyAnswers(tfds.core.GeneratorBasedBuilder):
    """Prompts that five and more answers satisfy: two numbers by sum or difference, a multiple in a range.

    Features: `question`; `solution`, a line that claims the constraint and `#### N` or `#### N, M`, three in ten wrong;
    `solution_right`, 1 or 0; `answer`, one right answer with its numbers ascending; `answers`, the number of right
    answers; and the constraint, from which rewards judge: `kind`, `target`, `low`, `high`.
    """

    VERSION = tfds.core.Version("2.0.0")
    RELEASE_NOTES = {"1.0.0": "Initial release.", "2.0.0": "Prompts are dealt to the splits anew."}

    def _info(self) -> tfds.core.DatasetInfo:
        text = {name: tfds.features.Text() for name in ("question", "solution", "answer", "kind")}
        names = ("solution_right", "answers", "target", "low", "high")
        return tfds.core.DatasetInfo(
            builder=self,
            description="Prompts with many right answers; no constraint occurs in two splits.",
            features=tfds.features.FeaturesDict(text | {name: tfds.features.Scalar(np.int64) for name in names}),
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager):
        del dl_manager  # nothing to download
        return {split: self._generate_examples(split, size) for split, size in _SIZES.items()}

    def _generate_examples(self, split: str, size: int) -> Iterator[tuple[str, dict]]:
        for i, prompt in enumerate(_prompts(split, size)):
            yield f"{split}-{i}", prompt

"""Prompts with many correct answers: a TFDS builder without network, for ProGRPO (arXiv 2602.05281).

Correct answers are equally likely in the solutions, so that a policy that imitates them is diverse.
`rewards.task_rewards` has the verdict and the canonical form that distinguishes correct answers.

    kind         a question of it                                   correct answers, at least 5
    sum          Name two numbers from 3 to 24 whose sum is 27.     3, 24   4, 23   ...   13, 14
    difference   Name two numbers from 3 to 24 that are 7 apart.    3, 10   4, 11   ...   17, 24
    multiple     Name a multiple of 6 from 20 to 75.                24   30   ...   72
"""

from collections.abc import Iterator
import itertools
import random
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from jaxrl_reason.data.builders import word_problems
from jaxrl_reason.data.builders.offline import endless, OfflineBuilder
from jaxrl_reason.data.builders.word_problems import Numbers

_INCORRECT = 0.3  # share of solutions that break the constraint
_LEAST = 5  # correct answers per prompt

_QUESTIONS = {
    "sum": "Name two numbers from {low} to {high} whose sum is {target}.",
    "difference": "Name two numbers from {low} to {high} that are {target} apart.",
    "multiple": "Name a multiple of {target} from {low} to {high}.",
}


def correct_answers(kind: str, target: int, low: int, high: int) -> list[Numbers]:
    """Returns all correct answers of a constraint in ascending order, each with ascending numbers of [low, high].

    Kinds are "sum", two numbers with the sum `target`; "difference", two numbers `target` apart; and "multiple", one
    multiple of `target`. Raises ValueError for another kind.
    """
    if kind == "sum":
        return [(a, target - a) for a in range(low, high + 1) if a <= target - a <= high]
    if kind == "difference":
        return [(a, a + target) for a in range(low, high - target + 1)]
    if kind == "multiple":
        return [(a,) for a in range(-(-low // target) * target, high + 1, target)]
    raise ValueError(f"kind is {kind!r}; it has to be one of {', '.join(_QUESTIONS)}.")


def _constraints(kind: str) -> Iterator[Numbers]:
    """Returns all (target, low, high) of small numbers with enough correct answers."""
    if kind == "multiple":
        lows = itertools.product(range(2, 7), range(1, 21))
        every: Iterator[Numbers] = ((m, low, high) for m, low in lows for high in range(low + 5 * m, low + 5 * m + 8))
    else:
        bounds = ((low, high) for low in range(1, 6) for high in range(low + 8, 19))
        targets = range(2, 10) if kind == "difference" else range(6, 31)
        every = ((target, low, high) for low, high in bounds for target in targets)
    return (constraint for constraint in every if len(correct_answers(kind, *constraint)) >= _LEAST)


def _incorrect_answer(kind: str, target: int, low: int, high: int, rng: random.Random) -> list[int]:
    """Returns numbers that nearly satisfy the constraint, in the order of the text."""
    if rng.random() < 1 / 3:  # out of range
        beyond = rng.randint(1, 3)
        if kind == "sum":
            least = max(correct_answers(kind, target, low, high)[0][0] - beyond, 0)
            return [least, target - least]
        if kind == "difference":
            return [high + beyond, high + beyond - target]
        return [high // target * target + target]
    numbers = list(rng.choice(correct_answers(kind, target, low, high)))[::-1]
    slips = [n for n in (-3, -2, -1, 1, 2, 3) if numbers[0] + n > 0 and (kind != "multiple" or n % target)]
    numbers[0] += rng.choice(slips)
    return numbers


def _solution(kind: str, target: int, numbers: list[int]) -> str:
    """Returns the claim that the numbers satisfy the constraint, true or not, and the numbers."""
    if kind == "multiple":
        step = f"{target} * {numbers[0] // target} = {numbers[0]}"
    else:
        step = f"{numbers[0]} {'+' if kind == 'sum' else '-'} {numbers[1]} = {target}"
    return f"{step}\n#### {', '.join(map(str, numbers))}"


def _rows(split: str, size: int) -> Iterator[dict[str, Any]]:
    """Yields `size` rows, equally many of each kind. Every constraint of the split appears before any of them repeats."""
    rng = random.Random(split)
    fits = lambda kind, constraint: word_problems.split_of(kind, constraint) == split
    constraints = endless(rng, {kind: [c for c in _constraints(kind) if fits(kind, c)] for kind in _QUESTIONS})
    for kind in itertools.islice(itertools.cycle(_QUESTIONS), size):
        target, low, high = next(constraints[kind])
        constraint = {"kind": kind, "target": target, "low": low, "high": high}
        answers = correct_answers(kind, target, low, high)
        is_correct = rng.random() >= _INCORRECT
        answer = list(rng.choice(answers))[:: 1 if kind == "sum" and rng.random() < 0.5 else -1]
        numbers = answer if is_correct else _incorrect_answer(kind, target, low, high, rng)
        yield {
            "question": _QUESTIONS[kind].format(**constraint),
            "solution": _solution(kind, target, numbers),
            "solution_right": int(is_correct),
            "answer": ", ".join(map(str, sorted(answer))),
            "answers": len(answers),
            **constraint,
        }


class ManyAnswers(OfflineBuilder):
    """Prompts with at least five correct answers: two numbers by their sum or difference, or a multiple in a range.

    Columns: `question`; `solution`, a line that claims the constraint and `#### N` or `#### N, M`, three in ten
    incorrect; `solution_right`, 1 or 0; `answer`, one correct answer with its numbers ascending; `answers`, the number
    of correct answers; and the constraint for rewards: `kind`, `target`, `low`, `high`.
    """

    VERSION = tfds.core.Version("2.0.0")
    RELEASE_NOTES = {"1.0.0": "Initial release.", "2.0.0": "Prompts are dealt to the splits anew."}
    DESCRIPTION = "Prompts with many right answers; no constraint occurs in two splits."
    SIZES = {"train": 12_000, "validation": 1_000, "test": 1_000}
    COLUMNS = {
        **dict.fromkeys(("question", "solution", "answer", "kind"), str),
        **dict.fromkeys(("solution_right", "answers", "target", "low", "high"), np.int64),
    }

    def rows(self, split: str) -> Iterator[dict[str, Any]]:
        return _rows(split, self.SIZES[split])

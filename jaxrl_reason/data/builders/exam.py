"""Exams whose questions are worth different points: a TFDS builder without network, for RLEV (arXiv 2510.20187).

Every exam asks the same number of questions per topic:

    topic      a question of it                                steps   points   in an exam
    add        7 pens and 12 more. How many?                   1        1-2     2
    missing    7 pens and how many more are 15?                1       12-18    2
    chain      9 pens, 4 fewer and 6 more. How many?           2        1-2     2
    three      7 pens, 4 more and 3 more. How many?            2       12-18    2
    nights     Mia stays from day 3 to day 8. How long?        1        1-2     3    5: the nights between
    days       Mia stays from day 3 to day 8. How long?        2       12-18    2    6: both ends counted
    pages      Mia reads from page 3 to page 8. How many?      2        1-2     3    6: both ends counted
    turns      Mia reads from page 3 to page 8. How many?      1       12-18    2    5: the pages turned

Points and number of steps are independent: an exam has five cheap and four dear questions of one step, and as many of
two. The last four topics are two pairs that ask the same questions, and a question does not tell which count its exam
expects. No policy is correct on both: a policy rewarded by answers learns the more frequent count, nights and pages; a
policy rewarded by points learns days and turns.
"""

from collections.abc import Callable, Iterator, Sequence
import dataclasses
import itertools
import random
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from jaxrl_reason.data.builders import word_problems
from jaxrl_reason.data.builders.offline import endless, OfflineBuilder
from jaxrl_reason.data.builders.word_problems import NAMES, Numbers, OBJECTS

_CHEAP, _DEAR = (1, 2), (12, 18)  # points, from and to
_WORKED = 0.5  # share of solutions with steps; the others are the bare answer
_CARELESS = 0.3  # share of solutions whose last step, and so the answer, is incorrect


@dataclasses.dataclass(frozen=True)
class _Topic:
    """One kind of question, asked `count` times per exam. `changes` turns numbers into the arguments of `sum_up`."""

    group: str  # topics of one group share their questions, and so the numbers and things of a split
    count: int
    points: tuple[int, int]
    numbers: Sequence[Numbers]
    changes: Callable[..., Numbers]
    template: str
    things: tuple[str, ...] = OBJECTS


_DATES = "{o} stays from day {a} to day {b}. How long?"
_PAGES = "{o} reads from page {a} to page {b}. How many?"
_TWO = list(itertools.product(range(2, 13), repeat=2))
_MISSING = [(a, b) for b in range(6, 17) for a in range(2, b - 1)]
_THREE = list(itertools.product(range(2, 8), repeat=3))
_CHAIN = [(a, b, c) for a in range(4, 13) for b in range(2, a - 1) for c in range(2, 8)]
_DAYS = [(a, b) for a in range(1, 13) for b in range(a + 2, a + 11)]

_between: Callable[..., Numbers] = lambda a, b: (b, -a)
_with_both_ends: Callable[..., Numbers] = lambda a, b: (b, -a, 1)

_TOPICS = {
    "add": _Topic("add", 2, _CHEAP, _TWO, lambda a, b: (a, b), "{a} {o} and {b} more. How many?"),
    "missing": _Topic("missing", 2, _DEAR, _MISSING, lambda a, b: (b, -a), "{a} {o} and how many more are {b}?"),
    "three": _Topic("three", 2, _DEAR, _THREE, lambda a, b, c: (a, b, c), "{a} {o}, {b} more and {c} more. How many?"),
    "chain": _Topic(
        "chain", 2, _CHEAP, _CHAIN, lambda a, b, c: (a, -b, c), "{a} {o}, {b} fewer and {c} more. How many?"
    ),
    "nights": _Topic("dates", 3, _CHEAP, _DAYS, _between, _DATES, NAMES),
    "days": _Topic("dates", 2, _DEAR, _DAYS, _with_both_ends, _DATES, NAMES),
    "pages": _Topic("pages", 3, _CHEAP, _DAYS, _with_both_ends, _PAGES, NAMES),
    "turns": _Topic("pages", 2, _DEAR, _DAYS, _between, _PAGES, NAMES),
}


def _question(topic: str, numbers: Numbers, thing: str, rng: random.Random) -> dict[str, Any]:
    """Returns a question with its answer and a pupil's solution."""
    spec = _TOPICS[topic]
    steps = word_problems.sum_up(*spec.changes(*numbers))
    answer = written = steps[-1][-1]
    if rng.random() < _CARELESS:
        written += rng.choice([slip for slip in (-10, -2, -1, 1, 2, 10) if answer + slip > 0])
    lines = ["{} {} {} = {}".format(*step) for step in [*steps[:-1], (*steps[-1][:3], written)]]
    lines = lines if rng.random() < _WORKED else []
    return {
        "question": spec.template.format(**dict(zip("abc", numbers)), o=thing),
        "solution": "\n".join([*lines, f"#### {written}"]),
        "solution_right": int(written == answer),
        "answer": str(answer),
        "topic": topic,
        "points": float(rng.randint(*spec.points)),
    }


def _exams(split: str, count: int) -> Iterator[dict[str, Any]]:
    """Yields the questions of `count` exams, one exam after the other. Within an exam no question repeats."""
    rng = random.Random(split)
    fits = lambda topic, pair: word_problems.split_of(topic.group, *pair) == split
    every = {name: itertools.product(topic.numbers, topic.things) for name, topic in _TOPICS.items()}
    pairs = endless(rng, {name: [p for p in every[name] if fits(topic, p)] for name, topic in _TOPICS.items()})
    for number in range(count):
        exam: dict[str, dict[str, Any]] = {}
        for name, topic in _TOPICS.items():
            for _ in range(topic.count):
                question = _question(name, *next(pairs[name]), rng)
                while question["question"] in exam:
                    question = _question(name, *next(pairs[name]), rng)
                exam[question["question"]] = question
        total = sum(question["points"] for question in exam.values())
        for question in exam.values():
            yield question | {"exam": f"{split}-{number}", "value": question["points"] / total}


class Exam(OfflineBuilder):
    """Exams of 18 arithmetic questions in eight topics, with integer answers. Points and number of steps are independent.

    Columns: `question`; `solution`, a pupil's: the steps, or none, and `#### N`, three in ten incorrect;
    `solution_right`, 1 or 0; `answer`, the correct number as text; `topic`; `exam`, the exam's name; `points`; `value`,
    the points over the exam's total, so that the values of an exam sum to 1 (in float32, as TFDS stores numbers).
    """

    VERSION = tfds.core.Version("2.0.0")
    RELEASE_NOTES = {
        "1.0.0": "Initial release.",
        "2.0.0": "Points and number of steps are independent; two pairs of topics share their questions.",
    }
    DESCRIPTION = "Exams whose questions are worth different points; no question occurs in two splits."
    SIZES = {"train": 700, "validation": 56, "test": 56}  # exams
    COLUMNS = {
        **dict.fromkeys(("question", "solution", "answer", "topic", "exam"), str),
        **dict.fromkeys(("points", "value"), np.float32),
        "solution_right": np.int64,
    }

    def rows(self, split: str) -> Iterator[dict[str, Any]]:
        return _exams(split, self.SIZES[split])

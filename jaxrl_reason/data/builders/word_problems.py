"""Procedural arithmetic word problems with worked solutions: a TFDS builder without network.

A hash assigns each combination of numbers to one split: a test problem is never a training problem in other words.
"""

from collections.abc import Callable, Iterator
import dataclasses
import hashlib
import itertools
import random
from typing import Any

import tensorflow_datasets as tfds

from jaxrl_reason.data.builders.offline import endless, OfflineBuilder

Numbers = tuple[int, ...]
Step = tuple[int, str, int, int]  # left, operator, right, result

# Few and frequent words: nearly every word is one token of a tokenizer with 512 entries.
NAMES = ("Ana", "Ben", "Dan", "Eva", "Gus", "Ida", "Leo", "Mia", "Nora", "Sam", "Tom", "Zoe")
OBJECTS = ("apples", "books", "cards", "coins", "eggs", "nuts", "pens", "shells", "stamps", "stones")


class _Skill:
    """One kind of computation. `steps` turns numbers into (left, operator, right, result) lines; the last result is the answer."""

    def __init__(self, numbers: Callable[[], Iterator[Numbers]], steps: Callable[..., list[Step]], *templates: str):
        self.numbers, self.steps, self.templates = numbers, steps, templates


def _pairs(low: int, high: int) -> Iterator[Numbers]:
    return itertools.product(range(low, high + 1), repeat=2)


def _differences() -> Iterator[Numbers]:
    return ((a, b) for a in range(4, 25) for b in range(2, min(a - 1, 13)))


def sum_up(first: int, *changes: int) -> list[Step]:
    """Returns the lines of first + changes, one line per change."""
    lines, total = [], first
    for change in changes:
        lines.append((total, "+" if change > 0 else "-", abs(change), total + change))
        total += change
    return lines


_SKILLS = {
    "add": _Skill(
        lambda: _pairs(2, 20),
        lambda a, b: [(a, "+", b, a + b)],
        "{n} has {a} {o}. {m} gives {n} {b} more. How many {o} does {n} have now?",
        "{n} has {a} {o} and {m} has {b}. How many {o} do they have together?",
        "There are {a} {o} in a box and {b} in a bag. How many {o} are there in all?",
    ),
    "subtract": _Skill(
        _differences,
        lambda a, b: [(a, "-", b, a - b)],
        "{n} has {a} {o} and gives {b} to {m}. How many {o} does {n} have now?",
        "There are {a} {o} in a box. {n} takes {b}. How many {o} are left?",
        "{n} has {a} {o} and loses {b}. How many {o} are left?",
    ),
    "multiply": _Skill(
        lambda: _pairs(2, 12),
        lambda a, b: [(a, "*", b, a * b)],
        "{n} has {a} bags of {b} {o} each. How many {o} are there in all?",
        "There are {b} {o} in a box. How many {o} are there in {a} boxes?",
        "{n} finds {b} {o} a day. How many {o} does {n} find in {a} days?",
    ),
    "divide": _Skill(
        lambda: ((a * b, b) for a, b in _pairs(2, 10)),
        lambda a, b: [(a, "/", b, a // b)],
        "{n} shares {a} {o} among {b} friends. How many {o} does each friend get?",
        "{n} puts {a} {o} in {b} bags, the same number in each. How many {o} are in each bag?",
    ),
    "compare": _Skill(
        _differences,
        lambda a, b: [(a, "-", b, a - b)],
        "{n} has {a} {o} and {m} has {b}. How many more {o} does {n} have than {m}?",
        "{m} has {b} {o} and {n} has {a}. How many more {o} does {n} have than {m}?",
        "{n} has {a} {o} and {m} has {b}. How many fewer {o} does {m} have than {n}?",
    ),
    "more_than": _Skill(
        lambda: _pairs(2, 15),
        lambda a, b: [(a, "+", b, a + b), (a, "+", a + b, 2 * a + b)],
        "{n} has {a} {o}. {m} has {b} more than {n}. How many {o} do they have together?",
        "There are {a} {o} in a box and {b} more than that in a bag. How many {o} are there in all?",
    ),
    "two_step": _Skill(
        lambda: ((a, b, c) for a, b in _pairs(2, 12) for c in range(2, min(a + b - 1, 11))),
        lambda a, b, c: [(a, "+", b, a + b), (a + b, "-", c, a + b - c)],
        "{n} has {a} {o}, finds {b} more and gives {c} to {m}. How many {o} does {n} have now?",
        "There are {a} {o} in a box. {n} puts in {b} more and {m} takes {c}. How many {o} are left?",
    ),
    "four": _Skill(
        lambda: itertools.product(range(2, 11), repeat=4),
        lambda a, b, c, d: sum_up(a, b, c, d),
        "{n} has {a} {o}, finds {b}, then {c} and then {d} more. How many {o} does {n} have now?",
        "There are {a} {o} in a box, {b} in a bag, {c} on a table and {d} on a chair. How many {o} are there in all?",
    ),
    "find_and_give": _Skill(
        lambda: ((a, b, c, d) for a, b, c, d in itertools.product(range(2, 11), repeat=4) if a + b - c > d),
        lambda a, b, c, d: sum_up(a, b, -c, -d),
        "{n} has {a} {o}, finds {b} more, gives {c} to {m} and loses {d}. How many {o} does {n} have now?",
        "There are {a} {o} in a box. {n} puts in {b} more, {m} takes {c} and then {d}. How many {o} are left?",
    ),
    "back_and_forth": _Skill(
        lambda: ((a, b, c, d) for a, b, c, d in itertools.product(range(2, 11), repeat=4) if a > b and a - b + c > d),
        lambda a, b, c, d: sum_up(a, -b, c, -d),
        "{n} has {a} {o}, gives {b} to {m}, finds {c} more and loses {d}. How many {o} does {n} have now?",
        "There are {a} {o} in a box. {m} takes {b}, {n} puts in {c} and takes {d}. How many {o} are in the box?",
    ),
    "bags_and_more": _Skill(
        lambda: ((a, b, c) for a, b in _pairs(2, 10) for c in range(2, 11)),
        lambda a, b, c: [(a, "*", b, a * b), (a * b, "+", c, a * b + c)],
        "{n} has {a} bags of {b} {o} each and finds {c} more. How many {o} does {n} have now?",
        "{n} has {c} {o} and {m} has {a} boxes of {b}. How many {o} do they have together?",
    ),
}


def split_of(skill: str, numbers: Numbers, thing: str = "") -> str:
    """Returns the only split that may use the numbers for the skill: 6/8 train, 1/8 validation, 1/8 test.

    The order of the numbers does not matter. A skill with few numbers is split by numbers and things.
    """
    key = " ".join(filter(None, [f"{skill}:", "-".join(map(str, sorted(numbers))), thing]))
    bucket = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") % 8  # `hash` differs per process
    return {0: "validation", 1: "test"}.get(bucket, "train")


def _problem(skill: str, numbers: Numbers, rng: random.Random, worked: float) -> dict[str, str]:
    template = rng.choice(_SKILLS[skill].templates)
    n, m = rng.sample(NAMES, 2)
    words = dict(zip("abcd", numbers), n=n, m=m, o=rng.choice(OBJECTS))
    steps = _SKILLS[skill].steps(*numbers)
    answer = str(steps[-1][-1])
    lines = ["{} {} {} = {}".format(*step) for step in steps]
    lines = lines if worked == 1 or rng.random() < worked else []
    solution = "\n".join([*lines, f"#### {answer}"])
    return {"question": template.format(**words), "solution": solution, "answer": answer, "skill": skill}


@dataclasses.dataclass
class WordProblemsConfig(tfds.core.BuilderConfig):
    """Which problems."""

    skills: tuple[str, ...] = ()
    largest: int = 1000  # the largest number in a problem or its solution
    worked: float = 1.0  # the share of solutions with steps; the others are the bare answer


def _problems(config: WordProblemsConfig, split: str, size: int) -> Iterator[dict[str, str]]:
    """Yields `size` different questions, equally many of each skill. Every combination of numbers appears before any repeats."""
    rng = random.Random(split)
    largest = lambda skill, numbers: max(max(a, b, c) for a, _, b, c in _SKILLS[skill].steps(*numbers))
    fits = lambda skill, numbers: largest(skill, numbers) <= config.largest and split_of(skill, numbers) == split
    combinations = endless(rng, {s: [n for n in _SKILLS[s].numbers() if fits(s, n)] for s in config.skills})
    seen: set[str] = set()
    for skill in itertools.islice(itertools.cycle(config.skills), size):
        problem = _problem(skill, next(combinations[skill]), rng, config.worked)
        while problem["question"] in seen:
            problem = _problem(skill, next(combinations[skill]), rng, config.worked)
        seen.add(problem["question"])
        yield problem


class WordProblems(OfflineBuilder):
    """Short arithmetic word problems with worked solutions and integer answers: config "standard", or "chains" of sums.

    Columns, all text: `question`; `solution`, one step per line and `#### N` at the end; `answer`, the number; `skill`.
    """

    VERSION = tfds.core.Version("2.0.0")
    RELEASE_NOTES = {
        "1.0.0": "Initial release.",
        "2.0.0": "Splits are disjoint by the numbers of a skill; chains take the place of small.",
    }
    BUILDER_CONFIGS = [
        WordProblemsConfig(
            name="standard",
            description="Eight skills of one and two steps, numbers up to about 130, every solution worked.",
            skills=("add", "subtract", "multiply", "divide", "compare", "more_than", "two_step", "bags_and_more"),
        ),
        WordProblemsConfig(
            name="chains",
            description="Three-step sums and differences, no number above 20. Half of the solutions are bare answers, as in data "
            "that were not made for reasoning: a policy that imitates them has yet to find out that working pays.",
            skills=("four", "find_and_give", "back_and_forth"),
            largest=20,
            worked=0.5,
        ),
    ]

    DESCRIPTION = "Procedural arithmetic word problems with worked solutions; no skill's numbers occur in two splits."
    SIZES = {"train": 20_000, "validation": 1_000, "test": 1_000}
    COLUMNS = dict.fromkeys(("question", "solution", "answer", "skill"), str)

    def rows(self, split: str) -> Iterator[dict[str, Any]]:
        return _problems(self.builder_config, split, self.SIZES[split])

"""Two numbers by their sum, found by tries that are checked: a TFDS builder without network, for LaSeR (arXiv 2510.14943).

    question                          a pupil's solution
    Which two of 3,1,6,8 make 14?     14: 8+1=9 no
                                      14: 8+6=14 yes
                                      #### 86

A pupil tries pairs in random order, larger number first, and checks each against the sum. After two tries the pupil
names the last pair, whether or not its check was passed. So every solution tells whether it is correct, and a policy
that imitates them checks its own answers. The config "silent" leaves `yes` and `no` out.
"""

from collections.abc import Iterator
import dataclasses
import itertools
import random
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from jaxrl_reason.data.builders import word_problems
from jaxrl_reason.data.builders.offline import OfflineBuilder
from jaxrl_reason.data.builders.word_problems import Numbers

_NUMBERS = 4  # in a question
_TRIES = 2  # at most, in a solution


def _sums(split: str) -> Iterator[tuple[Numbers, int]]:
    """Yields the ascending numbers and the sums of two digits of a split, each the sum of one pair only."""
    for numbers in itertools.combinations(range(1, 10), _NUMBERS):
        sums = [a + b for a, b in itertools.combinations(numbers, 2)]
        for total in sums:
            if total >= 10 and sums.count(total) == 1 and word_problems.split_of("two", (*numbers, total)) == split:
                yield numbers, total


def _row(numbers: Numbers, total: int, rng: random.Random, says: bool) -> dict[str, Any]:
    pairs = [tuple(sorted(pair, reverse=True)) for pair in itertools.combinations(numbers, 2)]
    right = next(pair for pair in pairs if sum(pair) == total)
    tries = rng.sample(pairs, _TRIES)
    tries = tries[: tries.index(right) + 1] if right in tries else tries
    said = lambda a, b: (" yes" if a + b == total else " no") if says else ""
    lines = [f"{total}: {a}+{b}={a + b}{said(a, b)}" for a, b in tries]
    return {
        "question": f"Which two of {','.join(map(str, numbers))} make {total}?",
        "solution": "\n".join([*lines, "#### {}{}".format(*tries[-1])]),
        "solution_right": int(tries[-1] == right),
        "answer": "{}{}".format(*right),
    }


@dataclasses.dataclass
class CheckedTriesConfig(tfds.core.BuilderConfig):
    """Which solutions."""

    says: bool = True  # the result of each check


class CheckedTries(OfflineBuilder):
    """Questions for the two of four digits that have a sum, in every order of the digits: config "spoken" or "silent".

    Columns: `question`; `solution`, one or two checked tries and `#### N`, a third of them correct; `solution_right`, 1 or
    0; `answer`, the two digits as one number, the larger one first.
    """

    BUILDER_CONFIGS = [
        CheckedTriesConfig(name="spoken", description="Each line of a solution ends with yes or no."),
        CheckedTriesConfig(name="silent", description="The same tries without yes and no.", says=False),
    ]
    DESCRIPTION = (
        "Which two of four digits have a sum, with tries that are checked; no digits with a sum occur in two splits."
    )
    SIZES = {"train": 6_000, "validation": 900, "test": 900}
    COLUMNS = {**dict.fromkeys(("question", "solution", "answer"), str), "solution_right": np.int64}

    def rows(self, split: str) -> Iterator[dict[str, Any]]:
        rng = random.Random(split)
        every = [(order, total) for numbers, total in _sums(split) for order in itertools.permutations(numbers)]
        return (_row(*question, rng, self.builder_config.says) for question in rng.sample(every, self.SIZES[split]))

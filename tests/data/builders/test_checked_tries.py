"""Compares the sums found by checked tries, after a real preparation by TFDS, with brute force."""

import collections
import itertools
import re

import pytest

from helpers.data_sets import assert_disjoint, digest, load_splits, longest, SPLITS
from jaxrl_reason.data.builders import checked_tries
from jaxrl_reason.rewards.numeric import numeric_verdict


@pytest.fixture(scope="module")
def rows(data_dir):
    return load_splits("checked_tries", data_dir)


def asked(row):
    """Returns the digits of a question in their order, and their sum."""
    digits, total = re.fullmatch(r"Which two of ([1-9](?:,[1-9]){3}) make (1\d)\?", row["question"]).groups()
    return tuple(map(int, digits.split(","))), int(total)


def test_sizes_and_features(rows):
    assert {split: len(part) for split, part in rows.items()} == {"train": 6_000, "validation": 900, "test": 900}
    kinds = {name: type(value) for name, value in rows["test"][0].items()}
    assert kinds == {"question": str, "solution": str, "solution_right": int, "answer": str}


def test_exactly_one_pair_has_the_sum(rows):
    for row in itertools.chain(*rows.values()):
        digits, total = asked(row)
        assert len(set(digits)) == 4
        (pair,) = (pair for pair in itertools.combinations(digits, 2) if sum(pair) == total)
        assert row["answer"] == f"{max(pair)}{min(pair)}"


def test_a_solution_checks_every_try_and_names_the_last(rows):
    """It has two different tries if the first is incorrect, and its last check tells whether it is correct."""
    for row in itertools.chain(*rows.values()):
        digits, total = asked(row)
        *tries, last = row["solution"].split("\n")
        found = [re.fullmatch(r"(\d+): (\d)\+(\d)=(\d+) (yes|no)", line).groups() for line in tries]
        for target, a, b, result, check in found:
            assert {int(a), int(b)} <= set(digits) and a > b and int(target) == total
            assert int(result) == int(a) + int(b) and (check == "yes") == (int(result) == total)
        checks = [line[-1] for line in found]
        assert checks in (["yes"], ["no", "yes"], ["no", "no"]) and len(set(found)) == len(found)
        assert last == f"#### {found[-1][1]}{found[-1][2]}"
        right = numeric_verdict(row["solution"], row["answer"])
        assert right == row["solution_right"] == (checks[-1] == "yes")


def test_tries_are_a_choice_among_all_pairs(rows):
    """Of six pairs, the first try is the correct one in 1/6 of the solutions, and one of two in 1/3."""
    ends = collections.Counter(row["solution"].count("\n") + row["solution_right"] for row in rows["train"])
    assert ends[3] / 6_000 == pytest.approx(1 / 6, abs=0.02)  # two tries, the second correct
    assert sum(row["solution_right"] for row in rows["train"]) / 6_000 == pytest.approx(1 / 3, abs=0.02)


def test_no_digits_with_their_sum_occur_in_two_splits(rows):
    assert_disjoint({split: {(*sorted(asked(row)[0]), asked(row)[1]) for row in part} for split, part in rows.items()})


def test_small_enough_for_the_recipe(rows):
    question, solution = longest(rows["train"], "solution")
    assert question <= 20 and solution < 30  # one more for the end token


def test_silent_solutions_are_the_same_without_the_result_of_a_check(rows, data_dir):
    """Who judges them has to compare the two sums."""
    silent = load_splits("checked_tries/silent", data_dir)
    for split, part in rows.items():
        assert [row | {"solution": re.sub(" (yes|no)", "", row["solution"])} for row in part] == silent[split]


def test_version_1_has_fixed_rows(data_dir):
    """Checkpoints and published metrics depend on the rows: a change needs a new VERSION."""
    builder = checked_tries.CheckedTries(data_dir=data_dir)
    content = [list(builder.rows(split)) for split in SPLITS]
    assert digest(content) == "95221c6439263ab6f8c829c61e5ae1ae4bd0a73e839af5e34176fa3a4604676c"

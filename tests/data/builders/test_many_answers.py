"""Compares the prompts with many correct answers, after a real preparation by TFDS, with brute force."""

import collections
import itertools
import re

import pytest

from helpers.data_sets import assert_disjoint, digest, load_splits, longest, SPLITS
from jaxrl_reason.data.builders import many_answers
from jaxrl_reason.rewards.task_rewards import canonical_answer, many_answers_reward

COLUMNS = ("kind", "target", "low", "high")


@pytest.fixture(scope="module")
def rows(data_dir):
    return load_splits("many_answers", data_dir)


@pytest.fixture(scope="module")
def everything(rows):
    return [row for part in rows.values() for row in part]


def brute_force(kind, target, low, high):
    """Returns the correct answers by trying all numbers."""
    if kind == "multiple":
        return [(a,) for a in range(low, high + 1) if any(a == target * k for k in range(1, 200))]
    holds = (lambda a, b: a + b == target) if kind == "sum" else (lambda a, b: b - a == target)
    return [(a, b) for a, b in itertools.product(range(low, high + 1), repeat=2) if a <= b and holds(a, b)]


def constraint(row):
    return tuple(row[name] for name in COLUMNS)


def test_sizes_and_features(rows):
    assert {split: len(part) for split, part in rows.items()} == {"train": 12_000, "validation": 1_000, "test": 1_000}
    kinds = {name: type(value) for name, value in rows["test"][0].items()}
    text = dict.fromkeys(("question", "solution", "answer", "kind"), str)
    assert kinds == text | dict.fromkeys(("solution_right", "answers", "target", "low", "high"), int)
    for part in rows.values():
        counts = collections.Counter(row["kind"] for row in part)
        assert set(counts) == {"sum", "difference", "multiple"} and max(counts.values()) - min(counts.values()) <= 1


def test_the_question_states_the_constraint(everything):
    patterns = {
        "sum": r"Name two numbers from (?P<low>\d+) to (?P<high>\d+) whose sum is (?P<target>\d+)\.",
        "difference": r"Name two numbers from (?P<low>\d+) to (?P<high>\d+) that are (?P<target>\d+) apart\.",
        "multiple": r"Name a multiple of (?P<target>\d+) from (?P<low>\d+) to (?P<high>\d+)\.",
    }
    for row in everything:
        match = re.fullmatch(patterns[row["kind"]], row["question"])
        assert {name: int(text) for name, text in match.groupdict().items()} == {n: row[n] for n in COLUMNS[1:]}


def test_brute_force_finds_the_correct_answers(everything):
    asked = {constraint(row): row["answers"] for row in everything}
    for values, count in asked.items():
        assert many_answers.correct_answers(*values) == brute_force(*values)
        assert len(brute_force(*values)) == count >= 5
    assert max(asked.values()) >= 12


def test_an_unknown_kind_raises():
    with pytest.raises(ValueError, match="kind is 'product'; it has to be one of sum, difference, multiple"):
        many_answers.correct_answers("product", 12, 1, 9)


def test_the_reward_accepts_exactly_the_correct_solutions(everything):
    columns = {name: [row[name] for row in everything] for name in COLUMNS}
    verdicts = many_answers_reward([row["solution"] for row in everything], **columns)
    assert verdicts == [row["solution_right"] for row in everything]
    assert many_answers_reward([f"#### {row['answer']}" for row in everything], **columns) == [1.0] * len(everything)


def test_a_correct_solution_claims_a_true_equation_and_an_incorrect_one_is_near(everything):
    sign = {"+": lambda a, b: a + b, "-": lambda a, b: a - b, "*": lambda a, b: a * b}
    for row in everything:
        step, last = row["solution"].split("\n")
        a, operator, b, c = re.fullmatch(r"(\d+) ([-+*]) (\d+) = (\d+)", step).groups()
        true = sign[operator](int(a), int(b)) == int(c)
        assert true or not row["solution_right"], row
        assert last == (f"#### {c}" if row["kind"] == "multiple" else f"#### {a}, {b}")
        named = [int(text) for text in re.findall(r"\d+", last)]
        near = min(sum(abs(x - y) for x, y in zip(sorted(named), correct)) for correct in brute_force(*constraint(row)))
        assert near == 0 if row["solution_right"] else 0 < near <= 9, row


def test_three_in_ten_solutions_are_incorrect(rows):
    for kind in ("sum", "difference", "multiple"):
        correct = [row["solution_right"] for row in rows["train"] if row["kind"] == kind]
        assert sum(correct) / len(correct) == pytest.approx(0.7, abs=0.03)


def test_solutions_are_uniform_over_all_correct_answers(rows):
    """The rank of the answer among the correct ones, in tenths, is uniform by a chi-square test at 99.9 %."""
    for kind in ("sum", "difference", "multiple"):
        tenths = collections.Counter()
        for row in rows["train"]:
            if row["kind"] == kind and row["solution_right"]:
                every = [", ".join(map(str, answer)) for answer in brute_force(*constraint(row))]
                rank = every.index(canonical_answer(row["solution"], **row))
                for tenth in range(10):  # the overlap of the answer's share with this tenth
                    share = min((rank + 1) / len(every), (tenth + 1) / 10) - max(rank / len(every), tenth / 10)
                    tenths[tenth] += max(share, 0) * len(every)
        expected = sum(tenths.values()) / 10
        assert sum((count - expected) ** 2 / expected for count in tenths.values()) < 27.9, (kind, tenths)


def test_a_training_prompt_has_several_correct_solutions(rows):
    solutions = collections.defaultdict(set)
    for row in rows["train"]:
        if row["solution_right"]:
            solutions[constraint(row)].add(canonical_answer(row["solution"], **row))
    assert sum(map(len, solutions.values())) / len(solutions) > 2


def test_splits_share_no_constraint(rows):
    keys = {split: {constraint(row) for row in part} for split, part in rows.items()}
    assert_disjoint(keys)
    for split in ("validation", "test"):
        assert min(collections.Counter(key[0] for key in keys[split]).values()) >= 20


def test_small_enough_for_a_small_model(rows):
    question, solution = longest(rows["train"], "solution")
    assert question <= 32 and solution < 32  # one more for the end token


def test_version_2_has_fixed_rows():
    """Checkpoints and published metrics depend on the rows: a change needs a new VERSION."""
    sizes = many_answers.ManyAnswers.SIZES
    content = [list(many_answers._rows(split, sizes[split])) for split in SPLITS]
    assert digest(content) == "a01c288b1cce803bc37df1524fa36911ce87b7ca56a7909856de520b659abc8a"

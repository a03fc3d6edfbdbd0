"""Tests the sums with several forms of answers, prepared by TFDS: arithmetic, forms and preference pairs."""

import collections
from fractions import Fraction
import re

import pytest

from helpers.data_sets import assert_disjoint, column, digest, load_splits, longest, SPLITS
from jaxrl_reason.data.builders import answer_forms
from jaxrl_reason.rewards.task_rewards import judge_reward, strict_reward


@pytest.fixture(scope="module")
def rows(data_dir):
    return load_splits("answer_forms", data_dir)


@pytest.fixture(scope="module")
def everything(rows):
    return [row for part in rows.values() for row in part]


def value(text):
    """Returns the value of a number in any form of the data, by Python's Fraction."""
    if text.endswith("%"):
        return Fraction(text[:-1]) / 100
    return sum(map(Fraction, text.split()))


def parts(row):
    """Returns (left, operator, right, thing) of the question."""
    return re.fullmatch(r"What is (\S+) ([-+]) (\S+) of a (\w+)\?", row["question"]).groups()


def form(text):
    if "/" in text:
        return "mixed" if " " in text else "lowest" if str(Fraction(text)) == text else "unreduced"
    return "percent" if "%" in text else "decimal"


def test_sizes_and_features(rows):
    assert {split: len(part) for split, part in rows.items()} == {"train": 12_000, "validation": 1_000, "test": 1_000}
    kinds = {name: type(value) for name, value in rows["test"][0].items()}
    text = dict.fromkeys(("question", "solution", "answer", "chosen", "rejected", "family"), str)
    assert kinds == text | {"solution_right": int}
    for part in rows.values():
        shares = {name: count / len(part) for name, count in collections.Counter(column(part, "family")).items()}
        assert shares == {"fractions": 0.5, "decimals": 0.25, "percents": 0.25}


def test_the_answer_is_the_result_in_lowest_terms(everything):
    for row in everything:
        left, operator, right, _ = parts(row)
        result = value(left) + value(right) if operator == "+" else value(left) - value(right)
        assert row["answer"] == str(result) and result > 0 and result.denominator > 1, row


def test_the_judge_accepts_exactly_the_correct_texts(everything):
    answers = column(everything, "answer")
    assert judge_reward(column(everything, "solution"), answers) == column(everything, "solution_right")
    assert judge_reward(column(everything, "chosen"), answers) == [1.0] * len(everything)
    assert judge_reward(column(everything, "rejected"), answers) == [0.0] * len(everything)
    assert judge_reward([f"#### {answer}" for answer in answers], answers) == [1.0] * len(everything)


def test_the_judge_agrees_with_python_fractions(everything):
    for row in everything[:5000]:
        final = row["solution"].rpartition("#### ")[2]
        assert (value(final) == Fraction(row["answer"])) == row["solution_right"]


def test_steps_repeat_the_question_and_rejected_texts_slip_in_the_step_or_the_answer(everything):
    incorrect_steps = 0
    for row in everything:
        left, operator, right, _ = parts(row)
        for name in ("solution", "chosen", "rejected"):
            step, last = row[name].split("\n")
            a, sign, b, result = re.fullmatch(r"(\S+) ([-+]) (\S+) = (\S+)", step).groups()
            assert sign == operator and {a, b} == {left, right} and last.startswith("#### ")
            if name == "chosen":
                assert value(result) == value(last[5:]) == Fraction(row["answer"])
            if name == "rejected":
                assert value(result) in (value(last[5:]), Fraction(row["answer"]))
                assert value(last[5:]) > 0
                incorrect_steps += value(result) != Fraction(row["answer"])
    assert incorrect_steps / len(everything) == pytest.approx(2 / 3, abs=0.02)


def test_two_of_three_solutions_are_correct(rows):
    assert sum(column(rows["train"], "solution_right")) / 12_000 == pytest.approx(0.65, abs=0.01)


def test_the_strict_verifier_misses_about_half_of_the_correct_solutions(rows):
    missed = {}
    for family in ("fractions", "decimals", "percents"):
        part = [row for row in rows["train"] if row["solution_right"] and row["family"] == family]
        missed[family] = 1 - sum(strict_reward(column(part, "solution"), column(part, "answer"))) / len(part)
    assert missed == pytest.approx({"fractions": 0.1, "decimals": 0.9, "percents": 0.9}, abs=0.03)
    correct = [row for row in rows["train"] if row["solution_right"]]
    share = 1 - sum(strict_reward(column(correct, "solution"), column(correct, "answer"))) / len(correct)
    assert share == pytest.approx(0.5, abs=0.02)


def test_the_strict_verifier_accepts_no_incorrect_text(everything):
    answers = column(everything, "answer")
    assert not any(strict_reward(column(everything, "rejected"), answers))
    strict = strict_reward(column(everything, "solution"), answers)
    assert all(row["solution_right"] for row, verdict in zip(everything, strict) if verdict)


def test_all_forms_occur_and_tell_little_about_correctness(rows):
    counts = {n: collections.Counter() for n in ("chosen", "rejected")}
    for row in rows["train"]:
        for name, counter in counts.items():
            final = row[name].rpartition("#### ")[2]
            if "/" in final or "." in final or "%" in final:  # an incorrect answer can be a whole number
                counter[row["family"], form(final)] += 1
    assert set(counts["chosen"]) == set(counts["rejected"])
    assert {form for _, form in counts["chosen"]} == {"lowest", "unreduced", "mixed", "decimal", "percent"}
    for key, count in counts["chosen"].items():
        assert counts["rejected"][key] / 12_000 == pytest.approx(count / 12_000, abs=0.05), key


def test_splits_share_no_numbers_and_things_of_a_family(rows):
    key = lambda row: (row["family"], parts(row)[1], parts(row)[3], *sorted((parts(row)[0], parts(row)[2])))
    keys = {split: set(map(key, part)) for split, part in rows.items()}
    assert_disjoint(keys)
    for split in ("validation", "test"):
        assert min(collections.Counter(key[0] for key in keys[split]).values()) >= 30


def test_small_enough_for_a_small_model(rows):
    question, *completions = longest(rows["train"], "solution", "chosen", "rejected")
    assert question <= 32 and max(completions) < 32  # one more for the end token


def test_version_1_has_fixed_rows():
    """Checkpoints and published metrics depend on the rows: a change needs a new VERSION."""
    sizes = answer_forms.AnswerForms.SIZES
    content = [list(answer_forms._rows(split, sizes[split])) for split in SPLITS]
    assert digest(content) == "24b50ab50da7b2118d85f88225714d3c47456f15f427ffadcd2b212a36083839"

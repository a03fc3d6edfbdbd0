"""Tests the word problems after a real preparation by TFDS: disjoint splits, arithmetic, reproducible rows."""

import collections
import operator
import re

import numpy as np
import pytest

from helpers.data_sets import assert_disjoint, digest, load_splits
from jaxrl_reason import data
from jaxrl_reason.data.builders import word_problems

SIZES = {"train": 20_000, "validation": 1_000, "test": 1_000}
OPERATIONS = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.floordiv}


@pytest.fixture(scope="module", params=["standard", "chains"])
def rows(request, problems, data_dir):
    if request.param == "standard":
        return {split: list(source) for split, source in problems.items()}
    return load_splits(f"word_problems/{request.param}", data_dir)


@pytest.fixture
def is_standard(request):
    return "standard" in request.node.callspec.id


def numbers(row):
    return tuple(sorted(int(digits) for digits in re.findall(r"\d+", row["question"])))


def test_sizes_and_features(rows):
    assert {split: len(part) for split, part in rows.items()} == SIZES
    for part in rows.values():
        assert set(part[0]) == {"question", "solution", "answer", "skill"}
        assert all(isinstance(value, str) and value for row in part for value in row.values())


def test_every_split_has_the_same_share_of_every_skill(rows):
    for part in rows.values():
        counts = collections.Counter(row["skill"] for row in part)
        assert len(counts) == len({row["skill"] for row in rows["train"]}) >= 3
        assert set(counts.values()) <= {len(part) // len(counts), -(-len(part) // len(counts))}


def test_splits_share_no_numbers_of_a_skill(rows):
    keys = {split: {(row["skill"], numbers(row)) for row in part} for split, part in rows.items()}
    assert_disjoint(keys)


def test_no_question_appears_twice(rows):
    questions = [row["question"] for part in rows.values() for row in part]
    assert len(set(questions)) == len(questions)


def test_held_out_skills_have_at_least_ten_combinations_of_numbers(rows):
    for split in ("validation", "test"):
        for skill in {row["skill"] for row in rows[split]}:
            assert len({numbers(row) for row in rows[split] if row["skill"] == skill}) >= 10, (split, skill)


def test_every_step_is_correct_and_leads_to_the_answer(rows):
    for part in rows.values():
        for row in part:
            *steps, last = row["solution"].split("\n")
            assert last == f"#### {row['answer']}"
            assert int(row["answer"]) > 0
            known = set(re.findall(r"\d+", row["question"]))
            for step in steps:
                left, sign, right, result = re.fullmatch(r"(\d+) ([-+*/]) (\d+) = (\d+)", step).groups()
                assert OPERATIONS[sign](int(left), int(right)) == int(result), row
                assert sign != "/" or int(left) % int(right) == 0, row
                assert {left, right} <= known, row  # from the question or an earlier step
                known.add(result)
            assert not steps or result == row["answer"]


def test_half_of_the_chains_are_bare_answers(rows, is_standard):
    bare = np.mean([row["solution"].startswith("####") for row in rows["train"]])
    assert bare == 0 if is_standard else 0.48 < bare < 0.52


def test_chains_have_three_steps_and_standard_problems_eight_skills(rows, is_standard):
    steps = {row["solution"].count("\n") for row in rows["train"]}
    assert steps == ({1, 2} if is_standard else {0, 3})
    assert len({row["skill"] for row in rows["train"]}) == (8 if is_standard else 3)


def test_small_enough_for_a_small_model(rows, is_standard):
    limit = 32 if is_standard else 40  # 40: max_prompt_length and max_completion_length of the recipes
    part = rows["train"][:4000]
    tokenizer = data.train_tokenizer(f"{row['question']}\n{row['solution']}" for row in part)
    assert max(map(len, tokenizer.encode_batch([row["question"] for row in part]))) <= limit
    assert (
        max(map(len, tokenizer.encode_batch([row["solution"] for row in part]))) < limit
    )  # one more for the end token


def test_a_second_preparation_gives_the_same_data(problems, tmp_path):
    again = data.load_source("word_problems", "validation", data_dir=tmp_path)
    assert list(again) == list(problems["validation"])
    assert again.fingerprint == problems["validation"].fingerprint


def test_version_2_has_fixed_rows():
    """Checkpoints and published metrics depend on the rows: a change needs a new VERSION."""
    configs = word_problems.WordProblems.BUILDER_CONFIGS
    content = [list(word_problems._problems(c, s, size)) for c in configs for s, size in SIZES.items()]
    assert digest(content) == "1fb6365c0d9838d8701174a1d82ea3d7d768943b3a35e687e2bce0807b6a4385"

"""Tests the problems of reasoning-gym: with a stand-in for its generators, and with the package itself if it is installed."""

import re
import sys
import types

import pytest

from jaxrl_reason import data
from jaxrl_reason.data.builders import reasoning_gym as builder
from jaxrl_reason.rewards import last_number_reward


def load(task, data_dir):
    return {
        split: list(data.load_source(f"reasoning_gym/{task}", split, data_dir=data_dir)) for split in ("train", "test")
    }


def package(problems):
    """Returns a stand-in for the package. Its `create_dataset` has the arguments, and returns what `problems` makes of them."""
    module = types.ModuleType("reasoning_gym")
    module.create_dataset = lambda name, *, seed, size, **options: [problems(name, i, options) for i in range(size)]
    return module


def test_a_question_occurs_once_and_a_fifth_is_test(tmp_path, monkeypatch):
    def problem(name, i, options):
        assert name == "chain_sum" and options == {"max_terms": 3, "max_digits": 1}
        a = i % 1000
        return {"question": f"{a} + 1 =", "answer": str(a + 1), "metadata": {"expression": f"{a} + 1"}}

    monkeypatch.setitem(sys.modules, "reasoning_gym", package(problem))
    rows = load("short_chain_sum", tmp_path)
    questions = [row["question"] for part in rows.values() for row in part]
    assert sorted(questions) == sorted(f"{a} + 1 =" for a in range(1000))
    assert 150 < len(rows["test"]) < 250 and all(builder.split_of(row["question"]) == "test" for row in rows["test"])
    for row in rows["train"]:
        assert row["solution"] == f"{row['question']} {row['answer']}"


def test_a_chain_is_worked_out_from_the_left():
    assert list(builder._steps("4 - 8 - 2 + 9")) == ["4 - 8 = -4", "-4 - 2 = -6", "-6 + 9 = 3"]


def test_the_last_line_of_a_solution_is_the_answer_as_the_data_spell_it(tmp_path, monkeypatch):
    problem = lambda name, i, options: {
        "question": f"What is half of {2 * i}?",
        "answer": str(i),
        "metadata": {"answer_cot": f"It is #### of {2 * i}: {2 * i} / 2 = {float(i)}\n#### {float(i)}"},
    }
    monkeypatch.setitem(sys.modules, "reasoning_gym", package(problem))
    row = load("gsm_symbolic", tmp_path)["test"][0]
    n = row["answer"]
    assert row["solution"] == f"It is #### of {2 * int(n)}: {2 * int(n)} / 2 = {n}.0\n#### {n}"
    assert last_number_reward([row["solution"]], [n]) == [1]


def test_without_the_package_the_error_names_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(
        ValueError, match="'reasoning_gym/gsm_symbolic' are prepared, once, .*: pip install reasoning-gym"
    ):
        load("gsm_symbolic", tmp_path)


def test_the_problems_of_the_package(tmp_path):
    pytest.importorskip("reasoning_gym")
    for task, count in (("short_chain_sum", 2299), ("gsm_symbolic", 5948)):
        rows = load(task, tmp_path)
        every = [row for part in rows.values() for row in part]
        assert len(every) == len({row["question"] for row in every}) == count
        assert 0.15 < len(rows["test"]) / count < 0.25
        assert all(re.fullmatch(r"-?\d+(\.\d+)?", row["answer"]) for row in every)
        assert set(last_number_reward([row["solution"] for row in every], [row["answer"] for row in every])) == {1.0}
    for row in load("short_chain_sum", tmp_path)["test"]:
        expression = row["question"].partition(": ")[2].removesuffix(" =")
        assert re.fullmatch(r"\d( [+-] \d){1,2}", expression) and eval(expression) == int(row["answer"])
        steps = [line.split(" = ") for line in row["solution"].splitlines()]
        assert all(eval(left) == int(right) for left, right in steps)
        total, *terms = expression.split()
        for left, right in steps:
            assert left.split() == [total, *terms[:2]]
            total, terms = right, terms[2:]
        assert total == row["answer"] and not terms

"""Prompt templates insert columns literally, so that braces in the data are safe."""

from hypothesis import given
from hypothesis import strategies as st
import pytest

from jaxrl_reason import data

ROW = {"question": "1 + 1?", "solution": "1 + 1 = 2\n#### 2", "answer": 2}


def test_the_templates_of_the_library():
    assert data.get_template("plain").render_prompt(ROW) == "1 + 1?\n"
    assert data.get_template("plain").render_solution(ROW) == ROW["solution"]
    assert data.get_template("qa").render_prompt(ROW) == "Question: 1 + 1?\nAnswer:"
    assert data.get_template("qa").render_solution(ROW) == " " + ROW["solution"]
    assert all(name == template.name for name, template in data.TEMPLATES.items())


def test_inline_templates():
    template = data.get_template("Put it in \\boxed{}: {question} {answer}")
    assert template.render_prompt(ROW) == "Put it in \\boxed{}: 1 + 1? 2"
    assert data.get_template(template) is template


@given(st.text(), st.text())
def test_braces_in_values_are_never_replaced(question, solution):
    template = data.PromptTemplate("both", "<{question}|{solution}>")
    assert template.render_prompt({"question": question, "solution": solution}) == f"<{question}|{solution}>"


def test_values_that_resemble_columns_stay():
    row = {"question": "{answer} {0} {question} \\1", "answer": "7"}
    assert data.get_template("plain").render_prompt(row) == row["question"] + "\n"


def test_a_missing_column_names_template_column_and_columns():
    with pytest.raises(
        ValueError,
        match="template 'plain' names the column 'solution', which this row does not have; its columns are answer, question. "
        "Solutions are for the supervised start; --config.supervised.steps=0",
    ):
        data.get_template("plain").render_solution({"question": "a", "answer": "b"})
    with pytest.raises(
        ValueError, match="names the column 'hint', .* Of a Parquet file, only columns that config.data"
    ):
        data.get_template("{hint} {question}").render_prompt({"question": "a"})


@pytest.mark.parametrize("role, name", [("human", "user"), ("gpt", "assistant")])
def test_roles_of_other_formats_are_refused_with_their_names(role, name):
    with pytest.raises(ValueError, match=f"turn 0 has the role '{role}'; name it '{name}'"):
        data.prompts.turns_of([{"role": role, "content": "a"}, {"role": "user", "content": "b"}])


def test_an_unknown_template_names_the_nearest():
    with pytest.raises(ValueError, match="'plian' \\(did you mean 'plain'"):
        data.get_template("plian")

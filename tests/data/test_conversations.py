"""Tests questions that are conversations. All turns go through the chat template, or a sentence says why not."""

import csv
import dataclasses
import json

import pyarrow
import pyarrow.parquet
import pytest

from jaxrl_reason import data
from jaxrl_reason.data import chat_template, get_template
from jaxrl_reason.data.prompts import parse_turns, turns_of

CHATML = (
    "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
NO_SYSTEM = (
    "{% for m in messages %}{% if m.role != 'system' %}{{ '<|' + m.role + '|>' + m.content }}{% endif %}{% endfor %}"
)
PARTS = "{% for m in messages %}<|{{ m.role }}|>{% for p in m.content %}{{ p.text }}{% endfor %}{% endfor %}"
LAST = "<|user|>{{ messages[-1].content }}"
TURNS = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "1 + 1?"},
    {"role": "assistant", "content": "2"},
    {"role": "user", "content": "2 + 2?"},
]
TEXT = "<|system|>Be brief.<|user|>1 + 1?<|assistant|>2<|user|>2 + 2?<|assistant|>"


@pytest.fixture(scope="module")
def backend():
    return data.train_tokenizer(["hello"], 300)


def chat(backend, text, inner="{question}", **options):
    return chat_template(get_template(inner), dataclasses.replace(backend, chat_template=text), **options)


@pytest.mark.parametrize("column", ["prompt", "messages", "question"])
@pytest.mark.parametrize("kind", ["jsonl", "parquet", "csv", "text in parquet"])
def test_a_conversation_goes_through_the_chat_template(write, tmp_path, backend, column, kind):
    rows = [{column: TURNS, "answer": "4"}, {column: TURNS[1:2], "answer": "2"}]
    path = str(tmp_path / "rows.parquet")
    if kind == "csv":
        path = str(tmp_path / "rows.csv")
        with open(path, "w", newline="") as file:
            cells = [[json.dumps(row[column], indent=1), row["answer"]] for row in rows]
            csv.writer(file).writerows([[column, "answer"], *cells])
    elif kind == "text in parquet":
        texts = [row | {column: json.dumps(row[column])} for row in rows]
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(texts), path)
    elif kind == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        path = write("".join(json.dumps(row) + "\n" for row in rows))
    for columns in ({}, {"question": column}):
        source = data.load_source(path, "all", columns=columns)
        assert list(source) == [{"question": TURNS, "answer": "4"}, {"question": TURNS[1:2], "answer": "2"}]
    template = chat(backend, CHATML)
    assert template.render_prompt(source[0]) == TEXT
    assert template.render_prompt(source[1]) == "<|user|>1 + 1?<|assistant|>"
    assert chat(backend, CHATML, "boxed").render_prompt(source[0]) == TEXT.replace(
        "2 + 2?", "2 + 2?\nPlease reason step by step, and put your final answer within \\boxed{}."
    )
    assert chat(backend, CHATML, system="Hi.").render_prompt(source[1]) == "<|system|>Hi.<|user|>1 + 1?<|assistant|>"
    with pytest.raises(ValueError, match="config.data.system is set, and the question begins with a system turn"):
        chat(backend, CHATML, system="Hi.").render_prompt(source[0])


def test_without_a_chat_template_one_turn_is_a_plain_question():
    plain = get_template("qa")
    assert plain.render_prompt({"question": TURNS[1:2]}) == "Question: 1 + 1?\nAnswer:"
    with pytest.raises(
        ValueError, match="'question' is a conversation of 4 turns, and .* set config.data.chat to True"
    ):
        plain.render_prompt({"question": TURNS})


def test_the_question_is_the_first_column_of_three(write):
    row = {"messages": TURNS[:2], "prompt": "p", "answer": 1}
    assert data.load_source(write(json.dumps(row)), "all")[0]["question"] == "p"
    assert data.load_source(write(json.dumps(row | {"question": "q"})), "all")[0] == row | {"question": "q"}


@pytest.mark.parametrize(
    "question, contents",
    [
        ("a", ["a"]),
        (7, ["7"]),
        ([{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}], ["ab"]),
        ({"role": ["system", "user"], "content": ["s", "u"]}, ["s", "u"]),  # as TFDS stores a sequence of turns
        ([{"role": "user", "content": "a", "name": None}], ["a"]),
    ],
)
def test_spellings_of_a_conversation(question, contents):
    assert [turn["content"] for turn in turns_of(question)] == contents
    assert all(set(turn) == {"role", "content"} for turn in turns_of(question))


@pytest.mark.parametrize(
    "question, message",
    [
        ([], "it has to be text, a number, or a list of turns"),
        ({"text": "a"}, "it has to be text, a number, or a list of turns"),
        (["a"], "turn 0 has to have a role and a content that is text"),
        ([{"from": "human", "value": "a"}], "turn 0 has to have a role"),
        ([{"role": "user", "content": None}], "turn 0 has to have a role"),
        (
            [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "a"}]}],
            "turn 0 has to have a role",
        ),
        ([{"role": "user", "content": " "}], "turn 0, the user's, is empty"),
        (TURNS[:3], "its last turn is the assistant's; it has to be the user's"),
        (TURNS[:1], "its last turn is the system's"),
    ],
)
def test_other_lists_are_bad_rows(write, question, message):
    with pytest.raises(ValueError, match=message):
        turns_of(question)
    path = write(json.dumps({"question": question, "answer": 1}) + "\n" + json.dumps({"question": "a", "answer": 1}))
    with pytest.raises(ValueError, match=f"line 1: column 'question' is a JSON .*, and .*{message}"):
        data.load_source(path, "all")


@pytest.mark.parametrize(
    "question",
    [
        "[1, 2]",
        '[{"a": 1}]',
        "[{role}]",
        '{"role": "user"}',
        '{"content": "a"}',
        '[{"content": 1}]',
        "{x}",
        "[] [",
        " ",
    ],
)
def test_other_texts_stay_texts(question):
    assert parse_turns(question) == question


@pytest.mark.parametrize(
    "question", [str(TURNS), json.dumps(TURNS)[:-1], '[{"content": "a", "role": "user"', '[{"role": ' + "[" * 100_000]
)
def test_a_conversation_that_is_no_json_is_a_bad_row(write, question):
    path = write(json.dumps({"prompt": question, "answer": 1}) + "\n" + json.dumps({"prompt": "a", "answer": 1}))
    with pytest.raises(
        ValueError, match="line 1: the question is text that begins like a list of turns, and is not JSON"
    ):
        data.load_source(path, "all")


def test_other_columns_are_not_parsed(write):
    row = {"question": "a", "answer": "1", "history": json.dumps(TURNS)}
    assert data.load_source(write(json.dumps(row)), "all", columns={"history": "history"})[0] == row


def test_one_turn_as_json_text_and_any_order_of_keys(write):
    """One turn as text is a bad row too. The first key of a turn can have any name."""
    path = write(json.dumps({"prompt": json.dumps(TURNS[1]), "answer": 1}))
    with pytest.raises(ValueError, match="line 1: column 'question' is a JSON object, and it has to be text, a number"):
        data.load_source(path, "all")
    turns = [{"id": 3, **turn} for turn in TURNS[:2]]
    assert (
        data.load_source(write(json.dumps({"prompt": json.dumps(turns), "answer": 1})), "all")[0]["question"] == turns
    )


@pytest.mark.parametrize(
    "turns, path, message",
    [
        ({"role": ["system", "user"], "content": ["s", "u"]}, "content.{}", "'question': 'data.turns' takes the whole"),
        (
            [{"from": "system", "value": "s"}, {"from": "human", "value": "u"}],
            "{}.value",
            "turns of role and content can",
        ),
        ({"from": ["gpt", "human"], "value": ["s", "u"]}, "value.{}", "turns of role and content can"),
    ],
)
def test_a_turn_by_its_place_in_other_spellings(write, turns, path, message):
    """TFDS and datasets store turns as lists of fields. Other files have the names `from` and `value`."""
    file, column = write(json.dumps({"data": {"turns": turns}, "answer": 1})), f"data.turns.{path}"
    role = (turns["from"] if "from" in turns else turns["role"])[0] if isinstance(turns, dict) else "system"
    with pytest.raises(ValueError, match=f"'{column.format(0)}' is the {role}'s turn; {message}"):
        data.load_source(file, "all", columns={"question": column.format(0)})
    with pytest.warns(UserWarning, match=f"'{column.format(1)}' leaves out the other turns of its conversation; "):
        assert data.load_source(file, "all", columns={"question": column.format(1)})[0]["question"] == "u"


def test_a_turn_by_its_place(write, recwarn):
    path = write(json.dumps({"prompt": TURNS, "answer": 1}) + "\n" + json.dumps({"prompt": TURNS[1:2], "answer": 1}))
    for place, role in ((0, "system"), (2, "assistant")):
        with pytest.raises(
            ValueError,
            match=f"line 1: the question 'prompt.{place}.content' is the {role}'s turn; 'question': 'prompt' takes",
        ):
            data.load_source(path, "all", columns={"question": f"prompt.{place}.content"})
    assert not recwarn
    one = write(json.dumps({"data": {"turns": TURNS[1:2]}, "answer": 1}), "one.jsonl")
    assert data.load_source(one, "all", columns={"question": "data.turns.0.content"})[0]["question"] == "1 + 1?"
    assert not recwarn
    several = write(json.dumps({"prompt": TURNS, "answer": 1}), "several.jsonl")
    with pytest.warns(
        UserWarning,
        match="question 'prompt.3.content' leaves out the other turns .*columns=\"{'question': 'prompt'}\" takes all",
    ):
        assert data.load_source(several, "all", columns={"question": "prompt.3.content"})[0]["question"] == "2 + 2?"


def test_repeats_of_conversations_are_found(write):
    rows = [{"question": TURNS, "answer": 1}, {"question": TURNS, "answer": 2}, {"question": TURNS[1:], "answer": 1}]
    source = data.load_source(write("".join(json.dumps(row) + "\n" for row in rows)), "all")
    turns = get_template("plain").turns
    with pytest.warns(UserWarning, match="line 2 repeats .*line 1|another answer|held-out") as warned:
        data.warn_of_repeats(source, source, lambda row: "\n".join(turn["content"] for turn in turns(row)))
    assert any("repeat in 1 of 3 rows" in str(w.message) for w in warned)


# ---- the text of a template has all turns ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, question, system, message",
    [
        (NO_SYSTEM, "1 + 1?", "Think.", "leaves out the system prompt"),
        (NO_SYSTEM, TURNS, "", "leaves out the system's turn 'Be brief.'"),
        (PARTS, "1 + 1?", "", "leaves out the user's turn"),
        (LAST, TURNS, "", "leaves out the (system|user)'s turn"),
        ("<|user|>", "1 + 1?", "", "leaves out the user's turn"),
        ("{{ messages[0].content }}", "the same", "the same", "leaves out"),  # one text, two turns
        (NO_SYSTEM, "1 + 1?", "user", "leaves out the system prompt"),  # the prompt is also a word of the template
        (PARTS, "user", "", "leaves out the user's turn"),
        ("{{ messages[-1].content[:20] }}", "a question of 26 letters..", "", "leaves out the user's turn"),
    ],
)
def test_a_template_that_leaves_something_out_is_refused(backend, text, question, system, message):
    with pytest.raises(ValueError, match=f"The model's chat template {message}.*: use another template"):
        chat(backend, text, system=system).render_prompt({"question": question})


@pytest.mark.parametrize(
    "text, question, expected",
    [
        ("{{ messages[0].content | trim }}", "  1 + 1? \n", "1 + 1?"),
        ("{{ messages | tojson }}", 'a "b"\nc', '[{"role": "user", "content": "a \\"b\\"\\nc"}]'),
        # The system prompt can be a part of the user's turn, and thoughts of earlier turns can be dropped.
        (
            "[INST] {{ messages[0].content }}\n\n{{ messages[1].content }}[/INST]",
            TURNS[:2],
            "[INST] Be brief.\n\n1 + 1?[/INST]",
        ),
        (
            "{% for m in messages %}{{ m.content.split('</think>')[-1].lstrip('\n') }}|{% endfor %}",
            [TURNS[1], {"role": "assistant", "content": "<think>one more</think>\n\n2"}, TURNS[3]],
            "1 + 1?|2|2 + 2?|",
        ),
    ],
)
def test_changes_that_lose_nothing_are_accepted(backend, text, question, expected):
    assert chat(backend, text).render_prompt({"question": question}) == expected


# ---- strftime_now ---------------------------------------------------------------------------------------------------------

DATED = "{{ strftime_now('%d %b %Y') }}|{{ messages[0].content }}"
LLAMA = "{% if strftime_now is defined %}{% set day = strftime_now('%d %b %Y') %}{% endif %}{{ day }}|{{ messages[0].content }}"


@pytest.mark.parametrize("text", [DATED, LLAMA])
def test_templates_have_a_day_that_a_resumed_run_keeps(backend, text):
    assert chat(backend, text).render_prompt({"question": "a"}) == "26 Jul 2024|a"
    assert chat(backend, text, options={"today": "2026-01-31"}).render_prompt({"question": "a"}) == "31 Jan 2026|a"


@pytest.mark.parametrize("day", ["31.1.2026", "", 5, "2026-02-30"])
def test_a_day_that_is_no_day_is_refused(backend, day):
    with pytest.raises(ValueError, match="config.data.chat_options names the day .*; write it as '2024-07-26'"):
        chat(backend, DATED, options={"today": day})
    with pytest.raises(ValueError, match="chat_options names 'strftime_now'"):
        chat(backend, DATED, options={"strftime_now": day})

"""Tests common kinds of files, columns that a file lacks, and the values of structured columns for rewards."""

import gzip
import json

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from jaxrl_reason import data
from jaxrl_reason.data import sources
from jaxrl_reason.data.parsers import kind_of
from jaxrl_reason.data.preferences import PreferenceStream

ROWS = [
    {"question": 'What is "5" in words,\nplease?', "answer": "five", "level": "1"},
    {"question": "Zürich, 甲?", "answer": "1,234", "level": ""},
]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)
CSV = 'question,answer,level\n"What is ""5"" in words,\nplease?",five,1\n"Zürich, 甲?","1,234",\n'
TSV = 'question\tanswer\tlevel\n"What is ""5"" in words,\nplease?"\tfive\t1\nZürich, 甲?\t1,234\t\n'
LIST = json.dumps(ROWS, indent=2)


@pytest.mark.parametrize(
    "name, content, first, second",
    [
        ("rows.jsonl", LINES, "line 1", "line 2"),
        ("rows.JSONL", "\ufeff" + LINES + "\n\n", "line 1", "line 2"),
        ("rows.json", LIST, "row 0", "row 1"),
        ("rows.json", json.dumps(ROWS), "row 0", "row 1"),
        ("rows.json", "\ufeff\n" + LIST + "\n", "row 0", "row 1"),
        ("rows.json", LINES, "line 1", "line 2"),
        ("rows.csv", CSV, "line 2", "line 4"),
        (
            "Rows.CSV",
            "\ufeff" + CSV.replace("\n", "\r\n").replace(",\r\nplease", ",\nplease") + "\r\n",
            "line 2",
            "line 4",
        ),
        ("rows.csv", CSV.replace("question,answer", ' question, "answer"'), "line 2", "line 4"),
        ("rows.tsv", TSV, "line 2", "line 4"),
    ],
)
@pytest.mark.parametrize("zipped", [False, True])
def test_files_of_every_kind_have_the_same_rows(write, name, content, first, second, zipped):
    content = content.encode()
    path = write(gzip.compress(content), name + ".gz") if zipped else write(content, name)
    source = data.load_source(path, "all")
    assert list(source) == ROWS
    assert [source.place(0), source.place(1)] == [f"{path}, {first}", f"{path}, {second}"]
    assert data.load_source(path, "[1:]")[0]["answer"] == "1,234"


def test_a_directory_with_the_name_of_a_data_set_is_not_in_its_way(problems, data_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "word_problems").mkdir()
    assert len(data.load_source("word_problems", "test", data_dir=data_dir)) == len(problems["test"])


def test_kinds_by_name():
    names = {"a.jsonl": ".jsonl", "A.JSON.GZ": ".json", "hf://datasets/o/n/x.tsv.gz": ".tsv", "a.Parquet": ".parquet"}
    assert {name: kind_of(name) for name in names} == names
    assert not any(map(kind_of, ["gsm8k", "a.parquet.gz", "a.gz", "a.txt", "csv", "a.xlsx", "wikipedia/20230601.en"]))


@pytest.mark.parametrize("name", ["rows.txt", "rows.jsonl.bz2", "rows.arrow", "rows.parquet.gz"])
def test_other_files_raise_one_sentence(write, name):
    path = write("question\n", name)
    with pytest.raises(
        ValueError, match="is no file of rows that can be read: a file ends in .jsonl, .*parquet.$"
    ) as e:
        data.load_source(path, "all")
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("name", ["rows.txt", "./rows.xlsx", "/nowhere/rows", "/tmp", "gs://bucket/rows", "a b", ""])
def test_names_that_tfds_cannot_parse_raise_one_sentence(name):
    message = "There is no data set .*: give word_problems, .*, or a path; a file ends in .jsonl, .json, .csv"
    with pytest.raises(ValueError, match=message) as e:
        data.load_source(name, "train")
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.json", b"", "no usable row: the file is empty"),
        ("a.json", b"[]", "no usable row: the file is empty"),
        ("a.json", b'[{"question": "a"}', "a.json is not a whole JSON list: row 0 is followed by '', line 1"),
        ("a.json", b'[{"question": "a"} {"question": "b"}]', "not a whole JSON list: row 0 is followed by '{'"),
        ("a.json", b'[{"question": "a"}] x', "not a whole JSON list"),
        ("a.json", b'[{"question": "a"},\n{"question": b}]', "is not JSON: Expecting value at line 2, character 14"),
        ("a.json", b'[{"question": "a", "question": "b"}]', "row 0 is not readable as JSON: 'question' occurs twice"),
        ("a.json", b'[{"question": "a"},\n "\xff"]', "a.json, line 2 is not UTF-8"),
        ("a.json", b'[3, {"question": "a"}]', "row 0: a JSON number; a row has to be an object with columns"),
        ("a.json", b'{\n "data": [{"question": "a"}]\n}', "holds one JSON object; it has to hold a list of rows"),
        ("a.csv", b"", "has no header: it is empty"),
        ("a.csv", b"question,answer\n", "has a header and no rows"),
        ("a.csv", b"question,question\n1,2\n", "line 1: columns 1 and 2 are both named 'question'"),
        ("a.csv", b"question,\n1,2\n", "line 1: column 2 has no name"),
        ("a.csv", b"question,answer\na,1\nb\n", "line 3: 1 cell, but the header names 2 columns"),
        ("a.csv", b"question,answer\na,1\n\nb,2\n", "line 3: no cells, but the header names 2 columns"),
        ("a.csv", b'question,answer\na,1\n"b,2\n', "line 3 is not readable as CSV: unexpected end of data"),
        ("a.csv", b"question,answer\na,1\n\xff,2\n", "line 3 is not UTF-8"),
        ("a.csv", b"question,answer\na\0,1\n", "line 2 holds NUL, as in a damaged file"),
        ("a.csv", b"question,answer\na,1\n,2\n", "line 3: column 'question' is empty"),
        ("a.csv", b"question;answer\na;1\n", "there is no column 'question', only 'question;answer'. Name the columns"),
        ("a.tsv", "question\tanswer\na\t1\n".encode("utf-16"), "a.tsv is UTF-16 or UTF-32 by its first bytes"),
        ("a.jsonl.gz", b'{"question": "a"}\n', "a.jsonl.gz is not a whole gzip file: Not a gzipped file"),
        ("a.jsonl.gz", gzip.compress(LINES.encode() * 50)[:-20], "a.jsonl.gz is not a whole gzip file: "),
    ],
)  # fmt: skip
def test_damaged_files_raise_a_sentence(write, name, content, message):
    with pytest.raises(ValueError, match=message):
        data.load_source(write(content, name), "all")


def test_bad_rows_of_csv_files_can_be_skipped(write):
    path = write("question,answer\na,1\nb\n,2\nc,3\n", "rows.csv")
    with pytest.warns(
        UserWarning, match="2 bad rows skipped, 2 kept:\n.*line 3: 1 cell.*\n.*line 4: column 'question' is"
    ):
        source = data.load_source(path, "all", on_bad_row="skip")
    assert list(source) == [{"question": "a", "answer": "1"}, {"question": "c", "answer": "3"}]


def test_rows_after_an_open_quote_are_not_lost_unnoticed(write):
    path = write('question,answer\na,1\n"b"c,2\nd,3\n', "rows.csv")
    with pytest.raises(ValueError, match=f"^{path}, line 3 is not readable as CSV: ',' expected after '\"'.$"):
        data.load_source(path, "all", on_bad_row="skip")


@pytest.mark.parametrize(
    "content",
    [
        ",question,answer\n0,a,1\n1,b,2\n",
        ",question,answer,\n0,a,1,\n,b,2,\n",
        ",question,answer\r\n0,a,1\r\n1,b,2\r\n",
    ],
)
def test_an_index_of_pandas_is_left_out_and_said_once(write, content):
    path = write(content, "rows.csv")
    with pytest.warns(UserWarning) as warned:
        assert list(data.load_source(path, "all")) == [
            {"question": "a", "answer": "1"},
            {"question": "b", "answer": "2"},
        ]
    assert [str(w.message) for w in warned] == [
        f"{path}: the first column has no name, as an index that pandas writes; it is left out."
    ]


@pytest.mark.parametrize(
    "header, column", [(",,question,answer", 2), (",question,,answer", 3), ("question,,answer,", 4)]
)
def test_only_the_first_column_without_a_name_can_be_an_index(write, header, column):
    with pytest.raises(ValueError, match=f"line 1: column {column} has no name; the first line has to name every"):
        data.load_source(write(f"{header}\n0,1,2,3\n", "rows.csv"), "all")


def test_bad_rows_beside_an_index_keep_their_lines(write):
    with pytest.warns(UserWarning), pytest.raises(ValueError, match="line 3: 2 cells, but the header names 3 columns"):
        data.load_source(write(",question,answer\n0,a,1\n1,b\n", "rows.csv"), "all")


def test_columns_without_content_count_as_absent(write, recwarn):
    rows = [{"question": "a", "answer": "1"}, {"question": "b", "answer": "2"}]
    for content in (
        "question,answer,\na,1,\nb,2,\n",
        'question,answer,\na,1," "\nb,2,\n',
        'question,answer,solution,value\na,1,,\nb,2,," "\n',
        "question,prompt,answer\n,a,1\n,b,2\n",
    ):
        assert list(data.load_source(write(content, "rows.csv"), "all")) == rows
    assert list(data.load_source(write("question,answer\na,\nb,\n", "rows.csv"), "all")) == [
        {"question": "a"},
        {"question": "b"},
    ]
    assert data.load_source(write("question,notes\na,\n", "rows.csv"), "all")[0] == {
        "question": "a",
        "notes": "",
    }  # a column for a reward
    assert not recwarn
    with pytest.raises(ValueError, match="line 2: column 'answer' is empty"):
        data.load_source(write("question,answer\na,\nb,\n", "rows.csv"), "all", columns={"answer": "answer"})
    with pytest.raises(ValueError, match="there is no column 'question', only 'answer'"):
        data.load_source(write("question,answer\n,1\n,2\n", "rows.csv"), "all")


def test_long_cells(write):
    text = "x" * 300_000
    assert data.load_source(write(f"question,answer\n{text},1\n", "rows.csv"), "all")[0]["question"] == text


# ---- columns --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.csv", "rows.parquet"])
@pytest.mark.parametrize("on_bad_row", ["refuse", "skip"])
def test_a_column_that_all_rows_lack_is_reported_once(write, tmp_path, name, on_bad_row):
    rows = [{"problem": f"{i}", "label": f"{i}"} for i in range(30)]
    if name.endswith(".parquet"):
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / name)
        path = str(tmp_path / name)
    elif name.endswith(".csv"):
        path = write("problem,label\n" + "".join(f"{i},{i}\n" for i in range(30)), name)
    else:
        path = write(json.dumps(rows) if name == "rows.json" else "".join(json.dumps(row) + "\n" for row in rows), name)
    with pytest.raises(ValueError) as e:
        data.load_source(path, "all", on_bad_row=on_bad_row)
    assert str(e.value).count("no column") == 1 and "\n" not in str(e.value)
    assert str(e.value).startswith(
        f"In {path}, there is no column 'question', only 'problem', 'label'. Name the columns"
    )
    assert "--config.data.columns=\"{'question': 'problem'}\"" in str(e.value)
    with pytest.raises(
        ValueError, match=r"no column 'anser' \(to be used as 'answer'\), only 'problem', 'label'. Name"
    ):
        data.load_source(path, "all", columns={"question": "problem", "answer": "anser"}, on_bad_row=on_bad_row)
    source = data.load_source(path, "all", columns={"question": "problem", "answer": "label"})
    assert source[29] == {"question": "29", "answer": "29"}


def test_tfds_names_the_flag_too(problems, data_dir):
    with pytest.raises(ValueError, match="no column 'problem' .*--config.data.columns"):
        data.load_source("word_problems", "test", data_dir=data_dir, columns={"question": "problem"})


@pytest.mark.parametrize("extra", [{}, {"answer": None}, {"tests": ["assert f(1) == 2"]}])
def test_rows_need_no_answer(write, tmp_path, extra):
    rows = [{"question": f"Write a poem, {i}.", **extra} for i in range(3)]
    expected = [{name: value for name, value in row.items() if value is not None} for row in rows]
    path = write("".join(json.dumps(row) + "\n" for row in rows))
    assert list(data.load_source(path, "all")) == expected
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    columns = {"tests": "tests"} if "tests" in extra else {}
    assert list(data.load_source(str(tmp_path / "rows.parquet"), "all", columns=columns)) == expected


def test_a_named_answer_is_needed_in_every_row(write):
    path = write('{"question": "a", "answer": null}\n')
    with pytest.raises(ValueError, match="line 1: column 'answer' is a JSON null"):
        data.load_source(path, "all", columns={"answer": "answer"})


def test_rows_without_an_answer_are_listed_in_order(write):
    lines = [
        '{"question": "a"}',
        '{"question": "b", "answer": 1}',
        '{"question": "", "answer": 1}',
        '{"question": "d"}',
    ]
    with pytest.raises(
        ValueError, match="3 bad rows:\n.*line 1: .*'answer'.*\n.*line 3: .* empty\n.*line 4: .*'answer'"
    ):
        data.load_source(write("\n".join(lines)), "all")


def test_structured_columns_of_parquet_files_reach_rewards(tmp_path):
    rows = [{"question": "a", "answer": "1", "tests": [{"in": [1, 2], "out": "x"}], "none": None, "big": "y" * 99}]
    path = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    columns = {"tests": "tests", "first": "tests.0.in", "none": "none"}
    row = data.load_source(str(path), "all", columns=columns)[0]
    assert row == {k: rows[0][k] for k in ("question", "answer", "tests", "none")} | {"first": [1, 2]}
    with pytest.raises(ValueError, match="column 'answer' is a JSON list; it has to be text or a number"):
        data.load_source(str(path), "all", columns={"answer": "tests"})
    with pytest.raises(ValueError, match="column 'solution' is a JSON list"):
        data.load_source(str(path), "all", columns={"solution": "tests"})


def test_numbers_of_32_bits_are_the_decimals_that_they_print_as(tmp_path):
    """The correct answer 0.1 must equal the reference. In float64, the reference would be 0.10000000149011612."""
    small = pyarrow.array([0.1, None, float("inf")], pyarrow.float32())
    nested = pyarrow.array([{"a": [0.1, None], "b": 0.1}] * 3, pyarrow.struct({"a": pyarrow.list_(pyarrow.float32()), "b": pyarrow.float64()}))  # fmt: skip
    halves = pyarrow.array(np.array([0.1, 0.2, 0.3], np.float16))
    columns = dict(question=["a", "b", "c"], answer=halves, small=small, nested=nested, wide=[0.1, 1 / 3, 2.0])
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "rows.parquet")
    named = {name: name for name in ("small", "nested", "wide")}
    found = list(data.load_source(str(tmp_path / "rows.parquet"), "all", columns=named))
    assert [row["answer"] for row in found] == [0.1, 0.2, 0.3]
    assert [row["small"] for row in found] == [0.1, None, float("inf")]
    assert found[0]["nested"] == {"a": [0.1, None], "b": 0.1}
    assert [row["wide"] for row in found] == [0.1, 1 / 3, 2.0]
    stored = {
        "one": np.float32(0.1),
        "row": np.array([[0.1], [0.2]], np.float32),
        "half": np.float16(0.1),
        "wide": 1 / 3,
    }
    assert sources._plain(stored) == {"one": 0.1, "row": [[0.1], [0.2]], "half": 0.1, "wide": 1 / 3}


def test_text_of_tfds_is_text_everywhere():
    stored = {
        "answers": np.array([b"Z\xc3\xbcrich", b"\xe7\x94\xb2"], object),
        "nested": {"texts": [b"a", np.array([b"b"], object)], "scores": np.array([[1, 2]], np.int32)},
        "score": np.float32(0.5),
        "raw": b"\xff\x00",
        "image": np.zeros((2, 2, 3), np.uint8),
    }
    plain = sources._plain(stored)
    assert plain["image"] is stored["image"]
    del plain["image"]
    assert plain == {
        "answers": ["Zürich", "甲"],
        "nested": {"texts": ["a", ["b"]], "scores": [[1, 2]]},
        "score": 0.5,
        "raw": b"\xff\x00",
    }
    assert type(plain["nested"]["scores"][0][0]) is int


def test_preference_pairs_need_no_answer(write, tokenizer):
    rows = [{"prompt": f"{i} + 1 =", "chosen": f"{i + 1}", "rejected": "no"} for i in range(4)]
    source = data.load_source(write("".join(json.dumps(row) + "\n" for row in rows)), "all")
    options = dict(batch_size=2, max_prompt_length=16, max_completion_length=8, seed=0)
    stream = PreferenceStream(source, tokenizer, data.get_template("plain"), **options)
    # The longest completion has the two tokens of "no" and the end token.
    assert stream.batch(0).tokens.shape == (2, 2, 3)

"""Tests one data file per kind of damage. Messages name file, line and reason, and no row disappears silently."""

import contextlib
import json
import os
import pathlib
import subprocess
import sys
import time
import warnings

import pyarrow
import pyarrow.parquet
import pytest

from jaxrl_reason import data
from jaxrl_reason.data import tables
from jaxrl_reason.data.preferences import PreferenceStream

GOOD = b'{"question": "1 + 1?", "answer": 2}\n'
NEXT = b'{"question": "2 + 2?", "answer": 4}\n'
PLAIN = data.get_template("plain")
TOKENIZER = data.train_tokenizer(["1 + 1 = 2"], vocab_size=270)

# name: (content, {bad line: reason}). The rows GOOD and NEXT around bad lines stay.
DAMAGED = {
    "cut in the last line": (
        GOOD + NEXT + b'{"question": "3 + 3?", "ans',
        {3: "not JSON: Unterminated string .*; the file ends in this line, which may be cut off"},
    ),
    "cut in a character": (GOOD + NEXT + '{"question": "é'.encode()[:-1], {3: "byte 15 is not UTF-8"}),
    "latin-1": (GOOD + '{"question": "é", "answer": 1}\n'.encode("latin-1") + NEXT, {2: "byte 15 is not UTF-8"}),
    "encodings mixed": (
        GOOD + '{"question": "é", "answer": 1}\n'.encode() + '{"question": "é", "answer": 1}\n'.encode("cp1252") + NEXT,
        {3: "byte 15 is not UTF-8"},
    ),
    "a NUL byte": (GOOD + b'{"question": "a\0b", "answer": 1}\n' + NEXT, {2: "byte 16 is NUL, as in a damaged file"}),
    "a block of NUL bytes": (GOOD + NEXT + b"\0" * 512, {3: "byte 1 is NUL"}),
    "UTF-16 further down": (
        GOOD + NEXT + '{"question": "a", "answer": 1}\n'.encode("utf-16-be"),
        {3: "byte 1 is NUL, .* or one in UTF-16"},
    ),
    "a blank line": (GOOD + b"\n" + NEXT, {2: "the line is blank"}),
    "a boolean": (GOOD + b'{"question": "a", "answer": true}\n' + NEXT, {2: "column 'answer' is a JSON boolean"}),
    "nested": (
        GOOD + b'{"question": {"text": "a"}, "answer": 1}\n{"question": "b", "answer": [[1]]}\n' + NEXT,
        {2: "column 'question' is a JSON object", 3: "column 'answer' is a JSON list"},
    ),
    "half a character inside": (
        GOOD + b'{"question": "a", "answer": 1, "messages": [{"content": "\\ud800"}]}\n' + NEXT,
        {2: "column 'messages' holds half of a surrogate pair"},
    ),
    "a value twice": (
        GOOD + b'{"question": "a", "answer": 1, "answer": 2}\n' + NEXT,
        {2: "'answer' occurs twice in one object"},
    ),
    "two rows in a line": (GOOD + GOOD.strip() + GOOD + NEXT, {2: "not JSON: Extra data at character 36$"}),
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_damage_is_reported_by_file_line_and_reason(write, kind):
    content, bad = DAMAGED[kind]
    path = write(content)
    reports = "".join(rf"\n  {path}, line {line}: {reason}[^\n]*" for line, reason in bad.items())
    count = "1 bad row" if len(bad) == 1 else f"{len(bad)} bad rows"
    with pytest.raises(ValueError, match=f"^{path} has {count}:{reports}\nCorrect the file".replace("$", "")):
        data.load_source(path, "all")
    kept = content.count(b"\n") + (not content.endswith(b"\n")) - len(bad)
    with pytest.warns(UserWarning, match=f"^{path}: {count} skipped, {kept} kept:{reports}$".replace("$", "")):
        source = data.load_source(path, "all", on_bad_row="skip")
    assert (len(source), source.skipped) == (kept, len(bad))
    lines = [n for n in range(1, kept + len(bad) + 1) if n not in bad]
    assert [source.place(i) for i in range(kept)] == [f"{path}, line {n}" for n in lines]
    assert {source[i]["answer"] for i in range(kept)} >= {2, 4}


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32"])
def test_a_file_in_another_encoding_raises_one_sentence(write, encoding):
    path = write((GOOD + NEXT).decode().encode(encoding))
    for on_bad_row in ("refuse", "skip"):
        with pytest.raises(ValueError, match=f"^{path} is UTF-16 or UTF-32 by its first bytes; save it as UTF-8\\.$"):
            data.load_source(path, "all", on_bad_row=on_bad_row)


def test_a_warning_lists_ten_skipped_rows_and_counts_the_rest(write):
    path = write(GOOD + b"{}\n" * 25 + NEXT)
    with pytest.warns(UserWarning) as warned:
        data.load_source(path, "all", on_bad_row="skip")
    message = str(warned[0].message)
    assert message.startswith(f"{path}: 25 bad rows skipped, 2 kept:\n  {path}, line 2: there is no column")
    assert message.count(", line ") == 10 and message.endswith("\n  and 15 more")


def test_a_cut_parquet_file_and_columns_of_other_types(tmp_path):
    path = tmp_path / "rows.parquet"
    rows = [{"question": "a", "answer": 1}, {"question": "b", "answer": 2}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ValueError, match=f"^{path} is not a Parquet file that can be read"):
        data.load_source(str(path), "all", on_bad_row="skip")
    rows = [{"question": f"question {i} " * 50, "answer": i} for i in range(50)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, compression="gzip")
    content = path.read_bytes()
    for start in range(100, 400, 20):  # only decompression may notice damage in the data
        path.write_bytes(content[:start] + b"\x5a" * 20 + content[start + 20 :])
        with contextlib.suppress(ValueError), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            data.load_source(str(path), "all", on_bad_row="skip")
    texts = pyarrow.Array.from_buffers(
        pyarrow.string(), 2, [None, pyarrow.py_buffer(b"\0\0\0\0\1\0\0\0\2\0\0\0"), pyarrow.py_buffer(b"a\xff")]
    )
    days = pyarrow.array([1, 2**40], pyarrow.timestamp("s"))
    pyarrow.parquet.write_table(pyarrow.table({"question": texts, "answer": [1, 2]}), path)
    with pytest.raises(ValueError, match=f"{path}, row 1: .*utf-8"):
        data.load_source(str(path), "all")
    pyarrow.parquet.write_table(pyarrow.table({"question": ["a", "b"], "answer": [1, 2], "value": days}), path)
    with pytest.raises(ValueError, match=f"{path}, row 1: "):
        data.load_source(str(path), "all")
    rows = [{"question": b"\xff", "answer": 1}, {"question": b"b", "answer": 2}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    with pytest.raises(ValueError, match=f"{path}, row 0: column 'question' is of type bytes; it has to be text or a"):
        data.load_source(str(path), "all")


def test_rows_that_do_not_fit_are_named_by_their_line(write):
    """The line numbers are correct after a skipped bad row, and in a slice."""
    long = json.dumps({"question": "9" * 30, "answer": 1, "solution": "7"}).encode() + b"\n"
    path = write(GOOD + b"{}\n" + long + NEXT + long * 12)
    with pytest.warns(UserWarning, match="1 bad row skipped"):
        source = data.load_source(path, "[1:]", on_bad_row="skip")
    options = dict(batch_size=1, max_prompt_length=8, seed=0)
    with pytest.raises(ValueError) as refused:
        data.PromptStream(source, TOKENIZER, PLAIN, **options)
    first = f"{path}, line 3 has a prompt of 31 tokens; 1 to 8 fit (max_prompt_length)\n  {path}, line 5 has"
    assert str(refused.value).startswith(f"13 of 14 rows do not fit:\n  {first}")
    with pytest.warns(UserWarning) as warned:
        stream = data.PromptStream(source, TOKENIZER, PLAIN, on_long="skip", **options)
    message = str(warned[0].message)
    assert message.startswith(f"Skipped: 13 of 14 rows do not fit:\n  {first}") and message.endswith("\n  and 3 more")
    assert stream.skipped == 13 and stream.batch(0).rows[0]["question"] == "2 + 2?"


def test_a_row_without_a_solution_raises(write):
    path = write(GOOD.replace(b"}", b', "solution": "2"}') + NEXT.replace(b"}", b', "solution": null}'))
    options = dict(batch_size=1, max_prompt_length=8, max_completion_length=8, seed=0)
    with pytest.raises(
        ValueError, match=f"^{path}, line 2: column 'solution' is None, .* it has to be text or a number"
    ):
        data.SolutionStream(data.load_source(path, "all"), TOKENIZER, PLAIN, **options)


# -- repeated rows -----------------------------------------------------------------------------------------------------


def warnings_of(recwarn):
    return [str(w.message) for w in recwarn.list if issubclass(w.category, UserWarning)]


def test_repeated_questions_and_other_answers_are_reported_with_their_lines(write, recwarn):
    other = GOOD.replace(b"2}", b"3}").replace(b'1 + 1?"', b'1 + 1? "')
    path = write(GOOD + NEXT + GOOD + b'{"question": "5?", "answer": 5}\n' + other + NEXT)
    held_out = data.load_source(write(b'{"question": "6?", "answer": 6}\n', "held.jsonl"), "all")
    source = data.load_source(path, "all")
    data.warn_of_repeats(source, held_out, PLAIN.render_prompt)
    same, different = warnings_of(recwarn)
    assert same == (
        f"{path}: earlier prompts repeat in 3 of 6 rows; the rows are kept and count again:\n"
        f"  {path}, line 3 repeats {path}, line 1\n  {path}, line 5 repeats {path}, line 1\n  {path}, line 6 repeats {path}, line 2"
    )
    assert different.startswith(f"{path}: another answer in 1 of the repeats; check which is correct:\n")
    assert different.endswith(f"  {path}, line 5 repeats {path}, line 1")
    assert len(source) == 6


def test_held_out_prompts_among_the_training_prompts_are_reported_with_both_places(write, recwarn):
    path = write(GOOD + NEXT + b'{"question": "5?", "answer": 5}\n')
    held = write(b'{"problem": "7?", "answer": 7}\n{"problem": "5?", "answer": 5}\n', "held.jsonl")
    train = data.load_source(path, "all")
    held_out = data.load_source(held, "all", columns={"question": "problem"})
    data.warn_of_repeats(train, held_out, PLAIN.render_prompt)
    (leak,) = warnings_of(recwarn)
    assert leak == (
        f"{held}: training prompts of {path} occur in 1 of 2 held-out rows, so held-out metrics are too high:\n"
        f"  {held}, line 2 is {path}, line 3"
    )
    recwarn.clear()
    data.warn_of_repeats(train, data.load_source(held, "[:1]", columns={"question": "problem"}), PLAIN.render_prompt)
    assert not warnings_of(recwarn)


def test_repeats_are_compared_by_the_rendered_prompt(write, recwarn):
    rows = [{"question": "How many?", "text": f"{i} apples", "answer": i} for i in (1, 2)]
    source = data.load_source(write("".join(json.dumps(row) + "\n" for row in rows).encode()), "all")
    data.warn_of_repeats(source, source, lambda row: f"{row['text']} {row['question']}")
    (leak,) = warnings_of(recwarn)
    assert "occur in 2 of 2 held-out rows" in leak


def test_many_repeats_are_counted(write, recwarn):
    path = write(GOOD * 31)
    source = data.load_source(path, "[:30]")
    data.warn_of_repeats(source, data.load_source(path, "[30:]"), PLAIN.render_prompt)
    same, leak = warnings_of(recwarn)
    assert "repeat in 29 of 30 rows" in same and same.count(" repeats ") == 10 and same.endswith("\n  and 19 more")
    assert leak.endswith(f"  {path}, line 31 is {path}, line 1")


def test_prepared_data_sets_may_repeat_on_purpose(problems, recwarn):
    data.warn_of_repeats(problems["test"], problems["test"], PLAIN.render_prompt)
    assert not warnings_of(recwarn)


def test_repeated_and_reversed_pairs_are_reported(write, recwarn):
    rows = [("1?", "a", "b"), ("2?", "a", "b"), ("1?", "a", "b"), ("1?", "a", "c"), ("2?", "b", "a")]
    content = "".join(json.dumps(dict(question=q, answer=0, chosen=c, rejected=r)) + "\n" for q, c, r in rows)
    path = write(content.encode())
    options = dict(batch_size=1, max_prompt_length=8, max_completion_length=8, seed=0)
    stream = PreferenceStream(data.load_source(path, "all"), TOKENIZER, PLAIN, **options)
    same, reversed_ = warnings_of(recwarn)
    assert same.endswith(
        f"earlier pairs repeat in 1 of 5 rows; the rows are kept and count again:\n  {path}, line 3 and {path}, line 1"
    )
    assert "earlier pairs are reversed in 1 of 5 rows" in reversed_ and reversed_.endswith(
        f"\n  {path}, line 5 and {path}, line 2"
    )
    assert stream.size == 5


@pytest.mark.slow
def test_a_run_prints_all_reports(tmp_path):
    rows = [{"question": f"{i} + 1?", "answer": i + 1} for i in range(8)] + [{"question": "1 + 1?", "answer": 3}]
    lines = [json.dumps(row) for row in rows] + ["{", json.dumps({"question": "9" * 99, "answer": 1})]
    train, held = tmp_path / "train.jsonl", tmp_path / "held.jsonl"
    train.write_text("\n".join(lines) + "\n")
    held.write_text(lines[-1] + "\n" + json.dumps(rows[2]) + "\n")
    command = [
        sys.executable,
        "-m",
        "jaxrl_reason.train",
        "--config=configs/quickstart.py",
        f"--workdir={tmp_path / 'run'}",
    ]
    fields = {
        "data.train": train,
        "data.train_split": "all",
        "data.eval": held,
        "data.eval_split": "all",
        "data.on_bad_row": "skip",
        "data.on_long_prompt": "skip",
        "supervised.steps": 0,
        "eval.prompts": 1,  # its row does not fit, so the run ends before it compiles
    }
    command += [f"--config.{name}={value}" for name, value in fields.items()]
    done = subprocess.run(
        command,
        cwd=pathlib.Path(__file__).parents[2],
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2, done.stderr[-4000:]
    for report in (
        f"{train}: 1 bad row skipped, 10 kept:\n  {train}, line 10: not JSON",
        f"{train}, line 9 repeats {train}, line 2",
        "another answer in 1 of the repeats",
        f"{held}, line 2 is {train}, line 3",
        f"Skipped: 1 of 10 rows do not fit:\n  {train}, line 11 has a prompt of",
        f"error: 1 of 1 rows do not fit:\n  {held}, line 1 has a prompt of",
    ):
        assert report in done.stderr, done.stderr[-4000:]


def test_many_columns_are_read_quickly_and_ten_are_named(tmp_path):
    """One of 20,000 columns occurs twice. The message is short, and reading is much faster than a quadratic search."""
    names = [f"column{i}" for i in range(20_000)]
    path = tmp_path / "rows.jsonl"
    path.write_text('{"question": "a", ' + ", ".join(f'"{name}": 1' for name in [*names, names[-1]]) + "}\n")
    (tmp_path / "rows.csv").write_text(",".join([*names, names[-1]]) + "\n" + "1," * 20_000 + "1\n")
    (tmp_path / "odd.csv").write_text(",".join(names) + "\n" + "1," * 19_999 + "1\n")
    wide = tmp_path / "wide.jsonl"
    wide.write_text(json.dumps({"q" * 1_000_000: 1} | dict.fromkeys(names, 1)) + "\n")
    for report, read in {
        "'column19999' occurs twice in one object": lambda: data.load_source(str(path), "all"),
        "columns 20000 and 20001 are both named 'column19999'": lambda: tables.load_table(
            str(tmp_path / "rows.csv"), "all", target="column0"
        ),
        "'column9' and 19990 more": lambda: tables.load_table(str(tmp_path / "odd.csv"), "all", target="?"),
        "'column8' and 19991 more": lambda: data.load_source(str(wide), "all"),
    }.items():
        begin = time.process_time()
        with pytest.raises(ValueError) as error:
            read()
        assert time.process_time() - begin < 1
        assert report in str(error.value) and len(str(error.value)) < 2000

"""Tests sources: data sets that TFDS really prepares, JSONL and Parquet files with bad rows, and hub addresses."""

import contextlib
import http.client
import io
import json
import logging
import time
import urllib.error

from hypothesis import given
from hypothesis import strategies as st
import pyarrow
import pyarrow.parquet
import pytest
import tensorflow_datasets as tfds

from jaxrl_reason import data
from jaxrl_reason.data import files, preparing, sources
from jaxrl_reason.data.builders import word_problems

GOOD = b'{"question": "1 + 1?", "answer": 2}\n'


def numbered(count):
    return b"".join(json.dumps({"question": f"q{i}", "answer": i}).encode() + b"\n" for i in range(count))


# ---- TFDS -----------------------------------------------------------------------------------------------------------------


def test_word_problems_by_name(problems, data_dir):
    source = problems["test"]
    assert (source.name, source.skipped, len(source)) == ("word_problems", 0, 1000)
    assert source[3] == list(source)[3]
    assert [source[i] for i in (5, 999)] == source.read([5, 999])
    part = data.load_source("word_problems", "test[:10]", data_dir=data_dir)
    assert list(part) == source.read(range(10))
    assert part.fingerprint != source.fingerprint != problems["validation"].fingerprint


def test_data_that_another_process_prepares_meanwhile_are_used(tmp_path, monkeypatch):
    monkeypatch.setattr(word_problems.WordProblems, "SIZES", {"train": 5, "test": 3})
    generate, others = word_problems.WordProblems._split_generators, []

    def overtaken(self, dl_manager):
        if not others:
            others.append(1)
            others.append(data.load_source("word_problems", "train", data_dir=tmp_path))
        return generate(self, dl_manager)

    monkeypatch.setattr(word_problems.WordProblems, "_split_generators", overtaken)
    source = data.load_source("word_problems", "train", data_dir=tmp_path)
    assert list(source) == list(others[1]) and len(source) == 5


@pytest.mark.parametrize("index", [-1, 1000])
def test_rows_outside_raise(problems, index):
    with pytest.raises(IndexError, match=f"word_problems has no row {index}; its rows are 0 to 999"):
        problems["test"][index]


def test_columns_rename_and_keep(data_dir):
    source = data.load_source(
        "word_problems", "test", data_dir=data_dir, columns={"question": "skill", "gold": "answer"}
    )
    row = source[0]
    assert set(row) == {"question", "gold", "answer", "solution"}
    assert row["gold"] == row["answer"]


@pytest.mark.parametrize("kept", [True, False])
def test_rows_of_a_small_data_set_are_parsed_once(problems, data_dir, monkeypatch, kept):
    parsed, rename = [], sources.files.rename_columns
    monkeypatch.setattr(sources.files, "rename_columns", lambda row, columns: parsed.append(1) or rename(row, columns))
    monkeypatch.setattr(sources, "_KEPT", 300 if kept else 3)
    source = data.load_source("word_problems", "test[:4]", data_dir=data_dir)
    rows = list(source)
    rows[1]["question"] = "changed by its reader"
    assert source.read([3, 1, 1]) == [source[3], source[1], source[1]]
    assert source[1]["question"] != "changed by its reader"
    assert (len(parsed) == 4) == kept


@pytest.mark.parametrize(
    "name, split, columns, message",
    [
        (
            "word_problem_typo",
            "train",
            {},
            "no data set 'word_problem_typo': give word_problems, exam, many_answers, answer_forms, checked_tries, sums, reasoning_gym, gsm8k, another name that TFDS knows, or a path",
        ),
        ("word_problems", "dev", {}, "Split 'dev' of data set 'word_problems' cannot be opened: .*'validation'"),
        (
            "word_problems/chain",
            "train",
            {},
            "'word_problems/chain' cannot be opened: 'word_problems' has no 'chain', only standard, chains",
        ),
        ("sums/x", "train", {}, "'sums/x' cannot be opened: 'sums' has no 'x'.$"),
        ("word_problems", "train[0:0]", {}, "Split 'train\\[0:0\\]' of data set 'word_problems'"),
        (
            "word_problems",
            "train",
            {"question": "problem"},
            "there is no column 'problem' \\(to be used as 'question'\\), only .*'skill'",
        ),
    ],
)
def test_unknown_names_raise_a_sentence(problems, data_dir, name, split, columns, message):
    with pytest.raises(ValueError, match=message):
        data.load_source(name, split, data_dir=data_dir, columns=columns)


def test_a_package_that_a_builder_of_tfds_lacks_is_named(tmp_path, monkeypatch):
    def prepare(self):
        raise ModuleNotFoundError("No module named 'pretty_midi'")

    monkeypatch.setattr(preparing, "_check_reachable", lambda url: None)
    monkeypatch.setattr(tfds.core.DatasetBuilder, "download_and_prepare", prepare)
    with pytest.raises(ValueError, match="The data set 'gsm8k' cannot be prepared: No module named 'pretty_midi'.$"):
        data.load_source("gsm8k", "train", data_dir=tmp_path)


def test_gsm8k_by_its_own_builder(tmp_path, monkeypatch):
    """Local files in the published format replace the download. Everything else is real."""
    rows = [
        {"question": "Natalia sold 48 clips…?", "answer": "She sold 48/2 = <<48/2=24>>24.\n#### 24"},
        {"question": "How much is a house?", "answer": "80,000+50,000=<<80000+50000=130000>>130,000\n#### 130,000"},
        {"question": "How cold?", "answer": "0-3=<<0-3=-3>>-3\n#### -3"},
    ]

    def local_files(self, urls):
        for name in urls:
            (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return {name: tmp_path / f"{name}.jsonl" for name in urls}

    monkeypatch.setattr(tfds.download.DownloadManager, "download_and_extract", local_files)
    monkeypatch.setattr(preparing, "_check_reachable", lambda url: None)
    source = data.load_source("gsm8k", "train", data_dir=tmp_path / "prepared")
    assert sorted(row["answer"] for row in source) == ["-3", "130000", "24"]
    solutions = {row["question"]: row["answer"] for row in rows}
    for row in source:
        assert set(row) == {"question", "solution", "answer"}
        assert row["solution"] == solutions[row["question"]]
    assert len(data.load_source("gsm8k", "test", data_dir=tmp_path / "prepared")) == 3


def prepare(tmp_path, capfd, name="word_problems"):
    """Prepares a data set, and returns its rows and the output on stdout and stderr."""
    source = data.load_source(name, "train", data_dir=tmp_path)
    return source, capfd.readouterr()


def test_the_first_use_is_one_sentence_and_later_uses_are_silent(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(word_problems.WordProblems, "SIZES", {"train": 5, "test": 3})
    source, written = prepare(tmp_path, capfd)
    folder = tmp_path / "word_problems" / "standard" / "2.0.0"
    assert written == ("", f"The data set 'word_problems' is being generated; it will be in {folder}.\n")
    again, written = prepare(tmp_path, capfd)
    assert written == ("", "") and list(again) == list(source)


def test_a_download_without_network_is_announced_at_once_and_ends_in_a_sentence(tmp_path, monkeypatch, capfd):
    said = []
    monkeypatch.setattr(preparing, "_check_reachable", lambda url: said.append(url))

    def unreachable(self, urls):
        said.append(capfd.readouterr().err)
        print("noise")
        logging.getLogger("urllib3").warning("Retrying")
        raise OSError("Max retries exceeded.\nMore.")

    monkeypatch.setattr(tfds.download.DownloadManager, "download_and_extract", unreachable)
    folder = tmp_path / "gsm8k" / "1.0.0"
    with pytest.raises(OSError) as caught:
        data.load_source("gsm8k", "train", data_dir=tmp_path)
    assert said == [
        "https://raw.githubusercontent.com",
        f"The data set 'gsm8k' is being downloaded; it will be in {folder}.\n",
    ]
    assert str(caught.value) == (
        f"The data set 'gsm8k' could not be prepared in {folder}: Max retries exceeded. Check the network, or name a "
        "folder with the prepared data (config.data.data_dir)."
    )
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    "answer, message",
    [
        (None, ""),
        (urllib.error.HTTPError("https://host:8", 404, "Not found", None, None), ""),  # a server that answers
        (urllib.error.URLError(OSError("no route")), r"host cannot be reached \(no route\)"),
        (TimeoutError("timed out"), r"host cannot be reached \(timed out\)"),
        (http.client.BadStatusLine("x"), r"host cannot be reached \(x\)"),
    ],
)
def test_a_server_is_asked_once_before_a_download(monkeypatch, answer, message):
    asked = []

    def urlopen(request, timeout):
        asked.append((request.get_method(), request.full_url, timeout))
        if answer:
            raise answer
        return io.BytesIO()

    monkeypatch.setattr(preparing.urllib.request, "urlopen", urlopen)
    with pytest.raises(OSError, match=f"^{message}$") if message else contextlib.nullcontext():
        preparing._check_reachable("https://host:8/rows/train.jsonl?a=b")
    preparing._check_reachable("ftp://host/rows.tar")  # urlopen would ask such servers for a whole listing
    assert asked == [("HEAD", "https://host:8", 10.0)]


def test_a_server_that_does_not_answer_is_a_sentence_in_seconds(tmp_path, monkeypatch):
    for name in ("HTTPS_PROXY", "https_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # no server is at this port
    monkeypatch.setattr(tfds.download.DownloadManager, "download_and_extract", lambda *_: pytest.fail("tried"))
    begin = time.monotonic()
    with pytest.raises(OSError) as caught:
        data.load_source("gsm8k", "train", data_dir=tmp_path)
    assert time.monotonic() - begin < 20
    assert str(caught.value) == (
        f"The data set 'gsm8k' could not be prepared in {tmp_path / 'gsm8k' / '1.0.0'}: raw.githubusercontent.com cannot be reached "
        "([Errno 111] Connection refused). Check the network, or name a folder with the prepared data (config.data.data_dir)."
    )


def test_a_disk_that_cannot_be_written_is_a_sentence(tmp_path, monkeypatch):
    def full(self):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(word_problems.WordProblems, "download_and_prepare", full)
    with pytest.raises(
        OSError, match="The data set 'word_problems' could not be prepared in .*: .*No space left on device.$"
    ):
        data.load_source("word_problems", "train", data_dir=tmp_path)


# ---- JSONL ----------------------------------------------------------------------------------------------------------------


def test_a_file_with_renamed_and_extra_columns(write):
    path = write(
        b'\xef\xbb\xbf{"problem": "caf\xc3\xa9?", "answer": 1.5, "tags": ["a"], "level": null}\r\n{"problem": "b", "answer": "x"}\n\n  \n'
    )
    source = data.load_source(path, "all", columns={"question": "problem"})
    assert list(source) == [
        {"question": "café?", "answer": 1.5, "tags": ["a"], "level": None},
        {"question": "b", "answer": "x"},
    ]
    assert (source.skipped, source.name) == (0, path)


def test_a_row_belongs_to_the_caller(write):
    source = data.load_source(write(GOOD), "all")
    source[0]["question"] = "changed"
    assert source[0]["question"] == "1 + 1?"


BAD_LINES = [
    (b'{"question": "\xff", "answer": 1}', "byte 15 is not UTF-8"),
    (b'{"question": "a", "answer": 1', "not JSON: Expecting ',' delimiter at character"),
    (b"question,answer", "not JSON: Expecting value at character 1"),
    (b'["a", 1]', "a JSON list; a row has to be an object with columns"),
    (b"3", "a JSON number; a row has to be an object"),
    (b"{}", "there is no column 'question', only an empty row"),
    (b'{"question": "a"}', "there is no column 'answer', only 'question'"),
    (b'{"question": "a", "answer": null}', "column 'answer' is a JSON null; it has to be text or a number"),
    (b'{"question": null, "answer": 1}', "column 'question' is a JSON null; it has to be text or a number"),
    (b'{"question": "a", "answer": true}', "column 'answer' is a JSON boolean"),
    (b'{"question": "a", "answer": [1]}', "column 'answer' is a JSON list"),
    (b'{"question": "a", "answer": {"x": 1}}', "column 'answer' is a JSON object"),
    (b'{"question": " ", "answer": 1}', "column 'question' is empty"),
    (b'{"question": "a", "answer": ""}', "column 'answer' is empty"),
    (b'{"question": "a", "answer": NaN}', "column 'answer' is nan, not a finite number"),
    (b'{"question": "a", "answer": 1e999}', "column 'answer' is inf, not a finite number"),
    (b'{"question": "\\ud800", "answer": 1}', "column 'question' holds half of a surrogate pair"),
    (b'{"question": "a", "answer": ' + b"9" * 5000 + b"}", "not readable as JSON"),
    (b'{"question": ' + b"[" * 100_000, "not readable as JSON"),
    (b"", "the line is blank"),
]


@pytest.mark.parametrize("line, reason", BAD_LINES, ids=[reason[:30] for _, reason in BAD_LINES])
def test_a_bad_row_raises_or_is_skipped_and_counted(write, line, reason):
    path = write(GOOD + line + b"\n" + GOOD)
    with pytest.raises(ValueError) as refused:
        data.load_source(path, "all")
    assert f"{path} has 1 bad row:\n  {path}, line 2: {reason}" in str(refused.value)
    assert "set config.data.on_bad_row to 'skip'" in str(refused.value)
    with pytest.warns(UserWarning) as warned:
        source = data.load_source(path, "all", on_bad_row="skip")
    assert f"1 bad row skipped, 2 kept:\n  {path}, line 2: {reason}" in str(warned[0].message)
    assert (len(source), source.skipped) == (2, 1)


def test_ten_bad_rows_are_listed_and_all_are_counted(write):
    path = write(GOOD + b"{}\n" * 25)
    with pytest.raises(ValueError, match="25 bad rows") as refused:
        data.load_source(path, "all")
    message = str(refused.value)
    assert message.count(", line ") == 10
    assert "line 11:" in message and "line 12:" not in message and "and 15 more" in message


def test_a_column_named_in_columns_is_required(write):
    path = write(b'{"question": "a", "answer": 1, "cot": null}\n')
    with pytest.raises(ValueError, match="line 1: column 'solution' is a JSON null"):
        data.load_source(path, "all", columns={"solution": "cot"})
    with pytest.raises(
        ValueError, match=f"^In {path}, there is no column 'steps' \\(to be used as 'solution'\\), only"
    ):
        data.load_source(path, "all", columns={"solution": "steps"})


@pytest.mark.parametrize(
    "content, on_bad_row, message",
    [
        (b"", "refuse", "no usable row: the file is empty"),
        (b"\n\n", "refuse", "no usable row: the file is empty"),
        (
            b"{}\n[]\n",
            "skip",
            "no usable row: 2 bad rows skipped, the first at .*line 1: there is no column 'question'",
        ),
        (GOOD, "ignore", "on_bad_row is 'ignore'; it has to be 'refuse' or 'skip'"),
    ],
)
def test_files_without_usable_rows_raise(write, content, on_bad_row, message):
    with pytest.raises(ValueError, match=message):
        data.load_source(write(content), "all", on_bad_row=on_bad_row)


def test_a_missing_file_raises(tmp_path):
    with pytest.raises(FileNotFoundError, match="no data file .*absent.jsonl"):
        data.load_source(str(tmp_path / "absent.jsonl"), "all")


@pytest.mark.parametrize(
    "split, expected",
    [
        ("all", range(0, 11)),
        ("[:]", range(0, 11)),
        ("[:90%]", range(0, 10)),
        ("[90%:]", range(10, 11)),
        ("[3:5]", range(3, 5)),
        ("[-2:]", range(9, 11)),
        ("[10%:-1]", range(1, 10)),
    ],
)
def test_slices_of_a_file(write, split, expected):
    source = data.load_source(write(numbered(11)), split)
    assert [row["answer"] for row in source] == list(expected)


@given(st.integers(1, 60), st.integers(0, 100))
def test_percentages_partition_the_rows(count, percent):
    rows = [{"answer": i} for i in range(count)]
    parts = []
    for split in (f"[:{percent}%]", f"[{percent}%:]"):
        try:
            parts += files.slice_rows(rows, split, "file")
        except ValueError as error:
            assert "selects none" in str(error)
    assert parts == rows


@pytest.mark.parametrize(
    "split, message",
    [
        ("train", "split 'train' of .* is not understood: a file takes 'all' or a slice"),
        ("train[:5]", "is not understood"),
        ("[5]", "is not understood"),
        ("[0:12]", "reaches outside .*, which has 11 usable rows"),
        ("[-12:]", "reaches outside"),
        ("[:101%]", "is not understood"),
        ("[5:5]", "selects none of its 11 usable rows"),
        ("[7:5]", "selects none"),
    ],
)
def test_invalid_slices_raise_a_sentence(write, split, message):
    with pytest.raises(ValueError, match=message):
        data.load_source(write(numbered(11)), split)


def test_the_fingerprint_follows_the_data_and_not_the_directory(write, tmp_path):
    def fingerprint(path, split="all", **options):
        return data.load_source(path, split, **options).fingerprint

    path = write(numbered(4))
    original = fingerprint(path)
    (tmp_path / "moved").mkdir()
    assert fingerprint(write(numbered(4), "moved/rows.jsonl")) == original
    assert fingerprint(path, "[:3]") != original
    assert fingerprint(path, columns={"gold": "answer"}) != original
    assert fingerprint(write(numbered(4).replace(b"q3", b"q4"))) != original


# -- Parquet, and the hub --------------------------------------------------------------------------------------------

MATHS = [
    {
        "prompt": [{"role": "user", "content": f"{i} + 1?"}],
        "reward_model": {"ground_truth": str(i + 1), "style": "rule"},
        "long_solution": "x" * 1000,
        "points": i,
    }
    for i in range(5)
]
NESTED = {"question": "prompt.0.content", "answer": "reward_model.ground_truth"}


def parquet(path, rows=MATHS):
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


def test_a_parquet_file_has_the_named_columns(tmp_path):
    file = parquet(tmp_path / "maths.parquet")
    source = data.load_source(str(file), "[1:3]", columns=NESTED)
    rows = [{name: row[name] for name in ("question", "answer", "points")} for row in source]
    assert rows == [{"question": f"{i} + 1?", "answer": str(i + 1), "points": i} for i in (1, 2)]
    assert "long_solution" not in source[0]  # no module needs it
    assert (
        data.load_source(str(file), "all", columns=NESTED | {"solution": "long_solution"})[0]["solution"] == "x" * 1000
    )
    moved = tmp_path / "moved"
    moved.mkdir()
    assert data.load_source(str(parquet(moved / file.name)), "[1:3]", columns=NESTED).fingerprint == source.fingerprint
    other = parquet(moved / file.name, MATHS[::-1])
    assert data.load_source(str(other), "[1:3]", columns=NESTED).fingerprint != source.fingerprint


def test_paths_into_columns_work_for_jsonl(tmp_path):
    file = tmp_path / "maths.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in MATHS))
    assert data.load_source(str(file), "all", columns=NESTED)[4]["question"] == "4 + 1?"
    with pytest.raises(ValueError, match=r"there is no column 'prompt.1.content' \(to be used as 'question'\)"):
        data.load_source(str(file), "all", columns=NESTED | {"question": "prompt.1.content"})


def test_bad_rows_of_a_parquet_file_are_named_or_counted(tmp_path):
    rows = [{"question": "a", "answer": "1"}, {"question": "", "answer": "1"}, {"question": "b", "answer": None}]
    file = parquet(tmp_path / "rows.parquet", rows)
    with pytest.raises(
        ValueError,
        match=r"has 2 bad rows:\n.*row 1: column 'question' is empty\n.*row 2: column 'answer' is a JSON null",
    ):
        data.load_source(str(file), "all")
    with pytest.warns(UserWarning, match="2 bad rows skipped, 1 kept"):
        source = data.load_source(str(file), "all", on_bad_row="skip")
    assert len(source) == 1 and source.skipped == 2


def test_invalid_parquet_files_raise_a_sentence(tmp_path):
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 nonsense")
    with pytest.raises(ValueError, match="bad.parquet is not a Parquet file that can be read"):
        data.load_source(str(tmp_path / "bad.parquet"), "all")
    with pytest.raises(FileNotFoundError, match="There is no data file"):
        data.load_source(str(tmp_path / "absent.parquet"), "all")
    with pytest.raises(ValueError, match="there is no column 'question', only 'text', 'points'. Name the columns with"):
        data.load_source(str(parquet(tmp_path / "m.parquet", [{"text": "a", "points": 1}])), "all")


def test_hub_files_have_a_named_revision_and_are_joined_in_order(hub_cache, tmp_path, capsys):
    """The files come from the cache of the hub's client, without a network."""
    content = lambda rows: parquet(tmp_path / "part.parquet", rows).read_bytes()
    files = {
        "data/train-00001.parquet": content(MATHS[3:]),
        "data/train-00000.parquet": content(MATHS[:3]),
        "data/test-00000.parquet": content(MATHS[:1]),
    }
    old = hub_cache("dataset", "owner/maths", files)
    new = hub_cache("dataset", "owner/maths", files | {"data/train-00001.parquet": content(MATHS[3:4])})
    points = lambda revision: [
        row["points"]
        for row in data.load_source(f"hf://datasets/owner/maths{revision}/data/train-*.parquet", "all", columns=NESTED)
    ]
    assert points("") == [0, 1, 2, 3]
    assert capsys.readouterr().err.startswith(f"owner/maths: revision {new} of the Hugging Face hub")
    assert points(f"@{old}") == [0, 1, 2, 3, 4]
    with pytest.raises(ValueError, match="has no file 'data/dev-\\*.parquet'"):
        data.load_source("hf://datasets/owner/maths/data/dev-*.parquet", "all")
    with pytest.raises(ValueError, match="nobody/nothing could not be had from the Hugging Face hub: Local"):
        data.load_source("hf://datasets/nobody/nothing/x.jsonl", "all")
    for wrong in ("owner/maths", "owner/maths/data.txt", "../maths/data.jsonl", "owner/maths@../x/data.jsonl"):
        with pytest.raises(ValueError, match="is not understood: write hf://datasets/OWNER/NAME/PATH"):
            data.load_source(f"hf://datasets/{wrong}", "all")

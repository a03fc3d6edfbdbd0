"""Tests files that are complete or absent."""

import os
import stat
import threading

import pytest

from jaxrl_reason.runs import files


def test_a_write_leaves_files_of_similar_names_and_gives_the_usual_mode(tmp_path):
    (tmp_path / "answers.tmp").write_text("mine")
    (tmp_path / ".answers.jsonl.tmp").write_text("the remains of a kill, longer than the text")
    files.write_text(tmp_path / "answers.jsonl", "new\ud800\n")
    (tmp_path / "opened").write_text("")
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {
        "answers.jsonl": "new\\ud800\n",
        "answers.tmp": "mine",
        "opened": "",
    }
    modes = [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("answers.jsonl", "opened")]
    assert modes[0] == modes[1]


def test_a_failed_write_keeps_the_file_and_leaves_nothing(tmp_path, monkeypatch):
    files.write_text(tmp_path / "a.json", "old")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match=r"a\.json cannot be written: No space left"):
        files.write_text(tmp_path / "a.json", "new")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("a.json", "old")]


def test_a_directory_in_the_place_of_lines_is_named(tmp_path):
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(OSError, match=r"metrics\.jsonl cannot be written: Is a directory"):
        files.JsonLines(tmp_path / "metrics.jsonl", None)


def test_writers_of_one_file_wait_for_each_other(tmp_path):
    """The file always has one of the texts, and no writer loses its scratch file to another one."""
    texts, faults = [str(i) * 200_000 for i in range(4)], []

    def write(text):
        try:
            for _ in range(20):
                files.write_text(tmp_path / "report.html", text)
                assert (tmp_path / "report.html").read_text() in texts
        except BaseException as e:
            faults.append(e)

    threads = [threading.Thread(target=write, args=(text,)) for text in texts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not faults and [path.name for path in tmp_path.iterdir()] == ["report.html"]

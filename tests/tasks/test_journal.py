"""Tests completions.jsonl of an unfinished evaluation. Whole batches are kept, and the rest is judged again."""

import json
import subprocess
import sys

import numpy as np
import pytest

from jaxrl_reason.config import ConfigError
from jaxrl_reason.data import PromptBatch
from jaxrl_reason.tasks.journal import Journal


def batch(*rows, weight=(1, 1)):
    zeros = np.zeros((len(rows), 1), np.int32)
    return PromptBatch(zeros, zeros == 0, np.array(rows, np.int32), np.array(weight, np.float32), [{}] * len(rows))


HELD_OUT = [batch(0, 1), batch(3, 4), batch(6, 6, weight=(1, 0))]  # a copy fills the last batch
LINES = [
    {"row": row, "sample": k, "text": f"{row}\n{k}", "correct": k == 0} for row in (0, 1, 3, 4, 6) for k in range(2)
]


def open_journal(folder, resume=True, begun=None):
    return Journal(folder, resume, HELD_OUT, 2, lambda: begun is not None and begun.append(1))


def read(folder):
    return [json.loads(line) for line in (folder / "completions.jsonl").read_text().splitlines()]


def write(folder, text):
    (folder / "completions.jsonl").write_text(text)


@pytest.mark.parametrize("lines, batches", [(10, 3), (9, 2), (8, 2), (7, 1), (4, 1), (3, 0), (0, 0)])
@pytest.mark.parametrize("torn", ["", '{"row": 4, "sam'])
def test_whole_batches_are_kept_and_the_rest_follows(lines, batches, torn, tmp_path):
    write(tmp_path, "".join(json.dumps(line) + "\n" for line in LINES[:lines]) + torn)
    before, begun = (tmp_path / "completions.jsonl").read_bytes(), []
    journal = open_journal(tmp_path, begun=begun)
    parts = [LINES[:4], LINES[4:8], LINES[8:]]
    assert journal.done == batches and journal.batches == parts[:batches]
    assert (tmp_path / "completions.jsonl").read_bytes() == before and not begun  # reading changes nothing
    for part in parts[batches:]:
        journal.append(part)
    journal.close()
    if batches < 3:
        assert read(tmp_path) == LINES and begun == [1]


def test_every_batch_is_in_the_file_when_it_is_judged(tmp_path):
    journal = open_journal(tmp_path)
    journal.append(LINES[:4])
    assert read(tmp_path) == LINES[:4]
    journal.append(LINES[4:8])
    assert read(tmp_path) == LINES[:8] and open_journal(tmp_path).done == 2


def test_lines_of_another_evaluation_are_replaced_by_the_first_batch(tmp_path):
    write(tmp_path, "".join(json.dumps(line) + "\n" for line in LINES))
    journal = open_journal(tmp_path, resume=False)
    assert journal.done == 0
    journal.append(LINES[:4])
    assert read(tmp_path) == LINES[:4]


@pytest.mark.parametrize("after", [6, 8])
def test_other_prompts_are_judged_again(after, tmp_path):
    write(tmp_path, "".join(json.dumps(line) + "\n" for line in [*LINES[:4], *LINES[after:]]))
    assert open_journal(tmp_path).done == 1


def test_lines_of_an_earlier_version_are_read(tmp_path):
    older = [{**line, "right": line["correct"]} for line in LINES[4:]]
    for line in older:
        del line["correct"]
    write(tmp_path, "".join(json.dumps(line) + "\n" for line in [*LINES[:4], *older]))
    assert open_journal(tmp_path).batches == [LINES[:4], LINES[4:8], LINES[8:]]


@pytest.mark.parametrize("text", ["{", "3", "\x00"])
def test_damage_before_the_last_line_is_a_sentence(text, tmp_path):
    write(tmp_path, json.dumps(LINES[0]) + "\n" + text + "\n" + json.dumps(LINES[1]) + "\n")
    with pytest.raises(ConfigError, match=r"Line 2 of .*completions.jsonl is damaged"):
        open_journal(tmp_path)


def test_wherever_a_kill_cuts_the_file_the_rest_is_written_once(tmp_path):
    write(tmp_path, "".join(json.dumps(line) + "\n" for line in LINES[:10]))
    whole = (tmp_path / "completions.jsonl").read_bytes()
    for end in range(len(whole) + 1):
        (tmp_path / "completions.jsonl").write_bytes(whole[:end])
        journal = open_journal(tmp_path)
        for part in (LINES[:4], LINES[4:8], LINES[8:])[journal.done :]:
            journal.append(part)
        journal.close()
        assert (tmp_path / "completions.jsonl").read_bytes() == whole


@pytest.mark.parametrize("resume", [False, True])
def test_lines_that_do_not_count_are_gone_before_the_evaluation_says_that_the_file_is_its_own(resume, tmp_path):
    write(tmp_path, json.dumps(LINES[3]) + "\n")
    seen = []
    journal = Journal(tmp_path, resume, HELD_OUT, 2, lambda: seen.append((tmp_path / "completions.jsonl").read_bytes()))
    journal.append(LINES[:4])
    assert seen == [b""] and read(tmp_path) == LINES[:4]


def test_what_another_process_has_written_meanwhile_is_not_repeated(tmp_path):
    first, second = open_journal(tmp_path), open_journal(tmp_path)
    first.append(LINES[:4])
    with pytest.raises(ConfigError, match=r"Another process writes .*completions.jsonl: wait for its end, or name"):
        second.append(LINES[:4])
    first.append(LINES[4:8])
    assert read(tmp_path) == LINES[:8]


def test_a_file_that_another_process_holds_is_refused(tmp_path):
    hold = (
        "import fcntl, sys; f = open(sys.argv[1], 'ab'); fcntl.lockf(f, fcntl.LOCK_EX); print(1, flush=True); input()"
    )
    journal, pipes = open_journal(tmp_path), dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    with subprocess.Popen([sys.executable, "-c", hold, str(tmp_path / "completions.jsonl")], **pipes) as process:
        process.stdout.readline()
        with pytest.raises(ConfigError, match="Another process writes"):
            journal.append(LINES[:4])
        process.kill()
    journal.append(LINES[:4])
    assert read(tmp_path) == LINES[:4]

"""Tests the columns of the data that signals read in the task of text problems."""

import json

import numpy as np
import pytest

from helpers.tiny_runs import ROWS, tiny
from jaxrl_reason import train
from jaxrl_reason.config import ConfigError
from jaxrl_reason.rl.signals import Signal, SIGNALS


def rows_with(path, difficulty):
    path.write_text("".join(json.dumps(row | {"difficulty": d}) + "\n" for row, d in zip(ROWS, difficulty)))
    return path


def test_a_signal_reads_a_column_of_the_data(tmp_path, monkeypatch):
    monkeypatch.setitem(SIGNALS, "values", Signal(lambda x: x.columns["difficulty"], columns=("difficulty",)))
    difficulty = [i / 8 - 2 for i in range(len(ROWS))]
    by_question = {row["question"]: d for row, d in zip(ROWS, difficulty)}
    rows = rows_with(tmp_path / "rows.jsonl", difficulty)
    run = train.setup(tiny(rows, method={"name": "rlev"}), tmp_path / "run")
    batch = run.prompts.batch(0)
    np.testing.assert_array_equal(batch.columns["difficulty"], [by_question[row["question"]] for row in batch.rows])


def test_a_column_that_is_no_number_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(SIGNALS, "values", Signal(lambda x: x.columns["difficulty"], columns=("difficulty",)))
    rows = rows_with(tmp_path / "rows.jsonl", [0.5, "hard", *[0.0] * (len(ROWS) - 2)])
    with pytest.raises(
        (ConfigError, ValueError), match=r"line 2 has 'hard' in the column 'difficulty'; it must be a number\."
    ):
        train.setup(tiny(rows, method={"name": "rlev"}), tmp_path / "run")

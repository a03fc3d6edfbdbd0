"""Fixtures of the tests of data: files, word problems that TFDS really prepares, and a tokenizer trained on them."""

import pytest

from helpers.data_sets import SPLITS
from jaxrl_reason import data


@pytest.fixture
def write(tmp_path):
    """Returns `write(content, name)`, which writes a file of bytes or text and returns its path."""

    def _write(content, name="rows.jsonl"):
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
        return str(tmp_path / name)

    return _write


@pytest.fixture(scope="session")
def problems(data_dir):
    """Returns the three splits as {split: Source}."""
    return {split: data.load_source("word_problems", split, data_dir=data_dir) for split in SPLITS}


@pytest.fixture(scope="session")
def tokenizer(problems):
    rows = problems["train"].read(range(2000))
    return data.train_tokenizer(f"{row['question']}\n{row['solution']}" for row in rows)

"""Shared: the word problems, prepared once for real, and a tokenizer trained on them."""

import pytest

from jaxrl_reason import data


@pytest.fixture(scope="session")
def problems(data_dir):
    """The three splits as {split: Source}."""
    return {
        split: data.load_source("word_problems", split, data_dir=data_dir) for split in ("train", "validation", "test")
    }


@pytest.fixture(scope="session")
def tokenizer(problems):
    rows = problems["train"].read(range(2000))
    return data.train_tokenizer(f"{row['question']}\n{row['solution']}" for row in rows)

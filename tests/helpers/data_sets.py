"""Reads all splits of one of our data sets and checks them."""

import hashlib
import json

from jaxrl_reason import data

SPLITS = ("train", "validation", "test")


def load_splits(name, data_dir):
    """Returns {split: list of rows}."""
    return {split: list(data.load_source(name, split, data_dir=data_dir)) for split in SPLITS}


def column(rows, name):
    return [row[name] for row in rows]


def assert_disjoint(keys):
    """Checks that no split, of {split: set of keys}, shares a key with another."""
    assert not keys["train"] & keys["validation"]
    assert not keys["train"] & keys["test"]
    assert not keys["validation"] & keys["test"]


def longest(rows, *columns, count=2000):
    """Returns the most tokens of a question with its line break, then of each column.

    The tokenizer learns from `count` rows.
    """
    tokenizer = data.train_tokenizer(f"{row['question']}\n{row['solution']}" for row in rows[:count])
    texts = [[row["question"] + "\n" for row in rows], *(column(rows, name) for name in columns)]
    return [max(map(len, tokenizer.encode_batch(part))) for part in texts]


def digest(content):
    """Returns the SHA-256 of the content as JSON."""
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()

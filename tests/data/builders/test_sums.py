"""All of the hundred sums occur, each in one split."""

from jaxrl_reason import data
from jaxrl_reason.rewards import last_number_reward


def test_every_sum_occurs_once_and_no_pair_is_in_both_splits(data_dir):
    rows = {split: list(data.load_source("sums", split, data_dir=data_dir)) for split in ("train", "test")}
    assert {split: len(part) for split, part in rows.items()} == {"train": 71, "test": 29}
    pairs = {}
    for split, part in rows.items():
        for row in part:
            a, b = map(int, row["question"].removeprefix("What is ").removesuffix("?").split(" + "))
            assert row["answer"] == str(a + b) and row["solution"] == f"{a} + {b} = {a + b}"
            assert pairs.setdefault((min(a, b), max(a, b)), split) == split
    assert len(pairs) == 55


def test_the_last_number_counts_without_a_marker():
    completions = ["7 + 5 = 12.", "It is 12, or 13.", "#### 12 or so 5", "#### 12\nnot 5", "twelve", ""]
    assert last_number_reward(completions, ["12"] * 6) == [1, 0, 0, 1, 0, 0]
    assert [last_number_reward.answer_of(c, {}) for c in completions] == [12, 13, None, 12, None, None]

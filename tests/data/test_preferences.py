"""Tests preference pairs: the ids of their rows, both completions of a row, and rows without a preference."""

import json
import warnings

from hypothesis import given, settings
from hypothesis import strategies as st
import numpy as np
import pytest

from jaxrl_reason import data
from jaxrl_reason.data.preferences import PreferenceStream, warn_of_leaks

PLAIN = data.get_template("plain")
TOKENIZER = data.train_tokenizer(["1 + 1 = 2", "12 and 13"], vocab_size=270)


def numbered(count):
    return [
        {"question": f"{i}", "chosen": f"{i} = {i}", "rejected": f"{i} = {i + 1}", "other": [i]} for i in range(count)
    ]


def stream(rows, batch_size=4, max_prompt_length=8, max_completion_length=12, seed=0, template=PLAIN, **options):
    lengths = {"max_prompt_length": max_prompt_length, "max_completion_length": max_completion_length}
    return PreferenceStream(rows, TOKENIZER, template, batch_size=batch_size, seed=seed, **lengths, **options)


def text(tokens, mask):
    return TOKENIZER.decode(tokens[mask], skip_special=False)


def questions(pairs, batches):
    return [int(text(*prompt)) for i in range(batches) for prompt in zip(*pairs.batch(i)[:2])]


def test_a_batch_has_prompts_and_their_completions_with_end_tokens():
    batch = stream(numbered(120), batch_size=5).batch(3)
    longest = lambda texts: max(len(TOKENIZER.encode(text)) for text in texts)
    S, T = longest(f"{i}\n" for i in range(120)), longest(f"{i} = {i + k}" for i in range(120) for k in (0, 1)) + 1
    assert batch.prompt_tokens.shape == batch.prompt_mask.shape == (5, S) and S < 8
    assert batch.tokens.shape == batch.mask.shape == (5, 2, T) and T < 12
    assert [x.dtype for x in batch] == [np.int32, bool, np.int32, bool]
    for prompt, prompt_mask, tokens, mask in zip(*batch):
        number = text(prompt, prompt_mask)
        assert number.endswith("\n") and number[:-1].isdigit()
        n = int(number)
        assert text(tokens[0], mask[0]) == f"{n} = {n}<eos>"
        assert text(tokens[1], mask[1]) == f"{n} = {n + 1}<eos>"
        for row in (prompt_mask, *mask):
            assert row.tolist() == [True] * row.sum() + [False] * (row.size - row.sum())
        assert set(tokens[~mask]) | set(prompt[~prompt_mask]) <= {TOKENIZER.pad_id}


def test_pairs_are_written_as_the_template_writes_solutions():
    template = data.get_template("qa")
    batch = stream(numbered(1), batch_size=1, max_prompt_length=40, template=template).batch(0)
    assert text(batch.prompt_tokens[0], batch.prompt_mask[0]) == "Question: 0\nAnswer:"
    assert [text(*completion) for completion in zip(batch.tokens[0], batch.mask[0])] == [" 0 = 0<eos>", " 0 = 1<eos>"]


@given(rows=st.integers(1, 30), batch_size=st.integers(1, 11), seed=st.integers(0, 2**32 - 1))
@settings(max_examples=10, deadline=None)
def test_every_epoch_has_every_pair_once_from_any_start(rows, batch_size, seed):
    pairs = stream(numbered(rows), batch_size, seed=seed)
    assert (pairs.size, pairs.skipped) == (rows, 0)
    count = -(-2 * rows // batch_size)
    seen = questions(pairs, count)
    assert sorted(seen[:rows]) == sorted(seen[rows : 2 * rows]) == list(range(rows))
    last = stream(numbered(rows), batch_size, seed=seed).batch(count - 1)
    for one, other in zip(last, pairs.batch(count - 1), strict=True):
        np.testing.assert_array_equal(one, other)


def test_pairs_have_the_order_of_prompts_under_the_same_seed():
    """A seed gives the same shuffle in all streams. Without shuffling, the order is the order of the source."""
    prompts = data.PromptStream(numbered(9), TOKENIZER, PLAIN, batch_size=4, max_prompt_length=8, seed=3)
    for i in range(4):
        np.testing.assert_array_equal(stream(numbered(9), seed=3).batch(i).prompt_tokens, prompts.batch(i).tokens)
    assert questions(stream(numbered(6), shuffle=False), 3) == [0, 1, 2, 3, 4, 5] * 2


def test_the_longer_completion_must_fit_with_its_end_token():
    rows = numbered(3) + [
        {"question": "3", "chosen": "1", "rejected": "1" * 30},
        {"question": "4", "chosen": "2" * 12, "rejected": "2"},
    ]
    with pytest.raises(
        ValueError,
        match="2 of 5 rows do not fit:\n  row 3 has a completion of 31 tokens; 1 to 12 fit .max_completion_length.\n  row 4 .* of 13",
    ):
        stream(rows)
    with pytest.warns(UserWarning, match="Skipped: 2 of 5 rows"):
        pairs = stream(rows, batch_size=3, on_long="skip")
    assert (pairs.size, pairs.skipped) == (3, 2)
    assert sorted(questions(pairs, 1)) == [0, 1, 2]
    assert stream(rows[4:], batch_size=1, max_completion_length=13).size == 1


def test_add_bos_begins_prompts_and_not_completions():
    batch = stream(numbered(4), add_bos=True).batch(0)
    assert (batch.prompt_tokens[:, 0] == TOKENIZER.bos_id).all()
    assert not (batch.tokens == TOKENIZER.bos_id).any()


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"chosen": None}, "^row 1: column 'chosen' is None; it has to be text\\.$"),
        ({"rejected": 7}, "^row 1: column 'rejected' is 7; it has to be text\\.$"),
        ({"rejected": "1 = 1"}, "^Rows with the same tokens as 'chosen' and as 'rejected' .* remove them:\n  row 1$"),
    ],
)
def test_a_row_without_a_preference_raises_with_its_number(changes, message):
    rows = numbered(3)
    rows[1] |= changes
    for on_long in ("refuse", "skip"):
        with pytest.raises(ValueError, match=message):
            stream(rows, on_long=on_long)


@pytest.mark.parametrize("column", ["question", "chosen", "rejected"])
def test_a_missing_column_raises_with_row_and_name(column):
    rows = numbered(3)
    del rows[2][column]
    with pytest.raises(ValueError, match=f"^row 2.* column '{column}'.*its columns are .*other.*\\.$"):
        stream(rows)


def test_several_rows_without_a_preference_are_listed():
    rows = [{**row, "rejected": row["chosen"]} for row in numbered(4)]
    with pytest.raises(ValueError, match="^Rows with the same tokens .*:\n  row 0\n  row 1\n  row 2\n  row 3$"):
        stream(rows)


@pytest.mark.parametrize(
    "rows, options, message",
    [
        ([], {}, "The data set has no rows"),
        (numbered(3), {"on_long": "truncate"}, "on_long is 'truncate'"),
        (numbered(3), {"batch_size": 0}, "batch_size is 0; it has to be at least 1"),
        (numbered(3), {"max_completion_length": 0}, "max_completion_length is 0; it has to be at least 1"),
        (numbered(3), {"seed": -1}, "seed is -1"),
    ],
)
def test_impossible_streams_raise(rows, options, message):
    with pytest.raises(ValueError, match=message):
        stream(rows, **options)


def test_held_out_pairs_that_are_training_pairs_give_a_warning(tmp_path):
    rows = [{"question": str(i % 5), "chosen": "a", "rejected": "bc"[i % 2]} for i in range(10)]
    swapped = {"question": "1", "chosen": "c", "rejected": "a"}
    source = lambda name, rows: data.load_source(str(write(tmp_path / name, rows)), "all", columns={"chosen": "chosen"})
    train = source("train.jsonl", rows)
    held_out = source("held_out.jsonl", [{**rows[0], "question": "7"}, rows[3], swapped])
    with pytest.warns(UserWarning) as found:
        warn_of_leaks(train, held_out)
    (warning,) = found
    first, *lines = str(warning.message).splitlines()
    assert "training pairs of" in first and "are 2 of 3 held-out pairs, so held-out metrics are too high" in first
    assert lines == [
        f"  {tmp_path}/held_out.jsonl, line 2 is {tmp_path}/train.jsonl, line 4",
        f"  {tmp_path}/held_out.jsonl, line 3 is {tmp_path}/train.jsonl, line 2",
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_leaks(train, source("other.jsonl", [{**rows[0], "question": "7"}]))


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_batches_are_numbered_from_zero():
    with pytest.raises(IndexError, match="There is no batch -1"):
        stream(numbered(3)).batch(-1)

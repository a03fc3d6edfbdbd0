"""Tests streams: pure random access, complete epochs, ids that never repeat, prompts that do not fit."""

import collections

from hypothesis import given, settings
from hypothesis import strategies as st
import numpy as np
import pytest

from jaxrl_reason import data

PLAIN = data.get_template("plain")
TOKENIZER = data.train_tokenizer(["1 + 1 = 2", "12 and 13"], vocab_size=270)


def numbered(count):
    return [{"question": f"{i}", "solution": f"{i} = {i}", "answer": i, "extra": [i]} for i in range(count)]


def prompt_stream(rows, batch_size=4, max_prompt_length=8, seed=0, **options):
    return data.PromptStream(
        rows, TOKENIZER, PLAIN, batch_size=batch_size, max_prompt_length=max_prompt_length, seed=seed, **options
    )


def solution_stream(rows, batch_size=4, max_prompt_length=8, max_completion_length=12, seed=0, **options):
    lengths = {"max_prompt_length": max_prompt_length, "max_completion_length": max_completion_length}
    return data.SolutionStream(rows, TOKENIZER, PLAIN, batch_size=batch_size, seed=seed, **lengths, **options)


def evaluation(rows, count, batch_size=4, max_prompt_length=8, **options):
    return data.eval_prompts(
        rows, TOKENIZER, PLAIN, count, batch_size=batch_size, max_prompt_length=max_prompt_length, **options
    )


def longest(texts):
    return max(len(TOKENIZER.encode(text)) for text in texts)


def answers(stream, batches):
    return [row["answer"] for i in range(batches) for row in stream.batch(i).rows]


def assert_equal(first, second):
    for one, other in zip(first, second, strict=True):
        assert one == other if isinstance(one, list) else np.array_equal(one, other)


def test_a_batch_holds_the_ids_of_its_rows_right_padded():
    batch = prompt_stream(numbered(120), batch_size=5).batch(3)
    assert batch.tokens.shape == batch.mask.shape == (5, longest(f"{i}\n" for i in range(120)))
    assert (batch.tokens.dtype, batch.mask.dtype, batch.prompt_ids.dtype, batch.weight.dtype) == (
        np.int32,
        bool,
        np.int32,
        np.float32,
    )
    assert batch.weight.tolist() == [1] * 5
    assert batch.prompt_ids.tolist() == [15, 16, 17, 18, 19]
    for row, tokens, mask in zip(batch.rows, batch.tokens, batch.mask):
        length = mask.sum()
        assert mask.tolist() == [True] * length + [False] * (4 - length)
        assert TOKENIZER.decode(tokens[mask]) == row["question"] + "\n"
        assert set(tokens[~mask]) <= {TOKENIZER.pad_id}
        assert row["extra"] == [row["answer"]]


@given(rows=st.integers(1, 40), batch_size=st.integers(1, 17), seed=st.integers(0, 2**32 - 1))
@settings(max_examples=40, deadline=None)
def test_every_epoch_has_every_row_once_in_another_order(rows, batch_size, seed):
    epochs = 3
    seen = answers(prompt_stream(numbered(rows), batch_size, seed=seed), -(-epochs * rows // batch_size))[
        : epochs * rows
    ]
    orders = [seen[e * rows : (e + 1) * rows] for e in range(epochs)]
    for order in orders:
        assert sorted(order) == list(range(rows))
    if (
        rows >= 12
    ):  # Equal orders are very improbable. With few rows, grain keeps the order of the source for 0.4 % of the seeds.
        assert orders[0] != orders[1] != orders[2]


@pytest.mark.parametrize("seed", range(5))
def test_rows_are_shuffled(seed):
    assert answers(prompt_stream(numbered(40), 40, seed=seed), 3)[80:] != list(range(40))


@given(st.integers(1, 13), st.lists(st.integers(0, 10_000), min_size=1, max_size=6))
@settings(max_examples=25, deadline=None)
def test_a_fresh_stream_gives_the_batches_of_a_continued_one(batch_size, positions):
    continued = prompt_stream(numbered(10), batch_size)
    for i in positions:
        assert_equal(continued.batch(i), prompt_stream(numbered(10), batch_size).batch(i))


def test_prompt_ids_never_repeat():
    stream = prompt_stream(numbered(5), batch_size=3)
    ids = np.concatenate([stream.batch(i).prompt_ids for i in range(20)])
    assert ids.tolist() == list(range(60))


def test_the_seed_decides_the_order_and_no_shuffle_keeps_it():
    assert answers(prompt_stream(numbered(20), seed=1), 5) != answers(prompt_stream(numbered(20), seed=2), 5)
    assert answers(prompt_stream(numbered(6), shuffle=False), 3) == [0, 1, 2, 3, 4, 5] * 2


def test_neighbouring_seeds_do_not_share_epochs():
    """If the seed were added to the epoch number, run s + 1 would be a shifted run s."""
    assert (
        answers(prompt_stream(numbered(20), seed=0), 10)[20:] != answers(prompt_stream(numbered(20), seed=1), 10)[:20]
    )


def test_long_prompts_raise_or_are_skipped_and_counted():
    rows = numbered(3) + [{"question": "9" * 20, "answer": 99}, {"question": "8" * 30, "answer": 88}] + numbered(2)
    with pytest.raises(
        ValueError,
        match="2 of 7 rows do not fit:\n  row 3 has a prompt of 21 tokens; 1 to 8 fit \\(max_prompt_length\\)\n  row 4",
    ):
        prompt_stream(rows)
    with pytest.warns(UserWarning, match="Skipped: 2 of 7 rows"):
        stream = prompt_stream(rows, batch_size=5, on_long="skip")
    assert stream.skipped == 2
    assert collections.Counter(answers(stream, 2)) == {0: 4, 1: 4, 2: 2}


@pytest.mark.parametrize(
    "rows, options, message",
    [
        ([], {}, "The data set has no rows"),
        (
            [{"question": "9" * 20, "solution": "1"}] * 12,
            {"on_long": "skip"},
            "12 of 12 rows do not fit:\n  row 0 .*\n(  row [1-9] .*\n){9}  and 2 more\nRaise the limit\\.$",
        ),
        (numbered(3), {"on_long": "truncate"}, "on_long is 'truncate'; it has to be 'refuse' or 'skip'"),
        (numbered(3), {"batch_size": 0}, "batch_size is 0; it has to be at least 1"),
        (numbered(3), {"max_prompt_length": 0}, "max_prompt_length is 0; it has to be at least 1"),
        (numbered(3), {"seed": -1}, "seed is -1; it has to be at least 0 and below"),
        (numbered(3), {"seed": 2**32}, "seed is 4294967296"),
        ([{"problem": "a"}], {}, "names the column 'question', which this row does not have; its columns are problem"),
    ],
)
def test_impossible_streams_raise(rows, options, message):
    for make in (prompt_stream, solution_stream):
        with pytest.raises(ValueError, match=message):
            make(rows, **options)


def test_a_prompt_without_tokens_raises():
    template = data.PromptTemplate("bare", "{question}")
    with pytest.raises(ValueError, match="row 0 has a prompt of 0 tokens"):
        data.PromptStream([{"question": ""}], TOKENIZER, template, batch_size=1, max_prompt_length=4, seed=0)


def test_batches_are_numbered_from_zero():
    for make in (prompt_stream, solution_stream):
        with pytest.raises(IndexError, match="There is no batch -1"):
            make(numbered(3)).batch(-1)


def test_add_bos_begins_every_prompt():
    rows = numbered(4)
    plain, begun = (prompt_stream(rows, add_bos=add_bos).batch(0) for add_bos in (False, True))
    assert not (plain.tokens == TOKENIZER.bos_id).any()
    assert (begun.tokens[:, 0] == TOKENIZER.bos_id).all()
    assert np.array_equal(begun.tokens[:, 1:], plain.tokens)
    assert (solution_stream(rows, add_bos=True).batch(0).prompt_tokens[:, 0] == TOKENIZER.bos_id).all()
    assert (evaluation(rows, 4, add_bos=True)[0].tokens[:, 0] == TOKENIZER.bos_id).all()


def test_solutions_end_with_the_end_token_inside_the_mask():
    rows = numbered(30)
    prompts, solutions = prompt_stream(rows, seed=3), solution_stream(rows, seed=3)
    for i in range(12):
        batch = solutions.batch(i)
        T = longest(f"{i} = {i}" for i in range(30)) + 1  # the end token
        assert batch.completion_tokens.shape == batch.completion_mask.shape == (4, T) and T < 12
        for prompt, mask, completion, completion_mask in zip(*batch[:4]):
            ids = completion[completion_mask]
            number = TOKENIZER.decode(prompt[mask]).strip()
            assert ids[-1] == TOKENIZER.eos_ids[0] and (ids[:-1] != ids[-1]).all()
            assert TOKENIZER.decode(ids[:-1], skip_special=False) == f"{number} = {number}"
        # RL uses exactly the prompt ids of the supervised phase.
        assert np.array_equal(batch.prompt_tokens, prompts.batch(i).tokens)


def test_a_solution_must_leave_room_for_the_end_token():
    rows = numbered(10)
    length = len(TOKENIZER.encode(rows[0]["solution"]))
    assert solution_stream(rows, max_completion_length=length + 1).skipped == 0
    with pytest.raises(
        ValueError,
        match=f"row 0 has a completion of {length + 1} tokens; 1 to {length} fit \\(max_completion_length\\)",
    ):
        solution_stream(rows, max_completion_length=length)
    with pytest.warns(UserWarning, match="1 of 11 rows"):
        assert solution_stream(rows + [{"question": "1", "solution": "1" * 50}], on_long="skip").skipped == 1


def test_a_missing_solution_column_raises_a_sentence():
    with pytest.raises(ValueError, match="names the column 'solution', which this row does not have"):
        solution_stream([{"question": "1", "answer": 2}])


def test_an_empty_solution_is_refused():
    with pytest.raises(ValueError, match="column 'solution' is empty, .*; --config.supervised.steps=0"):
        solution_stream([{"question": "1", "solution": ""}])


@pytest.mark.parametrize("count, batches", [(4, 1), (6, 2), (10, 3), (99, 3)])
def test_evaluation_is_in_order_and_pads_with_weight_zero(count, batches):
    result = evaluation(numbered(10), count)
    assert len(result) == batches
    real = min(count, 10)
    assert np.concatenate([batch.weight for batch in result]).tolist() == [1] * real + [0] * (batches * 4 - real)
    for batch in result:
        assert batch.tokens.shape == (4, longest(f"{i}\n" for i in range(real))) and len(batch.rows) == 4
        assert batch.mask.any(axis=1).all()  # padding rows also hold a prompt to sample from
        assert [row["answer"] for row in batch.rows] == batch.prompt_ids.tolist()
        assert (batch.prompt_ids[batch.weight == 0] == batch.prompt_ids[0]).all()
    ids = np.concatenate([batch.prompt_ids[batch.weight == 1] for batch in result])
    assert ids.tolist() == list(range(real))


def test_evaluation_raises_or_skips_long_prompts():
    rows = numbered(3) + [{"question": "9" * 20, "answer": 3}] + numbered(3)
    with pytest.raises(ValueError, match="1 of 4 rows do not fit:\n  row 3"):
        evaluation(rows, 4)
    with pytest.warns(UserWarning, match="1 of 5 rows"):
        (batch,) = evaluation(rows, 5, on_long="skip")
    assert batch.prompt_ids.tolist() == [0, 1, 2, 4]
    assert [TOKENIZER.decode(row[live]) for row, live in zip(batch.tokens, batch.mask)] == ["0\n", "1\n", "2\n", "0\n"]
    assert batch.tokens.shape[1] == longest(["0\n"])  # a row that is left out has no effect
    with pytest.raises(ValueError, match="count is 0"):
        evaluation(rows, 0)


def test_a_source_and_a_list_give_the_same_batches(problems, tokenizer):
    source = problems["validation"]
    options = {"batch_size": 64, "max_prompt_length": 32, "seed": 5}
    for make in (data.PromptStream, lambda *a, **k: data.SolutionStream(*a, max_completion_length=32, **k)):
        from_source, from_list = (
            make(source, tokenizer, PLAIN, **options),
            make(list(source), tokenizer, PLAIN, **options),
        )
        for i in (0, 15, 16):
            assert_equal(from_source.batch(i), from_list.batch(i))
    evaluations = [
        data.eval_prompts(rows, tokenizer, PLAIN, 100, batch_size=64, max_prompt_length=32)
        for rows in (source, list(source))
    ]
    for one, other in zip(*evaluations, strict=True):
        assert_equal(one, other)

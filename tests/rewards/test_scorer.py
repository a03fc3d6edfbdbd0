"""Tests the scorer with a real tokenizer: order, device and host rewards, `match_answer` against `accuracy`."""

import functools
import gc
import importlib.util
import json
import math
import pathlib
import types
import warnings

from hypothesis import given, settings
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_reason import data
from jaxrl_reason.config import Reward
from jaxrl_reason.rewards import math as math_rewards
from jaxrl_reason.rewards import RewardError
from jaxrl_reason.rewards import scorer as scorer_lib
from jaxrl_reason.rewards.output import Output
from jaxrl_reason.rewards.scorer import RewardScorer
from jaxrl_reason.rl import hosts
from jaxrl_reason.rl.experience import total_reward
from jaxrl_reason.rl.types import Rollout
from jaxrl_reason.tasks import evaluation

# MERGING learns " -" as one token from these solutions; BYTES learns no merges.
SOLUTIONS = [f"{a} - {b} = {a - b}\n#### {a - b}" for a in range(12) for b in range(12)]
MERGING = data.train_tokenizer(SOLUTIONS, vocab_size=300)
BYTES = data.train_tokenizer([], vocab_size=259)
TOKENIZERS = pytest.mark.parametrize("tokenizer", [MERGING, BYTES], ids=["merging", "bytes"])
HERE = jax.sharding.SingleDeviceSharding(jax.devices()[0])

MINE = """
import json, pathlib, time

def echo(completions, id, **_):
    return [float(i) for i in id]

def length(completion_ids, **_):
    return [len(ids) for ids in completion_ids]

def hinted(hint, completions, **_):
    return [None if h is None else float(h) for h in hint]

def picky(completions, **_):
    if "picky" in completions:
        raise ValueError("no")
    return [None if c == "none" else 1.0 for c in completions]

def match_answer(completions, **_):
    return [0.0] * len(completions)

def short(completions, **_):
    return [1.0]

def fifty(completions, **_):
    return [float("50" in c) for c in completions]

class Scaled:
    def __init__(self, scale):
        self.scale = scale

    def __call__(self, completion_ids, **_):
        return [self.scale * len(ids) for ids in completion_ids]

once, twice, worded = Scaled(1), Scaled(2), Scaled("2")

calls = 0

def counts(completions, completion_ids, prompts, **_):
    # The number of calls that this process has had; every call is noted in a file.
    global calls
    calls += 1
    with open("calls.jsonl", "a") as file:
        print(json.dumps([prompts, completions, list(map(len, completion_ids))]), file=file)
    print("called")
    return [float(calls)] * len(completions)

async def also_counts(**arguments):
    return counts(**arguments)

def fails(**arguments):
    counts(**arguments)
    raise KeyError("nothing works")

def fails_on_first(id, completions, **_):
    if 7 in id:
        raise KeyError("seven")
    return [1.0] * len(completions)

def fails_on_some(completions, **_):
    return [float(len(c.split("boxed{")[1])) for c in completions]

def nan(completions, **_):
    return [float("nan")] * len(completions)

def texts(completions, **_):
    return ["1"] * len(completions)

def nones(completions, **_):
    return [None] * len(completions)

def sleeps(completions, **_):
    time.sleep(1000)

def spy(**arguments):
    pathlib.Path(f"{arguments['prompts'][0].strip()}.json").write_text(json.dumps(arguments))
    return [1.0] * len(arguments["completions"])
"""


@pytest.fixture(autouse=True)
def mine(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(MINE)
    monkeypatch.chdir(tmp_path)


def make_scorer(*functions, weights=(), verdict="", max_failure_share=0.5, tokenizer=MERGING, output=None, **more):
    settings = Reward(
        functions=list(functions), weights=list(weights), verdict=verdict, max_failure_share=max_failure_share, **more
    )
    template = data.get_template("plain")
    return RewardScorer(settings, tokenizer=tokenizer, template=template, sharding=HERE, output=output)


def batch_of(rows):
    """Returns a batch of rows with any columns. A scorer reads none of its arrays."""
    P = len(rows)
    rows = [{"question": f"question {p}"} | row for p, row in enumerate(rows)]
    tokens, mask = np.zeros((P, 4), np.int32), np.ones((P, 4), bool)
    return data.PromptBatch(tokens, mask, np.arange(P), np.ones(P, np.float32), rows)


def rollout_of(texts, tokenizer=MERGING, cut=(), filler=None):
    """Returns a rollout of [P][G] texts, which end unless (p, g) is in `cut`. Tokens after the mask are `filler`."""
    P, G = len(texts), len(texts[0])
    ids = {(p, g): tokenizer.encode(texts[p][g]) for p, g in np.ndindex(P, G)}
    ids = {at: row if at in cut else [*row, tokenizer.eos_ids[0]] for at, row in ids.items()}
    T = -(-(max(map(len, ids.values())) + 3) // 64) * 64  # few lengths, so that little is compiled
    tokens = np.full((P, G, T), tokenizer.pad_id if filler is None else filler, np.int32)
    mask = np.zeros((P, G, T), bool)
    for at, row in ids.items():
        tokens[at][: len(row)], mask[at][: len(row)] = row, True
    truncated = ~np.any((tokens == tokenizer.eos_ids[0]) & mask, axis=-1)
    prompt = np.zeros((P, 4), np.int32), np.ones((P, 4), bool)
    return Rollout(*map(jnp.asarray, (*prompt, tokens, mask, np.zeros((P, G, T), np.float32), truncated)))


ROWS = [{"answer": "12", "id": 7}, {"answer": "-3", "id": 5}]
TEXTS = [["#### 12", "#### 2", "12"], ["x\n#### -3", "#### -3", "#### 3"]]


def test_device_and_host_rewards_together():
    scorer = make_scorer("accuracy", "match_answer", "mine.py:length", weights=[1, 0.5, 0], verdict="match_answer")
    assert scorer.names == ("accuracy", "match_answer", "length")
    assert scorer.weights == {"accuracy": 1.0, "match_answer": 0.5, "length": 0.0}
    assert scorer.verdict == "match_answer" and scorer.on_host
    rollout = rollout_of(TEXTS, cut=[(1, 1)])
    rewards, metrics = scorer(rollout, batch_of(ROWS))
    assert list(rewards) == list(scorer.names)
    np.testing.assert_array_equal(rewards["accuracy"], [[1, 0, 0], [1, 1, 0]])
    np.testing.assert_array_equal(rewards["match_answer"], [[1, 0, 0], [1, 0, 0]])  # one completion was cut off
    np.testing.assert_array_equal(rewards["length"], rollout.mask.sum(axis=-1))
    for values in rewards.values():
        assert isinstance(values, jax.Array) and values.dtype == jnp.float32 and values.sharding == HERE
    kinds = ("error_rate", "none_rate", "timeout_rate")
    assert metrics == {f"rewards/{name}/{kind}": 0 for name in ("accuracy", "length") for kind in kinds}
    np.testing.assert_array_equal(total_reward(rewards, scorer.weights), [[1.5, 0, 0], [1.5, 1, 0]])


@pytest.mark.parametrize("function, distinct, majority", [("accuracy", 1, 1), ("mine.py:fifty", 2, 0)])
def test_correct_answers_of_one_reference_are_one_answer(function, distinct, majority):
    texts = [["#### 3", "#### 50", "#### 50%", "#### 3", "#### 50.0%"]]  # 50 % is 1/2, and the reference accepts both
    scorer, batches = make_scorer(function), [batch_of([{"answer": "50"}])]
    found = evaluation.join(evaluation.sample_and_judge(lambda _: rollout_of(texts), batches, scorer, MERGING))
    assert found.correct.tolist() == [[False, True, True, False, True]] and not found.unjudged.any()
    assert evaluation.method_metrics(found)["distinct_correct_answers"] == distinct
    assert evaluation.per_prompt(found)["maj@5"] == majority


def test_correct_answers_do_not_vote_with_an_incorrect_one():
    """50 % is read as 0.5, which is incorrect."""
    texts = [["#### 0.5", "#### 50%", "#### 50", "#### 50"]]
    scorer, batches = make_scorer("accuracy"), [batch_of([{"answer": "50"}])]
    found = evaluation.join(evaluation.sample_and_judge(lambda _: rollout_of(texts), batches, scorer, MERGING))
    assert found.correct.tolist() == [[False, True, True, True]]
    assert evaluation.per_prompt(found)["maj@4"] == 1 and found.answers[0][1:] == [50, 50, 50]


def test_a_sample_on_which_a_reward_fails_is_left_out_of_training_only():
    texts = [["#### 12", "picky", "none", "#### 1"]]
    rows = [{"answer": "12"}]
    scorer = make_scorer("accuracy", "mine.py:picky", "match_answer", weights=[1, 0.5, 0])
    rewards, metrics = scorer(rollout_of(texts), batch_of(rows))
    # "picky" is a failure. "none" has no reward by picky, and is incorrect.
    np.testing.assert_array_equal(total_reward(rewards, scorer.weights), [[1.5, math.nan, 0, 0.5]])
    np.testing.assert_array_equal(rewards["accuracy"], [[1, math.nan, 0, 0]])
    np.testing.assert_array_equal(rewards["match_answer"], [[1, 0, 0, 0]])  # its weight is 0
    assert metrics["rewards/picky/error_rate"] == metrics["rewards/picky/none_rate"] == 0.25
    evaluated, _ = scorer.over(1)(rollout_of(texts), batch_of(rows))
    np.testing.assert_array_equal(evaluated["accuracy"], [[1, 0, 0, 0]])
    scorer = make_scorer("accuracy", "mine.py:picky", weights=[1, 0])
    np.testing.assert_array_equal(scorer(rollout_of(texts), batch_of(rows))[0]["accuracy"], [[1, 0, 0, 0]])


def test_an_evaluation_counts_completions_without_a_verdict():
    scorer, batches = make_scorer("mine.py:picky"), [batch_of([{"answer": "50"}])]
    found = evaluation.join(
        evaluation.sample_and_judge(lambda _: rollout_of([["fine", "none"]]), batches, scorer, MERGING)
    )
    assert found.correct.tolist() == [[True, False]] and found.unjudged.tolist() == [[False, True]]


def test_weights_and_verdict_have_defaults():
    scorer = make_scorer("match_answer", "format")
    assert list(scorer.weights.values()) == [1.0, 1.0] and scorer.verdict == "match_answer"
    assert make_scorer("format", "mine.py:length", verdict="mine.py:length").verdict == "length"


@settings(max_examples=30, deadline=None)
@given(st.sampled_from([(1, 1), (1, 4), (4, 1), (2, 3)]), st.data())
def test_the_total_is_the_weighted_sum_of_the_rewards_that_are_present(shape, data):
    P, G = shape  # few shapes, so that little is compiled
    value = st.none() | st.floats(-10, 10, width=32)
    names = data.draw(st.lists(st.sampled_from("abc"), min_size=1, unique=True))
    values = {k: data.draw(st.lists(value, min_size=P * G, max_size=P * G)) for k in names}
    weights = [data.draw(st.sampled_from([-1.0, 0.0, 0.25, 2.0])) for _ in names]
    rewards = {k: jnp.array([math.nan if x is None else x for x in v]).reshape(P, G) for k, v in values.items()}
    total = np.ravel(total_reward(rewards, dict(zip(rewards, weights))))
    for row in range(P * G):
        # A reward of weight 0 does not count. It does not turn a missing total into 0.
        present = [w * v[row] for w, v in zip(weights, values.values()) if w and v[row] is not None]
        np.testing.assert_allclose(total[row], sum(present) if present else math.nan, rtol=1e-5, atol=1e-5)


def test_rewards_stay_with_their_prompt_and_sample():
    texts = [["a" * (1 + (3 * p + 5 * g) % 7) for g in range(3)] for p in range(5)]
    rows = [{"id": i} for i in (30, 10, 50, 20, 40)]
    scorer = make_scorer("mine.py:echo", "mine.py:length", tokenizer=BYTES)
    rewards, _ = scorer(rollout_of(texts, BYTES), batch_of(rows))
    np.testing.assert_array_equal(rewards["echo"], [[i] * 3 for i in (30, 10, 50, 20, 40)])
    np.testing.assert_array_equal(rewards["length"], [[len(text) + 1 for text in group] for group in texts])


@pytest.mark.parametrize("filler", [None, MERGING.eos_ids[0], MERGING.encode("5")[0]])
def test_host_rewards_read_the_text_of_sampled_tokens_only(filler):
    scorer = make_scorer("mine.py:spy")
    scorer(rollout_of(TEXTS, cut=[(0, 1)], filler=filler), batch_of(ROWS))
    calls = [json.loads(pathlib.Path(f"question {p}.json").read_text()) for p in range(2)]  # one call per prompt
    seen = {name: calls[0][name] + calls[1][name] for name in calls[0]}
    assert seen["prompts"] == ["question 0\n"] * 3 + ["question 1\n"] * 3
    assert seen["completions"] == TEXTS[0] + TEXTS[1]
    end = list(MERGING.eos_ids)
    assert seen["completion_ids"] == [MERGING.encode(t) + (end if t != "#### 2" else []) for t in TEXTS[0] + TEXTS[1]]
    assert seen["answer"] == ["12"] * 3 + ["-3"] * 3 and seen["id"] == [7] * 3 + [5] * 3
    assert seen["question"] == ["question 0"] * 3 + ["question 1"] * 3


THINKING = data.train_tokenizer([], vocab_size=259)
THINKING.backend.add_special_tokens(["<think>", "</think>"])


@pytest.mark.parametrize(
    "skip_special, seen",
    [(False, "<bos><think>2 + 3</think>\n#### 5"), (True, "2 + 3\n#### 5")],
    ids=["shown", "hidden"],
)
def test_rewards_see_special_tokens_as_sampled(skip_special, seen):
    texts = [["<bos><think>2 + 3</think>\n<pad>#### 5", "#### 5"]]
    scorer = make_scorer("accuracy", "mine.py:spy", tokenizer=THINKING, skip_special_tokens=skip_special)
    rollout = rollout_of(texts, THINKING)
    rewards, _ = scorer(rollout, batch_of([{"answer": "5"}]))
    np.testing.assert_array_equal(rewards["accuracy"], [[1, 1]])
    call = json.loads(pathlib.Path("question 0.json").read_text())
    assert call["completions"] == [seen, "#### 5"]
    end, pad = THINKING.eos_ids[0], THINKING.pad_id
    assert call["completion_ids"][0][-1] == end and pad in call["completion_ids"][0]  # ids are kept as they are


def test_two_objects_of_one_class_are_two_rewards():
    scorer = make_scorer("mine.py:once", "mine.py:twice", weights=[1, 0.5], verdict="mine.py:twice")
    assert scorer.names == ("once", "twice") and scorer.verdict == "twice"
    rollout = rollout_of(TEXTS)
    rewards, _ = scorer(rollout, batch_of(ROWS))
    lengths = np.asarray(rollout.mask.sum(axis=-1))
    np.testing.assert_array_equal(rewards["once"], lengths)
    np.testing.assert_array_equal(rewards["twice"], 2 * lengths)
    assert make_scorer("mine.py:once").names == ("Scaled",)
    scorer = make_scorer("mine.py:once", "mine.py:worded")
    with pytest.raises(RewardError, match="Reward 'worded' returned '2222"):
        scorer(rollout, batch_of(ROWS))
    pathlib.Path("other.py").write_text(MINE)
    assert make_scorer("mine.py:length", "other.py:length").names == ("mine.length", "other.length")


def calls_made():
    return list(map(json.loads, pathlib.Path("calls.jsonl").read_text().splitlines()))


@pytest.mark.processes
@pytest.mark.parametrize("function", ["counts", "also_counts"])
def test_a_trial_is_one_call_that_leaves_no_state(function, tmp_path):
    output = Output(tmp_path / "rewards.log")
    scorer = make_scorer("accuracy", f"mine.py:{function}", output=output, workers=1)
    rows = [row | {"question": f"question {row['id']}"} for row in ROWS]
    scorer.try_out(rows, samples=3)
    ((prompts, completions, lengths),) = calls_made()
    assert prompts == ["question 7\n"] * 3 and "12" in completions[0] and len(set(completions)) == 3
    assert lengths == [len(MERGING.encode(text)) + 1 for text in completions]
    rewards, _ = scorer(rollout_of([["x", "y"]]), batch_of(ROWS[:1]))
    np.testing.assert_array_equal(rewards[function], [[1, 1]])  # the first call of this process
    assert len(calls_made()) == 2
    del scorer, output
    gc.collect()
    assert (tmp_path / "rewards.log").read_text() == "called\n" * 2


@pytest.mark.processes
@pytest.mark.parametrize(
    "function, message",
    [
        ("short", "'short' returned 1 rewards for 4 completions"),
        ("texts", "'texts' returned '1' for row 0"),
        ("nan", "'nan' failed on all 4 made-up completions, of each of 2 rows; .* returned nan for row 0"),
        (
            "fails",
            r"'fails' failed on all 4 .*KeyError: 'nothing works' \(.*mine.py, line [0-9]+\)\. Correct the function",
        ),
        ("sleeps", "'sleeps' failed on all 4 .* no result within 0.3 s"),
    ],
)
def test_a_trial_shows_a_broken_contract(function, message):
    rows = [row | {"question": "q"} for row in ROWS]
    with pytest.raises(RewardError, match=message):
        make_scorer(f"mine.py:{function}", timeout_s=0.3).try_out(rows, samples=4)
    if function == "fails":
        assert len(calls_made()) == 2 * (1 + 4)  # a failed call is made again row by row
        make_scorer(f"mine.py:{function}", max_failure_share=1).try_out(rows, samples=4)


@pytest.mark.processes
@pytest.mark.parametrize("function", ["fails_on_first", "fails_on_some", "nones", "length"])
def test_a_trial_accepts_functions_that_can_succeed(function):
    rows = [row | {"question": "q"} for row in ROWS]
    make_scorer(f"mine.py:{function}", "accuracy").try_out(rows, samples=4)


def test_missing_rewards_are_nan_and_counted():
    texts = [["fine", "none", "picky"], ["fine", "fine", "none"]]
    rewards, metrics = make_scorer("mine.py:picky")(rollout_of(texts), batch_of(ROWS))
    np.testing.assert_array_equal(rewards["picky"], [[1, np.nan, np.nan], [1, 1, np.nan]])
    assert metrics["rewards/picky/error_rate"] == pytest.approx(1 / 6)
    assert metrics["rewards/picky/none_rate"] == pytest.approx(2 / 6)
    with pytest.raises(
        RewardError,
        match="'picky' failed on 16.7% .*max_failure_share allows 0.0%; the last error is .*"
        r"first failure is on a completion of the prompt 'question 0\\n'\.$",
    ):
        make_scorer("mine.py:picky", max_failure_share=0)(rollout_of(texts), batch_of(ROWS))


def test_the_share_of_failures_is_over_the_rows_of_all_processes(monkeypatch):
    """One of 6 rows fails in this process, and none of 18 rows in others. The limit is one in twenty rows."""
    score = make_scorer("mine.py:picky", max_failure_share=0.05)
    texts = [["fine", "fine", "picky"], ["fine"] * 3]
    with pytest.raises(RewardError, match="failed on 16.7%"):
        score(rollout_of(texts), batch_of(ROWS))
    monkeypatch.setattr(hosts, "mean", lambda figures: {name: x / 4 for name, x in figures.items()})
    _, metrics = score(rollout_of(texts), batch_of(ROWS))
    assert metrics["rewards/picky/error_rate"] == pytest.approx(1 / 24)


def test_the_share_of_failures_of_an_evaluation_is_over_all_of_its_prompts():
    """Batches of 2 prompts, whose second one is padding in the last batch of 9 prompts. All completions of some fail."""
    all_fail, none_fails, padded = (
        [["picky"] * 2] * 2,
        [["fine"] * 2] * 2,
        batch_of(ROWS)._replace(weight=np.array([1.0, 0.0])),
    )
    scorer = make_scorer("mine.py:picky", max_failure_share=0.5)
    with pytest.raises(RewardError, match="failed on 100.0%"):
        scorer(rollout_of(all_fail), padded)
    score = scorer.over(9)
    for texts in (all_fail, none_fails, none_fails, none_fails):
        score(rollout_of(texts), batch_of(ROWS))
    score(rollout_of(all_fail), padded)  # 3 of 9
    scorer.over(9)(rollout_of(all_fail), batch_of(ROWS))  # another evaluation counts anew
    score(rollout_of(all_fail), padded)  # 4 of 9
    with pytest.raises(RewardError, match="'picky' failed on 55.6% of the completions"):
        score(rollout_of(all_fail), padded)


def test_unreadable_references_are_listed_and_too_many_raise():
    answers = ["12", "x = 5", None, 3, "1/0"]
    rows = [{"question": "q", "answer": answer} for answer in answers] * 10
    source = data.Source(
        "rows.jsonl", "", 0, lambda where: [rows[i] for i in where], len(rows), lambda i: f"line {i + 1}"
    )
    for name in ("accuracy", "judge"):
        with pytest.warns(UserWarning) as said:
            make_scorer(name, max_failure_share=0.6).check_references(source)
        lines = str(said[0].message).splitlines()
        assert f"Reward {name!r} cannot judge 30 of 50 rows" in lines[0] and lines[-2:] == [
            "  and 20 more",
            "These rows will have no reward.",
        ]
        assert lines[1].startswith("  line 2: The reference answer 'x = 5' is not a number") and "line 3: " in lines[2]
        with pytest.raises(RewardError, match="cannot judge 30 of 50 rows"):
            make_scorer(name, max_failure_share=0.5).check_references(source)
    with pytest.raises(RewardError, match="line 3: A row has no reference"):
        make_scorer("strict", max_failure_share=0).check_references(source)
    make_scorer("format", "mine.py:length", max_failure_share=0).check_references(source)
    good = data.Source("good.jsonl", "", 0, lambda where: [ROWS[i] for i in where], 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make_scorer("accuracy", "last_number", "strict", "judge", max_failure_share=0).check_references(good)


@pytest.mark.skipif(importlib.util.find_spec("math_verify") is None, reason="math-verify is not installed")
def test_references_that_math_verify_cannot_read_are_listed(monkeypatch):
    monkeypatch.setattr(scorer_lib, "_ROWS_PER_CHECK", 3)
    answers = ["12", r"$\sqrt{2}$.", "", r"\log_2 3", "}", None, r"\boxed{", "5_000"]
    rows = [{"question": "q", "answer": answer} for answer in answers]
    place = lambda i: f"line {i + 1}"
    source = data.Source("rows.jsonl", "", 0, lambda where: [rows[i] for i in where], len(rows), place)
    with pytest.warns(UserWarning) as said:
        make_scorer("math_verify", max_failure_share=0.7).check_references(source)
    lines = str(said[0].message).splitlines()
    assert "Reward 'math_verify' cannot judge 5 of 8 rows" in lines[0]
    for line, (number, answer) in zip(
        lines[1:], [(3, "''"), (5, "'}'"), (6, "None"), (7, r"'\\boxed{'"), (8, "'5_000'")]
    ):
        assert line.startswith(f"  line {number}: math-verify cannot read the reference answer {answer}, so no")
    with pytest.raises(RewardError, match="(?s)cannot judge 5 of 8 rows.*line 3: math-verify cannot read"):
        make_scorer("math_verify", max_failure_share=0.5).check_references(source)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make_scorer("math_verify", max_failure_share=0.5).check_references(source, 2)


def test_a_verifier_that_cannot_start_is_a_sentence(monkeypatch):
    def fail(items):
        raise RuntimeError("A worker process of the pool could not start: ImportError: Unsupported ANTLR version 4.10.")

    monkeypatch.setattr(math_rewards, "_pool", lambda: types.SimpleNamespace(map=fail))
    source = data.Source("rows.jsonl", "", 0, lambda where: [{"answer": "x+1"} for _ in where], 1)
    with pytest.raises(RewardError, match="'math_verify' cannot be called. A worker process .* ANTLR version 4.10"):
        make_scorer("math_verify").check_references(source)


def test_a_missing_value_of_a_column_is_none():
    rewards, _ = make_scorer("mine.py:hinted")(rollout_of(TEXTS), batch_of([{"hint": 2}, {}]))
    np.testing.assert_array_equal(rewards["hinted"], [[2] * 3, [np.nan] * 3])
    with pytest.raises(RewardError, match="'hinted' cannot be called: missing a required argument: 'hint'"):
        make_scorer("mine.py:hinted")(rollout_of(TEXTS), batch_of(ROWS))


@pytest.mark.parametrize("column", ["prompts", "completions", "completion_ids"])
def test_a_column_with_a_name_that_the_run_uses_raises(column):
    with pytest.raises(RewardError, match=f"column is named '{column}'"):
        make_scorer("accuracy")(rollout_of(TEXTS), batch_of([row | {column: 1} for row in ROWS]))


def test_a_broken_contract_names_the_function():
    with pytest.raises(RewardError, match="'short' returned 1 rewards for 3 completions"):
        make_scorer("mine.py:short")(rollout_of(TEXTS), batch_of(ROWS))


# -- match_answer ------------------------------------------------------------------------------------------------------

ANSWERS = ["0", "7", "12", "1234567", "-3", "-45", "1,234", "-1,234", "3.5", "-0.5", "3/4", "50%", "$18", "-$18"]


@functools.cache
def comparison(tokenizer):
    return make_scorer("match_answer", "accuracy", tokenizer=tokenizer)


def both(texts, rows, tokenizer, **options):
    """Returns the rewards of match_answer and of accuracy."""
    rewards, _ = comparison(tokenizer)(rollout_of(texts, tokenizer, **options), batch_of(rows))
    return np.asarray(rewards["match_answer"]), np.asarray(rewards["accuracy"])


def test_the_first_tokenizer_joins_the_space_with_a_minus():
    assert MERGING.encode("#### -3")[-2:] == MERGING.encode(" -") + MERGING.encode("3")
    assert MERGING.encode("#### -3") != MERGING.encode("#### ") + MERGING.encode("-3")


@TOKENIZERS
def test_match_answer_agrees_with_accuracy(tokenizer):
    """Compares every answer with every other, alone and at the end of a solution."""
    rows = [{"answer": answer} for answer in ANSWERS]
    for before in ("", "2 - 5 = -3\n", "It follows that:\n\n"):
        matched, accurate = both([[f"{before}#### {answer}" for answer in ANSWERS]] * len(rows), rows, tokenizer)
        np.testing.assert_array_equal(matched, np.eye(len(ANSWERS)))
        np.testing.assert_array_equal(accurate, np.eye(len(ANSWERS)))


NUMBERS = st.integers(-(10**6), 10**6) | st.integers(-12, 12)


@settings(max_examples=40, deadline=None)
@given(st.sampled_from([MERGING, BYTES]), st.lists(NUMBERS, min_size=3, max_size=3), st.tuples(*[NUMBERS] * 4))
def test_match_answer_agrees_with_accuracy_on_integers(tokenizer, answers, guesses):
    texts = [[f"1 - 2 = -1\n#### {guess}" for guess in (*guesses, answer)] for answer in answers]
    rows = [{"answer": answer if answer % 2 else str(answer)} for answer in answers]
    matched, accurate = both(texts, rows, tokenizer)
    np.testing.assert_array_equal(matched, accurate)
    np.testing.assert_array_equal(matched[:, -1], 1)


@TOKENIZERS
def test_match_answer_on_completions_without_the_answer(tokenizer):
    incorrect = ["-3", "### -3", "#### 3", "#### ", "####", "", "#### -3 4", "#### -34", "#### -3\n#### -4"]
    matched, accurate = both([[*incorrect, "#### -4\n#### -3"]], [{"answer": -3}], tokenizer)
    np.testing.assert_array_equal(matched, [[0] * 9 + [1]])
    np.testing.assert_array_equal(accurate, matched)


@TOKENIZERS
def test_match_answer_compares_spelling_and_requires_the_end_token(tokenizer):
    """It is stricter than accuracy. It rejects other spellings, text after the answer, and a missing end token."""
    texts = [["#### 12.0", "####12", "#### 12\n", "#### 12", "#### 12"]]
    matched, accurate = both(texts, [{"answer": "12"}], tokenizer, cut=[(0, 3)])
    np.testing.assert_array_equal(matched, [[0, 0, 0, 0, 1]])
    np.testing.assert_array_equal(accurate, [[1, 1, 1, 1, 1]])


def test_match_answer_takes_a_worked_solution_as_the_answer():
    rows = [{"answer": solution} for solution in ("2 - 5 = -3\n#### -3", "#### 12 ", r"so \boxed{12}", " 12\n")]
    matched, accurate = both([["#### -3", "#### 12"]] * 4, rows, MERGING)
    np.testing.assert_array_equal(matched, [[1, 0], [0, 1], [0, 1], [0, 1]])
    np.testing.assert_array_equal(accurate, matched)


def test_match_answer_agrees_with_accuracy_on_the_word_problems(data_dir):
    problems = data.load_source("word_problems", "validation", data_dir=data_dir)
    rows = problems.read(range(200))
    tokenizer = data.train_tokenizer(f"{row['question']}\n{row['solution']}" for row in rows)
    others = [*rows[1:], rows[0]]
    texts = [[row["solution"], other["solution"]] for row, other in zip(rows, others)]
    matched, accurate = both(texts, rows, tokenizer)
    np.testing.assert_array_equal(matched, accurate)
    np.testing.assert_array_equal(matched[:, 0], 1)
    assert matched[:, 1].mean() < 0.2


@pytest.mark.parametrize("row", [{}, {"answer": None}, {"answer": " "}])
def test_match_answer_without_a_reference_raises(row):
    with pytest.raises(RewardError, match="'match_answer' needs the column 'answer'.*its columns are .*question"):
        make_scorer("match_answer")(rollout_of(TEXTS), batch_of([{"answer": "1"}, row]))


def tokenizer_that_joins(*texts):
    """Returns a tokenizer for which each of the texts is one token in any context."""
    tokenizer = data.train_tokenizer([], vocab_size=259)
    tokenizer.backend.add_tokens(list(texts))
    return tokenizer


def test_a_tokenizer_that_joins_the_answer_with_its_marker_raises():
    scorer = make_scorer("match_answer", tokenizer=tokenizer_that_joins("#### 1"))
    with pytest.raises(RewardError, match="joins the answer '12' with the '####' before it; use the reward 'accuracy'"):
        scorer(rollout_of(TEXTS), batch_of(ROWS))
    with pytest.raises(RewardError, match="joins '####' with the line break before it; use the reward 'accuracy'"):
        make_scorer("match_answer", tokenizer=tokenizer_that_joins("\n####"))


def test_device_rewards_transfer_nothing():
    scorer, batch, rollout = make_scorer("match_answer"), batch_of(ROWS), rollout_of(TEXTS)
    assert not scorer.on_host and make_scorer("match_answer", "format").on_host
    with jax.transfer_guard("disallow"), jax.transfer_guard_device_to_host("disallow_explicit"):
        rewards, metrics = scorer(rollout, batch)
    assert metrics == {}
    # Transfers from a CPU to itself are not guarded, but using a value while tracing fails anywhere.
    traced = jax.jit(lambda rollout: scorer(rollout, batch)[0])(rollout)
    for values in (rewards, traced):
        np.testing.assert_array_equal(values["match_answer"], [[1, 0, 0], [1, 1, 0]])
    with pytest.raises(jax.errors.NonConcreteBooleanIndexError):
        jax.jit(lambda rollout: make_scorer("format")(rollout, batch)[0])(rollout)


def test_host_rewards_transfer_explicitly():
    scorer, batch, rollout = make_scorer("match_answer", "accuracy"), batch_of(ROWS), rollout_of(TEXTS)
    with jax.transfer_guard("disallow"):
        rewards, _ = scorer(rollout, batch)
    np.testing.assert_array_equal(rewards["accuracy"], [[1, 0, 0], [1, 1, 0]])


def test_new_answers_compile_nothing(caplog):
    scorer = make_scorer("match_answer")
    first, second = rollout_of(TEXTS), rollout_of([["#### -1", "x", "y"], ["#### 5", "", "z"]])
    with jax.log_compiles():
        scorer(first, batch_of(ROWS))
        assert "Compiling" in caplog.text
        caplog.clear()
        rewards, _ = scorer(second, batch_of([{"answer": "-1"}, {"answer": -12345}]))
        assert "Compiling" not in caplog.text
    np.testing.assert_array_equal(rewards["match_answer"], [[1, 0, 0], [0, 0, 0]])


# -- configurations that make no sense ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "functions, weights, message",
    [
        (["match_answer"], [0], "No reward has a weight other than 0"),
        (["accuracy", "format"], [0.0, 0.0], "No reward has a weight other than 0"),
        ([], [], "No reward has a weight other than 0"),
        (["accuracy", "format"], [1.0, math.nan], "weight of reward 'format' is nan"),
        (["match_answer"], [math.inf], "weight of reward 'match_answer' is inf"),
        (["accuracy", "accuracy"], [], "Two rewards are named 'accuracy'"),
        (["match_answer", "match_answer"], [], "Two rewards are named 'match_answer'"),
        (["match_answer", "mine.py:match_answer"], [], "Two rewards are named 'match_answer'"),
        (["accuracy", "acuracy"], [], "no built-in reward 'acuracy'; did you mean 'accuracy'"),
        (["match_answers"], [], "no built-in reward 'match_answers'; did you mean 'match_answer'.*, match_answer"),
        (["mine.py:lenght"], [], "has no function 'lenght'; did you mean 'length'"),
        (["mein.py:length"], [], "no file mein.py; did you mean 'mine.py'"),
    ],
)
def test_configurations_that_make_no_sense_raise(functions, weights, message):
    with pytest.raises(RewardError, match=message):
        make_scorer(*functions, weights=weights)

"""Tests tables of verdicts. No text makes a verdict raise, hang or run code."""

import time

from hypothesis import given
from hypothesis import strategies as st
import pytest

from jaxrl_reason.rewards import load_reward
from jaxrl_reason.rewards.task_rewards import canonical_answer, judge_reward, many_answers_reward, strict_reward

SUM = dict(kind="sum", target=12, low=1, high=9)
DIFFERENCE = dict(kind="difference", target=4, low=3, high=20)
MULTIPLE = dict(kind="multiple", target=6, low=20, high=50)

CANONICAL = [  # completion, constraint, canonical form
    ("5 + 7 = 12\n#### 5, 7", SUM, "5, 7"),
    ("#### 7, 5", SUM, "5, 7"),
    ("#### 7,5", SUM, "5, 7"),
    ("#### 5 and 7", SUM, "5, 7"),
    ("#### 5, and 7.", SUM, "5, 7"),
    ("#### 05, 7", SUM, "5, 7"),
    ("#### 6, 6", SUM, "6, 6"),
    (r"so \boxed{3, 9}", SUM, "3, 9"),
    ("#### 1, 2\n#### 3, 9", SUM, "3, 9"),
    ("5 + 7 = 12\n#### 5, 8", SUM, None),
    ("5 + 7 = 12", SUM, None),
    ("#### 5 + 7", SUM, None),
    ("#### 5 7", SUM, None),
    ("#### 12", SUM, None),
    ("#### 3, 4, 5", SUM, None),
    ("#### 2, 10", SUM, None),  # 10 is out of range
    ("#### -1, 13", SUM, None),
    ("#### 5.0, 7", SUM, None),
    ("#### 5, 7 or so", SUM, None),
    ("#### 5,, 7", SUM, None),
    ("#### ", SUM, None),
    ("#### ５, ７", SUM, None),
    ("7 - 3 = 4\n#### 7, 3", DIFFERENCE, "3, 7"),
    ("#### 3, 7", DIFFERENCE, "3, 7"),
    ("#### 16, 20", DIFFERENCE, "16, 20"),
    ("#### 17, 21", DIFFERENCE, None),
    ("#### 2, 6", DIFFERENCE, None),
    ("#### 4", DIFFERENCE, None),
    ("6 * 4 = 24\n#### 24", MULTIPLE, "24"),
    ("#### 48.", MULTIPLE, "48"),
    ("#### 25", MULTIPLE, None),
    ("#### 18", MULTIPLE, None),
    ("#### 54", MULTIPLE, None),
    ("#### 6 * 4", MULTIPLE, None),
    ("#### 24, 30", MULTIPLE, None),
]

JUDGED = {  # final answer -> verdicts of (judge, strict) for the reference 7/4
    "7/4": (1, 1),
    "14/8": (1, 0),
    "1 3/4": (1, 0),
    "1 6/8": (1, 0),
    "+1 3/4.": (1, 0),
    r"1\frac{3}{4}": (1, 0),
    r"1 \frac34": (1, 0),
    r"$1\frac34$": (1, 0),
    r"1\,\frac34": (1, 0),
    r"1\frac{1}{4}": (0, 0),
    r"2\frac{-1}{4}": (0, 0),
    r"1\frac34\%": (0, 0),
    "13/4": (0, 0),
    "1.75": (1, 0),
    "1.750": (1, 0),
    "175%": (1, 0),
    "175 %": (1, 0),
    r"175\%": (1, 0),
    "7 / 4": (1, 0),
    r"\frac{7}{4}": (1, 0),
    "175": (0, 0),
    "1.75%": (0, 0),
    "-7/4": (0, 0),
    "-1 3/4": (0, 0),
    "1 3/4%": (0, 0),
    "1 -3/4": (0, 0),
    "1  3/4": (0, 0),
    "1 3/0": (0, 0),
    "1 + 3/4": (0, 0),
    "7/4 + 0": (0, 0),
    "1.8": (0, 0),
    "４/7": (0, 0),
    "1 ³/4": (0, 0),
    "": (0, 0),
}

HOSTILE = [
    "",
    "####",
    "#### " + "9" * 5_000_000,
    "#### " + "5, " * 1_000_000 + "7",
    "#### 5" + " " * 3_000_000 + "7",
    "#### " + " and " * 500_000,
    "#### 1 " * 500_000,
    "####" * 500_000,
    r"\boxed{" * 300_000,
    "(" * 1_000_000,
    "#### 9**9**9**9",
    "#### 9**9**9**9, 1",
    "#### 1e999999999",
    "#### 10 " + "9" * 200 + "/7",
    "#### __import__('os').system('touch /tmp/ran')",
    "#### \x00, \x00",
    "#### \ud800, 7",
    "#### ٥, ٧",
    "#### ５, ７",
    "#### ²/3",
    "#### nan, inf",
    "#### 1_0, 2",
    "#### 5, 7\u2028",
]


@pytest.mark.parametrize("completion, constraint, canonical", CANONICAL)
def test_canonical_answer(completion, constraint, canonical):
    assert canonical_answer(completion, **constraint, question="?", answers=3) == canonical


def test_many_answers_judges_row_by_row():
    rows = [SUM, DIFFERENCE, MULTIPLE, SUM]
    columns = {name: [row[name] for row in rows] for name in SUM}
    completions = ["#### 7, 5", "#### 7, 3", "#### 24", "#### 7, 3"]
    rewards = many_answers_reward(prompts=["?"] * 4, completions=completions, completion_ids=[[1]] * 4, **columns)
    assert rewards == [1.0, 1.0, 1.0, 0.0]


def test_an_unknown_kind_is_named():
    with pytest.raises(
        ValueError, match="column 'kind' holds 'product'; many_answers can judge sum, difference, multiple"
    ):
        many_answers_reward(["#### 3, 4"], kind=["product"], target=[12], low=[1], high=[9])


def test_incorrect_answers_vote_too():
    """Without their votes, a majority vote would be correct whenever one answer is correct."""
    votes = [many_answers_reward.answer_of(text, {}) for text in ("#### 7, 5", "#### 5 and 7", "#### 1, 2", "#### x")]
    assert votes == ["5, 7", "5, 7", "1, 2", None]


@given(st.integers(-50, 50), st.integers(-50, 50), st.sampled_from(["sum", "difference"]), st.integers(0, 60))
def test_canonical_answer_against_brute_force(a, b, kind, target):
    correct = -20 <= a <= 30 and -20 <= b <= 30 and (a + b == target if kind == "sum" else abs(a - b) == target)
    found = canonical_answer(f"#### {a}, {b}", kind=kind, target=target, low=-20, high=30)
    assert found == (f"{min(a, b)}, {max(a, b)}" if correct else None)
    assert found == canonical_answer(f"#### {b} and {a}", kind=kind, target=target, low=-20, high=30)


@pytest.mark.parametrize("text", JUDGED)
def test_judge_and_strict(text):
    completion = f"3/4 + 1 = 7/4\n#### {text}"
    assert (judge_reward([completion], ["7/4"]), strict_reward([completion], ["7/4"])) == tuple(
        [v] for v in JUDGED[text]
    )


def test_judge_and_strict_require_the_marker_and_judge_row_by_row():
    completions, answers = ["7/4", "#### 7/4", "#### 3/4", r"\boxed{7/4}"], ["7/4", "7/4", "7/4", 1.75]
    call = dict(prompts=["?"] * 4, completions=completions, completion_ids=[[1]] * 4, answer=answers, family=["f"] * 4)
    assert judge_reward(**call) == [0.0, 1.0, 0.0, 1.0]
    assert strict_reward(**call) == [0.0, 1.0, 0.0, 0.0]


@pytest.mark.parametrize("reference", ["three quarters", "", "1 3/0", "9" * 300])
def test_judge_raises_on_a_reference_that_is_not_a_number(reference):
    with pytest.raises(ValueError, match="is not a number; correct that row's answer"):
        judge_reward(["#### 1"], [reference])


@given(st.integers(1, 999), st.integers(1, 99))
def test_judge_accepts_every_form_of_a_value(above, below):
    forms = [
        f"{above}/{below}",
        f"{above * 6}/{below * 6}",
        f"{above // below} {above % below}/{below}",
        f"{above * 100}/{below * 100}",
    ]
    assert judge_reward([f"#### {form}" for form in forms], [f"{above}/{below}"] * 4) == [1.0] * 4
    off = [f"{above + 1}/{below}", f"{above // below} {above % below + 1}/{below}", f"-{above}/{below}"]
    assert judge_reward([f"#### {form}" for form in off], [f"{above}/{below}"] * 3) == [0.0] * 3


def test_built_in_by_name():
    assert load_reward("many_answers") is many_answers_reward
    assert load_reward("strict") is strict_reward
    assert load_reward("judge") is judge_reward


def test_hostile_completions_are_incorrect_and_cost_little():
    count = len(HOSTILE)
    begin = time.perf_counter()
    assert not any(judge_reward(HOSTILE, ["7/4"] * count))
    assert not any(strict_reward(HOSTILE, ["7/4"] * count))
    for constraint in (SUM, DIFFERENCE, MULTIPLE):
        columns = {name: [value] * count for name, value in constraint.items()}
        verdicts = many_answers_reward(HOSTILE, **columns)
        assert [text[:20] for text, verdict in zip(HOSTILE, verdicts) if verdict] == (
            ["#### 5, 7\u2028"] if constraint is SUM else []
        )
    assert time.perf_counter() - begin < 5


@given(st.text())
def test_any_text_gets_a_verdict(text):
    for completion in (text, f"#### {text}"):
        assert judge_reward([completion], ["7/4"])[0] in (0.0, 1.0)
        assert strict_reward([completion], ["7/4"])[0] in (0.0, 1.0)
        for constraint in (SUM, DIFFERENCE, MULTIPLE):
            assert many_answers_reward([completion], **{k: [v] for k, v in constraint.items()})[0] in (0.0, 1.0)

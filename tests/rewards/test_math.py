"""Tests verdicts of math-verify from real worker processes."""

import functools
import importlib.util
import sys
import threading
import time

from hypothesis import given, settings
from hypothesis import strategies as st
import numpy as np
import pytest

from jaxrl_reason.rewards import compute_rewards, HostReward, load_reward, numeric_verdict, RewardError
from jaxrl_reason.rewards import math as math_rewards
from jaxrl_reason.rewards.math import math_verify_reward, MAX_ANSWER_LENGTH, TIMEOUT_S

if importlib.util.find_spec("math_verify") is None:  # importorskip would import it in this process
    pytest.skip("math-verify is not installed", allow_module_level=True)


def judge(*pairs):
    """Returns the results of (reference, completion) pairs."""
    references, completions = zip(*pairs)
    return math_verify_reward(prompts=["q"] * len(pairs), completions=list(completions), answer=list(references))


def boxed(answer):
    return rf"So the answer is $\boxed{{{answer}}}$."


CORRECT = [
    (r"\frac{1}{\sqrt{3}}", boxed(r"\frac{\sqrt{3}}{3}")),
    (r"\frac{1}{\sqrt{3}}", r"#### \frac{\sqrt{3}}{3}"),
    (r"$\frac{1}{2}$", boxed(r"\sin\frac{\pi}{6}")),
    ("2", boxed(r"\sqrt{4}")),
    (2, boxed(r"\sqrt{4}")),
    ("5", boxed("x=5")),
    ("x=5", boxed("5")),
    ("x^2+2x+1", boxed("(x+1)^2")),
    (r"\{1,2\}", boxed(r"\{2,1\}")),
    ("(1,2)", boxed("(1,2)")),
    ("[0,1)", boxed("[0,1)")),
    (r"x \le 2", boxed(r"(-\infty, 2]")),
    (r"50\%", boxed(r"\sqrt{0.25}")),
    (r"\frac{1}{2004!}", boxed(r"\frac{2005}{2005!}")),
    ("9", boxed("9 percent")),
    ("3/2", boxed("1 1/2")),
    (r"-\frac{9}{4}", boxed("-2 1/4")),
    ("9^{9^{9^{9}}}", boxed("9^{9^{9^{9}}}")),  # equal as expressions, not computed
    (r"\begin{pmatrix}1\\2\end{pmatrix}", boxed(r"\begin{pmatrix}1\\ 2\end{pmatrix}")),
    (r"\pi/4", boxed(r"\frac{\pi}{4}")),
    ("1e-7", boxed("10^{-7}")),
    (1e-7, boxed("10^{-7}")),
    ("10^{-7}", boxed("1e-7")),
    (r"Long division. \boxed{\sqrt{2}}", boxed(r"\frac{2}{\sqrt{2}}")),
    (r"First \sqrt{3}. #### \sqrt{2}", boxed(r"\frac{2}{\sqrt{2}}")),
    (r"\sqrt{2}", r"\boxed{\sqrt{3}}, no: \boxed{\frac{2}{\sqrt{2}}}"),
    (r"\sqrt{2}", r"\boxed{\sqrt{3}}" + "\n#### $\\sqrt{2}$"),
]
INCORRECT = [
    (r"\frac{1}{\sqrt{3}}", boxed(r"\frac{\sqrt{3}}{2}")),
    (r"\sqrt{2}", r"\boxed{\sqrt{2}}, no: \boxed{\sqrt{3}}"),  # the last box counts
    (r"\{1,2\}", r"\boxed{1} and \boxed{2}"),  # two boxes are not a set
    ("(1,2)", boxed("(2,1)")),
    ("[0,1)", boxed("[0,1]")),
    ("x^2+2x+1", boxed("(x-1)^2")),
    ("2", r"\sqrt{4}"),  # not marked as the answer
    (r"\sqrt{2}", "no idea"),
    (r"\sqrt{2}", ""),
    (r"\sqrt{2}", r"\boxed{\sqrt{2}"),
    (r"\frac{3}{4}", boxed(r"\frac{1}{2} ( \frac{3}{4}")),  # an unreadable answer that has a number
    (r"\frac{1}{2004!}", boxed(r"\frac{1}{2006!}")),
    (r"\frac{1}{2004!}", boxed("0")),
    ("10^{-20}", boxed("10^{-21}")),
    ("1", boxed("1 1/2")),
    (r"\frac{1}{3}", boxed("0.333333")),  # plain numbers are exact
    ("9", boxed("x \\ne 9")),
    (r"\sqrt{2}", boxed("__import__('os').system('touch hacked')")),
]


def test_verdicts():
    results = judge(*CORRECT, *INCORRECT)
    assert results.outcomes == ["ok"] * len(results), results.error
    misjudged = [pair for pair, verdict in zip(CORRECT, results) if verdict != 1.0]
    misjudged += [pair for pair, verdict in zip(INCORRECT, results[len(CORRECT) :]) if verdict != 0.0]
    assert not misjudged


NUMBERS = st.sampled_from(["18", "-3", "1,234", "0.5", "1/2", r"\frac{1}{2}", "50%", "$18", "0.333333", "1/3", "1e3"])


@settings(max_examples=60, deadline=None)
@given(NUMBERS, NUMBERS, st.booleans())
def test_plain_numbers_are_judged_exactly_and_in_this_process(reference, answer, hashes):
    completion = f"#### {answer}" if hashes else boxed(answer)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(math_rewards, "_pool", None)
        results = judge((reference, completion), (reference, "none"), (18, completion))
    assert results == [numeric_verdict(completion, reference), 0.0, numeric_verdict(completion, 18)]
    assert results.outcomes == ["ok"] * 3


ENDLESS = {"timeout", "error", "ok"}  # a limit of time, memory or recursion, or no limit
HOSTILE = {
    "9^{9^{9^{9}}}": {"timeout"},
    "(" * 900 + "1" + ")" * 900: ENDLESS,
    r"\prod_{n=1}^{99999999} n": ENDLESS,
    "9" * 1900 + "+1": {"ok"},
    "\0": {"ok"},
    "\ud800 + \udfff": {"ok"},
    "9" * (MAX_ANSWER_LENGTH + 1) + "x": {"error"},
    "9" * 1_000_000: {"error"},
    "(" * 10_000: {"error"},
    "}" * 100: {"ok"},
    "\\" * 101: {"ok"},
    "__import__('os').system('touch hacked')": {"ok"},
}


@pytest.mark.processes
def test_hostile_answers_cost_at_most_their_limit_and_no_other_answer(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    judge((r"\sqrt{2}", boxed("1")))  # starts the workers
    pairs = []
    for answer in HOSTILE:
        pairs += [(r"\sqrt{2}", "#### " + answer), (r"\sqrt{2}", boxed(r"\frac{2}{\sqrt{2}}"))]
    begin = time.monotonic()
    results = judge(*pairs, ("18", "#### 18"))
    took = time.monotonic() - begin
    for answer, outcome, value in zip(HOSTILE, results.outcomes[::2], results[::2]):
        assert outcome in HOSTILE[answer] and value == (0.0 if outcome == "ok" else None), (answer[:40], outcome, value)
    assert results[1::2] == [1.0] * len(HOSTILE) and results[-1] == 1.0
    assert took < results.outcomes.count("timeout") * (TIMEOUT_S + 2) + 10
    assert not (tmp_path / "hacked").exists()


def test_verdicts_from_a_thread():
    results = []
    thread = threading.Thread(target=lambda: results.extend(judge(*CORRECT[:3], *INCORRECT[:3])))
    thread.start()
    thread.join()
    assert results == [1.0] * 3 + [0.0] * 3


@pytest.mark.parametrize(
    "reference, shown",
    [
        ("", "''"),
        (" ", "' '"),
        (None, "None"),
        (float("nan"), "nan"),
        (["1"], r"\['1'\]"),
        ("#### ", "'#### '"),
        (r"so \boxed{2", r"'so \\\\boxed\{2'"),
        ("x" * (MAX_ANSWER_LENGTH + 1), "'xxx.*x\\.\\.\\."),
        ("}", "'}'"),
    ],
)
def test_a_reference_that_cannot_be_read_names_its_row(reference, shown):
    for completion in (boxed(r"\sqrt{2}"), "no idea"):
        with pytest.raises(ValueError, match=f"^Row 1: math-verify cannot read the reference answer {shown}, so no"):
            judge((r"\sqrt{2}", completion), (reference, completion))


class Spy:
    """A pool that records its items."""

    def __init__(self, pool):
        self.pool, self.asked = pool, []

    def map(self, items):
        self.asked += items
        return self.pool.map(items)


def test_outcomes_become_metrics_and_equal_answers_are_judged_once(monkeypatch):
    spy = Spy(math_rewards._pool())
    monkeypatch.setattr(math_rewards, "_pool", lambda: spy)
    completions = [
        [boxed(r"\frac{2}{\sqrt{2}}")] * 2 + ["#### " + "x" * 3000],
        ["no idea"] + ["#### 9^{9^{9^{9}}} + y"] * 2,
    ]
    reward = HostReward("math_verify", load_reward("math_verify"))
    table = compute_rewards([reward], ["a", "b"], completions, [[[1]] * 3] * 2, {"answer": [r"\sqrt{2}", "y"]})
    np.testing.assert_array_equal(table.per_reward["math_verify"], [[1, 1, np.nan], [0, np.nan, np.nan]])
    assert table.failures() == {
        "rewards/math_verify/error_rate": pytest.approx(1 / 6),
        "rewards/math_verify/none_rate": 0,
        "rewards/math_verify/timeout_rate": pytest.approx(2 / 6),
    }
    assert spy.asked == [(r"\sqrt{2}", r"\frac{2}{\sqrt{2}}"), ("y", None), ("y", "9^{9^{9^{9}}} + y")]


def test_a_bad_reference_costs_its_own_rows_only():
    reward = HostReward("math_verify", math_verify_reward)
    completions = [[boxed(r"\frac{2}{\sqrt{2}}"), "none"], [boxed("3"), "none"]]
    table = compute_rewards([reward], ["a", "b"], completions, [[[1]] * 2] * 2, {"answer": [r"\sqrt{2}", ""]})
    np.testing.assert_array_equal(table.per_reward["math_verify"], [[1, 0], [np.nan, np.nan]])
    assert table.error_rate == {"math_verify": 0.5} and table.timeout_rate == {"math_verify": 0}


def test_a_missing_package_raises(monkeypatch):
    sentence = r"'math_verify' needs the package math-verify.*pip install 'jaxrl_reason\[math\]'"
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "math_verify" else find_spec(name))
    with pytest.raises(RewardError, match=sentence):
        load_reward("math_verify")
    monkeypatch.setattr(math_rewards, "_pool", math_rewards._pool.__wrapped__)
    with pytest.raises(ImportError, match=sentence):
        judge((r"\sqrt{2}", boxed("1")))


def test_the_verifier_is_silent_and_not_in_this_process(monkeypatch, capfd):
    monkeypatch.setattr(math_rewards, "_pool", functools.cache(math_rewards._pool.__wrapped__))  # starts workers here
    assert judge((r"\sqrt{2}", boxed(r"\frac{2}{\sqrt{2}}")), (r"\sqrt{2}", boxed(r"\frac{("))) == [1.0, 0.0]
    math_rewards._pool().close()
    assert capfd.readouterr() == ("", "")
    assert "math_verify" not in sys.modules

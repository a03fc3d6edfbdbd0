"""The metrics of held-out completions against numbers worked by hand."""

from fractions import Fraction
import math

import numpy as np
import pytest

from jaxrl_reason.tasks import evaluation


def found(correct, **fields) -> evaluation.Evaluated:
    """Returns an evaluation with the given verdicts; other fields have any value of the correct shape."""
    correct = np.array(correct, bool)
    N, K = correct.shape
    defaults = dict(
        rows=[{}] * N,
        positions=np.arange(N),
        correct=correct,
        lengths=np.ones((N, K), int),
        truncated=np.zeros((N, K), bool),
        logprobs=np.zeros((N, K), np.float32),
        rewards={"accuracy": correct.astype(np.float32)},
        total=correct.astype(np.float32),
        texts=[[""] * K] * N,
        answers=[[None] * K] * N,
    )
    return evaluation.Evaluated(**defaults | fields)


def test_metrics_by_hand():
    three, four, seven = map(Fraction, (3, 4, 7))
    metrics = evaluation.all_metrics(
        found(
            [[1, 0, 1, 0], [0, 1, 0, 0], [0, 0, 0, 0]],
            answers=[[three, four, three, None], [None, seven, "x", "x"], [three, four, four, three]],
            texts=[["a", "b", "c", "d"], ["a", "b", "c", "c"], ["a", "a", "a", "a"]],
            lengths=np.array([[1, 2, 3, 4], [5, 5, 6, 6], [2, 2, 2, 10]]),
            truncated=np.array([[0, 0, 0, 1], [0, 0, 0, 0], [0, 0, 0, 1]], bool),
            logprobs=np.array([[-1, -2, -3, -4], [-1, -1, -1, -1], [-2, -2, -2, -3]], np.float32),
            total=np.array([[1, np.nan, 0, 2], [1, 1, 1, 1], [0, 0, 0, np.nan]], np.float32),
        ),
        temperature=1.0,
    )
    expected = {
        "accuracy": 3 / 12,
        "avg@4": 3 / 12,
        "pass@1": 3 / 12,
        "pass@2": (5 / 6 + 3 / 6) / 3,  # of the six pairs one, three and six are all incorrect
        "pass@4": 2 / 3,
        "maj@1": 1 / 3,  # three; nobody; three, which is incorrect there
        "maj@2": 2 / 3,  # three before four; seven; three before four
        "maj@4": 1 / 3,  # three; x; three before four
        "reward": 7 / 10,
        "rewards/accuracy": 3 / 12,
        "mean_length": 48 / 12,
        "mean_length_right": (1 + 3 + 5) / 3,
        "mean_length_wrong": (48 - 9) / 9,
        "clipped_ratio": 2 / 12,
        "answered_ratio": 10 / 12,
        "entropy": 23 / 48,
        "prompts": 3,
        "distinct_right_answers": (1 + 1 + 0) / 3,
        "distinct_right_completions": (2 + 1 + 0) / 3,
        # The mean of three draws of 1/2, 1/4, 0 is 0 in 1 of 27 cases, and 1/2 in as many.
        "accuracy_low": 0.0,
        "accuracy_high": 0.5,
    }
    assert metrics == {name: pytest.approx(value) for name, value in expected.items()}


def test_a_mean_of_nothing_is_nan():
    metrics = evaluation.all_metrics(found([[0, 0]], total=np.full((1, 2), np.nan, np.float32)), temperature=0.0)
    assert math.isnan(metrics["mean_length_right"]) and math.isnan(metrics["reward"])
    assert metrics["mean_length_wrong"] == 1 and metrics["maj@2"] == 0 and metrics["accuracy_low"] == 0
    assert metrics["accuracy_high"] == pytest.approx(0.79345, abs=1e-5)  # Wilson's: z**2 / (1 + z**2), z = 1.96
    assert "entropy" not in metrics  # greedy completions have no entropy
    assert math.isnan(evaluation.all_metrics(found([[1, 1]]), temperature=1.0)["mean_length_wrong"])


@pytest.mark.parametrize("samples, ks", [(1, [1]), (2, [1, 2]), (6, [1, 2, 4, 6]), (8, [1, 2, 4, 8])])
def test_curves_have_powers_of_two_and_all_samples(samples, ks):
    metrics = evaluation.all_metrics(found([[1] * samples]), temperature=1.0)
    for kind in ("pass", "maj"):
        assert [name for name in metrics if name.startswith(kind)] == [f"{kind}@{k}" for k in ks]


def test_the_first_completion_with_the_majority_answer_is_judged():
    """Equal answers can have unequal verdicts if a reward reads more than the answer."""
    metrics = evaluation.all_metrics(found([[0, 1], [1, 0]], answers=[["a", "a"], ["a", "a"]]), temperature=1.0)
    assert metrics["maj@2"] == 0.5


def test_human_values():
    """The values are .1 .. .5 in another order; H-Acc is (.2 + 1 * .5 + .5 * .1) / 1.5, with half the weight per sample."""
    values = np.array([0.2, 0.5, 0.4, 0.1, 0.3])
    correct = [[1, 1], [1, 1], [0, 0], [0, 1], [0, 0]]
    lengths = np.array([[2, 2], [4, 6], [8, 8], [1, 1], [3, 5]])
    metrics = evaluation.method_metrics(found(correct, values=values, lengths=lengths, texts=None, answers=None))
    assert metrics == {
        "h_accuracy": pytest.approx(0.75 / 1.5),
        "value_density": pytest.approx(50 / 4),
        "high_value_accuracy": 1.0,
        "low_value_accuracy": pytest.approx(0.5),
        **{f"mean_length_value_fifth_{i}": pytest.approx(x) for i, x in enumerate((1, 2, 4, 8, 5), start=1)},
    }


@pytest.mark.parametrize(
    "texts, same",
    [
        (["#### 3/4", "so #### 0.75", r"\boxed{\frac{3}{4}}", "#### 75%"], True),
        (["#### 3/4", "#### 0.7"], False),
        (["#### x + 1", r"\boxed{x + 1}"], True),
        (["#### x + 1", "#### x + 2"], False),
    ],
)
def test_equal_answers_vote_together(texts, same):
    assert (len({evaluation.final_answer(text, {}) for text in texts}) == 1) == same


@pytest.mark.parametrize("text", ["", "18", "####", r"\boxed{1", "the answer is 3"])
def test_a_completion_without_a_marked_answer_has_no_vote(text):
    assert evaluation.final_answer(text, {}) is None

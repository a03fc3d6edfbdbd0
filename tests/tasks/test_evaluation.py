"""Tests the metrics of held-out completions against numbers worked by hand."""

from fractions import Fraction
import json
import math

import numpy as np
import pytest

from jaxrl_reason.data import get_template, train_tokenizer
from jaxrl_reason.runs.files import json_line
from jaxrl_reason.tasks import evaluation
from jaxrl_reason.tasks.reporting import completion_lines, metric_tables


def found(correct, **fields) -> evaluation.Evaluated:
    """Returns an evaluation with the given verdicts. Other fields have any value of the correct shape."""
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
        "pass@2": (5 / 6 + 3 / 6) / 3,  # one, three and six of the six pairs are incorrect
        "pass@4": 2 / 3,
        "maj@1": 1 / 3,  # the votes are three, none, and three, which is incorrect
        "maj@2": 2 / 3,  # the votes are three (before four), seven, and three
        "maj@4": 1 / 3,  # the votes are three, x, and three (before four)
        "reward": 7 / 10,
        "rewards/accuracy": 3 / 12,
        "mean_length": 48 / 12,
        "mean_length_correct": (1 + 3 + 5) / 3,
        "mean_length_incorrect": (48 - 9) / 9,
        "clipped_ratio": 2 / 12,
        "answered_ratio": 10 / 12,
        "entropy": 23 / 48,
        "prompts": 3,
        "distinct_correct_answers": (1 + 1 + 0) / 3,
        "distinct_correct_completions": (2 + 1 + 0) / 3,
        # The mean of three draws of 1/2, 1/4 and 0 is 0 in 1 of 27 cases, and 1/2 in 1 of 27.
        "accuracy_low": 0.0,
        "accuracy_high": 0.5,
    }
    assert metrics == {name: pytest.approx(value) for name, value in expected.items()}


def test_completions_without_a_verdict_are_incorrect_and_counted():
    x = found([[1, 0], [0, 0]], unjudged=np.array([[False, True], [False, False]]))
    assert evaluation.all_metrics(x, 1.0)["missing_verdict_ratio"] == 0.25
    assert evaluation.summary_metrics(x, 1.0)["eval/missing_verdict_ratio"] == 0.25
    x = x._replace(unjudged=np.zeros((2, 2), bool))
    assert "missing_verdict_ratio" not in evaluation.all_metrics(x, 1.0)


def test_a_mean_of_nothing_is_nan():
    metrics = evaluation.all_metrics(found([[0, 0]], total=np.full((1, 2), np.nan, np.float32)), temperature=0.0)
    assert math.isnan(metrics["mean_length_correct"]) and math.isnan(metrics["reward"])
    assert metrics["mean_length_incorrect"] == 1 and metrics["maj@2"] == 0 and metrics["accuracy_low"] == 0
    assert metrics["accuracy_high"] == pytest.approx(0.79345, abs=1e-5)  # z**2 / (1 + z**2) by Wilson, z = 1.96
    assert "entropy" not in metrics  # greedy completions have no entropy
    assert math.isnan(evaluation.all_metrics(found([[1, 1]]), temperature=1.0)["mean_length_incorrect"])


@pytest.mark.parametrize("samples, ks", [(1, [1]), (2, [1, 2]), (6, [1, 2, 4, 6]), (8, [1, 2, 4, 8])])
def test_curves_have_powers_of_two_and_all_samples(samples, ks):
    metrics = evaluation.all_metrics(found([[1] * samples]), temperature=1.0)
    for kind in ("pass", "maj"):
        assert [name for name in metrics if name.startswith(kind)] == [f"{kind}@{k}" for k in ks]


@pytest.mark.parametrize(
    "samples, ks", [(1, [1]), (2, [2]), (4, [4]), (6, [4, 6]), (20, [4, 16, 20]), (64, [4, 16, 64])]
)
def test_a_run_logs_pass_at_powers_of_four_and_of_all_samples(samples, ks):
    metrics = evaluation.summary_metrics(found([[1] + [0] * (samples - 1)]), temperature=1.0)
    expected = {f"eval/pass@{k}": k / samples for k in ks}  # the chance that the one correct sample is drawn
    assert {name: x for name, x in metrics.items() if "pass@" in name} == pytest.approx(expected)


def test_the_first_completion_with_the_majority_answer_is_judged():
    """Equal answers can have unequal verdicts if a reward reads more than the answer."""
    metrics = evaluation.all_metrics(found([[0, 1], [1, 0]], answers=[["a", "a"], ["a", "a"]]), temperature=1.0)
    assert metrics["maj@2"] == 0.5


def test_votes_by_hand():
    """A prompt without answers has no correct vote. Self-rewards, clipped to [0, 1], weigh the votes."""
    nan = np.nan
    x = found(
        [[1, 0, 0], [1, 0, 0], [1, 0, 0], [1, 1, 1]],
        answers=[["x", "y", "y"], ["x", "y", "y"], ["x", "y", "y"], [None, None, None]],
        self_rewards=np.array([[0.9, 0.2, 0.3], [5.0, 0.6, 0.6], [0.1, nan, nan], [1, 1, 1]], np.float32),
    )
    numbers = evaluation.per_prompt(x)
    assert numbers["maj@3"].tolist() == [0, 0, 0, 0] and numbers["maj@1"].tolist() == [1, 1, 1, 0]
    assert numbers["weighted_vote"].tolist() == [1, 0, 1, 0]
    assert numbers["best_of_3_accuracy"].tolist() == [1, 1, 1, 1]


def test_human_values():
    """The values are .1 to .5 in another order, and H-Acc is (.2 + 1 * .5 + .5 * .1) / 1.5."""
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
        (["#### C", "#### (C)", r"\boxed{\text{C}}", "#### C. 18"], True),
        (["#### C", "#### D"], False),
        ([r"\boxed{\frac{\sqrt3}{3}}", r"\boxed{\frac{\sqrt{3}}{3}}", r"#### $\frac{\sqrt3}{3}$."], True),
        ([r"\boxed{\sqrt3}", r"\boxed{2\sqrt3}"], False),
    ],
)
def test_equal_answers_vote_together(texts, same):
    assert (len({evaluation.final_answer(text, {}) for text in texts}) == 1) == same


@pytest.mark.parametrize("text", ["", "18", "####", r"\boxed{1", "the answer is 3"])
def test_a_completion_without_a_marked_answer_has_no_vote(text):
    assert evaluation.final_answer(text, {}) is None


def test_self_rewards_and_log_probabilities_as_judges_by_hand():
    """A truncated completion is in no pair and is not chosen, however probable it is."""
    completions = found(
        [[1, 0, 0], [0, 1, 1], [0, 0, 0]],
        self_rewards=np.array([[0.95, 0.65, 0.25], [0.85, 0.75, np.nan], [0.15, 0.35, 0.05]], np.float32),
        logprobs=np.array([[-3, -1, -4], [-2, -5, -0.5], [-6, -7, -8]], np.float32),
        answers=[["7", "8", "8"], ["1", "2", "2"], ["5", "5", "6"]],
    )
    assert evaluation.self_reward_metrics(completions) == {
        "self_reward_f1": pytest.approx(2 * 1 * (4 / 6) / (1 + 4 / 6)),
        "self_reward_calibration_error": pytest.approx((0.05 + 0.65 + 0.25 + 0.85 + 0.25 + 0.15 + 0.35 + 0.05) / 8),
        "self_reward_auc": pytest.approx((6 + 5) / 12),  # 0.95 is above all six, and 0.75 is above all but 0.85
        "self_reward_auc_within": pytest.approx(2 / 3),
        "logprob_auc": pytest.approx((4 + 3) / 12),  # of -1, -4, -2, -6, -7, -8, four are below -3 and three below -5
        "logprob_auc_within": pytest.approx(1 / 3),
        "best_of_3_accuracy": pytest.approx(1 / 3),
        "best_of_3_by_logprob": 0.0,
        "weighted_vote": pytest.approx(1 / 3),  # 7 has 0.95 and 8 has 0.9; 1 has 0.85 and 2 has 0.75
    }


def test_truncated_completions_are_never_chosen():
    """All of the first prompt are truncated; the only one of the second that has ended is incorrect, with weight 0."""
    completions = found(
        [[1, 1], [1, 0]],
        self_rewards=np.array([[np.nan, np.nan], [np.nan, -0.5]], np.float32),
        answers=[["7", "7"], ["1", "2"]],
    )
    numbers = evaluation.per_prompt(completions)
    for name in ("best_of_2_accuracy", "best_of_2_by_logprob", "weighted_vote"):
        assert numbers[name].tolist() == [0, 0], name


def test_lines_of_a_file_give_the_same_completions():
    """Missing rewards, truncated completions and self-rewards survive as JSON. Answers become texts."""
    before = found(
        [[1, 0], [0, 1], [0, 0]],
        rows=[{"question": f"{i}?"} for i in range(3)],
        positions=np.array([0, 2, 5], np.int32),
        lengths=np.array([[1, 2], [3, 4], [5, 6]]),
        truncated=np.array([[0, 0], [0, 1], [0, 0]], bool),
        logprobs=np.array([[-0.1, -2], [-1 / 3, -1e-8], [-np.pi, 0]], np.float32),
        rewards={"accuracy": np.eye(3, 2, dtype=np.float32), "own": np.array([[np.nan, 0.1]] * 3, np.float32)},
        total=np.array([[1, np.nan], [0.1, 2], [0, 0]], np.float32),
        texts=[["a", "b\n"], ["\udc80", "\u2028"], ["", "{}"]],
        answers=[[Fraction(3, 4), None], ["x", Fraction(3, 4)], [None, None]],
        self_rewards=np.array([[0.5, 0.25], [0.1, np.nan], [1, 0]], np.float32),
    )
    lines = b"".join(map(json_line, completion_lines(before, get_template("plain"))))
    after = evaluation.parsed([json.loads(line) for line in lines.split(b"\n")[:-1]], prompts=3)
    for name in ("positions", "correct", "lengths", "truncated", "logprobs", "total", "self_rewards"):
        np.testing.assert_array_equal(getattr(after, name), getattr(before, name), err_msg=name)
        assert getattr(after, name).dtype == getattr(before, name).dtype, name
    assert after.rewards.keys() == before.rewards.keys()
    for name in before.rewards:
        np.testing.assert_array_equal(after.rewards[name], before.rewards[name])
    assert after.texts == before.texts and after.answers == [["3/4", None], ["x", "3/4"], [None, None]]
    numbers = evaluation.per_prompt(before)
    of_self_rewards = {"best_of_2_accuracy", "best_of_2_by_logprob", "weighted_vote"}
    assert numbers.keys() == {"accuracy", "pass@1", "pass@2", "maj@1", "maj@2"} | of_self_rewards
    for name, x in evaluation.per_prompt(after).items():
        np.testing.assert_array_equal(x, numbers[name])
    assert numbers["best_of_2_accuracy"].tolist() == [1, 0, 0] and numbers["weighted_vote"].tolist() == [1, 0, 0]
    joined = evaluation.join([after, after._replace(positions=np.array([1, 3, 4]))], values=np.arange(6.0))
    assert joined.values.tolist() == [0, 2, 5, 1, 3, 4] and joined.texts == 2 * after.texts
    assert joined.correct.tolist() == 2 * before.correct.tolist() and joined.rewards["own"].shape == (6, 2)


def test_lines_have_the_tokens_if_they_are_known():
    tokenizer = train_tokenizer(["a"], 260)  # one token per byte
    completion = lambda text, logprobs: evaluation.Sampled(
        np.array([*tokenizer.encode(text), tokenizer.eos_ids[0]]), np.array(logprobs, np.float32)
    )
    groups = [[completion("aé", [-0.12345, -1, -2.5, 0])], [completion("", [-np.inf])]]
    both = found([[1], [0]], rows=[{"question": "?"}] * 2, texts=[["aé"], [""]], sampled=groups)
    lines = list(completion_lines(both, get_template("plain"), tokenizer.pieces))
    assert [line["tokens"] for line in lines] == [["a", "", "é", ""], [""]]
    assert [line["logprobs"] for line in lines] == [[-0.123, -1.0, -2.5, 0.0], [None]]
    (twice, *_) = completion_lines(evaluation.join([both, both]), get_template("plain"), tokenizer.pieces)
    assert twice == lines[0]
    assert all("tokens" not in line for line in completion_lines(both, get_template("plain")))


def test_tables_have_intervals_if_there_are_any():
    numbers = {"accuracy": 0.5, "accuracy_low": 0.25, "avg@2": 0.5, "pass@1": 0.5, "maj@1": 0.25, "reward": math.nan}
    intervals = {"accuracy": (0.25, 0.75), "pass@1": (0.375, 0.625)}
    main, curve = metric_tables(numbers, intervals, "title")
    cells = lambda table: [list(column.cells) for column in table.columns]
    assert cells(main) == [
        ["accuracy", "avg@2", "reward"],
        ["50.0 %", "50.0 %", "-"],
        ["25.0 to 75.0 %", "25.0 to 75.0 %", ""],
    ]
    assert cells(curve) == [["1"], ["50.0 %"], ["37.5 to 62.5 %"], ["25.0 %"], [""]]


def test_the_table_of_predicted_numbers_has_no_percent():
    numbers = {
        "rmse": 0.5,
        "r2@8": 0.25,
        "median_rmse@8": 12.25,
        "r2": -5.6539e23,
        "spearman": math.nan,
        "prompts": 109,
    }
    (table,) = metric_tables(numbers, {}, "title")
    assert list(table.columns[1].cells) == ["0.500", "0.250", "12.250", "-5.65e+23", "-", "109"]

"""Tests messages of a long run: warnings, heartbeats and the remaining time."""

import io
import math
import re
import time

import numpy as np
import pytest
import rich.console

from jaxrl_reason.runs.progress import Clock, duration, Heartbeat, Progress
from jaxrl_reason.runs.watch import PATIENCE, SkippedUpdates, Watch

GOOD = {"frac_reward_zero_std": 0.5, "entropy": 1.0, "reward": 0.5, "sampling/logp_difference_max": 1e-6}
TIED, CERTAIN = GOOD | {"frac_reward_zero_std": 1.0}, GOOD | {"entropy": 0.009}
UNKNOWN = GOOD | {"frac_reward_zero_std": None, "entropy": math.nan, "reward": None}
MISSING = TIED | {"completions/missing_reward_ratio": 1.0, "entropy": 0.0, "reward": None}
UNMIXED = GOOD | {  # dynamic sampling has kept no group, so means are 0 or unknown
    "frac_reward_zero_std": math.nan,
    "entropy": 0.0,
    "dynamic_sampling/kept_ratio": 0.0,
    "dynamic_sampling/groups": 0,
    "dynamic_sampling/reward": 0.25,
}


def said_of(steps, history=()):
    said = []
    watch = Watch(said.append, 0.01, history)
    for i, metrics in enumerate(steps):
        watch.look(metrics, lambda: f"worst of {i}.")
    return said


def test_equal_rewards_give_one_warning_and_another_after_they_differed():
    assert said_of([TIED] * (PATIENCE - 1)) == []
    (sentence,) = said_of([GOOD, *[TIED] * 3 * PATIENCE])
    assert (
        f"For {PATIENCE} steps the completions of every group have had equal rewards (the mean reward is now 0.5)"
        in sentence
    )
    assert len(said_of([*[TIED] * PATIENCE, GOOD, *[TIED] * PATIENCE])) == 2
    assert said_of([*[TIED] * (PATIENCE - 1), UNKNOWN, *[TIED] * (PATIENCE - 1)]) == []
    assert len(said_of([TIED | {"frac_advantage_zero": 1.0}] * PATIENCE)) == 1


def test_equal_rewards_with_advantages_teach():
    assert said_of([TIED | {"frac_advantage_zero": 0.9}] * PATIENCE) == []


def test_missing_rewards_give_one_warning_only():
    (sentence,) = said_of([MISSING] * 2 * PATIENCE)
    assert f"For {PATIENCE} steps no completion has had a reward" in sentence and "none_rate" in sentence
    assert said_of([MISSING] * 3, history=[MISSING] * PATIENCE) == []


def test_completions_that_are_all_left_out_have_no_entropy_to_warn_of():
    left_out = GOOD | {"completions/left_out_ratio": 1.0, "completions/missing_reward_ratio": 0.0, "entropy": 0.0}
    (sentence,) = said_of([left_out] * 2 * PATIENCE)
    assert f"For {PATIENCE} steps no completion has entered the loss" in sentence
    assert "raise config.max_completion_length" in sentence
    assert said_of([left_out | {"completions/left_out_ratio": 0.99, "entropy": 1.0}] * PATIENCE) == []
    (sentence,) = said_of([MISSING | {"completions/left_out_ratio": 1.0}] * PATIENCE)
    assert "no completion has had a reward" in sentence


def test_lines_that_a_user_repaired_may_lack_metrics():
    assert said_of([{"step": 1}] * 2 * PATIENCE) == []
    skipped = SkippedUpdates(2, [{"step": 1}, {"skipped_update_ratio": 1.0}, {}])
    assert not skipped.look({"skipped_update_ratio": 1.0}) and skipped.look({"skipped_update_ratio": 1.0})


def test_dynamic_sampling_without_groups_gives_one_warning_only():
    (sentence,) = said_of([UNMIXED] * 2 * PATIENCE)
    assert (
        "dynamic sampling has found no group with correct and incorrect completions (the mean reward is now 0.25)"
        in sentence
    )
    assert said_of([UNMIXED | {"dynamic_sampling/kept_ratio": 0.1, "dynamic_sampling/groups": 1}] * PATIENCE)[0].count(
        "entropy"
    )


@pytest.mark.parametrize("unknown", [None, math.nan])
def test_dynamic_sampling_without_any_reward_is_told_as_such(unknown):
    (sentence,) = said_of([UNMIXED | {"dynamic_sampling/reward": unknown}] * 2 * PATIENCE)
    assert f"For {PATIENCE} steps no completion has had a reward" in sentence


def test_a_collapsed_entropy_gives_a_warning():
    (sentence,) = said_of([CERTAIN] * PATIENCE)
    assert "entropy has been below 0.01 nats per token (now 0.009)" in sentence and "entropy_coefficient" in sentence
    assert said_of([*[CERTAIN] * (PATIENCE - 1), GOOD]) == []


@pytest.mark.parametrize("difference", [0.011, math.inf, math.nan, None])
def test_a_mismatch_of_sampler_and_trainer_gives_a_warning_at_once(difference):
    bad = GOOD | {"sampling/logp_difference_max": difference}
    (sentence,) = said_of([GOOD, bad, bad])
    assert "more than config.sampling.mismatch_limit allows (0.01): worst of 1." in sentence
    assert len(said_of([bad, GOOD, bad])) == 2
    assert said_of([bad], history=[bad]) == []


def test_a_resumed_run_counts_the_earlier_steps():
    assert len(said_of([TIED], history=[TIED] * (PATIENCE - 1))) == 1
    assert said_of([TIED] * 5, history=[TIED] * PATIENCE) == []


def test_skipped_steps_count_in_a_row():
    skipped, applied, half = ({"skipped_update_ratio": x} for x in (1.0, 0.0, 0.5))
    counter = SkippedUpdates(3)
    assert [counter.look(x) for x in (skipped, skipped, applied, skipped, skipped, half, skipped, skipped)] == [
        False
    ] * 8
    assert counter.look(skipped)
    assert "At step 9 the loss or its gradient was not finite, for the 3rd step in a row" in str(
        counter.error("step 9", "")
    )
    almost = {"skipped_update_ratio": float(np.float32(1) - np.float32(6e-8))}  # the mean of 41 ones, rounded
    assert SkippedUpdates(3, [applied, skipped, almost]).look(skipped)
    assert not SkippedUpdates(3, [skipped, skipped, applied]).look(skipped)


def test_only_a_step_that_takes_long_gives_a_message():
    said, clock = [], Clock()
    with Heartbeat(said.append, 0.2) as heart:
        heart.step("Step 1", clock)
        with clock("rollout"):
            time.sleep(0.7)
        assert 1 <= len(said) <= 3  # each pause is twice as long
        assert re.fullmatch(
            r"Step 1 has been going on for \d s, and is in its rollout; the first step also compiles\.", said[0]
        )
        said.clear()
        for i in range(2, 6):
            heart.step(f"Step {i}", Clock())
            time.sleep(0.15)
        assert said == []
        heart.step("Step 6", Clock())
        time.sleep(1.2)  # five times as long as a usual step
    assert said[0].startswith("Step 6 has been going on for 1 s, and is not done.")
    count = len(said)
    time.sleep(0.5)
    assert len(said) == count


def test_the_first_step_compiles_even_after_an_evaluation_and_only_usual_steps_tell_the_usual_time():
    said = []
    with Heartbeat(said.append, 0.2) as heart:
        heart.step("The evaluation before training", Clock(), extra=True)
        time.sleep(0.5)
        heart.step("Step 1", Clock())
        time.sleep(0.5)  # below five times the evaluation
        for i in range(2, 5):
            heart.step(f"Step {i}", Clock())
            time.sleep(0.06)
            heart.step(f"The checkpoint of step {i}", Clock(), extra=True)
        heart.step("Step 5", Clock())
        time.sleep(0.6)  # more than five times a usual step, and less than five times the first one
    assert re.fullmatch(r"The evaluation before training .*, and is not done; it also compiles\.", said[0])
    of = lambda name: [text for text in said if text.startswith(name + " has")]
    assert of("Step 1")[0].endswith(" is not done; the first step also compiles.")
    assert of("Step 5")[0].endswith(" is not done.") and not of("Step 2")


def test_a_patience_of_zero_prints_nothing():
    said = []
    with Heartbeat(said.append, 0) as heart:
        heart.step("Step 1", Clock())
        time.sleep(0.1)
    assert said == []


def test_without_a_terminal_every_tenth_of_the_steps_is_a_line_with_the_remaining_time():
    out = io.StringIO()
    with Progress(rich.console.Console(file=out, markup=False, emoji=False), "RL", 20, 10) as bar:
        time.sleep(0.3)  # the first step compiles, and does not count
        for i in range(10):
            bar.advance(f"reward {i}")
            time.sleep(0.02)
    lines = out.getvalue().splitlines()
    assert lines[0].startswith("RL 12/20  reward 1  about 0 s left") and lines[-1] == "RL 20/20  reward 9"
    assert len(lines) == 5


@pytest.mark.parametrize(
    "seconds, text", [(0.4, "0 s"), (99, "99 s"), (130, "2 min"), (3600, "1 h 0 min"), (12345, "3 h 26 min")]
)
def test_durations(seconds, text):
    assert duration(seconds) == text

"""Tests the summary of results over seeds, by hand."""

import pytest

from helpers.entries import ENTRIES, WITH_PROMPTS
from jaxrl_reason import tasks
from jaxrl_reason.runs import result_tables, summary


def test_the_summary_by_hand():
    """t(0.975, 1) is 12.7062. The standard error of two values is half of their distance."""
    rows = {"hero": dict(enumerate(ENTRIES[:2])), "plain": dict(enumerate(ENTRIES[2:]))}
    found = summary.summarize(rows, "hero", tasks.BASELINES)
    assert list(found) == ["start", "pointwise", "hero", "plain"]
    means = {row: values.get("eval/accuracy") for row, values in found.items()}
    assert means == {"start": pytest.approx(0.3), "pointwise": None, "hero": 0.625, "plain": pytest.approx(0.35)}
    assert found["pointwise"]["eval/r2"] == pytest.approx(0.6)
    assert found["hero"]["eval/r2"] is None and found["hero"]["half_width"]["eval/r2"] is None
    assert found["hero"]["half_width"]["eval/accuracy"] == pytest.approx(12.7062 * 0.125, rel=1e-5)
    assert found["hero"]["seeds"]["eval/accuracy"] == {"0": 0.5, "1": 0.75} and found["hero"]["difference"] == {}
    difference = found["plain"]["difference"]["eval/accuracy"]  # the differences are -.25 and -.3
    expected = {"mean": -0.275, "low": -0.275 - 12.7062 * 0.025, "high": -0.275 + 12.7062 * 0.025}
    assert difference == pytest.approx(expected, rel=1e-5)
    run = {"config": "c", "versions": {"jax": "1"}, "seconds": 120.0, "start_seconds": 9.0}
    assert found["plain"]["runs"]["1"] == run


def test_curves_are_means_of_the_seeds_that_have_the_metric():
    rows = {"hero": dict(enumerate(ENTRIES[:2])), "plain": {0: ENTRIES[2]}}
    found = summary.curves(rows, "eval/accuracy")
    assert {row: {step: (e.mean, e.seeds) for step, e in points.items()} for row, points in found.items()} == {
        "hero": {0: (pytest.approx(0.3), 2), 8: (0.625, 2)},
        "plain": {0: (0.25, 1), 8: (0.25, 1)},
    }
    assert summary.curves(rows, "eval/r2") == {}


def test_accuracies_of_prompts_give_an_interval_for_other_prompts():
    """plain less hero is 0, -1 and -.25, -.5. Mean squares: seeds .0156, prompts .3906, rest .1406; variance .0664, t(1)."""
    rows = {"hero": dict(enumerate(WITH_PROMPTS[:2])), "plain": dict(enumerate(WITH_PROMPTS[2:]))}
    found = summary.summarize(rows, "hero", ())
    half = 12.7062 * ((0.015625 + 0.390625 - 0.140625) / 4) ** 0.5
    expected = {"mean": -0.4375, "low": -0.4375 - half, "high": -0.4375 + half}
    assert found["plain"]["difference"][summary.OTHER_PROMPTS] == pytest.approx(expected, rel=1e-5)
    assert summary.OTHER_PROMPTS not in found["start"]["difference"]
    assert summary.compared(found, ["eval/r2"]) == ["eval/r2", summary.OTHER_PROMPTS]
    text = "Accuracy less that of hero, with its 95 % interval for other seeds and other prompts: plain -43.8 [-371.2, +283.7] points."
    assert f" {text} " in result_tables.markdown(WITH_PROMPTS, ["accuracy"], ())


@pytest.mark.parametrize("change", [{"prompts": "q"}, {"prompts": None, "accuracies": None}, None])
def test_without_all_accuracies_of_the_same_prompts_there_is_no_such_interval(change):
    """One entry has other prompts, or is older; or the recipe has no runs, and the rows are not compared with each other."""
    plain = {0: WITH_PROMPTS[2], 1: WITH_PROMPTS[3] | (change or {})}
    rows = {"hero": dict(enumerate(WITH_PROMPTS[:2])), "plain": plain} if change else {"other": plain, "plain": plain}
    found = summary.summarize(rows, "hero", ())
    assert summary.compared(found, []) == [] and ("eval/accuracy" in found["plain"]["difference"]) == bool(change)

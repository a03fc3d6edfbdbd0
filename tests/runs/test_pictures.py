"""Tests the learning curve, and the table of metrics before and after training."""

import io
import json
import math

from matplotlib import figure
from matplotlib.image import imread
import numpy as np
import pytest
import rich.console

from jaxrl_reason.runs.metrics_file import MetricsWriter
from jaxrl_reason.runs.pictures import (
    cell,
    plot_comparison,
    plot_learning_curve,
    print_summary,
    print_table,
    reward_text,
    unit_note,
)
from jaxrl_reason.runs.statistics import Estimate
from jaxrl_reason.tasks import reporting


def test_learning_curve(tmp_path):
    with MetricsWriter(tmp_path, tensorboard=False) as writer:
        for step in range(60):
            metrics = {"reward": step / 60 if step != 30 else math.nan, "completions/mean_length": 50 - step / 2}
            writer.write(step, metrics | ({"eval/accuracy": step / 60} if step % 20 == 0 else {}))
    plot_learning_curve(tmp_path / "metrics.jsonl", tmp_path / "curve.png", title="60 steps")
    picture = imread(tmp_path / "curve.png")
    assert picture.shape[0] > 400 and picture.std() > 0.05
    for colour in ((31, 119, 180), (255, 127, 14), (44, 160, 44)):  # reward, accuracy, length are all drawn
        assert np.isclose(picture[..., :3], np.array(colour) / 255, atol=0.01).all(axis=-1).any()


def test_names_are_no_formulas(tmp_path):
    """matplotlib would refuse the formula of each name when it draws it."""
    name, out = r"a $\frac$ b", tmp_path / "picture.png"
    with MetricsWriter(tmp_path, tensorboard=False) as writer:
        writer.write(0, {"reward": 0.5})
    plot_learning_curve(tmp_path / "metrics.jsonl", out, title=name)
    plot_comparison({f"eval/{name}": {name: {0: Estimate(0.5, None, 1)}}}, out, title=name)
    record = {"metrics": {"accuracy": 0.5, "pass@2": 0.5}, "intervals": {"accuracy": (0.4, 0.6)}, "samples": 2}
    reporting.plot_sets({"sets": {name: record}}, out, title=name)
    reporting.plot_predictions(np.zeros((3, 2)), np.zeros(3), out, title=name)
    assert imread(out).std() > 0.05


NOTHING_KEPT = {"reward": math.nan, "completions/mean_length": math.nan}  # no group has different rewards
OVER_ALL = {"dynamic_sampling/reward": 0.25, "dynamic_sampling/mean_length": 7.0}


@pytest.mark.parametrize("steps", [1, 5])
@pytest.mark.parametrize("metrics", [{"reward": 0.5, "completions/mean_length": 7.0}, NOTHING_KEPT | OVER_ALL])
def test_every_run_has_curves(metrics, steps, tmp_path):
    """Even a run of one step, and dynamic sampling that has kept no group, have curves."""
    with MetricsWriter(tmp_path, tensorboard=False) as writer:
        for step in range(steps):
            writer.write(step, metrics)
    plot_learning_curve(tmp_path / "metrics.jsonl", tmp_path / "curve.png", title="dapo")
    picture = imread(tmp_path / "curve.png")
    plotted = picture[:, : int(picture.shape[1] * 0.6)]  # without the legend, at the right
    for colour in ((31, 119, 180), (44, 160, 44)):  # reward and length
        assert np.isclose(plotted[..., :3], np.array(colour) / 255, atol=0.01).all(axis=-1).sum() > 10


@pytest.mark.parametrize(
    "metrics, text",
    [
        ({"reward": 0.25}, "reward 0.250"),
        ({"reward": -1234.5}, "reward -1234.500"),
        ({"reward": math.nan}, "reward -"),
        ({"reward": None}, "reward -"),
        ({}, "reward -"),
        (NOTHING_KEPT | OVER_ALL, "reward 0.250"),
        ({"reward": 0.5} | OVER_ALL, "reward 0.250"),
        (NOTHING_KEPT | {"dynamic_sampling/reward": math.nan}, "reward -"),
    ],
)
def test_the_reward_next_to_the_progress_bar(metrics, text):
    assert reward_text(metrics) == text


@pytest.mark.parametrize(
    "name, value, text",
    [
        ("eval/accuracy", 0.5, "50.0 %"),
        ("pass@8", 0.5, "50.0 %"),
        ("eval/best_of_8_by_logprob", 0.5, "50.0 %"),
        ("eval/clipped_ratio", 0.031, "3.1 %"),
        ("eval/h_accuracy, other prompts", 0.5, "50.0 %"),
        ("eval/r2@8", 0.5, "0.500"),
        ("eval/mean_length", 18.26, "18.3"),
        ("eval/rmse", 999_999.0, "999,999"),
        ("eval/r2", -302265.917, "-302,266"),
        ("eval/r2", 9999.5, "9999.500"),
        ("eval/rmse", 1e6, "1.00e+06"),
        ("eval/r2", -5.6539e23, "-5.65e+23"),
        ("eval/r2", math.nan, "-"),
        ("eval/r2", None, "-"),
    ],
)
def test_a_cell_has_the_unit_of_its_metric(name, value, text):
    assert cell(name, value) == text


def test_the_unit_of_errors_is_named_for_predicted_numbers_only():
    note = "rmse and spread are in standard deviations of the training targets."
    assert unit_note(["eval/r2", "eval/rmse"]) == unit_note(["rmse"]) == note
    assert unit_note(["eval/accuracy", "rewards/my_rewards.py:spread", "hero/spread"]) == ""


@pytest.mark.parametrize(
    "lines",
    [
        "",
        '{"step": 0}\n',
        '{"step": 0, "eval/accuracy": 0.5}\n',
        '{"step": 0, "reward": null}\n{"step": 1, "reward": 1}\n',
    ],
)
def test_learning_curve_of_very_little(tmp_path, lines):
    (tmp_path / "metrics.jsonl").write_text(lines)
    plot_learning_curve(tmp_path / "metrics.jsonl", tmp_path / "curve.png", title="little")
    assert (tmp_path / "curve.png").stat().st_size > 0


def rows_of(console):
    """Returns the cells of the printed tables, without the headings."""
    rows = [line.strip("│ \n").split("│") for line in console.file.getvalue().splitlines() if "│" in line]
    return [[cell.strip() for cell in row] for row in rows]


def test_summary_table():
    before = {"eval/accuracy": 0.41, "eval/pass@4": 0.6, "eval/mean_length": 37.25, "eval/gone": 1.0}
    after = {
        "eval/accuracy": 0.73,
        "eval/pass@4": 0.55,
        "eval/mean_length": 40.0,
        "eval/h_accuracy": 0.5,
        "eval/gone": math.nan,
    }
    console = rich.console.Console(file=io.StringIO(), width=80)
    print_summary(console, before, after)
    assert rows_of(console) == [
        ["accuracy", "41.0 %", "73.0 %", "+32.0 points"],
        ["pass@4", "60.0 %", "55.0 %", "-5.0 points"],
        ["mean length", "37.2", "40.0", "+2.8"],
        ["gone", "1.0", "-", "-"],
        ["h accuracy", "-", "50.0 %", "-"],
    ]


@pytest.mark.parametrize("before, after, heading", [({}, {"eval/r2": 0.5}, "after"), ({"eval/r2": 0.5}, {}, "before")])
def test_a_summary_of_one_side_has_one_column(before, after, heading):
    console = rich.console.Console(file=io.StringIO(), width=80)
    print_summary(console, before, after)
    assert rows_of(console) == [["r2", "0.500"]] and heading in console.file.getvalue()


COLUMNS = {
    "start": ["50.0 %", "1.0"],
    "the method with a long name": ["60.0 %", "2.0"],
    **{f"baseline {i}": [f"{i}0.0 %", "123456.7"] for i in range(6)},
}


@pytest.mark.parametrize("width", [40, 60, 80, 200])
def test_a_table_is_as_wide_as_the_terminal_and_shows_every_cell(width):
    console = rich.console.Console(file=io.StringIO(), width=width)
    print_table(console, ["accuracy", "mean length"], COLUMNS)
    text = console.file.getvalue()
    assert max(map(len, text.splitlines())) <= width
    rows = rows_of(console)
    assert [cell for row in rows if row[0] == "accuracy" for cell in row[1:]] == [c[0] for c in COLUMNS.values()]
    assert [cell for row in rows if row[0] == "mean length" for cell in row[1:]] == [c[1] for c in COLUMNS.values()]
    words = text.replace("┃", " ").split()
    assert all(words.count(word) >= 1 for heading in COLUMNS for word in heading.split())
    assert text.count("┏") == {40: 7, 60: 3, 80: 2, 200: 1}[width]


def curve_axes(tmp_path, monkeypatch, lines):
    """Returns the axes of the learning curve of some metrics."""
    figures = []
    savefig = figure.Figure.savefig
    monkeypatch.setattr(figure.Figure, "savefig", lambda self, *a, **k: (figures.append(self), savefig(self, *a, **k)))
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps({"step": i} | x) + "\n" for i, x in enumerate(lines)))
    plot_learning_curve(tmp_path / "metrics.jsonl", tmp_path / "curve.png", title="")
    top, _, *right = figures[0].axes
    return top, right


def test_accuracy_is_in_percent_on_an_axis_of_the_same_scale_as_rewards_that_are_shares(tmp_path, monkeypatch):
    top, (right,) = curve_axes(tmp_path, monkeypatch, [{"reward": 0.25, "eval/accuracy": 0.5}, {"reward": 1.0}])
    assert right.lines[0].get_ydata() == [50.0] and right.get_ylabel() == "held-out accuracy (%)"
    assert [100 * x for x in top.get_ylim()] == pytest.approx(right.get_ylim())
    assert [text.get_text() for text in top.get_legend().get_texts()][-1] == "held-out accuracy (%)"


def test_curves_of_another_scale_have_axes_of_their_own(tmp_path, monkeypatch):
    top, (right,) = curve_axes(tmp_path, monkeypatch, [{"reward": -400.0, "eval/accuracy": 0.5}, {"reward": -100.0}])
    assert top.get_ylim()[0] < -400 and top.get_ylim()[1] < 0 and 0 < right.get_ylim()[0] < 50 < right.get_ylim()[1]
    top, (right,) = curve_axes(tmp_path, monkeypatch, [{"reward": -0.5, "eval/r2": 0.9}, {"reward": -0.4}])
    assert right.get_ylabel() == "held-out R2" and right.lines[0].get_ydata() == [0.9] and top.get_ylim()[1] < 0


def test_without_held_out_metrics_there_is_one_axis(tmp_path, monkeypatch):
    assert curve_axes(tmp_path, monkeypatch, [{"reward": 1.0}])[1] == []

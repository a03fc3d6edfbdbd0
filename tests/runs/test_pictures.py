"""The learning curve and the table of metrics before and after training."""

import io
import math

from matplotlib.image import imread
import numpy as np
import pytest
import rich.console

from jaxrl_reason.runs.metrics_file import MetricsWriter
from jaxrl_reason.runs.pictures import plot_learning_curve, summary_table


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
    console.print(summary_table(before, after))
    rows = [line.strip("│ \n").split("│") for line in console.file.getvalue().splitlines() if "│" in line]
    assert [[cell.strip() for cell in row] for row in rows] == [
        ["accuracy", "41.0 %", "73.0 %", "+32.0 points"],
        ["pass@4", "60.0 %", "55.0 %", "-5.0 points"],
        ["mean length", "37.2", "40.0", "+2.8"],
        ["gone", "1.0", "-", "-"],
        ["h accuracy", "-", "50.0 %", "-"],
    ]

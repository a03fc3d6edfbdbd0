"""A recipe and its baselines: one start for all, one row for each."""

import io
import json
import os
import signal

import jax
import numpy as np
import pytest
import rich.console

from helpers.tiny_runs import tiny, write_rows
from jaxrl_reason import compare, train
from jaxrl_reason.config import Config, ConfigError
from jaxrl_reason.rl import hosts
from jaxrl_reason.runs import checkpoints

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.mark.runs
def test_all_runs_begin_with_the_same_weights_and_give_a_row_each(tmp_path, capsys):
    config = tiny(write_rows(tmp_path / "rows.jsonl"), steps=1, supervised__steps=3, eval__every=1)
    rows = compare.compare(config, {"Leave-one-out": {"method": {"name": "rloo"}, "seed": 0}}, tmp_path / "runs")
    assert list(rows) == ["start", "grpo", "Leave-one-out"]
    assert (
        rows["start"]["eval/mean_length"]
        == json.loads((tmp_path / "runs" / "leave_one_out" / "metrics.jsonl").read_text().splitlines()[0])[
            "eval/mean_length"
        ]
    )
    assert json.loads((tmp_path / "runs" / "comparison.json").read_text()) == rows

    ready = train.setup(compare.variant(config, {"checkpoint.keep_start": True}), tmp_path / "runs" / "method")
    like = ready.programs.init().params
    start = checkpoints.load_params(tmp_path / "runs" / "method" / "start", like)
    different = [not np.array_equal(a, b) for a, b in zip(jax.tree.leaves(start), jax.tree.leaves(like))]
    assert any(different)  # the supervised start, not the random weights
    assert json.loads((tmp_path / "runs" / "leave_one_out" / "config.json").read_text())["config"]["method"] == {
        "name": "rloo"
    }
    # The same command again trains nothing and finds the same figures.
    assert (
        compare.compare(config, {"Leave-one-out": {"method": {"name": "rloo"}, "seed": 0}}, tmp_path / "runs") == rows
    )


def test_a_variant_changes_a_copy_and_knows_its_fields(tmp_path):
    config = tiny("rows.jsonl")
    changed = compare.variant(config, {"method": {"name": "rloo"}, "reward.weights": [2.0]})
    assert changed.method == {"name": "rloo"} and changed.reward.weights == [2.0]
    assert config.method == {"name": "grpo"} and config.reward.weights == []
    with pytest.raises(ConfigError, match="config.reward.wieghts, and there is no such field"):
        compare.variant(config, {"reward.wieghts": [1.0]})


def test_a_comparison_without_held_out_metrics_is_refused_before_training(tmp_path):
    config = Config()
    config.eval.every = 0
    with pytest.raises(ConfigError, match="config.eval.every is 0"):
        compare.compare(config, {}, tmp_path / "runs")
    assert not (tmp_path / "runs").exists()


def test_a_recipe_without_baselines_is_one_sentence(tmp_path, capsys):
    recipe = tmp_path / "recipe.py"
    recipe.write_text("from jaxrl_reason.config import Config\ndef get_config():\n    return Config()\n")
    for flags in ([f"--config={recipe}"], ["--config", str(recipe)]):
        assert compare.main([*flags, f"--workdir={tmp_path / 'runs'}"]) == 2
        assert "has no get_baselines()" in capsys.readouterr().err


def test_a_comparison_that_is_asked_to_end_says_that_it_goes_on(tmp_path, capsys, monkeypatch):
    recipe = tmp_path / "recipe.py"
    recipe.write_text(
        "from jaxrl_reason.config import Config\n"
        "def get_config():\n    return Config()\n"
        "def get_baselines():\n    return {}\n"
    )

    def stopped(*_):
        raise hosts.Preempted("step 3")

    monkeypatch.setattr(compare, "prepare", lambda *_: None)
    monkeypatch.setattr(compare, "train_all", stopped)
    assert compare.main([f"--config={recipe}", f"--workdir={tmp_path / 'run'}"]) == 143
    assert capsys.readouterr().err == "Asked to end, and saved after step 3: the same command continues from there.\n"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("ending", [0, 1])
def test_a_signal_in_the_last_step_of_a_run_ends_the_comparison(ending, number, tmp_path, monkeypatch):
    """After the last run there is nothing left to end."""
    config = tiny(write_rows(tmp_path / "rows.jsonl"), eval__every=1)
    comparison = compare.prepare(config, {"other": {"seed": 0}}, tmp_path / "runs")
    trained = []

    def last_step(run):
        (run.work.path / "start").mkdir(exist_ok=True)
        with hosts.preemption():
            if len(trained) == ending:
                os.kill(os.getpid(), number)
        trained.append(run.work.path.name)

    monkeypatch.setattr(train, "train", last_step)
    monkeypatch.setattr(compare, "read_metrics", lambda _: [{"eval/accuracy": 0.5}])
    if ending == 1:
        assert list(compare.train_all(comparison)) == ["start", "grpo", "other"]
    else:
        with pytest.raises(
            hosts.Preempted, match="saved after the last step of the run in .*/method: the same command"
        ):
            compare.train_all(comparison)
    assert trained == ["method", "other"][: ending + 1]


def test_the_table_has_a_dash_for_a_missing_metric():
    rows = {"start": {"eval/accuracy": 0.5, "eval/prompts": 4}, "pointwise": {"eval/r2": 0.25}}
    console = rich.console.Console(file=io.StringIO(), width=80)
    compare.print_rows(console, rows, ("accuracy", "r2"))
    lines = [line for line in console.file.getvalue().splitlines() if line[0] in "│┃"]
    words = [line.replace("│", " ").replace("┃", " ").split() for line in lines]
    assert words == [["start", "pointwise"], ["accuracy", "50.0", "%", "-"], ["r2", "-", "0.250"]]


def test_every_run_is_announced_with_the_number_of_runs_that_follow(tmp_path, monkeypatch, capsys):
    config = tiny(write_rows(tmp_path / "rows.jsonl"), eval__every=1)
    baselines = {"Other, seed": {"seed": 1}, "loo": {"method": {"name": "rloo"}}}
    comparison = compare.prepare(config, baselines, tmp_path / "runs")
    monkeypatch.setattr(compare, "_set_up", lambda *_: None)
    monkeypatch.setattr(train, "train", lambda run: print("trains"))
    monkeypatch.setattr(compare, "read_metrics", lambda _: [{"eval/accuracy": 0.5}])
    compare.train_all(comparison)
    runs = tmp_path / "runs"
    assert capsys.readouterr().out.splitlines() == [
        f"Run 1 of 3, the method, grpo, in {runs}/method; 2 follow.",
        "trains",
        f"Run 2 of 3, the baseline 'Other, seed', in {runs}/other_seed; 1 follows.",
        "trains",
        f"Run 3 of 3, the baseline 'loo', in {runs}/loo; none follows.",
        "trains",
    ]


def test_a_baseline_that_cannot_begin_is_named_when_the_method_has_ended(tmp_path, monkeypatch):
    config = tiny(write_rows(tmp_path / "rows.jsonl"), eval__every=1)
    comparison = compare.prepare(config, {"other": {"data.template": "nope"}}, tmp_path / "runs")
    trained = []

    def end(run):
        (run.work.path / "start").mkdir()
        trained.append(len(comparison.pending))

    monkeypatch.setattr(train, "train", end)
    monkeypatch.setattr(compare, "read_metrics", lambda _: [{"eval/accuracy": 0.5}])
    with pytest.raises(ConfigError, match="The baseline 'other' cannot begin: .*nope"):
        compare.train_all(comparison)
    assert trained == [0]  # the method's run was handed over

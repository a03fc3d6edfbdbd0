"""Tests the regressors for comparison, validation rows, and scores of few samples."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from helpers.tiny_runs import tiny, with_program
from jaxrl_reason import compare, metrics, models, train
from jaxrl_reason.config import ConfigError, Data, Model, Regression, Reward
from jaxrl_reason.data import streams
from jaxrl_reason.runs import checkpoints, results, study
from jaxrl_reason.runs.workdir import load_config
from jaxrl_reason.tasks import regression
from jaxrl_reason.tasks.regression import pointwise
from jaxrl_reason.tasks.regression.evaluation import prediction_metrics
from jaxrl_reason.tasks.regression.tables import Rows, solution_batches

pytestmark = pytest.mark.usefixtures("quick_compilation")


def rows_of(x, z, digits=None):
    digits = np.zeros((len(z), 2), np.int32) if digits is None else digits
    x, z = np.asarray(x, np.float32), np.asarray(z, np.float32)
    return Rows(streams.Padded([[9]] * len(z), 9), x, x, digits, z, z.astype(np.float64))


def test_scores_of_few_samples_are_means_over_disjoint_parts():
    """Targets 0 and 2 have SST 2. A sample that is off by e in both rows has R2 = 1 - 2 e^2 / 2."""
    errors = np.array([0.0, 1.0, 2.0, 1.0] * 4)  # of 16 samples, the mean of 8 is off by 1, and the median too
    targets = np.array([0.0, 2.0])
    found = prediction_metrics(targets[:, None] + errors, targets, greedy=targets + 0.5)
    assert found["r2@1"] == pytest.approx(1 - np.mean(errors**2)) and found["rmse@1"] == pytest.approx(errors.mean())
    assert found["r2@8"] == found["median_r2@8"] == pytest.approx(0) == found["r2"]
    assert found["greedy_r2"] == pytest.approx(0.75) and found["greedy_rmse"] == 0.5
    assert "median_r2@1" not in found
    # Parts are scored before they are averaged. Errors 4 and 0 have the mean R2 (1 - 16 + 1) / 2, not 1 - 2^2.
    halves = np.repeat([4.0, 0.0], 8)
    assert prediction_metrics(targets[:, None] + halves, targets)["r2@8"] == pytest.approx(-7)
    few = prediction_metrics(np.zeros((2, 8)), targets)
    assert "r2@1" in few and "r2@8" not in few and "greedy_r2" not in few


def test_validation_batches_have_each_row_once():
    digits = np.arange(10, dtype=np.int32).reshape(5, 2)
    rows = rows_of(np.arange(5)[:, None], np.arange(5), digits)
    batches = solution_batches(rows, (4, np.arange(4)))
    assert [batch.completion_mask.all(axis=1).tolist() for batch in batches] == [[True] * 4, [True] + [False] * 3]
    assert np.concatenate([b.completion_tokens[b.completion_mask[:, 0]] for b in batches]).tolist() == digits.tolist()
    second = solution_batches(rows, (4, np.array([2, 3])))  # the rows of the second of two processes
    assert [batch.completion_mask[:, 0].tolist() for batch in second] == [[True, True], [False, False]]
    assert second[0].features[:, 0].tolist() == [2, 3]


def test_least_squares_by_hand_with_columns_that_are_collinear():
    x = np.array([[0, 0], [1, 2], [2, 4], [3, 6]])
    train_rows, held_out = rows_of(x, [1, 3, 5, 7]), rows_of([[5, 10], [-1, -2]], [11, -1.5])  # z = 1 + 2 a
    found = pointwise.least_squares(train_rows, held_out)
    assert found["least_squares/rmse"] == pytest.approx(np.sqrt(0.125), rel=1e-4)  # the errors are 0 and 0.5
    assert found == {
        f"least_squares/{k}": pytest.approx(v, rel=1e-4)
        for k, v in metrics.regression_scores([11, -1], [11, -1.5]).items()
    }


def test_updates_of_the_regressors_leave_out_a_share_of_their_hidden_units():
    """With identity weights and inputs of 3, each unit gives gelu(3), and with dropout of one half 0 or twice as much."""
    one = (np.eye(200, dtype=np.float32), np.zeros(200, np.float32))
    params = [one, (np.ones((200, 1), np.float32), np.zeros(1, np.float32))]
    x = np.full((2, 200), 3.0, np.float32)
    whole = float(pointwise._mlp(params, x)[0])
    assert whole == pytest.approx(200 * 2.9964, rel=1e-3)
    found = np.asarray(pointwise._mlp(params, x, key=jax.random.key(0), dropout=0.5)) / whole
    kept = found * 100  # of 200 units, each twice as large
    np.testing.assert_allclose(kept, kept.round(), atol=1e-3)
    assert kept[0] != kept[1] and (np.abs(kept - 100) < 30).all()


@pytest.mark.parametrize("name", ["pointwise", "squared_error_head"])
def test_regressors_with_dropout_learn_another_function_and_the_same_one_again(name):
    x = np.random.default_rng(0).normal(size=(40, 2))
    rows, held_out = rows_of(x[:30], x[:30, 0]), rows_of(x[30:], x[30:, 0])
    model = models.ModelConfig(
        vocab_size=5, width=8, layers=1, heads=2, kv_heads=2, mlp_width=8, features=2, prefix_length=1, encoder_width=8
    )
    settings = dict(steps=3, batch_size=8, learning_rate=1e-2, seed=0, every=2)
    settings |= dict(width=8) if name == "pointwise" else dict(model=model, begin=1)
    fit = pointwise.pointwise_regressor if name == "pointwise" else pointwise.squared_error_head
    plain, *dropped = [fit(rows, held_out, dropout=rate, **settings)[f"{name}/rmse"] for rate in (0.0, 0.5, 0.5)]
    assert dropped[0] == dropped[1] != plain


def test_validation_rows_choose_the_step():
    """The weight moves from 0 towards 1. On validation rows, 0.5 is best."""
    ones = np.ones((8, 1))
    predict = lambda w, x, **_: w * x[:, 0]
    settings = dict(steps=40, batch_size=8, learning_rate=0.1, seed=0, every=1)
    last = pointwise._fit(predict, 0.0, rows_of(ones, np.ones(8)), None, **settings)
    best = pointwise._fit(predict, 0.0, rows_of(ones, np.ones(8)), rows_of(ones[:3], [0.5] * 3), **settings)
    assert float(last) > 0.8 and float(best) == pytest.approx(0.5, abs=0.06)


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """Writes a table with y = 2 a - b and noise."""
    rng = np.random.default_rng(0)
    a, b, noise = rng.normal(size=(3, 90)).round(3)
    lines = ["a,b,y"] + [f"{x},{y},{2 * x - y + 0.3 * e:.4f}" for x, y, e in zip(a, b, noise)]
    path = tmp_path_factory.mktemp("table") / "line.csv"
    path.write_text("\n".join(lines) + "\n")
    return path


def a_config(table, **changes):
    chosen = dict(
        tokenizer="normalized",
        target="y",
        prefix_length=2,
        encoder_width=16,
        encoder_layers=2,
        validation_split="[60:75]",
    )
    fields = {
        "data": Data(train=str(table), train_split="[:60]", eval_split="[75:]"),
        "regression": Regression(**chosen | {"validation_every": 2}),
        "reward": Reward(functions=["squared_error"]),
        "method": {"name": "genre2"},
        "max_prompt_length": 1,
        "max_completion_length": 8,
        "model": Model(width=16, layers=1, heads=2, kv_heads=2, mlp_width=16),
        "supervised__steps": 6,
        "supervised__batch_size": 8,
        "supervised__learning_rate": 3e-3,
        "steps": 1,
        "eval__every": 1,
        "eval__prompts": 15,
        "eval__samples": 10,
    }
    return tiny(table, **fields | changes)


def lines_of(directory):
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def test_a_validation_split_that_is_no_slice_of_the_table_raises(table, tmp_path):
    with pytest.raises(ValueError, match="validation"):
        train.setup(a_config(table, regression__validation_split="validation"), tmp_path / "run")


def test_no_step_at_all_raises(table):
    with pytest.raises(ConfigError, match="^config.steps is 0; config.supervised.steps is 0, too, so there is nothing"):
        train.setup(a_config(table, steps=0, supervised__steps=0), "unused")


@pytest.mark.runs
def test_the_supervised_phase_ends_with_the_weights_of_the_lowest_validation_loss(table, tmp_path):
    """The losses of steps 2, 4 and 6 are made up, and step 4 has the lowest. A run that dies in step 6 continues."""
    seen = []

    def run_with(losses):
        run = train.setup(a_config(table, checkpoint__keep_start=True, checkpoint__every=5), tmp_path / "run")
        assert len(run.task.validation) == 2  # 15 rows in batches of 8
        real, losses = run.programs.jitted["cross_entropy"], [loss for loss in losses for _ in range(2)]

        def measured(params, *batch):
            seen.append(np.asarray(params["final_norm"]))
            _, tokens = real(params, *batch)
            return losses.pop(0) * tokens, tokens

        programs = with_program(run.programs, "cross_entropy", lambda _: measured)
        return dataclasses.replace(run, programs=programs)

    with pytest.raises(IndexError):
        train.train(run_with([3.0, 1.0]))  # no loss is left in step 6
    done = run_with([1.0, 2.0])  # the losses of the best weights and of step 6
    train.train(done)
    lines = lines_of(tmp_path / "run" / "supervised")
    assert [line["validation/loss"] for line in lines if "validation/loss" in line] == [3, 1, 2]
    start = checkpoints.load_params(tmp_path / "run" / "start", done.programs.abstract_state.trained)
    np.testing.assert_array_equal(start["final_norm"], seen[2])  # the weights of step 4
    np.testing.assert_array_equal(seen[4 + 2], seen[2])
    assert not np.array_equal(seen[2], seen[-1])


@pytest.mark.runs
def test_the_rows_of_a_seed_share_its_baselines_and_a_row_can_continue_the_start(table, tmp_path):
    further = {"steps": 0, "supervised.steps": 3, "regression.validation_split": "", "regression.validation_every": 10}
    config, file = a_config(table), tmp_path / "a.jsonl"
    rows = compare.compare(config, {"further": further}, tmp_path / "work", seeds=[1], results_file=file)
    assert list(rows) == ["start", "least squares", "pointwise", "squared error head", "genre2", "further"]
    assert rows["least squares"]["eval/r2"] > 0.9  # the noise has a tenth of the spread
    directory = tmp_path / "work" / "seed-1" / "further"
    assert len(lines_of(directory)) == 1 and len(lines_of(directory / "supervised")) == 3
    assert "pointwise/r2" not in lines_of(directory)[0]  # measured once per seed, with the start
    entries = results.read(file)
    assert [(e["table"], e["row"], e["seed"]) for e in entries] == [(str(table), r, 1) for r in ("genre2", "further")]
    # A comparison on another table goes on with the same file, and has none of these results.
    plan = lambda c: study.plan(c, {"further": further}, tmp_path / "elsewhere", seeds=[1], done=entries)
    assert not plan(config).unfinished()
    assert len(plan(study.variant(config, {"data.train": "other.csv"})).unfinished()) == 3
    # A run without RL that was stopped before its evaluation is not finished.
    for name in ("learning_curve.png", "metrics.jsonl"):
        (directory / name).unlink()
    assert set(train.train(train.setup(load_config(directory, {}), directory))) == {"before"}
    assert len(lines_of(directory)) == 1
    assert train.train(train.setup(load_config(directory, {}), directory)) == {}


def test_the_regressors_of_a_run_learn(table):
    config = a_config(table)
    tables = regression.open_tables(config)
    train_rows, held_out, validation = tables.train_rows(), tables.held_out_rows(), tables.validation_rows()
    assert [len(rows.z) for rows in (train_rows, held_out, validation)] == [60, 15, 15]
    found = pointwise.pointwise_regressor(
        train_rows, held_out, validation, width=16, steps=200, batch_size=32, learning_rate=1e-2, seed=0, every=10
    )
    assert found["pointwise/r2"] > 0.9


@pytest.mark.runs
def test_the_network_with_a_squared_error_head_learns(table, tmp_path):
    run = train.setup(a_config(table), tmp_path / "run")
    tables = regression.open_tables(run.config)
    found = pointwise.squared_error_head(
        *(tables.train_rows(), tables.held_out_rows(), tables.validation_rows()),
        **dict(
            model=run.model, begin=tables.digits.pad_id, steps=200, batch_size=32, learning_rate=1e-2, seed=0, every=20
        ),
    )
    assert found["squared_error_head/r2"] > 0.8

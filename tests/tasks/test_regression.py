"""Tests the task of GenRe2: the vocabulary, the rewards, and a policy that learns to predict."""

import json
import types
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from helpers.tiny_runs import tiny
from jaxrl_reason import config as config_lib
from jaxrl_reason import evaluate, generate, methods, train
from jaxrl_reason.advantages import AdvantageInputs
from jaxrl_reason.config import ConfigError, Data, Model, Regression, Reward
from jaxrl_reason.data import tables
from jaxrl_reason.data.numbers import IEEETokenizer, NormalizedTokenizer, P10Tokenizer
from jaxrl_reason.data.tables import TargetScaler
from jaxrl_reason.models import sharding
from jaxrl_reason.tasks import regression
from jaxrl_reason.tasks.regression.evaluation import prediction_metrics

pytestmark = pytest.mark.usefixtures("quick_compilation")

SCALE = TargetScaler(mean=0.0, std=1.0, low=-1.5, high=2.5)  # METHODS has z from -1.5 to 2.5
UNIT_NOTE = "rmse and spread are in standard deviations of the training targets."
EVERYWHERE = sharding.batch_sharding(sharding.make_mesh(1, 1, 1, devices=jax.devices()[:1]))


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """Writes a table with y = 2 a - b, and an unrelated column c."""
    rng = np.random.default_rng(0)
    a, b, c = rng.normal(size=(3, 400)).round(3)
    lines = ["a,b,c,y"] + [f"{x},{y},{z},{2 * x - y:.4f}" for x, y, z in zip(a, b, c)]
    path = tmp_path_factory.mktemp("table") / "line.csv"
    path.write_text("\n".join(lines) + "\n")
    return path


def a_config(table, **changes):
    return tiny(
        table,
        **{
            "data": Data(train=str(table), train_split="[:80%]", eval_split="[80%:]", vocab_size=300),
            "regression": Regression(tokenizer="normalized", target="y", prefix_length=2, encoder_width=32),
            "reward": Reward(functions=["squared_error"]),
            "method": {"name": "genre2"},
            "max_prompt_length": 1,
            "max_completion_length": 8,
            **changes,
        },
    )


def lines_of(directory):
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def test_the_vocabulary_is_digits_then_the_begin_token():
    digits = regression.Digits(NormalizedTokenizer(2, 8), SCALE)
    assert (digits.pad_id, digits.vocab_size, digits.eos_ids) == (2, 3, ())
    np.testing.assert_array_equal(digits.legal, [[True, True, False]] * 8)
    assert digits.prompts(None, 2) == [[2], [2]]
    assert digits.decode_batch([[2], [1, 0, 1, 1, 0, 0, 1, 1]]) == ["(features)", "1 0 1 1 0 0 1 1"]
    # 0.7 of the unit interval is z = -1.5 + 0.7 * 4 = 1.3. Its 8 binary digits are 179/256.
    ids = digits.encode(np.array([1.3]))
    assert ids.tolist() == [[1, 0, 1, 1, 0, 0, 1, 1]]
    np.testing.assert_allclose(digits.decode(ids), [-1.5 + 4 * 179 / 256], rtol=1e-6)


def test_p10_writes_z_scores():
    digits = regression.Digits(P10Tokenizer(), SCALE)
    np.testing.assert_allclose(digits.decode(digits.encode(np.array([1.23456, -2.0]))), [1.235, -2.0], rtol=1e-6)


def scored(function, unit_values, target):
    """Returns digits, tokens int32[1, G, L] of numbers in the unit interval, their scorer, and a batch with the target."""
    digits = regression.Digits(NormalizedTokenizer(10, 3), SCALE)
    tokens = digits.number.encode(np.array(unit_values))[None]
    scorer = regression.NumberScorer([function], [], digits, EVERYWHERE)
    batch = types.SimpleNamespace(columns={"z": np.array([target], np.float32)})
    return digits, tokens, scorer, batch


def test_rewards_and_remax_advantages_by_hand():
    _, tokens, scorer, batch = scored("squared_error", [0.5, 0.75, 0.25, 0.4, 0.6], -1.5 + 4 * 0.5)
    rewards, _ = scorer(types.SimpleNamespace(tokens=jnp.asarray(tokens)), batch)
    np.testing.assert_allclose(rewards["squared_error"], [[0, -1, -1, -0.16, -0.16]], atol=1e-6)
    chain = methods.create("genre2").advantage
    inputs = AdvantageInputs(
        rewards=rewards["squared_error"][:, :4],
        completion_mask=jnp.ones((1, 4, 3)),
        greedy_rewards=rewards["squared_error"][:, 4],
    )
    np.testing.assert_allclose(chain.update(None, chain.init(), inputs)[0], [[0.16, -0.84, -0.84, 0]], atol=1e-6)


def test_the_heavy_tailed_reward_stops_at_50_and_is_100_for_no_number():
    digits = regression.Digits(P10Tokenizer(), SCALE)
    tokens = digits.encode(np.array([1.0, 9.0, 3.0]))[None]
    tokens[0, 2, 0] = digits.pad_id  # no sign
    scorer = regression.NumberScorer(["heavy_tailed"], [2.0], digits, EVERYWHERE)
    batch = types.SimpleNamespace(columns={"z": np.zeros(1, np.float32)})
    rewards, _ = scorer(types.SimpleNamespace(tokens=jnp.asarray(tokens)), batch)
    np.testing.assert_allclose(rewards["heavy_tailed"], [[-1, -50, -100]], rtol=1e-5)
    assert scorer.weights == {"heavy_tailed": 2.0}


@pytest.mark.runs
def test_a_policy_learns_to_predict_and_reports_the_pointwise_regressor(table, tmp_path, capsys):
    config = a_config(
        table,
        steps=10,
        prompts_per_step=16,
        group_size=8,
        model=Model(width=32, layers=2, heads=2, kv_heads=2, mlp_width=64),
        supervised__steps=200,
        supervised__batch_size=64,
        supervised__learning_rate=5e-3,
        optimizer__learning_rate=1e-4,
        eval__every=10,
        eval__prompts=80,
        eval__samples=32,
    )
    train.train(train.setup(config, tmp_path / "run"))
    assert UNIT_NOTE in capsys.readouterr().out
    before, after = lines_of(tmp_path / "run")[0], lines_of(tmp_path / "run")[-1]
    assert before["eval/r2"] > 0.6 and after["eval/r2"] > 0.6  # the mean has 0
    assert before["pointwise/r2"] > 0.9
    assert after["completions/mean_length"] == 8 and after["completions/clipped_ratio"] == 0
    assert after["sampling/logp_difference_max"] < 1e-4
    assert (tmp_path / "run" / "learning_curve.png").exists()

    # The evaluation command repeats the metrics, and writes the predictions.
    assert evaluate.main([f"--workdir={tmp_path / 'run'}"]) == 0
    record = json.loads((tmp_path / "run" / "evaluation" / "evaluation.json").read_text())
    names = {name.removeprefix("eval/") for name in after if name.startswith("eval/")}
    assert names >= {"rmse", "r2", "spearman", "spread", "median_rmse", "sample_rmse", "prompts"}
    assert {n: record["metrics"][n] for n in names} == {n: pytest.approx(after[f"eval/{n}"], rel=1e-5) for n in names}
    assert (record["phase"], record["samples"], record["verdict"]) == ("RL step 10", 32, "squared_error")
    lines = [json.loads(x) for x in (tmp_path / "run" / "evaluation" / "predictions.jsonl").read_text().splitlines()]
    assert len(lines) == 80 and all(len(line["samples_z"]) == 32 for line in lines)
    targets = np.loadtxt(table, delimiter=",", skiprows=1)[:, 3]
    np.testing.assert_allclose([line["target"] for line in lines], targets[320:])
    std = targets[:320].std()
    np.testing.assert_allclose([line["target_z"] for line in lines], (targets[320:] - targets[:320].mean()) / std, 1e-5)
    errors = [line["mean"] - line["target"] for line in lines]
    assert np.sqrt(np.mean(np.square(errors))) / std == pytest.approx(record["metrics"]["rmse"], rel=1e-4)
    assert lines[0]["median"] == pytest.approx(targets[:320].mean() + std * np.median(lines[0]["samples_z"]), rel=1e-4)
    assert (tmp_path / "run" / "evaluation" / "evaluation.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.runs
def test_evaluation_of_numbers_raises_for_another_training_table(table, tmp_path, capsys):
    own = tmp_path / "line.csv"
    own.write_text(table.read_text())
    train.train(train.setup(a_config(own, steps=1), tmp_path / "run"))
    flags = [f"--workdir={tmp_path / 'run'}", "--samples=2", "--prompts=3"]
    assert evaluate.main([*flags, f"--data={table}", "--split=[90%:]"]) == 0
    record = json.loads((tmp_path / "run" / "evaluation" / "evaluation.json").read_text())
    assert record["data"]["name"] == str(table) and record["prompts"] == 3
    assert UNIT_NOTE in capsys.readouterr().out
    (tmp_path / "one.csv").write_text("a,b,c,y\n1,2,3,4\n")  # R2 of one row is unknown
    assert evaluate.main([*flags, f"--data={tmp_path / 'one.csv'}", f"--out={tmp_path / 'one'}"]) == 0
    one = json.loads((tmp_path / "one" / "evaluation.json").read_text())
    assert one["metrics"]["r2"] is None and one["metrics"]["rmse"] > 0 and one["prompts"] == 1
    header, first, *lines = table.read_text().splitlines()
    other_target, other_feature = f"{first.rpartition(',')[0]},99", f"77{first[first.index(',') :]}"
    for changed in (other_target, other_feature):
        own.write_text("\n".join([header, changed, *lines]) + "\n")
        capsys.readouterr()
        assert evaluate.main(flags) == 2
        assert "is not the training table of the run" in capsys.readouterr().err
        assert generate.main([flags[0], '--prompt={"a": 1, "b": 2, "c": 3}']) == 2
        assert "is not the training table of the run" in capsys.readouterr().err
    assert evaluate.main([*flags, f"--config.data.train={table}"]) == 0


@pytest.mark.runs
@pytest.mark.parametrize(
    "number, options, length", [("p10", {}, 6), pytest.param("ieee", {"mantissa_digits": 3}, 7, marks=pytest.mark.slow)]
)
def test_the_other_alphabets_as_text_with_the_group_estimator(table, tmp_path, number, options, length):
    config = a_config(
        table,
        regression=Regression(tokenizer=number, tokenizer_options=options, target="y", inputs="text"),
        max_prompt_length=64,
        max_completion_length=length,
        method={"name": "genre2", "base": "grpo"},
        reward=Reward(functions=["heavy_tailed"]),
        supervised__steps=2,
        log__samples_every=1,
    )
    train.train(train.setup(config, tmp_path / "run"))
    last = lines_of(tmp_path / "run")[-1]
    assert last["completions/mean_length"] == length and -50 <= last["reward"] < 0
    # The pointwise regressor reads the columns, not their text.
    opened = regression.open_tables(config)
    found = regression.pointwise_regressor(
        opened.train_rows(),
        opened.held_out_rows(),
        **dict(width=32, steps=300, batch_size=64, learning_rate=5e-3, seed=0, every=10),
    )
    assert found["pointwise/r2"] > 0.9
    sample = json.loads((tmp_path / "run" / "samples.jsonl").read_text().splitlines()[0])
    assert sample["prompt"].startswith("a ") and ", b " in sample["prompt"]
    assert "".join(sample["tokens"]) == sample["completion"] and len(sample["logprobs"]) == length
    assert "correct" not in sample  # a number is not correct or incorrect
    assert evaluate.main([f"--workdir={tmp_path / 'run'}", "--samples=2"]) == 0


@pytest.mark.runs
def test_the_dense_expert_term_is_in_the_loss(table, tmp_path):
    config = a_config(table, method={"name": "genre2", "expert_coefficient": 0.05})
    train.train(train.setup(config, tmp_path / "run"))
    # A fresh policy is almost uniform on two digits, so the loss is ln 2 per digit.
    assert lines_of(tmp_path / "run")[0]["expert/loss"] == pytest.approx(np.log(2), abs=0.1)


@pytest.mark.parametrize(
    "changes, words",
    [
        (dict(max_completion_length=9), ["max_completion_length is 9", "8 tokens"]),
        (
            dict(max_prompt_length=8, regression=Regression(tokenizer="normalized", target="y", inputs="text")),
            ["max_prompt_length is 8"],
        ),
        (dict(reward=Reward(functions=["accuracy"])), ["accuracy", "squared_error"]),
        (dict(reward=Reward(functions=["squared_error"], weights=[-1.0])), ["weights", "above 0"]),
        (
            dict(regression=Regression(tokenizer="normalized", tokenizer_options={"digit": 3}, target="y")),
            ["digit", "digits"],
        ),
        (dict(regression=Regression(tokenizer="normalized", target="z")), ["'z'", "'y'"]),
        (dict(method={"name": "dapo"}), ["'dapo'", "both correct and incorrect", "dynamic_sampling"]),
        (
            dict(
                regression=Regression(tokenizer="p10", target="y"),
                max_completion_length=6,
                method={"name": "genre2", "expert_coefficient": 0.1},
            ),
            ["expert_coefficient", "normalized"],
        ),
    ],
    ids=["length", "prompt", "reward", "weight", "option", "target", "dapo", "expert"],
)
def test_a_run_that_cannot_begin_raises_a_sentence(table, tmp_path, changes, words):
    with pytest.raises((ConfigError, ValueError)) as caught:
        train.setup(a_config(table, **changes), tmp_path / "run")
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert not (tmp_path / "run").exists()


def test_numbers_far_off_have_a_finite_reward_and_finite_metrics():
    digits = regression.Digits(IEEETokenizer(), SCALE)
    tokens = jnp.asarray(digits.number.encode(np.array([1e20, -1e20, 1.0])))[None]
    scorer = regression.NumberScorer(["squared_error"], [], digits, EVERYWHERE)
    batch = types.SimpleNamespace(columns={"z": np.zeros(1, np.float32)})
    rewards = np.asarray(scorer(types.SimpleNamespace(tokens=tokens), batch)[0]["squared_error"])
    np.testing.assert_allclose(rewards, [[-1e30, -1e30, -1]])
    for method in ("grpo", "rloo", "reinforce_pp"):  # sums and squares of such rewards are finite too
        mask = jnp.ones((1, 3, 1), bool)
        inputs = AdvantageInputs(jnp.asarray(rewards), mask)
        chain = methods.create(method).advantage
        advantages, _ = chain.update(None, chain.init(), inputs)
        assert np.isfinite(advantages).all() and advantages[0, 0] < 0 < advantages[0, 2], method
    samples = np.full((3, 2), 3.4e38, np.float32)
    found = prediction_metrics(samples, np.arange(3, dtype=np.float32))
    assert all(np.isfinite(x) for name, x in found.items() if "spearman" not in name)


@pytest.mark.runs
def test_a_start_with_another_training_table_raises(table, tmp_path):
    train.train(train.setup(a_config(table, steps=1, checkpoint__keep_start=True), tmp_path / "start"))
    begin = dict(supervised__start_from=str(tmp_path / "start"))
    train.setup(a_config(table, **begin), tmp_path / "same")
    header, first, *lines = table.read_text().splitlines()
    other = tmp_path / "other.csv"  # with the targets of the start's table, and one other feature
    other.write_text("\n".join([header, f"77{first[first.index(',') :]}", *lines]) + "\n")
    for changes in ({"data__train_split": "[:50%]"}, {"data__train": str(other)}):
        with pytest.raises(ConfigError, match="another training table or spell numbers in another way"):
            train.setup(a_config(table, **begin, **changes), tmp_path / "other")


@pytest.mark.runs
def test_rows_with_human_values_under_genre2_and_rlev(table, tmp_path):
    """Advantages of RLOO are multiplied by 1 + min(alpha v, 1), which is 1 for the value 0 and 2 for the value 1."""
    header, *lines = table.read_text().splitlines()
    worth = tmp_path / "worth.csv"
    worth.write_text("\n".join([f"{header},v", *(f"{line},{i % 2}" for i, line in enumerate(lines))]) + "\n")
    config = a_config(
        worth,
        method={"name": "genre2+rlev", "base": "rloo", "rlev": {"alpha": 1.0}},
        regression=Regression(tokenizer="normalized", target="y", value="v", prefix_length=2, encoder_width=32),
        steps=1,
    )
    ready = train.setup(config, tmp_path / "run")
    assert ready.model.features == 3 and set(ready.task.prompts.batch(0).columns["values"].tolist()) <= {0.0, 1.0}
    assert ready.work.fingerprint.count("/") == 2  # the two tables, and the values of the training rows
    train.train(ready)
    assert 0 <= lines_of(tmp_path / "run")[-1]["rlev/value"] <= 1
    with pytest.raises(ConfigError, match="config.regression.value"):
        config_lib.validate(a_config(worth, method={"name": "genre2+rlev", "base": "rloo"}))
    rows, values = regression.take_values(tables.load_table(str(worth), "all", target="y"), "v")
    assert rows.names == ("a", "b", "c") and values[:3].tolist() == [0, 1, 0] and rows.features.shape == (400, 3)
    assert rows.left_out == ("v",)
    with pytest.raises(ConfigError, match=r"Column 'a' is .* in line \d+ of .*worth.csv; give a value from 0 to 1"):
        regression.take_values(tables.load_table(str(worth), "all", target="y"), "a")
    with pytest.raises(ConfigError, match="no such column of numbers"):
        regression.take_values(tables.load_table(str(worth), "all", target="y"), "w")


def tables_of(directory, train_rows, held_out_rows, header="a,b,y", **options):
    """Opens two files, with features 0 and 1 in every run of this helper's training table."""
    for name, rows in (("train", train_rows), ("held_out", held_out_rows)):
        (directory / f"{name}.csv").write_text("\n".join([header, *rows]) + "\n")
    files = dict(
        train=str(directory / "train.csv"), train_split="all", eval=str(directory / "held_out.csv"), eval_split="all"
    )
    number = Regression(tokenizer="normalized", target="y", prefix_length=2, encoder_width=32, **options)
    return regression.open_tables(a_config(directory / "train.csv", data=Data(**files), regression=number))


def test_a_held_out_table_may_have_one_row_or_one_target(tmp_path):
    opened = tables_of(tmp_path, ["0,1,2", "1,0,4"], ["3,3,7"])
    assert opened.held_out_rows().z.tolist() == [4.0]  # (7 - 3) / 1
    with pytest.raises(ValueError, match="The target 'y' of .*train.csv is 2.0 in all 2 rows"):
        tables_of(tmp_path, ["0,1,2", "1,0,2"], ["3,3,7"])


def test_columns_may_be_empty_in_a_held_out_table_if_means_fill_them(tmp_path, recwarn):
    rows, held_out = ["0,x,0,2", "1,z,4,4"], ["1,,,7", "0,NA,,8"]
    opened = tables_of(tmp_path, rows, held_out, "a,b,c,y", missing="mean", categorical="onehot")
    # By columns: a, c (a missing value is the mean), b=x, b=z (a missing text is neither).
    np.testing.assert_allclose(opened.held_out_rows().numeric, [[1, 0, 0, 0], [-1, 0, 0, 0]])
    assert not [str(warning.message) for warning in recwarn if "left out" in str(warning.message)]
    with pytest.raises(ValueError, match="but the training table had"):
        tables_of(tmp_path, rows, held_out, "a,b,c,y", categorical="onehot").held_out_rows()


def test_a_held_out_table_needs_no_human_values(tmp_path):
    rows = ["0,1,2", "1,0,4"]
    for cell in ("9", "", "high"):  # they are no values, and are not read
        assert tables_of(tmp_path, rows, [f"0,{cell},2", "1,1,2"], value="b").held_out_rows().values is None
    (tmp_path / "bare.csv").write_text("a,y\n5,5\n")
    config = a_config(tmp_path / "train.csv", regression=Regression(tokenizer="normalized", target="y", value="b"))
    config.data = Data(
        train=str(tmp_path / "train.csv"), train_split="all", eval=str(tmp_path / "bare.csv"), eval_split="all"
    )
    opened = regression.open_tables(config)
    assert opened.held_out_rows().numeric.tolist() == [[9.0]] and opened.train_values.tolist() == [1, 0]


def test_training_rows_among_the_held_out_rows_give_a_warning(tmp_path):
    rows = ["0,1,2", "1,0,4", "1,0,4"]
    opened = tables_of(tmp_path, rows, ["0,1,3", "1,0,4", "5,5,5"])
    with pytest.warns(UserWarning) as caught:
        regression.warn_of_repeats(opened.train, opened.held_out)
    [text] = [str(warning.message) for warning in caught]
    train, held_out = tmp_path / "train.csv", tmp_path / "held_out.csv"
    assert (
        f"{held_out}: training rows of {train} occur in 1 of 3 held-out rows, so held-out metrics are too good" in text
    )
    assert f"line 3 of {held_out} is line 3 of {train}" in text


@pytest.mark.parametrize(
    "train_row, held_out_row, repeats",
    [
        ("0,x,,1", ",1,-0,x", True),  # other order, a missing value, -0.0
        ("0,x,,1", "2,1,0,x", False),
        ("0,x,,1", ",1,0,z", False),
        ("20240115123456789,x,3,1", "3,1,20240115123456788,x", False),  # one float64, two numbers
    ],
)
def test_rows_repeat_each_other_if_all_their_cells_do(train_row, held_out_row, repeats, tmp_path):
    (tmp_path / "train.csv").write_text(f"a,b,c,y\n{train_row}\n7,w,7,7\n")
    (tmp_path / "held_out.csv").write_text(f"c,y,a,b\n{held_out_row}\n7,7,7,w\n")
    load = lambda name: tables.load_table(
        str(tmp_path / f"{name}.csv"), "[:1]", target="y", missing="mean", categorical="onehot"
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        regression.warn_of_repeats(load("train"), load("held_out"))
    assert len(caught) == repeats


@pytest.mark.parametrize("name", ["hero", "laser", "rlev", "progrpo"])
def test_methods_that_need_text_or_verdicts_raise(table, name):
    with pytest.raises(ConfigError, match="regression run"):
        config_lib.validate(a_config(table, method={"name": name}))

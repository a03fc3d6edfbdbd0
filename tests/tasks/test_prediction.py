"""Tests predictions for new rows: `generate` on a run that predicts numbers, and the rows that it refuses."""

import dataclasses
import json

import numpy as np
import pytest

from jaxrl_reason import evaluate, generate, train
from jaxrl_reason.config import Checkpoint, Config, ConfigError, Data, Eval, Log, Model, Regression, Reward, Supervised
from jaxrl_reason.data.tables import Table
from jaxrl_reason.tasks.regression.prediction import table_of

LIKE = Table(
    "train.csv", ("a", "b"), np.zeros((2, 2)), ("city",), np.array([["Rome"], ["Oslo"]]), "y", np.array([1.0, 3.0])
)


def test_rows_become_a_table_like_the_training_table():
    rows = [{"city": "Oslo", "b": "2.5", "a": 1}, {"a": 2**53 + 1, "b": -3.0, "city": "Rome", "y": "unread"}]
    table = table_of(rows, LIKE, "refuse")
    assert (table.names, table.label_names, table.target) == (("a", "b"), ("city",), "y")
    np.testing.assert_array_equal(table.features, [[1, 2.5], [2**53, -3]])
    assert table.labels.tolist() == [["Oslo"], ["Rome"]] and table.exact == {(1, "a"): str(2**53 + 1)}
    texts = [{"a": " 20240115123456789013", "b": "1e0 ", "city": " Rome "}]  # as the cells of a training table
    read = table_of(texts, LIKE, "refuse")
    assert read.labels.tolist() == [["Rome"]] and read.exact == {(0, "a"): "20240115123456789013"}
    for gaps in (("NA", " nan ", "?"), ("null", "n/a", "")):
        table = table_of([dict(zip(("a", "b", "city"), gaps))], LIKE, "mean")
        assert np.isnan(table.features).all() and table.labels.tolist() == [[""]] and not table.exact
    with_others = dataclasses.replace(LIKE, left_out=("note",))
    assert table_of([rows[0] | {"note": "x"}], with_others, "refuse").names == ("a", "b")
    filled = table_of([{"a": None, "b": "", "city": ""}], LIKE, "mean")
    assert np.isnan(filled.features).all() and filled.labels.tolist() == [[""]]


@pytest.mark.parametrize(
    "row, said",
    [
        ({"a": 1, "city": "Rome"}, "^Row 0 of the prompts has no column 'b'; the run reads the columns a, b, city."),
        ({"a": 1, "b": 2, "city": "Rome", "c": 3}, "^Row 0 of the prompts has a column 'c', which the training table"),
        (
            {"a": None, "b": 2, "city": "Rome"},
            "has no value in the column 'a', and config.regression.missing is 'refuse'",
        ),
        (
            {"a": "x", "b": 2, "city": "Rome"},
            "^Row 0 of the prompts has 'x' in the column 'a', which is no finite number",
        ),
        ({"a": "1_000", "b": 2, "city": "Rome"}, "has '1_000' in the column 'a', which is no finite number"),
        ({"a": "inf", "b": 2, "city": "Rome"}, "has 'inf' in the column 'a', which is no finite number"),
        (
            {"a": 1, "b": "NA", "city": "Rome"},
            "has no value in the column 'b', and config.regression.missing is 'refuse'",
        ),
        ({"a": True, "b": 2, "city": "Rome"}, "has True in the column 'a'"),
        ({"a": float("inf"), "b": 2, "city": "Rome"}, "has inf in the column 'a'"),
        ({"a": [1], "b": 2, "city": "Rome"}, r"has \[1\] in the column 'a'"),
        ({"a": 1, "b": 10**400, "city": "Rome"}, "has 1000.* in the column 'b'"),
        ({"a": 1, "b": 2, "city": 3}, "has 3 in the column 'city', which holds texts"),
    ],
)
def test_rows_that_do_not_fit_are_refused(row, said):
    with pytest.raises(ConfigError, match=said):
        table_of([row], LIKE, "refuse")


@pytest.fixture(scope="module")
def run(tmp_path_factory, quick_compilation):
    """Trains a run on y = 2 a - b, and returns its directory and its table."""
    folder = tmp_path_factory.mktemp("numbers")
    a, b = np.random.default_rng(0).normal(size=(2, 50)).round(3)
    lines = ["a,b,y", *(f"{x},{y},{2 * x - y:.4f}" for x, y in zip(a, b))]
    (folder / "line.csv").write_text("\n".join(lines) + "\n")
    (folder / "held_out.csv").write_text("\n".join([lines[0], *lines[41:]]) + "\n")
    config = Config(
        steps=1,
        prompts_per_step=4,
        group_size=4,
        max_prompt_length=1,
        max_completion_length=8,
        model=Model(width=16, layers=1, heads=2, kv_heads=2, mlp_width=16),
        data=Data(
            train=str(folder / "line.csv"), train_split="[:80%]", eval=str(folder / "held_out.csv"), eval_split="all"
        ),
        regression=Regression(
            tokenizer="normalized",
            target="y",
            prefix_length=2,
            encoder_width=16,
            validation_split="[80%:]",
            validation_every=1,
        ),
        reward=Reward(functions=["squared_error"]),
        method={"name": "genre2"},
        supervised=Supervised(steps=1),
        checkpoint=Checkpoint(every=100),
        eval=Eval(every=0, prompts=10, samples=6),
        log=Log(progress=False, tensorboard=False, samples_every=0),
    )
    train.train(train.setup(config, folder / "run"))
    return folder / "run", lines


@pytest.mark.runs
def test_predictions_are_those_of_an_evaluation(run, tmp_path, capsys):
    workdir, lines = run
    assert evaluate.main([f"--workdir={workdir}", f"--out={tmp_path / 'evaluation'}"]) == 0
    (workdir.parent / "held_out.csv").unlink()  # predictions for new rows do not need it
    found = [json.loads(line) for line in (tmp_path / "evaluation" / "predictions.jsonl").read_text().splitlines()]
    (tmp_path / "new.csv").write_text("\n".join(line.rsplit(",", 1)[0] for line in [lines[0], *lines[41:]]) + "\n")
    capsys.readouterr()
    flags = [f"--workdir={workdir}", f"--prompts={tmp_path / 'new.csv'}", f"--out={tmp_path / 'out.jsonl'}"]
    assert generate.main(flags) == 0
    printed = capsys.readouterr().out
    written = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert len(written) == len(found) == 10
    for mine, theirs in zip(written, found):
        assert len(mine["samples"]) == 6 and mine["mean"] == pytest.approx(theirs["mean"], rel=1e-5, abs=1e-5)
        assert mine["median"] == pytest.approx(theirs["median"], rel=1e-5, abs=1e-5)
        assert mine["spread"] == pytest.approx(np.std(mine["samples"]))
        assert f"{mine['mean']:.3f} (6 samples, median {mine['median']:.3f}, standard deviation" in printed
    # Seven rows do not fill their last batch.
    (tmp_path / "new.csv").write_text("\n".join((tmp_path / "new.csv").read_text().splitlines()[:8]) + "\n")
    assert generate.main(flags) == 0
    seven = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [x["samples"] for x in seven] == [pytest.approx(x["samples"], rel=1e-5) for x in written[:7]]
    # One row on the command line; the first row of the file has the same random numbers.
    row = json.dumps({name: float(x) for name, x in zip("ab", lines[41].split(","))})
    assert generate.main([f"--workdir={workdir}", f"--prompt={row}", f"--out={tmp_path / 'one.jsonl'}"]) == 0
    assert json.loads((tmp_path / "one.jsonl").read_text())["samples"] == pytest.approx(written[0]["samples"], rel=1e-5)


@pytest.mark.runs
@pytest.mark.parametrize(
    "flags, said",
    [
        ([], "This run predicts numbers and has no session"),
        (["--prompt=3 + 4"], "Prompt 0 is '3 + 4'; this run predicts numbers, so give a row as a JSON object."),
        (['--prompt={"a": 1}'], "Row 0 of the prompts has no column 'b'; the run reads the columns a, b."),
    ],
)
def test_a_run_that_predicts_numbers_takes_rows_only(run, flags, said, capsys):
    capsys.readouterr()
    assert generate.main([f"--workdir={run[0]}", *flags]) == 2
    assert said in capsys.readouterr().err

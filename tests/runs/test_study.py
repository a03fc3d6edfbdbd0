"""Tests the configurations of the runs of a comparison, and the fields that a table shows."""

import json
import pathlib

import pytest

from helpers.tiny_runs import tiny, write_rows
from jaxrl_reason.config import ConfigError, Regression, RewardModel, Supervised, to_dict
from jaxrl_reason.runs import inputs, results, study

LEARNED = {"reward__functions": ["strict", "reward_model"], "reward__weights": [1.0, 0.0]}


def planned(baselines, seeds=(0,), **changes):
    config = tiny("rows.jsonl", **changes)
    return study.plan(config, baselines, pathlib.Path("/w"), seeds=seeds).units


def test_rows_of_a_seed_begin_with_its_start():
    units = planned({"LOO!": {"method": {"name": "rloo"}}}, (0, 7), supervised__steps=3)
    assert [(unit.seed, unit.directory.name, unit.title) for unit in units] == [
        (0, "start", "the start"),
        (0, "method", "the method, grpo"),
        (0, "loo", "the baseline 'LOO!'"),
        (7, "start", "the start"),
        (7, "method", "the method, grpo"),
        (7, "loo", "the baseline 'LOO!'"),
    ]
    assert all(unit.config.seed == unit.seed for unit in units)
    start, method, loo = units[3:]
    assert start.config.supervised.steps == 3 and start.config.checkpoint.keep_start
    for unit in (method, loo):
        assert unit.config.supervised.steps == 0 and unit.config.supervised.start_from == "/w/seed-7/start"
    assert loo.config.method == {"name": "rloo"} and method.config.method == {"name": "grpo"}


def test_without_training_before_rl_there_is_no_start():
    (method,) = planned({})
    assert method.directory.name == "method" and not method.config.supervised.start_from
    pretrained = planned({}, **LEARNED, reward_model__path="rm")
    assert [unit.config.reward_model.path for unit in pretrained] == ["rm"]


def test_the_reward_model_of_the_start_serves_the_rows_that_use_it():
    baselines = {
        "verifier": {"reward.functions": ["strict"], "reward.weights": []},
        "naive": {"method": {"name": "dapo"}},
        "better": {"reward_model.steps": 500},
    }
    start, *rows = planned(baselines, **LEARNED, reward_model__steps=9)
    assert start.config.reward_model == RewardModel(steps=9) and start.reward_model
    shared, none, own = RewardModel(path="/w/seed-0/start/reward_model"), RewardModel(), RewardModel(steps=500)
    assert [row.config.reward_model for row in rows] == [shared, none, shared, own]


def test_rows_without_the_reward_model_of_the_start_need_a_start_without_it(tmp_path):
    baselines = {
        "verifier": {"reward.functions": ["strict"], "reward.weights": []},
        "better": {"reward_model.steps": 500},
    }
    config = tiny("rows.jsonl", **LEARNED, supervised__steps=1)
    runs = lambda *only: study.plan(config, baselines, tmp_path, seeds=[0], only=only)
    alone, both = runs("better", "verifier"), runs("grpo", "better")
    start, all_start = alone.units[0], both.units[0]
    assert not start.reward_model and all_start == start._replace(reward_model=True)
    start.directory.mkdir(parents=True)
    (start.directory / "result.json").write_text(json.dumps({"config": start.digest}))
    assert alone.take()[0].row.name == "verifier"
    assert both.take()[0] == all_start  # its supervised phase is done, and its reward model is not
    (start.directory / "reward_model").mkdir()
    (start.directory / "reward_model" / "reward_model.json").touch()
    assert both.take()[0].row.name == "grpo"


def test_a_baseline_may_have_a_start_of_its_own():
    _, _, own = planned({"own": {"supervised.start_from": "", "supervised.steps": 8}}, supervised__steps=3)
    assert own.config.supervised.steps == 8 and not own.config.supervised.start_from


def test_the_digest_is_that_of_the_fields_which_decide_the_results():
    config = tiny("rows.jsonl")
    same = {"seed": 3, "log.progress": True, "mesh.fsdp": 1, "checkpoint.every": 7, "data.data_dir": "/elsewhere"}
    assert len({results.digest(study.variant(config, {name: value})) for name, value in same.items()}) == 1
    others = {"steps": 3, "eval.samples": 3, "method": {"name": "grpo", "eps": 0.1}, "supervised.steps": 1}
    digests = {results.digest(study.variant(config, {name: value})) for name, value in others.items()}
    assert len(digests | {results.digest(config)}) == 5


def test_a_start_serves_other_lengths_of_rl():
    one, two = (planned({}, supervised__steps=1, steps=steps)[0].digest for steps in (1, 2))
    other = planned({}, supervised__steps=1, optimizer__b1=0.8)[0].digest
    assert one == two != other


def test_fields_that_differ_have_their_defaults():
    """clip_high of grpo is 0.2 by default, and progrpo averages over tokens. Only the row that has the keyword alpha sets it. No row sets beta_v."""
    baselines = {
        "plain": {"method": {"name": "grpo"}},
        "dapo": {"method": {"name": "dapo"}, "optimizer.learning_rate": 1e-3},
        "self": {"method": {"name": "laser", "tau": 0.2}},
    }
    config = tiny("rows.jsonl", method={"name": "progrpo", "alpha": 0.1, "clip_high": 0.28})
    rows = study.plan(config, baselines, pathlib.Path("/w"), seeds=[0]).rows
    found = study.differing_fields(rows)
    assert found == {
        "progrpo": {
            "optimizer.learning_rate": 1e-4,
            "method.alpha": 0.1,
            "method.clip_high": 0.28,
            "method.aggregation": "token_mean",
            "method.name": "progrpo",
        },
        "plain": {
            "optimizer.learning_rate": 1e-4,
            "method.clip_high": 0.2,
            "method.aggregation": "sequence_mean",
            "method.name": "grpo",
        },
        "dapo": {
            "optimizer.learning_rate": 1e-3,
            "method.clip_high": 0.28,
            "method.name": "dapo",
        },
        "self": {
            "optimizer.learning_rate": 1e-4,
            "method.alpha": 0.1,
            "method.tau": 0.2,
            "method.clip_high": 0.2,
            "method.aggregation": "sequence_mean",
            "method.name": "laser",
        },
    }


def test_rows_of_a_stack_show_the_keywords_of_its_methods():
    config = tiny("rows.jsonl", method={"name": "rlev+progrpo", "progrpo": {"alpha": 0.2}})
    baselines = {"more": {"method": {"name": "rlev+progrpo", "progrpo": {"alpha": 0.4}}}}
    rows = study.plan(config, baselines, pathlib.Path("/w"), seeds=[0]).rows
    assert study.differing_fields(rows) == {
        "rlev+progrpo": {"method.progrpo.alpha": 0.2},
        "more": {"method.progrpo.alpha": 0.4},
    }


def test_rows_wait_for_the_start_that_another_process_makes(tmp_path, monkeypatch):
    write_rows(tmp_path / "rows.jsonl")
    runs = study.plan(tiny(tmp_path / "rows.jsonl", supervised__steps=1), {}, tmp_path, seeds=[0, 1])
    take, elsewhere = study.locks.take, {tmp_path / "seed-0" / "start.lock"}
    monkeypatch.setattr(study.locks, "take", lambda path: None if path in elsewhere else take(path))
    assert runs.take()[0] == runs.units[2]  # the start of seed 1
    elsewhere.add(tmp_path / "seed-1" / "start.lock")
    assert runs.take() is None


def test_a_run_is_taken_when_its_start_is_made(tmp_path):
    write_rows(tmp_path / "rows.jsonl")
    config = tiny(tmp_path / "rows.jsonl", supervised__steps=1)
    runs = study.plan(config, {"other": {"optimizer.b1": 0.8}}, tmp_path, seeds=[0, 1])

    def finish(unit, digest=None):
        unit.directory.mkdir(parents=True, exist_ok=True)
        (unit.directory / "result.json").write_text(json.dumps({"config": digest or unit.digest}))

    start_0, method_0, other_0, start_1, method_1, other_1 = runs.units
    assert runs.take()[0] == start_0
    finish(start_0)
    finish(method_0)
    assert runs.take()[0] == other_0
    finish(other_0)
    assert runs.take()[0] == start_1
    finish(start_1, "another")
    assert runs.take()[0] == start_1
    finish(start_1)
    finish(method_1, "another")
    assert runs.take()[0] == method_1
    finish(method_1)
    finish(other_1)
    assert runs.take() is None and runs.unfinished() == []
    (start_1.directory / "result.json").unlink()
    assert runs.unfinished() == []  # no row needs the start


def test_runs_that_name_the_same_files_have_the_same_inputs(tmp_path):
    """Of another seed, of a start, of another row, and of an earlier command with other seeds."""
    rows = {
        "tuned": {"optimizer.b1": 0.8},
        "other data": {"data.train": "other.jsonl"},
        "other rows": {"regression.validation_split": "[:9]", "supervised.steps": 1},
        "other pairs": {"reward_model.data": "pairs.jsonl"},
    }
    runs = study.plan(tiny("rows.jsonl", supervised__steps=1), rows, tmp_path, seeds=[0, 1])
    start, method, tuned, other_data, other_rows, other_pairs = runs.units[:6]
    for unit, found in ((start, {"data": "a", "pairs": "b"}), (tuned, {"data": "a", "pairs": "b", "r.py:f": "c"})):
        unit.directory.mkdir(parents=True)
        inputs.write(unit.directory, found)
    accepted = (
        (method, {"data": "a", "pairs": "b", "r.py:f": "c"}),
        (other_data, {"data": "d", "r.py:f": "c"}),
        (other_rows, {"data": "d"}),
        (other_pairs, {"data": "a", "pairs": "d"}),
        (runs.units[6], {}),  # the start of seed 1
    )
    for unit, found in accepted:
        runs.check_inputs(unit, found)
    elsewhere = "because a file has changed in the meantime"
    refused = [
        (unit, {"data": "d"}, f"other data than .*seed-0/.*, {elsewhere}") for unit in (method, *runs.units[6:9])
    ]
    refused += [(unit, {"pairs": "d"}, "other pairs for the reward model than .*seed-0/") for unit in runs.units[6:9]]
    refused += [(unit, {"r.py:f": "d"}, "file of the reward 'r.py:f' than .*seed-0/tuned") for unit in runs.units[7:12]]
    refused += [
        (tuned, {"r.py:f": "d"}, "holds a run that began with another file of the reward .* remove the directory")
    ]
    later = study.plan(tiny("rows.jsonl", supervised__steps=1), rows, tmp_path, seeds=[7])
    refused += [(later.units[0], {"data": "d"}, "seed-7/start would have other data than .*seed-0/")]
    for unit, found, message in refused:
        with pytest.raises(ConfigError, match=message):
            runs.check_inputs(unit, found)


def test_the_file_of_results_has_inputs_too(tmp_path):
    rows = {"other data": {"data.train": "other.jsonl"}}
    config = tiny("rows.jsonl", supervised__steps=1)
    method, other = study.plan(config, rows, tmp_path, seeds=[0]).rows
    entry = lambda row, data: {
        "row": row.name,
        "seed": 0,
        "config": row.digest,
        "inputs": {"data": data, "r.py:f": "c"},
    }
    runs = study.plan(config, rows, tmp_path, seeds=[1], done=[entry(method, "a"), entry(other, "b")])
    start, method, _ = runs.units
    for unit, found in ((start, {"data": "a"}), (method, {"data": "a", "r.py:f": "c"})):
        runs.check_inputs(unit, found)
    for unit, found in ((start, {"data": "b"}), (method, {"data": "a", "r.py:f": "d"})):
        with pytest.raises(ConfigError, match="would have .* than seed 0 of 'grpo' in the file of results"):
            runs.check_inputs(unit, found)


def test_damaged_inputs_are_one_sentence(tmp_path):
    assert inputs.read(tmp_path) == {}
    for text in ("{", "[1]", "3", '{"data": ["x"]}'):
        (tmp_path / "inputs.json").write_text(text)
        with pytest.raises(ConfigError, match="inputs.json is damaged; remove its directory"):
            inputs.read(tmp_path)


def finished(tmp_path, **changes):
    """Writes the result of a run of 2 steps, and returns the plan of the comparison with changes."""
    (unit,) = study.plan(tiny("rows.jsonl", steps=2), {}, tmp_path, seeds=[0]).units
    unit.directory.mkdir(parents=True, exist_ok=True)
    entry = {"row": "grpo", "recipe": True, "seed": 0, "config": unit.digest, "versions": {}, "seconds": 1.0}
    entry |= {"start_seconds": 0.0, "evaluations": [{"step": 0}, {"step": 2}]}
    (unit.directory / "result.json").write_text(json.dumps(entry))
    return study.plan(tiny("rows.jsonl", **{"steps": 2} | changes), {}, tmp_path, seeds=[0])


def test_a_finished_run_may_get_more_steps_only(tmp_path):
    assert finished(tmp_path).unfinished() == []
    more = finished(tmp_path, steps=3)
    assert more.unfinished() == list(more.units)
    for changes in ({"steps": 1}, {"eval__samples": 7}, {"steps": 3, "eval__samples": 7}, {"optimizer__b1": 0.5}):
        with pytest.raises(ConfigError, match="the method, grpo, which is finished with another configuration"):
            finished(tmp_path, **changes)
    file = study.plan(tiny("rows.jsonl", steps=2), {}, tmp_path, seeds=[0]).units[0].directory / "config.json"
    file.write_text(json.dumps({"config": to_dict(tiny("rows.jsonl", steps=2))}))
    with pytest.raises(ConfigError, match=r"another configuration \(config.eval.samples was \d and is 7\); choose"):
        finished(tmp_path, eval__samples=7)


def test_more_steps_under_a_falling_learning_rate_are_another_run(tmp_path):
    falling = {"optimizer__schedule": "linear"}
    (unit,) = study.plan(tiny("rows.jsonl", steps=2, **falling), {}, tmp_path, seeds=[0]).units
    assert finished(tmp_path).unfinished() == []
    entry = json.loads((unit.directory / "result.json").read_text()) | {"config": unit.digest}
    (unit.directory / "result.json").write_text(json.dumps(entry))
    with pytest.raises(ConfigError, match="finished with 2 steps. .*schedule is 'linear'.*so it cannot go on to 3"):
        study.plan(tiny("rows.jsonl", steps=3, **falling), {}, tmp_path, seeds=[0])


def test_a_half_done_run_under_a_falling_learning_rate_keeps_its_number_of_steps(tmp_path):
    plan = lambda steps, schedule: study.plan(
        tiny("rows.jsonl", steps=steps, optimizer__schedule=schedule, supervised__steps=0), {}, tmp_path, seeds=[0]
    )
    (unit,) = plan(2, "cosine").units
    unit.directory.mkdir(parents=True)
    (unit.directory / "config.json").write_text(json.dumps({"config": to_dict(unit.config)}))
    assert plan(3, "cosine").unfinished()  # no step is done
    (unit.directory / "checkpoints" / "1").mkdir(parents=True)
    assert plan(2, "cosine").unfinished() and plan(3, "constant").unfinished()
    with pytest.raises(ConfigError, match="which began with 2 steps. .* so it cannot go on to 3"):
        plan(3, "cosine")


def test_a_run_with_more_steps_than_are_compared_is_refused(tmp_path):
    plan = lambda steps, done=(): study.plan(
        tiny("rows.jsonl", steps=steps, supervised__steps=0), {}, tmp_path, seeds=[0], done=done
    )
    (unit,) = plan(3).units
    (unit.directory / "checkpoints" / "3").mkdir(parents=True)
    assert plan(3).unfinished()
    with pytest.raises(ConfigError, match="holds the method, grpo, of which 3 steps are done, more than the 2 to comp"):
        plan(2)
    digest = plan(3).rows[0].digest  # steps are no part of it only where the results are finished
    fewer = study.plan(tiny("rows.jsonl", steps=2, supervised__steps=0), {}, tmp_path / "new", seeds=[0]).rows[0].digest
    assert fewer != digest
    assert plan(2, done=[{"row": "grpo", "seed": 0, "config": fewer}]).unfinished() == []


def test_a_field_of_the_method_is_changed_with_the_whole_method():
    for name, hint in (("method.name", True), ("optimizer.nme", False)):
        with pytest.raises(ConfigError, match=f"changes config.{name}, and there is no such field") as e:
            study.variant(tiny("rows.jsonl"), {name: 1})
        assert ("give the whole method: {'method': {'name': ...}}" in str(e.value)) == hint


@pytest.mark.parametrize("text", ["", "{", "[]", '{"evaluations": []}', '{"config": "x", "evaluations": []}'])
def test_a_damaged_result_is_named(text, tmp_path):
    (tmp_path / "result.json").write_text(text)
    with pytest.raises(ConfigError, match="result.json is damaged; remove it"):
        study.read_result(tmp_path)


@pytest.mark.parametrize(
    "changes, sentence",
    [
        (
            {"supervised.learning_rate": 1.0},
            "changes config.supervised.learning_rate, and begins with the start that all",
        ),
        (
            {"supervised": Supervised(learning_rate=1.0)},
            "changes config.supervised, and begins with the start that all",
        ),
        (
            {"regression.validation_split": "[:4]"},
            "changes config.regression.validation_split, and begins with the start",
        ),
        ({"regression": Regression()}, "changes config.regression, and begins with the start that all"),
        (
            {"regression.encoder_dropout": 0.1},
            "changes config.regression.encoder_dropout, and begins with the start that all",
        ),
        ({"lora.rank": 2}, "changes config.lora, and the start that all rows share has other weights"),
    ],
)
def test_what_the_shared_start_has_decided_is_not_changed_by_a_row(changes, sentence):
    with pytest.raises(ConfigError, match=sentence):
        planned({"other": changes}, supervised__steps=3)
    assert planned({"other": changes}, supervised__steps=0)
    if "lora.rank" not in changes:
        assert planned({"other": changes | {"supervised.steps": 2}}, supervised__steps=3)

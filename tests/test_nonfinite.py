"""Non-finite updates change no weight and are counted. Several in a row end the run, and replay finds the cause."""

import json
import re

import jax
import numpy as np
import pytest
import rich.console

from helpers.tiny_runs import ROWS, tiny, write_rows
from jaxrl_reason import config as config_lib
from jaxrl_reason import methods, replay, train
from jaxrl_reason.runs import read_metrics, records
from jaxrl_reason.runs.checkpoints import Checkpoints
from jaxrl_reason.runs.watch import NonFiniteError
from jaxrl_reason.tasks import supervised

REWARDS = """
def wild(row, completion_ids, **_):
    '''Rewards that overflow a float32 gradient, on some rows.'''
    return [3e38 * (i % 2) if r in (3, 7) else float(i % 2) for i, r in enumerate(row)]

def sound(completion_ids, **_):
    return [float(i % 2) for i, _ in enumerate(completion_ids)]

def wilder(row, completion_ids, **_):
    return [3e38 * (i % 2) if r % 2 else float(i % 2) for i, r in enumerate(row)]
"""


pytestmark = [pytest.mark.runs, pytest.mark.usefixtures("quick_compilation")]


@pytest.fixture(autouse=True)
def here(tmp_path):
    write_rows(tmp_path / "rows.jsonl")
    (tmp_path / "rewards.py").write_text(REWARDS)


def config_of(tmp_path, reward, **changes):
    defaults = dict(method={"name": "dr_grpo"}, steps=5, reward__functions=[f"{tmp_path / 'rewards.py'}:{reward}"])
    return tiny(tmp_path / "rows.jsonl", **defaults | changes)


def params_of(config, workdir):
    run = train.setup(config, workdir)
    saver = Checkpoints(workdir / "checkpoints", config.checkpoint.keep)
    _, state = saver.restore(run.programs.abstract_state)
    saver.close()
    return jax.tree.map(np.asarray, state.params)


@pytest.mark.parametrize("updates", [{}, pytest.param(dict(update__minibatches=2), marks=pytest.mark.slow)])
def test_steps_that_are_not_finite_are_skipped_and_counted(updates, tmp_path):
    warmup = dict(optimizer__learning_rate=8e-3, optimizer__warmup_steps=8)
    config = config_of(tmp_path, "wild", log__samples_every=1, log__samples=16, **warmup, **updates)
    train.train(train.setup(config, tmp_path / "run"))
    lines = read_metrics(tmp_path / "run" / "metrics.jsonl")
    wild = {step: set() for step in range(1, 6)}
    for line in open(tmp_path / "run" / "samples.jsonl"):
        sample = json.loads(line)
        if sample["prompt"] in ("Write 3.\n", "Write 7.\n"):
            wild[sample["step"]].add(sample["prompt"])
    assert 0 < sum(map(bool, wild.values())) < 5  # each of the 20 rows comes once
    for line in lines:
        ratio, prompts = line["skipped_update_ratio"], wild[line["step"]]
        assert ratio == (0 if not prompts else 1) if not updates else (ratio > 0) == bool(prompts)
    per_step = updates.get("update__minibatches", 1)
    done = np.cumsum([0, *(per_step * (1 - line["skipped_update_ratio"]) for line in lines)])[:-1]
    rates = 1e-3 * (1 + np.round(done) // per_step)  # a skipped update does not move the schedule
    np.testing.assert_allclose([line["learning_rate"] for line in lines], rates, rtol=1e-6)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(params_of(config, tmp_path / "run")))


def test_a_row_of_skipped_steps_ends_the_run_and_the_last_can_be_replayed(tmp_path, capsys):
    config = config_of(tmp_path, "wilder", optimizer__max_skipped=3, checkpoint__every=2)
    workdir = tmp_path / "run"
    with pytest.raises(NonFiniteError) as caught:
        train.train(train.setup(config, workdir))
    saved = workdir / "replay" / "3"
    assert str(caught.value).startswith("At step 3 the loss or its gradient was not finite, for the 3rd step in a row")
    assert f"in {saved}: python -m jaxrl_reason.replay --workdir={workdir} names" in str(caught.value)
    assert [line["step"] for line in read_metrics(workdir / "metrics.jsonl")] == [1, 2, 3]

    # The same command continues from step 2, and still counts the first two steps.
    with pytest.raises(NonFiniteError, match="At step 3 .*3rd step"):
        train.train(train.setup(config, workdir))
    assert [line["step"] for line in read_metrics(workdir / "metrics.jsonl")] == [1, 2, 3]

    run = train.setup(config, workdir)
    capsys.readouterr()
    whole, *prompts = replay.report(run, replay.load(run, 3), rich.console.Console(markup=False, emoji=False))
    printed = capsys.readouterr().out
    _, params, batch, rewards = replay.load(run, 3)
    rows = [int(re.search(r"\d+", run.tokenizer.decode(t[m].tolist()))[0]) for t, m in zip(*batch.rollout[:2])]
    assert not whole.finite and "layers.q" in whole.weights
    assert [not found.finite for found in prompts] == [row % 2 == 1 for row in rows]
    for p, row in enumerate(rows):
        assert (f"Prompt {p}: 'Write {row}.\\n'" in printed) == (row % 2 == 1)
    np.testing.assert_array_equal(
        rewards["wilder"][rows.index(next(r for r in rows if r % 2))], np.float32([0, 3e38, 0, 3e38])
    )
    jax.tree.map(
        np.testing.assert_array_equal, params, supervised.first_state(run.task, run.programs).params
    )  # no weight has moved


def test_a_step_that_cannot_be_saved_still_says_what_is_wrong(tmp_path):
    config = config_of(tmp_path, "wilder", optimizer__max_skipped=1)
    run = train.setup(config, tmp_path / "run")
    (tmp_path / "run" / "replay").write_text("in the way")
    with pytest.raises(
        NonFiniteError, match="At step 1 the loss .* It could not be saved for replay: The weights .* cannot be written"
    ):
        train.train(run)


@pytest.mark.slow
@pytest.mark.parametrize("method", [{"name": "dr_grpo"}, {"name": "laser", "self_reward_warmup": 3}])
def test_the_whole_batch_has_the_gradient_that_replay_says(method, tmp_path):
    """The gradients also agree for finite batches, and in LaSeR's warm-up, which judges no completion."""
    answering = dict(supervised__steps=30, supervised__learning_rate=1e-2, supervised__batch_size=4)
    config = config_of(tmp_path, "sound", steps=1, method=method, **answering)
    run = train.setup(config, tmp_path / "run")
    state = supervised.first_state(run.task, run.programs)
    for i in range(30):  # until completions end, because only complete ones are judged
        state, _ = run.programs.supervised_update(state, run.solutions.batch(i))
    state = run.programs.restart(state.params)
    c_ref = np.float32(-1) if method["name"] == "laser" else None
    step = train.train_step(run, jax.tree.map(jax.numpy.copy, state), None, train.Clock(), c_ref)
    batch, metrics = step.batch, step.metrics
    valid = lambda batch: batch.auxiliary["self_reward"]["valid"] if batch.auxiliary else None
    assert valid(batch) is None or valid(batch).any()
    records.save_for_replay(run.work.path, 1, state, step)
    _, params, loaded, rewards = replay.load(run, 1)
    assert valid(loaded) is None or not valid(loaded).any()
    saved = batch
    if loaded.auxiliary:
        data = batch.auxiliary["self_reward"] | {"valid": valid(loaded)}
        saved = batch._replace(auxiliary={"self_reward": data})
    jax.tree.map(np.testing.assert_array_equal, (params, loaded, rewards), (state.params, saved, step.groups.rewards))
    whole, *prompts = replay.examine(run, params, loaded)
    assert metrics["skipped_update_ratio"] == 0 < metrics["grad_norm"]
    assert whole.grad_norm == pytest.approx(metrics["grad_norm"], rel=1e-4)
    assert whole.loss == pytest.approx(metrics["loss"], abs=1e-5) and all(found.finite for found in prompts)


@pytest.mark.parametrize("method", [{"name": "plain"}, {"name": "rlev", "base": "plain"}], ids=str)
def test_replay_with_an_estimator_of_the_recipe(method, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(methods.registry, "_ESTIMATORS", dict(methods.registry._ESTIMATORS))
    recipe, workdir = tmp_path / "recipe.py", tmp_path / "run"
    recipe.write_text(
        "from jaxrl_reason.advantages import center_by_group\nfrom jaxrl_reason.methods import Method, PolicyLoss, register\n"
        "@register\ndef plain():\n    return Method(center_by_group(), PolicyLoss())\n"
    )
    write_rows(tmp_path / "rows.jsonl", [row | {"value": 0.5} for row in ROWS])
    config_lib.load_module(recipe)
    with pytest.raises(NonFiniteError):
        train.train(train.setup(config_of(tmp_path, "wilder", optimizer__max_skipped=1, method=method), workdir))
    methods.registry._ESTIMATORS.pop("plain")  # another process has not registered it
    capsys.readouterr()
    assert replay.main([f"--workdir={workdir}"]) == 2
    error = capsys.readouterr().err
    assert "'plain'" in error and error.endswith("If the run's recipe registers it, name the recipe: --config=FILE.\n")
    begun = (workdir / "config.json").read_bytes()
    assert replay.main([f"--workdir={workdir}", f"--config={recipe}", "--config.mesh.fsdp=1"]) == 0
    assert (workdir / "config.json").read_bytes() == begun  # the run is only read
    assert "Step 1: loss" in capsys.readouterr().out


def test_replay_of_what_is_not_there_is_a_sentence(tmp_path, capsys):
    config = config_of(tmp_path, "wild", steps=1, reward__functions=["format"])
    for arguments, sentence in [
        ([f"--workdir={tmp_path}"], "is not the work directory of a run"),
        (["--step=1"], "--workdir=DIR is missing"),
        ([f"--workdir={tmp_path}", "--other=1"], "There is no flag '--other'"),
        ([f"--workdir={tmp_path}", "--config.seed=1"], "There is no flag '--config.seed'"),
    ]:
        assert replay.main(arguments) == 2 and sentence in capsys.readouterr().err
    train.setup(config, tmp_path / "run")
    assert replay.main([f"--workdir={tmp_path / 'run'}"]) == 2
    assert "holds no step to replay" in capsys.readouterr().err
    (tmp_path / "run" / "replay" / "1").mkdir(parents=True)
    assert replay.main([f"--workdir={tmp_path / 'run'}", "--step=2"]) == 2
    assert "--step=2: " in capsys.readouterr().err
    assert replay.main([f"--workdir={tmp_path / 'run'}"]) == 2
    assert "cannot be read" in capsys.readouterr().err
    assert replay.main([f"--workdir={tmp_path / 'run'}", "--config.mesh.fsdp=3"]) == 2
    assert "mesh.fsdp=3" in capsys.readouterr().err


def test_a_supervised_phase_that_has_lost_itself_ends_in_a_sentence(tmp_path, capsys):
    changes = dict(supervised__steps=20, supervised__learning_rate=1e30, optimizer__max_grad_norm=1e30)
    config = config_of(tmp_path, "wild", optimizer__max_skipped=4, checkpoint__every=2, **changes)
    said = []
    for _ in range(2):  # the second time after the newest checkpoint
        with pytest.raises(NonFiniteError) as caught:
            train.train(train.setup(config, tmp_path / "run"))
        said.append(str(caught.value))
    assert re.search(r"At supervised step .* for the 4th step in a row.*supervised\.learning_rate", said[0])
    assert said[0] == said[1] and "Going on from" in capsys.readouterr().out


def test_a_token_on_which_sampler_and_trainer_differ_is_named_once(tmp_path, capsys):
    config = config_of(tmp_path, "wild", steps=3, reward__functions=["format"], sampling__mismatch_limit=1e-12)
    train.train(train.setup(config, tmp_path / "run"))
    printed = capsys.readouterr().out
    assert printed.count("warning: The sampler's and the trainer's log-probability of a token differ by") == 1
    assert re.search(
        r"mismatch_limit allows \(1e-12\): token \d of completion [0-3] of prompt [0-3], '.*' in '.*', was sampled at -",
        printed,
    )

"""Tests the evaluate command on tiny runs: its files and errors. The run stays unchanged."""

import hashlib
import json
import math
import os
import re
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
import rich.console

from helpers.tiny_runs import tiny, write_rows
from jaxrl_reason import config as config_lib
from jaxrl_reason import data, evaluate, export, methods, runs, train
from jaxrl_reason.data.preferences import PreferenceBatch
from jaxrl_reason.metrics import pass_at_k
from jaxrl_reason.models import reward_model
from jaxrl_reason.rewards import model_training
from jaxrl_reason.rewards.latex import normalised
from jaxrl_reason.rewards.numeric import choice, extract_answer, numeric_verdict, parse_number
from jaxrl_reason.runs import checkpoints, read_metrics
from jaxrl_reason.tasks import policies

pytestmark = [pytest.mark.runs, pytest.mark.usefixtures("quick_compilation")]

DIGITS = [{"question": str(i), "solution": f"#### {i % 10}", "answer": str(i % 10)} for i in range(20)]


@pytest.fixture(scope="module")
def rewards(tmp_path_factory):
    path = tmp_path_factory.mktemp("rewards") / "rewards.py"
    path.write_text('''"""Rewards for tests."""

def picky(completions, answer, **_):
    """None for the answer 3."""
    return [None if a == "3" else len(c) / 100 for c, a in zip(completions, answer)]

def even(completions, **_):
    return [float(len(c) % 2 == 0) for c in completions]

def broken(completions, **_):
    raise KeyError("nothing works")
''')
    return path


@pytest.fixture(scope="module")
def trained(tmp_path_factory, rewards, quick_compilation):
    """Trains to an accuracy between 0 and 1. Returns (configuration, work directory, a copy after one of two steps)."""
    folder = tmp_path_factory.mktemp("trained")
    config = tiny(
        write_rows(folder / "rows.jsonl", [row | {"value": 1 / (i + 1)} for i, row in enumerate(DIGITS)]),
        method={"name": "laser"},
        max_prompt_length=4,
        group_size=8,
        model__mlp_width=32,
        supervised__steps=150,
        supervised__batch_size=16,
        supervised__learning_rate=1e-2,
        optimizer__learning_rate=1e-3,
        reward__functions=["accuracy", f"{rewards}:picky"],
        reward__weights=[1.0, 0.25],
        checkpoint__keep=3,
        eval__every=1,
        eval__prompts=7,
        eval__samples=3,
    )
    for config.steps in (1, 2):
        train.train(train.setup(config, folder / "run"))
        if config.steps == 1:
            shutil.copytree(folder / "run", folder / "half")
    return config, folder / "run", folder / "half"


def command(workdir, out, *flags) -> dict:
    """Runs the command and returns the content of evaluation.json."""
    assert evaluate.main([f"--workdir={workdir}", f"--out={out}", *flags]) == 0
    return json.loads((out / "evaluation.json").read_text())


def completions(out) -> list[dict]:
    return [json.loads(line) for line in open(out / "completions.jsonl", encoding="utf-8")]


def contents(directory) -> dict:
    """Returns the digest and the time of modification of every file and folder below, except for the results."""
    below = [path for path in directory.rglob("*") if (directory / "evaluation") not in (path, *path.parents)]
    digest = lambda path: hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None
    return {str(path): (path.stat().st_mtime_ns, digest(path)) for path in below}


def test_the_command_agrees_with_the_evaluation_in_the_run_and_changes_nothing_there(trained, capsys):
    config, workdir, _ = trained
    before = contents(workdir)
    assert evaluate.main([f"--workdir={workdir}"]) == 0
    assert contents(workdir) == before
    assert sorted(path.name for path in (workdir / "evaluation").iterdir()) == [
        "completions.jsonl",
        "evaluation.json",
        "evaluation.png",
    ]
    record = json.loads((workdir / "evaluation" / "evaluation.json").read_text())
    last = read_metrics(workdir / "metrics.jsonl")[-1]
    assert 0 < last["eval/accuracy"] < 1  # otherwise the comparisons below would be trivial
    names = {name.removeprefix("eval/") for name in last if name.startswith("eval/")}
    assert names >= {"accuracy", "pass@3", "mean_length", "clipped_ratio", "prompts", "h_accuracy", "self_reward_f1"}
    assert {name: record["metrics"][name] for name in names} == {n: pytest.approx(last[f"eval/{n}"]) for n in names}
    assert record["checkpoint"] == 152 and record["phase"] == "RL step 2"
    assert record["command"] == f"python -m jaxrl_reason.evaluate --workdir={workdir}"
    fingerprint = json.loads((workdir / "config.json").read_text())["data_fingerprint"].partition("/")[2]
    assert record["data"] == {"name": config.data.train, "split": "all", "fingerprint": fingerprint}
    assert (record["samples"], record["temperature"], record["prompts"]) == (3, 1.0, 7)
    assert (workdir / "evaluation" / "evaluation.png").read_bytes().startswith(b"\x89PNG")
    out = capsys.readouterr().out
    assert f"{100 * record['metrics']['accuracy']:.1f} %" in out and f"{workdir}/evaluation/evaluation.json" in out
    for text in ("pass@k", "maj@k", "95 % interval", "mean length correct", "RL step 2", "avg@3", "answered ratio"):
        assert text in out


def test_every_number_follows_from_the_completions(trained, tmp_path):
    """All metrics are recomputed in plain Python from completions.jsonl."""
    record = command(trained[1], tmp_path, "--samples=5", "--split=[4:]", "--prompts=20", "--temperature=1.5")
    lines, numbers = completions(tmp_path), record["metrics"]
    assert record["data"]["split"] == "[4:]" and record["prompts"] == 16  # all rows of the split
    assert [(line["row"], line["sample"]) for line in lines] == [(n, k) for n in range(16) for k in range(5)]
    for line in lines:
        row = DIGITS[line["row"] + 4]
        assert line["prompt"] == row["question"] + "\n"
        assert line["correct"] == numeric_verdict(line["completion"], row["answer"])
        assert line["rewards"]["accuracy"] == line["correct"]
        picky = None if row["answer"] == "3" else pytest.approx(len(line["completion"]) / 100)
        assert line["rewards"]["picky"] == picky
        assert line["total"] == pytest.approx(line["correct"] + 0.25 * (line["rewards"]["picky"] or 0))
        text = extract_answer(line["completion"])
        number = text and parse_number(text)
        spelled = text and (choice(text, with_text=True) or normalised(text) or text)
        assert line["answer"] == (str(number) if number is not None else spelled)
        assert line["truncated"] <= (line["length"] == 6)
    mean = lambda values: pytest.approx(sum(values) / len(values))
    groups = [lines[i : i + 5] for i in range(0, 80, 5)]
    assert numbers["accuracy"] == numbers["avg@5"] == mean([line["correct"] for line in lines])
    assert 0 < numbers["accuracy"] < 1
    assert record["config"]["eval"]["samples"] == 5 and record["config"]["data"]["eval_split"] == "[4:]"
    assert numbers["accuracy_low"] < numbers["accuracy"] < numbers["accuracy_high"]
    for k in (1, 2, 4, 5):
        right = [sum(line["correct"] for line in group) for group in groups]
        assert numbers[f"pass@{k}"] == mean([pass_at_k(5, c, k) for c in right])
        majority = []
        for group in groups:
            votes = [line["answer"] for line in group[:k] if line["answer"] is not None]
            most = max(votes, key=lambda answer: (votes.count(answer), -votes.index(answer)), default=None)
            majority.append(any(line["correct"] for line in group[:k] if line["answer"] == most is not None))
        assert numbers[f"maj@{k}"] == mean(majority)
    assert numbers["mean_length_correct"] == mean([line["length"] for line in lines if line["correct"]])
    assert numbers["mean_length_incorrect"] == mean([line["length"] for line in lines if not line["correct"]])
    assert numbers["clipped_ratio"] == mean([line["truncated"] for line in lines])
    assert numbers["answered_ratio"] == mean([line["answer"] is not None for line in lines])
    assert numbers["reward"] == mean([line["total"] for line in lines])
    kept = [line["rewards"]["picky"] for line in lines if line["rewards"]["picky"] is not None]
    assert len(kept) == 75 and numbers["rewards/picky"] == mean(kept)
    distinct = [len({line["completion"] for line in group if line["correct"]}) for group in groups]
    assert numbers["distinct_correct_completions"] == mean(distinct)
    assert 0 < numbers["entropy"] < math.log(300)


@pytest.mark.slow
def test_a_run_with_an_estimator_of_its_recipe(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(methods.registry, "_ESTIMATORS", dict(methods.registry._ESTIMATORS))
    rows = write_rows(tmp_path / "rows.jsonl", DIGITS)
    (tmp_path / "recipe.py").write_text(
        "from jaxrl_reason.advantages import center_by_group\nfrom jaxrl_reason.methods import Method, PolicyLoss, register\n"
        "@register\ndef centered():\n    return Method(center_by_group(), PolicyLoss())\n"
    )
    config_lib.load_module(tmp_path / "recipe.py")
    train.train(train.setup(tiny(rows, steps=1, method={"name": "centered"}), tmp_path / "run"))
    methods.registry._ESTIMATORS.pop("centered")  # another process has not registered it
    assert evaluate.main([f"--workdir={tmp_path / 'run'}"]) == 2
    advice = "If the run's recipe registers it, name the recipe: --config=FILE.\n"
    error = capsys.readouterr().err
    assert "'centered'" in error and error.endswith(advice)
    out = f"--out={tmp_path / 'model'}"
    assert export.main([f"--workdir={tmp_path / 'run'}", out]) == 2 and capsys.readouterr().err.endswith(advice)
    assert evaluate.main([f"--workdir={tmp_path / 'run'}", f"--config={tmp_path / 'recipe.py'}"]) == 0
    methods.registry._ESTIMATORS.pop("centered")
    assert export.main([f"--workdir={tmp_path / 'run'}", out, f"--config={tmp_path / 'recipe.py'}"]) == 0


def test_fewer_samples_are_the_first_ones_and_again_is_the_same(trained, tmp_path):
    first = command(trained[1], tmp_path)
    files = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert command(trained[1], tmp_path) == first and first["checkpoint"] == 152
    assert files == {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    texts = [line["completion"] for line in completions(tmp_path) if line["sample"] < 2]
    command(trained[1], tmp_path / "two", "--samples=2")
    assert texts == [line["completion"] for line in completions(tmp_path / "two")] and len(set(texts)) > 2


def test_an_evaluation_overwrites_no_other(trained, tmp_path, capsys):
    workdir = tmp_path / "run"
    shutil.copytree(trained[1], workdir, ignore=shutil.ignore_patterns("evaluation*"))
    (workdir / "evaluation.json").write_text("{}")  # a file of an earlier version
    contents = lambda: {p: p.read_bytes() for p in workdir.glob("evaluation*/*")}
    samples = lambda: {
        p.parent.name: json.loads(p.read_bytes())["samples"] for p in workdir.glob("evaluation*/evaluation.json")
    }
    for flags in ([], ["--samples=2"], ["--samples=2", "--checkpoint=151"], ["--samples=2", "--split=[3:]"]):
        before = contents()
        assert evaluate.main([f"--workdir={workdir}", *flags]) == 0
        assert before == {path: x for path, x in contents().items() if path in before}
        assert len(contents()) == len(before) + 3
    assert samples() == {"evaluation": 3, "evaluation-2": 2, "evaluation-3": 2, "evaluation-4": 2}
    before = contents()
    # Other flags ask for the same evaluation again.
    for flags in (["--config.eval.samples=2"], ["--config.log.progress=true", "--samples", "3"], ["--checkpoint=152"]):
        assert evaluate.main([f"--workdir={workdir}", *flags]) == 0
    assert before.keys() == contents().keys()
    assert f"Written: {workdir}/evaluation-2/evaluation.json" in capsys.readouterr().out
    # A kill before evaluation.json is written leaves nothing to keep.
    (workdir / "evaluation-2" / "evaluation.json").unlink()
    assert evaluate.main([f"--workdir={workdir}", "--samples=1"]) == 0
    assert samples() == {"evaluation": 3, "evaluation-2": 1, "evaluation-3": 2, "evaluation-4": 2}
    # A directory that --out names is never overwritten, and no other one is written instead.
    before = contents()
    error = refusal(capsys, f"--workdir={workdir}", f"--out={workdir / 'evaluation'}", "--samples=2")
    assert "holds another evaluation; name another directory" in error and contents() == before
    (workdir / "evaluation" / "evaluation.json").write_text("[")
    assert "holds another" in refusal(capsys, f"--workdir={workdir}", f"--out={workdir / 'evaluation'}")
    assert (workdir / "evaluation.json").read_text() == "{}"


@pytest.mark.slow
def test_an_older_checkpoint_and_greedy_completions(trained, tmp_path):
    record = command(trained[1], tmp_path, "--temperature", "0", "--checkpoint", "150")
    assert record["checkpoint"] == 150 and record["phase"] == "RL step 0"
    assert record["samples"] == 1 and record["temperature"] == 0 and "entropy" not in record["metrics"]
    assert len(completions(tmp_path)) == 7
    flags = ["--temperature=0", "--checkpoint=151", "--samples=2", "--config.seed=1"]
    other = command(trained[1], tmp_path / "other", *flags)
    texts = [line["completion"] for line in completions(tmp_path / "other")]
    assert other["phase"] == "RL step 1" and other["seed"] == 1 and texts[::2] == texts[1::2]


def test_other_data_with_human_values(trained, tmp_path, monkeypatch):
    names, load_source = [], data.load_source
    monkeypatch.setattr(data, "load_source", lambda name, *a, **k: names.append(name) or load_source(name, *a, **k))
    rows = write_rows(tmp_path / "exam.jsonl", [row | {"value": (i + 1) / 10} for i, row in enumerate(DIGITS[:5])])
    record = command(trained[1], tmp_path / "out", f"--data={rows}", "--samples=8")
    assert names == [str(rows)]  # no training row is read
    assert record["data"]["name"] == str(rows) and record["data"]["split"] == "all" and record["prompts"] == 5
    lines = completions(tmp_path / "out")
    share = [np.mean([line["correct"] for line in lines if line["row"] == n]) for n in range(5)]
    earned = sum((n + 1) * share[n] for n in range(5)) / 15
    assert record["metrics"]["h_accuracy"] == pytest.approx(earned) and earned > 0
    assert record["metrics"]["low_value_accuracy"] == pytest.approx(share[0])

    # Points of an exam are values too. The total of an exam includes rows that are not evaluated.
    rows = write_rows(
        tmp_path / "points.jsonl", [row | {"points": str(i + 1), "exam": "a"} for i, row in enumerate(DIGITS[:5])]
    )
    again = command(trained[1], tmp_path / "points", f"--data={rows}", "--samples=8")
    assert again["metrics"]["h_accuracy"] == pytest.approx(earned)


def test_values_stay_with_their_questions_if_a_row_is_left_out(trained, tmp_path):
    long = {"question": "too long a question", "solution": "#### 1", "answer": "1", "value": 1.0}
    given = [long] + [row | {"value": (i + 1) / 10} for i, row in enumerate(DIGITS[:5])]
    rows = write_rows(tmp_path / "exam.jsonl", given)
    flags = [f"--data={rows}", "--samples=8", "--config.data.on_long_prompt=skip"]
    record = command(trained[1], tmp_path / "out", *flags)
    lines = completions(tmp_path / "out")
    assert {line["row"] for line in lines} == {1, 2, 3, 4, 5}
    earned = sum(given[line["row"]]["value"] * line["correct"] for line in lines) / 8 / 1.5
    assert record["metrics"]["h_accuracy"] == pytest.approx(earned) and earned > 0


@pytest.mark.slow
def test_the_temperature_of_evaluation_leaves_the_self_rewards_on_their_scale(trained, tmp_path):
    """A completion has the same self-reward at every temperature."""
    found = {}
    for temperature in ("1.0", "0.7"):
        command(trained[1], tmp_path / temperature, f"--temperature={temperature}", "--samples=16")
        for line in completions(tmp_path / temperature):
            if line["self_reward"] is not None:
                found.setdefault((line["prompt"], line["completion"]), {})[temperature] = line["self_reward"]
    both = [x for x in found.values() if len(x) == 2]
    assert len(both) > 5
    for x in both:
        assert x["1.0"] == pytest.approx(x["0.7"], abs=1e-4)


def test_weights_are_read_without_the_rest_of_the_state(trained):
    config, workdir, _ = trained
    run = train.setup(config, workdir)
    saver = checkpoints.Checkpoints(workdir / "checkpoints", config.checkpoint.keep)
    number, state = saver.restore(run.programs.init())
    saver.close()
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state.params)
    found_number, params = runs.load_weights(workdir, None, like, run.model)
    assert found_number == number == 152
    jax.tree.map(np.testing.assert_array_equal, params, state.params)
    assert jax.tree.map(lambda x: x.sharding, params) == jax.tree.map(lambda x: x.sharding, state.params)


def test_training_goes_on_as_if_it_had_not_been_evaluated(trained, tmp_path):
    config, straight, half = trained
    assert evaluate.main([f"--workdir={half}", "--samples=2"]) == 0 and (half / "evaluation").is_dir()
    train.train(train.setup(config, half))
    timeless = lambda line: {name: value for name, value in line.items() if not name.startswith("perf/")}
    lines, expected = ([timeless(x) for x in read_metrics(w / "metrics.jsonl")] for w in (half, straight))
    assert lines == expected and [line["step"] for line in lines] == [0, 1, 2]


def test_a_reward_model_scores_in_microbatches_on_the_mesh_as_in_training(tmp_path, monkeypatch):
    """The scoring program has the microbatches and the mesh of training. Scores in one piece are equal."""
    pairs = [row | {"chosen": row["solution"], "rejected": "#### 11"} for row in DIGITS]
    config = tiny(
        write_rows(tmp_path / "rows.jsonl", pairs),
        prompts_per_step=8,
        update__accumulation=4,
        update__minibatches=2,
        reward__functions=["reward_model"],
        reward_model__steps=1,
        reward_model__batch_size=4,
    )
    run = train.setup(config, tmp_path / "run")
    model, params = model_training.get_reward_model(
        run.reward_phase, run.programs.init().params, rich.console.Console(quiet=True)
    )
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 7, (4, 2))
    rollout = PreferenceBatch(
        rng.integers(0, 99, (4, 16)),
        np.arange(16) < 9,
        rng.integers(0, 99, (4, 2, 6)),
        np.arange(6) < lengths[..., None],
    )
    rollout = rollout._replace(prompt_mask=np.broadcast_to(rollout.prompt_mask, (4, 16)))
    expected = reward_model.group_scores(model, params, rollout)

    traced, group_scores = [], reward_model.group_scores

    def watched(model, params, rollout, *, parts=1):
        traced.append((parts, dict(jax.sharding.get_abstract_mesh().shape)))
        return group_scores(model, params, rollout, parts=parts)

    monkeypatch.setattr(reward_model, "group_scores", watched)
    mesh = run.programs.sharding.mesh
    score = model_training.load_scorer(config, tmp_path / "run", run.tokenizer, mesh, batch_size=4)
    scores, metrics = score(rollout, None)
    assert traced == [(4, dict(mesh.shape))] and metrics == {}  # 4 prompts are 4 microbatches, not 8
    assert len(np.unique(scores)) == 8
    np.testing.assert_allclose(scores, expected, rtol=1e-5, atol=1e-6)


def on_four_devices(workdir, out, shared_programs) -> None:
    """Runs the command in a process with four devices, which split prompts and weights."""
    env = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
    env |= {name.upper(): str(value) for name, value in shared_programs.items()}
    mesh = ["--config.mesh.data=2", "--config.mesh.fsdp=2"]
    arguments = [f"--workdir={workdir}", f"--out={out}", *mesh]
    result = subprocess.run(
        [sys.executable, "-m", "jaxrl_reason.evaluate", *arguments], env=env, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr[-2000:]


@pytest.mark.slow
def test_four_devices_find_the_same(trained, tmp_path, shared_programs):
    record = command(trained[1], tmp_path / "one")
    on_four_devices(trained[1], tmp_path / "four", shared_programs)
    exact = lambda out: [{k: v for k, v in line.items() if k != "self_reward"} for line in completions(out)]
    assert exact(tmp_path / "one") == exact(tmp_path / "four")
    other = json.loads((tmp_path / "four" / "evaluation.json").read_text())
    assert other["metrics"] == {name: pytest.approx(value, rel=1e-4) for name, value in record["metrics"].items()}


@pytest.mark.slow
def test_a_learned_reward_and_a_verdict_of_its_own(tmp_path, rewards, capsys, shared_programs):
    """The reward model of the run gives the scores of training, on four devices too."""
    pairs = [row | {"chosen": row["solution"], "rejected": "#### 11"} for row in DIGITS]
    config = tiny(
        write_rows(tmp_path / "rows.jsonl", pairs),
        eval__every=1,
        reward__functions=["accuracy", "reward_model", f"{rewards}:even"],
        reward_model__steps=2,
        reward_model__batch_size=4,
        max_completion_length=8,
        prompts_per_step=8,
        update__accumulation=2,
        eval__prompts=8,
    )
    train.train(train.setup(config, tmp_path / "run"))
    record = command(tmp_path / "run", tmp_path / "out")
    assert record["verdict"] == "accuracy"
    last = read_metrics(tmp_path / "run" / "metrics.jsonl")[-1]
    names = [name.removeprefix("eval/") for name in last if name.startswith("eval/")]
    assert {name: record["metrics"][name] for name in names} == {n: pytest.approx(last[f"eval/{n}"]) for n in names}
    scores = [line["rewards"]["reward_model"] for line in completions(tmp_path / "out")]
    assert len(set(scores)) > 1
    on_four_devices(tmp_path / "run", tmp_path / "four", shared_programs)
    again = [line["rewards"]["reward_model"] for line in completions(tmp_path / "four")]
    assert again == pytest.approx(scores, rel=1e-4, abs=1e-5)
    record = command(tmp_path / "run", tmp_path / "even", f"--config.eval.verdict={rewards}:even", "--samples=8")
    lines = completions(tmp_path / "even")
    assert record["verdict"] == "even" and 0 < record["metrics"]["accuracy"] < 1
    assert all(line["correct"] == line["rewards"]["even"] == (len(line["completion"]) % 2 == 0) for line in lines)
    (tmp_path / "run" / "reward_model" / "reward_model.json").unlink()
    assert "no trained reward model" in refusal(capsys, f"--workdir={tmp_path / 'run'}")


# -- models without a run ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def exported(trained, tmp_path_factory):
    directory = tmp_path_factory.mktemp("exported") / "model"
    assert export.main([f"--workdir={trained[1]}", f"--out={directory}"]) == 0
    return directory


def flags_of_the_run(config) -> list[str]:
    """Returns flags with which a model gets the questions of the run's evaluation."""
    fields = {"data.template": "plain", "max_prompt_length": 4, "data.columns": "{}"}
    return [
        *(f"--config.{name}={value}" for name, value in fields.items()),
        *(f"--data={config.data.train}", "--prompts=7", "--samples=3"),
        "--max-completion-length=6",
    ]


def test_a_model_is_evaluated_as_the_run_that_exported_it(trained, exported, tmp_path, hub_cache):
    config, workdir, _ = trained
    record = command(workdir, tmp_path / "run", "--config.reward.functions=accuracy", "--config.reward.weights=[]")
    assert evaluate.main([f"--model={exported}", f"--out={tmp_path / 'out'}", *flags_of_the_run(config)]) == 0
    found = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    without = lambda out: [{k: v for k, v in line.items() if k != "self_reward"} for line in completions(out)]
    assert without(tmp_path / "out") == without(tmp_path / "run") and len(completions(tmp_path / "out")) == 21
    assert found["metrics"] == {name: record["metrics"][name] for name in found["metrics"]}
    assert (found["model"], found["checkpoint"], found["phase"]) == (str(exported), None, "pretrained")
    # A model of the hub is named with its commit.
    commit = hub_cache("model", "us/digits", {path.name: path.read_bytes() for path in exported.iterdir()})
    assert evaluate.main(["--model=us/digits", f"--out={tmp_path / 'hub'}", *flags_of_the_run(config)]) == 0
    assert json.loads((tmp_path / "hub" / "evaluation.json").read_text())["model"] == f"us/digits@{commit}"
    assert completions(tmp_path / "hub") == completions(tmp_path / "out")


def test_a_run_against_the_model_that_it_became_differs_in_nothing(trained, exported, tmp_path, capsys):
    """The model gets the prompts of the run. A difference that is 0 for all prompts has no interval."""
    record = command(trained[1], tmp_path, f"--against={exported}", "--config.eval.verdict=accuracy")
    found = record["against"]["differences"]
    assert found.pop("prompts") == 7 and set(found) == {
        "accuracy",
        "pass@1",
        "pass@2",
        "pass@3",
        "maj@1",
        "maj@2",
        "maj@3",
    }
    assert all((x["difference"], x["low"], x["high"]) == (0, None, None) for x in found.values())
    assert 0 < found["accuracy"]["this"] == found["accuracy"]["other"] < 1
    # The other side can be a work directory, here a copy of the run after its first step.
    again = command(trained[1], tmp_path / "runs", f"--against={trained[2]}", "--checkpoint=151")["against"]
    assert again["differences"]["best_of_3_accuracy"]["difference"] == 0


def test_a_model_with_a_chat_template_is_asked_in_a_chat_and_for_a_box(trained, exported, tmp_path):
    chat = tmp_path / "chat"
    shutil.copytree(exported, chat)
    (chat / "chat_template.jinja").write_text("{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}")
    rows, prompts = trained[0].data.train, {}
    for name, model, flags in (("chat", chat, []), ("plain", exported, []), ("no", chat, ["--config.data.chat=false"])):
        flags = [f"--model={model}", f"--out={tmp_path / name}out", f"--data={rows}", "--prompts=1", *flags]
        assert evaluate.main([*flags, "--max_completion_length=2", "--samples=1"]) == 0
        prompts[name] = completions(tmp_path / f"{name}out")[0]["prompt"]
    asked = "0\nPlease reason step by step, and put your final answer within \\boxed{}."
    assert prompts == {"chat": f"<user>{asked}", "plain": asked, "no": asked}


def test_a_policy_is_opened_from_python(trained, exported):
    """The run and its export give the same tokens by the function that other commands use."""
    fields = {"max_completion_length": "6", "eval.samples": "2", "data.chat": "false"}
    rollouts = []
    for source in (trained[1], str(exported)):
        opened = policies.open_policy(source, fields)
        policy = opened.load()
        ids = np.array([opened.tokenizer.encode("7\n")] * 4)
        batch = data.PromptBatch(ids, np.ones_like(ids, bool), np.arange(4), np.ones(4, np.float32), [{}] * 4)
        rollouts.append(policy.programs.generate_eval(policy.weights, batch))
        assert policy.programs.model.attention != "auto" and opened.model.vocab_size == opened.tokenizer.vocab_size
    np.testing.assert_array_equal(rollouts[0].tokens, rollouts[1].tokens)
    assert (
        rollouts[0].tokens.shape == (4, 2, 6) and opened.name == "model" and opened.config.eval.prompts == policies.ALL
    )


@pytest.mark.parametrize(
    "flags, said",
    [
        (["--out=o", "--data=d.jsonl", "--workdir=w"], "--workdir and --model both name a policy"),
        (["--data=d.jsonl"], "--out=DIR is missing"),
        (["--out=o"], "--data=NAME_OR_PATH or --sets is missing"),
        (["--out=o", "--data=d.jsonl", "--checkpoint=3"], "--checkpoint chooses a checkpoint of a run"),
        (["--out=o", "--data=d.jsonl", "--config.model.path=x"], "names a second model"),
        (["--out=o", "--data=d.jsonl", "--config.model.width=3"], "has its own"),
        (["--out=o", "--data=none.jsonl"], "none.jsonl"),
    ],
)
def test_flags_that_do_not_fit_a_model(flags, said, exported, capsys):
    assert said in refusal(capsys, f"--model={exported}", *flags)


def test_a_work_directory_or_nothing_as_a_model(trained, tmp_path, capsys):
    rest = [f"--out={tmp_path}", "--data=d.jsonl"]
    assert "export it first" in refusal(capsys, f"--model={trained[1]}", *rest)
    assert "There is no nowhere" in refusal(capsys, "--model=nowhere", *rest)


# -- refusals --------------------------------------------------------------------------------------


def refusal(capsys, *flags, code=2) -> str:
    capsys.readouterr()
    assert evaluate.main(list(flags)) == code
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ") and captured.err.count("\n") == 1, captured.err
    assert "Traceback" not in captured.err
    return captured.err


@pytest.mark.parametrize(
    "flags, names",
    [
        (["--sample=3"], ["'--sample'", "'--samples'"]),
        (["--config.eval.sample=3"], ["'sample'", "'samples'"]),
        (["--samples"], ["--samples needs a value"]),
        (["--samples=many"], ["eval.samples=many", "an int"]),
        (["--samples=0"], ["eval.samples is 0", "at least 1"]),
        (["--prompts=0"], ["eval.prompts is 0"]),
        (["--prompts", "--samples=3"], ["--prompts needs a value"]),
        (["--temperature=-1"], ["eval.temperature is -1.0"]),
        (["--checkpoint=7"], ["no checkpoint 7", "it has 152, 151, 150"]),
        (["--checkpoint=last"], ["--checkpoint=last", "number"]),
        (["--data=word_problem"], ["'word_problem'", "word_problems"]),
        (["--data="], ["--data=: expected a name"]),
        (["--data=nothing.jsonl"], ["nothing.jsonl"]),
        (["--split=test"], ["'test'", "rows.jsonl"]),
        (["--split=[:0]"], ["[:0]", "none"]),
        (["--config.model.width=32"], ["152", "other shapes"]),
        (["--config.model.layers=2"], ["152", "other shapes"]),
        (["--config.mesh.data=3"], ["mesh.data=3", "1"]),
        (["--config.reward.functions=acuracy", "--config.reward.weights=[]"], ["acuracy", "'accuracy'"]),
    ],
    ids=str,
)
def test_a_wrong_flag_is_one_sentence(flags, names, trained, tmp_path, capsys):
    error = refusal(capsys, f"--workdir={trained[1]}", f"--out={tmp_path / 'out'}", *flags)
    assert all(name in error for name in names), error
    assert not (tmp_path / "out").exists()


def test_a_reward_that_fails_is_one_sentence(trained, rewards, tmp_path, capsys):
    flags = [f"--workdir={trained[1]}", f"--config.reward.functions={rewards}:broken", "--config.reward.weights=1"]
    error = refusal(capsys, *flags, f"--out={tmp_path}", code=1)  # the error comes while the command runs
    assert "'broken'" in error and "nothing works" in error and not list(tmp_path.iterdir())


def test_references_that_no_completion_can_equal_are_refused_by_line(trained, tmp_path, capsys):
    rows = write_rows(tmp_path / "rows.jsonl", [DIGITS[0], *({**row, "answer": "many"} for row in DIGITS[1:4])])
    assert evaluate.main([f"--workdir={trained[1]}", f"--data={rows}", f"--out={tmp_path / 'out'}"]) == 2
    error = capsys.readouterr().err
    assert "error: Reward 'accuracy' cannot judge 3 of 4 rows" in error
    assert f"{rows}, line 2: The reference answer 'many'" in error
    assert not (tmp_path / "out").exists()


def test_an_output_directory_that_is_a_file(trained, tmp_path, capsys):
    (tmp_path / "file").write_text("kept")
    assert "is a file" in refusal(capsys, f"--workdir={trained[1]}", f"--out={tmp_path / 'file'}")
    assert (tmp_path / "file").read_text() == "kept"


def test_empty_data_are_one_sentence(trained, tmp_path, capsys):
    (tmp_path / "empty.jsonl").write_text("")
    error = refusal(capsys, f"--workdir={trained[1]}", f"--data={tmp_path / 'empty.jsonl'}")
    assert "empty.jsonl" in error and "empty" in error


def test_a_directory_without_a_run_or_without_a_checkpoint(trained, tmp_path, capsys):
    assert "no such directory" in refusal(capsys, f"--workdir={tmp_path / 'nowhere'}")
    assert not (tmp_path / "nowhere").exists()
    assert "no config.json" in refusal(capsys, f"--workdir={tmp_path}")
    assert "--workdir=DIR is missing" in refusal(capsys, "--samples=2")
    train.setup(tiny(write_rows(tmp_path / "rows.jsonl")), tmp_path / "begun")
    assert "no checkpoint yet" in refusal(capsys, f"--workdir={tmp_path / 'begun'}")
    # Before the first completion of the other side.
    flags = [f"--workdir={trained[1]}", f"--out={tmp_path / 'out'}", f"--against={tmp_path / 'begun'}"]
    assert "no checkpoint yet" in refusal(capsys, *flags) and not (tmp_path / "out").exists()
    assert not (tmp_path / "begun" / "checkpoints").exists()


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"config": 3}', '{"config": {"model": 3}}', '{"config": {"stepz": 3}}']
)
def test_a_damaged_configuration_is_one_sentence(text, tmp_path, capsys):
    (tmp_path / "config.json").write_text(text)
    error = refusal(capsys, f"--workdir={tmp_path}")
    assert "config.json" in error or "'stepz'" in error


@pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning"
)  # the reader does not remove its callbacks
def test_a_damaged_checkpoint_is_skipped_unless_the_flag_names_it(trained, tmp_path, capsys, caplog):
    workdir, newest = tmp_path / "run", tmp_path / "run" / "checkpoints" / "152"
    shutil.copytree(trained[1], workdir)
    for file in newest.rglob("d/*"):
        file.write_bytes(file.read_bytes()[:10])
    before = contents(workdir)
    assert command(workdir, tmp_path / "out")["checkpoint"] == 151
    assert any(str(newest) in record.getMessage() for record in caplog.records)
    error = refusal(capsys, f"--workdir={workdir}", "--checkpoint=152")
    assert re.fullmatch(
        rf"error: Checkpoint {newest} cannot be read: .*{newest}/default/\S+ is missing or damaged\. "
        r"Choose another one: --checkpoint=151 or 150\.\n",
        error,
    )
    assert contents(workdir) == before


@pytest.mark.parametrize("part", ["default", "default/_METADATA", "default/manifest.ocdbt", "default/d"])
def test_a_checkpoint_that_was_half_removed_is_not_offered(part, trained, tmp_path, capsys):
    workdir, oldest = tmp_path / "run", tmp_path / "run" / "checkpoints" / "150"
    shutil.copytree(trained[1], workdir)
    shutil.rmtree(oldest / part) if (oldest / part).is_dir() else (oldest / part).unlink()
    error = refusal(capsys, f"--workdir={workdir}", "--checkpoint=150")
    assert error == f"error: The run in {workdir} has only a part of checkpoint 150; it has 152, 151.\n"


def test_help_names_every_flag(capsys):
    assert evaluate.main(["--help"]) == 0
    text = capsys.readouterr().out
    for flag in (f"--{flag.name}" for flag in evaluate.COMMAND.flags if not flag.name.endswith(".")):
        assert re.search(rf"^  {flag}=", text, re.MULTILINE), flag


def test_the_process_exits_with_the_code_and_without_a_traceback(tmp_path):
    arguments = [sys.executable, "-m", "jaxrl_reason.evaluate", f"--workdir={tmp_path}"]
    process = subprocess.run(arguments, capture_output=True, text=True, env=os.environ | {"JAX_PLATFORMS": "cpu"})
    assert process.returncode == 2 and process.stderr.startswith("error: ") and process.stderr.count("\n") == 1
    assert not process.stdout

"""The figures against numbers worked by hand, and the command on tiny runs: what it writes, refuses and leaves alone."""

from fractions import Fraction
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

from helpers.tiny_runs import tiny, write_rows
from jaxrl_reason import config as config_lib
from jaxrl_reason import evaluate, methods, runs, train
from jaxrl_reason.metrics import pass_at_k
from jaxrl_reason.rewards.numeric import extract_answer, numeric_verdict, parse_number
from jaxrl_reason.runs import checkpoints, read_metrics
from jaxrl_reason.tasks import evaluation

pytestmark = pytest.mark.usefixtures("quick_compilation")

DIGITS = [{"question": str(i), "solution": f"#### {i % 10}", "answer": str(i % 10)} for i in range(20)]


def found(right, **fields) -> evaluation.Evaluated:
    """An evaluation of these verdicts; every other field has some value of the right shape."""
    right = np.array(right, bool)
    N, K = right.shape
    defaults = dict(
        rows=[{}] * N,
        numbers=np.arange(N),
        right=right,
        lengths=np.ones((N, K), int),
        truncated=np.zeros((N, K), bool),
        logprobs=np.zeros((N, K), np.float32),
        rewards={"accuracy": right.astype(np.float32)},
        total=right.astype(np.float32),
        texts=[[""] * K] * N,
        answers=[[None] * K] * N,
    )
    return evaluation.Evaluated(**defaults | fields)


# -- figures ---------------------------------------------------------------------------------------


def test_figures_by_hand():
    three, four, seven = map(Fraction, (3, 4, 7))
    figures = evaluation.figures(
        found(
            [[1, 0, 1, 0], [0, 1, 0, 0], [0, 0, 0, 0]],
            answers=[[three, four, three, None], [None, seven, "x", "x"], [three, four, four, three]],
            texts=[["a", "b", "c", "d"], ["a", "b", "c", "c"], ["a", "a", "a", "a"]],
            lengths=np.array([[1, 2, 3, 4], [5, 5, 6, 6], [2, 2, 2, 10]]),
            truncated=np.array([[0, 0, 0, 1], [0, 0, 0, 0], [0, 0, 0, 1]], bool),
            logprobs=np.array([[-1, -2, -3, -4], [-1, -1, -1, -1], [-2, -2, -2, -3]], np.float32),
            total=np.array([[1, np.nan, 0, 2], [1, 1, 1, 1], [0, 0, 0, np.nan]], np.float32),
        ),
        temperature=1.0,
    )
    expected = {
        "accuracy": 3 / 12,
        "avg@4": 3 / 12,
        "pass@1": 3 / 12,
        "pass@2": (5 / 6 + 3 / 6) / 3,  # of the six pairs one, three and six are all wrong
        "pass@4": 2 / 3,
        "maj@1": 1 / 3,  # three; nobody; three, which is wrong there
        "maj@2": 2 / 3,  # three before four; seven; three before four
        "maj@4": 1 / 3,  # three; x; three before four
        "reward": 7 / 10,
        "rewards/accuracy": 3 / 12,
        "mean_length": 48 / 12,
        "mean_length_right": (1 + 3 + 5) / 3,
        "mean_length_wrong": (48 - 9) / 9,
        "clipped_ratio": 2 / 12,
        "answered_ratio": 10 / 12,
        "entropy": 23 / 48,
        "prompts": 3,
        "distinct_right_answers": (1 + 1 + 0) / 3,
        "distinct_right_completions": (2 + 1 + 0) / 3,
        # The mean of three draws of 1/2, 1/4, 0 is 0 in 1 of 27 cases, and 1/2 in as many.
        "accuracy_low": 0.0,
        "accuracy_high": 0.5,
    }
    assert figures == {name: pytest.approx(value) for name, value in expected.items()}


def test_where_nothing_can_be_averaged_there_is_nan():
    figures = evaluation.figures(found([[0, 0]], total=np.full((1, 2), np.nan, np.float32)), temperature=0.0)
    assert math.isnan(figures["mean_length_right"]) and math.isnan(figures["reward"])
    assert figures["mean_length_wrong"] == 1 and figures["maj@2"] == 0 and figures["accuracy_high"] == 0
    assert "entropy" not in figures  # a greedy law has none
    assert math.isnan(evaluation.figures(found([[1, 1]]), temperature=1.0)["mean_length_wrong"])


@pytest.mark.parametrize("samples, ks", [(1, [1]), (2, [1, 2]), (6, [1, 2, 4, 6]), (8, [1, 2, 4, 8])])
def test_curves_run_over_powers_of_two_to_the_last_sample(samples, ks):
    figures = evaluation.figures(found([[1] * samples]), temperature=1.0)
    for kind in ("pass", "maj"):
        assert [name for name in figures if name.startswith(kind)] == [f"{kind}@{k}" for k in ks]


def test_the_majority_is_judged_by_the_first_that_gave_its_answer():
    """Equal answers, unequal verdicts: a reward may ask for more than the answer."""
    figures = evaluation.figures(found([[0, 1], [1, 0]], answers=[["a", "a"], ["a", "a"]]), temperature=1.0)
    assert figures["maj@2"] == 0.5


def test_human_values():
    """The values .1 .. .5 out of order: H-Acc (.2 + 1 * .5 + .5 * .1) / 1.5 where every sample counts half."""
    values = np.array([0.2, 0.5, 0.4, 0.1, 0.3])
    right = [[1, 1], [1, 1], [0, 0], [0, 1], [0, 0]]
    lengths = np.array([[2, 2], [4, 6], [8, 8], [1, 1], [3, 5]])
    metrics = evaluation.method_metrics(found(right, values=values, lengths=lengths, texts=None, answers=None))
    assert metrics == {
        "h_accuracy": pytest.approx(0.75 / 1.5),
        "value_density": pytest.approx(50 / 4),
        "high_value_accuracy": 1.0,
        "low_value_accuracy": pytest.approx(0.5),
        **{f"mean_length_value_fifth_{i}": pytest.approx(x) for i, x in enumerate((1, 2, 4, 8, 5), start=1)},
    }


@pytest.mark.parametrize(
    "texts, same",
    [
        (["#### 3/4", "so #### 0.75", r"\boxed{\frac{3}{4}}", "#### 75%"], True),
        (["#### 3/4", "#### 0.7"], False),
        (["#### x + 1", r"\boxed{x + 1}"], True),
        (["#### x + 1", "#### x + 2"], False),
    ],
)
def test_answers_vote_together_where_they_are_the_same(texts, same):
    assert (len({evaluation.final_answer(text, {}) for text in texts}) == 1) == same


@pytest.mark.parametrize("text", ["", "18", "####", r"\boxed{1", "the answer is 3"])
def test_without_a_marked_answer_there_is_no_vote(text):
    assert evaluation.final_answer(text, {}) is None


# -- the command on a run --------------------------------------------------------------------------


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
    """A run that is right now and then: (configuration, work directory, a copy of it from half way)."""
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
    """Runs the command line to its end; evaluation.json."""
    assert evaluate.main([f"--workdir={workdir}", f"--out={out}", *flags]) == 0
    return json.loads((out / "evaluation.json").read_text())


def completions(out) -> list[dict]:
    return [json.loads(line) for line in open(out / "completions.jsonl", encoding="utf-8")]


def contents(directory) -> dict:
    """Every file and folder below, with what it holds and when it was written."""
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
    assert 0 < last["eval/accuracy"] < 1  # or nothing below shows anything
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
    for text in ("pass@k", "maj@k", "95 % interval", "mean length right", "RL step 2", "avg@3", "answered ratio"):
        assert text in out


def test_every_number_follows_from_the_completions(trained, tmp_path):
    """All figures again, in plain Python, from completions.jsonl alone."""
    record = command(trained[1], tmp_path, "--samples=5", "--split=[4:]", "--prompts=20", "--temperature=1.5")
    lines, numbers = completions(tmp_path), record["metrics"]
    assert record["data"]["split"] == "[4:]" and record["prompts"] == 16  # all there are
    assert [(line["row"], line["sample"]) for line in lines] == [(n, k) for n in range(16) for k in range(5)]
    for line in lines:
        row = DIGITS[line["row"] + 4]
        assert line["prompt"] == row["question"] + "\n"
        assert line["right"] == numeric_verdict(line["completion"], row["answer"])
        assert line["rewards"]["accuracy"] == line["right"]
        picky = None if row["answer"] == "3" else pytest.approx(len(line["completion"]) / 100)
        assert line["rewards"]["picky"] == picky
        assert line["total"] == pytest.approx(line["right"] + 0.25 * (line["rewards"]["picky"] or 0))
        text = extract_answer(line["completion"])
        number = text and parse_number(text)
        assert line["answer"] == (str(number) if number is not None else text)
        assert line["truncated"] <= (line["length"] == 6)
    mean = lambda values: pytest.approx(sum(values) / len(values))
    groups = [lines[i : i + 5] for i in range(0, 80, 5)]
    assert numbers["accuracy"] == numbers["avg@5"] == mean([line["right"] for line in lines])
    assert 0 < numbers["accuracy"] < 1
    assert numbers["accuracy_low"] < numbers["accuracy"] < numbers["accuracy_high"]
    for k in (1, 2, 4, 5):
        right = [sum(line["right"] for line in group) for group in groups]
        assert numbers[f"pass@{k}"] == mean([pass_at_k(5, c, k) for c in right])
        majority = []
        for group in groups:
            votes = [line["answer"] for line in group[:k] if line["answer"] is not None]
            most = max(votes, key=lambda answer: (votes.count(answer), -votes.index(answer)), default=None)
            majority.append(any(line["right"] for line in group[:k] if line["answer"] == most is not None))
        assert numbers[f"maj@{k}"] == mean(majority)
    assert numbers["mean_length_right"] == mean([line["length"] for line in lines if line["right"]])
    assert numbers["mean_length_wrong"] == mean([line["length"] for line in lines if not line["right"]])
    assert numbers["clipped_ratio"] == mean([line["truncated"] for line in lines])
    assert numbers["answered_ratio"] == mean([line["answer"] is not None for line in lines])
    assert numbers["reward"] == mean([line["total"] for line in lines])
    kept = [line["rewards"]["picky"] for line in lines if line["rewards"]["picky"] is not None]
    assert len(kept) == 75 and numbers["rewards/picky"] == mean(kept)
    distinct = [len({line["completion"] for line in group if line["right"]}) for group in groups]
    assert numbers["distinct_right_completions"] == mean(distinct)
    assert 0 < numbers["entropy"] < math.log(300)


@pytest.mark.slow
def test_a_run_of_an_estimator_of_ones_own(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(methods.registry, "_ESTIMATORS", dict(methods.registry._ESTIMATORS))
    rows = write_rows(tmp_path / "rows.jsonl", DIGITS)
    (tmp_path / "recipe.py").write_text(
        "from jaxrl_reason.advantages import center_by_group\nfrom jaxrl_reason.methods import Method, PolicyLoss, register\n"
        "@register\ndef centered():\n    return Method(center_by_group(), PolicyLoss())\n"
    )
    config_lib.load_module(tmp_path / "recipe.py")
    train.train(train.setup(tiny(rows, steps=1, method={"name": "centered"}), tmp_path / "run"))
    methods.registry._ESTIMATORS.pop("centered")  # as in another process
    assert evaluate.main([f"--workdir={tmp_path / 'run'}"]) == 2
    assert "'centered'" in capsys.readouterr().err
    assert evaluate.main([f"--workdir={tmp_path / 'run'}", f"--config={tmp_path / 'recipe.py'}"]) == 0


def test_fewer_samples_are_the_first_ones_and_again_is_the_same(trained, tmp_path):
    first = command(trained[1], tmp_path)
    files = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert command(trained[1], tmp_path) == first and first["checkpoint"] == 152
    assert files == {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    texts = [line["completion"] for line in completions(tmp_path) if line["sample"] < 2]
    command(trained[1], tmp_path, "--samples=2")
    assert texts == [line["completion"] for line in completions(tmp_path)] and len(set(texts)) > 2


@pytest.mark.slow
def test_an_older_checkpoint_and_greedy_completions(trained, tmp_path):
    record = command(trained[1], tmp_path, "--temperature", "0", "--checkpoint", "150")
    assert record["checkpoint"] == 150 and record["phase"] == "RL step 0"
    assert record["samples"] == 1 and record["temperature"] == 0 and "entropy" not in record["metrics"]
    assert len(completions(tmp_path)) == 7
    other = command(trained[1], tmp_path, "--temperature=0", "--checkpoint=151", "--samples=2", "--config.seed=1")
    texts = [line["completion"] for line in completions(tmp_path)]
    assert other["phase"] == "RL step 1" and other["seed"] == 1 and texts[::2] == texts[1::2]


def test_other_data_with_human_values(trained, tmp_path):
    rows = write_rows(tmp_path / "exam.jsonl", [row | {"value": (i + 1) / 10} for i, row in enumerate(DIGITS[:5])])
    record = command(trained[1], tmp_path / "out", f"--data={rows}", "--samples=8")
    assert record["data"]["name"] == str(rows) and record["data"]["split"] == "all" and record["prompts"] == 5
    lines = completions(tmp_path / "out")
    share = [np.mean([line["right"] for line in lines if line["row"] == n]) for n in range(5)]
    earned = sum((n + 1) * share[n] for n in range(5)) / 15
    assert record["metrics"]["h_accuracy"] == pytest.approx(earned) and earned > 0
    assert record["metrics"]["low_value_accuracy"] == pytest.approx(share[0])

    # Points of an exam are values too: the exam's total is that of all its rows, evaluated or not.
    rows = write_rows(
        tmp_path / "points.jsonl", [row | {"points": str(i + 1), "exam": "a"} for i, row in enumerate(DIGITS[:5])]
    )
    again = command(trained[1], tmp_path / "out", f"--data={rows}", "--samples=8")
    assert again["metrics"]["h_accuracy"] == pytest.approx(earned)


def test_values_stay_with_their_questions_where_a_row_is_left_out(trained, tmp_path):
    long = {"question": "too long a question", "solution": "#### 1", "answer": "1", "value": 1.0}
    given = [long] + [row | {"value": (i + 1) / 10} for i, row in enumerate(DIGITS[:5])]
    rows = write_rows(tmp_path / "exam.jsonl", given)
    flags = [f"--data={rows}", "--samples=8", "--config.data.on_long_prompt=skip"]
    record = command(trained[1], tmp_path / "out", *flags)
    lines = completions(tmp_path / "out")
    assert {line["row"] for line in lines} == {1, 2, 3, 4, 5}
    earned = sum(given[line["row"]]["value"] * line["right"] for line in lines) / 8 / 1.5
    assert record["metrics"]["h_accuracy"] == pytest.approx(earned) and earned > 0


@pytest.mark.slow
def test_the_temperature_of_evaluation_leaves_the_self_rewards_on_their_scale(trained, tmp_path):
    """One completion, whatever sampled it, has one self-reward."""
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


@pytest.mark.slow
def test_a_learned_reward_and_a_verdict_of_its_own(tmp_path, rewards, capsys):
    """The run's reward model scores again as it did in training."""
    pairs = [row | {"chosen": row["solution"], "rejected": "#### 11"} for row in DIGITS]
    config = tiny(
        write_rows(tmp_path / "rows.jsonl", pairs),
        eval__every=1,
        reward__functions=["accuracy", "reward_model", f"{rewards}:even"],
        reward_model__steps=2,
        reward_model__batch_size=4,
        max_completion_length=8,
    )
    train.train(train.setup(config, tmp_path / "run"))
    record = command(tmp_path / "run", tmp_path / "out")
    assert record["verdict"] == "accuracy"
    last = read_metrics(tmp_path / "run" / "metrics.jsonl")[-1]
    names = [name.removeprefix("eval/") for name in last if name.startswith("eval/")]
    assert {name: record["metrics"][name] for name in names} == {n: pytest.approx(last[f"eval/{n}"]) for n in names}
    assert len({line["rewards"]["reward_model"] for line in completions(tmp_path / "out")}) > 1
    record = command(tmp_path / "run", tmp_path / "out", f"--config.eval.verdict={rewards}:even", "--samples=8")
    lines = completions(tmp_path / "out")
    assert record["verdict"] == "even" and 0 < record["metrics"]["accuracy"] < 1
    assert all(line["right"] == line["rewards"]["even"] == (len(line["completion"]) % 2 == 0) for line in lines)
    (tmp_path / "run" / "reward_model" / "reward_model.json").unlink()
    assert "no trained reward model" in refusal(capsys, f"--workdir={tmp_path / 'run'}")


@pytest.mark.slow
def test_four_devices_find_the_same(trained, tmp_path, shared_programs):
    record = command(trained[1], tmp_path / "one")
    env = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
    env |= {name.upper(): str(value) for name, value in shared_programs.items()}
    mesh = ["--config.mesh.data=2", "--config.mesh.fsdp=2"]
    arguments = [f"--workdir={trained[1]}", f"--out={tmp_path / 'four'}", *mesh]
    result = subprocess.run(
        [sys.executable, "-m", "jaxrl_reason.evaluate", *arguments], env=env, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr[-2000:]
    exact = lambda out: [{k: v for k, v in line.items() if k != "self_reward"} for line in completions(out)]
    assert exact(tmp_path / "one") == exact(tmp_path / "four")
    other = json.loads((tmp_path / "four" / "evaluation.json").read_text())
    assert other["metrics"] == {name: pytest.approx(value, rel=1e-4) for name, value in record["metrics"].items()}


# -- refusals --------------------------------------------------------------------------------------


def refusal(capsys, *flags) -> str:
    capsys.readouterr()
    assert evaluate.main(list(flags)) == 2
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
def test_what_cannot_be_evaluated_is_one_sentence(flags, names, trained, tmp_path, capsys):
    error = refusal(capsys, f"--workdir={trained[1]}", f"--out={tmp_path / 'out'}", *flags)
    assert all(name in error for name in names), error
    assert not (tmp_path / "out").exists()


def test_a_reward_that_fails_is_one_sentence(trained, rewards, tmp_path, capsys):
    flags = [f"--workdir={trained[1]}", f"--config.reward.functions={rewards}:broken", "--config.reward.weights=1"]
    error = refusal(capsys, *flags, f"--out={tmp_path}")
    assert "'broken'" in error and "nothing works" in error and not list(tmp_path.iterdir())


def test_a_place_for_the_results_that_is_a_file(trained, tmp_path, capsys):
    (tmp_path / "file").write_text("kept")
    assert "is a file" in refusal(capsys, f"--workdir={trained[1]}", f"--out={tmp_path / 'file'}")
    assert (tmp_path / "file").read_text() == "kept"


def test_empty_data_are_one_sentence(trained, tmp_path, capsys):
    (tmp_path / "empty.jsonl").write_text("")
    error = refusal(capsys, f"--workdir={trained[1]}", f"--data={tmp_path / 'empty.jsonl'}")
    assert "empty.jsonl" in error and "empty" in error


def test_a_directory_without_a_run_or_without_a_checkpoint(tmp_path, capsys):
    assert "no such directory" in refusal(capsys, f"--workdir={tmp_path / 'nowhere'}")
    assert not (tmp_path / "nowhere").exists()
    assert "no config.json" in refusal(capsys, f"--workdir={tmp_path}")
    assert "--workdir=DIR is missing" in refusal(capsys, "--samples=2")
    train.setup(tiny(write_rows(tmp_path / "rows.jsonl")), tmp_path / "begun")
    assert "no checkpoint yet" in refusal(capsys, f"--workdir={tmp_path / 'begun'}")
    assert not (tmp_path / "begun" / "checkpoints").exists()


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"config": 3}', '{"config": {"model": 3}}', '{"config": {"stepz": 3}}']
)
def test_a_configuration_that_no_run_wrote(text, tmp_path, capsys):
    (tmp_path / "config.json").write_text(text)
    error = refusal(capsys, f"--workdir={tmp_path}")
    assert "config.json" in error or "'stepz'" in error


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # the reader leaves callbacks behind
def test_a_damaged_checkpoint_is_passed_over_unless_it_is_asked_for(trained, tmp_path, capsys, caplog):
    workdir, newest = tmp_path / "run", tmp_path / "run" / "checkpoints" / "152"
    shutil.copytree(trained[1], workdir)
    for file in newest.rglob("d/*"):
        file.write_bytes(file.read_bytes()[:10])
    before = contents(workdir)
    assert command(workdir, tmp_path / "out")["checkpoint"] == 151
    assert any(str(newest) in record.getMessage() for record in caplog.records)
    assert str(newest) in refusal(capsys, f"--workdir={workdir}", "--checkpoint=152")
    assert contents(workdir) == before


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

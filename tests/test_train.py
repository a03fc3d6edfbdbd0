"""Tests small whole runs: their files, every method, learning, resuming after a kill, devices and refusals."""

import contextlib
import dataclasses
import gc
import json
import os
import pathlib
import random
import re
import shutil
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from helpers.report_runs import content_of
from helpers.tiny_runs import change, ROWS, tiny, with_program, write_rows
from jaxrl_reason import data, methods, train
from jaxrl_reason.advantages import AdvantageTransform, chain
from jaxrl_reason.config import ConfigError, to_dict
from jaxrl_reason.methods import Method, PolicyLoss
from jaxrl_reason.rewards import RewardError
from jaxrl_reason.runs import checkpoints, eval_settings, loop, read_metrics
from jaxrl_reason.runs.progress import Clock
from jaxrl_reason.tasks import summary

pytestmark = [pytest.mark.runs, pytest.mark.usefixtures("quick_compilation")]

# First the metrics that TRL has, under TRL's names, and then our own.
STEP_METRICS = [
    "reward",
    "reward_std",
    "rewards/accuracy/mean",
    "rewards/accuracy/std",
    "frac_reward_zero_std",
    "completions/mean_length",
    "completions/min_length",
    "completions/max_length",
    "completions/clipped_ratio",
    "entropy",
    "clip_ratio/region_mean",
    "clip_ratio/low_mean",
    "clip_ratio/high_mean",
    "grad_norm",
    "learning_rate",
    "loss",
    "frac_advantage_zero",
    "sampling/logp_difference_max",
    "perf/rollout_tokens_per_s",
    "perf/update_tokens_per_s",
    "perf/step_seconds",
    "perf/step_seconds/rollout",
    "perf/step_seconds/reward",
    "perf/step_seconds/update",
]
EVAL_METRICS = [
    "eval/accuracy",
    "eval/pass@2",
    "eval/mean_length",
    "eval/clipped_ratio",
    "eval/maj@2",
    "eval/distinct_correct_answers",
    "eval/distinct_correct_completions",
    "eval/entropy",
    "eval/prompts",
]
MAY_BE_UNKNOWN = {"completions/mean_terminated_length"}  # if no completion ended


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    return write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl")


@pytest.fixture(scope="module")
def rewards(tmp_path_factory):
    """Writes a file of host rewards and returns its path."""
    path = tmp_path_factory.mktemp("rewards") / "rewards.py"
    path.write_text('''"""Rewards for tests."""
import time

def row_id(row, **_):
    return [float(r) for r in row]

def by_text(prompts, completions, question, row, **_):
    """A number that mixes the row and the completion, and a check that prompts and columns come together."""
    assert all(p == q + "\\n" and q == f"Write {r}." for p, q, r in zip(prompts, question, row))
    return [r * 1000 + sum(map(ord, c)) % 1000 for r, c in zip(row, completions)]

def spread(completion_ids, **_):
    """Never the same for two different completions; a while, so that a run lasts long enough to be killed."""
    time.sleep(0.03)
    return [sum((i + 1) * token for i, token in enumerate(ids)) % 1009 / 1009 for ids in completion_ids]

def even(completion_ids, **_):
    return [float(ids[0] % 2) for ids in completion_ids]

def zero(completions, **_):
    return [0.0] * len(completions)

def raises(completions, **_):
    raise KeyError("nothing works")

def raises_on_row_three(completions, row, **_):
    if 3 in row:
        raise ValueError("three")
    return [1.0] * len(completions)

def hinted(completions, hint, **_):
    return [1.0] * len(completions)

def too_short(completions, **_):
    return [1.0] * (len(completions) - 1)
''')
    return path


def metrics_of(workdir, *, perf=False):
    """Returns the lines of metrics.jsonl, without the timings unless `perf` is true."""
    keep = lambda name: perf or not name.startswith("perf/")
    return [{k: v for k, v in line.items() if keep(k)} for line in read_metrics(workdir / "metrics.jsonl")]


def samples_of(workdir):
    return [json.loads(line) for line in open(workdir / "samples.jsonl")]


def run(config, workdir):
    """Trains to the end and returns the lines of metrics.jsonl."""
    train.train(train.setup(config, workdir))
    return metrics_of(workdir)


def final_state(config, workdir):
    """Returns the number of the newest checkpoint, and its state as numpy arrays."""
    prepared = train.setup(config, workdir)
    saver = checkpoints.Checkpoints(workdir / "checkpoints", config.checkpoint.keep)
    number, state = saver.restore(prepared.programs.init())
    saver.close()
    return number, jax.tree.map(np.asarray, state)


def assert_finite(lines):
    for line in lines:
        unknown = {name for name, value in line.items() if value is None or not np.isfinite(value)}
        assert unknown <= MAY_BE_UNKNOWN, (line["step"], unknown)


def assert_close(lines, others, tolerance):
    assert [sorted(line) for line in lines] == [sorted(line) for line in others]
    for line, other in zip(lines, others):
        for name in line:
            if line[name] is None or other[name] is None:
                assert line[name] == other[name], name
            else:
                assert abs(line[name] - other[name]) <= tolerance * max(1, abs(line[name])), (
                    line["step"],
                    name,
                    line[name],
                    other[name],
                )


# -- the files of a run ----------------------------------------------------------------------------


def test_a_run_leaves_everything_in_its_work_directory(rows, tmp_path, capsys):
    config = tiny(
        rows,
        steps=3,
        supervised__steps=3,
        checkpoint__every=2,
        checkpoint__keep=2,
        eval__every=2,
        eval__prompts=6,
        log__tensorboard=True,
        log__samples_every=2,
        log__samples=5,
        log__progress=True,
    )
    work = tmp_path / "run"
    result = train.train(train.setup(config, work))
    out = capsys.readouterr().out

    assert json.loads((work / "config.json").read_text())["config"] == json.loads(json.dumps(to_dict(config)))
    lines = metrics_of(work, perf=True)
    assert [line["step"] for line in lines] == [0, 1, 2, 3]
    assert sorted(lines[0]) == sorted(["step", *EVAL_METRICS])
    for line in lines[1:]:
        assert set(STEP_METRICS) <= set(line)
        assert ("eval/accuracy" in line) == (line["step"] in (2, 3))
        assert line["perf/step_seconds"] >= sum(
            line[f"perf/step_seconds/{part}"] for part in ("rollout", "reward", "update")
        )
        assert line["sampling/logp_difference_max"] < 1e-5
    assert_finite(lines)
    assert lines[0]["eval/prompts"] == 6

    # log.samples is 5, and groups of four are written whole.
    assert [(s["step"]) for s in samples_of(work)] == [2] * 8 + [3] * 8
    assert set(samples_of(work)[0]) == {
        "step",
        "prompt",
        "completion",
        "rewards",
        "total",
        "advantage",
        "length",
        "truncated",
        "correct",
        "tokens",
        "logprobs",
    }
    for s in samples_of(work):
        assert "".join(s["tokens"]) == s["completion"] and s["correct"] == (s["rewards"]["accuracy"] > 0.5)
        assert len(s["tokens"]) == len(s["logprobs"]) == s["length"] and all(x <= 0 for x in s["logprobs"])
    held_out = [json.loads(line) for line in open(work / "held_out.jsonl")]
    assert [(s["step"], s["row"], s["sample"]) for s in held_out] == [
        (step, row, sample) for step in (0, 2, 3) for row, sample in ((0, 0), (0, 1), (1, 0), (1, 1), (2, 0))
    ]
    assert len({s["prompt"] for s in held_out}) == 3
    for s in held_out:
        assert "".join(s["tokens"]) == s["completion"] and len(s["tokens"]) == len(s["logprobs"]) == s["length"]
        assert sum(s["logprobs"]) == pytest.approx(s["logprob"], abs=1e-3 * s["length"])
    by_prompt = [json.loads(line) for line in open(work / "held_out_accuracy.jsonl")]
    evaluated = {line["step"]: line["eval/accuracy"] for line in metrics_of(work) if "eval/accuracy" in line}
    assert [(x["step"], len(x["accuracy"])) for x in by_prompt] == [(0, 6), (2, 6), (3, 6)]
    for x in by_prompt:
        assert np.mean(x["accuracy"]) == pytest.approx(evaluated[x["step"]], abs=1e-6)
    page = content_of(work / "report.html")
    assert page["subtitle"] == "grpo, step 3 of 3" and page["fields"]["recipe"] == ""  # it began without a recipe
    assert [found["of"] for found in page["completions"].values()] == [15, 16]
    charts = {curve["name"]: curve["steps"] for chart in page["charts"] for curve in chart["curves"]}
    assert charts["reward"] == charts["perf/host_memory_gib"] == [1, 2, 3] and charts["eval/accuracy"] == [0, 2, 3]
    assert all(re.fullmatch(r"Write \d+\.\n", s["prompt"]) for s in samples_of(work))
    assert [json.loads(x)["step"] for x in open(work / "supervised" / "metrics.jsonl")] == [1, 2, 3]
    assert list((work / "tensorboard").iterdir()) and (work / "learning_curve.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(p.name for p in (work / "checkpoints").iterdir()) == [
        "5",
        "6",
    ]  # three supervised steps, then steps 2 and 3 of RL
    assert (work / "tokenizer" / "tokenizer.json").is_file()
    assert not (work / "start").exists()

    assert (
        result["before"] == {k: lines[0][k] for k in EVAL_METRICS[:-1]}
        and result["after"]["eval/pass@2"] == lines[3]["eval/pass@2"]
    )
    for text in ("supervised 3/3", "RL 3/3", "accuracy", "pass@2", "mean length", "before", "after"):
        assert text in out
    assert f"Learning curve: {work / 'learning_curve.png'}\nReport: {work / 'report.html'}\n" in out


@pytest.mark.slow
def test_word_problems_by_the_quickstart_recipe(data_dir, tmp_path, capsys):
    recipe = pathlib.Path(__file__).parents[1] / "configs" / "quickstart.py"
    flags = [
        "steps=2",
        "supervised.steps=2",
        "supervised.batch_size=8",
        "model.width=16",
        "model.layers=1",
        "model.heads=2",
        "model.kv_heads=1",
        "model.mlp_width=16",
        "prompts_per_step=4",
        "group_size=4",
        "eval.prompts=8",
        "eval.every=0",
        "log.tensorboard=false",
        f"data.data_dir={data_dir}",
        "data.train_split=train[:200]",
    ]
    assert train.main([f"--config={recipe}", f"--workdir={tmp_path}", *(f"--config.{f}" for f in flags)]) == 0
    assert_finite(metrics_of(tmp_path))
    assert "Learning curve" in capsys.readouterr().out


# -- methods ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in methods.names() if "base" not in methods.keywords(name)])
def test_every_estimator_trains(name, rows, rewards, tmp_path):
    lines = run(
        tiny(rows, method={"name": name}, reward__functions=[f"{rewards}:even"], log__samples_every=1), tmp_path / "run"
    )
    assert [line["step"] for line in lines] == [1, 2]
    assert_finite(lines)
    assert all(line["grad_norm"] > 0 and line["skipped_update_ratio"] == 0 for line in lines)
    assert len(samples_of(tmp_path / "run")) == 2 * 8 and all(
        np.isfinite(s["advantage"]) for s in samples_of(tmp_path / "run")
    )


def test_dynamic_sampling_refills_the_batch(rows, rewards, tmp_path):
    """Four random rewards agree in one of eight groups, so some step draws again. Each step finds its four groups."""
    config = tiny(
        rows,
        steps=6,
        method={"name": "dapo"},
        sampling__max_batches=50,
        log__samples_every=1,
        log__samples=16,
        reward__functions=[f"{rewards}:even"],
    )
    lines = run(config, tmp_path / "run")
    assert all(line["dynamic_sampling/groups"] == 4 and line["frac_reward_zero_std"] == 0 for line in lines)
    assert all(0 < line["dynamic_sampling/kept_ratio"] <= 1 for line in lines)
    assert all(0 < line["dynamic_sampling/reward"] < 1 for line in lines)
    assert any(line["dynamic_sampling/reward"] != line["reward"] for line in lines)
    drawn = [line["dynamic_sampling/batches"] for line in lines]
    assert max(drawn) > 1
    samples = samples_of(tmp_path / "run")
    for start in range(0, len(samples), 4):
        group = samples[start : start + 4]
        assert len({s["prompt"] for s in group}) == 1 and {s["total"] for s in group} == {0.0, 1.0}
    _, state = final_state(config, tmp_path / "run")
    assert state.data_position == sum(drawn) and state.step == 6


def test_dynamic_sampling_gives_up_where_no_group_is_mixed(rows, rewards, tmp_path, capsys):
    config = tiny(
        rows,
        method={"name": "dapo"},
        sampling__max_batches=3,
        reward__functions=[f"{rewards}:zero"],
        log__samples_every=1,
    )
    config.log.progress = True
    lines = run(config, tmp_path / "run")
    assert "RL 2/2  reward 0.000" in capsys.readouterr().out
    for line in lines:
        assert line["dynamic_sampling/batches"] == 3 and line["dynamic_sampling/groups"] == 0
        assert 1 <= line["dynamic_sampling/mean_length"] <= 6
        assert line["grad_norm"] == 0 and line["loss"] == 0
        assert line["dynamic_sampling/reward"] == 0 and np.isnan(line["reward"] or np.nan)  # no group was kept
    assert len(lines) == 2


def test_dynamic_sampling_reports_failures_over_all_that_was_drawn(rows, rewards, tmp_path):
    """No group is mixed, so each step draws five batches, an epoch. Of eighty completions, the four of row 3 fail."""
    config = tiny(
        rows,
        method={"name": "dapo"},
        sampling__max_batches=5,
        reward__functions=[f"{rewards}:raises_on_row_three"],
    )
    for line in run(config, tmp_path / "run"):
        assert line["dynamic_sampling/batches"] == 5
        assert line["rewards/raises_on_row_three/error_rate"] == pytest.approx(0.05)
        assert line["rewards/raises_on_row_three/none_rate"] == 0


@pytest.mark.parametrize(
    "options",
    [
        dict(method={"name": "dapo"}, sampling__max_batches=3),
        pytest.param(dict(), marks=pytest.mark.slow),
        pytest.param(dict(method={"name": "remax"}), marks=pytest.mark.slow),
    ],
    ids=["dapo", "grpo", "remax"],
)
def test_sampling_in_parts_changes_no_number(options, rows, rewards, tmp_path):
    options = dict(reward__functions=[f"{rewards}:even", "match_answer"], log__samples_every=1, **options)
    whole = run(tiny(rows, **options), tmp_path / "whole")
    parts = run(tiny(rows, sampling__parts=2, **options), tmp_path / "parts")
    assert_close(whole, parts, 1e-6)
    assert samples_of(tmp_path / "whole") == samples_of(tmp_path / "parts")


def test_a_part_is_scored_while_the_next_is_sampled(rows, rewards, tmp_path, monkeypatch):
    config = tiny(rows, reward__functions=[f"{rewards}:even"], sampling__parts=2, steps=1)
    ready = train.setup(config, tmp_path / "run")
    events = []

    def told(name, function):
        def call(*args):
            events.append(name)
            return function(*args)

        return call

    ready.scorer.begin = told("score", ready.scorer.begin)
    programs = with_program(ready.programs, "rollout", lambda sample: told("sample", sample))
    ready = dataclasses.replace(ready, programs=programs)
    state = programs.init()
    monkeypatch.setattr(jax, "block_until_ready", told("wait", jax.block_until_ready))
    train.collect(ready, state, state.params, Clock())
    # The first score does not wait for the second part.
    assert events[:5] == ["sample", "sample", "score", "wait", "score"]


def test_parts_that_do_not_divide_the_prompts_are_refused(rows, tmp_path):
    with pytest.raises(ConfigError, match=r"config\.sampling\.parts is 3.*\(4\)"):
        train.setup(tiny(rows, sampling__parts=3), tmp_path / "run")


@pytest.mark.parametrize(
    "method, sampled, learnt",
    [("grpo", 16, 16), pytest.param("remax", 20, 16, marks=pytest.mark.slow), ("dapo", 48, 0)],
)
def test_speeds_count_the_tokens_that_were_sampled_and_those_that_were_learnt(
    method, sampled, learnt, rows, rewards, tmp_path
):
    """A batch has 4 x 4 completions of one token. ReMax adds one per prompt. DAPO draws 3 batches and keeps none."""
    config = tiny(
        rows,
        method={"name": method},
        max_completion_length=1,
        sampling__max_batches=3,
        reward__functions=[f"{rewards}:zero"],
    )
    run(config, tmp_path / "run")
    for line in metrics_of(tmp_path / "run", perf=True):
        rollout, update = (
            line[f"perf/{part}_tokens_per_s"] * line[f"perf/step_seconds/{part}"] for part in ("rollout", "update")
        )
        assert (rollout, update) == (pytest.approx(sampled), pytest.approx(learnt))


def test_a_reference_policy_is_kept_and_its_divergence_measured(rows, rewards, tmp_path):
    """The reward and the loss have a KL term. After a resume, the reference is still the policy that RL began with."""
    options = dict(
        method={"name": "reinforce_pp", "kl_coef": 0.1},
        update__kl_coefficient=0.2,
        optimizer__learning_rate=1e-2,
        reward__functions=[f"{rewards}:even"],
        checkpoint__every=1,
    )
    lines = run(tiny(rows, steps=3, **options), tmp_path / "straight")
    assert (tmp_path / "straight" / "start").is_dir()
    assert_finite(lines)
    assert abs(lines[0]["kl"]) < 1e-6 and lines[2]["kl"] > 1e-4
    run(tiny(rows, steps=1, **options), tmp_path / "resumed")
    assert run(tiny(rows, steps=3, **options), tmp_path / "resumed") == lines


def test_rewards_on_the_device_alone(rows, tmp_path):
    lines = run(tiny(rows, reward__functions=["match_answer"], eval__every=1), tmp_path / "run")
    assert_finite(lines)
    assert "rewards/match_answer/mean" in lines[1] and "rewards/match_answer/error_rate" not in lines[1]


def test_device_and_host_rewards_are_added_with_their_weights(rows, rewards, tmp_path):
    config = tiny(
        rows,
        reward__functions=[f"{rewards}:even", "match_answer", "format"],
        reward__weights=[2.0, 1.0, 0.5],
        log__samples_every=1,
        log__samples=16,
    )
    for line in run(config, tmp_path / "run"):
        total = 2 * line["rewards/even/mean"] + line["rewards/match_answer/mean"] + 0.5 * line["rewards/format/mean"]
        assert line["reward"] == pytest.approx(total, abs=1e-6)
    for sample in samples_of(tmp_path / "run"):
        r = sample["rewards"]
        assert sample["total"] == 2 * r["even"] + r["match_answer"] + 0.5 * r["format"]


# -- order -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["dr_grpo", "remax", "dapo"])
def test_rewards_belong_to_their_prompts_and_completions(method, rows, rewards, tmp_path):
    """Host rewards depend on the row and the text. The written samples and the advantages agree with the rewards."""
    config = tiny(
        rows,
        method={"name": method},
        log__samples_every=1,
        log__samples=16,
        sampling__max_batches=30,
        reward__functions=[f"{rewards}:by_text", f"{rewards}:row_id", f"{rewards}:even"],
        reward__weights=[1.0, 0.0, 0.0],
        reward__verdict=f"{rewards}:even",
        reward__max_failure_share=0.0,
    )
    run(config, tmp_path / "run")
    samples = samples_of(tmp_path / "run")
    assert len(samples) == 2 * 16
    for sample in samples:
        row = int(re.fullmatch(r"Write (\d+)\.\n", sample["prompt"])[1])
        assert sample["rewards"]["row_id"] == row
        assert (
            sample["rewards"]["by_text"] == row * 1000 + sum(map(ord, sample["completion"])) % 1000 == sample["total"]
        )
    for start in range(0, len(samples), 4):
        group = samples[start : start + 4]
        assert len({s["prompt"] for s in group}) == 1
        advantages = np.array([s["advantage"] for s in group])
        totals = np.array([s["total"] for s in group])
        if method == "dr_grpo":
            np.testing.assert_allclose(advantages, totals - totals.mean(), atol=1e-2)
        elif method == "remax":  # one baseline per group
            np.testing.assert_allclose(advantages - totals, (advantages - totals)[0], atol=1e-2)
        else:
            np.testing.assert_array_equal(np.argsort(advantages, kind="stable"), np.argsort(totals, kind="stable"))


# -- learning --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, id="grpo"),
        pytest.param(
            dict(update__minibatches=2, update__epochs=2, update__accumulation=2, method={"name": "dr_grpo"}),
            id="off-policy",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_policy_learns(options, tmp_path):
    """The answer is the last digit of a number. The supervised start is often incorrect, and RL improves it."""
    rows = write_rows(
        tmp_path / "rows.jsonl",
        [{"question": str(i), "solution": f"#### {i % 10}", "answer": str(i % 10)} for i in range(20)],
    )
    config = tiny(
        rows,
        steps=100,
        prompts_per_step=8,
        group_size=8,
        max_prompt_length=4,
        model__mlp_width=32,
        reward__functions=["match_answer"],
        supervised__steps=60,
        supervised__batch_size=16,
        supervised__learning_rate=1e-2,
        optimizer__learning_rate=1e-2,
        eval__every=100,
        eval__prompts=20,
        eval__samples=8,
    )
    change(config, **options)
    result = train.train(train.setup(config, tmp_path / "run"))
    before, after = (result[when]["eval/accuracy"] for when in ("before", "after"))
    assert before < 0.4 and after > before + 0.3 and after > 0.5, (before, after)
    rewards = [line["reward"] for line in metrics_of(tmp_path / "run")[1:]]
    assert np.mean(rewards[-20:]) > np.mean(rewards[:20]) + 0.2


# -- the update ------------------------------------------------------------------------------------


def test_accumulation_changes_no_number(rows, rewards, tmp_path):
    runs = [
        run(
            tiny(rows, update__accumulation=a, prompts_per_step=4, reward__functions=[f"{rewards}:even"]),
            tmp_path / str(a),
        )
        for a in (1, 2)
    ]
    assert_close(*runs, 1e-5)


@pytest.mark.parametrize(
    "options",
    [
        pytest.param(dict(update__minibatches=2), id="minibatches", marks=pytest.mark.slow),
        pytest.param(dict(update__epochs=2), id="epochs", marks=pytest.mark.slow),
        pytest.param(
            dict(update__minibatches=2, update__epochs=2, update__accumulation=2, update__kl_coefficient=0.1), id="all"
        ),
    ],
)
def test_several_updates_a_rollout(options, rows, rewards, tmp_path):
    config = tiny(rows, reward__functions=[f"{rewards}:even"], optimizer__learning_rate=1e-2, **options)
    lines = run(config, tmp_path / "run")
    assert_finite(lines)
    updates = config.update.epochs * config.update.minibatches
    _, state = final_state(config, tmp_path / "run")
    counts = [int(x) for x in jax.tree.leaves(state.opt_state) if x.ndim == 0]
    assert state.step == 2 and counts and set(counts) == {2 * updates}
    assert lines[0]["sampling/logp_difference_max"] < 1e-5  # before the weights change


@contextlib.contextmanager
def compilations():
    """Collects the names of the programs that are compiled inside the `with` block."""
    names, listening = [], True

    def listen(event, _, **details):
        if listening and event == "/jax/core/compile/backend_compile_duration":
            names.append(details.get("fun_name"))

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield names
    listening = False


@pytest.mark.parametrize("method", ["grpo", pytest.param("remax", marks=pytest.mark.slow), "dapo"])
def test_nothing_compiles_after_the_first_step(method, rows, rewards, tmp_path):
    config = tiny(
        rows,
        steps=5,
        method={"name": method},
        reward__functions=[f"{rewards}:even", "match_answer"],
        eval__every=1,
        log__samples_every=1,
        checkpoint__every=1,
        optimizer__schedule="cosine",
    )
    prepared = train.setup(config, tmp_path / "run")
    after = []
    with compilations() as names:
        advance = loop.Progress.advance

        class Watched(loop.Progress):
            def advance(self, text):
                advance(self, text)
                after.append(len(names))

        before, loop.Progress = loop.Progress, Watched
        try:
            train.train(prepared)
        finally:
            loop.Progress = before
    assert names and len(after) == 5
    # The second step may compile for a new kind of input, a state from an update. Later steps compile nothing.
    assert after[1:] == [after[1]] * 4, names[after[1] :]
    step = {"jit(generate)", "jit(update_step)", "jit(make_experience)"}
    assert step <= set(names[: after[0]]) and not step & set(names[after[0] :]), names


# -- going on --------------------------------------------------------------------------------------


def test_a_finished_run_says_so_and_trains_nothing(rows, tmp_path, capsys):
    config = tiny(rows)
    lines = run(config, tmp_path / "run")
    stamps = {p: p.stat().st_mtime_ns for p in (tmp_path / "run").rglob("*") if p.is_file()}
    capsys.readouterr()
    assert train.train(train.setup(config, tmp_path / "run")) == {}
    assert "finished: all 2 steps are done" in " ".join(capsys.readouterr().out.split())
    assert metrics_of(tmp_path / "run") == lines
    assert train.train(train.setup(tiny(rows, steps=1, eval__every=1), tmp_path / "run")) == {}
    assert "finished: 2 steps are done, of 1" in " ".join(capsys.readouterr().out.split())
    assert stamps == {p: p.stat().st_mtime_ns for p in (tmp_path / "run").rglob("*") if p.is_file()}


def test_a_finished_run_reads_no_rows_but_those_of_its_evaluation(rows, tmp_path, capsys, monkeypatch):
    config = tiny(rows, steps=1, supervised__steps=1)
    train.train(train.setup(config, tmp_path / "run"))

    def read(*_, **__):
        raise AssertionError("A stream reads and encodes all rows, which takes seconds.")

    monkeypatch.setattr(data.streams.TextStream, "__init__", read)
    monkeypatch.setattr(data, "warn_of_repeats", read)
    capsys.readouterr()
    assert train.train(train.setup(config, tmp_path / "run")) == {}
    assert "finished: all 1 steps are done" in " ".join(capsys.readouterr().out.split())
    config.steps = 2  # now the run is not finished
    with pytest.raises(AssertionError, match="takes seconds"):
        train.setup(config, tmp_path / "run")


def test_a_finished_run_without_its_picture_is_reported_after_all(rows, tmp_path, capsys, monkeypatch):
    """The run dies between the last checkpoint and the report, the second time with the picture of a shorter run."""
    picture, report = tmp_path / "learning_curve.png", summary.report
    for steps in (1, 2):
        config = tiny(rows, steps=steps, eval__every=1)
        monkeypatch.setattr(summary, "report", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train.train(train.setup(config, tmp_path))
        assert not picture.exists()
        monkeypatch.setattr(summary, "report", report)
        capsys.readouterr()
        result = train.train(train.setup(config, tmp_path))
        out = capsys.readouterr().out
        assert "finished" in out and "accuracy" in out and "change" in out and str(picture) in out
        assert picture.read_bytes().startswith(b"\x89PNG") and sorted(result) == ["after", "before"]
        assert train.train(train.setup(config, tmp_path)) == {}


def test_lines_after_the_last_checkpoint_do_not_count_for_a_run_that_is_then_finished(rows, tmp_path, capsys):
    """The run is killed between the line of step 2 and its checkpoint, and its user settles for step 1."""
    config = tiny(rows, steps=1, eval__every=1, log__samples_every=1, checkpoint__every=1)
    run(config, tmp_path)
    files = ("metrics.jsonl", "samples.jsonl", "held_out.jsonl", "held_out_accuracy.jsonl")
    whole = {name: (tmp_path / name).read_bytes() for name in files}
    run(tiny(rows, steps=2, eval__every=1, log__samples_every=1, checkpoint__every=1), tmp_path)
    shutil.rmtree(tmp_path / "checkpoints" / "2")
    (tmp_path / "learning_curve.png").unlink()
    assert all(len((tmp_path / name).read_bytes()) > len(content) for name, content in whole.items())
    capsys.readouterr()
    result = train.train(train.setup(config, tmp_path))
    assert "finished: all 1 steps are done" in " ".join(capsys.readouterr().out.split())
    assert {name: (tmp_path / name).read_bytes() for name in files} == whole
    assert result["after"]["eval/accuracy"] == metrics_of(tmp_path)[-1]["eval/accuracy"]


def test_an_evaluation_before_the_last_step_says_so(rows, tmp_path, capsys):
    run(tiny(rows, steps=1, eval__every=1), tmp_path)
    capsys.readouterr()
    run(tiny(rows, steps=3, eval__every=0), tmp_path)
    assert "The last evaluation was after step 1." in capsys.readouterr().out
    run(tiny(rows, steps=4, eval__every=1), tmp_path)
    assert "The last evaluation was" not in capsys.readouterr().out


def test_before_is_the_evaluation_of_step_0_or_none(rows, tmp_path, capsys):
    run(tiny(rows, steps=1), tmp_path)
    capsys.readouterr()
    result = train.train(train.setup(tiny(rows, steps=3, eval__every=1), tmp_path))
    out = capsys.readouterr().out
    last = metrics_of(tmp_path)[-1]
    assert result == {"after": {k: last[k] for k in EVAL_METRICS[:-1]}}
    assert re.search(r"┃ +┃ +after ┃\n", out) and "accuracy" in out, out  # no other column


def test_an_evaluation_that_has_changed_is_not_compared_with_the_first(rows, tmp_path, capsys):
    both = train.train(train.setup(tiny(rows, steps=1, eval__every=1), tmp_path))
    assert sorted(both) == ["after", "before"]
    capsys.readouterr()
    result = train.train(train.setup(tiny(rows, steps=2, eval__every=1, eval__prompts=2), tmp_path))
    assert list(result) == ["after"] and "is not compared, because config.eval has changed" in capsys.readouterr().out
    again = train.train(train.setup(tiny(rows, steps=3, eval__every=2), tmp_path))
    assert again["before"] == both["before"]
    (tmp_path / "eval_settings.json").rename(tmp_path / "evaluation.json")  # its name in earlier versions
    old = train.train(train.setup(tiny(rows, steps=4, eval__every=2), tmp_path))
    assert old["before"] == both["before"]
    (tmp_path / "evaluation.json").write_text('{"command": "python -m jaxrl_reason.evaluate", "metrics": {}}')
    assert not eval_settings.have_changed(tmp_path, config_of_last := tiny(rows, steps=5, eval__every=2))
    (tmp_path / "evaluation.json").unlink()
    assert list(train.train(train.setup(config_of_last, tmp_path))) == ["after"]


def test_a_row_that_cannot_be_judged_may_be_alone_in_the_last_batch_of_an_evaluation(rows, tmp_path):
    """5 held-out rows in batches of 4: the last batch has the bad row only, and the limit is half of all rows."""
    held_out = write_rows(tmp_path / "held_out.jsonl", [*ROWS[:4], {**ROWS[4], "answer": "hello"}])
    with pytest.warns(UserWarning, match="cannot judge 1 of 5 rows"):
        ready = train.setup(
            tiny(rows, steps=1, data__eval=str(held_out), eval__every=1, eval__prompts=5), tmp_path / "run"
        )
    assert train.train(ready)["after"]["eval/accuracy"] <= 0.8  # the bad row counts as incorrect


def test_an_evaluation_json_in_the_work_directory_stays(tmp_path):
    (tmp_path / "evaluation.json").write_text("of evaluate --out")
    eval_settings.write(tmp_path, tiny("rows.jsonl"))
    assert (tmp_path / "evaluation.json").read_text() == "of evaluate --out"
    assert json.loads((tmp_path / "eval_settings.json").read_text())["every"] is None


def test_the_seconds_of_evaluations_and_checkpoints_are_in_the_metrics(rows, tmp_path):
    """A line has the time since the line before it. The time includes the checkpoint that came before the step."""
    config = tiny(rows, steps=4, supervised__steps=3, eval__every=2, checkpoint__every=1)
    train.train(train.setup(config, tmp_path))
    supervised = metrics_of(tmp_path / "supervised", perf=True)
    lines = metrics_of(tmp_path, perf=True)[1:]
    parts = [{n.rpartition("/")[2] for n in line if n.startswith("perf/step_seconds/")} for line in lines]
    usual = {"rollout", "reward", "update"}
    assert parts == [
        usual,
        usual | {"checkpoint", "evaluation"},
        usual | {"checkpoint"},
        usual | {"checkpoint", "evaluation"},
    ]
    assert ["perf/step_seconds/checkpoint" in line for line in supervised] == [False, True, True]
    for line in supervised + lines:
        parts = [x for name, x in line.items() if name.startswith("perf/step_seconds/")]
        assert all(x > 0 for x in parts) and line["perf/step_seconds"] >= sum(parts)


@pytest.mark.parametrize(
    "changes, field",
    [
        (dict(model__width=20), "config.model.width was 16 and is 20"),
        (dict(method={"name": "rloo"}), "config.method.name was 'grpo' and is 'rloo'"),
        (dict(seed=1), "config.seed was 0 and is 1"),
        (dict(group_size=8), "config.group_size was 4 and is 8"),
        (dict(optimizer__learning_rate=1.0), "config.optimizer.learning_rate was"),
        (dict(supervised__steps=3), "config.supervised.steps was 0 and is 3"),
        (dict(data__train_split="[:10]"), "config.data.train_split was 'all' and is '[:10]'"),
    ],
)
def test_another_configuration_in_the_same_directory_is_refused_by_field(changes, field, rows, tmp_path):
    train.setup(tiny(rows), tmp_path)
    with pytest.raises(ConfigError) as error:
        train.setup(tiny(rows, **changes), tmp_path)
    text = str(error.value)
    assert field in text and str(tmp_path) in text and "another --workdir" in text and text.count(" was ") <= 2
    train.setup(tiny(rows), tmp_path)  # the refusal has changed nothing


def test_other_data_under_the_same_name_are_refused(tmp_path):
    config = tiny(write_rows(tmp_path / "rows.jsonl"))
    train.setup(config, tmp_path / "run")
    write_rows(tmp_path / "rows.jsonl", [*ROWS[:-1], {**ROWS[-1], "answer": "7"}])
    with pytest.raises(ConfigError, match="holds another run: its data have changed since it began"):
        train.setup(config, tmp_path / "run")


def test_how_long_and_what_is_written_may_change(rows, tmp_path):
    run(tiny(rows, steps=1), tmp_path)
    lines = run(
        tiny(
            rows,
            steps=2,
            log__tensorboard=True,
            log__samples_every=1,
            eval__every=2,
            checkpoint__keep=5,
        ),
        tmp_path,
    )
    assert [line["step"] for line in lines] == [1, 2] and "eval/accuracy" in lines[1]


def damage(checkpoint):
    for file in checkpoint.rglob("d/*"):
        file.write_bytes(file.read_bytes()[:10])


def checkpoint_names(workdir):
    return sorted(p.name for p in (workdir / "checkpoints").iterdir())


# The reader does not remove its callbacks.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_damaged_checkpoint_is_put_aside_with_a_warning_that_names_it(rows, tmp_path, caplog):
    """Damages the newest of two kept checkpoints twice. It is neither deleted nor counted, and its step is repeated."""
    config = tiny(rows, steps=3, checkpoint__every=1, checkpoint__keep=2)
    lines = run(config, tmp_path)
    newest, content = tmp_path / "checkpoints" / "3", {}
    for aside in ("damaged-3", "damaged-3-2"):
        assert checkpoint_names(tmp_path) == ["2", "3", *content]
        damage(newest)
        content[aside] = {p.relative_to(newest): p.read_bytes() for p in newest.rglob("*") if p.is_file()}
        caplog.clear()
        assert run(config, tmp_path) == lines
        assert any(str(newest) in r.getMessage() and aside in r.getMessage() for r in caplog.records)
    assert checkpoint_names(tmp_path) == ["2", "3", *content]
    for aside, files in content.items():
        kept = newest.with_name(aside)
        assert files == {p.relative_to(kept): p.read_bytes() for p in kept.rglob("*") if p.is_file()}
    run(change(config, steps=5), tmp_path)
    assert checkpoint_names(tmp_path) == ["4", "5", *content]
    gc.collect()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_where_no_checkpoint_can_be_read_the_run_stops_in_a_sentence_and_leaves_them(rows, tmp_path, capsys):
    config = tiny(rows, checkpoint__every=1)
    run(config, tmp_path / "run")
    names = checkpoint_names(tmp_path / "run")
    for name in names:
        damage(tmp_path / "run" / "checkpoints" / name)
    error = refusal(change(config, steps=3), tmp_path, capsys, code=1)
    assert "None of the checkpoints under" in error and "the newest (2)" in error and error.count("\n") == 1
    assert checkpoint_names(tmp_path / "run") == names == ["1", "2"]
    gc.collect()


@pytest.fixture
def running_baseline(monkeypatch):
    """Registers a method with a state: the advantage is the reward minus a running mean of earlier rewards."""
    monkeypatch.setattr(methods.registry, "_ESTIMATORS", dict(methods.registry._ESTIMATORS))

    @methods.register
    def running_baseline(*, momentum: float = 0.5):
        def update(advantages, mean, inputs):
            return advantages - mean, momentum * mean + (1 - momentum) * jnp.nanmean(inputs.rewards)

        return Method(chain(AdvantageTransform(lambda: jnp.float32(0), update)), PolicyLoss(), dynamic_sampling=True)


def in_parts(config, ends, workdir):
    """Runs to each step of `ends` in turn and returns the metrics and the final state.

    Each part sets up a new run, which shares the compiled programs only.
    """
    programs = None
    for steps in ends:
        prepared = train.setup(change(config, steps=steps), workdir)
        programs = programs or prepared.programs
        train.train(dataclasses.replace(prepared, programs=programs))
    saver = checkpoints.Checkpoints(workdir / "checkpoints", config.checkpoint.keep)
    number, state = saver.restore(programs.init())
    saver.close()
    assert number == ends[-1]
    return metrics_of(workdir), jax.tree.map(np.asarray, state)


@pytest.mark.parametrize("method", ["dapo", pytest.param("running_baseline", marks=pytest.mark.slow)])
def test_a_resumed_run_has_all_its_state(method, running_baseline, rows, rewards, tmp_path):
    """Data position, moments of the optimizer and state of the chain are equal to the state of an uninterrupted run."""
    config = tiny(
        rows,
        steps=5,
        method={"name": method},
        sampling__max_batches=50,
        optimizer__learning_rate=1e-2,
        reward__functions=[f"{rewards}:even", f"{rewards}:spread"],
        reward__verdict=f"{rewards}:even",
    )
    straight, expected = in_parts(config, [5], tmp_path / "straight")
    assert sum(line["dynamic_sampling/batches"] for line in straight[:3]) > 3
    lines, state = in_parts(config, [3, 5], tmp_path / "resumed")
    assert lines == straight
    jax.tree.map(np.testing.assert_array_equal, state, expected)
    assert any(np.any(x) for x in jax.tree.leaves(state.advantage_state)) == (method == "running_baseline")


@pytest.mark.slow
def test_runs_that_stop_around_the_end_of_an_epoch_read_on_as_one_does(rows, rewards, tmp_path):
    """A step takes four of twenty rows, so the second epoch begins with step 6. A reward of weight 0 names the rows."""
    config = tiny(rows, reward__functions=[f"{rewards}:even", f"{rewards}:row_id"], reward__weights=[1.0, 0.0])
    straight, expected = in_parts(config, [7], tmp_path / "straight")
    assert sum(line["rewards/row_id/mean"] for line in straight[:5]) == pytest.approx(5 * 9.5)
    lines, state = in_parts(config, [4, 5, 6, 7], tmp_path / "resumed")
    assert lines == straight
    jax.tree.map(np.testing.assert_array_equal, state, expected)


@pytest.mark.slow
def test_a_kill_during_a_save_leaves_the_checkpoint_before(rows, rewards, tmp_path, shared_programs):
    """The process dies just before the second checkpoint gets its final name. Only one checkpoint is kept."""
    config = tiny(rows, steps=3, checkpoint__every=1, checkpoint__keep=1, reward__functions=[f"{rewards}:even"])
    arguments = command(config, tmp_path / "recipe.py", tmp_path / "killed")[3:]
    script = tmp_path / "killed.py"
    script.write_text(
        "import os, signal, sys\n"
        "from jaxrl_reason import train\n"
        "def die(event, arguments):\n"
        "    if event == 'os.rename' and str(arguments[1]).endswith('checkpoints/2'):\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "sys.addaudithook(die)\n"
        "train.main(sys.argv[1:])\n"
    )
    env = environment(shared_programs, JAX_DISABLE_MOST_OPTIMIZATIONS="true")  # as in this process, for equal numbers
    process = subprocess.run([sys.executable, script, *arguments], env=env, capture_output=True, text=True)
    assert process.returncode == -signal.SIGKILL, process.stderr[-2000:]
    names = checkpoint_names(tmp_path / "killed")
    assert "1" in names and "2" not in names and len(names) == 2, names  # the other one is unfinished
    lines = run(config, tmp_path / "killed")
    assert lines == run(config, tmp_path / "straight")
    (number, state), (_, expected) = (final_state(config, tmp_path / name) for name in ("killed", "straight"))
    assert number == 3
    jax.tree.map(np.testing.assert_array_equal, state, expected)


KILLED = dict(
    steps=8,
    supervised__steps=12,
    checkpoint__every=3,
    checkpoint__keep=2,
    eval__every=4,
    log__samples_every=1,
    update__minibatches=2,
    method={"name": "dapo", "dynamic_sampling": False},
)


def command(config, recipe, workdir):
    recipe.write_text(
        "from jaxrl_reason.config import Config, from_dict\n"
        f"def get_config():\n    return from_dict({to_dict(config)!r})\n"
    )
    return [sys.executable, "-m", "jaxrl_reason.train", f"--config={recipe}", f"--workdir={workdir}"]


def environment(shared_programs, **more):
    return os.environ | {"JAX_PLATFORMS": "cpu"} | {k.upper(): str(v) for k, v in shared_programs.items()} | more


def count_lines(path):
    return path.read_bytes().count(b"\n") if path.exists() else 0


def kill_after(arguments, file, lines, env):
    """Starts a run and kills it after `file` has the given number of lines."""
    process = subprocess.Popen(arguments, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + 120
        while count_lines(file) < lines and process.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.001)
        time.sleep(random.uniform(0, 0.05))
    finally:
        process.send_signal(signal.SIGKILL)
        _, error = process.communicate()
    assert process.returncode == -signal.SIGKILL, (process.returncode, error[-2000:])


@pytest.mark.slow
def test_a_run_that_is_killed_twice_ends_as_if_it_had_not_been(rows, rewards, tmp_path, shared_programs):
    """SIGKILL ends the run at a random moment of both phases. Then the same command runs to the end."""
    config = tiny(rows, reward__functions=[f"{rewards}:spread"], **KILLED)
    env = environment(shared_programs)
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    first = subprocess.run(command(config, tmp_path / "recipe.py", straight), env=env, capture_output=True, text=True)
    assert first.returncode == 0, first.stderr[-2000:]

    arguments = command(config, tmp_path / "recipe.py", killed)
    moments = random.randint(1, 11), random.randint(1, 8)
    print("killed after lines", moments)
    kill_after(arguments, killed / "supervised" / "metrics.jsonl", moments[0], env)
    kill_after(arguments, killed / "metrics.jsonl", moments[1], env)
    last = subprocess.run(arguments, env=env, capture_output=True, text=True)
    assert last.returncode == 0 and "Traceback" not in last.stderr, last.stderr[-2000:]
    assert "Going on from" in last.stdout

    for phase in (".", "supervised"):
        assert metrics_of(killed / phase) == metrics_of(straight / phase), moments
    assert samples_of(killed) == samples_of(straight)
    (number, state), (expected_number, expected) = (final_state(config, w) for w in (killed, straight))
    assert number == expected_number == 20
    jax.tree.map(np.testing.assert_array_equal, state, expected)

    again = subprocess.run(arguments, env=env, capture_output=True, text=True)
    assert again.returncode == 0 and "finished" in again.stdout
    assert metrics_of(killed) == metrics_of(straight)


# -- devices ---------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        dict(update__minibatches=2, update__kl_coefficient=0.1, eval__every=2, supervised__steps=2, model__layers=2),
        dict(method={"name": "dapo"}, sampling__max_batches=20),
        dict(method={"name": "remax"}),
    ],
    ids=["grpo", "dapo", "remax"],
)
def test_eight_devices_sample_and_learn_as_one_does(options, rewards, tmp_path, shared_programs):
    rows = write_rows(
        tmp_path / "rows.jsonl",
        [{**row, "question": f"Write {row['answer']} down, in figures, not in words."} for row in ROWS],
    )
    common = dict(
        prompts_per_step=8,
        max_prompt_length=32,
        log__samples_every=1,
        log__samples=32,
        reward__functions=[f"{rewards}:even", "match_answer"],
        supervised__batch_size=8,
        **options,
    )
    one = tiny(rows, mesh__fsdp=1, **common)
    eight = tiny(rows, mesh__data=2, mesh__fsdp=2, mesh__tensor=2, **common)
    lines = run(one, tmp_path / "one")
    env = environment(shared_programs, XLA_FLAGS="--xla_force_host_platform_device_count=8")
    result = subprocess.run(
        command(eight, tmp_path / "recipe.py", tmp_path / "eight"), env=env, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert_close(lines, metrics_of(tmp_path / "eight"), 1e-4)
    text = lambda workdir: [(s["step"], s["prompt"], s["completion"], s["total"]) for s in samples_of(workdir)]
    assert text(tmp_path / "one") == text(tmp_path / "eight")


# -- refusals --------------------------------------------------------------------------------------


def refusal(config, tmp_path, capsys, *flags, code=2) -> str:
    """Runs the command line on a configuration that cannot run, and returns its output on stderr."""
    arguments = command(config, tmp_path / "recipe.py", tmp_path / "run")[3:]
    capsys.readouterr()
    assert train.main([*arguments, *flags]) == code
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.endswith("\n") and "Traceback" not in error
    return error


@pytest.mark.parametrize(
    "changes, flags, names",
    [
        (dict(steps=0), [], ["config.steps is 0", "nothing to train"]),
        (dict(), ["--config.steps=0"], ["config.steps is 0", "nothing to train"]),
        (dict(), ["--config.modle.width=3"], ["modle", "'model'"]),
        (dict(group_size=1), [], ["group_size is 1", "at least 2"]),
        (dict(data__train_split="[:200]"), [], ["'[:200]'", "rows.jsonl", "20 usable rows"]),
        (dict(data__train_split="test"), [], ["'test'", "rows.jsonl"]),
        (dict(data__train="word_problem"), [], ["word_problem", "word_problems"]),
        (dict(data__train="nothing.jsonl"), [], ["nothing.jsonl"]),
        (dict(data__template="plane"), [], ["plane", "'plain'"]),
        (dict(data__tokenizer="nowhere"), [], ["nowhere"]),
        (dict(max_prompt_length=2), [], ["20 of 20 rows", "max_prompt_length"]),
        (dict(supervised__steps=1, max_completion_length=2), [], ["rows do not fit", "max_completion_length"]),
        (dict(reward__functions=["acuracy"]), [], ["acuracy", "'accuracy'"]),
        (dict(reward__functions=["no.such.module:f"]), [], ["no.such.module"]),
        (dict(reward__weights=[0.0]), [], ["weight"]),
        (dict(mesh__data=3), [], ["mesh.data=3", "1"]),
    ],
    ids=str,
)
def test_what_cannot_run_is_one_sentence_and_a_non_zero_exit(changes, flags, names, rows, tmp_path, capsys):
    error = refusal(tiny(rows, **changes), tmp_path, capsys, *flags)
    lines = [line for line in error.splitlines() if not line.startswith("  ")]  # each row is listed on a line
    assert len(lines) == 1 + ("Raise the limit." in lines) and all(name in error for name in names), error
    assert not (tmp_path / "run").exists()
    train.setup(tiny(rows), tmp_path / "run")  # a corrected run is not "another run"


def test_a_missing_flag_is_one_sentence(capsys):
    assert train.main(["--workdir=w"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and "--config=FILE" in error and error.count("\n") == 1


@pytest.mark.parametrize(
    "content, names",
    [
        (b"", ["data.jsonl", "empty"]),
        (b"\n\n", ["data.jsonl", "empty"]),
        (b'{"question": "a", "answer": "1"}\n{"question": "b"}\n', ["data.jsonl, line 2", "'answer'"]),
        (b'{"question": "a", "answer": "1"}\n{"question": \n', ["data.jsonl, line 2", "not JSON"]),
        (b'{"question": "a", "answer": "1"}\n\xff\n', ["data.jsonl, line 2", "UTF-8"]),
    ],
    ids=["empty", "blank", "no answer", "not JSON", "not UTF-8"],
)
def test_data_that_cannot_be_read_are_named_by_file_and_line(content, names, tmp_path, capsys):
    (tmp_path / "data.jsonl").write_bytes(content)
    error = refusal(tiny(tmp_path / "data.jsonl"), tmp_path, capsys)
    assert all(name in error for name in names), error
    assert not (tmp_path / "run").exists()


def test_a_supervised_start_without_solutions_is_refused(tmp_path, capsys):
    rows = write_rows(tmp_path / "rows.jsonl", [{"question": "a", "answer": "1"}] * 3)
    assert "solution" in refusal(tiny(rows, supervised__steps=1), tmp_path, capsys)


@pytest.mark.parametrize(
    "function, names",
    [
        ("raises", ["'raises'", "failed", "KeyError", "nothing works"]),
        ("too_short", ["'too_short'", "returned 3 rewards for 4 completions"]),
    ],
)
def test_a_reward_that_breaks_its_contract_stops_the_run_in_a_sentence(
    function, names, rows, rewards, tmp_path, capsys
):
    config = tiny(rows, reward__functions=[f"{rewards}:{function}"], supervised__steps=1)
    error = refusal(config, tmp_path, capsys)  # before the supervised start
    assert error.count("\n") == 1 and all(name in error for name in names), error


@pytest.mark.parametrize(
    "changes, names",
    [
        (dict(reward__functions=["{rewards}:hinted"]), ["'hinted'", "missing a required argument: 'hint'"]),
        (dict(data__train="{reserved}"), ["column is named 'completions'"]),
        (dict(data__eval="{reserved}", eval__every=1), ["column is named 'completions'"]),
        (
            dict(data__tokenizer="{joining}", reward__functions=["match_answer"]),
            ["'match_answer'", "joins the answer '1"],
        ),
    ],
    ids=["a column is missing", "a reserved column", "a reserved column, in evaluation", "answers are joined"],
)
def test_rewards_are_checked_against_the_data_before_anything_runs(changes, names, rows, rewards, tmp_path, capsys):
    reserved = write_rows(tmp_path / "reserved.jsonl", [{**row, "completions": "x"} for row in ROWS])
    tokenizer = data.train_tokenizer([], vocab_size=259)
    tokenizer.backend.add_tokens([f"#### {digit}" for digit in range(10)])
    tokenizer.save(tmp_path / "joining")
    places = dict(rewards=rewards, reserved=reserved, joining=tmp_path / "joining")

    def here(value):
        if isinstance(value, list):
            return [here(v) for v in value]
        return value.format(**places) if isinstance(value, str) else value

    config = tiny(rows, supervised__steps=3, max_completion_length=16, **{k: here(v) for k, v in changes.items()})
    error = refusal(config, tmp_path, capsys)
    assert error.count("\n") == 1 and all(name in error for name in names), error
    assert not (tmp_path / "run").exists()


def test_held_out_rows_that_are_never_scored_are_not_checked(rows, tmp_path):
    reserved = write_rows(tmp_path / "reserved.jsonl", [{**row, "completions": "x"} for row in ROWS])
    train.setup(tiny(rows, data__eval=str(reserved)), tmp_path / "run")


def test_what_stops_a_run_half_way_is_a_sentence(rows, tmp_path, capsys):
    config = tiny(rows, checkpoint__every=1, steps=2)
    run(change(config, steps=1), tmp_path / "run")
    metrics_file = tmp_path / "run" / "metrics.jsonl"
    good = metrics_file.read_bytes()
    metrics_file.write_bytes(b"{}\n" + good)
    error = refusal(change(config, steps=2), tmp_path, capsys, code=1)
    assert f"Line 1 of {metrics_file} is not a JSON object" in error and error.count("\n") == 1
    metrics_file.unlink()
    metrics_file.mkdir()
    error = refusal(config, tmp_path, capsys, code=1)
    assert "Is a directory" in error and str(metrics_file) in error and error.count("\n") == 1
    metrics_file.rmdir()
    metrics_file.write_bytes(good)
    assert [line["step"] for line in run(config, tmp_path / "run")] == [1, 2]


def test_a_lost_reference_policy_is_a_sentence(rows, tmp_path, capsys):
    config = tiny(rows, steps=2, update__kl_coefficient=0.1)
    run(change(config, steps=1), tmp_path / "run")
    (tmp_path / "run" / "start").rename(tmp_path / "elsewhere")
    error = refusal(change(config, steps=2), tmp_path, capsys, code=1)
    assert f"The weights {tmp_path / 'run' / 'start'} cannot be read: " in error and error.count("\n") == 1


def test_mistakes_in_the_program_keep_their_traceback(rows, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "collect", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train.main(command(tiny(rows), tmp_path / "recipe.py", tmp_path / "run")[3:])


def test_a_reward_that_raises_now_and_then_leaves_its_rows_out(rows, rewards, tmp_path):
    config = tiny(rows, steps=5, reward__functions=[f"{rewards}:raises_on_row_three"])  # one epoch: row 3 comes once
    lines = run(config, tmp_path / "run")
    assert sorted(line["rewards/raises_on_row_three/error_rate"] for line in lines) == [0, 0, 0, 0, 0.25]
    assert sorted(line["completions/missing_reward_ratio"] for line in lines) == [0, 0, 0, 0, 0.25]
    assert all(line["reward"] == 1 for line in lines)
    with pytest.raises(RewardError, match="raises_on_row_three"):
        run(change(config, reward__max_failure_share=0.1), tmp_path / "strict")


def test_the_process_exits_with_the_code_and_without_a_traceback(rows, tmp_path):
    arguments = command(tiny(rows, steps=0), tmp_path / "recipe.py", tmp_path / "run")
    process = subprocess.run(arguments, capture_output=True, text=True, env=os.environ | {"JAX_PLATFORMS": "cpu"})
    assert process.returncode == 2 and process.stderr.startswith("error: ") and process.stderr.count("\n") == 1, (
        process.stderr
    )
    assert not process.stdout


@pytest.mark.slow
def test_the_quickstart_gains_25_points_on_problems_not_seen(data_dir, tmp_path):
    """Runs the README's first command, about one minute on two quiet cores."""
    recipe = pathlib.Path(__file__).parents[1] / "configs" / "quickstart.py"
    assert train.main([f"--config={recipe}", f"--workdir={tmp_path}", f"--config.data.data_dir={data_dir}"]) == 0
    evaluations = [line["eval/accuracy"] for line in metrics_of(tmp_path) if "eval/accuracy" in line]
    assert evaluations[-1] - evaluations[0] >= 0.25

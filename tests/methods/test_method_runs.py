"""Tests the five methods in the real loop: training, resuming, switched off, errors."""

import json

import jax
import numpy as np
import pytest

from helpers.tiny_runs import change, ROWS, write_rows
from helpers.tiny_runs import tiny as bare
from jaxrl_reason import config as config_lib
from jaxrl_reason import evaluate, models, train
from jaxrl_reason.config import ConfigError, Reward, RewardModel
from jaxrl_reason.models import decoder
from jaxrl_reason.rewards import RewardError
from jaxrl_reason.runs import checkpoints

pytestmark = [pytest.mark.runs, pytest.mark.usefixtures("quick_compilation")]

GRADED = [row | {"value": i / 40, "chosen": f"#### {i}", "rejected": f"#### {i + 1}"} for i, row in enumerate(ROWS)]
HERO = dict(
    method={"name": "hero", "base": "rloo"},
    reward=Reward(functions=["accuracy", "reward_model"], weights=[1.0, 0.0]),
    reward_model=RewardModel(steps=2, batch_size=4),
)
LASER = dict(method={"name": "laser", "base": "rloo", "reasoning_warmup": 1, "self_reward_warmup": 1})
RLEV = dict(method={"name": "rlev", "base": "rloo"})
PROGRPO = dict(method={"name": "progrpo", "base": "rloo"})
ALL = dict(
    HERO,
    method={
        "name": "hero+laser+rlev+progrpo",
        "base": "rloo",
        "laser": {"reasoning_warmup": 1, "self_reward_warmup": 1},
    },
)


NEGATIVE = """
def spread(completion_ids, **_):
    return [(i % 2 - 0.25) for i, _ in enumerate(completion_ids)]

def positive(completion_ids, **_):
    return [i % 2 for i, _ in enumerate(completion_ids)]
"""


@pytest.mark.parametrize("parts", [1, 2])
def test_maxrl_trains_and_refuses_negative_rewards(parts, tmp_path):
    (tmp_path / "own.py").write_text(NEGATIVE)
    rows = write_rows(tmp_path / "rows.jsonl")
    reward = lambda name: {"reward__functions": [f"{tmp_path / 'own.py'}:{name}"], "sampling__parts": parts}
    config = bare(rows, method={"name": "maxrl"}, **reward("positive"))
    train.train(train.setup(config, tmp_path / "good"))
    lines = [json.loads(line) for line in (tmp_path / "good" / "metrics.jsonl").read_text().splitlines()]
    assert [line["reward"] for line in lines] == [0.5, 0.5] and all(line["grad_norm"] > 0 for line in lines)
    message = "A reward of step 1 is -0.25, and config.method.name 'maxrl' refuses negative rewards; let the reward"
    with pytest.raises(RewardError, match=message):
        train.train(train.setup(change(config, **reward("spread")), tmp_path / "bad"))


def tiny(rows, **changes):
    """Returns a run whose supervised start teaches the policy to end its answers."""
    return bare(rows, **{"supervised__steps": 30, "supervised__learning_rate": 1e-2, **changes})


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    return write_rows(tmp_path_factory.mktemp("data") / "rows.jsonl", GRADED)


def run(config, directory):
    """Trains and returns (the lines of metrics.jsonl, the final state)."""
    ready = train.setup(config, directory)
    train.train(ready)
    saver = checkpoints.Checkpoints(directory / "checkpoints", 1)
    _, state = saver.restore(ready.programs.init())
    saver.close()
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return lines, jax.device_get(state)


def same(a, b):
    return all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


@pytest.mark.parametrize(
    "changes, metrics",
    [
        (HERO, {"hero/score_spread", "hero/score_incorrect", "rewards/reward_model/mean"}),
        (LASER, {"self_reward/loss", "self_reward/incorrect", "self_reward/f1"}),
        (RLEV, {"rlev/value", "rlev/h_acc"}),
        (PROGRPO, {"progrpo/prompt_confidence", "progrpo/answer_confidence"}),
    ],
    ids=["hero", "laser", "rlev", "progrpo"],
)
def test_a_method_trains_and_logs_its_own_metrics_and_no_others(changes, metrics, rows, tmp_path):
    lines, _ = run(tiny(rows, **changes), tmp_path / "run")
    own = {name for name in lines[-1] if name.split("/")[0] in ("hero", "self_reward", "rlev", "progrpo")}
    assert [line["step"] for line in lines] == [1, 2]
    assert metrics <= set(lines[-1]) and {name.split("/")[0] for name in own} == {min(metrics).split("/")[0]}
    assert lines[-1]["nonfinite_completions"] == 0 and lines[-1]["skipped_update_ratio"] == 0


@pytest.mark.slow
def test_a_stack_of_four_resumes_with_the_same_numbers(rows, tmp_path):
    config = lambda **changes: tiny(rows, steps=4, checkpoint__every=2, checkpoint__keep=9, **ALL, **changes)
    lines, final = run(config(), tmp_path / "straight")
    run(change(config(), steps=2), tmp_path / "resumed")
    c_ref = (tmp_path / "resumed" / "self_reward.json").read_text()
    resumed, state = run(config(), tmp_path / "resumed")

    untimed = lambda lines: [{k: v for k, v in line.items() if not k.startswith("perf/")} for line in lines]
    assert untimed(resumed) == untimed(lines)
    assert same(state, final)
    counts = [x for x in jax.tree.leaves(final.advantage_state) if x.dtype == np.int32]
    assert counts == [4]  # LaSeR's warm-up
    assert (tmp_path / "resumed" / "self_reward.json").read_text() == c_ref
    assert json.loads(c_ref)["completions"] > 0


@pytest.mark.parametrize(
    "changes",
    [
        dict(HERO, method={"name": "hero", "base": "rloo", "alpha": 0.0, "beta": 0.0, "w_min": 1.0, "w_max": 1.0}),
        dict(
            method={
                "name": "laser",
                "base": "rloo",
                "alpha": 0.0,
                "tau": 0.0,
                "reasoning_warmup": 0,
                "self_reward_warmup": 0,
            }
        ),
        dict(method={"name": "rlev", "base": "rloo", "alpha": 0.0}),
        dict(method={"name": "progrpo", "base": "rloo", "alpha": 0.0}),
    ],
    ids=["hero", "laser", "rlev", "progrpo"],
)
def test_a_method_that_is_switched_off_gives_its_base(changes, rows, base_run, tmp_path):
    lines, state = run(tiny(rows, reward__functions=["accuracy"], **changes), tmp_path / "off")
    base_lines, base_state = base_run
    for line, expected in zip(lines, base_lines, strict=True):
        for name in ("reward", "completions/mean_length", "entropy", "grad_norm", "loss"):
            assert line[name] == pytest.approx(expected[name], abs=1e-6), name
    assert all(
        np.allclose(x, y, atol=1e-6) for x, y in zip(jax.tree.leaves(state.params), jax.tree.leaves(base_state.params))
    )


def test_the_probe_is_read_at_the_temperature_of_training_whatever_samples(rows, tmp_path):
    """The trainer and the constant also have this temperature. Each rollout samples at a temperature of its own."""
    config = tiny(rows, **LASER, sampling__temperature=0.6, eval__temperature=1.4, eval__every=1, eval__samples=16)
    change(config, group_size=16, max_completion_length=24)  # some completions end
    ready = train.setup(config, tmp_path / "run")
    state = ready.programs.init()
    for rollout in (
        ready.programs.generate(state.params, ready.prompts.batch(0), state.step),
        ready.programs.generate_eval(state.params, ready.held_out[0]),
    ):
        scored = ready.programs.compute_logprobs(state.params, rollout)
        ended = ~np.asarray(rollout.truncated)
        assert ended.any()
        np.testing.assert_allclose(
            np.asarray(rollout.probe_logprobs)[ended], np.asarray(scored.probe_logprobs)[ended], atol=1e-4
        )


@pytest.fixture(scope="module")
def base_run(rows, tmp_path_factory):
    return run(tiny(rows, method={"name": "rloo"}), tmp_path_factory.mktemp("base") / "run")


@pytest.mark.parametrize(
    "changes",
    [
        {},
        # Adapters on random weights. Completions are long enough to end by chance, and the entropy moves the adapters.
        pytest.param(
            dict(lora__rank=2, max_completion_length=120, update__entropy_coefficient=1.0), marks=pytest.mark.slow
        ),
    ],
    ids=str,
)
def test_an_exact_reference_for_self_rewards_is_that_of_evaluations_too(changes, rows, tmp_path):
    """The policy and the policy of the start score each completion of `evaluate` again, without a cache."""
    method = LASER["method"] | {"reference": "exact", "self_reward_warmup": 0}
    config = tiny(
        rows, steps=6, eval__every=6, optimizer__learning_rate=3e-2, method=method, eval__samples=8, **changes
    )
    workdir = tmp_path / "run"
    lines, state = run(config, workdir)
    assert (workdir / "start").is_dir() and not (workdir / "self_reward.json").exists()
    assert lines[1]["self_reward/incorrect"] == pytest.approx(0.0, abs=1e-5)  # the policy is its own reference
    assert lines[0]["eval/best_of_8_accuracy"] >= 0 and "kl" not in lines[1]
    assert evaluate.main([f"--workdir={workdir}", "--samples=8"]) == 0
    record = json.loads((workdir / "evaluation" / "evaluation.json").read_bytes())
    for name in ("self_reward_f1", "self_reward_calibration_error", "best_of_8_accuracy"):
        assert record["metrics"][name] == pytest.approx(lines[-1][f"eval/{name}"], nan_ok=True)
    ready = train.setup(config, workdir)
    start = checkpoints.load_params(workdir / "start", ready.programs.abstract_state.trained)
    rollout = ready.programs.generate_eval(ready.programs.rollout_weights(state.params), ready.task.held_out[0])
    beta, differences = ready.method.loss.find("self_reward").beta, []
    for line in open(workdir / "evaluation" / "completions.jsonl", encoding="utf-8"):
        line = json.loads(line)
        p, g = line["row"], line["sample"]
        assert line["length"] == rollout.mask[p, g].sum() and line["truncated"] == rollout.truncated[p, g]
        if line["truncated"]:
            assert line["self_reward"] is None
            continue
        prompt, completion = rollout.prompt_tokens[p][rollout.prompt_mask[p]], rollout.tokens[p, g][rollout.mask[p, g]]
        tokens = np.concatenate([prompt, completion])[None]
        policy, reference = (
            jax.nn.log_softmax(decoder.apply(ready.model, models.lora.join(trained, state.frozen), tokens)[0, -1])
            for trained in (state.trained, start)
        )
        differences.append(float((policy - reference)[ready.task.probe_token]))
        assert line["self_reward"] == pytest.approx(beta * differences[-1], abs=1e-4)
    assert len(differences) > 3 and max(map(abs, differences)) > 0.02  # the policy has moved


@pytest.mark.parametrize(
    "changes, words",
    [
        (dict(method={"name": "hero"}), ["reward_model", "config.reward.functions"]),
        (
            dict(HERO, reward=Reward(functions=["accuracy", "format", "reward_model"], weights=[1.0, 0.5, 0.0])),
            ["format", "weight"],
        ),
        (
            dict(HERO, reward=Reward(functions=["accuracy", "reward_model"], weights=[0.0, 1.0])),
            ["reward_model", "accuracy"],
        ),
        (dict(method={"name": "hero", "weight_on": "reward"}), ["cancels", "standard deviation"]),
        (dict(method={"name": "genre2"}), ["config.regression.tokenizer"]),
        (dict(reward_model=RewardModel(steps=9)), ["config.reward_model", "reward_model"]),
        (dict(data__values="shuffled"), ["config.data.values", "rlev"]),
        (dict(regression__target="y"), ["config.regression"]),
        (dict(method={"name": "hero+rlev", "hero": {"alhpa": 1.0}}, reward=HERO["reward"]), ["alhpa", "'alpha'"]),
        (
            dict(method={"name": "hero+rlev", "hero": {"alpha": "much"}}, reward=HERO["reward"]),
            ["config.method.hero.alpha"],
        ),
        (dict(supervised__steps=0, steps=0), ["config.steps", "config.supervised.steps"]),
        (dict(eval__verdict="judge"), ["config.eval.verdict", "judge"]),
    ],
    ids=lambda x: "+".join(x) if isinstance(x, dict) else "",
)
def test_a_method_without_its_needs_raises_before_data_is_read(changes, words, tmp_path):
    with pytest.raises(ConfigError) as caught:
        config_lib.validate(tiny(tmp_path / "none.jsonl", **changes))
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_the_error_of_a_missing_value_names_the_row(tmp_path):
    bad = [dict(row) for row in GRADED]
    del bad[7]["value"]
    path = write_rows(tmp_path / "rows.jsonl", bad)
    with pytest.raises(ValueError, match=r"rows.jsonl, line 8 has None in the column 'value'"):
        train.setup(tiny(path, **RLEV), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_start_that_was_not_kept_raises(rows, tmp_path):
    with pytest.raises(ConfigError, match="start_from is .*has no folder start/.*config.checkpoint.keep_start"):
        train.setup(bare(rows, supervised__start_from=str(tmp_path)), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_run_can_begin_with_the_supervised_start_of_another(rows, tmp_path):
    first = tiny(rows, steps=1, supervised__steps=3, checkpoint__keep_start=True)
    run(first, tmp_path / "first")
    second = bare(rows, steps=1, supervised__start_from=str(tmp_path / "first"), checkpoint__keep_start=True)
    run(second, tmp_path / "second")
    ready = train.setup(second, tmp_path / "second")
    like = ready.programs.init().params
    start = [jax.device_get(checkpoints.load_params(tmp_path / d / "start", like)) for d in ("first", "second")]
    assert same(*start) and not same(start[0], jax.device_get(like))

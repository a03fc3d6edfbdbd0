"""Tests rules across fields, and the signals that a method declares."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from helpers.configurations import one_sentence
from helpers.tiny_runs import change, tiny, write_rows
from jaxrl_reason import methods, train
from jaxrl_reason.advantages import center_by_group, chain, stateless, subtract_greedy
from jaxrl_reason.config import Config, ConfigError, make_method, validate
from jaxrl_reason.config.validate import RULES
from jaxrl_reason.methods import Method, PolicyLoss

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.mark.parametrize(
    "changes, names",
    [
        (dict(method={"name": "grppo"}), ["config.method", "grppo", "'grpo'"]),
        (dict(method={}), ["config.method"]),
        (dict(method={"name": 3}), ["config.method"]),
        (dict(method={"name": "dapo", "clip_hi": 1}), ["config.method", "clip_hi", "'clip_high'"]),
        (dict(method={"name": "grpo", "clip_low": -1}), ["config.method", "clip_low", "-1"]),
        (dict(method={"name": "grpo", "eps": "small"}), ["config.method", "eps"]),
        (dict(method={"name": "grpo", "clip_low": "wide"}), ["config.method", "clip_low"]),
        (dict(method={"name": "dapo", "overlong_max_length": 8}), ["overlong_cache_length"]),
        (dict(method={"name": "reinforce_pp", "kl_coef": -1.0}), ["config.method", "kl_coef"]),
        (dict(group_size=1), ["group_size", "1", "at least 2"]),
        (dict(group_size=1, method={"name": "rloo"}), ["group_size", "at least 2"]),
        (dict(group_size=1, method={"name": "dapo"}), ["group_size", "at least 2"]),
        (dict(update__accumulation=3), ["config.update.accumulation is 3", "16"]),
        (dict(log__trackers=["wandb", "tensorboard"]), ["config.log.trackers", "one of wandb, trackio, mlflow"]),
        (dict(log__trackers=[["wandb"]]), ["config.log.trackers", "one of wandb"]),
        (dict(log__trackers=["wandb", "wandb"]), ["config.log.trackers", "once"]),
        (dict(log__profile=[10]), ["config.log.profile is [10]", "such as [10, 12]"]),
        (dict(log__profile=[1, 2.5]), ["config.log.profile", "such as [10, 12]"]),
        (dict(log__profile=[True, 2]), ["config.log.profile", "such as [10, 12]"]),
        (dict(log__profile=[3, 2]), ["config.log.profile is [3, 2]", "at least 1", "config.steps (100)"]),
        (dict(log__profile=[0, 2]), ["config.log.profile", "at least 1"]),
        (dict(log__profile=[99, 101]), ["config.log.profile", "config.steps (100)"]),
        (dict(reward__weights=[True]), ["config.reward.weights", "True"]),
        (dict(model__heads=3), ["config.model.heads (3)", "kv_heads"]),
        (dict(model__width=130), ["config.model.width (130)", "model.heads"]),
        (dict(model__head_dim=3), ["config.model.head_dim is 3", "even"]),
        (dict(model__sliding_period=2), ["config.model.sliding_period", "sliding_window"]),
        (dict(model__rope_scaling={"factor": 4.0}), ["config.model.rope_scaling", "'kind'", "original_length"]),
        (
            dict(model__rope_scaling={"kind": "yarn", "factor": 4.0}),
            ["config.model.rope_scaling.kind is 'yarn'", "llama3"],
        ),
        (dict(model__rope_scaling={"kind": "linear", "factor": 0}), ["config.model.rope_scaling.factor is 0"]),
        (
            dict(model__rope_scaling={"kind": "linear", "factor": 4, "original_length": 512}),
            ["original_length", "'llama3'"],
        ),
        (
            dict(model__rope_scaling={"kind": "llama3", "factor": 4, "low_freq_factor": 4.0}),
            ["high_freq_factor is 4.0"],
        ),
        (dict(model__sliding_window=4, model__local_rope_theta=5.0), ["config.model.local_rope_theta", "rope_theta"]),
        (dict(model__rope_scaling={"kind": "linear", "factor": True}), ["rope_scaling.factor is True", "a number"]),
        (dict(model__rope_scaling={"kind": "linear", "factor": "4"}), ["config.model.rope_scaling", "'4'", "'factor'"]),
        (dict(optimizer__b1=1.0), ["config.optimizer.b1 is 1.0", "less than 1"]),
        (dict(optimizer__b2=1 - 1e-9), ["config.optimizer.b2 is 0.999999999", "less than 1 in float32"]),
    ],
    ids=lambda x: str(x)[:60] if isinstance(x, dict) else "",
)
def test_invalid_configurations_raise_one_sentence(changes, names):
    with pytest.raises(ConfigError) as error:
        validate(change(Config(), **changes))
    text = one_sentence(error)
    assert all(name in text for name in names), text


@pytest.fixture
def registry(monkeypatch):
    """Removes the methods that a test has registered."""
    monkeypatch.setattr(methods.registry, "_ESTIMATORS", dict(methods.registry._ESTIMATORS))


NUMBERS = dict(regression__tokenizer="normalized", data__train="synthetic")
JUDGED = dict(method={"name": "hero"}, reward__functions=["accuracy", "reward_model"])

# For each of RULES, in order: (changed fields, field and value in the message, another part of the message).
BROKEN = [
    (
        dict(method={"name": "dapo", "overlong_max_length": 9000, "overlong_cache_length": 5}),
        "method.overlong_max_length is 9000",
        "no completion reaches: set it to config.max_completion_length (",
    ),
    (dict(group_size=1, method={"name": "dynamic"}), "group_size is 1", "both correct and incorrect"),
    (dict(method={"name": "genre2"}), "method.name is 'genre2'", "config.regression.tokenizer"),
    (dict(update__minibatches=3), "update.minibatches is 3", "config.prompts_per_step (16)"),
    (dict(update__minibatches=8, update__accumulation=4), "update.accumulation is 4", "2 prompts per update"),
    (dict(update__wave_tokens=9, update__lengths=1), "update.wave_tokens is 9", "config.update.lengths is 1"),
    (dict(data__system="Be short."), "data.chat is False", "config.data.system"),
    (dict(data__columns={"question": 3}), "data.columns is {'question': 3}", "column names"),
    (dict(data__eval_columns={3: "question"}), "data.eval_columns is {3: 'question'}", "column names"),
    (dict(reward__functions=[3]), "reward.functions is [3]", "name of a reward"),
    (dict(reward__functions=[]), "reward.functions is []", "at least one"),
    (dict(reward__weights=[1.0, 2.0]), "reward.weights is [1.0, 2.0]", "['accuracy']"),
    (dict(reward__weights=["1"]), "reward.weights is ['1']", "a number"),
    (dict(reward__verdict="acuracy"), "reward.verdict is 'acuracy'", "Did you mean 'accuracy'?"),
    (dict(eval__verdict="judge"), "eval.verdict is 'judge'", "config.reward.functions. There are: accuracy."),
    (dict(optimizer__float32_master=True), "optimizer.float32_master is True", "leave it out"),
    (dict(sampling__parts=3), "sampling.parts is 3", "config.prompts_per_step (16)"),
    (dict(sampling__importance_cap=3.0), "sampling.importance_cap is 3.0", "config.sampling.quantize"),
    (dict(sampling__quantize="int8", method={"name": "laser"}), "sampling.quantize is 'int8'", "'laser' needs exact"),
    (dict(steps=0), "steps is 0", "config.supervised.steps is 0, too"),
    (dict(regression__target="y"), "regression.tokenizer is ''", "config.regression"),
    (NUMBERS | dict(regression__validation_every=5), "regression.validation_every is 5", "validation_split: set both"),
    (
        NUMBERS | dict(regression__encoder_dropout=0.1, regression__inputs="text"),
        "regression.encoder_dropout is 0.1",
        "rows as text have no MLP",
    ),
    (NUMBERS | dict(regression__encoder_dropout=0.1), "regression.encoder_dropout is 0.1", "supervised.steps is 0"),
    (NUMBERS | dict(method={"name": "dapo"}), "method.name is 'dapo'", "config.method.dynamic_sampling=false"),
    (NUMBERS | dict(lora__rank=2), "lora.rank is 2", "set it to 0"),
    (NUMBERS | dict(data__template="qa"), "data.template is 'qa'", "a regression run"),
    (NUMBERS | dict(model__path="model", data__tokenizer="other"), "data.tokenizer is 'other'", "config.model.path"),
    (NUMBERS | dict(model__path="model"), "model.path is 'model'", "config.regression.inputs='text'"),
    (NUMBERS | dict(method={"name": "rlev"}), "method.name is 'rlev'", "config.regression.value"),
    (NUMBERS | dict(data__values="shuffled"), "data.values is 'shuffled'", "regression run"),
    (NUMBERS | dict(method={"name": "progrpo"}), "method.name is 'progrpo'", "it needs answer_confidence"),
    (
        NUMBERS | dict(reward__functions=["accuracy", "reward_model"]),
        "reward.functions is",
        "'reward_model' reads text",
    ),
    (NUMBERS | dict(method={"name": "maxrl"}), "method.name is 'maxrl'", "those of a regression run are negative"),
    (
        dict(method={"name": "maxrl"}, reward__weights=[-1.0]),
        "reward.weights is [-1.0]",
        "'maxrl' refuses negative rewards: each must be at least 0",
    ),
    (
        dict(method={"name": "maxrl"}, reward__functions=["accuracy", "reward_model"]),
        "reward.functions is ['accuracy', 'reward_model']",
        "'reward_model' can be negative: use 'reward_model_probability'",
    ),
    (dict(method={"name": "hero"}), "method.name is 'hero'", "add 'reward_model'"),
    (
        JUDGED | dict(reward__weights=[1.0, 0.5]),
        "reward.weights is [1.0, 0.5]",
        "the weights of reward_model do not fit",
    ),
    (dict(method={"name": "no_loss"}), "method.name is 'no_loss'", "SelfReward"),
    (dict(data__values="shuffled"), "data.values is 'shuffled'", "use rlev"),
    (dict(reward_model__steps=9), "reward.functions is ['accuracy']", "config.reward_model is set"),
    (dict(model__path="model", model__qk_norm=True), "model.qk_norm is True", "config.model.path"),
    (dict(lora__alpha=3.0), "lora.rank is 0", "config.lora"),
    (dict(log__trackers=["tensorboard"]), "log.trackers is ['tensorboard']", "one of wandb, trackio, mlflow"),
    (dict(log__trackers=["wandb", "wandb"]), "log.trackers is ['wandb', 'wandb']", "once"),
    (dict(log__profile=[10]), "log.profile is [10]", "such as [10, 12]"),
    (dict(log__profile=[3, 2]), "log.profile is [3, 2]", "config.steps (100)"),
]


@pytest.mark.parametrize(
    "name, value",
    [
        ("chat", True),
        ("columns", {"answer": "y"}),
        ("eval_columns", {"answer": "y"}),
        ("on_bad_row", "skip"),
        ("on_long_prompt", "skip"),
    ],
)
def test_fields_of_questions_are_refused_for_tables(name, value):
    with pytest.raises(ConfigError, match=f"config.data.{name} is .*; a regression run .* does not use it"):
        validate(change(Config(method={"name": "genre2"}), **NUMBERS, **{f"data__{name}": value}))


@pytest.mark.parametrize("number", range(len(RULES)), ids=[f"{i}-{rule.field}" for i, rule in enumerate(RULES)])
def test_each_rule_raises_with_field_value_and_advice(number, registry):
    same = stateless(lambda advantages, inputs: advantages)

    @methods.register
    def dynamic():
        return Method(same, PolicyLoss(), dynamic_sampling=True)

    @methods.register
    def no_loss():
        return Method(same, PolicyLoss(), signals=frozenset({"self_rewards"}))

    changes, value, advice = BROKEN[number]
    config = change(Config(), **changes)
    with pytest.raises(ConfigError) as error:
        validate(config)
    text = one_sentence(error)
    assert text.startswith(f"config.{value}") and advice in text, text
    assert [bool(rule.broken(config, make_method(config))) for rule in RULES[: number + 1]] == [False] * number + [True]


def test_each_rule_has_a_case():
    assert len(BROKEN) == len(RULES)


@pytest.mark.parametrize(
    "read",
    [
        lambda inputs: inputs.greedy_rewards[:, None],
        lambda inputs: inputs.kl.sum(axis=-1),
        lambda inputs: subtract_greedy().update(inputs.rewards, (), inputs)[0],
    ],
    ids=["index", "attribute", "transformation"],
)
def test_an_estimator_that_uses_undeclared_signals_raises(read, registry):
    @methods.register
    def undeclared():
        return Method(chain(stateless(lambda advantages, inputs: advantages - read(inputs))), PolicyLoss())

    with pytest.raises(ConfigError) as error:
        validate(Config(method={"name": "undeclared"}))
    text = one_sentence(error)
    assert "'undeclared' reads the signals" in text and "Method(signals=...)" in text
    assert re.search(r"\['(kl|greedy_rewards)'\]", text), text


@pytest.mark.parametrize(
    "function, reason",
    [
        (lambda advantages, inputs: ~inputs.rewards, "TypeError"),
        (lambda advantages, inputs: inputs.reward, "AttributeError"),
        (lambda advantages, inputs: advantages + jnp.ones(3), "shape"),
        (lambda advantages, inputs: advantages if inputs.truncated.any() else -advantages, "boolean"),
    ],
    ids=["dtype", "unknown field", "shape", "branch on values"],
)
def test_an_estimator_that_cannot_be_traced_raises(function, reason, registry):
    @methods.register
    def untraceable():
        return Method(chain(stateless(function)), PolicyLoss())

    with pytest.raises(ConfigError) as error:
        validate(Config(method={"name": "untraceable"}))
    text = str(error.value)
    assert "config.method.name 'untraceable'" in text and reason in text and "\n" not in text


@pytest.mark.runs
def test_a_registered_estimator_gets_boolean_signals_and_trains(registry, tmp_path):
    @methods.register
    def ended_only():
        """Uses only completions that are complete and incorrect."""
        keep = lambda advantages, inputs: jnp.where(~inputs.truncated & ~inputs.verdicts, advantages, 0.0)
        return Method(chain(center_by_group(), stateless(keep)), PolicyLoss())

    config = tiny(write_rows(tmp_path / "rows.jsonl"), method={"name": "ended_only"})
    train.train(train.setup(config, tmp_path / "run"))
    steps = [json.loads(line) for line in open(tmp_path / "run" / "metrics.jsonl")]
    assert [line["step"] for line in steps] == [1, 2] and all(np.isfinite(line["loss"]) for line in steps)


ESTIMATORS = [name for name in methods.names() if "base" not in methods.keywords(name)]


@pytest.mark.parametrize("name", ESTIMATORS)
def test_validate_returns_the_configured_method(name):
    assert validate(Config(method={"name": name})).name == name


def test_validate_compiles_nothing():
    compiled = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, _, **kw: compiled.append(kw) if event == "/jax/core/compile/backend_compile_duration" else None
    )
    for name in ESTIMATORS:
        validate(Config(method={"name": name}))
    assert not compiled

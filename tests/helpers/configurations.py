"""All fields of the configuration, and configurations with one field changed."""

from collections.abc import Iterator
import dataclasses
import functools
import typing
from typing import Any

from helpers.tiny_runs import change
from jaxrl_reason.config import Config


def _leaves(kind: type = Config, prefix: str = "") -> Iterator[tuple[str, dataclasses.Field, type]]:
    hints = typing.get_type_hints(kind)
    for f in dataclasses.fields(kind):
        if dataclasses.is_dataclass(hints[f.name]):
            yield from _leaves(hints[f.name], f"{prefix}{f.name}.")
        else:
            yield prefix + f.name, f, hints[f.name]


# "section.field" -> (dataclass field, type), for every field that is not a section.
LEAVES = {name: (field, hint) for name, field, hint in _leaves()}
FIELDS = [name for name in LEAVES if name != "method"]


def with_value(name: str, value: Any) -> Config:
    """Returns the default configuration with one field set."""
    return change(Config(), **{name.replace(".", "__"): value})


def default(name: str) -> Any:
    """Returns the default of a field."""
    return functools.reduce(getattr, name.split("."), Config())


def one_sentence(error) -> str:
    """Returns the message of `pytest.raises`, after checking that it is one line that ends as a sentence."""
    text = str(error.value)
    assert "\n" not in text and text.rstrip().endswith((".", "?")), text
    return text

"""Checks of the shapes and dtypes in annotations. The package itself never checks them."""

from collections.abc import Callable
import functools
import importlib
import inspect
import sys
from types import ModuleType
from typing import Any, get_type_hints

import beartype
from beartype.door import is_bearable
import jaxtyping

import jaxrl_reason

MATHEMATICS = ("jaxrl_reason.advantages", "jaxrl_reason.losses", "jaxrl_reason.metrics")
AS_NUMPY = beartype.BeartypeConf(is_pep484_tower=True)  # an int is a float


def check_fields(value: Any) -> None:
    """Raises TypeError if a field of a NamedTuple does not have the annotated shape or dtype.

    A letter is one size in all fields of the NamedTuple.
    """
    with jaxtyping.jaxtyped("context"):
        _check_fields(value)


def _check_fields(value: Any) -> None:
    for name, hint in get_type_hints(type(value), include_extras=True).items():
        if not is_bearable(getattr(value, name), hint, conf=AS_NUMPY):
            raise TypeError(f"{type(value).__name__}.{name} is {getattr(value, name)!r}, not {hint}.")


def typechecker(function: Callable) -> Callable:
    """Returns a function that checks its arguments, and the fields of arguments that are NamedTuples.

    A letter is one size in all arguments and fields.
    """
    checked = beartype.beartype(conf=AS_NUMPY)(function)

    @functools.wraps(function)
    def check(*args, **kwargs):
        result = checked(*args, **kwargs)
        for argument in inspect.signature(function).bind(*args, **kwargs).arguments.values():
            if isinstance(argument, tuple) and hasattr(argument, "_fields"):
                _check_fields(argument)
        return result

    return check


@functools.cache
def checked_modules() -> dict[str, ModuleType]:
    """Returns second copies of advantages, losses and metrics that check annotations at every call."""
    ours = {name: module for name, module in sys.modules.items() if name.startswith(MATHEMATICS)}
    for name in ours:
        del sys.modules[name]
    try:
        with jaxtyping.install_import_hook(list(MATHEMATICS), "helpers.shapes.typechecker"):
            copies = {name.rpartition(".")[2]: importlib.import_module(name) for name in MATHEMATICS}
    finally:
        for name in [name for name in sys.modules if name.startswith(MATHEMATICS)]:
            del sys.modules[name]
        sys.modules.update(ours)
        for name in ours.keys() & set(MATHEMATICS):
            setattr(jaxrl_reason, name.rpartition(".")[2], ours[name])
    return copies

"""Checks of the shapes and dtypes that annotations state. The package itself never checks them."""

import functools
import importlib
import inspect
import sys
from types import ModuleType
from typing import Any, Callable, get_type_hints

import beartype
import jaxtyping

import jaxrl_reason

MATHEMATICS = ("jaxrl_reason.advantages", "jaxrl_reason.losses", "jaxrl_reason.metrics")


def check_fields(value: Any) -> None:
    """Raises TypeError if an array of a NamedTuple does not have the annotated shape or dtype.

    One letter is one size: of all fields, and of the arguments of the checked function that calls.
    """
    for name, hint in get_type_hints(type(value), include_extras=True).items():
        if not isinstance(getattr(value, name), hint):
            raise TypeError(f"{type(value).__name__}.{name} is {getattr(value, name)!r}, not {hint}.")


def typechecker(function: Callable) -> Callable:
    """Checks arguments as beartype does, and the fields of those that are NamedTuples of arrays."""
    # With the numeric tower an int is a float, as numpy and jax have it.
    checked = beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))(function)

    @functools.wraps(function)
    def check(*args, **kwargs):
        result = checked(*args, **kwargs)
        for argument in inspect.signature(function).bind(*args, **kwargs).arguments.values():
            if type(argument).__name__ in ("AdvantageInputs", "SpreadState", "Totals", "ClassTotals"):
                check_fields(argument)
        return result

    return check


@functools.cache
def checked() -> dict[str, ModuleType]:
    """Returns second copies of the modules of mathematics, by name, that check the annotations at every call."""
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
        for name in MATHEMATICS:
            if name in ours:
                setattr(jaxrl_reason, name.rpartition(".")[2], ours[name])
    return copies

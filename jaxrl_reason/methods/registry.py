"""The registered methods by name, and the methods that they make: one estimator, or a stack of extensions on one."""

from collections.abc import Callable, Collection
import dataclasses
import difflib
import inspect
from typing import Any, NamedTuple, TypeVar

from jaxrl_reason.advantages import AdvantageTransform, chain
from jaxrl_reason.methods.types import Extension, Method


class _Registered(NamedTuple):
    factory: Callable[..., Extension]
    base: str  # the estimator that it extends by default
    defaults: dict[str, Any]  # of that estimator's parameters, if no base is named


_Factory = TypeVar("_Factory", bound=Callable[..., Any])
_ESTIMATORS: dict[str, Callable[..., Method]] = {}
_EXTENSIONS: dict[str, _Registered] = {}


def register(factory: Callable[..., Method]) -> Callable[..., Method]:
    """Makes `factory(**keywords) -> Method` available to `create` under its function name.

    Raises ValueError for a name that is taken, TypeError for a parameter that is not keyword-only or has no default.
    """
    _check_factory(factory)
    _ESTIMATORS[factory.__name__] = factory
    return factory


def register_extension(base: str, **defaults: Any) -> Callable[[_Factory], _Factory]:
    """Makes `factory(estimator: Method, **keywords) -> Extension` available to `create` under its function name.

    `base` names the estimator that it extends by default. `defaults` are parameters of that estimator that have other
    defaults then; a base that is named has its own, also in a stack. The decorator raises ValueError and TypeError as `register`.
    """

    def register_it(factory: _Factory) -> _Factory:
        _check_factory(factory, skip=1)
        _EXTENSIONS[factory.__name__] = _Registered(factory, base, defaults)
        return factory

    return register_it


def _check_factory(factory: Callable[..., Any], skip: int = 0) -> None:
    name = factory.__name__
    taken = _EXTENSIONS[name].factory if name in _EXTENSIONS else _ESTIMATORS.get(name)
    # The cell of a notebook or a recipe may run twice.
    if taken and (taken.__module__, taken.__qualname__) != (factory.__module__, factory.__qualname__):
        raise ValueError(f"A method named {name!r} is registered already.")
    for parameter in list(inspect.signature(factory).parameters.values())[skip:]:
        if parameter.kind is not parameter.KEYWORD_ONLY or parameter.default is parameter.empty:
            raise TypeError(f"Method {name!r}: parameter {parameter.name!r} must be keyword-only and have a default.")


def names() -> tuple[str, ...]:
    """Returns the names of the registered methods, estimators first."""
    return (*_ESTIMATORS, *_EXTENSIONS)


def keywords(name: str, base: str = "") -> dict[str, Any]:
    """Returns the parameters of a method and their defaults.

    For an extension, they are its own parameters, `base`, and the parameters of the base that the extension does not
    set itself. For a stack, they are a dict per extension, `base`, and the same parameters of the base.

    Args:
      name: an estimator, an extension, or a stack ("hero+rlev").
      base: the estimator of an extension or a stack; empty means the default one.

    Raises:
      ValueError: a name is unknown, or base is not an estimator.
    """
    known = _all_keywords(name, base)
    if name in _ESTIMATORS:
        return known
    try:
        estimator = create(known["base"])
        fixed = {field for part in name.split("+") for field in _EXTENSIONS[part].factory(estimator).loss}
    except ValueError:  # the defaults do not fit this base; `create` names the cause
        fixed = set()
    own = {key for part in name.split("+") for key in _own_keywords(_EXTENSIONS[part].factory)}
    return {key: default for key, default in known.items() if key in own or key not in fixed}


def _all_keywords(name: str, base: str) -> dict[str, Any]:
    """Returns the parameters as `keywords`, with those that an extension sets itself."""
    if name in _ESTIMATORS:
        return _own_keywords(_ESTIMATORS[name])
    parts = name.split("+")
    for part in parts:
        if part not in _EXTENSIONS:
            near = nearest(part, names())
            if len(parts) > 1 and part in _ESTIMATORS:
                near = f" It is an estimator: give it as base={part!r}."
            raise ValueError(f"There is no method {part!r}{' to stack' if len(parts) > 1 else ''}.{near}")
    others = _defaults(parts, base)
    base = base or (_EXTENSIONS[name].base if len(parts) == 1 else "grpo")
    if base not in _ESTIMATORS:
        why = "a base must be an estimator; use stack() for several methods" if base in _EXTENSIONS else "unknown"
        raise ValueError(f"method.base is {base!r} ({why}).{nearest(base, _ESTIMATORS)}")
    _check_keys(base, others, _own_keywords(_ESTIMATORS[base]))
    own = {part: _own_keywords(_EXTENSIONS[part].factory) for part in parts}
    return (own[name] if len(parts) == 1 else own) | {"base": base} | _own_keywords(_ESTIMATORS[base]) | others


def _defaults(parts: list[str], base: str) -> dict[str, Any]:
    """Returns the defaults of an extension for parameters of its base, which no base that is named has."""
    return {} if base or len(parts) > 1 else _EXTENSIONS[parts[0]].defaults


def summary(name: str) -> str:
    """Returns the first sentence of the docstring of an estimator or extension, without "Builds"; "" without docstring."""
    factory = _ESTIMATORS[name] if name in _ESTIMATORS else _EXTENSIONS[name].factory
    return " ".join((inspect.getdoc(factory) or "").partition("\n\n")[0].split()).removeprefix("Builds ")


def _own_keywords(factory: Callable[..., Any]) -> dict[str, Any]:
    parameters = inspect.signature(factory).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}


def create(name: str, **options: Any) -> Method:
    """Returns the method `name` with its parameters set.

    Args:
      name: an estimator, an extension, or a stack ("hero+rlev", see `stack`).
      **options: the parameters of the method, see `keywords`. `base` names the estimator of an extension.

    Raises:
      ValueError: a name or a parameter is unknown (the message names the nearest valid ones), a value is out of range,
        or a combination contradicts itself or cancels.
    """
    base = options.get("base", "")
    if name not in _ESTIMATORS and not isinstance(base, str):
        raise ValueError(f"method.base is {base!r}; it must be the name of an estimator.")
    known = _all_keywords(name, base)
    _check_keys(name, options, known)
    if name in _ESTIMATORS:
        return dataclasses.replace(_ESTIMATORS[name](**options), name=name)
    parts = name.split("+")
    if len(set(parts)) < len(parts):
        raise ValueError(f"{name!r} names a method twice; each acts once.")
    base = known["base"]
    estimator = create(base, **_select(known | options, _ESTIMATORS[base]))
    extensions = {}
    for part in parts:
        factory = _EXTENSIONS[part].factory
        given = options
        if len(parts) > 1:
            given = _options_of(part, options)
            _check_keys(part, given, _own_keywords(factory))
        extensions[part] = factory(estimator, **_select(given, factory))
        for field, value in extensions[part].loss.items():
            if field in options and field not in _own_keywords(factory):
                chosen = options[field]
                raise ValueError(f"method.{field} is {chosen!r}, and {part} sets it to {value!r}; leave it out.")
    return combine(name, estimator, extensions)


def stack(*parts: str, base: str = "grpo", **options: Any) -> Method:
    """Returns several methods on one estimator, for example

        stack("hero", "rlev", "progrpo", base="rloo", hero={"alpha": 0.1}, clip_high=0.28)

    The slots of `Extension` set the order of the transformations, whatever the order of the names. The options are a
    dict per extension, and the parameters of the estimator. Raises ValueError as `create`, and without parts.
    """
    if not parts:
        raise ValueError("stack() needs at least one method; for a bare estimator use create().")
    if len(parts) == 1:
        own = _options_of(parts[0], options)
        options = {k: v for k, v in options.items() if k != parts[0]} | own
    return create("+".join(parts), base=base, **options)


def _check_keys(name: str, options: Collection[str], known: Collection[str]) -> None:
    for key in options:
        if key not in known:
            raise ValueError(f"Method {name!r} has no parameter {key!r}.{nearest(key, known)}")


def _options_of(part: str, options: dict[str, Any]) -> dict[str, Any]:
    given = options.get(part, {})
    if not isinstance(given, dict):
        raise ValueError(f"method.{part} is {given!r}; it must be a dict of {part}'s parameters.")
    return given


def _select(options: dict[str, Any], factory: Callable[..., Any]) -> dict[str, Any]:
    return {k: options[k] for k in _own_keywords(factory) if k in options}


def combine(name: str, estimator: Method, extensions: dict[str, Extension]) -> Method:
    """Returns the method `name`: an estimator and its extensions, which are by name, in the order of the name.

    Their transformations are in the order of the slots. Raises ValueError for parts that contradict each other.
    """
    parts = extensions.values()
    giving = [n for n, e in extensions.items() if e.gives_reward]
    judging = [n for n, e in extensions.items() if e.judges]
    if giving and judging:
        raise ValueError(
            f"{name!r} contradicts itself: {judging[0]} needs verdicts (correct or incorrect), and the reward of {giving[0]} "
            "is a distance without verdicts, so its part would never act."
        )
    if giving and estimator.dynamic_sampling:
        raise ValueError(
            f"{name!r} contradicts itself: {estimator.name} keeps groups with both correct and incorrect answers, and the "
            f"reward of {giving[0]} is a distance without verdicts; set dynamic_sampling to False."
        )

    def filled(*slots: str) -> list[AdvantageTransform]:
        return [t for slot in slots for e in parts if (t := getattr(e, slot)) is not None]

    auxiliary = estimator.loss.auxiliary + tuple(settings for e in parts for settings in e.auxiliary)
    fields = {name: value for e in parts for name, value in e.loss.items()}
    before, after = filled("replace_reward", "scale_reward"), filled("scale_advantage", "add", "mix")
    return dataclasses.replace(
        estimator,
        advantage=chain(*before, estimator.advantage, *after),
        loss=dataclasses.replace(estimator.loss, auxiliary=auxiliary, **fields),
        signals=estimator.signals.union(*(e.signals for e in parts)),
        name=name,
    )


def nearest(word: str, known: Collection[str]) -> str:
    """Returns the end of an error message: " Did you mean ...?" with the nearest known words, or all known words."""
    close = difflib.get_close_matches(word, known, n=3, cutoff=0.5)
    if close:
        return " Did you mean " + " or ".join(repr(c) for c in close) + "?"
    return " There are: " + ", ".join(known) + "." if known else " It has none."

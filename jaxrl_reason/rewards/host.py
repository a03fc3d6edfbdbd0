"""Rewards that run on the host, by TRL's signature: f(prompts, completions, completion_ids, **columns) -> rewards.

All arguments are flat lists of one length, given by keyword. The completions of a prompt are adjacent. One call has a
whole batch, or with `isolated` one prompt. A reward is a float, or `None` for "no reward for this sample": it becomes
NaN, is left out of every statistic, and is never 0. A `pool.Results` list also tells why a reward is missing.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
import dataclasses
import difflib
import functools
import importlib
import importlib.util
import inspect
import itertools
import logging
import math
from pathlib import Path
import sys
from types import ModuleType
from typing import Any

import numpy as np

from jaxrl_reason.rewards import math as math_rewards
from jaxrl_reason.rewards.functions import accuracy_reward, format_reward, last_number_reward
from jaxrl_reason.rewards.math import math_verify_reward, require_math_verify
from jaxrl_reason.rewards.pool import Results
from jaxrl_reason.rewards.task_rewards import judge_reward, many_answers_reward, strict_reward

RewardFunction = Callable[..., Sequence[float | None]]

BUILT_IN: dict[str, RewardFunction] = {
    "accuracy": accuracy_reward,
    "last_number": last_number_reward,
    "format": format_reward,
    "many_answers": many_answers_reward,
    "strict": strict_reward,
    "judge": judge_reward,
    "math_verify": math_verify_reward,
}
# Rewards that compare with a reference of each row, so that all references are tried before training.
COMPARING = tuple(BUILT_IN[name] for name in BUILT_IN if name != "format")

_LARGEST = float(np.finfo(np.float32).max)
_log = logging.getLogger(__name__)


class RewardError(Exception):
    """A reward cannot be found, cannot be called, or breaks its contract. The message is a sentence for the user."""


@dataclasses.dataclass(frozen=True)
class HostReward:
    """A reward function, any callable by TRL's signature, and its name in the metrics `rewards/<name>/...`.

    An empty name becomes the function's own (or its class's). Raises RewardError if `function` is not callable.
    """

    name: str
    function: RewardFunction

    def __post_init__(self):
        if not callable(self.function):
            kind = type(self.function).__name__
            raise RewardError(f"Reward {self.name!r} is a {kind}, which cannot be called; give a function.")
        if not self.name:
            object.__setattr__(self, "name", name_of(self.function))


@dataclasses.dataclass(frozen=True)
class RewardTable:
    """The rewards of P prompts x G completions by name, and the shares of rows on which each reward is missing."""

    per_reward: dict[str, np.ndarray]  # float32[P,G], unweighted; NaN if the function returned None or failed
    error_rate: dict[str, float]  # the function raised or reports an error
    none_rate: dict[str, float]  # it returned None
    timeout_rate: dict[str, float]  # it reports a timeout
    error: dict[str, str]  # the text of the last error, "" if there was none

    def failures(self) -> dict[str, float]:
        """Returns `rewards/<name>/{error_rate,none_rate,timeout_rate}`, the shares of rows without a reward."""
        kinds = {"error_rate": self.error_rate, "none_rate": self.none_rate, "timeout_rate": self.timeout_rate}
        return {f"rewards/{name}/{kind}": rate for kind, rates in kinds.items() for name, rate in rates.items()}


def reference_faults(function: RewardFunction, columns: Mapping[str, Sequence]) -> list[str | None]:
    """Returns, for each row, why a reward of `COMPARING` cannot judge completions of it, or None if it can."""
    size = len(next(iter(columns.values())))
    if function is math_verify_reward:
        return math_rewards.reference_faults(columns.get("answer", [None] * size))
    faults: list[str | None] = []
    for row in range(size):
        try:
            function(**{name: [values[row]] for name, values in columns.items()}, prompts=[""], completions=[""])
            faults.append(None)
        except (ValueError, TypeError) as error:  # the reference is missing or cannot be read
            faults.append(str(error))
    return faults


def load_reward(spec: str, other_names: Sequence[str] = ()) -> RewardFunction:
    """Returns the function of a name: built in ("accuracy"), "package.module:function", or "path/to/file.py:function".

    Raises RewardError if nothing has that name, or if a package is missing. The message gives the nearest existing names;
    `other_names` are built-in names that the caller handles itself.
    """
    place, colon, attribute = spec.rpartition(":")
    if not colon:
        if spec == "math_verify":
            try:
                require_math_verify()
            except ImportError as error:
                raise RewardError(str(error)) from None
        if spec in BUILT_IN:
            return BUILT_IN[spec]
        known = [*BUILT_IN, *other_names]
        raise RewardError(
            f"There is no built-in reward {spec!r}{_nearest(spec, known)}. Built in are {', '.join(known)}; "
            'name a function of your own as "package.module:function" or "path/to/file.py:function".'
        )
    module = _import_file(Path(place), spec) if place.endswith(".py") else _import_module(place, spec)
    function = getattr(module, attribute, None)
    if not callable(function):
        problem = f"has no function {attribute!r}" if function is None else f"has {attribute!r}, which cannot be called"
        valid = [name for name, value in vars(module).items() if callable(value)]
        raise RewardError(f"Reward {spec!r}: {place} {problem}{_nearest(attribute, valid)}.")
    return function


def compute_rewards(
    rewards: Sequence[HostReward],
    prompts: Sequence[str],
    completions: Sequence[Sequence[str]],
    completion_ids: Sequence[Sequence[Sequence[int]]],
    columns: Mapping[str, Sequence],
    max_failure_share: float = 0.5,
) -> RewardTable:
    """Calls every reward on P prompts x G completions.

    If a function raises, it is called again for each row alone. Only the rows that raise go missing, and all other rows
    keep their reward. A reward that compares the rows of a batch must therefore not rely on raising. A function that
    returns `pool.Results` has counted its errors and timeouts itself. If more than `max_failure_share` of a function's
    rows fail, the fault is in the function rather than in the rows, and this raises. Rewards have distinct names. There
    are P prompts, P lists of G completions and of their ids, end token included, and per column P values, which are
    repeated for the completions.

    Raises RewardError if a function fails too often, lacks an argument, returns the wrong length or a value that is
    neither a finite number nor None, or if the inputs do not fit each other. The message names the function.
    """
    shape = checked_shape(prompts, completions, completion_ids, columns)
    repeat = lambda values: [value for value in values for _ in range(shape[1])]
    flatten = lambda groups: [value for group in groups for value in group]
    rows = dict(prompts=repeat(prompts), completions=flatten(completions), completion_ids=flatten(completion_ids))
    rows |= {name: repeat(values) for name, values in columns.items()}
    table = RewardTable({}, {}, {}, {}, {})
    for reward in rewards:
        if hasattr(reward.function, "in_groups_of"):
            reward = dataclasses.replace(reward, function=reward.function.in_groups_of(shape[1]))
        results = _rewards_of_rows(reward, rows, max_failure_share)
        table.per_reward[reward.name] = np.array(results, np.float32).reshape(shape)
        table.error[reward.name] = results.error or ""
        for kind in ("error", "none", "timeout"):
            getattr(table, f"{kind}_rate")[reward.name] = results.outcomes.count(kind) / len(results)
    return table


def _rewards_of_rows(reward: HostReward, rows: dict[str, list], max_failure_share: float) -> Results:
    """Returns one float per row, NaN if missing, and the outcomes."""
    count, name = len(rows["completions"]), reward.name
    check_signature(reward, rows)
    results, first_error = _try_call(reward, rows, first_row=0)
    if first_error is None:
        failures = _check_failures(reward, results, count, max_failure_share)
        if failures:
            missing = f"{failures} of {count} rows, which get no reward"
            _log.warning("Reward %r failed on %s; the last error is %s", name, missing, results.error)
        return results
    results = Results([], [])
    for row in range(count):
        one, cause = _try_call(reward, {name: column[row : row + 1] for name, column in rows.items()}, first_row=row)
        results += one
        results.outcomes += one.outcomes
        results.error = one.error or results.error
        # Checked after every row, so that a broken function is not called for all rows.
        failures = _check_failures(reward, results, count, max_failure_share, cause)
    first, missing = f"{type(first_error).__name__}: {first_error}", f"{failures} of {count} rows, which get no reward"
    _log.warning("Reward %r raised %s; called row by row, it failed on %s.", name, first, missing)
    return results


def _try_call(reward: HostReward, rows: Mapping[str, Sequence], first_row: int) -> tuple[Results, BaseException | None]:
    """Returns the results of `call` and None, or one "error" and the exception of the function."""
    try:
        return call(reward, rows, first_row), None
    except (RewardError, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # not Exception: math-verify's timeouts derive from BaseException
        return Results([math.nan], ["error"], f"{type(error).__name__}: {error}"), error


def _check_failures(
    reward: HostReward, results: Results, count: int, max_share: float, cause: BaseException | None = None
) -> int:
    """Returns how many rows have failed so far. Raises RewardError if they exceed the share of all `count` rows."""
    failures = sum(outcome in ("error", "timeout") for outcome in results.outcomes)
    if failures > max_share * count:
        raise RewardError(
            f"Reward {reward.name!r} failed on {failures} of the {len(results)} rows tried, more than the share of "
            f"{max_share:g} of {count} rows that may fail; the last error is {results.error}"
        ) from cause
    return failures


def call(reward: HostReward, rows: Mapping[str, Sequence], first_row: int) -> Results:
    """Calls a reward once and returns its rewards as floats, NaN for None, with their outcomes.

    `first_row` is the number of the first row, for messages. Raises RewardError if the return value breaks the contract.
    Anything that the function itself raises passes through.
    """
    count = len(rows["completions"])
    # Each function gets its own lists, so that it may sort or clear them.
    result = reward.function(**{name: list(column) for name, column in rows.items()})
    name = f"Reward {reward.name!r}"
    try:
        returned = list(result)
    except TypeError:
        kind = type(result).__name__
        raise RewardError(f"{name} returned a {kind}; it must return a list of {count} rewards.") from None
    if len(returned) != count:
        raise RewardError(
            f"{name} returned {len(returned)} rewards for {count} completions; it must return one reward per completion, "
            "in order, and None for a missing reward."
        )
    values = [_checked_value(reward, first_row + row, value) for row, value in enumerate(returned)]
    given = ["none" if math.isnan(value) else "ok" for value in values]
    if not isinstance(result, Results):
        return Results(values, given)
    for row, (outcome, present) in enumerate(itertools.zip_longest(result.outcomes, given)):
        if outcome != present and (present != "none" or outcome not in ("error", "timeout")):
            raise RewardError(
                f"{name} reports the outcome {outcome!r} for row {first_row + row}, which has "
                f"{'a' if present == 'ok' else 'no'} reward; give 'ok' with a reward, and 'none', 'error' or 'timeout' "
                "without one."
            )
    return Results(values, result.outcomes, result.error)


def _checked_value(reward: HostReward, row: int, value: Any) -> float:
    if value is None:
        return math.nan
    try:
        number = math.nan if isinstance(value, (str, bytes)) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not abs(number) <= _LARGEST:  # also true of NaN
        fault = f"Reward {reward.name!r} returned {value!r:.80} for row {row}"
        raise RewardError(f"{fault}; return a finite float32 number, or None for a missing reward.")
    return number


def check_signature(reward: HostReward, rows: Mapping[str, Sequence]) -> None:
    """Raises RewardError if the function cannot take these arguments. A TypeError of the call can have other causes."""
    try:
        signature = inspect.signature(reward.function)
    except (TypeError, ValueError):  # some callables written in C have none
        return
    try:
        signature.bind(**rows)
    except TypeError as error:
        raise RewardError(
            f"Reward {reward.name!r} cannot be called: {error}. It gets {', '.join(rows)}, by keyword; name the arguments "
            "that it uses and take the others as **columns."
        ) from None


def checked_shape(
    prompts: Sequence[str],
    completions: Sequence[Sequence[str]],
    completion_ids: Sequence[Sequence[Sequence[int]]],
    columns: Mapping[str, Sequence],
) -> tuple[int, int]:
    """Returns (P, G). Raises RewardError if the inputs of `compute_rewards` do not fit each other."""
    if len(prompts) == 0 or len(completions) != len(prompts) or len(completions[0]) == 0:
        counts = f"{len(prompts)} prompts and {len(completions)} groups of completions"
        raise RewardError(f"There are {counts}; give one non-empty group per prompt.")
    groups = len(completions[0])
    sizes, id_sizes = [len(group) for group in completions], [len(group) for group in completion_ids]
    if set(sizes) != {groups} or id_sizes != sizes:
        shown = lambda sizes: ", ".join(map(str, sizes[:8])) + (", ..." if len(sizes) > 8 else "")
        raise RewardError(
            "Every prompt needs the same number of completions and of completion_ids; the groups have "
            f"{shown(sizes)} completions and {shown(id_sizes)} completion_ids."
        )
    for name, values in columns.items():
        if name in ("prompts", "completions", "completion_ids"):
            raise RewardError(f"A data column is named {name!r}, a name that the run itself uses; rename the column.")
        if len(values) != len(prompts):
            counts = f"{len(values)} values for {len(prompts)} prompts"
            raise RewardError(f"Column {name!r} has {counts}; give one value per prompt.")
    return len(prompts), groups


def name_of(function: Callable) -> str:
    """Returns the name of a function, of the function in a partial, or of a callable object's class."""
    while isinstance(function, functools.partial):
        function = function.func
    return getattr(function, "__name__", type(function).__name__)


def _nearest(name: str, valid: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(valid), n=3, cutoff=0.5)
    return f"; did you mean {' or '.join(map(repr, close))}?" if close else ""


def _import_module(name: str, spec: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except Exception as error:
        raise RewardError(
            f"Reward {spec!r}: importing {name!r} failed with {type(error).__name__}: {error}. Install the module or start "
            'the run in its directory; name a file anywhere else as "path/to/file.py:function".'
        ) from error


def _import_file(path: Path, spec: str) -> ModuleType:
    if not path.is_file():
        nearby = _nearest(path.name, [p.name for p in path.parent.glob("*.py")] if path.parent.is_dir() else [])
        raise RewardError(f"Reward {spec!r}: there is no file {path}{nearby} (in {path.parent.resolve()}).")
    module_spec = importlib.util.spec_from_file_location(f"jaxrl_reason_reward_{path.stem}", path)
    assert module_spec is not None and module_spec.loader is not None  # true of every .py file
    module = importlib.util.module_from_spec(module_spec)
    sys.modules[module_spec.name] = module  # dataclasses look up their module there
    try:
        module_spec.loader.exec_module(module)
    except Exception as error:
        raise RewardError(f"Reward {spec!r}: running {path} failed with {type(error).__name__}: {error}.") from error
    return module

"""Rewards that run on the host, by TRL's signature: f(prompts, completions, completion_ids, **columns) -> rewards.

All arguments are flat lists of one length, given by keyword. The completions of a prompt are adjacent. One call has a
whole batch, or with `isolated` one prompt. A reward is a float, or `None` for "no reward for this sample": it becomes
NaN. A sample without any reward is left out of every statistic. A `pool.Results` list also tells why a reward is missing.
"""

import asyncio
from collections.abc import Callable, Mapping, Sequence, Set
import concurrent.futures
import dataclasses
import functools
import inspect
import itertools
import logging
import math
from pathlib import Path
import re
import sys
import threading
import traceback
from typing import Any

import numpy as np

from jaxrl_reason.rewards import math as math_rewards
from jaxrl_reason.rewards.functions import accuracy_reward, format_reward, last_number_reward
from jaxrl_reason.rewards.math import math_verify_reward
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
ONE_REFERENCE = tuple(f for f in COMPARING if f is not many_answers_reward)  # whose correct answers all mean the same

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
    failed: dict[str, np.ndarray]  # bool[P,G], True for an error or a timeout
    prompt: dict[str, str]  # the first prompt with a failure, "" if there was none

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


def compute_rewards(
    rewards: Sequence[HostReward],
    prompts: Sequence[str],
    completions: Sequence[Sequence[str]],
    completion_ids: Sequence[Sequence[Sequence[int]]],
    columns: Mapping[str, Sequence],
    max_failure_share: float = 0.5,
    warns: bool = True,
) -> RewardTable:
    """Calls every reward on P prompts x G completions; those of `isolated` that are `async` while the others run.

    If a function raises, it is called again for each row alone. Only the rows that raise go missing, and all other rows
    keep their reward. A reward that compares the rows of a batch must therefore not rely on raising. A function that
    returns `pool.Results` has counted its errors and timeouts itself. If more than `max_failure_share` of a function's
    rows fail, the fault is in the function rather than in the rows, and this raises. Rewards have distinct names. There
    are P prompts, P lists of G completions and of their ids, end token included, and per column P values, which are
    repeated for the completions. With `warns`, failures that are allowed are logged.

    Raises RewardError if a function fails too often, lacks an argument, returns the wrong length or a value that is
    neither a finite number nor None, or if the inputs do not fit each other. The message names the function.
    """
    shape = checked_shape(prompts, completions, completion_ids, columns)
    repeat = lambda values: [value for value in values for _ in range(shape[1])]
    flatten = lambda groups: [value for group in groups for value in group]
    rows = dict(prompts=repeat(prompts), completions=flatten(completions), completion_ids=flatten(completion_ids))
    rows |= {name: repeat(values) for name, values in columns.items()}
    table = RewardTable({}, {}, {}, {}, {}, {}, {})
    grouped = [
        dataclasses.replace(reward, function=reward.function.in_groups_of(shape[1]))
        if hasattr(reward.function, "in_groups_of")
        else reward
        for reward in rewards
    ]
    waits = lambda reward: getattr(reward.function, "asynchronous", False)
    with concurrent.futures.ThreadPoolExecutor(len(rewards) or 1) as threads:
        call_one = lambda reward: _rewards_of_rows(reward, rows, max_failure_share)
        begun = {reward.name: threads.submit(call_one, reward) for reward in grouped if waits(reward)}
        done = {reward.name: call_one(reward) for reward in grouped if not waits(reward)}
        done |= {name: future.result() for name, future in begun.items()}
    for reward in rewards:
        results = done[reward.name]
        table.per_reward[reward.name] = np.array(results, np.float32).reshape(shape)
        table.error[reward.name] = results.error or ""
        table.failed[reward.name] = np.array([kind in ("error", "timeout") for kind in results.outcomes]).reshape(shape)
        groups = zip(prompts, table.failed[reward.name])
        table.prompt[reward.name] = next((prompt for prompt, failed in groups if failed.any()), "")
        for kind in ("error", "none", "timeout"):
            getattr(table, f"{kind}_rate")[reward.name] = results.outcomes.count(kind) / len(results)
        if warns:
            warn_of_failures(table, reward.name)
    return table


def _rewards_of_rows(reward: HostReward, rows: dict[str, list], max_failure_share: float) -> Results:
    """Returns one float per row, NaN if missing, and the outcomes."""
    count = len(rows["completions"])
    check_signature(reward, rows)
    results, first_error = _try_call(reward, rows, first_row=0)
    if first_error is None:
        _check_failures(reward, results, count, max_failure_share)
        return results
    first, results = results.error, Results([], [])
    for row in range(count):
        one, cause = _try_call(reward, {name: column[row : row + 1] for name, column in rows.items()}, first_row=row)
        results += one
        results.outcomes += one.outcomes
        results.error = one.error or results.error
        # Checked after every row, so that a broken function is not called for all rows.
        failures = _check_failures(reward, results, count, max_failure_share, cause)
    if not failures:
        fault = f"Reward {reward.name!r} raised {first}; called row by row, it works, in one call per completion."
        _log.warning("%s", fault, extra={"kind": (reward.name, "rows")})
    return results


def warn_of_failures(table: RewardTable, name: str) -> None:
    """Logs the failures of a reward, if any; commands show each kind once: the reward, the class of the error, its place."""
    error, count = table.error[name] or "unknown", table.per_reward[name].size
    failures = round((table.error_rate[name] + table.timeout_rate[name]) * count)
    if failures:
        place = re.search(r"\([^()]*, line \d+\)", error)
        kind = (name, re.sub(r"\d+", "", error.partition(":")[0]), place and place[0])
        fault = f"Reward {name!r} failed on {failures} of {count} rows, which get no reward; the last error is {error.rstrip('.')}."
        fault = f"{fault} The first failure is on a completion of the prompt {table.prompt[name]!r:.80}."
        note = f"Later failures of this kind are only counted, in rewards/{name}/error_rate and timeout_rate."
        _log.warning("%s %s", fault, note, extra={"kind": kind})


def _try_call(reward: HostReward, rows: Mapping[str, Sequence], first_row: int) -> tuple[Results, BaseException | None]:
    """Returns the results of `call` and None, or one "error" and the exception of the function."""
    try:
        return call(reward, rows, first_row), None
    except (RewardError, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # not Exception: math-verify's timeouts derive from BaseException
        note_place(error, reward.function)
        words = " ".join([f"{type(error).__name__}: {error}", *getattr(error, "__notes__", ())])
        return Results([math.nan], ["error"], words), error


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
    """Calls a reward once and returns what `checked` makes of its result. Anything that the function raises passes.

    `first_row` is the number of the first row, for messages.
    """
    # Each function gets its own lists, so that it may sort or clear them.
    result = finish(reward.function(**{name: list(column) for name, column in rows.items()}))
    return checked(reward, result, count=len(rows["completions"]), first_row=first_row)


_of_thread = threading.local()


def finish(result: Any) -> Any:
    """Returns the result of a call, which an `async` function gives only when its event loop runs."""
    if not inspect.isawaitable(result):
        return result
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        # One loop for all calls: the clients that a module holds belong to the loop of their first call.
        if not hasattr(_of_thread, "loop"):
            _of_thread.loop = asyncio.new_event_loop()
        return _of_thread.loop.run_until_complete(result)
    with concurrent.futures.ThreadPoolExecutor(1) as thread:  # a notebook runs a loop of its own
        return thread.submit(finish, result).result()


def checked(reward: HostReward, result: Any, *, count: int, first_row: int) -> Results:
    """Returns the rewards of a call as floats, NaN if missing, with their outcomes.

    A number that is not finite is an "error": the reward of this row alone is missing. Raises RewardError if the result
    breaks the contract in another way: it is no list, has another length, or holds something else than numbers and None.
    """
    name = f"Reward {reward.name!r}"
    try:
        if isinstance(result, (str, bytes, Mapping, Set)):
            raise TypeError
        returned = list(result)
    except TypeError:
        kind = type(result).__name__
        raise RewardError(f"{name} returned a {kind}; it must return a list of {count} rewards.") from None
    if len(returned) != count:
        raise RewardError(
            f"{name} returned {len(returned)} rewards for {count} completions; it must return one reward per completion, "
            "in order, and None for a missing reward."
        )
    values = [_number(reward, first_row + row, value) for row, value in enumerate(returned)]
    given = ["none" if value is None else "ok" if math.isfinite(value) else "error" for value in values]
    error = next((_fault(reward, first_row + i, returned[i]) for i in range(count) if given[i] == "error"), "")
    values = [math.nan if value is None or not math.isfinite(value) else value for value in values]
    if not isinstance(result, Results):
        return Results(values, given, error)
    for row, (outcome, present) in enumerate(itertools.zip_longest(result.outcomes, given)):
        if present == "error" and outcome == "ok":
            continue
        if outcome != present and (present != "none" or outcome not in ("error", "timeout")):
            raise RewardError(
                f"{name} reports the outcome {outcome!r} for row {first_row + row}, which has "
                f"{'a' if present == 'ok' else 'no'} reward; give 'ok' with a reward, and 'none', 'error' or 'timeout' "
                "without one."
            )
    outcomes = ["error" if present == "error" else outcome for outcome, present in zip(result.outcomes, given)]
    return Results(values, outcomes, error or result.error)


def _number(reward: HostReward, row: int, value: Any) -> float | None:
    """Returns a reward as a float, infinite if float32 cannot hold it. Raises RewardError if it is no number."""
    if value is None:
        return None
    try:
        if isinstance(value, (str, bytes)):
            raise TypeError
        number = float(value)
    except OverflowError:
        return math.inf
    except (TypeError, ValueError):
        raise RewardError(_fault(reward, row, value)) from None
    return number if abs(number) <= _LARGEST or math.isnan(number) else math.inf


def _fault(reward: HostReward, row: int, value: Any) -> str:
    fault = f"Reward {reward.name!r} returned {value!r:.80} for row {row}"
    return f"{fault}; return a finite float32 number, or None for a missing reward."


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
            "that it uses and take the others as **columns. --config.data.columns names columns of the data."
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


def innermost(function: Callable) -> Callable:
    """Returns the function in a partial, or the function itself."""
    while isinstance(function, functools.partial):
        function = function.func
    return function


def name_of(function: Callable) -> str:
    """Returns the name of a function, of the function in a partial, or of a callable object's class."""
    function = innermost(function)
    return getattr(function, "__name__", type(function).__name__)


def note_place(error: BaseException, function: Callable) -> None:
    """Adds a note to the error of a user's function: the file and the line at which it was raised."""
    module = sys.modules.get(getattr(innermost(function), "__module__", None) or "")
    file = getattr(module, "__file__", None)
    if file is None or Path(file).parent != Path(__file__).parent:  # not one of the built-in functions
        place = place_of(error, Path(file).parent if file else None)
        if place:
            error.add_note(place)


def place_of(error: BaseException, folder: Path | None) -> str:
    """Returns "(FILE, line N)" of the last call in the folder of a user's code, else of the last call of all."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if Path(f.filename).parent != Path(__file__).parent]
    here = lambda f: folder and Path(f.filename).is_relative_to(folder) and "site-packages" not in f.filename
    frame = next((frame for frame in reversed(frames) if here(frame)), frames[-1] if frames else None)
    return f"({frame.filename}, line {frame.lineno})" if frame else ""

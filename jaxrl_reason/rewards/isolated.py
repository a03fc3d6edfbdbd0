"""Calls reward functions of the user's own in worker processes, so that a function that hangs or dies does not end the run.

A worker loads the function by the name in the configuration, so a lambda in a file works. One call has all completions
of a prompt. Each worker has its own copy of any state that a function keeps between calls. The calls of an `async`
function run at the same time, in one worker.
"""

import asyncio
from collections.abc import Mapping, Sequence
import copy
import functools
import inspect
import itertools
import math
import os
import pathlib
from typing import Any

from jaxrl_reason.rewards import host
from jaxrl_reason.rewards.loading import load_reward
from jaxrl_reason.rewards.output import Output
from jaxrl_reason.rewards.pool import Pool, Results
from jaxrl_reason.rewards.worker import words_of

MAX_WORKERS = 8
_SAMPLE = 16  # rows that are called singly before the failures among them are counted
_GRACE_S = 1.0  # for calls that run at the same time to end at their limit, before their worker is killed

Call = tuple[str, int, dict[str, list]]  # the name of the reward, the number of the first row, the columns


def make_pool(
    specs: Sequence[str], *, workers: int, timeout_s: float, memory_mb: int, output: Output | None = None
) -> Pool:
    """Returns a pool whose workers load `specs` at the first call; `workers` 0: one per core, at most `MAX_WORKERS`."""
    load = functools.partial(_load_all, [_absolute(spec) for spec in specs])
    workers = workers or min(os.cpu_count() or 1, MAX_WORKERS)
    return Pool(_answer, workers=workers, timeout_s=timeout_s, memory_mb=memory_mb, initializer=load, output=output)


def is_async(function: host.RewardFunction) -> bool:
    """Returns whether a function, or an object's `__call__`, is defined by `async def`."""
    inner = host.innermost(function)
    return inspect.iscoroutinefunction(inner) or inspect.iscoroutinefunction(type(inner).__call__)


class Isolated:
    """A host reward, by TRL's signature and with `Results`, that calls a function in the workers of a pool.

    The rows of a prompt are one call (`in_groups_of`; before that, all rows are). A call that raises, dies or exceeds a
    limit is made again row by row, so that only the rows at fault go missing. The retries end early when more than
    `max_failure_share` of the rows tried have failed, unless success of all other rows could still meet that share. A
    row that was not tried keeps the outcome of its prompt's call. The workers of the pool load the function by `spec`;
    `function` is the same, loaded in this process for its name, its arguments and its `answer_of`; another `name` can
    be given for messages. A call raises RewardError if the function breaks its contract, if no worker starts, or if the data cannot be sent to a worker.

    If the function is `asynchronous`, all calls run at the same time in one worker, each within the limit of a call.
    Failed calls are made again one by one, before their rows are: another call may have blocked the worker.
    """

    def __init__(
        self, spec: str, function: host.RewardFunction, pool: Pool, max_failure_share: float, name: str | None = None
    ):
        self.__wrapped__ = function  # `inspect` reads the signature here,
        self.__name__ = name or host.name_of(function)  # and `HostReward` the name
        self.asynchronous = is_async(function)
        self._spec, self._pool, self._max_failure_share = _absolute(spec), pool, max_failure_share
        self._group: int | None = None
        if hasattr(function, "answer_of"):
            self.answers_of = self._answers_of

    def in_groups_of(self, rows: int) -> "Isolated":
        """Returns this reward for prompts of `rows` completions each."""
        other = copy.copy(self)
        other._group = rows
        return other

    def forget(self) -> None:
        """Ends the workers, so that all state of earlier calls is lost."""
        self._pool.restart()

    def __call__(self, **columns: Sequence) -> Results:
        count = len(columns["completions"])
        results = Results([None] * count, ["error"] * count)
        size = self._group or count
        failed: list[Sequence[int]] = [range(first, first + size) for first in range(0, count, size)]
        if self.asynchronous:
            failed = self._call(failed, columns, results, together=True)
        failed = [rows for rows in self._call(failed, columns, results) if len(rows) > 1]
        # The first row of every failed prompt, then the second: soon a fair sample.
        waiting = [row for rows in itertools.zip_longest(*failed) for row in rows if row is not None]
        tried = bad = 0
        while waiting:
            now, waiting = waiting[:_SAMPLE], waiting[_SAMPLE:]
            tried += len(now)
            bad += len(self._call([[row] for row in now], columns, results))
            if bad > self._max_failure_share * tried and bad + len(waiting) > self._max_failure_share * count:
                break
        return results

    def _call(
        self,
        rows_of: Sequence[Sequence[int]],
        columns: Mapping[str, Sequence],
        results: Results,
        together: bool = False,
    ) -> list[Sequence[int]]:
        """Calls the function once per list of rows and fills `results`. Returns the lists whose call failed."""
        cut = lambda rows: {name: [x[row] for row in rows] for name, x in columns.items()}
        calls: list[Call] = [(self.__name__, rows[0], cut(rows)) for rows in rows_of]
        if together:
            answers = self._ask([("rewards", self._spec, (calls, self._pool.timeout_s))], _GRACE_S)
            given = (
                answers[0] if isinstance(answers[0], list) and len(answers[0]) == len(calls) else [None] * len(calls)
            )
            outcomes = answers.outcomes * len(calls)
        else:
            answers = self._ask([("reward", self._spec, call) for call in calls])
            given, outcomes = list(answers), answers.outcomes
        failed = []
        for rows, answer, outcome in zip(rows_of, given, outcomes):
            match answer:
                case str():
                    raise host.RewardError(answer)
                case [list(values), list(found), str(words)] if len(values) == len(found) == len(rows):
                    pass
                case [None, "error" | "timeout" as outcome, str(words)]:
                    failed.append(rows)
                    values, found = [None] * len(rows), [outcome] * len(rows)
                case _:  # no answer, or one that `_answer` cannot give: the function took over the process
                    failed.append(rows)
                    outcome = "error" if outcome == "ok" else outcome
                    values, found, words = [None] * len(rows), [outcome] * len(rows), answers.error
            for row, value, one in zip(rows, values, found):
                results[row], results.outcomes[row] = value, one
            results.error = words or results.error
        return failed

    def _answers_of(self, texts: Sequence[Sequence[str]], rows: Sequence[Mapping[str, Any]]) -> list[list]:
        """Returns `answer_of` each text of each row: a text or a number, None if there is none or the call fails."""
        pairs = [(text, dict(row)) for group, row in zip(texts, rows, strict=True) for text in group]
        answers = iter(self._ask([("answer_of", self._spec, pair) for pair in pairs]))
        return [[next(answers) for _ in group] for group in texts]

    def _ask(self, items: list, more_s: float = 0.0) -> Results:
        try:
            return self._pool.map(items, more_s)
        except (RuntimeError, TypeError) as error:
            raise host.RewardError(f"Reward {self.__name__!r} cannot be called: {error}") from error


def _absolute(spec: str) -> str:
    place, colon, attribute = spec.rpartition(":")
    return f"{pathlib.Path(place).expanduser().absolute()}{colon}{attribute}" if place.endswith(".py") else spec


# Called in the workers, like everything below.
_loaded = functools.cache(load_reward)


def _load_all(specs: Sequence[str]) -> None:
    for spec in specs:
        _loaded(spec)


def _answer(item: tuple[str, str, tuple]) -> list | str | float | None:
    """Calls `answer_of`, a reward, or an `async` reward several times at once: see `_result` for the answers."""
    kind, spec, arguments = item
    function: Any = _loaded(spec)
    if kind == "answer_of":
        answer = host.finish(function.answer_of(*arguments))
        return answer if answer is None or isinstance(answer, (str, int, float)) else repr(answer)
    if kind == "rewards":
        return host.finish(_answer_together(function, *arguments))
    name, first_row, rows = arguments
    count = len(rows["completions"])  # before the call, which may change its arguments
    try:
        result = host.finish(function(**rows))
    except BaseException as error:
        host.note_place(error, function)
        raise
    return _result(host.HostReward(name, function), result, count, first_row)


def _result(reward: host.HostReward, result: Any, count: int, first_row: int) -> list | str:
    """Returns [values, outcomes, the last error] of a call, or the message of a broken contract."""
    try:
        results = host.checked(reward, result, count=count, first_row=first_row)
    except host.RewardError as error:
        return str(error)
    return [[None if math.isnan(value) else value for value in results], results.outcomes, results.error]


async def _answer_together(function: Any, calls: Sequence[Call], limit_s: float) -> list[list | str]:
    """Returns the answer of each call; [None, "error" or "timeout", why] of a call that fails."""

    async def one(name: str, first_row: int, rows: dict[str, list]) -> list | str:
        limit, count = asyncio.timeout(limit_s), len(rows["completions"])
        try:
            async with limit:
                result = function(**rows)
                result = await result if inspect.isawaitable(result) else result
        except BaseException as error:  # one call, not all
            if limit.expired():
                return [None, "timeout", f"no result within {limit_s:g} s"]
            host.note_place(error, function)
            return [None, "error", words_of(error)]
        return _result(host.HostReward(name, function), result, count, first_row)

    return await asyncio.gather(*(one(*call) for call in calls))

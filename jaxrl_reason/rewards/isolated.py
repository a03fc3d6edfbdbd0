"""Calls reward functions of the user's own in worker processes, so that a function that hangs or dies does not end the run.

A worker loads the function by the name in the configuration, so a lambda in a file works. One call has all completions
of a prompt. Each worker has its own copy of any state that a function keeps between calls.
"""

from collections.abc import Mapping, Sequence
import copy
import functools
import itertools
import math
import os
import pathlib
from typing import Any

from jaxrl_reason.rewards import host
from jaxrl_reason.rewards.pool import Pool, Results

MAX_WORKERS = 8
_SAMPLE = 16  # rows that are called singly before the failures among them are counted


def make_pool(specs: Sequence[str], *, workers: int, timeout_s: float, memory_mb: int) -> Pool:
    """Returns a pool whose workers load `specs` at the first call; `workers` 0: one per core, at most `MAX_WORKERS`."""
    load = functools.partial(_load_all, [_absolute(spec) for spec in specs])
    workers = workers or min(os.cpu_count() or 1, MAX_WORKERS)
    return Pool(_answer, workers=workers, timeout_s=timeout_s, memory_mb=memory_mb, initializer=load)


class Isolated:
    """A host reward, by TRL's signature and with `Results`, that calls a function in the workers of a pool.

    The rows of a prompt are one call (`in_groups_of`; before that, all rows are). A call that raises, dies or exceeds a
    limit is made again row by row, so that only the rows at fault go missing. The retries end early when more than
    `max_failure_share` of the rows tried have failed, unless success of all other rows could still meet that share. A
    row that was not tried keeps the outcome of its prompt's call. The workers of the pool load the function by `spec`;
    `function` is the same, loaded in this process for its name, its arguments and its `answer_of`. A call raises
    RewardError if the function breaks its contract, if no worker starts, or if the data cannot be sent to a worker.
    """

    def __init__(self, spec: str, function: host.RewardFunction, pool: Pool, max_failure_share: float):
        self.__wrapped__ = function  # `inspect` reads the signature here,
        self.__name__ = host.name_of(function)  # and `HostReward` the name
        self._spec, self._pool, self._max_failure_share = _absolute(spec), pool, max_failure_share
        self._group: int | None = None
        if hasattr(function, "answer_of"):
            self.answers_of = self._answers_of

    def in_groups_of(self, rows: int) -> "Isolated":
        """Returns this reward for prompts of `rows` completions each."""
        other = copy.copy(self)
        other._group = rows
        return other

    def __call__(self, **columns: Sequence) -> Results:
        count = len(columns["completions"])
        results = Results([None] * count, ["error"] * count)
        size = self._group or count
        groups = [range(first, first + size) for first in range(0, count, size)]
        failed = [rows for rows in self._call(groups, columns, results) if len(rows) > 1]
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
        self, calls: Sequence[Sequence[int]], columns: Mapping[str, Sequence], results: Results
    ) -> list[Sequence[int]]:
        """Calls the function once per list of rows and fills `results`. Returns the lists whose call failed."""
        cut = lambda rows: {name: [x[row] for row in rows] for name, x in columns.items()}
        answers = self._ask([("reward", self._spec, (self.__name__, rows[0], cut(rows))) for rows in calls])
        failed = []
        for rows, answer, outcome in zip(calls, answers, answers.outcomes):
            if isinstance(answer, str):
                raise host.RewardError(answer)
            try:
                values, outcomes, words = answer
                if not len(values) == len(outcomes) == len(rows):
                    raise ValueError
            except (TypeError, ValueError):
                # No answer, or one that `_answer` cannot give: the function took over the process.
                failed.append(rows)
                outcome = "error" if outcome == "ok" else outcome
                values, outcomes, words = [None] * len(rows), [outcome] * len(rows), answers.error
            for row, value, outcome in zip(rows, values, outcomes):
                results[row], results.outcomes[row] = value, outcome
            results.error = words or results.error
        return failed

    def _answers_of(self, texts: Sequence[Sequence[str]], rows: Sequence[Mapping[str, Any]]) -> list[list]:
        """Returns `answer_of` each text of each row: a text or a number, None if there is none or the call fails."""
        pairs = [(text, dict(row)) for group, row in zip(texts, rows, strict=True) for text in group]
        answers = iter(self._ask([("answer_of", self._spec, pair) for pair in pairs]))
        return [[next(answers) for _ in group] for group in texts]

    def _ask(self, items: list) -> Results:
        try:
            return self._pool.map(items)
        except (RuntimeError, TypeError) as error:
            raise host.RewardError(f"Reward {self.__name__!r} cannot be called: {error}") from error


def _absolute(spec: str) -> str:
    place, colon, attribute = spec.rpartition(":")
    return f"{pathlib.Path(place).absolute()}{colon}{attribute}" if place.endswith(".py") else spec


# Called in the workers, like everything below.
_loaded = functools.cache(host.load_reward)


def _load_all(specs: Sequence[str]) -> None:
    for spec in specs:
        _loaded(spec)


def _answer(item: tuple[str, str, tuple]) -> list | str | float | None:
    """Calls `answer_of`, or a reward: returns [values, outcomes, the last error] or the message of a broken contract."""
    kind, spec, arguments = item
    function: Any = _loaded(spec)
    if kind == "answer_of":
        answer = function.answer_of(*arguments)
        return answer if answer is None or isinstance(answer, (str, int, float)) else repr(answer)
    name, first_row, rows = arguments
    try:
        results = host.call(host.HostReward(name, function), rows, first_row)
    except host.RewardError as error:
        return str(error)
    return [[None if math.isnan(value) else value for value in results], results.outcomes, results.error]

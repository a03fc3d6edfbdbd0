"""Reward functions of the user's own, called in worker processes: whatever one does to its process, the run goes on.

A worker loads the function as the configuration names it (so that a lambda in a file will do), and gets one call for all
completions of a prompt. What a function keeps from call to call, each worker keeps for itself.
"""

from collections.abc import Callable, Mapping, Sequence
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
_SAMPLE = 16  # rows that are called singly at once, before the failures among them are counted


def make_pool(specs: Sequence[str], *, workers: int, timeout_s: float, memory_mb: int) -> Pool:
    """Workers that load these functions when they start, which is with the first call.

    Args:
      specs: "package.module:function" or "path/to/file.py:function".
      workers: how many at most; 0: one a core, `MAX_WORKERS` at most.
      timeout_s, memory_mb: what one call may take, see `Pool`.
    """
    load = functools.partial(_load_all, [_absolute(spec) for spec in specs])
    workers = workers or min(os.cpu_count() or 1, MAX_WORKERS)
    return Pool(_answer, workers=workers, timeout_s=timeout_s, memory_mb=memory_mb, initializer=load)


class Isolated:
    """A host reward, by TRL's signature and with `Results`, that calls a function in the workers of a pool.

    The rows of a prompt are one call (`in_groups_of`; all rows are until then). A call that raises, dies or takes too much is made
    again row by row, so that only the rows at fault go missing. Where more than `max_failure_share` of the rows tried so fail, and of
    all rows would if the others did, these are not tried: they keep what became of their prompt's call.

    Args:
      spec: what the workers load the function by; one of the pool's.
      function: the same, loaded here: for its name, its arguments, and whether it tells answers apart (`answer_of`).
      pool: from `make_pool`.
      max_failure_share: in [0, 1].

    Raises (when called):
      RewardError: the function breaks its contract, or cannot be called: no worker starts, or the data cannot be sent to one.
    """

    def __init__(self, spec: str, function: Callable, pool: Pool, max_failure_share: float):
        self.__wrapped__ = function  # where `inspect` looks for the signature,
        self.__name__ = host.name_of(function)  # and `HostReward` for the name
        self._spec, self._pool, self._max_failure_share = _absolute(spec), pool, max_failure_share
        self._group = None
        if hasattr(function, "answer_of"):
            self.answers_of = self._answers_of

    def in_groups_of(self, rows: int) -> "Isolated":
        """The same for so many rows a prompt."""
        other = copy.copy(self)
        other._group = rows
        return other

    def __call__(self, **columns: Sequence) -> Results:
        count = len(columns["completions"])
        results = Results([None] * count, ["error"] * count)
        size = self._group or count
        groups = [range(first, first + size) for first in range(0, count, size)]
        failed = [rows for rows in self._call(groups, columns, results) if len(rows) > 1]
        # The first row of every such prompt, then the second: soon a fair sample.
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
        """Calls the function once for each of these lists of rows and enters what becomes of them; returns those that failed."""
        items = [
            (
                "reward",
                self._spec,
                (self.__name__, rows[0], {name: [x[row] for row in rows] for name, x in columns.items()}),
            )
            for rows in calls
        ]
        answers = self._ask(items)
        failed = []
        for rows, answer, outcome in zip(calls, answers, answers.outcomes):
            if isinstance(answer, str):
                raise host.RewardError(answer)
            try:
                values, outcomes, words = answer
                if not len(values) == len(outcomes) == len(rows):
                    raise ValueError
            except (TypeError, ValueError):  # none, or what no call of ours would say: it took the process over
                failed.append(rows)
                outcome = "error" if outcome == "ok" else outcome
                values, outcomes, words = [None] * len(rows), [outcome] * len(rows), answers.error
            for row, value, outcome in zip(rows, values, outcomes):
                results[row], results.outcomes[row] = value, outcome
            results.error = words or results.error
        return failed

    def _answers_of(self, texts: Sequence[Sequence[str]], rows: Sequence[Mapping[str, Any]]) -> list[list]:
        """The function's own `answer_of` of each row's texts: a text or a number; None also where that fails."""
        items = [
            ("answer_of", self._spec, (text, dict(row)))
            for group, row in zip(texts, rows, strict=True)
            for text in group
        ]
        answers = iter(self._ask(items))
        return [[next(answers) for _ in group] for group in texts]

    def _ask(self, items: list) -> Results:
        try:
            return self._pool.map(items)
        except (RuntimeError, TypeError) as error:
            raise host.RewardError(f"Reward {self.__name__!r} cannot be called: {error}") from error


def _absolute(spec: str) -> str:
    place, colon, attribute = spec.rpartition(":")
    return f"{pathlib.Path(place).absolute()}{colon}{attribute}" if place.endswith(".py") else spec


# -- in the workers ----------------------------------------------------------------------------------------------------

_loaded = functools.cache(host.load_reward)


def _load_all(specs: Sequence[str]) -> None:
    for spec in specs:
        _loaded(spec)


def _answer(item: tuple[str, str, tuple]):
    """(values, outcomes, the last error) of a call of a reward, or the sentence of a broken contract; or an answer of `answer_of`."""
    kind, spec, arguments = item
    function = _loaded(spec)
    if kind == "answer_of":
        answer = function.answer_of(*arguments)
        return answer if answer is None or isinstance(answer, (str, int, float)) else repr(answer)
    name, first_row, rows = arguments
    try:
        results = host.call(host.HostReward(name, function), rows, first_row)
    except host.RewardError as error:
        return str(error)
    return [[None if math.isnan(value) else value for value in results], results.outcomes, results.error]

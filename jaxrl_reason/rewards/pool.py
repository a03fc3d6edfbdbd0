"""Calls a function in worker processes that can be killed, so that every item has a limit of time and memory.

    with Pool(judge, workers=4, timeout_s=2.0) as pool:
        results = pool.map(items)  # one value per item, in order; None if it has no value, see results.outcomes

A worker runs `worker.py` as a script and imports only the module of its function. `multiprocessing.Process` would
import the main module of the run, and JAX with it, into every worker and again after every kill. A worker has one item
at a time and reports after it. The limits therefore apply to one item, and a kill costs no other item.
"""

import collections
from collections.abc import Callable, Iterable, Sequence
import contextlib
import functools
import json
import math
import multiprocessing.connection
from multiprocessing.reduction import ForkingPickler
import os
import pathlib
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from typing import Any
import weakref

from jaxrl_reason.rewards.output import Output
from jaxrl_reason.rewards.worker import MAX_REPORT_BYTES

START_LIMIT_S = 120.0  # time for a worker to import its function's module, which may be slow the first time
STARTS = 3  # consecutive workers that may die or time out before they are ready; then the pool gives up
_NEVER = math.inf  # the deadline of an idle worker
_PROGRAM = str(pathlib.Path(__file__).with_name("worker.py"))


class Results(list[Any]):
    """The values of N items, the outcome of each, and the text of the last error or timeout, empty if there was none.

    Outcomes are "ok", "none" (the function returned None), "error" (the function raised or returned a value that cannot
    be reported, or its process died) and "timeout". The value is None unless the outcome is "ok".
    """

    def __init__(self, values: Iterable[Any], outcomes: Iterable[str], error: str = ""):
        super().__init__(values)
        self.outcomes, self.error = list(outcomes), error


class Pool:
    """Calls `function(item)` in worker processes.

    The function returns a finite number, a text, a list of numbers and texts, or None. Workers start with the first
    `map`, at most one per item. A worker has JAX_PLATFORMS=cpu and ignores Ctrl-C and SIGTERM; the processes that an item
    starts do not ignore them. Workers end with the pool and with the process that made the pool, even if that process is
    killed. Any thread may call any method; one `map` runs at a time.

    Args:
      function: a function at the top level of an importable module, or a `functools.partial` of such a function.
      workers, timeout_s: most processes; seconds per item, after which a worker and its child processes are killed.
      memory_mb: memory that a worker may add to its size when it became ready (enforced on Linux).
      max_tasks: items after which a worker is replaced; None: never.
      initializer: called in each worker before its first item, for slow imports; it has no limit of an item.
      output: takes what workers and their child processes print; None: nothing does, except that the first
        `worker.MAX_STDERR` characters of a worker to stderr go to the stderr of this process.

    Raises TypeError if the function cannot be sent to another process, ValueError if a number is out of range.
    """

    def __init__(
        self,
        function: Callable[[Any], Any],
        *,
        workers: int = 2,
        timeout_s: float = 2.0,
        memory_mb: int = 1024,
        max_tasks: int | None = None,
        initializer: Callable[[], object] | None = None,
        output: Output | None = None,
    ):
        for name, value in dict(workers=workers, memory_mb=memory_mb, max_tasks=max_tasks).items():
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}; a pool needs at least 1.")
        if not 0 < timeout_s < math.inf:
            raise ValueError(f"timeout_s is {timeout_s}; give a finite number of seconds per item, above 0.")
        _check_importable(function)
        _check_importable(initializer)
        has_file = output is not None
        self._setup = [_packed((list(sys.path), has_file)), _packed((function, initializer, memory_mb))]
        self.timeout_s, self._limit_s = timeout_s, timeout_s  # the second is that of the current `map`
        self._count, self._max_tasks, self._output = workers, max_tasks, output
        self._workers: list[_Worker] = []
        self._failure = ""  # why no worker can start; the pool does not try again for every item of a batch
        self._lost_starts = 0  # consecutive workers that died or timed out while starting
        self._lock = threading.Lock()
        self._finalizer = weakref.finalize(self, _stop_all, self._workers)  # also at the interpreter's exit

    def map(self, items: Iterable[Any], more_s: float = 0.0) -> Results:
        """Returns the function's values in the order of the items; numbers become floats. No item makes this raise.

        `more_s` is added to the seconds that each of these items may take.

        Raises TypeError if an item cannot be sent to another process, ValueError if the pool is closed, RuntimeError if
        workers cannot start, for instance because the initializer raises.
        """
        payloads = [_packed(item, f"Item {i}") for i, item in enumerate(items)]
        results = Results([None] * len(payloads), ["error"] * len(payloads))
        with self._lock:
            if not self._finalizer.alive:
                raise ValueError("This pool is closed; make a new one.")
            if self._failure:
                raise RuntimeError(self._failure)
            self._limit_s = self.timeout_s + more_s
            try:
                self._work_off(payloads, results)
            finally:  # after an interrupt, the next batch must not read the reports of unfinished items as its own
                for worker in [w for w in self._workers if w.item is not None]:
                    self._drop(worker)
        return results

    def restart(self) -> None:
        """Ends the workers, and with them all state that they hold. The next `map` starts new ones."""
        with self._lock:
            _stop_all(self._workers)

    def close(self) -> None:
        """Ends the workers. A closed pool cannot be used again; closing it again does nothing."""
        with self._lock:
            self._finalizer()

    def __enter__(self) -> "Pool":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _work_off(self, payloads: Sequence[bytes], results: Results) -> None:
        waiting = collections.deque(range(len(payloads)))
        while True:
            for worker in [w for w in self._workers if w.idle]:
                if not waiting:
                    break
                if worker.connection.poll():  # an idle worker reports nothing, so it died; no item is at fault
                    self._drop(worker)
                    continue
                worker.item, worker.deadline = waiting.popleft(), time.monotonic() + self._limit_s
                worker.send(payloads[worker.item])
            unfinished = len(waiting) + sum(w.item is not None for w in self._workers)
            if not unfinished:
                return
            while len(self._workers) < min(self._count, unfinished):
                self._workers.append(_Worker(self._setup, self._limit_s, self._output))
            self._listen(results)

    def _listen(self, results: Results) -> None:
        """Waits for the next report or deadline, then takes all reports that are there."""
        awaited = {w.connection: w for w in self._workers if not w.idle}
        patience = min(w.deadline for w in awaited.values()) - time.monotonic()
        reported = multiprocessing.connection.wait(list(awaited), max(patience, 0))
        now = time.monotonic()
        for connection, worker in awaited.items():
            report = worker.receive() if connection in reported else None
            if report is not None:
                kind, value, words = report
                if kind == "died":
                    kind, words = "error", self._drop(worker)
            elif worker.deadline <= now:  # even if it sends parts of a report
                limit = START_LIMIT_S if worker.item is None else self._limit_s
                kind, value, words = "timeout", None, f"no result within {limit:g} s"
                self._drop(worker)
            else:
                continue
            self._take(worker, kind, value, words, results)

    def _take(self, worker: "_Worker", kind: str, value: Any, words: str, results: Results) -> None:
        if worker.item is None:  # it was starting
            self._lost_starts = 0 if kind == "ready" else self._lost_starts + 1
            if kind == "failed" or self._lost_starts == STARTS:
                self._failure = f"A worker process of the pool could not start: {words}."
                raise RuntimeError(self._failure)
            worker.deadline = _NEVER
            return
        results[worker.item], results.outcomes[worker.item] = value, kind
        results.error = words or results.error
        worker.item, worker.deadline = None, _NEVER
        worker.tasks += 1
        if worker.tasks == self._max_tasks and worker in self._workers:
            self._drop(worker)

    def _drop(self, worker: "_Worker") -> str:
        self._workers.remove(worker)
        return worker.stop()


class _Worker:
    """A worker process, the parent's end of the connection to it, and its current item."""

    def __init__(self, setup: Sequence[bytes], send_limit_s: float, output: Output | None):
        self.connection, theirs = multiprocessing.Pipe()
        # A worker that stops reading must not block the parent for longer than this.
        with socket.socket(fileno=os.dup(self.connection.fileno())) as end:
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", math.ceil(send_limit_s), 0))
        self._held = b""  # the beginning of an incomplete report
        with theirs:
            self.process = subprocess.Popen(
                # -P keeps this folder off the path, in which math.py would hide the standard library's.
                [sys.executable, "-P", _PROGRAM, str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.PIPE,  # never written; see _end_with_parent
                stdout=output.stream() if output else subprocess.DEVNULL,
                stderr=output.stream() if output else None,
                env=os.environ | {"JAX_PLATFORMS": "cpu"},
                start_new_session=True,  # a process group of its own, so that its child processes can be killed with it
            )
        self.item: int | None = None  # its index; None if the worker is idle or starting
        # The time.monotonic() at which its report is due (`_NEVER` if it is idle), and the number of items finished.
        self.deadline, self.tasks = time.monotonic() + START_LIMIT_S, 0
        for part in setup:
            self.send(part)

    @property
    def idle(self) -> bool:
        return self.deadline == _NEVER

    def send(self, payload: bytes) -> None:
        """Sends a payload. Ignores errors: `receive` notices a dead process, the deadline one that does not read."""
        with contextlib.suppress(OSError):
            self.connection.send_bytes(payload)

    def receive(self) -> tuple[str, Any, str] | None:
        """Returns (kind, value, words) of a complete report, None if the report is incomplete.

        The kind is "died" if the process died or sent an invalid report. Call this when there is something to read: it
        reads that much and does not wait for more.
        """
        read = b""
        with contextlib.suppress(OSError):
            read = os.read(self.connection.fileno(), 2**16)
        self._held += read
        if not read or len(self._held) > MAX_REPORT_BYTES + 1:
            return "died", None, ""
        if not self._held.endswith(b"\n"):
            return None
        held, self._held = self._held, b""
        try:
            kind, value, words = json.loads(held, parse_constant=_no_number)
        except (ValueError, TypeError, RecursionError):
            return "died", None, ""
        expected = ("ready", "failed") if self.item is None else ("ok", "none", "error")
        return (kind, value, words) if kind in expected and isinstance(words, str) else ("died", None, "")

    def stop(self) -> str:
        """Kills the process and its child processes. Returns how it ended, perhaps before this call."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        code = self.process.wait()
        if self.process.stdin is not None:
            self.process.stdin.close()
        self.connection.close()
        return f"its process {f'was ended by {signal.Signals(-code).name}' if code < 0 else f'exited with {code}'}"


def _no_number(name: str) -> None:
    raise ValueError(f"{name} is not a JSON number")


def _stop_all(workers: list[_Worker]) -> None:
    while workers:
        workers.pop().stop()


def _packed(value: Any, what: str = "The function") -> bytes:
    try:
        return bytes(ForkingPickler.dumps(value))
    except Exception as error:  # PicklingError, AttributeError, TypeError, RecursionError, or what __reduce__ raises
        raise TypeError(
            f"{what} cannot be sent to a worker process ({type(error).__name__}: {error}); define functions at the top level "
            "of a module, and make items of plain values such as texts, numbers and tuples."
        ) from error


def _check_importable(function: Callable | None) -> None:
    """Raises TypeError for a function of the main module, which workers do not run."""
    while isinstance(function, functools.partial):
        function = function.func
    if getattr(function, "__module__", None) == "__main__":
        main = "the main script, which worker processes do not import"
        raise TypeError(f"{function!r} is defined in {main}; move it to a module of its own and import it from there.")

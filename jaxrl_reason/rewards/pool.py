"""A function in worker processes that can be killed: every item has its limit of time and memory, whatever it does.

    with Pool(judge, workers=4, timeout_s=2.0) as pool:
        results = pool.map(items)  # a value for each, in order; None where there is none: results.outcomes says why

A worker is this file, run as a script. `multiprocessing.Process` would import the main module of the run, and with it
JAX and all else, into every worker and again after every kill; a worker imports only the module of its function.

A worker holds one item at a time and reports after it, so the limit is that of the item, and a kill costs no other item.
"""

import collections
import contextlib
import fcntl
import functools
import json
import math
import multiprocessing.connection
import os
import pathlib
import resource
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Sequence
from multiprocessing.reduction import ForkingPickler
from typing import Any

START_LIMIT_S = 120.0  # for a worker to import its function's module, which may be slow the first time
MAX_REPORT_BYTES = 2**24  # a worker that a hostile item took over cannot fill the parent's memory


class Results(list):
    """What became of N items: a list of values, None where there is none.

    Attributes:
      outcomes: of each item "ok", "none" (the function returned None), "error" (it raised, returned what cannot be
        reported, or its process died) or "timeout". The value is None in all cases but "ok".
      error: the last error or timeout in words; empty without one.
    """

    def __init__(self, values: Iterable[Any], outcomes: Iterable[str], error: str = ""):
        super().__init__(values)
        self.outcomes, self.error = list(outcomes), error


class Pool:
    """Calls `function(item)` in worker processes, which returns a finite number, a text, a list of such, or None.

    Workers start with the first `map`, and no more of them than it has items. They see JAX_PLATFORMS=cpu, ignore
    Ctrl-C, print to nowhere (errors to stderr), and end with the pool and with the process that made it, even if that is
    killed. All methods may be called from any thread; one `map` runs at a time.

    Args:
      function: defined at the top level of a module that can be imported, or a `functools.partial` of such a function.
      workers: how many processes at most.
      timeout_s: what one item may take. A worker that has not reported by then is killed, with all it started.
      memory_mb: what a worker may take on top of what it holds when it is ready (enforced on Linux).
      max_tasks: a worker is replaced after that many items; None: never.
      initializer: called in each worker before its first item, under no item's limit: for slow imports.

    Raises:
      TypeError: the function cannot be sent to another process.
      ValueError: a number out of range.
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
    ):
        for name, value in dict(workers=workers, memory_mb=memory_mb, max_tasks=max_tasks).items():
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}; a pool needs at least 1.")
        if not 0 < timeout_s < math.inf:
            raise ValueError(f"timeout_s is {timeout_s}; give the seconds that one item may take.")
        for sent in filter(None, (function, initializer)):
            _check_importable(sent)
        self._setup = [_packed(list(sys.path)), _packed((function, initializer, memory_mb))]
        self._count, self._timeout_s, self._max_tasks = workers, timeout_s, max_tasks
        self._workers: list[_Worker] = []
        self._failure = ""  # why no worker can start: that is not tried again for every item of a batch
        self._lock = threading.Lock()
        self._finalizer = weakref.finalize(self, _stop_all, self._workers)  # also at the interpreter's exit

    def map(self, items: Iterable[Any]) -> Results:
        """The function's values, in the order of the items; numbers are floats. Nothing an item does raises here.

        Raises:
          TypeError: an item cannot be sent to another process.
          RuntimeError: workers cannot start, for instance because the initializer raises.
          ValueError: the pool is closed.
        """
        payloads = [_packed(item, f"Item {i}") for i, item in enumerate(items)]
        results = Results([None] * len(payloads), ["error"] * len(payloads))
        with self._lock:
            if not self._finalizer.alive:
                raise ValueError("This pool is closed; make a new one.")
            if self._failure:
                raise RuntimeError(self._failure)
            try:
                self._work_off(payloads, results)
            finally:  # an interrupt leaves items in flight, whose reports the next batch must not read as its own
                for worker in [w for w in self._workers if w.item is not None]:
                    self._drop(worker)
        return results

    def close(self) -> None:
        """Ends the workers. A closed pool stays closed; closing it again does nothing."""
        with self._lock:
            self._finalizer()

    def __enter__(self) -> "Pool":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def _work_off(self, payloads: Sequence[bytes], results: Results) -> None:
        waiting = collections.deque(range(len(payloads)))
        while True:
            for worker in [w for w in self._workers if w.idle]:
                if not waiting:
                    break
                if worker.connection.poll():  # one that waits has nothing to say: it died, which is no item's fault
                    self._drop(worker)
                    continue
                worker.item, worker.deadline = waiting.popleft(), time.monotonic() + self._timeout_s
                worker.send(payloads[worker.item])
            unfinished = len(waiting) + sum(w.item is not None for w in self._workers)
            if not unfinished:
                return
            while len(self._workers) < min(self._count, unfinished):
                self._workers.append(_Worker(self._setup))
            self._listen(results)

    def _listen(self, results: Results) -> None:
        """Waits for the next report or deadline, and takes all there are."""
        awaited = {w.connection: w for w in self._workers if not w.idle}
        patience = min(w.deadline for w in awaited.values()) - time.monotonic()
        reported = multiprocessing.connection.wait(list(awaited), max(patience, 0))
        now = time.monotonic()
        for connection, worker in awaited.items():
            if connection in reported:
                kind, value, words = worker.receive()
                if kind == "died":
                    kind, words = "error", self._drop(worker)
            elif worker.deadline <= now:
                limit = START_LIMIT_S if worker.item is None else self._timeout_s
                kind, value, words = "timeout", None, f"no result within {limit:g} s"
                self._drop(worker)
            else:
                continue
            self._take(worker, kind, value, words, results)

    def _take(self, worker: "_Worker", kind: str, value: Any, words: str, results: Results) -> None:
        if worker.item is None:  # it was starting
            if kind != "ready":
                self._failure = f"A worker process of the pool could not start: {words}."
                raise RuntimeError(self._failure)
            worker.deadline = None
            return
        results[worker.item], results.outcomes[worker.item] = value, kind
        results.error = words or results.error
        worker.item = worker.deadline = None
        worker.tasks += 1
        if worker.tasks == self._max_tasks and worker in self._workers:
            self._drop(worker)

    def _drop(self, worker: "_Worker") -> str:
        self._workers.remove(worker)
        return worker.stop()


class _Worker:
    """A process, this end of the connection to it, and what it is at.

    Attributes:
      item: the index of the item it holds; None: none, it is idle or starting.
      deadline: when its report is due, by time.monotonic(); None: it is idle.
      tasks: how many items it has finished.
    """

    def __init__(self, setup: Sequence[bytes]):
        self.connection, theirs = multiprocessing.Pipe()
        with theirs:
            self.process = subprocess.Popen(
                # -P: this folder stays off the path, where math.py would be taken for the standard library's.
                [sys.executable, "-P", __file__, str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.PIPE,  # never written; see _end_with_parent
                stdout=subprocess.DEVNULL,
                env=os.environ | {"JAX_PLATFORMS": "cpu"},
                start_new_session=True,  # a group of its own: what it starts can be killed with it
            )
        self.item, self.deadline, self.tasks = None, time.monotonic() + START_LIMIT_S, 0
        for part in setup:
            self.send(part)

    @property
    def idle(self) -> bool:
        return self.deadline is None

    def send(self, payload: bytes) -> None:
        """Where the process is no more, `receive` will say so."""
        with contextlib.suppress(OSError):
            self.connection.send_bytes(payload)

    def receive(self) -> tuple[str, Any, str]:
        """(kind, value, words); the kind is "died" where the process did."""
        try:
            kind, value, words = json.loads(self.connection.recv_bytes(MAX_REPORT_BYTES))
        except (EOFError, OSError, ValueError):
            return "died", None, ""
        return kind, value, words

    def stop(self) -> str:
        """Kills the process and all it started; says how it ended, which may have been before."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        code = self.process.wait()
        self.process.stdin.close()
        self.connection.close()
        return (
            f"its process was ended by {signal.Signals(-code).name}" if code < 0 else f"its process exited with {code}"
        )


def _stop_all(workers: list[_Worker]) -> None:
    while workers:
        workers.pop().stop()


def _packed(value: Any, what: str = "The function") -> bytes:
    try:
        return bytes(ForkingPickler.dumps(value))
    except Exception as error:  # PicklingError, AttributeError, TypeError, RecursionError, or what __reduce__ raises
        raise TypeError(
            f"{what} cannot be sent to a worker process ({type(error).__name__}: {error}); functions must be defined at the "
            "top level of a module, and items be made of plain values such as texts, numbers and tuples."
        ) from error


def _check_importable(function: Callable) -> None:
    """Workers do not run the main module, where multiprocessing's message would be about the worker's own."""
    while isinstance(function, functools.partial):
        function = function.func
    if getattr(function, "__module__", None) == "__main__":
        raise TypeError(
            f"{function!r} is defined in the script that is being run, which worker processes do not import; move it to a "
            "module of its own and import it from there."
        )


# -- in the worker -----------------------------------------------------------------------------------------------------


def _serve(connection: multiprocessing.connection.Connection) -> None:
    _end_with_parent()
    try:
        sys.path[:] = connection.recv()
        function, initializer, memory_mb = connection.recv()
        if initializer is not None:
            initializer()
        _limit_memory(memory_mb)
    except BaseException as error:
        connection.send_bytes(_packed_report("failed", words=_words(error)))
        return
    connection.send_bytes(_packed_report("ready"))
    while True:
        payload = connection.recv_bytes()
        try:
            value = function(ForkingPickler.loads(payload))
            if not (value is None or isinstance(value, (str, list))):
                value = float(value)
                if not math.isfinite(value):
                    raise ValueError(f"the function returned {value}, which is not a finite number")
            report = _packed_report("none" if value is None else "ok", value)
        except BaseException as error:  # not Exception: what verifiers raise (math-verify) may derive from that only
            report = _packed_report("error", words=_words(error))
        connection.send_bytes(report)


def _packed_report(kind: str, value: Any = None, words: str = "") -> bytes:
    # JSON: a worker that a hostile item took over must not choose what the parent unpickles.
    report = json.dumps([kind, value, words], allow_nan=False).encode()
    if len(report) > MAX_REPORT_BYTES:
        raise ValueError(f"the function returned {len(report)} bytes; at most {MAX_REPORT_BYTES} are read")
    return report


def _words(error: BaseException) -> str:
    try:
        words = f"{type(error).__name__}: {error}"
    except BaseException:  # the text of an error may fail as the item did
        words = type(error).__name__
    return words[:300].encode("ascii", "backslashreplace").decode()


def _end_with_parent() -> None:
    """The kernel ends this process when the parent's end of stdin closes, whatever the process is at.

    An idle worker would see its connection close; one in a long computation in C, which no thread or handler of Python's
    interrupts, would go on for hours. SIGIO, sent when the state of stdin changes, ends a process by default (on Linux).
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the run decides when it ends
    signal.signal(signal.SIGIO, signal.SIG_DFL)
    fcntl.fcntl(0, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(0, fcntl.F_SETFL, fcntl.fcntl(0, fcntl.F_GETFL) | os.O_ASYNC)


def _limit_memory(memory_mb: int) -> None:
    held = pathlib.Path("/proc/self/statm")
    if held.exists():  # elsewhere systems do not enforce this limit
        address_space = int(held.read_text().split()[0]) * resource.getpagesize() + memory_mb * 2**20
        hard = resource.getrlimit(resource.RLIMIT_AS)[1]
        limit = address_space if hard == resource.RLIM_INFINITY else min(address_space, hard)
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


if __name__ == "__main__":
    try:
        _serve(multiprocessing.connection.Connection(int(sys.argv[1])))
    except (EOFError, OSError):  # the parent closed the connection
        pass
    finally:
        os._exit(0)  # at once: threads that an item left running would hold up an orderly exit

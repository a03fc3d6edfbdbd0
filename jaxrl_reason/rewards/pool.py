"""A function in worker processes that can be killed: every item has its limit of time and memory, whatever it does.

    with Pool(judge, workers=4, timeout_s=2.0) as pool:
        results = pool.map(items)  # a value for each, in order; None where there is none: results.outcomes says why

A worker is this file, run as a script. `multiprocessing.Process` would import the main module of the run, and with it
JAX and all else, into every worker and again after every kill; a worker imports only the module of its function.

A worker holds one item at a time and reports after it, so the limit is that of the item, and a kill costs no other item.
"""

import collections
from collections.abc import Callable, Iterable, Sequence
import contextlib
import fcntl
import functools
import io
import json
import math
import multiprocessing.connection
from multiprocessing.reduction import ForkingPickler
import os
import pathlib
import resource
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from typing import Any
import weakref

START_LIMIT_S = 120.0  # for a worker to import its function's module, which may be slow the first time
STARTS = 3  # of workers that die or take too long before they are ready, in a row, and then no more
MAX_STDERR = 10_000  # characters of a worker
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
    Ctrl-C and SIGTERM, print to nowhere (the first of what goes to stderr is kept), and end with the pool and with the process that made it, even if that is
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
        self._lost_starts = 0  # in a row: those that died or took too long, which may be the machine's fault
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
                self._workers.append(_Worker(self._setup, self._timeout_s))
            self._listen(results)

    def _listen(self, results: Results) -> None:
        """Waits for the next report or deadline, and takes all there are."""
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
            elif worker.deadline <= now:  # also of one that sends its report in bits
                limit = START_LIMIT_S if worker.item is None else self._timeout_s
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

    def __init__(self, setup: Sequence[bytes], send_limit_s: float):
        self.connection, theirs = multiprocessing.Pipe()
        # One that stopped reading must not hold up those who write to it.
        with socket.socket(fileno=os.dup(self.connection.fileno())) as end:
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", math.ceil(send_limit_s), 0))
        self._held = b""  # of a report that has not come to its end
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
        """Where the process is no more, `receive` will say so; where it does not read, its deadline."""
        with contextlib.suppress(OSError):
            self.connection.send_bytes(payload)

    def receive(self) -> tuple[str, Any, str] | None:
        """(kind, value, words) once a whole report is there, else None; the kind is "died" where the process did, or says what it must not.

        To be called when there is something to read: it takes that and waits for nothing, however little it is.
        """
        try:
            read = os.read(self.connection.fileno(), 2**16)
        except OSError:
            read = b""
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
        """Kills the process and all it started; says how it ended, which may have been before."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        code = self.process.wait()
        self.process.stdin.close()
        self.connection.close()
        return (
            f"its process was ended by {signal.Signals(-code).name}" if code < 0 else f"its process exited with {code}"
        )


def _no_number(name: str):
    raise ValueError(f"{name} is no number of JSON")


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

_F_SETSIG = 10  # of Linux; Python's fcntl has no name for it


def _serve(connection: multiprocessing.connection.Connection) -> None:
    _end_with_parent()
    sys.stderr = _Few(sys.stderr, MAX_STDERR)
    try:
        sys.path[:] = connection.recv()
        function, initializer, memory_mb = connection.recv()
        if initializer is not None:
            initializer()
        _limit_memory(memory_mb)
    except BaseException as error:
        _write(connection, _packed_report("failed", words=_words(error)))
        return
    _write(connection, _packed_report("ready"))
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
        _write(connection, report)


def _write(connection, report: bytes) -> None:
    while report:
        report = report[os.write(connection.fileno(), report) :]


def _packed_report(kind: str, value: Any = None, words: str = "") -> bytes:
    # JSON: a worker that a hostile item took over must not choose what the parent unpickles.
    report = json.dumps([kind, value, words], allow_nan=False).encode()
    if len(report) > MAX_REPORT_BYTES:
        raise ValueError(f"the function returned {len(report)} bytes; at most {MAX_REPORT_BYTES} are read")
    return report + b"\n"  # which JSON of one line does not hold


def _words(error: BaseException) -> str:
    try:
        words = f"{type(error).__name__}: {error}"
    except BaseException:  # the text of an error may fail as the item did
        words = type(error).__name__
    return words[:300].encode("ascii", "backslashreplace").decode()


def _end_with_parent() -> None:
    """The kernel ends this process and what it started when the parent's end of stdin closes, whatever they are at.

    An idle worker would see its connection close; one in a long computation in C, which no thread or handler of Python's
    interrupts, would go on for hours. SIGIO, sent when the state of stdin changes, ends a process by default; on Linux the whole group
    gets SIGKILL instead, which also ends one that is stopped.
    """
    for asked_to_end in (signal.SIGINT, signal.SIGTERM):  # sent to all processes at once; the run decides when it ends
        signal.signal(asked_to_end, signal.SIG_IGN)
    signal.signal(signal.SIGIO, signal.SIG_DFL)
    if sys.platform == "linux":
        fcntl.fcntl(0, _F_SETSIG, signal.SIGKILL)
    fcntl.fcntl(0, fcntl.F_SETOWN, -os.getpgrp())
    fcntl.fcntl(0, fcntl.F_SETFL, fcntl.fcntl(0, fcntl.F_GETFL) | os.O_ASYNC)


class _Few(io.TextIOBase):
    """A text stream that takes so many characters and forgets the rest: what an item prints must not fill the run's log."""

    def __init__(self, stream, characters: int):
        self._stream, self._left = stream, characters

    def write(self, text: str) -> int:
        if self._left > 0:
            self._stream.write(text[: self._left])
            self._left -= len(text)
            if self._left <= 0:
                self._stream.write("\n[a worker process has said enough]\n")
        return len(text)

    def flush(self) -> None:
        self._stream.flush()

    def fileno(self) -> int:
        return self._stream.fileno()


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

"""The program of a worker process, which `pool` runs as a script: `python worker.py FILE_DESCRIPTOR`.

The worker receives (import path, whether its output has a file), then (function, initializer, memory limit), then one
item after another. It answers with a line of JSON, [kind, value, error text]: "ready" or "failed" after its start, "ok",
"none" or "error" per item.
"""

import contextlib
import fcntl
import io
import json
import math
import multiprocessing.connection
from multiprocessing.reduction import ForkingPickler
import os
import pathlib
import resource
import signal
import sys
import threading
from typing import Any, TextIO

MAX_STDERR = 10_000  # characters that a worker without a file may print to stderr
MAX_WORDS = 300  # characters of an error that are reported
MAX_REPORT_BYTES = 2**24  # keeps a worker that a hostile item took over from filling the parent's memory
_ASKED_TO_END = (signal.SIGINT, signal.SIGTERM)
_F_SETSIG = 10  # a Linux constant that Python's fcntl does not name


def _serve(connection: multiprocessing.connection.Connection) -> None:
    _end_with_parent()
    for stream in (sys.stdout, sys.stderr):  # a worker can be killed at any time, so nothing waits in a buffer
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(encoding="utf-8", errors="backslashreplace", line_buffering=True)
    try:
        sys.path[:], has_file = connection.recv()
        if not has_file:
            sys.stderr = _Limited(sys.stderr, MAX_STDERR)
        function, initializer, memory_mb = connection.recv()
        if initializer is not None:
            initializer()
        _limit_memory(memory_mb)
    except BaseException as error:
        _write(connection, _packed_report("failed", words=words_of(error)))
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
        except BaseException as error:  # not Exception: math-verify's timeouts derive from BaseException
            report = _packed_report("error", words=words_of(error))
        with contextlib.suppress(BaseException):  # an item can replace or close the stream
            sys.stdout.flush()
        _write(connection, report)


def _write(connection: multiprocessing.connection.Connection, report: bytes) -> None:
    while report:
        report = report[os.write(connection.fileno(), report) :]


def _packed_report(kind: str, value: Any = None, words: str = "") -> bytes:
    # JSON, because a worker that a hostile item took over must not make the parent unpickle anything.
    report = json.dumps([kind, value, words], allow_nan=False).encode()
    if len(report) > MAX_REPORT_BYTES:
        raise ValueError(f"the function returned {len(report)} bytes; at most {MAX_REPORT_BYTES} are read")
    return report + b"\n"  # marks the end: a line of JSON contains no line break


def words_of(error: BaseException) -> str:
    """Returns the type, the message and the notes of an error on one line, in ASCII."""
    words = type(error).__name__
    with contextlib.suppress(BaseException):  # the error's own __str__ may raise
        words += f": {error}"
    words = " ".join([words[:MAX_WORDS], *getattr(error, "__notes__", ())])
    words = words.encode("ascii", "backslashreplace").decode()
    return "".join(x if x.isprintable() else x.encode("unicode_escape").decode() for x in words)


def _end_with_parent() -> None:
    """Makes the kernel end this process and its child processes when the parent's end of stdin closes."""
    # An idle worker would notice that its connection closed. A worker in a long computation in C, which no thread or
    # Python handler can interrupt, would go on for hours. The kernel sends SIGIO when the state of stdin changes, and
    # SIGIO ends a process by default. On Linux the whole process group gets SIGKILL, which ends stopped ones too.
    for asked_to_end in _ASKED_TO_END:  # sent to all processes at once; the run decides when to end
        # Not SIG_IGN, which every program that an item starts would inherit: nothing could ask such a program to end.
        signal.signal(asked_to_end, _ignore)
    os.register_at_fork(before=_hold, after_in_parent=_release, after_in_child=_end_when_asked)
    signal.signal(signal.SIGIO, signal.SIG_DFL)
    if sys.platform == "linux":
        fcntl.fcntl(0, _F_SETSIG, signal.SIGKILL)
    fcntl.fcntl(0, fcntl.F_SETOWN, -os.getpgrp())
    fcntl.fcntl(0, fcntl.F_SETFL, fcntl.fcntl(0, fcntl.F_GETFL) | os.O_ASYNC)


def _ignore(*_: object) -> None:
    """Handles a signal by doing nothing."""


# A signal that reached a forked process before it can end of it would be lost, so such signals wait.
_before_fork = threading.local()


def _hold() -> None:
    _before_fork.mask = signal.pthread_sigmask(signal.SIG_BLOCK, _ASKED_TO_END)


def _release() -> None:
    signal.pthread_sigmask(signal.SIG_SETMASK, _before_fork.mask)


def _end_when_asked() -> None:
    """Gives a process that an item forks the signals of an ordinary Python process."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    _release()


class _Limited(io.TextIOBase):
    """A text stream that drops everything after some characters, so that the prints of an item fill no log."""

    def __init__(self, stream: TextIO, characters: int):
        self._stream, self._left = stream, characters

    def write(self, text: str) -> int:
        if self._left > 0:
            self._stream.write(text[: self._left])
            self._left -= len(text)
            if self._left <= 0:
                self._stream.write("\n[further output of this worker process is dropped]\n")
        return len(text)

    def flush(self) -> None:
        self._stream.flush()

    def fileno(self) -> int:
        return self._stream.fileno()


def _limit_memory(memory_mb: int) -> None:
    held = pathlib.Path("/proc/self/statm")
    if held.exists():  # other systems than Linux do not enforce this limit
        address_space = int(held.read_text().split()[0]) * resource.getpagesize() + memory_mb * 2**20
        hard = resource.getrlimit(resource.RLIMIT_AS)[1]
        limit = address_space if hard == resource.RLIM_INFINITY else min(address_space, hard)
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


if __name__ == "__main__":
    try:
        with contextlib.suppress(EOFError, OSError):  # the parent closed the connection
            _serve(multiprocessing.connection.Connection(int(sys.argv[1])))
    finally:
        os._exit(0)  # at once: an orderly exit would wait for threads that an item left running

"""A file for the output of worker processes, which stays small."""

import contextlib
import os
import pathlib
import threading
import weakref

MAX_BYTES = 5_000_000  # per file; there are two, the newest and the one before it
_BLOCK = 2**16


class Output:
    """Appends what processes print to a file; the file, and its directory, are made when something is printed.

    A file of `MAX_BYTES` becomes PATH.1 in place of an older one, so the newest output stays. A full disk costs output,
    and nothing else. Several pools can share an output. It ends with the process, or when nothing refers to it.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = pathlib.Path(path)
        self._opened: list[tuple[int, threading.Thread]] = []  # the end of the pipe that is written, and the reader
        self._lock = threading.Lock()
        weakref.finalize(self, _close, self._opened)

    def stream(self) -> int:
        """Returns the file descriptor that is to be the stdout and the stderr of a process."""
        # A pipe, because nothing else limits what child processes and libraries in C print.
        with self._lock:
            if not self._opened:
                read_end, write_end = os.pipe()
                thread = threading.Thread(target=_copy, args=(read_end, self.path), daemon=True)
                thread.start()
                self._opened.append((write_end, thread))
            return self._opened[0][0]


def _close(opened: list[tuple[int, threading.Thread]]) -> None:
    for write_end, thread in opened:
        os.close(write_end)
        with contextlib.suppress(RuntimeError):  # the garbage collector can run in this very thread
            thread.join(timeout=1.0)  # a process that left its group may still hold the pipe


def _copy(read_end: int, path: pathlib.Path) -> None:
    with open(read_end, "rb", buffering=0) as pipe:
        while block := pipe.read(_BLOCK):
            with contextlib.suppress(OSError):
                path.parent.mkdir(parents=True, exist_ok=True)
                if path.is_file() and path.stat().st_size + len(block) > MAX_BYTES:
                    path.replace(f"{path}.1")
                with open(path, "ab", buffering=0) as file:
                    file.write(block)

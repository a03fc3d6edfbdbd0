"""Locks between processes that share a directory: one process holds the lock of a file, and its end frees the lock.

The locks are POSIX record locks: those of a killed process are free at once, and processes on several hosts see them if
their common file system has such locks (NFS 4 has them). A process never excludes itself.
"""

from collections.abc import Iterator
import contextlib
import errno
import fcntl
import pathlib
from typing import IO

from jaxrl_reason.runs.files import writing


def take(path: pathlib.Path, *, needed: bool = True) -> IO[bytes] | None:
    """Takes the lock of a file, which is made if needed. Returns None if another process holds the lock.

    Closing the returned file frees the lock. Raises OSError for a file that cannot be written, and on a file system
    without locks; there the file is returned without a lock, if the lock is not `needed`.
    """
    return _locked(path, fcntl.LOCK_NB, needed)


@contextlib.contextmanager
def held(path: pathlib.Path) -> Iterator[None]:
    """Waits for the lock of a file, and holds it inside a `with` block. Raises OSError as `take`."""
    file = _locked(path, 0)
    assert file is not None  # without LOCK_NB it waits
    with file:
        yield


def _locked(path: pathlib.Path, flags: int, needed: bool = True) -> IO[bytes] | None:
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(path, "ab")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | flags)
    except OSError as e:
        if not needed and e.errno not in (errno.EACCES, errno.EAGAIN):
            return file
        file.close()
        if flags and e.errno in (errno.EACCES, errno.EAGAIN):
            return None
        raise OSError(
            f"{path} cannot be locked ({e.strerror or e}); choose a directory on a file system with locks."
        ) from e
    return file

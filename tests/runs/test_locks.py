"""Tests locks of files between processes."""

import signal
import subprocess
import sys
import time

import pytest

from jaxrl_reason.runs import locks

HOLD = """
import pathlib, sys, time
from jaxrl_reason.runs import locks
lock = locks.take(pathlib.Path(sys.argv[1]))
print("held" if lock else "refused", flush=True)
if lock and len(sys.argv) > 2:
    sys.stdin.readline()
"""


def another(path, *flags):
    return subprocess.Popen(
        [sys.executable, "-c", HOLD, str(path), *flags], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


@pytest.mark.processes
def test_one_process_holds_a_lock_and_a_killed_one_frees_it(tmp_path):
    file = tmp_path / "new" / "a.lock"
    with another(file, "wait") as holder:
        assert holder.stdout.readline() == "held\n"
        assert locks.take(file) is None
        holder.send_signal(signal.SIGKILL)
        holder.wait()
        lock = locks.take(file)
        assert lock
    assert another(file).communicate()[0] == "refused\n"
    lock.close()
    assert another(file).communicate()[0] == "held\n"


@pytest.mark.processes
def test_held_waits_for_the_lock(tmp_path):
    with another(tmp_path / "a.lock", "wait") as holder:
        assert holder.stdout.readline() == "held\n"
        subprocess.Popen(["sh", "-c", f"sleep 0.5; kill -9 {holder.pid}"])
        begin = time.monotonic()
        with locks.held(tmp_path / "a.lock"):
            assert time.monotonic() - begin > 0.4


def test_a_file_that_cannot_be_locked_is_one_sentence(tmp_path, monkeypatch):
    def no_locks(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(locks.fcntl, "lockf", no_locks)
    with pytest.raises(OSError, match=r"a.lock cannot be locked \(Operation not supported\); choose a directory on"):
        locks.take(tmp_path / "a.lock")
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="a.lock cannot be written: "):
        locks.take(tmp_path / "file" / "a.lock")

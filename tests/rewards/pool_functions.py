"""Functions that workers run in the tests of `Pool`. Every worker imports this module, so it imports little."""

import ctypes
import math
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time


def act(item):
    """Returns a number unchanged. A text names an action of the worker."""
    if not isinstance(item, str):
        return item
    match item.partition(" ")[0]:
        case "sleep":
            time.sleep(float(item.split()[1]))
            return 1.0
        case "hang":
            return len(str(9**9**9**9))  # this runs in C and holds the interpreter's lock
        case "loop":
            while True:
                try:
                    time.sleep(1000)
                except BaseException:
                    pass
        case "grandchild":
            child = subprocess.Popen(["sleep", "1000"])
            pathlib.Path(item.split()[1]).write_text(str(child.pid))
            child.wait()
        case "stopped":  # stops right after its report
            threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGSTOP)).start()
            return 1.0
        case "half":  # writes half of a report
            os.write(int(sys.argv[1]), b'["ok", 1.0')
            time.sleep(1000)
        case "twice":
            os.write(int(sys.argv[1]), b'["ok", 1.0, ""]\n["ok", 2.0, ""]\n')
            time.sleep(1000)
        case "trickle":
            while True:
                os.write(int(sys.argv[1]), b" ")
                time.sleep(0.001)
        case "forged":
            os.write(int(sys.argv[1]), item.partition(" ")[2].encode() + b"\n")
            time.sleep(1000)
        case "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        case "chatter":
            for _ in range(100_000):
                print("noise", file=sys.stderr)
            return 1.0
        case "exit":
            os._exit(7)
        case "segfault":
            ctypes.string_at(0)
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        case "memory":
            return len(bytes(2**40))
        case "recursion":
            return act(item)
        case "raise":
            raise type("VerifierTimeout", (BaseException,), {})("what it said")
        case "unspeakable":
            raise type("Unspeakable", (Exception,), {"__str__": lambda self: 1 / 0})
        case "system_exit":
            sys.exit(3)
        case "interrupt":
            raise KeyboardInterrupt
        case "text":
            return "\ud800 no number"
        case "list":
            return [1.0, None, ["ok"]]
        case "object":
            return {}
        case "inside":
            return [math.nan]
        case "endless":
            return "x" * 2**24
        case "nan":
            return math.nan
        case "print":
            print("noise\n" * 1000, flush=True)
            return 2.0
        case "unended":
            print("x" * 10**6)
            return 1.0
        case "pid":
            return os.getpid()
        case "jax":
            return float("jax" in sys.modules or os.environ["JAX_PLATFORMS"] != "cpu")
    return None


def size(item):
    return len(item)


def die(countdown):
    """Kills the worker as many times as the number in the file."""
    left = int(pathlib.Path(countdown).read_text())
    pathlib.Path(countdown).write_text(str(left - 1))
    if left > 0:
        os.kill(os.getpid(), signal.SIGKILL)


def refuse():
    raise OSError("no such verifier")

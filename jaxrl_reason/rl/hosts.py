"""Several processes, one per host, run one program: which prompts each process reads and scores, and how the processes stay in step.

Every process runs the same command. Arrays on devices are global. Data on a host is either complete and equal on all processes (scalars, held-out
prompts), or it is this process's rows of a batch, the rows that its devices hold. A single process holds all rows, and nothing communicates.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
import contextlib
import functools
import glob
import itertools
import os
import re
import signal
import sys
import textwrap
import threading
import traceback
from typing import Any, TypeVar

import jax
from jax.experimental import multihost_utils
import numpy as np

T = TypeVar("T")


def initialize(timeout: int, patience: int, *, saves: bool = True) -> None:
    """Connects this process with the others, if there are any. Call it before anything else of jax.

    On Cloud TPUs jax finds the other processes. Elsewhere three environment variables name them: JAX_COORDINATOR_ADDRESS (host:port of process 0),
    JAX_NUM_PROCESSES and JAX_PROCESS_ID. If the others do not connect in time, this process ends with a sentence and exit code 1.

    Args:
      timeout: seconds without a heartbeat after which a process counts as dead, and the others end.
      patience: seconds to wait for the others to connect.
      saves: whether the command uses `preemption`. Otherwise SIGTERM ends one of several processes, as it ends a single one.

    Raises:
      ValueError: some of the variables are missing or not numbers, or the other processes cannot be found.
    """
    names = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
    given = [os.environ.get(name, "") for name in names]
    listed = ", ".join(f"{name}={text!r}" for name, text in zip(names, given))
    if any(given) and not (all(given) and all(text.isdigit() for text in given[1:])):
        raise ValueError(
            f"A run on several processes needs an address and two numbers, and there are {listed}. Set all three, or none."
        )
    limits: dict[str, Any] = dict(
        initialization_timeout=patience + 60,  # after our own limit: jax ends the process without a sentence
        heartbeat_timeout_seconds=timeout,
        shutdown_timeout_seconds=timeout,
    )
    if not (any(given) or _on_a_tpu_vm()):
        return
    jax.config.update("jax_enable_preemption_service", saves)  # catches SIGTERM
    try:
        with _patient(patience, listed):
            if all(given):
                jax.distributed.initialize(given[0], num_processes=int(given[1]), process_id=int(given[2]), **limits)
            else:
                jax.distributed.initialize(**limits)
            # CPUs connect at their first collective, which must come within 30 seconds; set-up may take longer.
            barrier("connected")
    except Exception as e:  # from the network, the cloud's metadata or jax: many classes
        if isinstance(e, ValueError) and not any(given) and not came_from_devices(e):
            return  # jax knows no cluster: there is only this machine
        raise ValueError(
            f"This process cannot be connected with the others ({listed}): {textwrap.shorten(str(e), 300, placeholder=' ...')} If there are "
            "none, set JAX_NUM_PROCESSES=1, JAX_PROCESS_ID=0 and JAX_COORDINATOR_ADDRESS=127.0.0.1:1234."
        ) from e


@contextlib.contextmanager
def _patient(seconds: int, listed: str) -> Iterator[None]:
    """Prints that this process waits for the others, and ends it after this many seconds. No exception could end the wait."""
    connected = threading.Event()

    def watch():
        say = lambda text: print(text, file=sys.stderr, flush=True)
        first = min(30.0, seconds / 2)
        if connected.wait(first):
            return
        say(f"This process waits for the others, up to {seconds} s (mesh.initialization_timeout; {listed}).")
        if not connected.wait(seconds - first):
            say(
                f"error: The other processes have not connected within {seconds} s (mesh.initialization_timeout; {listed}). Start the same command on "
                "every host, and read the messages on hosts whose process has ended."
            )
            os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
    try:
        yield
    finally:
        connected.set()


def _on_a_tpu_vm() -> bool:
    """Returns whether this machine has TPUs and may be one of several. A notebook's machine is alone and has no metadata server."""
    alone = "COLAB_RELEASE_TAG" in os.environ or os.environ.get("JAX_PLATFORMS") == "cpu"
    return not alone and bool(glob.glob("/dev/accel*") or glob.glob("/dev/vfio/[0-9]*"))


def is_first() -> bool:
    """Returns whether this is the process that writes files and prints."""
    return jax.process_index() == 0


def barrier(name: str) -> None:
    """Waits until every process has reached this call."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def leave(code: int) -> int:
    """Ends one of several processes at once, since a normal exit would wait for the others. Returns `code` if there is only one process."""
    if jax.process_count() > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


@contextlib.contextmanager
def leaving_together() -> Iterator[None]:
    """Ends one of several processes at once, with a traceback, if an unexpected exception leaves the block."""
    try:
        yield
    except BaseException:
        if jax.process_count() == 1:
            raise
        traceback.print_exc()
        leave(1)


def came_from_devices(error: Exception) -> bool:
    """Returns whether the runtime raised this error. Its errors have several classes; their messages begin with a status."""
    return bool(
        re.match(
            r"(UNKNOWN|UNAVAILABLE|INTERNAL|ABORTED|CANCELLED|DEADLINE_EXCEEDED|FAILED_PRECONDITION): ", str(error)
        )
    )


def why_it_stopped(error: Exception) -> str:
    """Returns a sentence about a failure of the devices in a run on several processes."""
    return (
        f"Process {jax.process_index()} of {jax.process_count()} cannot go on: a computation that all processes share has failed, most "
        f"likely because another process has ended ({textwrap.shorten(str(error), 200, placeholder=' ...')}). Start the same command on "
        "every host again: it goes on from what is saved."
    )


class Preempted(Exception):
    """The run received SIGTERM or Ctrl-C and has saved its state after `step`; the message is a sentence."""

    exit_code = 128 + signal.SIGTERM

    def __init__(self, step: str):
        super().__init__(f"Asked to end, and saved after {step}: the same command continues from there.")


@contextlib.contextmanager
def preemption() -> Iterator[Callable[[], bool]]:
    """Catches SIGTERM and Ctrl-C inside a `with` block, which gets should_stop: () -> whether to save and end.

    On several processes all calls of should_stop return True from the same step on, whichever process got the signal. So every process has to call
    it once per step. A block inside another one shares its should_stop, so that a signal in one of several runs ends all of them. A second Ctrl-C
    raises KeyboardInterrupt.
    """
    if _asked:
        yield _asked[-1]
        return
    received: list[int] = []
    calls = itertools.count(1)

    def ask(number: int, _: Any) -> None:
        if number == signal.SIGINT in received:
            raise KeyboardInterrupt
        received.append(number)
        if number == signal.SIGINT:
            if sys.stdout.isatty():
                # `print` may be busy.
                os.write(1, b"\nEnding after this step. A second Ctrl-C ends at once, without saving.\n")
            if not alone:
                os.kill(os.getpid(), signal.SIGTERM)

    def agreed():
        # jax catches SIGTERM, and the processes agree on a call that none of them has reached.
        nonlocal stopping
        stopping = stopping or multihost_utils.reached_preemption_sync_point(next(calls))
        return stopping

    stopping, alone = False, jax.process_count() == 1
    should_stop = (lambda: bool(received)) if alone else agreed
    in_main_thread = threading.current_thread() is threading.main_thread()  # only this thread may handle signals
    caught = (signal.SIGINT, signal.SIGTERM) if alone else (signal.SIGINT,)
    before = {number: signal.signal(number, ask) for number in caught} if in_main_thread else {}
    _asked.append(should_stop)
    try:
        yield should_stop
    finally:
        _asked.pop()
        for number, handler in before.items():
            signal.signal(number, handler)


_asked: list[Callable[[], bool]] = []  # should_stop of the outermost `preemption`


@contextlib.contextmanager
def leaving_at_once() -> Iterator[None]:
    """Ends the process at the second Ctrl-C inside a `with` block, even while it computes or compiles."""
    # Python's own handlers wait until the main thread returns from compiled code; a thread reads the signals meanwhile.
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    before = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)

    def watch() -> None:
        presses = 0
        while number := os.read(reading, 1):
            presses += number[0] == signal.SIGINT
            if presses == 2:
                if sys.stdout.isatty():
                    os.write(1, b"\x1b[?25h")  # shows the cursor, which a progress bar hides
                os._exit(INTERRUPTED)
        os.close(reading)

    threading.Thread(target=watch, daemon=True).start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        os.close(writing)


INTERRUPTED = 128 + signal.SIGINT  # the exit code after Ctrl-C without saving


# -- rows of a batch -------------------------------------------------------------------------------


@functools.lru_cache(maxsize=64)
def _rows_of(sharding: jax.sharding.Sharding, size: int) -> tuple[tuple[int, ...], ...]:
    """Returns, for each process, the rows of [size, ...] that its devices hold, ascending."""
    rows: list[set[int]] = [set() for _ in range(jax.process_count())]
    indices: Mapping[Any, Any] = sharding.devices_indices_map((size,))
    for device, index in indices.items():
        rows[device.process_index].update(range(*index[0].indices(size)))
    return tuple(tuple(sorted(found)) for found in rows)


def local_rows(sharding: jax.sharding.Sharding, size: int) -> np.ndarray:
    """Returns the indices of the rows of a batch that this process holds, int[n], ascending. A group is never split."""
    if jax.process_count() == 1:
        return np.arange(size)
    return np.array(_rows_of(sharding, size)[jax.process_index()])


def local_rows_of(x: jax.Array) -> np.ndarray:
    """Returns the indices of the rows of an array that this process holds."""
    return np.arange(len(x)) if jax.process_count() == 1 else local_rows(x.sharding, len(x))


def put(x: Any, sharding: jax.sharding.Sharding) -> jax.Array:
    """Makes a global array from a value that is complete on every process."""
    if jax.process_count() == 1:
        return jax.device_put(x, sharding)
    x = np.asarray(x)
    shards = sharding.addressable_devices_indices_map(x.shape).items()
    return jax.make_array_from_single_device_arrays(
        x.shape, sharding, [jax.device_put(x[index], device) for device, index in shards]
    )


def put_rows(x: Any, sharding: jax.sharding.Sharding, size: int) -> jax.Array:
    """Makes a global array [size, ...] from this process's rows [n, ...]."""
    if jax.process_count() == 1:
        return jax.device_put(x, sharding)
    x = np.asarray(x)
    mine, shards = local_rows(sharding, size), []
    indices: Mapping[Any, Any] = sharding.addressable_devices_indices_map((size, *x.shape[1:]))
    for device, index in indices.items():
        rows = np.searchsorted(mine, np.arange(*index[0].indices(size)))
        shards.append(jax.device_put(x[rows][(slice(None), *index[1:])], device))
    return jax.make_array_from_single_device_arrays((size, *x.shape[1:]), sharding, shards)


def rows_to_host(x: jax.Array, sharding: jax.sharding.Sharding) -> np.ndarray:
    """Returns this process's rows [n, ...] of a global array [size, ...], whatever the sharding of the array."""
    if jax.process_count() == 1:
        return jax.device_get(x)
    mine = local_rows(sharding, x.shape[0])
    out, filled = np.zeros((len(mine), *x.shape[1:]), x.dtype), np.zeros((len(mine), *x.shape[1:]), bool)
    for shard in x.addressable_shards:
        held = np.arange(*shard.index[0].indices(x.shape[0]))
        known = np.isin(held, mine)
        at = (np.searchsorted(mine, held[known]), *shard.index[1:])
        out[at], filled[at] = jax.device_get(shard.data)[known], True
    if not filled.all():
        raise ValueError(f"An array of shape {x.shape} is not sharded by its prompts: {x.sharding}.")
    return out


def _gather(x, tiled: bool = False) -> np.ndarray:
    """Returns every process's x, stacked, or (tiled) a complete global array. The transfer is intended."""
    with jax.transfer_guard("allow"):
        return multihost_utils.process_allgather(x, tiled=tiled)


def to_host(x: jax.Array) -> np.ndarray:
    """Returns a complete global array on every process."""
    if jax.process_count() == 1 or x.is_fully_replicated:
        return jax.device_get(x)
    return _gather(x, tiled=True)


def gather_rows(x: np.ndarray, sharding: jax.sharding.Sharding, size: int) -> np.ndarray:
    """Gathers every process's rows [n, ...] to [size, ...], on every process.

    If several processes hold a row, the first process decides: a reward function may answer differently each time.
    """
    if jax.process_count() == 1:
        return x
    rows = _rows_of(sharding, size)
    padded = np.zeros((max(map(len, rows)), *x.shape[1:]), x.dtype)
    padded[: len(x)] = x
    out = np.zeros((size, *x.shape[1:]), x.dtype)
    for mine, theirs in list(zip(rows, _gather(padded)))[::-1]:
        out[list(mine)] = theirs[: len(mine)]
    return out


def from_first(numbers: Sequence[int]) -> list[int]:
    """Returns the first process's numbers."""
    if jax.process_count() == 1:
        return list(numbers)
    padded = np.zeros(largest(len(numbers)), np.int32)
    padded[: len(numbers)] = numbers
    count = _gather(np.int32(len(numbers)))[0]
    return _gather(padded)[0][:count].tolist() if padded.size else []


def largest(x: int) -> int:
    """Returns the largest of the processes' numbers."""
    return x if jax.process_count() == 1 else int(_gather(np.int32(x)).max())


def mean(metrics: dict[str, float]) -> dict[str, float]:
    """Returns the mean of every metric over the processes. Every process has all metrics."""
    if jax.process_count() == 1 or not metrics:
        return metrics
    values = _gather(np.asarray(list(metrics.values()), np.float32)).mean(axis=0)
    return dict(zip(metrics, map(float, values)))


def attempt(work: Callable[[], T], *errors: type[Exception]) -> Callable[[], T]:
    """Does `work` now, and returns a function that returns its result or raises its error (one of `errors`), for `agree`."""
    try:
        result = work()
    except errors as e:
        fault = e

        def failed():
            raise fault

        return failed
    return lambda: result


def agree(work: Callable[[], T], *errors: type[Exception]) -> T:
    """Returns `work()`. If it raises one of `errors` on one process, every process raises."""
    if jax.process_count() == 1:
        return work()
    result: Any = None
    fault: Exception | None = None
    try:
        result = work()
    except errors as e:
        fault = e
    text = b"" if fault is None else (str(fault) or type(fault).__name__).encode()
    padded = np.zeros(largest(len(text)), np.uint8)
    padded[: len(text)] = np.frombuffer(text, np.uint8)
    texts = _gather(padded) if padded.size else np.zeros((0, 0), np.uint8)
    if fault is not None:
        raise fault
    for process, text in enumerate(texts):
        if text.any():
            said = bytes(text[text > 0]).decode(errors="replace")
            raise errors[0](f"On process {process}: {said}")
    return result

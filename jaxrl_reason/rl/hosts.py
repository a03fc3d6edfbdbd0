"""Several processes, one a host, that run one program: which prompts each of them reads and scores, and how they stay in step.

Every process runs the same command. Arrays are global; what stands on a host is either whole and the same everywhere (scalars,
held-out prompts) or this process's share of a batch: the rows that its devices hold. With one process a share is everything, and
nothing here communicates.
"""

from collections.abc import Callable, Sequence
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
from typing import TypeVar

import jax
from jax.experimental import multihost_utils
import numpy as np

T = TypeVar("T")


def initialize(timeout: int, patience: int) -> None:
    """Connects this process with the others, where there are any; before anything else of jax is used.

    On Cloud TPUs jax finds them. Elsewhere three variables of the environment name them: JAX_COORDINATOR_ADDRESS (host:port of process
    0), JAX_NUM_PROCESSES and JAX_PROCESS_ID. If they do not come in time, this ends the process with a sentence and the exit code 1.

    Args:
      timeout: seconds without a sign of life after which a process counts as dead, and the others end.
      patience: seconds to wait for the others to come.

    Raises:
      ValueError: only some of the three are set, or are no numbers; the others cannot be found; or it cannot be known whether there are any.
    """
    names = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
    given = [os.environ.get(name, "") for name in names]
    listed = ", ".join(f"{name}={text!r}" for name, text in zip(names, given))
    if any(given) and not (all(given) and all(text.isdigit() for text in given[1:])):
        raise ValueError(
            f"A run on several processes needs an address and two numbers, and there are {listed}: set all three, or none."
        )
    limits = dict(
        initialization_timeout=patience + 60,  # behind ours: jax ends the process without a sentence
        heartbeat_timeout_seconds=timeout,
        shutdown_timeout_seconds=timeout,
    )
    if not (any(given) or _on_a_tpu_vm()):
        return
    try:
        with _patient(patience, listed):
            if all(given):
                jax.distributed.initialize(given[0], num_processes=int(given[1]), process_id=int(given[2]), **limits)
            else:
                jax.distributed.initialize(**limits)
            # CPUs connect at the first thing done together, in 30 seconds; what comes first may take longer.
            barrier("connected")
    except Exception as e:  # of the network, of the cloud's metadata, of jax: many classes
        if isinstance(e, ValueError) and not any(given) and not came_from_devices(e):
            return  # jax knows of no cluster: this machine is alone
        raise ValueError(
            f"This process cannot be connected with the others ({listed}): {textwrap.shorten(str(e), 300, placeholder=' ...')} If there are "
            "none, set JAX_NUM_PROCESSES=1, JAX_PROCESS_ID=0 and JAX_COORDINATOR_ADDRESS=127.0.0.1:1234."
        ) from e


@contextlib.contextmanager
def _patient(seconds: int, listed: str):
    """Says that this process waits for others when that takes long, and ends it after so many seconds: no exception would reach it."""
    come = threading.Event()

    def watch():
        say = lambda text: print(text, file=sys.stderr, flush=True)
        first = min(30.0, seconds / 2)
        if come.wait(first):
            return
        say(f"This process waits for the others, up to {seconds} s (mesh.initialization_timeout; {listed}).")
        if not come.wait(seconds - first):
            say(
                f"error: The other processes have not come within {seconds} s (mesh.initialization_timeout; {listed}). Give the same "
                "command on every host, and see on those where it has ended what it said."
            )
            os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
    try:
        yield
    finally:
        come.set()


def _on_a_tpu_vm() -> bool:
    """Whether this machine has TPUs and may be one of several; notebooks' machines are alone, and have nobody to ask."""
    alone = "COLAB_RELEASE_TAG" in os.environ or os.environ.get("JAX_PLATFORMS") == "cpu"
    return not alone and bool(glob.glob("/dev/accel*") or glob.glob("/dev/vfio/[0-9]*"))


def first() -> bool:
    """Whether this is the process that writes files and speaks."""
    return jax.process_index() == 0


def barrier(name: str) -> None:
    """Waits until every process is here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def leave(code: int) -> int:
    """Ends a process of several that has failed, at once: the usual way out would wait for the others, who wait for this one.

    Returns:
      `code`, where there is only one.
    """
    if jax.process_count() > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


@contextlib.contextmanager
def leaving_together():
    """Around all that several processes do: what nobody foresaw ends this one with its traceback, and at once."""
    try:
        yield
    except BaseException:
        if jax.process_count() == 1:
            raise
        traceback.print_exc()
        leave(1)


def came_from_devices(error: Exception) -> bool:
    """Whether the runtime raised this: jax gives its errors several classes, and their messages begin with a status."""
    return bool(
        re.match(
            r"(UNKNOWN|UNAVAILABLE|INTERNAL|ABORTED|CANCELLED|DEADLINE_EXCEEDED|FAILED_PRECONDITION): ", str(error)
        )
    )


def why_it_stopped(error: Exception) -> str:
    """A sentence about a failure of the devices in a run on several processes."""
    return (
        f"Process {jax.process_index()} of {jax.process_count()} cannot go on: a computation that all of them share has failed, most "
        f"likely because another one has ended ({textwrap.shorten(str(error), 200, placeholder=' ...')}). Give the same command on "
        "every host again: the run goes on from its newest checkpoint."
    )


class Preempted(Exception):
    """The run was asked to end (SIGTERM) and has saved where it stands, after `step`; the message is a sentence."""

    exit_code = 128 + signal.SIGTERM

    def __init__(self, step: str):
        super().__init__(f"Asked to end, and saved after {step}: the same command goes on from there.")


@contextlib.contextmanager
def preemption():
    """While this lasts SIGTERM ends nothing, but is told by what the `with` statement gives: () -> whether to save and end.

    Of several processes all begin to say so at the same call, whichever was told; each has to ask after every step. Once said it stays.
    """
    told, calls = [], itertools.count(1)

    def agreed():
        # jax catches the signal, and agrees on a number that nobody has reached.
        if not told and multihost_utils.reached_preemption_sync_point(next(calls)):
            told.append(True)
        return bool(told)

    if jax.process_count() > 1:
        yield agreed
        return
    try:
        before = signal.signal(signal.SIGTERM, lambda *_: told.append(True))
    except ValueError:  # only the main thread may
        yield lambda: False
        return
    try:
        yield lambda: bool(told)
    finally:
        signal.signal(signal.SIGTERM, before)


# -- shares of a batch -----------------------------------------------------------------------------


@functools.lru_cache(maxsize=64)
def _rows_of(sharding: jax.sharding.Sharding, size: int) -> tuple[tuple[int, ...], ...]:
    """For each process, the rows of [size, ...] that its devices hold, ascending."""
    rows = [set() for _ in range(jax.process_count())]
    for device, index in sharding.devices_indices_map((size,)).items():
        rows[device.process_index].update(range(*index[0].indices(size)))
    return tuple(tuple(sorted(found)) for found in rows)


def places(sharding: jax.sharding.Sharding, size: int) -> np.ndarray:
    """The rows of a batch of `size` that this process holds, int[n], ascending; a group is never split."""
    if jax.process_count() == 1:
        return np.arange(size)
    return np.array(_rows_of(sharding, size)[jax.process_index()])


def places_of(x: jax.Array) -> np.ndarray:
    """The rows of a batch that this process holds of an array of it."""
    return np.arange(len(x)) if jax.process_count() == 1 else places(x.sharding, len(x))


def put(x, sharding: jax.sharding.Sharding) -> jax.Array:
    """A global array out of a value that every process has whole."""
    if jax.process_count() == 1:
        return jax.device_put(x, sharding)
    x = np.asarray(x)
    shards = sharding.addressable_devices_indices_map(x.shape).items()
    return jax.make_array_from_single_device_arrays(
        x.shape, sharding, [jax.device_put(x[index], device) for device, index in shards]
    )


def put_share(x, sharding: jax.sharding.Sharding, size: int) -> jax.Array:
    """A global array [size, ...] out of this process's rows [n, ...]."""
    if jax.process_count() == 1:
        return jax.device_put(x, sharding)
    x = np.asarray(x)
    mine, shards = places(sharding, size), []
    for device, index in sharding.addressable_devices_indices_map((size, *x.shape[1:])).items():
        rows = np.searchsorted(mine, np.arange(*index[0].indices(size)))
        shards.append(jax.device_put(x[rows][(slice(None), *index[1:])], device))
    return jax.make_array_from_single_device_arrays((size, *x.shape[1:]), sharding, shards)


def share(x: jax.Array, sharding: jax.sharding.Sharding) -> np.ndarray:
    """This process's rows [n, ...] of a global array [size, ...], wherever its own sharding has put them."""
    if jax.process_count() == 1:
        return jax.device_get(x)
    mine = places(sharding, x.shape[0])
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
    """Every process's x, stacked, or (tiled) all of a global array; a crossing that is meant."""
    with jax.transfer_guard("allow"):
        return multihost_utils.process_allgather(x, tiled=tiled)


def whole(x: jax.Array) -> np.ndarray:
    """All of a global array, on every process."""
    if jax.process_count() == 1 or x.is_fully_replicated:
        return jax.device_get(x)
    return _gather(x, tiled=True)


def together(x: np.ndarray, sharding: jax.sharding.Sharding, size: int) -> np.ndarray:
    """Every process's rows [n, ...] put together to [size, ...], on every process.

    Of a row that several hold, what the first of them says counts: they may have asked something that answers differently each time.
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
    """The first process's numbers."""
    if jax.process_count() == 1:
        return list(numbers)
    padded = np.zeros(largest(len(numbers)), np.int32)
    padded[: len(numbers)] = numbers
    count = _gather(np.int32(len(numbers)))[0]
    return _gather(padded)[0][:count].tolist() if padded.size else []


def largest(x: int) -> int:
    """The largest of the processes' numbers."""
    return x if jax.process_count() == 1 else int(_gather(np.int32(x)).max())


def mean(figures: dict[str, float]) -> dict[str, float]:
    """The mean of every figure over the processes, each of which has all of them."""
    if jax.process_count() == 1 or not figures:
        return figures
    values = _gather(np.float32(list(figures.values()))).mean(axis=0)
    return dict(zip(figures, map(float, values)))


def attempt(work: Callable[[], T], *errors: type[Exception]) -> Callable[[], T]:
    """Does `work` now; what it returns or raises (one of `errors`) comes when the result is called: for `agree`."""
    try:
        result = work()
    except errors as e:
        fault = e

        def failed():
            raise fault

        return failed
    return lambda: result


def agree(work: Callable[[], T], *errors: type[Exception]) -> T:
    """`work()` on every process; where it raises one of `errors` on one of them, every process raises."""
    if jax.process_count() == 1:
        return work()
    result = fault = None
    try:
        result = work()
    except errors as e:
        fault = e
    text = b"" if fault is None else (str(fault) or type(fault).__name__).encode()
    padded = np.zeros(largest(len(text)), np.uint8)
    padded[: len(text)] = np.frombuffer(text, np.uint8)
    texts = _gather(padded) if padded.size else []
    if fault is not None:
        raise fault
    for process, text in enumerate(texts):
        if text.any():
            said = bytes(text[text > 0]).decode(errors="replace")
            raise errors[0](f"On process {process}: {said}")
    return result

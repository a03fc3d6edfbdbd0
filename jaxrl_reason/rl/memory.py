"""Memory of the host, between steps and after compiling."""

from collections.abc import Callable
import ctypes
import os
import pathlib

import jax

_BLOCK, _ALL = 128 * 2**20, 512 * 2**20  # bytes
_MMAP_THRESHOLD, _TRIM_THRESHOLD = -3, -1  # names of mallopt(3)


def keep_freed_blocks() -> None:
    """Lets glibc keep freed blocks of up to 128 MiB each, and 512 MiB in all, for the next step.

    By default it returns blocks above 32 MiB to the system, which clears their pages when the next step takes them: a
    third of the time of a small model. The arenas of threads other than the main one return blocks above 64 MiB in any
    case. Settings of the environment come first. Other C libraries have no such setting.
    """
    if any(name in os.environ for name in ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES")):
        return
    mallopt = _glibc("mallopt")
    if mallopt is not None:
        mallopt(_MMAP_THRESHOLD, _BLOCK)
        mallopt(_TRIM_THRESHOLD, _ALL)


def release_freed_blocks() -> None:
    """Lets glibc return all freed memory to the system: compiling the programs of a run leaves 0.7 GB."""
    trim = _glibc("malloc_trim")
    if trim is not None:
        trim(0)


def _glibc(name: str) -> Callable[..., int] | None:
    return getattr(ctypes.CDLL(None), name, None) if os.name == "posix" else None


def memory_metrics() -> dict[str, float]:
    """Returns the memory in use now, in GiB: of this process, and of the fullest of its devices, as far as they tell."""
    found, own = {}, pathlib.Path("/proc/self/statm")
    if own.exists():
        found["perf/host_memory_gib"] = int(own.read_bytes().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**30
    used = [(device.memory_stats() or {}).get("bytes_in_use") for device in jax.local_devices()]
    known = [x for x in used if x is not None]
    return found | ({"perf/device_memory_gib": max(known) / 2**30} if known else {})

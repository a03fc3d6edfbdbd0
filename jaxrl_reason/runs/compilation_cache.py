"""The persistent cache of compiled programs: a later start of the same configuration compiles nothing.

JAX reads and writes the entries, one file per program, and takes an entry that it cannot read for a missing one. This
module names the directory, limits its size, and removes entries that a killed process has left torn: JAX would keep
them, and compile their programs at every start.
"""

import importlib
import logging
import os
import pathlib
import zlib

import jax
from jax.experimental.compilation_cache import compilation_cache

MAX_BYTES = 4 * 2**30  # of a directory, when a run begins
_CHECKED = "checked"  # the modification time of this file is that of the last check
_log = logging.getLogger(__name__)
_ours: str | None = None  # the directory that this module has set


def enable(name: str) -> str:
    """Lets JAX keep compiled programs in a directory, and returns the directory; "" if there is none.

    A setting of JAX's own comes first, JAX_COMPILATION_CACHE_DIR or jax.config. A directory that cannot be used costs a
    warning.

    Args:
      name: the directory, "auto" for `default_directory`, or "" for none; `config.compilation_cache`.
    """
    global _ours
    now = jax.config.jax_compilation_cache_dir
    if "JAX_COMPILATION_CACHE_DIR" in os.environ or now not in (None, _ours):
        return now or ""
    directory = (
        str(default_directory() if name == "auto" else pathlib.Path(name).expanduser().resolve()) if name else None
    )
    if directory:
        try:
            pathlib.Path(directory).mkdir(mode=0o700, parents=True, exist_ok=True)
            clean(pathlib.Path(directory))
        except OSError as e:
            _log.warning(
                "Compiled programs cannot be kept in %s (%s); they are compiled again at every start.", directory, e
            )
            directory = None
    if directory != now:
        jax.config.update("jax_compilation_cache_dir", directory)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
        compilation_cache.reset_cache()  # JAX opens a directory once
        _ours = directory
    return directory or ""


def default_directory() -> pathlib.Path:
    """Returns the directory in the user's cache."""
    cache = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    return pathlib.Path(cache).resolve() / "jaxrl_reason" / "xla"


def clean(directory: pathlib.Path, max_bytes: int = MAX_BYTES) -> None:
    """Removes torn entries that are new since the last call, then the entries not used for longest, beyond `max_bytes`.

    Several processes may call it, and use the directory, at the same time: an entry that is missing is compiled again.
    Raises OSError for a directory that cannot be written.
    """
    marker = directory / _CHECKED
    last_check = marker.stat().st_mtime_ns if marker.exists() else 0
    marker.touch()
    entries = {}  # path -> (the time of its last use, its size)
    for path in directory.glob("*-cache"):
        try:
            stat = path.stat()
            if stat.st_mtime_ns >= last_check and not _is_whole(path.read_bytes()):
                path.unlink()
                continue
        except FileNotFoundError:  # another process has removed it
            continue
        entries[path] = max(stat.st_atime_ns, stat.st_mtime_ns), stat.st_size
    size = sum(size for _, size in entries.values())
    for path in sorted(entries, key=lambda path: entries[path]):
        if size <= max_bytes:
            break
        path.unlink(missing_ok=True)
        size -= entries[path][1]


def _is_whole(content: bytes) -> bool:
    """Returns whether an entry can be decompressed: by zlib, or by zstandard, which JAX uses where it is installed."""
    try:
        if content[:4] != b"\x28\xb5\x2f\xfd":
            zlib.decompress(content)
            return True
        for name in ("compression.zstd", "zstandard"):
            try:
                importlib.import_module(name).decompress(content)
                return True
            except ImportError:
                continue
        return True  # nothing here can tell; JAX cannot read it either
    except Exception:  # noqa: BLE001 - the classes of zstd's errors differ between packages
        return False

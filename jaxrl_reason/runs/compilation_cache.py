"""The persistent cache of compiled programs: a later start of the same configuration compiles nothing.

JAX reads and writes the entries, one file per program, and takes an entry that it cannot read for a missing one. This
module names the directory, limits its size, and removes entries that a killed process has left torn: JAX would keep
them, and compile their programs at every start.
"""

import logging
import os
import pathlib
import zlib

import jax
from jax.experimental.compilation_cache import compilation_cache

from jaxrl_reason.config import remote

try:
    from compression import zstd
except ImportError:
    try:
        import zstandard as zstd
    except ImportError:
        zstd = None

MAX_BYTES = 4 * 2**30  # of a directory, when a run begins
_CHECKED = "checked"  # the modification time of this file is that of the last check
_ZSTD = b"\x28\xb5\x2f\xfd"  # the first bytes of a Zstandard frame
_log = logging.getLogger(__name__)
_ours: str | None = None  # the directory that this module has set


def enable(name: str) -> None:
    """Lets JAX keep compiled programs in a directory.

    A setting of JAX's own comes first, JAX_COMPILATION_CACHE_DIR or jax.config. A directory that cannot be used costs a
    warning.

    Args:
      name: the directory, "auto" for `default_directory`, or "" for none; `config.compilation_cache`.
    """
    global _ours
    now = jax.config.values["jax_compilation_cache_dir"]
    if "JAX_COMPILATION_CACHE_DIR" in os.environ or now not in (None, _ours):
        return
    path, place = None, pathlib.Path(name)
    try:
        if name and not remote(name):  # `config.validate` refuses an address
            place = default_directory() if name == "auto" else place.expanduser().resolve()
            place.mkdir(mode=0o700, parents=True, exist_ok=True)
            clean(place)
            path = str(place)
    except (OSError, RuntimeError) as e:  # RuntimeError: there is no home directory
        _log.warning("Compiled programs cannot be kept in %s (%s); they are compiled again at every start.", place, e)
    if path != now:
        jax.config.update("jax_compilation_cache_dir", path)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
        compilation_cache.reset_cache()  # JAX opens a directory once
        _ours = path


def directory() -> str:
    """Returns the directory in which JAX keeps compiled programs; "" if it keeps none."""
    values = jax.config.values
    return (values["jax_enable_compilation_cache"] and values["jax_compilation_cache_dir"]) or ""


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
            if stat.st_mtime_ns >= last_check:
                if not _is_whole(path.read_bytes()):
                    path.unlink()
                    continue
                os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # the check is no use
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
    """Returns whether an entry can be decompressed: by Zstandard, which JAX uses if it is installed, or by zlib."""
    try:
        (zstd if zstd and content.startswith(_ZSTD) else zlib).decompress(content)
    except Exception:  # the packages have different classes of errors
        return False
    return True

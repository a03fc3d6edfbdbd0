import ctypes
import types

from jaxrl_reason.rl import ahead, memory


def calls(monkeypatch, library):
    monkeypatch.setattr(ctypes, "CDLL", lambda name: library)
    memory.keep_freed_blocks()


def test_freed_blocks_are_kept_unless_the_user_has_settings(monkeypatch):
    for name in ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES"):
        monkeypatch.delenv(name, raising=False)
    made = []
    library = types.SimpleNamespace(mallopt=lambda name, value: made.append((name, value)))
    calls(monkeypatch, library)
    assert made == [(-3, 128 * 2**20), (-1, 512 * 2**20)]  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD
    calls(monkeypatch, types.SimpleNamespace())  # another C library
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "0")
    calls(monkeypatch, library)
    assert len(made) == 2


def test_what_compiling_leaves_is_returned(monkeypatch):
    made = []
    monkeypatch.setattr(ctypes, "CDLL", lambda name: types.SimpleNamespace(malloc_trim=lambda n: made.append(n)))
    ahead._compile(lambda: types.SimpleNamespace(compile=lambda: made.append("compiled")))
    assert made == ["compiled", 0]  # malloc_trim(0) keeps nothing
    monkeypatch.setattr(ctypes, "CDLL", lambda name: types.SimpleNamespace())  # another C library
    memory.release_freed_blocks()

import contextlib
import json
import logging
import os
import pathlib
import subprocess
import sys
import zlib

import jax
import pytest

from helpers.tiny_runs import tiny, write_recipe, write_rows
from jaxrl_reason import runs, train
from jaxrl_reason.runs import compilation_cache as cache

SETTINGS = (
    "jax_compilation_cache_dir",
    "jax_persistent_cache_min_compile_time_secs",
    "jax_persistent_cache_min_entry_size_bytes",
)


@pytest.fixture
def user(tmp_path, monkeypatch):
    """Imitates a user without settings of JAX and with a cache below tmp_path. Restores JAX's settings afterwards."""
    before = {name: getattr(jax.config, name) for name in SETTINGS}
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    jax.config.update("jax_compilation_cache_dir", None)
    monkeypatch.setattr(cache, "_ours", None)
    yield tmp_path / "cache" / "jaxrl_reason" / "xla"
    for name, value in before.items():
        jax.config.update(name, value)
    cache.compilation_cache.reset_cache()


def enabled(name):
    """Enables the cache and returns the directory that JAX uses, or ""."""
    cache.enable(name)
    assert cache.directory() == (jax.config.jax_compilation_cache_dir or "")
    return cache.directory()


def test_the_default_is_in_the_cache_of_the_user(user, monkeypatch):
    assert enabled("auto") == str(user)
    assert user.stat().st_mode & 0o777 == 0o700
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache.default_directory() == pathlib.Path.home() / ".cache" / "jaxrl_reason" / "xla"


def test_runs_of_one_process_may_have_different_directories_or_none(user, tmp_path):
    assert enabled("auto") == str(user)
    assert enabled(str(tmp_path / "mine")) == str(tmp_path / "mine")
    assert enabled("") == ""
    assert enabled("auto") == str(user)


def test_an_address_becomes_no_folder(user, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert enabled("gs://bucket/cache") == "" and not list(tmp_path.iterdir())


def test_settings_of_jax_come_first(user, tmp_path, monkeypatch):
    theirs = str(tmp_path / "theirs")
    jax.config.update("jax_compilation_cache_dir", theirs)
    for name in ("auto", str(tmp_path / "mine"), ""):
        assert enabled(name) == theirs
    jax.config.update("jax_compilation_cache_dir", None)
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "")  # JAX reads this variable when it is imported
    assert enabled("auto") == ""
    assert not user.exists()


def test_a_cache_that_is_switched_off_is_none(user):
    cache.enable("auto")
    jax.config.update("jax_enable_compilation_cache", False)
    try:
        assert cache.directory() == ""
    finally:
        jax.config.update("jax_enable_compilation_cache", True)


def test_a_directory_that_cannot_be_used_costs_a_warning(user, tmp_path, caplog):
    file = tmp_path / "file"
    file.write_text("")
    for name in (file, file / "below", "/proc/nowhere"):
        with caplog.at_level(logging.WARNING):
            assert enabled(str(name)) == ""
        assert f"Compiled programs cannot be kept in {name} (" in caplog.messages[-1]


def write_entry(directory, name, size, used):
    path = directory / f"{name}-cache"
    content = zlib.compress(os.urandom(size), 0)
    path.write_bytes(content)
    os.utime(path, (used, used))
    return len(content)


def test_the_entries_that_were_not_used_for_longest_make_room(tmp_path):
    sizes = {name: write_entry(tmp_path, name, 1000, used) for name, used in dict(a=30, b=10, c=20, d=40).items()}
    (tmp_path / "autotuning").write_bytes(bytes(9000))  # a foreign file is neither counted nor removed
    names = lambda: sorted(path.name for path in tmp_path.iterdir())
    cache.clean(tmp_path, sum(sizes.values()))
    assert names() == ["a-cache", "autotuning", "b-cache", "c-cache", "checked", "d-cache"]
    cache.clean(tmp_path, sum(sizes.values()) - 1)
    assert names() == ["a-cache", "autotuning", "c-cache", "checked", "d-cache"]
    os.utime(tmp_path / "c-cache", (50, 20))  # it was read long after it was written
    cache.clean(tmp_path, 2 * sizes["c"])
    assert names() == ["autotuning", "c-cache", "checked", "d-cache"]
    cache.clean(tmp_path, 0)
    assert names() == ["autotuning", "checked"]


@pytest.mark.parametrize("torn", [b"", b"no entry", zlib.compress(os.urandom(99))[:-1], b"\x28\xb5\x2f\xfd torn"])
def test_an_entry_that_a_kill_has_torn_is_removed(torn, tmp_path):
    write_entry(tmp_path, "whole", 100, 10)
    (tmp_path / "torn-cache").write_bytes(torn)
    cache.clean(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checked", "whole-cache"]


def test_only_entries_since_the_last_check_are_read(tmp_path, monkeypatch):
    write_entry(tmp_path, "old", 100, 10)
    cache.clean(tmp_path)
    read = []
    monkeypatch.setattr(cache, "_is_whole", lambda content: read.append(content) or True)
    cache.clean(tmp_path)
    (tmp_path / "new-cache").write_bytes(b"new")
    cache.clean(tmp_path)
    assert read == [b"new"]


@contextlib.contextmanager
def counting():
    """Counts the programs that were compiled (misses), and the programs that were found (hits)."""
    counts = {"hits": 0, "misses": 0}
    name = "/jax/compilation_cache/cache_"

    def listen(event, **_):
        if event.startswith(name):
            counts[event.removeprefix(name)] += 1

    jax.monitoring.register_event_listener(listen)
    try:
        yield counts
    finally:
        jax.monitoring.unregister_event_listener(listen)


def trained(config, directory):
    """Trains with no program in memory, as in a new process. Returns the metrics without timings, and the counts."""
    jax.clear_caches()
    cache.compilation_cache.reset_cache()
    with counting() as counts:
        train.train(train.setup(config, directory))
    lines = runs.read_metrics(directory / "metrics.jsonl")
    return [{k: v for k, v in line.items() if not k.startswith(("perf/", "time"))} for line in lines], counts


@pytest.mark.runs
def test_a_second_start_compiles_nothing_with_any_seed_and_gives_the_same_numbers(user, tmp_path, capsys):
    rows = write_rows(tmp_path / "rows.jsonl")
    more = dict(supervised__steps=3, eval__every=1, update__minibatches=2)
    config = lambda **changes: tiny(rows, **more, **changes)
    without, counts = trained(config(compilation_cache=""), tmp_path / "without")
    assert counts == {"hits": 0, "misses": 0} and not user.exists()
    assert "Compiled programs" not in capsys.readouterr().out
    first, counts = trained(config(), tmp_path / "first")
    assert counts["misses"] == len([*user.glob("*-cache")]) > 10 and first == without
    assert f"Compiled programs are kept in {user}." in capsys.readouterr().out
    second, counts = trained(config(), tmp_path / "second")
    assert counts["misses"] == 0 < counts["hits"] and second == without
    other, counts = trained(config(seed=5), tmp_path / "other")
    assert counts["misses"] == 0 < counts["hits"] and other != without

    for i, entry in enumerate(sorted(user.glob("*-cache"))):  # the entries are damaged while no run is active
        entry.write_bytes([b"", entry.read_bytes()[:-9], b"no entry"][i % 3])
    os.utime(user / "checked")
    with pytest.warns(UserWarning, match="Error reading persistent compilation cache"):
        damaged, _ = trained(config(), tmp_path / "damaged")
    assert damaged == without
    for entry in user.glob("*-cache"):
        os.utime(entry)  # the entries look new
    repaired, counts = trained(config(), tmp_path / "repaired")
    assert repaired == without and counts["misses"] > 10
    assert trained(config(), tmp_path / "last")[1]["misses"] == 0


@pytest.mark.processes
def test_processes_that_begin_at_the_same_time_share_a_directory(tmp_path):
    recipe = write_recipe(tmp_path / "recipe.py", tiny(write_rows(tmp_path / "rows.jsonl")))
    env = {name: value for name, value in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"}
    env |= {"XDG_CACHE_HOME": str(tmp_path / "cache"), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "jaxrl_reason.train", f"--config={recipe}"]
    start = lambda name: subprocess.Popen([*command, f"--workdir={tmp_path / name}"], env=env, stderr=subprocess.PIPE)
    for process in [start(name) for name in "abc"]:
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors.decode()
    read = lambda name: [json.loads(line)["reward"] for line in open(tmp_path / name / "metrics.jsonl")]
    assert read("a") == read("b") == read("c")
    entries = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*-cache")}
    _, errors = start("d").communicate(timeout=300)
    assert read("d") == read("a") and b"cache" not in errors
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*-cache")} == entries

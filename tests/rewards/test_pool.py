"""Tests the pool with real processes and real kills. The workers run the functions of pool_functions.py."""

import _thread
import functools
import math
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time

from pool_functions import act, die, refuse, size
import pytest

from jaxrl_reason.rewards.output import Output
from jaxrl_reason.rewards.pool import Pool, Results

pytestmark = pytest.mark.processes

LIMIT_S = 1.0


def alive(pid):
    """Returns whether a process still runs; a zombie does not."""
    try:
        return pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def wait_until_gone(*pids, seconds=5):
    """Returns whether all processes end within some seconds."""
    deadline = time.monotonic() + seconds
    while any(map(alive, pids)) and time.monotonic() < deadline:
        time.sleep(0.01)
    return not any(map(alive, pids))


def children():
    """Returns the number of child processes."""
    me = str(os.getpid())
    stats = [path.read_text().rpartition(")")[2].split() for path in pathlib.Path("/proc").glob("[0-9]*/stat")]
    return sum(stat[1] == me for stat in stats)


@pytest.fixture(scope="module")
def pool():
    with Pool(act, workers=2, timeout_s=LIMIT_S, memory_mb=512) as pool:
        yield pool


def test_values_keep_their_order(pool):
    items = [0.1 * i if i % 5 else None for i in range(500)]
    results = pool.map(items)
    assert results == items and isinstance(results, list)
    assert results.outcomes == ["ok" if i % 5 else "none" for i in range(500)]
    assert results.error == ""
    assert pool.map([True, 3, -0.0]) == [1.0, 3.0, 0.0] and pool.map([]) == []
    assert pool.map(["text", "list"]) == ["\ud800 no number", [1.0, None, ["ok"]]]


@pytest.mark.parametrize(
    "item, words",
    [
        ("raise", "VerifierTimeout: what it said"),
        ("unspeakable", "Unspeakable"),
        ("system_exit", "SystemExit: 3"),
        ("interrupt", "KeyboardInterrupt: "),
        ("recursion", "RecursionError: maximum recursion depth exceeded"),
        ("memory", "MemoryError: "),
        ("object", "TypeError: float() argument must be a string or a real number, not 'dict'"),
        ("inside", "ValueError: Out of range float values are not JSON compliant"),
        ("endless", "ValueError: the function returned 16777"),
        ("nan", "ValueError: the function returned nan, which is not a finite number"),
        ("exit", "its process exited with 7"),
        ("segfault", "its process was ended by SIGSEGV"),
        ("kill", "its process was ended by SIGKILL"),
    ],
)
def test_an_item_that_fails_costs_no_other(pool, item, words):
    results = pool.map([1.0, 2.0, item, 3.0, None])
    assert results == [1.0, 2.0, None, 3.0, None]
    assert results.outcomes == ["ok", "ok", "error", "ok", "none"]
    assert results.error.startswith(words)


@pytest.mark.parametrize("item", ["hang", "loop"])
def test_an_item_that_does_not_return_is_killed_at_its_limit(pool, item):
    pool.map([1.0, 2.0])
    begin = time.monotonic()
    results = pool.map([1.0, item, *range(50)])
    took = time.monotonic() - begin
    assert results == [1.0, None, *range(50)]
    assert results.outcomes == ["ok", "timeout"] + ["ok"] * 50
    assert results.error == "no result within 1 s"
    assert LIMIT_S <= took < LIMIT_S + 10  # without a limit, "hang" would never end


def test_a_worker_that_stops_reading_does_not_block_the_pool():
    with Pool(act, workers=1, timeout_s=LIMIT_S) as pool:
        assert pool.map(["stopped"]) == [1.0]
        time.sleep(0.5)
        begin = time.monotonic()
        results = pool.map([1.0, "2" * 2_000_000, 3.0])  # larger than the buffer of the connection
        assert results[2] == 3.0 and "timeout" in results.outcomes and time.monotonic() - begin < 10 * LIMIT_S


FORGED = [
    "5",
    "null",
    "[]",
    '["ready", 1, ""]',
    '["ok", 1]',
    '["ok", NaN, ""]',
    '["ok", 1, 2]',
    "[" * 50_000,
    '[["ok"], 1, ""]',
]


@pytest.mark.parametrize(
    "item, outcome",
    [
        ("half", "timeout"),
        ("trickle", "timeout"),
        ("twice", "error"),
        *((f"forged {text}", "error") for text in FORGED),
    ],
    ids=lambda x: x[:24],
)
def test_an_item_that_writes_into_the_reports_costs_no_other(item, outcome):
    with Pool(act, workers=1, timeout_s=LIMIT_S) as pool:
        begin = time.monotonic()
        results = pool.map([1.0, item, 3.0])
        assert results == [1.0, None, 3.0] and results.outcomes[1] == outcome
        assert time.monotonic() - begin < LIMIT_S + 5


def test_output_to_stderr_is_limited(capfd):
    with Pool(act, workers=1) as pool:
        assert pool.map(["chatter"] * 3) == [1.0] * 3
    printed = capfd.readouterr().err
    assert 10_000 <= len(printed) < 11_000 and printed.endswith("[further output of this worker process is dropped]\n")


def test_all_kinds_of_failures_in_one_batch(pool):
    items = ["hang", 1.0, "exit", 2.0, "segfault", None, "raise", 3.0, "kill", "loop", 4.0, "nan", 5.0]
    results = pool.map(items)
    assert results == [item if isinstance(item, float) else None for item in items]
    special = {None: "none", "hang": "timeout", "loop": "timeout"}
    assert results.outcomes == ["ok" if isinstance(i, float) else special.get(i, "error") for i in items]


def test_the_time_limit_applies_to_one_item():
    with Pool(act, workers=1, timeout_s=0.5) as pool:
        results = pool.map(["sleep 0.3"] * 3)
        assert results.outcomes == ["ok"] * 3
        assert pool.map(["sleep 0.3", "sleep 0.8", "sleep 0.3"]).outcomes == ["ok", "timeout", "ok"]


def test_the_memory_limit_applies_to_the_growth_of_one_item():
    with Pool(size, workers=1, memory_mb=64) as pool:
        results = pool.map([bytes(2**20), bytes(2**27), bytes(2**20)])
        assert results == [2**20, None, 2**20] and results.outcomes[1] == "error"


def test_items_of_any_text(pool):
    with Pool(size) as sizes:
        items = ["\0", "\ud800", "9" * 5_000_000, "", "\U0001f600" * 1000]
        assert sizes.map(items) == [1, 1, 5_000_000, 0, 1000]


def test_killing_a_worker_kills_its_children(pool, tmp_path):
    results = pool.map([f"grandchild {tmp_path / 'pid'}"])
    assert results.outcomes == ["timeout"]
    pid = int((tmp_path / "pid").read_text())
    gone = wait_until_gone(pid, seconds=2)
    if not gone:
        os.kill(pid, signal.SIGKILL)
    assert gone


def test_workers_start_with_the_first_batch_and_at_most_one_per_item():
    before = children()
    pool = Pool(act, workers=4)
    assert children() == before
    pool.map([1.0])
    assert children() == before + 1
    pool.map([1.0, 2.0, 3.0])
    assert children() == before + 3
    pool.close()
    assert children() == before


def test_a_worker_is_replaced_after_max_tasks():
    with Pool(act, workers=1, max_tasks=2) as pool:
        first, second, third, fourth, fifth = pool.map(["pid"] * 5)
        assert first == second and third == fourth and len({first, third, fifth}) == 3
        assert pool.map(["pid"]) == [fifth]  # across batches
        assert pool.map(["pid"]) != [fifth]
    with Pool(act, workers=1) as pool:
        assert len(set(pool.map(["pid"] * 5))) == 1


def test_workers_have_no_jax(pool):
    assert "jax" in sys.modules  # in this process
    assert pool.map(["jax"]) == [0.0]


def test_output_to_stdout_is_dropped(capfd):
    with Pool(act) as pool:  # started here, so that workers inherit the captured streams
        assert pool.map(["print"]) == [2.0]
    assert capfd.readouterr() == ("", "")


def test_the_file_of_the_output_stays_small_and_holds_the_newest_lines(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr("jaxrl_reason.rewards.output.MAX_BYTES", 200_000)
    output = Output(tmp_path / "log")
    with Pool(act, workers=2, output=output) as pool, Pool(act, workers=1, output=output) as other:
        assert pool.map(["chatter"] * 2 + ["print"]) == [1.0, 1.0, 2.0]
        assert other.map(["unended"]) == [1.0]
    del output, pool, other
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["log", "log.1"]
    assert all(0 < path.stat().st_size <= 200_000 for path in tmp_path.iterdir())
    assert (tmp_path / "log").read_text().endswith("x" * 10_000 + "\n")
    assert capfd.readouterr() == ("", "")


def test_a_full_disk_costs_output_only(capfd):
    output = Output("/dev/full")
    with Pool(act, workers=1, output=output) as pool:
        assert pool.map(["print", "chatter", 3.0]) == [2.0, 1.0, 3.0]
    del output, pool
    assert capfd.readouterr() == ("", "")


def test_a_pool_that_restarts_has_new_workers():
    with Pool(act, workers=1) as pool:
        (first,) = pool.map(["pid"])
        pool.restart()
        assert wait_until_gone(int(first))
        (second,) = pool.map(["pid"])
        assert first != second


def test_more_time_is_for_one_batch():
    with Pool(act, workers=1, timeout_s=0.3) as pool:
        assert pool.map(["sleep 0.8"], more_s=5.0) == [1.0]
        results = pool.map(["sleep 0.8"])
        assert results.outcomes == ["timeout"] and results.error == "no result within 0.3 s"


@pytest.mark.parametrize("victims", [[0], [1], [0, 1]])
def test_an_idle_worker_that_died_costs_no_item(victims):
    with Pool(act, workers=2) as pool:
        pool.map(["sleep 0.2"] * 2)  # long enough for both workers to start
        pids = [pool._workers[victim].process.pid for victim in victims]
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        assert wait_until_gone(*pids)
        assert pool.map([1.0]) == [1.0]
        results = pool.map(["pid", "pid", 1.0])
        assert results.outcomes == ["ok"] * 3 and not set(pids) & set(results)


def test_workers_ignore_sigterm():
    with Pool(act, workers=1) as pool:
        (pid,) = pool.map(["pid"])
        os.kill(int(pid), signal.SIGTERM)
        assert pool.map(["pid", 1.0]) == [pid, 1.0]


def test_workers_ignore_ctrl_c():
    with Pool(act, workers=1) as pool:
        (pid,) = pool.map(["pid"])
        os.kill(int(pid), signal.SIGINT)
        assert pool.map(["pid"]) == [pid]
        assert os.getpgid(int(pid)) != os.getpgid(0)


def test_after_an_interrupt_the_next_batch_gets_its_own_values(pool):
    # A shell that starts the tests in the background makes them ignore interrupts.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    timer = threading.Timer(0.3, _thread.interrupt_main)
    timer.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            pool.map(["sleep 0.6", "sleep 0.6", 7.0])
    finally:
        signal.signal(signal.SIGINT, before)
    assert pool.map([8.0]) == [8.0]


def test_several_threads_can_call_one_pool(pool):
    results = {}

    def work(name):
        results[name] = pool.map([name + i / 8 for i in range(100)] + ["exit"])

    threads = [threading.Thread(target=work, args=[name]) for name in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {name: [name + i / 8 for i in range(100)] + [None] for name in range(4)}


PARENT = """
import os, sys, threading, time
sys.path.insert(0, {tests!r})
import pool_functions
from jaxrl_reason.rewards.pool import Pool
pools = [Pool(pool_functions.act, workers=1, timeout_s=1000) for _ in range(5)]
pids = [int(pool.map(["pid"])[0]) for pool in pools]
for pool, item in zip(pools, ["hang", "loop", "grandchild " + {child!r}, "stop"]):  # the last pool stays idle
    threading.Thread(target=pool.map, args=[[item]], daemon=True).start()
while not os.path.exists({child!r}) or not open({child!r}).read():
    time.sleep(0.01)
time.sleep(0.3)
print(*pids, open({child!r}).read(), flush=True)
{ending}
"""


@pytest.mark.parametrize("ending", ["time.sleep(1000)", "sys.exit(0)"])
def test_workers_and_their_children_end_with_the_parent(ending, tmp_path):
    script = PARENT.format(tests=os.path.dirname(__file__), ending=ending, child=str(tmp_path / "pid"))
    parent = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    pids = [int(pid) for pid in parent.stdout.readline().split()]
    assert len(pids) == 6
    if "sleep" in ending:
        assert all(map(alive, pids))
        parent.kill()
    parent.wait(10)
    gone = wait_until_gone(*pids)
    for pid in filter(alive, pids):
        os.kill(pid, signal.SIGKILL)
    assert gone


def test_a_collected_pool_ends_its_workers():
    pool = Pool(act, workers=1)
    (pid,) = pool.map(["pid"])
    assert alive(int(pid))
    del pool
    assert wait_until_gone(int(pid))


def test_a_closed_pool_stays_closed():
    with Pool(act) as pool:
        pids = pool.map(["pid", "pid"])
    assert wait_until_gone(*map(int, pids))
    pool.close()
    with pytest.raises(ValueError, match="This pool is closed; make a new one"):
        pool.map([1.0])


def test_a_failed_start_is_retried_twice(tmp_path):
    for lost in (2, 3):
        countdown = tmp_path / str(lost)
        countdown.write_text(str(lost))
        with Pool(act, workers=1, initializer=functools.partial(die, str(countdown))) as pool:
            if lost == 2:
                assert pool.map([1.0]) == [1.0]
            else:
                with pytest.raises(RuntimeError, match="could not start: its process was ended by SIGKILL"):
                    pool.map([1.0])


def test_workers_that_cannot_start_raise_and_are_not_retried(tmp_path, monkeypatch):
    pool = Pool(act, initializer=refuse)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="could not start: OSError: no such verifier."):
            pool.map([1.0])
        refused_at = time.monotonic()
    with pytest.raises(RuntimeError, match="no such verifier"):
        pool.map([1.0])
    assert time.monotonic() - refused_at < 0.02
    pool.close()

    with Pool(act, initializer=functools.partial(act, "exit")) as pool:
        with pytest.raises(RuntimeError, match="could not start: its process exited with 7"):
            pool.map([1.0])

    (tmp_path / "fleeting.py").write_text("def judge(item):\n    return 1.0\n")
    monkeypatch.syspath_prepend(tmp_path)
    import fleeting

    with Pool(fleeting.judge) as pool:
        assert pool.map([0.0]) == [1.0]
    (tmp_path / "fleeting.py").unlink()
    with Pool(fleeting.judge) as pool:
        with pytest.raises(RuntimeError, match="could not start: ModuleNotFoundError: No module named 'fleeting'"):
            pool.map([0.0])


def test_functions_and_items_that_cannot_be_sent_raise(pool, monkeypatch):
    def local(item):
        return 1.0

    for function in (lambda item: 1.0, local, functools.partial(local)):
        with pytest.raises(
            TypeError, match="The function cannot be sent .*define functions at the top level of a module"
        ):
            Pool(function)
    with pytest.raises(TypeError, match="The function cannot be sent"):
        Pool(act, initializer=lambda: None)
    with pytest.raises(TypeError, match="Item 1 cannot be sent .*make items of plain values"):
        pool.map([1.0, lambda: None])
    assert pool.map([1.0]) == [1.0]

    monkeypatch.setattr(size, "__module__", "__main__")
    for function in (size, functools.partial(size)):
        with pytest.raises(TypeError, match="size.* is defined in the main script.* move it to a module"):
            Pool(function)


def test_a_partial_works():
    with Pool(functools.partial(max, 3.0), workers=1) as pool:
        assert pool.map([1.0, 5.0]) == [3.0, 5.0]


@pytest.mark.parametrize(
    "argument, message",
    [
        (dict(workers=0), "workers is 0; a pool needs at least 1"),
        (dict(memory_mb=0), "memory_mb is 0; a pool needs at least 1"),
        (dict(max_tasks=-1), "max_tasks is -1; a pool needs at least 1"),
        (dict(max_tasks=0), "max_tasks is 0; a pool needs at least 1"),
        (dict(timeout_s=0), "timeout_s is 0; give a finite number of seconds"),
        (dict(timeout_s=math.inf), "timeout_s is inf; give a finite number of seconds"),
        (dict(timeout_s=math.nan), "timeout_s is nan; give a finite number of seconds"),
    ],
)
def test_numbers_out_of_range_raise(argument, message):
    with pytest.raises(ValueError, match=message):
        Pool(act, **argument)


def test_results_are_a_list():
    results = Results([1.0, None], ["ok", "timeout"], "no result within 2 s")
    assert results == [1.0, None] and results.outcomes == ["ok", "timeout"] and results.error == "no result within 2 s"

"""Real processes and real kills. What the workers run stands in pool_functions.py."""

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

import numpy as np
from pool_functions import act, die, refuse, size
import pytest

from jaxrl_reason.rewards import HostReward, RewardError, score
from jaxrl_reason.rewards.pool import Pool, Results

LIMIT_S = 1.0


def alive(pid):
    """Whether a process still runs; one that is dead but not yet waited for does not."""
    try:
        return pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def wait_until_gone(*pids, seconds=5):
    deadline = time.monotonic() + seconds
    while any(map(alive, pids)) and time.monotonic() < deadline:
        time.sleep(0.01)
    return not any(map(alive, pids))


def children():
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
    assert LIMIT_S <= took < LIMIT_S + 10  # the answer to the first would take longer than anyone can wait


def test_a_worker_that_stops_reading_holds_up_nobody():
    with Pool(act, workers=1, timeout_s=LIMIT_S) as pool:
        assert pool.map(["stopped"]) == [1.0]
        time.sleep(0.5)
        begin = time.monotonic()
        results = pool.map([1.0, "2" * 2_000_000, 3.0])  # more than the connection takes unread
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
def test_what_an_item_writes_into_the_reports_is_its_own_loss(item, outcome):
    with Pool(act, workers=1, timeout_s=LIMIT_S) as pool:
        begin = time.monotonic()
        results = pool.map([1.0, item, 3.0])
        assert results == [1.0, None, 3.0] and results.outcomes[1] == outcome
        assert time.monotonic() - begin < LIMIT_S + 5


def test_what_items_print_to_stderr_has_an_end(capfd):
    with Pool(act, workers=1) as pool:
        assert pool.map(["chatter"] * 3) == [1.0] * 3
    printed = capfd.readouterr().err
    assert 10_000 <= len(printed) < 11_000 and printed.endswith("[a worker process has said enough]\n")


def test_all_kinds_at_once(pool):
    items = ["hang", 1.0, "exit", 2.0, "segfault", None, "raise", 3.0, "kill", "loop", 4.0, "nan", 5.0]
    results = pool.map(items)
    assert results == [item if isinstance(item, float) else None for item in items]
    special = {None: "none", "hang": "timeout", "loop": "timeout"}
    assert results.outcomes == ["ok" if isinstance(i, float) else special.get(i, "error") for i in items]


def test_the_limit_is_that_of_one_item():
    with Pool(act, workers=1, timeout_s=0.5) as pool:
        results = pool.map(["sleep 0.3"] * 3)
        assert results.outcomes == ["ok"] * 3
        assert pool.map(["sleep 0.3", "sleep 0.8", "sleep 0.3"]).outcomes == ["ok", "timeout", "ok"]


def test_the_memory_limit_is_what_an_item_may_add():
    with Pool(size, workers=1, memory_mb=64) as pool:
        results = pool.map([bytes(2**20), bytes(2**27), bytes(2**20)])
        assert results == [2**20, None, 2**20] and results.outcomes[1] == "error"


def test_items_of_any_text(pool):
    with Pool(size) as sizes:
        items = ["\0", "\ud800", "9" * 5_000_000, "", "\U0001f600" * 1000]
        assert sizes.map(items) == [1, 1, 5_000_000, 0, 1000]


def test_a_killed_worker_takes_what_it_started_along(pool, tmp_path):
    results = pool.map([f"grandchild {tmp_path / 'pid'}"])
    assert results.outcomes == ["timeout"]
    pid = int((tmp_path / "pid").read_text())
    gone = wait_until_gone(pid, seconds=2)
    if not gone:
        os.kill(pid, signal.SIGKILL)
    assert gone


def test_workers_start_late_and_no_more_than_there_are_items():
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
    assert "jax" in sys.modules  # here, with the package of the pool
    assert pool.map(["jax"]) == [0.0]


def test_prints_go_nowhere(capfd):
    with Pool(act) as pool:  # started here, with the outputs that the test sees
        assert pool.map(["print"]) == [2.0]
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("victims", [[0], [1], [0, 1]])
def test_an_idle_worker_that_died_costs_no_item(victims):
    with Pool(act, workers=2) as pool:
        pool.map(["sleep 0.2"] * 2)  # long enough for both to start
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
    # A shell that starts tests in the background has them ignore interrupts.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    timer = threading.Timer(0.3, _thread.interrupt_main)
    timer.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            pool.map(["sleep 0.6", "sleep 0.6", 7.0])
    finally:
        signal.signal(signal.SIGINT, before)
    assert pool.map([8.0]) == [8.0]


def test_from_other_threads_and_from_several(pool):
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
for pool, item in zip(pools, ["hang", "loop", "grandchild " + {child!r}, "stop"]):  # the last one stays idle
    threading.Thread(target=pool.map, args=[[item]], daemon=True).start()
while not os.path.exists({child!r}) or not open({child!r}).read():
    time.sleep(0.01)
time.sleep(0.3)
print(*pids, open({child!r}).read(), flush=True)
{ending}
"""


@pytest.mark.parametrize("ending", ["time.sleep(1000)", "sys.exit(0)"])
def test_neither_workers_nor_what_they_started_outlive_their_parent(ending, tmp_path):
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


def test_a_pool_that_is_forgotten_ends_its_workers():
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


def test_a_start_that_is_lost_is_tried_again_and_not_for_ever(tmp_path):
    for lost in (2, 3):
        countdown = tmp_path / str(lost)
        countdown.write_text(str(lost))
        with Pool(act, workers=1, initializer=functools.partial(die, str(countdown))) as pool:
            if lost == 2:
                assert pool.map([1.0]) == [1.0]
            else:
                with pytest.raises(RuntimeError, match="could not start: its process was ended by SIGKILL"):
                    pool.map([1.0])


def test_workers_that_cannot_start_are_a_sentence_and_not_tried_again(tmp_path, monkeypatch):
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


def test_functions_and_items_that_cannot_be_sent_are_a_sentence(pool, monkeypatch):
    def local(item):
        return 1.0

    for function in (lambda item: 1.0, local, functools.partial(local)):
        with pytest.raises(TypeError, match="The function cannot be sent .*defined at the top level of a module"):
            Pool(function)
    with pytest.raises(TypeError, match="The function cannot be sent"):
        Pool(act, initializer=lambda: None)
    with pytest.raises(TypeError, match="Item 1 cannot be sent .*items be made of plain values"):
        pool.map([1.0, lambda: None])
    assert pool.map([1.0]) == [1.0]

    monkeypatch.setattr(size, "__module__", "__main__")
    for function in (size, functools.partial(size)):
        with pytest.raises(TypeError, match="size.* is defined in the script that is being run.* move it to a module"):
            Pool(function)


def test_a_partial_will_do():
    with Pool(functools.partial(max, 3.0), workers=1) as pool:
        assert pool.map([1.0, 5.0]) == [3.0, 5.0]


@pytest.mark.parametrize(
    "argument, message",
    [
        (dict(workers=0), "workers is 0; a pool needs at least 1"),
        (dict(memory_mb=0), "memory_mb is 0; a pool needs at least 1"),
        (dict(max_tasks=-1), "max_tasks is -1; a pool needs at least 1"),
        (dict(max_tasks=0), "max_tasks is 0; a pool needs at least 1"),
        (dict(timeout_s=0), "timeout_s is 0; give the seconds"),
        (dict(timeout_s=math.inf), "timeout_s is inf; give the seconds"),
        (dict(timeout_s=math.nan), "timeout_s is nan; give the seconds"),
    ],
)
def test_numbers_out_of_range_are_refused(argument, message):
    with pytest.raises(ValueError, match=message):
        Pool(act, **argument)


def test_results_are_a_list():
    results = Results([1.0, None], ["ok", "timeout"], "no result within 2 s")
    assert results == [1.0, None] and results.outcomes == ["ok", "timeout"] and results.error == "no result within 2 s"


# -- in the host's table -----------------------------------------------------------------------------------------------


def table_of(results, max_failure_share=1.0):
    reward = HostReward("mine", lambda completions, **_: results)
    return score([reward], ["a", "b"], [["x", "y", "z"]] * 2, [[[1]] * 3] * 2, {}, max_failure_share)


def test_outcomes_become_rates_and_count_as_failures():
    results = Results(
        [1.0, None, None, 0.0, None, None], ["ok", "none", "error", "ok", "timeout", "timeout"], "too long"
    )
    table = table_of(results, max_failure_share=0.5)
    np.testing.assert_array_equal(table.per_reward["mine"], [[1, np.nan, np.nan], [0, np.nan, np.nan]])
    assert table.failures() == {
        "rewards/mine/error_rate": pytest.approx(1 / 6),
        "rewards/mine/none_rate": pytest.approx(1 / 6),
        "rewards/mine/timeout_rate": pytest.approx(2 / 6),
    }
    with pytest.raises(RewardError, match="'mine' failed on 3 of the 6 rows tried, .*0.49 of 6 .*error is too long"):
        table_of(results, max_failure_share=0.49)
    assert table_of(Results([1.0] * 6, ["ok"] * 6)).failures()["rewards/mine/timeout_rate"] == 0
    assert table_of([1.0] * 6).failures()["rewards/mine/timeout_rate"] == 0


def test_outcomes_row_by_row():
    def picky(completions, completion_ids, **_):
        if [2] in completion_ids:
            raise ValueError("no twos")
        outcomes = ["timeout" if text == "slow" else "ok" for text in completions]
        return Results([None if outcome == "timeout" else 1.0 for outcome in outcomes], outcomes, "too slow")

    def run(share):
        ids, texts = [[[1], [2], [3], [4]]], [["x", "x", "slow", "x"]]
        return score([HostReward("picky", picky)], ["a"], texts, ids, {}, share)

    table = run(0.5)
    np.testing.assert_array_equal(table.per_reward["picky"], [[1, np.nan, np.nan, 1]])
    rates = {"rewards/picky/error_rate": 0.25, "rewards/picky/none_rate": 0, "rewards/picky/timeout_rate": 0.25}
    assert table.failures() == rates
    with pytest.raises(RewardError, match="'picky' failed on 2 of the 3 rows tried.*too slow"):
        run(0.25)


@pytest.mark.parametrize(
    "values, outcomes, message",
    [
        ([1.0] * 6, ["ok"] * 5, "outcome None for row 5, which has a reward"),
        ([1.0] * 6, ["ok"] * 7, "outcome 'ok' for row 6, which has no reward"),
        ([1.0] * 6, ["ok"] * 5 + ["timeout"], "outcome 'timeout' for row 5, which has a reward"),
        ([1.0] * 5 + [None], ["ok"] * 6, "outcome 'ok' for row 5, which has no reward"),
        ([None] * 6, ["none", "late"] * 3, "outcome 'late' for row 1, .* without one 'none', 'error' or 'timeout'"),
    ],
)
def test_outcomes_that_do_not_fit_the_rewards_are_a_sentence(values, outcomes, message):
    with pytest.raises(RewardError, match=f"'mine' reports the {message}"):
        table_of(Results(values, outcomes))

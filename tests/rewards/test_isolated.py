"""Tests reward functions in workers that raise, hang, exit or take memory. Only the rows at fault have no reward."""

import functools
import multiprocessing
import os
import pathlib
import threading
import time

import numpy as np
import pytest

from jaxrl_reason.rewards import compute_rewards, HostReward, load_reward, RewardError
from jaxrl_reason.rewards.isolated import Isolated, make_pool
from jaxrl_reason.rewards.output import Output
from jaxrl_reason.rewards.worker import words_of

pytestmark = pytest.mark.processes

LIMIT_S = 1.0
MINE = '''
import asyncio, multiprocessing, os, pathlib, signal, subprocess, sys, threading, time

def act(completions, **_):
    """Returns the number in each completion, or does to the process what the completion names."""
    return [ACTS[text]() if text in ACTS else float(text) for text in completions]

def stay():
    while True:
        try:
            time.sleep(1000)
        except BaseException:
            pass

def take():
    return len(bytearray(2**40))

ACTS = {
    "none": lambda: None,
    "raise": lambda: 1 / 0,
    "exit": lambda: os._exit(7),
    "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "leave": lambda: sys.exit(0),
    "memory": take,
    "compute": lambda: len(str(9**9**9**9)),  # in C, holding the interpreter's lock
    "stay": stay,
}

shortened = lambda completions, **_: [float(len(text)) for text in completions]

def calls(completions, completion_ids, prompts, row, **_):
    with open("calls.txt", "a") as file:
        file.write(f"{prompts[0]} {len(prompts)} {len(set(prompts))}\\n")
    return [float(ids[0] * 100 + r) for ids, r in zip(completion_ids, row)]

def pid(completions, **_):
    return [float(os.getpid())] * len(completions)

def forger(completions, **_):
    for text in completions:
        if not text.isdigit() or text == "7":
            os.write(int(sys.argv[1]), f'["ok", {text}, ""]\\n'.encode())
            time.sleep(1000)
    return [float(text) for text in completions]

def short(completions, **_):
    return [1.0] * (len(completions) - 1)

def infinite(completions, **_):
    return [["inf"] if text == "x" else 1.0 for text in completions]

async def wait(completions, **_):
    await asyncio.sleep(0.4)
    return [len(asyncio.all_tasks()) if text == "tasks" else os.getpid() if text == "pid" else float(text) for text in completions]

class Waits:
    async def __call__(self, completions, **_):
        return await wait(completions)

waits, waits_too = Waits(), Waits()

async def at_once(completions, **_):
    """Does what each completion names, while other calls run."""
    pathlib.Path(f"{completions[0]}.begun").write_text("")
    for text in completions:
        if text == "stuck":
            time.sleep(1000)
        elif text == "stubborn":
            while True:
                try:
                    await asyncio.sleep(1000)
                except BaseException:
                    pass
        elif text == "hang":
            await asyncio.sleep(1000)
    return [ACTS[text]() if text in ACTS else float(text) for text in completions]

async def blocking(completions, **_):
    time.sleep(0.3)
    return [float(text) for text in completions]

lock = asyncio.Lock()

async def locked(completions, **_):
    async with lock:  # belongs to the loop of its first call
        await asyncio.sleep(0.001)
    return [float(id(asyncio.get_running_loop()) % 1000)] * len(completions)

async def short_async(completions, **_):
    return [1.0] * (len(completions) - 1)

async def clearing(completions, completion_ids, **_):
    values = [float(ids[0]) for ids in completion_ids]
    completions.clear()
    return values

async def voted_async(completions, **_):
    return [1.0] * len(completions)

async def same(completion, row):
    return completion.lower()

voted_async.answer_of = same

def ended(completions, **_):
    """The seconds until processes of all kinds have ended that were asked to."""
    begin = time.monotonic()
    for context in map(multiprocessing.get_context, ("fork", "spawn")):
        process = context.Process(target=time.sleep, args=[1000])
        process.start()
        process.terminate()
        process.join()
        with context.Pool(2) as pool:
            assert pool.map(abs, [-1, -2]) == [1, 2]
    for ending in (subprocess.Popen.terminate, lambda process: process.send_signal(signal.SIGINT)):
        process = subprocess.Popen(["sleep", "1000"])
        ending(process)
        process.wait()
    pid = os.fork()
    if not pid:
        try:
            time.sleep(1000)
        finally:
            os._exit(5)
    time.sleep(0.1)
    os.kill(pid, signal.SIGINT)
    assert os.waitpid(pid, 0)[1] == 5 << 8  # by an exception, as Ctrl-C ends an ordinary Python process
    os.kill(os.getpid(), signal.SIGTERM)  # the worker itself stays
    return [time.monotonic() - begin] * len(completions)

def counted(completions, **_):
    with open("counted.txt", "a") as file:
        file.write("x\\n")
    raise ValueError("always")

def voted(completions, **_):
    return [1.0] * len(completions)

voted.answer_of = lambda completion, row: ACTS.get(completion, lambda: (completion, row["id"]))()
'''


@pytest.fixture(autouse=True)
def mine(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(MINE)
    monkeypatch.chdir(tmp_path)


def reward_of(name, share=1.0, workers=2, **limits):
    pool = make_pool([f"mine.py:{name}"], workers=workers, **dict(timeout_s=LIMIT_S, memory_mb=256) | limits)
    return HostReward("", Isolated(f"mine.py:{name}", load_reward(f"mine.py:{name}"), pool, share))


def table_of(reward, groups, share=1.0, **columns):
    """Returns the table of [P][G] texts. The ids of a text are its position."""
    ids = [[[p * len(group) + g] for g in range(len(group))] for p, group in enumerate(groups)]
    prompts = [f"p{p}" for p in range(len(groups))]
    return compute_rewards([reward], prompts, groups, ids, columns, share)


@pytest.mark.processes
@pytest.mark.parametrize("act", ["raise", "exit", "kill", "leave", "memory", "compute", "stay"])
def test_only_the_row_at_fault_goes_missing(act):
    begin = time.monotonic()
    table = table_of(reward_of("act"), [["1", "2", "3"], ["4", act, "none"], ["5", "6", "7"]])
    values = table.per_reward["act"]
    np.testing.assert_array_equal(values, [[1, 2, 3], [4, np.nan, np.nan], [5, 6, 7]])
    late = act in ("compute", "stay")
    rates = {"error_rate": 0 if late else 1 / 9, "none_rate": 1 / 9, "timeout_rate": 1 / 9 if late else 0}
    assert table.failures() == {f"rewards/act/{kind}": pytest.approx(rate) for kind, rate in rates.items()}
    assert time.monotonic() - begin < 2 * LIMIT_S + 10  # one call for the prompt and one for the row


def test_one_call_has_the_completions_of_one_prompt():
    groups = [["x"] * 3] * 20
    table = table_of(reward_of("calls"), groups, row=list(range(20)))
    expected = np.arange(60).reshape(20, 3) * 100 + np.arange(20)[:, None]
    np.testing.assert_array_equal(table.per_reward["calls"], expected)
    calls = sorted(pathlib.Path("calls.txt").read_text().split("\n")[:-1])
    assert calls == sorted(f"p{p} 3 1" for p in range(20))


def test_equal_prompts_are_separate_calls():
    reward, ids = reward_of("calls"), [[[1], [2]]] * 3
    table = compute_rewards([reward], ["p", "p", "q"], [["x", "y"]] * 3, ids, {"row": [0, 1, 2]})
    np.testing.assert_array_equal(table.per_reward["calls"], [[100, 200], [101, 201], [102, 202]])
    assert sorted(pathlib.Path("calls.txt").read_text().split("\n")[:-1]) == ["p 2 1", "p 2 1", "q 2 1"]


def test_functions_run_in_other_processes_that_stay():
    reward = reward_of("pid")
    first = set(table_of(reward, [["x"]] * 8).per_reward["pid"].flat)
    assert first and os.getpid() not in first
    assert set(table_of(reward, [["x"]] * 8).per_reward["pid"].flat) <= first


def test_a_lambda_in_a_file_works():
    np.testing.assert_array_equal(table_of(reward_of("shortened"), [["a", "bbb"]]).per_reward["<lambda>"], [[1, 3]])


def test_a_broken_contract_names_function_and_row():
    with pytest.raises(RewardError, match="'short' returned 1 rewards for 2 completions"):
        table_of(reward_of("short"), [["a", "b"]] * 3)
    with pytest.raises(RewardError, match=r"'infinite' returned \['inf'\] for row 5; return a finite float32"):
        table_of(reward_of("infinite"), [["a", "b"], ["a", "b"], ["a", "x"]])
    with pytest.raises(RewardError, match="'calls' cannot be called: missing a required argument: 'row'"):
        table_of(reward_of("calls"), [["a", "b"]])


def test_a_number_that_is_not_finite_costs_its_row():
    table = table_of(reward_of("act"), [["1", "nan"], ["inf", "2"]])
    np.testing.assert_array_equal(table.per_reward["act"], [[1, np.nan], [np.nan, 2]])
    assert table.error_rate["act"] == 0.5 and "'act' returned inf for row 2" in table.error["act"]


def test_a_raising_function_is_shown_with_file_and_line(tmp_path):
    line = 1 + next(i for i, line in enumerate(MINE.splitlines()) if '"raise"' in line)
    for name in ("act", "at_once"):
        table = table_of(reward_of(name), [["1", "raise"]])
        assert table.error[name] == f"ZeroDivisionError: division by zero ({tmp_path}/mine.py, line {line})"


def test_the_words_of_an_error_are_one_line_of_printable_ascii():
    error = ValueError("no \x1b[2J number\nin 'é\\d'\x07")
    error.add_note("(mine.py,\tline 3)")
    assert words_of(error) == "ValueError: no \\x1b[2J number\\nin '\\xe9\\d'\\x07 (mine.py,\\tline 3)"


def test_what_a_reward_starts_ends_when_it_is_asked_to():
    seconds = table_of(reward_of("ended", timeout_s=30), [["x"]]).per_reward["ended"]
    assert seconds < 10  # most seconds are for the start of Python in spawned processes


@pytest.mark.parametrize("name", ["wait", "waits"])
def test_async_calls_of_a_batch_run_at_the_same_time(name):
    reward = reward_of(name)
    table_of(reward, [["0"]])  # starts a worker
    begin = time.monotonic()
    values = table_of(reward, [["tasks", "pid", str(p)] for p in range(12)]).per_reward[reward.name]
    assert time.monotonic() - begin < 2  # calls one by one take 4.8 s
    np.testing.assert_array_equal(values[:, 2], range(12))
    assert values[0, 0] >= 12 and set(values[:, 1]) != {os.getpid()} and len(set(values[:, 1])) == 1


def test_several_async_rewards_run_at_the_same_time():
    rewards = [HostReward(name, reward_of(name).function) for name in ("wait", "waits", "waits_too")]
    call = lambda: compute_rewards(
        [*rewards, HostReward("act", reward_of("act").function)], ["p"], [["1"]], [[[1]]], {}
    )
    call()
    begin = time.monotonic()
    table = call()
    assert time.monotonic() - begin < 1.0  # calls one by one take 1.2 s
    assert list(table.per_reward) == ["wait", "waits", "waits_too", "act"] and all(
        x.item() == 1 for x in table.per_reward.values()
    )


@pytest.mark.parametrize("act", ["raise", "exit", "kill", "leave", "stuck", "stubborn", "hang", "nan"])
def test_only_the_row_at_fault_of_an_async_reward_goes_missing(act):
    begin = time.monotonic()
    table = table_of(reward_of("at_once"), [["1", "2", "3"], ["4", act, "none"], ["5", "6", "7"]])
    np.testing.assert_array_equal(table.per_reward["at_once"], [[1, 2, 3], [4, np.nan, np.nan], [5, 6, 7]])
    late = act in ("stuck", "stubborn", "hang")
    rates = {"error_rate": 0 if late else 1 / 9, "none_rate": 1 / 9, "timeout_rate": 1 / 9 if late else 0}
    assert table.failures() == {f"rewards/at_once/{kind}": pytest.approx(rate) for kind, rate in rates.items()}
    assert time.monotonic() - begin < 4 * LIMIT_S + 10  # all calls together, the call alone, and the row


def test_async_calls_that_block_each_other_are_made_again():
    table = table_of(reward_of("blocking"), [[str(p), "0"] for p in range(8)])  # 2.4 s one by one; the limit is 1 s
    np.testing.assert_array_equal(table.per_reward["blocking"], [[p, 0] for p in range(8)])


def test_an_async_reward_keeps_its_loop():
    reward = reward_of("locked")
    first, second = (table_of(reward, [["x"]] * 4).per_reward["locked"] for _ in range(2))
    assert len({*first.flat, *second.flat}) == 1


def test_async_contracts_arguments_and_answers():
    with pytest.raises(RewardError, match="'short_async' returned 1 rewards for 2 completions"):
        table_of(reward_of("short_async"), [["a", "b"]] * 3)
    values = table_of(reward_of("clearing"), [["a", "b"], ["c", "d"]]).per_reward["clearing"]
    np.testing.assert_array_equal(values, [[0, 1], [2, 3]])
    assert reward_of("voted_async").function.answers_of([["A", "a"]], [{}]) == [["a", "a"]]


def test_output_goes_to_a_file(tmp_path):
    (tmp_path / "mine.py").write_text("""
import os, subprocess, sys
def act(completions, **_):
    print("out", completions[0])
    print("err", file=sys.stderr)
    subprocess.run(["echo", "child"])
    print("without an end \u00fc", end="")
    return [1.0]
""")
    output = Output(tmp_path / "new" / "rewards.log")
    reward = reward_of("act", workers=1, output=output)
    table_of(reward, [["a"], ["b"]])
    expected = "".join(f"out {name}\nerr\nchild\nwithout an end ü" for name in "ab")
    del reward, output  # ends the workers, and then the file
    assert (tmp_path / "new" / "rewards.log").read_text() == expected


def test_a_broken_function_is_not_tried_on_every_row():
    """64 prompts of 4 completions get one call per prompt, and then calls for a sample of the 256 rows."""
    with pytest.raises(RewardError, match="'counted' failed on 256 of the 256 rows.*error is ValueError: always"):
        table_of(reward_of("counted", 0.5), [["x"] * 4] * 64, 0.5)
    assert pathlib.Path("counted.txt").read_text().count("x") == 64 + 16


def test_all_rows_are_tried_singly_if_the_share_allows_it():
    groups = [["1", "raise"]] * 20  # the call for each prompt fails, and each second row fails alone
    table = table_of(reward_of("act", 0.5), groups, 0.5)
    np.testing.assert_array_equal(table.per_reward["act"], [[1, np.nan]] * 20)


def test_a_file_that_a_worker_cannot_load_raises():
    reward = reward_of("act")
    pathlib.Path("mine.py").write_text("import nothing_like_this")
    with pytest.raises(
        RewardError, match="'act' cannot be called: A worker process .* could not start: .*nothing_like_this"
    ):
        table_of(reward, [["1"]])


def test_data_that_cannot_be_sent_raises():
    with pytest.raises(RewardError, match="'act' cannot be called: Item 0 cannot be sent to a worker process"):
        table_of(reward_of("act"), [["1"]], strange=[lambda: 0])


def test_answer_of_runs_in_the_workers():
    answers_of = reward_of("voted").function.answers_of
    texts = [["a", "none", "raise"], ["exit", "stay", "b"], ["a", "a", "c"]]
    answers = answers_of(texts, [{"id": 1}, {"id": 2}, {"id": 1}])
    assert answers == [["('a', 1)", None, None], [None, None, "('b', 2)"], ["('a', 1)", "('a', 1)", "('c', 1)"]]
    assert not hasattr(reward_of("act").function, "answers_of")


def in_a_spawned_process(queue):
    queue.put(table_of(reward_of("act"), [["1", "exit"]]).per_reward["act"].tolist())


def test_it_works_in_a_spawned_process():
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=in_a_spawned_process, args=[queue])
    process.start()
    ((one, missing),) = queue.get(timeout=60)
    process.join(60)
    assert one == 1 and np.isnan(missing) and process.exitcode == 0


def test_threads_get_their_own_values():
    reward = reward_of("act")
    tables = {}
    work = lambda i: tables.update({i: table_of(reward, [[str(i * 10 + g) for g in range(3)]] * 4).per_reward["act"]})
    threads = [threading.Thread(target=functools.partial(work, i)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i in range(6):
        np.testing.assert_array_equal(tables[i], [[i * 10 + g for g in range(3)]] * 4)


@pytest.mark.processes
@pytest.mark.parametrize("forged", ["[]", "[1]", '[[1.0], ["ok"], ""]', '[[1.0, 1.0], 7, ""]', "7"])
def test_a_forged_report_is_a_failure(forged):
    # There is one worker. The forger does not answer again, so it must get the row at fault and no other row.
    table = table_of(reward_of("forger", workers=1), [["1", "2"], [forged, "2"]])
    np.testing.assert_array_equal(table.per_reward["forger"], [[1, 2], [np.nan, 2]])
    assert table.error_rate["forger"] + table.timeout_rate["forger"] == 0.25

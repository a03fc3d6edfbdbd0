"""Tests host rewards: rows and columns, missing rewards, failures, broken contracts, and the search for functions."""

import asyncio
from decimal import Decimal
import functools
import logging
import math
import pickle
import re
import sys
from types import ModuleType

from hypothesis import given, settings
from hypothesis import strategies as st
import numpy as np
import pytest

from jaxrl_reason.rewards import accuracy_reward, compute_rewards, format_reward, HostReward, load_reward, RewardError
from jaxrl_reason.rewards.loading import distinct_names
from jaxrl_reason.rewards.pool import Results

PROMPTS = ["one?", "two?"]
COMPLETIONS = [["#### 1", "#### 2", "1"], ["#### 2", "two", "#### 1"]]
IDS = [[[1], [1, 2], [1, 2, 3]], [[4], [4, 5], [4, 5, 6]]]
COLUMNS = {"answer": ["1", "2"], "id": [10, 20]}


def run(*rewards, **overrides):
    arguments = dict(prompts=PROMPTS, completions=COMPLETIONS, completion_ids=IDS, columns=COLUMNS) | overrides
    return compute_rewards(rewards, **arguments)


def constant(value):
    return lambda completions, **_: [value] * len(completions)


def test_accuracy_and_format():
    table = run(HostReward("accuracy", accuracy_reward), HostReward("format", format_reward))
    np.testing.assert_array_equal(table.per_reward["accuracy"], [[1, 0, 0], [1, 0, 0]])
    np.testing.assert_array_equal(table.per_reward["format"], [[1, 1, 0], [1, 0, 1]])
    assert table.per_reward["accuracy"].dtype == table.per_reward["format"].dtype == np.float32
    assert table.failures() == {
        "rewards/accuracy/error_rate": 0,
        "rewards/accuracy/none_rate": 0,
        "rewards/accuracy/timeout_rate": 0,
        "rewards/format/error_rate": 0,
        "rewards/format/none_rate": 0,
        "rewards/format/timeout_rate": 0,
    }


def test_rows_are_prompt_major_and_columns_repeat():
    seen = {}

    def spy(prompts, completions, completion_ids, **columns):
        seen.update(prompts=prompts, completions=completions, completion_ids=completion_ids, **columns)
        return [10 * i + len(ids) for i, ids in zip(columns["id"], completion_ids)]

    table = run(HostReward("spy", spy))
    assert seen["prompts"] == ["one?"] * 3 + ["two?"] * 3
    assert seen["completions"] == COMPLETIONS[0] + COMPLETIONS[1]
    assert seen["completion_ids"] == IDS[0] + IDS[1]
    assert seen["id"] == [10, 10, 10, 20, 20, 20] and seen["answer"] == ["1"] * 3 + ["2"] * 3
    np.testing.assert_array_equal(table.per_reward["spy"], [[101, 102, 103], [201, 202, 203]])


@settings(max_examples=50)
@given(st.integers(1, 5), st.integers(1, 5), st.data())
def test_every_value_keeps_its_row_and_none_is_nan(prompts, groups, data):
    rows = prompts * groups
    value = st.none() | st.floats(-10, 10, width=32)
    values = data.draw(st.lists(st.lists(value, min_size=rows, max_size=rows), min_size=1, max_size=3))
    rewards = [HostReward(str(i), lambda completions, v=v, **_: v) for i, v in enumerate(values)]
    table = compute_rewards(rewards, ["p"] * prompts, [["c"] * groups] * prompts, [[[1]] * groups] * prompts, {})
    assert list(table.per_reward) == [reward.name for reward in rewards]
    for i, v in enumerate(values):
        expected = np.reshape([math.nan if x is None else x for x in v], (prompts, groups))
        np.testing.assert_array_equal(table.per_reward[str(i)], expected)
        assert table.failures()[f"rewards/{i}/none_rate"] == pytest.approx(v.count(None) / rows)
        assert table.failures()[f"rewards/{i}/error_rate"] == 0


def test_none_is_missing_and_zero_is_a_reward():
    nones = HostReward("nones", lambda completions, **_: [None, 0.0, None, 0.0, 1.0, None])
    table = run(nones, HostReward("two", constant(2.0)), HostReward("nothing", constant(None)))
    np.testing.assert_array_equal(table.per_reward["nones"], [[np.nan, 0, np.nan], [0, 1, np.nan]])
    np.testing.assert_array_equal(table.per_reward["two"], np.full((2, 3), 2))
    np.testing.assert_array_equal(table.per_reward["nothing"], np.full((2, 3), np.nan))
    none_rates = {name: table.failures()[f"rewards/{name}/none_rate"] for name in table.per_reward}
    assert none_rates == {"nones": 0.5, "two": 0, "nothing": 1}


@pytest.mark.parametrize("exception", [ValueError, type("VerifierTimeout", (BaseException,), {})])
def test_only_the_rows_that_raise_go_missing(exception, caplog):
    def picky(completions, completion_ids, **_):
        if [1, 2, 3] in completion_ids:
            raise exception("three is too many")
        return [float(len(ids)) for ids in completion_ids]

    with caplog.at_level(logging.WARNING):
        table = run(HostReward("picky", picky))
    np.testing.assert_array_equal(table.per_reward["picky"], [[1, 2, np.nan], [1, 2, 3]])
    assert table.error_rate == {"picky": pytest.approx(1 / 6)}
    rates = {"error_rate": pytest.approx(1 / 6), "none_rate": 0, "timeout_rate": 0}
    assert table.failures() == {f"rewards/picky/{kind}": rate for kind, rate in rates.items()}
    assert "three is too many" in caplog.text and "1 of 6" in caplog.text


def test_failures_of_one_class_at_one_place_are_one_kind(caplog):
    def picky(completions, completion_ids, **_):
        for ids in completion_ids:
            if ids in ([7], [9]):
                raise (ValueError if ids == [7] else KeyError)(f"text {len(caplog.records)} is bad")
        if [8] in completion_ids:
            raise ValueError("at another place")
        return [1.0] * len(completions)

    with caplog.at_level(logging.WARNING):
        for name, bad in (("picky", 7), ("picky", 7), ("picky", 9), ("picky", 8), ("other", 7)):
            run(HostReward(name, picky), completion_ids=[[[2]] * 3, [[bad], [5], [6]]])
    kinds = [record.kind for record in caplog.records]
    assert len(kinds) == 5 and kinds[0] == kinds[1] and len(set(kinds[1:])) == 4
    assert "text 1 is bad" in caplog.messages[1] and "counted, in rewards/picky/error_rate" in caplog.messages[1]


def test_failures_that_differ_in_numbers_alone_are_one_kind(caplog):
    def slow(completions, **_):
        seconds.append(len(seconds) + 1)
        return Results([None, *[1.0] * 5], ["timeout", *["ok"] * 5], f"no result within {seconds[-1]} s")

    seconds: list[int] = []
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            run(HostReward("slow", slow))
    first, second = caplog.records
    assert first.kind == second.kind and "within 2 s" in caplog.messages[1]


def test_a_function_that_works_on_single_rows_alone_is_named(caplog):
    def single(completions, **_):
        (text,) = completions
        return [float(len(text))]

    with caplog.at_level(logging.WARNING):
        table = run(HostReward("single", single))
        run(HostReward("single", single))
    np.testing.assert_array_equal(table.per_reward["single"], [[6, 6, 1], [6, 3, 6]])
    assert [record.kind for record in caplog.records] == [("single", "rows")] * 2  # a kind is shown once
    assert re.search("'single' raised ValueError: too many values .*; called row by row, it works", caplog.text)


def test_a_function_that_fails_too_often_raises():
    def broken(completions, **_):
        raise OSError("no route to host")

    for others in ([], [HostReward("fine", constant(1.0))]):
        with pytest.raises(RewardError, match="'broken' failed on 4 of the 4 rows tried.*OSError: no route to host"):
            run(HostReward("broken", broken), *others)
    table = run(HostReward("broken", broken), HostReward("fine", constant(1.0)), max_failure_share=1.0)
    np.testing.assert_array_equal(table.per_reward["broken"], np.full((2, 3), np.nan))
    np.testing.assert_array_equal(table.per_reward["fine"], np.ones((2, 3)))
    assert table.error_rate == {"broken": 1, "fine": 0}


def test_none_and_failures_are_counted_apart():
    def mixed(completions, completion_ids, **_):
        if [4] in completion_ids:
            raise ValueError("no fours")
        return [None if len(ids) == 3 else 1.0 for ids in completion_ids]

    table = run(HostReward("mixed", mixed))
    np.testing.assert_array_equal(table.per_reward["mixed"], [[1, 1, np.nan], [np.nan, 1, np.nan]])
    failures = table.failures()
    assert failures["rewards/mixed/error_rate"] == pytest.approx(1 / 6)
    assert failures["rewards/mixed/none_rate"] == pytest.approx(2 / 6)


@pytest.mark.parametrize("interrupt", [KeyboardInterrupt, SystemExit])
def test_an_interrupt_is_not_counted_as_a_failure(interrupt):
    def interrupted(completions, **_):
        raise interrupt

    with pytest.raises(interrupt):
        run(HostReward("interrupted", interrupted), max_failure_share=1.0)


@pytest.mark.parametrize(
    "function, message",
    [
        (lambda completions, **_: [1.0], "'bad' returned 1 rewards for 6 completions"),
        (lambda completions, **_: [1.0] * 7, "'bad' returned 7 rewards for 6 completions"),
        (lambda completions, **_: 1.0, "'bad' returned a float; it must return a list of 6"),
        (lambda completions, **_: None, "'bad' returned a NoneType"),
        (lambda completions, **_: dict.fromkeys(range(6), 1.0), "'bad' returned a dict; it must return a list of 6"),
        (lambda completions, **_: {1.0, 2.0, 3.0, 4.0, 5.0, 6.0}, "'bad' returned a set; it must return a list of 6"),
        (lambda completions, **_: "123456", "'bad' returned a str; it must return a list of 6"),
        (lambda completions, **_: b"123456", "'bad' returned a bytes; it must return a list of 6"),
        (lambda completions, **_: [math.nan, "x", 1.0, 1.0, 1.0, 1.0], "'bad' returned 'x' for row 1"),
        (lambda completions, **_: ["1.0"] * 6, "'bad' returned '1.0' for row 0"),
        (lambda completions, **_: [[1.0]] * 6, r"'bad' returned \[1.0\] for row 0"),
        (
            lambda completions, image, **_: [1.0] * 6,
            "'bad' cannot be called: missing a required argument: 'image'.*answer, id",
        ),
        (lambda completions: [1.0] * 6, r"'bad' cannot be called: got an unexpected keyword argument.*\*\*columns"),
    ],
)
def test_a_broken_contract_raises(function, message):
    with pytest.raises(RewardError, match=message):
        run(HostReward("bad", function), max_failure_share=1.0)


def test_a_broken_contract_row_by_row_names_the_row():
    def bad(completions, completion_ids, **_):
        if len(completions) > 1:
            raise ValueError("one at a time")
        return ["x" if completion_ids == [[4, 5]] else 1.0]

    with pytest.raises(RewardError, match="'x' for row 4"):
        run(HostReward("bad", bad))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e39, 10**400, np.float32("nan"), Decimal("NaN")])
def test_a_number_that_is_not_finite_is_a_failure_of_its_row(value, caplog):
    with caplog.at_level(logging.WARNING):
        table = run(HostReward("bad", lambda completions, **_: [1.0, 0.0, value, None, 1.0, value]))
    np.testing.assert_array_equal(table.per_reward["bad"], [[1, 0, np.nan], [np.nan, 1, np.nan]])
    rates = {"error_rate": pytest.approx(2 / 6), "none_rate": pytest.approx(1 / 6), "timeout_rate": 0}
    assert table.failures() == {f"rewards/bad/{kind}": rate for kind, rate in rates.items()}
    assert "'bad' failed on 2 of 6 rows" in caplog.text and "for row 2; return a finite float32 number" in caplog.text
    assert table.prompt == {"bad": PROMPTS[0]} and f"is on a completion of the prompt {PROMPTS[0]!r}" in caplog.text
    table = run(HostReward("bad", lambda completions, **_: [1.0] * 5 + [value]))
    assert table.prompt == {"bad": PROMPTS[1]}


def test_numbers_that_are_not_finite_count_against_the_share():
    with pytest.raises(RewardError, match="'bad' failed on 6 of the 6 rows tried.*'bad' returned nan for row 0"):
        run(HostReward("bad", constant(math.nan)))
    reported = Results([1.0, math.nan, None, 1.0, 1.0, 1.0], ["ok", "ok", "none", "ok", "ok", "ok"])
    table = run(HostReward("bad", lambda completions, **_: reported))
    np.testing.assert_array_equal(table.per_reward["bad"], [[1, np.nan, np.nan], [1, 1, 1]])
    assert table.error_rate["bad"] == pytest.approx(1 / 6) and table.none_rate["bad"] == pytest.approx(1 / 6)


@pytest.mark.parametrize(
    "overrides, message",
    [
        (dict(prompts=[]), "0 prompts and 2 groups"),
        (dict(completions=COMPLETIONS[:1]), "2 prompts and 1 groups"),
        (dict(completions=[[], []]), "non-empty"),
        (dict(completions=[["a"], ["a", "b"]]), "have 1, 2 completions"),
        (dict(completion_ids=[[[1]], [[1]]]), "have 3, 3 completions and 1, 1 completion_ids"),
        (dict(columns={"answer": ["1"]}), "'answer' has 1 values for 2 prompts"),
        (dict(columns={"prompts": ["1", "2"]}), "column is named 'prompts'"),
    ],
)
def test_inputs_that_do_not_fit_raise(overrides, message):
    with pytest.raises(RewardError, match=message):
        run(HostReward("one", constant(1.0)), **overrides)


def test_a_reward_that_is_not_callable_raises():
    with pytest.raises(RewardError, match="'x' is a str, which cannot be called"):
        HostReward("x", "accuracy")


def test_a_function_may_change_its_arguments():
    def greedy(prompts, completions, **columns):
        count = len(completions)
        completions.clear()
        prompts.sort(reverse=True)
        columns["answer"].clear()
        return [1.0] * count

    table = run(HostReward("greedy", greedy), HostReward("accuracy", accuracy_reward))
    np.testing.assert_array_equal(table.per_reward["accuracy"], [[1, 0, 0], [1, 0, 0]])
    assert COLUMNS["answer"] == ["1", "2"]


class LengthReward:
    def __init__(self, scale):
        self.scale = scale

    def __call__(self, completion_ids, **_):
        return [self.scale * len(ids) for ids in completion_ids]


def scaled(scale, completion_ids, **_):
    return [scale * len(ids) for ids in completion_ids]


def test_any_callable_and_any_number_works():
    callables = [
        HostReward("", LengthReward(2)),
        HostReward("", functools.partial(scaled, 2)),
        HostReward("", lambda completion_ids, **_: np.array([2 * len(ids) for ids in completion_ids])),
        HostReward("tuple", lambda completion_ids, **_: tuple(np.float32(2 * len(ids)) for ids in completion_ids)),
    ]
    assert [reward.name for reward in callables] == ["LengthReward", "scaled", "<lambda>", "tuple"]
    table = run(*callables)
    for rewards in table.per_reward.values():
        np.testing.assert_array_equal(rewards, [[2, 4, 6], [2, 4, 6]])
    np.testing.assert_array_equal(run(HostReward("bool", constant(True))).per_reward["bool"], np.ones((2, 3)))


async def waiting(completion_ids, **_):
    await asyncio.sleep(0)
    return [2.0 * len(ids) for ids in completion_ids]


class Waiting:
    async def __call__(self, completion_ids, **_):
        return await waiting(completion_ids)


def test_async_functions_work_in_a_loop_that_stays():
    locks = []

    async def locked(completion_ids, **_):
        locks.append(asyncio.get_running_loop())
        return await waiting(completion_ids)

    rewards = [waiting, Waiting(), functools.partial(waiting), lambda completion_ids, **_: waiting(completion_ids)]
    rewards = [HostReward(str(i), function) for i, function in enumerate([*rewards, locked])]

    async def notebook():
        return run(*rewards)

    for table in (run(*rewards), run(*rewards), asyncio.run(notebook())):
        for values in table.per_reward.values():
            np.testing.assert_array_equal(values, [[2, 4, 6], [2, 4, 6]])
    assert locks[0] is locks[1] and not locks[0].is_closed()


def test_a_raising_function_is_shown_with_file_and_line(tmp_path):
    helper = "import json\ndef read(text):\n    return json.loads(text)\n"
    (tmp_path / "helper_of_mine.py").write_text(helper)
    mine = "import helper_of_mine\n\ndef score(completions, **_):\n    return [helper_of_mine.read(c) for c in completions]\n"
    (tmp_path / "mine.py").write_text(mine)
    table = run(HostReward("mine", load_reward(f"{tmp_path}/mine.py:score")), max_failure_share=1.0)
    assert table.error["mine"].startswith("JSONDecodeError: Expecting value")
    assert table.error["mine"].endswith(f"({tmp_path}/helper_of_mine.py, line 3)")  # not the line in json itself
    (tmp_path / "broken.py").write_text("import math\n\n\nmath.sqrt(-1)\n")
    with pytest.raises(
        RewardError, match=rf"running .*broken.py failed with ValueError: .*\({tmp_path}/broken.py, line 4\)"
    ):
        load_reward(f"{tmp_path}/broken.py:score")


def test_load_built_in_module_and_file(tmp_path, monkeypatch):
    assert load_reward("accuracy") is accuracy_reward
    assert load_reward("format") is format_reward
    assert load_reward("jaxrl_reason.rewards.functions:format_reward") is format_reward

    source = "import dataclasses\n@dataclasses.dataclass\nclass Point:\n    x: 'int'\ndef short(completions, **_):\n    return [Point(1).x for _ in completions]\n"
    (tmp_path / "mine.py").write_text(source)
    assert load_reward(f"{tmp_path}/mine.py:short")(completions=["a", "b"]) == [1, 1]
    monkeypatch.chdir(tmp_path)
    assert load_reward("mine.py:short")(completions=["a"]) == [1]


@pytest.fixture
def two_folders(tmp_path):
    """Writes two folders with rewards.py and with modules and packages of equal names next to it."""
    for folder in ("first", "second"):
        (tmp_path / folder / "parts").mkdir(parents=True)
        (tmp_path / folder / "parts" / "__init__.py").write_text("")
        (tmp_path / folder / "parts" / "words.py").write_text(f"WORD = '{folder} word'\n")
        (tmp_path / folder / "shared_helper.py").write_text(f"NAME = '{folder}'\n")
        (tmp_path / folder / f"late_{folder}.py").write_text(f"NAME = 'late {folder}'\n")
        (tmp_path / folder / "random.py").write_text("raise ImportError('hides the standard library')\n")
        (tmp_path / folder / "rewards.py").write_text(f"""import random
import shared_helper
from parts.words import WORD
random.random()
count = 0
def score(completions, **_):
    global count
    count += 1
    import late_{folder}
    return [shared_helper.NAME, WORD, late_{folder}.NAME, count]
def again(**_):
    return count
""")
    return tmp_path


def test_a_file_imports_the_modules_next_to_it(two_folders):
    before, standard = sys.modules.get("shared_helper"), sys.modules["random"]
    first = load_reward(f"{two_folders}/first/rewards.py:score")
    second = load_reward(f"{two_folders}/second/rewards.py:score")
    assert first(completions=[]) == ["first", "first word", "late first", 1]
    assert second(completions=[]) == ["second", "second word", "late second", 1]
    assert sys.modules["random"] is standard and sys.modules.get("shared_helper") is not before
    assert first.__module__ != second.__module__ and pickle.loads(pickle.dumps(first)) is first
    # The folder is at the end of the path, so that it hides no other module.
    assert str(two_folders / "first") in sys.path[len(sys.path) - 2 :]


def test_a_module_that_is_loaded_already_hides_none_next_to_a_file(two_folders, monkeypatch):
    mine = ModuleType("shared_helper")
    monkeypatch.setitem(sys.modules, "shared_helper", mine)
    assert load_reward(f"{two_folders}/first/rewards.py:score")(completions=[])[0] == "first"
    assert sys.modules["shared_helper"] is mine


def test_a_file_is_run_once_until_it_changes(two_folders, monkeypatch):
    file = two_folders / "first" / "rewards.py"
    load_reward(f"{file}:score")(completions=[])
    monkeypatch.chdir(two_folders)
    assert load_reward("first/rewards.py:again")() == 1  # the same module
    monkeypatch.setenv("HOME", str(two_folders))
    assert load_reward("~/first/rewards.py:again")() == 1
    file.write_text("def again(**_):\n    return 'changed'\n")
    assert load_reward(f"{file}:again")() == "changed"


@pytest.mark.parametrize(
    "specs, names",
    [
        (["a.py:one", "a.py:two"], ["one", "two"]),
        (["a.py:short"], ["Length"]),
        (["a.py:short", "a.py:long"], ["short", "long"]),
        (["a.py:half", "a.py:one"], ["half", "one"]),  # a partial of `one`
        (["a.py:made", "a.py:made_too"], ["made", "made_too"]),
        (["a.py:one", "b.py:one"], ["a.one", "b.one"]),
        (["a.py:short", "b.py:short", "a.py:long"], ["a.short", "b.short", "long"]),
        (["a.py:accuracy", "a.py:one"], ["accuracy", "one"]),  # the scorer refuses the name of a built-in reward
        (["a.py:exact"], ["exact"]),
    ],
)
def test_rewards_of_one_name_are_told_apart(specs, names, tmp_path, monkeypatch):
    for name in ("a.py", "b.py"):
        (tmp_path / name).write_text("""import functools
class Length:
    def __call__(self, completions, **_): return []
short, long = Length(), Length()
def one(**_): return []
def two(**_): return []
half = functools.partial(one, scale=0.5)
def make():
    def inner(**_): return []
    return inner
made, made_too = make(), make()
def accuracy(**_): return []
exact = accuracy
""")
    monkeypatch.chdir(tmp_path)
    found = distinct_names({spec: load_reward(spec) for spec in specs}, ["accuracy"])
    assert [found[spec] for spec in specs] == names


@pytest.mark.parametrize(
    "spec, message",
    [
        (
            "acuracy",
            "no built-in reward 'acuracy'; did you mean 'accuracy'.*Built in are accuracy, last_number, format",
        ),
        ("", "no built-in reward ''"),
        ("zzz", "no built-in reward 'zzz'. Built in"),
        (
            "jaxrl_reason.rewards.functions:format_rewards",
            "has no function 'format_rewards'; did you mean 'format_reward'",
        ),
        ("jaxrl_reason.rewards.host:BUILT_IN", "has 'BUILT_IN', which cannot be called"),
        ("no_such_package.rewards:f", "importing 'no_such_package.rewards' failed with ModuleNotFoundError"),
        ("mien.py:short", "no file mien.py; did you mean 'mine.py'"),
        ("nowhere/mine.py:short", "no file nowhere/mine.py"),
        ("broken.py:short", "running broken.py failed with ZeroDivisionError"),
        (":short", "importing '' failed"),
        ("leaving.py:short", "running leaving.py failed with SystemExit: 3 .*leaving.py, line 2"),
        ("syntax.py:short", "running syntax.py failed with SyntaxError: .*syntax.py, line 1"),
        ("kinds.py:Kind", "'kinds.py:Kind' is a class; make an instance of it in kinds.py, and name the instance"),
    ],
)
def test_a_reward_that_cannot_be_loaded_raises(spec, message, tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text("def short(completions, **_):\n    return [1.0] * len(completions)\n")
    (tmp_path / "broken.py").write_text("1 / 0\n")
    (tmp_path / "leaving.py").write_text("import sys\nsys.exit(3)\n")
    (tmp_path / "syntax.py").write_text("def short(:\n")
    (tmp_path / "kinds.py").write_text("class Kind:\n    def __call__(self, completions, **_): return []\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RewardError, match=message):
        load_reward(spec)


# -- functions that report outcomes ------------------------------------------------------------------------------------


def table_of(results, max_failure_share=1.0):
    reward = HostReward("mine", lambda completions, **_: results)
    return compute_rewards([reward], ["a", "b"], [["x", "y", "z"]] * 2, [[[1]] * 3] * 2, {}, max_failure_share)


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


def test_outcomes_of_single_rows():
    def picky(completions, completion_ids, **_):
        if [2] in completion_ids:
            raise ValueError("no twos")
        outcomes = ["timeout" if text == "slow" else "ok" for text in completions]
        return Results([None if outcome == "timeout" else 1.0 for outcome in outcomes], outcomes, "too slow")

    def run(share):
        ids, texts = [[[1], [2], [3], [4]]], [["x", "x", "slow", "x"]]
        return compute_rewards([HostReward("picky", picky)], ["a"], texts, ids, {}, share)

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
        ([None] * 6, ["none", "late"] * 3, "outcome 'late' for row 1, .* 'none', 'error' or 'timeout' without one"),
    ],
)
def test_outcomes_that_contradict_the_rewards_raise(values, outcomes, message):
    with pytest.raises(RewardError, match=f"'mine' reports the {message}"):
        table_of(Results(values, outcomes))

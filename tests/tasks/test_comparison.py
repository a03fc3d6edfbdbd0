"""Tests the comparison of two directories of results, prompt by prompt, and the choice of a directory for results."""

import json
import types

import pytest

from jaxrl_reason import metrics
from jaxrl_reason.config import Config, ConfigError
from jaxrl_reason.data.named_sets import NAMED_SETS
from jaxrl_reason.tasks import comparison, reporting
from jaxrl_reason.tasks.asked import config_like, configs_of_sets, read_sets
from jaxrl_reason.tasks.policies import ALL

RIGHT = {4: [1, 0, 1], 1: [0, 0, 1], 7: [1, 1, 1]}  # row -> verdicts, in the order of the file
ANSWERS = {4: ["x", "y", "x"], 1: [None, "y", "z"], 7: ["x"] * 3}


def record(samples=3, prompts=3, **changes):
    data = {"name": "rows.jsonl", "split": "all", "fingerprint": "f"}
    found = {"data": data, "verdict": "even", "samples": samples, "prompts": prompts, "metrics": {}}
    return found | {"checkpoint": 2, "weights": "ab", "config": {"seed": 0, "steps": 5}} | changes


def write(folder, right=RIGHT, lines=None, **changes):
    """Writes the results of an evaluation and returns its record."""
    folder.mkdir(parents=True, exist_ok=True)
    samples = len(next(iter(right.values())))
    found = record(samples, len(right), **changes)
    made = [
        {
            "row": row,
            "sample": k,
            "completion": "",
            "answer": ANSWERS[row][k],
            "correct": bool(x),
            "rewards": {"even": float(x)},
            "total": float(x),
            "length": 1,
            "truncated": False,
        }
        for row, verdicts in right.items()
        for k, x in enumerate(verdicts)
    ]
    (folder / "evaluation.json").write_text(json.dumps(found))
    (folder / "completions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in (lines or list)(made)))
    return found


def test_differences_by_hand(tmp_path):
    ours = write(tmp_path / "a")
    write(tmp_path / "b", {7: [0, 1], 4: [0, 0]})  # in another order
    found = comparison.compare(tmp_path / "a", tmp_path / "b", ours)[""]
    assert found["prompts"] == 2  # rows 4 and 7
    assert found.keys() == {"prompts", "accuracy", "pass@1", "pass@2", "maj@1", "maj@2"}
    expected = {  # (this, other), each a mean over the rows 4 and 7
        "accuracy": ((2 / 3 + 1) / 2, (0 + 1 / 2) / 2),
        "pass@2": ((1 + 1) / 2, (0 + 1) / 2),  # each pair of 1, 0, 1 has a correct one
        "maj@1": ((1 + 1) / 2, (0 + 0) / 2),
        "maj@2": ((1 + 1) / 2, (0 + 0) / 2),  # the votes are x (before y) and x
    }
    for name, (this, other) in expected.items():
        x = found[name]
        assert (x["this"], x["other"], x["difference"]) == pytest.approx((this, other, this - other)), name
    mean, low, high = metrics.paired_difference([2 / 3, 1], [0, 1 / 2])
    assert (found["accuracy"]["low"], found["accuracy"]["high"]) == (low, high) and low < mean < high
    assert found["pass@1"] == pytest.approx(found["accuracy"])
    same = comparison.compare(tmp_path / "a", tmp_path / "a", ours)[""]
    assert all((x["difference"], x["low"], x["high"]) == (0, None, None) for n, x in same.items() if n != "prompts")


def test_the_table_has_percent_signs_and_no_interval_without_one(tmp_path):
    differences = {
        "s": {"prompts": 2, "pass@2": {"this": 1.0, "other": 0.5, "difference": 0.5, "low": 0.25, "high": 0.75}}
    }
    differences["t"] = {"prompts": 1, "accuracy": {"this": 0, "other": 1, "difference": -1, "low": None, "high": None}}
    columns = [list(column.cells) for column in comparison.table(differences, "").columns]
    assert columns == [
        ["s pass@2", "t accuracy"],
        ["100.0 %", "0.0 %"],
        ["50.0 %", "100.0 %"],
        ["+50.0", "-100.0"],
        ["+25.0 to +75.0", ""],
    ]


@pytest.mark.parametrize(
    "lines, said",
    [
        (lambda x: x[:-1], "completions.jsonl has not 3 completions of each of 3 prompts"),
        (lambda x: x[:6], "completions.jsonl has not 3 completions of each of 3 prompts"),
        (lambda x: [*x[:3], *x[:3], *x[3:]], "completions.jsonl has not 3 completions"),
        (lambda x: x[::-1], "completions.jsonl has not 3 completions"),
        (lambda x: [{"row": y["row"], "sample": y["sample"]} for y in x], "is not that of an evaluation"),
        (lambda x: [{}], "is not that of an evaluation"),
    ],
)
def test_results_with_missing_or_repeated_completions_are_not_compared(lines, said, tmp_path):
    ours = write(tmp_path / "a")
    write(tmp_path / "b", lines=lines)
    with pytest.raises(ConfigError, match=said):
        comparison.read_record(tmp_path / "b", ours)


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"data": record()["data"] | {"fingerprint": "g"}}, "has other data for rows.jsonl"),
        ({"verdict": "odd"}, r"has another verdict \('odd', not 'even'\)"),
        ({"metrics": None}, "is not finished"),
        ({"sets": {"first": record()}}, "has no evaluation of a single set; it has first"),
    ],
)
def test_other_evaluations_are_not_compared(changes, said, tmp_path):
    ours, theirs = write(tmp_path / "a"), write(tmp_path / "b", **changes)
    (tmp_path / "b" / "evaluation.json").write_text(json.dumps({n: x for n, x in theirs.items() if x is not None}))
    with pytest.raises(ConfigError, match=said):
        comparison.read_record(tmp_path / "b", ours)
    assert comparison.is_results(tmp_path / "b")
    (tmp_path / "b" / "config.json").write_text("{}")  # a run, or a model
    assert not comparison.is_results(tmp_path / "b")


def test_results_of_other_prompts_are_not_compared(tmp_path):
    ours = write(tmp_path / "a")
    write(tmp_path / "b", {1: [0, 0]})
    write(tmp_path / "c", {4: [0, 0]})
    with pytest.raises(ConfigError, match="have no prompt of the data in common"):
        comparison.compare(tmp_path / "c", tmp_path / "b", ours)


def test_directories_of_another_evaluation_are_left_alone(tmp_path):
    choose = lambda found, out=None: reporting.results_directory(out, tmp_path, found).relative_to(tmp_path)
    ours = write(tmp_path / "evaluation")
    assert str(choose(ours)) == "evaluation" and reporting.holds(tmp_path / "evaluation", ours)
    for other in (
        {"weights": "cd"},  # another run of the same recipe, or the same run again
        {"checkpoint": 3},
        {"changed": 1.0},
        {"data": ours["data"] | {"fingerprint": "g"}},
        {"config": {"seed": 1, "steps": 5}},
    ):
        assert str(choose(record() | other)) == "evaluation-2"
        with pytest.raises(ConfigError, match="holds another evaluation"):
            choose(record() | other, tmp_path / "evaluation")
        (tmp_path / "evaluation-2").rmdir()
    same = {
        "command": "c",
        "workdir": "/moved",
        "config": {"seed": 0, "steps": 9, "log": {"samples": 1}, "mesh": {"data": 2}, "checkpoint": {"keep": 3}}
        | {"compilation_cache": "/c", "reward": {"workers": 2}, "data": {"data_dir": "/d"}},
    }
    assert str(choose(record() | same)) == "evaluation"
    # The folder of a set may hold an evaluation of its own.
    write(tmp_path / "own" / "first")
    sets = lambda **changes: {"sets": {"first": record(**changes), "second": record()}}
    assert str(choose(sets(), tmp_path / "own")) == "own"
    with pytest.raises(ConfigError, match="holds another evaluation"):
        choose(sets(weights="cd"), tmp_path / "own")


@pytest.mark.parametrize("name", ["completions.jsonl", "predictions.jsonl", "evaluation.png"])
def test_files_of_unknown_origin_are_not_replaced_in_a_chosen_directory(name, tmp_path):
    choose = lambda out, found: reporting.results_directory(out, tmp_path, found)
    for folder, found in (("a", record()), ("b", {"sets": {"first": record()}})):
        out = tmp_path / folder
        file = (out / "first" if "sets" in found else out) / name
        file.parent.mkdir(parents=True)
        file.write_text("")  # of a kill before evaluation.json
        assert choose(out, found) == out
        file.write_text("mine")
        with pytest.raises(ConfigError, match=f"{file.relative_to(out)} without evaluation.json"):
            choose(out, found)
        (file.parent / "evaluation.json").write_text(json.dumps(record()))
        assert choose(out, found) == out
    (tmp_path / "evaluation").mkdir()
    (tmp_path / "evaluation" / name).write_text("of an earlier version")
    assert choose(None, record()) == tmp_path / "evaluation"


def test_a_directory_that_cannot_be_made_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(
        OSError, match="file/evaluation cannot be made: Not a directory. Name another directory with --out"
    ):
        reporting.results_directory(None, tmp_path / "file", {})


@pytest.mark.parametrize(
    "text, found",
    [
        ("aime24@32,mine.v2.jsonl", {"aime24": ("aime24", 32), "mine": ("mine.v2.jsonl", None)}),
        (" a/b c.jsonl@3 , ../.d.csv", {"b_c": ("a/b c.jsonl", 3), "d": ("../.d.csv", None)}),
        ("hf://datasets/o/n@1a/x-*.parquet@2", {"x-_": ("hf://datasets/o/n@1a/x-*.parquet", 2)}),
        ("aime24@-1", {"aime24_-1": ("aime24@-1", None)}),  # no data set has this name
    ],
)
def test_sets_of_the_command_line(text, found):
    assert read_sets(text) == found


def test_sets_have_their_splits_and_all_rows_unless_the_command_line_limits_them():
    policy, sets = (
        types.SimpleNamespace(config=Config(), numbers=None, workdir=None),
        read_sets("sums@2,x.jsonl,math500"),
    )
    found = configs_of_sets(policy, sets, {})
    parts = {label: (c.data.eval, c.data.eval_split, c.eval.samples, c.eval.prompts) for label, c in found.items()}
    assert parts == {
        "sums": ("sums", "test", 2, ALL),
        "x": ("x.jsonl", "all", Config().eval.samples, ALL),
        "math500": (NAMED_SETS["math500"].source, "all", Config().eval.samples, ALL),
    }
    assert found["math500"].reward.functions == ["math_verify"] and found["math500"].data.template == "boxed"
    assert found["x"].reward == Config().reward and found["x"].data.template == Config().data.template
    given = {"eval.prompts": "256", "data.template": "plain", "reward.functions": "accuracy"}
    c = configs_of_sets(policy, sets, given)["math500"]
    assert (c.eval.prompts, c.data.template, c.reward) == (
        Config().eval.prompts,
        Config().data.template,
        Config().reward,
    )
    run = types.SimpleNamespace(config=Config(), numbers=None, workdir="runs/a")
    assert configs_of_sets(run, sets, {})["math500"].data.template == Config().data.template  # a run keeps its template


@pytest.mark.parametrize("text", ["", "a,,b", "..", "aime24,.", "a.jsonl,b/a.csv", "a.jsonl,.a.jsonl"])
def test_sets_without_a_name_of_their_own_are_refused(text):
    with pytest.raises(ValueError, match="^sets "):
        read_sets(text)


def test_the_other_policy_is_judged_under_the_same_limits():
    ours, policy = Config(), types.SimpleNamespace(numbers=None, workdir=None, config=Config())
    limits = {
        "skip_special_tokens": True,
        "workers": 2,
        "timeout_s": 120.0,
        "memory_mb": 8192,
        "max_failure_share": 1.0,
    }
    for name, value in limits.items():
        setattr(ours.reward, name, value)
    found = config_like(ours, policy).reward
    assert {name: getattr(found, name) for name in limits} == limits

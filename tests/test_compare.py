"""Tests a recipe and its baselines, which share one start and have one row each."""

import io
import json
import os
import re
import signal
import subprocess
import sys
import types

import jax
import numpy as np
import pytest
import rich.console

from helpers.documents import ROOT
from helpers.report_runs import content_of
from helpers.tiny_runs import tiny, write_recipe, write_rows
from jaxrl_reason import compare, train
from jaxrl_reason.config import Config, ConfigError, RewardModel
from jaxrl_reason.rl import hosts
from jaxrl_reason.runs import checkpoints, inputs, results, study, summary

pytestmark = pytest.mark.usefixtures("quick_compilation")
ROWS = ("method", "leave_one_out")
OTHER = {"optimizer.b1": 0.8}  # the change of a row


@pytest.fixture
def untrained(monkeypatch):
    """Replaces training, so that runs end at once with an accuracy of one half."""
    monkeypatch.setattr(results, "evaluations", lambda *_: [{"step": 0, "eval/accuracy": 0.5}])
    monkeypatch.setattr(results, "seconds", lambda *_: 0.0)

    def trains(run):
        run.work.path.mkdir(exist_ok=True)
        print("trains")

    monkeypatch.setattr(train, "train", trains)


LOO = {"Leave-one-out": {"method": {"name": "rloo"}}}


@pytest.mark.runs
def test_all_runs_begin_with_the_same_weights_and_give_a_row_each(tmp_path, capsys):
    config = tiny(write_rows(tmp_path / "rows.jsonl"), steps=1, supervised__steps=3, eval__every=1)
    rows = compare.compare(config, LOO, tmp_path / "runs")
    directory = tmp_path / "runs" / "seed-0"
    assert list(rows) == ["start", "grpo", "Leave-one-out"]
    first = {name: json.loads((directory / name / "metrics.jsonl").read_text().splitlines()[0]) for name in ROWS}
    assert first["method"] == first["leave_one_out"]
    assert rows["start"]["eval/mean_length"] == first["method"]["eval/mean_length"]
    assert json.loads((tmp_path / "runs" / "comparison.json").read_text()) == rows

    ready = train.setup(study.variant(config, {"checkpoint.keep_start": True}), directory / "start")
    like = ready.programs.init().params
    start = checkpoints.load_params(directory / "start" / "start", like)
    different = [not np.array_equal(a, b) for a, b in zip(jax.tree.leaves(start), jax.tree.leaves(like))]
    assert any(different)  # the supervised start, not the random weights
    assert json.loads((directory / "leave_one_out" / "config.json").read_text())["config"]["method"] == {"name": "rloo"}
    # The same command again trains nothing and finds the same metrics.
    capsys.readouterr()
    assert compare.compare(config, LOO, tmp_path / "runs") == rows
    assert capsys.readouterr().out == "3 of 3 runs are finished.\n"


@pytest.mark.runs
def test_a_row_is_the_run_that_train_makes_with_the_same_seed(tmp_path):
    config = tiny(write_rows(tmp_path / "rows.jsonl"), seed=5, supervised__steps=2, eval__every=1)
    rows = compare.compare(config, {}, tmp_path / "runs", seeds=[1, 5])
    train.train(train.setup(config, tmp_path / "alone"))
    lines = [
        {name: value for name, value in json.loads(line).items() if not name.startswith("perf/")}
        for file in ("alone", "runs/seed-5/method")
        for line in (tmp_path / file / "metrics.jsonl").read_text().splitlines()
    ]
    assert len(lines) == 6 and lines[:3] == lines[3:]
    length = {seed: rows["grpo"]["seeds"]["eval/mean_length"][seed] for seed in ("1", "5")}
    assert length["5"] == lines[-1]["eval/mean_length"]
    assert rows["grpo"]["eval/mean_length"] == pytest.approx((length["1"] + length["5"]) / 2)
    others = {seed: values for seed, values in rows["start"]["seeds"]["eval/entropy"].items()}
    assert others["1"] != others["5"]  # other weights


@pytest.mark.runs
def test_one_row_after_the_other_is_the_comparison_of_both(tmp_path, capsys):
    (tmp_path / "even.py").write_text(
        "def even(completion_ids, **_):\n    return [float(ids[0] % 2) for ids in completion_ids]\n"
    )
    config = tiny(
        write_rows(tmp_path / "rows.jsonl"),
        steps=1,
        supervised__steps=1,
        eval__every=1,
        eval__prompts=7,
        reward__functions=[f"{tmp_path / 'even.py'}:even"],
        optimizer__learning_rate=0.1,
        log__samples_every=1,
        log__samples=14,  # all of an evaluation
    )
    results_file = tmp_path / "results" / "tiny.jsonl"
    compare_again = lambda workdir, **options: compare.compare(config, LOO, tmp_path / workdir, **options)
    assert list(compare_again("runs", only=["Leave-one-out"])) == ["start", "Leave-one-out"]
    assert not (tmp_path / "runs" / "seed-0" / "method").exists()
    assert list(compare_again("runs", only=["grpo"], results_file=results_file)) == ["start", "grpo", "Leave-one-out"]
    # The file of results has all finished runs. With some of them, another work directory continues and adds the rest.
    all_entries = results.read(results_file)
    assert [(entry["row"], entry["seed"], entry["recipe"]) for entry in all_entries] == [
        ("grpo", 0, True),
        ("Leave-one-out", 0, False),
    ]
    for entry, name in zip(all_entries, ROWS):
        lines = (tmp_path / "runs" / "seed-0" / name / "held_out.jsonl").read_text().splitlines()
        correct = [(line["step"], line["correct"]) for line in map(json.loads, lines)]
        before, after = (
            [np.mean(correct[i : i + 2], axis=0)[1] for i in range(begin, begin + 14, 2)] for begin in (0, 14)
        )
        assert entry["accuracies"] == after != before and after != sorted(after)
        assert entry["prompts"] == all_entries[0]["prompts"]
    results_file.unlink()
    results.merge(results_file, all_entries[:1])
    rows = compare_again("elsewhere", results_file=results_file)
    assert sorted(path.name for path in (tmp_path / "elsewhere" / "seed-0").iterdir() if path.is_dir()) == [
        "leave_one_out",
        "start",
    ]
    first = compare_again("runs")
    for row in rows.values():
        for run in row.get("runs", {}).values():
            del run["seconds"], run["start_seconds"]
    for row in first.values():
        for run in row.get("runs", {}).values():
            del run["seconds"], run["start_seconds"]
    assert rows == first
    found = results.read(results_file)
    assert found[0] == all_entries[0] and found[1]["evaluations"] == all_entries[1]["evaluations"]
    # Neither a run nor a start is left to do.
    capsys.readouterr()
    compare_again("nowhere", results_file=results_file)
    assert capsys.readouterr().out == "3 of 3 runs are finished.\n"
    # Results of another configuration are never mixed in or replaced.
    other = study.variant(config, {"optimizer.b1": 0.8})
    message = "The file of --results has seed 0 of 'grpo' with another configuration; name another file, or remove such"
    with pytest.raises(ConfigError, match=message):
        compare.prepare(other, LOO, tmp_path / "other", results_file=results_file)
    assert results.read(results_file) == found


def test_a_variant_changes_a_copy_and_knows_its_fields(tmp_path):
    config = tiny("rows.jsonl")
    changed = study.variant(config, {"method": {"name": "rloo"}, "reward.weights": [2.0]})
    assert changed.method == {"name": "rloo"} and changed.reward.weights == [2.0]
    assert config.method == {"name": "grpo"} and config.reward.weights == []
    with pytest.raises(ConfigError, match="config.reward.wieghts, and there is no such field"):
        study.variant(config, {"reward.wieghts": [1.0]})


def test_a_comparison_without_held_out_metrics_is_refused_before_training(tmp_path):
    config = Config()
    config.eval.every = 0
    with pytest.raises(ConfigError, match="config.eval.every is 0"):
        compare.compare(config, {}, tmp_path / "runs")
    assert not (tmp_path / "runs").exists()


def test_a_recipe_without_baselines_is_one_sentence(tmp_path, capsys):
    recipe = tmp_path / "recipe.py"
    recipe.write_text("from jaxrl_reason.config import Config\ndef get_config():\n    return Config()\n")
    for flags in ([f"--config={recipe}"], ["--config", str(recipe)]):
        assert compare.main([*flags, f"--workdir={tmp_path / 'runs'}"]) == 2
        assert "has no get_baselines()" in capsys.readouterr().err


def test_a_comparison_that_is_asked_to_end_says_that_it_goes_on(tmp_path, capsys, monkeypatch):
    recipe = tmp_path / "recipe.py"
    recipe.write_text(
        "from jaxrl_reason.config import Config\n"
        "def get_config():\n    return Config()\n"
        "def get_baselines():\n    return {}\n"
    )

    def stopped(*_):
        raise hosts.Preempted("step 3")

    monkeypatch.setattr(compare, "prepare", lambda *_, **__: None)
    monkeypatch.setattr(compare, "train_all", stopped)
    assert compare.main([f"--config={recipe}", f"--workdir={tmp_path / 'run'}"]) == 143
    assert capsys.readouterr().err == "Asked to end, and saved after step 3: the same command continues from there.\n"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("ending", [0, 1])
def test_a_signal_in_the_last_step_of_a_run_ends_the_comparison(ending, number, tmp_path, monkeypatch, untrained):
    """After the last run there is nothing left to end."""
    config = tiny(write_rows(tmp_path / "rows.jsonl"), eval__every=1)
    comparison = compare.prepare(config, {"other": OTHER}, tmp_path / "runs")
    trained = []

    def last_step(run):
        with hosts.preemption():
            if len(trained) == ending:
                os.kill(os.getpid(), number)
        trained.append(run.work.path.name)

    monkeypatch.setattr(train, "train", last_step)
    if ending == 1:
        assert list(compare.train_all(comparison)) == ["start", "grpo", "other"]
    else:
        with pytest.raises(
            hosts.Preempted, match="saved after the last step of the run in .*/seed-0/method: the same command"
        ):
            compare.train_all(comparison)
    assert trained == ["method", "other"][: ending + 1]


def test_the_table_has_a_dash_for_a_missing_metric():
    rows = {"start": {"eval/accuracy": 0.5, "eval/prompts": 4}, "pointwise": {"eval/r2": 0.25}}
    console = rich.console.Console(file=io.StringIO(), width=80)
    compare.print_rows(console, rows, ("accuracy", "r2"))
    lines = [line for line in console.file.getvalue().splitlines() if line[0] in "│┃"]
    words = [line.replace("│", " ").replace("┃", " ").split() for line in lines]
    assert words == [["start", "pointwise"], ["accuracy", "50.0", "%", "-"], ["r2", "-", "0.250"]]
    assert "standard deviations" not in console.file.getvalue()
    compare.print_rows(console, {"start": {"eval/rmse": 0.5}}, ("rmse",))
    assert "rmse and spread are in standard deviations of the training targets." in console.file.getvalue()


def test_every_run_is_announced_with_the_number_of_runs_that_follow(tmp_path, capsys, untrained):
    config = tiny(write_rows(tmp_path / "rows.jsonl"), eval__every=1)
    baselines = {"Other, b1": OTHER, "loo": {"method": {"name": "rloo"}}}
    rows = compare.compare(config, baselines, tmp_path / "runs", seeds=[4, 2], only=["grpo", "Other, b1"])
    assert rows["Other, b1"]["differs"] == {"optimizer.b1": 0.8}  # no field of loo, which is not trained
    runs = tmp_path / "runs"
    assert capsys.readouterr().out.splitlines() == [
        f"Run 1 of 4, seed 4, the method, grpo, in {runs}/seed-4/method; 3 follow.",
        "trains",
        f"Run 2 of 4, seed 4, the baseline 'Other, b1', in {runs}/seed-4/other_b1; 2 follow.",
        "trains",
        f"Run 3 of 4, seed 2, the method, grpo, in {runs}/seed-2/method; 1 follows.",
        "trains",
        f"Run 4 of 4, seed 2, the baseline 'Other, b1', in {runs}/seed-2/other_b1; none follows.",
        "trains",
    ]


def test_a_file_of_results_is_locked_for_all_work_directories(tmp_path, untrained):
    config = tiny(write_rows(tmp_path / "rows.jsonl"), steps=1, eval__every=1)
    for name in ("one", "two"):
        compare.compare(config, {}, tmp_path / name, results_file=tmp_path / "shared" / "results.jsonl")
        assert not (tmp_path / name / "results.lock").exists()
    assert {path.name for path in (tmp_path / "shared").iterdir()} == {"results.jsonl", "results.jsonl.lock"}


def test_a_baseline_that_cannot_begin_is_named_when_the_method_has_ended(tmp_path, monkeypatch, untrained):
    config = tiny(write_rows(tmp_path / "rows.jsonl"), eval__every=1)
    comparison = compare.prepare(config, {"other": {"data.template": "nope"}}, tmp_path / "runs")
    trained = []
    monkeypatch.setattr(train, "train", lambda run: trained.append(len(comparison.pending)))
    with pytest.raises(ConfigError, match="The baseline 'other' cannot begin: .*nope"):
        compare.train_all(comparison)
    assert trained == [0]  # the method's run is not pending any more


@pytest.mark.parametrize("changed", ["rows.jsonl", "even.py"])
def test_data_and_reward_files_may_not_change_between_the_seeds_of_a_row(changed, tmp_path, untrained):
    (tmp_path / "even.py").write_text("def even(completions, **_):\n    return [0.0 for _ in completions]\n")
    spec = f"{tmp_path / 'even.py'}:even"
    config = tiny(write_rows(tmp_path / "rows.jsonl"), eval__every=1, reward__functions=[spec])
    results_file, file, text = tmp_path / "results.jsonl", tmp_path / changed, (tmp_path / changed).read_text()
    compare.compare(config, {}, tmp_path / "runs", seeds=[3], results_file=results_file)
    file.write_text(text.replace("3", "4").replace("0.0", "1.0"))
    what = "other data" if changed == "rows.jsonl" else f"another file of the reward {spec!r}"
    for workdir, seeds, other in (
        ("runs", [3, 1], tmp_path / "runs" / "seed-3" / "method"),
        ("others", [1], "seed 3 of 'grpo' in the file of results"),
    ):
        options = {"seeds": seeds, "results_file": results_file if workdir == "others" else None}
        sentence = (
            f"{tmp_path / workdir / 'seed-1' / 'method'} would have {what} than {other}, because a file has changed"
        )
        with pytest.raises(ConfigError, match=re.escape(sentence)):
            compare.compare(config, {}, tmp_path / workdir, **options)
        file.write_text(text)
        assert len(compare.compare(config, {}, tmp_path / workdir, **options)) == 2  # nothing was written before
        file.write_text(text.replace("3", "4").replace("0.0", "1.0"))


def test_a_file_that_changes_during_a_run_is_noticed(tmp_path, monkeypatch, untrained):
    (tmp_path / "even.py").write_text("def even(completions, **_):\n    return [0.0 for _ in completions]\n")
    config = tiny(
        write_rows(tmp_path / "rows.jsonl"), eval__every=1, reward__functions=[f"{tmp_path / 'even.py'}:even"]
    )

    def edited(run):
        run.work.path.mkdir(exist_ok=True)
        (tmp_path / "even.py").write_text("def even(completions, **_):\n    return [1.0 for _ in completions]\n")

    monkeypatch.setattr(train, "train", edited)
    with pytest.raises(
        ConfigError, match="seed-1/method would have another file of the reward .* than .*/seed-3/method"
    ):
        compare.compare(config, {}, tmp_path / "runs", seeds=[3, 1])


def test_the_inputs_of_a_run_are_the_files_that_it_reads(tmp_path):
    """Rows that share a reward model have its pairs; a start has no rewards. Data of TFDS have no digest."""
    (tmp_path / "r.py").write_text("def f(**_): pass\n")
    shared = tmp_path / "start" / "reward_model"
    config = tiny("rows.jsonl", reward_model__data="pairs.jsonl", reward__functions=["accuracy", f"{tmp_path}/r.py:f"])
    work = types.SimpleNamespace(fingerprint="d")
    run = lambda c, phase=None: types.SimpleNamespace(
        config=c, task=types.SimpleNamespace(work=work), reward_phase=phase
    )
    unit = lambda row: types.SimpleNamespace(row=row, directory=tmp_path / ("row" if row else "start"))
    phase = types.SimpleNamespace(work=types.SimpleNamespace(fingerprint="p"))
    assert (found := compare._inputs(unit(None), run(config, phase))) == {"data": "d", "pairs": "p"}
    (tmp_path / "start").mkdir()
    inputs.write(tmp_path / "start", found)
    reward = {f"{tmp_path}/r.py:f": compare.file_digest(f"{tmp_path}/r.py:f")}
    using = study.variant(config, {"reward_model": RewardModel(path=str(shared))})
    assert compare._inputs(unit("row"), run(using, types.SimpleNamespace(work=None))) == found | reward
    for name, expected in (("hf://datasets/o/n/a*", {"data": "d"}), ("word_problems/chains", {})):
        other = study.variant(config, {"data.train": name, "data.eval": "", "reward.functions": ["accuracy"]})
        assert compare._inputs(unit("row"), run(other)) == expected


HOLD = "import pathlib, sys; from jaxrl_reason.runs import locks; lock = locks.take(pathlib.Path(sys.argv[1])); print(); input()"


@pytest.mark.processes
@pytest.mark.parametrize("ended", ["killed", "finished", "signal"])
def test_a_process_waits_for_the_runs_of_others(ended, tmp_path, monkeypatch, capsys, untrained):
    """It continues the run of a killed process, and leaves a run alone that finishes in the meantime."""
    config = tiny(write_rows(tmp_path / "rows.jsonl"), eval__every=1)
    comparison = compare.prepare(config, {"other": OTHER}, tmp_path / "runs")
    other = tmp_path / "runs" / "seed-0" / "other"
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, f"{other}.lock"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT
    )
    holder.stdout.readline()
    waited = []

    def sleep(seconds):
        waited.append(seconds)
        if len(waited) < 3:
            return
        if ended == "signal":
            os.kill(os.getpid(), signal.SIGTERM)
            return
        if ended == "finished":
            other.mkdir()
            digest = comparison.study.rows[1].digest
            entry = {"row": "other", "recipe": False, "seed": 0, "config": digest}
            entry |= {"versions": {}, "seconds": 0, "start_seconds": 0}
            evaluations = [{"step": 0, "eval/accuracy": 0.75}]
            (other / "result.json").write_text(json.dumps(entry | {"evaluations": evaluations}))
        holder.kill()
        holder.wait()

    monkeypatch.setattr(compare.time, "sleep", sleep)
    with holder:
        if ended == "signal":
            with pytest.raises(hosts.Preempted, match="saved after the last run of this process"):
                compare.train_all(comparison)
            holder.kill()
        else:
            rows = compare.train_all(comparison)
            assert rows["other"]["eval/accuracy"] == {"killed": 0.5, "finished": 0.75}[ended]
    assert waited == [1.0] * 3
    out = capsys.readouterr().out.splitlines()
    assert out[2] == "Other processes work on the runs that are left (1); waiting for them."
    assert [line[:12] for line in out[3:]] == ["Run 2 of 2, ", "trains"] * (ended == "killed")


@pytest.mark.parametrize(
    "options, message",
    [
        (
            {"baselines": {"a": {"steps": -1}}},
            "The baseline 'a' cannot begin: config.steps is -1; it must be at least 0.",
        ),
        (
            {"baselines": {"a": {"eval.every": 0}}},
            "The baseline 'a' cannot begin: config.eval.every is 0, and a comparison needs held-out metrics; set it above 0.",
        ),
        (
            {"baselines": {"a": {"steps": "5"}}},
            "The baseline 'a' cannot begin: config.steps is '5'; it must be an int.",
        ),
        ({"only": ["b"]}, "--only=b is no row. There are: grpo, other."),
        (
            {"baselines": {"A b": OTHER, "a-b": OTHER}},
            "The baseline 'a-b' has the name or the directory of another row",
        ),
        (
            {"baselines": {"\u03b2": OTHER}},
            "The baseline '\u03b2' has no letter a-z or digit for its directory; rename it.",
        ),
        ({"baselines": {"Start": OTHER}}, "The baseline 'Start' has the name or the directory of another row"),
        ({"baselines": {"grpo": OTHER}}, "The baseline 'grpo' has the name or the directory of another row"),
        ({"baselines": {"other": {"seed": 3}}}, "The baseline 'other' changes config.seed, which all rows share"),
        ({"seeds": [2**31]}, "config.seed is 2147483648; it must be at most 2147483647."),
    ],
)
def test_rows_that_cannot_be_compared_are_refused_before_training(options, message, tmp_path):
    config = tiny(write_rows(tmp_path / "rows.jsonl"), eval__every=1)
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}"):
        compare.prepare(config, **({"baselines": {"other": OTHER}, "workdir": tmp_path / "runs"} | options))
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    "text, seeds", [("1", (0,)), ("3", (0, 1, 2)), ("0,3,5", (0, 3, 5)), ("3,", (3,)), ("7,0", (7, 0))]
)
def test_the_seeds_of_a_flag(text, seeds):
    assert compare.read_seeds(text) == seeds


@pytest.mark.parametrize("text", ["0", "1001", "-1", "a", "", ",", "1,,2", "1,1", "1,01", "1.5", "²"])
def test_seeds_that_are_none(text):
    with pytest.raises(ValueError, match="^a number of seeds from 1 to 1000, or seeds such as 0,3,5$"):
        compare.read_seeds(text)


def test_two_ways_to_set_the_seed_are_refused(tmp_path, capsys):
    recipe = write_recipe(tmp_path / "recipe.py", tiny(write_rows(tmp_path / "rows.jsonl"), eval__every=1), {})
    assert compare.main([f"--config={recipe}", f"--workdir={tmp_path / 'w'}", "--seeds=2", "--config.seed=1"]) == 2
    assert capsys.readouterr().err == "error: --seeds and --config.seed both set the seed; leave one of them out.\n"


@pytest.mark.parametrize(
    "body, said",
    [
        ("return None", "get_baselines() must return a dict that maps names of rows to dicts of fields."),
        ("return {1: {}}", "get_baselines() must return a dict that maps names of rows to dicts of fields."),
        ("return {'a': {1: 2}}", "get_baselines() must return a dict that maps names of rows to dicts of fields."),
        ("return {'a': 3}", "get_baselines() must return a dict that maps names of rows to dicts of fields."),
        ("return {}['x']", "get_baselines() has failed: KeyError: 'x'."),
    ],
)
def test_baselines_that_are_none_are_one_sentence(body, said, tmp_path, capsys):
    recipe = write_recipe(tmp_path / "recipe.py", tiny(write_rows(tmp_path / "rows.jsonl"), eval__every=1))
    with open(recipe, "a") as file:
        file.write(f"\n\ndef get_baselines():\n    {body}\n")
    assert compare.main([f"--config={recipe}", f"--workdir={tmp_path / 'runs'}"]) == 2
    assert capsys.readouterr().err == f"error: {recipe}: {said}\n"


def test_every_row_with_fewer_seeds_says_so():
    count = lambda n: {"seeds": {"eval/accuracy": dict.fromkeys(map(str, range(n)), 0.5), "eval/other": {}}}
    rows = {"start": count(1), "pointwise": {"seeds": {}}, "m": count(1), "b": count(3)}
    assert summary.headings(rows) == {
        "start": "start (1 of 3 seeds)",
        "pointwise": "pointwise",
        "m": "m (1 of 3 seeds)",
        "b": "b",
    }


def words(console):
    lines = [line for line in console.file.getvalue().splitlines() if line]
    return [line.replace("│", " ").replace("┃", " ").split() if line[0] in "│┃" else line for line in lines]


def test_the_tables_of_several_seeds_have_intervals_and_the_fields_that_differ(tmp_path):
    """With t(0.975, 2) = 4.30265, 50, 60 and 70 % are 60 ± 24.8, and the differences 10, 20 and 30 are 20 ± 24.8."""
    entry = lambda x: {"step": 1, "eval/accuracy": x}
    row = lambda values: {
        seed: {
            "config": "c",
            "versions": {},
            "seconds": 1.0,
            "start_seconds": 0.0,
            "evaluations": [entry(0.5), entry(x)],
        }
        for seed, x in values.items()
    }
    rows = summary.summarize(
        {"m": row({0: 0.5, 1: 0.6, 4: 0.7}), "b": row({0: 0.4, 1: 0.4, 4: 0.4}), "c": row({0: 0.2, 1: 0.2})}, "m", ()
    )
    rows["m"]["differs"] = {"method.alpha": 0.3, "optimizer.learning_rate": 1e-4}
    rows["b"]["differs"] = {"optimizer.learning_rate": 2e-4}
    rows["c"]["difference"][summary.OTHER_PROMPTS] = {"mean": -0.35, "low": -0.5, "high": -0.125}
    console = rich.console.Console(file=io.StringIO(), width=120)
    compare.print_rows(console, rows, ("accuracy",))
    shown = [line for line in words(console) if isinstance(line, list) or line[0] not in "┏┡├└"]
    assert [line.strip() if isinstance(line, str) else line for line in shown] == [
        ["c", "(2", "of", "3"],
        ["start", "m", "b", "seeds)"],
        ["method.alpha", "0.3", "-"],
        ["optimizer.learning_rate", "0.0001", "0.0002"],
        ["accuracy", "50.0", "%", "60.0", "±", "24.8", "%", "40.0", "%", "20.0", "%"],
        "Means over the seeds 0, 1, 4 ± half-widths of their 95 % intervals (Student's t).",
        "Difference to m, paired by seed, with its 95 % interval",
        ["start", "b", "c", "(2", "of", "3", "seeds)"],
        ["accuracy"] + "-10.0 [-34.8, +14.8] points -20.0 [-44.8, +4.8] points -35.0 [-98.5, +28.5] points".split(),
        "accuracy, other prompts - - -35.0 [-50.0, -12.5] points".split(),
        summary.OTHER_PROMPTS_NOTE,
    ]
    compare.write_comparison(tmp_path / "c.html", rows, {}, ["eval/accuracy"], {}, title="t")
    table = next(table for table in content_of(tmp_path / "c.html")["tables"] if table["title"] == "Differences")
    assert table["head"] == ["", "accuracy", "accuracy, other prompts"]
    assert table["note"].endswith(summary.OTHER_PROMPTS_NOTE)
    assert table["rows"][-1] == ["c (2 of 3 seeds)", "-35.0 [-98.5, +28.5] points", "-35.0 [-50.0, -12.5] points"]


def test_one_seed_has_no_interval_and_the_table_says_so(tmp_path, capsys, untrained):
    recipe = write_recipe(
        tmp_path / "recipe.py", tiny(write_rows(tmp_path / "rows.jsonl"), eval__every=1), {"other": OTHER}
    )
    assert compare.main([f"--config={recipe}", f"--workdir={tmp_path / 'runs'}", "--seeds=3,"]) == 0
    out = capsys.readouterr().out
    assert "Seed 3 only, so there is no interval: a difference can be noise. Give --seeds=8." in out
    assert "±" not in out and "Difference to the recipe" not in out
    rows = json.loads((tmp_path / "runs" / "comparison.json").read_text())
    assert rows["other"]["difference"]["eval/accuracy"] == {"mean": 0.0, "low": None, "high": None}
    assert (tmp_path / "runs" / "comparison.png").read_bytes()[:4] == b"\x89PNG"

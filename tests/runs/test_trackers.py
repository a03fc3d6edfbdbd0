"""Trackers get all metrics and have one run after a resume. No tracker ends a run or makes it wait."""

import json
import pathlib
import sys
import time

import pytest

from helpers.tiny_runs import ROWS, tiny, write_rows
from helpers.trackers import Fake
from jaxrl_reason import config as config_lib
from jaxrl_reason import train
from jaxrl_reason.config import ConfigError, schema
from jaxrl_reason.runs import read_metrics, trackers
from jaxrl_reason.runs.trackers import names, Trackers

NAMES = ("wandb", "trackio", "mlflow")


@pytest.fixture
def fake(monkeypatch):
    """Returns a function that installs a `Fake` as all three packages. Releases hanging functions at the end."""
    made = []
    for variable in ("WANDB_PROJECT", "MLFLOW_EXPERIMENT_NAME"):
        monkeypatch.delenv(variable, raising=False)

    def install(**faults):
        made.append(Fake(**faults))
        for name in NAMES:
            monkeypatch.setitem(sys.modules, name, getattr(made[-1], name))
        return made[-1]

    yield install
    for one in made:
        one.released.set()


def config_of(*names):
    return config_lib.Config(log=config_lib.Log(trackers=list(names)))


def warnings_in(caplog):
    return [record.getMessage() for record in caplog.records]


def test_every_name_of_the_configuration_is_a_tracker():
    assert tuple(trackers.TRACKERS) == schema.TRACKERS == NAMES


@pytest.mark.parametrize(
    "directory, expected",
    [
        ("/runs/hero", ("runs", "hero")),
        ("/runs/hero/supervised", ("runs", "hero/supervised")),
        ("/runs/hero/reward_model", ("runs", "hero/reward_model")),
        ("/home/my runs/hero/seed-3/method/supervised", ("hero", "seed-3/method/supervised")),
        ("/my: runs?/hero", ("my--runs", "hero")),
        ("/hero", ("jaxrl_reason", "hero")),
    ],
)
def test_projects_and_runs_have_the_names_of_directories(directory, expected):
    assert names(pathlib.Path(directory)) == expected


@pytest.mark.parametrize("name", NAMES)
def test_a_tracker_gets_the_configuration_and_every_metric_that_is_finite(name, fake, tmp_path):
    told, directory, config = fake(), tmp_path / "project" / "run", config_of(name)
    directory.mkdir(parents=True)
    with Trackers(config, directory) as found:
        found.log(0, {"eval/pass@4": 0.5, "reward": None})
        found.log(1, {"reward": 2, "flag": True})
    pass_at_4 = "eval/pass_4" if name == "mlflow" else "eval/pass@4"
    assert told.of("log") == [{"step": 0, pass_at_4: 0.5}, {"step": 1, "reward": 2.0, "flag": 1.0}]
    assert told.calls[-1] == ("finish", {})
    (known,) = told.of("init")
    if name == "mlflow":
        assert told.of("set_experiment") == ["project"] and known == {"run_name": "run"}
        assert told.of("log_dict") == [{"config.json": config_lib.to_dict(config)}]
    else:
        assert known["project"] == "project" and known["config"] == config_lib.to_dict(config)
        assert known["name"].startswith("run") and known["resume"] == "allow"


@pytest.mark.parametrize("name", NAMES)
def test_a_resumed_run_goes_on_in_the_same_run_of_its_tracker(name, fake, tmp_path):
    told = fake()
    for step in (1, 2):
        with Trackers(config_of(name), tmp_path) as found:
            found.log(step, {"reward": 0.0})
    key = {"wandb": "id", "trackio": "name", "mlflow": "run_id"}[name]
    first, second = told.of("init")
    kept = json.loads((tmp_path / "trackers.json").read_text())
    assert second[key] == kept[name] and [line["step"] for line in told.of("log")] == [1, 2]
    if name == "trackio":  # trackio finds its runs by name
        assert first[key] == second[key] != tmp_path.name
    if name == "wandb":
        assert first[key] and kept[name] == "given"


def test_another_directory_of_the_same_name_is_another_run(fake, tmp_path):
    told = fake()
    for parent in ("a", "b"):
        directory = tmp_path / parent / "p" / "run"
        directory.mkdir(parents=True)
        with Trackers(config_of("wandb", "trackio"), directory) as found:
            found.log(0, {"reward": 0.0})
    ids = [known.get("id", known["name"]) for known in told.of("init")]
    assert len({*ids}) == 4


@pytest.mark.parametrize("error", [RuntimeError, SystemExit, KeyboardInterrupt])
@pytest.mark.parametrize("where, done", [("init", 0), ("log", 0), ("finish", 3)])
def test_a_tracker_that_raises_gives_one_warning_and_the_others_go_on(
    where, done, error, fake, tmp_path, caplog, monkeypatch
):
    told, other = fake(raises=where, error=error), Fake()
    monkeypatch.setitem(sys.modules, "trackio", other.trackio)
    with Trackers(config_of("wandb", "trackio"), tmp_path) as found:
        for step in range(3):
            found.log(step, {"reward": 0.0})
            time.sleep(0.02)
    (sentence,) = warnings_in(caplog)
    doing = {"init": "start", "log": "log", "finish": "finish"}[where]
    assert sentence == (
        f"The tracker wandb failed to {doing} ({error.__name__}: no {where} here). The run goes on without it; "
        f"{tmp_path / 'metrics.jsonl'} has all metrics."
    )
    assert len(told.of("log")) == done
    assert [name for name, _ in other.calls] == ["init", "log", "log", "log", "finish"]


@pytest.mark.parametrize("where", ["init", "log", "finish"])
def test_a_tracker_that_hangs_delays_the_end_by_a_limit_and_no_step(where, fake, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(trackers, "PATIENCE", 0.3)
    told = fake(hangs=where)
    with Trackers(config_of("wandb"), tmp_path) as found:
        begin = time.monotonic()
        for step in range(5):
            found.log(step, {"reward": 0.0})
        assert time.monotonic() - begin < 0.2
        assert where == "finish" or told.reached.wait(10)
        ending = time.monotonic()
    assert 0.25 < time.monotonic() - ending < 5
    (sentence,) = warnings_in(caplog)
    assert sentence.startswith("The tracker wandb has not taken everything 0 s after the last step. The run goes on")


def test_a_tracker_that_does_not_keep_up_is_left_alone(fake, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(trackers, "WAITING", 3)
    told = fake(hangs="log")
    begin = time.monotonic()
    with Trackers(config_of("wandb"), tmp_path) as found:
        found.log(0, {"reward": 0.0})
        assert told.reached.wait(10)
        for step in range(1, 9):
            found.log(step, {"reward": 0.0})
    assert time.monotonic() - begin < 5  # far below PATIENCE
    (sentence,) = warnings_in(caplog)
    assert sentence.startswith("The tracker wandb does not keep up: the metrics of 3 steps wait. The run goes on")


def test_only_the_first_process_has_trackers(fake, tmp_path):
    told = fake()
    with Trackers(config_of(*NAMES), tmp_path, enabled=False) as found:
        found.log(0, {"reward": 0.0})
    assert told.calls == [] and list(tmp_path.iterdir()) == []


def test_a_damaged_file_of_ids_begins_a_new_run(fake, tmp_path, caplog):
    told = fake()
    (tmp_path / "trackers.json").write_text("{")
    with Trackers(config_of("mlflow"), tmp_path) as found:
        found.log(0, {"reward": 0.0})
    assert told.of("init") == [{"run_name": tmp_path.name}] and "trackers.json is damaged" in caplog.text
    assert json.loads((tmp_path / "trackers.json").read_text()) == {"mlflow": "given"}


def test_a_tracker_that_is_not_installed_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: None)
    config = tiny(write_rows(tmp_path / "rows.jsonl"), log__trackers=["wandb"])
    with pytest.raises(ConfigError) as error:
        train.setup(config, tmp_path / "run")
    assert str(error.value) == (
        "config.log.trackers names 'wandb', which is not installed; run: pip install wandb, or leave it out."
    )
    assert not (tmp_path / "run").exists()


PAIRS = [row | {"chosen": row["solution"], "rejected": "#### no"} for row in ROWS]
PHASES = dict(
    supervised__steps=2,
    reward__functions=["accuracy", "reward_model"],
    reward__weights=[1.0, 0.0],
    reward_model__steps=1,
    reward_model__batch_size=4,
    eval__every=2,
)


@pytest.mark.runs
@pytest.mark.usefixtures("quick_compilation")
def test_all_phases_log_what_they_write_and_a_resumed_run_adds_its_steps(fake, tmp_path):
    rows, work = write_rows(tmp_path / "rows.jsonl", PAIRS), tmp_path / "runs" / "hero"
    logged = {}
    for steps in (2, 3):
        told = fake()
        train.train(train.setup(tiny(rows, **PHASES, steps=steps, log__trackers=["wandb"]), work))
        for name, known in told.calls:
            if name == "init":
                of = logged.setdefault(known["name"], [])
            elif name == "log":
                of.append(known)
    assert sorted(logged) == ["hero", "hero/reward_model", "hero/supervised"]
    for name, lines in logged.items():
        directory = work.parent / name
        written = [
            {k: v for k, v in line.items() if v is not None} for line in read_metrics(directory / "metrics.jsonl")
        ]
        assert lines == written and len(lines) in (2, 4)


@pytest.mark.runs
@pytest.mark.usefixtures("quick_compilation")
@pytest.mark.parametrize("faults", [dict(raises="init"), dict(raises="log"), dict(hangs="log")])
def test_a_run_with_a_faulty_tracker_writes_what_it_writes_without(faults, fake, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(trackers, "PATIENCE", 0.3)
    rows = write_rows(tmp_path / "rows.jsonl")
    found = []
    for chosen in ([], ["wandb"]):
        fake(**faults)
        work = tmp_path / f"run{len(chosen)}"
        train.train(train.setup(tiny(rows, steps=3, log__trackers=chosen), work))
        lines = read_metrics(work / "metrics.jsonl")
        found.append([{k: v for k, v in line.items() if not k.startswith("perf/")} for line in lines])
        assert len(warnings_in(caplog)) == len(chosen)
    assert found[0] == found[1] and len(found[0]) == 3

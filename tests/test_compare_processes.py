"""Tests several processes on one comparison. Each run is trained once. A killed process's run is continued."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import chaos
import pytest

from helpers.documents import ROOT
from helpers.tiny_runs import tiny, write_recipe, write_rows
from jaxrl_reason.runs import read_metrics

pytestmark = pytest.mark.processes
ANNOUNCED = re.compile(r"Run (\d) of 6, seed \d, .*, in (\S+); ")
SLOW = """
import time

def spread(completion_ids, **_):
    time.sleep(0.1)  # so that a run lasts long enough to be hit
    return [sum(ids) % 97 / 97 for ids in completion_ids]
"""


@pytest.fixture
def compare(tmp_path, shared_programs):
    """Returns a function that starts `compare` of two rows with two seeds as a process. NAME.log has its output."""
    (tmp_path / "slow.py").write_text(SLOW)
    config = tiny(
        write_rows(tmp_path / "rows.jsonl"),
        steps=8,
        supervised__steps=4,
        eval__every=4,
        checkpoint__every=1,
        reward__functions=[f"{tmp_path / 'slow.py'}:spread"],
    )
    recipe = write_recipe(tmp_path / "recipe.py", config, {"loo": {"method": {"name": "rloo"}}})
    settings = {name.upper(): str(value) for name, value in shared_programs.items()}
    environment = os.environ | settings | {"JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    processes = []

    def start(name, directory):
        command = [sys.executable, "-m", "jaxrl_reason.compare", f"--config={recipe}", "--seeds=2"]
        with open(tmp_path / f"{name}.log", "w") as log:
            arguments = dict(
                stdout=log, stderr=subprocess.STDOUT, cwd=ROOT, env=environment | {"PYTHONUNBUFFERED": "1"}
            )
            processes.append(subprocess.Popen([*command, f"--workdir={tmp_path / directory}"], **arguments))
        return processes[-1]

    yield start
    for process in processes:
        process.kill()
        process.wait()


def announced(tmp_path, name):
    """Returns the directories of the runs that a process has begun, in order."""
    return [match[2] for match in ANNOUNCED.finditer((tmp_path / f"{name}.log").read_text())]


def wait_for_a_run(tmp_path, name, process):
    """Waits until a process has done two steps of a run, and returns the directory of the run."""
    while process.poll() is None:
        directory = announced(tmp_path, name)[-1:]
        file = tmp_path / directory[0] / "metrics.jsonl" if directory else None
        if file and file.exists() and 3 <= len(read_metrics(file)) < 6:
            return directory[0]
        time.sleep(0.02)
    raise AssertionError((tmp_path / f"{name}.log").read_text())


def outcome(directory):
    rows = json.loads((directory / "comparison.json").read_text())
    for row in rows.values():
        for run in row.get("runs", {}).values():
            del run["seconds"], run["start_seconds"]
    return rows


def test_a_killed_process_is_replaced_and_nothing_differs(compare, tmp_path):
    """Every number of the table, and every file of each run, is equal to the outcome of one process, bit for bit."""
    first, second = compare("first", "shared"), compare("second", "shared")
    killed = wait_for_a_run(tmp_path, "first", first)
    before = {name: announced(tmp_path, name) for name in ("first", "second")}
    first.send_signal(signal.SIGKILL)
    assert second.wait(timeout=600) == 0, (tmp_path / "second.log").read_text()
    assert compare("alone", "alone").wait(timeout=600) == 0, (tmp_path / "alone.log").read_text()

    shared, alone = tmp_path / "shared", tmp_path / "alone"
    after = announced(tmp_path, "second")
    # Both processes had runs at the same time.
    assert before["first"] and before["second"] and not {*before["first"]} & {*before["second"]}
    assert killed in after  # the other process continues it
    assert {*before["first"], *after} == {
        str(shared / f"seed-{s}" / r) for s in (0, 1) for r in ("start", "method", "loo")
    }
    assert len(after) + len(before["first"]) == 7  # only the killed run was begun twice
    assert "Going on from" in (tmp_path / "second.log").read_text()
    assert outcome(shared) == outcome(alone) and len(outcome(alone)["grpo"]["runs"]) == 2
    for directory in announced(tmp_path, "alone"):
        name = os.path.relpath(directory, alone)
        found = chaos.differences(alone / name, shared / name)
        # config.json and the fields in report.html name the directory of the start, and result.json has seconds
        known = lambda line: line.startswith(("config.json", "result.json")) or "('fields', " in line
        assert [line for line in found if not known(line)] == [], name


def test_processes_that_end_together_print_the_same_table(compare, tmp_path):
    first = compare("first", "shared")
    wait_for_a_run(tmp_path, "first", first)
    later = compare("later", "shared")
    assert first.wait(timeout=600) == 0
    assert later.wait(timeout=600) == 0
    begun = announced(tmp_path, "first") + announced(tmp_path, "later")
    assert len(begun) == len({*begun}) == 6
    tables = [
        (tmp_path / f"{name}.log").read_text().partition("Means over the seeds")[2] for name in ("first", "later")
    ]
    assert tables[0] == tables[1] != ""

"""Tests a long run. Memory, time per step, files and threads stay level, and the files on disk grow as documented."""

import dataclasses
import json
import os
import pathlib
import statistics
import subprocess
import sys
import time

import pytest

from helpers.tiny_runs import ROWS, tiny, write_rows
from jaxrl_reason.config import to_dict
from jaxrl_reason.runs import read_metrics

# Runs the command line and records the time of each compilation.
WATCHED = """
import sys, time
import jax
from jaxrl_reason import train

pytestmark = pytest.mark.runs
out = open(sys.argv[1], "a", buffering=1)
def listen(event, _, **details):
    if event == "/jax/core/compile/backend_compile_duration":
        out.write(f"{time.time()} {details.get('fun_name')}\\n")
jax.monitoring.register_event_duration_secs_listener(listen)
sys.exit(train.main(sys.argv[2:]))
"""
REWARD = """
def spread(completion_ids, **_):
    return [sum((i + 1) * token for i, token in enumerate(ids)) % 1009 / 1009 for ids in completion_ids]
"""


@dataclasses.dataclass(frozen=True)
class Sample:
    """The process of a run after a step: resident bytes of the process and of its workers, open files and threads."""

    time: float
    step: int
    memory: int
    workers: int
    files: int
    threads: int


def resident(pid: int | str) -> int:
    """Returns the resident bytes that a process does not share with files, so that libraries do not count."""
    fields = dict(line.split(":", 1) for line in pathlib.Path(f"/proc/{pid}/status").read_text().splitlines())
    return 1024 * int(fields["RssAnon"].split()[0])


def look(pid: int, step: int) -> Sample:
    process = pathlib.Path(f"/proc/{pid}")
    children = [c for task in (process / "task").iterdir() for c in (task / "children").read_text().split()]
    return Sample(
        time.time(),
        step,
        resident(pid),
        sum(map(resident, children)),
        len(os.listdir(process / "fd")),
        len(os.listdir(process / "task")),
    )


def soak(folder: pathlib.Path, steps: int, shared_programs) -> tuple[list[Sample], list[tuple[float, str]]]:
    """Runs `steps` steps in folder/run with evaluations, checkpoints and samples.

    Returns:
      Samples of the process, and the time and the name of each compilation.
    """
    (folder / "rewards.py").write_text(REWARD)
    config = tiny(
        write_rows(folder / "rows.jsonl", ROWS),
        steps=steps,
        reward__functions=["match_answer", f"{folder / 'rewards.py'}:spread"],
        update__minibatches=2,
        checkpoint__every=steps // 20,
        eval__every=steps // 10,
        log__samples_every=steps // 40,
        log__tensorboard=True,
    )
    recipe, compiled = folder / "recipe.py", folder / "compiled.txt"
    recipe.write_text(
        f"from jaxrl_reason.config import from_dict\ndef get_config():\n    return from_dict({to_dict(config)!r})\n"
    )
    command = [sys.executable, "-c", WATCHED, compiled, f"--config={recipe}", f"--workdir={folder / 'run'}"]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"} | {k.upper(): str(v) for k, v in shared_programs.items()}
    samples, metrics, done = [], folder / "run" / "metrics.jsonl", 0
    with open(folder / "said.txt", "wb") as out:
        process = subprocess.Popen(command, env=environment, stdout=out, stderr=out)
    try:
        position = 0
        while process.poll() is None:
            time.sleep(0.1)
            if not metrics.exists():
                continue
            with open(metrics, "rb") as lines:
                lines.seek(position)
                new = lines.read()
            position, done = position + len(new), done + new.count(b"\n")
            try:
                if new:
                    samples.append(look(process.pid, done - 1))  # the first line is of step 0
            except (OSError, KeyError):  # the process or one of its workers has just ended
                continue
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 0, (folder / "said.txt").read_text()[-3000:]
    return samples, [(float(when), name) for when, name in map(str.split, compiled.read_text().splitlines())]


def slope(points: list[tuple[float, float]]) -> float:
    """Returns the slope of the line of least squares through the points."""
    mean = [statistics.fmean(x) for x in zip(*points)]
    return sum((x - mean[0]) * (y - mean[1]) for x, y in points) / sum((x - mean[0]) ** 2 for x, _ in points)


@pytest.mark.slow
@pytest.mark.parametrize("steps", [160, 2000])
def test_a_long_run_takes_no_more_memory_time_or_handles_as_it_goes_on(steps, tmp_path, shared_programs):
    samples, compiled = soak(tmp_path, steps, shared_programs)
    lines = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(steps + 1))
    quarter = [[s for s in samples if i * steps <= 4 * s.step < (i + 1) * steps] for i in range(4)]
    late = quarter[2] + quarter[3]
    files = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    sizes = {name: sum(p.stat().st_size for p in files if name in str(p)) for name in ("metrics", "samples", "events")}
    seconds = [line["perf/step_seconds"] for line in lines[1:]]
    quarters = [statistics.median(seconds[i * steps // 4 : (i + 1) * steps // 4]) for i in range(4)]
    grows = {name: slope([(s.step, getattr(s, name)) for s in late]) * 1000 / 2**20 for name in ("memory", "workers")}
    found = {
        "MiB at the end": [late[-1].memory / 2**20, late[-1].workers / 2**20],
        "MiB in 1,000 steps": grows,
        "median seconds of a step, by quarters": quarters,
        "bytes a step": {name: size / steps for name, size in sizes.items()},
        # The minimum of a quarter, because a save opens more files while it lasts.
        "open files, by quarters": [min(s.files for s in q) for q in quarter],
        "open files at most": max(s.files for s in samples),
        "threads, by quarters": [min(s.threads for s in q) for q in quarter],
        "threads at most": max(s.threads for s in samples),
        "compiled": len(compiled),
    }
    print(json.dumps(found, indent=1))
    warm = next(s.time for s in samples if s.step > steps // 10)  # after an evaluation, a checkpoint and samples
    assert [name for when, name in compiled if when > warm] == [] and compiled
    assert quarters[3] < 1.5 * quarters[1], found
    for held in ("open files", "threads"):
        assert found[f"{held}, by quarters"][3] <= found[f"{held}, by quarters"][1] + 2, found
        assert found[f"{held} at most"] < 64, found
    # A save leaves about 0.1 MB with the allocator, and later saves leave less. So a short run grows faster.
    assert grows["memory"] < (5 if steps >= 2000 else 100) and grows["workers"] < 1, found
    # The texts are short. A line of samples has about 200 bytes more than its texts, and 15 bytes more per token.
    assert found["bytes a step"]["metrics"] < 2000 and found["bytes a step"]["events"] < 2000, found
    completions = (tmp_path / "run" / "samples.jsonl").read_bytes().count(b"\n")
    assert completions == 40 * 8 and sizes["samples"] < (300 + 6 * 15) * completions, found  # 40 tables of 8

"""In two processes, compare, reward_training, export and generate give the results of one process."""

import json

import numpy as np
import pytest

from helpers.processes import finish, launch, run_command
from helpers.tiny_runs import ROWS, tiny, write_recipe, write_rows
from jaxrl_reason.runs import read_metrics

pytestmark = pytest.mark.processes
PAIRS = [row | {"chosen": row["solution"], "rejected": f"#### {i + 1}"} for i, row in enumerate(ROWS)]


@pytest.fixture(scope="module")
def recipes(tmp_path_factory):
    """Returns a folder, and the recipes for one and for two processes."""
    folder = tmp_path_factory.mktemp("commands_on_hosts")
    rows = write_rows(folder / "rows.jsonl", PAIRS)

    def recipe(name, **changes):
        sizes = dict(prompts_per_step=8, group_size=4, supervised__batch_size=8, optimizer__eps=1e-5, eval__every=2)
        config = tiny(rows, **sizes, mesh__host_timeout=20, **changes)
        return write_recipe(folder / f"{name}.py", config, {"loo": {"method": {"name": "rloo"}}})

    start = dict(supervised__steps=2, reward__functions=["match_answer"])
    judged = dict(
        reward__functions=["match_answer", "reward_model"],
        reward__weights=[1.0, 0.0],
        reward_model__steps=3,
        reward_model__batch_size=8,
    )
    return folder, {
        (kind, n): recipe(f"{kind}{n}", mesh__fsdp=n, **options)
        for n in (1, 2)
        for kind, options in (("compared", start), ("judged", judged))
    }


def run(command, recipes, shared_programs, kind):
    """Runs a command by one and by two processes. Returns both work directories and the outputs of two processes."""
    folder, files = recipes
    for n in (1, 2):
        flags = [f"--config={files[kind, n]}", f"--workdir={folder / f'{command}{n}'}"]
        outputs = run_command(command, flags, shared_programs, processes=n)
    return folder / f"{command}1", folder / f"{command}2", outputs


@pytest.fixture(scope="module")
def compared(recipes, shared_programs):
    return run("compare", recipes, shared_programs, "compared")


@pytest.fixture(scope="module")
def judged(recipes, shared_programs):
    return run("reward_training", recipes, shared_programs, "judged")


def close(one, two):
    """Asserts that trees of numbers and texts are equal up to rounding."""
    if isinstance(one, dict):
        assert one.keys() == two.keys()
        for name in one:
            close(one[name], two[name])
    elif isinstance(one, float):
        np.testing.assert_allclose(two, one, rtol=1e-4, atol=1e-5)
    else:
        assert one == two


def without_times(line):
    return {name: x for name, x in line.items() if not name.startswith(("perf/", "sampling/logp_difference"))}


def test_compare(compared):
    one, two, ((first, _), (other, _)) = compared
    rows = [json.loads((directory / "comparison.json").read_text()) for directory in (one, two)]
    for row in (row for found in rows for row in found.values()):
        for name in ("difference", "half_width", "runs"):  # these are quotients of rounding errors, or seconds
            row.pop(name, None)
    assert list(rows[0]) == ["start", "grpo", "loo"]
    close(*rows)
    for name in ("start/supervised", "method", "loo"):
        lines = [read_metrics(directory / "seed-0" / name / "metrics.jsonl") for directory in (one, two)]
        assert len(lines[0]) == len(lines[1]) > 1
        for pair in zip(*lines):
            close(*map(without_times, pair))
    assert "Run 3 of 3, seed 0, the baseline 'loo'" in first and "comparison.json" in first
    assert not [line for line in other.splitlines() if "Gloo" not in line]


def test_a_finished_comparison_on_two_processes_says_so(compared, recipes, shared_programs):
    _, two, _ = compared
    folder, files = recipes
    before = (two / "comparison.json").read_bytes()
    flags = [f"--config={files['compared', 2]}", f"--workdir={two}"]
    (first, _), _ = run_command("compare", flags, shared_programs, processes=2)
    assert "3 of 3 runs are finished." in first and (two / "comparison.json").read_bytes() == before


def test_reward_training(judged):
    one, two, ((first, _), (other, _)) = judged
    lines = [read_metrics(directory / "reward_model" / "metrics.jsonl") for directory in (one, two)]
    assert [line["step"] for line in lines[1]] == [0, 1, 2, 3]
    for pair in zip(*lines):
        close(*map(without_times, pair))
    assert "The reward model starts from random weights" in first
    assert not [line for line in other.splitlines() if "Gloo" not in line]


@pytest.mark.parametrize("switches", [[], ["--reward-model"]])
def test_export(switches, compared, judged, shared_programs, tmp_path):
    workdir = judged[1] if switches else compared[1] / "seed-0" / "method"
    for n in (1, 2):
        flags = [f"--workdir={workdir}", f"--out={tmp_path / str(n) / 'model'}", *switches]
        outputs = run_command("export", flags, shared_programs, processes=n)
    one, two = ({p.name: p.read_bytes() for p in (tmp_path / n / "model").iterdir()} for n in "12")
    assert one == two and len(one["model.safetensors"]) > 1000
    assert "is in" in outputs[0][0] and "is in" not in outputs[1][0]


def test_generate(compared, shared_programs, tmp_path):
    workdir = compared[1] / "seed-0" / "method"
    found = []
    for n in (1, 2):
        out = tmp_path / f"{n}.jsonl"
        flags = [f"--workdir={workdir}", f"--out={out}", "--prompt=Write 3.", "--prompt=Write 17.", "--samples=3"]
        outputs = run_command("generate", [*flags, f"--config.mesh.fsdp={n}"], shared_programs, processes=n)
        found.append([json.loads(line) for line in out.read_text().splitlines()])
    for one, two in zip(*found, strict=True):
        assert one["prompt"] == two["prompt"] and len(one["samples"]) == 3
        for pair in zip(one["samples"], two["samples"], strict=True):
            close(*pair)
    assert outputs[0][0].count("log-probability") == 6
    assert not [line for line in outputs[1][0].splitlines() if "Gloo" not in line]


def test_a_session_on_two_processes_is_refused(compared, shared_programs):
    env = {k.upper(): str(v) for k, v in shared_programs.items()}
    flags = [f"--workdir={compared[1] / 'seed-0' / 'method'}"]
    ended = finish(launch(["-m", "jaxrl_reason.generate", *flags], 2, env=env))
    assert [code for code, _, _ in ended] == [2, 2]
    assert any("A session runs on one process" in err for _, _, err in ended)

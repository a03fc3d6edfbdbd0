"""The notebooks run again, headless, and agree with their stored outputs."""

import json
import os
import re
import subprocess
import sys

import pytest

from helpers.notebooks import (
    BY_HAND,
    COLAB,
    execute,
    images,
    INSTALL,
    METHODS,
    NOTEBOOKS,
    outputs_of,
    read,
    text,
    TRAINS,
    write_session,
    write_stand_in,
)
from jaxrl_reason import methods, models, runs
from jaxrl_reason.runs import result_tables, results
from jaxrl_reason.tasks import BASELINES

STUDIES = COLAB.parent / "configs" / "results"
STORED = dict.fromkeys(NOTEBOOKS, 1) | dict.fromkeys(METHODS, 2) | {"kaggle_v5e8": 0}  # numbers of pictures


@pytest.mark.parametrize("notebook", NOTEBOOKS)
def test_a_notebook_is_short_and_stored_with_its_outputs(notebook):
    stored = read(notebook)
    assert len(stored.cells) <= (12 if notebook in ("tpu_qwen", "kaggle_v5e8") else 14)
    assert images(stored) == STORED[notebook]
    counts = [cell.execution_count for cell in stored.cells if cell.cell_type == "code"]
    assert counts == list(range(1, len(counts) + 1))  # executed once, from top to bottom
    assert not any(output.output_type == "error" for output in outputs_of(stored))


@pytest.mark.parametrize("notebook", NOTEBOOKS)
def test_stored_outputs_have_no_paths_of_a_machine(notebook):
    assert not re.findall(r"/(?:tmp|root|home|work|Users|private|var)/[^\s<]*", json.dumps(outputs_of(read(notebook))))


def test_every_method_has_a_notebook():
    extensions = {name for name in methods.names() if "base" in methods.keywords(name)}
    assert set(METHODS) == extensions <= set(NOTEBOOKS)


@pytest.mark.parametrize("notebook", METHODS)
def test_notebooks_of_methods_have_the_same_order_and_name_paper_and_recipe(notebook):
    cells = read(notebook).cells
    assert len(cells) <= 12
    headings = [cell.source.partition("\n")[0] for cell in cells if cell.cell_type == "markdown"]
    study = ["## The study"] if (STUDIES / f"{notebook}.jsonl").exists() else []
    assert headings[1:] == ["## The formula", "## A small recipe", "## The curves", *study, "## How to read it"]
    paper = re.search(r"arXiv (\d{4}\.\d{5})", (COLAB.parent / "configs" / f"{notebook}.py").read_text())[1]
    assert f"[arXiv {paper}](https://arxiv.org/abs/{paper})" in cells[0].source
    assert "$$" in cells[2].source
    assert f"../configs/README.md#{notebook})" in cells[-1].source and "Two seeds decide nothing" in cells[-1].source


@pytest.mark.parametrize("notebook", METHODS)
def test_a_group_of_four_by_hand_is_as_the_library_computes_it(notebook, capsys):
    cell = read(notebook).cells[BY_HAND]
    assert "assert_allclose(ours" in cell.source
    exec(compile(cell.source, notebook, "exec"), {})
    [stored] = cell.outputs
    assert capsys.readouterr().out == stored.text


@pytest.mark.parametrize("notebook", [name for name in METHODS if (STUDIES / f"{name}.jsonl").exists()])
def test_the_table_of_a_study_is_of_its_results(notebook):
    """After a failure, run: cd tests && python -m helpers.notebooks --keep-runs NOTEBOOK"""
    table = next(out for out in outputs_of(read(notebook)) if "text/markdown" in out.get("data", ()))
    entries = results.read(STUDIES / f"{notebook}.jsonl")
    lines = table.data["text/markdown"].splitlines()
    columns = [name.replace(" ", "_") for name in lines[0].strip("| ").split(" | ")]
    assert table.data["text/markdown"] == result_tables.markdown(entries, columns, BASELINES)


def test_one_step_fits_on_a_screen():
    assert max(cell.source.count("\n") for cell in read("one_step").cells) < 60


INSTALLING = """
import importlib.util, pathlib, subprocess, sys
sys.path[:0] = [{cwd!r}, {site!r}]
from IPython.core.interactiveshell import InteractiveShell
shell = InteractiveShell.instance()
def system(command):
    command = command.replace(sys.executable + " -m pip", "echo")
    print(subprocess.run(["sh", "-c", command], capture_output=True, text=True, check=True).stdout)
    pathlib.Path({site!r}, "jaxrl_reason").symlink_to({package!r})
shell.system = system
shell.run_cell({cell!r}).raise_error()
importlib.invalidate_caches()
print(importlib.util.find_spec("jaxrl_reason").origin)
"""


@pytest.mark.parametrize("where", ["colab", "a folder that holds the clone"])
@pytest.mark.parametrize("notebook", NOTEBOOKS)
def test_after_installing_the_package_is_found(notebook, where, tmp_path):
    """A fake pip records its arguments. As in a notebook, the folder is on the path, and it may hold the clone."""
    repository, site = COLAB.parent, tmp_path / "site-packages"
    site.mkdir()
    if where == "colab":
        place, clone = COLAB, ".."
    else:
        place, clone = tmp_path / "folder", "./jaxrl_reason"
        place.mkdir()
        (place / "jaxrl_reason").symlink_to(repository)
    cell = read(notebook).cells[INSTALL].source
    assert "\n" not in cell
    script = INSTALLING.format(cwd=str(place), site=str(site), package=str(repository / "jaxrl_reason"), cell=cell)
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    process = subprocess.run([sys.executable, "-c", script], cwd=place, capture_output=True, text=True, env=environment)
    assert process.returncode == 0, process.stderr
    arguments, _, *_, origin = process.stdout.split("\n")[:-1]
    extra = {"one_step": "", "genre2": "[tpu,tables]"}.get(notebook, "[tpu]")
    assert arguments.split() == ["install", "-q", clone + extra]
    assert origin == str(site / "jaxrl_reason" / "__init__.py")


def rewards(notebook) -> list[float]:
    return [float(x) for x in re.findall(r"reward (\d\.\d+)  error", text(notebook))]


@pytest.mark.runs
def test_one_step_learns_as_stored(tmp_path):
    done = execute("one_step", tmp_path)
    again, stored = rewards(done), rewards(read("one_step"))
    assert len(again) == len(stored) and images(done) == images(read("one_step"))
    assert again[0] == pytest.approx(stored[0], abs=0.02) and again[0] < 0.2
    assert again[-1] == pytest.approx(stored[-1], abs=0.05) and again[-1] > 0.9


def accuracies(notebook) -> list[float]:
    """Returns the accuracy before and after RL, in percent."""
    return [float(x) for x in re.findall(r"accuracy +│ +(\d+\.\d) % │ +(\d+\.\d) %", text(notebook))[0]]


@pytest.mark.slow
def test_the_quickstart_runs_headless(tmp_path, monkeypatch):
    monkeypatch.setenv("STEPS", "5")
    monkeypatch.setenv("SUPERVISED_STEPS", "4")
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    done = execute("quickstart", tmp_path)
    assert images(done) == images(read("quickstart"))
    assert "accuracy" in text(done) and "advantage" in text(done)


@pytest.mark.slow
def test_the_quickstart_learns_as_stored(tmp_path, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    again, stored = accuracies(execute("quickstart", tmp_path)), accuracies(read("quickstart"))
    assert again == pytest.approx(stored, abs=8)
    assert again[1] > again[0] + 25


@pytest.mark.slow
def test_qwen_runs_headless_and_is_exported(tmp_path, monkeypatch):
    """The stored outputs have the same small model and problems."""
    for name, value in write_stand_in(tmp_path).items():
        monkeypatch.setenv(name, value)
    done = execute("tpu_qwen", tmp_path)
    shown, stored = text(done), text(read("tpu_qwen"))
    assert images(done) == images(read("tpu_qwen"))
    assert "accuracy" in shown and "advantage" in shown
    assert "<user>1 + " in shown and "<think></think>" in shown  # a sample, in the chat of the model without thinking
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 1, 2]
    exported = models.load_pretrained(tmp_path / "run" / "model")
    assert exported.config.qk_norm and not exported.config.lora_rank
    assert "config.json" in shown and "model.safetensors" in shown
    assert shown.splitlines()[-1] == stored.splitlines()[-1]  # the files of the export


@pytest.mark.runs
@pytest.mark.parametrize("notebook", [*(pytest.param(x, marks=pytest.mark.slow) for x in METHODS[:-1]), METHODS[-1]])
def test_cells_of_a_method_that_do_not_train_are_as_stored(notebook, tmp_path):
    """The cells print the recipe. After a failure, run: cd tests && python -m helpers.notebooks --keep-runs NOTEBOOK"""
    again, stored = execute(notebook, tmp_path, train=False), read(notebook)
    assert text(again) == text(stored) and images(again) == images(stored)
    assert sum(TRAINS in cell.metadata.get("tags", ()) for cell in stored.cells) == 2


@pytest.mark.slow
@pytest.mark.parametrize("notebook", METHODS)
def test_the_notebook_of_a_method_runs_headless(notebook, tmp_path, monkeypatch):
    for name, value in dict(STEPS=2, SUPERVISED_STEPS=4, REWARD_MODEL_STEPS=4, TFDS_DATA_DIR=tmp_path).items():
        monkeypatch.setenv(name, str(value))
    done = execute(notebook, tmp_path)
    assert images(done) == images(read(notebook))
    assert "paired by seed, with its 95 % interval" in text(done)


@pytest.mark.slow
def test_a_kaggle_session_continues_the_attached_output_of_the_one_before(tmp_path, monkeypatch):
    """The first session ends when its time is over, and the second one ends after its last step."""

    def session(number: int, steps: int, seconds: int) -> tuple[str, list[int]]:
        for name, value in write_session(tmp_path, steps, seconds).items():
            monkeypatch.setenv(name, value)
        shown, output = text(execute("kaggle_v5e8", tmp_path / f"session{number}")), tmp_path / "working"
        done = [line["step"] for line in runs.read_metrics(output / "run" / "metrics.jsonl")]
        assert shown.count("  accuracy ") == len(done)
        assert shown.splitlines()[-1] == text(read("kaggle_v5e8")).splitlines()[-1]  # the files of the export
        (tmp_path / "input").mkdir(exist_ok=True)
        output.rename(tmp_path / "input" / f"version{number}")
        return shown, done

    shown, done = session(1, steps=10**6, seconds=90)
    last = done[-1]
    assert done == list(range(last + 1)) and last > 0
    assert f"Asked to end, and saved after step {last}:" in shown and "Continuing" not in shown
    shown, done = session(2, steps=last + 1, seconds=600)
    assert done == list(range(last + 2))
    assert f"Continuing the attached run from step {last}." in shown and "Asked to end" not in shown

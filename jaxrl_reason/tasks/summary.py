"""The end of a run: a table of the evaluations before and after training, and the learning curve."""

import dataclasses
import pathlib
from typing import Any

import rich.console

from jaxrl_reason.config import Config
from jaxrl_reason.methods import Method
from jaxrl_reason.models.formats.weights import read_json
from jaxrl_reason.rl import hosts
from jaxrl_reason.runs import pictures, read_metrics
from jaxrl_reason.runs.files import write_json
from jaxrl_reason.tasks.reporting import BASELINES, headlines


def picture_of(workdir: pathlib.Path) -> pathlib.Path:
    """Returns the file of the learning curve. A run draws it last: if it exists, the run has reported."""
    return workdir / "learning_curve.png"


_SETTINGS = "eval_settings.json"
_EARLIER = "evaluation.json"  # its name in work directories of earlier versions


def evaluation_settings(config: Config) -> dict[str, Any]:
    """Returns the settings of an evaluation. Two evaluations are compared only if these are equal."""
    return dataclasses.asdict(config.eval) | {"every": None}


def write_settings(workdir: pathlib.Path, config: Config) -> None:
    """Writes the settings of the evaluation before training to eval_settings.json."""
    write_json(workdir / _SETTINGS, evaluation_settings(config))


def _measured_alike(workdir: pathlib.Path, config: Config) -> bool:
    """Returns whether the evaluation before training had the settings of the configuration."""
    files = [file for name in (_SETTINGS, _EARLIER) if (file := workdir / name).exists()]
    return bool(files) and read_json(files[0]) == evaluation_settings(config)


def report(
    workdir: pathlib.Path, config: Config, method: Method, console: rich.console.Console
) -> dict[str, dict[str, float]]:
    """Prints the table of before and after, and draws the learning curve.

    Returns {"before": the evaluation of step 0, "after": the last later one}, without evaluations that were not made,
    and without the first if config.eval has changed since. Empty on all processes but the first.
    """
    if not hosts.is_first():
        return {}
    metrics_path, picture = workdir / "metrics.jsonl", picture_of(workdir)
    evaluations: dict[str, dict[str, float]] = {}
    baselines: dict[str, float] = {}
    for line in read_metrics(metrics_path):
        if any(name.startswith("eval/") for name in line):
            metrics = {k: v for k, v in line.items() if k.startswith("eval/") and k != "eval/prompts"}
            evaluations["after" if line["step"] else "before"] = metrics
        baselines |= {k: v for k, v in line.items() if k.startswith(BASELINES)}
    if "before" in evaluations and not _measured_alike(workdir, config):
        console.print(
            "The evaluation before training is not compared, because config.eval has changed since.", soft_wrap=True
        )
        del evaluations["before"]
    if evaluations:
        shown = tuple(f"eval/{name}" for name in headlines(method))
        before, after = (
            {k: v for k, v in evaluations.get(side, {}).items() if k.startswith(shown)} for side in ("before", "after")
        )
        pictures.print_summary(console, before, after)
        if note := pictures.unit_note([*before, *after]):
            console.print(note, soft_wrap=True)
    if baselines:
        console.print("Baselines: " + ", ".join(f"{name} {pictures.cell(name, x)}" for name, x in baselines.items()))
    scratch = picture.with_suffix(".tmp")
    pictures.plot_learning_curve(metrics_path, scratch, title=workdir.name)
    scratch.replace(picture)
    console.print(f"Learning curve: {picture}", soft_wrap=True)
    if (page := workdir / "report.html").exists():
        console.print(f"Report: {page}", soft_wrap=True)
    return evaluations

"""The end of a run: a table of the evaluations before and after training, and the learning curve."""

import pathlib

import rich.console

from jaxrl_reason.config import Config
from jaxrl_reason.methods import Method
from jaxrl_reason.rl import hosts
from jaxrl_reason.runs import eval_settings, pictures, read_metrics
from jaxrl_reason.tasks.reporting import BASELINES, headlines


def picture_of(workdir: pathlib.Path) -> pathlib.Path:
    """Returns the file of the learning curve. A run draws it last: if it exists, the run has reported."""
    return workdir / "learning_curve.png"


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
    lines, evaluated = read_metrics(metrics_path), 0
    for line in lines:
        if any(name.startswith("eval/") for name in line):
            metrics = {k: v for k, v in line.items() if k.startswith("eval/") and k != "eval/prompts"}
            evaluations["after" if line["step"] else "before"], evaluated = metrics, line["step"]
        baselines |= {k: v for k, v in line.items() if k.startswith(BASELINES)}
    if "before" in evaluations and not eval_settings.are_those_of(workdir, config):
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
        if after and evaluated < lines[-1]["step"]:
            console.print(f"The last evaluation was after step {evaluated}.", soft_wrap=True)
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

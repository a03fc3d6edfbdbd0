"""Evaluates a run on held-out data.

Samples several completions per prompt, scores them by the run's rewards, and prints a table. Writes evaluation.json
(every number), evaluation.png and completions.jsonl (predictions.jsonl if a run predicts numbers) to WORKDIR/evaluation,
and those of another evaluation to evaluation-2, evaluation-3, ... Nothing else in the work directory changes, but
rewards.log takes what rewards print. Fields of the configuration on which the weights do not depend can be set as in
training: --config.seed=1, --config.mesh.fsdp=-1 on another number of devices, --config.data.columns={} if other data
have other names.
"""

import math
import pathlib
import sys
from typing import Any, NamedTuple

import jax
import rich.console

from jaxrl_reason import config as config_lib
from jaxrl_reason import models, runs, tasks
from jaxrl_reason.config import Config
from jaxrl_reason.data import PromptBatch
from jaxrl_reason.rewards import model_training, RewardError
from jaxrl_reason.rewards.scorer import LEARNED
from jaxrl_reason.rl import programs as programs_lib
from jaxrl_reason.rl.types import Rollout
from jaxrl_reason.runs import command, compilation_cache
from jaxrl_reason.runs.command import Flag
from jaxrl_reason.runs.progress import Progress
from jaxrl_reason.tasks import reporting, self_reward


class Evaluation(NamedTuple):
    """An evaluation before its first prompt."""

    config: Config  # with the fields of the command line
    task: tasks.Task
    programs: programs_lib.Programs
    params: models.Params  # the weights of the checkpoint, as rollouts read them
    reference: self_reward.ProbeReference  # of LaSeR's self-rewards
    workdir: pathlib.Path
    out: pathlib.Path | None  # the directory of the results that the command line names
    record: dict[str, Any]  # the first part of evaluation.json


def prepare(arguments: command.Arguments) -> Evaluation:
    """Reads run and held-out data; a ConfigError, RewardError, ValueError or OSError names the cause and its place."""
    command.load_recipe(arguments)
    workdir, out = arguments.workdir, arguments.out
    c = runs.load_config(workdir, arguments.fields)
    compilation_cache.enable(c.compilation_cache)
    method = config_lib.make_method(c)
    mesh = programs_lib.make_mesh(c)
    task = tasks.open_for_evaluation(c, method, mesh, workdir)
    if LEARNED.keys() & set(c.reward.functions):
        task = task.with_reward_model(model_training.load_scorer(c, workdir, mesh, len(task.held_out[0].rows)))
    programs = tasks.build_programs(c, method, task, mesh)
    shapes, shardings = models.abstract_params(task.model), models.param_shardings(task.model, mesh)
    like = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)
    number, params = runs.load_weights(workdir, arguments.checkpoint, like, task.model)
    reference = self_reward.read_reference(method, programs, workdir, params, task.model)
    record = {"command": arguments.command_line, "workdir": str(workdir), **_record(c, task, number)}
    reporting.results_directory(out, workdir, record)  # before the work, which would be lost without a directory
    return Evaluation(c, task, programs, programs.rollout_weights(params), reference, workdir, out, record)


def evaluate(evaluation: Evaluation) -> dict[str, float]:
    """Samples, scores, prints the table, writes the results and returns the metrics. Raises RewardError, OSError."""
    c, task, programs, params, reference, workdir, out, record = evaluation
    console = rich.console.Console(highlight=False, markup=False)
    with Progress(console, "evaluation", len(task.held_out), enabled=c.log.progress) as bar:

        def generate(batch: PromptBatch) -> Rollout:
            rollout = jax.block_until_ready(programs.generate_eval(params, batch))
            bar.advance("")
            return rollout

        judged = task.judge(generate, task.scorer, reference)

    metrics = judged.metrics()
    numbers = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
    record = record | {"prompts": metrics["prompts"], "metrics": numbers}
    title = f"{workdir.name}, {record['phase']}, on {task.source[0]} ({c.data.eval_split})"
    out = reporting.results_directory(out, workdir, record)
    files = reporting.write_results(out, judged, metrics, record, title)
    for table in reporting.metric_tables(metrics, title):
        console.print(table)
    console.print(f"Written: {out}/{', '.join(files)}", soft_wrap=True)
    return metrics


def _record(c: Config, task: tasks.Task, checkpoint: int) -> dict[str, Any]:
    """Returns the content of evaluation.json that is known before the evaluation."""
    step, (name, fingerprint) = checkpoint - c.supervised.steps, task.source
    return {
        "checkpoint": checkpoint,
        "phase": f"RL step {step}" if step >= 0 else f"supervised step {checkpoint}",
        "data": {"name": name, "split": c.data.eval_split, "fingerprint": fingerprint},
        "samples": c.eval.samples,
        "temperature": c.eval.temperature,
        "max_completion_length": c.max_completion_length,
        "seed": c.seed,
        "rewards": dict(task.scorer.weights),
        "verdict": task.verdict,
        "config": config_lib.to_dict(c),
    }


COMMAND = command.Command(
    "evaluate",
    __doc__,
    (
        command.WORKDIR,
        Flag(
            "data",
            "NAME_OR_PATH",
            "other data, as config.data.eval; the split is then test, or all of a file",
            field="data.eval",
        ),
        Flag("split", "SPLIT", "as config.data.eval_split", field="data.eval_split"),
        Flag("prompts", "N", "the largest number of prompts; config.eval.prompts by default", field="eval.prompts"),
        Flag(
            "samples",
            "K",
            "completions per prompt; config.eval.samples by default, 1 at temperature 0",
            field="eval.samples",
        ),
        Flag("temperature", "T", "0 is greedy; config.eval.temperature by default", field="eval.temperature"),
        command.RECIPE,
        command.CHECKPOINT,
        Flag("out", "DIR", "the directory of the results; WORKDIR/evaluation or evaluation-N by default", command.path),
        Flag("config.", "FIELD=VALUE", "sets a field of the configuration"),
    ),
    "--workdir=/tmp/quickstart --samples=16",
    errors=(RewardError,),
)


def main(argv: list[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    return command.run(COMMAND, argv, prepare, evaluate)


if __name__ == "__main__":
    sys.exit(main())

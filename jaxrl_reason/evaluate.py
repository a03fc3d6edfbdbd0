"""Evaluates a run, or a pretrained model, on held-out data.

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
from jaxrl_reason import tasks
from jaxrl_reason.config import Config, ConfigError
from jaxrl_reason.data import PromptBatch
from jaxrl_reason.rewards import model_training, RewardError
from jaxrl_reason.rewards.scorer import LEARNED
from jaxrl_reason.rl import programs as programs_lib
from jaxrl_reason.rl.types import Rollout
from jaxrl_reason.runs import command
from jaxrl_reason.runs.command import Flag
from jaxrl_reason.runs.progress import Progress
from jaxrl_reason.tasks import policies, reporting
from jaxrl_reason.tasks.policies import chosen_source, LoadedPolicy, open_policy, OpenedPolicy


class Evaluation(NamedTuple):
    """An evaluation before its first prompt."""

    name: str  # of the policy
    config: Config  # with the fields of the command line
    task: tasks.Task
    programs: programs_lib.Programs
    policy: LoadedPolicy
    out: pathlib.Path  # the directory of the results
    record: dict[str, Any]  # the first part of evaluation.json


def prepare(arguments: command.Arguments) -> Evaluation:
    """Opens policy and held-out data; a ConfigError, RewardError, ValueError or OSError names the cause and its place."""
    command.load_recipe(arguments)
    source, fields = chosen_source(arguments.workdir, arguments.model), arguments.fields
    if arguments.model:
        if not arguments.out:
            raise ConfigError("--out=DIR is missing: a model has no work directory for the results.")
        if not fields.get("data.eval"):
            raise ConfigError("--data=NAME_OR_PATH is missing: a model has no held-out data of its own.")
        fields = {"data.template": "boxed"} | fields
    opened = open_policy(source, fields, arguments.checkpoint)
    c, method, mesh = opened.config, opened.method, opened.mesh
    home = opened.workdir or arguments.out
    task = tasks.open_for_evaluation(opened, c, home)
    if LEARNED.keys() & set(c.reward.functions):
        task = task.with_reward_model(
            model_training.load_scorer(c, home, opened.tokenizer, mesh, len(task.held_out[0].rows))
        )
    policy, programs = opened.load(), tasks.build_programs(c, method, task, mesh)
    record = {"command": arguments.command_line, **_record(opened, c, task, policy.checkpoint)}
    out = reporting.results_directory(arguments.out, home, record)  # before the work, which would be lost without one
    return Evaluation(opened.name, c, task, programs, policy, out, record)


def evaluate(evaluation: Evaluation) -> dict[str, float]:
    """Samples, scores, prints the table, writes the results and returns the metrics. Raises RewardError, OSError."""
    name, c, task, programs, policy, out, record = evaluation
    console = rich.console.Console(highlight=False, markup=False)
    with Progress(console, "evaluation", len(task.held_out), enabled=c.log.progress) as bar:

        def generate(batch: PromptBatch) -> Rollout:
            rollout = jax.block_until_ready(programs.generate_eval(policy.weights, batch))
            bar.advance("")
            return rollout

        judged = task.judge(generate, task.scorer, policy.reference)

    metrics = judged.metrics()
    numbers = {key: value if math.isfinite(value) else None for key, value in metrics.items()}
    record = record | {"prompts": metrics["prompts"], "metrics": numbers}
    title = f"{name}, {record['phase']}, on {task.source[0]} ({c.data.eval_split})"
    files = reporting.write_results(out, judged, metrics, record, title)
    for table in reporting.metric_tables(metrics, title):
        console.print(table)
    console.print(f"Written: {out}/{', '.join(files)}", soft_wrap=True)
    return metrics


def _record(opened: OpenedPolicy, c: Config, task: tasks.Task, checkpoint: int | None) -> dict[str, Any]:
    """Returns the content of evaluation.json that is known before the evaluation."""
    name, fingerprint = task.source
    step = (checkpoint or 0) - c.supervised.steps
    phase = f"RL step {step}" if step >= 0 else f"supervised step {checkpoint}"
    return {
        **({"workdir": str(opened.workdir)} if opened.workdir else {"model": c.model.path}),
        "checkpoint": checkpoint,
        "phase": phase if opened.workdir else "pretrained",
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
        policies.WORKDIR,
        policies.MODEL,
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
        Flag(
            "max_completion_length",
            "N",
            "the largest number of tokens per completion; config.max_completion_length by default",
            field="max_completion_length",
            alias="max-completion-length",
        ),
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

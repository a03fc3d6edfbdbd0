"""A policy evaluated on one or more sets: opened, begun or continued, judged, and written."""

from collections.abc import Mapping
import math
import pathlib
import time
from typing import Any, NamedTuple

import jax
import numpy as np
import rich.console

from jaxrl_reason import config as config_lib
from jaxrl_reason import metrics as metrics_lib
from jaxrl_reason.config import Config
from jaxrl_reason.data import PromptBatch
from jaxrl_reason.rewards import model_training
from jaxrl_reason.rewards.loading import file_digest
from jaxrl_reason.rewards.scorer import LEARNED
from jaxrl_reason.rl import hosts
from jaxrl_reason.rl.programs import Programs
from jaxrl_reason.rl.types import Rollout
from jaxrl_reason.runs import pictures
from jaxrl_reason.runs.files import finite, write_json
from jaxrl_reason.runs.progress import Progress
from jaxrl_reason.tasks import reporting
from jaxrl_reason.tasks.journal import Journal
from jaxrl_reason.tasks.opening import open_for_evaluation
from jaxrl_reason.tasks.policies import LoadedPolicy, OpenedPolicy
from jaxrl_reason.tasks.task import build_programs, Task

Record = dict[str, Any]  # the content of evaluation.json


class Evaluation(NamedTuple):
    """An evaluation on one set before its first prompt."""

    config: Config  # of the policy, with the data and the fields of this evaluation
    task: Task
    programs: Programs


class Evaluations(NamedTuple):
    """A policy with its weights, and its evaluations by label. The only one of a policy without --sets is called ""."""

    policy: OpenedPolicy
    loaded: LoadedPolicy
    sets: dict[str, Evaluation]
    directory: pathlib.Path  # of the results; a label has a folder of its name
    record: Record  # the content of evaluation.json before the first prompt


def open_evaluation(policy: OpenedPolicy, config: Config, out: pathlib.Path | None) -> Evaluation:
    """Opens held-out data and rewards. Raises ConfigError, RewardError, ValueError or OSError.

    The output of rewards goes to the work directory of the run; for a model, to `out`, which is then not None.
    """
    directory = policy.workdir or out
    assert directory is not None
    task = open_for_evaluation(policy, config, directory)
    if LEARNED.keys() & set(config.reward.functions):
        batch_size = len(task.held_out[0].rows)
        scorer = model_training.load_scorer(config, directory, policy.tokenizer, policy.mesh, batch_size)
        task = task.with_reward_model(scorer)
    return Evaluation(config, task, build_programs(config, policy.method, task, policy.mesh))


def begin(
    policy: OpenedPolicy,
    sets: dict[str, Evaluation],
    chosen: pathlib.Path | None,
    folder: pathlib.Path,
    command_line: str,
    name: str = "evaluation",
) -> Evaluations:
    """Loads the weights and chooses the directory of the results: `chosen`, else `name`, `name`-2, ... in `folder`.

    Raises ConfigError or PretrainedError for weights that cannot be read, and for a directory with another evaluation.
    """
    loaded = policy.load()
    records = {label: _record(policy, evaluation, loaded) for label, evaluation in sets.items()}
    record = {"command": command_line, **(records[""] if "" in records else {"sets": records})}
    choose = lambda: reporting.results_directory(chosen, folder, record, name) if hosts.is_first() else folder
    return Evaluations(policy, loaded, sets, hosts.agree(choose, config_lib.ConfigError, OSError), record)


def run(evaluations: Evaluations, console: rich.console.Console) -> Record:
    """Samples, scores, prints the tables, writes the results, and returns the content of evaluation.json.

    Processes but the first return the record without results. Raises RewardError or OSError.
    """
    directory, record = evaluations.directory, evaluations.record
    if "" in evaluations.sets:
        return _run("", evaluations, directory, {}, console)[0]
    sets = record["sets"]
    accuracies: list[np.ndarray] = []
    for label in evaluations.sets:
        start = {directory / "evaluation.json": record | {"sets": sets}}
        found, accuracy = _run(label, evaluations, directory / label, start, console)
        sets, accuracies = sets | {label: found}, [*accuracies, accuracy]
    if not hosts.is_first():
        return record
    mean = metrics_lib.mean_over_sets(accuracies)
    record = record | {"sets": sets, "all": {name: finite(x) for name, x in mean._asdict().items()}}
    reporting.plot_sets(record, directory / "evaluation.png", evaluations.policy.name)
    write_json(directory / "evaluation.json", record)
    console.print(reporting.table_of_sets(record, evaluations.policy.name))
    console.print(f"Written: {directory}/evaluation.json, evaluation.png", soft_wrap=True)
    return record


def _run(
    label: str,
    evaluations: Evaluations,
    directory: pathlib.Path,
    more: Mapping[pathlib.Path, Record],
    console: rich.console.Console,
) -> tuple[Record, np.ndarray]:
    """Evaluates one set; returns its record, and the accuracy of its prompts f64[N], empty on processes but the first.

    `more` maps files to records that are written with the first completions.
    """
    policy, loaded = evaluations.policy, evaluations.loaded
    c, task, programs = evaluations.sets[label]
    record = evaluations.record["sets"][label] if label else evaluations.record

    def start() -> None:
        directory.mkdir(parents=True, exist_ok=True)
        for file, content in {directory / "evaluation.json": record, **more}.items():
            write_json(file, content)

    journal = Journal(directory, reporting.holds(directory, record), task.held_out, c.eval.samples, start)
    if journal.done and hosts.is_first():
        count = sum(len({line["row"] for line in batch}) for batch in journal.batches)
        finished = journal.done == len(task.held_out)
        of, rest = ("all ", "nothing is sampled") if finished else ("", "the evaluation continues there")
        console.print(f"{directory} has the completions of {of}{count} prompts; {rest}.", soft_wrap=True)
    name = f"evaluation {label}".strip()
    enabled = c.log.progress and hosts.is_first()
    with Progress(console, name, len(task.held_out), journal.done, enabled=enabled) as bar:

        def generate(batch: PromptBatch, temperature: float | None = None) -> Rollout:
            since = time.monotonic()
            rollout = jax.block_until_ready(programs.generate_eval(loaded.weights, batch, temperature))
            if temperature is not None:  # once more: the bar counts batches
                return rollout
            speed = f"{int(rollout.mask.sum()) / (time.monotonic() - since):.0f} tokens/s"
            bar.advance(speed if bar.begun else f"{speed}, with compilation")
            return rollout

        judged = task.judge(generate, task.scorer, loaded.reference, journal)
    journal.close()
    if not hosts.is_first():
        return record, np.zeros(0)
    metrics, prompts = judged.metrics(), judged.per_prompt()
    numbers = {key: value if math.isfinite(value) else None for key, value in metrics.items()}
    intervals = {key: metrics_lib.accuracy_interval(x) for key, x in prompts.items()}
    record = record | {"prompts": metrics["prompts"], "metrics": numbers, "intervals": intervals}
    title = f"{policy.name}, {record['phase']}, on {label or task.source[0]} ({c.data.eval_split})"
    if not (directory / "evaluation.json").exists():
        start()  # predictions have no journal, which begins it
    files = reporting.write_results(directory, judged, metrics, record, title)
    for table in reporting.metric_tables(metrics, intervals, title):
        console.print(table)
    if note := pictures.unit_note(metrics):
        console.print(note, soft_wrap=True)
    console.print(f"Written: {directory}/{', '.join(files)}", soft_wrap=True)
    return record, prompts.get("accuracy", np.zeros(0))


def _record(policy: OpenedPolicy, evaluation: Evaluation, loaded: LoadedPolicy) -> Record:
    """Returns the content of evaluation.json that is known before the evaluation."""
    c, task, checkpoint = evaluation.config, evaluation.task, loaded.checkpoint
    name, fingerprint = task.source
    step = (checkpoint or 0) - c.supervised.steps
    phase = f"RL step {step}" if step >= 0 else f"supervised step {checkpoint}"
    return {
        **(
            {"workdir": str(policy.workdir), "weights": loaded.digest}
            if policy.workdir
            else {"model": c.model.path, "changed": policy.changed}
        ),
        "checkpoint": checkpoint,
        "phase": phase if policy.workdir else "pretrained",
        "data": {"name": name, "split": c.data.eval_split, "fingerprint": fingerprint},
        "samples": c.eval.samples,
        "temperature": c.eval.temperature,
        "top_k": c.eval.top_k,
        "top_p": c.eval.top_p,
        "max_completion_length": c.max_completion_length,
        "seed": c.seed,
        "rewards": dict(task.scorer.weights),
        "reward_files": {spec: digest for spec in c.reward.functions if (digest := file_digest(spec))},
        "verdict": task.verdict,
        "config": config_lib.to_dict(c),
    }

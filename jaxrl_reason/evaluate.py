"""Held-out evaluation of a run: python -m jaxrl_reason.evaluate --workdir=DIR [--data=NAME_OR_PATH]

Samples several completions a prompt, judges them as the run's configuration says, and prints a table. Writes evaluation.json
(every number), evaluation.png and completions.jsonl (predictions.jsonl where a run predicts numbers); nothing else in the work
directory is touched.

  --workdir=DIR       the work directory of a run: its config.json, tokenizer and checkpoints
  --data=NAME_OR_PATH another data set, as config.data.eval; its split is then "test", or all of a .jsonl, .parquet or .csv file
  --split=SPLIT       as config.data.eval_split
  --prompts=N         prompts at most; default config.eval.prompts
  --samples=K         completions a prompt; default config.eval.samples, 1 at temperature 0
  --temperature=T     default config.eval.temperature; 0: greedy
  --config=FILE       the run's recipe, where it registers an estimator of its own
  --checkpoint=N      a number under DIR/checkpoints; default the newest
  --out=DIR           default: evaluation, in the work directory

Other fields that the weights do not depend on are set as in training: --config.seed=1, --config.mesh.fsdp=-1 on another number of
devices, --config.data.columns={} where the other data set has other names.
"""

from collections.abc import Sequence
import dataclasses
import math
import pathlib
import shlex
import sys
from typing import Any

import jax
import rich.console

from jaxrl_reason import config as config_lib
from jaxrl_reason import methods, models, runs, tasks
from jaxrl_reason.config import Config, ConfigError
from jaxrl_reason.data import PromptBatch
from jaxrl_reason.rewards import model_training, RewardError
from jaxrl_reason.rewards.scorer import LEARNED
from jaxrl_reason.rl import programs as programs_lib
from jaxrl_reason.rl.types import Rollout
from jaxrl_reason.runs.progress import Progress
from jaxrl_reason.tasks import reporting, self_reward

# Flags that are fields of the configuration by a shorter name.
FIELDS = {
    "--data": "data.eval",
    "--split": "data.eval_split",
    "--prompts": "eval.prompts",
    "--samples": "eval.samples",
    "--temperature": "eval.temperature",
}


@dataclasses.dataclass(frozen=True)
class Request:
    """What the command line asks for.

    Attributes:
      workdir: of the run.
      fields: configuration field -> text of its value.
      checkpoint: a number, or None for the newest.
      out: where the results go.
      recipe: to be loaded first, or None.
    """

    workdir: pathlib.Path
    fields: dict[str, str]
    checkpoint: int | None
    out: pathlib.Path
    recipe: pathlib.Path | None = None


def parse_args(argv: Sequence[str]) -> Request:
    """Reads --flag=value and --flag value.

    Raises:
      ConfigError: an unknown flag, a flag without a value, or no --workdir.
    """
    known, argv, texts, fields = ["--workdir", "--config", "--checkpoint", "--out", *FIELDS], list(argv), {}, {}
    while argv:
        flag, equals, text = argv.pop(0).partition("=")
        if flag not in known and not flag.startswith("--config."):
            raise ConfigError(f"There is no flag {flag!r}.{methods.nearest(flag, known)}")
        if not equals and (not argv or argv[0].startswith("--")):
            raise ConfigError(f"{flag} needs a value: {flag}=...")
        texts[flag] = text if equals else argv.pop(0)
    for flag, text in texts.items():
        if flag in FIELDS or flag.startswith("--config."):
            fields[FIELDS.get(flag) or flag.removeprefix("--config.")] = text
    if not texts.get("--workdir"):
        raise ConfigError("--workdir=DIR is missing; name the work directory of a run.")
    number = texts.get("--checkpoint")
    if number is not None and not (number.isascii() and number.isdigit()):
        raise ConfigError(f"--checkpoint={number}: expected the number of a checkpoint.")
    workdir = pathlib.Path(texts["--workdir"]).expanduser().resolve()
    out = pathlib.Path(texts.get("--out") or workdir / "evaluation").expanduser().resolve()
    recipe = pathlib.Path(texts["--config"]).expanduser() if "--config" in texts else None
    return Request(workdir, fields, None if number is None else int(number), out, recipe)


def run(request: Request, command: str) -> dict[str, float]:
    """Evaluates a run, prints the table and writes the results.

    Args:
      request: the run, and what to change in its configuration.
      command: the command line, for evaluation.json.

    Returns:
      The metrics.

    Raises:
      ConfigError, RewardError, ValueError, OSError: the run cannot be evaluated; the message names the cause and its place.
    """
    if request.recipe:
        config_lib.load_module(request.recipe)
    c, workdir = runs.load_config(request.workdir, request.fields), request.workdir
    method = config_lib.make_method(c)
    mesh = programs_lib.make_mesh(c)
    task = tasks.open_for_evaluation(c, method, mesh, workdir)
    if LEARNED.keys() & set(c.reward.functions):
        task = task.with_reward_model(model_training.load_scorer(c, workdir, mesh, len(task.held_out[0].rows)))
    programs = tasks.build_programs(c, method, task, mesh)
    like = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        models.abstract_params(task.model),
        models.param_shardings(task.model, mesh),
    )
    number, params = runs.load_weights(workdir, request.checkpoint, like, task.model)
    params = programs.rollout_weights(params)
    c_ref = self_reward.read_constant(workdir) if method.loss.find("self_reward") else None
    if request.out.exists() and not request.out.is_dir():
        raise ConfigError(f"--out={request.out} is a file; name a directory.")
    request.out.mkdir(parents=True, exist_ok=True)  # before the work, which would be lost without a directory

    console = rich.console.Console(highlight=False, markup=False)
    with Progress(console, "evaluation", len(task.held_out), enabled=c.log.progress) as bar:

        def generate(batch: PromptBatch) -> Rollout:
            rollout = jax.block_until_ready(programs.generate_eval(params, batch))
            bar.advance("")
            return rollout

        judged = task.judge(generate, task.scorer, c_ref)

    metrics = judged.metrics()
    record = {"command": command, "workdir": str(workdir)} | _record(c, task, number, metrics)
    title = f"{workdir.name}, {record['phase']}, on {task.source[0]} ({c.data.eval_split})"
    files = reporting.write_results(request.out, judged, metrics, record, title)
    for table in reporting.metric_tables(metrics, title):
        console.print(table)
    console.print(f"Written: {request.out}/{', '.join(files)}", soft_wrap=True)
    return metrics


def _record(c: Config, task: tasks.Task, checkpoint: int, metrics: dict[str, float]) -> dict[str, Any]:
    """Returns the content of evaluation.json, except the command and the work directory."""
    step, (name, fingerprint) = checkpoint - c.supervised.steps, task.source
    return {
        "checkpoint": checkpoint,
        "phase": f"RL step {step}" if step >= 0 else f"supervised step {checkpoint}",
        "data": {"name": name, "split": c.data.eval_split, "fingerprint": fingerprint},
        "prompts": metrics["prompts"],
        "samples": c.eval.samples,
        "temperature": c.eval.temperature,
        "max_completion_length": c.max_completion_length,
        "seed": c.seed,
        "rewards": dict(task.scorer.weights),
        "verdict": task.verdict,
        "metrics": {name: value if math.isfinite(value) else None for name, value in metrics.items()},
    }


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or "--help" in argv or "-h" in argv:
        print(__doc__)
        return 0
    try:
        run(parse_args(argv), shlex.join(["python", "-m", "jaxrl_reason.evaluate", *argv]))
    except (ConfigError, RewardError, ValueError, OSError) as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

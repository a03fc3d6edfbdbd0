"""Evaluates a run on held-out data.

Samples several completions per prompt, scores them by the run's rewards, and prints a table. Writes evaluation.json (every number),
evaluation.png and completions.jsonl (predictions.jsonl if a run predicts numbers). Nothing else in the work directory changes. Fields of the
configuration on which the weights do not depend can be set as in training: --config.seed=1, --config.mesh.fsdp=-1 on another
number of devices, --config.data.columns={} if other data have other names.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
import dataclasses
import functools
import json
import math
import pathlib
import sys
from typing import Any

import jax
from matplotlib.figure import Figure
import numpy as np
import rich.console
import rich.table

from jaxrl_reason import config as config_lib
from jaxrl_reason import data, methods, models, runs, tasks
from jaxrl_reason.config import Config, ConfigError
from jaxrl_reason.data import PromptBatch
from jaxrl_reason.data.values import held_out_values
from jaxrl_reason.models import reward_model, sharding
from jaxrl_reason.rewards import model_training, RewardError
from jaxrl_reason.rewards.scorer import LEARNED, RewardScorer
from jaxrl_reason.rl import programs as programs_lib
from jaxrl_reason.rl.types import Rollout
from jaxrl_reason.runs import command, files
from jaxrl_reason.runs.progress import Progress
from jaxrl_reason.runs.workdir import model_source, tokenizer_of
from jaxrl_reason.tasks import evaluation, regression


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


@dataclasses.dataclass(frozen=True)
class Judged:
    """What was found out about a policy.

    Attributes:
      figures: name -> value, NaN where there is nothing to average.
      lines: the file `records` of the samples behind them, a dict a line.
      records: its name.
      draw: (path, title) -> writes the picture.
    """

    figures: dict[str, float]
    lines: Iterable[dict[str, Any]]
    records: str
    draw: Callable[[pathlib.Path, str], None]


@dataclasses.dataclass(frozen=True)
class Subject:
    """A run's model and the held-out data it is judged on.

    Attributes:
      model: the decoder's shape.
      vocabulary: the run's tokenizer, or its digits.
      data: name and fingerprint of the held-out data.
      batches: of prompts.
      weights, verdict: of the rewards.
      judge: (generate) -> Judged.
      legal: bool[T, V], or None.
      probe_token: of LaSeR, or None.
    """

    model: models.ModelConfig
    vocabulary: data.Tokenizer | regression.Digits
    data: tuple[str, str]
    batches: list[PromptBatch]
    weights: Mapping[str, float]
    verdict: str
    judge: Callable[[Callable[[PromptBatch], Rollout]], Judged]
    legal: np.ndarray | None = None
    probe_token: int | None = None


def _batch_size(c: Config, mesh: jax.sharding.Mesh, rows: int) -> int:
    """Prompts at once: about as many completions as in training, which is known to fit."""
    decoding = sharding.rollout_mesh(mesh, c.mesh.rollout_tensor or mesh.shape["tensor"])
    ways = math.lcm(sharding.num_shards(mesh), sharding.num_shards(decoding))
    at_once = min(c.prompts_per_step * c.group_size // c.eval.samples, c.eval.prompts, rows)
    return max(-(-at_once // ways), 1) * ways


def _text_subject(c: Config, workdir: pathlib.Path, method: methods.Method, mesh: jax.sharding.Mesh) -> Subject:
    source = data.load_source(
        c.data.eval or c.data.train,
        c.data.eval_split,
        data_dir=c.data.data_dir or None,
        columns=c.data.eval_columns or c.data.columns,
        on_bad_row=c.data.on_bad_row,
    )
    values = held_out_values(source, "values" in method.signals)
    tokenizer = tokenizer_of(workdir)
    template = config_lib.prompt_template(c, tokenizer)
    batches = data.eval_prompts(
        source,
        tokenizer,
        template,
        c.eval.prompts,
        batch_size=_batch_size(c, mesh, len(source)),
        max_prompt_length=c.max_prompt_length,
        on_long=c.data.on_long_prompt,
        add_bos=config_lib.begins_with_bos(c, tokenizer),
    )
    r = c.reward
    scorer = RewardScorer(r, tokenizer=tokenizer, template=template, sharding=sharding.batch_sharding(mesh))
    verdict = dict(zip(r.functions, scorer.names)).get(c.eval.verdict, scorer.verdict)
    for batch in batches:
        scorer.check(batch.rows)
    if LEARNED.keys() & set(r.functions):
        scorer = scorer.with_reward_model(_learned_reward(c, workdir, tokenizer, mesh))

    def judge(generate):
        found = evaluation.gather(
            generate,
            batches,
            scorer,
            tokenizer,
            answers_of=scorer.answers_of(verdict),
            verdict=verdict,
            self_reward=tasks.self_reward_of(method, _self_reward_constant(workdir)),
            values=values,
        )
        numbers = evaluation.figures(found, c.eval.temperature)
        draw = functools.partial(plot, found, numbers)
        return Judged(numbers, _completions(found, template), "completions.jsonl", draw)

    return Subject(
        config_lib.model_config(c, tokenizer.vocab_size, model_source(workdir)),
        tokenizer,
        (source.name, source.fingerprint),
        batches,
        scorer.weights,
        verdict,
        judge,
        probe_token=tasks.probe_token(method, tokenizer),
    )


def _numbers_subject(c: Config, workdir: pathlib.Path, mesh: jax.sharding.Mesh) -> Subject:
    if c.regression.inputs == "text":
        c.data.tokenizer = str(workdir / "tokenizer" / "text")
    origin = model_source(workdir)
    text_size = models.read_config(origin).vocab_size if origin else 0
    task = regression.open_task(c, text_size=text_size)  # scales are those of the training table, which is read again
    rows, digits = task.held_out, task.tokenizer
    if digits.description() != json.loads((workdir / "tokenizer" / "digits.json").read_bytes()):
        raise ConfigError(
            f"{c.data.train} ({c.data.train_split}) is not the table that the run in {workdir} learnt from: its targets have another "
            "scale. Restore it, or name it with --config.data.train."
        )
    batches = regression.eval_batches(rows, c.eval.prompts, _batch_size(c, mesh, len(rows.targets)))
    reward = regression.NumberScorer(c.reward.functions, c.reward.weights, digits, sharding.batch_sharding(mesh))

    def judge(generate):
        samples, targets = regression.predictions(generate, batches, digits)
        numbers = regression.figures(samples, targets)
        draw = functools.partial(plot_predictions, samples, targets)
        return Judged(numbers, _predictions(samples, targets, digits, rows), "predictions.jsonl", draw)

    return Subject(
        tasks.numbers_model(c, task, origin),
        digits,
        (c.data.eval or c.data.train, task.fingerprint),
        batches,
        reward.weights,
        reward.verdict,
        judge,
        legal=digits.legal,
    )


def run(request: Request, command_line: str) -> dict[str, float]:
    """Evaluates, prints the table and writes the results.

    Args:
      request: what to evaluate.
      command_line: for the record.

    Returns:
      The figures.

    Raises:
      ConfigError, RewardError, ValueError, OSError: a sentence that says what is wrong and where.
    """
    if request.recipe:
        config_lib.load_module(request.recipe)
    c, workdir = runs.load_config(request.workdir, request.fields), request.workdir
    method = config_lib.make_method(c)
    mesh = programs_lib.make_mesh(c)
    subject = _numbers_subject(c, workdir, mesh) if c.regression.tokenizer else _text_subject(c, workdir, method, mesh)
    programs = programs_lib.build(
        c,
        method,
        subject.model,
        mesh,
        eos_ids=subject.vocabulary.eos_ids,
        pad_id=subject.vocabulary.pad_id,
        weights=subject.weights,
        verdict=subject.verdict,
        probe_token=subject.probe_token,
        legal=subject.legal,
    )
    like = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        models.abstract_params(subject.model),
        models.param_shardings(subject.model, mesh),
    )
    number, params = runs.load_weights(workdir, request.checkpoint, like, subject.model)
    params = programs.rollout_weights(params)
    if request.out.exists() and not request.out.is_dir():
        raise ConfigError(f"--out={request.out} is a file; name a directory.")
    request.out.mkdir(parents=True, exist_ok=True)  # before the work that it is for

    console = rich.console.Console(highlight=False, markup=False)
    with Progress(console, "evaluation", len(subject.batches), enabled=c.log.progress) as bar:

        def generate(batch):
            rollout = jax.block_until_ready(programs.generate_eval(params, batch))
            bar.advance("")
            return rollout

        judged = subject.judge(generate)

    step = number - c.supervised.steps
    phase = f"RL step {step}" if step >= 0 else f"supervised step {number}"
    name, fingerprint = subject.data
    title = f"{workdir.name}, {phase}, on {name} ({c.data.eval_split})"
    record = {
        "command": command_line,
        "workdir": str(workdir),
        "checkpoint": number,
        "phase": phase,
        "data": {"name": name, "split": c.data.eval_split, "fingerprint": fingerprint},
        "prompts": judged.figures["prompts"],
        "samples": c.eval.samples,
        "temperature": c.eval.temperature,
        "max_completion_length": c.max_completion_length,
        "seed": c.seed,
        "rewards": dict(subject.weights),
        "verdict": subject.verdict,
        "metrics": {name: value if math.isfinite(value) else None for name, value in judged.figures.items()},
    }
    lines = (json.dumps(line, ensure_ascii=False) + "\n" for line in judged.lines)
    _write(request.out / judged.records, "".join(lines))
    judged.draw(request.out / "evaluation.png", title=title)
    # Last: where it is, the others are of the same evaluation.
    files.write_json(request.out / "evaluation.json", record)
    for table in tables(judged.figures, title):
        console.print(table)
    console.print(f"Written: {request.out}/evaluation.json, evaluation.png, {judged.records}", soft_wrap=True)
    return judged.figures


def _learned_reward(c: Config, workdir: pathlib.Path, tokenizer: data.Tokenizer, mesh: jax.sharding.Mesh) -> Callable:
    """Scores of the reward model that the run learnt from, see `RewardScorer.with_reward_model`."""
    directory = pathlib.Path(c.reward_model.path).expanduser() if c.reward_model.path else workdir / "reward_model"
    if c.reward_model.path and not model_training.is_ours(directory):
        opened = model_training.open_pretrained(c, mesh, workdir)
        return model_training.pretrained_scorer(c, opened, tokenizer, mesh)
    digest = model_training.tokenizer_digest(tokenizer)
    shape, params = model_training.load_reward_model(directory, digest, mesh=mesh)
    score = jax.jit(functools.partial(reward_model.group_scores, shape))
    return lambda rollout, batch: (score(params, rollout), {})


def _self_reward_constant(workdir: pathlib.Path) -> float | None:
    """LaSeR's c_ref of the run; None where it has measured none."""
    file = workdir / "self_reward.json"
    try:
        return float(json.loads(file.read_bytes())["c_ref"]) if file.exists() else None
    except (ValueError, TypeError, KeyError) as e:
        raise ConfigError(f"{file} is not what a run writes ({type(e).__name__}: {e}); restore it.") from e


def _completions(found: evaluation.Evaluated, template: data.PromptTemplate) -> Iterator[dict[str, Any]]:
    """The lines of completions.jsonl, one a completion."""
    for n, k in np.ndindex(*found.right.shape):
        answer = found.answers[n][k]
        record = {
            "row": int(found.numbers[n]),
            "sample": k,
            "prompt": template.render_prompt(found.rows[n]),
            "completion": found.texts[n][k],
            "answer": None if answer is None else str(answer),
            "right": bool(found.right[n, k]),
            "rewards": {name: _known(values[n, k]) for name, values in found.rewards.items()},
            "total": _known(found.total[n, k]),
            "length": int(found.lengths[n, k]),
            "truncated": bool(found.truncated[n, k]),
        }
        if found.self_rewards is not None:
            record["self_reward"] = _known(found.self_rewards[n, k])
        yield record


def _predictions(samples, targets, digits: regression.Digits, rows: regression.Rows) -> Iterator[dict[str, Any]]:
    """The lines of predictions.jsonl, one a row of the table: in its own unit, and what was sampled as z-scores."""
    for i, (drawn, z) in enumerate(zip(samples, targets)):
        mean, median = float(drawn.mean()), float(np.median(drawn))
        yield {
            "row": i,
            "target": float(rows.targets[i]),
            "mean": _known(digits.target.from_z(mean)),
            "median": _known(digits.target.from_z(median)),
            "target_z": float(z),
            "samples_z": [_known(x) for x in drawn],
        }


def _known(x) -> float | None:
    """A number for JSON, which has no NaN."""
    return float(x) if math.isfinite(x) else None


def _write(path: pathlib.Path, text: str) -> None:
    """Complete or absent. A character that is none (half of a surrogate pair) is written as its escape."""
    scratch = path.with_name(path.name + ".tmp")
    scratch.write_text(text, encoding="utf-8", errors="backslashreplace")
    scratch.replace(path)


def tables(numbers: Mapping[str, float], title: str) -> list[rich.table.Table]:
    """What is shown on the screen: a row a figure, and pass@k beside maj@k. Shares are in percent, NaN is a dash."""

    def show(name: str, value: float) -> str:
        if math.isnan(value):
            return "-"
        if isinstance(value, int):
            return str(value)
        if "@" in name or name.endswith(("accuracy", "_ratio", "_vote")):
            return f"{100 * value:.1f} %"
        return f"{value:.3f}" if abs(value) < 10 else f"{value:.1f}"

    main = rich.table.Table("", title=title)
    for heading in ("", "95 % interval"):
        main.add_column(heading, justify="right")
    curve = rich.table.Table("k", "pass@k", "maj@k") if "accuracy" in numbers else None
    for name, value in numbers.items():
        kind, at, k = name.partition("@")
        if kind == "pass":
            curve.add_row(k, show(name, value), show(name, numbers[f"maj@{k}"]))
        elif name == "accuracy":
            interval = (100 * numbers[f"accuracy_{end}"] for end in ("low", "high"))
            main.add_row(name, show(name, value), "{:.1f} to {:.1f} %".format(*interval))
        elif kind != "maj" and name not in ("accuracy_low", "accuracy_high"):
            main.add_row(name.replace("_", " "), show(name, value), "")
    return [main, curve] if curve else [main]


def plot(found: evaluation.Evaluated, numbers: Mapping[str, float], path: pathlib.Path, *, title: str) -> None:
    """Draws pass@k and maj@k over k, and beside them how many prompts are answered right how often."""
    samples = found.right.shape[1]
    figure = Figure(figsize=(10, 4), layout="constrained")  # not pyplot: no global state, no display
    figure.suptitle(title)
    curves, histogram = figure.subplots(1, 2)
    for kind in ("pass", "maj"):
        points = [(k, 100 * numbers[f"{kind}@{k}"]) for k in evaluation.powers(samples)]
        curves.plot(*zip(*points), "o-", label=f"{kind}@k")
    curves.axhspan(
        *(100 * numbers[f"accuracy_{end}"] for end in ("low", "high")),
        alpha=0.2,
        color="tab:gray",
        label="accuracy, 95 % interval",
    )
    curves.set_xscale("log", base=2)
    curves.set_xticks(evaluation.powers(samples), [str(k) for k in evaluation.powers(samples)])
    curves.set_xlabel("k, completions a prompt")
    curves.set_ylabel("%")
    curves.legend(loc="best")
    counts = np.bincount(found.right.sum(axis=1), minlength=samples + 1)
    histogram.bar(100 * np.arange(samples + 1) / samples, counts, width=80 / (samples + 1))
    histogram.set_xlabel(f"accuracy of a prompt over {samples} completions (%)")
    histogram.set_ylabel("prompts")
    for axis in (curves, histogram):
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=120, format="png")


def plot_predictions(samples: np.ndarray, targets: np.ndarray, path: pathlib.Path, *, title: str) -> None:
    """Draws the samples' mean over the target with a bar of one standard deviation, and the distribution of the errors."""
    samples = samples.astype(np.float64)  # of the wide alphabets, squares overflow float32
    figure = Figure(figsize=(10, 4), layout="constrained")
    figure.suptitle(title)
    scatter, histogram = figure.subplots(1, 2)
    mean = samples.mean(axis=1)
    scatter.errorbar(targets, mean, yerr=samples.std(axis=1), fmt="o", ms=2, lw=0.5, alpha=0.5)
    scatter.axline((0, 0), slope=1, color="tab:gray", lw=1)
    scatter.set_xlabel("target (z-score)")
    scatter.set_ylabel(f"mean of {samples.shape[1]} samples (z-score)")
    errors = mean - targets
    histogram.hist(errors[np.isfinite(errors)], bins=40)
    histogram.set_xlabel("error of the mean (z-score)")
    histogram.set_ylabel("rows")
    for axis in (scatter, histogram):
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=120, format="png")


COMMAND = command.Command(
    "evaluate",
    __doc__,
    (
        command.WORKDIR,
        command.Flag(
            "data",
            "NAME_OR_PATH",
            "other data, as config.data.eval; the split is then test, or all of a .jsonl, .parquet or .csv file",
            field="data.eval",
        ),
        command.Flag("split", "SPLIT", "as config.data.eval_split", field="data.eval_split"),
        command.Flag(
            "prompts", "N", "the largest number of prompts; config.eval.prompts by default", field="eval.prompts"
        ),
        command.Flag(
            "samples",
            "K",
            "completions per prompt; config.eval.samples by default, 1 at temperature 0",
            field="eval.samples",
        ),
        command.Flag("temperature", "T", "0 is greedy; config.eval.temperature by default", field="eval.temperature"),
        command.RECIPE,
        command.CHECKPOINT,
        command.Flag("out", "DIR", "the directory of the results; WORKDIR/evaluation by default", command.path),
        command.Flag("config.", "FIELD=VALUE", "sets a field of the configuration"),
    ),
    "--workdir=/tmp/quickstart --samples=16",
    errors=(RewardError,),
)


def main(argv: list[str] | None = None) -> int:
    """Runs the command and returns its exit code."""

    def prepare(a: command.Arguments) -> None:
        request = Request(a.workdir, a.fields, a.checkpoint, a.out or a.workdir / "evaluation", a.config)
        run(request, a.command_line)

    return command.run(COMMAND, argv, prepare, lambda _: None)


if __name__ == "__main__":
    sys.exit(main())

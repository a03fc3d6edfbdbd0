"""Opens the task of a run on text problems, for training or for evaluation."""

import functools
import pathlib
from typing import Any

import jax
import numpy as np

from jaxrl_reason import config as config_lib
from jaxrl_reason import data, methods, models
from jaxrl_reason.config import Config
from jaxrl_reason.data.values import altered, held_out_values, read_numbers, read_values
from jaxrl_reason.methods import Method
from jaxrl_reason.models import sharding
from jaxrl_reason.rewards.output import Output
from jaxrl_reason.rewards.scorer import RewardScorer
from jaxrl_reason.rl import hosts
from jaxrl_reason.rl.requirements import requirements
from jaxrl_reason.runs.workdir import Workdir
from jaxrl_reason.tasks import evaluation, pretrained, reporting
from jaxrl_reason.tasks.journal import FILE, Journal
from jaxrl_reason.tasks.self_reward import probe_token, ProbeReference, self_reward_of
from jaxrl_reason.tasks.task import Generate, Judged, Task, TrainingTask


def open_for_training(
    config: Config, method: Method, mesh: jax.sharding.Mesh, workdir: str | pathlib.Path
) -> TrainingTask:
    """Opens training rows, held-out rows, tokenizer, streams and rewards; see `tasks.open_task`."""
    c = config
    train_rows = _read(c, c.data.train, c.data.train_split, c.data.columns)
    eval_rows = _held_out_rows(c)
    columns = {name: _column(c, train_rows, name) for name in requirements(c, method).columns}
    work = Workdir(workdir, c, f"{train_rows.fingerprint}/{eval_rows.fingerprint}")
    source, opened = pretrained.find(c, work.path)
    tokenizer = work.tokenizer(functools.partial(_make_tokenizer, c, train_rows, opened))
    model = config_lib.model_config(c, tokenizer.vocab_size, source)
    if opened is not None:
        models.check_weights(opened, pretrained.base_shape(model))
    scorer = _scorer(c, tokenizer, mesh, work.path)
    streams = functools.cache(lambda: _streams(c, mesh, train_rows, tokenizer, columns))
    checks = not work.is_finished(c.supervised.steps + c.steps)  # a finished run has passed them, and they take seconds
    if checks:
        streams()  # refuses training rows that do not fit before held-out ones
    values = held_out_values(eval_rows, "values" in method.signals) if c.eval.every else None
    task = _task(c, method, eval_rows, tokenizer, model, scorer, batch_size=c.prompts_per_step, values=values)
    if checks:
        turns = data.get_template(c.data.template).turns
        data.warn_of_repeats(train_rows, eval_rows, lambda row: "\n".join(turn["content"] for turn in turns(row)))
        for batch in (streams()[1].batch(0), *(task.held_out if c.eval.every else ())):
            scorer.check(batch.rows)
        scorer.check_references(train_rows)
        if c.eval.every:
            scorer.check_references(eval_rows, c.eval.prompts)
        if hosts.is_first() and not (work.path / "metrics.jsonl").exists():  # RL has not begun
            scorer.try_out(_spread(train_rows), c.group_size)
    load = functools.partial(pretrained.load_weights, c, opened, source, model, mesh) if c.model.path else None
    return TrainingTask(**vars(task), work=work, streams=streams, pretrained=opened, load_weights=load)


def open_for_evaluation(
    config: Config,
    method: Method,
    mesh: jax.sharding.Mesh,
    tokenizer: data.Tokenizer,
    model: models.ModelConfig,
    directory: pathlib.Path,
) -> Task:
    """Opens held-out rows and rewards for a policy; see `tasks.open_for_evaluation`."""
    c, rows = config, _held_out_rows(config)
    values = held_out_values(rows, "values" in method.signals)
    scorer = _scorer(c, tokenizer, mesh, directory)
    batch_size = evaluation.batch_size(c, mesh, len(rows))
    task = _task(c, method, rows, tokenizer, model, scorer, batch_size=batch_size, values=values)
    for batch in task.held_out:
        scorer.check(batch.rows)
    scorer.check_references(rows, c.eval.prompts)
    return task


def _task(
    c: Config,
    method: Method,
    rows: data.Source,
    tokenizer: data.Tokenizer,
    model: models.ModelConfig,
    scorer: RewardScorer,
    *,
    batch_size: int,
    values: np.ndarray | None,
) -> Task:
    """Returns the task that judges completions of the held-out `rows`, whose human values f32[N] may be None."""
    template = config_lib.prompt_template(c, tokenizer)
    verdict = scorer.by_function.get(c.eval.verdict, scorer.verdict)
    batches = data.eval_prompts(
        rows, tokenizer, template, c.eval.prompts, batch_size=batch_size, **_prompt_options(c, tokenizer)
    )

    def judge(
        generate: Generate, scorer: RewardScorer, reference: ProbeReference, journal: Journal | None = None
    ) -> Judged:
        parts = evaluation.sample_and_judge(
            generate,
            batches,
            scorer,
            tokenizer,
            skip_special=c.reward.skip_special_tokens,
            answers_of=scorer.answers_of(verdict),
            verdict=verdict,
            self_reward=self_reward_of(method, reference),
            journal=journal,
            lines_of=lambda part: reporting.completion_lines(part, template),
        )
        found = functools.cache(lambda: evaluation.join(parts, values))
        pieces = functools.partial(tokenizer.pieces, skip_special=c.reward.skip_special_tokens)
        return Judged(
            summary=lambda: evaluation.summary_metrics(found(), c.eval.temperature),
            metrics=lambda: evaluation.all_metrics(found(), c.eval.temperature),
            accuracies=lambda: found().correct.mean(axis=1),
            per_prompt=lambda: evaluation.per_prompt(found()),
            file=FILE,
            lines=lambda: reporting.completion_lines(found(), template, pieces),
            draw=lambda metrics, path, title: reporting.plot_completions(found(), metrics, path, title),
        )

    source, probe = (rows.name, rows.fingerprint), probe_token(method, tokenizer)
    return Task(tokenizer, model, source, batches, scorer, verdict, judge, probe_token=probe)


def _scorer(c: Config, tokenizer: data.Tokenizer, mesh: jax.sharding.Mesh, workdir: pathlib.Path) -> RewardScorer:
    template = config_lib.prompt_template(c, tokenizer)
    output = Output(workdir / ("rewards.log" if hosts.is_first() else f"rewards.{jax.process_index()}.log"))
    return RewardScorer(
        c.reward, tokenizer=tokenizer, template=template, sharding=sharding.batch_sharding(mesh), output=output
    )


def _read(c: Config, name: str, split: str, columns: dict[str, str]) -> data.Source:
    return data.load_source(
        name, split, data_dir=c.data.data_dir or None, columns=columns, on_bad_row=c.data.on_bad_row
    )


def _spread(rows: data.Source) -> list[dict[str, Any]]:
    """Returns the first row, one in the middle and the last: rows at one place can share a fault."""
    return rows.read(sorted({0, len(rows) // 2, len(rows) - 1}))


def _held_out_rows(c: Config) -> data.Source:
    return _read(c, c.data.eval or c.data.train, c.data.eval_split, c.data.eval_columns or c.data.columns)


def _column(c: Config, rows: data.Source, name: str) -> np.ndarray:
    """Returns a column that a signal reads, f32[N]: human values as config.data.values alters them, or the file's numbers."""
    if name != "values":
        return read_numbers(rows, name)
    given = c.method.get("rlev", c.method)
    scale = {k: given.get(k, default) for k, default in methods.keywords("rlev").items() if k in ("alpha", "clip")}
    return altered(read_values(rows), c.data.values, seed=c.seed, **scale)


def _make_tokenizer(c: Config, rows: data.Source, opened: models.Opened | None) -> data.Tokenizer:
    """Returns the tokenizer of a new run: of another run, by name, of a pretrained model, or trained on the rows."""
    if c.supervised.start_from:
        return data.load_tokenizer(pathlib.Path(c.supervised.start_from).expanduser() / "tokenizer")
    if c.data.tokenizer:
        return data.load_tokenizer(c.data.tokenizer)
    if opened is not None:
        return pretrained.tokenizer_of(c, opened)
    template = data.get_template(c.data.template)
    texts = [
        template.render_prompt(row) + ("" if row.get("solution") is None else template.render_solution(row))
        for row in rows.read(range(min(len(rows), 2000)))
    ]
    return data.train_tokenizer(texts, c.data.vocab_size)


def _prompt_options(c: Config, tokenizer: data.Tokenizer) -> dict[str, Any]:
    """Returns how streams encode prompts."""
    add_bos = config_lib.begins_with_bos(c, tokenizer)
    return dict(max_prompt_length=c.max_prompt_length, on_long=c.data.on_long_prompt, add_bos=add_bos)


def _streams(
    c: Config, mesh: jax.sharding.Mesh, rows: data.Source, tokenizer: data.Tokenizer, columns: dict[str, np.ndarray]
) -> tuple[data.SolutionStream | None, data.PromptStream]:
    """Returns the training batches: worked solutions if the run has a supervised phase, and prompts for RL."""
    # The prompts carry `columns`, name -> [N, ...]. A stream reads the rows of a batch that belong to this process.
    template = config_lib.prompt_template(c, tokenizer)
    options = _prompt_options(c, tokenizer) | {"seed": c.seed}
    batches = lambda size: (
        options | dict(batch_size=size, local_rows=hosts.local_rows(sharding.batch_sharding(mesh), size))
    )
    solutions = None
    if c.supervised.steps:
        more = batches(c.supervised.batch_size) | {"max_completion_length": c.max_completion_length}
        solutions = data.SolutionStream(rows, tokenizer, template, **more)
    return solutions, data.PromptStream(rows, tokenizer, template, columns=columns, **batches(c.prompts_per_step))

"""Opens the task of a regression run, for training or for evaluation."""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import functools
import pathlib
from typing import Any

import jax
import numpy as np

from jaxrl_reason import config as config_lib
from jaxrl_reason import data, models
from jaxrl_reason.config import Config, ConfigError
from jaxrl_reason.data import numbers, PromptBatch
from jaxrl_reason.methods import Method
from jaxrl_reason.models import sharding
from jaxrl_reason.models.formats.weights import read_json
from jaxrl_reason.rl import hosts
from jaxrl_reason.runs.workdir import model_source, Workdir
from jaxrl_reason.tasks import evaluation, pretrained, reporting
from jaxrl_reason.tasks.journal import Journal
from jaxrl_reason.tasks.regression import pointwise
from jaxrl_reason.tasks.regression.evaluation import NumberScorer, predict, prediction_metrics
from jaxrl_reason.tasks.regression.prediction import Row, table_of
from jaxrl_reason.tasks.regression.tables import (
    eval_batches,
    open_tables,
    Rows,
    solution_batches,
    Stream,
    Tables,
    warn_of_repeats,
)
from jaxrl_reason.tasks.regression.vocabulary import Digits
from jaxrl_reason.tasks.self_reward import ProbeReference
from jaxrl_reason.tasks.task import Generate, Judged, Task, TrainingTask


def open_for_training(
    config: Config, method: Method, mesh: jax.sharding.Mesh, workdir: str | pathlib.Path
) -> TrainingTask:
    """Opens tables, streams of their rows, rewards and evaluation; see `tasks.open_task`."""
    c, path = config, pathlib.Path(workdir).expanduser().resolve()
    source, opened = pretrained.find(c, path)
    text = None if opened is None else pretrained.tokenizer_of(c, opened)
    if source is not None and text is None:
        text = data.load_tokenizer(path / "tokenizer" / "text")
    tables = open_tables(c, text, models.read_config(source).vocab_size if source else 0)
    digits, train, held_out = tables.digits, tables.train_rows(), tables.held_out_rows()
    warn_of_repeats(tables.train, tables.held_out)
    model = _model(c, tables, source)
    if opened is not None:
        models.check_weights(opened, pretrained.base_shape(model, digits.text_size))
    _check_start(c, tables)
    expert = _expert(method, digits)
    by_prompt = sharding.batch_sharding(mesh)
    stream = lambda make, size: Stream(
        len(train.targets), make, batch_size=size, seed=c.seed, local_rows=hosts.local_rows(by_prompt, size)
    )
    solutions = (
        stream(lambda chosen, _: train.solutions(chosen), c.supervised.batch_size) if c.supervised.steps else None
    )
    prompts = stream(train.prompts, c.prompts_per_step)
    validation = tables.validation_rows()
    sizes = c.supervised.batch_size, hosts.local_rows(by_prompt, c.supervised.batch_size)
    load = functools.partial(pretrained.load_weights, c, opened, source, model, mesh, digits.text_size)
    return TrainingTask(
        **vars(_task(c, mesh, tables, held_out, model, c.prompts_per_step)) | {"expert": expert},
        work=Workdir(workdir, c, tables.fingerprint),
        streams=lambda: (solutions, prompts),
        validation=[] if validation is None or solutions is None else solution_batches(validation, sizes),
        baselines=functools.partial(_baselines, c, model, tables, train, held_out, validation),
        pretrained=opened,
        load_weights=load if source else None,
    )


def open_for_evaluation(config: Config, mesh: jax.sharding.Mesh, workdir: pathlib.Path) -> Task:
    """Opens the held-out table and its evaluation; see `tasks.open_for_evaluation`."""
    c = config
    tables = _tables_of_run(c, workdir)
    rows = tables.held_out_rows()
    batch_size = evaluation.batch_size(c, mesh, len(rows.targets))
    return _task(c, mesh, tables, rows, _model(c, tables, model_source(workdir)), batch_size)


def open_rows(config: Config, mesh: jax.sharding.Mesh, workdir: pathlib.Path, rows: Sequence[Row]) -> list[PromptBatch]:
    """Returns batches of new rows, scaled as the training table of a run; raises ConfigError for a row that does not fit."""
    tables = _tables_of_run(config, workdir)
    encoded = tables.encode(table_of(rows, tables.train, config.regression.missing), None)
    size = evaluation.batch_size(config, mesh, len(rows))
    return eval_batches(encoded, len(rows), size)


def _tables_of_run(c: Config, workdir: pathlib.Path) -> Tables:
    """Opens the tables of a trained run; raises ConfigError unless the training table is that of the run."""
    text = data.load_tokenizer(workdir / "tokenizer" / "text") if c.regression.inputs == "text" else None
    source = model_source(workdir)
    tables = open_tables(c, text, models.read_config(source).vocab_size if source else 0)
    if not _is_of(workdir, tables):
        raise ConfigError(
            f"{c.data.train} ({c.data.train_split}), as config.regression reads it, is not the training table of the run in {workdir}, which sets "
            "the scales of features and targets. Restore the file and the configuration, or name the file with --config.data.train."
        )
    return tables


def _is_of(workdir: pathlib.Path, tables: Tables) -> bool:
    """Returns whether a run has this training table, and spells numbers in this way."""
    digits, run = workdir / "tokenizer" / "digits.json", workdir / "config.json"
    if not digits.is_file() or not run.is_file():
        return False
    train = str(read_json(run).get("data_fingerprint")).partition("/")[0]
    return tables.digits.description() == read_json(digits) and tables.train.fingerprint == train


def _task(
    c: Config, mesh: jax.sharding.Mesh, tables: Tables, rows: Rows, model: models.ModelConfig, batch_size: int
) -> Task:
    """Returns the task that judges predictions of held-out `rows`, in batches of `batch_size`."""
    digits = tables.digits
    batches = eval_batches(rows, c.eval.prompts, batch_size)
    scorer = NumberScorer(c.reward.functions, c.reward.weights, digits, sharding.batch_sharding(mesh))

    def judge(
        generate: Generate, scorer: NumberScorer, reference: ProbeReference, journal: Journal | None = None
    ) -> Judged:
        samples, z = predict(generate, batches, digits)
        greedy = None
        if c.eval.temperature:
            greedy = predict(functools.partial(generate, temperature=0.0), batches, digits)[0][:, 0]
        return Judged(
            summary=lambda: {f"eval/{name}": x for name, x in prediction_metrics(samples, z, greedy).items()},
            metrics=functools.partial(prediction_metrics, samples, z, greedy),
            accuracies=lambda: np.zeros(0),
            per_prompt=dict,
            file="predictions.jsonl",
            lines=functools.partial(reporting.prediction_lines, samples, z, rows.targets, digits.target),
            draw=lambda metrics, path, title: reporting.plot_predictions(samples, z, path, title),
        )

    source = c.data.eval or c.data.train, tables.fingerprint
    return Task(digits, model, source, batches, scorer, scorer.verdict, judge, legal=digits.legal)


def _model(c: Config, tables: Tables, source: Mapping[str, Any] | None) -> models.ModelConfig:
    """Returns the decoder of a regression run. The vocabulary of a pretrained model follows the tokens of numbers."""
    size, r = tables.digits.vocab_size, c.regression
    model = config_lib.model_config(c, 1 if source else size, source)
    if source:
        return dataclasses.replace(model, vocab_size=size)
    if not tables.features:
        return model
    return dataclasses.replace(
        model,
        features=tables.features,
        prefix_length=r.prefix_length,
        encoder_width=r.encoder_width,
        encoder_layers=r.encoder_layers,
    )


def _check_start(c: Config, tables: Tables) -> None:
    """Raises ConfigError if config.supervised.start_from has another training table, or spells numbers differently."""
    start = c.supervised.start_from
    if start and not _is_of(pathlib.Path(start).expanduser(), tables):
        raise ConfigError(
            f"config.supervised.start_from is {start!r}, whose weights read another training table or spell numbers in another way. Start "
            "from a run with the same config.regression and training table."
        )


def _expert(method: Method, digits: Digits) -> Callable | None:
    """Returns the targets of GenRe2's dense expert term; None if its coefficient is 0."""
    settings = method.loss.find("expert")
    if not settings:
        return None
    if not isinstance(digits.number, numbers.NormalizedTokenizer):
        raise ConfigError(
            f"config.method.expert_coefficient is {settings.coefficient}, and the dense expert term is defined for "
            "config.regression.tokenizer 'normalized' only; set it to 0."
        )
    return functools.partial(numbers.expert_targets, base=digits.number.base)


def _baselines(
    c: Config, model: models.ModelConfig, tables: Tables, train: Rows, held_out: Rows, validation: Rows | None
) -> dict[str, float]:
    """Returns the metrics of the pointwise regressors, and the best possible R2 if it is known.

    They have the settings of the supervised phase, so a run without a start of its own has none. The policy's network
    with a squared-error head is among them if the rows enter as features and there are validation rows.
    """
    s, r = c.supervised, c.regression
    if not s.steps or s.start_from:
        return {}
    settings: Any = dict(
        steps=s.steps,
        batch_size=s.batch_size,
        learning_rate=s.learning_rate,
        seed=c.seed,
        every=r.validation_every,
        dropout=r.encoder_dropout,
    )
    found = pointwise.least_squares(train, held_out)
    found |= pointwise.pointwise_regressor(train, held_out, validation, width=r.encoder_width, **settings)
    if validation is not None and tables.features:
        begin = tables.digits.pad_id
        found |= pointwise.squared_error_head(train, held_out, validation, model=model, begin=begin, **settings)
    best = tables.held_out.best_r2
    return found | ({} if best is None else {"best_possible/r2": best})

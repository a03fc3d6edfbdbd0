"""What a run trains on and how it is judged: text problems, or numbers decoded from tables.

A task brings the data streams, the tokenizer, the scorer and the evaluation; the loop in train.py is the same for both.
"""

from collections.abc import Callable, Mapping
import dataclasses
import functools
import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_reason import config as config_lib
from jaxrl_reason import data, methods, models, runs
from jaxrl_reason.config import Config, ConfigError
from jaxrl_reason.data import numbers
from jaxrl_reason.data.values import altered, held_out_values, read_values
from jaxrl_reason.methods import Method
from jaxrl_reason.models import sharding
from jaxrl_reason.rewards.scorer import RewardScorer
from jaxrl_reason.rl import hosts
from jaxrl_reason.runs.workdir import model_source, Workdir
from jaxrl_reason.tasks import evaluation, regression


@dataclasses.dataclass(frozen=True)
class Task:
    """Everything about the data of a run.

    Attributes:
      work: its directory, looked at and not yet written to.
      tokenizer: between ids and text.
      model: the decoder's shape for this vocabulary.
      prompts: `batch(i)` gives the i-th PromptBatch for RL.
      solutions: `batch(i)` gives the i-th SolutionBatch of the supervised start, or None.
      held_out: batches of held-out prompts.
      scorer: rewards of a rollout.
      evaluate: (generate, scorer, c_ref) -> held-out figures, named eval/...; c_ref is LaSeR's constant, or None.
      legal: bool[T, V] tokens allowed at each position, or None.
      expert: see `experience.make_experience`, or None.
      baselines: () -> figures of other approaches on the same data, measured once a run.
      pretrained: the model that the run begins with where its directory does not say it yet, or None.
      load_weights: () -> the weights of that model, on the mesh; None where a run begins with random ones.
    """

    work: Workdir
    tokenizer: Any
    model: models.ModelConfig
    prompts: Any
    solutions: Any
    held_out: list[data.PromptBatch]
    scorer: Any
    evaluate: Callable
    legal: np.ndarray | None = None
    expert: Callable | None = None
    baselines: Callable[[], dict[str, float]] = dict
    pretrained: models.Opened | None = None
    load_weights: Callable[[], models.Params] | None = None


def open_task(config: Config, method: Method, mesh: jax.sharding.Mesh, workdir: str | pathlib.Path) -> Task:
    """The task of a configuration; reads data and checks them, writes nothing.

    Raises:
      ConfigError, RewardError, ValueError, OSError: a sentence that says what is wrong and where.
    """
    sharding.check_batch(mesh, "config.prompts_per_step", config.prompts_per_step)
    if config.supervised.steps:
        sharding.check_batch(mesh, "config.supervised.batch_size", config.supervised.batch_size)
    start = config.supervised.start_from
    if start and not (pathlib.Path(start).expanduser() / "start").is_dir():
        raise ConfigError(
            f"config.supervised.start_from is {start!r}, and there is no start/ in it: name the work directory of a run that was "
            "made with config.checkpoint.keep_start."
        )
    if start and config.lora.rank:
        _same_base(config, pathlib.Path(start).expanduser())
    return (_numbers if config.regression.tokenizer else _text)(config, method, mesh, workdir)


def _same_base(config: Config, start: pathlib.Path) -> None:
    """Refuses adapters of another run that were trained on other weights than this run's."""
    theirs = runs.load_config(start, {})
    fields = ("model", "lora") if config.model.path else ("model", "lora", "seed")
    other = [name for name in fields if getattr(config, name) != getattr(theirs, name)]
    if other:
        raise ConfigError(
            f"config.supervised.start_from is {str(start)!r}, a run with other config.{other[0]}: its adapters belong to other weights."
        )


def _text(c: Config, method: Method, mesh: jax.sharding.Mesh, workdir) -> Task:
    by_prompt = sharding.batch_sharding(mesh)
    rows_of = lambda name, split, columns=c.data.columns: data.load_source(
        name, split, data_dir=c.data.data_dir or None, columns=columns, on_bad_row=c.data.on_bad_row
    )
    train_rows = rows_of(c.data.train, c.data.train_split)
    eval_rows = rows_of(c.data.eval or c.data.train, c.data.eval_split, c.data.eval_columns or c.data.columns)
    data.warn_of_repeats(train_rows, eval_rows, data.get_template(c.data.template).render_prompt)
    columns = {}
    if "values" in method.signals:
        given = c.method.get("rlev", c.method)
        scale = {k: given.get(k, default) for k, default in methods.keywords("rlev").items() if k in ("alpha", "clip")}
        columns["values"] = altered(read_values(train_rows), c.data.values, seed=c.seed, **scale)

    work = Workdir(workdir, c, f"{train_rows.fingerprint}/{eval_rows.fingerprint}")
    source, pretrained = _source(c, work.path)

    def make_tokenizer():
        if c.supervised.start_from:
            return data.load_tokenizer(pathlib.Path(c.supervised.start_from).expanduser() / "tokenizer")
        if c.data.tokenizer:
            return data.load_tokenizer(c.data.tokenizer)
        if pretrained is not None:
            return _tokenizer_of(c, pretrained)
        template = data.get_template(c.data.template)
        rows = train_rows.read(range(min(len(train_rows), 2000)))
        texts = [
            template.render_prompt(row) + ("" if row.get("solution") is None else template.render_solution(row))
            for row in rows
        ]
        return data.train_tokenizer(texts, c.data.vocab_size)

    tokenizer = work.tokenizer(make_tokenizer)
    template = config_lib.prompt_template(c, tokenizer)
    model = config_lib.model_config(c, tokenizer.vocab_size, source)
    if pretrained is not None:
        models.check_weights(pretrained, _pretrained_shape(model))
    texts = dict(max_prompt_length=c.max_prompt_length, on_long=c.data.on_long_prompt)
    texts["add_bos"] = config_lib.begins_with_bos(c, tokenizer)
    scorer = RewardScorer(c.reward, tokenizer=tokenizer, template=template, sharding=by_prompt)
    judge = scorer.by_function[c.eval.verdict] if c.eval.verdict else scorer.verdict
    solutions = None
    if c.supervised.steps:
        solutions = data.SolutionStream(
            train_rows,
            tokenizer,
            template,
            batch_size=c.supervised.batch_size,
            seed=c.seed,
            max_completion_length=c.max_completion_length,
            places=hosts.places(by_prompt, c.supervised.batch_size),
            **texts,
        )
    prompts = data.PromptStream(
        train_rows,
        tokenizer,
        template,
        batch_size=c.prompts_per_step,
        seed=c.seed,
        columns=columns,
        places=hosts.places(by_prompt, c.prompts_per_step),
        **texts,
    )
    values = held_out_values(eval_rows, "values" in method.signals) if c.eval.every else None
    held_out = data.eval_prompts(eval_rows, tokenizer, template, c.eval.prompts, batch_size=c.prompts_per_step, **texts)
    for batch in (prompts.batch(0), *(held_out if c.eval.every else ())):
        scorer.check(batch.rows)
    scorer.check_references(train_rows)
    if c.eval.every:
        scorer.check_references(eval_rows, c.eval.prompts)
    return Task(
        work=work,
        tokenizer=tokenizer,
        model=model,
        prompts=prompts,
        solutions=solutions,
        held_out=held_out,
        scorer=scorer,
        evaluate=lambda generate, scorer, c_ref: evaluation.evaluate(
            evaluation.gather(
                generate,
                held_out,
                scorer,
                tokenizer,
                answers_of=scorer.answers_of(judge),
                verdict=judge,
                self_reward=self_reward_of(method, c_ref),
                values=values,
            ),
            c.eval.temperature,
        ),
        pretrained=pretrained,
        load_weights=functools.partial(_pretrained_weights, c, pretrained, source, model, mesh)
        if c.model.path
        else None,
    )


def _source(c: Config, work: pathlib.Path) -> tuple[Mapping[str, Any] | None, models.Opened | None]:
    """The config.json of the pretrained model that a run begins with, and, in a new work directory, the model, looked at."""
    source = model_source(work)
    if not c.model.path or source is not None:
        return source, None
    opened = models.open_model(c.model.path)
    return opened.source, opened


def _tokenizer_of(c: Config, opened: models.Opened) -> data.Tokenizer:
    if opened.tokenizer is None:
        raise ConfigError(
            f"config.model.path is {c.model.path!r}, which has no tokenizer.json; name one in config.data.tokenizer."
        )
    return opened.tokenizer


def _pretrained_shape(model: models.ModelConfig, digits: regression.Digits | None = None) -> models.ModelConfig:
    """The decoder whose weights config.model.path holds: without adapters, and without a number's tokens."""
    base = models.lora.base_of(model)
    return base if digits is None else dataclasses.replace(base, vocab_size=digits.text_size)


def _pretrained_weights(
    c: Config,
    pretrained: models.Opened | None,
    source: Mapping[str, Any] | None,
    model: models.ModelConfig,
    mesh: jax.sharding.Mesh,
    digits: regression.Digits | None = None,
):
    """The weights of config.model.path on the mesh, with fresh adapters where they are to be trained.

    Where the model is not `pretrained` any more, a run that goes on reads it again, at the commit of `source`.

    Tokens of numbers are new to the model: each begins as the mean of its embedding (and of its output head).
    """
    opened = pretrained or models.open_model(models.pinned(c.model.path, source))
    base = models.place_weights(opened, _pretrained_shape(model, digits), mesh)
    if digits is not None:
        new = model.vocab_size - digits.text_size
        placed = models.param_shardings(models.lora.base_of(model), mesh)
        for name, axis in ({"embedding": 0} | ({} if model.tied_embedding else {"head": 1})).items():
            mean = base[name].astype("float32").mean(axis=axis, keepdims=True).astype(base[name].dtype)
            more = jnp.concatenate([jnp.repeat(mean, new, axis=axis), base[name]], axis=axis)
            base[name] = jax.device_put(more, placed[name])
    if not model.lora_rank:
        return base
    shardings, _ = models.lora.split(model, models.param_shardings(model, mesh))
    key = jax.random.key(c.seed)
    adapters = jax.jit(functools.partial(models.lora.init_adapters, model), out_shardings=shardings)(key)
    return models.lora.join(adapters, base)


def _numbers(c: Config, method: Method, mesh: jax.sharding.Mesh, workdir) -> Task:
    by_prompt = sharding.batch_sharding(mesh)
    source, pretrained = _source(c, pathlib.Path(workdir).expanduser().resolve())
    text = None if pretrained is None else _tokenizer_of(c, pretrained)
    if source is not None and text is None:
        text = data.load_tokenizer(pathlib.Path(workdir).expanduser() / "tokenizer" / "text")
    table = regression.open_task(c, text, models.read_config(source).vocab_size if source else 0)
    digits, r = table.tokenizer, c.regression
    model = numbers_model(c, table, source)
    if pretrained is not None:
        models.check_weights(pretrained, _pretrained_shape(model, digits))
    if c.supervised.start_from:
        file = pathlib.Path(c.supervised.start_from).expanduser() / "tokenizer" / "digits.json"
        if not file.is_file() or json.loads(file.read_bytes()) != digits.description():
            raise ConfigError(
                f"config.supervised.start_from is {c.supervised.start_from!r}, whose weights spell numbers in another way or on another "
                f"scale ({file}): start from a run with the same config.regression and training table."
            )
    expert = None
    if settings := method.loss.find("expert"):
        if r.tokenizer != "normalized":
            raise ConfigError(
                f"config.method.expert_coefficient is {settings.coefficient}, and the dense expert term is defined for "
                "config.regression.tokenizer 'normalized' only; set it to 0."
            )
        expert = functools.partial(numbers.expert_targets, base=digits.number.base)
    stream = lambda size, solutions: regression.Stream(
        table.train, batch_size=size, seed=c.seed, solutions=solutions, places=hosts.places(by_prompt, size)
    )
    held_out = regression.eval_batches(table.held_out, c.eval.prompts, c.prompts_per_step)

    def baselines():
        s = c.supervised
        if not s.steps:
            return {}
        found = regression.pointwise_regressor(
            table,
            width=r.encoder_width,
            steps=s.steps,
            batch_size=s.batch_size,
            learning_rate=s.learning_rate,
            seed=c.seed,
        )
        return found | ({} if table.best_r2 is None else {"best_possible/r2": table.best_r2})

    return Task(
        work=Workdir(workdir, c, table.fingerprint),
        tokenizer=digits,
        model=model,
        prompts=stream(c.prompts_per_step, False),
        solutions=stream(c.supervised.batch_size, True) if c.supervised.steps else None,
        held_out=held_out,
        scorer=regression.NumberScorer(c.reward.functions, c.reward.weights, digits, by_prompt),
        evaluate=lambda generate, scorer, c_ref: regression.evaluate(generate, held_out, digits),
        legal=digits.legal,
        expert=expert,
        baselines=baselines,
        pretrained=pretrained,
        load_weights=functools.partial(_pretrained_weights, c, pretrained, source, model, mesh, digits)
        if source
        else None,
    )


def numbers_model(c: Config, table: regression.Task, source: Mapping[str, Any] | None) -> models.ModelConfig:
    """The decoder of a regression run.

    Features, where it has them, enter by its encoder. A pretrained one (`source`, its config.json) has the number's tokens in front of
    its own.
    """
    digits, r = table.tokenizer, c.regression
    model = config_lib.model_config(c, 1 if source else digits.vocab_size, source)
    if source:
        return dataclasses.replace(model, vocab_size=digits.vocab_size)
    if not table.features:
        return model
    return dataclasses.replace(
        model, features=table.features, prefix_length=r.prefix_length, encoder_width=r.encoder_width
    )


def probe_token(method: Method, tokenizer: data.Tokenizer) -> int | None:
    """The id of the token whose log-probability behind the end is LaSeR's self-reward; None where the method has none.

    Raises:
      ConfigError: the configured text is not one token, or there is no padding token to use.
    """
    settings = method.loss.find("self_reward")
    if not settings:
        return None
    text = settings.token
    if text:
        ids = tokenizer.encode(text)
        if len(ids) != 1:
            raise ConfigError(
                f"config.method.token is {text!r}, which this tokenizer writes as {len(ids)} tokens; name one that is a single token "
                "and otherwise unused."
            )
        return ids[0]
    if tokenizer.pad_id in tokenizer.eos_ids:
        raise ConfigError(
            "LaSeR needs a token that is otherwise unused, and this tokenizer's padding token is an end token too; name one in "
            "config.method.token."
        )
    return tokenizer.pad_id


def self_reward_of(method: Method, c_ref) -> Callable | None:
    """Rollout -> LaSeR's self-rewards f32[P, G], NaN where truncated; None without a constant."""
    settings = method.loss.find("self_reward")
    if c_ref is None or not settings:
        return None
    beta = settings.beta
    return lambda rollout: np.where(
        hosts.whole(rollout.truncated), np.nan, beta * (hosts.whole(rollout.probe_logprobs) - float(c_ref))
    )


BASELINES = ("pointwise/", "best_possible/")  # how the figures of other approaches begin


def headlines(method: Method) -> tuple[str, ...]:
    """How the names of the held-out figures begin that a summary of a run shows; all of them are in metrics.jsonl."""
    shown = ["accuracy", "pass@", "mean_length", "r2", "median_r2", "rmse", "spearman", "spread"]
    if "values" in method.signals:
        shown += ["h_accuracy", "value_density", "high_value", "low_value"]
    if method.loss.find("self_reward"):
        shown += ["self_reward", "best_of", "maj@", "weighted_vote"]
    if "answer_confidence" in method.signals:
        shown += ["distinct_right_answers", "entropy"]
    return tuple(shown)

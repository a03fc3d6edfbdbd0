"""Checks a configuration before anything compiles: types and ranges, signals, then the rules across fields."""

from collections.abc import Callable, Iterable, Mapping
import dataclasses
import math
from typing import Any, get_args, get_type_hints, NamedTuple

import jax
import numpy as np

from jaxrl_reason import methods
from jaxrl_reason.advantages import AdvantageInputs
from jaxrl_reason.config import schema
from jaxrl_reason.config.build import make_method, model_config, OVERRIDES
from jaxrl_reason.config.paths import has_unknown_user, remote
from jaxrl_reason.config.schema import Config, ConfigError, field_names, with_article
from jaxrl_reason.methods import Method

ALWAYS = frozenset({"rewards", "completion_mask", "verdicts", "truncated"})  # fields that no method need name


class Rule(NamedTuple):
    """A combination of fields that cannot run.

    The error is "config.FIELD is VALUE; ADVICE." In `field` and `advice`, {found} is the value of `broken`, and {c} is
    the configuration.
    """

    field: str  # the field that the error names, such as "update.minibatches"
    broken: Callable[[Config, Method], Any]  # returns a true value if they cannot run
    advice: str  # the reason, and the change that makes them run


def _changed(section: Any, names: Iterable[str]) -> str:
    """Returns the first of these fields that does not have its default, or ""."""
    default = type(section)()
    return next((name for name in names if getattr(section, name) != getattr(default, name)), "")


# Fields of data that regression runs do not use.
_OF_QUESTIONS = ("template", "chat", "add_bos", "columns", "eval_columns", "on_bad_row", "on_long_prompt")


def _all_text(columns: Mapping[Any, Any]) -> bool:
    return all(isinstance(name, str) for item in columns.items() for name in item)


def _unknown(name: str, known: list[str]) -> str:
    """Returns a hint at known names, or "" if the name is empty or known."""
    return "" if not name or name in known else methods.nearest(name, known)


def _learned(c: Config) -> str:
    """Returns the first learned reward of `reward.functions`, or ""."""
    return next((name for name in c.reward.functions if name.startswith("reward_model")), "")


def _weighted_scores(c: Config) -> str:
    """Returns "reward_model" if its scores, which can be negative, have a weight, or ""."""
    weights = c.reward.weights or [1.0] * len(c.reward.functions)
    return next((n for n, w in zip(c.reward.functions, weights) if n == "reward_model" and w), "")


def _misweighted(c: Config) -> str:
    """Returns the reward functions that have a weight, but are not the verdict; and the verdict, if it has none."""
    functions = c.reward.functions
    weights = c.reward.weights or [1.0] * len(functions)
    verdict = c.reward.verdict or functions[0]
    return ", ".join(name for name, weight in zip(functions, weights) if bool(weight) != (name == verdict))


def _uses(m: Method, *signals: str) -> str:
    """Returns those of `signals` that the method uses, or ""."""
    return ", ".join(name for name in signals if name in m.signals)


# The first broken rule is the error, so a rule can rely on the rules before it.
# fmt: off
RULES = (
    # method
    Rule("method.overlong_max_length",
         lambda c, m: c.method.get("overlong_max_length", 0) - c.method.get("overlong_cache_length", 0) >= c.max_completion_length,
         "the penalty begins overlong_cache_length tokens before it, which no completion reaches: "
         "set it to config.max_completion_length ({c.max_completion_length})"),
    Rule("group_size", lambda c, m: m.dynamic_sampling and c.group_size < 2,
         "config.method.dynamic_sampling keeps groups with both correct and incorrect completions: set it to at least 2"),
    Rule("method.name", lambda c, m: "genre2" in m.name.split("+") and not c.regression.tokenizer,
         "it predicts numbers: set config.regression.tokenizer, and name a table in config.data.train"),
    # update
    Rule("update.minibatches", lambda c, m: c.prompts_per_step % c.update.minibatches,
         "it must divide config.prompts_per_step ({c.prompts_per_step})"),
    Rule("update.accumulation",
         lambda c, m: (per_update := c.prompts_per_step // c.update.minibatches) % (c.update.accumulation or 1) and per_update,
         "it must divide the {found} prompts per update (config.prompts_per_step / config.update.minibatches)"),
    Rule("update.wave_tokens", lambda c, m: c.update.wave_tokens and c.update.lengths == 1,
         "config.update.lengths is 1, and only updates with several lengths use it: set both, or leave it out"),
    # data
    Rule("data.chat", lambda c, m: not c.data.chat and (c.data.system or c.data.chat_options),
         "config.data.system and config.data.chat_options belong to the model's chat template: set config.data.chat=true"),
    Rule("data.columns", lambda c, m: not _all_text(c.data.columns),
         "it must map column names to column names, all of them text"),
    Rule("data.eval_columns", lambda c, m: not _all_text(c.data.eval_columns),
         "it must map column names to column names, all of them text"),
    # reward
    Rule("reward.functions", lambda c, m: any(not isinstance(name, str) for name in c.reward.functions),
         "each must be the name of a reward"),
    Rule("reward.functions", lambda c, m: not c.reward.functions, "name at least one reward"),
    Rule("reward.weights", lambda c, m: c.reward.weights and len(c.reward.weights) != len(c.reward.functions),
         "give one weight to each of config.reward.functions, which are {c.reward.functions}"),
    Rule("reward.weights",
         lambda c, m: any(not isinstance(w, (int, float)) or isinstance(w, bool) for w in c.reward.weights),
         "each must be a number"),
    Rule("reward.verdict", lambda c, m: _unknown(c.reward.verdict, c.reward.functions),
         "it must be one of config.reward.functions.{found}"),
    Rule("eval.verdict", lambda c, m: _unknown(c.eval.verdict, c.reward.functions),
         "it must be one of config.reward.functions.{found}"),
    # optimizer, sampling, supervised
    Rule("optimizer.float32_master",
         lambda c, m: c.optimizer.float32_master and (c.model.param_dtype == "float32" or c.lora.rank),
         "it keeps a float32 copy of bfloat16 weights, and this run trains float32 weights: leave it out"),
    Rule("sampling.parts", lambda c, m: c.prompts_per_step % c.sampling.parts,
         "it must divide config.prompts_per_step ({c.prompts_per_step})"),
    Rule("sampling.importance_cap",
         lambda c, m: not c.sampling.quantize and c.sampling.importance_cap != schema.Sampling().importance_cap,
         "only config.sampling.quantize uses it: set both, or leave it out"),
    Rule("sampling.quantize",
         lambda c, m: c.sampling.quantize and _uses(m, "self_rewards", "answer_confidence"),
         "config.method.name {c.method[name]!r} needs exact log-probabilities for {found}: leave it empty"),
    Rule("steps", lambda c, m: not c.steps and not c.supervised.steps,
         "config.supervised.steps is 0, too, so there is nothing to train: set one of them above 0"),
    # regression: a table of numbers instead of text problems
    Rule("regression.tokenizer", lambda c, m: not c.regression.tokenizer and c.regression != schema.Regression(),
         "set it, or leave out the other fields of config.regression"),
    Rule("regression.validation_every",
         lambda c, m: not c.regression.validation_split and c.regression.validation_every != schema.Regression().validation_every,
         "it is for config.regression.validation_split: set both, or leave it out"),
    Rule("regression.encoder_dropout", lambda c, m: c.regression.encoder_dropout and c.regression.inputs == "text",
         "rows as text have no MLP: set config.regression.inputs='features', or leave it out"),
    Rule("regression.encoder_dropout",
         lambda c, m: c.regression.encoder_dropout and not c.supervised.steps and not c.supervised.start_from,
         "it is for the supervised phase, and config.supervised.steps is 0: set it above 0, or leave it out"),
    Rule("method.name", lambda c, m: c.regression.tokenizer and m.dynamic_sampling,
         "it keeps groups with both correct and incorrect completions, and a regression run has neither: "
         "set config.method.dynamic_sampling=false"),
    Rule("lora.rank", lambda c, m: c.regression.tokenizer and c.lora.rank,
         "a regression run learns new number tokens, and adapters cannot: set it to 0"),
    Rule("data.{found}", lambda c, m: c.regression.tokenizer and _changed(c.data, _OF_QUESTIONS),
         "a regression run (config.regression.tokenizer) does not use it: leave it out"),
    Rule("data.tokenizer", lambda c, m: c.regression.tokenizer and c.model.path and c.data.tokenizer,
         "a regression run uses the tokenizer of config.model.path: leave it empty"),
    Rule("model.path", lambda c, m: c.regression.tokenizer and c.model.path and c.regression.inputs != "text",
         "a pretrained model reads text: set config.regression.inputs='text'"),
    Rule("method.name", lambda c, m: c.regression.tokenizer and "values" in m.signals and not c.regression.value,
         "it uses the values of rows, and this regression run has none: name their column in config.regression.value"),
    Rule("data.values", lambda c, m: c.regression.tokenizer and c.data.values != "own",
         "it is for questions, and a regression run has rows: leave it out"),
    Rule("method.name",
         lambda c, m: c.regression.tokenizer and _uses(m, "answer_confidence", "model_scores", "self_rewards"),
         "it needs {found}, and a regression run has none: choose another method, or leave config.regression out"),
    Rule("reward.functions", lambda c, m: c.regression.tokenizer and _learned(c),
         "{found!r} reads text, and a regression run has none: leave it out"),
    # methods that refuse negative rewards
    Rule("method.name", lambda c, m: m.nonnegative_rewards and c.regression.tokenizer,
         "it refuses negative rewards, and those of a regression run are negative: choose another method"),
    Rule("reward.weights", lambda c, m: m.nonnegative_rewards and any(w < 0 for w in c.reward.weights),
         "config.method.name {c.method[name]!r} refuses negative rewards: each must be at least 0"),
    Rule("reward.functions", lambda c, m: m.nonnegative_rewards and "model_scores" not in m.signals and _weighted_scores(c),
         "config.method.name {c.method[name]!r} refuses negative rewards, and {found!r} can be negative: "
         "use 'reward_model_probability', or give it the weight 0"),
    # signals
    Rule("method.name", lambda c, m: "model_scores" in m.signals and "reward_model" not in c.reward.functions,
         "it needs a reward model: add 'reward_model' to config.reward.functions, with weight 0"),
    Rule("reward.weights", lambda c, m: "model_scores" in m.signals and _misweighted(c),
         "config.method.name {c.method[name]!r} replaces the sum of rewards, so the weights of {found} do not fit: "
         "give the function of config.reward.verdict the weight 1, and all others 0"),
    Rule("method.name", lambda c, m: "self_rewards" in m.signals and not m.loss.find("self_reward"),
         "it needs self-rewards: give its loss a SelfReward"),
    Rule("data.values", lambda c, m: c.data.values != "own" and "values" not in m.signals,
         "config.method.name {c.method[name]!r} uses no values: leave it out, or use rlev"),
    Rule("reward.functions", lambda c, m: c.reward_model != schema.RewardModel() and not _learned(c),
         "config.reward_model is set, and none of them is learned: add 'reward_model', or leave config.reward_model out"),
    # model, lora
    Rule("model.{found}",
         lambda c, m: c.model.path and _changed(c.model, sorted({*field_names(c.model)} - {"path", "attention", "remat", *OVERRIDES})),
         "the model of config.model.path has its own: leave one of the two out"),
    Rule("lora.rank", lambda c, m: not c.lora.rank and c.lora != schema.Lora(),
         "set it, or leave out the other fields of config.lora"),
    # log
    Rule("log.trackers", lambda c, m: any(name not in schema.TRACKERS for name in c.log.trackers),
         f"each must be one of {', '.join(schema.TRACKERS)}"),
    Rule("log.trackers", lambda c, m: len({*c.log.trackers}) < len(c.log.trackers), "name each tracker once"),
    Rule("log.profile", lambda c, m: c.log.profile and [type(step) for step in c.log.profile] != [int, int],
         "give the first and the last step to profile, such as [10, 12]"),
    Rule("log.profile", lambda c, m: c.log.profile and not 1 <= c.log.profile[0] <= c.log.profile[1] <= c.steps,
         "the first step must be at least 1, and the last one from there to config.steps ({c.steps})"),
)
# fmt: on


def validate(config: Config) -> Method:
    """Checks all that is known before data are read, and returns the method. The first failure raises ConfigError."""
    _check_fields(config)
    _check_paths(config)
    method = make_method(config)
    _check_signals(config, method)
    for rule in RULES:
        if found := rule.broken(config, method):
            name, advice = (text.format(c=config, found=found) for text in (rule.field, rule.advice))
            raise ConfigError(f"config.{name} is {_value(config, name)!r}; {advice}{'' if advice[-1] in '.?' else '.'}")
    new_model = dataclasses.replace(config, model=schema.Model()) if config.model.path else config
    model_config(new_model, vocab_size=300)
    return method


def _value(config: Config, name: str) -> Any:
    at: Any = config
    for part in name.split("."):
        at = at[part] if isinstance(at, dict) else getattr(at, part)
    return at


def _check_fields(section: Any, prefix: str = "config") -> None:
    """Raises ConfigError if a field has not its type, or is outside its range. Converts ints of float fields."""
    for f in dataclasses.fields(section):
        value, name, kind = getattr(section, f.name), f"{prefix}.{f.name}", get_type_hints(type(section))[f.name]
        if dataclasses.is_dataclass(kind):
            assert isinstance(kind, type)
            if not isinstance(value, kind):
                raise ConfigError(f"{name} is {value!r}; it must be a {kind.__name__} section.")
            _check_fields(value, name)
            continue
        if kind is float and type(value) is int:
            value = float(value)
            setattr(section, f.name, value)
        if type(value) is not kind and not (kind is list and type(value) is tuple):
            raise ConfigError(f"{name} is {value!r}; it must be {with_article(kind)}.")
        if allowed := _violated_bound(value, **{k: v for k, v in f.metadata.items() if k != "help"}):
            raise ConfigError(f"{name} is {value!r}; it must be {allowed}.")


def _violated_bound(value: Any, low: Any, above: Any, high: Any, below: Any, choices: Any) -> str:
    """Returns the first bound that the value violates, in words, or ""."""
    if isinstance(value, float) and not math.isfinite(value):
        return "a finite number"
    if low is not None and value < low:
        return f"at least {low}"
    if above is not None and value - above < np.finfo(np.float32).tiny:  # 1e-50 is 0 in float32
        return f"greater than {above}" + (" in float32" if value > above else "")
    if high is not None and value > high:
        return f"at most {high}"
    if below is not None and (value >= below or np.float32(value) >= below):  # 1 - 1e-9 is 1 in float32
        return f"less than {below} in float32"
    if choices and value not in choices:
        return f"one of {', '.join(choices)}"
    return ""


PATHS = (
    *("model.path", "reward_model.path", "supervised.start_from", "data.tokenizer"),
    *("data.data_dir", "data.train", "data.eval", "reward_model.data", "reward.functions", "compilation_cache"),
)


def _check_paths(config: Config) -> None:
    """Raises ConfigError if a path is an address of another machine; data may lie on the Hugging Face hub."""
    for name in PATHS:
        supported = ("hf://datasets/",) if name in ("data.train", "data.eval", "reward_model.data") else ()
        value = _value(config, name)
        for path in value if isinstance(value, list) else [value]:
            if elsewhere := remote(str(path), supported):
                raise ConfigError(f"config.{name} is {path!r}; only paths on this machine are supported: {elsewhere}.")
            if has_unknown_user(str(path)):
                raise ConfigError(
                    f"config.{name} is {path!r}, and no user has the name after ~; ~/ is your own home directory."
                )


def _check_signals(config: Config, method: Method) -> None:
    """Raises ConfigError if the advantage chain does not run with the signals that its method declares."""
    error = _chain_error(config, method, method.signals)
    if error is None:
        return
    every = frozenset(AdvantageInputs._fields)
    undeclared = [s for s in sorted(every - method.signals) if _chain_error(config, method, every - {s})]
    if undeclared and _chain_error(config, method, every) is None:  # it runs with all signals
        name = f"config.method.name {method.name!r}"
        advice = "which its Method does not declare; name them in Method(signals=...)."
        raise ConfigError(f"{name} reads the signals {undeclared}, {advice}") from error
    reason = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
    setting = f"config.method.name {method.name!r} with config.group_size {config.group_size}"
    raise ConfigError(f"{setting}: {reason.partition(chr(10))[0]}") from error


def _chain_error(config: Config, method: Method, signals: frozenset[str]) -> Exception | None:
    """Returns the exception that the advantage chain raises when traced with these signals, or None."""
    P, G, T = config.prompts_per_step, config.group_size, config.max_completion_length
    inputs: dict[str, Any] = {}
    for name, hint in get_type_hints(AdvantageInputs, include_extras=True).items():
        if name in ALWAYS | signals:
            array = next(kind for kind in get_args(hint) or (hint,) if kind is not type(None))
            shape = tuple({"P": P, "G": G, "T": T}[letter] for letter in array.dim_str.split())
            floating = isinstance(array.dtypes, tuple) and "float32" in array.dtypes
            inputs[name] = jax.ShapeDtypeStruct(shape, "float32" if floating else "bool")
    inputs = dict.fromkeys(AdvantageInputs._fields) | inputs
    try:
        jax.eval_shape(method.advantage.update, None, jax.eval_shape(method.advantage.init), AdvantageInputs(**inputs))
    except (ValueError, AssertionError, TypeError, AttributeError, OverflowError) as e:
        return e
    return None

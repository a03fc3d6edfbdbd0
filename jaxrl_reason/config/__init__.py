"""Typed configuration: one source for defaults, help, overrides, validation and what a run saves.

A recipe is a Python file whose `get_config()` returns a `Config`. On the command line any field can be
set as `--config.section.field=value`. Everything is checked by `validate` before anything compiles.
"""

import ast
from collections.abc import Mapping
import dataclasses
import difflib
import importlib.util
import math
import pathlib
import typing
from typing import Any

import jax
import numpy as np

from jaxrl_reason import data, losses, methods, models
from jaxrl_reason.advantages import AdvantageInputs


class ConfigError(ValueError):
    """A configuration that cannot run; the message is a sentence that names the field."""


def _field(default, help: str, *, low=None, above=None, high=None, below=None, choices=None):
    meta = dict(help=help, low=low, above=above, high=high, below=below, choices=choices)
    if isinstance(default, (dict, list)):
        return dataclasses.field(default_factory=lambda: type(default)(default), metadata=meta)
    return dataclasses.field(default=default, metadata=meta)


_section = dataclasses.dataclass(kw_only=True)


@_section
class Model:
    path: str = _field(
        "",
        "a model to begin with: a directory in the Hugging Face layout, an id of its hub, or a .gguf file; sizes, switches and "
        "tokenizer are then its own. Empty: random weights",
    )
    width: int = _field(128, "size of the residual stream", low=1)
    layers: int = _field(4, "number of layers", low=1)
    heads: int = _field(4, "query heads", low=1)
    kv_heads: int = _field(2, "key/value heads; divides heads", low=1)
    head_dim: int = _field(0, "size of a head; 0: width / heads", low=0)
    mlp_width: int = _field(384, "hidden size of the MLP", low=1)
    activation: str = _field("silu", "gate of the MLP", choices=("silu", "gelu"))
    rope_theta: float = _field(10_000.0, "base of the rotary frequencies", above=0)
    rope_scaling: dict = _field(
        {}, "stretch of the frequencies, e.g. {'kind': 'llama3', 'factor': 8.0, 'original_length': 8192}; empty: none"
    )
    sliding_window: int = _field(0, "positions a sliding layer sees; 0: no sliding layers", low=0)
    sliding_period: int = _field(0, "every n-th layer is global, the others slide; 0: all slide", low=0)
    local_rope_theta: float = _field(0.0, "rotary base of sliding layers; 0: rope_theta with its scaling", low=0)
    norm_eps: float = _field(1e-6, "epsilon of RMSNorm", above=0)
    norm_offset: float = _field(0.0, "added to the stored norm scales (Gemma: 1)")
    post_norms: bool = _field(False, "also normalise the output of attention and MLP (Gemma 3)")
    qkv_bias: bool = _field(False, "biases on query, key and value projections")
    qk_norm: bool = _field(False, "RMSNorm on each query and key head")
    tied_embedding: bool = _field(True, "the output head is the embedding")
    embedding_scale: float = _field(1.0, "embeddings are multiplied by this (Gemma: sqrt(width))", above=0)
    query_scale: float = _field(0.0, "attention scores are multiplied by this; 0: head_dim ** -0.5", low=0)
    param_dtype: str = _field("float32", "dtype of the weights", choices=("float32", "bfloat16"))
    compute_dtype: str = _field(
        "float32", "operands of matrix products (sums are float32)", choices=("float32", "bfloat16")
    )
    remat: str = _field("layer", "what the backward pass recomputes", choices=("none", "dots", "layer"))
    attention: str = _field(
        "auto",
        "of prompts and updates: splash (kernels for TPUs, interpreted elsewhere) or plain; auto: splash on TPUs",
        choices=("auto", "plain", "splash"),
    )


@_section
class Lora:
    rank: int = _field(
        0, "rank of the adapters that are trained in place of the weights; 0: all weights are trained", low=0
    )
    alpha: float = _field(16.0, "the adapters' product is multiplied by alpha / rank", above=0)
    projections: list = _field(list(models.PROJECTIONS), "the layers' matrices that have adapters")


@_section
class Data:
    train: str = _field(
        "word_problems",
        "a TFDS name (word_problems, gsm8k, ...), a path ending in .jsonl or .parquet, or hf://datasets/OWNER/NAME/PATH",
    )
    train_split: str = _field("train", "TFDS split, or a slice such as [:90%] of a JSONL file")
    eval: str = _field("", "the same, for evaluation; empty: as data.train")
    eval_split: str = _field("test", "split or slice for evaluation")
    data_dir: str = _field("", "where TFDS keeps prepared data; empty: TFDS's own default")
    columns: dict = _field({}, "our column names to the file's, e.g. {'question': 'problem'}")
    eval_columns: dict = _field({}, "the same, for data.eval; empty: as data.columns")
    template: str = _field("plain", "prompt template: a name from data/prompts.py, or a text with a {column}")
    chat: bool = _field(False, "put the prompt into the chat template that comes with the model, as the user's turn")
    system: str = _field("", "system prompt of that chat; empty: none, or the template's own")
    chat_options: dict = _field({}, "further names that the chat template knows, e.g. {'enable_thinking': False}")
    on_bad_row: str = _field("refuse", "what to do with a malformed row", choices=("refuse", "skip"))
    on_long_prompt: str = _field("refuse", "what to do with prompts over max_prompt_length", choices=("refuse", "skip"))
    tokenizer: str = _field("", "a tokenizer.json or its directory; empty: a small one trained on the data")
    vocab_size: int = _field(512, "size of the tokenizer that is trained where none is given", low=300)
    add_bos: bool = _field(
        False, "start each prompt with the tokenizer's BOS token, also where the tokenizer does not do it by itself"
    )
    values: str = _field(
        "own",
        "values of questions that RLEV trains with: their own, or its ablations",
        choices=("own", "uniform", "shuffled"),
    )


@_section
class Supervised:
    steps: int = _field(0, "supervised steps on worked solutions before RL; 0: none", low=0)
    batch_size: int = _field(64, "solutions a step", low=1)
    learning_rate: float = _field(1e-3, "peak learning rate (cosine to 0 after 5 % warm-up)", above=0)
    start_from: str = _field("", "work directory of a run whose supervised start is taken instead of training one")


@_section
class Regression:
    tokenizer: str = _field(
        "",
        "how a number is spelt; with it, data.train is a table (diabetes, synthetic, or a path ending in .csv) and the policy "
        "predicts numbers; empty: text problems",
        choices=("", "normalized", "p10", "ieee"),
    )
    tokenizer_options: dict = _field({}, "its options, e.g. {'base': 2, 'digits': 8}")
    target: str = _field("", "column of a .csv to predict")
    value: str = _field("", "column of numbers in [0, 1], what the rows are worth, for rlev; no feature then")
    missing: str = _field("refuse", "what a missing value does", choices=("refuse", "mean", "drop"))
    categorical: str = _field("refuse", "what a column of texts does", choices=("refuse", "onehot", "drop"))
    inputs: str = _field(
        "features", "rows enter through an MLP that gives prefix embeddings, or as text", choices=("features", "text")
    )
    prefix_length: int = _field(4, "prefix embeddings of a row", low=1)
    encoder_width: int = _field(128, "hidden size of that MLP, and of the pointwise regressor beside it", low=1)


@_section
class RewardModel:
    path: str = _field(
        "",
        "a reward model that was trained with this package, or a pretrained one: a directory in the Hugging Face layout or an id of "
        "its hub; empty: train one in this work directory",
    )
    system: str = _field("", "system prompt of a pretrained reward model's chat")
    max_length: int = _field(2048, "tokens that a pretrained reward model reads; a longer text has no score", low=1)
    data: str = _field("", "pairs to train it on: a source with question, chosen, rejected; empty: data.train")
    split: str = _field("", "split of these pairs; empty: data.train_split")
    eval_split: str = _field("", "split of the held-out pairs; empty: data.eval_split")
    steps: int = _field(300, "training steps", low=1)
    batch_size: int = _field(32, "pairs a step", low=1)
    learning_rate: float = _field(1e-3, "peak learning rate (cosine to 0 after 5 % warm-up)", above=0)


@_section
class Reward:
    functions: list = _field(
        ["accuracy"],
        "accuracy, last_number, format, math_verify, match_answer (on device), reward_model (learned), module:function or file.py:function",
    )
    weights: list = _field([], "a weight a function; empty: 1 each")
    verdict: str = _field("", "the function whose value > 0.5 means right; empty: the first")
    max_failure_share: float = _field(
        0.5,
        "stop when more than this share of a step's rewards (of a part's, see sampling.parts) failed",
        low=0,
        high=1,
    )
    workers: int = _field(
        0, "processes that call module:function and file.py:function; 0: one a core, at most 8", low=0
    )
    timeout_s: float = _field(
        10.0, "seconds that one such call may take, which is for all completions of a prompt", above=0
    )
    memory_mb: int = _field(2048, "memory that one such call may take beyond what its process began with", low=1)


@_section
class Sampling:
    temperature: float = _field(1.0, "temperature of the rollout; training uses the same law", above=0)
    quantize: str = _field(
        "",
        "rollouts decode with rounded weights and KV cache (evaluations do not); empty: as trained",
        choices=("", "int8"),
    )
    importance_cap: float = _field(
        2.0,
        "with sampling.quantize: tokens are weighted by min(p_trained / p_sampled, this), which corrects the rounding",
        above=0,
    )
    parts: int = _field(
        1,
        "a step's prompts are sampled in so many parts, one behind the other: smaller KV caches, and the host scores one while the "
        "next is sampled",
        low=1,
    )
    mismatch_limit: float = _field(
        0.0,
        "warn where sampler and trainer give a token log-probabilities that differ by more, in nats; 0: 0.01 in float32, else 1",
        low=0,
    )
    mask_truncated_completions: bool = _field(False, "leave completions without an end token out of the loss")
    max_batches: int = _field(8, "dynamic sampling: prompt batches drawn for a step at most", low=1)


@_section
class Optimizer:
    learning_rate: float = _field(1e-4, "peak learning rate", above=0)
    schedule: str = _field("constant", "after the warm-up", choices=("constant", "linear", "cosine"))
    warmup_steps: int = _field(0, "training steps of linear warm-up", low=0)
    weight_decay: float = _field(0.0, "AdamW's decoupled weight decay", low=0)
    b1: float = _field(0.9, "AdamW's first-moment decay", low=0, below=1)
    b2: float = _field(0.99, "AdamW's second-moment decay", low=0, below=1)
    eps: float = _field(1e-8, "AdamW's epsilon", above=0)
    max_grad_norm: float = _field(1.0, "clip gradients to this global norm", above=0)
    float32_master: bool = _field(
        False, "with bfloat16 weights: keep a float32 copy, so that steps smaller than bfloat16 can hold add up"
    )
    max_skipped: int = _field(
        5,
        "updates whose loss or gradient is not finite are skipped; stop after so many steps in a row of nothing else",
        low=1,
    )


@_section
class Update:
    epochs: int = _field(1, "passes over each rollout", low=1)
    minibatches: int = _field(1, "optimizer updates a pass; divides prompts_per_step", low=1)
    accumulation: int = _field(1, "microbatches an update: less memory, the same numbers", low=1)
    logprob_chunk: int = _field(0, "completion positions whose logits are held at once; 0: chosen", low=0)
    kl_coefficient: float = _field(0.0, "weight of KL(policy || reference) in the loss (TRL: beta)", low=0)
    kl_kind: str = _field(
        "k3", "estimate of that KL; all have the gradient of KL(policy || ref)", choices=losses.KL_KINDS
    )
    entropy_coefficient: float = _field(0.0, "weight of an entropy bonus", low=0)


@_section
class Mesh:
    slice: int = _field(1, "TPU slices joined by a data-centre network; -1: the rest", low=-1)
    data: int = _field(1, "devices that hold copies of the weights; -1: the rest", low=-1)
    fsdp: int = _field(-1, "devices over which weights and prompts are split; -1: the rest", low=-1)
    tensor: int = _field(1, "devices over which heads and vocabulary are split; -1: the rest", low=-1)
    rollout_tensor: int = _field(
        0,
        "devices over which they are split while sampling, where weights are not split by fsdp; 0: as mesh.tensor",
        low=0,
    )
    initialization_timeout: int = _field(
        300, "seconds that one of several processes waits for the others to come when a run begins", low=1
    )
    host_timeout: int = _field(
        100, "seconds without a sign of life from one of several processes after which the others end", low=1
    )


@_section
class Checkpoint:
    every: int = _field(100, "steps between checkpoints; the last step is always saved", low=1)
    keep: int = _field(2, "checkpoints kept", low=1)
    keep_start: bool = _field(
        False, "also keep the weights that RL begins with, for supervised.start_from of other runs"
    )


@_section
class Eval:
    every: int = _field(50, "steps between evaluations; first and last always; 0: none", low=0)
    prompts: int = _field(128, "held-out prompts", low=1)
    samples: int = _field(4, "completions a prompt", low=1)
    temperature: float = _field(1.0, "temperature of evaluation; 0: greedy", low=0)
    verdict: str = _field(
        "", "the reward function whose value > 0.5 counts as right in evaluation; empty: reward.verdict"
    )


@_section
class Log:
    samples_every: int = _field(10, "steps between tables of sample completions; 0: none", low=0)
    samples: int = _field(8, "completions in such a table", low=1)
    tensorboard: bool = _field(True, "write TensorBoard events")
    progress: bool = _field(True, "show a progress bar")
    heartbeat: float = _field(
        60.0, "say so when a step takes longer than these seconds, and five times as long as usual; 0: never", low=0
    )


@_section
class Config:
    """A run. `method` holds a name and that method's own keywords."""

    seed: int = _field(0, "everything random derives from it", low=0, high=2**31 - 1)
    steps: int = _field(100, "RL steps", low=1)
    prompts_per_step: int = _field(16, "prompts a step (P)", low=1)
    group_size: int = _field(8, "completions a prompt (G)", low=1)
    max_prompt_length: int = _field(64, "tokens of a prompt (S)", low=1)
    max_completion_length: int = _field(64, "tokens of a completion, end token included (T)", low=1)
    model: Model = dataclasses.field(default_factory=Model)
    lora: Lora = dataclasses.field(default_factory=Lora)
    data: Data = dataclasses.field(default_factory=Data)
    supervised: Supervised = dataclasses.field(default_factory=Supervised)
    regression: Regression = dataclasses.field(default_factory=Regression)
    reward: Reward = dataclasses.field(default_factory=Reward)
    reward_model: RewardModel = dataclasses.field(default_factory=RewardModel)
    method: dict = _field(
        {"name": "grpo"}, "the method's name and its own keywords (python -m jaxrl_reason.train --help)"
    )
    sampling: Sampling = dataclasses.field(default_factory=Sampling)
    optimizer: Optimizer = dataclasses.field(default_factory=Optimizer)
    update: Update = dataclasses.field(default_factory=Update)
    mesh: Mesh = dataclasses.field(default_factory=Mesh)
    checkpoint: Checkpoint = dataclasses.field(default_factory=Checkpoint)
    eval: Eval = dataclasses.field(default_factory=Eval)
    log: Log = dataclasses.field(default_factory=Log)


# -- reading ---------------------------------------------------------------------------------------


def load_module(path: str | pathlib.Path):
    """A recipe file as a module."""
    path = pathlib.Path(path)
    if not path.is_file():
        near = difflib.get_close_matches(str(path), [str(p) for p in path.parent.glob("*.py")], n=3)
        hint = " Did you mean " + " or ".join(near) + "?" if near else ""
        raise ConfigError(f"There is no configuration file {path}.{hint}")
    spec = importlib.util.spec_from_file_location(f"jaxrl_reason_recipe_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as e:  # a recipe is a program: it can fail in any way
        raise _not_a_recipe(path, e) from e
    return module


def load(path: str | pathlib.Path) -> Config:
    """The Config that `get_config()` of a recipe file returns."""
    module = load_module(path)
    try:
        config = module.get_config()
    except ConfigError:
        raise
    except Exception as e:
        raise _not_a_recipe(path, e) from e
    if not isinstance(config, Config):
        raise ConfigError(
            f"{path}: get_config() returned {type(config).__name__}; it must return a jaxrl_reason.config.Config."
        )
    return config


def _not_a_recipe(path, error: Exception) -> ConfigError:
    return ConfigError(
        f"{path} could not be read as a recipe with a get_config() function: {type(error).__name__}: {error}."
    )


def override(config: Config, name: str, text: str) -> None:
    """Sets `section.field` (or a key of `method`) from the text of a command-line value, in place."""
    *sections, leaf = name.split(".")
    at, seen = config, "config"
    for part in sections:
        at = at.setdefault(part, {}) if isinstance(at, dict) else _child(at, part, seen)
        seen += "." + part
        if not (dataclasses.is_dataclass(at) or isinstance(at, dict)):
            raise ConfigError(f"--{seen} is a single value and has no field {leaf!r}.")
    if isinstance(at, dict):
        at[leaf] = _literal(text)
        return
    current = _child(at, leaf, seen)
    if dataclasses.is_dataclass(current):
        raise ConfigError(f"--{seen}.{leaf} is a section; set one of its fields: {', '.join(_names(current))}.")
    hint = typing.get_type_hints(type(at))[leaf]
    setattr(at, leaf, _convert(text, hint, f"{seen}.{leaf}"))


def _names(section) -> list[str]:
    return [f.name for f in dataclasses.fields(section)]


def _child(at, part: str, seen: str):
    known = _names(at)
    if part not in known:
        raise ConfigError(f"{seen} has no field {part!r}.{methods.nearest(part, known)}")
    return getattr(at, part)


def _literal(text: str):
    try:
        return ast.literal_eval({"true": "True", "false": "False", "none": "None"}.get(text.lower(), text))
    except (ValueError, SyntaxError):
        return text


def _convert(text: str, hint, name: str):
    if hint is str:
        return text
    value = _literal(text)
    if hint is list and isinstance(value, str):
        value = [v.strip() for v in value.split(",") if v.strip()]
    elif hint is list and isinstance(value, (tuple, int, float)):
        value = list(value) if isinstance(value, tuple) else [value]
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if hint is int and isinstance(value, float) and value.is_integer():
        value = int(value)
    if type(value) is not hint:
        raise ConfigError(f"--{name}={text}: expected {_a(hint)}.")
    return value


def to_dict(config: Config) -> dict[str, Any]:
    return dataclasses.asdict(config)


def from_dict(values: dict[str, Any], kind=Config):
    """The inverse of `to_dict`; unknown fields are refused."""
    hints = typing.get_type_hints(kind)
    for key in values:
        if key not in hints:
            raise ConfigError(
                f"The saved configuration has a field {key!r} that this version does not know."
                f"{methods.nearest(key, list(hints))}"
            )
    return kind(**{k: from_dict(v, hints[k]) if dataclasses.is_dataclass(hints[k]) else v for k, v in values.items()})


def parse_args(argv: list[str]) -> tuple[Config, str]:
    """(configuration, work directory) from --config=FILE --workdir=DIR --config.field=value ...

    Without --workdir it is runs/NAME, NAME being that of the recipe's file.

    Raises:
      ConfigError: an unknown flag or field, or a value that does not convert.
    """
    values, path, workdir = [], None, None
    argv = list(argv)
    while argv:
        flag, equals, text = argv.pop(0).partition("=")
        if not equals and argv and not argv[0].startswith("--"):
            text = argv.pop(0)  # --flag value
        elif not equals:
            raise ConfigError(f"{flag} needs a value: {flag}=...")
        if flag == "--config":
            path = text
        elif flag == "--workdir":
            workdir = text
        elif flag.startswith("--config."):
            values.append((flag.removeprefix("--config."), text))
        else:
            raise ConfigError(
                f"There is no flag {flag!r}; there are --config=FILE, --workdir=DIR, --config.section.field=value and --help."
            )
    if not path:
        raise ConfigError("--config=FILE is missing.")
    workdir = workdir or f"runs/{pathlib.Path(path).stem}"
    config = load(path)
    for name, text in values:
        override(config, name, text)
    return config, workdir


# -- checking --------------------------------------------------------------------------------------


def _a(kind: type) -> str:
    return f"{'an' if kind is int else 'a'} {kind.__name__}"


def _check_fields(section, prefix: str = "config") -> None:
    hints = typing.get_type_hints(type(section))
    for f in dataclasses.fields(section):
        value, name, meta = getattr(section, f.name), f"{prefix}.{f.name}", f.metadata
        if dataclasses.is_dataclass(hints[f.name]):
            if not isinstance(value, hints[f.name]):
                raise ConfigError(f"{name} is {value!r}; it must be a {hints[f.name].__name__} section.")
            _check_fields(value, name)
            continue
        hint = hints[f.name]
        if hint is float and type(value) is int:
            value = float(value)
            setattr(section, f.name, value)
        if type(value) is not hint and not (hint is list and type(value) is tuple):
            raise ConfigError(f"{name} is {value!r}; it must be {_a(hint)}.")
        if isinstance(value, float) and not math.isfinite(value):
            raise ConfigError(f"{name} is {value}; it must be a finite number.")
        if meta.get("low") is not None and value < meta["low"]:
            raise ConfigError(f"{name} is {value}; it must be at least {meta['low']}.")
        if meta.get("above") is not None and value <= meta["above"]:
            raise ConfigError(f"{name} is {value}; it must be greater than {meta['above']}.")
        if meta.get("high") is not None and value > meta["high"]:
            raise ConfigError(f"{name} is {value}; it must be at most {meta['high']}.")
        below = meta.get("below")
        if below is not None and (value >= below or np.float32(value) >= below):  # 1 - 1e-9 is 1 where it is used
            raise ConfigError(f"{name} is {value}; it must be less than {below} in float32.")
        if meta.get("choices") and value not in meta["choices"]:
            raise ConfigError(f"{name} is {value!r}; it must be one of {', '.join(meta['choices'])}.")


def _check_option(name: str, value, default) -> None:
    """The kind of a method's keyword, by its default; a dict holds those of one method of a stack."""
    if isinstance(default, dict) and isinstance(value, dict):
        for key, inner in value.items():
            if key in default:
                _check_option(f"{name}.{key}", inner, default[key])
        return
    kinds = {float: (float, int), type(None): (float, int, type(None))}.get(type(default), (type(default),))
    if type(value) not in kinds or isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(
            f"{name} is {value!r}; it must be a finite {kinds[0].__name__}."
            if float in kinds
            else f"{name} is {value!r}; it must be {_a(kinds[0])}."
        )


def make_method(config: Config) -> methods.Method:
    options = dict(config.method)
    name = options.pop("name", "")
    if not isinstance(name, str):
        raise ConfigError(f"config.method.name is {name!r}; it must be a str.")
    try:
        base = options.get("base", "")
        for key, default in methods.keywords(name, base if isinstance(base, str) else "").items():
            _check_option(f"config.method.{key}", options.get(key, default), default)
        return methods.create(name, **options)
    except ConfigError:
        raise
    except (ValueError, TypeError) as e:
        raise ConfigError(f"config.method: {e}") from e


_OF_PRETRAINED = (
    "path",
    "attention",
    "param_dtype",
    "compute_dtype",
    "remat",
)  # what config.model can still say about one


def prompt_template(config: Config, tokenizer: data.Tokenizer) -> data.PromptTemplate | data.ChatTemplate:
    """What turns the rows of a run into prompts and solutions. Raises ValueError where there is no such template."""
    d = config.data
    template = data.get_template(d.template)
    return data.chat_template(template, tokenizer, d.system, d.chat_options) if d.chat else template


def begins_with_bos(config: Config, tokenizer: data.Tokenizer) -> bool:
    """Whether prompts begin with the begin token: where the tokenizer does it by itself, or it is asked for. A chat template says its own."""
    return config.data.add_bos or (tokenizer.adds_bos and not config.data.chat)


def model_config(config: Config, vocab_size: int, source: Mapping[str, Any] | None = None) -> models.ModelConfig:
    """The decoder of a run; what computes its attention is chosen with the devices, see `programs.with_attention`.

    Args:
      config: of the run.
      vocab_size: of its tokenizer.
      source: the config.json of the pretrained model it begins with, or None.

    Raises:
      ConfigError: there can be no such decoder.
    """
    sizes = dataclasses.asdict(config.model)
    adapters = {}
    if config.lora.rank:
        names = tuple(config.lora.projections)
        adapters = dict(lora_rank=config.lora.rank, lora_alpha=config.lora.alpha, lora_projections=names)
    if source is not None:
        found = models.read_config(source)
        if vocab_size > found.vocab_size:
            raise ConfigError(
                f"The tokenizer has {vocab_size} tokens, and the model of config.model.path has {found.vocab_size}; leave "
                "config.data.tokenizer empty to take the model's own."
            )
        return dataclasses.replace(found, **{name: sizes[name] for name in _OF_PRETRAINED[2:]}, **adapters)
    scaling = sizes.pop("rope_scaling")
    for name in _OF_PRETRAINED[:2]:
        sizes.pop(name)
    try:
        scaling = models.RopeScaling(**scaling) if scaling else None
        return models.ModelConfig(vocab_size=vocab_size, rope_scaling=scaling, **sizes, **adapters)
    except TypeError as e:  # of rope_scaling, the one part that is not typed above
        names = ", ".join(f.name for f in dataclasses.fields(models.RopeScaling))
        raise ConfigError(
            f"config.model.rope_scaling is {scaling}; it needs 'kind' and 'factor', and its names are {names}."
        ) from e
    except ValueError as e:
        raise ConfigError(f"config.{e}") from e


# What the training loop supplies without being asked.
ALWAYS = frozenset({"rewards", "completion_mask", "verdicts", "truncated"})


def validate(config: Config) -> methods.Method:
    """Checks everything that can be known before data is read; returns the configured method.

    Raises:
      ConfigError: one sentence naming the field, what it is and what it may be.
    """
    _check_fields(config)
    c = config
    method = make_method(c)
    error = _chain_error(c, method, method.signals)
    if error:
        undeclared = _undeclared_signals(c, method)
        if undeclared:
            raise ConfigError(
                f"config.method.name {method.name!r} reads the signals {undeclared}, which its Method does not declare; "
                "name them in Method(signals=...)."
            ) from error
        fault = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
        fault = fault.partition("\n")[0]
        raise ConfigError(
            f"config.method.name {method.name!r} with config.group_size {c.group_size}: {fault}"
        ) from error
    if method.dynamic_sampling and c.group_size < 2:
        raise ConfigError(
            "config.method.dynamic_sampling keeps groups with both right and wrong answers; config.group_size must be at least 2."
        )
    if c.prompts_per_step % c.update.minibatches:
        raise ConfigError(
            f"config.update.minibatches is {c.update.minibatches}, which does not divide config.prompts_per_step ({c.prompts_per_step})."
        )
    per_update = c.prompts_per_step // c.update.minibatches
    if per_update % c.update.accumulation:
        raise ConfigError(
            f"config.update.accumulation is {c.update.accumulation}, which does not divide the {per_update} prompts of "
            "an update (config.prompts_per_step / config.update.minibatches)."
        )
    if c.prompts_per_step % c.sampling.parts:
        raise ConfigError(
            f"config.sampling.parts is {c.sampling.parts}, which does not divide config.prompts_per_step ({c.prompts_per_step})."
        )
    if not c.data.chat and (c.data.system or c.data.chat_options):
        raise ConfigError(
            "config.data.system and config.data.chat_options belong to the model's chat template; set config.data.chat=true."
        )
    for field in ("columns", "eval_columns"):
        columns = getattr(c.data, field)
        if any(not isinstance(name, str) for item in columns.items() for name in item):
            raise ConfigError(
                f"config.data.{field} is {columns}; it must map column names to column names, all of them text."
            )
    if any(not isinstance(name, str) for name in c.reward.functions):
        raise ConfigError(f"config.reward.functions is {c.reward.functions}; each must be the name of a reward.")
    if not c.reward.functions:
        raise ConfigError("config.reward.functions is empty; name at least one reward.")
    if c.reward.weights and len(c.reward.weights) != len(c.reward.functions):
        raise ConfigError(
            f"config.reward.weights has {len(c.reward.weights)} entries for {len(c.reward.functions)} config.reward.functions."
        )
    if any(not isinstance(w, (int, float)) or isinstance(w, bool) for w in c.reward.weights):
        raise ConfigError(f"config.reward.weights is {c.reward.weights}; each must be a number.")
    if c.reward.verdict and c.reward.verdict not in c.reward.functions:
        raise ConfigError(
            f"config.reward.verdict is {c.reward.verdict!r}, which is not among config.reward.functions.{methods.nearest(c.reward.verdict, c.reward.functions)}"
        )
    if c.eval.verdict and c.eval.verdict not in c.reward.functions:
        raise ConfigError(
            f"config.eval.verdict is {c.eval.verdict!r}, which is not among config.reward.functions."
            f"{methods.nearest(c.eval.verdict, c.reward.functions)}"
        )
    if c.optimizer.float32_master and (c.model.param_dtype == "float32" or c.lora.rank):
        raise ConfigError(
            "config.optimizer.float32_master keeps a float32 copy of bfloat16 weights, and what this run trains is float32 already; "
            "leave it out."
        )
    if not c.sampling.quantize and c.sampling.importance_cap != Sampling().importance_cap:
        raise ConfigError(
            f"config.sampling.importance_cap is {c.sampling.importance_cap}, and rollouts are of the trained law; it is for "
            "config.sampling.quantize."
        )
    if c.supervised.start_from and c.supervised.steps:
        raise ConfigError(
            "config.supervised.start_from takes another run's supervised start, and config.supervised.steps asks for one of this "
            "run's own; set one of them to empty or 0."
        )
    _check_needs(c, method)
    if c.model.path:
        fresh = Model()
        given = [
            name
            for name in _names(fresh)
            if name not in _OF_PRETRAINED and getattr(c.model, name) != getattr(fresh, name)
        ]
        if given:
            raise ConfigError(
                f"config.model.{given[0]} is {getattr(c.model, given[0])!r}, and the model of config.model.path brings its own; leave out "
                "one of them."
            )
    if not c.lora.rank and c.lora != Lora():
        raise ConfigError("config.lora is set and config.lora.rank is 0, so nothing would read it.")
    model_config(dataclasses.replace(c, model=Model() if c.model.path else c.model), vocab_size=300)
    return method


def _check_needs(c: Config, method: methods.Method) -> None:
    """What a method needs from other sections, and sections that nothing would read."""
    numbers, parts = c.regression.tokenizer, method.name.split("+")
    learned = [name for name in c.reward.functions if name.startswith("reward_model")]
    if "genre2" in parts and not numbers:
        raise ConfigError(
            "config.method.name 'genre2' predicts numbers: set config.regression.tokenizer, and a table as data.train."
        )
    if numbers and method.dynamic_sampling:
        raise ConfigError(
            f"config.method.name {method.name!r} keeps groups with both right and wrong answers, and a regression run has neither; "
            "set config.method.dynamic_sampling=false."
        )
    if numbers and c.lora.rank:
        raise ConfigError(
            "config.lora.rank trains adapters alone, and in a regression run (config.regression.tokenizer) the tokens of numbers are new and "
            "have to be learnt: set it to 0."
        )
    unread = [name for name in ("template", "chat", "add_bos") if getattr(c.data, name) != getattr(Data(), name)]
    if numbers and unread:
        raise ConfigError(
            f"config.data.{unread[0]} is for text problems; a regression run (config.regression.tokenizer) does not read it."
        )
    if numbers and c.model.path and c.data.tokenizer:
        raise ConfigError(
            "config.data.tokenizer is set, and in a regression run the model of config.model.path brings its own."
        )
    if numbers and c.model.path and c.regression.inputs != "text":
        raise ConfigError(
            "config.model.path names a pretrained model, which reads text: set config.regression.inputs='text'."
        )
    if numbers:
        if "values" in method.signals and not c.regression.value:
            raise ConfigError(
                f"config.method.name {method.name!r} weighs rows by their values, and this regression run has none: name their column in "
                "config.regression.value."
            )
        if c.data.values != "own":
            raise ConfigError(
                f"config.data.values is {c.data.values!r}, which is for questions; a regression run has its own."
            )
        foreign = sorted(method.signals & {"model_scores", "self_rewards", "answer_confidence"})
        if foreign:
            raise ConfigError(
                f"config.method.name {method.name!r} needs {foreign}, which a regression run (config.regression.tokenizer) does not have."
            )
        if learned:
            raise ConfigError(
                f"config.reward.functions names {learned[0]!r}, which reads text; a regression run has none."
            )
    elif c.regression != Regression():
        raise ConfigError(
            "config.regression is set and config.regression.tokenizer is empty, so nothing would read it."
        )
    rounded = sorted(method.signals & {"self_rewards", "answer_confidence"})
    if c.sampling.quantize and rounded:
        raise ConfigError(
            f"config.method.name {method.name!r} reads log-probabilities of the rollout as {rounded[0]}, and config.sampling.quantize rounds "
            "them; leave it empty."
        )
    if "model_scores" in method.signals:
        if "reward_model" not in c.reward.functions:
            raise ConfigError(
                f"config.method.name {method.name!r} grades by a reward model: add 'reward_model' to config.reward.functions, with weight 0."
            )
        weights = dict(zip(c.reward.functions, c.reward.weights or [1.0] * len(c.reward.functions)))
        verdict = c.reward.verdict or c.reward.functions[0]
        others = [name for name, weight in weights.items() if weight and name != verdict]
        if others or not weights[verdict]:
            raise ConfigError(
                f"config.method.name {method.name!r} puts its own reward, made of the verdict of {verdict!r} and the reward model's "
                f"score, in the place of the sum of rewards: give {verdict!r} the weight 1 and the others"
                f"{' (' + ', '.join(others) + ')' if others else ''} 0 in config.reward.weights."
            )
    if "self_rewards" in method.signals and not method.loss.find("self_reward"):
        raise ConfigError(f"config.method.name {method.name!r} needs self-rewards, and its loss has no SelfReward.")
    if not learned and c.reward_model != RewardModel():
        raise ConfigError(
            "config.reward_model is set, and no reward of config.reward.functions is learned; add 'reward_model' there."
        )
    if c.data.values != "own" and "values" not in method.signals:
        raise ConfigError(
            f"config.data.values is {c.data.values!r}, and config.method.name {method.name!r} reads no values; only rlev does."
        )


def _chain_error(c: Config, method: methods.Method, signals: frozenset[str]) -> Exception | None:
    """What the chain raises where the loop supplies these signals, or None. Shapes and dtypes only: nothing is compiled."""
    P, G, T = c.prompts_per_step, c.group_size, c.max_completion_length
    shapes = dict(completion_mask=(P, G, T), greedy_rewards=(P,), values=(P,), prompt_confidence=(P,), kl=(P, G, T))
    dtypes = dict.fromkeys(("completion_mask", "verdicts", "truncated"), "bool")
    inputs = AdvantageInputs(
        **{
            name: jax.ShapeDtypeStruct(shapes.get(name, (P, G)), dtypes.get(name, "float32"))
            if name in ALWAYS | signals
            else None
            for name in AdvantageInputs._fields
        }
    )
    try:
        jax.eval_shape(method.advantage.update, None, jax.eval_shape(method.advantage.init), inputs)
    except (ValueError, AssertionError, TypeError, AttributeError) as e:
        return e
    return None


def _undeclared_signals(c: Config, method: methods.Method) -> list[str]:
    """The signals without which a chain that runs with all of them does not run, and that its method does not declare."""
    every = frozenset(AdvantageInputs._fields)
    if _chain_error(c, method, every):
        return []
    return [name for name in sorted(every - method.signals) if _chain_error(c, method, every - {name})]


def help_text() -> str:
    """Every field with its default, type and meaning, from the same definitions that are checked."""
    lines = []

    def describe(section, prefix):
        hints = typing.get_type_hints(type(section))
        for f in dataclasses.fields(section):
            value = getattr(section, f.name)
            if dataclasses.is_dataclass(hints[f.name]):
                lines.append("")
                describe(value, f"{prefix}.{f.name}")
            else:
                choices = f.metadata.get("choices")
                text = f.metadata["help"] + (f" ({' | '.join(choices)})" if choices else "")
                lines.append(f"  --{prefix}.{f.name}={value!r:<12} {text}")

    describe(Config(), "config")
    lines.append("\nMethods (config.method.name) and their keywords (config.method.*):")
    for name in methods.names():
        options = ", ".join(f"{k}={v}" for k, v in methods.keywords(name).items())
        lines.append(f"  {name:<22} {options}")
    return "\n".join(lines)

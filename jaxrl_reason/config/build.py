"""Builds the objects that a configuration describes: the method, the decoder, the prompt template."""

from collections.abc import Mapping
import dataclasses
import math
from typing import Any

from jaxrl_reason import data, methods, models
from jaxrl_reason.config.schema import Config, ConfigError, field_names, with_article

OVERRIDES = ("param_dtype", "compute_dtype")  # fields of config.model that also apply to a pretrained model


def make_method(config: Config) -> methods.Method:
    """Returns the method of `config.method`. Raises ConfigError for an unknown name or an invalid keyword."""
    keywords = dict(config.method)
    name = keywords.pop("name", "")
    if not isinstance(name, str):
        raise ConfigError(f"config.method.name is {name!r}; it must be a str.")
    try:
        base = keywords.get("base", "")
        for key, default in methods.keywords(name, base if isinstance(base, str) else "").items():
            _check_keyword(f"config.method.{key}", keywords.get(key, default), default)
        return methods.create(name, **keywords)
    except ConfigError:
        raise
    except (ValueError, TypeError) as e:
        raise ConfigError(f"config.method: {e}") from e


def _check_keyword(name: str, value: Any, default: Any) -> None:
    """Raises ConfigError if a keyword of a method has not the type of its default."""
    if isinstance(default, dict) and isinstance(value, dict):  # the keywords of one method of a stack
        for key, inner in value.items():
            if key in default:
                _check_keyword(f"{name}.{key}", inner, default[key])
        return
    kinds = {float: (float, int), type(None): (float, int, type(None))}.get(type(default), (type(default),))
    if type(value) not in kinds or isinstance(value, float) and not math.isfinite(value):
        expected = "a finite float" if float in kinds else with_article(kinds[0])
        raise ConfigError(f"{name} is {value!r}; it must be {expected}.")


def prompt_template(config: Config, tokenizer: data.Tokenizer) -> data.PromptTemplate | data.ChatTemplate:
    """Returns the template that turns rows into prompts and worked solutions.

    With `data.chat`, the tokenizer has the chat template. Raises ValueError for an unknown template.
    """
    template = data.get_template(config.data.template)
    if not config.data.chat:
        return template
    return data.chat_template(template, tokenizer, config.data.system, config.data.chat_options)


def begins_with_bos(config: Config, tokenizer: data.Tokenizer) -> bool:
    """Returns True if the BOS token is put before prompts: by `data.add_bos`, or as the tokenizer's default.

    A chat template writes its own BOS token, so the tokenizer's default does not apply to chats.
    """
    return config.data.add_bos or (tokenizer.adds_bos and not config.data.chat)


def model_config(config: Config, vocab_size: int, source: Mapping[str, Any] | None = None) -> models.ModelConfig:
    """Returns the configuration of the decoder; `rl.devices` sets its attention, remat and unrolled later, by the devices.

    `vocab_size` is the number of tokens of the tokenizer. `source` is config.json of the pretrained model, or None for
    a new model. Raises ConfigError for fields that do not make a decoder.
    """
    lora, adapters = config.lora, dict[str, Any]()
    if lora.rank:
        adapters = dict(lora_rank=lora.rank, lora_alpha=lora.alpha, lora_projections=tuple(lora.projections))
    if source is None:
        return _new_model(config, vocab_size, adapters)
    found = models.read_config(source)
    if vocab_size > found.vocab_size:
        raise ConfigError(
            f"The tokenizer has {vocab_size} tokens, and the model of config.model.path has {found.vocab_size}; leave "
            "config.data.tokenizer empty to use the tokenizer of the model."
        )
    return dataclasses.replace(found, **{name: getattr(config.model, name) for name in OVERRIDES}, **adapters)


def _new_model(config: Config, vocab_size: int, adapters: Mapping[str, Any]) -> models.ModelConfig:
    sizes = dataclasses.asdict(config.model)
    del sizes["path"], sizes["attention"], sizes["remat"]
    scaling = sizes.pop("rope_scaling")
    try:
        rope_scaling = models.RopeScaling(**scaling) if scaling else None
        return models.ModelConfig(vocab_size=vocab_size, rope_scaling=rope_scaling, **sizes, **adapters)
    except TypeError as e:  # only rope_scaling has entries of unchecked types
        raise ConfigError(
            f"config.model.rope_scaling is {scaling}; it needs 'kind' and 'factor', and its names are "
            f"{', '.join(field_names(models.RopeScaling))}."
        ) from e
    except ValueError as e:
        raise ConfigError(f"config.{e}") from e

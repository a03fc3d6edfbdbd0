"""The pretrained model that a run begins with: its description, its tokenizer, and its weights on the mesh."""

from collections.abc import Mapping
import dataclasses
import functools
import pathlib
from typing import Any

import jax
import jax.numpy as jnp

from jaxrl_reason import data, models
from jaxrl_reason.config import Config, ConfigError
from jaxrl_reason.runs.workdir import model_source


def find(config: Config, workdir: pathlib.Path) -> tuple[Mapping[str, Any] | None, models.Opened | None]:
    """Returns the model's config.json, and the opened model unless the work directory records the config.json."""
    source = model_source(workdir)
    if not config.model.path or source is not None:
        return source, None
    opened = models.open_model(config.model.path)
    return opened.source, opened


def tokenizer_of(config: Config, opened: models.Opened) -> data.Tokenizer:
    """Returns the model's tokenizer; raises ConfigError if it has none."""
    if opened.tokenizer is None:
        raise ConfigError(
            f"config.model.path is {config.model.path!r}, which has no tokenizer.json; name one in config.data.tokenizer."
        )
    return opened.tokenizer


def base_shape(model: models.ModelConfig, vocab_size: int | None = None) -> models.ModelConfig:
    """Returns the decoder that config.model.path holds: `model` without adapters, with its `vocab_size` if given."""
    base = models.lora.base_of(model)
    return base if vocab_size is None else dataclasses.replace(base, vocab_size=vocab_size)


def load_weights(
    config: Config,
    opened: models.Opened | None,
    source: Mapping[str, Any] | None,
    model: models.ModelConfig,
    mesh: jax.sharding.Mesh,
    vocab_size: int | None = None,
) -> models.Params:
    """Loads the weights of config.model.path onto the mesh, and adds fresh adapters if the run trains adapters.

    `opened` None: the model is opened again, at the commit that `source`, its config.json, records. If the run adds
    tokens before the model's own, `vocab_size` is the number of ids of the pretrained model.
    """
    opened = opened or models.reopen(config.model.path, source or {})
    base = models.place_weights(opened, base_shape(model, vocab_size), mesh)
    if vocab_size is not None:
        _add_tokens(base, model, mesh, model.vocab_size - vocab_size)
    if not model.lora_rank:
        return base
    shardings, _ = models.lora.split(model, models.param_shardings(model, mesh))
    key = jax.random.key(config.seed)
    adapters = jax.jit(functools.partial(models.lora.init_adapters, model), out_shardings=shardings)(key)
    return models.lora.join(adapters, base)


def _add_tokens(params: models.Params, model: models.ModelConfig, mesh: jax.sharding.Mesh, count: int) -> None:
    """Adds `count` tokens before the model's own, in place, with the mean embedding and the mean output head."""
    placed = models.param_shardings(models.lora.base_of(model), mesh)
    for name, axis in ({"embedding": 0} | ({} if model.tied_embedding else {"head": 1})).items():
        mean = params[name].astype("float32").mean(axis=axis, keepdims=True).astype(params[name].dtype)
        more = jnp.concatenate([jnp.repeat(mean, count, axis=axis), params[name]], axis=axis)
        params[name] = jax.device_put(more, placed[name])

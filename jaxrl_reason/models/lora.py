"""LoRA (arXiv 2106.09685): trains low-rank additions to the layers' matrices, and keeps all other weights.

The adapter of a projection q consists of two more weights of the decoder, `q_a` [layers, in, rank] and `q_b` [layers, rank, out]: x q
becomes x q + (alpha / rank) (x q_a) q_b. Without adapters all weights are trained, and the functions here change nothing.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Key

from jaxrl_reason.models import decoder
from jaxrl_reason.models.config import ModelConfig


def names_of(config: ModelConfig) -> tuple[str, ...]:
    """Returns the names of the adapters among the weights of the layers."""
    return tuple(f"{name}_{side}" for name in config.lora_projections for side in "ab") if config.lora_rank else ()


def split(config: ModelConfig, params: decoder.Params) -> tuple[decoder.Params, decoder.Params]:
    """Splits the weights into (trained, frozen), each with the structure of the parameters and only its own weights."""
    adapters = set(names_of(config))
    if not adapters:
        return params, {}
    layers = params["layers"]
    frozen = {name: weight for name, weight in params.items() if name != "layers"}
    frozen["layers"] = {name: weight for name, weight in layers.items() if name not in adapters}
    return {"layers": {name: layers[name] for name in adapters}}, frozen


def join(trained: decoder.Params, frozen: decoder.Params) -> decoder.Params:
    """Joins the two parts of `split` to the parameters."""
    return {**frozen, "layers": frozen["layers"] | trained["layers"]} if frozen else trained


def base_of(config: ModelConfig) -> ModelConfig:
    """Returns the configuration of the decoder without adapters."""
    plain: dict[str, Any] = {f.name: f.default for f in dataclasses.fields(ModelConfig) if f.name.startswith("lora_")}
    return dataclasses.replace(config, **plain)


def init_adapters(config: ModelConfig, key: Key[Array, ""]) -> decoder.Params:
    """Draws new adapters, the first part of `split`; they add nothing before they are trained. Traceable."""
    return split(config, decoder.init_params(config, key))[0]


def merge(config: ModelConfig, params: decoder.Params, dtype: str | None = None) -> tuple[ModelConfig, decoder.Params]:
    """Merges the adapters into their matrices: a decoder without adapters that computes the same function, up to rounding.

    Sums are in float32 and rounded once, to `dtype`; None: to the dtype of the matrices. Other weights keep their dtype.
    """
    if not config.lora_rank:
        return config, params
    adapters, base = split(config, params)

    def add(name):
        weight = base["layers"][name]
        if name not in config.lora_projections:
            return weight
        a, b = (adapters["layers"][f"{name}_{side}"].astype(jnp.float32) for side in "ab")
        more = jnp.einsum("nir,nro->nio", a, b, precision=jax.lax.Precision.HIGHEST)
        return (weight.astype(jnp.float32) + config.lora_scale * more).astype(dtype or weight.dtype)

    return base_of(config), {**base, "layers": {name: add(name) for name in base["layers"]}}

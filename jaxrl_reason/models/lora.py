"""LoRA (arXiv 2106.09685): low-rank additions to the layers' matrices are trained, everything else stays as it is.

The adapters of a projection q are two more weights of the decoder, `q_a` [layers, in, rank] and `q_b` [layers, rank, out]: x q becomes
x q + (alpha / rank) (x q_a) q_b. Without adapters everything is trained, and the functions here change nothing.
"""

import dataclasses
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy

from jaxrl_reason.models import decoder
from jaxrl_reason.models.config import ModelConfig
from jaxrl_reason.models.formats import families


def names_of(config: ModelConfig) -> tuple[str, ...]:
    """The layers' weights that are adapters."""
    return tuple(f"{name}_{side}" for name in config.lora_projections for side in "ab") if config.lora_rank else ()


def split(config: ModelConfig, params: decoder.Params) -> tuple[decoder.Params, decoder.Params]:
    """(what is trained, what is not), each with the structure of the parameters and only its own weights."""
    adapters = set(names_of(config))
    if not adapters:
        return params, {}
    layers = params["layers"]
    frozen = {name: weight for name, weight in params.items() if name != "layers"}
    frozen["layers"] = {name: weight for name, weight in layers.items() if name not in adapters}
    return {"layers": {name: layers[name] for name in adapters}}, frozen


def join(trained: decoder.Params, frozen: decoder.Params) -> decoder.Params:
    """The parameters again."""
    if not frozen:
        return trained
    return {**frozen, "layers": {**frozen["layers"], **trained["layers"]}}


def base_of(config: ModelConfig) -> ModelConfig:
    """The decoder without adapters."""
    plain = {f.name: f.default for f in dataclasses.fields(ModelConfig) if f.name.startswith("lora_")}
    return dataclasses.replace(config, **plain)


def init_adapters(config: ModelConfig, key: jax.Array) -> decoder.Params:
    """Fresh adapters, as the first of `split`: they add nothing yet. Traceable."""
    return split(config, decoder.init_params(config, key))[0]


def merge(config: ModelConfig, params: decoder.Params) -> tuple[ModelConfig, decoder.Params]:
    """A decoder without adapters that computes the same: each matrix with its addition, summed in float32."""
    if not config.lora_rank:
        return config, params
    adapters, base = split(config, params)

    def add(name):
        if name not in config.lora_projections:
            return base["layers"][name]
        a, b = (adapters["layers"][f"{name}_{side}"].astype(jnp.float32) for side in "ab")
        weight = base["layers"][name]
        more = jnp.einsum("nir,nro->nio", a, b, precision=jax.lax.Precision.HIGHEST)
        return (weight.astype(jnp.float32) + config.lora_scale * more).astype(weight.dtype)

    return base_of(config), {**base, "layers": {name: add(name) for name in base["layers"]}}


def save_peft(
    directory: pathlib.Path, config: ModelConfig, params: decoder.Params, base_model: str, revision: str | None = None
) -> None:
    """Writes the adapters as PEFT reads them: adapter_config.json and adapter_model.safetensors.

    Args:
      directory: is there.
      config, params: with adapters.
      base_model: what PEFT loads them on, a directory or an id of the hub.
      revision: the commit of the hub that this is taken at.
    """
    table = families.tensors_of(base_of(config), decoder.abstract_params(base_of(config)))["layers"]
    tensors = {}
    for name in config.lora_projections:
        for side, theirs in (("a", "lora_A"), ("b", "lora_B")):
            stacked = np.asarray(params["layers"][f"{name}_{side}"])
            for layer, matrix in zip(table[name].names, stacked):
                module = layer.removesuffix(".weight")
                tensors[f"base_model.model.{module}.{theirs}.weight"] = np.ascontiguousarray(matrix.T)
    safetensors.numpy.save_file(tensors, directory / "adapter_model.safetensors", metadata={"format": "pt"})
    content = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "revision": revision,
        "r": config.lora_rank,
        "lora_alpha": config.lora_alpha,
        "target_modules": [table[name].names[0].split(".")[-2] for name in config.lora_projections],
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    (directory / "adapter_config.json").write_text(json.dumps(content, indent=2) + "\n")

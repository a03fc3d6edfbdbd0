"""Adapters in the layout of PEFT: adapter_config.json and adapter_model.safetensors."""

import json
import pathlib

import numpy as np
import safetensors.numpy

from jaxrl_reason.data import hub
from jaxrl_reason.models import decoder, lora
from jaxrl_reason.models.formats.pretrained import complete_or_absent, Policy, write_tokenizer
from jaxrl_reason.models.formats.source import REVISION
from jaxrl_reason.models.formats.tensors import tensors_of


def save_adapters(directory: str | pathlib.Path, policy: Policy, base_model: str) -> None:
    """Writes the adapters of a policy and the tokenizer's files; all of them or nothing.

    Args:
      directory: a directory that does not exist, or is empty.
      policy: a policy with adapters.
      base_model: the model to which PEFT adds them, a directory or an id of the hub. An id is written with the commit that the
        policy began with.

    Raises:
      PretrainedError: if the directory is not empty.
    """
    revision = policy.source.get(REVISION)
    base = lora.base_of(policy.config)
    table = tensors_of(base, decoder.abstract_params(base))["layers"]
    names = policy.config.lora_projections
    content = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": hub.name_of(base_model) if revision else base_model,
        "revision": revision,
        "r": policy.config.lora_rank,
        "lora_alpha": policy.config.lora_alpha,
        "target_modules": [table[name].names[0].split(".")[-2] for name in names],
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    tensors = {}
    for name in names:
        for side, theirs in (("a", "lora_A"), ("b", "lora_B")):
            stacked = np.asarray(policy.params["layers"][f"{name}_{side}"])
            for layer, matrix in zip(table[name].names, stacked):
                module = layer.removesuffix(".weight")
                tensors[f"base_model.model.{module}.{theirs}.weight"] = np.ascontiguousarray(matrix.T)
    with complete_or_absent(directory) as scratch:
        safetensors.numpy.save_file(tensors, scratch / "adapter_model.safetensors", metadata={"format": "pt"})
        (scratch / "adapter_config.json").write_text(json.dumps(content, indent=2) + "\n")
        write_tokenizer(scratch, policy)

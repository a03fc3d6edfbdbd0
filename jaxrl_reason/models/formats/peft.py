"""PEFT directories, read: the adapters of LoRA are added to the weights of their base model while those are read."""

from collections.abc import Mapping
import math
import pathlib
import re
from typing import Any

import numpy as np

from jaxrl_reason.data import hub
from jaxrl_reason.models.formats.tensors import PretrainedError, Weights
from jaxrl_reason.models.formats.weights import inside, open_safetensors, read_json

CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_NAME = re.compile(r"base_model\.model\.(.+)\.lora_([AB])\.weight")
# Settings that change more than a product of two matrices, with the values that do not.
_PLAIN: dict[str, tuple] = {
    "peft_type": ("LORA",),
    "bias": ("none", None),
    "init_lora_weights": (True, False, None, "gaussian", "orthogonal", "eva"),  # others change the base model
    **dict.fromkeys(("use_dora", "fan_in_fan_out", "lora_bias", "use_qalora"), (False, None)),
    **dict.fromkeys(("modules_to_save", "trainable_token_indices", "layer_replication"), (None, [], {})),
    **dict.fromkeys(("alora_invocation_tokens", "target_parameters"), (None, [])),
}


def is_adapter(directory: pathlib.Path) -> bool:
    """Returns whether a directory holds adapters and no weights of a whole model. Some hold its config.json."""
    whole = ("model.safetensors", "model.safetensors.index.json")
    return inside(directory, CONFIG).is_file() and not any(inside(directory, name).is_file() for name in whole)


def base_of(directory: pathlib.Path) -> str:
    """Returns the base model of adapters: a path, or an id of the hub with its revision, if the adapters name one.

    A relative path begins at the working directory, as for PEFT, or else at the directory of the adapters.
    """
    found = read_json(directory / CONFIG)
    base, revision = found.get("base_model_name_or_path"), found.get("revision")
    if not isinstance(base, str) or not base:
        raise PretrainedError(
            f"{directory / CONFIG} has base_model_name_or_path {base!r}; it must name the base model."
        )
    path = pathlib.Path(base).expanduser()
    if not path.exists() and (directory / path).exists():
        return str((directory / path).resolve())
    local = path.exists() or not hub.is_address(base)
    return base if local or not isinstance(revision, str) else hub.at_revision(base, revision)


class Adapted:
    """The weights of a base model with adapters added, see `Weights`. Sums are in float32.

    Raises PretrainedError if the adapters are not plain LoRA, do not fit the base model, or are damaged.
    """

    def __init__(self, base: Weights, directory: pathlib.Path) -> None:
        self.where, self._base = str(directory), base
        self.shapes: Mapping[str, tuple[int, ...]] = base.shapes
        config, path = read_json(directory / CONFIG), inside(directory, _WEIGHTS)
        for key, allowed in _PLAIN.items():
            if key in config and config[key] not in allowed:
                fault = f"{directory / CONFIG} has {key} {config[key]!r}"
                raise PretrainedError(f"{fault}; only plain LoRA can be read: merge the adapters with PEFT first.")
        if not path.is_file():
            hint = " It has a pickle, which can run code: convert it." if any(directory.glob("*.bin")) else ""
            raise PretrainedError(f"There is no {path}.{hint}")
        sides: dict[str, dict[str, np.ndarray]] = {}
        with open_safetensors(path) as file:
            for key in file.keys():
                match = _NAME.fullmatch(key)
                if match is None or f"{match[1]}.weight" not in base.shapes:
                    raise PretrainedError(f"{path} has {key}, which is no adapter of a weight of {base.where}.")
                sides.setdefault(match[1], {})[match[2]] = np.asarray(file.get_tensor(key)).astype(np.float32)
        self._pairs = {f"{name}.weight": self._pair(path, name, pair, config) for name, pair in sides.items()}
        if not self._pairs:
            raise PretrainedError(f"{path} holds no adapters.")

    def _pair(
        self, path: pathlib.Path, name: str, sides: Mapping[str, np.ndarray], config: Mapping[str, Any]
    ) -> tuple[np.ndarray, np.ndarray]:
        """Returns the two sides of an adapter, [r, in] and [out, r]; the second is scaled."""
        a, b = sides.get("A"), sides.get("B")
        out_in = self.shapes[f"{name}.weight"]
        if a is None or b is None or a.ndim != 2 or b.shape != (out_in[0], len(a)) or a.shape[1:] != out_in[1:]:
            shapes = {side: list(x.shape) for side, x in sides.items()}
            raise PretrainedError(
                f"{path}: the adapter of {name} has the shapes {shapes}; the weight is {list(out_in)}."
            )
        rank, alpha = config.get("r"), _alpha(path, name, config)
        if len(a) != rank and not config.get("rank_pattern"):
            raise PretrainedError(f"{path}: the adapter of {name} has rank {len(a)}, and its configuration {rank}.")
        scale = alpha / (math.sqrt(len(a)) if config.get("use_rslora") else len(a))
        return a, b * np.float32(scale)

    def read(self, name: str, part: tuple[slice, ...]) -> np.ndarray:
        """Reads a part of a tensor."""
        found = self._base.read(name, part)
        if name not in self._pairs:
            return found
        a, b = self._pairs[name]
        return found.astype(np.float32) + b[part[0]] @ a[:, part[1]]


def _alpha(path: pathlib.Path, name: str, config: Mapping[str, Any]) -> float:
    """Returns the `alpha` of a module: by the first pattern that matches the end of its path, as in PEFT, else lora_alpha."""
    patterns = config.get("alpha_pattern") or {}
    if not isinstance(patterns, dict) or not all(map(_is_quick, patterns)):
        rule = "only names can be read, and regular expressions without repeated groups"
        raise PretrainedError(f"{path.with_name(CONFIG)} has alpha_pattern {patterns}; {rule}.")
    named = (alpha for key, alpha in patterns.items() if re.match(rf"(.*\.)?({key})$", name))
    alpha = next(named, config.get("lora_alpha", 8))
    if type(alpha) not in (int, float) or not 0 < alpha < math.inf:
        raise PretrainedError(f"{path.with_name(CONFIG)} has alpha {alpha!r}; it must be a finite number above 0.")
    return alpha


def _is_quick(pattern: str) -> bool:
    """Returns whether a text is a regular expression that cannot take long: no repeated group, few repetitions."""
    try:
        re.compile(pattern)
    except (re.error, RecursionError, OverflowError):
        return False
    return (
        len(pattern) <= 500
        and not re.search(r"\)[*+{]|\\[1-9]|\(\?P=", pattern)
        and len(re.findall("[*+{]", pattern)) <= 4
    )

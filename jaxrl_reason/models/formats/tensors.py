"""Opened models and their tensors in Hugging Face's layout: types that the formats share, and a `Tensor` per weight."""

from collections.abc import Mapping
import dataclasses
from typing import Any, Protocol, runtime_checkable

import numpy as np

from jaxrl_reason.data.tokenizer import Tokenizer
from jaxrl_reason.models.config import ModelConfig

_NAMES = dict(
    embedding="model.embed_tokens.weight", final_norm="model.norm.weight", head="lm_head.weight", score="score.weight"
)
_LAYER_NAMES = (
    {name: f"self_attn.{name}_proj.weight" for name in "qkvo"}
    | {f"{name}_bias": f"self_attn.{name}_proj.bias" for name in "qkv"}
    | {f"{name}_norm": f"self_attn.{name}_norm.weight" for name in "qk"}
    | {name: f"mlp.{name}_proj.weight" for name in ("gate", "up", "down")}
    | {"attention_norm": "input_layernorm.weight", "mlp_norm": "post_attention_layernorm.weight"}
)
_LAYER_NAMES_WITH_POST_NORMS = _LAYER_NAMES | {
    "post_attention_norm": "post_attention_layernorm.weight",
    "mlp_norm": "pre_feedforward_layernorm.weight",
    "post_mlp_norm": "post_feedforward_layernorm.weight",
}


class PretrainedError(ValueError):
    """A model cannot be read or written. The message is a sentence that names the file, the field or the tensor."""


@runtime_checkable
class Weights(Protocol):
    """A readable source of named tensors. Its shapes are known before any tensor is read."""

    @property
    def where(self) -> str: ...  # its name in messages
    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]: ...  # by name

    def read(self, name: str, part: tuple[slice, ...]) -> np.ndarray:
        """Reads a part of a tensor."""


@dataclasses.dataclass(frozen=True)
class Tensor:
    """The tensors of a file that hold one weight of the decoder."""

    names: tuple[str, ...]  # one tensor, or one per layer if the weight is stacked
    stacked: bool  # whether the weight has a leading axis of layers
    transposed: bool  # whether the file has [out, in]; weights of the decoder are [in, out]
    shape: tuple[int, ...]  # shape of each tensor in the file


@dataclasses.dataclass(frozen=True, eq=False)
class Opened:
    """A model that is opened: everything about it but the values of its weights. For other fields see `pretrained.Policy`."""

    config: ModelConfig  # in float32; the caller chooses dtypes
    weights: Weights
    tokenizer: Tokenizer | None
    source: Mapping[str, Any]
    files: Mapping[str, bytes]


def tensors_of(config: ModelConfig, abstract_params: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a `Tensor` per weight, in the structure of the parameters of a policy or a reward model."""
    layer_names = _LAYER_NAMES_WITH_POST_NORMS if config.post_norms else _LAYER_NAMES

    def walk(tree: Mapping[str, Any], stacked: bool) -> dict[str, Any]:
        out: dict[str, Any] = {}
        for name, leaf in tree.items():
            if isinstance(leaf, Mapping):
                out[name] = walk(leaf, name == "layers")
                continue
            shape = leaf.shape[1:] if stacked else leaf.shape
            transposed = len(shape) == 2 and name != "embedding"
            shape = shape[::-1] if transposed else shape
            if stacked:
                names = tuple(f"model.layers.{i}.{layer_names[name]}" for i in range(config.layers))
            else:
                names = (_NAMES[name],)
            out[name] = Tensor(names, stacked, transposed, (1, *shape) if name == "score" else shape)
        return out

    return walk(abstract_params, False)

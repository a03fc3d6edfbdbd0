"""Names and shapes of tensors in Hugging Face's layout, for each weight of the decoder."""

from collections.abc import Mapping
from typing import Any

from jaxrl_reason.models.config import ModelConfig
from jaxrl_reason.models.formats.types import Tensor

_NAMES = {
    "embedding": "model.embed_tokens.weight",
    "final_norm": "model.norm.weight",
    "head": "lm_head.weight",
    "score": "score.weight",
}
_LAYER_NAMES = {
    "attention_norm": "input_layernorm.weight",
    "q": "self_attn.q_proj.weight",
    "k": "self_attn.k_proj.weight",
    "v": "self_attn.v_proj.weight",
    "o": "self_attn.o_proj.weight",
    "q_bias": "self_attn.q_proj.bias",
    "k_bias": "self_attn.k_proj.bias",
    "v_bias": "self_attn.v_proj.bias",
    "q_norm": "self_attn.q_norm.weight",
    "k_norm": "self_attn.k_norm.weight",
    "mlp_norm": "post_attention_layernorm.weight",
    "gate": "mlp.gate_proj.weight",
    "up": "mlp.up_proj.weight",
    "down": "mlp.down_proj.weight",
}
_LAYER_NAMES_WITH_POST_NORMS = {
    "post_attention_norm": "post_attention_layernorm.weight",
    "mlp_norm": "pre_feedforward_layernorm.weight",
    "post_mlp_norm": "post_feedforward_layernorm.weight",
}


def tensors_of(config: ModelConfig, abstract_params: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a `Tensor` per weight, in the structure of the parameters.

    Args:
      config: the decoder.
      abstract_params: shapes of the parameters of a policy, or of a reward model ({"decoder": ..., "score": ...}).
    """
    layer_names = _LAYER_NAMES | (_LAYER_NAMES_WITH_POST_NORMS if config.post_norms else {})

    def walk(tree: Mapping[str, Any], stacked: bool) -> dict[str, Any]:
        out: dict[str, Any] = {}
        for name, leaf in tree.items():
            if isinstance(leaf, Mapping):
                out[name] = walk(leaf, name == "layers")
                continue
            shape = leaf.shape[1:] if stacked else leaf.shape
            transposed = len(shape) == 2 and name != "embedding"
            shape = shape[::-1] if transposed else shape
            if name == "score":
                shape = (1, *shape)
            if stacked:
                names = tuple(f"model.layers.{i}.{layer_names[name]}" for i in range(config.layers))
            else:
                names = (_NAMES[name],)
            out[name] = Tensor(names, stacked, transposed, shape)
        return out

    return walk(abstract_params, False)

"""Models from GGUF files, the format of llama.cpp: weights are dequantised tensor by tensor, and the tokenizer is built again.

Needs the package `gguf`, an optional extra that is imported only when a file is read: pip install 'jaxrl_reason[gguf]'.
"""

from collections.abc import Callable
import pathlib
from typing import Any

import numpy as np
import tokenizers
from tokenizers import decoders, pre_tokenizers
from tokenizers import models as tokenizer_models

from jaxrl_reason.data.tokenizer import Tokenizer
from jaxrl_reason.models.formats import families
from jaxrl_reason.models.formats.tensors import Opened, PretrainedError

_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_LAYER_NAMES = (
    {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm", "attn_output": "self_attn.o_proj"}
    | {f"attn_{x}": f"self_attn.{x}_proj" for x in "qkv"}
    | {f"ffn_{x}": f"mlp.{x}_proj" for x in ("gate", "up", "down")}
)
_FREQUENCIES = "rope_freqs.weight"  # present with llama3 scaling
_CONTROL, _USER_DEFINED = 3, 4  # types of tokens
_PRE_TOKENIZERS = {
    "smollm": lambda: pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
}


def open_file(path: pathlib.Path) -> Opened:
    """Reads all of a GGUF file but the values of its weights. Raises PretrainedError, also if the package `gguf` is missing."""
    try:
        import gguf
    except ImportError as e:
        raise PretrainedError(f"Reading {path} needs the package gguf: pip install 'jaxrl_reason[gguf]'.") from e
    try:
        reader = gguf.GGUFReader(path)
        fields = {name: field.contents() for name, field in reader.fields.items()}
    except Exception as e:  # a damaged file can fail in any way
        raise PretrainedError(f"{path} is not a whole GGUF file: {type(e).__name__}: {e}") from e
    architecture = fields.get("general.architecture")
    if architecture != "llama":
        raise PretrainedError(f"{path} has architecture {architecture!r}; only llama is read from GGUF files.")
    scaling = fields.get("llama.rope.scaling.type", "none")
    if scaling != "none" or any(tensor.name == _FREQUENCIES for tensor in reader.tensors):
        scaling = _FREQUENCIES if scaling == "none" else repr(scaling)
        raise PretrainedError(f"{path} scales its rotary positions ({scaling}), which is not supported for GGUF files.")
    weights = _Weights(path, reader, fields, gguf.dequantize)
    source = _config(path, fields, tied="lm_head.weight" not in weights.shapes)
    return Opened(families.read_config(source, str(path)), weights, _tokenizer(path, fields), source, files={})


def _config(path: pathlib.Path, fields: dict[str, Any], tied: bool) -> dict[str, Any]:
    """Returns the metadata of the file as a config.json."""

    def get(name, default=None):
        value = fields.get(f"llama.{name}", default)
        if value is None:
            raise PretrainedError(f"{path} lacks the field llama.{name}.")
        return value

    heads, width = get("attention.head_count"), get("embedding_length")
    if type(heads) is not int or heads < 1:
        raise PretrainedError(f"{path} has llama.attention.head_count {heads}; it must be one number for all layers.")
    ids = {
        f"{name}_token_id": fields[f"tokenizer.ggml.{key}_token_id"]
        for name, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"))
        if f"tokenizer.ggml.{key}_token_id" in fields
    }
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "vocab_size": fields.get("llama.vocab_size", len(fields.get("tokenizer.ggml.tokens", ()))),
        "hidden_size": width,
        "intermediate_size": get("feed_forward_length"),
        "num_hidden_layers": get("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": get("attention.head_count_kv", heads),
        "head_dim": get("rope.dimension_count", width // heads),
        # Rounded, because the file has float32: 1e-5 is stored as 9.99e-6.
        "rms_norm_eps": float(f"{get('attention.layer_norm_rms_epsilon'):.6g}"),
        "rope_theta": float(get("rope.freq_base", 10_000.0)),
        "max_position_embeddings": get("context_length"),
        "tie_word_embeddings": tied,
        "attention_bias": False,
        "mlp_bias": False,
        **ids,
    }


class _Weights:
    """See `tensors.Weights`. Each read dequantises the whole tensor."""

    def __init__(self, path: pathlib.Path, reader: Any, fields: dict[str, Any], dequantize: Callable) -> None:
        self.where, self._dequantize = str(path), dequantize
        heads: Any = fields.get("llama.attention.head_count")
        self._heads = {"q_proj": heads, "k_proj": fields.get("llama.attention.head_count_kv", heads)}
        self._tensors = {}
        for tensor in reader.tensors:
            try:  # one row, to check that the type is supported
                dequantize(tensor.data[:1] if tensor.data.ndim > 1 else tensor.data, tensor.tensor_type)
            except NotImplementedError as e:
                kind = tensor.tensor_type.name
                raise PretrainedError(f"{path}: {tensor.name} is quantised as {kind}, which is not supported.") from e
            self._tensors[_name(tensor.name)] = tensor
        self.shapes = {name: tuple(int(n) for n in t.shape[::-1]) for name, t in self._tensors.items()}

    def read(self, name: str, part: tuple[slice, ...]) -> np.ndarray:
        tensor = self._tensors[name]
        found = self._dequantize(tensor.data, tensor.tensor_type).reshape(self.shapes[name])
        kind = name.split(".")[-2]
        if kind in self._heads:  # llama.cpp interleaves the pairs of a rotation, Hugging Face splits a head into halves
            heads = self._heads[kind]
            found = found.reshape(heads, -1, 2, found.shape[-1]).swapaxes(1, 2).reshape(found.shape)
        return found[part]


def _name(name: str) -> str:
    """Returns Hugging Face's name of a tensor; an unknown tensor keeps its name, and is reported as surplus."""
    if name in _NAMES:
        return _NAMES[name]
    parts = name.split(".")
    if len(parts) == 4 and parts[0] == "blk" and parts[2] in _LAYER_NAMES:
        return f"model.layers.{parts[1]}.{_LAYER_NAMES[parts[2]]}.{parts[3]}"
    return name


def _tokenizer(path: pathlib.Path, fields: dict[str, Any]) -> Tokenizer:
    kind, pre = fields.get("tokenizer.ggml.model"), fields.get("tokenizer.ggml.pre")
    if kind != "gpt2" or pre not in _PRE_TOKENIZERS:
        raise PretrainedError(
            f"{path} has a tokenizer of kind {kind!r} that splits text as {pre!r}; the kind must be 'gpt2' (byte pairs), and the "
            f"splitting must be one of {', '.join(_PRE_TOKENIZERS)}."
        )
    try:
        tokens, types = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
        merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
        backend = tokenizers.Tokenizer(tokenizer_models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    except Exception as e:  # the library raises bare Exception
        raise PretrainedError(f"{path} has a tokenizer that cannot be built: {type(e).__name__}: {e}") from e
    backend.pre_tokenizer = _PRE_TOKENIZERS[pre]()
    backend.decoder = decoders.ByteLevel()
    for kind, special, add in (
        (_CONTROL, True, backend.add_special_tokens),
        (_USER_DEFINED, False, backend.add_tokens),
    ):
        found = [token for token, k in zip(tokens, types) if k == kind]
        add([tokenizers.AddedToken(token, special=special, normalized=False) for token in found])
    eos = fields.get("tokenizer.ggml.eos_token_id")
    if eos is None:
        raise PretrainedError(f"{path} has no end token (tokenizer.ggml.eos_token_id).")
    return Tokenizer(
        backend,
        eos_ids=(eos,),
        pad_id=fields.get("tokenizer.ggml.padding_token_id", eos),
        bos_id=fields.get("tokenizer.ggml.bos_token_id"),
        chat_template=fields.get("tokenizer.chat_template"),
        adds_bos=bool(fields.get("tokenizer.ggml.add_bos_token", False)),
    )

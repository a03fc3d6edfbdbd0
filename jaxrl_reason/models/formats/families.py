"""Model families: what Hugging Face's config.json says about the one decoder, and what it calls the tensors.

A family is one entry of `FAMILIES`: the switches of `ModelConfig` that it always has, and what stands where config.json is silent.
"""

from collections.abc import Mapping
import dataclasses
import math
from typing import Any

from jaxrl_reason.models.config import ModelConfig, RopeScaling


class PretrainedError(ValueError):
    """A model that cannot be read or written; the message is a sentence that names the file, field or tensor."""


@dataclasses.dataclass(frozen=True)
class Family:
    """One `model_type` of config.json.

    Attributes:
      model_type, prefix: "qwen2" and the Qwen2 of Qwen2ForCausalLM.
      fixed: fields of ModelConfig that do not differ within the family.
      absent: what an absent key of config.json means.
      computes: keys whose other values ask for something that the decoder does not do.
      sliding: how sliding layers are told: "none", "all" (where sliding_window is a number) or "layers".
    """

    model_type: str
    prefix: str
    fixed: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    absent: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    computes: Mapping[str, tuple] = dataclasses.field(default_factory=dict)
    sliding: str = "none"


_LARGEST = 10_000_000  # of any size: what is beyond is no model, and would only use up memory
_SILU = {"hidden_act": ("silu", "swish")}
_GELU = ("gelu_pytorch_tanh",)

FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        Family("llama", "Llama", computes=_SILU | {"attention_bias": (False,), "mlp_bias": (False,)}),
        Family(
            "mistral",
            "Mistral",
            absent={"sliding_window": 4096, "num_key_value_heads": 8},
            computes=_SILU,
            sliding="all",
        ),
        Family(
            "qwen2",
            "Qwen2",
            fixed={"qkv_bias": True},
            absent={"num_key_value_heads": 32},
            computes=_SILU,
            sliding="layers",
        ),
        Family(
            "qwen3",
            "Qwen3",
            fixed={"qk_norm": True},
            absent={"head_dim": 128, "num_key_value_heads": 32},
            computes=_SILU | {"attention_bias": (False,)},
            sliding="layers",
        ),
        Family(
            "gemma3_text",
            "Gemma3",
            fixed={"qk_norm": True, "norm_offset": 1.0, "post_norms": True, "activation": "gelu"},
            absent={
                "num_key_value_heads": 4,
                "head_dim": 256,
                "query_pre_attn_scalar": 256,
                "tie_word_embeddings": True,
                "rope_theta": 1_000_000.0,
                "rope_local_base_freq": 10_000.0,
                "sliding_window": 4096,
                "sliding_window_pattern": 6,
            },
            computes={
                "hidden_activation": _GELU,
                "hidden_act": _GELU,
                "attention_bias": (False,),
                "attn_logit_softcapping": (None,),
                "final_logit_softcapping": (None,),
                "use_bidirectional_attention": (False, None),
            },
            sliding="layers",
        ),
    )
}

_SIZES = {
    "vocab_size": "vocab_size",
    "width": "hidden_size",
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "mlp_width": "intermediate_size",
}

# -- config.json -----------------------------------------------------------------------------------


def read_config(source: Mapping[str, Any], where: str = "config.json") -> ModelConfig:
    """The decoder that a config.json describes, in the spelling of transformers 4 or 5.

    Args:
      source: the file's content.
      where: what messages call it.

    Raises:
      PretrainedError: an unknown architecture, a missing size, or something that the decoder does not compute.
    """
    try:
        return _read_config(source, where)
    except PretrainedError:
        raise
    except (TypeError, ValueError, AttributeError, KeyError, ArithmeticError) as e:  # a file can hold anything anywhere
        raise PretrainedError(f"{where} describes a model that cannot be: {e}") from e


def _read_config(source: Mapping[str, Any], where: str) -> ModelConfig:
    family = _family(source, where)
    get = lambda key, default=None: source.get(key, family.absent.get(key, default))
    for key, allowed in family.computes.items():
        if key in source and source[key] not in allowed:
            raise PretrainedError(
                f"{where} has {key} {source[key]!r}, and only {', '.join(map(repr, allowed))} is computed here."
            )
    if source.get("quantization_config"):
        raise PretrainedError(f"{where} has a quantization_config: take the model with weights in float32 or bfloat16.")
    sizes = {}
    for ours, theirs in _SIZES.items():
        sizes[ours] = _number(source, theirs, where)
    sizes["kv_heads"] = sizes["heads"]
    if get("num_key_value_heads") is not None:
        sizes["kv_heads"] = _number({"num_key_value_heads": get("num_key_value_heads")}, "num_key_value_heads", where)
    head_dim = get("head_dim") or 0
    tied = get("tie_word_embeddings", False)
    if type(tied) is not bool:
        raise PretrainedError(f"{where} has tie_word_embeddings {tied!r}; it must be true or false.")
    theta, scaling = _rope(source, family, where, "full_attention")
    window, period, local = _sliding(source, family, where)
    own = {}
    if family.model_type == "gemma3_text":
        own = {
            "embedding_scale": math.sqrt(sizes["width"]),
            "query_scale": _positive(get("query_pre_attn_scalar"), "query_pre_attn_scalar", where) ** -0.5,
        }
    return ModelConfig(
        **sizes,
        head_dim=head_dim,
        rope_theta=theta,
        rope_scaling=scaling,
        sliding_window=window,
        sliding_period=period,
        local_rope_theta=local,
        norm_eps=_positive(get("rms_norm_eps", 1e-6), "rms_norm_eps", where),
        tied_embedding=tied,
        **family.fixed,
        **own,
    )


def write_config(config: ModelConfig, classifier: bool = False) -> dict[str, Any]:
    """The config.json of the first family that describes this decoder, in the spelling that transformers 4 and 5 read.

    Args:
      config: dtypes and remat do not enter; the dtype of the weights is written.
      classifier: for a reward model.

    Raises:
      PretrainedError: no family has all of its switches.
    """
    plain = ModelConfig(vocab_size=1, width=2, layers=1, heads=1, kv_heads=1, mlp_width=1)
    free = {name: getattr(plain, name) for name in ("param_dtype", "compute_dtype", "remat", "attention")}
    wanted = dataclasses.replace(config, **free)
    for family in FAMILIES.values():
        found = _describe(family, wanted)
        try:
            same = read_config(found) == wanted
        except PretrainedError:
            same = False
        if same:
            kind = "ForSequenceClassification" if classifier else "ForCausalLM"
            # Gemma's text decoder of a multimodal family has a name of its own.
            prefix = "Gemma3Text" if classifier and family.prefix == "Gemma3" else family.prefix
            return {"architectures": [prefix + kind], **found, "torch_dtype": config.param_dtype}
    raise PretrainedError(
        f"No family ({', '.join(FAMILIES)}) has a decoder with these switches, so no config.json can describe it: {config}."
    )


def _family(source: Mapping[str, Any], where: str) -> Family:
    kind = str(source.get("model_type"))
    if kind == "gemma3":
        raise PretrainedError(
            f"{where} has model_type 'gemma3', the model with a vision tower: take its text decoder, model_type 'gemma3_text'."
        )
    if kind not in FAMILIES:
        raise PretrainedError(f"{where} has model_type {kind!r}; there are {', '.join(FAMILIES)}.")
    return FAMILIES[kind]


def _number(source: Mapping[str, Any], key: str, where: str) -> int:
    value = source.get(key)
    if type(value) is not int or not 1 <= value <= _LARGEST:
        raise PretrainedError(f"{where} has {key} {value!r}; it must be a whole number from 1 to {_LARGEST:,}.")
    return value


def _positive(value: Any, key: str, where: str) -> float:
    if type(value) not in (int, float) or not 0 < value < math.inf:
        raise PretrainedError(f"{where} has {key} {value!r}; it must be a finite number above 0.")
    return float(value)


def _rope(source, family: Family, where: str, kind: str) -> tuple[float, RopeScaling | None]:
    """Base and stretch of the rotary frequencies of layers of this kind."""
    get = lambda key, default=None: source.get(key, family.absent.get(key, default))
    local = kind == "sliding_attention"
    base = get("rope_local_base_freq") if local else get("rope_theta", 10_000.0)
    found = source.get("rope_parameters") or {}  # transformers 5: for all layers, or for each kind
    nested = any(isinstance(value, Mapping) for value in found.values())
    if nested:
        found = found.get(kind) or {}
    elif local:
        found = {}
    elif not found:
        found = source.get("rope_scaling") or {}  # transformers 4
    scaling = found.get("rope_type", found.get("type", "default"))
    theta = _positive(found.get("rope_theta", base), "rope_theta", where)
    try:
        if scaling == "default":
            return theta, None
        if scaling == "linear":
            return theta, RopeScaling(kind="linear", factor=float(found["factor"]))
        if scaling == "llama3":
            return theta, RopeScaling(
                kind="llama3",
                factor=float(found["factor"]),
                low_freq_factor=float(found["low_freq_factor"]),
                high_freq_factor=float(found["high_freq_factor"]),
                original_length=int(found["original_max_position_embeddings"]),
            )
    except KeyError as e:
        raise PretrainedError(f"{where} asks for {scaling!r} rotary positions without {e}.") from e
    raise PretrainedError(
        f"{where} asks for rotary positions of type {scaling!r}; there are default, linear and llama3."
    )


def _sliding(source, family: Family, where: str) -> tuple[int, int, float]:
    """(sliding_window, sliding_period, local_rope_theta) of ModelConfig."""
    get = lambda key, default=None: source.get(key, family.absent.get(key, default))
    layers, window = source["num_hidden_layers"], get("sliding_window")
    if family.sliding == "none" or (family.sliding == "all" and window is None):
        return 0, 0, 0.0
    gemma = family.model_type == "gemma3_text"
    kinds = source.get("layer_types")
    if family.sliding == "all":
        slides = [True] * layers
    elif kinds is not None:
        unknown = set(kinds) - {"full_attention", "sliding_attention"}
        if unknown or len(kinds) != layers:
            raise PretrainedError(
                f"{where} has layer_types {kinds}; it must name full_attention or sliding_attention for each of {layers} layers."
            )
        slides = [kind == "sliding_attention" for kind in kinds]
    elif gemma:
        period = _number({"sliding_window_pattern": get("sliding_window_pattern")}, "sliding_window_pattern", where)
        slides = [(i + 1) % period != 0 for i in range(layers)]
    else:
        first = source.get("max_window_layers", layers)
        slides = [bool(source.get("use_sliding_window")) and i >= first for i in range(layers)]
    if not any(slides) or (not gemma and family.sliding == "layers" and not source.get("use_sliding_window")):
        return 0, 0, 0.0
    window = _number({"sliding_window": window}, "sliding_window", where)
    local, scaling = _rope(source, family, where, "sliding_attention") if gemma else (0.0, None)
    if scaling is not None:
        raise PretrainedError(
            f"{where} scales the rotary positions of sliding layers ({scaling.kind}), which is not computed here."
        )
    if all(slides):  # a period beyond the last layer, where two rotary bases must be kept apart
        return window, max(layers + 1, get("sliding_window_pattern", 0)) if gemma else 0, local
    period = slides.index(False) + 1
    if slides != [(i + 1) % period != 0 for i in range(layers)]:
        raise PretrainedError(
            f"{where}: every n-th layer can be global and the others slide, and layer_types is not so."
        )
    return window, period, local


def _describe(family: Family, c: ModelConfig) -> dict[str, Any]:
    """What config.json would say if the decoder were of this family; `read_config` tells whether it is."""
    out = {"model_type": family.model_type}
    out |= {theirs: getattr(c, ours) for ours, theirs in _SIZES.items()}
    out |= {
        "num_key_value_heads": c.kv_heads,
        "head_dim": c.head_dim,
        "rms_norm_eps": c.norm_eps,
        "tie_word_embeddings": c.tied_embedding,
        "rope_theta": c.rope_theta,
        "attention_dropout": 0.0,
        "use_cache": True,
        **{key: allowed[0] for key, allowed in family.computes.items()},
    }
    s = c.rope_scaling
    if s is not None:
        out["rope_scaling"] = {"rope_type": s.kind, "factor": s.factor}
        if s.kind == "llama3":
            out["rope_scaling"] |= {
                "low_freq_factor": s.low_freq_factor,
                "high_freq_factor": s.high_freq_factor,
                "original_max_position_embeddings": s.original_length,
            }
    if family.model_type == "gemma3_text":
        out |= {"query_pre_attn_scalar": _whole(c.query_scale**-2), "rope_local_base_freq": c.local_rope_theta}
        out["sliding_window_pattern"] = c.sliding_period
    if family.sliding != "none":
        out["sliding_window"] = c.sliding_window or None
    if family.sliding == "layers":
        out["use_sliding_window"] = bool(c.sliding_window)
        out["layer_types"] = ["sliding_attention" if slides else "full_attention" for slides in c.sliding_layers]
        if any(c.sliding_layers):
            out["max_window_layers"] = c.sliding_layers.index(True)
        else:
            out["max_window_layers"] = c.layers
    return out


def _whole(x: float) -> float | int:
    return round(x) if math.isclose(x, round(x), rel_tol=1e-9) else x


# -- tensors ---------------------------------------------------------------------------------------

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


@dataclasses.dataclass(frozen=True)
class Tensor:
    """Where one weight of ours lies in a file of theirs.

    Attributes:
      names: one tensor, or one a layer for a weight that is stacked.
      stacked: whether ours leads with a layer axis.
      transposed: theirs is [out, in], ours [in, out].
      shape: of each of their tensors.
    """

    names: tuple[str, ...]
    stacked: bool
    transposed: bool
    shape: tuple[int, ...]


def tensors_of(config: ModelConfig, abstract_params: Mapping[str, Any]) -> dict[str, Any]:
    """A `Tensor` a weight, in the structure of the parameters (of a policy's decoder, or {"decoder": ..., "score": ...})."""
    layer_names = _LAYER_NAMES | (_LAYER_NAMES_WITH_POST_NORMS if config.post_norms else {})

    def walk(tree, stacked):
        out = {}
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

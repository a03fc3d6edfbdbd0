"""Model families: Hugging Face's config.json to the configuration of the decoder, and back.

A family is one entry of `FAMILIES`: the switches of `ModelConfig` that it always has, and the meaning of keys that config.json lacks.
"""

from collections.abc import Mapping
import dataclasses
import math
from typing import Any

from jaxrl_reason.models.config import ModelConfig, RopeScaling
from jaxrl_reason.models.formats.types import PretrainedError


@dataclasses.dataclass(frozen=True)
class Family:
    """One `model_type` of config.json.

    Attributes:
      model_type: for example "qwen2".
      prefix: of the architecture: the Qwen2 of Qwen2ForCausalLM.
      fixed: fields of ModelConfig that do not differ within the family.
      absent: values of keys that config.json can lack.
      computes: for some keys, the values that the decoder supports.
      sliding: which layers can slide: "none", "all" (if sliding_window is a number) or "layers" (config.json names them).
    """

    model_type: str
    prefix: str
    fixed: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    absent: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    computes: Mapping[str, tuple] = dataclasses.field(default_factory=dict)
    sliding: str = "none"


_LARGEST = 10_000_000  # bound of any size: a file with a larger number would only exhaust the memory
_SILU = {"hidden_act": ("silu", "swish")}
_GELU = ("gelu_pytorch_tanh",)

_FAMILIES = (
    Family("llama", "Llama", computes=_SILU | {"attention_bias": (False,), "mlp_bias": (False,)}),
    Family(
        "mistral", "Mistral", absent={"sliding_window": 4096, "num_key_value_heads": 8}, computes=_SILU, sliding="all"
    ),
    Family("qwen2", "Qwen2", {"qkv_bias": True}, {"num_key_value_heads": 32}, _SILU, "layers"),
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
FAMILIES = {family.model_type: family for family in _FAMILIES}

_SIZES = {
    "vocab_size": "vocab_size",
    "width": "hidden_size",
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "mlp_width": "intermediate_size",
}

# Fields of ModelConfig that a config.json does not hold, apart from the dtype of its weights.
UNWRITTEN = ("param_dtype", "compute_dtype", "remat", "attention")

# -- config.json -----------------------------------------------------------------------------------


def read_config(source: Mapping[str, Any], where: str = "config.json") -> ModelConfig:
    """Reads the configuration of a decoder from a config.json, in the spelling of transformers 4 or 5.

    Args:
      source: the content of the file.
      where: the name of the file in messages.

    Raises:
      PretrainedError: if the architecture is unknown, a size is missing, or the decoder does not support a value.
    """
    try:
        return _read_config(source, where)
    except PretrainedError:
        raise
    except (TypeError, ValueError, AttributeError, KeyError, ArithmeticError) as e:  # a file can hold anything anywhere
        raise PretrainedError(f"{where} describes an invalid model: {e}") from e


def _read_config(source: Mapping[str, Any], where: str) -> ModelConfig:
    family = _family(source, where)
    get = lambda key, default=None: source.get(key, family.absent.get(key, default))
    for key, allowed in family.computes.items():
        if key in source and source[key] not in allowed:
            raise PretrainedError(
                f"{where} has {key} {source[key]!r}, and only {' or '.join(map(repr, allowed))} is supported."
            )
    if source.get("quantization_config"):
        raise PretrainedError(f"{where} has a quantization_config: use a model with weights in float32 or bfloat16.")
    sizes: dict[str, Any] = {ours: _number(source, theirs, where) for ours, theirs in _SIZES.items()}
    sizes["kv_heads"] = sizes["heads"]
    if get("num_key_value_heads") is not None:
        sizes["kv_heads"] = _number({"num_key_value_heads": get("num_key_value_heads")}, "num_key_value_heads", where)
    head_dim = get("head_dim") or 0
    tied = get("tie_word_embeddings", False)
    if type(tied) is not bool:
        raise PretrainedError(f"{where} has tie_word_embeddings {tied!r}; it must be true or false.")
    theta, scaling = _rope(source, family, where, "full_attention")
    window, period, local = _sliding(source, family, where)
    own: dict[str, float] = {}
    if family.model_type == "gemma3_text":
        own = {
            "embedding_scale": math.sqrt(sizes["width"]),
            "query_scale": _positive(get("query_pre_attn_scalar"), "query_pre_attn_scalar", where) ** -0.5,
        }
    fields: dict[str, Any] = sizes | dict(family.fixed) | own
    return ModelConfig(
        **fields,
        head_dim=head_dim,
        rope_theta=theta,
        rope_scaling=scaling,
        sliding_window=window,
        sliding_period=period,
        local_rope_theta=local,
        norm_eps=_positive(get("rms_norm_eps", 1e-6), "rms_norm_eps", where),
        tied_embedding=tied,
    )


def write_config(config: ModelConfig, classifier: bool = False) -> dict[str, Any]:
    """Returns the config.json of the first family that describes a decoder, in a spelling that transformers 4 and 5 read.

    Args:
      config: the decoder. Only the dtype of the weights is written; the choice of the family ignores dtypes, remat and attention.
      classifier: whether the model is a reward model.

    Raises:
      PretrainedError: if no family has all switches of the decoder.
    """
    plain = ModelConfig(vocab_size=1, width=2, layers=1, heads=1, kv_heads=1, mlp_width=1)
    free: dict[str, Any] = {name: getattr(plain, name) for name in UNWRITTEN}
    wanted = dataclasses.replace(config, **free)
    for family in FAMILIES.values():
        found = _describe(family, wanted)
        try:
            same = read_config(found) == wanted
        except PretrainedError:
            same = False
        if same:
            kind = "ForSequenceClassification" if classifier else "ForCausalLM"
            # The classifier of Gemma's text decoder has another name, because the family is multimodal.
            prefix = "Gemma3Text" if classifier and family.prefix == "Gemma3" else family.prefix
            return {"architectures": [prefix + kind], **found, "torch_dtype": config.param_dtype}
    raise PretrainedError(
        f"No family ({', '.join(FAMILIES)}) has a decoder with these switches, so no config.json can describe it: {config}."
    )


def _family(source: Mapping[str, Any], where: str) -> Family:
    kind = str(source.get("model_type"))
    if kind == "gemma3":
        raise PretrainedError(
            f"{where} has model_type 'gemma3', the model with a vision tower: use its text decoder, model_type 'gemma3_text'."
        )
    if kind not in FAMILIES:
        raise PretrainedError(f"{where} has model_type {kind!r}; it must be one of {', '.join(FAMILIES)}.")
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


def _rope(source: Mapping[str, Any], family: Family, where: str, kind: str) -> tuple[float, RopeScaling | None]:
    """Returns the base and the scaling of the rotary frequencies of one kind of layers."""
    get = lambda key, default=None: source.get(key, family.absent.get(key, default))
    local = kind == "sliding_attention"
    base = get("rope_local_base_freq") if local else get("rope_theta", 10_000.0)
    found = source.get("rope_parameters") or {}  # transformers 5: for all layers, or per kind
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
        raise PretrainedError(f"{where} has rotary positions of type {scaling!r} without {e}.") from e
    raise PretrainedError(
        f"{where} has rotary positions of type {scaling!r}; the type must be default, linear or llama3."
    )


def _sliding(source: Mapping[str, Any], family: Family, where: str) -> tuple[int, int, float]:
    """Returns (sliding_window, sliding_period, local_rope_theta) of ModelConfig."""
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
            f"{where} scales the rotary positions of sliding layers ({scaling.kind}), which is not supported."
        )
    if all(slides):  # Gemma: a period beyond the last layer keeps the two rotary bases apart
        return window, max(layers + 1, get("sliding_window_pattern", 0)) if gemma else 0, local
    period = slides.index(False) + 1
    if slides != [(i + 1) % period != 0 for i in range(layers)]:
        raise PretrainedError(
            f"{where} has layer_types without a period; it is supported that every n-th layer is global and the others slide."
        )
    return window, period, local


def _describe(family: Family, c: ModelConfig) -> dict[str, Any]:
    """Returns a config.json of this family for a decoder; it describes the decoder only if `read_config` gives it back."""
    out: dict[str, Any] = {"model_type": family.model_type}
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

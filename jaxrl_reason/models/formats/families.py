"""Model families, the entries of `FAMILIES`: Hugging Face's config.json to the decoder's configuration, and back."""

from collections.abc import Mapping
import dataclasses
import math
from typing import Any

from jaxrl_reason.models.config import ModelConfig, RopeScaling
from jaxrl_reason.models.formats.tensors import PretrainedError


@dataclasses.dataclass(frozen=True)
class Family:
    """One `model_type` of config.json."""

    model_type: str
    prefix: str  # of the architecture: the Qwen2 of Qwen2ForCausalLM
    fixed: Mapping[str, Any]  # fields of ModelConfig that do not differ within the family
    absent: Mapping[str, Any]  # values of keys that config.json can lack
    computes: Mapping[str, tuple]  # for some keys, the values that the decoder supports
    sliding: str  # which layers can slide: "none", "all" (if sliding_window is a number) or "layers" (config.json names them)


_LARGEST = 10_000_000  # bound of any size: a file with a larger number would only exhaust the memory
_SILU = {"hidden_act": ("silu", "swish")}
_GELU = {"hidden_activation": ("gelu_pytorch_tanh",), "hidden_act": ("gelu_pytorch_tanh",)}
_NO_BIAS = {"attention_bias": (False,)}
_QWEN = {"num_key_value_heads": 32, "max_window_layers": 28}

_FAMILIES = (
    Family("llama", "Llama", {}, {}, _SILU | _NO_BIAS | {"mlp_bias": (False,)}, "none"),
    Family("mistral", "Mistral", {}, {"sliding_window": 4096, "num_key_value_heads": 8}, _SILU, "all"),
    Family("qwen2", "Qwen2", {"qkv_bias": True}, _QWEN, _SILU, "layers"),
    Family("qwen3", "Qwen3", {"qk_norm": True}, _QWEN | {"head_dim": 128}, _SILU | _NO_BIAS, "layers"),
    Family(
        "gemma3_text",
        "Gemma3",
        {"qk_norm": True, "norm_offset": 1.0, "post_norms": True, "activation": "gelu"},
        {"num_key_value_heads": 4, "head_dim": 256, "query_pre_attn_scalar": 256, "tie_word_embeddings": True}
        | {"rope_theta": 1_000_000.0, "rope_local_base_freq": 10_000.0}
        | {"sliding_window": 4096, "sliding_window_pattern": 6},
        _GELU
        | _NO_BIAS
        | {"attn_logit_softcapping": (None,), "final_logit_softcapping": (None,)}
        | {"use_bidirectional_attention": (False, None)},
        "layers",
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

_ROPE_FACTORS = {"linear": ("factor",), "llama3": ("factor", "low_freq_factor", "high_freq_factor")}
# Factors that change rotary frequencies, of any type.
_SCALES = (
    *("factor", "low_freq_factor", "high_freq_factor", "attention_factor"),
    *("beta_fast", "beta_slow", "short_factor", "long_factor", "mscale", "mscale_all_dim"),
)
_KINDS = {"full_attention", "sliding_attention"}  # of layers
# Fields of ModelConfig that a config.json does not hold, apart from the dtype of its weights.
UNWRITTEN = ("param_dtype", "compute_dtype", "remat", "unrolled", "attention")


def read_config(source: Mapping[str, Any], where: str = "config.json") -> ModelConfig:
    """Reads the configuration of a decoder from the content of a config.json, in the spelling of transformers 4 or 5.

    Raises PretrainedError, naming the file as `where`, if the architecture is unknown, a size is missing, or a value is not supported.
    """
    try:
        return _read_config(source, where)
    except PretrainedError:
        raise
    except (TypeError, ValueError, AttributeError, KeyError, ArithmeticError) as e:  # a file can hold anything anywhere
        raise PretrainedError(f"{where} describes an invalid model: {e}") from e


def _read_config(source: Mapping[str, Any], where: str) -> ModelConfig:
    family = _family(source, where)
    given, source = source, {**family.absent, **source}
    for key, allowed in family.computes.items():
        if key in source and source[key] not in allowed:
            supported = " or ".join(map(repr, allowed))
            raise PretrainedError(f"{where} has {key} {source[key]!r}, and only {supported} is supported.")
    for key in ("quantization_config", "compression_config"):
        if source.get(key):
            raise PretrainedError(f"{where} has a {key}: use a model with weights in float32 or bfloat16.")
    fields: dict[str, Any] = {ours: _number(source, theirs, where) for ours, theirs in _SIZES.items()}
    fields["kv_heads"] = fields["heads"]
    if source.get("num_key_value_heads") is not None:
        fields["kv_heads"] = _number(source, "num_key_value_heads", where)
    fields["head_dim"] = source.get("head_dim") or 0
    fields["tied_embedding"] = tied = source.get("tie_word_embeddings", False)
    if type(tied) is not bool:
        raise PretrainedError(f"{where} has tie_word_embeddings {tied!r}; it must be true or false.")
    fields["rope_theta"], fields["rope_scaling"] = _rope(given, family, where, "full_attention")
    window, period, local = _sliding(source, given, family, where)
    if family.model_type == "gemma3_text":
        fields["embedding_scale"] = math.sqrt(fields["width"])
        scalar = _positive(source["query_pre_attn_scalar"], "query_pre_attn_scalar", where)
        fields["query_scale"] = scalar**-0.5
    fields["norm_eps"] = _positive(source.get("rms_norm_eps", 1e-6), "rms_norm_eps", where)
    fields |= family.fixed
    return ModelConfig(**fields, sliding_window=window, sliding_period=period, local_rope_theta=local)


def write_config(config: ModelConfig, classifier: bool = False) -> dict[str, Any]:
    """Returns the config.json of the first family that describes a decoder, in a spelling that transformers 4 and 5 read.

    The choice of the family ignores dtypes, remat, unrolled and attention; of them only the dtype of the weights is written. A `classifier` is a
    reward model. Raises PretrainedError if no family has all switches of the decoder.
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


def _rope(given: Mapping[str, Any], family: Family, where: str, kind: str) -> tuple[float, RopeScaling | None]:
    """Returns the base and the scaling of the rotary frequencies of one kind of layers.

    transformers 4 writes `rope_scaling` and `rope_theta`, transformers 5 `rope_parameters`, for all layers or per kind.
    If a file has both, `rope_scaling` decides on the scaling, as in transformers 5; all bases have to agree.
    """
    new, old = (_of_kind(given, name, where, kind) for name in ("rope_parameters", "rope_scaling"))
    key = "rope_local_base_freq" if kind == "sliding_attention" else "rope_theta"
    bases = {f"rope_scaling.{key}": old.get(key), "rope_parameters.rope_theta": new.get("rope_theta")}
    bases[key] = given.get(key)
    if "rope_theta" in new and not old:  # the only spelling of transformers 5: null is a fault
        _positive(new["rope_theta"], "rope_theta", where)
    theta = _agreed(bases, where, family.absent.get(key, 10_000.0))
    found = old or new
    partial = [x.get("partial_rotary_factor") for x in (given, new, old)]
    if any(x not in (None, 1) for x in partial):
        raise PretrainedError(f"{where} has a partial_rotary_factor {partial}: only whole heads can be rotated.")
    return _positive(theta, "rope_theta", where), _rope_scaling(found, given, where)


def _of_kind(given: Mapping[str, Any], name: str, where: str, kind: str) -> Mapping[str, Any]:
    """Returns the rotary settings of one kind of layers under a key; {} if there are none. Plain ones are of global layers."""
    found = given.get(name) or {}
    are_nested = [isinstance(x, Mapping) for x in found.values() if x is not None] if isinstance(found, Mapping) else []
    if not isinstance(found, Mapping) or any(are_nested) and not (all(are_nested) and found.keys() <= _KINDS):
        rule = f"it must hold the settings of all layers, or those of {' and '.join(sorted(_KINDS))}"
        raise PretrainedError(f"{where} has {name} {found!r}; {rule}.")
    if any(are_nested):
        return found.get(kind) or {}
    return {} if kind == "sliding_attention" else found


def _rope_scaling(found: Mapping[str, Any], given: Mapping[str, Any], where: str) -> RopeScaling | None:
    """Reads one description of a scaling; raises PretrainedError if it contradicts itself or is not supported."""
    scaling = _agreed({name: found.get(name) for name in ("rope_type", "type")}, where, None)
    surplus = {name: found[name] for name in _SCALES if found.get(name) is not None}
    if scaling in (None, "default"):
        if surplus not in ({}, {"factor": 1}):
            kind = "without a type" if scaling is None else "of the type 'default', which scales nothing,"
            raise PretrainedError(f"{where} has rotary positions {kind} with {surplus}: name the rope_type.")
        return None
    if scaling not in _ROPE_FACTORS:
        types = "the type must be default, linear or llama3"
        raise PretrainedError(f"{where} has rotary positions of type {scaling!r}; {types}.")
    try:
        values: dict[str, Any] = {name: _positive(found[name], name, where) for name in _ROPE_FACTORS[scaling]}
        if scaling == "llama3":
            key = "original_max_position_embeddings"
            length = _agreed({f"its {key}": found.get(key), key: given.get(key)}, where, None)
            if length is None:
                raise KeyError(key)
            values["original_length"] = int(length)
    except KeyError as e:
        raise PretrainedError(f"{where} has rotary positions of type {scaling!r} without {e}.") from e
    return RopeScaling(kind=scaling, **values)


def _agreed(spellings: Mapping[str, Any], where: str, default: Any) -> Any:
    """Returns the value of a key with several spellings, or the default; raises PretrainedError if two of them differ."""
    given = {name: value for name, value in spellings.items() if value is not None}
    first = next(iter(given.values()), default)
    if any(value != first for value in given.values()):
        listed = " and ".join(f"{name} {value!r}" for name, value in given.items())
        raise PretrainedError(f"{where} has {listed}, which say the same thing and differ: leave the wrong one out.")
    return first


def _sliding(source: Mapping[str, Any], given: Mapping[str, Any], family: Family, where: str) -> tuple[int, int, float]:
    """Returns (sliding_window, sliding_period, local_rope_theta) of ModelConfig."""
    layers, window = source["num_hidden_layers"], source.get("sliding_window")
    if family.sliding == "none" or (family.sliding == "all" and window is None):
        return 0, 0, 0.0
    gemma = family.model_type == "gemma3_text"
    kinds = source.get("layer_types")
    if family.sliding == "all":
        slides = [True] * layers
    elif kinds is not None:
        unknown = set(kinds) - _KINDS
        if unknown or len(kinds) != layers:
            raise PretrainedError(
                f"{where} has layer_types {kinds}; it must name full_attention or sliding_attention for each of {layers} layers."
            )
        slides = [kind == "sliding_attention" for kind in kinds]
        if gemma and given.get("sliding_window_pattern") is not None:
            _agreed({"layer_types": slides, "sliding_window_pattern": _pattern(given, layers, where)}, where, None)
    elif gemma:
        slides = _pattern(source, layers, where)
    else:
        first = source["max_window_layers"]
        slides = [bool(source.get("use_sliding_window")) and i >= first for i in range(layers)]
    if not any(slides) or (not gemma and family.sliding == "layers" and not source.get("use_sliding_window")):
        return 0, 0, 0.0
    window = _number(source, "sliding_window", where)
    local, scaling = _rope(given, family, where, "sliding_attention") if gemma else (0.0, None)
    if scaling is not None:
        kind = f"of sliding layers ({scaling.kind})"
        raise PretrainedError(f"{where} scales the rotary positions {kind}, which is not supported.")
    if all(slides):  # Gemma: a period beyond the last layer keeps the two rotary bases apart
        return window, max(layers + 1, source["sliding_window_pattern"]) if gemma else 0, local
    period = slides.index(False) + 1
    if slides != [(i + 1) % period != 0 for i in range(layers)]:
        raise PretrainedError(
            f"{where} has layer_types without a period; it is supported that every n-th layer is global and the others slide."
        )
    return window, period, local


def _pattern(source: Mapping[str, Any], layers: int, where: str) -> list[bool]:
    """Returns which layers of Gemma slide: all but every n-th."""
    period = _number(source, "sliding_window_pattern", where)
    return [(i + 1) % period != 0 for i in range(layers)]


def _describe(family: Family, c: ModelConfig) -> dict[str, Any]:
    """Returns a config.json of this family for a decoder; it describes the decoder only if `read_config` gives it back."""
    out: dict[str, Any] = {
        "model_type": family.model_type,
        **{theirs: getattr(c, ours) for ours, theirs in _SIZES.items()},
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
        out["rope_scaling"] = {"rope_type": s.kind} | {name: getattr(s, name) for name in _ROPE_FACTORS[s.kind]}
        if s.kind == "llama3":
            out["rope_scaling"]["original_max_position_embeddings"] = s.original_length
    if family.model_type == "gemma3_text":
        out |= {"query_pre_attn_scalar": _whole(c.query_scale**-2), "rope_local_base_freq": c.local_rope_theta}
        out |= {"sliding_window_pattern": c.sliding_period} if c.sliding_period else {}
    if family.sliding != "none":
        out["sliding_window"] = c.sliding_window or None
    if family.sliding == "layers":
        out["use_sliding_window"] = bool(c.sliding_window)
        out["layer_types"] = ["sliding_attention" if slides else "full_attention" for slides in c.sliding_layers]
        out["max_window_layers"] = (*c.sliding_layers, True).index(True)
    return out


def _whole(x: float) -> float | int:
    return round(x) if math.isclose(x, round(x), rel_tol=1e-9) else x

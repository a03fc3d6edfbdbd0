"""The configuration of one decoder: sizes, switches and dtypes in one frozen value."""

import dataclasses
import math

PROJECTIONS = ("q", "k", "v", "o", "gate", "up", "down")
_CHOICES = {
    "param_dtype": ("float32", "bfloat16"),
    "compute_dtype": ("float32", "bfloat16"),
    "activation": ("silu", "gelu"),
    "remat": ("none", "dots", "layer"),
    "attention": ("plain", "blockwise", "splash"),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """A change of the rotary frequencies for contexts longer than the contexts of the first training."""

    # "linear" divides every frequency by `factor` (Gemma 3); "llama3" low ones, and blends up to high ones (Llama 3.1).
    kind: str
    factor: float
    low_freq_factor: float = 1.0  # "llama3" divides frequencies with fewer periods than this in the original context
    high_freq_factor: float = 4.0  # "llama3" keeps frequencies with more periods than this in the original context
    original_length: int = 8192  # tokens of the original context

    def __post_init__(self) -> None:
        if self.kind not in ("linear", "llama3"):
            raise ValueError(f"model.rope_scaling.kind is {self.kind!r}; it must be 'linear' or 'llama3'.")
        for name in ("factor", "low_freq_factor", "high_freq_factor", "original_length"):
            value = getattr(self, name)
            if isinstance(value, bool):
                raise ValueError(f"model.rope_scaling.{name} is {value}; it must be a number.")
            if value <= 0:
                raise ValueError(f"model.rope_scaling.{name} is {value}; it must be greater than 0.")
        extra = [f.name for f in dataclasses.fields(self)[2:] if getattr(self, f.name) != f.default]
        if self.kind == "linear" and extra:
            raise ValueError(f"model.rope_scaling.{extra[0]} belongs to kind 'llama3'; kind 'linear' has only factor.")
        low, high = self.low_freq_factor, self.high_freq_factor
        if self.kind == "llama3" and high <= low:
            raise ValueError(f"model.rope_scaling.high_freq_factor is {high}; it must be above low_freq_factor, {low}.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The configuration of the decoder that serves all families. Hashable: compiled functions take it as a static argument."""

    vocab_size: int
    width: int
    layers: int
    heads: int
    kv_heads: int
    mlp_width: int
    head_dim: int = 0  # size of one head, independent of width; 0: width / heads
    activation: str = "silu"  # "silu" (SwiGLU) or "gelu" (tanh-approximated GeGLU)
    rope_theta: float = 10_000.0  # base of the rotary frequencies
    rope_scaling: RopeScaling | None = None  # change of the frequencies for long contexts
    sliding_window: int = 0  # keys that a sliding layer sees, the query's own included; 0: no layer slides
    sliding_period: int = 0  # every n-th layer is global, and the others slide (Gemma 3: 6); 0: all slide (Mistral)
    local_rope_theta: float = 0.0  # rotary base of sliding layers; 0: rope_theta with its scaling
    norm_eps: float = 1e-6  # epsilon inside the root of RMSNorm
    norm_offset: float = 0.0  # added to the stored scale of a norm (Gemma stores scale - 1)
    post_norms: bool = False  # also normalise the outputs of attention and MLP (Gemma 3)
    qkv_bias: bool = False  # biases on the query, key and value projections (Qwen 2)
    qk_norm: bool = False  # RMSNorm on each query and key head (Qwen 3, Gemma 3)
    tied_embedding: bool = True  # the output head is the embedding
    embedding_scale: float = 1.0  # factor on the embeddings (Gemma: sqrt(width))
    query_scale: float = 0.0  # factor on the attention scores; 0: head_dim ** -0.5
    param_dtype: str = "float32"  # dtype of the stored weights and of the residual stream
    compute_dtype: str = "float32"  # dtype of the operands of matrix products; sums are always float32
    # Values computed again in the backward pass: "none", "dots" (all but products and blockwise attention), "layer".
    remat: str = "layer"
    unrolled: bool = False  # programs repeat the code of a layer instead of looping over the layers
    # Attention to whole prompts and completions: "plain", "blockwise" or "splash", see the modules. Decoding is always plain.
    attention: str = "plain"
    lora_rank: int = 0  # rank of the adapters, trained instead of the weights, see `models.lora`; 0: no adapters
    lora_alpha: float = 16.0  # the product of an adapter's matrices is multiplied by lora_alpha / lora_rank
    lora_projections: tuple[str, ...] = PROJECTIONS  # the matrices of each layer that have adapters
    features: int = 0  # numbers per prompt in addition to its tokens; 0: none
    prefix_length: int = 0  # embeddings before the tokens, into which an MLP turns the features
    encoder_width: int = 0  # hidden size of the MLP
    encoder_layers: int = 1  # hidden layers of the MLP

    def __post_init__(self) -> None:
        self._check_sizes()
        if not self.head_dim:
            object.__setattr__(self, "head_dim", self.width // self.heads)
        if self.head_dim % 2:
            raise ValueError(f"model.head_dim is {self.head_dim}; it must be even, as rotary positions turn pairs.")
        if not self.query_scale:
            object.__setattr__(self, "query_scale", 1.0 / math.sqrt(self.head_dim))
        for name, allowed in _CHOICES.items():
            value = getattr(self, name)
            if value not in allowed:
                raise ValueError(f"model.{name} is {value!r}; it must be one of {', '.join(map(repr, allowed))}.")
        object.__setattr__(self, "lora_projections", tuple(self.lora_projections))
        self._check_additions()

    def _check_sizes(self) -> None:
        for name in ("vocab_size", "width", "layers", "heads", "kv_heads", "mlp_width"):
            if getattr(self, name) < 1:
                raise ValueError(f"model.{name} is {getattr(self, name)}; it must be at least 1.")
        for name in ("head_dim", "sliding_window", "sliding_period", "local_rope_theta", "norm_eps", "query_scale"):
            if getattr(self, name) < 0:
                raise ValueError(f"model.{name} is {getattr(self, name)}; it must not be negative.")
        if self.rope_theta <= 0:
            raise ValueError(f"model.rope_theta is {self.rope_theta}; it must be greater than 0.")
        if self.heads % self.kv_heads:
            raise ValueError(
                f"model.heads ({self.heads}) must be a multiple of model.kv_heads ({self.kv_heads}): each serves as many query heads."
            )
        if not self.head_dim and self.width % self.heads:
            raise ValueError(
                f"model.width ({self.width}) is not a multiple of model.heads ({self.heads}); set model.head_dim explicitly."
            )

    def _check_additions(self) -> None:
        if self.lora_rank < 0 or self.lora_alpha <= 0:
            raise ValueError(
                f"lora.rank is {self.lora_rank} and lora.alpha {self.lora_alpha}; rank must not be negative, alpha must be above 0."
            )
        names = self.lora_projections
        if not names or any(name not in PROJECTIONS for name in names) or len(set(names)) < len(names):
            raise ValueError(
                f"lora.projections is {list(names)}; it must name some of {', '.join(PROJECTIONS)}, each once."
            )
        encoder = (self.features, self.prefix_length, self.encoder_width)
        if min(encoder) < 0 or (any(encoder) and not all(encoder)):
            raise ValueError(
                f"model.features, model.prefix_length and model.encoder_width are {self.features}, {self.prefix_length} and "
                f"{self.encoder_width}; set all of them above 0, or none."
            )
        if self.encoder_layers < 1:
            raise ValueError(f"model.encoder_layers is {self.encoder_layers}; it must be at least 1.")
        if not self.sliding_window and (self.sliding_period or self.local_rope_theta):
            both = "model.sliding_period and model.local_rope_theta"
            raise ValueError(f"{both} act on sliding layers only: set model.sliding_window, or leave them 0.")
        if self.sliding_period == 1:
            raise ValueError(
                "model.sliding_period is 1, so every layer would be global: set it to 2 or more, to 0 if all layers slide, or leave "
                "out model.sliding_window."
            )
        if self.local_rope_theta and not self.sliding_period:
            raise ValueError(
                "model.local_rope_theta is for models with sliding and global layers, and all layers slide without "
                "model.sliding_period: set model.rope_theta instead."
            )

    @property
    def lora_scale(self) -> float:
        return self.lora_alpha / self.lora_rank

    @property
    def sliding_layers(self) -> tuple[bool, ...]:
        """Per layer, whether it sees only the last `sliding_window` positions."""
        if not self.sliding_window:
            return (False,) * self.layers
        return tuple(not self.sliding_period or (i + 1) % self.sliding_period != 0 for i in range(self.layers))

"""The configuration of one decoder: sizes, switches and dtypes in one frozen value."""

import dataclasses
import math

PROJECTIONS = ("q", "k", "v", "o", "gate", "up", "down")
_CHOICES = {
    "param_dtype": ("float32", "bfloat16"),
    "compute_dtype": ("float32", "bfloat16"),
    "activation": ("silu", "gelu"),
    "remat": ("none", "dots", "layer"),
    "attention": ("plain", "splash"),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """A change of the rotary frequencies for contexts longer than those of the first training.

    Kind "linear" divides every frequency by `factor` (global layers of Gemma 3). Kind "llama3" divides low frequencies by `factor`,
    keeps high ones and blends between them (Llama 3.1 and later).

    Attributes:
      kind: "linear" or "llama3".
      factor: divisor of the frequencies.
      low_freq_factor: "llama3" divides frequencies with fewer periods than this in the original context.
      high_freq_factor: "llama3" keeps frequencies with more periods than this in the original context.
      original_length: tokens of the original context.
    """

    kind: str
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_length: int = 8192

    def __post_init__(self) -> None:
        if self.kind not in ("linear", "llama3"):
            raise ValueError(f"model.rope_scaling.kind is {self.kind!r}; it must be 'linear' or 'llama3'.")
        for name in ("factor", "low_freq_factor", "high_freq_factor", "original_length"):
            if isinstance(getattr(self, name), bool):
                raise ValueError(f"model.rope_scaling.{name} is {getattr(self, name)}; it must be a number.")
            if getattr(self, name) <= 0:
                raise ValueError(f"model.rope_scaling.{name} is {getattr(self, name)}; it must be greater than 0.")
        if self.kind == "linear":
            extra = [f.name for f in dataclasses.fields(self)[2:] if getattr(self, f.name) != f.default]
            if extra:
                raise ValueError(
                    f"model.rope_scaling.{extra[0]} belongs to kind 'llama3'; kind 'linear' has only factor."
                )
        elif self.high_freq_factor <= self.low_freq_factor:
            raise ValueError(
                f"model.rope_scaling.high_freq_factor is {self.high_freq_factor}; it must be greater than low_freq_factor, "
                f"{self.low_freq_factor}."
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The configuration of the decoder that serves all families. Hashable: compiled functions take it as a static argument.

    Attributes:
      vocab_size, width, layers, heads, kv_heads, mlp_width: sizes.
      head_dim: size of one head, independent of width (0: width / heads).
      activation: "silu" (SwiGLU) or "gelu" (tanh-approximated GeGLU).
      rope_theta: base of the rotary frequencies.
      rope_scaling: change of the frequencies for long contexts, or None.
      sliding_window: keys that a sliding layer sees, the query's own included; 0: no layer slides.
      sliding_period: every `sliding_period`-th layer is global and the others slide (Gemma 3: 6); 0: all layers slide (Mistral).
        Needs a sliding window.
      local_rope_theta: rotary base of sliding layers; 0: rope_theta with its scaling.
      norm_eps: epsilon inside the root of RMSNorm.
      norm_offset: added to the stored scale of a norm (Gemma stores scale - 1).
      post_norms: also normalise the outputs of attention and MLP (Gemma 3).
      qkv_bias: biases on the query, key and value projections (Qwen 2).
      qk_norm: RMSNorm on each query and key head (Qwen 3, Gemma 3).
      tied_embedding: the output head is the embedding.
      embedding_scale: factor on the embeddings (Gemma: sqrt(width)).
      query_scale: factor on the attention scores (0: head_dim ** -0.5).
      param_dtype: dtype of the stored weights and of the residual stream.
      compute_dtype: dtype of the operands of matrix products; sums are always float32.
      remat: values that the backward pass computes again: "none", "dots" (all but matrix products) or "layer".
      attention: for whole prompts and completions, "plain" or "splash". Plain attention holds all scores of a layer. The splash kernels
        for TPUs hold no scores and skip blocks that no query sees; on other devices they are interpreted: slow, for tests. Decoding
        is always plain.
      lora_rank: rank of the adapters that are trained instead of the weights; 0: no adapters, see `models.lora`.
      lora_alpha: the product of an adapter's matrices is multiplied by lora_alpha / lora_rank.
      lora_projections: the matrices of each layer that have adapters.
      features: numbers per prompt in addition to its tokens. An MLP turns them into `prefix_length` embeddings before the tokens.
        0: none.
      prefix_length: embeddings per prompt that the MLP computes from the features.
      encoder_width: hidden size of the MLP.
    """

    vocab_size: int
    width: int
    layers: int
    heads: int
    kv_heads: int
    mlp_width: int
    head_dim: int = 0
    activation: str = "silu"
    rope_theta: float = 10_000.0
    rope_scaling: RopeScaling | None = None
    sliding_window: int = 0
    sliding_period: int = 0
    local_rope_theta: float = 0.0
    norm_eps: float = 1e-6
    norm_offset: float = 0.0
    post_norms: bool = False
    qkv_bias: bool = False
    qk_norm: bool = False
    tied_embedding: bool = True
    embedding_scale: float = 1.0
    query_scale: float = 0.0
    param_dtype: str = "float32"
    compute_dtype: str = "float32"
    remat: str = "layer"
    attention: str = "plain"
    lora_rank: int = 0
    lora_alpha: float = 16.0
    lora_projections: tuple[str, ...] = PROJECTIONS
    features: int = 0
    prefix_length: int = 0
    encoder_width: int = 0

    def __post_init__(self) -> None:
        self._check_sizes()
        if not self.head_dim:
            object.__setattr__(self, "head_dim", self.width // self.heads)
        if self.head_dim % 2:
            raise ValueError(
                f"model.head_dim is {self.head_dim}; it must be even, because rotary positions turn pairs."
            )
        if not self.query_scale:
            object.__setattr__(self, "query_scale", 1.0 / math.sqrt(self.head_dim))
        for name, allowed in _CHOICES.items():
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"model.{name} is {getattr(self, name)!r}; it must be one of {', '.join(map(repr, allowed))}."
                )
        object.__setattr__(self, "lora_projections", tuple(self.lora_projections))
        self._check_additions()
        self._check_windows()

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
                f"model.heads ({self.heads}) must be a multiple of model.kv_heads ({self.kv_heads}): "
                "each key/value head serves as many query heads."
            )
        if not self.head_dim and self.width % self.heads:
            raise ValueError(
                f"model.width ({self.width}) is not a multiple of model.heads ({self.heads}); "
                "set model.head_dim explicitly."
            )

    def _check_additions(self) -> None:
        """Checks the adapters and the encoder of features."""
        if self.lora_rank < 0 or self.lora_alpha <= 0:
            raise ValueError(
                f"lora.rank is {self.lora_rank} and lora.alpha {self.lora_alpha}; the rank must not be negative, and alpha must be "
                "greater than 0."
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

    def _check_windows(self) -> None:
        if not self.sliding_window and (self.sliding_period or self.local_rope_theta):
            raise ValueError(
                "model.sliding_period and model.local_rope_theta act on sliding layers only: "
                "set model.sliding_window, or leave them 0."
            )
        if self.local_rope_theta and not self.sliding_period:
            raise ValueError(
                "model.local_rope_theta is for models with sliding and global layers, and all layers slide without "
                "model.sliding_period: set model.rope_theta instead."
            )

    @property
    def lora_scale(self) -> float:
        """The factor on the product of an adapter's two matrices."""
        return self.lora_alpha / self.lora_rank

    @property
    def sliding_layers(self) -> tuple[bool, ...]:
        """Per layer, whether it sees only the last `sliding_window` positions."""
        if not self.sliding_window:
            return (False,) * self.layers
        return tuple(not self.sliding_period or (i + 1) % self.sliding_period != 0 for i in range(self.layers))

"""What distinguishes one decoder from another: sizes, switches and dtypes, as one frozen value."""

import dataclasses
import math

_DTYPES = ("float32", "bfloat16")
PROJECTIONS = ("q", "k", "v", "o", "gate", "up", "down")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """How rotary frequencies are stretched for contexts longer than those first trained on.

    kind "linear" divides every frequency by `factor` (Gemma 3's global layers); kind "llama3"
    divides the low ones, keeps the high ones and blends between (Llama 3.1 and later).
    """

    kind: str
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_length: int = 8192

    def __post_init__(self):
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
                    f"model.rope_scaling.{extra[0]} belongs to kind 'llama3'; kind 'linear' has a factor alone."
                )
        elif self.high_freq_factor <= self.low_freq_factor:
            raise ValueError(
                f"model.rope_scaling.high_freq_factor is {self.high_freq_factor}; it must be greater than low_freq_factor, "
                f"{self.low_freq_factor}."
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """One decoder for all families. Hashable: it is a static argument of compiled functions.

    Attributes:
      vocab_size, width, layers, heads, kv_heads, mlp_width: sizes.
      head_dim: size of one head, independent of width (0: width / heads).
      activation: "silu" (SwiGLU) or "gelu" (tanh-approximated GeGLU).
      rope_theta: base of the rotary frequencies.
      rope_scaling: stretch of the frequencies, or None.
      sliding_window: keys a sliding layer can see, the query itself included; 0 for none.
      sliding_period: with a window, every `sliding_period`-th layer is global and the others slide
        (Gemma 3: 6); 0 means that all layers slide (Mistral).
      local_rope_theta: rotary base of sliding layers; 0 means rope_theta, with its scaling.
      norm_eps: epsilon inside the root of RMSNorm.
      norm_offset: added to the stored norm scale (Gemma stores scale - 1).
      post_norms: also normalise the output of attention and MLP (Gemma 3).
      qkv_bias: biases on the query, key and value projections (Qwen 2).
      qk_norm: RMSNorm on each query and key head (Qwen 3, Gemma 3).
      tied_embedding: the output head is the embedding.
      embedding_scale: embeddings are multiplied by this (Gemma: sqrt(width)).
      query_scale: attention scores are multiplied by this (0: head_dim ** -0.5).
      param_dtype: dtype of stored weights and of the residual stream.
      compute_dtype: dtype of the operands of matrix products; sums are always float32.
      remat: what the backward pass recomputes: "none", "dots" (all but matrix products) or "layer".
      attention: of whole prompts and completions: "plain", which holds all scores of a layer, or "splash", kernels for TPUs that hold
        none and skip what nothing sees; elsewhere they are interpreted, slow, for tests. Decoding is plain.
      lora_rank: rank of the adapters that are trained in place of the weights; 0: none, see `models.lora`.
      lora_alpha: the adapters' product is multiplied by lora_alpha / lora_rank.
      lora_projections: the layers' matrices that have adapters.
      features: numbers a prompt carries beside its tokens; an MLP turns them into `prefix_length` embeddings in front
        of the tokens. 0: none.
      prefix_length: see features.
      encoder_width: hidden size of that MLP.
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

    def __post_init__(self):
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
                f"model.heads ({self.heads}) must be a multiple of model.kv_heads "
                f"({self.kv_heads}): each key/value head serves as many query heads."
            )
        if not self.head_dim:
            if self.width % self.heads:
                raise ValueError(
                    f"model.width ({self.width}) is not a multiple of model.heads ({self.heads}); "
                    "set model.head_dim explicitly."
                )
            object.__setattr__(self, "head_dim", self.width // self.heads)
        if self.head_dim % 2:
            raise ValueError(f"model.head_dim is {self.head_dim}; rotary positions need an even number.")
        if not self.query_scale:
            object.__setattr__(self, "query_scale", 1.0 / math.sqrt(self.head_dim))
        for name in ("param_dtype", "compute_dtype"):
            if getattr(self, name) not in _DTYPES:
                raise ValueError(f"model.{name} is {getattr(self, name)!r}; it must be one of {_DTYPES}.")
        if self.activation not in ("silu", "gelu"):
            raise ValueError(f"model.activation is {self.activation!r}; it must be 'silu' or 'gelu'.")
        if self.remat not in ("none", "dots", "layer"):
            raise ValueError(f"model.remat is {self.remat!r}; it must be 'none', 'dots' or 'layer'.")
        if self.attention not in ("plain", "splash"):
            raise ValueError(f"model.attention is {self.attention!r}; it must be 'plain' or 'splash'.")
        object.__setattr__(self, "lora_projections", tuple(self.lora_projections))
        unknown = [name for name in self.lora_projections if name not in PROJECTIONS]
        if self.lora_rank < 0 or self.lora_alpha <= 0:
            raise ValueError(
                f"lora.rank is {self.lora_rank} and lora.alpha {self.lora_alpha}; the rank must not be negative, alpha above 0."
            )
        if unknown or not self.lora_projections or len(set(self.lora_projections)) < len(self.lora_projections):
            raise ValueError(
                f"lora.projections is {list(self.lora_projections)}; it must name some of {', '.join(PROJECTIONS)}, each once."
            )
        encoder = (self.features, self.prefix_length, self.encoder_width)
        if min(encoder) < 0 or (any(encoder) and not all(encoder)):
            raise ValueError(
                f"model.features, model.prefix_length and model.encoder_width are {self.features}, {self.prefix_length} and "
                f"{self.encoder_width}; set all of them above 0, or none."
            )
        if not self.sliding_window and (self.sliding_period or self.local_rope_theta):
            raise ValueError(
                "model.sliding_period and model.local_rope_theta act on sliding layers only: "
                "set model.sliding_window, or leave them 0."
            )

        if self.local_rope_theta and not self.sliding_period:
            raise ValueError(
                "model.local_rope_theta is for models with sliding and global layers, and without model.sliding_period all "
                "layers slide: set model.rope_theta instead."
            )

    @property
    def lora_scale(self) -> float:
        """The factor on the product of an adapter's two matrices."""
        return self.lora_alpha / self.lora_rank

    @property
    def sliding_layers(self) -> tuple[bool, ...]:
        """Which layers see only the last `sliding_window` positions."""
        if not self.sliding_window:
            return (False,) * self.layers
        return tuple(not self.sliding_period or (i + 1) % self.sliding_period != 0 for i in range(self.layers))

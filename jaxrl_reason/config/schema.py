"""The fields of a configuration, with their defaults, ranges and help texts.

The command line, `--help`, the validation and the saved `config.json` all read the dataclasses in this module.
"""

from collections.abc import Iterable
import dataclasses
from typing import Any, get_type_hints

from jaxrl_reason import losses, methods, models

DTYPES = ("float32", "bfloat16")
TRACKERS = ("wandb", "trackio", "mlflow")  # `runs.trackers` has an entry for each


class ConfigError(ValueError):
    """A configuration that cannot run. The message is one sentence that names the field."""


def _field(default: Any, help: str, *, choices: Iterable[str] | None = None, **bounds: float) -> Any:
    """Returns a dataclass field: low <= value <= high, above < value < below, and value among `choices`."""
    metadata = dict.fromkeys(("low", "above", "high", "below")) | bounds | dict(help=help, choices=choices)
    if isinstance(default, (dict, list)):
        return dataclasses.field(default_factory=lambda: type(default)(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass(kw_only=True)
class Model:
    path: str = _field(
        "", "pretrained model: Hugging Face directory or id, or .gguf; sets sizes and tokenizer; empty: random weights"
    )
    width: int = _field(128, "size of the residual stream", low=1)
    layers: int = _field(4, "number of layers", low=1)
    heads: int = _field(4, "query heads", low=1)
    kv_heads: int = _field(2, "key/value heads; divides heads", low=1)
    head_dim: int = _field(0, "size of a head; 0: width / heads", low=0)
    mlp_width: int = _field(384, "hidden size of the MLP", low=1)
    activation: str = _field("silu", "gate of the MLP", choices=("silu", "gelu"))
    rope_theta: float = _field(10_000.0, "base of the rotary frequencies", above=0)
    rope_scaling: dict = _field(
        {}, "scaling of the rotary frequencies, e.g. {'kind': 'llama3', 'factor': 8.0, 'original_length': 8192}"
    )
    sliding_window: int = _field(0, "positions that a sliding layer sees; 0: no sliding layers", low=0)
    sliding_period: int = _field(0, "every n-th layer is global, the others slide; 0: all slide", low=0)
    local_rope_theta: float = _field(0.0, "rotary base of sliding layers; 0: rope_theta with its scaling", low=0)
    norm_eps: float = _field(1e-6, "epsilon of RMSNorm", above=0)
    norm_offset: float = _field(0.0, "added to the stored norm scales (Gemma: 1)")
    post_norms: bool = _field(False, "also normalize the output of attention and MLP (Gemma 3)")
    qkv_bias: bool = _field(False, "biases on query, key and value projections")
    qk_norm: bool = _field(False, "RMSNorm on each query and key head")
    tied_embedding: bool = _field(True, "the output head is the embedding")
    embedding_scale: float = _field(1.0, "factor on the embeddings (Gemma: sqrt(width))", above=0)
    query_scale: float = _field(0.0, "factor on the attention scores; 0: head_dim ** -0.5", low=0)
    param_dtype: str = _field("float32", "dtype of the weights", choices=DTYPES)
    compute_dtype: str = _field("float32", "dtype of the operands of matrix products; sums are float32", choices=DTYPES)
    remat: str = _field(
        "auto",
        "values that the backward pass recomputes: none, all but matrix products (dots), whole layers, auto (on CPUs none or dots if memory allows, else layer)",
        choices=("auto", "none", "dots", "layer"),
    )
    attention: str = _field(
        "auto",
        "attention of prompts and updates: plain, blockwise (CPUs and GPUs), splash (TPU kernels, interpreted elsewhere), auto (splash on TPUs, else blockwise, with plain for short ones)",
        choices=("auto", "plain", "blockwise", "splash"),
    )


@dataclasses.dataclass(kw_only=True)
class Lora:
    rank: int = _field(0, "rank of the adapters, which are trained instead of the weights; 0: train all weights", low=0)
    alpha: float = _field(16.0, "the product of an adapter is multiplied by alpha / rank", above=0)
    projections: list = _field(list(models.PROJECTIONS), "matrices of a layer that have adapters")


@dataclasses.dataclass(kw_only=True)
class Data:
    train: str = _field(
        "word_problems",
        "TFDS name (gsm8k, ...), path of a .jsonl, .json, .csv, .tsv or .parquet file, or hf://datasets/OWNER/NAME/PATH",
    )
    train_split: str = _field("train", "TFDS split, or a slice such as [:90%] of a file")
    eval: str = _field("", "evaluation data; empty: as data.train")
    eval_split: str = _field("test", "split or slice for evaluation")
    data_dir: str = _field("", "directory in which TFDS keeps prepared data; empty: the default of TFDS")
    columns: dict = _field({}, "maps our column names to those of the data, e.g. {'question': 'problem'}")
    eval_columns: dict = _field({}, "column names of data.eval; empty: as data.columns")
    template: str = _field("plain", "prompt template: a name from data/prompts.py, or a text with a {column}")
    chat: bool = _field(
        False, "put the prompt into the model's chat template, as the user's turn after the row's earlier turns"
    )
    system: str = _field("", "system prompt of the chat; empty: none, or the default of the chat template")
    chat_options: dict = _field({}, "further variables of the chat template, e.g. {'enable_thinking': False}")
    on_bad_row: str = _field("refuse", "treatment of malformed rows", choices=("refuse", "skip"))
    on_long_prompt: str = _field("refuse", "treatment of prompts over max_prompt_length", choices=("refuse", "skip"))
    tokenizer: str = _field(
        "", "a tokenizer.json or its directory; empty: the model's own, or a small one trained on the data"
    )
    vocab_size: int = _field(512, "size of a tokenizer that is trained on the data", low=300)
    add_bos: bool = _field(False, "start each prompt with the BOS token, even if the tokenizer does not add it")
    values: str = _field(
        "own",
        "values for rlev: own; ablations: one for all, shuffled, or five levels",
        choices=("own", "uniform", "shuffled", "levels"),
    )


@dataclasses.dataclass(kw_only=True)
class Supervised:
    steps: int = _field(0, "supervised steps on worked solutions before RL; 0: none", low=0)
    batch_size: int = _field(64, "solutions per step", low=1)
    learning_rate: float = _field(1e-3, "peak learning rate (cosine to 0 after 5 % warm-up)", above=0)
    start_from: str = _field(
        "", "work directory of another run, whose supervised start is used; supervised.steps come after it"
    )


@dataclasses.dataclass(kw_only=True)
class Regression:
    tokenizer: str = _field(
        "",
        "number tokenizer; predicts numbers of a table data.train: diabetes, synthetic, small_tables/mpg or a .csv; empty: text problems",
        choices=("", "normalized", "p10", "ieee"),
    )
    tokenizer_options: dict = _field({}, "options of the number tokenizer, e.g. {'base': 2, 'digits': 8}")
    target: str = _field("", "column of a .csv to predict")
    value: str = _field("", "column of row values in [0, 1] for rlev; it is not used as a feature")
    missing: str = _field("refuse", "treatment of missing values", choices=("refuse", "mean", "drop"))
    categorical: str = _field("refuse", "treatment of text columns", choices=("refuse", "onehot", "drop"))
    inputs: str = _field(
        "features", "rows as features (an MLP makes prefix embeddings) or as text", choices=("features", "text")
    )
    prefix_length: int = _field(4, "prefix embeddings per row", low=1)
    encoder_width: int = _field(128, "hidden size of the MLP and of the pointwise regressor (a baseline)", low=1)
    encoder_layers: int = _field(1, "hidden layers of the MLP", low=1)
    encoder_dropout: float = _field(
        0.0,
        "share of the MLP's hidden units that an update of the supervised phase, or of a baseline, leaves out",
        low=0,
        below=1,
    )
    validation_split: str = _field(
        "",
        "split of data.train whose cross-entropy chooses the step with which the supervised phase ends; empty: the last",
    )
    validation_every: int = _field(10, "supervised steps between validations", low=1)


@dataclasses.dataclass(kw_only=True)
class RewardModel:
    path: str = _field(
        "", "reward model of this package or Hugging Face (directory or id); empty: train one in this work directory"
    )
    system: str = _field("", "system prompt in the chat of a pretrained reward model")
    max_length: int = _field(2048, "maximum tokens per text of a pretrained model; longer texts have no score", low=1)
    data: str = _field("", "training pairs: a source with question, chosen, rejected; empty: data.train")
    split: str = _field("", "split of the training pairs; empty: data.train_split")
    eval_split: str = _field("", "split of the held-out pairs; empty: data.eval_split")
    steps: int = _field(300, "training steps", low=1)
    batch_size: int = _field(32, "pairs per step", low=1)
    learning_rate: float = _field(1e-3, "peak learning rate (cosine to 0 after 5 % warm-up)", above=0)


@dataclasses.dataclass(kw_only=True)
class Reward:
    functions: list = _field(
        ["accuracy"],
        "accuracy, last_number, format, math_verify, match_answer (on device), reward_model (learned), module:function or "
        "file.py:function",
    )
    weights: list = _field([], "one weight per function; empty: 1 each")
    verdict: str = _field("", "function whose value > 0.5 means correct; empty: the first")
    max_failure_share: float = _field(
        0.5, "stop if a larger share of the rewards of a step (or part, see sampling.parts) failed", low=0, high=1
    )
    workers: int = _field(0, "processes for module:function and file.py:function; 0: one per core, at most 8", low=0)
    timeout_s: float = _field(10.0, "seconds per call; a call scores all completions of one prompt", above=0)
    memory_mb: int = _field(2048, "memory per call, beyond the memory its process began with", low=1)
    skip_special_tokens: bool = _field(
        False, "hide special tokens of completions from rewards and sample tables; end tokens are always hidden"
    )


@dataclasses.dataclass(kw_only=True)
class Sampling:
    temperature: float = _field(1.0, "temperature of the rollout; training uses the same distribution", above=0)
    quantize: str = _field(
        "", "rounding of weights and KV cache in rollouts, not in evaluations; empty: as trained", choices=("", "int8")
    )
    importance_cap: float = _field(
        2.0, "with sampling.quantize: cap of token weights p_trained / p_sampled, which correct the rounding", above=0
    )
    parts: int = _field(
        1, "parts of a step's prompts, sampled in turn: smaller KV caches, and rewards overlap with sampling", low=1
    )
    halvings: int = _field(
        -1,
        "how often completions that still grow move into a loop of half the size; the samples are the same; -1: automatic",
        low=-1,
    )
    cache_pieces: int = _field(
        0,
        "pieces of the completions' KV cache; a step reads those that are begun; the samples are the same; 0: automatic",
        low=0,
    )
    mismatch_limit: float = _field(
        0.0, "warn if log-probabilities of sampler and trainer differ by more nats; 0: 0.01 in float32, else 1", low=0
    )
    mask_truncated_completions: bool = _field(False, "exclude completions without an end token from the loss")
    max_batches: int = _field(8, "dynamic sampling: maximum prompt batches drawn per step", low=1)


@dataclasses.dataclass(kw_only=True)
class Optimizer:
    learning_rate: float = _field(1e-4, "peak learning rate", above=0)
    schedule: str = _field("constant", "schedule after the warm-up", choices=("constant", "linear", "cosine"))
    warmup_steps: int = _field(0, "training steps of linear warm-up", low=0)
    weight_decay: float = _field(0.0, "decoupled weight decay of AdamW", low=0)
    b1: float = _field(0.9, "first-moment decay of AdamW", low=0, below=1)
    b2: float = _field(0.99, "second-moment decay of AdamW", low=0, below=1)
    eps: float = _field(1e-8, "epsilon of AdamW", above=0)
    max_grad_norm: float = _field(1.0, "clip gradients to this global norm", above=0)
    float32_master: bool = _field(False, "with bfloat16 weights: keep a float32 copy, which accumulates smaller steps")
    max_skipped: int = _field(
        5, "updates with non-finite loss or gradient are skipped; stop after this many steps in a row with none", low=1
    )


@dataclasses.dataclass(kw_only=True)
class Update:
    epochs: int = _field(1, "passes over each rollout", low=1)
    minibatches: int = _field(1, "optimizer updates per pass; divides prompts_per_step", low=1)
    accumulation: int = _field(
        0, "microbatches per update: less memory, the same result; 0: 1, on CPUs by memory", low=0
    )
    lengths: int = _field(
        0,
        "lengths of completions for which the update is compiled, each half of the next; 1: all padded; 0: automatic",
        low=0,
    )
    wave_tokens: int = _field(
        0, "with several lengths: tokens per device that are computed at the same time; 0: automatic", low=0
    )
    logprob_chunk: int = _field(0, "completion positions whose logits are held at once; 0: automatic", low=0)
    kl_coefficient: float = _field(0.0, "weight of KL(policy || reference) in the loss (TRL: beta)", low=0)
    kl_kind: str = _field("k3", "estimator of that KL; all estimators have its gradient", choices=losses.KL_KINDS)
    entropy_coefficient: float = _field(0.0, "weight of an entropy bonus", low=0)


@dataclasses.dataclass(kw_only=True)
class Mesh:
    slice: int = _field(1, "TPU slices joined by a data-center network; -1: all remaining", low=-1)
    data: int = _field(1, "devices that hold copies of the weights; -1: all remaining", low=-1)
    fsdp: int = _field(-1, "devices over which weights and prompts are split; -1: all remaining", low=-1)
    tensor: int = _field(1, "devices over which heads and vocabulary are split; -1: all remaining", low=-1)
    rollout_tensor: int = _field(
        0, "devices over which heads and vocabulary are split in sampling, which uses no fsdp; 0: as mesh.tensor", low=0
    )
    initialization_timeout: int = _field(300, "seconds that a process waits for the others when a run begins", low=1)
    host_timeout: int = _field(100, "seconds without a heartbeat from one process after which all others end", low=1)


@dataclasses.dataclass(kw_only=True)
class Checkpoint:
    every: int = _field(100, "steps between checkpoints; the last step is always saved", low=1)
    keep: int = _field(2, "checkpoints kept", low=1)
    keep_start: bool = _field(False, "also keep the initial weights of RL, for supervised.start_from of other runs")


@dataclasses.dataclass(kw_only=True)
class Eval:
    every: int = _field(50, "steps between evaluations; the first and last step are always evaluated; 0: none", low=0)
    prompts: int = _field(128, "held-out prompts", low=1)
    samples: int = _field(4, "completions per prompt", low=1, high=2**20)
    temperature: float = _field(1.0, "temperature of evaluation; 0: greedy", low=0)
    top_k: int = _field(
        0,
        "evaluation samples among the k most probable tokens; 0: all; training never truncates",
        low=0,
        high=2**31 - 1,
    )
    top_p: float = _field(
        1.0, "evaluation samples among the most probable tokens whose probabilities reach p; 1: all", above=0, high=1
    )
    verdict: str = _field("", "reward function whose value > 0.5 means correct in evaluation; empty: reward.verdict")


@dataclasses.dataclass(kw_only=True)
class Log:
    samples_every: int = _field(10, "steps between tables of sample completions; 0: none", low=0)
    samples: int = _field(8, "completions per table; samples.jsonl has whole groups", low=1)
    tensorboard: bool = _field(True, "write TensorBoard events")
    trackers: list = _field([], f"experiment trackers that get the metrics too: {', '.join(TRACKERS)}")
    profile: list = _field(
        [], "first and last RL step of a profile by jax, in profile/ of the work directory, e.g. [10, 12]; empty: none"
    )
    progress: bool = _field(True, "show a progress bar")
    heartbeat: float = _field(
        60.0, "report a step that takes longer than this many seconds and five times the usual time; 0: never", low=0
    )


@dataclasses.dataclass(kw_only=True)
class Config:
    """The whole configuration of a run. `method` holds the name of a method and its keywords."""

    seed: int = _field(0, "seed of everything random", low=0, high=2**31 - 1)
    steps: int = _field(100, "RL steps; 0: the supervised phase only", low=0)
    prompts_per_step: int = _field(16, "prompts per step (P)", low=1)
    group_size: int = _field(8, "completions per prompt (G)", low=1)
    max_prompt_length: int = _field(64, "maximum tokens per prompt (S)", low=1)
    max_completion_length: int = _field(64, "maximum tokens per completion, end token included (T)", low=1)
    compilation_cache: str = _field(
        "auto", "directory that keeps compiled programs; auto: jaxrl_reason/xla in the user's cache; empty: none"
    )
    model: Model = dataclasses.field(default_factory=Model)
    lora: Lora = dataclasses.field(default_factory=Lora)
    data: Data = dataclasses.field(default_factory=Data)
    supervised: Supervised = dataclasses.field(default_factory=Supervised)
    regression: Regression = dataclasses.field(default_factory=Regression)
    reward: Reward = dataclasses.field(default_factory=Reward)
    reward_model: RewardModel = dataclasses.field(default_factory=RewardModel)
    method: dict = _field({"name": "grpo"}, "name of the method and its keywords; --help ends with a list of them")
    sampling: Sampling = dataclasses.field(default_factory=Sampling)
    optimizer: Optimizer = dataclasses.field(default_factory=Optimizer)
    update: Update = dataclasses.field(default_factory=Update)
    mesh: Mesh = dataclasses.field(default_factory=Mesh)
    checkpoint: Checkpoint = dataclasses.field(default_factory=Checkpoint)
    eval: Eval = dataclasses.field(default_factory=Eval)
    log: Log = dataclasses.field(default_factory=Log)


def field_names(section: Any) -> list[str]:
    """Returns the names of the fields of a section."""
    return [f.name for f in dataclasses.fields(section)]


def with_article(kind: type) -> str:
    """Returns "an int", "a float", ... for messages."""
    return f"{'an' if kind is int else 'a'} {kind.__name__}"


def to_dict(config: Config) -> dict[str, Any]:
    """Returns the configuration as nested dicts that JSON can hold."""
    return dataclasses.asdict(config)


def from_dict(values: dict[str, Any], kind: type = Config) -> Any:
    """Returns the configuration (or a section of type `kind`) that `to_dict` turned into `values`.

    Raises:
      ConfigError: `values` has a field that does not exist.
    """
    hints = get_type_hints(kind)
    for key in values:
        if key not in hints:
            near = methods.nearest(key, list(hints))
            raise ConfigError(f"The saved configuration has the field {key!r}, which does not exist.{near}")
    return kind(**{k: from_dict(v, hints[k]) if dataclasses.is_dataclass(hints[k]) else v for k, v in values.items()})

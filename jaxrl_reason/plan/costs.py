"""What a rollout, a scoring and an update cost, from the sizes alone: FLOPs of their products, and the least traffic with memory.

Nothing is compiled. The FLOPs are those of the programs in `rollout`, `learner` and `models.reward_model` as they are written, padding and
recomputation included, and agree with `hlo.read` of the compiled programs (tests/plan/test_costs.py). The bytes are a lower bound to first
order, for a roofline: what has to pass between a device's memory and its cores even where everything that can be fused is.

P prompts of S tokens, G completions of T tokens each, as arrays: padding costs as much as tokens. All numbers are of a whole step, summed
over the devices. Symbols below: D width, F mlp_width, H heads, N kv_heads, K head_dim, V vocab_size, L layers; c and p are the bytes of a
number in compute_dtype and in param_dtype. Products count two FLOPs a multiply-add; what works element by element counts nothing.
"""

import dataclasses
import math

from jaxrl_reason.models.config import ModelConfig, PROJECTIONS
from jaxrl_reason.rl import scoring

ATTENTION = ("plain", "splash")
_BYTES = {"float32": 4, "bfloat16": 2}
_FLOAT32 = 4


@dataclasses.dataclass(frozen=True)
class Cost:
    """Of one program, over all devices.

    Attributes:
      flops: of all products.
      attention_flops: of those, queries with keys and weights with values.
      recomputed_flops: of those, what an update computes again in its backward pass instead of keeping it. A model's FLOPs, as its share of
        the hardware's peak is usually told, are `flops` less these.
      bytes: read from and written to memory, at least.
    """

    flops: float = 0.0
    attention_flops: float = 0.0
    recomputed_flops: float = 0.0
    bytes: float = 0.0

    def __add__(self, other: "Cost") -> "Cost":
        mine, theirs = dataclasses.astuple(self), dataclasses.astuple(other)
        return Cost(*(a + b for a, b in zip(mine, theirs)))

    def __mul__(self, times: float) -> "Cost":
        return Cost(*(times * x for x in dataclasses.astuple(self)))


def rollout(
    model: ModelConfig,
    P: int,
    G: int,
    S: int,
    T: int,
    *,
    attention: str = "plain",
    replicas: int = 1,
    prompt_logprobs: bool = False,
    probe: bool = False,
    int8: bool = False,
) -> Cost:
    """`rollout.generate` where no completion ends early: one prefill, and T - 1 steps of P * G tokens (T with a probe).

    FLOPs of a step: those of a forward of P * G tokens, head included, 4 H K L P G (S + T) of attention: every step multiplies with the
    whole cache, what lies ahead masked, whatever `attention` is. The first token's logits are taken once a prompt.

    Bytes: a pass over P * S tokens as in `score`, its keys and values written, all layers' matrices read once more in param_dtype and written
    as decoding reads them. Then in every step: the layers' matrices and the head once a replica, each prompt's keys and values once, all T
    places of each sample's cache once, its own key and value written, its float32 logits written and read. Scores and other activations of a
    step are taken to stay on the chip. int8 makes matrices 1 byte a number, and cached numbers 1 byte with 4 more for each head and place.

    Args:
      model: the decoder's configuration.
      P, G, S, T: prompts, completions a prompt (the greedy one included, where a method asks for it), tokens.
      attention: of the prefill: "plain" computes the whole S x S rectangle, "splash" what is visible.
      replicas: into how many parts the mesh splits the prompts (all its axes but "tensor"): each part reads all matrices.
      prompt_logprobs, probe, int8: as in `rollout.generate`.
    """
    _check(model, attention, P=P, G=G, S=S, T=T, replicas=replicas)
    steps, rows, S = T - 1 + probe, P * G, S + model.prefix_length
    c = _BYTES[model.compute_dtype]
    weight, place = (1, model.head_dim + 4) if int8 else (c, model.head_dim * c)
    matrices, head = _matrices(model), model.width * model.vocab_size
    cached = 2 * model.layers * model.kv_heads * place  # of one token
    first = _forward(model, P, 1, S, 0, attention, replicas) + _encoder(model, P)
    first += Cost(2.0 * head * P * (1 + (S - model.prefix_length) * prompt_logprobs))
    first += Cost(bytes=P * S * cached + matrices * (_BYTES[model.param_dtype] + weight))
    attended = _products(model, rows * (S + T)) * model.layers
    step = Cost(2.0 * rows * (matrices + _adapters(model) + head) + attended, attended)
    read = replicas * weight * (matrices + head) + replicas * _FLOAT32 * _adapters(model)
    read += P * S * cached + rows * T * cached
    written = rows * (cached + 2 * _FLOAT32 * model.vocab_size)
    return first + (step + Cost(bytes=read + written)) * steps


def score(
    model: ModelConfig,
    P: int,
    G: int,
    S: int,
    T: int,
    *,
    attention: str = "plain",
    replicas: int = 1,
    parts: int = 1,
    logprob_chunk: int = 0,
    probe: bool = False,
    tensor: int = 1,
) -> Cost:
    """`scoring.score`: one forward over P * (S + G * (T - 1)) tokens (G * T with a probe), and P * G * T logits.

    FLOPs of a token and layer: 2 (2 D K (H + N) + 3 D F). Attention: 4 H K for each pair of a query and a key, which are S * S pairs a prompt and
    T * (S + T) a completion where attention is plain, and those that are visible (causal, near enough in a sliding layer) where it is splash.
    Chunks of positions are padded to the same length, and the padding is computed.

    Bytes, for each part: every matrix read once a replica, in compute_dtype; of each token and layer what goes into and comes out of the
    products once, 4 D + 4 H K + 4 N K + 4 F numbers in compute_dtype, which elementwise work can share; of plain attention the float32 scores
    written and read and their exponentials written and read in compute_dtype, 8 + 2 c bytes a pair and head; logits written and read in
    float32; the head read once a chunk.

    Args:
      model: the decoder's configuration.
      P, G, S, T: prompts, completions a prompt, tokens.
      attention: "plain" or "splash".
      replicas: see `rollout`.
      parts: microbatches.
      logprob_chunk: positions whose logits are held at once; 0: what the program picks.
      probe: whether a token behind the end is scored too.
      tensor: over how many devices the vocabulary is split.
    """
    _check(model, attention, P=P, G=G, S=S, T=T, replicas=replicas, parts=parts)
    p, positions = P / parts, _positions(model, P // parts, G, T, logprob_chunk, replicas, tensor)
    one = _forward(model, p, G, S + model.prefix_length, T - 1 + probe, attention, replicas) + _encoder(model, p)
    one += _logits(model, p * G * positions.computed, replicas * positions.chunks)
    if probe:
        one += _logits(model, p * G, replicas)
    return one * parts


def reward_model(
    model: ModelConfig, P: int, G: int, S: int, T: int, *, attention: str = "plain", replicas: int = 1, parts: int = 1
) -> Cost:
    """`models.reward_model.group_scores`: as `score`, over P * (S + G * T) tokens and without a head; T = 0: P whole texts of S tokens."""
    _check(model, attention, P=P, G=G, S=S, T=max(T, 1), replicas=replicas, parts=parts)
    return _forward(model, P / parts, G, S, T, attention, replicas) * parts


def update(
    model: ModelConfig,
    P: int,
    G: int,
    S: int,
    T: int,
    *,
    attention: str = "plain",
    replicas: int = 1,
    copies: int = 1,
    epochs: int = 1,
    minibatches: int = 1,
    accumulation: int = 1,
    logprob_chunk: int = 0,
    probe: bool = False,
    tensor: int = 1,
    optimizer_slots: int = 2,
) -> Cost:
    """`learner.make_update`: for each pass over the rollout the forward of `score`, its backward, and the optimizer.

    FLOPs of the backward: of each product twice the forward's, for the gradients of its two operands; once for a frozen matrix. Again in
    the backward: the logits, where they are taken in chunks; with remat "dots" the attention; with remat "layer" the layers too, less the
    MLP's last product where nothing behind it needs its result. Splash attention computes the scores again in each of its two gradient
    kernels, 7 products behind the forward's 2; remat computes the forward's again.

    Bytes, for each microbatch: the forward's; in the backward every matrix again, twice the forward's traffic of activations, scores and
    logits (what was kept is read, gradients are written and read), once more what is recomputed; gradients written in float32 by every
    replica, and with accumulation read and written once more; the head's gradient read and written for every chunk. For each update, once a
    copy: gradient, weights and the optimizer's numbers read, the last two written.

    Args:
      model, P, G, S, T, attention, replicas, logprob_chunk, probe, tensor: see `score`. model.remat says what is recomputed, model.lora_rank what is
        trained.
      copies: of `replicas`, how many hold all weights and optimizer state of their own (all axes of the mesh but "fsdp" and "tensor").
      epochs, minibatches, accumulation: see `learner.UpdateOptions`.
      optimizer_slots: float32 numbers that the optimizer keeps a weight: 2 for AdamW, 3 with a float32 master copy.
    """
    parts = minibatches * accumulation
    _check(model, attention, P=P, G=G, S=S, T=T, replicas=replicas, copies=copies, epochs=epochs, parts=parts)
    p, positions = P / parts, _positions(model, P // parts, G, T, logprob_chunk, replicas, tensor)
    prefixed, after = S + model.prefix_length, T - 1 + probe
    tokens, trained = p * (prefixed + G * after), not model.lora_rank
    matrices, adapters = _matrices(model), _adapters(model)

    layers = _forward(model, p, G, prefixed, after, attention, replicas)
    attended, body = layers.attention_flops, layers.flops - layers.attention_flops
    frozen = 0 if trained else 2.0 * tokens * matrices  # products of which one gradient is not taken
    behind = (2.0 if attention == "plain" else 3.5) * attended
    again = attended if model.remat != "none" else 0.0
    backward = Cost(2 * body - frozen + behind + again, behind + again, again)
    if model.remat == "layer":
        rerun = body - (0 if model.post_norms else 2.0 * tokens * _last_product(model))
        backward += Cost(rerun, 0.0, rerun)
    moved = layers.bytes - replicas * _weight_bytes(model)
    kept_scores = _score_bytes(model, p, G, prefixed, after, attention)
    rerun_bytes = {
        "none": 0.0,
        "dots": kept_scores,
        "layer": moved
        + replicas * _weight_bytes(model)
        + 2 * tokens * model.layers * model.width * _BYTES[model.param_dtype],
    }
    backward += Cost(bytes=2 * moved + replicas * _weight_bytes(model) + rerun_bytes[model.remat])

    backwards = 2 if trained else 1
    once = _logits(model, p * G * positions.computed, replicas * positions.chunks)
    head = once * (1 + backwards)
    if positions.chunks > 1:
        head += once + Cost(recomputed_flops=once.flops)
    if probe:
        head += _logits(model, p * G, replicas) * (1 + backwards)
    if trained:  # its gradient's product reads no weights and adds to a sum
        each = 2 * _FLOAT32 - _BYTES[model.compute_dtype]
        head += Cost(bytes=each * replicas * positions.chunks * model.width * model.vocab_size)
    encoder = _encoder(model, p)
    # The features' gradient is taken by nobody.
    first = 2.0 * p * model.features * model.encoder_width
    encoder = encoder * 3 + Cost(-first) if trained else encoder * 1

    weights = _weights(model) if trained else adapters
    size = _BYTES[model.param_dtype] if trained else _FLOAT32
    gradients = Cost(bytes=_FLOAT32 * replicas * weights * (1 if accumulation == 1 else 3))
    step = Cost(bytes=copies * weights * (_FLOAT32 + 2 * size + 2 * _FLOAT32 * optimizer_slots))
    microbatch = layers + backward + head + encoder + gradients
    return (microbatch * accumulation + step) * (epochs * minibatches)


# -- parts ---------------------------------------------------------------------------------------------------------------------------------


def _check(model: ModelConfig, attention: str, *, P: int, parts: int = 1, **sizes: int) -> None:
    if attention not in ATTENTION:
        raise ValueError(f"attention is {attention!r}; it must be 'plain' or 'splash'.")
    for name, value in {"P": P, "parts": parts, **sizes}.items():
        if value < 1:
            raise ValueError(f"{name} is {value}; it must be at least 1.")
    if P % parts:
        raise ValueError(f"{P} prompts cannot be shared evenly among {parts} microbatches.")


def _shapes(model: ModelConfig) -> dict[str, tuple[int, int]]:
    """(in, out) of a layer's matrices."""
    D, F, K = model.width, model.mlp_width, model.head_dim
    heads, kv = model.heads * K, model.kv_heads * K
    return dict(zip(PROJECTIONS, ((D, heads), (D, kv), (D, kv), (heads, D), (D, F), (D, F), (F, D))))


def _matrices(model: ModelConfig) -> int:
    """Numbers in the matrices of all layers, without adapters."""
    return model.layers * sum(i * o for i, o in _shapes(model).values())


def _adapters(model: ModelConfig) -> int:
    """Numbers in the adapters of all layers."""
    shapes = _shapes(model)
    return model.layers * model.lora_rank * sum(sum(shapes[name]) for name in model.lora_projections)


def _weights(model: ModelConfig) -> int:
    """Numbers in matrices, embedding and head: biases and norms are too few to matter."""
    return _matrices(model) + (1 if model.tied_embedding else 2) * model.vocab_size * model.width


def _weight_bytes(model: ModelConfig) -> float:
    """The layers' matrices, adapters included, as products read them."""
    return _BYTES[model.compute_dtype] * (_matrices(model) + _adapters(model))


def _last_product(model: ModelConfig) -> int:
    """Multiply-adds a token, over all layers, of what adds to the residual stream at a layer's end."""
    i, o = _shapes(model)["down"]
    adapter = model.lora_rank * o if "down" in model.lora_projections else 0
    return model.layers * (i * o + adapter)


def _products(model: ModelConfig, pairs: float) -> float:
    """FLOPs of a layer's attention: scores and weighted values of `pairs` queries and keys."""
    return 4.0 * model.heads * model.head_dim * pairs


def _pairs(model: ModelConfig, S: int, T: int, attention: str, sliding: bool) -> tuple[float, float]:
    """Pairs of a query and a key: of a prompt [S], and of a completion [T] with prompt and itself."""
    if attention == "plain":
        return S * S, T * (S + T)
    window = model.sliding_window if sliding else S + T
    causal = lambda n: sum(min(i + 1, window) for i in range(n))
    return causal(S), causal(S + T) - causal(S)


def _all_pairs(model: ModelConfig, P: float, G: int, S: int, T: int, attention: str) -> float:
    """Pairs of all prompts and completions, over all layers."""
    total = 0.0
    for sliding in (False, True):
        count = model.sliding_layers.count(sliding)
        if count:
            of_prompt, of_completion = _pairs(model, S, T, attention, sliding)
            total += count * P * (of_prompt + G * of_completion)
    return total


def _score_bytes(model: ModelConfig, P: float, G: int, S: int, T: int, attention: str) -> float:
    """Traffic of plain attention's scores and their exponentials in a forward; splash's stay on the chip."""
    if attention == "splash":
        return 0.0
    each = 2 * _FLOAT32 + 2 * _BYTES[model.compute_dtype]
    return each * model.heads * _all_pairs(model, P, G, S, T, attention)


def _forward(model: ModelConfig, P: float, G: int, S: int, T: int, attention: str, replicas: int) -> Cost:
    """The layers over P prompts of S tokens and G completions each of T more."""
    tokens = P * (S + G * T)
    attended = _products(model, _all_pairs(model, P, G, S, T, attention))
    products = 2.0 * tokens * (_matrices(model) + _adapters(model))
    D, F, K = model.width, model.mlp_width, model.head_dim
    each = 4 * (D + model.heads * K + model.kv_heads * K + F) * _BYTES[model.compute_dtype]
    moved = tokens * model.layers * each + _score_bytes(model, P, G, S, T, attention)
    return Cost(products + attended, attended, bytes=moved + replicas * _weight_bytes(model))


def _logits(model: ModelConfig, rows: float, reads: float) -> Cost:
    """Logits of `rows` positions, the head read `reads` times."""
    head = model.width * model.vocab_size
    moved = 2 * _FLOAT32 * rows * model.vocab_size + reads * _BYTES[model.compute_dtype] * head
    return Cost(2.0 * rows * head, bytes=moved)


def _encoder(model: ModelConfig, P: float) -> Cost:
    """The MLP that embeds the numbers that prompts carry."""
    return Cost(2.0 * P * model.encoder_width * (model.features + model.prefix_length * model.width))


@dataclasses.dataclass(frozen=True)
class _Positions:
    """Of a completion's logits: chunks, and positions computed with the last chunk's padding."""

    chunks: int
    computed: int


def _positions(model: ModelConfig, P: int, G: int, T: int, chunk: int, replicas: int, tensor: int) -> _Positions:
    chunk = scoring.chunk_length(math.ceil(P / replicas), G, T, math.ceil(model.vocab_size / tensor), chunk)
    chunks = math.ceil(T / chunk)
    return _Positions(chunks, chunks * chunk)

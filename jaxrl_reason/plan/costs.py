"""Computes FLOPs and memory traffic of a rollout, a scoring and an update from the sizes alone. Nothing is compiled.

FLOPs count products, padding and recomputation included: two per multiply-add, none per elementwise operation. They
agree with `hlo.read` of the compiled programs (tests/plan/test_costs.py). Bytes are a lower bound to first order, for a
roofline: the traffic between a device's memory and its cores that remains if everything is fused that can be. P prompts
of S tokens, G completions of T tokens each. All numbers are sums over the devices. D width, F mlp_width, H heads, N
kv_heads, K head_dim, L layers; c: bytes of a number in compute_dtype.
"""

import dataclasses
import math

import numpy as np

from jaxrl_reason.models.config import ModelConfig, PROJECTIONS
from jaxrl_reason.models.decoding import compaction
from jaxrl_reason.rl import scoring, waves

ATTENTION = ("plain", "splash")
_BYTES = {"float32": 4, "bfloat16": 2}
_FLOAT32 = 4


@dataclasses.dataclass(frozen=True)
class Cost:
    """The cost of one program, over all devices. Utilization is usually computed from `flops - recomputed_flops`."""

    flops: float = 0.0  # of all products
    attention_flops: float = 0.0  # the share of products of queries with keys and of weights with values
    recomputed_flops: float = 0.0  # that the backward pass of an update computes again instead of keeping results
    bytes: float = 0.0  # least traffic with memory, read and written

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(*(a + b for a, b in zip(dataclasses.astuple(self), dataclasses.astuple(other))))

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
    pieces: int = 1,
    halvings: int = 0,
    completions: np.ndarray | None = None,
) -> Cost:
    """Returns the cost of `rollout.generate`: a prefill and, if no completion ends early, T - 1 steps (T with a probe).

    FLOPs of a step: a forward of one token per completion of the loop (P * G in the first) with the head, and
    4 H K L (S + C) per completion of attention. Each step multiplies with the C places of the cache's pieces that are
    begun, masked positions included, for both kinds of attention. The first token's logits are computed once per prompt.

    Bytes of the prefill: a pass over P * S tokens as in `score`, its keys and values written, all layers' matrices read
    once more in param_dtype and written in the dtype of decoding. Bytes of a step: the layers' matrices and the head
    once per replica; each prompt's keys and values (in a smaller loop, each completion's copy of them) and C places of
    each sample's cache once; each sample's new key and value written, its float32 logits written and read. Attention scores and other activations of a step stay on
    the chip. With int8 a number of a matrix or a cache takes 1 byte, and a cache takes 4 more per head and position.

    Args:
      model, P, G, S, T: of the policy; G includes the greedy completion if the method needs it.
      attention: of the prefill: "plain" computes the whole S x S rectangle, "splash" the visible part.
      replicas: number of parts into which the mesh splits the prompts (all axes but "tensor"). Each reads all matrices.
      prompt_logprobs, probe, int8: as in `rollout.generate`.
      pieces, halvings: of the completions' cache (`cache_pieces`), and of the loop.
      completions: tokens per completion, int[P, G]; None: all have T.
    """
    _check(model, attention, P=P, G=G, S=S, T=T, replicas=replicas, pieces=pieces)
    S += model.prefix_length
    c = _BYTES[model.compute_dtype]
    weight, place = (1, model.head_dim + 4) if int8 else (c, model.head_dim * c)
    matrices, head = _matrices(model), model.width * model.vocab_size
    cached = 2 * model.layers * model.kv_heads * place  # bytes per token
    first = _forward(model, P, 1, S, 0, attention, replicas) + _encoder(model, P)
    first += Cost(2.0 * head * P * (1 + (S - model.prefix_length) * prompt_logprobs))
    first += Cost(bytes=P * S * cached + matrices * (_BYTES[model.param_dtype] + weight))
    weights = replicas * weight * (matrices + head) + replicas * _FLOAT32 * _adapters(model)
    for rows, index in _decoding_steps(P, G, S, T, T - 1 + probe, replicas, halvings, completions):
        places = (size := -(-T // pieces)) * min(index // size + 1, pieces)
        attended = 4.0 * model.heads * model.head_dim * rows * (S + places) * model.layers
        prompts = (P if rows == P * G else rows) * S * cached
        moved = rows * (cached + 2 * _FLOAT32 * model.vocab_size) + rows * places * cached
        flops = 2.0 * rows * (matrices + _adapters(model) + head) + attended
        first += Cost(flops, attended, bytes=weights + prompts + moved)
    return first


def _decoding_steps(
    P: int, G: int, S: int, T: int, steps: int, replicas: int, halvings: int, completions: np.ndarray | None
) -> list[tuple[int, int]]:
    """Returns, for each decoding step, the completions of the loop that makes it, on all devices, and its position."""
    if completions is None:
        return [(P * G, index) for index in range(steps)]
    per_device = np.reshape(completions, (replicas, -1))
    sizes = [P * G // replicas, *compaction.sizes(P // replicas, G, S, T, halvings)]
    found = []
    for index in range(steps):
        live = (per_device > index + T - steps).sum(axis=1).max()
        if live:
            found.append((replicas * min(n for n in sizes if n >= live), index))
    return found


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
    lengths: int = 1,
    wave_tokens: int = 0,
    completions: np.ndarray | None = None,
) -> Cost:
    """Returns the cost of `scoring.score`: a forward over P * (S + G * T) tokens and P * G * T logits.

    FLOPs per token and layer: 2 (2 D K (H + N) + 3 D F).
    Attention: 4 H K per pair of a query and a key. Plain attention has S * S pairs per prompt and T * (S + T) per
    completion. Splash attention has the visible pairs only (causal, and within the window in a sliding layer). Chunks of
    positions are padded to equal length, and the padding is computed.

    Bytes per part: every matrix read once per replica, in compute_dtype. Per token and layer the operands and results of
    the products once, as elementwise work can be fused with them: 4 D + 4 H K + 4 N K + 4 F numbers in compute_dtype.
    For plain attention the float32 scores and their exponentials in compute_dtype, written and read: 8 + 2 c bytes per
    pair and head. Logits written and read in float32, and the head read once per chunk.

    Args:
      model, P, G, S, T, attention, replicas: see `rollout`.
      logprob_chunk: positions whose logits are in memory at once; 0: the program's own choice.
      probe: whether a token after the end is scored too.
      parts, tensor: number of microbatches; of devices over which the vocabulary is split.
      lengths, wave_tokens: see `waves.sizes`. With several lengths, a wave counts as prompts of one completion whose
        keys and values are copied.
      completions: tokens per completion, int[P, G]; None: all have T. They matter with several lengths only.
    """
    _check(model, attention, P=P, G=G, S=S, T=T, replicas=replicas, parts=parts)
    if lengths > 1:
        prompt_parts, found = _waves(model, P, G, S, T, replicas, parts, lengths, wave_tokens, completions)
        S += model.prefix_length
        cost = (_forward(model, P / prompt_parts, 0, S, 0, attention, replicas) + _encoder(model, P)) * prompt_parts
        for (length, rows), count in found:
            n, (chunks, computed) = rows * replicas, _chunks(model, rows, 1, length, logprob_chunk, 1, tensor)
            one = _completions(model, n, S, length, attention, replicas) + _copies(model, n * S)
            one += _logits(model, n * computed, replicas * chunks) + _logits(model, n, replicas) * probe
            cost += one * count
        return cost
    p, (chunks, computed) = P / parts, _chunks(model, P // parts, G, T, logprob_chunk, replicas, tensor)
    one = _forward(model, p, G, S + model.prefix_length, T, attention, replicas) + _encoder(model, p)
    one += _logits(model, p * G * computed, replicas * chunks)
    return (one + _logits(model, p * G, replicas) * probe) * parts


def reward_model(
    model: ModelConfig,
    P: int,
    G: int,
    S: int,
    T: int,
    *,
    attention: str = "plain",
    replicas: int = 1,
    parts: int = 1,
    lengths: int = 1,
    wave_tokens: int = 0,
    completions: np.ndarray | None = None,
) -> Cost:
    """Returns the cost of `reward_model.group_scores` or, in waves, of a scoring program of `rewards`.

    It is that of `score` without a head over P (S + G T) tokens; S = 0: texts without prompts.
    """
    _check(model, attention, P=P, G=G, S=max(S, 1), T=T, replicas=replicas, parts=parts)
    if lengths == 1:
        return _forward(model, P / parts, G, S, T, attention, replicas) * parts
    prompt_parts, found = _waves(model, P, G, S, T, replicas, parts, lengths, wave_tokens, completions)
    cost = _forward(model, P / prompt_parts, 0, S, 0, attention, replicas) * (prompt_parts if S else 0)
    for (length, rows), count in found:
        n = rows * replicas
        cost += (_completions(model, n, S, length, attention, replicas) + _copies(model, n * S)) * count
    return cost


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
    lengths: int = 1,
    wave_tokens: int = 0,
    completions: np.ndarray | None = None,
) -> Cost:
    """Returns the cost of `learner.make_update`: per epoch the forward of `score`, its backward, and the optimizer.

    For FLOPs and bytes see `_layers_backward` and `_head`. Bytes beyond the microbatches' passes: gradients written in
    float32 by every replica, and with accumulation or waves read and written once more; per update, once per copy,
    gradient, weights and optimizer state read, the last two written.

    Args:
      model, P, G, S, T, attention, replicas, logprob_chunk, probe, tensor, lengths, wave_tokens, completions: see
        `score`. model.remat decides which
        results are recomputed, model.lora_rank which weights are trained.
      copies: how many of the `replicas` hold all weights and optimizer state of their own (all axes of the mesh but
        "fsdp" and "tensor").
      epochs, minibatches, accumulation: see `learner.UpdateOptions`.
      optimizer_slots: float32 numbers that the optimizer keeps per weight: 2 for AdamW, 3 with a float32 master copy.
    """
    parts = minibatches * accumulation
    _check(model, attention, P=P, G=G, S=S, T=T, replicas=replicas, copies=copies, epochs=epochs, parts=parts)
    prefixed, trained = S + model.prefix_length, not model.lora_rank
    # Biases and norms are too few to matter.
    embeddings = (1 if model.tied_embedding else 2) * model.vocab_size * model.width
    weights = _matrices(model) + embeddings if trained else _adapters(model)
    size = _BYTES[model.param_dtype] if trained else _FLOAT32
    gradients = Cost(bytes=_FLOAT32 * replicas * weights)
    step = Cost(bytes=copies * weights * (_FLOAT32 + 2 * size + 2 * _FLOAT32 * optimizer_slots))

    def encoder(p: float) -> Cost:
        first = 2.0 * p * model.features * model.encoder_width  # no gradient of the features is taken
        return _encoder(model, p) * 3 + Cost(-first) if trained else _encoder(model, p)

    def both_ways(forward: Cost, tokens: float, score_bytes: float) -> Cost:
        return forward + _layers_backward(model, forward, tokens, score_bytes, attention, replicas)

    scores = lambda p, G, T: _score_bytes(model, p, G, prefixed, T, attention)
    if lengths == 1:
        p, (chunks, computed) = P / parts, _chunks(model, P // parts, G, T, logprob_chunk, replicas, tensor)
        forward = _forward(model, p, G, prefixed, T, attention, replicas)
        microbatch = both_ways(forward, p * (prefixed + G * T), scores(p, G, T)) + encoder(p)
        microbatch += _head(model, p * G, chunks, computed, replicas, probe) + gradients * (
            1 if accumulation == 1 else 3
        )
        return (microbatch * accumulation + step) * (epochs * minibatches)
    mini = None if completions is None else np.reshape(completions, (minibatches, -1, G))[0]
    P //= minibatches
    prompt_parts, found = _waves(model, P, G, S, T, replicas, accumulation, lengths, wave_tokens, mini)
    p = P / prompt_parts
    prompts = both_ways(_forward(model, p, 0, prefixed, 0, attention, replicas), p * prefixed, scores(p, 0, 0))
    cost = (prompts + encoder(p) + gradients * 3) * prompt_parts
    for (length, rows), count in found:
        n = rows * replicas
        chunks, computed = _chunks(model, rows, 1, length, logprob_chunk, 1, tensor)
        forward = _completions(model, n, prefixed, length, attention, replicas)
        one = both_ways(forward, n * length, scores(n, 1, length) - scores(n, 0, 0)) + _copies(model, n * prefixed) * 3
        cost += (one + _head(model, n, chunks, computed, replicas, probe) + gradients * 3) * count
    return (cost + step) * (epochs * minibatches)


def _waves(
    model: ModelConfig,
    P: int,
    G: int,
    S: int,
    T: int,
    replicas: int,
    microbatches: int,
    lengths: int,
    tokens: int,
    given,
) -> tuple[int, list[tuple[waves.Size, int]]]:
    """Returns the parts of the prompts, and the sizes of the waves of all parts together with their numbers."""
    parts = waves.prompt_parts(G, S + model.prefix_length, T, microbatches)
    own = P // parts // replicas
    sizes = waves.sizes(own, G, S + model.prefix_length, T, lengths, tokens, microbatches // parts)
    each = np.full((P, G), T) if given is None else np.asarray(given)
    per_part = np.sort(each.reshape(parts, replicas, own * G), axis=-1).max(axis=1)
    found = np.sum([waves.counts(longest, sizes) for longest in per_part], axis=0)
    return parts, [(size, int(n)) for size, n in zip(sizes, found)]


def _completions(model: ModelConfig, rows: int, S: int, T: int, attention: str, replicas: int) -> Cost:
    """Returns the cost of the layers over `rows` completions of T tokens, each after a prompt that is computed already."""
    prompts = _forward(model, rows, 0, S, 0, attention, replicas)
    once = Cost(bytes=replicas * _weight_bytes(model))
    return _forward(model, rows, 1, S, T, attention, replicas) + prompts * -1 + once


def _copies(model: ModelConfig, tokens: float) -> Cost:
    """Returns the traffic of a copy of the keys and values of prompts."""
    return Cost(bytes=4 * model.layers * model.kv_heads * model.head_dim * _BYTES[model.compute_dtype] * tokens)


def _layers_backward(
    model: ModelConfig, forward: Cost, tokens: float, score_bytes: float, attention: str, replicas: int
) -> Cost:
    """Returns the cost of the backward pass through the layers over some tokens, of which `forward` is the forward's cost."""
    # FLOPs: each product twice, for the gradients of its two operands; once for a frozen matrix. With remat "dots" the
    # attention again. With remat "layer" the layers again too, without the MLP's last product unless a norm after it
    # needs the result. Splash attention recomputes the scores in each of its two gradient kernels: 7 products in
    # addition to the forward's 2. With remat it computes the forward's again. Bytes: every matrix again, and twice the
    # forward's traffic of activations and scores (kept results are read, gradients are written and read). Recomputed
    # results count once more.
    attended, body = forward.attention_flops, forward.flops - forward.attention_flops
    weight_bytes = replicas * _weight_bytes(model)
    frozen = 0 if not model.lora_rank else 2.0 * tokens * _matrices(model)  # products with one gradient only
    after = (2.0 if attention == "plain" else 3.5) * attended
    again = attended if model.remat != "none" else 0.0
    backward = Cost(2 * body - frozen + after + again, after + again, again)
    if model.remat == "layer":
        i, o = _shapes(model)["down"]  # the MLP's product into the residual stream
        last = model.layers * (i * o + (model.lora_rank * o if "down" in model.lora_projections else 0))
        layers = body - (0 if model.post_norms else 2.0 * tokens * last)
        backward += Cost(layers, 0.0, layers)
    moved = forward.bytes - weight_bytes
    inputs = 2 * tokens * model.layers * model.width * _BYTES[model.param_dtype]
    rerun = {"none": 0.0, "dots": score_bytes, "layer": moved + weight_bytes + inputs}
    return backward + Cost(bytes=2 * moved + weight_bytes + rerun[model.remat])


def _head(model: ModelConfig, rows: float, chunks: int, computed: int, replicas: int, probe: bool) -> Cost:
    """Returns the cost of the logits of one microbatch of `rows` completions, forward and backward."""
    # The gradients cost two products, one if the head is frozen. If there are several chunks the logits are recomputed
    # in the backward. A trained head's gradient is read and written for every chunk.
    trained = not model.lora_rank
    once = _logits(model, rows * computed, replicas * chunks)
    head = once * (2 + trained)
    if chunks > 1:
        head += once + Cost(recomputed_flops=once.flops)
    if probe:
        head += _logits(model, rows, replicas) * (2 + trained)
    if trained:  # the gradient's product reads no weights and adds to a sum
        each = 2 * _FLOAT32 - _BYTES[model.compute_dtype]
        head += Cost(bytes=each * replicas * chunks * model.width * model.vocab_size)
    return head


def _check(model: ModelConfig, attention: str, *, P: int, parts: int = 1, **sizes: int) -> None:
    if attention not in ATTENTION:
        raise ValueError(f"attention is {attention!r}; it must be 'plain' or 'splash'.")
    for name, value in {"P": P, "parts": parts, **sizes}.items():
        if value < 1:
            raise ValueError(f"{name} is {value}; it must be at least 1.")
    if P % parts:
        raise ValueError(f"{P} prompts cannot be shared evenly among {parts} microbatches.")


def _shapes(model: ModelConfig) -> dict[str, tuple[int, int]]:
    """Returns (in, out) of a layer's matrices."""
    D, F, K = model.width, model.mlp_width, model.head_dim
    heads, kv = model.heads * K, model.kv_heads * K
    return dict(zip(PROJECTIONS, ((D, heads), (D, kv), (D, kv), (heads, D), (D, F), (D, F), (F, D))))


def _matrices(model: ModelConfig) -> int:
    """Returns the number of weights in the matrices of all layers, without adapters."""
    return model.layers * sum(i * o for i, o in _shapes(model).values())


def _adapters(model: ModelConfig) -> int:
    """Returns the number of weights in the adapters of all layers."""
    shapes = _shapes(model)
    return model.layers * model.lora_rank * sum(sum(shapes[name]) for name in model.lora_projections)


def _weight_bytes(model: ModelConfig) -> float:
    """Returns the bytes of the layers' matrices, adapters included, in the dtype of the products."""
    return _BYTES[model.compute_dtype] * (_matrices(model) + _adapters(model))


def _all_pairs(model: ModelConfig, P: float, G: int, S: int, T: int, attention: str) -> float:
    """Returns the pairs of a query and a key of all prompts and completions, over all layers."""
    total = 0.0
    for sliding in sorted(set(model.sliding_layers)):
        causal = lambda n: sum(min(i + 1, model.sliding_window if sliding else S + T) for i in range(n))
        splash = causal(S), causal(S + T) - causal(S)
        per_prompt, per_completion = splash if attention == "splash" else (S * S, T * (S + T))
        total += model.sliding_layers.count(sliding) * P * (per_prompt + G * per_completion)
    return total


def _score_bytes(model: ModelConfig, P: float, G: int, S: int, T: int, attention: str) -> float:
    """Returns the traffic of plain attention's scores and exponentials in a forward. With splash they stay on the chip."""
    each = 0 if attention == "splash" else 2 * _FLOAT32 + 2 * _BYTES[model.compute_dtype]
    return each * model.heads * _all_pairs(model, P, G, S, T, attention)


def _forward(model: ModelConfig, P: float, G: int, S: int, T: int, attention: str, replicas: int) -> Cost:
    """Returns the cost of the layers over P prompts of S tokens with G completions of T tokens each."""
    tokens = P * (S + G * T)
    attended = 4.0 * model.heads * model.head_dim * _all_pairs(model, P, G, S, T, attention)
    products = 2.0 * tokens * (_matrices(model) + _adapters(model))
    D, F, K = model.width, model.mlp_width, model.head_dim
    each = 4 * (D + model.heads * K + model.kv_heads * K + F) * _BYTES[model.compute_dtype]
    moved = tokens * model.layers * each + _score_bytes(model, P, G, S, T, attention)
    return Cost(products + attended, attended, bytes=moved + replicas * _weight_bytes(model))


def _logits(model: ModelConfig, rows: float, reads: float) -> Cost:
    """Returns the cost of the logits of `rows` positions. The head is read `reads` times."""
    head = model.width * model.vocab_size
    moved = 2 * _FLOAT32 * rows * model.vocab_size + reads * _BYTES[model.compute_dtype] * head
    return Cost(2.0 * rows * head, bytes=moved)


def _encoder(model: ModelConfig, P: float) -> Cost:
    """Returns the cost of the MLP that embeds the numeric features of prompts."""
    hidden = (model.encoder_layers - 1) * model.encoder_width
    return Cost(2.0 * P * model.encoder_width * (model.features + hidden + model.prefix_length * model.width))


def _chunks(model: ModelConfig, P: int, G: int, T: int, chunk: int, replicas: int, tensor: int) -> tuple[int, int]:
    """Returns the chunks of a completion's logits, and the positions computed, the last chunk's padding included."""
    chunk = scoring.chunk_length(math.ceil(P / replicas), G, T, math.ceil(model.vocab_size / tensor), chunk)
    return math.ceil(T / chunk), math.ceil(T / chunk) * chunk

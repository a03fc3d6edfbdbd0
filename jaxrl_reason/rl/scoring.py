"""Log-probabilities of completions under any weights, by the same forward that sampled them.

Completions run against the shared keys and values of their prompt, with gradients through each prompt once. Log-probabilities are computed in
chunks of positions, so that [tokens, vocabulary] takes at most 64 MiB, or is one position of every completion.
"""

from collections.abc import Callable, Mapping
import functools
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxrl_reason import losses, models
from jaxrl_reason.models import sharding
from jaxrl_reason.models.decoding.sampling import scale_logits
from jaxrl_reason.rl import waves
from jaxrl_reason.rl.types import LogProbs, Rollout

_CHUNK_ENTRIES = 2**24  # logits per chunk if the chunk is 0: 64 MiB of float32


class PromptStates(NamedTuple):
    """What completions read of their prompts."""

    hidden: Float[Array, "P 1 D"]  # predicts the first token of every completion
    keys: Float[Array, "P layers N K S"]
    values: Float[Array, "P layers N S K"]


class PromptPlaces(NamedTuple):
    """Where the tokens of prompts are, see `models.layers.PromptCache`."""

    mask: Bool[Array, "P S"]
    positions: Int[Array, "P S"]
    lengths: Int[Array, " P"]


Prompts = tuple[PromptStates, PromptPlaces]


def read_prompts(
    config: models.ModelConfig,
    params: models.Params,
    rollout: Rollout,
    dropout: Float[Array, "P layers W"] | None = None,
) -> Prompts:
    """Computes the states of the prompts of a rollout; for `dropout` see `models.Decoder.prefill`."""
    model = models.bind(config, params)
    hidden, cache = model.prefill(rollout.prompt_tokens, rollout.prompt_mask, rollout.features, dropout)
    last = rollout.prompt_mask.shape[1] - 1 - jnp.argmax(rollout.prompt_mask[:, ::-1], axis=1)
    hidden = jnp.take_along_axis(hidden, last[:, None, None], axis=1)
    keys, values = (jnp.moveaxis(jnp.asarray(kv), 1, 0) for kv in (cache.keys, cache.values))
    return PromptStates(hidden, keys, values), PromptPlaces(cache.mask, cache.positions, cache.lengths)


def prompt_cache(prompts: Prompts) -> models.PromptCache:
    """Returns the cache that `Decoder.extend` reads."""
    states, places = prompts
    keys, values = (jnp.moveaxis(kv, 1, 0) for kv in (states.keys, states.values))
    return models.PromptCache(keys, values, *places)


def compute_logprobs(
    config: models.ModelConfig,
    params: models.Params,
    rollout: Rollout,
    temperature: Float[Array, ""] | float,
    legal: Bool[Array, "T V"] | Bool[Array, "P T V"] | None = None,
    chunk: int = 0,
    *,
    targets: Mapping[str, Int[Array, "P G T"]] | None = None,
    probe_token: int | None = None,
    prompts: Prompts | None = None,
) -> LogProbs:
    """Computes the log-probability of every completion token under the distribution that samples, and the entropy of that distribution.

    Args:
      config, params: the decoder.
      rollout: prompts and completions.
      temperature, legal: of the distribution.
      chunk: positions of T whose logits are in memory at the same time; 0 chooses.
      targets: further tokens to score at the same positions, from the same logits, by name.
      probe_token: a token to score after each end token, by the same forward.
      prompts: from `read_prompts`; None: they are computed here.
    """
    P, G, T = rollout.tokens.shape
    chex.assert_rank(temperature, 0)
    if legal is not None:
        legal = jnp.broadcast_to(legal, (legal.shape[0] if legal.ndim == 3 else 1, T, config.vocab_size))
    model = models.bind(config, params)
    prompts = read_prompts(config, params, rollout) if prompts is None else prompts
    prompt = prompt_cache(prompts)
    # The last token predicts nothing but a probe. T positions instead of T - 1 keep all arrays in whole tiles of a TPU.
    after = model.extend(rollout.tokens, prompt)
    first = jnp.broadcast_to(prompts[0].hidden[:, None], (P, G, 1, config.width))
    hidden = jnp.concatenate([first, after[:, :, :-1]], axis=2)
    head = model.head_matrix()
    probe = None
    if probe_token is not None:
        end = jnp.maximum(rollout.mask.sum(axis=-1) - 1, 0)[..., None, None]
        after_end = jnp.take_along_axis(after, end, axis=2)[:, :, 0]
        logits = scale_logits(models.project(after_end, head, config), temperature, None)
        probe = losses.token_logprobs(logits, jnp.full((P, G), probe_token))[0]

    # Each device computes the logits of its own prompts: the head is gathered once, and its gradient summed once, instead of once per chunk.
    in_chunks = sharding.by_prompt(functools.partial(_in_chunks, config, chunk))
    logprobs, entropy, others = in_chunks((head, temperature), hidden, rollout.tokens, dict(targets or {}), legal)
    return LogProbs(logprobs, entropy, others, probe)


def chunk_length(P: int, G: int, T: int, vocabulary: int, chunk: int = 0) -> int:
    """Returns the positions of T whose logits one device holds at the same time, of its P prompts and its part of the vocabulary.

    A `chunk` that is not 0 is the result, if T is not smaller. Otherwise, more than 8 positions are a multiple of 8: a tile
    of a TPU has 8 rows, and other numbers cost copies of the logits and minutes of compiling.
    """
    chosen = max(1, _CHUNK_ENTRIES // (P * G * vocabulary))
    return min(chunk or (chosen - chosen % 8 if chosen > 8 else chosen), T)


def _in_chunks(config: models.ModelConfig, chunk: int, distribution, hidden, tokens, targets, legal):
    """Returns the log-probabilities, the entropy and the targets' log-probabilities, [P, G, T] each, of hidden [P, G, T, D].

    `distribution` is the output head and the temperature; for the others see `compute_logprobs`.
    """
    (head, temperature), (P, G, T) = distribution, tokens.shape
    head = head.astype(jnp.float32)  # its gradient is summed over the chunks

    def of_chunk(head, hidden, tokens, targets, legal):
        logits = models.project(hidden, head, config)
        logits = scale_logits(logits, temperature, None if legal is None else legal[:, None])
        scored = losses.token_logprobs(logits, tokens)
        return *scored, {name: losses.token_logprobs(logits, other)[0] for name, other in targets.items()}

    chunk = chunk_length(P, G, T, -(-config.vocab_size // sharding.num_vocab_shards()), chunk)
    if chunk == T:
        return of_chunk(head, hidden, tokens, targets, legal)
    count = -(-T // chunk)

    def cut(x, axis):  # [.., T, ..] -> [count, .., chunk, ..]
        x = jnp.pad(x, [(0, count * chunk - T if i == axis else 0) for i in range(x.ndim)], mode="edge")
        return jnp.moveaxis(x.reshape(*x.shape[:axis], count, chunk, *x.shape[axis + 1 :]), axis, 0)

    along_tokens = functools.partial(cut, axis=2)
    chunks = *jax.tree.map(along_tokens, (hidden, tokens, targets)), None if legal is None else cut(legal, 1)
    of_chunk = jax.checkpoint(
        of_chunk, prevent_cse=False
    )  # the backward pass computes logits again instead of keeping them
    _, ys = jax.lax.scan(lambda _, x: ((), of_chunk(head, *x)), (), chunks)
    join = lambda y: jnp.moveaxis(y, 0, 2).reshape(P, G, count * chunk)[:, :, :T]
    return jax.tree.map(join, ys)


def split_prompts(tree: Any, count: int) -> Any:
    """Cuts [P, ...] into [count, P / count, ...] by stride, so that on a sharded axis every device keeps its own prompts."""
    cut = lambda x: x.reshape(x.shape[0] // count, count, *x.shape[1:]).swapaxes(0, 1)
    return jax.tree.map(cut, tree)


def join_prompts(tree: Any) -> Any:
    """Joins [count, P / count, ...] to [P, ...], the inverse of `split_prompts`."""
    return jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(-1, *x.shape[2:]), tree)


def score(
    config: models.ModelConfig,
    params: models.Params,
    rollout: Rollout,
    temperature: Float[Array, ""],
    legal: Bool[Array, "T V"] | None = None,
    *,
    microbatches: int = 1,
    chunk: int = 0,
    probe_token: int | None = None,
    lengths: int = 1,
    wave_tokens: int = 0,
) -> LogProbs:
    """Computes the log-probabilities of a rollout under `params`, one microbatch after another. The entropy is 0.

    Args:
      config, params, rollout, temperature, legal, chunk, probe_token: see `compute_logprobs`.
      microbatches: their number; P is divisible by it.
      lengths, wave_tokens: see `waves.sizes`; with one length, microbatches are whole groups.
    """

    def one(part: Rollout, prompts: Prompts | None = None) -> LogProbs:
        allowed = None if legal is None else legal[: part.tokens.shape[2]]
        scored = compute_logprobs(
            config, params, part, temperature, allowed, chunk, probe_token=probe_token, prompts=prompts
        )
        return scored._replace(entropy=jnp.zeros_like(scored.entropy))

    if lengths == 1:
        return join_prompts(jax.lax.map(one, split_prompts(rollout, microbatches)))
    zeros = jnp.zeros(rollout.tokens.shape)
    empty = LogProbs(zeros, zeros, {}, None if probe_token is None else zeros[..., 0])
    return map_waves(config, params, rollout, one, empty, microbatches, lengths, wave_tokens)


def map_waves(
    config: models.ModelConfig,
    params: models.Params,
    rollout: Rollout,
    function: Callable[[Rollout, Prompts], Any],
    empty: Any,
    microbatches: int,
    lengths: int,
    wave_tokens: int,
) -> Any:
    """Computes a function of completions and their prompts, wave by wave.

    Args:
      config, params, rollout: the decoder that reads the prompts, and the whole batch.
      function: (completions [R, 1, length], their prompts) -> a tree of arrays [R, 1, length] or [R, 1].
      empty: a tree of arrays [P, G, T] or [P, G], the results without completions.
      microbatches, lengths, wave_tokens: see `score`.
    """
    (_, G, T), S = rollout.tokens.shape, rollout.prompt_tokens.shape[1] + config.prefix_length
    parts = waves.prompt_parts(G, S, T, microbatches)

    def of_part(args):
        part, found = args
        prompts = read_prompts(config, params, part)
        own = len(part.tokens) // sharding.num_prompt_shards()
        sizes = waves.sizes(own, G, S, T, lengths, wave_tokens, microbatches // parts)

        def of_wave(wave, found):
            completions = waves.take(wave, without_prompts(part))
            return waves.put(wave, found, function(completions, waves.take_prompts(wave, G, prompts)))

        return waves.for_each(sizes, waves.queue(part.mask.sum(axis=-1)), of_wave, found)

    return join_prompts(jax.lax.map(of_part, split_prompts((rollout, empty), parts)))


def without_prompts(rollout: Rollout) -> Rollout:
    """Returns the completions alone: only arrays [P, G, ...] are left."""
    nothing: dict[str, Any] = dict.fromkeys(("prompt_tokens", "prompt_mask", "features", "prompt_logprobs"))
    return rollout._replace(**nothing)

"""Samples groups of completions on the device. Each prompt is prefilled once; G samples decode against its keys and values."""

from collections.abc import Callable
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from jaxrl_reason.models import sharding
from jaxrl_reason.models.config import ModelConfig
from jaxrl_reason.models.decoder import bind, Decoder, Params, project
from jaxrl_reason.models.decoding import compaction
from jaxrl_reason.models.decoding.compaction import first_rows, keep, most_per_device, put_back, Rows
from jaxrl_reason.models.decoding.sampling import pick, sample_token, sampling_noise, scale_logits


class Rollout(NamedTuple):
    """G completions for each of P prompts, with at most T tokens per completion."""

    prompt_tokens: Int[Array, "P S"]  # padded on the left or the right
    prompt_mask: Bool[Array, "P S"]  # True on real prompt tokens
    tokens: Int[Array, "P G T"]  # `pad_id` after the end
    mask: Bool[Array, "P G T"]  # True on sampled tokens, the end token included
    # Log-probability of each token under the distribution that sampled it (temperature, legal tokens and truncation included; greedy
    # completions: at temperature 1, not truncated); 0 if the mask is False.
    logprobs: Float[Array, "P G T"]
    # True if the budget ran out before an end token. False throughout if no token ends a completion (numbers of a fixed length).
    truncated: Bool[Array, "P G"]
    features: Float[Array, "P F"] | None = None  # numbers that belong to the prompts in addition to their tokens
    # If asked for: log-probability of each prompt token given its prefix, at temperature 1; 0 on the first real token and if masked.
    prompt_logprobs: Float[Array, "P S"] | None = None
    # If asked for: log-probability of the probe token right after the end token, at the probe temperature; 0 if truncated.
    probe_logprobs: Float[Array, "P G"] | None = None


class Completions(NamedTuple):
    """The completions so far."""

    live: jax.Array  # bool[P, G], True if a completion has not ended
    tokens: jax.Array  # [P, G, T], or one position longer with a probe
    logprobs: jax.Array
    mask: jax.Array
    probe: jax.Array | None  # f32[P, G], log-probabilities of the probe token that have been read


class Carry(NamedTuple):
    """The state of a decoding loop."""

    t: jax.Array  # the position that is sampled next
    last: jax.Array  # int32[P, G], the tokens at position t - 1
    # bool[P, G], completions whose end token was sampled in the last step: the next one reads their probe
    due: jax.Array | None
    cache: Any  # keys and values of the completions
    completions: Completions


def generate(
    config: ModelConfig,
    params: Params,
    prompt_tokens: Int[Array, "P S"],
    prompt_mask: Bool[Array, "P S"],
    prompt_ids: Int[Array, " P"],
    key: Key[Array, ""],
    *,
    group_size: int,
    max_length: int,
    eos_ids: tuple[int, ...],
    pad_id: int,
    temperature: Float[Array, ""] | Float[Array, " G"] | float,
    top_k: Int[Array, ""] | Int[Array, " G"] | int | None = None,
    top_p: Float[Array, ""] | Float[Array, " G"] | float | None = None,
    legal: Bool[Array, "T V"] | Bool[Array, "P T V"] | None = None,
    features: Float[Array, "P F"] | None = None,
    with_prompt_logprobs: bool = False,
    probe_token: int | None = None,
    probe_temperature: float = 1.0,
    int8: bool = False,
    cache_pieces: int = 1,
    halvings: int = 0,
    end_at: Int[Array, "P G"] | None = None,
    watch: Callable[[Any, Any], None] | None = None,
) -> Rollout:
    """Samples G completions per prompt. Pure; jit it with the keyword sizes static.

    A `lax.while_loop` decodes until every completion has ended. When few are left, they move into a smaller loop.

    Args:
      config, params: the decoder.
      prompt_tokens, prompt_mask: padded prompts; the mask is True on real tokens, at least one per prompt.
      prompt_ids: the prompts' names in the keys of the random numbers.
      key: from (seed, step).
      group_size, max_length: G, and T, the budget in tokens.
      eos_ids: tokens that end a completion; if empty, all completions have T tokens.
      pad_id: fills the positions after the end.
      temperature: traced; 0 is greedy.
      top_k, top_p: traced; truncate the distribution after the temperature, see `sampling.truncate`; not for training.
      legal: the tokens allowed at each position; None allows all.
      features: numbers of the prompts, for a model with `features`.
      with_prompt_logprobs: also return the prompts' log-probabilities, from the prefill.
      probe_token: also return this token's log-probability after each end token, in one more iteration; ValueError without an end token.
      probe_temperature: the temperature of that log-probability, whatever temperature samples.
      int8: decode with rounded weights and caches, half or a quarter of the memory traffic. Log-probabilities are those of the rounded model.
      cache_pieces, halvings: pieces of the completions' cache, and how often the loop is halved. The samples are the same.
      end_at: for measurements: the positions at which the first end token is forced, and nowhere else; None: completions end by themselves.
      watch: called on the host with each position's tokens and whether they count, [P, G]; for one device, without halvings.
    """
    if probe_token is not None and not eos_ids:
        raise ValueError("A probe token is read after the end token, and no token ends a completion: eos_ids is empty.")
    (P, S), G, T = prompt_tokens.shape, group_size, max_length
    model = bind(config, params)
    hidden, prompt = model.prefill(prompt_tokens, prompt_mask, features)
    prompt_logprobs = _prompt_logprobs(model, hidden, prompt_tokens, prompt_mask) if with_prompt_logprobs else None
    hidden = last_hidden(hidden, prompt_mask)
    blocks, prompt = model.unstack(prompt, int8)
    head = model.head_matrix(int8)

    def next_logits(rows: Rows, carry: Carry):
        hidden, cache = model.step(carry.last, carry.t - 1, blocks, rows.prompt, carry.cache)
        return project(hidden, head, config), cache

    # The probe token is scored among all tokens: the legal tokens end with the completion.
    after_end = lambda logits: jax.nn.log_softmax(scale_logits(logits, probe_temperature, None))[..., probe_token]
    steps = T + (probe_token is not None)  # one more, to read what follows an end token at the last position
    rows = first_rows(prompt, sampling_noise(key, prompt_ids, G, steps), temperature, legal, end_at, top_k, top_p)
    empty = _no_tokens(P, G, steps, pad_id, probe_token is not None, model.empty_cache(P, G, T, int8, cache_pieces))
    sizes = compaction.sizes(P // sharding.num_prompt_shards(), G, S, T, halvings)
    end = _decode(rows, empty, project(hidden, head, config), next_logits, after_end, eos_ids, pad_id, T, sizes, watch)
    tokens, mask, logprobs = (x[:, :, :T] for x in (end.tokens, end.mask, end.logprobs))
    truncated = end.live if eos_ids else jnp.zeros_like(end.live)
    prompts = prompt_tokens, prompt_mask.astype(bool)
    return Rollout(*prompts, tokens, mask, logprobs, truncated, features, prompt_logprobs, end.probe)


def last_hidden(hidden: Float[Array, "P S D"], mask: Bool[Array, "P S"]) -> Float[Array, "P 1 D"]:
    """Returns the hidden states of the last real tokens."""
    last = mask.shape[1] - 1 - jnp.argmax(mask[:, ::-1], axis=1)
    return jnp.take_along_axis(hidden, last[:, None, None], axis=1)


def _no_tokens(P: int, G: int, steps: int, pad_id: int, with_probe: bool, cache: Any) -> Carry:
    """Returns the state before the first token."""
    shape = (P, G, steps)
    tokens, logprobs, mask = jnp.full(shape, pad_id, jnp.int32), jnp.zeros(shape), jnp.zeros(shape, bool)
    probe = jnp.zeros((P, G)) if with_probe else None
    completions = Completions(jnp.ones((P, G), bool), tokens, logprobs, mask, probe)
    return Carry(jnp.int32(0), tokens[:, :, 0], None, cache, completions)


def _decode(
    rows: Rows,
    empty: Carry,
    first_logits: Float[Array, "P 1 V"],
    next_logits: Callable[[Rows, Carry], tuple[jax.Array, Any]],
    after_end: Callable[[jax.Array], jax.Array],
    eos_ids: tuple[int, ...],
    pad_id: int,
    T: int,
    sizes: list[int],
    watch: Callable[[Any, Any], None] | None = None,
) -> Completions:
    """Runs the decoding loops until every completion has ended or has T tokens.

    `first_logits` predict the first token. `next_logits` reads the last tokens and returns the prediction of the next ones, and the cache.
    `after_end` maps logits to the log-probability of the probe token. `sizes` are completions per device: a loop of this size takes over
    when no device has more that grow.
    """
    eos = jnp.asarray(eos_ids, jnp.int32)

    def advance(rows: Rows, carry: Carry, logits) -> Carry:
        """Samples position t of every live completion and writes it."""
        t, old = carry.t, carry.completions
        new, logp = _sample(rows, logits, t)
        ends = jnp.any(new[..., None] == eos, axis=-1) if rows.end_at is None else rows.end_at == t
        new = new if rows.end_at is None else jnp.where(ends, eos_ids[0], new)
        if watch is not None:
            jax.debug.callback(watch, new, old.live, ordered=True)
        put = lambda x, y: jax.lax.dynamic_update_index_in_dim(x, y, t, axis=2)
        done = old._replace(
            live=old.live & ~ends,
            tokens=put(old.tokens, jnp.where(old.live, new, pad_id)),
            logprobs=put(old.logprobs, jnp.where(old.live, logp, 0.0)),
            mask=put(old.mask, old.live),
        )
        return carry._replace(
            t=t + 1, last=new, due=None if old.probe is None else old.live & ~done.live, completions=done
        )

    def body(rows: Rows, carry: Carry) -> Carry:
        logits, cache = next_logits(rows, carry)
        new, old = advance(rows, carry._replace(cache=cache), logits), carry.completions
        if carry.due is None:
            return new
        live = jnp.where(carry.t < T, new.completions.live, old.live)  # the step after the budget only reads the probe
        assert old.probe is not None  # as completions are due
        probe = jnp.where(carry.due, after_end(logits), old.probe)
        return new._replace(due=old.live & ~live, completions=new.completions._replace(live=live, probe=probe))

    def busy(carry: Carry) -> Bool[Array, "P G"]:
        sampling = (carry.t < T) & carry.completions.live
        return sampling if carry.due is None else sampling | carry.due

    def run(rows: Rows, carry: Carry, smaller: int) -> Carry:
        """Runs until no device has more than `smaller` completions that grow."""
        steps = T + (carry.due is not None)
        go_on = lambda carry: (carry.t < steps) & (most_per_device(busy(carry)) > smaller)
        return jax.lax.while_loop(go_on, functools.partial(body, rows), carry)

    carry = run(rows, advance(rows, empty, first_logits), sizes[0] if sizes else 0)
    everything = carry.completions
    for size, smaller in zip(sizes, [*sizes[1:], 0]):
        rows, state = keep(busy(carry), size, rows, carry[1:])
        carry = run(rows, Carry(carry.t, *state), smaller)
        everything = put_back(everything, carry.completions, rows.home)
    return everything


def _sample(
    rows: Rows, logits: Float[Array, "P 1 V"] | Float[Array, "P G V"], t: Int[Array, ""]
) -> tuple[jax.Array, ...]:
    """Returns the tokens of position t, int32[P, G], and their log-probabilities."""
    G = rows.noise.shape[1]
    legal = None if rows.legal is None else rows.legal[..., t, :].reshape(-1, 1, rows.legal.shape[-1])
    logits = sharding.constrain(logits, "prompts", None, "vocab")  # each device computes its part of the vocabulary
    distribution = scale_logits(logits, rows.temperature, legal)  # f32[P, G, V]
    if G % sharding.num_vocab_shards() == 0 and logits.shape[1] == G:
        # Each device of the tensor axis gets whole rows of some samples, instead of all rows of all samples.
        distribution = sharding.constrain(distribution, "prompts", "samples")
    noise = jax.lax.dynamic_index_in_dim(rows.noise, t, 2, keepdims=False)
    drawn = sample_token(distribution, noise, rows.temperature == 0, rows.top_k, rows.top_p)
    return tuple(sharding.constrain(x, "prompts") for x in drawn)


def _prompt_logprobs(model: Decoder, hidden, tokens, mask):
    """Computes `Rollout.prompt_logprobs`. Takes one position at a time, so that [S, vocabulary] is never in memory."""
    mask = mask.astype(bool)
    S = tokens.shape[1]
    places = jnp.where(mask, jnp.arange(S), -1)
    before = jnp.concatenate([jnp.full_like(places[:, :1], -1), jax.lax.cummax(places, axis=1)[:, :-1]], axis=1)
    predicted = mask & (before >= 0)
    hidden = jnp.take_along_axis(hidden, jnp.maximum(before, 0)[..., None], axis=1)

    def one(args):
        logits, token = model.logits(args[0]), args[1]
        return pick(jax.nn.log_softmax(logits), token)

    return jnp.where(predicted, jax.lax.map(one, (hidden.swapaxes(0, 1), tokens.T)).T, 0.0)

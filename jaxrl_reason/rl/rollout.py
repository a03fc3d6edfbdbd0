"""Samples groups of completions on the device. Each prompt is prefilled once; G samples decode against its keys and values."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from jaxrl_reason import models
from jaxrl_reason.models import sharding
from jaxrl_reason.rl.sampling import pick, sample_token, sampling_noise, scale_logits
from jaxrl_reason.rl.types import Rollout


class Probe(NamedTuple):
    """The log-probabilities of the probe token that have been read so far."""

    logprobs: jax.Array  # f32[P, G]
    due: (
        jax.Array
    )  # bool[P, G], completions whose end token was sampled in the last step: their probe is read in the next one


class Carry(NamedTuple):
    """The state of the decoding loop."""

    t: jax.Array  # the position that is sampled next
    live: jax.Array  # bool[P, G], completions that have not ended
    last: jax.Array  # int32[P, G], the tokens at position t - 1
    tokens: jax.Array  # the completions so far, [P, G, T], or one position longer with a probe
    logprobs: jax.Array
    mask: jax.Array
    cache: Any  # keys and values of the completions
    probe: Probe | None


def generate(
    config: models.ModelConfig,
    params: models.Params,
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
    legal: Bool[Array, "T V"] | Bool[Array, "P T V"] | None = None,
    features: Float[Array, "P F"] | None = None,
    with_prompt_logprobs: bool = False,
    probe_token: int | None = None,
    probe_temperature: float = 1.0,
    int8: bool = False,
) -> Rollout:
    """Samples G completions per prompt. Pure; jit it with the keyword sizes static.

    Decoding is one `lax.while_loop`, which stops when every completion has ended.

    Args:
      config, params: the decoder.
      prompt_tokens, prompt_mask: padded prompts; the mask is True on real tokens, at least one per prompt.
      prompt_ids: the prompts' names in the keys of the random numbers.
      key: from (seed, step).
      group_size, max_length: G, and T, the budget in tokens.
      eos_ids: tokens that end a completion; if empty, all completions have T tokens.
      pad_id: fills the positions after the end.
      temperature: traced; 0 is greedy.
      legal: the tokens allowed at each position; None allows all.
      features: numbers of the prompts, for a model with `features`.
      with_prompt_logprobs: also return the prompts' log-probabilities, from the prefill.
      probe_token: also return this token's log-probability after each end token. The decoder reads the end token like any other token. This
        costs at most one more iteration of the loop and no further forward pass.
      probe_temperature: the temperature of that log-probability, whatever temperature samples.
      int8: decode with rounded weights and caches, half or a quarter of the memory traffic. Log-probabilities are those of the rounded model.

    Raises:
      ValueError: a probe token without an end token.
    """
    if probe_token is not None and not eos_ids:
        raise ValueError(
            "A probe token is read after the end token, and no token ends a completion because eos_ids is empty."
        )
    P, G, T = prompt_tokens.shape[0], group_size, max_length
    model = models.bind(config, params)
    hidden, prompt = model.prefill(prompt_tokens, prompt_mask, features)
    prompt_logprobs = _prompt_logprobs(model, hidden, prompt_tokens, prompt_mask) if with_prompt_logprobs else None
    last = prompt_mask.shape[1] - 1 - jnp.argmax(prompt_mask[:, ::-1], axis=1)
    hidden = jnp.take_along_axis(hidden, last[:, None, None], axis=1)  # [P, 1, D]: all samples of a group start equal
    blocks, prompt = model.unstack(prompt, int8)
    head = model.head_matrix(int8)

    def next_logits(carry: Carry):
        hidden, cache = model.step(carry.last, carry.t - 1, blocks, prompt, carry.cache)
        return models.project(hidden, head, config), cache

    # The legal tokens end with the completion: the probe token is scored among all tokens.
    after_end = lambda logits: jax.nn.log_softmax(scale_logits(logits, probe_temperature, None))[..., probe_token]
    steps = T + (probe_token is not None)  # one more, to read what follows an end token at the last position
    sample = _sampler(sampling_noise(key, prompt_ids, G, steps), temperature, legal)
    empty = _empty_carry(model.empty_cache(P, G, T, int8), P, G, steps, pad_id, probe_token is not None)
    end = _decode(empty, models.project(hidden, head, config), next_logits, sample, after_end, eos_ids, pad_id, T)
    return Rollout(
        prompt_tokens,
        prompt_mask.astype(bool),
        end.tokens[:, :, :T],
        end.mask[:, :, :T],
        end.logprobs[:, :, :T],
        truncated=end.live if eos_ids else jnp.zeros_like(end.live),
        features=features,
        prompt_logprobs=prompt_logprobs,
        probe_logprobs=None if end.probe is None else end.probe.logprobs,
    )


def _empty_carry(cache: Any, P: int, G: int, steps: int, pad_id: int, with_probe: bool) -> Carry:
    """Returns the state before the first token."""
    return Carry(
        t=jnp.int32(0),
        live=jnp.ones((P, G), bool),
        last=jnp.zeros((P, G), jnp.int32),
        tokens=jnp.full((P, G, steps), pad_id, jnp.int32),
        logprobs=jnp.zeros((P, G, steps)),
        mask=jnp.zeros((P, G, steps), bool),
        cache=cache,
        probe=Probe(jnp.zeros((P, G)), jnp.zeros((P, G), bool)) if with_probe else None,
    )


def _decode(
    empty: Carry,
    first_logits: Float[Array, "P 1 V"],
    next_logits: Callable[[Carry], tuple[jax.Array, Any]],
    sample: Callable,
    after_end: Callable[[jax.Array], jax.Array],
    eos_ids: tuple[int, ...],
    pad_id: int,
    T: int,
) -> Carry:
    """Runs the decoding loop until every completion has ended or has T tokens.

    `first_logits` predict the first token. `next_logits` reads the last tokens and returns the prediction of the next ones, and the cache.
    `after_end` maps logits to the log-probability of the probe token.
    """
    eos = jnp.asarray(eos_ids, jnp.int32)

    def advance(carry: Carry, logits) -> Carry:
        """Samples position t of every live completion and writes it."""
        t, live = carry.t, carry.live
        new, logp = sample(logits, t)
        put = lambda x, y: jax.lax.dynamic_update_index_in_dim(x, y, t, axis=2)
        ends = jnp.any(new[..., None] == eos, axis=-1)
        return carry._replace(
            t=t + 1,
            live=live & ~ends,
            last=new,
            tokens=put(carry.tokens, jnp.where(live, new, pad_id)),
            logprobs=put(carry.logprobs, jnp.where(live, logp, 0.0)),
            mask=put(carry.mask, live),
        )

    def body(carry: Carry) -> Carry:
        logits, cache = next_logits(carry)
        new = advance(carry._replace(cache=cache), logits)
        if carry.probe is None:
            return new
        live = jnp.where(carry.t < T, new.live, carry.live)  # the step after the budget only reads the probe
        logprobs = jnp.where(carry.probe.due, after_end(logits), carry.probe.logprobs)
        return new._replace(live=live, probe=Probe(logprobs, carry.live & ~live))

    def unfinished(carry: Carry):
        sampling = (carry.t < T) & carry.live.any()
        return sampling if carry.probe is None else sampling | carry.probe.due.any()

    start = advance(empty, first_logits)
    if start.probe is not None:
        start = start._replace(probe=start.probe._replace(due=~start.live))
    return jax.lax.while_loop(unfinished, body, start)


def _sampler(noise: Float[Array, "P G T"], temperature, legal) -> Callable:
    """Returns sample(logits [P, G or 1, V], t) -> the tokens of position t, int32[P, G], and their log-probabilities."""
    G = noise.shape[1]
    legal = None if legal is None else jnp.asarray(legal)
    temperature = jnp.broadcast_to(jnp.asarray(temperature, jnp.float32), (G,))

    def sample(logits, t):
        legal_now = None if legal is None else legal[..., t, :].reshape(-1, 1, legal.shape[-1])
        logits = sharding.constrain(logits, "prompts", None, "vocab")  # each device computes its part of the vocabulary
        distribution = scale_logits(logits, temperature, legal_now)  # f32[P, G, V]
        if G % sharding.num_vocab_shards() == 0 and distribution.shape[1] == G:
            # Each device of the tensor axis gets whole rows of some samples, instead of all rows of all samples.
            distribution = sharding.constrain(distribution, "prompts", "samples")
        drawn = sample_token(distribution, jax.lax.dynamic_index_in_dim(noise, t, 2, keepdims=False), temperature == 0)
        return tuple(sharding.constrain(x, "prompts") for x in drawn)

    return sample


def _prompt_logprobs(model: models.Decoder, hidden, tokens, mask):
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

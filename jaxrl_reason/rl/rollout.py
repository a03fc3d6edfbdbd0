"""Group rollout on device: prompts are prefilled once each, G samples decode against them.

The keys of randomness are (seed, step, prompt id, sample, position), folded in that order: a sample
does not depend on its neighbours in the batch, on the number of devices, or on what ran before.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxrl_reason import models
from jaxrl_reason.models import sharding

_BLOCK = 128  # vocabulary entries whose probabilities are summed before a token is looked for


class Rollout(NamedTuple):
    """G completions for each of P prompts, at most T tokens each.

    Attributes:
      prompt_tokens: int32[P, S].
      prompt_mask: bool[P, S], True on real tokens.
      tokens: int32[P, G, T], `pad_id` after the end.
      mask: bool[P, G, T], True on sampled tokens, the end token included.
      logprobs: f32[P, G, T] log-probability of each token under the law that sampled it (temperature
        and legal tokens included; greedy samples: at temperature 1); 0 where mask is False.
      truncated: bool[P, G], True where the budget ran out before an end token; never where no token ends (numbers of
        a fixed length).
      features: f32[P, F], numbers that the prompts carry beside their tokens, or None.
      prompt_logprobs: f32[P, S] log-probability of each prompt token given its prefix at temperature 1; 0 on the first real
        token and where prompt_mask is False. None where not asked for.
      probe_logprobs: f32[P, G] log-probability, at the probe temperature, of the probe token right behind the
        end token; 0 where truncated. None where not asked for.
    """

    prompt_tokens: jax.Array
    prompt_mask: jax.Array
    tokens: jax.Array
    mask: jax.Array
    logprobs: jax.Array
    truncated: jax.Array
    features: jax.Array | None = None
    prompt_logprobs: jax.Array | None = None
    probe_logprobs: jax.Array | None = None


def sampling_noise(key: jax.Array, prompt_ids: jax.Array, group: int, length: int) -> jax.Array:
    """One uniform number a token, f32[P, G, T] in [0, 1), from (key, prompt id, sample, position)."""
    fold = jax.random.fold_in
    each = lambda p, g, t: jax.random.uniform(fold(fold(fold(key, p), g), t))
    over = jax.vmap(jax.vmap(jax.vmap(each, (None, None, 0)), (None, 0, None)), (0, None, None))
    return over(prompt_ids, jnp.arange(group), jnp.arange(length))


def scale_logits(logits: jax.Array, temperature: jax.Array, legal: jax.Array | None) -> jax.Array:
    """The law that samples, before normalisation: logits [..., V] / temperature, illegal at -inf.

    Temperature 0 (greedy) leaves the logits as they are. Sampling and training both call this.
    """
    temperature = jnp.asarray(temperature, jnp.float32)[..., None]
    logits = logits.astype(jnp.float32) / jnp.where(temperature > 0, temperature, 1.0)
    return logits if legal is None else jnp.where(legal, logits, -jnp.inf)


def sample_token(logits: jax.Array, noise: jax.Array, greedy: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Inverse-CDF sampling of one token a row.

    The token is the first whose cumulative probability exceeds the row's uniform number: one number a
    row in place of Gumbel noise over the vocabulary. The sum runs over blocks of the vocabulary first,
    then inside the block that holds the token.

    Args:
      logits: f32[..., V], -inf on illegal tokens.
      noise: f32[...] in [0, 1).
      greedy: bool, broadcastable to [...]; True takes the most probable token.

    Returns:
      tokens int32[...], and their log-probabilities f32[...].
    """
    V = logits.shape[-1]
    top = logits.max(axis=-1, keepdims=True)
    weights = jnp.exp(logits - top)
    padded = jnp.pad(weights, [(0, 0)] * (weights.ndim - 1) + [(0, -V % _BLOCK)])
    blocks = padded.reshape(*padded.shape[:-1], -1, _BLOCK)
    ends = jnp.cumsum(blocks.sum(axis=-1), axis=-1)  # [..., V / block]
    total = ends[..., -1]
    aim = noise * total
    block = _first_above(blocks.sum(axis=-1), ends, aim)
    start = jnp.where(block > 0, _pick(ends, jnp.maximum(block - 1, 0)), 0.0)
    inside = jnp.take_along_axis(blocks, block[..., None, None], axis=-2)[..., 0, :]
    sampled = block * _BLOCK + _first_above(inside, jnp.cumsum(inside, axis=-1), aim - start)
    # An argmax over the vocabulary is half of sampling's time on CPU: only where somebody is greedy.
    take_best = lambda: jnp.where(greedy, jnp.argmax(logits, axis=-1), sampled)
    tokens = jax.lax.cond(jnp.any(greedy), take_best, lambda: sampled).astype(jnp.int32)
    return tokens, _pick(logits, tokens) - top[..., 0] - jnp.log(total)


def _pick(x, index):
    return jnp.take_along_axis(x, index[..., None], axis=-1)[..., 0]


def _first_above(weights, ends, aim):
    """The first index with weight whose cumulative sum exceeds the aim; the last with weight where none does.

    Rounding can put the aim at the total or below 0, and a long float32 sum need not be monotone: what has no weight is
    ruled out by name.
    """
    has_weight = weights > 0
    above = has_weight & (ends > aim[..., None])
    last = weights.shape[-1] - 1 - jnp.argmax(has_weight[..., ::-1], axis=-1)
    return jnp.where(above.any(axis=-1), jnp.argmax(above, axis=-1), last)


def generate(
    config: models.ModelConfig,
    params,
    prompt_tokens,
    prompt_mask,
    prompt_ids,
    key,
    *,
    group_size: int,
    max_length: int,
    eos_ids: tuple[int, ...],
    pad_id: int,
    temperature,
    legal: jax.Array | None = None,
    features: jax.Array | None = None,
    with_prompt_logprobs: bool = False,
    probe_token: int | None = None,
    probe_temperature: float = 1.0,
    int8: bool = False,
) -> Rollout:
    """Samples G completions for each prompt. Pure; to be jitted with the keyword sizes static.

    Decoding is one `lax.while_loop` that stops when every sample has ended.

    Args:
      config: the decoder's configuration.
      params: its weights.
      prompt_tokens: int[P, S], prompt_mask: [P, S]; at least one real token a prompt.
      prompt_ids: int[P], names of the prompts in the keys of randomness.
      key: from (seed, step).
      group_size: G.  max_length: T, the budget in tokens.
      eos_ids: tokens that end a completion; none: all have T tokens.  pad_id: fills what lies behind.
      temperature: f32 scalar or [G], traced; 0 is greedy.
      legal: bool[T, V] or [P, T, V], the tokens allowed at each position, or None for all.
      features: f32[P, F] for a model with `features`.
      with_prompt_logprobs: also return the prompts' log-probabilities, from the prefill that happens anyway.
      probe_token: also return this token's log-probability behind each end token. The end token is fed to the decoder like
        any other, which costs at most one more iteration of the loop and no further forward pass.
      probe_temperature: of that log-probability. The one of training, whatever samples: what a self-reward is
        compared with was measured there.
      int8: decode with rounded weights and KV, half or a quarter of the memory to read. Log-probabilities are those of this law,
        which is not quite the policy's.
    """
    P, G, T = prompt_tokens.shape[0], group_size, max_length
    if probe_token is not None and not eos_ids:
        raise ValueError(
            "A probe token is read behind the end token, and no token ends a completion (eos_ids is empty)."
        )
    legal = None if legal is None else jnp.asarray(legal)
    model = models.bind(config, params)
    hidden, prompt = model.prefill(prompt_tokens, prompt_mask, features)
    prompt_logprobs = _prompt_logprobs(model, hidden, prompt_tokens, prompt_mask) if with_prompt_logprobs else None
    last = prompt_mask.shape[1] - 1 - jnp.argmax(prompt_mask[:, ::-1], axis=1)
    hidden = jnp.take_along_axis(hidden, last[:, None, None], axis=1)  # [P, 1, D]: a group starts alike
    blocks, prompt = model.unstack(prompt, int8)
    head = model.head_matrix(int8)
    logits_of = lambda hidden: models.project(hidden, head, config)
    steps = T + (probe_token is not None)  # one more to read what follows an end token in the last place
    noise = sampling_noise(key, prompt_ids, G, steps)
    temperature = jnp.broadcast_to(jnp.asarray(temperature, jnp.float32), (G,))
    eos = jnp.asarray(eos_ids, jnp.int32)

    def sample(logits, t):
        legal_now = None if legal is None else legal[..., t, :].reshape(-1, 1, legal.shape[-1])
        logits = sharding.constrain(logits, "prompts", None, "vocab")  # computed where the head's parts are
        law = scale_logits(logits, temperature, legal_now)  # f32[P, G, V]
        if G % sharding.num_vocab_shards() == 0 and law.shape[1] == G:
            # Whole rows of some samples to each device that has a part of the vocabulary, not all samples' to all.
            law = sharding.constrain(law, "prompts", "samples")
        drawn = sample_token(law, jax.lax.dynamic_index_in_dim(noise, t, 2, keepdims=False), temperature == 0)
        return tuple(sharding.constrain(x, "prompts") for x in drawn)

    def write(tokens, logprobs, new, logp, live, t):
        put = lambda x, y: jax.lax.dynamic_update_index_in_dim(x, y, t, axis=2)
        ends = jnp.any(new[..., None] == eos, axis=-1)
        return put(tokens, jnp.where(live, new, pad_id)), put(logprobs, jnp.where(live, logp, 0.0)), live & ~ends

    tokens = jnp.full((P, G, steps), pad_id, jnp.int32)
    new, logp = sample(logits_of(hidden), 0)
    everyone = jnp.ones((P, G), bool)
    tokens, logprobs, live = write(tokens, jnp.zeros((P, G, steps)), new, logp, everyone, 0)
    mask = jnp.zeros((P, G, steps), bool).at[:, :, 0].set(True)
    probe = None if probe_token is None else (jnp.zeros((P, G)), everyone & ~live)

    def going(carry):
        t, live, probe = carry[0], carry[1], carry[-1]
        sampling = (t < T) & live.any()
        return sampling if probe is None else sampling | probe[1].any()

    def body(carry):
        t, live, new, tokens, logprobs, mask, cache, probe = carry
        hidden, cache = model.step(new, t - 1, blocks, prompt, cache)
        logits = logits_of(hidden)
        new, logp = sample(logits, t)
        mask = jax.lax.dynamic_update_index_in_dim(mask, live, t, axis=2)
        tokens, logprobs, going_on = write(tokens, logprobs, new, logp, live, t)
        if probe is not None:
            values, ended = probe
            behind = scale_logits(logits, probe_temperature, None)  # legal tokens end with the completion
            values = jnp.where(ended, jax.nn.log_softmax(behind)[..., probe_token], values)
            going_on = jnp.where(t < T, going_on, live)  # the step beyond the budget only reads
            probe = values, live & ~going_on
        return t + 1, going_on, new, tokens, logprobs, mask, cache, probe

    carry = (jnp.int32(1), live, new, tokens, logprobs, mask, model.empty_cache(P, G, T, int8), probe)
    _, live, _, tokens, logprobs, mask, _, probe = jax.lax.while_loop(going, body, carry)
    return Rollout(
        prompt_tokens,
        prompt_mask.astype(bool),
        tokens[:, :, :T],
        mask[:, :, :T],
        logprobs[:, :, :T],
        truncated=live if eos_ids else jnp.zeros_like(live),
        features=features,
        prompt_logprobs=prompt_logprobs,
        probe_logprobs=None if probe is None else probe[0],
    )


def _prompt_logprobs(model: models.Decoder, hidden, tokens, mask):
    """See `Rollout.prompt_logprobs`. One position at a time, so that [S, vocabulary] is never held."""
    mask = mask.astype(bool)
    S = tokens.shape[1]
    places = jnp.where(mask, jnp.arange(S), -1)
    before = jnp.concatenate([jnp.full_like(places[:, :1], -1), jax.lax.cummax(places, axis=1)[:, :-1]], axis=1)
    predicted = mask & (before >= 0)
    hidden = jnp.take_along_axis(hidden, jnp.maximum(before, 0)[..., None], axis=1)

    def one(args):
        logits, token = model.logits(args[0]), args[1]
        return _pick(jax.nn.log_softmax(logits), token)

    return jnp.where(predicted, jax.lax.map(one, (hidden.swapaxes(0, 1), tokens.T)).T, 0.0)

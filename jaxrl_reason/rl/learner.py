"""The training step: from a rollout and its advantages to new parameters, on one page.

Completions run against the same shared prompt KV that sampled them, with gradients flowing through
each prompt once; log-probabilities are taken in chunks of positions, so that [tokens, vocabulary] is never
held whole: at most half of it and 64 MiB, or one position of every completion; a batch is cut into
minibatches (an optimizer update each) and those into microbatches (memory), always along the prompt axis,
with denominators counted over the whole minibatch.
"""

from collections.abc import Callable
import dataclasses
import functools
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from jaxrl_reason import losses, models
from jaxrl_reason.methods import PolicyLoss
from jaxrl_reason.models import sharding
from jaxrl_reason.rl.rollout import Rollout, scale_logits

_CHUNK_ENTRIES = 2**24  # logits held at once where logprob_chunk is 0: 64 MiB of float32


class TrainState(NamedTuple):
    """All that a run carries from step to step; what a checkpoint holds.

    Attributes:
      step: int32 scalar, steps done (of the phase it belongs to).
      params: the policy's weights.
      opt_state: optax state, float32 whatever the weights are.
      advantage_state: state of the method's advantage chain.
      batches: int32 scalar, prompt batches drawn from the data so far: the data position.
    """

    step: jax.Array
    params: models.Params
    opt_state: Any
    advantage_state: Any
    batches: jax.Array


class Experience(NamedTuple):
    """What an update learns from. P prompts, G completions, T tokens.

    Attributes:
      rollout: the completions.
      mask: bool[P, G, T], tokens that count in the loss: rollout.mask less what is left out (missing
        rewards, truncated completions where asked, padding groups).
      advantages: f32[P, G] or f32[P, G, T].
      old_logprobs: f32[P, G, T] under the policy before the first update, or None: on-policy (one
        update a rollout), where they are the current ones and the ratio is exactly 1.
      ref_logprobs: f32[P, G, T] under the reference policy, or None.
      verdicts: bool[P, G], what LaSeR's self-rewards are to say, or None.
      judged: bool[P, G], completions that its loss is over: those that ended and count.
      probe_reference: f32[P, G], its c_ref.
      expert_tokens: int32[P, G, T], targets of GenRe2's dense expert term, or None.
    """

    rollout: Rollout
    mask: jax.Array
    advantages: jax.Array
    old_logprobs: jax.Array | None = None
    ref_logprobs: jax.Array | None = None
    verdicts: jax.Array | None = None
    judged: jax.Array | None = None
    probe_reference: jax.Array | None = None
    expert_tokens: jax.Array | None = None


class Scored(NamedTuple):
    """Of P x G completions; values behind a completion's end mean nothing.

    Attributes:
      logprobs: f32[P, G, T] log-probability of every token under the law that samples.
      entropy: f32[P, G, T], of that law, in nats.
      target_logprobs: f32[P, G, T], of other tokens in the same places, or None.
      probe_logprobs: f32[P, G], of the probe token right behind the end token, or None; truncated ones mean nothing.
    """

    logprobs: jax.Array
    entropy: jax.Array
    target_logprobs: jax.Array | None = None
    probe_logprobs: jax.Array | None = None


class Mismatch(NamedTuple):
    """The live token on whose log-probability the sampler and the trainer agree least.

    Attributes:
      difference: f32 scalar, the trainer's less the sampler's, in nats.
      prompt, sample, position: int32 scalars, its place in [P, G, T].
    """

    difference: jax.Array
    prompt: jax.Array
    sample: jax.Array
    position: jax.Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class UpdateOptions:
    """Static choices of an update.

    Attributes:
      loss: the method's policy loss.
      kl_coefficient, kl_kind: weight and estimator of KL(policy || reference) in the loss.
      entropy_coefficient: weight of the entropy bonus.
      epochs: passes over a rollout.  minibatches: optimizer updates a pass.
      accumulation: microbatches an update; changes memory, not numbers.
      logprob_chunk: completion positions whose logits are held at once; 0 picks.
      probe_token: the token whose log-probability behind the end is LaSeR's self-reward, where the loss has one.
      importance_cap: where the law that sampled is not quite the policy's (int8 rollouts), each token's advantage is multiplied by
        min(p / p_sampled, importance_cap), p before the update: truncated importance sampling. 0: they are one law.
    """

    loss: PolicyLoss
    kl_coefficient: float = 0.0
    kl_kind: str = "k3"
    entropy_coefficient: float = 0.0
    epochs: int = 1
    minibatches: int = 1
    accumulation: int = 1
    logprob_chunk: int = 0
    probe_token: int | None = None
    importance_cap: float = 0.0


def completion_logprobs(
    config: models.ModelConfig,
    params,
    rollout: Rollout,
    temperature,
    legal=None,
    chunk: int = 0,
    *,
    targets=None,
    probe_token: int | None = None,
) -> Scored:
    """Log-probability of every completion token under the law that samples, and that law's entropy.

    Args:
      config, params: the policy.
      rollout: prompts and completions.
      temperature: f32 scalar.
      legal: bool[T, V] or [P, T, V], or None.
      chunk: positions of T whose logits are held at once; 0 picks.
      targets: int[P, G, T], further tokens to score in the same places, from the same logits.
      probe_token: a token to score behind each end token: one more position of the same forward.
    """
    P, G, T = rollout.tokens.shape
    chex.assert_rank(temperature, 0)
    if legal is not None:
        legal = jnp.broadcast_to(legal, (legal.shape[0] if legal.ndim == 3 else 1, T, config.vocab_size))
    model = models.bind(config, params)
    hidden, prompt = model.prefill(rollout.prompt_tokens, rollout.prompt_mask, rollout.features)
    last = rollout.prompt_mask.shape[1] - 1 - jnp.argmax(rollout.prompt_mask[:, ::-1], axis=1)
    hidden = jnp.take_along_axis(hidden, last[:, None, None], axis=1)  # predicts every first token
    hidden = jnp.broadcast_to(hidden[:, None], (P, G, 1, config.width))
    inputs = rollout.tokens if probe_token is not None else rollout.tokens[:, :, :-1]
    if inputs.shape[2]:
        hidden = jnp.concatenate([hidden, model.extend(inputs, prompt)], axis=2)
    head = model.head_matrix()
    probe = None
    if probe_token is not None:
        end = rollout.mask.sum(axis=-1)[..., None, None]
        behind = jnp.take_along_axis(hidden, end, axis=2)[:, :, 0]
        logits = scale_logits(models.project(behind, head, config), temperature, None)
        probe = losses.token_logprobs(logits, jnp.full((P, G), probe_token))[0]
        hidden = hidden[:, :, :T]

    # On several devices each takes its own prompts' logits: the head is gathered, and its gradient summed, once and not once a chunk.
    of_prompts = sharding.by_prompt(functools.partial(_in_chunks, config, chunk))
    return Scored(*of_prompts((head, temperature), hidden, rollout.tokens, targets, legal), probe)


def chunk_length(P: int, G: int, T: int, vocabulary: int, chunk: int = 0) -> int:
    """Positions of T whose logits a device holds at once, of its P prompts and its part of the vocabulary; `chunk` where it is given."""
    return min(chunk or max(1, min(_CHUNK_ENTRIES // (P * G * vocabulary), -(-T // 2))), T)


def _in_chunks(config: models.ModelConfig, chunk: int, law, hidden, tokens, targets, legal):
    """(log-probabilities, entropy, those of targets or None), each f32[P, G, T], of hidden [P, G, T, D] under law, (head, temperature)."""
    (head, temperature), (P, G, T) = law, tokens.shape
    head = head.astype(jnp.float32)  # its gradient adds up over the chunks

    def of_chunk(head, hidden, tokens, targets, legal):
        logits = models.project(hidden, head, config)
        logits = scale_logits(logits, temperature, None if legal is None else legal[:, None])
        scored = losses.token_logprobs(logits, tokens)
        return *scored, None if targets is None else losses.token_logprobs(logits, targets)[0]

    chunk = chunk_length(P, G, T, -(-config.vocab_size // sharding.num_vocab_shards()), chunk)
    if chunk == T:
        return of_chunk(head, hidden, tokens, targets, legal)
    count = -(-T // chunk)

    def cut(x, axis):  # [.., T, ..] -> [count, .., chunk, ..]
        if x is None:
            return None
        x = jnp.pad(x, [(0, count * chunk - T if i == axis else 0) for i in range(x.ndim)], mode="edge")
        return jnp.moveaxis(x.reshape(*x.shape[:axis], count, chunk, *x.shape[axis + 1 :]), axis, 0)

    xs = cut(hidden, 2), cut(tokens, 2), cut(targets, 2), cut(legal, 1)
    of_chunk = jax.checkpoint(of_chunk, prevent_cse=False)  # logits are computed again, not kept
    _, ys = jax.lax.scan(lambda _, x: ((), of_chunk(head, *x)), (), xs)
    join = lambda y: jnp.moveaxis(y, 0, 2).reshape(P, G, count * chunk)[:, :, :T]
    return jax.tree.map(join, ys)


def split(tree, parts: int):
    """[P, ...] -> [parts, P / parts, ...] by stride, so that on a sharded axis every device keeps its own."""
    cut = lambda x: x.reshape(x.shape[0] // parts, parts, *x.shape[1:]).swapaxes(0, 1)
    return jax.tree.map(cut, tree)


def unsplit(tree):
    """[parts, P / parts, ...] -> [P, ...]: what `split` undoes."""
    return jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(-1, *x.shape[2:]), tree)


def join(parts):
    """A tree with [P / parts, ...] for each part of `split` -> [P, ...]."""
    return unsplit(jax.tree.map(lambda *xs: jnp.stack(xs), *parts))


def score(
    config: models.ModelConfig,
    params,
    rollout: Rollout,
    temperature,
    legal=None,
    *,
    parts: int = 1,
    chunk: int = 0,
    probe_token: int | None = None,
) -> Scored:
    """A rollout scored under `params`, `parts` microbatches one after another. Without entropy: it is 0."""

    def one(part):
        scored = completion_logprobs(config, params, part, temperature, legal, chunk, probe_token=probe_token)
        return scored._replace(entropy=jnp.zeros_like(scored.entropy))

    return unsplit(jax.lax.map(one, split(rollout, parts)))


def loss_and_metrics(
    config: models.ModelConfig,
    options: UpdateOptions,
    params,
    batch: Experience,
    total: losses.Totals,
    temperature,
    legal=None,
    classes: losses.ClassTotals | None = None,
):
    """The loss of a part of a batch whose counts are `total` and `classes`; losses and metrics of parts add up.

    Returns:
      loss, (metrics, (difference f32[P, G], position int32[P, G])), the last two of each completion's worst token, see `Mismatch`.
    """
    scored = completion_logprobs(
        config,
        params,
        batch.rollout,
        temperature,
        legal,
        options.logprob_chunk,
        targets=batch.expert_tokens,
        probe_token=options.probe_token if options.loss.self_reward else None,
    )
    logprobs = scored.logprobs
    old = jax.lax.stop_gradient(logprobs) if batch.old_logprobs is None else batch.old_logprobs
    advantages = batch.advantages
    if options.importance_cap:
        importance = jnp.exp(jnp.where(batch.mask, old - batch.rollout.logprobs, 0.0))
        advantages = advantages[..., None] if advantages.ndim == 2 else advantages
        advantages = advantages * jnp.minimum(importance, options.importance_cap)
    loss, metrics = losses.policy_loss(
        logprobs, old, advantages, batch.mask, total=total, **options.loss.policy_keywords()
    )
    references = () if batch.ref_logprobs is None else (batch.ref_logprobs,)
    mask, _ = losses.drop_nonfinite(batch.mask, logprobs, old, *references)
    mean = lambda x: losses.masked_sum(x, mask) / total.tokens
    same_law = lambda x: losses.aggregate(x, mask, options.loss.aggregation, options.loss.constant, total)
    metrics["entropy"] = mean(scored.entropy)
    if options.importance_cap:
        metrics["sampling/logp_difference_mean"] = mean(jnp.abs(old - batch.rollout.logprobs))
        metrics["sampling/importance_weight_mean"] = mean(importance)
        metrics["sampling/importance_capped_ratio"] = mean((importance > options.importance_cap).astype(jnp.float32))
    if options.entropy_coefficient:
        loss -= options.entropy_coefficient * same_law(scored.entropy)
    if batch.ref_logprobs is not None:
        kl = losses.kl_penalty(logprobs, batch.ref_logprobs, options.kl_kind)
        metrics["kl"] = mean(kl)
        if options.kl_coefficient:
            loss += options.kl_coefficient * same_law(kl)
    if options.loss.self_reward:
        settings = options.loss.self_reward
        judged = batch.judged & jnp.isfinite(scored.probe_logprobs)
        self_rewards = settings.beta * (jnp.where(judged, scored.probe_logprobs, 0.0) - batch.probe_reference)
        metrics["self_reward/loss"] = losses.self_reward_loss(self_rewards, batch.verdicts, judged, total=classes)
        loss += settings.coefficient * metrics["self_reward/loss"]
    if batch.expert_tokens is not None:
        metrics["expert/loss"] = -mean(scored.target_logprobs)
        loss += options.loss.expert_coefficient * metrics["expert/loss"]
    difference = jax.lax.stop_gradient(jnp.where(mask, logprobs - batch.rollout.logprobs, 0.0))
    position = jnp.argmax(jnp.abs(difference), axis=-1)
    difference = jnp.take_along_axis(difference, position[..., None], axis=-1)[..., 0]
    metrics["loss"] = loss
    return loss, (metrics, (difference, position))


def make_gradient(config: models.ModelConfig, options: UpdateOptions, legal=None) -> Callable:
    """The gradient of one minibatch.

    Args:
      config, options: what to run.
      legal: bool[T, V], the legal-token mask that sampled, or None.

    Returns:
      gradient(params, experience, temperature) -> (gradients of the weights that are trained, metrics, (difference, position)), the
      last two as in `loss_and_metrics`. What is not finite in the experience's own log-probabilities is left out.
    """
    whole_weights = models.lora.join
    loss = lambda trained, frozen, *args: loss_and_metrics(config, options, whole_weights(trained, frozen), *args)

    def whole_or_parts(params, batch: Experience, temperature):
        trained, frozen = models.lora.split(config, params)
        grad = jax.grad(lambda trained, *args: loss(trained, frozen, *args), has_aux=True)
        total, classes = losses.totals(batch.mask), None
        if options.loss.self_reward:
            classes = losses.class_totals(batch.verdicts, batch.judged)
        whole = total, temperature, legal, classes
        if options.accumulation == 1:
            grads, (metrics, worst) = grad(trained, batch, *whole)
            return grads, metrics, worst

        def add(sums, part):
            grads, (metrics, worst) = grad(trained, part, *whole)
            return jax.tree.map(jnp.add, sums, (grads, metrics)), worst

        parts = split(batch, options.accumulation)
        grads, (metrics, _) = jax.eval_shape(grad, trained, jax.tree.map(lambda x: x[0], parts), *whole)
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), (grads, metrics))
        (grads, metrics), worst = jax.lax.scan(add, zeros, parts)
        return grads, metrics, unsplit(worst)

    def gradient(params, batch: Experience, temperature):
        # Before anything is counted: a completion left out is in no numerator and in no denominator.
        mask, dropped = losses.drop_nonfinite(
            batch.mask, *(x for x in (batch.old_logprobs, batch.ref_logprobs) if x is not None)
        )
        batch = batch._replace(mask=mask)
        if options.loss.self_reward:
            batch = batch._replace(judged=batch.judged & mask.any(axis=-1))
        grads, metrics, worst = whole_or_parts(params, batch, temperature)
        metrics["nonfinite_completions"] += dropped
        return grads, metrics, worst

    return gradient


def make_update(
    config: models.ModelConfig, options: UpdateOptions, optimizer: optax.GradientTransformation, legal=None
) -> Callable:
    """The update step, a pure function to be jitted with its first argument donated.

    Args:
      config, options, legal: see `make_gradient`.
      optimizer: what turns gradients into updates.

    Returns:
      update(state, experience, temperature, key) -> (state, metrics, Mismatch): f32 scalars, means over the updates, and the worst token
      before anything changed, whose absolute difference is the metric `sampling/logp_difference_max`.
    """
    gradient = make_gradient(config, options, legal)

    def apply(params, opt_state, batch: Experience, temperature):
        grads, metrics, worst = gradient(params, batch, temperature)
        trained, frozen = models.lora.split(config, params)
        trained, opt_state, metrics["grad_norm"], applied = apply_gradients(
            optimizer, trained, opt_state, grads, metrics["loss"]
        )
        metrics["skipped_update_ratio"] = 1.0 - applied
        return models.lora.join(trained, frozen), opt_state, metrics, worst

    def update(state: TrainState, batch: Experience, temperature, key):
        params, opt_state = state.params, state.opt_state
        if options.loss.self_reward:
            batch = batch._replace(judged=batch.judged & (state.step >= options.loss.self_reward.warmup_steps))
        if batch.mask.shape[0] % (options.minibatches * options.accumulation):
            raise ValueError(
                f"{batch.mask.shape[0]} prompts cannot be shared evenly among {options.minibatches} minibatches of "
                f"{options.accumulation} microbatches."
            )
        if options.epochs * options.minibatches > 1 and batch.old_logprobs is None:
            raise ValueError("Several updates on one rollout need old_logprobs: without them every ratio would be 1.")
        P = batch.mask.shape[0]
        if options.epochs * options.minibatches == 1:
            params, opt_state, metrics, worst = apply(params, opt_state, batch, temperature)
            rows = jnp.arange(P)
        else:
            size = P // options.minibatches
            order = jnp.concatenate([jax.random.permutation(k, P) for k in jax.random.split(key, options.epochs)])

            def one(carry, rows):
                params, opt_state, *rest = apply(*carry, jax.tree.map(lambda x: x[rows], batch), temperature)
                return (params, opt_state), rest

            (params, opt_state), (metrics, worst) = jax.lax.scan(one, (params, opt_state), order.reshape(-1, size))
            metrics, worst = jax.tree.map(jnp.mean, metrics), jax.tree.map(lambda x: x[0], worst)
            rows = order[:size]
        mismatch = _largest(*worst, rows)
        metrics["sampling/logp_difference_max"] = jnp.abs(mismatch.difference)
        return state._replace(step=state.step + 1, params=params, opt_state=opt_state), metrics, mismatch

    return update


def _largest(difference: jax.Array, position: jax.Array, rows: jax.Array) -> Mismatch:
    """The largest of [P, G] mismatches, whose prompts stand in these rows of the batch, int32[P]."""
    at = jnp.argmax(jnp.abs(difference))
    row, sample = jnp.unravel_index(at, difference.shape)
    return Mismatch(difference[row, sample], rows[row], sample, position[row, sample])


def apply_gradients(optimizer, params, opt_state, grads, loss):
    """One optax update in float32, whatever the weights are; returns (params, opt_state, gradient norm, bool scalar: applied).

    Where the loss or its gradient is not finite, nothing changes.
    """
    to32 = lambda tree: jax.tree.map(lambda x: x.astype(jnp.float32), tree)
    grads, wide = to32(grads), to32(params)
    norm = optax.tree.norm(grads)
    updates, new_opt_state = optimizer.update(grads, opt_state, wide)
    new = jax.tree.map(lambda old, x: x.astype(old.dtype), params, optax.apply_updates(wide, updates))
    finite = jnp.isfinite(norm) & jnp.isfinite(loss)
    keep = lambda new, old: jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, old)
    return keep(new, params), keep(new_opt_state, opt_state), norm, finite


def init_opt_state(optimizer, params):
    """Optimizer state for float32 copies of the weights' shapes."""
    return optimizer.init(jax.tree.map(lambda x: x.astype(jnp.float32), params))


def make_supervised_update(config: models.ModelConfig, optimizer: optax.GradientTransformation, legal=None) -> Callable:
    """Cross-entropy on given completions: update(state, prompt_tokens, prompt_mask, tokens, mask, features=None).

    tokens, mask: [B, T], the end token included; the loss is the mean over tokens. legal: see `make_update`.
    """

    def loss_fn(trained, frozen, rollout):
        params = models.lora.join(trained, frozen)
        logprobs = completion_logprobs(config, params, rollout, 1.0, legal).logprobs
        return -losses.aggregate(logprobs, rollout.mask, "token_mean")

    def update(state: TrainState, prompt_tokens, prompt_mask, tokens, mask, features=None):
        mask = mask[:, None].astype(bool)
        zeros, no = jnp.zeros(mask.shape), jnp.zeros(mask.shape[:2], bool)
        rollout = Rollout(prompt_tokens, prompt_mask, tokens[:, None], mask, zeros, no, features)
        trained, frozen = models.lora.split(config, state.params)
        loss, grads = jax.value_and_grad(loss_fn)(trained, frozen, rollout)
        trained, opt_state, norm, applied = apply_gradients(optimizer, trained, state.opt_state, grads, loss)
        params = models.lora.join(trained, frozen)
        state = state._replace(step=state.step + 1, params=params, opt_state=opt_state, batches=state.batches + 1)
        return state, {"sft/loss": loss, "sft/grad_norm": norm, "skipped_update_ratio": 1.0 - applied}

    return update

"""The update, on one page: from a rollout and its advantages to new parameters.

A batch is cut into minibatches (one optimizer update each), and a minibatch into microbatches (to save memory), always along the prompt axis. All
denominators are counts of the whole minibatch.
"""

from collections.abc import Callable, Mapping
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int
import optax

from jaxrl_reason import losses, models
from jaxrl_reason.data import SolutionBatch
from jaxrl_reason.methods import PolicyLoss
from jaxrl_reason.models import sharding
from jaxrl_reason.rl import auxiliary, gradients, waves
from jaxrl_reason.rl.optimizer import apply_gradients
from jaxrl_reason.rl.scoring import compute_logprobs, Prompts, read_prompts
from jaxrl_reason.rl.types import Experience, Gradient, LogProbs, Mismatch, Rollout, TrainState, UpdateResult


@dataclasses.dataclass(frozen=True, kw_only=True)
class UpdateOptions:
    """Static choices of an update."""

    loss: PolicyLoss
    kl_coefficient: float = 0.0  # weight of KL(policy || reference) in the loss
    kl_kind: str = "k3"  # its estimator
    entropy_coefficient: float = 0.0  # weight of the entropy bonus
    epochs: int = 1  # passes over a rollout
    minibatches: int = 1  # optimizer updates per pass
    accumulation: int = 1  # microbatches per update; they change the memory, not the numbers
    lengths: int = 1  # number of lengths that are compiled, each half of the next; 1: whole groups, padded to T
    wave_tokens: int = 0  # with several lengths: tokens per device that are computed at the same time
    logprob_chunk: int = 0  # completion positions whose logits are in memory at the same time; 0 chooses
    probe_token: int | None = None  # the token of LaSeR's self-reward, if an auxiliary loss reads it
    # For rollouts whose distribution differs from the policy's (int8), each token's advantage is multiplied by
    # min(p / p_sampled, importance_cap), with p before the update: truncated importance sampling. 0: the distributions are equal.
    importance_cap: float = 0.0


def loss_and_metrics(
    config: models.ModelConfig,
    options: UpdateOptions,
    params: models.Params,
    batch: Experience,
    total: losses.Totals,
    counts: Mapping[str, Any],
    temperature: Float[Array, ""],
    legal: Bool[Array, "T V"] | None = None,
    prompts: Prompts | None = None,
) -> tuple[Float[Array, ""], tuple[dict[str, jax.Array], Array, Array]]:
    """Computes the loss of a part of a minibatch. Losses and metrics of the parts add up.

    Args:
      config, options, params: what to compute.
      batch: the part.
      total, counts: counts of the whole minibatch; `counts` of the auxiliary losses, by name.
      temperature, legal: of the distribution that sampled.
      prompts: see `compute_logprobs`.

    Returns:
      The loss, and (metrics, difference, position); the last two as in `Gradient`.
    """
    scored = compute_logprobs(
        config,
        params,
        batch.rollout,
        temperature,
        legal,
        options.logprob_chunk,
        targets=auxiliary.targets(batch.auxiliary),
        probe_token=options.probe_token if auxiliary.needs_probe(options.loss) else None,
        prompts=prompts,
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
    mask, _ = losses.drop_nonfinite(batch.mask, *(x for x in (logprobs, old, batch.ref_logprobs) if x is not None))
    mean = lambda x: losses.masked_sum(x, mask) / total.tokens
    as_loss = lambda x: losses.aggregate(x, mask, options.loss.aggregation, options.loss.constant, total)
    metrics["entropy"] = mean(scored.entropy)
    if options.importance_cap:
        metrics["sampling/logp_difference_mean"] = mean(jnp.abs(old - batch.rollout.logprobs))
        metrics["sampling/importance_weight_mean"] = mean(importance)
        metrics["sampling/importance_capped_ratio"] = mean((importance > options.importance_cap).astype(jnp.float32))
    if options.entropy_coefficient:
        loss -= options.entropy_coefficient * as_loss(scored.entropy)
    if batch.ref_logprobs is not None:
        kl = losses.kl_penalty(logprobs, batch.ref_logprobs, options.kl_kind)
        metrics["kl"] = mean(kl)
        if options.kl_coefficient:
            loss += options.kl_coefficient * as_loss(kl)
    if options.loss.auxiliary:
        more, terms = auxiliary.loss_and_metrics(options.loss, batch.auxiliary, scored, mask, total, counts)
        loss, metrics = loss + more, metrics | terms
    metrics["loss"] = loss
    return loss, (metrics, *_worst_tokens(scored, batch.rollout, mask))


def _worst_tokens(scored: LogProbs, rollout: Rollout, mask: Bool[Array, "P G T"]) -> tuple[jax.Array, jax.Array]:
    """Returns, per completion, the largest difference between the trainer's and the sampler's log-probability, and its position."""
    difference = jax.lax.stop_gradient(jnp.where(mask, scored.logprobs - rollout.logprobs, 0.0))
    position = jnp.argmax(jnp.abs(difference), axis=-1)
    return jnp.take_along_axis(difference, position[..., None], axis=-1)[..., 0], position


def gradient(
    config: models.ModelConfig,
    options: UpdateOptions,
    params: models.Params,
    batch: Experience,
    temperature: Float[Array, ""],
    legal: Bool[Array, "T V"] | None = None,
) -> Gradient:
    """Computes the gradient of one minibatch, in microbatches of whole groups or in waves.

    Completions with a log-probability in `batch` that is not finite are left out before anything is counted: they are in no numerator and in no
    denominator. `temperature` and `legal` are of the distribution that sampled.
    """
    known = (x for x in (batch.old_logprobs, batch.ref_logprobs) if x is not None)
    mask, dropped = losses.drop_nonfinite(batch.mask, *known)
    batch = batch._replace(mask=mask, auxiliary=auxiliary.restrict(batch.auxiliary, mask))
    counts = {name: auxiliary.AUXILIARY[name].counts(data) for name, data in batch.auxiliary.items()}
    whole = losses.totals(mask), counts, temperature
    trained, frozen = models.lora.split(config, params)
    (_, G, T), S = mask.shape, batch.rollout.prompt_tokens.shape[1] + config.prefix_length
    if options.loss.aggregation == "constant" and options.loss.constant is None:  # completions of a wave are shorter
        options = dataclasses.replace(options, loss=dataclasses.replace(options.loss, constant=T))

    def loss(trained, part, legal, prompts=None):
        return loss_and_metrics(config, options, models.lora.join(trained, frozen), part, *whole, legal, prompts)

    def read(trained, rollout):
        return read_prompts(config, models.lora.join(trained, frozen), rollout)

    if options.lengths == 1:
        parts, grad = options.accumulation, jax.grad(lambda trained, part: loss(trained, part, legal), has_aux=True)
    else:
        parts = waves.prompt_parts(G, S, T, options.accumulation)
        own = len(mask) // parts // sharding.num_prompt_shards()
        sizes = waves.sizes(own, G, S, T, options.lengths, options.wave_tokens, options.accumulation // parts)
        grad = functools.partial(gradients.in_waves, loss, read, sizes, legal)
    grads, (metrics, difference, position) = gradients.in_parts(grad, parts, trained, batch)
    metrics["nonfinite_completions"] += dropped
    return Gradient(grads, metrics, difference, position)


def make_update(
    config: models.ModelConfig,
    options: UpdateOptions,
    optimizer: optax.GradientTransformation,
    legal: Bool[Array, "T V"] | None = None,
) -> Callable[..., UpdateResult]:
    """Makes update(state, experience, temperature, key) -> UpdateResult, a pure function; jit it with its first argument donated.

    Its metrics are means over the optimizer updates whose minibatch has a token. Its mismatch is the one before anything changed; the absolute
    difference is the metric `sampling/logp_difference_max`. `legal` is the legal-token mask that sampled.
    """
    updates = options.epochs * options.minibatches

    def apply(state: TrainState, batch: Experience, temperature) -> tuple[TrainState, dict, jax.Array, jax.Array]:
        grads, metrics, difference, position = gradient(config, options, state.params, batch, temperature, legal)
        trained, opt_state, metrics["grad_norm"], applied = apply_gradients(
            optimizer, state.trained, state.opt_state, grads, metrics["loss"]
        )
        metrics["skipped_update_ratio"] = 1.0 - applied
        return state._replace(trained=trained, opt_state=opt_state), metrics, difference, position

    def update(state: TrainState, batch: Experience, temperature, key) -> UpdateResult:
        P = batch.mask.shape[0]
        _check(options, batch)
        batch = batch._replace(auxiliary=auxiliary.at_step(options.loss, batch.auxiliary, batch.mask, state.step))
        if updates == 1:
            new, metrics, difference, position = apply(state, batch, temperature)
            rows = jnp.arange(P)
        else:
            order = jnp.concatenate([jax.random.permutation(k, P) for k in jax.random.split(key, options.epochs)])
            order = order.reshape(-1, P // options.minibatches)

            def one(carry, rows):
                trained, opt_state = carry
                minibatch = jax.tree.map(lambda x: x[rows], batch)
                new, *rest = apply(state._replace(trained=trained, opt_state=opt_state), minibatch, temperature)
                return (new.trained, new.opt_state), rest

            (trained, opt_state), (metrics, *worst) = jax.lax.scan(one, (state.trained, state.opt_state), order)
            # Places that dynamic sampling could not fill are empty.
            live = batch.mask.any(axis=(1, 2))[order].any(axis=1)
            mean = lambda x: jnp.where(live, x, 0.0).sum() / jnp.maximum(live.sum(), 1)
            metrics, (difference, position) = jax.tree.map(mean, metrics), jax.tree.map(lambda x: x[0], worst)
            new, rows = state._replace(trained=trained, opt_state=opt_state), order[0]
        mismatch = _largest(difference, position, rows)
        metrics["sampling/logp_difference_max"] = jnp.abs(mismatch.difference)
        return UpdateResult(new._replace(step=state.step + 1), metrics, mismatch)

    return update


def _check(options: UpdateOptions, batch: Experience) -> None:
    """Raises ValueError if the batch cannot be divided, or if several updates would all have the ratio 1."""
    P = batch.mask.shape[0]
    if P % (options.minibatches * options.accumulation):
        raise ValueError(
            f"{P} prompts cannot be divided evenly into {options.minibatches} minibatches of {options.accumulation} microbatches."
        )
    if options.epochs * options.minibatches > 1 and batch.old_logprobs is None:
        raise ValueError("Several updates per rollout need old_logprobs: without them every ratio would be 1.")


def _largest(difference: Float[Array, "P G"], position: Int[Array, "P G"], rows: Int[Array, " P"]) -> Mismatch:
    """Returns the largest of the mismatches of prompts that are in these rows of the batch."""
    at = jnp.argmax(jnp.abs(difference))
    row, sample = jnp.unravel_index(at, difference.shape)
    return Mismatch(difference[row, sample], rows[row], sample, position[row, sample])


def make_cross_entropy(config: models.ModelConfig, legal: Bool[Array, "T V"] | None = None) -> Callable[..., jax.Array]:
    """Makes loss(params, prompt_tokens [B, S], prompt_mask [B, S], tokens [B, T], mask [B, T], features=None) -> f32 scalar.

    It is the cross-entropy on the given completions, their end token included, averaged over tokens. The keyword
    `dropout` has the factors of `models.encoder_dropout`.
    """

    def loss(params, prompt_tokens, prompt_mask, tokens, mask, features=None, *, dropout=None):
        mask = mask[:, None].astype(bool)
        zeros, no = jnp.zeros(mask.shape), jnp.zeros(mask.shape[:2], bool)
        rollout = Rollout(prompt_tokens, prompt_mask, tokens[:, None], mask, zeros, no, features)
        prompts = read_prompts(config, params, rollout, dropout)
        logprobs = compute_logprobs(config, params, rollout, 1.0, legal, prompts=prompts).logprobs
        return -losses.aggregate(logprobs, rollout.mask, "token_mean")

    return loss


def make_supervised_update(
    config: models.ModelConfig,
    optimizer: optax.GradientTransformation,
    legal: Bool[Array, "T V"] | None = None,
    dropout: float = 0.0,
    parts: int = 1,
) -> Callable[..., tuple[TrainState, dict[str, jax.Array]]]:
    """Makes update(state, batch, key) -> (state, metrics); the loss of a batch is that of `make_cross_entropy`.

    `dropout` is the share of the encoder's hidden units that an update leaves out; `key` chooses them. `parts` is the
    number of microbatches, which change the memory and not the numbers.
    """

    cross_entropy = make_cross_entropy(config, legal)

    def update(state: TrainState, batch: SolutionBatch, key: jax.Array):
        count = lambda batch: batch[3].sum(dtype=jnp.float32)
        tokens = count(batch)

        def loss_fn(trained, part):
            batch, factors = part
            mean = cross_entropy(models.lora.join(trained, state.frozen), *batch, dropout=factors)
            # A share of all tokens, so that the losses of microbatches add up.
            return count(batch) / jnp.maximum(tokens, 1) * mean

        def gradient(trained, part):
            loss, grads = jax.value_and_grad(loss_fn)(trained, part)
            return grads, (loss,)

        factors = models.encoder_dropout(config, key, dropout, len(batch[0]))
        grads, (loss,) = gradients.in_parts(gradient, parts, state.trained, (batch, factors))
        trained, opt_state, norm, applied = apply_gradients(optimizer, state.trained, state.opt_state, grads, loss)
        state = state._replace(
            step=state.step + 1, trained=trained, opt_state=opt_state, data_position=state.data_position + 1
        )
        return state, {"sft/loss": loss, "sft/grad_norm": norm, "skipped_update_ratio": 1.0 - applied}

    return update

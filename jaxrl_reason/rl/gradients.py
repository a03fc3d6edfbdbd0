"""Sums the gradients of the parts of a minibatch, so that not all activations are in memory at once.

A loss is a function of the trained weights and a part that returns a sum, with metrics and, per completion, the worst token. The gradients and
the metrics of the parts add up.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool

from jaxrl_reason import models
from jaxrl_reason.models import sharding
from jaxrl_reason.rl import auxiliary, waves
from jaxrl_reason.rl.scoring import join_prompts, Prompts, split_prompts, without_prompts
from jaxrl_reason.rl.types import Experience, Rollout

Worst = tuple[Array, Array]  # per completion, see `Gradient.difference` and `position`
Result = tuple[Any, tuple[dict[str, Array], *Worst]]  # the gradient, and the metrics and the worst tokens


def in_parts(gradient: Callable[[models.Params, Any], Any], parts: int, trained: models.Params, batch: Any) -> Any:
    """Computes `gradient(trained, part)` of equal parts of the prompts, one after another, and joins the results.

    A result is (gradient, (metrics, *arrays with a row per prompt)). Gradients and metrics add up; arrays are joined.
    """
    if parts == 1:
        return gradient(trained, batch)

    def add(sums, part):
        grads, (metrics, *worst) = gradient(trained, part)
        return jax.tree.map(jnp.add, sums, (grads, metrics)), worst

    split = split_prompts(batch, parts)
    shapes, (shape_of_metrics, *_) = jax.eval_shape(gradient, trained, jax.tree.map(lambda x: x[0], split))
    (grads, metrics), worst = jax.lax.scan(add, _zeros((shapes, shape_of_metrics)), split)
    return grads, (metrics, *join_prompts(worst))


def in_waves(
    loss: Callable[..., Any],
    read: Callable[[models.Params, Rollout], Prompts],
    sizes: Sequence[waves.Size],
    legal: Bool[Array, "T V"] | None,
    trained: models.Params,
    batch: Experience,
) -> Result:
    """Computes the gradient in one pass over the prompts, and waves of completions that add to the gradients of weights and prompts.

    Args:
      loss: (trained, completions of a wave, legal tokens, their prompts) -> (loss, (metrics, difference, position)).
      read: (trained, rollout) -> its prompts.
      sizes: the sizes of the waves, see `waves.sizes`.
      legal: the tokens that are allowed at each position; None: all.
      trained: the weights at which the gradient is taken.
      batch: the completions of the minibatch.
    """
    P, G, _ = batch.mask.shape
    states, backward, places = jax.vjp(lambda trained: read(trained, batch.rollout), trained, has_aux=True)
    completions = batch._replace(rollout=without_prompts(batch.rollout))

    def of_wave(trained, states, places, part, legal):
        return loss(trained, part, legal, (states, places))

    def add(wave, sums):
        grads, of_states, metrics, worst = sums
        part = waves.take(wave, completions)
        mask = part.mask & wave.live(P // sharding.num_prompt_shards() * G)[..., None]
        part = part._replace(mask=mask, auxiliary=auxiliary.restrict(part.auxiliary, mask))
        prompts = waves.take_prompts(wave, G, (states, places))
        allowed = None if legal is None else legal[: wave.length]
        (more, more_of_states), (more_metrics, *found) = gradient(trained, *prompts, part, allowed)
        grads, metrics = jax.tree.map(jnp.add, (grads, metrics), (more, more_metrics))
        return grads, waves.add_prompts(wave, G, of_states, more_of_states), metrics, waves.put(wave, worst, found)

    gradient = jax.grad(of_wave, argnums=(0, 1), has_aux=True)
    used = jnp.where(batch.mask.any(axis=-1), batch.rollout.mask.sum(axis=-1), 0)
    _, (metrics, *_) = jax.eval_shape(of_wave, trained, states, places, completions, legal)
    worst = [jnp.zeros((P, G)), jnp.zeros((P, G), jnp.int32)]
    zeros = (*_zeros((trained, states, metrics)), worst)
    grads, of_states, metrics, worst = waves.for_each(sizes, waves.queue(used), add, zeros)
    (of_prompts,) = backward(jax.tree.map(lambda x, like: x.astype(like.dtype), of_states, states))
    return jax.tree.map(jnp.add, grads, of_prompts), (metrics, *worst)


def _zeros(tree: Any) -> Any:
    """Returns float32 zeros in the shapes of a tree."""
    return jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), tree)

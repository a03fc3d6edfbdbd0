"""optax chains from a configuration: gradient clipping, AdamW, schedules, and a float32 copy of bfloat16 weights."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxrl_reason.config import Config


def make_optimizer(config: Config) -> tuple[Callable, optax.GradientTransformation]:
    """Returns the learning rate as a function of the optimizer update, and gradient clipping with AdamW."""
    o, updates = config.optimizer, config.update.epochs * config.update.minibatches
    schedule = _schedule(o.learning_rate, o.schedule, o.warmup_steps, config.steps, updates)
    return schedule, _clipped_adamw(config, schedule)


def make_supervised_optimizer(config: Config) -> optax.GradientTransformation:
    """Returns the same chain, so that both phases share one checkpoint format, with a cosine decay to 0 after 5 % warm-up."""
    s = config.supervised
    return _clipped_adamw(config, _schedule(s.learning_rate, "cosine", s.steps // 20, s.steps, 1))


def init_opt_state(optimizer: optax.GradientTransformation, params: Any) -> Any:
    """Returns the optimizer state for float32 copies of the weights."""
    return optimizer.init(_to_float32(params))


def apply_gradients(
    optimizer: optax.GradientTransformation, params: Any, opt_state: Any, grads: Any, loss: jax.Array
) -> tuple[Any, Any, jax.Array, jax.Array]:
    """Applies one optax update in float32, whatever the weights are. If the loss or the gradient is not finite, nothing changes.

    Returns the weights, the optimizer state, the norm of the gradient (f32 scalar), and whether the update was applied (bool scalar).
    """
    grads, wide = _to_float32(grads), _to_float32(params)
    norm = optax.tree.norm(grads)
    updates, new_opt_state = optimizer.update(grads, opt_state, wide)
    new = jax.tree.map(lambda old, x: x.astype(old.dtype), params, optax.apply_updates(wide, updates))
    finite = jnp.isfinite(norm) & jnp.isfinite(loss)
    keep = lambda new, old: jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, old)
    return keep(new, params), keep(new_opt_state, opt_state), norm, finite


def _to_float32(tree: Any) -> Any:
    return jax.tree.map(lambda x: x.astype(jnp.float32), tree)


def _schedule(peak: float, kind: str, warmup: int, steps: int, updates_per_step: int) -> Callable:
    """Returns the learning rate as a function of the number of optimizer updates done."""
    rest = max(steps - warmup, 1)
    after = {
        "constant": optax.constant_schedule(peak),
        "linear": optax.linear_schedule(peak, 0.0, rest),
        "cosine": optax.cosine_decay_schedule(peak, rest),
    }[kind]
    # The first update already moves the weights: warm-up goes from peak / warmup to peak.
    ramp = lambda step: peak * jnp.minimum((step + 1) / max(warmup, 1), 1.0)
    return lambda count: jnp.where(
        count // updates_per_step < warmup, ramp(count // updates_per_step), after(count // updates_per_step - warmup)
    )


def _clipped_adamw(config: Config, schedule: Callable) -> optax.GradientTransformation:
    o = config.optimizer
    adamw = optax.adamw(schedule, b1=o.b1, b2=o.b2, eps=o.eps, weight_decay=o.weight_decay)
    chain = optax.chain(optax.clip_by_global_norm(o.max_grad_norm), adamw)
    return with_float32_master(chain) if o.float32_master else chain


class MasterState(NamedTuple):
    """State of `with_float32_master`: the weights in float32, and the state of the wrapped optimizer."""

    master: Any
    inner: Any


def with_float32_master(inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """Applies `inner` to a float32 copy of the weights. The weights follow the copy, rounded.

    bfloat16 has 8 significant bits: an update smaller than 1/256 of a weight is lost in the weight, and adds up in the copy. The updates lead from
    the weights, widened to float32, to the new copy.
    """

    def update(grads, state, params):
        updates, inner_state = inner.update(grads, state.inner, state.master)
        master = optax.apply_updates(state.master, updates)
        return jax.tree.map(jnp.subtract, master, params), MasterState(master, inner_state)

    return optax.GradientTransformation(lambda params: MasterState(params, inner.init(params)), update)

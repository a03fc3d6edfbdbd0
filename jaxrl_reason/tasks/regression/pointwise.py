"""The usual alternative to decoding digits: a regressor with a mean-squared-error head."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxrl_reason import metrics
from jaxrl_reason.data import streams
from jaxrl_reason.tasks.regression.rows import Rows


def pointwise_regressor(
    train: Rows, held_out: Rows, *, width: int, steps: int, batch_size: int, learning_rate: float, seed: int
) -> dict[str, float]:
    """Trains an MLP on the features of a table, for comparison with the policy.

    Args:
      train, held_out: encoded rows; features are read, also if the policy reads rows as text.
      width: of the two hidden layers.
      steps, batch_size, learning_rate: of AdamW with cosine decay to 0, as in the supervised phase.
      seed: of weights and batches.

    Returns:
      `pointwise/rmse`, `pointwise/r2`, `pointwise/spearman` on the held-out rows, in z-scores.
    """
    sizes = [train.numeric.shape[1], width, width, 1]
    keys = jax.random.split(jax.random.key(seed), len(sizes) - 1)
    params = [(jax.random.normal(k, (i, o)) * i**-0.5, jnp.zeros(o)) for k, i, o in zip(keys, sizes[:-1], sizes[1:])]
    optimizer = optax.adamw(optax.cosine_decay_schedule(learning_rate, steps))
    batches = streams.endless(len(train.z), batch_size, seed, shuffle=True)

    @jax.jit
    def update(carry, x, y):
        params, opt_state = carry
        grads = jax.grad(lambda p: jnp.square(_predict(p, x) - y).mean())(params)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    carry = params, optimizer.init(params)
    for i in range(steps):
        chosen = batches[i]
        carry = update(carry, train.numeric[chosen], train.z[chosen])
    scores = metrics.regression_scores(np.asarray(jax.jit(_predict)(carry[0], held_out.numeric)), held_out.z)
    return {f"pointwise/{name}": value for name, value in scores.items()}


def _predict(params, x):
    for i, (w, b) in enumerate(params):
        x = x @ w + b
        x = jax.nn.gelu(x) if i < len(params) - 1 else x
    return x[:, 0]

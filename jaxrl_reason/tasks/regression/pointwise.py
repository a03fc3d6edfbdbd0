"""Regressors to compare with a policy that decodes digits: each predicts one number per row, and learns from squared errors."""

from collections.abc import Callable
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxrl_reason import metrics, models
from jaxrl_reason.data import streams
from jaxrl_reason.models import decoder, reward_model
from jaxrl_reason.tasks.regression.tables import Rows

# (weights, features f32[N, F], key=None, dropout=0.0) -> z-scores f32[N]. With a key, it leaves out that share of hidden units.
Predict = Callable[..., jax.Array]
_DROPOUT = 1  # folded into the seed for the choice of hidden units; the seed itself makes the weights


def least_squares(train: Rows, held_out: Rows) -> dict[str, float]:
    """Fits a linear function with an intercept; returns `least_squares/rmse`, `r2` and `spearman` on the held-out rows."""
    with_one = lambda rows: np.c_[rows.numeric, np.ones(len(rows.z))].astype(np.float64)
    weights, *_ = np.linalg.lstsq(with_one(train), train.z.astype(np.float64), rcond=1e-6)  # columns can be collinear
    return _scores("least_squares", with_one(held_out) @ weights, held_out)


def pointwise_regressor(
    train: Rows, held_out: Rows, validation: Rows | None = None, *, width: int, seed: int, **settings: Any
) -> dict[str, float]:
    """Trains an MLP with two hidden layers on the features, also if the policy reads rows as text.

    Returns `pointwise/rmse`, `pointwise/r2` and `pointwise/spearman` on the held-out rows. For `settings` see `_fit`.
    """
    sizes = [train.numeric.shape[1], width, width, 1]
    keys = jax.random.split(jax.random.key(seed), len(sizes) - 1)
    params = [(jax.random.normal(k, (i, o)) * i**-0.5, jnp.zeros(o)) for k, i, o in zip(keys, sizes[:-1], sizes[1:])]
    found = _fit(_mlp, params, train, validation, seed=seed, **settings)
    return _scores("pointwise", np.asarray(jax.jit(_mlp)(found, held_out.numeric)), held_out)


def squared_error_head(
    train: Rows,
    held_out: Rows,
    validation: Rows | None = None,
    *,
    model: models.ModelConfig,
    begin: int,
    seed: int,
    **settings: Any,
) -> dict[str, float]:
    """Trains the policy's network with one output, which reads the state of the token `begin`, instead of digits.

    Returns `squared_error_head/rmse`, `r2` and `spearman` on the held-out rows. For `settings` see `_fit`.
    """
    network = reward_model.headless(model)

    def predict(params, features, key=None, dropout=0.0):
        tokens = jnp.full((len(features), 1), begin, jnp.int32)
        mask, factors = jnp.ones(tokens.shape, bool), decoder.encoder_dropout(network, key, dropout, len(features))
        hidden, _ = decoder.bind(network, params["decoder"]).prefill(tokens, mask, features, factors)
        return (hidden[:, -1].astype(jnp.float32) * params["score"]).sum(axis=-1)

    params = reward_model.init_params(model, jax.random.key(seed))
    found = _fit(predict, params, train, validation, seed=seed, **settings)
    return _scores("squared_error_head", np.asarray(jax.jit(predict)(found, held_out.numeric)), held_out)


def _fit(
    predict: Predict,
    params: Any,
    train: Rows,
    validation: Rows | None,
    *,
    steps: int,
    batch_size: int,
    learning_rate: float,
    seed: int,
    every: int,
    dropout: float = 0.0,
) -> Any:
    """Minimizes the mean squared error with AdamW and cosine decay to 0, as the supervised phase minimizes cross-entropy.

    Returns the weights after the last step; with validation rows, those of the lowest error on them, measured every
    `every` steps. Each step leaves out a share `dropout` of the hidden units that `predict` has in an MLP on features.
    """
    optimizer = optax.adamw(optax.cosine_decay_schedule(learning_rate, steps))
    batches = streams.endless(len(train.z), batch_size, seed, shuffle=True)
    loss = lambda params, x, y, **options: jnp.square(predict(params, x, **options) - y).mean()
    keys = jax.random.split(jax.random.fold_in(jax.random.key(seed), _DROPOUT), steps)

    def update(carry, batch):
        (params, opt_state), (x, y, key) = carry, batch
        grads = jax.grad(loss)(params, x, y, key=key, dropout=dropout)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), ()

    advance = jax.jit(functools.partial(jax.lax.scan, update))
    error = jax.jit(loss)
    carry, best, lowest = (params, optimizer.init(params)), params, np.inf
    for begin in range(0, steps, every):
        chosen = np.stack([streams.batch_at(batches, i) for i in range(begin, min(begin + every, steps))])
        carry, _ = advance(carry, (train.numeric[chosen], train.z[chosen], keys[begin : begin + every]))
        if validation is None:
            best = carry[0]
        elif (found := float(error(carry[0], validation.numeric, validation.z))) < lowest:
            best, lowest = carry[0], found
    return best


def _mlp(params, x, key=None, dropout=0.0):
    *hidden, (w, b) = params
    for i, (weight, bias) in enumerate(hidden):
        x = jax.nn.gelu(x @ weight + bias)
        if dropout:
            x = x * jax.random.bernoulli(jax.random.fold_in(key, i), 1 - dropout, x.shape) / (1 - dropout)
    return (x @ w + b)[:, 0]


def _scores(name: str, predicted: np.ndarray, held_out: Rows) -> dict[str, float]:
    return {f"{name}/{metric}": x for metric, x in metrics.regression_scores(predicted, held_out.z).items()}

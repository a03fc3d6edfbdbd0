"""How numbers are judged: rewards on the device, predictions with their metrics, and a regressor to compare with."""

from collections.abc import Callable, Sequence
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxrl_reason import metrics
from jaxrl_reason.config import ConfigError
from jaxrl_reason.data import PromptBatch, streams
from jaxrl_reason.rl import hosts
from jaxrl_reason.rl.types import Rollout
from jaxrl_reason.tasks.regression.tables import Rows
from jaxrl_reason.tasks.regression.vocabulary import Digits

REWARDS = ("squared_error", "heavy_tailed")
Scores = tuple[dict[str, jax.Array], dict[str, float]]


class NumberScorer:
    """Computes rewards [P, G] of decoded numbers on the device, in z-scores, by one function and with a `sharding`.

    "squared_error": -(yhat - y)^2. "heavy_tailed": -min((yhat - y)^2, 50), and -100 if the tokens are no number.
    """

    def __init__(
        self, functions: Sequence[str], weights: Sequence[float], digits: Digits, sharding: jax.sharding.NamedSharding
    ):
        if len(functions) != 1 or functions[0] not in REWARDS:
            raise ConfigError(
                f"config.reward.functions is {functions}; a regression run has one reward, {' or '.join(REWARDS)}."
            )
        name = functions[0]
        self.names, self.verdict = (name,), name
        self.weights = {name: float(weights[0]) if weights else 1.0}
        if not self.weights[name] > 0:
            raise ConfigError(f"config.reward.weights is {list(weights)}; the only reward needs a weight above 0.")
        self._sharding = sharding
        self._reward = jax.jit(functools.partial(_reward, name, digits), out_shardings=sharding)

    def __call__(self, rollout: Rollout, batch: PromptBatch) -> Scores:
        """Returns name -> f32[P, G], and no metrics of the host."""
        z = hosts.put_rows(batch.columns["z"], self._sharding, len(rollout.tokens))
        return {self.verdict: self._reward(rollout.tokens, z)}, {}

    def begin(self, rollout: Rollout, batch: PromptBatch) -> Callable[[], Scores]:
        """Returns a function that does the work of `__call__`: no host reward has to be asked first."""
        return functools.partial(self, rollout, batch)

    def check(self, *rows) -> None:
        """Does nothing: a table is checked when it is read."""


def _reward(name: str, digits: Digits, tokens: jax.Array, z: jax.Array) -> jax.Array:
    # The square of a number of the wide alphabets can overflow float32.
    error = jnp.minimum(jnp.square(digits.decode(tokens) - z[:, None]), jnp.finfo(jnp.float32).max)
    if name == "squared_error":
        return -error
    return jnp.where(jnp.isnan(error), -100.0, -jnp.minimum(error, 50.0))


def predict(
    generate: Callable[[PromptBatch], Rollout], batches: Sequence[PromptBatch], digits: Digits
) -> tuple[np.ndarray, np.ndarray]:
    """Returns decoded samples f32[N, K] and targets f32[N], in z-scores; rows of weight 0 are left out."""
    decode = jax.jit(digits.decode)
    samples, targets = [], []
    for batch in batches:
        real = batch.weight > 0
        samples.append(hosts.to_host(decode(generate(batch).tokens))[real])
        targets.append(batch.columns["z"][real])
    return np.concatenate(samples), np.concatenate(targets)


def prediction_metrics(samples: np.ndarray, targets: np.ndarray) -> dict[str, float]:
    """Computes regression scores of mean and median of the samples f32[N, K], and their spread, all in z-scores.

    They are `rmse`, `r2`, `spearman` of the mean; `median_rmse`, ... of the median; `spread`, the mean over rows of the
    standard deviation of the samples; `sample_rmse`, of single samples; and `prompts`.
    """
    samples, targets = samples.astype(np.float64), targets.astype(np.float64)  # a float32 sum can overflow
    mean, median = samples.mean(axis=1), np.median(samples, axis=1)
    return {
        **metrics.regression_scores(mean, targets),
        **{f"median_{name}": x for name, x in metrics.regression_scores(median, targets).items()},
        "spread": float(samples.std(axis=1).mean()),
        "sample_rmse": float(np.sqrt(np.square(samples - targets[:, None]).mean())),
        "prompts": len(targets),
    }


def pointwise_regressor(
    train: Rows, held_out: Rows, *, width: int, steps: int, batch_size: int, learning_rate: float, seed: int
) -> dict[str, float]:
    """Trains an MLP on the features of a table, for comparison with the policy that decodes digits.

    The MLP has two hidden layers, a mean-squared-error head, and AdamW with cosine decay to 0, as in the supervised
    phase. It reads features also if the policy reads rows as text. Returns `pointwise/rmse`, `pointwise/r2` and
    `pointwise/spearman` on the held-out rows, in z-scores.
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

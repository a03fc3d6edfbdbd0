"""How numbers are judged: rewards on the device, and predictions with their metrics."""

from collections.abc import Callable, Sequence
import functools

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_reason import metrics
from jaxrl_reason.config import ConfigError
from jaxrl_reason.data import PromptBatch
from jaxrl_reason.rl import hosts
from jaxrl_reason.rl.types import Rollout
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


_LARGEST = 1e30  # of a squared error: those of the wide alphabets overflow float32, and so would sums over a batch


def _reward(name: str, digits: Digits, tokens: jax.Array, z: jax.Array) -> jax.Array:
    error = jnp.minimum(jnp.square(digits.decode(tokens) - z[:, None]), _LARGEST)
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


FEWER = (1, 8)  # samples per row of the metrics r2@1, r2@8, ...


def prediction_metrics(samples: np.ndarray, targets: np.ndarray, greedy: np.ndarray | None = None) -> dict[str, float]:
    """Computes regression scores of mean and median of the samples f32[N, K], and their spread, all in z-scores.

    They are `rmse`, `r2`, `spearman` of the mean; `median_rmse`, ... of the median; `rmse@8`, `median_rmse@8`, ... of 8
    samples, the mean over the K // 8 disjoint parts of the samples, as for one sample; `greedy_rmse`, ... of greedy
    numbers f32[N], if they are given; `spread`, the mean over rows of the standard deviation of the samples;
    `sample_rmse`, of single samples; and `prompts`.
    """
    samples, targets = samples.astype(np.float64), targets.astype(np.float64)  # a float32 sum can overflow
    whole = _scores_of(samples, targets)
    found, K = dict(whole), samples.shape[1]
    for k in (k for k in FEWER if k < K):
        parts = [_scores_of(samples[:, i : i + k], targets) for i in range(0, K - k + 1, k)]
        found |= {
            f"{name}@{k}": float(np.mean([part[name] for part in parts]))
            for name in whole
            if k > 2 or "median" not in name
        }
    if greedy is not None:
        found |= {f"greedy_{name}": x for name, x in metrics.regression_scores(greedy, targets).items()}
    return {
        **found,
        "spread": float(samples.std(axis=1).mean()),
        "sample_rmse": float(np.sqrt(np.square(samples - targets[:, None]).mean())),
        "prompts": len(targets),
    }


def _scores_of(samples: np.ndarray, targets: np.ndarray) -> dict[str, float]:
    """Returns the scores of the mean and of the median of samples."""
    medians = metrics.regression_scores(np.median(samples, axis=1), targets)
    return metrics.regression_scores(samples.mean(axis=1), targets) | {f"median_{n}": x for n, x in medians.items()}

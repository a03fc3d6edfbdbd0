"""Rewards of decoded numbers, computed on the device."""

from collections.abc import Callable, Sequence
import functools

import jax
import jax.numpy as jnp

from jaxrl_reason.config import ConfigError
from jaxrl_reason.data import PromptBatch
from jaxrl_reason.rl import hosts
from jaxrl_reason.rl.types import Rollout
from jaxrl_reason.tasks.regression.vocabulary import Digits

REWARDS = ("squared_error", "heavy_tailed")
Scores = tuple[dict[str, jax.Array], dict[str, float]]


class NumberScorer:
    """Computes minus the squared error of decoded numbers, in z-scores.

    "squared_error": -(yhat - y)^2. "heavy_tailed": -min((yhat - y)^2, 50), and -100 if the tokens are no number.

    Args:
      functions, weights: as in `config.reward`: exactly one function.
      digits: decodes completions.
      sharding: of the rewards [P, G].
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

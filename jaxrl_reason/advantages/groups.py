"""Statistics of a group, axis 1 of [P, G], and the checks that transformations share."""

import chex
from jax import Array
import jax.numpy as jnp
from jaxtyping import Bool, Float, Shaped

from jaxrl_reason.advantages.types import AdvantageInputs, Advantages, PerCompletion


def has_reward(inputs: AdvantageInputs) -> Bool[Array, "P G"]:
    """Returns False for a completion without a reward, and for one whose score of a reward model is not finite."""
    present = ~jnp.isnan(inputs.rewards)
    return present if inputs.model_scores is None else present & jnp.isfinite(inputs.model_scores)


def is_correct(inputs: AdvantageInputs) -> Bool[Array, "P G"]:
    """Returns the verdicts, by default rewards > 0.5; False for a completion without a reward."""
    verdicts = inputs.rewards > 0.5 if inputs.verdicts is None else inputs.verdicts.astype(bool)
    return verdicts & has_reward(inputs)


def group_tied(x: Shaped[Array, "P G"], present: Bool[Array, "P G"]) -> Bool[Array, "P 1"]:
    """Returns True for a group with fewer than two present values, or with equal ones. No rounding enters."""
    highest = jnp.where(present, x, -jnp.inf).max(axis=1, keepdims=True)
    return highest <= jnp.where(present, x, jnp.inf).min(axis=1, keepdims=True)


def group_deviation(x: PerCompletion, present: Bool[Array, "P G"]) -> tuple[PerCompletion, Float[Array, "P 1"]]:
    """Computes the deviations from the mean of each group, and the standard deviation (n - 1).

    Only present values count; absent ones may hold NaN, and their deviation is 0. Both results are 0 in a tied group.
    Deviations are squared, not values, so [1, 1.00001] has a spread. The unit of the squares is the largest deviation,
    so 1e20 does not overflow.
    """
    count = present.sum(axis=1, keepdims=True)
    live = present & ~group_tied(x, present)
    mean = jnp.where(present, x, 0.0).sum(axis=1, keepdims=True) / jnp.maximum(count, 1)
    deviation = jnp.where(live, x - mean, 0.0)
    largest = jnp.abs(deviation).max(axis=1, keepdims=True)
    unit = jnp.where(largest > 0, largest, 1.0)
    variance = jnp.square(deviation / unit).sum(axis=1, keepdims=True) / jnp.maximum(count - 1, 1)
    return deviation, unit * jnp.sqrt(variance)


def over_tokens(x: Shaped[Array, " P"] | Shaped[Array, "P G"], advantages: Advantages) -> Array:
    """Appends axes of size 1 to x, so that it broadcasts with advantages [P, G] or [P, G, T]."""
    return x.reshape(x.shape + (1,) * (advantages.ndim - x.ndim))


def require_group(name: str, advantages: Array) -> None:
    """Raises ValueError if a group has one completion only."""
    chex.assert_rank(advantages, 2)
    if advantages.shape[1] < 2:
        raise ValueError(
            f"{name} compares the completions of a prompt with each other, and group_size is {advantages.shape[1]}; "
            "it must be at least 2."
        )


def require(name: str, inputs: AdvantageInputs, field: str) -> Array:
    """Returns a field of the inputs. Raises ValueError if it is None."""
    value = getattr(inputs, field)
    if value is None:
        raise ValueError(f"{name} needs AdvantageInputs.{field}, which is None.")
    return value

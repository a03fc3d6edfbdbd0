"""Transformations made of transformations."""

from typing import Any, TypeAlias

import chex
import jax
import jax.numpy as jnp

from jaxrl_reason.advantages.groups import has_reward, over_tokens
from jaxrl_reason.advantages.types import AdvantageInputs, Advantages, AdvantageTransform

State: TypeAlias = tuple[Any, ...]


def chain(*transforms: AdvantageTransform) -> AdvantageTransform:
    """Applies transformations in order, like `optax.chain`.

    The chain starts from `inputs.rewards` if its advantages are None. It sets the advantage of every completion without
    a reward to 0 and stops all gradients. Its state is the tuple of the states of its parts; `update` raises ValueError
    for a state of another length.

    Example:
      >>> inputs = AdvantageInputs(jnp.array([[3.0, 1.0, jnp.nan]]), jnp.ones((1, 3, 4)), values=jnp.array([0.1]))
      >>> print(chain(center_by_group(), scale_by_value()).update(None, ((), ()), inputs)[0])
      [[ 2. -2.  0.]]
    """

    def init() -> State:
        return tuple(t.init() for t in transforms)

    def update(advantages: Advantages | None, state: State, inputs: AdvantageInputs) -> tuple[Advantages, State]:
        chex.assert_rank([inputs.rewards, inputs.completion_mask], [2, 3])
        chex.assert_equal_shape_prefix([inputs.rewards, inputs.completion_mask], 2)
        if len(state) != len(transforms):
            raise ValueError(
                f"The advantage state has {len(state)} parts and the chain {len(transforms)}: another chain made it."
            )
        advantages = jnp.asarray(inputs.rewards if advantages is None else advantages, jnp.float32)
        new = []
        for transform, part in zip(transforms, state):
            advantages, part = transform.update(advantages, part, inputs)
            new.append(part)
        present = over_tokens(has_reward(inputs), advantages)
        return jax.lax.stop_gradient((jnp.where(present, advantages, 0.0), tuple(new)))

    return AdvantageTransform(init, update)


def after(steps: int, transform: AdvantageTransform) -> AdvantageTransform:
    """Applies a transformation from update number `steps` on, and leaves advantages unchanged until then.

    The count of updates is checkpointed state. The transformation's own state changes from the first update on. Raises
    ValueError for negative steps and those beyond int32.

    Example:
      >>> inputs = AdvantageInputs(jnp.array([[1.0, 0.0]]), jnp.ones((1, 2, 3)))
      >>> print(after(1, center_by_group()).update(inputs.rewards, (jnp.int32(1), ()), inputs)[0])
      [[ 0.5 -0.5]]
    """
    if not 0 <= steps < 2**31:
        raise ValueError(f"after: steps is {steps}; it must be at least 0 and at most 2147483647.")
    if steps == 0:
        return transform

    def init() -> State:
        return jnp.int32(0), transform.init()

    def update(advantages: Advantages, state: State, inputs: AdvantageInputs) -> tuple[Advantages, State]:
        count, inner = state
        changed, inner = transform.update(advantages, inner, inputs)
        before = advantages[..., None] if changed.ndim > advantages.ndim else advantages  # `changed` may be per token
        return jnp.where(count >= steps, changed, before), (count + 1, inner)

    return AdvantageTransform(init, update)

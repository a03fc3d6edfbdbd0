"""Rewards that run on the device, traced into the training step: f(tokens, mask, columns) -> rewards float32[P,G].

`tokens` int32[P,G,T] and `mask` [P,G,T] are of completions. The mask is 1 on sampled tokens, a prefix of every row that
includes the end token. Tokens after the mask have any value. `columns` maps names to arrays [P, ...] of the data.
"""

from collections.abc import Callable, Mapping
import functools

import chex
import jax
import jax.numpy as jnp

DeviceReward = Callable[[jax.Array, jax.Array, Mapping[str, jax.Array]], jax.Array]


def match_answer_tokens(marker: tuple[int, ...], *, eos_ids: tuple[int, ...]) -> DeviceReward:
    """Returns a device reward: 1.0 if the tokens between the last marker and the end token are the reference, else 0.0.

    The reference is the column `answer_tokens`, int32[P,A], padded with -1. The ids in `marker` announce the answer,
    for instance the ids of "####"; `eos_ids` end a completion. A tokenizer may merge a space with the text after it, so
    the space between marker and answer is part of the answer: " -3". A completion is incorrect if it has no marker, or
    if it was cut off before an end token.

    Raises ValueError if an argument is empty or has a negative id, or if the marker contains an end token. The returned
    function raises KeyError or AssertionError if the column is missing or a shape is wrong.
    """
    marker, eos_ids = tuple(marker), tuple(eos_ids)
    for name, ids in (("marker", marker), ("eos_ids", eos_ids)):
        if not ids or min(ids) < 0:
            raise ValueError(f"{name} is {ids}; give at least one token id, none negative.")
    if set(marker) & set(eos_ids):
        raise ValueError(f"The marker {marker} contains an end token ({eos_ids}), so no completion could contain it.")

    def reward(completion_tokens: jax.Array, completion_mask: jax.Array, columns: Mapping[str, jax.Array]) -> jax.Array:
        if "answer_tokens" not in columns:
            raise KeyError(
                f"This reward reads the column 'answer_tokens', and the data has {sorted(columns)}; add the column."
            )
        answer = jnp.asarray(columns["answer_tokens"])
        chex.assert_rank([completion_tokens, completion_mask, answer], [3, 3, 2])
        chex.assert_equal_shape([completion_tokens, completion_mask])
        chex.assert_equal_shape_prefix([completion_tokens, answer], 1)
        matches = functools.partial(_matches, marker=marker, eos_ids=eos_ids)
        by_completion = jax.vmap(jax.vmap(matches, in_axes=(0, 0, None)))
        return by_completion(completion_tokens, completion_mask, answer).astype(jnp.float32)

    return reward


def _matches(
    tokens: jax.Array, mask: jax.Array, answer: jax.Array, marker: tuple[int, ...], eos_ids: tuple[int, ...]
) -> jax.Array:
    """Compares one completion, tokens int32[T] and mask [T], with its answer int32[A]. Returns a bool scalar."""
    end = jnp.sum(mask != 0) - 1  # index of the end token; -1 for an empty completion
    ended = (end >= 0) & jnp.isin(tokens[end], jnp.array(eos_ids))
    # Positions at which the marker starts. A match that rolls over the end has a position after `end` and is dropped.
    starts = jnp.stack([jnp.roll(tokens, -offset) == token for offset, token in enumerate(marker)]).all(axis=0)
    position = jnp.arange(tokens.shape[0])
    starts &= position + len(marker) <= end
    found = starts.any()
    begin = jnp.max(jnp.where(starts, position, 0)) + len(marker)
    index = begin + jnp.arange(answer.shape[0])
    agrees = tokens.at[index].get(mode="fill", fill_value=-1) == answer
    length = jnp.sum(answer >= 0)
    return ended & found & (end - begin == length) & (agrees | (answer < 0)).all()

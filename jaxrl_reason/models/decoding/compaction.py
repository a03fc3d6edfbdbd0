"""Moves the completions that still grow together, so that those that have ended cost nothing.

A decoding loop computes a static number of rows. When few of its P x G completions are left, they move into a smaller loop, each with its cache, its
random numbers and a copy of its prompt's keys and values: R prompts of one completion each. Every device moves its own completions, so
nothing crosses devices and the shards stay equal.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxrl_reason.models import sharding
from jaxrl_reason.models.layers import PromptCache


class Rows(NamedTuple):
    """The inputs of P x G completions that decode together."""

    home: Int[Array, "P G"]  # the place of each completion among those that its device began with
    prompt: PromptCache
    noise: Float[Array, "P G T"]  # one uniform number per token
    temperature: Float[Array, "P G"]
    legal: Bool[Array, "#P T V"] | None
    end_at: Int[Array, "P G"] | None  # forced ends, for measurements
    top_k: Int[Array, "P G"] | None = None  # see `sampling.truncate`
    top_p: Float[Array, "P G"] | None = None


def sizes(P: int, G: int, S: int, T: int, halvings: int) -> list[int]:
    """Returns the completions per device of the smaller loops, for P prompts on this device.

    Args:
      P, G, S, T: prompts per device, completions per prompt, tokens per prompt and per completion.
      halvings: how often the number of completions is halved. Sizes with which the caches would need more memory are left out: each
        completion of a smaller loop has its own copy of the prompt.
    """
    rows = [-(-P * G // 2**k) for k in range(1, halvings + 1)]
    return [r for r in sorted(set(rows), reverse=True) if r < P * G and r * (S + T) <= P * (S + G * T)]


def loop_sizes(T: int, cache_pieces: int = 0, halvings: int = -1) -> tuple[int, int]:
    """Returns the pieces of the completions' cache and the halvings of the loop; 0 pieces and -1 halvings: chosen by the length T."""
    halvings = min(3, T // 64) if halvings < 0 else halvings
    # XLA on CPU copies a cache of one piece in every step of a smaller loop.
    return cache_pieces or min(max(T // 128, 2 if halvings else 1), 8), halvings


def first_rows(
    prompt: PromptCache, noise: Array, temperature: Any, legal: Any, end_at: Any, top_k: Any = None, top_p: Any = None
) -> Rows:
    """Returns the rows of the first loop. `temperature`, `top_k` and `top_p` broadcast to [P, G] of the noise [P, G, T]."""
    P, G, _ = noise.shape
    home = jnp.arange(P * G).reshape(P, G) % (P * G // sharding.num_prompt_shards())
    each = lambda x, dtype=jnp.float32: jnp.broadcast_to(jnp.asarray(x, dtype), (P, G))
    k, p = None if top_k is None else each(top_k, jnp.int32), None if top_p is None else each(top_p)
    if legal is not None:  # [T, V] is the same for all prompts
        legal = jnp.asarray(legal).reshape(-1, *legal.shape[-2:])
    return Rows(home, prompt, noise, each(temperature), legal, end_at, k, p)


def most_per_device(busy: Bool[Array, "P G"]) -> Int[Array, ""]:
    """Returns the largest number of True entries that one device holds."""
    return busy.reshape(sharding.num_prompt_shards(), -1).sum(axis=1).max()


def keep(busy: Bool[Array, "P G"], size: int, rows: Rows, state: Any) -> tuple[Rows, Any]:
    """Returns `size` completions per device, as prompts of one completion each: all that are busy, and others.

    Args:
      busy: True for completions that still grow; at most `size` per device.
      rows, state: the inputs, and a tree of arrays [P, G, ...].
    """
    # Legal tokens that all prompts share stay as they are.
    own_legal = rows.legal is not None and rows.legal.shape[0] > 1
    per_prompt = (rows.prompt, rows.legal if own_legal else None)

    def own(_, busy, per_prompt, per_row):
        P, G = busy.shape
        order = jnp.argsort(~busy.reshape(-1), stable=True)[:size]
        of_rows = jax.tree.map(lambda x: jnp.take(x.reshape(P * G, *x.shape[2:]), order, axis=0)[:, None], per_row)
        return jax.tree.map(lambda x: jnp.take(x, order // G, axis=0), per_prompt), of_rows

    inputs = (rows.home, rows.noise, rows.temperature, rows.end_at, rows.top_k, rows.top_p)
    (prompt, legal), ((home, noise, temperature, *others), state) = sharding.by_prompt(own)(
        (), busy, per_prompt, (inputs, state)
    )
    return Rows(home, prompt, noise, temperature, legal if own_legal else rows.legal, *others), state


def put_back(all_rows: Any, rows: Any, home: Int[Array, "R G"]) -> Any:
    """Writes arrays [R, G, ...] of completions into arrays [P, G, ...], each to the place where its completion began."""

    def own(_, all_rows, rows, home):
        put = lambda x, y: (
            x.reshape(-1, *x.shape[2:]).at[home.reshape(-1)].set(y.reshape(-1, *y.shape[2:])).reshape(x.shape)
        )
        return jax.tree.map(put, all_rows, rows)

    return sharding.by_prompt(own)((), all_rows, rows, home)

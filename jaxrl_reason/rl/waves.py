"""Cuts a batch into waves of completions of similar length, so that an update and a scoring pay for tokens and not for padding.

All completions of a device are sorted by length. A wave takes the next ones, as R prompts of one completion each, cut to one of a few lengths
that are compiled. Short completions come first. If the last ones do not fill a wave, they join one of the next length. Every device computes the same
number of waves of each length, with its own completions: the shards do equal work.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from jaxrl_reason.models import sharding

# Memory of the keys and values of a prompt token with their gradients, as a multiple of the activations of a token.
_PROMPT_MEMORY = 3


class Size(NamedTuple):
    """The size of a wave on one device."""

    length: int  # tokens per completion
    rows: int  # completions


class Queue(NamedTuple):
    """Each device's completions in the order of the waves."""

    order: Int[Array, "P G"]  # indices of the device's completions, by length
    longest: Int[Array, " n"]  # the length at each rank, the largest over the devices


class Wave(NamedTuple):
    """The completions of a wave, on all devices together."""

    # Each one's place among the completions of its device; their number if the place in the wave is empty.
    home: Int[Array, "R 1"]
    length: int  # tokens per completion

    def live(self, count: int) -> Bool[Array, "R 1"]:
        """Returns which places hold a completion, of `count` completions per device."""
        return self.home < count


def sizes(P: int, G: int, S: int, T: int, lengths: int, tokens: int, microbatches: int) -> list[Size]:
    """Returns the sizes of waves, the shortest first.

    Args:
      P, G, S, T: prompts per device, completions per prompt, tokens per prompt and per completion.
      lengths: how many, each half of the next.
      tokens: tokens of the completions in a wave of the full length T, rounded down to whole completions, at least one. Shorter waves have more
        completions, such that completions and copies of their prompts have as many tokens.
      microbatches: a wave has at most the completions of one of them.
    """
    rows = max(1, min(tokens // T, P * G // microbatches))
    compiled = sorted({-(-T // 2**k) for k in range(lengths)})
    return [Size(n, min(rows * (S + T) // (S + n), P * G)) for n in compiled]


def prompt_parts(G: int, S: int, T: int, accumulation: int) -> int:
    """Returns into how many parts of equal size an update cuts its prompts, whose keys and values are in memory together.

    It is the smallest divisor of `accumulation` with which the prompts take no more memory than a microbatch of whole groups.
    """
    enough = lambda parts: parts * (S + G * T) >= _PROMPT_MEMORY * accumulation * S
    return next(n for n in range(1, accumulation + 1) if accumulation % n == 0 and (enough(n) or n == accumulation))


def queue(lengths: Int[Array, "P G"]) -> Queue:
    """Sorts each device's completions by their lengths. Completions of length 0 are left out, as many as every device has."""

    def own(_, lengths):
        order = jnp.argsort(lengths.reshape(-1), stable=True)
        return order.reshape(lengths.shape), lengths.reshape(-1)[order].reshape(lengths.shape)

    order, by_rank = sharding.by_prompt(own)((), lengths)
    return Queue(order, by_rank.reshape(sharding.num_prompt_shards(), -1).max(axis=0))


def counts(longest: Any, sizes: Sequence[Size]) -> list[Any]:
    """Returns the number of waves of each size, for the `longest` of a queue or a numpy array like it."""
    total, start, found = longest.size, (longest == 0).sum(), []
    for length, rows in sizes:
        last = length == sizes[-1].length
        found.append(-(-(total - start) // rows) if last else ((longest <= length).sum() - start) // rows)
        start += found[-1] * rows
    return found


def for_each(sizes: Sequence[Size], queue: Queue, body: Callable[[Wave, Any], Any], carry: Any) -> Any:
    """Runs `carry = body(wave, carry)` for all waves and returns the last carry."""
    start = (queue.longest == 0).sum()
    for (length, rows), waves in zip(sizes, counts(queue.longest, sizes)):

        def one(state, start=start, rows=rows, length=length):
            i, carry = state
            return i + 1, body(Wave(_places(queue.order, start + i * rows, rows), length), carry)

        # With full lengths only the last loop runs. Its bound is a constant of the program, which a plan reads.
        most = -(-queue.longest.size // rows) if length == sizes[-1].length else None
        more = lambda state, n=waves, most=most: (state[0] < n) if most is None else (state[0] < n) & (state[0] < most)
        _, carry = jax.lax.while_loop(more, one, (jnp.int32(0), carry))
        start += waves * rows
    return carry


def _places(order: Int[Array, "P G"], start: Int[Array, ""], rows: int) -> Int[Array, "R 1"]:
    def own(start, order):
        ranks = start + jnp.arange(rows)
        index = jnp.take(order.reshape(-1), ranks, mode="clip")
        return jnp.where(ranks < order.size, index, order.size)[:, None]

    return sharding.by_prompt(own)(start, order)


def take(wave: Wave, tree: Any) -> Any:
    """Returns the completions of a wave: arrays [P, G, T, ...] as [R, 1, wave.length, ...], and arrays [P, G] as [R, 1]."""

    def own(_, index, tree):
        pick = lambda x: jnp.take(x.reshape(-1, *x.shape[2:]), index[:, 0], axis=0, mode="clip")[:, None]
        return jax.tree.map(lambda x: pick(x)[:, :, : wave.length] if x.ndim > 2 else pick(x), tree)

    return sharding.by_prompt(own)((), wave.home, tree)


def put(wave: Wave, everything: Any, tree: Any) -> Any:
    """Writes arrays [R, 1, wave.length] or [R, 1] of a wave into arrays [P, G, T] or [P, G], the inverse of `take`."""

    def own(_, index, everything, tree):
        def one(x, y):
            flat = x.reshape(-1, *x.shape[2:])
            at = flat.at[index[:, 0], : wave.length] if x.ndim > 2 else flat.at[index[:, 0]]
            return at.set(y[:, 0], mode="drop").reshape(x.shape)

        return jax.tree.map(one, everything, tree)

    return sharding.by_prompt(own)((), wave.home, everything, tree)


def take_prompts(wave: Wave, G: int, tree: Any) -> Any:
    """Returns the prompt of each completion of a wave: arrays [P, ...] as [R, ...]."""

    def own(_, index, tree):
        return jax.tree.map(lambda x: jnp.take(x, index[:, 0] // G, axis=0, mode="clip"), tree)

    return sharding.by_prompt(own)((), wave.home, tree)


def add_prompts(wave: Wave, G: int, everything: Any, tree: Any) -> Any:
    """Adds arrays [R, ...] of the completions of a wave to arrays [P, ...] of their prompts."""

    def own(_, index, everything, tree):
        add = lambda x, y: x.at[index[:, 0] // G].add(y.astype(x.dtype), mode="drop")
        return jax.tree.map(add, everything, tree)

    return sharding.by_prompt(own)((), wave.home, everything, tree)

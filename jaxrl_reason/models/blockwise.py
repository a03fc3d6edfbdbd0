"""Attention of `prefill` and `extend` block by block, for CPUs and GPUs: one block of scores is in memory at a time.

Loops run over blocks of queries and, for each, over the blocks of keys that one of them sees. A step computes one block
for all prompts, heads and completions. The softmax is accumulated from block to block, and the backward pass computes
the scores again. Queries in blocks are [blocks, P, N, G, C * R, K]: C places with the R query heads of a key head.
"""

import functools
import math
from typing import NamedTuple

import jax
from jax.ad_checkpoint import checkpoint_name
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxrl_reason.models.config import ModelConfig

SAVED = "attention"  # name of the results that the backward pass reads, for policies of `jax.checkpoint`
_NEVER = -1e30  # finite: the result of a query that sees nothing is finite, too
_EVERYWHERE = 2**30  # a window that contains all places
_SIDES = (256, 128, 64, 32)  # places along the side of a block
_SCORES = 2**19  # scores of a block: 2 MiB stay in the cache of a CPU
_SMALL = 2**15  # scores per head that one block of `layers.group_attention` computes as fast


class _Places(NamedTuple):
    """What decides which queries see which keys, in blocks of C places; g is G, or 1 for all completions alike."""

    order: Int[Array, "blocks C"]  # a query sees keys up to its own place in this order
    at: Int[Array, "blocks P g C"] | None  # and, in a sliding layer, from this position less the window
    real: Bool[Array, "blocks P g C"] | None  # False: no query sees the key


class _Keys(NamedTuple):
    """Keys and values in blocks; g is G, or 1 if the completions of a prompt share them."""

    keys: Float[Array, "blocks P N g C K"]
    values: Float[Array, "blocks P N g C K"]


class _Layout(NamedTuple):
    """Who sees whom: places of queries, places and visible blocks of each source of keys, and the window (None: no layer slides)."""

    queries: _Places
    keys: tuple[_Places, ...]
    ranges: tuple[tuple[Int[Array, " query_blocks"], Int[Array, " query_blocks"]], ...]  # first block and end
    window: Int[Array, ""] | None


def pays(T: int, S: int = 0) -> bool:
    """Returns whether blocks are faster than `layers.group_attention` for T queries after a prompt of S keys."""
    return T * (S + T) > _SMALL


def group_attention(
    q: Float[Array, "P G T H K"],
    own: tuple[Float[Array, "P G N K T"], Float[Array, "P G N T K"]],
    own_real: Bool[Array, "P T"] | None = None,
    prompt: tuple[Float[Array, "P N K S"], Float[Array, "P N S K"]] | None = None,
    prompt_real: Bool[Array, "P S"] | None = None,
    *,
    config: ModelConfig,
    sliding: bool | Bool[Array, ""],
    at: Int[Array, "#P #G T"],
    prompt_at: Int[Array, "P S"] | None = None,
) -> Float[Array, "P G T H*K"]:
    """Computes `layers.group_attention` under the masks of `prefill` and `extend`. The softmax and sums are float32.

    Args:
      own: keys and values of the same positions, with N key/value heads. A query sees its own key and earlier ones.
      own_real: True on tokens, which can be anywhere (G = 1). None: all are tokens.
      prompt, prompt_real: keys and values that every query sees, and True on tokens.
      sliding: whether the layer slides, for a model with sliding and global layers.
      at, prompt_at: positions of the queries and of the prompt's keys.
    """
    P, G, T, H, K = q.shape
    N = own[0].shape[2]
    R, dtype = H // N, config.compute_dtype
    side = _side(T, P * G * H)
    window = None
    if config.sliding_window:
        window = jnp.where(jnp.asarray(sliding), config.sliding_window, _EVERYWHERE)

    def in_blocks(keys, values, side) -> _Keys:  # from [P, N, g, K, S] and [P, N, g, S, K]
        return _Keys(*(_cut(x.astype(dtype), 3, side) for x in (keys.swapaxes(3, 4), values)))

    def places(order, at, real, side) -> _Places:
        by_prompt = None if window is None else at, None if real is None else real[:, None]
        return _Places(order.reshape(-1, side), *(None if x is None else _cut(x, 2, side) for x in by_prompt))

    queries = places(jnp.arange(_padded(T, side)), at, own_real, side)
    sources, of = [in_blocks(own[0].swapaxes(1, 2), own[1].swapaxes(1, 2), side)], [queries]
    if prompt is not None:
        S = prompt[0].shape[-1]
        width = _side(S, P * G * H)
        sources.insert(0, in_blocks(prompt[0][:, :, None], prompt[1][:, :, None], width))
        first = jnp.full(_padded(S, width), -1)
        of.insert(0, places(first, None if prompt_at is None else prompt_at[:, None], prompt_real, width))
    layout = _Layout(queries, tuple(of), tuple(_visible_blocks(queries, x, window) for x in of), window)

    q = _cut((q * config.query_scale).astype(dtype).reshape(P, G, T, N, R, K), 2, side)
    q = q.transpose(0, 1, 4, 2, 3, 5, 6).reshape(-1, P, N, G, side * R, K)
    out = _attend(dtype, q, tuple(sources), layout)
    out = out.reshape(-1, P, N, G, side, R, K).transpose(1, 3, 0, 4, 2, 5, 6)
    return out.reshape(P, G, -1, H * K)[:, :, :T]


def _side(places: int, rows: int) -> int:
    """Returns the side of blocks that cover some places with little padding, for `rows` heads of completions."""
    most = next((side for side in _SIDES if rows * side**2 <= _SCORES), _SIDES[-1])
    return 8 * math.ceil(places / math.ceil(places / most) / 8)


def _padded(places: int, side: int) -> int:
    return -(-places // side) * side


def _cut(x: Array, axis: int, side: int) -> Array:
    """Cuts [.., T, ..] into [blocks, .., side, ..], with zeros at the end."""
    T = x.shape[axis]
    x = jnp.pad(x, [(0, _padded(T, side) - T if i == axis else 0) for i in range(x.ndim)])
    return jnp.moveaxis(x.reshape(*x.shape[:axis], -1, side, *x.shape[axis + 1 :]), axis, 0)


def _visible_blocks(queries: _Places, keys: _Places, window) -> tuple[Array, Array]:
    """Returns, per block of queries, the first and the end of the blocks of keys that contain all keys that it sees."""
    low, high = (lambda x: x.min(axis=-1)), (lambda x: x.max(axis=-1))
    row, column = (lambda x: x[:, None]), (lambda x: x[None])  # [query blocks, key blocks, P, g]
    seen = row(high(queries.order)) >= column(low(keys.order))
    if window is not None:
        seen &= (row(low(queries.at)) - column(high(keys.at)) < window).any((2, 3))
    blocks = jnp.arange(seen.shape[1])
    return jnp.where(seen, blocks, len(blocks)).min(1), jnp.where(seen, blocks + 1, 0).max(1)


def _visible(queries: _Places, keys: _Places, window) -> Bool[Array, "#P 1 #G C 1 D"]:
    """Returns which queries of one block see which keys of another."""
    rows, columns = (lambda x: x[:, None, :, :, None, None]), (lambda x: x[:, None, :, None, None, :])
    seen = columns(keys.order[None, None]) <= rows(queries.order[None, None])
    if window is not None:
        seen &= rows(queries.at) - columns(keys.at) < window
    return seen if keys.real is None else seen & columns(keys.real)


def _block(tree, j):
    return jax.tree.map(lambda x: x[j], tree)


def _rows(x: Array, keys: Array) -> Array:
    """Returns queries [P, N, G, M, ..] as [P, N, g, G / g * M, ..], the rows of a product with keys [P, N, g, ..]."""
    return x.reshape(*keys.shape[:3], -1, *x.shape[4:])


def _product(equation: str, x, y, dtype):
    precision = jax.lax.Precision.HIGHEST if dtype == "float32" else None
    return jnp.einsum(equation, x, y, precision=precision, preferred_element_type=jnp.float32)


def _scores(dtype, q, keys, visible):
    """Returns the scores [P, N, G, M, C] of queries [P, N, G, M, K]."""
    s = _product("pngmk,pngck->pngmc", _rows(q, keys), keys, dtype)
    s = s.reshape(*q.shape[:3], visible.shape[3], -1, keys.shape[3])
    return jnp.where(visible, s, _NEVER).reshape(*q.shape[:4], -1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(dtype: str, q: Array, sources: tuple[_Keys, ...], layout: _Layout) -> Array:
    """Computes [blocks, P, N, G, C * R, K], the attention of queries to all sources of keys."""
    return _forward(dtype, q, sources, layout)[0]


def _forward(dtype, q, sources, layout):
    def of_queries(x):
        q, mine, ranges = x

        def add(source, of, j, carry):
            top, total, out = carry
            keys, values = _block(source, j)
            s = _scores(dtype, q, keys, _visible(mine, _block(of, j), layout.window))
            higher = jnp.maximum(top, s.max(axis=-1))
            e, shrink = jnp.exp(s - higher[..., None]), jnp.exp(top - higher)
            seen = _product("pngmc,pngck->pngmk", _rows(e.astype(dtype), keys), values, dtype).reshape(out.shape)
            return higher, total * shrink + e.sum(axis=-1), out * shrink[..., None] + seen

        carry = jnp.full(q.shape[:-1], _NEVER), jnp.zeros(q.shape[:-1]), jnp.zeros(q.shape)
        for source, of, (first, end) in zip(sources, layout.keys, ranges):
            carry = jax.lax.fori_loop(first, end, functools.partial(add, source, of), carry)
        top, total, out = carry
        return out / total[..., None], top + jnp.log(total)

    results = jax.lax.map(of_queries, (q, layout.queries, layout.ranges))
    out, logsumexp = checkpoint_name(results, SAVED)
    return out, (q, sources, layout, out, logsumexp)


def _backward(dtype, residuals, d_out):
    q, sources, layout, out, logsumexp = residuals

    def of_queries(grads, x):
        q, mine, ranges, d_out, out, logsumexp = x
        mean = (d_out * out).sum(axis=-1, keepdims=True)
        d_out = d_out.astype(dtype)

        def add(source, of, columns, j, carry):
            d_q, d_keys, d_values = carry
            keys, values = _block(source, j)
            visible = _visible(mine, _block(of, j), layout.window)
            e = jnp.exp(_scores(dtype, q, keys, visible) - logsumexp[..., None])
            d_e = _product("pngmk,pngck->pngmc", _rows(d_out, keys), values, dtype).reshape(e.shape)
            d_s, e = (_rows(y.astype(dtype), keys) for y in (e * (d_e - mean), e))
            # The rows are contracted as the last axis of one operand and not the last of the other: the fast products on CPU.
            by_key = lambda x, y: _product("pngkm,pngmc->pngkc", x, y, dtype)
            d_q += _product("pngmc,pngck->pngmk", d_s, keys, dtype).reshape(d_q.shape)
            return d_q, d_keys.at[j].add(by_key(columns[0], d_s)), d_values.at[j].add(by_key(columns[1], e))

        d_q, found = jnp.zeros(q.shape), []
        for source, of, (first, end), grad in zip(sources, layout.keys, ranges, grads):
            columns = [_rows(y, source.keys[0]).swapaxes(-1, -2) for y in (q, d_out)]
            d_q, *grad = jax.lax.fori_loop(first, end, functools.partial(add, source, of, columns), (d_q, *grad))
            found.append(tuple(grad))
        return found, d_q

    zeros = [tuple(jnp.zeros(x.swapaxes(-1, -2).shape) for x in source) for source in sources]
    grads, d_q = jax.lax.scan(of_queries, zeros, (q, layout.queries, layout.ranges, d_out, out, logsumexp))
    d_sources = tuple(_Keys(*(x.swapaxes(-1, -2).astype(dtype) for x in grad)) for grad in grads)
    return d_q.astype(dtype), d_sources, None


_attend.defvjp(_forward, _backward)

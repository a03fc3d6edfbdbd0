"""Attention of `prefill` and `extend` by the splash kernels for TPUs: blocks that nobody sees are skipped, scores stay on the chip.

A prompt and its G completions are one sequence of keys, [prompt | completion 1 | ... | completion G], the prompt's tokens at the end of
their part and each completion's at the beginning of its own. What a query sees is then a static function of two places, a sliding
window's distance included. Which places of the prompt hold tokens is not static: that goes through segment ids. Without a prompt it is
causal attention.

The kernels are compiled where the program is lowered for TPUs, and interpreted elsewhere: slow, for tests.
"""

import dataclasses
import functools

import jax
from jax.experimental.pallas.ops.tpu import splash_attention as kernels
import jax.numpy as jnp
from jax.sharding import PartitionSpec
import numpy as np

from jaxrl_reason.models import sharding
from jaxrl_reason.models.config import ModelConfig

_BLOCKS = (512, 384, 256, 128)  # places along a block's side; 128 is what the kernels can at least
_FLOAT32_SIDE = 128  # of float32 operands: larger blocks of these take minutes to compile
_PADDING = 1.125  # a larger block may make the sequence longer by this factor


def group_attention(q, own, own_real=None, prompt=None, prompt_real=None, *, config: ModelConfig, sliding):
    """What `layers.group_attention` computes, under the masks of `prefill` and `extend`.

    On the mesh of `jax.set_mesh`, prompts are split over "slice", "data" and "fsdp" and heads over "tensor", as far as they divide. Where
    no mesh is set, all is on one device.

    Args:
      q: [P, G, T, H, K] queries.
      own: keys [P, G, N, K, T] and values [P, G, N, T, K] of the same positions, N key/value heads: each is seen from itself on.
      own_real: bool[P, T], which of them are tokens, all of these at the end (G = 1); None: all are. Tokens see tokens; the others see
        each other, so that theirs are numbers too.
      prompt: keys [P, N, K, S] and values [P, N, S, K] that every query sees, or None.
      prompt_real: bool[P, S], which of them are tokens, all of these at the end.
      config: of the decoder.
      sliding: bool, Python's or traced: whether this is a sliding layer, where the model has both kinds.

    Returns:
      [P, G, T, H * K] in the dtype of products. The softmax and sums are float32; a TPU multiplies float32 operands as the kernels say,
      which is less exact than `layers.group_attention`.
    """
    P, G, T, H, K = q.shape
    N, S = own[0].shape[2], 0 if prompt is None else prompt[0].shape[-1]
    block = _block_side(S, G, T, config.compute_dtype)
    mask = _GroupMask(-S // block * -block, G, -T // block * -block)
    dtype = config.compute_dtype
    behind = lambda x, axis: _pad(x, axis, (0, mask.T - T))
    ahead = lambda x, axis: _pad(x, axis, (mask.S - S, 0))

    q = behind((q * config.query_scale).astype(dtype), 2).reshape(P, G, mask.T, N, H // N, K)
    q = q.transpose(0, 3, 4, 1, 2, 5).reshape(P, N, H // N, G * mask.T, K)
    keys, values = own[0].swapaxes(3, 4), own[1]  # each [P, G, N, T, K]
    keys, values = (behind(x.astype(dtype), 3).swapaxes(1, 2).reshape(P, N, G * mask.T, K) for x in (keys, values))
    # Behind a completion's end no mask is needed: only what lies there, too, sees it, and that is cut off below.
    own_ids = jnp.ones((P, G * mask.T)) if own_real is None else behind(own_real, 1)
    q_ids = k_ids = own_ids.astype(jnp.int32)
    if prompt is not None:
        prompt = prompt[0].swapaxes(2, 3), prompt[1]
        keys, values = (jnp.concatenate([ahead(a.astype(dtype), 2), b], 2) for a, b in zip(prompt, (keys, values)))
        k_ids = jnp.concatenate([ahead(prompt_real.astype(jnp.int32), 1), k_ids], axis=1)

    run = _on_mesh(functools.partial(_attend, config, mask, block), P, N)
    out = run(q, keys, values, q_ids, k_ids, jnp.asarray(sliding))
    out = out.reshape(P, N, H // N, G, mask.T, K)[..., :T, :]
    return out.transpose(0, 3, 4, 1, 2, 5).reshape(P, G, T, H * K)


def _pad(x, axis, widths):
    return jnp.pad(x, [widths if i == axis else (0, 0) for i in range(x.ndim)])


def _block_side(S: int, G: int, T: int, dtype: str) -> int:
    """The largest side of a block that pads prompt and completions by little more than the smallest does."""
    sides = [side for side in _BLOCKS if dtype == "bfloat16" or side <= _FLOAT32_SIDE]
    padded = lambda side: -(-S // side) * side + G * -(-T // side) * side
    return next(side for side in sides if padded(side) <= _PADDING * padded(_BLOCKS[-1]))


def _on_mesh(run, P: int, N: int):
    """`run` on each device's own prompts and heads: a kernel cannot be partitioned by the compiler."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return run
    prompts, ways = [], 1
    for axis in sharding.RULES["prompts"]:
        if P % (ways * mesh.shape.get(axis, 1)) == 0 and axis in mesh.shape:
            prompts.append(axis)
            ways *= mesh.shape[axis]
    heads = sharding.RULES["kv_heads"]
    heads = heads if N % mesh.shape.get(heads, N + 1) == 0 else None
    split, rows = PartitionSpec(tuple(prompts), heads), PartitionSpec(tuple(prompts))
    # check_vma off: kernels do not say along which axes their results differ.
    specs = (split, split, split, rows, rows, PartitionSpec())
    return jax.shard_map(run, in_specs=specs, out_specs=split, check_vma=False)


def _attend(config, mask, block, q, keys, values, q_ids, k_ids, sliding):
    """q [P, N, R, Q, K], keys and values [P, N, C, K], ids int32[P, Q] and [P, C] -> [P, N, R, Q, K]."""

    def run(window):
        def kernel(interpret, q, keys, values, ids):
            one = _kernel(dataclasses.replace(mask, window=window), q.shape[2], block, interpret)
            over_heads = jax.vmap(one, (0, 0, 0, None))
            return jax.vmap(over_heads)(q, keys, values, kernels.SegmentIds(*ids))

        # Which of the two is known when the program is lowered, perhaps for devices that are not here.
        compiled, interpreted = functools.partial(kernel, False), functools.partial(kernel, True)
        return jax.lax.platform_dependent(q, keys, values, (q_ids, k_ids), tpu=compiled, default=interpreted)

    kinds = set(config.sliding_layers)
    if len(kinds) == 1:
        return run(config.sliding_window)
    return jax.lax.cond(sliding, lambda: run(config.sliding_window), lambda: run(0))


def _kernel(mask: "_GroupMask", heads: int, block: int, interpret: bool):
    """The kernel of `heads` query heads and one key head: (q [R, Q, K], keys [C, K], values [C, K], ids) -> [R, Q, K]."""
    sides = ("block_q", "block_kv", "block_q_dq", "block_kv_dq", "block_q_dkv", "block_kv_dkv", "block_kv_dkv_compute")
    sizes = kernels.BlockSizes(**dict.fromkeys(sides, block))
    masks = kernels.MultiHeadMask([mask] * heads)
    # jax keeps what it learns about a mask, so that this is done once a shape and not once a trace.
    return kernels.make_splash_mqa(masks, block_sizes=sizes, head_shards=1, q_seq_shards=1, interpret=interpret)


@dataclasses.dataclass(frozen=True)
class _GroupMask(kernels.Mask):
    """What the queries [G * T] see of the keys [S + G * T]. Blocks that the kernels ask for divide S and T.

    Attributes:
      S, G, T: places of the prompt, completions, places of each.
      window: places that are seen, a query's own included; 0: all.
    """

    S: int
    G: int
    T: int
    window: int = 0

    @property
    def shape(self):
        return self.G * self.T, self.S + self.G * self.T

    def __getitem__(self, index):
        """bool[queries, keys] of a block."""
        queries, keys = index
        sample, t = divmod(queries.start, self.T)
        if keys.start < self.S:
            distance = self.S + t - keys.start
        elif (keys.start - self.S) // self.T == sample:
            distance = t - (keys.start - self.S) % self.T
        else:
            distance = -self.T  # of another completion
        rows, columns = queries.stop - queries.start, keys.stop - keys.start
        # Farther than any window is as far as that, nearer than any query as near.
        return _band(max(min(distance, columns + self.window), -rows), rows, columns, self.window)

    # With these two, a kernel computes the mask in the blocks that are not empty, in place of reading it.

    @property
    def q_sequence(self):
        """int32[G * T], what `mask_function` is told of a query: its place among all keys or, for a window, completion and place in it."""
        place = np.arange(self.G * self.T, dtype=np.int32)
        return place // self.T << self._bits | place % self.T if self.window else place + self.S

    def mask_function(self, query, key):
        # Other completions' keys are in blocks that are skipped, and need not be told apart.
        if not self.window:
            return key <= query
        sample, t = query >> self._bits, query & (1 << self._bits) - 1
        distance = self.S + t - key
        distance = distance + jnp.where(key < self.S, 0, sample * self.T)
        return (distance >= 0) & (distance < self.window)

    @property
    def _bits(self):
        return self.T.bit_length()


@functools.lru_cache(maxsize=64)
def _band(distance: int, rows: int, columns: int, window: int):
    """bool[rows, columns], True at distances from 0 up to the window; `distance` is that of the first row and column."""
    distances = distance + np.arange(rows)[:, None] - np.arange(columns)
    return (distances >= 0) & (distances < window) if window else distances >= 0

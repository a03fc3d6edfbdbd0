"""Attention of `prefill` and `extend` by the splash kernels for TPUs, which skip blocks that no query sees.

The keys of a prompt and its G completions form one sequence, [prompt | completion 1 | ... | completion G]. Tokens are
at the end of the prompt's part, and at the beginning of each completion's. Whether a query sees a key is then a static
function of their places, also under a sliding window. Segment ids tell which places of the prompt hold tokens. Without
a prompt, attention is causal. Scores stay on the chip. On other devices the kernels are interpreted: slow, for tests.
"""

import dataclasses
import functools
from typing import Any

import jax
from jax.experimental.pallas.ops.tpu import splash_attention as kernels
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float
import numpy as np

from jaxrl_reason.models import sharding
from jaxrl_reason.models.config import ModelConfig

_BLOCKS = (512, 384, 256, 128)  # places along the side of a block; the kernels need at least 128
_FLOAT32_SIDE = 128  # for float32 operands: larger blocks take minutes to compile
_PADDING = 1.125  # a larger block may make the sequence longer by this factor


def group_attention(
    q: Float[Array, "P G T H K"],
    own: tuple[Float[Array, "P G N K T"], Float[Array, "P G N T K"]],
    own_real: Bool[Array, "P T"] | None = None,
    prompt: tuple[Float[Array, "P N K S"], Float[Array, "P N S K"]] | None = None,
    prompt_real: Bool[Array, "P S"] | None = None,
    *,
    config: ModelConfig,
    sliding: bool | Bool[Array, ""],
) -> Float[Array, "P G T H*K"]:
    """Computes `layers.group_attention` under the masks of `prefill` and `extend`, in the dtype of products.

    On the mesh of `jax.set_mesh`, prompts and heads are split as far as its axes divide them. The softmax and sums are
    float32. A TPU multiplies float32 operands less exactly than `layers.group_attention`.

    Args:
      own: keys and values of the same positions, with N key/value heads. A query sees its own key and earlier ones.
      own_real: True on tokens, which must be at the end (G = 1). Padding sees only padding. None: all are tokens.
      prompt, prompt_real: keys and values that every query sees, and True on tokens, which must be at the end.
      sliding: whether the layer slides, for a model with sliding and global layers.
    """
    P, G, T, H, K = q.shape
    N, S = own[0].shape[2], 0 if prompt is None else prompt[0].shape[-1]
    dtype = config.compute_dtype
    block = _block_side(S, G, T, dtype)
    mask = _GroupMask(-S // block * -block, G, -T // block * -block)
    pad_end = lambda x, axis: _pad(x, axis, (0, mask.T - T))
    pad_start = lambda x, axis: _pad(x, axis, (mask.S - S, 0))

    q = pad_end((q * config.query_scale).astype(dtype), 2).reshape(P, G, mask.T, N, H // N, K)
    q = q.transpose(0, 3, 4, 1, 2, 5).reshape(P, N, H // N, G * mask.T, K)
    keys, values = own[0].swapaxes(3, 4), own[1]  # each [P, G, N, T, K]
    keys, values = (pad_end(x.astype(dtype), 3).swapaxes(1, 2).reshape(P, N, G * mask.T, K) for x in (keys, values))
    # Padding after a completion needs no mask: only padding sees it, and the results of padding are cut off below.
    own_ids = jnp.ones((P, G * mask.T)) if own_real is None else pad_end(own_real, 1)
    q_ids = k_ids = own_ids.astype(jnp.int32)
    if prompt is not None:
        assert prompt_real is not None
        prompt = prompt[0].swapaxes(2, 3), prompt[1]
        keys, values = (jnp.concatenate([pad_start(a.astype(dtype), 2), b], 2) for a, b in zip(prompt, (keys, values)))
        k_ids = jnp.concatenate([pad_start(prompt_real.astype(jnp.int32), 1), k_ids], axis=1)

    run = _on_mesh(functools.partial(_attend, config, mask, block), P, N)
    out = run(q, keys, values, q_ids, k_ids, jnp.asarray(sliding)).reshape(P, N, H // N, G, mask.T, K)[..., :T, :]
    return out.transpose(0, 3, 4, 1, 2, 5).reshape(P, G, T, H * K)


def _pad(x, axis, widths):
    return jnp.pad(x, [widths if i == axis else (0, 0) for i in range(x.ndim)])


def _block_side(S: int, G: int, T: int, dtype: str) -> int:
    """Returns the largest side of a block that pads prompt and completions by little more than the smallest side does."""
    sides = [side for side in _BLOCKS if dtype == "bfloat16" or side <= _FLOAT32_SIDE]
    padded = lambda side: -(-S // side) * side + G * -(-T // side) * side
    return next(side for side in sides if padded(side) <= _PADDING * padded(_BLOCKS[-1]))


def _on_mesh(run, P: int, N: int):
    """Returns `run` on each device's own prompts and heads, because the compiler cannot partition a kernel."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return run
    prompts: list[str] = []
    shards = 1
    for axis in sharding.PROMPT_AXES:
        if P % (shards * mesh.shape.get(axis, 1)) == 0 and axis in mesh.shape:
            prompts.append(axis)
            shards *= mesh.shape[axis]
    heads = sharding.RULES["kv_heads"]
    heads = heads if N % mesh.shape.get(heads, N + 1) == 0 else None
    split, rows = PartitionSpec(tuple(prompts), heads), PartitionSpec(tuple(prompts))
    # No check_vma: kernels do not declare along which axes their results vary.
    specs = (split, split, split, rows, rows, PartitionSpec())
    return jax.shard_map(run, in_specs=specs, out_specs=split, check_vma=False)


def _attend(config, mask, block, q, keys, values, q_ids, k_ids, sliding):
    """Computes [P, N, R, Q, K] from q [P, N, R, Q, K], keys and values [P, N, C, K], and ids int32[P, Q] and [P, C]."""

    def run(window):
        def kernel(interpret, q, keys, values, ids):
            one = _kernel(dataclasses.replace(mask, window=window), q.shape[2], block, interpret)
            over_heads = jax.vmap(one, (0, 0, 0, None))
            return jax.vmap(over_heads)(q, keys, values, kernels.SegmentIds(*ids))

        # The choice is made when the program is lowered, perhaps for devices of another machine.
        compiled, interpreted = functools.partial(kernel, False), functools.partial(kernel, True)
        return jax.lax.platform_dependent(q, keys, values, (q_ids, k_ids), tpu=compiled, default=interpreted)

    kinds = set(config.sliding_layers)
    if len(kinds) == 1:
        return run(config.sliding_window)
    return jax.lax.cond(sliding, lambda: run(config.sliding_window), lambda: run(0))


def _kernel(mask: "_GroupMask", heads: int, block: int, interpret: bool):
    """Returns the kernel of `heads` query heads and one key head: (q [R, Q, K], keys [C, K], values [C, K], ids) -> [R, Q, K]."""
    sides = ("block_q", "block_kv", "block_q_dq", "block_kv_dq", "block_q_dkv", "block_kv_dkv", "block_kv_dkv_compute")
    masks = kernels.MultiHeadMask([mask] * heads)
    blocks: dict[str, Any] = dict.fromkeys(sides, block)
    block_sizes = kernels.BlockSizes(**blocks)
    # jax caches its analysis of a mask, so this is done once per shape, not once per trace.
    return kernels.make_splash_mqa(masks, block_sizes=block_sizes, head_shards=1, q_seq_shards=1, interpret=interpret)


@dataclasses.dataclass(frozen=True)
class _GroupMask(kernels.Mask):
    """The mask of queries [G * T] and keys [S + G * T]. The block sides of the kernels divide S and T."""

    S: int  # places of the prompt
    G: int  # completions
    T: int  # places per completion
    window: int = 0  # places that a query sees, its own included; 0: all

    @property
    def shape(self):
        return self.G * self.T, self.S + self.G * self.T

    def __getitem__(self, index):
        queries, keys = index
        sample, t = divmod(queries.start, self.T)
        if keys.start < self.S:
            distance = self.S + t - keys.start
        elif (keys.start - self.S) // self.T == sample:
            distance = t - (keys.start - self.S) % self.T
        else:
            distance = -self.T  # the keys of another completion: not seen
        rows, columns = queries.stop - queries.start, keys.stop - keys.start
        # Distances beyond the window, or before all queries, give equal blocks: clipped, they share a cache entry.
        return _band(max(min(distance, columns + self.window), -rows), rows, columns, self.window)

    @property
    def q_sequence(self):
        """The queries for `mask_function`, int32[G * T]: places among keys or, with a window, completion and place."""
        place = np.arange(self.G * self.T, dtype=np.int32)
        return place // self.T << self._bits | place % self.T if self.window else place + self.S

    def mask_function(self, query, key):
        """Returns whether a query sees a key; keys of other completions are in blocks that are skipped."""
        if not self.window:
            return key <= query
        sample, t = query >> self._bits, query & (1 << self._bits) - 1
        distance = self.S + t - key + jnp.where(key < self.S, 0, sample * self.T)
        return (distance >= 0) & (distance < self.window)

    @property
    def _bits(self):
        return self.T.bit_length()


@functools.lru_cache(maxsize=64)
def _band(distance: int, rows: int, columns: int, window: int):
    """Returns bool[rows, columns], True at distances from 0 to the window; `distance` belongs to the first row and column."""
    distances = distance + np.arange(rows)[:, None] - np.arange(columns)
    return (distances >= 0) & (distances < window) if window else distances >= 0

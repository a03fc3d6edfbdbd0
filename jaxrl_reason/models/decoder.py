"""The decoder: one transformer for all families, in Flax NNX, used functionally.

`bind(config, params)` gives the module over a plain pytree of arrays; everything around it is jax.
Three forwards share the same layers, so that what samples and what trains cannot disagree:

  prefill   prompts [P, S]                     -> hidden [P, S, D] and one KV cache per prompt
  extend    completions [P, G, T] on that cache -> hidden [P, G, T, D]   (training)
  step      one token for each of P x G samples, on that cache and their own   (sampling)
"""

import dataclasses
import functools
from typing import NamedTuple

from flax import nnx
import jax
import jax.numpy as jnp

from jaxrl_reason.models import layers as L
from jaxrl_reason.models import sharding, splash
from jaxrl_reason.models.config import ModelConfig, PROJECTIONS

Params = dict  # a nested dict of arrays


class PromptCache(NamedTuple):
    """Keys and values of P prompts, each computed once and shared by its group.

    With config.attention "splash" each prompt's tokens lie at the end, padding in front of them, wherever the caller had it.
    In `step` (unrolled layers), `keys` and `values` are tuples with an entry a layer, each an array or a `layers.Int8`.
    """

    keys: jax.Array  # [layers, P, kv_heads, head_dim, S], rotated
    values: jax.Array  # [layers, P, kv_heads, S, head_dim]
    mask: jax.Array  # bool[P, S]
    positions: jax.Array  # int32[P, S]
    lengths: jax.Array  # int32[P] real tokens


class SampleCache(NamedTuple):
    """Keys and values of the samples' own tokens, an entry a layer.

    Keys lie as the product with a query wants them: a step of decoding reads all of them for a few rows of queries. Each may
    be a `layers.Int8` with a scale a position.
    """

    keys: tuple[jax.Array, ...]  # [P, G, kv_heads, head_dim, T]
    values: tuple[jax.Array, ...]  # [P, G, kv_heads, T, head_dim]


def _weight(rngs, config, shape, axes, std):
    value = jax.random.normal(rngs.params(), shape, jnp.float32) * std
    return nnx.Param(value.astype(config.param_dtype), axes=axes)


def _constant(config, shape, axes, value):
    return nnx.Param(jnp.full(shape, value, config.param_dtype), axes=axes)


class DecoderLayer(nnx.Module):
    """Attention and MLP. Built with its weights stacked over all layers; called on one slice."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        self.config = c = config
        n, D, F, K = c.layers, c.width, c.mlp_width, c.head_dim
        weight = lambda i, o, axes, scale=1.0: _weight(rngs, c, (n, i, o), ("layers", *axes), scale / i**0.5)
        norm = lambda size, axis: _constant(c, (n, size), ("layers", axis), 1.0 - c.norm_offset)
        residual_scale = (2 * n) ** -0.5  # keeps the residual stream's variance independent of depth
        self.attention_norm = norm(D, "embed")
        self.q = weight(D, c.heads * K, ("embed", "heads"))
        self.k = weight(D, c.kv_heads * K, ("embed", "kv_heads"))
        self.v = weight(D, c.kv_heads * K, ("embed", "kv_heads"))
        self.o = weight(c.heads * K, D, ("heads", "embed"), residual_scale)
        if c.qkv_bias:
            self.q_bias = _constant(c, (n, c.heads * K), ("layers", "heads"), 0.0)
            self.k_bias = _constant(c, (n, c.kv_heads * K), ("layers", "kv_heads"), 0.0)
            self.v_bias = _constant(c, (n, c.kv_heads * K), ("layers", "kv_heads"), 0.0)
        if c.qk_norm:
            self.q_norm = norm(K, "head_dim")
            self.k_norm = norm(K, "head_dim")
        self.mlp_norm = norm(D, "embed")
        self.gate = weight(D, F, ("embed", "mlp"))
        self.up = weight(D, F, ("embed", "mlp"))
        self.down = weight(F, D, ("mlp", "embed"), residual_scale)
        if c.post_norms:
            self.post_attention_norm = norm(D, "embed")
            self.post_mlp_norm = norm(D, "embed")
        for name in c.lora_projections if c.lora_rank else ():
            (_, i, o), (_, of_in, of_out) = getattr(self, name).shape, getattr(self, name).get_metadata()["axes"]
            wide = dataclasses.replace(c, param_dtype="float32")  # what is trained, is so in float32
            a = _weight(rngs, wide, (n, i, c.lora_rank), ("layers", of_in, "rank"), (3 * i) ** -0.5)
            setattr(self, f"{name}_a", a)
            setattr(self, f"{name}_b", _constant(wide, (n, c.lora_rank, o), ("layers", "rank", of_out), 0.0))

    def __call__(self, x, rotary, attend, cache=None, index=None):
        """One layer on x [P, G, T, D].

        Args:
          x: residual stream.
          rotary: (cos, sin), each broadcastable to f32[P, G, T, head_dim / 2].
          attend: queries [P, G, T, H, K] and own keys and values, as returned -> [P, G, T, H * K].
          cache: keys [P, G, N, K, C] and values [P, G, N, C, K] to write this call's into, at `index`
            along C, and to read own positions from; None: own positions are this call's.
          index: int scalar, with cache.

        Returns:
          x, and the keys [P, G, N, K, C] and values [P, G, N, C, K] of the own positions.
        """
        c = self.config
        P, G, T, _ = x.shape
        norm = lambda y, scale: L.rms_norm(y, scale[...], c.norm_eps, c.norm_offset)
        dot = self._dot

        y = norm(x, self.attention_norm)
        q, k, v = dot(y, "q"), dot(y, "k"), dot(y, "v")
        if c.qkv_bias:
            q, k, v = q + self.q_bias[...], k + self.k_bias[...], v + self.v_bias[...]
        q = q.reshape(P, G, T, c.heads, c.head_dim)
        k = k.reshape(P, G, T, c.kv_heads, c.head_dim)
        v = v.reshape(P, G, T, c.kv_heads, c.head_dim)
        if c.qk_norm:
            q, k = norm(q, self.q_norm), norm(k, self.k_norm)
        q, k = L.rotate(q, *rotary), L.rotate(k, *rotary)
        own = k.transpose(0, 1, 3, 4, 2).astype(c.compute_dtype), v.swapaxes(2, 3).astype(c.compute_dtype)
        if cache is not None:
            own = _written(cache, own, index)
        y = dot(attend(q, own), "o").astype(x.dtype)
        x = x + (norm(y, self.post_attention_norm) if c.post_norms else y)

        y = norm(x, self.mlp_norm)
        act = jax.nn.silu if c.activation == "silu" else functools.partial(jax.nn.gelu, approximate=True)
        y = dot(act(dot(y, "gate")) * dot(y, "up"), "down").astype(x.dtype)
        return x + (norm(y, self.post_mlp_norm) if c.post_norms else y), own

    def _dot(self, y, name):
        """y times the matrix of this name, its adapter included."""
        c = self.config
        weight = lambda name: getattr(self, name).get_value()
        out = L.dot(y, weight(name), c.compute_dtype)
        if c.lora_rank and name in c.lora_projections:
            narrow = L.dot(y, weight(f"{name}_a"), c.compute_dtype)
            out += c.lora_scale * L.dot(narrow, weight(f"{name}_b"), c.compute_dtype)
        return out


def _written(cache, own, index):
    """The cache with this call's keys and values at `index`, rounded as it is."""
    write = jax.lax.dynamic_update_slice_in_dim
    if not isinstance(cache[0], L.Int8):
        return write(cache[0], own[0], index, axis=4), write(cache[1], own[1], index, axis=3)
    keys, values = _rounded(*own)
    put = lambda old, new, axis: L.Int8(
        write(old.values, new.values, index, axis), write(old.scale, new.scale, index, 4)
    )
    return put(cache[0], keys, 4), put(cache[1], values, 3)


def _rounded(keys, values):
    """Keys [..., K, C] and values [..., C, K] with a scale [..., 1, C] each."""
    values = L.quantize(values, axis=-1)
    return L.quantize(keys, axis=-2), values._replace(scale=values.scale.swapaxes(-1, -2))


class Decoder(nnx.Module):
    """Embedding, layers (stacked and scanned), final norm, head. See the module's docstring."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        self.config = c = config
        self.embedding = _weight(rngs, c, (c.vocab_size, c.width), ("vocab", "embed"), 0.02)
        self.layers = DecoderLayer(c, rngs)
        self.final_norm = _constant(c, (c.width,), ("embed",), 1.0 - c.norm_offset)
        if not c.tied_embedding:
            self.head = _weight(rngs, c, (c.width, c.vocab_size), ("embed", "vocab"), c.width**-0.5)
        if c.features:
            N, W = c.prefix_length, c.encoder_width
            self.encoder_in = _weight(rngs, c, (c.features, W), ("features", "mlp"), c.features**-0.5)
            self.encoder_in_bias = _constant(c, (W,), ("mlp",), 0.0)
            self.encoder_out = _weight(rngs, c, (W, N, c.width), ("mlp", "prefix", "embed"), W**-0.5)
            self.encoder_out_bias = _constant(c, (N, c.width), ("prefix", "embed"), 0.0)

    # -- the three forwards ------------------------------------------------------------------------

    def prefill(
        self, tokens: jax.Array, mask: jax.Array, features: jax.Array | None = None
    ) -> tuple[jax.Array, PromptCache]:
        """Prompts int[P, S] with mask [P, S] (1 = real; padding anywhere) -> hidden [P, S, D], cache.

        With features f32[P, F], their embeddings stand in front of the tokens, in the cache too (not in hidden).
        """
        mask = mask.astype(bool)
        x = self._embed(tokens[:, None])
        if features is None and self.config.features:
            raise ValueError(f"Prompts carry no features, and model.features is {self.config.features}.")
        if features is not None:
            prefix = self._encode(features).astype(x.dtype)
            x = jnp.concatenate([prefix[:, None], x], axis=2)
            mask = jnp.concatenate([jnp.ones(prefix.shape[:2], bool), mask], axis=1)
        order = None
        if self.config.attention == "splash":
            order = jnp.argsort(mask, axis=1, stable=True)  # padding first
            x = jnp.take_along_axis(x, order[:, None, :, None], axis=2)
            mask = jnp.take_along_axis(mask, order, axis=1)
        positions = jnp.maximum(jnp.cumsum(mask, axis=1) - 1, 0)
        at = positions[:, None]  # one sample a prompt

        def layer(block, x, flags, _):
            return block(x, self._rotary(at, flags), self._attend(at, flags, mask))

        x, (keys, values) = self._scan(layer, x)
        # One sample a prompt: its axis goes.
        keys, values = (sharding.constrain(kv[:, :, 0], "layers", "prompts", "kv_heads") for kv in (keys, values))
        x, cache = x[:, 0], PromptCache(keys, values, mask, positions, mask.sum(axis=1))
        if order is not None:
            x = jnp.take_along_axis(x, jnp.argsort(order, axis=1)[..., None], axis=1)
        return self._final(x[:, -tokens.shape[1] :]), cache

    def extend(self, tokens: jax.Array, prompt: PromptCache) -> jax.Array:
        """Completions int[P, G, T], each after its prompt -> hidden [P, G, T, D].

        Tokens after a completion's end see those before it, and nothing before the end sees them:
        no mask is needed here, the loss leaves them out.
        """
        T = tokens.shape[-1]
        at = (prompt.lengths[:, None] + jnp.arange(T))[:, None]  # [P, 1, T]

        def layer(block, x, flags, kv):
            one = prompt._replace(keys=kv[0], values=kv[1])  # this layer's
            x, _ = block(x, self._rotary(at, flags), self._attend(at, flags, prompt=one))
            return x, ()

        x, _ = self._scan(layer, self._embed(tokens), (prompt.keys, prompt.values))
        return self._final(x)

    def step(
        self, tokens: jax.Array, index: jax.Array, blocks, prompt: PromptCache, cache: SampleCache
    ) -> tuple[jax.Array, SampleCache]:
        """One token int[P, G] a sample, its `index`-th (a scalar) -> hidden [P, G, D], cache.

        `blocks` and the unstacked prompt cache come from `unstack`, called once before the loop.
        """
        at = (prompt.lengths[:, None] + index)[:, None]  # [P, 1, 1]
        places = jnp.arange(cache.keys[0].shape[-1])
        own_at = prompt.lengths[:, None, None] + places  # [P, 1, T]
        x = self._embed(tokens[:, :, None])
        keys, values = [], []
        for i, block in enumerate(blocks):
            flags = self.config.sliding_layers[i]
            own_mask = (places <= index)[None, None, None] & self._window(at, own_at, flags)
            attend = self._plainly(own_mask, at, flags, prompt._replace(keys=prompt.keys[i], values=prompt.values[i]))
            x, (k, v) = block(x, self._rotary(at, flags), attend, (cache.keys[i], cache.values[i]), index)
            keys.append(k)
            values.append(v)
        return self._final(x)[:, :, 0], SampleCache(tuple(keys), tuple(values))

    def unstack(self, prompt: PromptCache, int8: bool = False) -> tuple[list[DecoderLayer], PromptCache]:
        """Layers and prompt KV one by one, matrices cast once: what a decoding loop wants to close over.

        With int8 the layers' matrices are rounded, a scale a column, and the prompt KV, a scale a position.
        """
        c = self.config
        graphdef, stacked = nnx.split(self.layers)
        cast = lambda x: x.astype(c.compute_dtype) if x.ndim == 2 else x
        blocks = [nnx.merge(graphdef, jax.tree.map(lambda x: cast(x[i]), stacked)) for i in range(c.layers)]
        cache = list(zip(prompt.keys, prompt.values))
        if int8:
            for block in blocks:
                for name in PROJECTIONS:
                    setattr(block, name, nnx.Param(L.quantize(getattr(block, name)[...], axis=0)))
            cache = [_rounded(*kv) for kv in cache]
        keys, values = zip(*cache)
        return blocks, prompt._replace(keys=keys, values=values)

    def empty_cache(self, prompts: int, group: int, length: int, int8: bool = False) -> SampleCache:
        c = self.config
        lead = prompts, group, c.kv_heads

        def split(shape, dtype):
            return sharding.constrain(jnp.zeros(shape, dtype), "prompts", None, "kv_heads")

        def zeros(*shape):
            if int8:
                return L.Int8(split((*lead, *shape), jnp.int8), split((*lead, 1, length), jnp.float32))
            return split((*lead, *shape), c.compute_dtype)

        empty = lambda *shape: tuple(zeros(*shape) for _ in range(c.layers))
        return SampleCache(empty(c.head_dim, length), empty(length, c.head_dim))

    def logits(self, hidden: jax.Array) -> jax.Array:
        """hidden [..., D] -> f32[..., V]."""
        return project(hidden, self.head_matrix(), self.config)

    def head_matrix(self, int8: bool = False) -> jax.Array | L.Int8:
        """The output head [D, V]; with int8 rounded, a scale a token."""
        head = self.embedding[...].T if self.config.tied_embedding else self.head[...]
        return L.quantize(head, axis=0) if int8 else head

    # -- parts -------------------------------------------------------------------------------------

    def _embed(self, tokens):
        # Whole rows of the embedding: else the partitioner makes the activations whole, and exchanges those.
        rows = sharding.constrain(self.embedding[...], "vocab", None)
        x = sharding.constrain(rows[tokens], "prompts")
        scale = self.config.embedding_scale
        # Families that scale do it with a factor rounded to the weights' dtype.
        return x if scale == 1.0 else x * jnp.asarray(scale, x.dtype)

    def _encode(self, features):
        """f32[P, F] -> [P, prefix_length, D]: an MLP with one hidden layer."""
        c = self.config
        if not c.features or features.shape[-1] != c.features:
            raise ValueError(f"Prompts carry {features.shape[-1]} features, and model.features is {c.features}.")
        hidden = L.dot(features, self.encoder_in[...], c.compute_dtype) + self.encoder_in_bias[...]
        out = L.dot(jax.nn.gelu(hidden), self.encoder_out[...].reshape(c.encoder_width, -1), c.compute_dtype)
        return out.reshape(-1, c.prefix_length, c.width) + self.encoder_out_bias[...]

    def _final(self, x):
        return L.rms_norm(x, self.final_norm[...], self.config.norm_eps, self.config.norm_offset)

    def _scan(self, layer, x, xs=()):
        """Runs `layer(block, x, sliding, xs slice) -> (x, ys slice)` over the stacked layers."""
        c = self.config
        graphdef, stacked = nnx.split(self.layers)

        def body(x, slices):
            weights, flags, xs = slices
            return layer(nnx.merge(graphdef, weights), x, flags, xs)

        if c.remat == "layer":
            body = jax.checkpoint(body, prevent_cse=False)
        elif c.remat == "dots":
            policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
            body = jax.checkpoint(body, prevent_cse=False, policy=policy)
        return jax.lax.scan(body, x, (stacked, jnp.array(c.sliding_layers), xs))

    def _rotary(self, at, sliding):
        """(cos, sin) at positions; `sliding` is a Python or a traced bool."""
        c = self.config
        if not c.local_rope_theta:
            return L.rotary_angles(at, c, sliding=False)
        local, other = L.rotary_angles(at, c, sliding=True), L.rotary_angles(at, c, sliding=False)
        return jax.tree.map(lambda a, b: jnp.where(sliding, a, b), local, other)

    def _window(self, queries_at, keys_at, sliding):
        """bool[..., queries, keys]: near enough for a sliding layer; one True where nothing slides."""
        c = self.config
        if not c.sliding_window:
            return jnp.ones((1, 1, 1, 1), bool)
        near = queries_at[..., :, None] - keys_at[..., None, :] < c.sliding_window
        return near | jnp.logical_not(sliding)

    def _attend(self, at, sliding, real=None, prompt=None):
        """What a layer calls to attend from positions `at` [P, 1, T], one behind the other, each seen from itself on.

        Args:
          at: positions of the queries and own keys.
          sliding: whether the layer slides, a Python or a traced bool.
          real: bool[P, T], which of them are tokens; None: all.
          prompt: the layer's part of a cache, seen by all of them, or None.
        """
        c = self.config
        if c.attention == "splash":
            kv = () if prompt is None else ((prompt.keys, prompt.values), prompt.mask)
            return lambda q, own: splash.group_attention(q, own, real, *kv, config=c, sliding=sliding)
        # By place, not by position: padding shares its neighbour's position.
        own_mask = jnp.tril(jnp.ones((at.shape[-1],) * 2, bool)) & self._window(at, at, sliding)
        own_mask = own_mask if real is None else own_mask & real[:, None, None, :]
        return self._plainly(own_mask, at, sliding, prompt)

    def _plainly(self, own_mask, at, sliding, prompt=None):
        """`layers.group_attention` under these masks, of queries at positions `at` that see the prompt's tokens."""
        c = self.config
        kv = ()
        if prompt is not None:
            seen = prompt.mask[:, None, None, :] & self._window(at, prompt.positions[:, None], sliding)
            kv = (prompt.keys, prompt.values), seen
        return lambda q, own: L.group_attention(q, own, own_mask, *kv, scale=c.query_scale, dtype=c.compute_dtype)


# -- functions around the module -------------------------------------------------------------------


def project(hidden: jax.Array, head: jax.Array, config: ModelConfig) -> jax.Array:
    """Logits f32[..., V] of hidden [..., D] through the output head [D, V]."""
    return L.dot(hidden, head, config.compute_dtype)


@functools.lru_cache(maxsize=32)
def _abstract(config: ModelConfig):
    return nnx.split(nnx.eval_shape(lambda: Decoder(config, nnx.Rngs(0))))


def abstract_params(config: ModelConfig) -> Params:
    """The weights' shapes and dtypes, as a nested dict of ShapeDtypeStruct; nothing is allocated."""
    return nnx.to_pure_dict(_abstract(config)[1])


def logical_axes(config: ModelConfig) -> Params:
    """The weights' logical axes: a tuple of names a weight, in the structure of the parameters."""
    flat = {path: leaf.get_metadata()["axes"] for path, leaf in nnx.to_flat_state(_abstract(config)[1])}
    return nnx.traversals.unflatten_mapping(flat)


def init_params(config: ModelConfig, key: jax.Array) -> Params:
    """Random weights. Traceable: jit it with output shardings to create them where they live."""
    return nnx.to_pure_dict(nnx.state(Decoder(config, nnx.Rngs(key))))


def bind(config: ModelConfig, params: Params) -> Decoder:
    """The module over these weights (arrays or tracers)."""
    return nnx.merge(_abstract(config)[0], params)


def apply(config: ModelConfig, params: Params, tokens: jax.Array, mask: jax.Array | None = None) -> jax.Array:
    """Plain forward: int[B, S], mask [B, S] (1 = real token, padding on any side) -> f32[B, S, V]."""
    model = bind(config, params)
    mask = jnp.ones(tokens.shape, bool) if mask is None else mask
    hidden, _ = model.prefill(tokens, mask)
    return model.logits(hidden)


def param_count(config: ModelConfig) -> int:
    return sum(x.size for x in jax.tree.leaves(abstract_params(config)))

"""The decoder: one transformer for all families, in Flax NNX, used functionally.

Three forwards share their layers, so sampling and training compute the same log-probabilities:

  prefill   prompts [P, S]                             -> hidden [P, S, D], and one KV cache per prompt
  extend    completions [P, G, T] on that cache        -> hidden [P, G, T, D]    (training)
  step      one token [P, G] on that cache and its own -> hidden [P, G, D]       (sampling)
"""

import functools
from typing import Any

from flax import nnx
import jax
from jax import checkpoint_policies as policies
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int, Key, Shaped

from jaxrl_reason.models import blockwise, sharding, splash
from jaxrl_reason.models import layers as L
from jaxrl_reason.models.config import ModelConfig, PROJECTIONS
from jaxrl_reason.models.decoder_layer import constant_weight, DecoderLayer, normal_weight
from jaxrl_reason.models.layers import PromptCache, SampleCache

Params = dict[str, Any]  # a nested dict of arrays
Head = Float[Array, "D V"] | L.Int8
Blocks = list[DecoderLayer]  # one entry per layer


class Decoder(nnx.Module):
    """Embedding, layers (stacked, and scanned or unrolled), final norm, head. See the docstring of the file."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        self.config = c = config
        self.embedding = normal_weight(rngs, c, (c.vocab_size, c.width), ("vocab", "embed"), 0.02)
        self.layers = DecoderLayer(c, rngs)
        self.final_norm = constant_weight(c, (c.width,), ("embed",), 1.0 - c.norm_offset)
        if not c.tied_embedding:
            self.head = normal_weight(rngs, c, (c.width, c.vocab_size), ("embed", "vocab"), c.width**-0.5)
        if c.features:
            N, W = c.prefix_length, c.encoder_width
            self.encoder_in = normal_weight(rngs, c, (c.features, W), ("features", "mlp"), c.features**-0.5)
            self.encoder_in_bias = constant_weight(c, (W,), ("mlp",), 0.0)
            if c.encoder_layers > 1:
                shape, axes = (c.encoder_layers - 1, W, W), ("layers", "features", "mlp")
                self.encoder_hidden = normal_weight(rngs, c, shape, axes, W**-0.5)
                self.encoder_hidden_bias = constant_weight(c, shape[:2], ("layers", "mlp"), 0.0)
            self.encoder_out = normal_weight(rngs, c, (W, N, c.width), ("mlp", "prefix", "embed"), W**-0.5)
            self.encoder_out_bias = constant_weight(c, (N, c.width), ("prefix", "embed"), 0.0)

    def prefill(
        self,
        tokens: Int[Array, "P S"],
        mask: Shaped[Array, "P S"],
        features: Float[Array, "P F"] | None = None,
        dropout: Float[Array, "P layers W"] | None = None,
    ) -> tuple[Float[Array, "P S D"], PromptCache]:
        """Computes the hidden states of prompts after the final norm, and their cache.

        The mask is 1 on real tokens, which can be anywhere. The embeddings of features precede the tokens, but only in
        the cache. `dropout` has the factors of the hidden units of the encoder, see `encoder_dropout`.
        """
        mask = mask.astype(bool)
        x = self._embed(tokens[:, None])
        if features is None and self.config.features:
            raise ValueError(f"Prompts carry no features, and model.features is {self.config.features}.")
        if features is not None:
            prefix = self._encode(features, dropout).astype(x.dtype)
            x = jnp.concatenate([prefix[:, None], x], axis=2)
            mask = jnp.concatenate([jnp.ones(prefix.shape[:2], bool), mask], axis=1)
        order = None
        if self.config.attention == "splash":
            order = jnp.argsort(mask, axis=1, stable=True)  # padding first
            x = jnp.take_along_axis(x, order[:, None, :, None], axis=2)
            mask = jnp.take_along_axis(mask, order, axis=1)
        positions = jnp.maximum(jnp.cumsum(mask, axis=1) - 1, 0)
        at = positions[:, None]  # one sample per prompt

        def layer(block, x, sliding, _):
            return block(x, self._rotary(at, sliding), self._attend(at, sliding, mask))

        x, (keys, values) = self._scan(layer, x)
        keys, values = (sharding.constrain(kv[:, :, 0], "layers", "prompts", "kv_heads") for kv in (keys, values))
        x, cache = x[:, 0], PromptCache(keys, values, mask, positions, mask.sum(axis=1))
        if order is not None:
            x = jnp.take_along_axis(x, jnp.argsort(order, axis=1)[..., None], axis=1)
        return self._final(x[:, -tokens.shape[1] :]), cache

    def extend(self, tokens: Int[Array, "P G T"], prompt: PromptCache) -> Float[Array, "P G T D"]:
        """Computes the hidden states of completions after the final norm, each completion after its prompt.

        No mask is needed: no token of a completion sees the tokens after its end, and the loss leaves them out.
        """
        T = tokens.shape[-1]
        at = (prompt.lengths[:, None] + jnp.arange(T))[:, None]  # [P, 1, T]

        def layer(block, x, sliding, kv):
            one = prompt._replace(keys=kv[0], values=kv[1])  # of this layer
            x, _ = block(x, self._rotary(at, sliding), self._attend(at, sliding, prompt=one))
            return x, ()

        x, _ = self._scan(layer, self._embed(tokens), (prompt.keys, prompt.values))
        return self._final(x)

    def step(
        self, tokens: Int[Array, "P G"], index: Int[Array, ""], blocks: Blocks, prompt: PromptCache, cache: SampleCache
    ) -> tuple[Float[Array, "P G D"], SampleCache]:
        """Computes the hidden states of tokens at position `index` of completions, and the new cache; see `unstack`."""
        at = (prompt.lengths[:, None] + index)[:, None]  # [P, 1, 1]
        pieces, size = len(cache.keys[0]), cache.keys[0][0].shape[-1]
        places = jnp.arange(pieces * size)
        own_at = prompt.lengths[:, None, None] + places  # [P, 1, T]
        x = self._embed(tokens[:, :, None])
        updated = []
        for i, block in enumerate(blocks):
            sliding = self.config.sliding_layers[i]
            own_mask = (places <= index)[None, None, None] & self._window(at, own_at, sliding)
            one = prompt._replace(keys=prompt.keys[i], values=prompt.values[i])

            def first(n, own_mask=own_mask, sliding=sliding, one=one):
                attend = self._attend_under(own_mask[..., : n * size], at, sliding, one)
                return lambda q, own: attend(q, own[:n])

            # Only the pieces that hold positions up to `index` are read.
            attends = [first(n + 1) for n in range(pieces)]
            attend = lambda q, own, attends=attends: jax.lax.switch(index // size, attends, q, own)
            own = tuple(zip(cache.keys[i], cache.values[i]))
            x, own = block(x, self._rotary(at, sliding), attend if pieces > 1 else attends[0], own, index)
            updated.append(tuple(zip(*own)))
        return self._final(x)[:, :, 0], SampleCache(*zip(*updated))

    def unstack(self, prompt: PromptCache, int8: bool = False) -> tuple[Blocks, PromptCache]:
        """Splits layers and prompt cache into one entry per layer for a decoding loop, and casts matrices once.

        With int8, it also rounds the matrices, with one scale per column, and the cache, with one scale per position.
        """
        c = self.config
        graphdef, stacked = nnx.split(self.layers)
        cast = lambda x: x.astype(c.compute_dtype) if x.ndim == 2 else x
        blocks = [nnx.merge(graphdef, jax.tree.map(lambda x: cast(x[i]), stacked)) for i in range(c.layers)]
        cache: list[Any] = list(zip(prompt.keys, prompt.values))
        if int8:
            for block in blocks:
                for name in PROJECTIONS:
                    setattr(block, name, nnx.Param(L.quantize(getattr(block, name)[...], axis=0)))
            cache = [L.round_to_int8(*kv) for kv in cache]
        keys, values = zip(*cache)
        return blocks, prompt._replace(keys=keys, values=values)

    def empty_cache(self, prompts: int, group: int, length: int, int8: bool = False, pieces: int = 1) -> SampleCache:
        """Makes the cache of `step` before the first token, see `layers.empty_cache`."""
        return L.empty_cache(self.config, prompts, group, length, int8, pieces)

    def head_matrix(self, int8: bool = False) -> Head:
        """Returns the output head; with int8 rounded, with one scale per token of the vocabulary."""
        head = self.embedding[...].T if self.config.tied_embedding else self.head[...]
        return L.quantize(head, axis=0) if int8 else head

    def logits(self, hidden: Float[Array, "*batch D"]) -> Float[Array, "*batch V"]:
        """Returns the logits of hidden states in float32."""
        return project(hidden, self.head_matrix(), self.config)

    def _embed(self, tokens):
        # Gathers whole rows of the embedding. Otherwise the partitioner gathers the activations, which are larger.
        rows = sharding.constrain(self.embedding[...], "vocab", None)
        x = sharding.constrain(rows[tokens], "prompts")
        scale = self.config.embedding_scale
        return x if scale == 1.0 else x * jnp.asarray(scale, x.dtype)  # families round it to the dtype of the weights

    def _encode(self, features, dropout):
        """Returns the embeddings [P, prefix_length, D] of features f32[P, F]: an MLP, with the factors of its hidden units."""
        c = self.config
        if not c.features or features.shape[-1] != c.features:
            raise ValueError(f"Prompts carry {features.shape[-1]} features, and model.features is {c.features}.")
        kept = lambda x, i: x if dropout is None else x * dropout[:, i]
        hidden = L.dot(features, self.encoder_in[...], c.compute_dtype) + self.encoder_in_bias[...]
        hidden = kept(jax.nn.gelu(hidden), 0)
        for i in range(c.encoder_layers - 1):
            weight, bias = self.encoder_hidden[i], self.encoder_hidden_bias[i]
            hidden = kept(jax.nn.gelu(L.dot(hidden, weight, c.compute_dtype) + bias), i + 1)
        out = L.dot(hidden, self.encoder_out[...].reshape(c.encoder_width, -1), c.compute_dtype)
        return out.reshape(-1, c.prefix_length, c.width) + self.encoder_out_bias[...]

    def _final(self, x):
        return L.rms_norm(x, self.final_norm[...], self.config.norm_eps, self.config.norm_offset)

    def _scan(self, layer, x, xs=()):
        """Scans `layer(block, x, sliding, xs slice) -> (x, ys slice)` over the stacked layers."""
        c = self.config
        graphdef, stacked = nnx.split(self.layers)

        def body(x, slices):
            weights, sliding, xs = slices
            return layer(nnx.merge(graphdef, weights), x, sliding, xs)

        if c.remat != "none":
            saved = policies.dots_with_no_batch_dims_saveable, policies.save_only_these_names(blockwise.SAVED)
            policy = policies.save_from_both_policies(*saved) if c.remat == "dots" else None
            body = jax.checkpoint(body, prevent_cse=False, policy=policy)
        xs = stacked, jnp.array(c.sliding_layers), xs
        return jax.lax.scan(body, x, xs, unroll=c.layers if c.unrolled else 1)

    def _rotary(self, at, sliding):
        """Returns cosines and sines at positions; `sliding` is a Python or a traced bool."""
        c = self.config
        if not c.local_rope_theta:
            return L.rotary_angles(at, c, sliding=False)
        local, other = L.rotary_angles(at, c, sliding=True), L.rotary_angles(at, c, sliding=False)
        return jax.tree.map(lambda a, b: jnp.where(sliding, a, b), local, other)

    def _window(self, queries_at, keys_at, sliding):
        """Returns bool[..., queries, keys], True if a key is inside the window; one True if no layer slides."""
        c = self.config
        if not c.sliding_window:
            return jnp.ones((1, 1, 1, 1), bool)
        near = queries_at[..., :, None] - keys_at[..., None, :] < c.sliding_window
        return near | jnp.logical_not(sliding)

    def _attend(self, at, sliding, real=None, prompt=None):
        """Returns the causal attention of a layer, a function of queries and of own keys and values, both at positions `at` [P, 1, T]."""
        c, T = self.config, at.shape[-1]
        kv = () if prompt is None else ((prompt.keys, prompt.values), prompt.mask)
        if c.attention == "splash":
            return lambda q, own: splash.group_attention(q, own, real, *kv, config=c, sliding=sliding)
        if c.attention == "blockwise" and blockwise.pays(T, 0 if prompt is None else prompt.mask.shape[1]):
            places = dict(at=at, prompt_at=None if prompt is None else prompt.positions)
            return lambda q, own: blockwise.group_attention(q, own, real, *kv, config=c, sliding=sliding, **places)
        # By index, not by position: padding shares a position with its neighbour.
        own_mask = jnp.tril(jnp.ones((T, T), bool)) & self._window(at, at, sliding)
        own_mask = own_mask if real is None else own_mask & real[:, None, None, :]
        attend = self._attend_under(own_mask, at, sliding, prompt)
        return lambda q, own: attend(q, (own,))

    def _attend_under(self, own_mask, at, sliding, prompt=None):
        """Returns plain attention of queries at positions `at`, under `own_mask` on pieces of own keys and the window on the prompt's keys."""
        c = self.config
        kv = ()
        if prompt is not None:
            seen = prompt.mask[:, None, None, :] & self._window(at, prompt.positions[:, None], sliding)
            kv = (prompt.keys, prompt.values), seen
        return lambda q, own: L.group_attention(q, own, own_mask, *kv, scale=c.query_scale, dtype=c.compute_dtype)


def project(hidden: Float[Array, "*batch D"], head: Head, config: ModelConfig) -> Float[Array, "*batch V"]:
    """Returns the float32 logits of hidden states through the output head, see `Decoder.head_matrix`."""
    return L.dot(hidden, head, config.compute_dtype)


@functools.lru_cache(maxsize=32)
def _abstract(config: ModelConfig):
    return nnx.split(nnx.eval_shape(lambda: Decoder(config, nnx.Rngs(0))))


def abstract_params(config: ModelConfig) -> Params:
    """Returns the shapes and dtypes of the weights as a nested dict of ShapeDtypeStruct; allocates nothing."""
    return nnx.to_pure_dict(_abstract(config)[1])


def logical_axes(config: ModelConfig) -> Params:
    """Returns the logical axes of the weights, a tuple of names per weight, in the structure of the parameters."""
    flat = {path: leaf.get_metadata()["axes"] for path, leaf in nnx.to_flat_state(_abstract(config)[1])}
    return nnx.traversals.unflatten_mapping(flat)


def param_shardings(config: ModelConfig, mesh: sharding.AnyMesh) -> Params:
    """Returns a NamedSharding per weight, in the structure of the parameters: its logical axes by `sharding.RULES`.

    Raises ValueError if a mesh axis does not divide the dimension that it splits; heads are counted whole.
    """
    counts = {"heads": config.heads, "kv_heads": config.kv_heads}

    def one(axes, shape):
        split = []
        for name, size in zip(axes, shape.shape):
            axis = sharding.RULES[name]
            n = mesh.shape[axis] if axis else 1
            size = counts.get(name, size)
            if size % n:
                fits = [k for k in range(1, size + 1) if size % k == 0]
                near = [*[k for k in fits if k < n][-3:], *[k for k in fits if k > n][:1]]
                raise ValueError(
                    f"mesh.{axis} is {n}, which does not divide the model's {name!r} dimension ({size}); sizes near it that do: {near}."
                )
            split.append(axis if n > 1 else None)
        return NamedSharding(mesh, PartitionSpec(*split))

    return jax.tree.map(one, logical_axes(config), abstract_params(config), is_leaf=lambda x: isinstance(x, tuple))


def init_params(config: ModelConfig, key: Key[Array, ""]) -> Params:
    """Draws random weights. Traceable: under `jax.jit` with output shardings, each device makes its own shards."""
    return nnx.to_pure_dict(nnx.state(Decoder(config, nnx.Rngs(key))))


def encoder_dropout(config: ModelConfig, key: Key[Array, ""], rate: float, P: int) -> Float[Array, "P layers W"] | None:
    """Returns factors of the encoder's hidden units for P prompts: 0 for a share `rate`, 1 / (1 - rate) for the others.

    None, if the rate is 0.
    """
    if not rate:
        return None
    return jax.random.bernoulli(key, 1 - rate, (P, config.encoder_layers, config.encoder_width)) / (1 - rate)


def bind(config: ModelConfig, params: Params) -> Decoder:
    """Returns the module over weights, which are arrays or tracers."""
    return nnx.merge(_abstract(config)[0], params)


def apply(
    config: ModelConfig, params: Params, tokens: Int[Array, "B S"], mask: Shaped[Array, "B S"] | None = None
) -> Float[Array, "B S V"]:
    """Computes logits in float32, without meaning on padding. The mask is 1 on real tokens, which can be anywhere; None: on all."""
    model = bind(config, params)
    return model.logits(model.prefill(tokens, jnp.ones(tokens.shape, bool) if mask is None else mask)[0])


def param_count(config: ModelConfig) -> int:
    """Returns the number of weights."""
    return sum(x.size for x in jax.tree.leaves(abstract_params(config)))

"""The decoder against the float64 reference, and its three forwards against each other."""

import functools

from hypothesis import given, settings
from hypothesis import strategies as st
import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import pytest

from helpers import reference_decoder as reference
from jaxrl_reason import models
from jaxrl_reason.models import layers, ModelConfig, RopeScaling

V = 23
LLAMA3 = dict(kind="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_length=100)


def make(**overrides):
    sizes = dict(vocab_size=V, width=16, layers=3, heads=4, kv_heads=2, mlp_width=24, head_dim=8)
    return ModelConfig(**(sizes | overrides))


# Both windows are shorter than prompts here, and reach back into them from the completion.
GEMMA3 = dict(
    sliding_window=3,
    sliding_period=3,
    local_rope_theta=50.0,
    rope_theta=1000.0,
    qk_norm=True,
    post_norms=True,
    norm_offset=1.0,
    activation="gelu",
    embedding_scale=4.0,
    query_scale=0.3,
    rope_scaling=RopeScaling(kind="linear", factor=8.0),
)
FAMILIES = {
    "llama3": dict(tied_embedding=False, rope_scaling=RopeScaling(**LLAMA3)),
    "qwen2": dict(qkv_bias=True),
    "qwen3": dict(qk_norm=True, tied_embedding=False, rope_theta=1e6),
    "mistral": dict(sliding_window=4, tied_embedding=False),
    "gemma3": GEMMA3,
}
# name: (what differs, what it is compared with)
SWITCHES = {
    "untied": (dict(tied_embedding=False), {}),
    "gelu": (dict(activation="gelu"), {}),
    "rope_theta": (dict(rope_theta=100.0), {}),
    "linear_rope": (dict(rope_scaling=RopeScaling(kind="linear", factor=4.0)), {}),
    "llama3_rope": (dict(rope_scaling=RopeScaling(**LLAMA3)), {}),
    **{
        f"llama3_{name}": (
            dict(rope_scaling=RopeScaling(**LLAMA3 | {name: value})),
            dict(rope_scaling=RopeScaling(**LLAMA3)),
        )
        for name, value in dict(factor=2.0, low_freq_factor=0.3, high_freq_factor=9.0, original_length=30).items()
    },
    "all_slide": (dict(sliding_window=4), {}),
    "window_size": (dict(sliding_window=5), dict(sliding_window=4)),
    "period": (dict(sliding_window=4, sliding_period=3), dict(sliding_window=4)),
    "local_theta": (
        dict(sliding_window=4, sliding_period=2, local_rope_theta=10.0),
        dict(sliding_window=4, sliding_period=2),
    ),
    "scaling_without_local_theta": (
        dict(sliding_window=4, rope_scaling=RopeScaling(kind="linear", factor=4.0)),
        dict(sliding_window=4),
    ),
    "norm_eps": (dict(norm_eps=0.1), {}),
    "post_norms": (dict(post_norms=True), {}),
    "qkv_bias": (dict(qkv_bias=True), {}),
    "qk_norm": (dict(qk_norm=True), {}),
    "default_head_dim": (dict(head_dim=0), {}),
    "one_kv_head": (dict(kv_heads=1), {}),
    "a_kv_head_each": (dict(kv_heads=4), {}),
    "embedding_scale": (dict(embedding_scale=3.0), {}),
    "query_scale": (dict(query_scale=0.9), {}),
}
TOKENS = np.random.default_rng(0).integers(0, V, (2, 11))


# The larger programs run once or twice: half their time would go into optimising them.
jit_once = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


@functools.cache
def jitted(name, config):
    return jax.jit(functools.partial(getattr(models, name), config))


@functools.cache
def logits_of(config):
    run = jit_once(functools.partial(models.apply, config))
    return np.asarray(run(reference.random_params(config), TOKENS))


@pytest.mark.parametrize("name", SWITCHES)
def test_each_switch_matches_the_reference_and_changes_the_output(name):
    new, old = SWITCHES[name]
    config = make(**(old | new))
    logits = logits_of(config)
    assert logits.dtype == np.float32 and logits.shape == (2, 11, V)
    params = reference.float64(reference.random_params(config))
    want = np.array([reference.forward(config, params, row) for row in TOKENS])
    np.testing.assert_allclose(logits, want, atol=2e-4 * np.abs(want).max() / 10)
    assert np.abs(logits - logits_of(make(**old))).max() > 1e-2 * np.abs(want).max() / 10


@pytest.mark.parametrize("name", FAMILIES)
def test_each_family_matches_the_reference(name):
    config = make(**FAMILIES[name])
    params = reference.float64(reference.random_params(config))
    want = np.array([reference.forward(config, params, row) for row in TOKENS])
    logits = jitted("apply", config)(reference.random_params(config), TOKENS)
    np.testing.assert_allclose(logits, want, atol=2e-5 * np.abs(want).max())


def test_norm_offset_is_added_to_the_stored_scale():
    stored = reference.random_params(make())
    shifted = jax.tree_util.tree_map_with_path(lambda path, x: x - ("norm" in str(path)), stored)
    offset = jitted("apply", make(norm_offset=1.0))
    np.testing.assert_allclose(offset(shifted, TOKENS), logits_of(make()), atol=1e-4)
    assert np.abs(np.asarray(offset(stored, TOKENS)) - logits_of(make())).max() > 1


def test_a_later_token_changes_nothing_before_it():
    config = make(**GEMMA3)
    params, run = reference.random_params(config), jitted("apply", config)
    changed = TOKENS.copy()
    changed[:, 7] = (changed[:, 7] + 1) % V
    a, b = np.asarray(run(params, TOKENS)), np.asarray(run(params, changed))
    np.testing.assert_array_equal(a[:, :7], b[:, :7])
    assert (np.abs(a - b)[:, 7:].max(axis=-1) > 1e-3).all()


def test_windows_bound_how_far_back_a_stack_of_sliding_layers_looks():
    config = make(sliding_window=3)  # three layers see 2 positions back each: 6 in all
    params, run = reference.random_params(config), jitted("apply", config)
    changed = TOKENS.copy()
    changed[:, 2] = (changed[:, 2] + 1) % V
    moved = np.abs(np.asarray(run(params, TOKENS)) - np.asarray(run(params, changed))).max(axis=(0, 2))
    assert (moved[2:9] > 1e-5).all() and not moved[:2].any() and not moved[9:].any()


# -- precision and remat ---------------------------------------------------------------------------------------------


def cosine(a, b):
    a, b = (jax.flatten_util.ravel_pytree(reference.float64(t))[0] for t in (a, b))
    return a @ b / np.linalg.norm(a) / np.linalg.norm(b)


@functools.cache
def loss_and_grad(config):
    params = reference.random_params(config, scale=0.2)

    def loss(params):
        logprobs = jax.nn.log_softmax(models.apply(config, params, TOKENS[:, :-1]))
        return -jnp.take_along_axis(logprobs, jnp.asarray(TOKENS)[:, 1:, None], axis=-1).mean()

    return jit_once(jax.value_and_grad(loss))(params)


@pytest.mark.parametrize(
    "dtypes",
    [
        dict(compute_dtype="bfloat16"),
        pytest.param(dict(compute_dtype="bfloat16", param_dtype="bfloat16"), marks=pytest.mark.slow),
    ],
)
def test_bfloat16_is_close_and_its_gradients_are_close(dtypes):
    full, half = make(qkv_bias=True), make(qkv_bias=True, **dtypes)
    (loss, grads), (half_loss, half_grads) = loss_and_grad(full), loss_and_grad(half)
    assert half_loss.dtype == jnp.float32
    assert {str(x.dtype) for x in jax.tree.leaves(half_grads)} == {dtypes.get("param_dtype", "float32")}
    assert abs(half_loss - loss) < 0.03 * loss and half_loss != loss
    assert cosine(grads, half_grads) > 0.99
    # Weight by weight: a product whose backward is wrong does not hide in the norm of the others.
    for path, one in jax.tree_util.tree_leaves_with_path(grads):
        other = dict(jax.tree_util.tree_leaves_with_path(half_grads))[path]
        if "k_bias" not in str(path):  # softmax all but cancels a bias on keys: mostly rounding
            assert cosine(one, other) > 0.97, path
            assert np.linalg.norm(np.asarray(other, np.float64)) == pytest.approx(np.linalg.norm(one), rel=0.1), path


@pytest.mark.parametrize("remat", ["layer", pytest.param("dots", marks=pytest.mark.slow)])
def test_remat_changes_neither_values_nor_gradients(remat):
    (loss, grads), (again, other) = loss_and_grad(make(qkv_bias=True)), loss_and_grad(make(qkv_bias=True, remat=remat))
    np.testing.assert_allclose(again, loss, rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), grads, other)


def test_remat_policies_keep_less_for_the_backward_pass():
    def kept(remat):
        config = make(remat=remat)
        params = models.abstract_params(config)
        _, vjp = jax.eval_shape(lambda p: jax.vjp(lambda p: models.apply(config, p, TOKENS), p), params)
        return sum(x.size for x in jax.tree.leaves(vjp))

    assert kept("layer") < kept("dots") < kept("none")


def test_gradient_agrees_with_finite_differences_of_the_reference():
    config = make(qkv_bias=True)
    params = reference.float64(reference.random_params(config, scale=0.2))
    _, grads = loss_and_grad(config)

    def loss(params):
        logprobs = [reference.log_softmax(reference.forward(config, params, row[:-1])) for row in TOKENS]
        return -np.mean([p[np.arange(10), row[1:]] for p, row in zip(logprobs, TOKENS, strict=True)])

    rng = np.random.default_rng(1)
    for path, grad in jax.tree_util.tree_leaves_with_path(grads):
        direction = rng.normal(size=grad.shape)
        shift = lambda eps: jax.tree_util.tree_map_with_path(
            lambda p, x: x + eps * direction if p == path else x, params
        )
        slope = (loss(shift(1e-6)) - loss(shift(-1e-6))) / 2e-6
        error = 1e-3 * float(np.linalg.norm(grad)) + 1e-6
        assert (np.asarray(grad) * direction).sum() == pytest.approx(slope, abs=error), path


# -- padding ---------------------------------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from(["left", "right", "mixed"]), st.booleans())
def test_padding_anywhere_and_of_any_value_changes_nothing(seed, side, as_int):
    config = make(**GEMMA3)
    params = reference.random_params(config)
    rng = np.random.default_rng(seed)
    B, S = TOKENS.shape
    tokens = rng.integers(0, V, (B, S))
    mask = rng.random((B, S)) < 0.6
    mask[:, rng.integers(S)] = True
    if side != "mixed":
        mask = np.sort(mask, axis=1)[:, :: 1 if side == "left" else -1]
    run = jitted("apply", config)
    logits = np.asarray(run(params, tokens, mask.astype(np.int32) if as_int else mask))
    assert np.isfinite(logits).all()
    other = np.where(mask, tokens, rng.integers(0, V, (B, S)))
    np.testing.assert_array_equal(np.asarray(run(params, other, mask))[mask], logits[mask])
    for row in range(B):
        want = reference.forward(config, reference.float64(params), tokens[row, mask[row]])
        np.testing.assert_allclose(logits[row, mask[row]], want, atol=2e-5 * np.abs(want).max())


# -- the shared prompt -----------------------------------------------------------------------------------------------

P, G, S, T = 3, 4, 6, 5
SHARED = {
    "llama3_qwen": make(**FAMILIES["llama3"] | dict(layers=2, qkv_bias=True)),
    "gemma3": make(**GEMMA3 | dict(sliding_window=4, sliding_period=2, layers=2, tied_embedding=False)),
}


def shared_batch(side):
    rng = np.random.default_rng(3)
    prompts, completions = rng.integers(0, 16, (P, S)), rng.integers(8, V, (P, G, T))
    mask = np.arange(S) < np.array([[6], [2], [4]])
    if side == "left":
        mask = mask[:, ::-1]
    if side == "mixed":
        mask = rng.permuted(mask, axis=1)
    return prompts, np.ascontiguousarray(mask), completions


@functools.cache
def shared_forward(config):
    """Logits [P, G, T, V] after each completion token, from the shared cache; with gradients of a fixed weighting."""

    def logits(params, prompts, mask, completions):
        model = models.bind(config, params)
        _, cache = model.prefill(prompts, mask)
        return model.logits(model.extend(completions, cache))

    def loss(params, weights, *args):
        y = logits(params, *args)
        return (jax.nn.log_softmax(y) * weights).sum(), y

    return jit_once(jax.value_and_grad(loss, has_aux=True))


@functools.cache
def plain_forward(config):
    def loss(params, weights, prompts, mask, completions):
        tokens = jnp.concatenate([jnp.repeat(prompts[:, None], G, axis=1), completions], axis=2)
        mask = jnp.concatenate([jnp.repeat(mask[:, None], G, axis=1), jnp.ones((P, G, T), bool)], axis=2)
        y = models.apply(config, params, tokens.reshape(P * G, S + T), mask.reshape(P * G, S + T))
        y = y[:, S:].reshape(P, G, T, V)
        return (jax.nn.log_softmax(y) * weights).sum(), y

    return jit_once(jax.value_and_grad(loss, has_aux=True))


@pytest.mark.parametrize("side", ["left", "right", "mixed"])
@pytest.mark.parametrize("family", ["gemma3", pytest.param("llama3_qwen", marks=pytest.mark.slow)])
def test_completions_on_the_shared_prompt_equal_the_plain_forward_in_value_and_gradient(family, side):
    config = SHARED[family]
    params = reference.random_params(config, scale=0.2)
    batch = shared_batch(side)
    weights = np.random.default_rng(4).normal(size=(P, G, T, V)).astype(np.float32) / (P * G * T * V) ** 0.5
    (_, logits), grads = shared_forward(config)(params, weights, *batch)
    (_, plain), plain_grads = plain_forward(config)(params, weights, *batch)
    np.testing.assert_allclose(logits, plain, atol=1e-5 * np.abs(plain).max())
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5 * max(1.0, float(np.abs(b).max()))), grads, plain_grads
    )
    prompts, mask, completions = batch
    for p in range(P):  # the first prompt's first sample, and so on: the reference is slow
        row = np.concatenate([prompts[p, mask[p]], completions[p, p]])
        want = reference.forward(config, reference.float64(params), row)[-T:]
        np.testing.assert_allclose(logits[p, p], want, atol=2e-5 * np.abs(want).max())


def test_every_weight_gets_gradient_through_the_prompt():
    config = SHARED["gemma3"]
    params, (prompts, mask, completions) = reference.random_params(config, scale=0.2), shared_batch("left")
    outside = np.setdiff1d(prompts[mask], completions)  # tokens that stand in prompts only
    assert outside.size
    weights = np.random.default_rng(4).normal(size=(P, G, T, V)).astype(np.float32)
    _, grads = shared_forward(config)(params, weights, prompts, mask, completions)
    assert (np.abs(np.asarray(grads["embedding"])[outside]).max(axis=1) > 1e-4).all()
    unseen = np.setdiff1d(np.arange(V), np.concatenate([prompts[mask], completions.ravel()]))
    assert not np.asarray(grads["embedding"])[unseen].any()


@pytest.mark.parametrize("side", ["left", "right", "mixed"])
@pytest.mark.parametrize("family", ["gemma3", pytest.param("llama3_qwen", marks=pytest.mark.slow)])
def test_decoding_token_by_token_equals_extending_at_every_position(family, side):
    config = SHARED[family]
    params = reference.random_params(config, scale=0.2)
    batch = shared_batch(side)
    (_, want), _ = shared_forward(config)(params, np.zeros((P, G, T, V), np.float32), *batch)
    logits, cache = step_through(config)(params, *batch)
    np.testing.assert_allclose(logits, want, atol=1e-5 * np.abs(want).max())
    assert cache.keys[0].shape == (P, G, config.kv_heads, config.head_dim, T + 2)


@functools.cache
def step_through(config):
    @jit_once
    def run(params, prompts, mask, completions):
        model = models.bind(config, params)
        _, prompt = model.prefill(prompts, mask)
        blocks, prompt = model.unstack(prompt)
        # The cache holds garbage where nothing is written yet, and more places than are used.
        cache = jax.tree.map(lambda x: x + 100.0, model.empty_cache(P, G, T + 2))

        def body(cache, t):
            hidden, cache = model.step(completions[:, :, t], t, blocks, prompt, cache)
            return cache, model.logits(hidden)

        cache, logits = jax.lax.scan(body, cache, jnp.arange(T))
        return jnp.moveaxis(logits, 0, 2), cache

    return run


def test_sliding_windows_reach_from_the_completion_into_the_prompt_and_no_further():
    config = make(sliding_window=3, layers=1, tied_embedding=False)
    params = reference.random_params(config)
    prompts, _, completions = shared_batch("left")
    mask = np.ones((P, S), bool)

    def run(prompts):
        return np.asarray(logits_on_cache(config)(params, prompts, mask, completions))

    for place, reaches in ((S - 1, 2), (S - 2, 1), (S - 3, 0)):  # completion positions that see this prompt token
        changed = prompts.copy()
        changed[:, place] = (changed[:, place] + 1) % V
        moved = np.abs(run(changed) - run(prompts)).max(axis=(0, 1, 3))
        assert (moved[:reaches] > 1e-3).all() and not moved[reaches:].any(), place


@functools.cache
def logits_on_cache(config):
    @jax.jit
    def run(params, prompts, mask, completions):
        model = models.bind(config, params)
        _, cache = model.prefill(prompts, mask)
        return model.logits(model.extend(completions, cache))

    return run


# -- group attention -------------------------------------------------------------------------------------------------


def naive_attention(q, own, own_mask, prompt, prompt_mask, scale):
    """Every query meets its prompt's and its own keys in one list; float64, in loops."""
    (Pn, Gn, Tn, H, K), N = q.shape, own[0].shape[2]
    out = np.zeros((Pn, Gn, Tn, H, K))
    for p, g, t, h in np.ndindex(Pn, Gn, Tn, H):
        n = h // (H // N)
        keys, values, see = own[0][p, g, n], own[1][p, g, n], own_mask[p, g, t]
        if prompt is not None:
            keys, values = np.concatenate([prompt[0][p, n], keys]), np.concatenate([prompt[1][p, n], values])
            see = np.concatenate([prompt_mask[p, g, t], see])
        scores = np.where(see, keys @ q[p, g, t, h] * scale, -np.inf)
        out[p, g, t, h] = np.exp(reference.log_softmax(scores)) @ values
    return out.reshape(Pn, Gn, Tn, H * K)


@pytest.mark.parametrize("shape", [(2, 3, 4, 4, 2, 6, 4, 5), (3, 1, 2, 3, 3, 2, 2, 1), (1, 4, 1, 4, 1, 4, 3, 7)])
@pytest.mark.parametrize("with_prompt", [True, False])
def test_group_attention_equals_attention_over_one_list_of_keys(shape, with_prompt):
    Pn, Gn, Tn, H, N, K, C, Sn = shape
    rng = np.random.default_rng(5)
    draw = lambda *s: rng.normal(size=s).astype(np.float32)
    q, own = draw(Pn, Gn, Tn, H, K), (draw(Pn, Gn, N, C, K), draw(Pn, Gn, N, C, K))
    prompt = (5 * draw(Pn, N, Sn, K), draw(Pn, N, Sn, K)) if with_prompt else None
    own_mask, prompt_mask = rng.random((Pn, Gn, Tn, C)) < 0.5, rng.random((Pn, Gn, Tn, Sn)) < 0.5
    own_mask[..., 0] |= ~(own_mask.any(axis=-1) | (with_prompt & prompt_mask.any(axis=-1)))  # all see something
    run = jax.jit(functools.partial(layers.group_attention, scale=0.7, dtype="float32"))
    lying = lambda kv: kv and (kv[0].swapaxes(-1, -2), kv[1])  # keys as the product wants them
    got = run(q, lying(own), own_mask, lying(prompt), prompt_mask if with_prompt else None)
    np.testing.assert_allclose(got, naive_attention(q, own, own_mask, prompt, prompt_mask, 0.7), atol=2e-5)


def test_group_attention_shifts_scores_without_overflow():
    one = np.ones((1, 1, 1, 1, 2), np.float32)
    keys = 300 * one.swapaxes(-1, -2)
    own, prompt = (keys, 1 * one), (keys[:, 0], 3 * one[:, 0])
    see = np.ones((1, 1, 1, 1), bool)
    run = jax.jit(functools.partial(layers.group_attention, scale=1.0, dtype="float32"))
    np.testing.assert_allclose(run(100 * one, own, see, prompt, see), [[[[2, 2]]]])  # scores of 60000, equal: the mean
    nothing = run(one, own, ~see, prompt, ~see)
    assert np.isfinite(nothing).all()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_float32_products_are_float32_on_every_accelerator(dtype):
    """Where nothing is asked for, they would be bfloat16 or TF32."""
    config = make(compute_dtype=dtype)
    forward = lambda params, tokens: models.apply(config, params, tokens)
    jaxpr = str(jax.make_jaxpr(forward)(models.abstract_params(config), jax.ShapeDtypeStruct((2, 3), "int32")))
    products = jaxpr.count("dot_general[")
    assert products >= 8
    assert jaxpr.count("precision=(Precision.HIGHEST, Precision.HIGHEST)") == products * (dtype == "float32")


# -- the abstract description ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_one_description_serves_initialisation_axes_and_counts(family):
    config = make(**FAMILIES[family], param_dtype="bfloat16")
    abstract = models.abstract_params(config)
    params = jax.eval_shape(functools.partial(models.init_params, config), jax.random.key(0))
    shapes = lambda tree: jax.tree.map(lambda x: (x.shape, str(x.dtype)), tree)
    assert shapes(params) == shapes(abstract)
    assert {str(x.dtype) for x in jax.tree.leaves(params)} == {"bfloat16"}
    axes = models.logical_axes(config)
    lengths = jax.tree.map(len, axes, is_leaf=lambda x: isinstance(x, tuple))
    assert lengths == jax.tree.map(lambda x: len(x.shape), abstract)
    sizes = dict(layers=3, vocab=V, embed=16, mlp=24, head_dim=8, heads=32, kv_heads=16)
    jax.tree.map(
        lambda names, x: np.testing.assert_array_equal([sizes[n] for n in names], x.shape),
        axes,
        abstract,
        is_leaf=lambda x: isinstance(x, tuple),
    )
    per_layer = 16 * (32 + 16 + 16) + 32 * 16 + 3 * 16 * 24 + 2 * 16
    per_layer += (32 + 16 + 16) * config.qkv_bias + 2 * 8 * config.qk_norm + 2 * 16 * config.post_norms
    total = 3 * per_layer + 16 + V * 16 * (1 if config.tied_embedding else 2)
    assert models.param_count(config) == total


def test_initial_weights_follow_their_key_and_norms_start_at_one():
    config = make(**GEMMA3, tied_embedding=False)
    init = jit_once(functools.partial(models.init_params, config))
    a, b, c = init(jax.random.key(0)), init(jax.random.key(0)), init(jax.random.key(1))
    jax.tree.map(np.testing.assert_array_equal, a, b)
    for name in ("q", "k", "v", "o", "gate", "up", "down"):
        w = np.asarray(a["layers"][name])
        assert (w != np.asarray(c["layers"][name])).mean() > 0.99
        assert np.abs(np.corrcoef(w.reshape(3, -1)) - np.eye(3)).max() < 0.25, "layers start alike"
    assert not np.array_equal(a["embedding"].T, a["head"])
    for name in ("attention_norm", "mlp_norm", "q_norm", "k_norm", "post_attention_norm", "post_mlp_norm"):
        assert not np.asarray(a["layers"][name]).any()  # norm_offset is 1: stored as scale - 1
    # Normed activations of size ~1 keep it through a projection.
    assert np.asarray(a["layers"]["q"]).std() == pytest.approx(16**-0.5, rel=0.1)


@pytest.mark.parametrize(
    "overrides, named",
    [
        (dict(heads=3), "heads"),
        (dict(layers=0), "layers"),
        (dict(vocab_size=0), "vocab_size"),
        (dict(head_dim=7), "head_dim"),
        (dict(head_dim=0, width=18), "width"),
        (dict(activation="relu"), "activation"),
        (dict(remat="all"), "remat"),
        (dict(param_dtype="float16"), "param_dtype"),
        (dict(compute_dtype="f32"), "compute_dtype"),
        (dict(sliding_period=2), "sliding_period"),
        (dict(local_rope_theta=1e4), "local_rope_theta"),
    ],
)
def test_a_wrong_configuration_is_refused_by_a_sentence_that_names_the_field(overrides, named):
    with pytest.raises(ValueError, match=rf"model\.{named}.*\.$"):
        make(**overrides)


@pytest.mark.parametrize(
    "overrides, named",
    [
        (dict(sliding_window=-1), "sliding_window"),
        (dict(rope_theta=0.0), "rope_theta"),
        (dict(head_dim=-2), "head_dim"),
        (dict(norm_eps=-1.0), "norm_eps"),
    ],
)
def test_values_that_could_only_give_nan_or_nothing_are_refused(overrides, named):
    with pytest.raises(ValueError, match=rf"model\.{named}"):
        make(**overrides)


@pytest.mark.parametrize(
    "wrong, named",
    [
        (dict(kind="yarn", factor=2.0), "kind"),
        (dict(kind="linear", factor=0.0), "factor"),
    ],
)
def test_a_wrong_rope_scaling_is_refused(wrong, named):
    with pytest.raises(ValueError, match=rf"rope_scaling\.{named}"):
        RopeScaling(**wrong)


def test_sliding_layers_follow_the_period():
    assert make(layers=6, sliding_window=2, sliding_period=3).sliding_layers == (True, True, False) * 2
    assert make(sliding_window=2).sliding_layers == (True,) * 3
    assert make().sliding_layers == (False,) * 3

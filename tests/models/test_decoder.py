"""Tests the decoder against the float64 reference, and its three forwards against each other."""

import functools

from hypothesis import given, settings
from hypothesis import strategies as st
import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import pytest

from helpers import reference_decoder as reference
from helpers.tiny_decoders import FAMILIES, GEMMA3, jit_once, LLAMA3, make, V
from jaxrl_reason import models
from jaxrl_reason.models import RopeScaling

# name: (the switch under test, the switches of both decoders of the comparison)
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


@functools.cache
def jitted(name, config):
    return jax.jit(functools.partial(getattr(models, name), config))


@functools.cache
def logits_of(config):
    run = jit_once(functools.partial(models.apply, config))
    return np.asarray(run(reference.random_params(config), TOKENS))


@pytest.mark.runs
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


def test_sliding_windows_bound_the_reach_of_a_stack_of_layers():
    config = make(sliding_window=3)  # each of three layers sees 2 positions back, 6 in all
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


@pytest.mark.runs
@pytest.mark.parametrize(
    "dtypes",
    [
        dict(compute_dtype="bfloat16"),
        pytest.param(dict(compute_dtype="bfloat16", param_dtype="bfloat16"), marks=pytest.mark.slow),
    ],
)
def test_bfloat16_values_and_gradients_are_close(dtypes):
    full, half = make(qkv_bias=True), make(qkv_bias=True, **dtypes)
    (loss, grads), (half_loss, half_grads) = loss_and_grad(full), loss_and_grad(half)
    assert half_loss.dtype == jnp.float32
    assert {str(x.dtype) for x in jax.tree.leaves(half_grads)} == {dtypes.get("param_dtype", "float32")}
    assert abs(half_loss - loss) < 0.03 * loss and half_loss != loss
    assert cosine(grads, half_grads) > 0.99
    # Each weight is compared by itself. The norm of the others would hide an incorrect backward pass of one product.
    for path, one in jax.tree_util.tree_leaves_with_path(grads):
        other = dict(jax.tree_util.tree_leaves_with_path(half_grads))[path]
        if "k_bias" not in str(path):  # softmax nearly cancels a bias on keys, whose gradient is mostly rounding
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
def test_place_and_value_of_padding_change_nothing(seed, side, as_int):
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
        assert not np.asarray(a["layers"][name]).any()  # norm_offset is 1, so scale - 1 is stored
    # Normed activations keep their size of about 1 through a projection.
    assert np.asarray(a["layers"]["q"]).std() == pytest.approx(16**-0.5, rel=0.1)

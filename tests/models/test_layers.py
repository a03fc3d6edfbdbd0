"""Tests group attention against attention over one list of keys, and the precision of products."""

import functools

import jax
import numpy as np
import pytest

from helpers import reference_decoder as reference
from helpers.tiny_decoders import make
from jaxrl_reason import models
from jaxrl_reason.models import layers


def naive_attention(q, own, own_mask, prompt, prompt_mask, scale):
    """Computes attention of each query over one list of its prompt's and its own keys, in float64 and in loops."""
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
    own_mask[..., 0] |= ~(own_mask.any(axis=-1) | (with_prompt & prompt_mask.any(axis=-1)))  # every query sees a key
    run = jax.jit(functools.partial(layers.group_attention, scale=0.7, dtype="float32"))
    transposed = lambda kv: kv and (kv[0].swapaxes(-1, -2), kv[1])  # the keys have the layout of the product
    cut = C // 2
    pieces = lambda kv: [
        p for p in ((kv[0][..., :cut], kv[1][..., :cut, :]), (kv[0][..., cut:], kv[1][..., cut:, :])) if p[0].size
    ]
    got = run(q, pieces(transposed(own)), own_mask, transposed(prompt), prompt_mask if with_prompt else None)
    np.testing.assert_allclose(got, naive_attention(q, own, own_mask, prompt, prompt_mask, 0.7), atol=2e-5)


def test_group_attention_of_large_scores_does_not_overflow():
    one = np.ones((1, 1, 1, 1, 2), np.float32)
    keys = 300 * one.swapaxes(-1, -2)
    own, prompt = (keys, 1 * one), (keys[:, 0], 3 * one[:, 0])
    see = np.ones((1, 1, 1, 1), bool)
    run = jax.jit(functools.partial(layers.group_attention, scale=1.0, dtype="float32"))
    np.testing.assert_allclose(
        run(100 * one, (own,), see, prompt, see), [[[[2, 2]]]]
    )  # equal scores of 60000 give the mean of the values
    nothing = run(one, (own,), ~see, prompt, ~see)
    assert np.isfinite(nothing).all()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_float32_products_are_float32_on_every_accelerator(dtype):
    """By default, the products would be bfloat16 or TF32."""
    config = make(compute_dtype=dtype)
    forward = lambda params, tokens: models.apply(config, params, tokens)
    jaxpr = str(jax.make_jaxpr(forward)(models.abstract_params(config), jax.ShapeDtypeStruct((2, 3), "int32")))
    products = jaxpr.count("dot_general[")
    assert products >= 8
    assert jaxpr.count("precision=(Precision.HIGHEST, Precision.HIGHEST)") == products * (dtype == "float32")

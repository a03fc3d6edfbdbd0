"""Tests blockwise against plain attention: values and gradients in float32 to 1e-5 of the largest entry."""

import dataclasses
import functools
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from helpers import reference_decoder as reference
from helpers.tiny_decoders import make
from helpers.tiny_runs import tiny
from jaxrl_reason import models
from jaxrl_reason.config import ConfigError
from jaxrl_reason.models import blockwise, layers
from jaxrl_reason.models.decoding.rollout import generate
from jaxrl_reason.rl import devices
from jaxrl_reason.rl.scoring import compute_logprobs
from jaxrl_reason.rl.types import Rollout

pytestmark = pytest.mark.usefixtures("quick_compilation")

P, G, T, S = 2, 3, 20, 13


@pytest.fixture
def blocks_of_8(monkeypatch):
    monkeypatch.setattr(blockwise, "_SIDES", (8,))
    monkeypatch.setattr(blockwise, "_SMALL", 0)


def example(heads=4, kv_heads=2, completions=G, prompt=True, padded=False, **config):
    """Returns a decoder, q, keys and values, also of the prompt, and the other arguments of `group_attention`."""
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    c = make(heads=heads, kv_heads=kv_heads, head_dim=4, **config)
    K, N, g = c.head_dim, kv_heads, completions
    arrays = [draw(P, g, T, heads, K), draw(P, g, N, K, T), draw(P, g, N, T, K)]
    others = {"at": np.broadcast_to(np.arange(T), (P, 1, T))}
    if padded:
        others["own_real"] = rng.random((P, T)) < 0.6
        others["own_real"][:, 0] = True  # every query sees a key
        others["at"] = np.maximum(np.cumsum(others["own_real"], axis=1) - 1, 0)[:, None]
    if prompt:
        arrays += [draw(P, N, K, S), draw(P, N, S, K)]
        others["prompt_real"] = rng.random((P, S)) < [[0.8], [0.3]]
        others["prompt_at"] = np.maximum(np.cumsum(others["prompt_real"], axis=1) - 1, 0)
        others["at"] = others["at"] + others["prompt_real"].sum(axis=1)[:, None, None]
    return c, arrays, others


def plain(c, sliding, arrays, at, own_real=None, prompt_real=None, prompt_at=None):
    """Computes the same attention by `layers.group_attention`, under masks of all pairs."""
    window = c.sliding_window if sliding and c.sliding_window else 10**6
    seen = np.tril(np.ones((T, T), bool)) & (at[..., :, None] - at[..., None, :] < window)
    seen = seen if own_real is None else seen & own_real[:, None, None]
    q, *own = arrays[:3]
    prompt = ()
    if prompt_real is not None:
        near = at[..., :, None] - prompt_at[:, None, None] < window
        prompt = arrays[3:], near & prompt_real[:, None, None]
    return layers.group_attention(q, (own,), seen, *prompt, scale=c.query_scale, dtype=c.compute_dtype)


def in_blocks(c, sliding, arrays, **others):
    q, *own = arrays[:3]
    others = jax.tree.map(jnp.asarray, others)
    return blockwise.group_attention(
        q, own, prompt=arrays[3:] or None, config=c, sliding=jnp.asarray(sliding), **others
    )


def both(c, arrays, others, sliding=True):
    """Returns (values, gradients) of both kinds of attention. Queries of padding have no meaning and no cotangent."""
    P, G, T, H, K = arrays[0].shape
    real = others.get("own_real", np.ones((P, T), bool))[:, None, :, None]
    cotangent = np.random.default_rng(1).normal(size=(P, G, T, H * K)) * real

    def run(attention):
        def total(arrays):
            out = attention(c, sliding, arrays, **others) * real
            return (out * cotangent).sum(), out

        grads, out = jax.jit(jax.grad(total, has_aux=True))(arrays)
        return out, *grads

    return run(in_blocks), run(plain)


def assert_close(found, wanted, tolerance=1e-5):
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
        assert np.abs(y).max() > 1e-3
        assert np.abs(x - y).max() <= tolerance * np.abs(y).max()


WINDOW = dict(sliding_window=5)


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(dict(), id="completions"),
        pytest.param(dict(completions=1, prompt=False, padded=True), id="prompts with padding anywhere"),
        pytest.param(dict(WINDOW), id="completions in a sliding layer"),
        pytest.param(dict(WINDOW, completions=1, prompt=False, padded=True), id="prompts in a sliding layer"),
        pytest.param(dict(WINDOW, kv_heads=1), id="one key head, in a sliding layer"),
        pytest.param(dict(kv_heads=4, query_scale=0.7), id="a key head per query head"),
    ],
)
def test_values_and_gradients_equal_plain_attention(case, blocks_of_8):
    assert_close(*both(*example(**case)))


def test_the_window_is_for_sliding_layers_only(blocks_of_8):
    example_ = example(**WINDOW)
    found, wanted = both(*example_, sliding=False)
    assert_close(found, wanted)
    assert np.abs(np.asarray(found[0]) - both(*example_, sliding=True)[0][0]).max() > 0.1


def test_one_block_equals_plain_attention():
    assert_close(*both(*example(kv_heads=1)))


def test_bfloat16_operands_are_close_to_plain_attention(blocks_of_8):
    assert_close(*both(*example(compute_dtype="bfloat16")), tolerance=0.02)


def test_a_query_that_sees_nothing_gives_finite_values_and_gradients(blocks_of_8):
    c, arrays, others = example(completions=1, prompt=False, padded=True)
    others["own_real"][0] = False
    out, *grads = both(c, arrays, others)[0]
    assert all(np.isfinite(x).all() for x in (out, *grads))
    assert np.abs(grads[0][0]).max() == 0 and np.abs(grads[0][1]).max() > 0.1


def test_scores_of_60000_do_not_overflow(blocks_of_8):
    c, arrays, others = example()
    arrays[0] = 30_000 * arrays[0]
    (found, *_), (wanted, *_) = both(c, arrays, others)
    assert_close(found, wanted, tolerance=0.05)  # float32 scores of this size are exact to 0.01


# -- blocks that are skipped -----------------------------------------------------------------------------------------


def ranges(at, order, window=None, of=None):
    """Returns the first block and the end of the blocks of keys, own or `of`, that each block of 8 queries sees."""
    cut = lambda x: None if x is None else blockwise._cut(jnp.asarray(x)[None, None], 2, 8)
    own = blockwise._Places(blockwise._cut(jnp.asarray(order), 0, 8), cut(at), None)
    first, end = blockwise._visible_blocks(own, of or own, window)
    return first.tolist(), end.tolist()


def test_blocks_that_no_query_sees_are_skipped():
    t = np.arange(32)
    assert ranges(t, t) == ([0, 0, 0, 0], [1, 2, 3, 4])
    assert ranges(t, t, window=9) == ([0, 0, 1, 2], [1, 2, 3, 4])
    assert ranges(t, t, window=10) == ([0, 0, 0, 1], [1, 2, 3, 4])
    prompt = blockwise._Places(jnp.full((2, 8), -1), blockwise._cut(jnp.arange(16)[None, None], 2, 8), None)
    assert ranges(t + 16, t, of=prompt) == ([0, 0, 0, 0], [2, 2, 2, 2])
    # The first block of queries sees positions from 16 - 7 on, and the others see no position.
    assert ranges(t + 16, t, window=8, of=prompt) == ([1, 2, 2, 2], [2, 0, 0, 0])


@pytest.mark.parametrize(
    "places, rows, side",
    [(512, 128, 64), (511, 128, 64), (20, 128, 24), (130, 16, 72), (2048, 8, 256), (512, 4096, 32)],
)
def test_blocks_fit_into_the_cache_and_pad_little(places, rows, side):
    assert blockwise._side(places, rows) == side


@pytest.mark.runs
def test_memory_grows_with_the_length_and_not_with_its_square():
    def temporaries(T):
        c = make(heads=2, kv_heads=1, head_dim=16)
        shapes = (1, 2, T, 2, 16), (1, 2, 1, 16, T), (1, 2, 1, T, 16)
        arrays = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
        at = np.arange(T)[None, None]
        loss = lambda arrays: (in_blocks(c, False, arrays, at=at) ** 2).sum()
        return jax.jit(jax.grad(loss)).lower(arrays).compile().memory_analysis().temp_size_in_bytes

    assert temporaries(2048) < 2.2 * temporaries(1024)


# -- in a decoder ----------------------------------------------------------------------------------------------------

ALTERNATING = make(
    layers=2, sliding_window=6, sliding_period=2, local_rope_theta=50.0, features=3, prefix_length=2, encoder_width=4
)


def gradients(config):
    """Returns a function from weights to gradients of a weighted sum of hidden states, and the completions' states."""
    rng = np.random.default_rng(2)
    prompts, completions = (jnp.asarray(rng.integers(0, 16, shape)) for shape in ((P, S), (P, G, T)))
    mask = rng.random((P, S)) < 0.6
    mask[:, 3] = True
    features = jnp.asarray(rng.normal(size=(P, 3)), jnp.float32)
    weights = rng.normal(size=(P, G, T, config.width)), rng.normal(size=(P, S, config.width)) * mask[..., None]

    def total(params):
        model = models.bind(config, params)
        hidden, cache = model.prefill(prompts, jnp.asarray(mask), features)
        extended = model.extend(completions, cache)
        return (extended * weights[0]).sum() + (hidden * weights[1]).sum(), extended

    return jax.grad(total, has_aux=True)


def in_a_decoder(remat):
    return gradients(dataclasses.replace(ALTERNATING, attention="blockwise", remat=remat))


@pytest.mark.runs
@pytest.mark.parametrize(
    "remat", ["none", pytest.param("dots", marks=pytest.mark.runs), pytest.param("layer", marks=pytest.mark.runs)]
)
def test_a_decoder_equals_the_same_with_plain_attention(remat, blocks_of_8):
    params = reference.random_params(ALTERNATING, scale=0.3)
    run, plain_run = in_a_decoder(remat), gradients(ALTERNATING)
    assert "while" in str(jax.make_jaxpr(run)(params)) and "while" not in str(jax.make_jaxpr(plain_run)(params))
    assert_close(jax.jit(run)(params), jax.jit(plain_run)(params), 2e-5)


def test_only_rematerialised_layers_compute_attention_again(blocks_of_8):
    params = models.abstract_params(ALTERNATING)
    loops = lambda remat: len(re.findall(r"\bwhile\[", str(jax.make_jaxpr(in_a_decoder(remat))(params))))
    assert loops("none") == loops("dots") < loops("layer")


@pytest.mark.runs
def test_the_trainer_computes_the_logprobs_of_the_sampler(blocks_of_8):
    config = dataclasses.replace(ALTERNATING, attention="blockwise", features=0, prefix_length=0, encoder_width=0)
    params = reference.random_params(config, scale=0.3)
    prompts, mask = np.random.default_rng(0).integers(4, 16, (P, S)), np.arange(S) >= np.array([[0], [9]])
    sample = functools.partial(generate, config, group_size=G, max_length=T, eos_ids=(3,), pad_id=0)
    rollout: Rollout = jax.jit(sample)(
        params, prompts, mask, jnp.arange(P), jax.random.key(1), temperature=jnp.float32(1.3)
    )
    scored = jax.jit(functools.partial(compute_logprobs, config))(params, rollout, jnp.float32(1.3))
    assert rollout.mask.sum() > 40
    difference = np.where(rollout.mask, scored.logprobs - rollout.logprobs, 0)
    assert np.abs(difference).max() < 1e-5


# -- choices by device -----------------------------------------------------------------------------------------------


def mesh_of(platform, kind=""):
    device = types.SimpleNamespace(platform=platform, device_kind=kind)
    return types.SimpleNamespace(devices=np.array([device], object), shape=dict.fromkeys(("slice", "data", "fsdp"), 1))


def test_blocks_on_a_tpu_raise():
    config = tiny("rows.jsonl", model__attention="blockwise")
    with pytest.raises(ConfigError, match=r"config.model.attention is 'blockwise', .*; set it to 'auto'\.$"):
        devices.for_devices(make(), config, mesh_of("tpu"))
    for platform in ("cpu", "gpu"):
        assert devices.for_devices(make(), config, mesh_of(platform)).attention == "blockwise"

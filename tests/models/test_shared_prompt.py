"""Tests completions on their prompt's cache against a plain forward and the float64 reference."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from helpers import reference_decoder as reference
from helpers.tiny_decoders import FAMILIES, GEMMA3, jit_once, make, V
from jaxrl_reason import models

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
    """Returns a function to logits [P, G, T, V] on the shared cache, and gradients of weighted log-probabilities."""

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


@pytest.mark.runs
@pytest.mark.parametrize("side", ["left", "right", "mixed"])
@pytest.mark.parametrize("family", ["gemma3", pytest.param("llama3_qwen", marks=pytest.mark.slow)])
def test_values_and_gradients_on_the_shared_prompt_equal_the_plain_forward(family, side):
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
    for p in range(P):  # one sample per prompt, because the reference is slow
        row = np.concatenate([prompts[p, mask[p]], completions[p, p]])
        want = reference.forward(config, reference.float64(params), row)[-T:]
        np.testing.assert_allclose(logits[p, p], want, atol=2e-5 * np.abs(want).max())


def test_every_weight_gets_gradient_through_the_prompt():
    config = SHARED["gemma3"]
    params, (prompts, mask, completions) = reference.random_params(config, scale=0.2), shared_batch("left")
    outside = np.setdiff1d(prompts[mask], completions)  # tokens that only prompts contain
    assert outside.size
    weights = np.random.default_rng(4).normal(size=(P, G, T, V)).astype(np.float32)
    _, grads = shared_forward(config)(params, weights, prompts, mask, completions)
    assert (np.abs(np.asarray(grads["embedding"])[outside]).max(axis=1) > 1e-4).all()
    unseen = np.setdiff1d(np.arange(V), np.concatenate([prompts[mask], completions.ravel()]))
    assert not np.asarray(grads["embedding"])[unseen].any()


@pytest.mark.parametrize("side", ["left", "right", "mixed"])
@pytest.mark.parametrize("family", ["gemma3", pytest.param("llama3_qwen", marks=pytest.mark.slow)])
def test_decoding_token_by_token_equals_extend(family, side):
    config = SHARED[family]
    params = reference.random_params(config, scale=0.2)
    batch = shared_batch(side)
    (_, want), _ = shared_forward(config)(params, np.zeros((P, G, T, V), np.float32), *batch)
    logits, cache = step_through(config)(params, *batch)
    np.testing.assert_allclose(logits, want, atol=1e-5 * np.abs(want).max())
    assert cache.keys[0][0].shape == (P, G, config.kv_heads, config.head_dim, T + 2)


@functools.cache
def step_through(config):
    @jit_once
    def run(params, prompts, mask, completions):
        model = models.bind(config, params)
        _, prompt = model.prefill(prompts, mask)
        blocks, prompt = model.unstack(prompt)
        # The cache has garbage at unwritten places, and more places than tokens.
        cache = jax.tree.map(lambda x: x + 100.0, model.empty_cache(P, G, T + 2))

        def body(cache, t):
            hidden, cache = model.step(completions[:, :, t], t, blocks, prompt, cache)
            return cache, model.logits(hidden)

        cache, logits = jax.lax.scan(body, cache, jnp.arange(T))
        return jnp.moveaxis(logits, 0, 2), cache

    return run


def test_sliding_windows_reach_from_the_completion_into_the_prompt():
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

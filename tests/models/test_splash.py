"""Tests the splash kernels, interpreted on small shapes against plain attention, and compiled for TPUs."""

import dataclasses
import functools
import os
import pathlib
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from helpers import reference_decoder as reference
from jaxrl_reason import models
from jaxrl_reason.models import ModelConfig, splash
from jaxrl_reason.models.decoding.rollout import generate

pytestmark = pytest.mark.usefixtures("quick_compilation")

V, P, G, S, T = 24, 2, 3, 6, 5
SMALL = ModelConfig(
    vocab_size=V, width=16, layers=2, heads=4, kv_heads=2, mlp_width=16, head_dim=8, qk_norm=True, tied_embedding=False
)
PADDING = {
    "left": [[0, 0, 1, 1, 1, 1], [0, 0, 0, 0, 0, 1]],
    "right": [[1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 0]],
    "between": [[1, 0, 0, 1, 0, 1], [0, 1, 1, 0, 1, 0]],
    "none": [[1] * S] * P,
}
slow = lambda *values, id: pytest.param(*values, id=id, marks=pytest.mark.slow)


def inputs(mask, length, config, seed=0):
    """Returns prompts, mask, completions, cotangents of both hidden states (0 on padding), and features."""
    rng = np.random.default_rng(seed)
    mask = np.asarray(mask, bool)
    prompts, completions = rng.integers(0, V, mask.shape), rng.integers(0, V, (len(mask), G, length))
    of_prompts = rng.normal(size=(*mask.shape, config.width)) * mask[..., None]
    of_completions = rng.normal(size=(len(mask), G, length, config.width))
    features = rng.normal(size=(len(mask), config.features)) if config.features else None
    narrow = lambda x: x if x is None else jnp.asarray(x, jnp.float32 if x.dtype == float else None)
    return [narrow(x) for x in (prompts, mask, completions, of_prompts, of_completions, features)]


@functools.partial(jax.jit, static_argnums=0)
def hidden_and_gradients(config, params, prompts, mask, completions, of_prompts, of_completions, features):
    """Returns gradients of a sum over hidden states, the prompts' logits (0 on padding), the completions' states."""

    def total(params):
        model = models.bind(config, params)
        hidden, cache = model.prefill(prompts, mask, features)
        extended = model.extend(completions, cache)
        logits = jnp.where(mask[..., None], model.logits(hidden), 0.0)
        return (hidden * of_prompts).sum() + (extended * of_completions).sum() + logits[..., 0].sum(), (
            logits,
            extended,
        )

    return jax.grad(total, has_aux=True)(params)


def both(config, mask, length, params=None, seed=0):
    params = reference.random_params(config, scale=0.3) if params is None else params
    run = lambda attention: hidden_and_gradients(
        dataclasses.replace(config, attention=attention), params, *inputs(mask, length, config, seed)
    )
    return run("splash"), run("plain")


def assert_close(found, wanted):
    """Asserts equality within 2e-5 of the largest entry of each array."""
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(wanted)):
        x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
        size = np.abs(y).max()
        assert size > 1e-3 and np.abs(x - y).max() <= 2e-5 * size, jax.tree_util.keystr(path)


@pytest.mark.runs
@pytest.mark.parametrize(
    "padding", ["between", slow("left", id="left"), slow("right", id="right"), slow("none", id="none")]
)
def test_values_and_gradients_equal_plain_attention_with_padding_anywhere(padding):
    assert_close(*both(SMALL, PADDING[padding], T))


SLIDING = dataclasses.replace(SMALL, sliding_window=3)
ALTERNATING = dataclasses.replace(SLIDING, sliding_period=2, local_rope_theta=100.0)
FEATURES = dataclasses.replace(SMALL, features=3, prefix_length=2, encoder_width=4)


@pytest.mark.runs
@pytest.mark.parametrize(
    "config",
    [
        pytest.param(ALTERNATING, id="alternating"),
        slow(SLIDING, id="sliding"),
        slow(FEATURES, id="features"),
        slow(dataclasses.replace(SMALL, kv_heads=4), id="a key head a query head"),
        slow(dataclasses.replace(SMALL, kv_heads=1, query_scale=0.7), id="one key head"),
        slow(dataclasses.replace(ALTERNATING, remat="none"), id="nothing rematerialised"),
        slow(dataclasses.replace(ALTERNATING, remat="dots"), id="all but products rematerialised"),
    ],
)
def test_other_decoders_equal_plain_attention(config):
    assert_close(*both(config, PADDING["between"], T))


@pytest.mark.slow
@pytest.mark.parametrize("window", [0, 40, 150, 290])
@pytest.mark.parametrize("prompt, completion", [(140, 130), (5, 300), (300, 40)])
def test_several_blocks_equal_plain_attention(prompt, completion, window):
    config = dataclasses.replace(SMALL, layers=1, heads=2, kv_heads=1, sliding_window=window)
    mask = np.random.default_rng(1).random((P, prompt)) < [[0.8], [0.3]]
    mask[:, 2] = True
    assert_close(*both(config, mask, completion))


@pytest.mark.slow
def test_bfloat16_operands_are_close_to_plain_attention():
    config = dataclasses.replace(SMALL, compute_dtype="bfloat16", remat="none", layers=1)
    (grads, (logits, hidden)), (plain_grads, (plain_logits, plain_hidden)) = both(config, PADDING["between"], T)
    assert hidden.dtype == plain_hidden.dtype and logits.dtype == plain_logits.dtype
    np.testing.assert_allclose(hidden, plain_hidden, atol=0.1)
    flat = lambda tree: np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)])
    assert np.linalg.norm(flat(grads) - flat(plain_grads)) < 0.03 * np.linalg.norm(flat(plain_grads))


@pytest.mark.runs
def test_padding_gives_neither_nan_nor_gradient():
    """One prompt has no token at all. Only padding has token 0."""
    mask = np.array([[0, 1, 0, 1, 1, 0], [0] * S], bool)
    prompts, _, completions, of_prompts, of_completions, _ = inputs(mask, T, SMALL)
    prompts = jnp.where(mask, jnp.maximum(prompts, 1), 0)
    args = prompts, jnp.asarray(mask), jnp.maximum(completions, 1), of_prompts, of_completions, None
    config = dataclasses.replace(SMALL, attention="splash")
    grads, outputs = hidden_and_gradients(config, reference.random_params(config, scale=0.3), *args)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves((grads, outputs)))
    assert np.abs(grads["embedding"][0]).max() == 0 and np.abs(grads["embedding"][1:]).max() > 0.1


@pytest.mark.runs
def test_values_of_padding_change_nothing():
    mask = jnp.asarray(PADDING["between"], bool)
    prompts, _, *others = inputs(mask, T, SMALL)
    config, params = dataclasses.replace(SMALL, attention="splash"), reference.random_params(SMALL, scale=0.3)
    one = hidden_and_gradients(config, params, prompts, mask, *others)
    two = hidden_and_gradients(config, params, jnp.where(mask, prompts, V - 1 - prompts), mask, *others)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), one, two)


@pytest.mark.runs
def test_the_cache_has_the_tokens_of_each_prompt_at_the_end():
    mask = jnp.asarray(PADDING["between"], bool)
    config, params = dataclasses.replace(SMALL, attention="splash"), reference.random_params(SMALL)
    _, cache = models.bind(config, params).prefill(jnp.zeros((P, S), int), mask)
    np.testing.assert_array_equal(cache.mask, [[0, 0, 0, 1, 1, 1]] * P)
    np.testing.assert_array_equal(cache.positions, [[0, 0, 0, 0, 1, 2]] * P)
    np.testing.assert_array_equal(cache.lengths, [3, 3])


def sampled(config, params, **options):
    run = jax.jit(functools.partial(generate, config, group_size=G, max_length=T, eos_ids=(3,), pad_id=0, **options))
    prompts, mask, *_ = inputs(PADDING["between"], T, config)
    return run(params, prompts, mask, jnp.arange(P), jax.random.key(1), temperature=jnp.float32(1.3))


@pytest.mark.runs
@pytest.mark.parametrize("config", [pytest.param(ALTERNATING, id="alternating"), slow(SMALL, id="global")])
def test_samples_equal_those_of_plain_attention(config):
    params = reference.random_params(config, scale=0.3)
    plain = sampled(config, params, with_prompt_logprobs=True)
    found = sampled(dataclasses.replace(config, attention="splash"), params, with_prompt_logprobs=True)
    assert len(np.unique(plain.tokens)) > 5
    np.testing.assert_array_equal(found.tokens, plain.tokens)
    np.testing.assert_allclose(found.logprobs, plain.logprobs, atol=1e-4)
    np.testing.assert_allclose(found.prompt_logprobs, plain.prompt_logprobs, atol=1e-4)


# -- the mask --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("window", [0, 1, 3, 7, 11, 100])
def test_the_mask_equals_its_definition(window):
    S, G, T, side = 8, 3, 12, 4
    mask = splash._GroupMask(S, G, T, window)
    want = np.zeros(mask.shape, bool)
    for g in range(G):
        for t in range(T):
            seen = [s for s in range(S) if not window or S + t - s < window]
            seen += [S + g * T + i for i in range(t + 1) if not window or t - i < window]
            want[g * T + t, seen] = True
    blocks = [
        [mask[slice(q, q + side), slice(k, k + side)] for k in range(0, mask.shape[1], side)]
        for q in range(0, mask.shape[0], side)
    ]
    np.testing.assert_array_equal(np.block(blocks), want)
    # The kernels compute the same mask in blocks that are not empty.
    queries, keys = np.broadcast_arrays(mask.q_sequence[:, None], np.arange(mask.shape[1], dtype=np.int32))
    computed = np.asarray(mask.mask_function(queries, keys))
    holds = np.repeat(np.repeat([[b.any() for b in row] for row in blocks], side, 0), side, 1)
    np.testing.assert_array_equal(computed & holds, want)


def test_masks_of_long_completions_are_small():
    """8 completions of 3072 tokens after a prompt of 1024 have 629 million pairs."""
    kernel = splash._kernel(splash._GroupMask(1024, 8, 3072), 4, 512, interpret=False)
    assert sum(x.nbytes for x in jax.tree.leaves(kernel)) < 2**19


@pytest.mark.parametrize(
    "sizes, dtype, side",
    [
        ((1024, 8, 3072), "bfloat16", 512),
        ((1024, 8, 3072), "float32", 128),
        ((100, 8, 3072), "bfloat16", 512),
        ((0, 1, 300), "bfloat16", 384),
        ((6, 2, 5), "bfloat16", 128),
    ],
)
def test_blocks_are_large_if_they_pad_little(sizes, dtype, side):
    assert splash._block_side(*sizes, dtype) == side


def test_an_unknown_attention_raises():
    with pytest.raises(ValueError, match=r"model\.attention is 'flash'; it must be .*\.$"):
        dataclasses.replace(SMALL, attention="flash")


# -- several devices -------------------------------------------------------------------------------------------------

PROMPTS_ON_DEVICES = np.arange(S) >= np.array([0, 1, 2, 3, 4, 5, 0, 3])[:, None]


def on_devices(out):
    """Writes the results of a mesh and of one device, in a process with 8 devices."""
    results = {}
    params = reference.random_params(ALTERNATING, scale=0.3)
    config = dataclasses.replace(ALTERNATING, attention="splash")
    args = inputs(PROMPTS_ON_DEVICES, T, config)
    results["one"] = hidden_and_gradients(config, params, *args)
    mesh = models.sharding.make_mesh(2, 2, 2)
    batch = models.sharding.batch_sharding(mesh)
    with jax.set_mesh(mesh):
        params = jax.device_put(params, models.param_shardings(config, mesh))
        placed = [x if x is None else jax.device_put(x, batch) for x in args]
        results["mesh"] = hidden_and_gradients(config, params, *placed)
        # The mesh does not divide three prompts, so all devices compute them.
        results["three"] = hidden_and_gradients(config, params, *(x if x is None else x[:3] for x in args))[1][1]
        text = str(jax.make_jaxpr(functools.partial(hidden_and_gradients, config))(params, *placed))
    assert "shard_map" in text
    flat = {
        f"{name}{jax.tree_util.keystr(path)}": x
        for name, tree in results.items()
        for path, x in jax.tree_util.tree_leaves_with_path(tree)
    }
    np.savez(out, **jax.device_get(flat))


@pytest.mark.slow
def test_results_of_a_mesh_equal_those_of_one_device(tmp_path):
    root, here = pathlib.Path(models.__file__).resolve().parents[2], pathlib.Path(__file__).resolve()
    env = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0",
        "PYTHONPATH": os.pathsep.join(map(str, [root, here.parents[1], here.parent])),
    }
    out = tmp_path / "out.npz"
    script = f"import test_splash; test_splash.on_devices({str(out)!r})"
    run = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    with np.load(out) as arrays:
        one = {name[3:]: x for name, x in arrays.items() if name.startswith("one")}
        mesh = {name[4:]: x for name, x in arrays.items() if name.startswith("mesh")}
        three = arrays["three"]
    assert_close(mesh, one)
    np.testing.assert_allclose(three, one["[1][1]"][:3], atol=1e-4)


# -- for TPUs --------------------------------------------------------------------------------------------------------


def compiled_gradient(config, devices, sizes, prompt, completion):
    """Returns the text of a program like `hidden_and_gradients`, compiled for a mesh of devices."""
    mesh = models.sharding.make_mesh(*sizes, devices=devices[: int(np.prod(sizes))])
    batch = models.sharding.batch_sharding(mesh)
    like = lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
    params = jax.tree.map(like, models.abstract_params(config), models.param_shardings(config, mesh))
    of = lambda dtype, *shape: jax.ShapeDtypeStruct((8, *shape), dtype, sharding=batch)

    def total(params, prompts, mask, completions):
        model = models.bind(config, params)
        hidden, cache = model.prefill(prompts, mask)
        return (hidden[:, -1] ** 2).sum() + (model.extend(completions, cache) ** 2).sum()

    with jax.set_mesh(mesh):
        args = params, of("int32", prompt), of("bool", prompt), of("int32", G, completion)
        return jax.jit(jax.grad(total)).lower(*args).compile().as_text()


LIKE_QWEN = ModelConfig(
    vocab_size=256, width=128, layers=2, heads=10, kv_heads=2, mlp_width=128, head_dim=64, compute_dtype="bfloat16"
)


@pytest.mark.parametrize(
    "topology, sizes, changes",
    [
        pytest.param("v5e:2x2", (1, 2, 2), dict(), id="v5e sharded", marks=pytest.mark.slow),
        pytest.param("v5e:2x2", (1, 1, 1), dict(head_dim=128), id="v5e", marks=pytest.mark.slow),
        pytest.param(
            "v5p:2x2x1",
            (2, 1, 2),
            dict(head_dim=256, sliding_window=200, sliding_period=2),
            id="v5p sharded",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_programs_for_tpus_have_kernels_and_no_scores(tpu, topology, sizes, changes):
    prompt, completion, ours = 75, 115, G * 128  # no dimension of the model and no product has these sizes
    config = dataclasses.replace(LIKE_QWEN, **changes)
    keys, queries = {prompt, completion, ours, ours + 128}, {prompt, completion, ours}
    heads, rows = config.heads // config.kv_heads, set()
    for n in queries:
        rows |= {n, n * heads, n * heads * G}

    def scores(text):
        shapes = [list(map(int, x.split(","))) for x in re.findall(r"(?:f32|bf16|pred)\[([\d,]+)\]", text)]
        return {tuple(x) for x in shapes if len(x) >= 3 and x[-1] in keys and x[-2] in rows}

    plain = compiled_gradient(config, tpu(topology), sizes, prompt, completion)
    assert scores(plain), "the search does not find the scores of plain attention"
    text = compiled_gradient(dataclasses.replace(config, attention="splash"), tpu(topology), sizes, prompt, completion)
    # Prompts and completions each have two forwards, the gradient of queries and the gradient of keys.
    assert text.count('custom_call_target="tpu_custom_call"') >= 8
    assert not scores(text), scores(text)

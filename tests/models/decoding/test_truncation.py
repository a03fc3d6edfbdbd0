"""Tests top-k and top-p: the kept tokens against a sort in float64, the distribution, and rollouts that truncate."""

import functools

from hypothesis import given, settings
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from helpers import reference_decoder as reference
from jaxrl_reason.models import ModelConfig
from jaxrl_reason.models.decoding.rollout import generate
from jaxrl_reason.models.decoding.sampling import sample_token, truncate

pytestmark = pytest.mark.usefixtures("quick_compilation")

compiled = jax.jit(truncate)
token = jax.jit(sample_token)


def kept_by_a_sort(probabilities, k, p):
    """Returns the mask of kept tokens: top-k first, then the fewest tokens with a share p of the rest. Ties stay."""
    law = np.asarray(probabilities, np.float64)
    if k:
        law = np.where(law >= np.sort(law)[::-1][min(k, law.size) - 1], law, 0.0)
    if p < 1:
        falling = np.sort(law)[::-1]
        needed = np.searchsorted(np.cumsum(falling) / falling.sum(), p)
        law = np.where(law >= falling[needed], law, 0.0)
    return law > 0


@pytest.mark.parametrize(
    "k, p, expected",
    [
        (0, 1.0, [1, 1, 1, 1, 0]),
        (2, 1.0, [0, 1, 0, 1, 0]),
        (4, 1.0, [1, 1, 1, 1, 0]),
        (9, 1.0, [1, 1, 1, 1, 0]),
        (0, 0.5, [0, 1, 0, 0, 0]),  # exactly the share of the first token
        (0, 0.51, [0, 1, 0, 1, 0]),
        (0, 0.75, [0, 1, 0, 1, 0]),
        (0, 0.76, [1, 1, 1, 1, 0]),  # the two smallest are equal, and stay together
        (1, 0.99, [0, 1, 0, 0, 0]),
        (2, 0.6, [0, 1, 0, 0, 0]),  # top-k keeps two tokens, of which 1/2 of 3/4 is the share 2/3
        (3, 1.0, [1, 1, 1, 1, 0]),  # two tokens tie for the third place
        (0, 1e-6, [0, 1, 0, 0, 0]),
    ],
)
def test_kept_tokens_by_hand(k, p, expected):
    """Probabilities 1/8, 1/2, 1/8, 1/4 and 0, relative to the largest."""
    weights = np.float32([0.25, 1.0, 0.25, 0.5, 0.0])
    found = np.asarray(compiled(weights, jnp.int32(k), jnp.float32(p)))
    np.testing.assert_array_equal(found, weights * expected)
    np.testing.assert_array_equal(kept_by_a_sort(weights, k, p), np.array(expected, bool))


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from([0, 1, 3, 50, 299, 300, 500]), st.floats(0.01, 1.0), st.booleans())
def test_rows_keep_what_a_sort_keeps(seed, k, p, illegal):
    rng = np.random.default_rng(seed)
    logits = rng.permuted(np.linspace(-9, 0, 300))[None] + rng.normal(0, 0.001, (3, 300))
    if illegal:
        logits[rng.random(logits.shape) < 0.5] = -np.inf
    weights = np.exp(logits - logits.max(axis=-1, keepdims=True)).astype(np.float32)
    ks, ps = np.int32([k, 0, 2]), np.float32([p, p, 1.0])
    found = np.asarray(compiled(weights, ks, ps))
    for row, result, k_, p_ in zip(weights, found, ks, ps):
        kept = kept_by_a_sort(row, k_, float(p_))
        differ = np.nonzero((result > 0) != kept)[0]
        assert len(differ) <= 1 and (not len(differ) or p_ < 1)  # for a share that is p up to rounding
        assert set(result[result > 0]) <= set(row)


def test_truncated_tokens_follow_their_renormalised_distribution():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=200) * 2
    logits[rng.random(200) < 0.3] = -np.inf
    law = np.exp(reference.log_softmax(logits))
    kept = kept_by_a_sort(law, 30, 0.8)
    assert 5 < kept.sum() < 30
    law = np.where(kept, law, 0) / law[kept].sum()
    n = 20000
    rows = lambda x, dtype: jnp.full(n, x, dtype)
    tokens, logprobs = token(
        jnp.broadcast_to(jnp.float32(logits), (n, 200)),
        jnp.float32(rng.random(n)),
        rows(0, bool),
        rows(30, jnp.int32),
        rows(0.8, jnp.float32),
    )
    counts = np.bincount(tokens, minlength=200)
    assert not counts[~kept].any()
    assert scipy.stats.chisquare(counts[kept], law[kept] * n).pvalue > 1e-4
    np.testing.assert_allclose(logprobs, np.log(law[np.asarray(tokens)]), atol=1e-5)


def test_values_that_keep_all_change_no_bit_and_greedy_rows_stay_at_temperature_one():
    rng = np.random.default_rng(1)
    logits, noise = jnp.float32(rng.normal(size=(6, 300))), jnp.float32(rng.random(6))
    greedy = jnp.array([False, True] * 3)
    plain = token(logits, noise, greedy)
    off = token(logits, noise, greedy, jnp.zeros(6, jnp.int32), jnp.ones(6))
    cut = token(logits, noise, greedy, jnp.full(6, 2), jnp.full(6, 0.5))
    for a, b, c in zip(plain, off, cut):
        np.testing.assert_array_equal(a, b)
        np.testing.assert_array_equal(a[1::2], c[1::2])
        assert (np.asarray(a) != c)[::2].any()


# -- rollouts --------------------------------------------------------------------------------------------------------

P, G, S, T, V = 3, 4, 5, 6, 37
CONFIG = ModelConfig(vocab_size=V, width=16, layers=2, heads=4, kv_heads=2, mlp_width=24, tied_embedding=False)
PARAMS = reference.random_params(CONFIG, seed=23, scale=0.3)
PROMPTS = np.random.default_rng(0).integers(0, V, (P, S))
MASK = np.arange(S) >= np.array([[0], [3], [2]])


def rollout(run, **sampling):
    out = run(PARAMS, PROMPTS, MASK, np.arange(P), jax.random.key(0), **jax.tree.map(jnp.asarray, sampling))
    return jax.tree.map(np.asarray, out)


def program(**options):
    options = dict(group_size=G, max_length=T, eos_ids=(5,), pad_id=0) | options
    return jax.jit(functools.partial(generate, CONFIG, **options))


def test_a_rollout_has_the_log_probabilities_of_the_distribution_that_sampled_it():
    """Samples of a group have different settings, which smaller loops keep."""
    sampling = dict(
        temperature=np.float32([0.7, 1.3, 0.0, 1.0]), top_k=np.int32([5, 0, 3, 0]), top_p=np.float32([0.9, 0.6, 0.5, 1])
    )
    legal = np.random.default_rng(1).random((T, V)) < 0.8
    out = rollout(program(cache_pieces=2, halvings=2), legal=legal, **sampling)
    logits = reference.completion_logits(CONFIG, reference.float64(PARAMS), PROMPTS, MASK, out.tokens)
    left_out = 0
    for p, g, t in np.argwhere(out.mask):
        temperature, k, p_ = (float(sampling[name][g]) for name in ("temperature", "top_k", "top_p"))
        law = reference.sampling_logprobs(logits[p, g, t], temperature or 1.0, legal[t])
        if temperature:
            kept = kept_by_a_sort(np.exp(law), int(k), p_)
            left_out += (np.isfinite(law) & ~kept).sum()
            law = np.where(kept, law, -np.inf) - np.log(np.exp(law)[kept].sum())
        assert out.logprobs[p, g, t] == pytest.approx(law[out.tokens[p, g, t]], abs=5e-5)
    assert left_out > 500 and out.mask.sum() > 40


def test_other_values_compile_nothing_and_none_compiles_no_truncation():
    run = program()
    one = rollout(run, temperature=1.0, top_k=0, top_p=1.0)
    best = rollout(run, temperature=1.0, top_k=1, top_p=1.0)
    assert run._cache_size() == 1
    plain, greedy = (rollout(program(), temperature=temperature) for temperature in (1.0, 0.0))
    jax.tree.map(np.testing.assert_array_equal, one, plain)
    np.testing.assert_array_equal(best.tokens, greedy.tokens)
    np.testing.assert_array_equal(best.logprobs, 0.0)  # probability 1
    args = PARAMS, PROMPTS, MASK, np.arange(P), jax.random.key(0)
    casts = lambda **sampling: (
        run.lower(*args, temperature=1.0, **sampling).as_text().count("stablehlo.bitcast_convert")
    )
    assert casts() < casts(top_k=2) < casts(top_k=2, top_p=0.5)

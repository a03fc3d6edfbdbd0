"""Tests group sampling: its distribution against the float64 reference, its keys, ends and independence."""

import functools
import time

from hypothesis import given, settings
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from helpers import reference_decoder as reference
from jaxrl_reason import models
from jaxrl_reason.models import layers, ModelConfig
from jaxrl_reason.models.decoding.rollout import generate
from jaxrl_reason.models.decoding.sampling import sample_token, sampling_noise
from jaxrl_reason.rl import scoring

pytestmark = pytest.mark.usefixtures("quick_compilation")

P, G, S, T, V = 3, 4, 5, 6, 37
ONE = np.nextafter(np.float32(1), np.float32(0))  # the largest float32 below 1
EOS, PAD = (5, 9), 5  # the pad token is an end token

# The window reaches from the completion into the prompt. The head is separate, so that greedy text does not repeat.
CONFIG = ModelConfig(
    vocab_size=V,
    width=16,
    layers=2,
    heads=4,
    kv_heads=2,
    mlp_width=24,
    head_dim=4,
    qkv_bias=True,
    tied_embedding=False,
    sliding_window=4,
    sliding_period=2,
)
PARAMS = reference.random_params(CONFIG, seed=23, scale=0.3)
RNG = np.random.default_rng(0)
PROMPTS = RNG.integers(0, V, (P, S))
MASK = np.arange(S) >= np.array([[0], [3], [2]])  # left padding, mixed lengths
IDS = np.array([7, 3, 11])
LEGAL = RNG.random((P, T, V)) < 0.4
LEGAL[..., 20] = True
NO_EOS = np.ones((P, T, V), bool)
NO_EOS[..., EOS] = False


def compiled(group=G, length=T, eos=EOS, pad=PAD, **options):
    return jax.jit(
        functools.partial(generate, CONFIG, group_size=group, max_length=length, eos_ids=eos, pad_id=pad), **options
    )


# For programs that run once: optimizing them would take half of the time.
compiled_once = functools.partial(compiled, compiler_options={"xla_backend_optimization_level": 0})


run_legal = compiled()  # called with legal [P, T, V]
run_free = compiled(pad=0)  # called without legal tokens


def free(key=0, temperature=1.0, prompts=PROMPTS, mask=MASK, ids=IDS, params=PARAMS, run=run_free):
    out = run(params, prompts, mask, ids, jax.random.key(key), temperature=jnp.asarray(temperature, jnp.float32))
    return jax.tree.map(np.asarray, out)


def legal(allowed, key=0, temperature=1.0, ids=IDS, run=run_legal):
    out = run(
        PARAMS,
        PROMPTS,
        MASK,
        ids,
        jax.random.key(key),
        legal=allowed,
        temperature=jnp.broadcast_to(jnp.asarray(temperature, jnp.float32), ()),
    )
    return jax.tree.map(np.asarray, out)


def only(**at):
    """Returns legal tokens that force a text: only(t0=[1], t3=[5, 9]). Other positions allow all but end tokens."""
    allowed = NO_EOS.copy()
    for place, tokens in at.items():
        allowed[:, int(place[1:])] = np.isin(np.arange(V), tokens)
    return allowed


def reference_logits(tokens, params=PARAMS, prompts=PROMPTS, mask=MASK):
    return reference.completion_logits(CONFIG, reference.float64(params), prompts, mask, tokens)


def chosen(logprobs, tokens):
    return np.take_along_axis(logprobs, tokens[..., None].astype(int), axis=-1)[..., 0]


trainer = jax.jit(functools.partial(scoring.compute_logprobs, CONFIG))


# -- the distribution ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.6, 1.0, 1.3])
@pytest.mark.parametrize("kind", ["all", "[T, V]", "[P, T, V]"])
def test_sampled_logprobs_equal_the_trainers_and_the_references(temperature, kind):
    if kind == "all":
        out, allowed = free(temperature=temperature), None
    elif kind == "[T, V]":
        out = legal(LEGAL[0], temperature=temperature)
        allowed = np.broadcast_to(LEGAL[0], LEGAL.shape)
    else:
        out, allowed = legal(LEGAL, temperature=temperature), LEGAL
    assert out.mask.sum() > 40 and out.tokens.dtype == np.int32 and out.logprobs.dtype == np.float32
    trained = trainer(PARAMS, jax.tree.map(jnp.asarray, out), jnp.float32(temperature), allowed).logprobs
    np.testing.assert_allclose(out.logprobs[out.mask], np.asarray(trained)[out.mask], atol=1e-5)
    law = reference.sampling_logprobs(
        reference_logits(out.tokens), temperature, None if allowed is None else allowed[:, None]
    )
    np.testing.assert_allclose(out.logprobs[out.mask], chosen(law, out.tokens)[out.mask], atol=5e-5)
    assert np.ptp(out.logprobs[out.mask]) > 1  # the distribution is far from uniform


def test_each_member_of_a_group_can_have_its_temperature_and_one_of_them_be_greedy():
    temperatures = np.array([1.0, 0.0, 0.6, 1.3], np.float32)
    out = free(temperature=temperatures)
    logits = reference_logits(out.tokens)
    law = reference.sampling_logprobs(logits, np.array([1.0, 1.0, 0.6, 1.3])[:, None, None])
    np.testing.assert_allclose(out.logprobs[out.mask], chosen(law, out.tokens)[out.mask], atol=5e-5)
    greedy = out.mask[:, 1]
    np.testing.assert_array_equal(out.tokens[:, 1][greedy], logits[:, 1].argmax(axis=-1)[greedy])
    for g, temperature in enumerate(temperatures):  # a member does not depend on the temperatures of the others
        np.testing.assert_array_equal(free(temperature=temperature).tokens[:, g], out.tokens[:, g])


def test_greedy_takes_the_most_probable_token_of_each_prompt_alone():
    out = free(temperature=0.0)
    assert (out.tokens == out.tokens[:, :1]).all()
    assert len({tuple(row) for row in out.tokens[:, 0]}) == P
    params = reference.float64(PARAMS)
    for p in range(P):
        text = list(PROMPTS[p, MASK[p]])
        for t in range(T):  # token by token, without cache, padding or batch
            logits = reference.forward(CONFIG, params, text)[-1]
            assert out.tokens[p, 0, t] == logits.argmax()
            assert out.logprobs[p, 0, t] == pytest.approx(reference.log_softmax(logits).max(), abs=5e-5)
            text.append(logits.argmax())
            if logits.argmax() in EOS:
                break
        assert out.mask[p, 0].sum() == len(text) - MASK[p].sum()


def test_greedy_obeys_the_legal_tokens():
    out = legal(LEGAL & NO_EOS, temperature=0.0)
    logits = np.where((LEGAL & NO_EOS)[:, None], reference_logits(out.tokens), -np.inf)
    np.testing.assert_array_equal(out.tokens, logits.argmax(axis=-1))
    assert (out.tokens != free(temperature=0.0).tokens).any()


def test_a_prompt_alone_gives_what_it_gives_in_a_batch_of_mixed_lengths():
    batch, alone = free(), compiled_once(pad=0)
    out = alone(
        PARAMS, PROMPTS[1:2, 3:], np.ones((1, 2), bool), IDS[1:2], jax.random.key(0), temperature=jnp.float32(1)
    )
    np.testing.assert_array_equal(out.tokens[0], batch.tokens[1])
    np.testing.assert_allclose(out.logprobs[0], batch.logprobs[1], atol=1e-5)


def test_padding_on_either_side_gives_the_same_samples():
    order = np.argsort(~MASK, axis=1, kind="stable")  # real tokens first
    left, right = free(), free(prompts=np.take_along_axis(PROMPTS, order, 1), mask=np.take_along_axis(MASK, order, 1))
    np.testing.assert_array_equal(left.tokens, right.tokens)
    np.testing.assert_allclose(left.logprobs, right.logprobs, atol=1e-5)


def test_illegal_tokens_are_never_sampled():
    drawn = 0
    for key in range(60):
        out = legal(LEGAL, key=key, temperature=[0.6, 1.3, 30.0][key % 3])
        p, g, t = np.nonzero(out.mask)
        assert LEGAL[p, t, out.tokens[out.mask]].all()
        assert np.isfinite(out.logprobs).all()
        drawn += len(p)
    assert drawn > 3000


def test_completions_follow_the_softmax_of_the_reference():
    first, second = [], []
    for key in range(150):
        out = legal(only(t0=[1, 2, 3]), key=key, ids=np.array([0, 1, 2]))
        first.append(out.tokens[0, :, 0])
        second.append(out.tokens[0, :, 1])
    first, second = np.concatenate(first), np.concatenate(second)
    texts = np.array([[[a, 0] for a in (1, 2, 3)]] * P)
    logits = reference_logits(texts)[0]
    at_first = np.exp(reference.sampling_logprobs(logits[0, 0, [1, 2, 3]], 1.0))
    assert scipy.stats.chisquare([(first == a).sum() for a in (1, 2, 3)], at_first * len(first)).pvalue > 1e-4
    for i, a in enumerate((1, 2, 3)):  # the distribution of the second token depends on the first
        law = np.exp(reference.sampling_logprobs(logits[i, 1], 1.0, NO_EOS[0, 1]))
        counts = np.bincount(second[first == a], minlength=V)
        top = np.argsort(law)[-3:]
        pool = lambda x: np.append(x[top], x.sum() - x[top].sum())
        if counts.sum() > 50:
            assert scipy.stats.chisquare(pool(counts), pool(law) * counts.sum()).pvalue > 1e-4


# -- one token -------------------------------------------------------------------------------------------------------

token = jax.jit(sample_token)


def draw(logits, noise):
    noise = np.asarray(noise, np.float32)
    tokens, logprobs = token(
        jnp.broadcast_to(jnp.asarray(logits, jnp.float32), (len(noise), len(logits))),
        noise,
        jnp.zeros(len(noise), bool),
    )
    return np.asarray(tokens), np.asarray(logprobs)


def random_law(rng, size, share=0.5, spread=3.0):
    logits = rng.normal(size=size) * spread
    logits[rng.random(size) > share] = -np.inf
    logits[rng.integers(size)] = 0.0
    return logits.astype(np.float32)


@pytest.mark.parametrize("size", [5, 128, 200, 300])
@pytest.mark.parametrize("share", [0.3, 1.0])
def test_frequencies_match_the_softmax_to_the_resolution_of_the_noise(size, share):
    n = 8000
    logits = random_law(np.random.default_rng(size), size, share)
    law = np.exp(reference.sampling_logprobs(logits.astype(np.float64), 1.0))
    tokens, logprobs = draw(logits, (np.arange(n) + 0.5) / n)
    assert (np.diff(tokens) >= 0).all()
    counts = np.bincount(tokens, minlength=size)
    assert counts.shape == (size,) and np.abs(counts / n - law).max() <= 1.01 / n
    np.testing.assert_allclose(logprobs, np.log(law[tokens]), atol=1e-5)


@pytest.mark.parametrize("size", [5, 300])
def test_frequencies_match_the_softmax_with_the_noise_that_is_used(size):
    noise = np.asarray(jax.jit(sampling_noise, static_argnums=(2, 3))(jax.random.key(1), jnp.arange(50), 8, 20)).ravel()
    logits = random_law(np.random.default_rng(size), size, spread=1.0)
    law = np.exp(reference.sampling_logprobs(logits.astype(np.float64), 1.0))
    counts = np.bincount(draw(logits, noise)[0], minlength=size)
    assert not counts[law == 0].any()
    assert scipy.stats.chisquare(counts[law > 0], law[law > 0] * len(noise)).pvalue > 1e-4


@pytest.mark.runs
@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 2**32 - 1),
    st.sampled_from([5, 128, 129, 300, 1000]),
    st.sampled_from([0.02, 0.3, 0.9, 1.0]),
    st.sampled_from([0.1, 3.0, 50.0]),
)
def test_noise_at_the_edges_of_the_cumulative_law_lands_on_possible_tokens_only(seed, size, share, spread):
    rng = np.random.default_rng(seed)
    logits = random_law(rng, size, share, spread)
    law = np.exp(reference.sampling_logprobs(logits.astype(np.float64), 1.0))
    edges = rng.choice(np.cumsum(law), 200).astype(np.float32)
    noise = [edges * np.float32(1 + k * 2.0**-24) for k in (-4, -2, -1, 0, 1, 2, 4)] + [[0, 1e-30, 0.5, ONE]]
    noise = np.clip(np.concatenate(noise[:-1] + [np.float32(noise[-1])] + [np.zeros(20, np.float32)]), 0, ONE)
    tokens, logprobs = draw(logits, noise)
    assert ((tokens >= 0) & (tokens < size)).all()
    possible = np.isfinite(logits[tokens])
    assert possible.all(), f"noise {noise[~possible][:3]} gave the illegal tokens {tokens[~possible][:3]}"
    assert np.isfinite(logprobs).all()
    cumulative = np.concatenate([[0.0], np.cumsum(law)])
    assert (cumulative[tokens] <= noise + 1e-5).all() and (cumulative[tokens + 1] >= noise - 1e-5).all()


@pytest.mark.parametrize(
    "logits, want_low, want_high",
    [
        ([-np.inf, 1.0, 2.0, -np.inf], 1, 2),
        ([1e30, 1e30, -1e30, 0.0], 0, 1),
        ([-1e30, -1e30, -3e38, -np.inf], 0, 1),
        ([1e-30, 0.0, -1e-30], 0, 2),
        ([-np.inf, -np.inf, -5e4], 2, 2),
        ([3e38] + [-np.inf] * 200 + [3e38] + [-np.inf] * 100, 0, 201),
    ],
)
def test_the_smallest_and_the_largest_noise_take_the_first_and_the_last_possible_token(logits, want_low, want_high):
    tokens, logprobs = draw(logits, [0.0, ONE])
    assert tokens.tolist() == [want_low, want_high]
    ways = {(0, 0): 1}.get((want_low, want_high), len({want_low, want_high}))
    if want_low == want_high or logits[want_low] == logits[want_high]:
        np.testing.assert_allclose(logprobs, -np.log(ways), atol=1e-6)
    assert np.isfinite(logprobs).all()


def test_greedy_rows_ignore_the_noise():
    logits = random_law(np.random.default_rng(1), 200)
    rows = jnp.broadcast_to(logits, (6, 200))
    tokens, logprobs = token(rows, np.float32([0, 0.2, 0.5, 0.9, 0.99, ONE]), jnp.ones(6, bool))
    assert set(np.asarray(tokens)) == {logits.argmax()}
    np.testing.assert_allclose(logprobs, reference.log_softmax(logits.astype(np.float64)).max(), atol=1e-5)


def test_noise_is_uniform_and_has_no_two_alike_by_prompt_sample_position_or_key():
    noise = jax.jit(sampling_noise, static_argnums=(2, 3))
    a = np.asarray(noise(jax.random.key(0), jnp.arange(20), 8, 20))
    b = np.asarray(noise(jax.random.key(1), jnp.arange(20), 8, 20))
    assert a.shape == (20, 8, 20) and a.dtype == np.float32 and a.min() >= 0 and a.max() < 1
    assert scipy.stats.kstest(a.ravel(), "uniform").pvalue > 1e-3
    # Numbers have 23 bits, so a few are equal by chance.
    assert len(np.unique(np.concatenate([a.ravel(), b.ravel()]))) > 2 * a.size - 20
    for axis in range(3):
        near = np.corrcoef(np.delete(a, 0, axis).ravel(), np.delete(a, -1, axis).ravel())[0, 1]
        assert abs(near) < 0.1


# -- keys ------------------------------------------------------------------------------------------------------------


def test_samples_of_a_group_differ_keys_differ_and_a_key_repeats():
    a, again, other = (legal(NO_EOS, key=key).tokens for key in (0, 0, 1))
    np.testing.assert_array_equal(a, again)
    assert all(len({tuple(row) for row in group}) == G for group in a)
    assert (a != other).any(axis=-1).all()


def test_a_sample_depends_on_its_prompt_id_and_on_nothing_else_of_its_batch():
    base = free()
    order = np.array([2, 0, 1])
    moved = free(prompts=PROMPTS[order], mask=MASK[order], ids=IDS[order])
    for name in ("tokens", "mask", "truncated", "prompt_tokens", "prompt_mask"):
        np.testing.assert_array_equal(getattr(moved, name), getattr(base, name)[order])
    np.testing.assert_allclose(moved.logprobs, base.logprobs[order], atol=1e-5)
    # The neighbours are now the same prompt under other ids.
    prompts, mask, ids = PROMPTS.copy(), MASK.copy(), IDS.copy()
    prompts[1:], mask[1:], ids[1:] = PROMPTS[0], MASK[0], [100, 101]
    beside = free(prompts=prompts, mask=mask, ids=ids)
    np.testing.assert_array_equal(beside.tokens[0], base.tokens[0])
    assert (beside.tokens[1] != beside.tokens[2]).any() and (beside.tokens[1] != base.tokens[0]).any()


def test_a_sample_does_not_depend_on_the_size_of_its_group_nor_on_the_budget():
    base = legal(NO_EOS)
    small = legal(NO_EOS[:, :4], run=compiled_once(group=2, length=4))
    np.testing.assert_array_equal(small.tokens, base.tokens[:, :2, :4])
    np.testing.assert_allclose(small.logprobs, base.logprobs[:, :2, :4], atol=1e-5)


def test_the_parameters_given_are_used_and_nothing_compiles_twice():
    run = run_free
    other = reference.random_params(CONFIG, seed=1, scale=0.3)
    base = free(run=run)
    programs = run._cache_size()
    results = [
        free(run=run, params=other),
        free(run=run, temperature=0.5),
        free(run=run, key=1),
        free(run=run, ids=IDS + 1),
        free(run=run, prompts=(PROMPTS + 1) % V),
    ]
    assert run._cache_size() == programs
    for out in results:
        assert (out.tokens != base.tokens).any()
    law = reference.sampling_logprobs(reference_logits(results[0].tokens, params=other), 1.0)
    np.testing.assert_allclose(
        results[0].logprobs[results[0].mask], chosen(law, results[0].tokens)[results[0].mask], atol=5e-5
    )
    vector = np.ones(G, np.float32)
    free(run=run, temperature=vector)
    programs = run._cache_size()  # temperatures [G] compile once, for their shape
    for temperature in (0.5 * vector, 0 * vector):
        free(run=run, temperature=temperature)
    assert run._cache_size() == programs
    assert free(run=run, params=other).tokens.tolist() == results[0].tokens.tolist()


# -- ends ------------------------------------------------------------------------------------------------------------


def lengths(out):
    assert (out.mask == (np.arange(T) < out.mask.sum(axis=-1, keepdims=True))).all()  # the mask is a prefix
    assert (out.tokens[~out.mask] == PAD).all() and (out.logprobs[~out.mask] == 0).all()
    assert (out.logprobs[out.mask] <= 0).all()
    return out.mask.sum(axis=-1)


@pytest.mark.parametrize("eos", EOS)
@pytest.mark.parametrize("place", [0, 2, T - 1])
def test_any_end_token_ends_a_completion_where_it_stands_and_belongs_to_it(eos, place):
    out = legal(only(**{f"t{place}": [eos]}))
    assert (lengths(out) == place + 1).all()
    assert (out.tokens[:, :, place] == eos).all()
    np.testing.assert_array_equal(out.logprobs[:, :, place], 0.0)  # the only legal token has probability 1
    assert not out.truncated.any()  # an end at the budget's last token counts too


def test_without_an_end_token_all_are_truncated():
    out = legal(NO_EOS)
    assert (lengths(out) == T).all() and out.truncated.all()
    assert not np.isin(out.tokens, EOS).any()


def test_groups_of_several_lengths_end_each_at_its_own_end_token():
    out = legal(only(t1=[5, 9, 1, 2], t3=[9, 1]), key=3, temperature=30.0)
    ends = lengths(out)
    assert set(ends.ravel()) == {2, 4, 6}
    for p, g in np.ndindex(P, G):
        text = out.tokens[p, g, : ends[p, g]]
        assert not np.isin(text[:-1], EOS).any()
        assert np.isin(text[-1], EOS) != out.truncated[p, g]
    law = reference.sampling_logprobs(reference_logits(out.tokens), 30.0, only(t1=[5, 9, 1, 2], t3=[9, 1])[:, None])
    np.testing.assert_allclose(out.logprobs[out.mask], chosen(law, out.tokens)[out.mask], atol=5e-5)


def test_the_pad_token_is_an_ordinary_token_where_it_does_not_end():
    out = legal(only(t1=[0], t4=[9]), run=(run := compiled_once(eos=(9,), pad=0)))
    assert (out.tokens[:, :, 1] == 0).all() and out.mask[:, :, :5].all() and not out.mask[:, :, 5].any()
    assert (out.tokens[:, :, 5] == 0).all() and not out.truncated.any()
    out = legal(only(t1=[5], t5=[1]), run=run)  # 5 is no end token here
    assert out.mask.all() and out.truncated.all()


def test_a_budget_of_one_token():
    out = compiled_once(length=1)(
        PARAMS,
        PROMPTS,
        MASK,
        IDS,
        jax.random.key(0),
        temperature=jnp.float32(1),
        legal=np.isin(np.arange(V), [5, 1])[None, None].repeat(P, 0),
    )
    assert out.mask.all() and out.mask.shape == (P, G, 1)
    np.testing.assert_array_equal(out.truncated, np.asarray(out.tokens)[..., 0] == 1)
    trained = trainer(PARAMS, out, jnp.float32(1), np.isin(np.arange(V), [5, 1])[None, None].repeat(P, 0))
    np.testing.assert_allclose(out.logprobs, trained.logprobs, atol=1e-5)


def test_decoding_stops_when_every_sample_has_ended():
    length = 1500
    run = compiled(group=1, length=length)
    endless = np.isin(np.arange(V), EOS, invert=True)[None].repeat(length, 0)
    ending = endless.copy()
    ending[1] = ~endless[1]

    def seconds(allowed):
        start = time.perf_counter()
        out = run(PARAMS, PROMPTS[:1], MASK[:1], IDS[:1], jax.random.key(0), temperature=jnp.float32(1), legal=allowed)
        count = int(out.mask.sum())
        return time.perf_counter() - start, count

    seconds(ending)  # compiles
    short, long = min(seconds(ending) for _ in range(3)), seconds(endless)
    assert (short[1], long[1]) == (2, length)
    assert short[0] < long[0] / 4


# -- rounded weights and caches --------------------------------------------------------------------------------------


def test_rounding_by_hand():
    x = np.array([[1.0, -2.0], [0.5, 0.0], [-0.25, 0.6]], np.float32)
    rounded = layers.quantize(jnp.asarray(x), axis=0)
    np.testing.assert_allclose(rounded.scale, [[1 / 127, 2 / 127]])
    np.testing.assert_array_equal(rounded.values, [[127, -127], [64, 0], [-32, 38]])  # .6 * 127 / 2 = 38.1
    assert rounded.values.dtype == jnp.int8
    y = np.array([[1.0, 2.0, 4.0]], np.float32)
    expected = [[(127 + 2 * 64 - 4 * 32) / 127, (-127 + 4 * 38) * 2 / 127]]
    np.testing.assert_allclose(layers.dot(jnp.asarray(y), rounded, "float32"), expected, rtol=1e-6)
    zeros = layers.quantize(jnp.zeros((2, 3)), axis=0)
    assert not np.any(zeros.values) and np.all(np.isfinite(zeros.scale))


@pytest.mark.slow
def test_a_rounded_rollout_reports_the_law_that_sampled_it():
    """It is close to the distribution of rounded weights. It differs by the rounded caches and the prompt's forward."""
    rounded = lambda x, axis: (lambda r: r.values.astype(jnp.float32) * r.scale)(layers.quantize(x, axis))
    matrices = {name: rounded(PARAMS["layers"][name], 1) for name in models.PROJECTIONS}
    close = {**PARAMS, "head": rounded(PARAMS["head"], 0), "layers": {**PARAMS["layers"], **matrices}}
    run = jax.jit(
        functools.partial(generate, CONFIG, group_size=16, max_length=T, eos_ids=EOS, pad_id=PAD, int8=True),
    )
    rollout = run(PARAMS, PROMPTS, MASK, IDS, jax.random.key(0), temperature=jnp.float32(1.3))
    score = lambda params: scoring.compute_logprobs(CONFIG, params, rollout, jnp.float32(1.3)).logprobs
    mask = np.asarray(rollout.mask)
    far, near = (np.abs(score(params) - rollout.logprobs)[mask].mean() for params in (PARAMS, close))
    assert mask.sum() > 100 and 1e-3 < far < 0.02 and near < far


@pytest.mark.runs
def test_attention_over_a_rounded_cache_is_attention_over_what_it_stands_for():
    P, G, N, R, K, C, S, T = 2, 3, 2, 2, 8, 5, 4, 1
    rng = np.random.default_rng(0)
    shape = lambda *sizes: jnp.asarray(rng.normal(size=sizes), jnp.float32)
    q = shape(P, G, T, N * R, K)
    own, prompt = (shape(P, G, N, K, C), shape(P, G, N, C, K)), (shape(P, N, K, S), shape(P, N, S, K))
    masks = jnp.asarray(rng.random((P, G, T, C)) < 0.7).at[..., 0].set(True), jnp.ones((P, G, T, S), bool)
    rounded_own, rounded_prompt = layers.round_to_int8(*own), layers.round_to_int8(*prompt)

    def meant(pair):
        keys, values = (x.values.astype(jnp.float32) for x in pair)
        return keys * pair[0].scale, values * pair[1].scale.swapaxes(-1, -2)

    for pair, exact in ((rounded_own, own), (rounded_prompt, prompt)):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=0.02), meant(pair), exact)
    attend = lambda own, prompt: layers.group_attention(
        q, (own,), masks[0], prompt, masks[1], scale=0.35, dtype="float32"
    )
    expected = attend(meant(rounded_own), meant(rounded_prompt))
    np.testing.assert_allclose(attend(rounded_own, rounded_prompt), expected, atol=1e-6)
    assert np.abs(attend(own, prompt) - expected).max() > 1e-4

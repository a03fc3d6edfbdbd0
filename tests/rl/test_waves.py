"""Tests waves of completions of similar length.

Gradients, metrics and scores equal the results of whole groups, for all sizes, devices and losses.
"""

import dataclasses
import functools
import os
import pathlib
import subprocess
import sys

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from helpers import reference_decoder as reference
import jaxrl_reason
from jaxrl_reason.methods import ExpertDigits, PolicyLoss, SelfReward
from jaxrl_reason.models import ModelConfig, reward_model, sharding
from jaxrl_reason.rewards.learned import scoring_program
from jaxrl_reason.rewards.model_training import group_scoring_program
from jaxrl_reason.rl import auxiliary, learner, scoring, waves
from jaxrl_reason.rl.types import Experience, Rollout
from jaxrl_reason.rl.waves import Size

pytestmark = pytest.mark.usefixtures("quick_compilation")

P, G, S, T, V = 8, 3, 5, 12, 23
CONFIG = ModelConfig(
    vocab_size=V, width=16, layers=2, heads=4, kv_heads=2, mlp_width=24, sliding_window=4, sliding_period=2
)
PARAMS = reference.random_params(CONFIG, seed=5, scale=0.3)
RNG = np.random.default_rng(0)
PROMPT_MASK = np.arange(S) >= RNG.integers(0, 4, (P, 1))
LENGTHS = np.minimum(RNG.geometric(0.25, (P, G)), T)
LENGTHS[0, 0], LENGTHS[3, 1], LENGTHS[5] = T, T, 0  # the budget ends two completions, and one prompt has none
LENGTHS[6, 2] = 0  # 16 completions count: waves of 4, 3 and five times 2 have an empty place
MASK = np.arange(T) < LENGTHS[..., None]
COUNTS = MASK & (RNG.random((P, G)) < 0.8)[..., None]  # the others are left out
LEGAL = RNG.random((T, V)) < 0.7
TOKENS = np.argmax(RNG.random((P, G, T, V)) * LEGAL, axis=-1).astype(np.int32)
JUDGED = SelfReward(coefficient=0.5, beta=0.3, warmup_steps=0)


def values(*shape, scale=1.0):
    return (scale * RNG.normal(size=shape)).astype(np.float32)


def experience():
    rollout = Rollout(
        RNG.integers(0, V, (P, S)).astype(np.int32), PROMPT_MASK, TOKENS, MASK, values(P, G, T) - 3, LENGTHS == T
    )
    judged = {
        "verdicts": RNG.random((P, G)) < 0.5,
        "valid": COUNTS.any(-1) & (LENGTHS < T),
        "reference": np.full((P, G), -2, np.float32),
    }
    targets = np.argmax(RNG.random((P, G, T, V)) * LEGAL, axis=-1)
    return Experience(
        rollout,
        COUNTS,
        values(P, G, T),
        values(P, G, T, scale=0.3) - 3,
        values(P, G, T, scale=0.3) - 3,
        {SelfReward.name: judged, ExpertDigits.name: targets},
    )


BATCH = experience()
LOSSES = {
    "token_mean": PolicyLoss(aggregation="token_mean", clip_high=0.28),
    "sequence_mean": PolicyLoss(aggregation="sequence_mean", ratio="sequence"),
    "sequence_sum": PolicyLoss(aggregation="sequence_sum", ratio="none"),
    "constant of 7": PolicyLoss(aggregation="constant", constant=7.0, ratio="cispo"),
    "a judge and an expert": PolicyLoss(aggregation="constant", auxiliary=(JUDGED, ExpertDigits(coefficient=0.3))),
}
REST = dict(kl_coefficient=0.5, entropy_coefficient=0.2, probe_token=3)


def gradient(name="token_mean", mesh=None, config=CONFIG, **options):
    """Returns the gradient of the batch at a temperature of 1.3, with legal tokens."""
    loss = LOSSES[name]
    kept = {k: v for k, v in BATCH.auxiliary.items() if k in [a.name for a in loss.auxiliary]}
    batch, options = BATCH._replace(auxiliary=kept), learner.UpdateOptions(loss=loss, **(REST | options))
    run = functools.partial(learner.gradient, config, options, temperature=jnp.float32(1.3), legal=jnp.asarray(LEGAL))
    if mesh is not None:
        batch, run = jax.device_put(batch, sharding.batch_sharding(mesh)), sharding.on_mesh(mesh, run)
    return jax.tree.map(np.asarray, jax.jit(run)(PARAMS, batch))


def assert_same(a, b, tolerance=2e-6):
    chex.assert_trees_all_equal_structs(a, b)
    tolerance *= max(
        1.0, *(np.abs(x).max() for x in jax.tree.leaves(b.grads))
    )  # float32 rounds sums relative to their terms
    chex.assert_trees_all_close(a._replace(position=0), b._replace(position=0), atol=tolerance, rtol=tolerance)
    np.testing.assert_array_equal(a.position, b.position)


@functools.cache
def of_groups(name):
    found = gradient(name)
    assert max(np.abs(x).max() for x in jax.tree.leaves(found.grads)) > 0.01
    return found


IN_WAVES = dict(lengths=3, wave_tokens=2 * T)  # lengths 3, 6 and 12


@pytest.mark.parametrize(
    "name",
    [n if n == "a judge and an expert" else pytest.param(n, marks=pytest.mark.runs) for n in LOSSES],
)
def test_the_gradient_is_that_of_whole_groups(name):
    assert_same(gradient(name, **IN_WAVES), of_groups(name))


@pytest.mark.runs
@pytest.mark.parametrize(
    "options",
    [
        dict(lengths=2, wave_tokens=1),
        dict(lengths=4, wave_tokens=1000),
        dict(lengths=3, wave_tokens=5 * T, accumulation=2, logprob_chunk=2),
        dict(lengths=3, wave_tokens=5 * T, accumulation=8),
    ],
    ids=str,
)
def test_the_gradient_does_not_depend_on_the_sizes(options):
    assert_same(gradient(**options), of_groups("token_mean"))


@pytest.mark.runs
@pytest.mark.parametrize("attention", ["splash", "blockwise"])
def test_the_gradient_does_not_depend_on_the_attention(attention):
    config = dataclasses.replace(CONFIG, attention=attention, remat="dots")
    assert_same(gradient(config=config, **IN_WAVES), of_groups("token_mean"), tolerance=1e-5)


def scores(**options):
    run = functools.partial(scoring.score, CONFIG, probe_token=3, **options)
    return jax.tree.map(np.asarray, jax.jit(run)(PARAMS, BATCH.rollout, jnp.float32(1.3), jnp.asarray(LEGAL)))


def test_scores_are_those_of_whole_groups():
    whole, found = scores(), scores(**IN_WAVES, microbatches=2)
    np.testing.assert_allclose(found.logprobs[MASK], whole.logprobs[MASK], atol=2e-6, rtol=2e-6)
    ended = (LENGTHS > 0) & (LENGTHS < T)
    np.testing.assert_allclose(found.probe_logprobs[ended], whole.probe_logprobs[ended], atol=2e-6, rtol=2e-6)
    assert not found.entropy.any()


def test_scores_of_reward_models_are_those_of_whole_groups():
    params = reward_model.init_params(CONFIG, jax.random.key(1), PARAMS)
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    whole = reward_model.group_scores(CONFIG, params, BATCH.rollout)
    found = group_scoring_program(CONFIG, mesh, 2, **IN_WAVES)(params, BATCH.rollout)
    assert np.isnan(whole).sum() == (LENGTHS == 0).sum()
    np.testing.assert_allclose(found, whole, atol=2e-6, rtol=2e-6)
    texts = reward_model.scores(CONFIG, params, TOKENS.reshape(-1, T), MASK.reshape(-1, T)).reshape(P, G)
    for options in (IN_WAVES, {}):
        found = scoring_program(CONFIG, sharding.batch_sharding(mesh), **options)(params, TOKENS, LENGTHS, 2)
        np.testing.assert_allclose(found, texts, atol=2e-6, rtol=2e-6)


MESHES = ((8, 1, 1), (2, 2, 2))


@pytest.mark.runs
def test_the_gradient_does_not_depend_on_the_devices(tmp_path):
    """A process with 8 devices splits the prompts over all of them, or over 4 with the heads over 2."""
    flags = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
    folders = [str(pathlib.Path(__file__).parents[1]), str(pathlib.Path(jaxrl_reason.__file__).parents[1])]
    env = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, "PYTHONPATH": os.pathsep.join(folders)}
    done = subprocess.run([sys.executable, __file__, str(tmp_path)], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    expected = jax.tree.leaves(of_groups("a judge and an expert"))
    for mesh in MESHES:
        with np.load(tmp_path / f"{mesh[2]}.npz") as found:
            assert len(found) == len(expected)
            for x, y in zip(found.values(), expected, strict=True):
                np.testing.assert_allclose(x, y, atol=5e-6, rtol=5e-6)


def save_gradients_on_devices(folder):
    for mesh in MESHES:
        found = gradient("a judge and an expert", sharding.make_mesh(*mesh), **IN_WAVES)
        np.savez(folder / f"{mesh[2]}.npz", *jax.tree.leaves(found))


# -- the waves of an update and of a scoring ---------------------------------------------------------------------------


@pytest.fixture
def asked(monkeypatch):
    """Returns a list of the sizes and sums of each program. Waves are not computed: the results are the lengths."""
    seen = []

    def for_each(sizes, lengths, body, carry):
        seen.append((sizes, carry))
        if isinstance(carry, scoring.LogProbs):
            return carry._replace(probe_logprobs=lengths.astype(jnp.float32))
        *sums, (_, position) = carry
        return *sums, (lengths.astype(jnp.float32), position)

    monkeypatch.setattr(waves, "queue", lambda lengths: lengths)
    monkeypatch.setattr(waves, "for_each", for_each)
    return seen


PARTS = [
    Size(6, 9),
    Size(12, 6),
]  # 2 parts of 4 prompts: 6 of 12 completions, or 6 * 17 // 11 = 9 of half the length


def test_the_update_computes_completions_that_count_with_sums_in_float32(asked):
    config = dataclasses.replace(CONFIG, param_dtype="bfloat16", compute_dtype="bfloat16")
    options = learner.UpdateOptions(loss=LOSSES["token_mean"], **REST, lengths=2, wave_tokens=1000, accumulation=4)
    params = jax.tree.map(lambda x: x.astype("bfloat16"), PARAMS)
    batch = BATCH._replace(auxiliary={})
    found = jax.jit(functools.partial(learner.gradient, config, options))(params, batch, jnp.float32(1.0))
    np.testing.assert_array_equal(found.difference, np.where(COUNTS.any(-1), LENGTHS, 0))
    assert [sizes for sizes, _ in asked] and all(sizes == PARTS for sizes, _ in asked)
    assert {x.dtype for _, (*sums, _) in asked for x in jax.tree.leaves(sums)} == {jnp.dtype("float32")}


def test_the_score_computes_all_completions_in_waves_as_large_as_the_updates(asked):
    found = scores(lengths=2, wave_tokens=1000, microbatches=4)
    np.testing.assert_array_equal(found.probe_logprobs, LENGTHS)
    assert [sizes for sizes, _ in asked] and all(sizes == PARTS for sizes, _ in asked)


def test_data_of_auxiliary_losses_belong_to_completions(monkeypatch):
    of_prompts = auxiliary.AuxiliaryLoss(
        data=lambda settings, x: {"first": x.rollout.tokens[:, 0, 0]}, loss=lambda *_: 0.0
    )
    monkeypatch.setitem(auxiliary.AUXILIARY, SelfReward.name, of_prompts)
    inputs = auxiliary.AuxiliaryInputs(BATCH.rollout, LENGTHS > 3, COUNTS.any(-1), {}, None, None)
    with pytest.raises(ValueError, match=r"'self_reward' have the shape \(8,\), which must be \[P, G\] = \(8, 3\) or"):
        auxiliary.make_data(PolicyLoss(auxiliary=(JUDGED,)), inputs)


def test_a_loss_that_begins_later_needs_a_restrict(monkeypatch):
    later = auxiliary.AuxiliaryLoss(data=lambda *_: None, loss=lambda *_: 0.0, from_step=lambda settings: 3)
    monkeypatch.setitem(auxiliary.AUXILIARY, SelfReward.name, later)
    with pytest.raises(ValueError, match="'self_reward' has from_step and no restrict"):
        auxiliary.at_step(PolicyLoss(auxiliary=(JUDGED,)), {"self_reward": LENGTHS}, BATCH.mask, 0)


# -- the waves, by hand ----------------------------------------------------------------------------------------------


def test_sizes():
    """8 prompts of 32 tokens have 8 completions of 256 tokens. The first case has 576 tokens per wave."""
    assert waves.sizes(8, 8, 32, 256, 3, 512, 1) == [Size(64, 6), Size(128, 3), Size(256, 2)]
    assert waves.sizes(8, 8, 0, 256, 2, 767, 1) == [Size(128, 4), Size(256, 2)]  # rounded down to two completions
    assert waves.sizes(1, 2, 32, 256, 3, 4096, 1) == [Size(64, 2), Size(128, 2), Size(256, 2)]  # all completions
    assert waves.sizes(8, 8, 32, 256, 2, 4096, 16) == [Size(128, 7), Size(256, 4)]  # a microbatch has 4
    assert waves.sizes(8, 8, 32, 256, 1, 0, 1) == [Size(256, 1)]
    assert waves.sizes(1, 1, 32, 100, 2, 1, 9) == [Size(50, 1), Size(100, 1)]


def test_parts_of_the_prompts():
    assert waves.prompt_parts(8, 32, 256, 4) == 1
    assert waves.prompt_parts(8, 256, 64, 8) == 8  # prompts are a third of the tokens
    assert waves.prompt_parts(8, 1024, 1024, 12) == 4  # 36 / 9
    assert waves.prompt_parts(8, 1024, 1024, 1) == 1


def taken(lengths, sizes):
    """Returns the length and the completions of each wave."""

    def add(wave, state):
        count, seen, size = state
        places = jnp.arange(wave.home.shape[0])
        return count + 1, seen.at[count, places].set(wave.home[:, 0]), size.at[count].set(wave.length)

    empty = jnp.int32(0), jnp.full((20, 4), -1), jnp.zeros(20, int)
    count, seen, size = waves.for_each(sizes, waves.queue(jnp.asarray(lengths)), add, empty)
    return [(int(n), [int(i) for i in row if i >= 0]) for n, row in zip(size[:count], seen)]


def test_waves_by_hand():
    """Two completions of at most 4 tokens do not fill a wave of three, so they wait. 6 marks an empty place."""
    sizes = [Size(4, 3), Size(8, 2)]
    assert taken([[8, 1, 5], [3, 0, 6]], sizes) == [(8, [1, 3]), (8, [2, 5]), (8, [0, 6])]
    assert taken([[8, 1, 4], [3, 0, 6]], sizes) == [(4, [1, 3, 2]), (8, [5, 0])]
    assert taken([[4, 1, 4], [3, 2, 1]], sizes) == [(4, [1, 5, 4]), (4, [3, 0, 2])]
    assert taken([[0, 0, 0], [0, 0, 0]], sizes) == []


def test_completions_are_taken_and_put_back():
    """Worked by hand: 2 prompts have 2 completions of 3 tokens, and a wave has 2 tokens and an empty place."""
    wave = waves.Wave(jnp.array([[3], [0], [4]]), 2)
    np.testing.assert_array_equal(wave.live(4), [[True], [True], [False]])
    tokens, per_row = jnp.arange(12).reshape(2, 2, 3), jnp.arange(4).reshape(2, 2) * 10
    found = waves.take(wave, {"tokens": tokens, "per_row": per_row})
    np.testing.assert_array_equal(found["tokens"][:2], [[[9, 10]], [[0, 1]]])
    np.testing.assert_array_equal(found["per_row"][:2], [[30], [0]])
    assert found["tokens"].shape == (3, 1, 2) and found["per_row"].shape == (3, 1)
    back = waves.put(wave, {"tokens": tokens, "per_row": per_row}, jax.tree.map(lambda x: x + 100, found))
    np.testing.assert_array_equal(back["tokens"], [[[100, 101, 2], [3, 4, 5]], [[6, 7, 8], [109, 110, 11]]])
    np.testing.assert_array_equal(back["per_row"], [[100, 10], [20, 130]])
    prompts = jnp.array([1.0, 2.0])
    np.testing.assert_array_equal(waves.take_prompts(wave, 2, prompts)[:2], [2, 1])
    twice = waves.Wave(jnp.array([[3], [2], [4]]), 2)
    added = jnp.array([5.0, 2.0**-8, 9.0], jnp.bfloat16)  # 7 + 2^-8 has more digits than bfloat16
    np.testing.assert_array_equal(waves.add_prompts(twice, 2, prompts, added), [1, 7 + 2.0**-8])


if __name__ == "__main__":
    save_gradients_on_devices(pathlib.Path(sys.argv[1]))

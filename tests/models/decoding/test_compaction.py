"""Smaller loops and caches in pieces give the samples of one loop, for all sizes, devices and options."""

import functools
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from helpers import reference_decoder as reference
import jaxrl_reason
from jaxrl_reason.models import Decoder, ModelConfig, sharding
from jaxrl_reason.models.decoding import compaction
from jaxrl_reason.models.decoding.rollout import generate

pytestmark = pytest.mark.usefixtures("quick_compilation")

P, G, S, T, V = 8, 3, 5, 12, 37
EOS, PAD = (1, 5, 7, 9, 13, 20, 24, 30, 33), 0
CONFIG = ModelConfig(
    vocab_size=V, width=16, layers=2, heads=4, kv_heads=2, mlp_width=24, sliding_window=4, sliding_period=2
)
PARAMS = reference.random_params(CONFIG, seed=23, scale=0.3)
RNG = np.random.default_rng(0)
PROMPTS = RNG.integers(0, V, (P, S)).astype(np.int32)
MASK = np.arange(S) >= RNG.integers(0, 4, (P, 1))
IDS = np.arange(P, dtype=np.int32) * 3
LEGAL = RNG.random((P, T, V)) < 0.5
LEGAL[..., 20] = True


def run(*, cache_pieces=1, halvings=0, temperature=1.0, mesh=None, legal=None, end_at=None, **options):
    def sample(params, prompts, mask, ids):
        return generate(
            CONFIG,
            params,
            prompts,
            mask,
            ids,
            jax.random.key(3),
            group_size=G,
            max_length=T,
            eos_ids=EOS,
            pad_id=PAD,
            temperature=jnp.asarray(temperature, jnp.float32),
            legal=legal,
            end_at=end_at,
            cache_pieces=cache_pieces,
            halvings=halvings,
            **options,
        )

    inputs = (PROMPTS, MASK, IDS)
    if mesh is not None:
        inputs = jax.device_put(inputs, sharding.batch_sharding(mesh))
        sample = sharding.on_mesh(mesh, sample)
    return jax.tree.map(np.asarray, jax.jit(sample)(PARAMS, *inputs))


def assert_same(a, b):
    """Asserts that tokens and masks are equal, and that log-probabilities differ by rounding only."""
    for name, x, y in zip(a._fields, a, b):
        if x is None or x.dtype != np.float32:
            np.testing.assert_array_equal(x, y, err_msg=name)
        else:
            np.testing.assert_allclose(x, y, atol=5e-6, rtol=2e-6, err_msg=name)


OPTIONS = {
    "several end tokens": {},
    "legal tokens of all prompts": dict(legal=LEGAL[0]),
    "legal tokens per prompt": dict(legal=LEGAL),
    "int8": dict(int8=True),
    "log-probabilities of prompts": dict(with_prompt_logprobs=True),
    "a probe": dict(probe_token=2, probe_temperature=0.7),
    "temperatures, one greedy": dict(temperature=[1.0, 0.0, 1.3]),
    "top-k and top-p": dict(top_k=jnp.array([0, 12, 30]), top_p=jnp.array([0.95, 1.0, 0.9])),
    "forced ends": dict(end_at=np.arange(P * G).reshape(P, G) % T // 2 * (np.arange(G) + 1) % T),
}


ON_DEVICES, MESHES = (
    ("several end tokens", "legal tokens per prompt", "a probe", "top-k and top-p"),
    ((8, 1, 1), (2, 2, 2)),
)


@functools.cache
def one_loop(name):
    return run(**OPTIONS[name])


QUICK = ("legal tokens of all prompts", "a probe")


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.runs) for n in OPTIONS])
def test_samples_do_not_depend_on_the_loops(name):
    expected = one_loop(name)
    lengths = expected.mask.sum(-1)
    assert 1 <= (lengths > T // 2).sum() <= P * G / 2  # few completions are long, so all loops run
    assert_same(run(cache_pieces=2, halvings=2, **OPTIONS[name]), expected)


@pytest.mark.runs
@pytest.mark.parametrize(
    "sizes", [(1, 1), (5, 0), pytest.param((12, 5), marks=pytest.mark.slow)]
)  # 5 pieces of 3 places are more than T
def test_samples_do_not_depend_on_the_sizes(sizes):
    assert_same(run(cache_pieces=sizes[0], halvings=sizes[1]), one_loop("several end tokens"))


@pytest.mark.runs
def test_samples_do_not_depend_on_the_devices(tmp_path):
    """A process with 8 devices splits the prompts over all of them, or over 4 with the heads over 2."""
    flags = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
    folders = [str(pathlib.Path(__file__).parents[2]), str(pathlib.Path(jaxrl_reason.__file__).parents[1])]
    env = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, "PYTHONPATH": os.pathsep.join(folders)}
    done = subprocess.run([sys.executable, __file__, str(tmp_path)], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    for name in ON_DEVICES:
        for mesh in MESHES:
            with np.load(tmp_path / f"{name}-{mesh[2]}.npz") as found:
                expected = {k: v for k, v in one_loop(name)._asdict().items() if v is not None}
                assert found.keys() == expected.keys()
                for key in expected:
                    tolerance = 1e-5 if expected[key].dtype == np.float32 else 0
                    np.testing.assert_allclose(
                        found[key], expected[key], atol=tolerance, rtol=tolerance, err_msg=f"{name} {key}"
                    )


def save_samples_on_devices(folder):
    for name in ON_DEVICES:
        for mesh in MESHES:
            devices = sharding.rollout_mesh(sharding.make_mesh(*mesh), mesh[2])
            out = run(cache_pieces=2, halvings=2, mesh=devices, **OPTIONS[name])
            np.savez(folder / f"{name}-{mesh[2]}.npz", **{k: v for k, v in out._asdict().items() if v is not None})


@pytest.mark.runs
def test_a_smaller_loop_takes_over_when_few_are_left(monkeypatch):
    """Of 24 completions, 12, 6, 3 and 3 end together. The loops begin with 24, 12, 6 and 3 rows that all grow."""
    ends = np.array([1] * 12 + [5] * 6 + [8] * 3 + [11] * 3).reshape(P, G)
    steps = []
    embed = Decoder.step

    def counted(self, tokens, index, *rest):
        jax.debug.callback(lambda index: steps.append((tokens.size, int(index))), index)
        return embed(self, tokens, index, *rest)

    monkeypatch.setattr(Decoder, "step", counted)
    out = run(cache_pieces=2, halvings=3, end_at=ends)
    jax.effects_barrier()
    np.testing.assert_array_equal(out.mask.sum(-1), ends + 1)
    # Each step reads the token before the one that it samples.
    expected = (
        [(24, 0)] + [(12, i) for i in range(1, 5)] + [(6, i) for i in range(5, 8)] + [(3, i) for i in range(8, 11)]
    )
    assert sorted(steps, key=lambda step: step[1]) == expected


@pytest.mark.runs
def test_a_step_reads_the_pieces_that_are_begun(monkeypatch):
    """12 tokens are 3 pieces of 4, and 11 steps write places 0 to 10.

    So each of 2 layers reads one, two and three pieces 4, 4 and 3 times.
    """
    read, attend_under = [], Decoder._attend_under

    def counted(self, *args):
        attend = attend_under(self, *args)

        def attend_and_count(q, own):
            if q.shape[2] == 1:  # a decoding step, not the prefill
                jax.debug.callback(lambda: read.append(len(own)))
            return attend(q, own)

        return attend_and_count

    monkeypatch.setattr(Decoder, "_attend_under", counted)
    run(cache_pieces=3, end_at=np.full((P, G), T))
    jax.effects_barrier()
    assert sorted(read) == [1] * 8 + [2] * 8 + [3] * 6


def test_sizes_of_the_smaller_loops():
    assert compaction.sizes(4, 8, 32, 256, 3) == [16, 8, 4]
    assert compaction.sizes(1, 6, 1, 9, 9) == [3, 2, 1]
    assert compaction.sizes(1, 1, 32, 256, 3) == []
    assert compaction.sizes(2, 8, 1024, 128, 3) == [2]  # copies of long prompts would need more memory than one loop
    assert compaction.sizes(4, 8, 32, 256, 0) == []


def test_completions_move_and_return():
    """Worked by hand: 2 prompts have 3 completions each, of which 3 in all still grow."""
    busy = jnp.array([[False, True, False], [True, False, True]])
    cache = compaction.PromptCache(
        (jnp.arange(2.0),), (), jnp.array([[True], [False]]), jnp.zeros((2, 1), int), jnp.array([4, 7])
    )
    rows = compaction.first_rows(cache, jnp.arange(6.0).reshape(2, 3, 1), jnp.array([1.0, 2.0, 3.0]), None, None)
    state = jnp.arange(6).reshape(2, 3) * 10
    kept, moved = compaction.keep(busy, 3, rows, state)
    np.testing.assert_array_equal(moved, [[10], [30], [50]])
    np.testing.assert_array_equal(kept.home, [[1], [3], [5]])
    np.testing.assert_array_equal(kept.noise[..., 0], [[1], [3], [5]])
    np.testing.assert_array_equal(kept.temperature, [[2], [1], [3]])
    np.testing.assert_array_equal(kept.prompt.lengths, [4, 7, 7])
    np.testing.assert_array_equal(kept.prompt.keys[0], [0, 1, 1])
    again, smaller = compaction.keep(jnp.array([[False], [False], [True]]), 1, kept, moved)
    np.testing.assert_array_equal(again.home, [[5]])
    np.testing.assert_array_equal(compaction.put_back(state, smaller + 1, again.home), [[0, 10, 20], [30, 40, 51]])
    assert compaction.most_per_device(busy) == 3


if __name__ == "__main__":
    save_samples_on_devices(pathlib.Path(sys.argv[1]))

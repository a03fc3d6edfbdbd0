"""Compares costs from sizes with the programs that XLA compiles and with numbers by hand."""

import dataclasses
import functools
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxrl_reason import models
from jaxrl_reason.methods import PolicyLoss
from jaxrl_reason.models import ModelConfig, reward_model, sharding
from jaxrl_reason.models.decoding import rollout
from jaxrl_reason.plan import costs, hlo
from jaxrl_reason.plan.lengths import skewed_lengths
from jaxrl_reason.rewards.learned import scoring_program
from jaxrl_reason.rl import learner, scoring
from jaxrl_reason.rl import optimizer as optimizers
from jaxrl_reason.rl.learner import UpdateOptions
from jaxrl_reason.rl.types import Experience, Rollout, TrainState

P, G, S, T = 4, 3, 24, 16
CONFIG = ModelConfig(vocab_size=640, width=128, layers=2, heads=4, kv_heads=2, mlp_width=320)
ADAPTED = dataclasses.replace(CONFIG, lora_rank=8)
MATRICES = 128 * 128 * 2 + 128 * 64 * 2 + 3 * 128 * 320  # numbers in the matrices of a layer


def lowered(program, config, P=P, G=G, S=S, T=T, mesh=None, *, options=None, **keywords):
    """Returns a lowered program of `costs` with abstract arguments, on a mesh if one is given."""
    whole, split = (sharding.replicated(mesh), sharding.batch_sharding(mesh)) if mesh else (None, None)
    of = lambda shape, dtype, place=split: jax.ShapeDtypeStruct(shape, dtype, sharding=place)
    place = lambda tree, places: jax.tree.map(lambda x, at: of(x.shape, x.dtype, at), tree, places)
    params = models.abstract_params(config)
    params = place(params, models.param_shardings(config, mesh)) if mesh else params
    features = of((P, config.features), jnp.float32) if config.features else None
    prompts = of((P, S), jnp.int32), of((P, S), bool)
    batch = Rollout(
        *prompts, of((P, G, T), jnp.int32), of((P, G, T), bool), of((P, G, T), jnp.float32), of((P, G), bool), features
    )
    temperature = of((), jnp.float32, whole)
    key = of((), jax.random.key(0).dtype, whole)
    if program == "rollout":
        settings = dict(group_size=G, max_length=T, eos_ids=(1,), pad_id=0) | keywords
        generate = functools.partial(rollout.generate, config, **settings)
        arguments = params, *prompts, of((P,), jnp.int32), key
        return jax.jit(generate).lower(*arguments, temperature=temperature, features=features)
    if program == "score":
        return jax.jit(functools.partial(scoring.score, config, **keywords)).lower(params, batch, temperature)
    if program == "reward_model":
        weights = reward_model.abstract_params(config)
        return jax.jit(functools.partial(reward_model.group_scores, config, **keywords)).lower(weights, batch)
    optimizer = optax.adamw(1e-4)
    trained = models.lora.split(config, params)[0]
    opt_state = jax.eval_shape(functools.partial(optimizers.init_opt_state, optimizer), trained)
    number = of((), jnp.int32, whole)
    state = TrainState(number, *models.lora.split(config, params), opt_state, (), number)
    many = options.epochs * options.minibatches > 1
    experience = Experience(batch, batch.mask, of((P, G), jnp.float32), batch.logprobs if many else None)
    update = learner.make_update(config, options, optimizer)
    return jax.jit(update, donate_argnums=0).lower(state, experience, temperature, key)


def options(**keywords):
    return UpdateOptions(loss=PolicyLoss(), **keywords)


def of_program(lowered, **keywords):
    # The program skips slow optimizations. Its products already have their final form.
    text = lowered.compile(compiler_options={"xla_backend_optimization_level": 0}).as_text()
    return hlo.read(text, **keywords).flops


def with_(config=CONFIG, **changes):
    return dataclasses.replace(config, **changes)


@pytest.mark.runs
@pytest.mark.parametrize(
    "config",
    [
        CONFIG,
        pytest.param(with_(tied_embedding=False, qkv_bias=True, compute_dtype="bfloat16"), marks=pytest.mark.slow),
        with_(ADAPTED, qk_norm=True, sliding_window=6, sliding_period=2),
        pytest.param(with_(features=5, prefix_length=4, encoder_width=96), marks=pytest.mark.slow),
    ],
)
def test_flops_of_rollout_and_score_equal_those_of_their_programs(config):
    sizes = P, G, S, T
    assert costs.rollout(config, *sizes).flops == pytest.approx(of_program(lowered("rollout", config)), rel=1e-3)
    assert costs.score(config, *sizes).flops == pytest.approx(of_program(lowered("score", config)), rel=1e-3)


@pytest.mark.slow
def test_flops_include_options():
    more = lowered("rollout", CONFIG, with_prompt_logprobs=True, probe_token=3)
    expected = costs.rollout(CONFIG, P, G, S, T, prompt_logprobs=True, probe=True).flops
    assert expected == pytest.approx(of_program(more, loop_trips=T), rel=1e-3)
    more = lowered("score", CONFIG, microbatches=2, chunk=5, probe_token=3)  # 16 positions are four chunks of 5
    expected = costs.score(CONFIG, P, G, S, T, parts=2, logprob_chunk=5, probe=True).flops
    assert expected == pytest.approx(of_program(more), rel=1e-3)
    pieces = lowered("rollout", CONFIG, P, G, S, 64, cache_pieces=4)
    assert costs.rollout(CONFIG, P, G, S, 64, pieces=4).flops == pytest.approx(of_program(pieces), rel=1e-3)
    assert costs.rollout(CONFIG, P, G, S, 64).flops > 1.01 * of_program(pieces)
    rounded = lowered("rollout", CONFIG, int8=True)
    assert costs.rollout(CONFIG, P, G, S, T, int8=True).flops == pytest.approx(of_program(rounded), rel=1e-3)
    scored = lowered("reward_model", CONFIG, parts=2)
    assert costs.reward_model(CONFIG, P, G, S, T, parts=2).flops == pytest.approx(of_program(scored), rel=1e-3)


@pytest.mark.runs
@pytest.mark.parametrize(
    "config",
    [
        pytest.param(with_(remat="none", qkv_bias=True, tied_embedding=False), marks=pytest.mark.slow),
        pytest.param(with_(remat="dots"), marks=pytest.mark.slow),
        with_(remat="layer", compute_dtype="bfloat16"),
        pytest.param(with_(remat="layer", post_norms=True), marks=pytest.mark.slow),
        pytest.param(with_(ADAPTED, remat="none", compute_dtype="bfloat16"), marks=pytest.mark.slow),
        pytest.param(with_(ADAPTED, remat="dots", lora_projections=("q", "v")), marks=pytest.mark.slow),
        pytest.param(with_(ADAPTED, remat="layer"), marks=pytest.mark.slow),
        pytest.param(
            with_(remat="layer", features=5, prefix_length=4, encoder_width=96, encoder_layers=2),
            marks=pytest.mark.slow,
        ),
    ],
)
def test_flops_of_an_update_equal_those_of_its_program(config):
    program = lowered("update", config, options=options())
    assert costs.update(config, P, G, S, T).flops == pytest.approx(of_program(program), rel=1e-3)


@pytest.mark.runs
@pytest.mark.parametrize(
    "settings",
    [
        dict(accumulation=2, logprob_chunk=5),
        pytest.param(dict(epochs=2, minibatches=2), marks=pytest.mark.slow),
        pytest.param(dict(logprob_chunk=T), marks=pytest.mark.slow),
    ],
)
def test_flops_of_an_update_in_parts_equal_those_of_its_program(settings):
    program = lowered("update", CONFIG, options=options(**settings))
    assert costs.update(CONFIG, P, G, S, T, **settings).flops == pytest.approx(of_program(program), rel=1e-3)


def test_recomputed_flops_equal_the_difference_between_remat_modes():
    kept, recomputed = (
        costs.update(with_(remat=remat), P, G, S, T, logprob_chunk=T // 2) for remat in ("none", "layer")
    )
    assert recomputed.flops - kept.flops == recomputed.recomputed_flops - kept.recomputed_flops > 0
    assert kept.recomputed_flops == 2 * P * G * T * 128 * 640  # the logits of two chunks


@pytest.mark.parametrize("window, period", [(0, 0), (6, 2), (10, 0)])
def test_splash_attention_costs_the_visible_pairs(window, period):
    config = with_(sliding_window=window, sliding_period=period, layers=4)
    pairs = 0
    for sliding in config.sliding_layers:
        far = np.subtract.outer(np.arange(S + T), np.arange(S + T))
        seen = (far >= 0) & ((far < window) | (not sliding))
        pairs += P * (seen[:S].sum() + G * seen[S:].sum())
    forward = costs.reward_model(config, P, G, S, T, attention="splash")
    assert forward.attention_flops == pairs * 4 * 4 * 32
    plain = costs.reward_model(config, P, G, S, T)
    assert plain.attention_flops == 4 * P * (S * S + G * T * (S + T)) * 4 * 4 * 32
    assert plain.flops - plain.attention_flops == forward.flops - forward.attention_flops
    # An update has two forwards, and 7 products per 2 of the forward. Its last token is no query.
    one = costs.score(config, P, G, S, T, attention="splash").attention_flops
    assert costs.update(config, P, G, S, T, attention="splash").attention_flops == one * (1 + 1 + 3.5)


# Width 4, 2 heads of size 2, 1 key head, MLP of 6. So 4*4 + 2*4*2 + 4*4 + 3*4*6 = 120 numbers in the layer, 40 in the
# head.
SMALL = ModelConfig(
    vocab_size=10, width=4, layers=1, heads=2, kv_heads=1, mlp_width=6, param_dtype="float32", compute_dtype="bfloat16"
)


def test_a_step_of_decoding_moves_weights_caches_and_logits():
    moved = lambda T, **k: costs.rollout(SMALL, 3, 5, 7, T, **k).bytes
    weights, logits = 120 + 40, 15 * 2 * 4 * 10
    per_token = 2 * 2  # numbers in a key and a value
    step = lambda T: 2 * weights + 2 * per_token * (3 * 7 + 15 * T + 15) + logits
    assert moved(2) - moved(1) == step(2)
    assert moved(3) - moved(1) == 2 * step(3)
    assert moved(2, replicas=3) - moved(1, replicas=3) == step(2) + 2 * 2 * weights
    rounded = weights + 2 * (2 + 4) * (3 * 7 + 15 * 2 + 15) + logits  # a float32 scale per head and position
    assert moved(2, int8=True) - moved(1, int8=True) == rounded


def test_a_forward_moves_weights_activations_and_scores():
    tokens, numbers = 3 * (7 + 5 * 2), 4 * (4 + 4 + 2 + 6)
    plain, splash = (costs.reward_model(SMALL, 3, 5, 7, 2, attention=a).bytes for a in ("plain", "splash"))
    assert splash == 2 * 120 + 2 * tokens * numbers
    assert plain - splash == 12 * 2 * 3 * (7 * 7 + 5 * 2 * 9)  # 12 bytes per pair, 2 heads
    assert costs.reward_model(SMALL, 3, 5, 7, 2, replicas=3, attention="splash").bytes == splash + 2 * 2 * 120
    logits = costs.score(SMALL, 3, 5, 7, 2, logprob_chunk=1).bytes - costs.reward_model(SMALL, 3, 5, 7, 2).bytes
    assert logits == 2 * 4 * 3 * 5 * 2 * 10 + 2 * 2 * 40  # logits move twice; each of two chunks reads the head


def test_an_update_moves_gradients_and_the_optimizers_state():
    moved = lambda config=SMALL, **k: costs.update(config, 4, 5, 7, 2, **k).bytes
    assert moved(optimizer_slots=3) - moved() == 2 * 4 * 160
    assert moved(copies=2, replicas=2) - moved(replicas=2) == 4 * 160 * (1 + 2 + 4)
    assert moved(epochs=3) == 3 * moved()
    # A second microbatch reads the layers three times more. In each of two chunks it reads the head three times more and
    # sums its gradient. Both microbatches add their gradients to a sum that is read and written. The rest is divided.
    more = 3 * 2 * 120 + 2 * (3 * 2 * 40 + 2 * 4 * 40) + 4 * 160 * (2 * 3 - 1)
    assert moved(accumulation=2, logprob_chunk=1) - moved(logprob_chunk=1) == more
    by_remat = [moved(with_(SMALL, remat=remat)) for remat in ("none", "dots", "layer")]
    assert by_remat == sorted(set(by_remat))
    adapted = with_(SMALL, lora_rank=1)
    adapters = 3 * (4 + 4) - 2 + (4 + 2) + 3 * (4 + 6)
    assert moved(adapted, optimizer_slots=3) - moved(adapted) == 2 * 4 * adapters


@pytest.mark.runs
@pytest.mark.parametrize("remat, probe", [("layer", None), pytest.param("none", 3, marks=pytest.mark.slow)])
def test_flops_of_waves_equal_those_of_their_programs(remat, probe):
    """All completions have full length, so only the last of two loops runs, with 4 waves of 3 completions."""
    config, sizes = with_(remat=remat), dict(lengths=2, wave_tokens=3 * T)
    scored = lowered("score", config, probe_token=probe, **sizes)
    expected = costs.score(config, P, G, S, T, probe=probe is not None, **sizes).flops
    assert expected == pytest.approx(of_program(scored, unlimited=0), rel=1e-3)
    texts = jax.ShapeDtypeStruct((P, G, T), jnp.int32), jax.ShapeDtypeStruct((P, G), jnp.int32)
    one = sharding.batch_sharding(sharding.make_mesh(devices=jax.devices()[:1]))
    scored = scoring_program(config, one, **sizes).lower(reward_model.abstract_params(config), *texts, 1)
    expected = costs.reward_model(config, P, G, 0, T, **sizes).flops
    assert expected == pytest.approx(of_program(scored, unlimited=0), rel=1e-3)
    program = lowered("update", config, options=options(accumulation=2, **sizes))
    expected = costs.update(config, P, G, S, T, accumulation=2, **sizes).flops
    assert expected == pytest.approx(of_program(program, unlimited=0), rel=1e-3)


def test_waves_of_short_completions_cost_less():
    """11 completions of 8 tokens and one of 16 are three waves of 3 with half the length, and a last wave of 3."""
    short = np.full((P, G), T // 2)
    short[2, 1] = T
    sizes = dict(lengths=2, wave_tokens=3 * T)
    full, half = (costs.score(CONFIG, P, G, S, T, completions=c, **sizes) for c in (None, short))
    tokens = lambda cost: (cost.flops - cost.attention_flops - 2 * 128 * 640 * logits[cost]) / (2 * 2 * MATRICES)
    # Three completions of 16 tokens after 24 are 120 tokens, which are 120 // 32 = 3 completions of 8 tokens.
    logits = {full: P * G * T, half: 3 * 3 * T // 2 + 3 * T}
    assert tokens(full) == P * S + P * G * T
    assert tokens(half) == P * S + logits[half]


def test_decoding_of_short_completions_costs_less():
    """4 of 12 completions have 16 tokens and 8 have 2. A loop of 12 has one step, and a loop of 6 has 14 steps."""
    ends = np.array([16, 2, 2] * 4).reshape(P, G)
    sizes = dict(halvings=1)
    full, mixed = (costs.rollout(CONFIG, P, G, S, T, completions=c, **sizes) for c in (None, ends))
    first = costs.rollout(CONFIG, P, G, S, 1)
    rows = lambda cost: (cost.flops - cost.attention_flops) - (first.flops - first.attention_flops)
    step = rows(costs.rollout(CONFIG, P, G, S, 2))
    assert rows(full) == pytest.approx(15 * step)
    assert rows(mixed) == pytest.approx(step + 14 * step / 2)
    assert costs.rollout(CONFIG, P, G, S, T, completions=np.full((P, G), T), **sizes) == full


@pytest.mark.parametrize("mean", [1, 16, 64, 200, 256])
def test_skewed_lengths(mean):
    lengths = skewed_lengths(8, 8, 256, mean)
    assert lengths.shape == (8, 8) and lengths.min() >= 1 and lengths.max() <= 256
    assert lengths.mean() == pytest.approx(mean, abs=1)
    np.testing.assert_array_equal(lengths, skewed_lengths(8, 8, 256, mean))
    if mean == 64:
        assert lengths.max() == 256 and np.median(lengths) < 50  # the lengths are skewed


def test_a_mean_length_that_no_completion_can_have_is_refused():
    with pytest.raises(ValueError, match="The mean length is 300; it must be between 1 and the 256 tokens"):
        skewed_lengths(8, 8, 256, 300)


def test_invalid_sizes_raise_and_are_named():
    with pytest.raises(ValueError, match="attention is 'flash'; it must be 'plain' or 'splash'"):
        costs.rollout(CONFIG, P, G, S, T, attention="flash")
    with pytest.raises(ValueError, match="T is 0; it must be at least 1"):
        costs.score(CONFIG, P, G, S, 0)
    with pytest.raises(ValueError, match="4 prompts cannot be shared evenly among 3 microbatches"):
        costs.update(CONFIG, P, G, S, T, accumulation=3)


TPU = """
import sys
sys.path.insert(0, sys.argv[1])
import test_costs as t
from jaxrl_reason.plan import devices_of

devices = devices_of("v5e:2x2")
mesh = t.sharding.make_mesh(fsdp=4, devices=devices)
config = t.with_(compute_dtype="bfloat16")
for program in ("rollout", "update"):
    text = t.lowered(program, config, mesh=mesh, options=t.options()).compile().as_text()
    print(t.hlo.read(text).flops * len(devices))
"""


@pytest.mark.slow
def test_flops_equal_those_of_programs_for_four_tpus():
    pytest.importorskip("libtpu", reason="Compiling for TPUs needs libtpu: pip install jaxrl_reason[tpu].")
    env = os.environ | {"JAX_PLATFORMS": "cpu"}
    tests = str(pathlib.Path(__file__).parent)
    run = subprocess.run([sys.executable, "-c", TPU, tests], env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    config = with_(compute_dtype="bfloat16")
    expected = [f(config, P, G, S, T).flops for f in (costs.rollout, costs.update)]
    assert list(map(float, run.stdout.split()[-2:])) == pytest.approx(expected, rel=1e-3)

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from helpers import reference_decoder as reference
from helpers.tiny_runs import tiny
from jaxrl_reason import models
from jaxrl_reason.config import ConfigError
from jaxrl_reason.rl import devices

SMALL = models.ModelConfig(vocab_size=300, width=8, layers=3, heads=2, kv_heads=1, mlp_width=16, head_dim=4)
SIZES = dict(max_prompt_length=10, max_completion_length=20, prompts_per_step=8, group_size=4)


def mesh_of(platform, kind="", **axes):
    device = types.SimpleNamespace(platform=platform, device_kind=kind)
    shape = dict.fromkeys(("slice", "data", "fsdp", "tensor"), 1) | axes
    return types.SimpleNamespace(devices=np.array([device], object), shape=shape)


@pytest.mark.parametrize(
    "platform, kind, chosen",
    [
        ("cpu", "cpu", ("blockwise", "none")),
        ("gpu", "NVIDIA H100", ("blockwise", "layer")),
        ("tpu", "TPU v5 lite", ("splash", "layer")),
        ("tpu", "TPU v2", ("plain", "layer")),
        ("tpu", "TPU v3", ("plain", "layer")),
    ],
)
def test_auto_is_what_suits_the_devices(platform, kind, chosen):
    model = devices.for_devices(SMALL, tiny("rows.jsonl"), mesh_of(platform, kind))
    assert (model.attention, model.remat) == chosen
    own = tiny("rows.jsonl", model__attention="plain", model__remat="none")
    model = devices.for_devices(SMALL, own, mesh_of(platform, kind))
    assert (model.attention, model.remat) == ("plain", "none")


@pytest.mark.parametrize("flags, slow", [("fpu avx512f", True), ("avx512_bf16", False), ("avx2 amx_bf16 x", False)])
def test_bfloat16_warns_if_the_processor_cannot_multiply_it(flags, slow, tmp_path, monkeypatch, recwarn):
    monkeypatch.setattr(devices, "_CPUINFO", tmp_path / "cpuinfo")
    monkeypatch.setattr(devices.platform, "machine", lambda: "x86_64")
    (tmp_path / "cpuinfo").write_text(f"processor\t: 0\nflags\t\t: {flags}\n")
    model = dataclasses.replace(SMALL, compute_dtype="bfloat16")
    for platform, said in (("cpu", slow), ("tpu", False)):
        devices.for_devices(model, tiny("rows.jsonl"), mesh_of(platform))
        assert bool(recwarn.list) == said
        recwarn.clear()
    devices.for_devices(SMALL, tiny("rows.jsonl"), mesh_of("cpu"))
    assert not recwarn.list


@pytest.mark.parametrize("kind", ["TPU v2", "TPU v3"])
def test_old_chips_cannot_run_the_kernels(kind):
    config = tiny("rows.jsonl", model__attention="splash")
    assert devices.for_devices(SMALL, config, mesh_of("tpu", "TPU v5 lite")).attention == "splash"
    with pytest.raises(ConfigError, match=f"config.model.attention is 'splash', .* do not run on {kind}"):
        devices.for_devices(SMALL, config, mesh_of("tpu", kind))


def test_blockwise_attention_is_refused_on_tpus():
    with pytest.raises(ConfigError, match="config.model.attention is 'blockwise', which is for CPUs and GPUs"):
        devices.for_devices(SMALL, tiny("rows.jsonl", model__attention="blockwise"), mesh_of("tpu", "TPU v4"))


def test_a_cpu_keeps_products_if_they_fit(monkeypatch):
    config = tiny("rows.jsonl", **SIZES)
    # Per token and layer: 3 x 8 of the residual stream, (2 x 2 + 2 x 1) x 4 of heads, 2 x 16 of the MLP: 80 numbers.
    kept = 8 * (10 + 4 * 20) * 3 * 80 * 4
    assert devices.kept_bytes(SMALL, config, mesh_of("cpu")) == kept
    parts = tiny("rows.jsonl", **SIZES, update__accumulation=4)
    assert devices.kept_bytes(SMALL, parts, mesh_of("cpu", fsdp=2)) == kept / 8
    supervised = tiny("rows.jsonl", **SIZES, supervised__steps=1, supervised__batch_size=48)
    assert devices.kept_bytes(SMALL, supervised, mesh_of("cpu")) == 2 * kept  # 48 x 30 tokens instead of 720
    in_waves = tiny("rows.jsonl", **SIZES, update__lengths=2, update__wave_tokens=40)
    sizes = devices.update_sizes(SMALL, in_waves, mesh_of("cpu"))
    assert sizes == {"lengths": 2, "wave_tokens": 40}
    # 80 tokens of prompts and 40 of completions
    assert devices.kept_bytes(SMALL, in_waves, mesh_of("cpu"), **sizes) == kept / 6
    shorter = sizes | {"wave_tokens": 10}  # a wave holds a completion of 20 tokens
    assert devices.kept_bytes(SMALL, in_waves, mesh_of("cpu"), **shorter) == kept * 100 / 720
    chosen = lambda config, model=SMALL, **axes: devices.with_remat(model, config, mesh_of("cpu", **axes))
    pair = lambda found: (found.remat, found.unrolled)
    for limit, remat in ((2 * kept, "none"), (2 * kept - 1, "dots"), (kept, "dots"), (kept - 1, "layer")):
        monkeypatch.setattr(devices, "MAX_KEPT", limit)
        assert pair(chosen(config)) == (remat, remat == "none")
    assert pair(chosen(config, fsdp=2)) == ("dots", False)
    monkeypatch.setattr(devices, "MAX_KEPT", 100 * kept)
    assert pair(chosen(in_waves)) == pair(chosen(config, DEEP)) == ("dots", False)
    monkeypatch.setattr(devices, "MAX_KEPT", kept / 6)
    assert pair(chosen(in_waves)) == ("dots", False)  # the update without waves keeps six times as much
    own = tiny("rows.jsonl", **SIZES, model__remat="none")
    assert pair(chosen(own)) == ("none", False)


DEEP = dataclasses.replace(SMALL, layers=9)


@pytest.mark.parametrize(
    "platform, model, S, T, prompts, sizes",
    [
        ("cpu", SMALL, 32, 64, 64, (1, 512)),  # unrolled layers and one length
        ("cpu", DEEP, 32, 64, 64, (3, 512)),  # 64, 32 and 16 tokens
        ("cpu", DEEP, 32, 64, 4, (3, 256)),  # a quarter of 4 x 4 x 64 tokens
        ("cpu", DEEP, 32, 64, 1, (3, 64)),  # one completion
        ("cpu", DEEP, 16, 24, 64, (1, 512)),
        ("cpu", DEEP, 65, 64, 64, (1, 512)),  # the prompt is longer than a completion
        ("cpu", DEEP, 64, 64, 64, (3, 512)),
        ("cpu", DEEP, 32, 127, 64, (3, 512)),
        ("cpu", DEEP, 32, 128, 64, (2, 512)),
        ("cpu", SMALL, 32, 256, 64, (3, 512)),
        ("cpu", SMALL, 32, 2048, 64, (4, 2048)),  # a wave holds at least one completion
        ("tpu", DEEP, 32, 64, 4, (1, 4096)),
        ("tpu", SMALL, 32, 1024, 4, (4, 4096)),
    ],
)
def test_the_sizes_of_an_update(platform, model, S, T, prompts, sizes):
    config = tiny("rows.jsonl", prompts_per_step=prompts, group_size=4, max_prompt_length=S, max_completion_length=T)
    found = devices.update_sizes(model, config, mesh_of(platform, "TPU v4"))
    assert (found["lengths"], found["wave_tokens"]) == sizes


MIB = 2**20
BY_TOKENS = dict(max_prompt_length=64, max_completion_length=64, prompts_per_step=16, group_size=4)


@pytest.mark.parametrize(
    "changes, axes, mib, parts",
    [
        # 16 x (64 + 4 x 64) tokens x 3 layers x 80 numbers x 4 bytes, and as much again beside the products: 9.4 MiB
        ({}, {}, 10, 1),
        ({}, {}, 9, 2),
        ({}, {}, 4, 4),
        ({}, {}, 0.01, 16),  # a microbatch has at least one prompt
        ({}, {"fsdp": 2}, 4, 2),  # per device
        ({"update__minibatches": 2}, {}, 4, 2),
        ({"prompts_per_step": 15}, {}, 4, 3),  # 8.8 MiB, of which halves would do
        ({"prompts_per_step": 7}, {}, 4, 7),
        ({"update__accumulation": 8}, {}, 10, 8),
        ({"update__lengths": 2}, {}, 4, 1),  # waves are small
        ({"max_completion_length": 128}, {}, 4, 1),
        ({"max_completion_length": 128, "update__accumulation": 2}, {}, 4, 2),
    ],
)
def test_a_cpu_computes_an_update_in_parts_that_stay_in_memory(changes, axes, mib, parts, monkeypatch):
    config = tiny("rows.jsonl", **BY_TOKENS | changes)
    monkeypatch.setattr(devices, "_MICROBATCH", mib * MIB)
    monkeypatch.setattr(devices, "_PER_WEIGHTS", 0)
    assert devices.microbatches(SMALL, config, mesh_of("cpu", **axes)) == parts
    for other in ("gpu", "tpu"):
        assert devices.microbatches(SMALL, config, mesh_of(other, "TPU v4")) == (config.update.accumulation or 1)


def test_a_supervised_update_has_microbatches_of_its_own(monkeypatch):
    # 24 x 128 tokens keep 5.6 MiB.
    config = tiny("rows.jsonl", **BY_TOKENS, supervised__steps=1, supervised__batch_size=24)
    monkeypatch.setattr(devices, "_PER_WEIGHTS", 0)
    for mib, parts in ((6, 1), (5, 2), (2, 3), (0.01, 24)):
        monkeypatch.setattr(devices, "_MICROBATCH", mib * MIB)
        assert devices.supervised_microbatches(SMALL, config, mesh_of("cpu")) == parts
        assert devices.supervised_microbatches(SMALL, config, mesh_of("tpu", "TPU v4")) == 1
    assert devices.supervised_microbatches(SMALL, config, mesh_of("cpu", fsdp=8)) == 3
    monkeypatch.setattr(devices, "_MICROBATCH", 2 * MIB)
    assert (
        devices.kept_bytes(SMALL, config, mesh_of("cpu")) == 8 * 128 * 3 * 80 * 4
    )  # an update keeps 640 tokens at once


def test_a_microbatch_of_a_cpu_keeps_at_least_four_times_the_weights(monkeypatch):
    monkeypatch.setattr(devices, "_MICROBATCH", 1)
    wide = dataclasses.replace(SMALL, vocab_size=20_000)  # 9.4 MiB to keep
    assert models.param_count(wide) * 4 * 4 == pytest.approx(2.45 * MIB, rel=0.01)
    config = tiny("rows.jsonl", **BY_TOKENS)
    assert devices.microbatches(wide, config, mesh_of("cpu")) == 4
    assert devices.kept_bytes(wide, config, mesh_of("cpu")) == 16 * 320 / 4 * 3 * 80 * 4


def test_the_frozen_weights_of_a_policy_with_adapters_do_not_count(monkeypatch):
    monkeypatch.setattr(devices, "_MICROBATCH", MIB)
    wide = dataclasses.replace(SMALL, vocab_size=20_000)
    config = tiny("rows.jsonl", **BY_TOKENS)
    assert devices.microbatches(wide, config, mesh_of("cpu")) == 4  # 4 x 0.6 MiB of weights
    adapted = dataclasses.replace(wide, lora_rank=1)
    assert devices.microbatches(adapted, config, mesh_of("cpu")) == 16  # 1 MiB


def test_microbatches_do_not_decide_about_waves(monkeypatch):
    config, waves = tiny("rows.jsonl", **BY_TOKENS), dict(lengths=3, wave_tokens=512)
    monkeypatch.setattr(devices, "MAX_KEPT", 9 * MIB)  # the update of one length keeps 9.4
    monkeypatch.setattr(devices, "_MICROBATCH", MIB)
    assert devices.update_sizes(SMALL, config, mesh_of("cpu")) == waves
    assert devices.microbatches(SMALL, config, mesh_of("cpu")) == 1
    chosen = tiny("rows.jsonl", **BY_TOKENS, update__accumulation=2)
    assert devices.update_sizes(SMALL, chosen, mesh_of("cpu")) == waves | {"lengths": 1}


def test_the_training_of_a_reward_model_counts_its_pairs(monkeypatch):
    config = tiny("rows.jsonl", **BY_TOKENS, reward_model__batch_size=6)
    kept = 2 * 6 * 128 * 3 * 80 * 4
    chosen = lambda **axes: devices.with_remat_of_pairs(SMALL, config, mesh_of("cpu", **axes))
    for limit, remat in ((2 * kept, "none"), (2 * kept - 1, "dots"), (kept - 1, "layer")):
        monkeypatch.setattr(devices, "MAX_KEPT", limit)
        assert (chosen().remat, chosen().unrolled) == (remat, remat == "none")
    assert chosen(fsdp=2).remat == "dots"
    assert devices.with_remat_of_pairs(SMALL, config, mesh_of("tpu", "TPU v4")).remat == "layer"


def test_tokens_of_waves_are_refused_if_an_update_has_none():
    options = dict(max_prompt_length=65, max_completion_length=64, update__wave_tokens=128)
    with pytest.raises(ConfigError, match="config.update.wave_tokens is 128, and updates of this run have one length"):
        devices.check_waves(DEEP, tiny("rows.jsonl", **options), mesh_of("cpu"))
    devices.check_waves(DEEP, tiny("rows.jsonl", **options, update__lengths=2), mesh_of("cpu"))
    devices.check_waves(DEEP, tiny("rows.jsonl", **options | {"update__wave_tokens": 0}), mesh_of("cpu"))


def test_a_wave_is_a_part_of_a_minibatch_of_a_device():
    sizes = dict(group_size=4, max_prompt_length=32, max_completion_length=64)
    wave = lambda config, **axes: devices.update_sizes(DEEP, config, mesh_of("cpu", **axes))["wave_tokens"]
    assert wave(tiny("rows.jsonl", prompts_per_step=4, **sizes)) == 256  # a quarter of 4 x 4 x 64 tokens
    assert wave(tiny("rows.jsonl", prompts_per_step=4, **sizes, update__minibatches=2)) == 128
    assert wave(tiny("rows.jsonl", prompts_per_step=4, **sizes), fsdp=2) == 128


@pytest.mark.runs
@pytest.mark.parametrize("S, T, remat", [(200, 120, "none"), (8, 192, "dots")])  # long enough for attention in blocks
def test_the_choice_for_cpus_changes_neither_values_nor_gradients(S, T, remat):
    P, G = 2, 2
    config = tiny("rows.jsonl", max_prompt_length=S, max_completion_length=T)
    chosen = devices.for_devices(SMALL, config, mesh_of("cpu"))
    params, rng = reference.random_params(SMALL, scale=0.3), np.random.default_rng(0)
    prompts, completions = (jnp.asarray(rng.integers(0, 300, shape)) for shape in ((P, S), (P, G, T)))
    weights = jnp.asarray(rng.normal(size=(P, G, T, SMALL.width)), jnp.float32)

    def total(model, params):
        decoder = models.bind(model, params)
        _, cache = decoder.prefill(prompts, jnp.ones((P, S), bool))
        return (decoder.extend(completions, cache) * weights).sum()

    results = [jax.jit(jax.value_and_grad(lambda p, m=model: total(m, p)))(params) for model in (SMALL, chosen)]
    assert chosen == dataclasses.replace(SMALL, attention="blockwise", remat=remat, unrolled=remat == "none") != SMALL
    (value, gradient), (other, again) = results
    assert float(other) == pytest.approx(float(value), rel=1e-5)
    scale = max(float(jnp.abs(x).max()) for x in jax.tree.leaves(gradient))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=2e-5 * scale, rtol=0), gradient, again)


@pytest.mark.parametrize("unrolled", [False, True])
def test_unrolled_layers_are_no_loop(unrolled):
    model = dataclasses.replace(SMALL, remat="none", unrolled=unrolled)
    forward = lambda params: models.apply(model, params, jnp.zeros((1, 4), jnp.int32))
    text = jax.jit(forward).lower(models.abstract_params(model)).compile().as_text()
    assert (" while(" in text) == (not unrolled)

"""Tests adapters: their function, their training, their merge, and their PEFT files."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import safetensors.numpy

from helpers import reference_decoder
from jaxrl_reason import models
from jaxrl_reason.methods import PolicyLoss
from jaxrl_reason.models import lora, ModelConfig
from jaxrl_reason.rl import learner, scoring
from jaxrl_reason.rl import optimizer as optimizers
from jaxrl_reason.rl.learner import UpdateOptions
from jaxrl_reason.rl.types import Experience, Rollout, TrainState

pytestmark = pytest.mark.usefixtures("quick_compilation")

CONFIG = ModelConfig(
    vocab_size=20,
    width=16,
    layers=3,
    heads=4,
    kv_heads=2,
    mlp_width=24,
    lora_rank=3,
    lora_alpha=5.0,
    lora_projections=("q", "v", "down"),
)
TOKENS = jnp.arange(2 * 9).reshape(2, 9) % 20


def params_with_adapters(config=CONFIG):
    return reference_decoder.random_params(config, scale=0.3)


def test_only_the_chosen_projections_have_adapters_in_float32():
    shapes = models.abstract_params(dataclasses.replace(CONFIG, param_dtype="bfloat16"))["layers"]
    adapters = {name: (x.shape, str(x.dtype)) for name, x in shapes.items() if name[-2:] in ("_a", "_b")}
    assert adapters == {
        "q_a": ((3, 16, 3), "float32"),
        "q_b": ((3, 3, 16), "float32"),
        "v_a": ((3, 16, 3), "float32"),
        "v_b": ((3, 3, 8), "float32"),
        "down_a": ((3, 24, 3), "float32"),
        "down_b": ((3, 3, 16), "float32"),
    }
    assert str(shapes["q"].dtype) == "bfloat16"


def test_fresh_adapters_add_nothing():
    params = models.init_params(CONFIG, jax.random.key(0))
    _, base = lora.split(CONFIG, params)
    np.testing.assert_array_equal(
        models.apply(CONFIG, params, TOKENS), models.apply(lora.base_of(CONFIG), base, TOKENS)
    )
    a = np.asarray(params["layers"]["down_a"])
    assert 0.5 < a.std() * np.sqrt(3 * 24) < 2 and not np.any(params["layers"]["down_b"])


def test_merge_equals_the_sum_by_hand():
    params = params_with_adapters()
    config, merged = lora.merge(CONFIG, params)
    assert config == lora.base_of(CONFIG) and config.lora_rank == 0
    layers = {name: np.asarray(x, np.float64) for name, x in params["layers"].items()}
    for name in ("q", "v", "down"):
        for layer in range(3):
            expected = layers[name][layer] + 5 / 3 * layers[f"{name}_a"][layer] @ layers[f"{name}_b"][layer]
            np.testing.assert_allclose(merged["layers"][name][layer], expected, atol=1e-6)
    np.testing.assert_array_equal(merged["layers"]["k"], params["layers"]["k"])
    assert merged.keys() == params.keys() and merged["layers"].keys() == layers.keys() - set(lora.names_of(CONFIG))
    with_adapters = np.asarray(models.apply(CONFIG, params, TOKENS))
    np.testing.assert_allclose(models.apply(config, merged, TOKENS), with_adapters, atol=1e-4)
    without = models.apply(config, lora.split(CONFIG, params)[1], TOKENS)
    assert np.abs(without - with_adapters).max() > 0.1


@pytest.mark.parametrize("base, dtype", [("bfloat16", "float32"), ("bfloat16", None), ("float32", "bfloat16")])
def test_sums_are_rounded_once(base, dtype):
    config = dataclasses.replace(CONFIG, param_dtype=base)
    params = params_with_adapters(config)
    _, merged = lora.merge(config, params, dtype)
    exact = lambda x: np.asarray(x, np.float64)
    layers = params["layers"]
    wanted = exact(layers["q"]) + 5 / 3 * exact(layers["q_a"]) @ exact(layers["q_b"])
    found = merged["layers"]["q"]
    assert str(found.dtype) == (dtype or base)
    if dtype == "float32":
        np.testing.assert_allclose(found, wanted, atol=1e-5)
        assert np.abs(exact(found.astype(jnp.bfloat16)) - wanted).max() > 1e-3
    else:
        assert np.abs(exact(found) - wanted).max() <= 2**-8 * np.abs(wanted).max() and str(found.dtype) == "bfloat16"
        rounded = np.asarray(jnp.asarray(wanted, jnp.float32).astype(jnp.bfloat16), np.float64)
        assert (exact(found) == rounded).mean() > 0.99  # but for sums that float32 puts on the other side
    assert merged["layers"]["k"].dtype == params["layers"]["k"].dtype


def test_split_and_join_are_inverse_and_copy_nothing():
    params = params_with_adapters()
    trained, frozen = lora.split(CONFIG, params)
    assert set(trained) == {"layers"} and set(trained["layers"]) == set(lora.names_of(CONFIG))
    again = lora.join(trained, frozen)
    assert jax.tree.structure(again) == jax.tree.structure(params)
    assert all(a is b for a, b in zip(jax.tree.leaves(again), jax.tree.leaves(params)))
    base = lora.base_of(CONFIG)
    assert base == ModelConfig(vocab_size=20, width=16, layers=3, heads=4, kv_heads=2, mlp_width=24)
    assert lora.split(base, frozen) == (frozen, {}) and lora.merge(base, frozen) == (base, frozen)


def batch():
    rng = np.random.default_rng(0)
    P, G, S, T = 2, 2, 4, 5
    mask = np.ones((P, G, T), bool)
    rollout = Rollout(
        rng.integers(0, 20, (P, S)),
        np.ones((P, S), bool),
        rng.integers(0, 20, (P, G, T)),
        mask,
        np.zeros((P, G, T), np.float32),
        np.zeros((P, G), bool),
    )
    advantages = rng.normal(size=(P, G)).astype(np.float32)
    return jax.tree.map(jnp.asarray, Experience(rollout, mask, advantages))


@pytest.mark.runs
@pytest.mark.parametrize("accumulation", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_an_update_moves_only_the_adapters_along_their_gradient(accumulation):
    params, rate = params_with_adapters(), 1e-2
    optimizer = optax.sgd(rate)
    trained, frozen = lora.split(CONFIG, params)
    state = TrainState(jnp.int32(0), trained, frozen, optimizers.init_opt_state(optimizer, trained), (), jnp.int32(0))
    options = UpdateOptions(loss=PolicyLoss(), accumulation=accumulation)
    experience = batch()
    new, metrics, _ = jax.jit(learner.make_update(CONFIG, options, optimizer))(
        state, experience, jnp.float32(1), jax.random.key(0)
    )
    new_trained, new_frozen = lora.split(CONFIG, new.params)
    jax.tree.map(np.testing.assert_array_equal, new_frozen, frozen)

    def loss(trained):  # an on-policy update has the gradient of this loss
        joined = lora.join(trained, frozen)
        scored = scoring.compute_logprobs(CONFIG, joined, experience.rollout, jnp.float32(1))
        return -(experience.advantages[..., None] * scored.logprobs).mean()

    gradient = jax.grad(loss)(trained)
    jax.tree.map(
        lambda a, b, g: np.testing.assert_allclose((a - b) / rate, g, atol=2e-4), trained, new_trained, gradient
    )
    assert metrics["grad_norm"] == pytest.approx(float(optax.tree.norm(gradient)), rel=1e-3)


def test_the_optimizer_keeps_moments_of_the_adapters_only():
    from jaxrl_reason.config import Config
    from jaxrl_reason.methods import create
    from jaxrl_reason.rl import programs

    _, optimizer = programs.make_optimizer(Config())
    mesh = models.sharding.make_mesh()
    shardings = programs.state_shardings(CONFIG, mesh, optimizer, create("grpo"))
    trained, _ = lora.split(CONFIG, models.abstract_params(CONFIG))
    state = jax.eval_shape(
        lambda: optimizers.init_opt_state(optimizer, jax.tree.map(lambda x: jnp.zeros(x.shape), trained))
    )
    assert jax.tree.structure(shardings.opt_state) == jax.tree.structure(state)
    moments = sum(x.size for x in jax.tree.leaves(state) if x.ndim)
    assert moments == 2 * sum(x.size for x in jax.tree.leaves(trained))


def test_adapters_are_written_in_the_layout_of_peft(tmp_path):
    params = params_with_adapters()
    models.save_adapters(tmp_path / "out", models.Policy(CONFIG, params), "org/base")
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    content = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert content["peft_type"] == "LORA" and content["base_model_name_or_path"] == "org/base"
    assert (content["r"], content["lora_alpha"]) == (3, 5.0)
    assert content["target_modules"] == ["q_proj", "v_proj", "down_proj"]
    stored = safetensors.numpy.load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert len(stored) == 3 * 3 * 2
    # As torch computes it: x A' B' alpha / r, both matrices [out, in].
    name = "base_model.model.model.layers.1.mlp.down_proj"
    a, b = stored[f"{name}.lora_A.weight"], stored[f"{name}.lora_B.weight"]
    assert a.shape == (3, 24) and b.shape == (16, 3)
    x = np.random.default_rng(0).normal(size=(4, 24)).astype(np.float32)
    _, merged = lora.merge(CONFIG, params)
    added = x @ np.asarray(merged["layers"]["down"] - params["layers"]["down"])[1]
    np.testing.assert_allclose(x @ a.T @ b.T * 5 / 3, added, atol=1e-4)


def test_a_base_is_written_so_that_peft_finds_it_from_anywhere(tmp_path, monkeypatch):
    params, of_hub = params_with_adapters(), {"_commit_hash": "0" * 40}
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for directory in ("home/base", "org/base"):
        (tmp_path / directory).mkdir(parents=True)
    cases = [
        ("~/base", {}, str(tmp_path / "home" / "base")),
        ("org/base", {}, str(tmp_path / "org" / "base")),
        ("~/removed", {}, str(tmp_path / "home" / "removed")),
        ("org/model", {}, "org/model"),
        ("org/base@main", of_hub, "org/base"),
    ]
    for i, (base, source, written) in enumerate(cases):
        models.save_adapters(tmp_path / str(i), models.Policy(CONFIG, params, source=source), base)
        content = json.loads((tmp_path / str(i) / "adapter_config.json").read_text())
        assert content["base_model_name_or_path"] == written and content["revision"] == source.get("_commit_hash")


def test_a_policy_without_adapters_has_none_to_write(tmp_path):
    config, params = lora.merge(CONFIG, params_with_adapters())
    with pytest.raises(models.PretrainedError, match="has no adapters .*: write it with models.save_pretrained.$"):
        models.save_adapters(tmp_path / "out", models.Policy(config, params), "org/base")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(lora_rank=-1), "lora.rank is -1"),
        (dict(lora_alpha=0.0), "alpha 0.0"),
        (
            dict(lora_projections=("q", "query")),
            r"lora.projections is \['q', 'query'\]; it must name some of q, k, v, o",
        ),
        (dict(lora_projections=()), "must name some"),
        (dict(lora_projections=("q", "q")), "each once"),
    ],
)
def test_invalid_adapters_raise(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CONFIG, **changes)

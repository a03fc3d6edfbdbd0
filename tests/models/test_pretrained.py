"""Pretrained models are read as by `transformers`: outputs, shards, directories and the hub."""

import dataclasses
import os
import pathlib
import pickle
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from helpers.golden import Bomb, change_json, expected, GOLDEN, load, NAMES, POLICIES
from jaxrl_reason import data, models
from jaxrl_reason.models import PretrainedError
from jaxrl_reason.models.formats import pretrained

pytestmark = pytest.mark.usefixtures("quick_compilation")

# -- outputs -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("name", NAMES)
def test_outputs_equal_those_of_transformers(name, side):
    policy, golden = load(name), expected(name)
    tokens, mask, want = (golden[f"{side}_{part}"] for part in ("tokens", "mask", "output"))
    found = np.asarray(policy.apply(policy.params, tokens, mask))
    alone = np.asarray(policy.apply(policy.params, tokens[:1]))  # the first row is full and needs no mask
    assert found.dtype == np.float32
    if name == "qwen2_reward":
        np.testing.assert_allclose(found, want[:, 0], atol=2e-4)
        np.testing.assert_allclose(alone, want[:1, 0], atol=2e-4)
    else:
        assert np.abs(want).max() > 1  # the comparison is not trivial
        np.testing.assert_allclose(found[mask], want[mask], atol=2e-4)
        np.testing.assert_allclose(alone, want[:1], atol=2e-4)


@pytest.mark.runs
@pytest.mark.parametrize(
    "name", [n if n in ("gemma3", "llama") else pytest.param(n, marks=pytest.mark.slow) for n in POLICIES]
)
def test_outputs_with_a_cache_equal_those_of_transformers(name):
    policy, golden = load(name), expected(name)
    tokens, want = golden["right_tokens"][:1], golden["right_output"][:1]
    at = 6
    model = models.bind(policy.config, policy.params)

    @jax.jit
    def extended(tokens):
        hidden, prompt = model.prefill(tokens[:, :at], jnp.ones((1, at), bool))
        return model.logits(hidden), model.logits(model.extend(tokens[:, None, at:], prompt))[:, 0]

    @jax.jit
    def stepped(tokens):
        blocks, prompt = model.unstack(model.prefill(tokens[:, :at], jnp.ones((1, at), bool))[1])
        cache, rows = model.empty_cache(1, 1, tokens.shape[1] - at), []
        for i in range(tokens.shape[1] - at):
            hidden, cache = model.step(tokens[:, None, at + i], jnp.int32(i), blocks, prompt, cache)
            rows.append(model.logits(hidden)[:, 0])
        return jnp.stack(rows, axis=1)

    begin, rest = extended(tokens)
    np.testing.assert_allclose(begin, want[:, :at], atol=2e-4)
    np.testing.assert_allclose(rest, want[:, at:], atol=2e-4)
    np.testing.assert_allclose(stepped(tokens), want[:, at:], atol=2e-4)


@pytest.mark.parametrize("name", ["llama", "gemma3", "qwen2_reward"])
def test_bfloat16_outputs_are_close(name):
    policy, golden = load(name, dtype="bfloat16"), expected(name)
    assert {x.dtype for x in jax.tree.leaves(policy.params)} <= {jnp.dtype("bfloat16"), jnp.dtype("float32")}
    assert policy.config.param_dtype == policy.config.compute_dtype == "bfloat16"
    mask, want = golden["right_mask"], golden["right_output"]
    found = np.asarray(policy.apply(policy.params, golden["right_tokens"], mask))
    difference = np.abs(found - want[:, 0]) if name == "qwen2_reward" else np.abs(found - want)[mask]
    assert 1e-4 < difference.mean() < 0.03


def test_a_score_is_read_at_the_last_token_that_is_not_the_padding_token_of_config_json(tmp_path):
    """As `transformers` reads it, even if the token that pads ends the text."""
    shutil.copytree(GOLDEN / "qwen2_reward", tmp_path / "judge")
    change_json(tmp_path / "judge" / "config.json", pad_token_id=2)
    found, plain = models.load_reward_model(tmp_path / "judge"), load("qwen2_reward")
    texts = np.array([[5, 6, 7, 2], [5, 2, 2, 2], [2, 6, 7, 8], [2, 2, 2, 2]])
    at = lambda length: np.arange(4) < np.array(length)[:, None]
    got = found.apply(found.params, texts)
    np.testing.assert_allclose(got[:3], plain.apply(plain.params, texts, at([3, 1, 4, 4]))[:3], atol=1e-5)
    assert np.isnan(got[3])
    masked = found.apply(found.params, texts, at([3, 4, 2, 1]))
    np.testing.assert_allclose(masked[:3], plain.apply(plain.params, texts, at([3, 1, 2, 4]))[:3], atol=1e-5)
    for nothing in (None, "2"):
        assert pretrained.pad_id_of({"pad_token_id": nothing}) is None
    content = pretrained.config_json(dataclasses.replace(found, tokenizer=data.train_tokenizer(["ab"])))
    assert content["pad_token_id"] == 2  # a model that came so is written so


# -- reading ---------------------------------------------------------------------------------------------------------


def test_one_file_goes_before_an_index(tmp_path):
    """As in `transformers`: an index can be left from other weights."""
    shutil.copytree(GOLDEN / "qwen3", tmp_path / "model")
    (tmp_path / "model" / "model.safetensors.index.json").write_text('{"weight_map": {"a": "old.safetensors"}}')
    found, expected = models.load_pretrained(tmp_path / "model"), load("qwen3")
    jax.tree.map(np.testing.assert_array_equal, found.params, expected.params)


def test_a_directory_cannot_say_that_it_is_of_the_hub(tmp_path):
    shutil.copytree(GOLDEN / "qwen3", tmp_path / "model")
    change_json(tmp_path / "model" / "config.json", _commit_hash="0" * 40, _adapted_from="some/base")
    assert models.open_model(tmp_path / "model").source == load("qwen3").source
    assert models.read_source(tmp_path / "model") == load("qwen3").source


@pytest.mark.processes
def test_weights_are_read_shard_by_shard():
    env = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    script = pathlib.Path(__file__).with_name("sharded_loading.py")
    done = subprocess.run(
        [sys.executable, str(script), str(GOLDEN)], env=os.environ | env, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["llama", "gemma3", "qwen2_reward"]


def test_a_path_without_a_model_raises(tmp_path):
    for path, message in (
        (tmp_path / "absent", "There is no .*absent: give a directory"),
        (GOLDEN / "make.py", "neither a directory nor a .gguf file"),
        (tmp_path, "There is no .*config.json"),
    ):
        with pytest.raises(PretrainedError, match=message):
            models.load_pretrained(path)
    with pytest.raises(PretrainedError, match="param_dtype is 'float16'"):
        models.load_pretrained(GOLDEN / "qwen3", dtype="float16")
    with pytest.raises(PretrainedError, match="a reward model, read by load_reward_model"):
        models.load_pretrained(GOLDEN / "qwen2_reward")
    with pytest.raises(PretrainedError, match="a language model, read by load_pretrained"):
        models.load_reward_model(GOLDEN / "qwen2")


def test_a_model_of_the_hub_is_read_at_a_named_revision_and_without_pickles(hub_cache, tmp_path, capsys, monkeypatch):
    """Reads the cache of the hub's own client, without a network."""
    monkeypatch.chdir(tmp_path)
    files = {path.name: path.read_bytes() for path in (GOLDEN / "qwen3").iterdir() if path.suffix != ".npz"}
    old, new = (
        hub_cache("model", "Qwen/Qwen3-0.6B", files | {"README.md": text, "pytorch_model.bin": pickle.dumps(Bomb())})
        for text in (b"old", b"new")
    )
    opened = models.open_model("Qwen/Qwen3-0.6B")
    assert opened.source["_commit_hash"] == new
    assert capsys.readouterr().err.strip() == (
        f"Qwen/Qwen3-0.6B: revision {new} of the Hugging Face hub (write Qwen/Qwen3-0.6B@{new} to stay with it)."
    )
    # A run keeps the source, and stays with its commit when it continues.
    assert models.pinned("Qwen/Qwen3-0.6B@main", opened.source) == f"Qwen/Qwen3-0.6B@{new}"
    assert models.pinned(str(tmp_path), opened.source) == str(tmp_path)
    policy = models.load_pretrained(f"Qwen/Qwen3-0.6B@{old}")
    assert policy.config.qk_norm and policy.source["_commit_hash"] == old
    assert capsys.readouterr().err.strip().endswith(f"revision {old} of the Hugging Face hub.")
    assert "_commit_hash" not in pretrained.config_json(policy)
    assert models.read_source("Qwen/Qwen3-0.6B@main")["model_type"] == "qwen3"
    assert not (tmp_path / "exploded").exists()
    for name, message in (
        ("nobody/nothing", "no directory nobody/nothing, and nobody/nothing could not be had from the .* hub: Local"),
        ("Qwen/Qwen3-0.6B@other", "Qwen/Qwen3-0.6B@other could not be had from the Hugging Face hub: Local"),
        ("Qwen/Qwen3-0.6B@../../x", "There is no Qwen/Qwen3-0.6B@../../x: give a directory"),
        ("../Qwen3", "There is no ../Qwen3: give a directory"),
    ):
        with pytest.raises(PretrainedError, match=message):
            models.load_pretrained(name)


@pytest.mark.parametrize("large", [False, True])
def test_a_changed_file_in_the_cache_of_the_hub_raises(hub_cache, large):
    files = {path.name: path.read_bytes() for path in (GOLDEN / "qwen3").iterdir() if path.suffix != ".npz"}
    commit = hub_cache("model", "some/model", files)
    name = "model.safetensors" if large else "config.json"
    blob = (hub_cache.directory / "models--some--model" / "snapshots" / commit / name).resolve()
    assert len(blob.name) == (64 if large else 40)
    content = bytearray(blob.read_bytes())
    content[-5] ^= 1
    blob.write_bytes(content)
    with pytest.raises(PretrainedError, match=f"{name} is not what the hub has under this name: its hash is"):
        models.open_model("some/model")

"""Tests policies and reward models that are written to directories and read again."""

import dataclasses
import json
import os

import jax
import numpy as np
import pytest
import safetensors.numpy

from helpers import reference_decoder
from helpers.golden import GOLDEN, load, NAMES, POLICIES
from jaxrl_reason import data, models
from jaxrl_reason.models import ModelConfig, PretrainedError
from jaxrl_reason.models.formats import weights

SMALL = dict(vocab_size=30, width=16, layers=2, heads=4, kv_heads=2, mlp_width=24)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Saves a policy of our own with a tokenizer of two end tokens. Returns the directory and the policy."""
    config = ModelConfig(**SMALL | dict(vocab_size=400), qk_norm=True)
    tokenizer = dataclasses.replace(data.train_tokenizer(["ab ab 12"]), eos_ids=(2, 7), chat_template="{{ messages }}")
    policy = models.Policy(config, reference_decoder.random_params(config), tokenizer)
    directory = tmp_path_factory.mktemp("exported") / "deep" / "model"
    models.save_pretrained(directory, policy)
    return directory, policy


def test_weights_that_cannot_be_written_are_an_error_of_the_system(tmp_path):
    """The library has an error of its own, for a full disk as for a directory in the place of the file."""
    (tmp_path / "model.safetensors" / "folder").mkdir(parents=True)
    with pytest.raises(OSError, match="model.safetensors cannot be written: .*directory"):
        weights.save_tensors(tmp_path / "model.safetensors", {"a": np.zeros(3, np.float32)})


def test_a_saved_policy_has_all_its_files(exported):
    directory, policy = exported
    assert {p.name for p in directory.iterdir()} == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    content = json.loads((directory / "config.json").read_text())
    assert content["architectures"] == ["Qwen3ForCausalLM"] and content["torch_dtype"] == "float32"
    assert content["eos_token_id"] == [2, 7] and content["bos_token_id"] == 1 and content["pad_token_id"] == 0
    assert json.loads((directory / "generation_config.json").read_text())["eos_token_id"] == [2, 7]
    again = models.load_pretrained(directory)
    assert again.config == policy.config and again.tokenizer.chat_template == "{{ messages }}"
    jax.tree.map(np.testing.assert_array_equal, again.params, policy.params)
    assert list(directory.parent.iterdir()) == [directory]


@pytest.mark.parametrize("name", NAMES)
def test_an_unchanged_model_is_written_as_it_was_read(name, tmp_path):
    model = load(name)
    models.save_pretrained(tmp_path / "out", model)
    old, new = (json.loads((d / "config.json").read_text()) for d in (GOLDEN / name, tmp_path / "out"))
    old.pop("dtype")
    assert new == old | {"torch_dtype": "float32"}
    inside = lambda d: {k: v for f in d.glob("*.safetensors") for k, v in safetensors.numpy.load_file(f).items()}
    before, after = inside(GOLDEN / name), inside(tmp_path / "out")
    assert before.keys() == after.keys()
    for tensor, value in before.items():
        np.testing.assert_array_equal(after[tensor], value)


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002], ids=oct)
def test_every_file_has_the_mode_of_a_new_file(mask, tmp_path):
    model = load("qwen3")
    adapters = dataclasses.replace(model.config, lora_rank=1)
    params = models.lora.join(models.lora.init_adapters(adapters, jax.random.key(0)), model.params)
    before = os.umask(mask)
    try:
        models.save_pretrained(tmp_path / "whole", model)
        models.save_pretrained(tmp_path / "shards", model, max_shard_bytes=9000)
        models.save_adapters(tmp_path / "adapters", dataclasses.replace(model, config=adapters, params=params), "base")
    finally:
        os.umask(before)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len([path for path in files if path.suffix == ".safetensors"]) > 4
    assert {path.stat().st_mode & 0o777 for path in files} == {0o666 & ~mask}


@pytest.mark.parametrize("name", POLICIES)
def test_a_family_is_found_for_a_decoder_without_a_source(name, tmp_path):
    model = dataclasses.replace(load(name), source={})
    models.save_pretrained(tmp_path / "out", model, max_shard_bytes=9000)
    files = sorted(p.name for p in (tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 2 and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert all((tmp_path / "out" / f).stat().st_size < 12_000 for f in files)
    again = models.load_pretrained(tmp_path / "out")
    assert again.config == model.config
    jax.tree.map(np.testing.assert_array_equal, again.params, model.params)


def test_the_config_of_a_changed_decoder_is_written_anew(tmp_path):
    model = load("qwen3")
    models.save_pretrained(
        tmp_path / "out", dataclasses.replace(model, config=dataclasses.replace(model.config, rope_theta=7.0))
    )
    assert models.load_pretrained(tmp_path / "out").config.rope_theta == 7.0


def test_bfloat16_weights_are_written_in_bfloat16(tmp_path):
    model = load("gemma3", dtype="bfloat16")
    models.save_pretrained(tmp_path / "out", model)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == "bfloat16"
    stored = safetensors.numpy.load_file(tmp_path / "out" / "model.safetensors")
    assert {str(x.dtype) for x in stored.values()} == {"bfloat16"}
    jax.tree.map(
        np.testing.assert_array_equal, models.load_pretrained(tmp_path / "out", dtype="bfloat16").params, model.params
    )


@pytest.mark.parametrize("pad, written", [(0, 0), (2, None), (7, None)])
def test_a_score_read_at_an_end_token_stays_there_if_this_token_pads(pad, written, tmp_path):
    """`transformers` reads no score at pad_token_id; without one it refuses padded batches."""
    config = ModelConfig(**SMALL | dict(vocab_size=400), qkv_bias=True)
    params = {"decoder": reference_decoder.random_params(config), "score": np.ones(16, np.float32)}
    tokenizer = dataclasses.replace(data.train_tokenizer(["ab ab 12"]), eos_ids=(2, 7), pad_id=pad)
    files = {"special_tokens_map.json": json.dumps({"pad_token": tokenizer.spelled(pad)}).encode()}
    judge = models.RewardModel(config, params, tokenizer, files=files)
    models.save_pretrained(tmp_path / "out", judge)
    content = json.loads((tmp_path / "out" / "config.json").read_text())
    assert content["pad_token_id"] == written and content["eos_token_id"] == [2, 7]
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        assert ("pad_token" in json.loads((tmp_path / "out" / name).read_text())) == (written is not None)
    again, texts = models.load_reward_model(tmp_path / "out"), np.array([[20, 30, 40, 2], [20, 30, 40, 7]])
    np.testing.assert_allclose(again.apply(again.params, texts), judge.apply(params, texts), atol=1e-6)
    assert again.tokenizer.eos_ids == (2, 7) and again.tokenizer.encode("ab 12") == tokenizer.encode("ab 12")
    policy = models.Policy(config, reference_decoder.random_params(config), tokenizer)
    models.save_pretrained(tmp_path / "policy", policy)  # a language model pads as its tokenizer
    assert json.loads((tmp_path / "policy" / "config.json").read_text())["pad_token_id"] == pad


def test_a_full_directory_and_an_unknown_family_raise(tmp_path):
    model = load("qwen3")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("keep")
    with pytest.raises(PretrainedError, match="is there already and not empty"):
        models.save_pretrained(tmp_path / "full", model)
    odd = ModelConfig(**SMALL, qk_norm=True, qkv_bias=True)
    with pytest.raises(PretrainedError, match="No family .* has a decoder with these switches"):
        models.save_pretrained(tmp_path / "odd", models.Policy(odd, models.init_params(odd, jax.random.key(0))))
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["full", "mine.txt"]
    (tmp_path / "empty").mkdir()
    models.save_pretrained(tmp_path / "empty", model)
    assert (tmp_path / "empty" / "config.json").exists()


def test_an_interrupted_export_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(weights, "write", lambda *_: (_ for _ in ()).throw(OSError("No space left on device")))
    with pytest.raises(OSError, match="No space left"):
        models.save_pretrained(tmp_path / "out", load("qwen3"))
    assert not list(tmp_path.iterdir())


def test_the_tokenizer_is_read_with_the_model(exported):
    directory, policy = exported
    found = models.load_pretrained(directory)
    assert found.tokenizer.encode("ab 12") == policy.tokenizer.encode("ab 12")
    assert found.tokenizer.eos_ids == (2, 7) and found.tokenizer.bos_id == 1
    assert models.load_pretrained(GOLDEN / "llama").tokenizer is None

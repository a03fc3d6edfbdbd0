"""Tests PEFT directories as models. Our own and other exports are read with their adapters merged."""

import dataclasses
import json
import shutil

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from helpers import reference_decoder
from helpers.golden import change_json, GOLDEN
from jaxrl_reason import data, models
from jaxrl_reason.models import lora, PretrainedError
from jaxrl_reason.models.formats import source as source_lib

pytestmark = pytest.mark.usefixtures("quick_compilation")

TOKENS = np.array([[3, 1, 4, 1, 5, 9]])
Q = "base_model.model.model.layers.{}.self_attn.q_proj.lora_{}.weight"


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Writes our own adapters on a model of transformers. Returns the directory and the logits of the policy."""
    directory, base = tmp_path_factory.mktemp("peft"), models.load_pretrained(GOLDEN / "qwen3")
    config = dataclasses.replace(base.config, lora_rank=2, lora_alpha=5.0, lora_projections=("q", "v", "down"))
    trained, _ = lora.split(config, reference_decoder.random_params(config, scale=0.3))
    policy = dataclasses.replace(base, config=config, params=lora.join(trained, base.params))
    models.save_adapters(directory / "adapters", policy, str(GOLDEN / "qwen3"))
    return directory / "adapters", np.asarray(policy.apply(policy.params, TOKENS))


@pytest.fixture
def adapters(exported, tmp_path):
    shutil.copytree(exported[0], tmp_path / "adapters")
    return tmp_path / "adapters"


def change(directory, edit):
    path = directory / "adapter_model.safetensors"
    tensors = safetensors.numpy.load_file(path)
    edit(tensors)
    safetensors.numpy.save_file(tensors, path)


def logits(directory):
    policy = models.load_pretrained(directory)
    return np.asarray(policy.apply(policy.params, TOKENS))


def test_our_own_export_computes_what_the_policy_computed(exported):
    directory, expected = exported
    found = models.load_pretrained(directory)
    np.testing.assert_allclose(found.apply(found.params, TOKENS), expected, rtol=0, atol=2e-5)
    assert np.abs(logits(GOLDEN / "qwen3") - expected).max() > 0.01
    assert found.config.lora_rank == 0
    assert models.read_source(directory) == models.read_source(GOLDEN / "qwen3")


def test_a_config_of_the_base_next_to_the_adapters_is_no_model(adapters, exported):
    shutil.copy(GOLDEN / "qwen3" / "config.json", adapters)
    np.testing.assert_allclose(logits(adapters), exported[1], rtol=0, atol=2e-5)
    shutil.copy(GOLDEN / "qwen3" / "model.safetensors", adapters)  # now a whole model with a file of PEFT
    np.testing.assert_array_equal(logits(adapters), logits(GOLDEN / "qwen3"))


def test_an_export_of_merged_adapters_is_a_plain_model(exported, tmp_path):
    directory, expected = exported
    models.save_pretrained(tmp_path / "merged", models.load_pretrained(directory))
    content = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert source_lib.ADAPTED not in content and source_lib.REVISION not in content
    np.testing.assert_allclose(logits(tmp_path / "merged"), expected, rtol=0, atol=2e-5)
    policy = models.load_pretrained(directory)
    with pytest.raises(PretrainedError, match="began with adapters on .*qwen3, and PEFT needs a base model"):
        models.save_adapters(tmp_path / "more", policy, str(directory))


def by_hand(directory, scale):
    """Returns the merged q of layer 0, computed by numpy."""
    tensors = safetensors.numpy.load_file(directory / "adapter_model.safetensors")
    a, b = (tensors[Q.format(0, side)].astype(np.float32) for side in "AB")
    base = models.load_pretrained(GOLDEN / "qwen3").params["layers"]["q"][0]
    return np.asarray(base) + scale * (b @ a).T


@pytest.mark.parametrize(
    "changes, scale",
    [
        ({}, 5 / 2),
        ({"lora_alpha": 3}, 3 / 2),
        ({"use_rslora": True}, 5 / 2**0.5),
        ({"alpha_pattern": {"q_proj": 8.0}}, 8 / 2),
        ({"alpha_pattern": {"layers.1.self_attn.q_proj": 8.0}}, 5 / 2),
        ({"alpha_pattern": {"model.layers.0.self_attn.q_proj": 1}}, 1 / 2),
        ({"alpha_pattern": {"proj": 8.0}}, 5 / 2),  # a name must match as a whole
        # Regular expressions match the end of a path from a dot on. The first match counts.
        ({"alpha_pattern": {r"layers\.[0-9]+\.self_attn\..*": 8.0}}, 8 / 2),
        ({"alpha_pattern": {"[qk]_proj": 8.0, "q_proj": 3.0}}, 8 / 2),
        ({"alpha_pattern": {"k_proj|q_proj": 8.0}}, 8 / 2),
        ({"alpha_pattern": {".*layers.*self.*q_proj[0-9]*": 8.0}}, 8 / 2),
        ({"alpha_pattern": {r"^model\.layers\.0\..*": 8.0}}, 8 / 2),
        ({"alpha_pattern": {r"^layers\.0\..*": 8.0, "_proj": 8.0, "q_pro": 8.0, "self_attn": 8.0}}, 5 / 2),
        ({"alpha_pattern": {r"layers\.1\..*q_proj": 8.0}, "rank_pattern": {r"layers\..*": 2}, "r": 64}, 5 / 2),
        ({"rank_pattern": {"q_proj": 2}, "r": 64}, 5 / 2),
        ({"init_lora_weights": "gaussian", "modules_to_save": None, "layers_to_transform": None}, 5 / 2),
    ],
)
def test_scales(adapters, changes, scale):
    content = json.loads((adapters / "adapter_config.json").read_text())
    (adapters / "adapter_config.json").write_text(json.dumps(content | changes))
    found = models.load_pretrained(adapters).params["layers"]["q"][0]
    np.testing.assert_allclose(found, by_hand(adapters, scale), rtol=1e-5, atol=1e-6)


def test_parts_of_a_weight_are_parts_of_the_sum(exported):
    weights = models.open_model(exported[0]).weights
    name = "model.layers.1.mlp.down_proj.weight"
    whole = weights.read(name, (slice(None), slice(None)))
    part = weights.read(name, (slice(1, 5), slice(2, 9)))
    np.testing.assert_allclose(part, whole[1:5, 2:9], rtol=1e-6)
    assert part.shape == (4, 7)


def test_bfloat16_adapters_on_one_layer_alone(adapters):
    def edit(tensors):
        for name in list(tensors):
            if ".layers.0.self_attn.q_proj." not in name:
                del tensors[name]
            else:
                tensors[name] = tensors[name].astype(ml_dtypes.bfloat16)

    change(adapters, edit)
    found, base = models.load_pretrained(adapters), models.load_pretrained(GOLDEN / "qwen3")
    np.testing.assert_allclose(found.params["layers"]["q"][0], by_hand(adapters, 5 / 2), rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(found.params["layers"]["q"][1], base.params["layers"]["q"][1])
    np.testing.assert_array_equal(found.params["layers"]["v"], base.params["layers"]["v"])


def test_the_tokenizer_of_the_adapters_keeps_the_end_tokens_of_the_base(tmp_path):
    tokenizer = data.train_tokenizer(["a b c"], 270)
    config = models.ModelConfig(vocab_size=270, width=16, layers=1, heads=2, kv_heads=1, mlp_width=24)
    ended = dataclasses.replace(tokenizer, eos_ids=(2, 0))
    models.save_pretrained(tmp_path / "base", models.Policy(config, reference_decoder.random_params(config), ended))
    config = dataclasses.replace(config, lora_rank=2)
    policy = models.Policy(config, reference_decoder.random_params(config), tokenizer)
    models.save_adapters(tmp_path / "adapters", policy, str(tmp_path / "base"))
    found = models.load_pretrained(tmp_path / "adapters")
    assert data.load_tokenizer(tmp_path / "adapters").eos_ids == (2,)
    assert found.tokenizer.eos_ids == (2, 0)
    models.save_pretrained(tmp_path / "merged", found)
    assert data.load_tokenizer(tmp_path / "merged").eos_ids == (2, 0)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "adapters" / name).unlink()
    assert models.load_pretrained(tmp_path / "adapters").tokenizer.eos_ids == (2, 0)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"peft_type": "PREFIX_TUNING"}, "has peft_type 'PREFIX_TUNING'; only plain LoRA can be read"),
        ({"use_dora": True}, "has use_dora True; only plain LoRA"),
        ({"bias": "all"}, "has bias 'all'"),
        ({"modules_to_save": ["lm_head"]}, "has modules_to_save"),
        ({"init_lora_weights": "pissa"}, "has init_lora_weights 'pissa'"),
        ({"fan_in_fan_out": True}, "has fan_in_fan_out True"),
        ({"alpha_pattern": {"(a+)+": 1}}, "has alpha_pattern .*; only names can be read"),
        ({"alpha_pattern": {r"(a)\1": 1}}, "has alpha_pattern .*; only names can be read"),
        ({"alpha_pattern": {"(?P<x>a)(?P=x)": 1}}, "has alpha_pattern .*; only names can be read"),
        ({"alpha_pattern": {"a" * 501: 1}}, "has alpha_pattern .*; only names can be read"),
        ({"alpha_pattern": {"a(": 1}}, "has alpha_pattern .*; only names can be read"),
        ({"alpha_pattern": {".*.*.*.*.*x": 1}}, "has alpha_pattern .*; only names can be read"),
        ({"lora_alpha": "x"}, "has alpha 'x'; it must be a finite number above 0"),
        ({"r": 4}, "the adapter of .* has rank 2, and its configuration 4"),
        ({"base_model_name_or_path": ""}, "has base_model_name_or_path ''; it must name the base model"),
        ({"base_model_name_or_path": "/nowhere/at all"}, "names the base model '/nowhere/at all': There is no"),
    ],
)
def test_adapters_that_cannot_be_read_raise_a_sentence(adapters, changes, message):
    content = json.loads((adapters / "adapter_config.json").read_text())
    (adapters / "adapter_config.json").write_text(json.dumps(content | changes))
    with pytest.raises(PretrainedError, match=message):
        models.load_pretrained(adapters)


def test_damaged_adapters_raise_a_sentence(adapters):
    change(adapters, lambda tensors: tensors.update({"base_model.model.lm_head.bias": np.zeros(2, np.float32)}))
    with pytest.raises(PretrainedError, match="lm_head.bias, which is no adapter of a weight of"):
        models.load_pretrained(adapters)
    change(adapters, lambda tensors: tensors.pop("base_model.model.lm_head.bias"))
    change(adapters, lambda tensors: tensors.pop(Q.format(1, "B")))
    with pytest.raises(PretrainedError, match="the adapter of model.layers.1.self_attn.q_proj has the shapes {'A'"):
        models.load_pretrained(adapters)
    (adapters / "adapter_model.safetensors").rename(adapters / "adapter_model.bin")
    with pytest.raises(PretrainedError, match="There is no .*adapter_model.safetensors. It has a pickle"):
        models.load_pretrained(adapters)


def test_adapters_on_adapters_raise_a_sentence(adapters, exported):
    change_json(adapters / "adapter_config.json", base_model_name_or_path=str(exported[0]))
    with pytest.raises(PretrainedError, match="has adapters for .*, which holds adapters too: merge those first"):
        models.load_pretrained(adapters)
    change_json(adapters / "adapter_config.json", base_model_name_or_path=str(adapters))
    with pytest.raises(PretrainedError, match="which holds adapters too"):
        models.load_pretrained(adapters)


def test_a_run_stays_with_the_commits_of_adapters_and_base(adapters, hub_cache, tmp_path, capsys):
    files = {path.name: path.read_bytes() for path in (GOLDEN / "qwen3").iterdir() if path.suffix != ".npz"}
    old = hub_cache("model", "owner/base", files)
    change_json(adapters / "adapter_config.json", base_model_name_or_path="owner/base", revision="main")
    commit = hub_cache("model", "owner/adapters", {path.name: path.read_bytes() for path in adapters.iterdir()})
    opened = models.open_model("owner/adapters")
    assert opened.source[source_lib.ADAPTED] == f"owner/base@{old}"
    assert opened.source[source_lib.REVISION] == commit
    hub_cache("model", "owner/base", files | {"config.json": b"{}"})
    with pytest.raises(PretrainedError, match="model_type"):
        models.open_model("owner/adapters")
    again = models.reopen("owner/adapters", opened.source)
    assert again.config == opened.config and again.source == opened.source
    assert models.read_source(str(adapters)) != {} or capsys.readouterr()


def test_the_path_of_the_base_can_begin_at_the_adapters(adapters, exported, tmp_path, monkeypatch):
    shutil.copytree(GOLDEN / "qwen3", tmp_path / "models" / "base")
    here = tmp_path / "elsewhere" / "deep"  # ../models does not exist from this folder
    here.mkdir(parents=True)
    monkeypatch.chdir(here)
    for base in ("../models/base", "../models/../models/base"):
        change_json(adapters / "adapter_config.json", base_model_name_or_path=base)
        np.testing.assert_allclose(logits(adapters), exported[1], rtol=0, atol=2e-5)
        assert models.read_source(adapters) == models.read_source(GOLDEN / "qwen3")
    shutil.copytree(GOLDEN / "qwen3", here / "owner" / "base")  # the working directory comes before the hub
    change_json(adapters / "adapter_config.json", base_model_name_or_path="owner/base")
    np.testing.assert_allclose(logits(adapters), exported[1], rtol=0, atol=2e-5)
    shutil.copytree(GOLDEN / "qwen3", here / "both")
    (adapters / "both").mkdir()  # the working directory comes before the adapters' folder
    change_json(adapters / "adapter_config.json", base_model_name_or_path="both")
    np.testing.assert_allclose(logits(adapters), exported[1], rtol=0, atol=2e-5)
    change_json(adapters / "adapter_config.json", base_model_name_or_path="../models/none")
    with pytest.raises(PretrainedError, match="names the base model '../models/none'"):
        models.load_pretrained(adapters)


def test_a_work_directory_is_no_model(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"config": {}, "data_fingerprint": "ab"}))
    command = f"python -m jaxrl_reason.export --workdir={tmp_path} --out=DIR"
    with pytest.raises(PretrainedError, match=f"{tmp_path} is the work directory of a run; export it first: {command}"):
        models.load_pretrained(tmp_path)
    judge = tmp_path / "reward_model"
    judge.mkdir()
    (judge / "config.json").write_text(json.dumps({"config": {}, "data_fingerprint": "ab"}))
    with pytest.raises(PretrainedError, match=f"export --workdir={tmp_path} --reward-model --out=DIR"):
        models.load_reward_model(judge)

"""Pretrained models in and out, against directories that `transformers` wrote and what it computes with them (tests/golden)."""

import dataclasses
import json
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
import safetensors.numpy

from helpers import reference_decoder
from jaxrl_reason import data, models
from jaxrl_reason.models import ModelConfig, PretrainedError, RopeScaling
from jaxrl_reason.models.formats import families, pretrained, weights

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
NAMES = ("llama", "qwen2", "qwen2_tied", "qwen3", "mistral", "gemma3", "qwen2_reward")
POLICIES = NAMES[:-1]
SMALL = dict(vocab_size=30, width=16, layers=2, heads=4, kv_heads=2, mlp_width=24)


def load(name, **options):
    loader = models.load_reward_model if name == "qwen2_reward" else models.load_pretrained
    return loader(GOLDEN / name, **options)


def expected(name):
    return np.load(GOLDEN / name / "expected.npz")


# -- what they compute ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("name", NAMES)
def test_outputs_are_those_of_transformers(name, side):
    policy, golden = load(name), expected(name)
    tokens, mask, want = (golden[f"{side}_{part}"] for part in ("tokens", "mask", "output"))
    found = np.asarray(policy.apply(policy.params, tokens, mask))
    alone = np.asarray(policy.apply(policy.params, tokens[:1]))  # the first row is full: no mask
    assert found.dtype == np.float32
    if name == "qwen2_reward":
        np.testing.assert_allclose(found, want[:, 0], atol=2e-4)
        np.testing.assert_allclose(alone, want[:1, 0], atol=2e-4)
    else:
        assert np.abs(want).max() > 1  # there is something to be equal to
        np.testing.assert_allclose(found[mask], want[mask], atol=2e-4)
        np.testing.assert_allclose(alone, want[:1], atol=2e-4)


@pytest.mark.parametrize("name", POLICIES)
def test_with_a_cache_the_same(name):
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
def test_in_bfloat16(name):
    policy, golden = load(name, dtype="bfloat16"), expected(name)
    assert {x.dtype for x in jax.tree.leaves(policy.params)} <= {jnp.dtype("bfloat16"), jnp.dtype("float32")}
    assert policy.config.param_dtype == policy.config.compute_dtype == "bfloat16"
    mask, want = golden["right_mask"], golden["right_output"]
    found = np.asarray(policy.apply(policy.params, golden["right_tokens"], mask))
    difference = np.abs(found - want[:, 0]) if name == "qwen2_reward" else np.abs(found - want)[mask]
    assert 1e-4 < difference.mean() < 0.03


# -- reading ---------------------------------------------------------------------------------------------------------


def test_weights_go_straight_into_their_shards():
    env = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    script = pathlib.Path(__file__).with_name("sharded_loading.py")
    done = subprocess.run(
        [sys.executable, str(script), str(GOLDEN)], env=os.environ | env, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["llama", "gemma3", "qwen2_reward"]


def test_the_tokenizer_comes_along(exported):
    directory, policy = exported
    found = models.load_pretrained(directory)
    assert found.tokenizer.encode("ab 12") == policy.tokenizer.encode("ab 12")
    assert found.tokenizer.eos_ids == (2, 7) and found.tokenizer.bos_id == 1
    assert models.load_pretrained(GOLDEN / "llama").tokenizer is None


def test_what_is_no_model_is_a_sentence(tmp_path):
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


def test_an_id_of_the_hub_is_taken_at_a_named_revision_and_without_pickles(hub_cache, tmp_path, capsys, monkeypatch):
    """From the cache of the hub's own client, without a network."""
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
    # A run keeps what was found, and stays there when it goes on.
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
def test_what_changed_in_the_cache_of_the_hub_is_refused(hub_cache, large):
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


# -- hostile directories ---------------------------------------------------------------------------------------------


def change_json(path, **changes):
    content = json.loads(path.read_text())
    for key, value in changes.items():
        if value is None:
            content.pop(key)
        else:
            content[key] = value
    path.write_text(json.dumps(content))


def change_tensors(directory, change):
    tensors = safetensors.numpy.load_file(directory / "model.safetensors")
    change(tensors)
    safetensors.numpy.save_file(tensors, directory / "model.safetensors")


class Bomb:
    def __reduce__(self):
        return pathlib.Path.touch, (pathlib.Path("exploded"),)


def a_pickle(directory):
    (directory / "model.safetensors").unlink()
    (directory / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb()))


def a_disguised_pickle(directory):
    (directory / "model.safetensors").write_bytes(pickle.dumps(Bomb()))


def an_index(file):
    def spoil(directory):
        weight_map = dict.fromkeys(safetensors.numpy.load_file(directory / "model.safetensors"), file)
        (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))

    return spoil


def truncated(directory):
    file = directory / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-8])


def config_of(**changes):
    return lambda directory: change_json(directory / "config.json", **changes)


def tensors(change):
    return lambda directory: change_tensors(directory, change)


def other_file(name, content):
    return lambda directory: (directory / name).write_bytes(content)


def a_link(name, target):
    """The file moved out of the directory, and a link in its place; where there is none, a link to `target`."""

    def spoil(directory):
        file, outside = directory / name, directory.parent / "outside" / name
        outside.parent.mkdir()
        if file.exists():
            file.rename(outside)
        file.symlink_to(outside if outside.exists() else target)

    return spoil


def an_index_to_a_link(directory):
    an_index("weights.safetensors")(directory)
    a_link("model.safetensors", "")(directory)
    (directory / "model.safetensors").rename(directory / "weights.safetensors")


FIRST = "model.layers.0.self_attn.q_proj.weight"
HOSTILE = {
    "truncated": (truncated, "model.safetensors is not a whole safetensors file"),
    "header": (other_file("model.safetensors", b"\xff" * 64), "is not a whole safetensors file"),
    "pickle": (a_pickle, "pytorch_model.bin, a pickle, which can run code"),
    "disguised": (a_disguised_pickle, "is not a whole safetensors file"),
    "outside": (
        an_index("../model.safetensors"),
        "into '../model.safetensors'; it must be the name of a .safetensors file in the same directory",
    ),
    "absolute": (an_index("/etc/passwd"), "into '/etc/passwd'; it must be the name"),
    "a NUL": (an_index("a\0.safetensors"), "safetensors cannot be followed"),
    "linked weights": (
        a_link("model.safetensors", ""),
        "model.safetensors leads to .*, outside of .*; put the file itself",
    ),
    "indexed link": (an_index_to_a_link, "weights.safetensors leads to .*, outside of"),
    "linked index": (
        a_link("model.safetensors.index.json", "/etc/passwd"),
        "index.json leads to /etc/passwd, outside of",
    ),
    "linked config": (a_link("config.json", ""), "config.json leads to .*, outside of"),
    "linked merges": (a_link("merges.txt", "/etc/passwd"), "merges.txt leads to /etc/passwd, outside of"),
    "linked chat": (
        a_link("chat_template.jinja", "../../../../etc/passwd"),
        "chat_template.jinja leads to .*, outside",
    ),
    "circle": (a_link("tokenizer.json", "tokenizer.json"), "tokenizer.json (cannot be followed|leads to)"),
    "not there": (an_index("other.safetensors"), "names other.safetensors, and there is no such file"),
    "no map": (other_file("model.safetensors.index.json", b"{}"), "has no weight_map"),
    "bad index": (other_file("model.safetensors.index.json", b"{"), "index.json is not JSON"),
    "missing": (tensors(lambda t: t.pop(FIRST)), f"lacks {FIRST}"),
    "surplus": (
        tensors(lambda t: t.update(extra=np.zeros(2))),
        "extra has dtype F64",
    ),
    "surplus32": (
        tensors(lambda t: t.update(extra=np.zeros(2, "f4"))),
        "has extra, which its config.json has no place for",
    ),
    "misshapen": (
        tensors(lambda t: t.update({FIRST: t[FIRST].T.copy()})),
        rf"{FIRST} has shape \[16, 24\], and config.json requires \[24, 16\]",
    ),
    "integers": (tensors(lambda t: t.update({FIRST: t[FIRST].astype("i1")})), f"{FIRST} has dtype I8"),
    "another head": (
        tensors(lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"] + 1})),
        "ties the output head to the embedding, and lm_head.weight differs",
    ),
    "no config": (lambda d: (d / "config.json").unlink(), "There is no .*config.json"),
    "config": (other_file("config.json", b"{]"), "config.json is not JSON"),
    "config list": (other_file("config.json", b"[]"), "config.json holds a JSON list"),
    "config bytes": (other_file("config.json", b"\xff\xfe\x00"), "config.json is not JSON"),
    "unknown": (
        config_of(model_type="mamba"),
        "has model_type 'mamba'; it must be one of llama, mistral, qwen2, qwen3, gemma3_text",
    ),
    "no type": (config_of(model_type=None), "has model_type 'None'"),
    "no size": (config_of(hidden_size=None), "has hidden_size None; it must be a whole number"),
    "bad size": (config_of(num_hidden_layers="2"), "has num_hidden_layers '2'"),
    "zero": (config_of(num_attention_heads=0), "has num_attention_heads 0"),
    "activation": (config_of(hidden_act="relu"), "has hidden_act 'relu', and only 'silu'"),
    "bias": (config_of(attention_bias=True), "has attention_bias True, and only False"),
    "rope": (
        config_of(rope_parameters={"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}),
        "rotary positions of type 'yarn'; the type must be default, linear or llama3",
    ),
    "rope fields": (
        config_of(rope_parameters={"rope_type": "llama3", "rope_theta": 1e4}),
        "rotary positions of type 'llama3' without 'factor'",
    ),
    "quantized": (config_of(quantization_config={"bits": 4}), "has a quantization_config"),
    "heads": (config_of(num_key_value_heads=3), "describes an invalid model: model.heads"),
    "tokenizer": (other_file("tokenizer.json", b"\x80\x04"), "is not a tokenizer.json"),
    "tokenizer config": (
        lambda d: (data.train_tokenizer(["a"]).save(d), (d / "tokenizer_config.json").write_text("nope")),
        "tokenizer_config.json is not JSON",
    ),
    "vocabulary": (lambda d: data.train_tokenizer(["a"]).save(d), "The tokenizer has 259 tokens, and the model 40"),
}


@pytest.mark.parametrize("fault", HOSTILE)
def test_a_hostile_directory_is_one_sentence_and_places_nothing(fault, tmp_path, monkeypatch):
    spoil, message = HOSTILE[fault]
    directory = tmp_path / "model"
    shutil.copytree(GOLDEN / "qwen3", directory)
    models.load_pretrained(directory)
    spoil(directory)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(jax, "make_array_from_callback", lambda *_: pytest.fail("something was placed"))
    with pytest.raises(PretrainedError, match=message) as caught:
        models.load_pretrained(directory)
    assert "\n" not in str(caught.value) and str(directory) in str(caught.value)
    assert not (tmp_path / "exploded").exists()


def test_code_that_a_model_brings_is_never_run_and_goes_no_further(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    directory = tmp_path / "model"
    shutil.copytree(GOLDEN / "qwen3", directory)
    data.train_tokenizer(["a"]).save(directory)
    touch = "import pathlib\npathlib.Path('exploded').touch()\n"
    for name in ("modeling_own", "configuration_own", "tokenization_own"):
        (directory / f"{name}.py").write_text(touch)
    auto_map = {"AutoConfig": "configuration_own.C", "AutoModelForCausalLM": "modeling_own.M"}
    change_json(directory / "config.json", auto_map=auto_map, trust_remote_code=True, vocab_size=259)
    change_json(directory / "tokenizer_config.json", auto_map={"AutoTokenizer": ["tokenization_own.T", None]})
    rows = np.zeros((259, json.loads((directory / "config.json").read_text())["hidden_size"]), "f4")
    change_tensors(directory, lambda t: t.update({"model.embed_tokens.weight": rows}))
    with pytest.warns(UserWarning, match="config.json names code of the model's own .auto_map., which is never run"):
        policy = models.load_pretrained(directory)
    models.save_pretrained(tmp_path / "out", policy)
    for name in ("config.json", "tokenizer_config.json"):
        assert "auto_map" not in (tmp_path / "out" / name).read_text()
    assert json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())["eos_token"] == "<eos>"
    change_json(directory / "config.json", model_type="own")
    with pytest.warns(UserWarning, match="never run"), pytest.raises(PretrainedError, match="has model_type 'own'"):
        models.load_pretrained(directory)
    assert not (tmp_path / "exploded").exists()


def test_links_inside_of_a_directory_are_taken(tmp_path):
    directory = tmp_path / "model"
    shutil.copytree(GOLDEN / "qwen3", directory)
    (directory / "kept").mkdir()
    (directory / "model.safetensors").rename(directory / "kept" / "weights")
    (directory / "model.safetensors").symlink_to("kept/weights")
    (tmp_path / "by another name").symlink_to(directory)
    assert models.open_model(tmp_path / "by another name").weights.shapes


def test_a_stored_copy_of_a_tied_head_is_taken(tmp_path):
    directory = tmp_path / "model"
    shutil.copytree(GOLDEN / "qwen3", directory)
    change_tensors(directory, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].copy()}))
    jax.tree.map(np.testing.assert_array_equal, models.load_pretrained(directory).params, load("qwen3").params)


def test_files_and_their_index_hold_the_same_tensors(tmp_path):
    """Seen from both sides: a tensor that the index does not know, and one that its file does not have."""
    for change, message in (
        (lambda t: t.update(extra=np.zeros(2, "f4")), "holds a tensor that the index does not assign to it: extra"),
        (lambda t: t.pop(sorted(t)[0]), "lacks a tensor of the index: "),
    ):
        directory = tmp_path / message[:5]
        shutil.copytree(GOLDEN / "llama", directory)
        file = sorted(directory.glob("*.safetensors"))[0]
        tensors = safetensors.numpy.load_file(file)
        change(tensors)
        safetensors.numpy.save_file(tensors, file)
        with pytest.raises(PretrainedError, match=f"{file.name} {message}"):
            models.load_pretrained(directory)


def test_families_that_look_alike_are_told_apart(tmp_path):
    directory = tmp_path / "model"
    shutil.copytree(GOLDEN / "gemma3", directory)
    change_json(directory / "config.json", model_type="gemma3")
    with pytest.raises(PretrainedError, match="the model with a vision tower"):
        models.load_pretrained(directory)
    change_json(
        directory / "config.json", model_type="gemma3_text", layer_types=["full_attention", "sliding_attention"] * 2
    )
    with pytest.raises(PretrainedError, match="has layer_types without a period"):
        models.load_pretrained(directory)


# -- config.json, as the hub has it --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_both_spellings_of_a_configuration_are_one_decoder(name):
    """The directories are written by transformers 5; as transformers 4 would have written them they say the same."""
    new = json.loads((GOLDEN / name / "config.json").read_text())
    old = {key: value for key, value in new.items() if key not in ("rope_parameters", "layer_types", "dtype")}
    rope = new["rope_parameters"]
    if name == "gemma3":
        old |= {"rope_local_base_freq": rope["sliding_attention"]["rope_theta"], "sliding_window_pattern": 2}
        rope = rope["full_attention"]
    scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
    old |= {"rope_theta": rope["rope_theta"], "torch_dtype": "float32"}
    old["rope_scaling"] = None if scaling == {"rope_type": "default"} else scaling
    assert families.read_config(old) == families.read_config(new)


@pytest.mark.parametrize(
    "name, changes, message",
    [
        ("qwen3", dict(rope_parameters={"rope_type": "default", "rope_theta": None}), "rope_theta None"),
        ("qwen3", dict(rope_parameters="linear"), "config.json describes an invalid model"),
        ("qwen3", dict(rope_parameters={"rope_type": "linear", "factor": 0}), "an invalid model: .*factor is 0"),
        ("qwen3", dict(tie_word_embeddings="false"), "tie_word_embeddings 'false'; it must be true or false"),
        ("qwen3", dict(rms_norm_eps=0), "rms_norm_eps 0; it must be a finite number above 0"),
        ("qwen3", dict(layer_types=5), "an invalid model|layer_types"),
        ("qwen3", dict(model_type=["qwen3"]), "has model_type"),
        ("qwen3", dict(hidden_size=10**9), "hidden_size 1000000000; it must be a whole number from 1 to"),
        ("gemma3", dict(query_pre_attn_scalar=0), "query_pre_attn_scalar 0"),
        ("gemma3", dict(layer_types=None, sliding_window_pattern=0), "sliding_window_pattern 0"),
        (
            "gemma3",
            dict(rope_parameters={"sliding_attention": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}}),
            "scales the rotary positions of sliding layers",
        ),
    ],
)
def test_a_configuration_that_cannot_be_is_one_sentence(name, changes, message):
    source = json.loads((GOLDEN / name / "config.json").read_text()) | changes
    with pytest.raises(PretrainedError, match=message):
        families.read_config(source)


def test_what_an_absent_key_means_is_the_familys_own():
    source = json.loads((GOLDEN / "gemma3" / "config.json").read_text())
    found = families.read_config(source | {"rope_parameters": {"full_attention": {"rope_type": "default"}}})
    assert (found.rope_theta, found.local_rope_theta) == (1e6, 1e4)
    found = families.read_config(source | {"rope_parameters": {"rope_type": "default", "rope_theta": 7.0}})
    assert (found.rope_theta, found.local_rope_theta) == (7.0, 1e4)
    mistral = json.loads((GOLDEN / "mistral" / "config.json").read_text())
    del mistral["sliding_window"]
    assert families.read_config(mistral).sliding_window == 4096
    assert families.read_config(mistral | {"sliding_window": None}).sliding_window == 0
    qwen = json.loads((GOLDEN / "qwen2" / "config.json").read_text())
    sliding = {"layer_types": ["sliding_attention"] * 2, "sliding_window": 9, "use_sliding_window": False}
    assert families.read_config(qwen | sliding).sliding_window == 0
    assert families.read_config(qwen | sliding | {"use_sliding_window": True}).sliding_window == 9


def test_configurations_in_the_spelling_of_transformers_4():
    llama = families.read_config(
        {
            "model_type": "llama",
            "vocab_size": 128256,
            "hidden_size": 2048,
            "intermediate_size": 8192,
            "num_hidden_layers": 16,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 64,
            "hidden_act": "silu",
            "rms_norm_eps": 1e-05,
            "rope_theta": 500000.0,
            "rope_scaling": {
                "factor": 32.0,
                "high_freq_factor": 4.0,
                "low_freq_factor": 1.0,
                "original_max_position_embeddings": 8192,
                "rope_type": "llama3",
            },
            "tie_word_embeddings": True,
            "attention_bias": False,
            "mlp_bias": False,
        }
    )
    assert llama.rope_scaling == RopeScaling(kind="llama3", factor=32.0) and llama.rope_theta == 500000.0
    assert llama.tied_embedding and llama.head_dim == 64 and llama.norm_eps == 1e-5
    qwen = {
        "model_type": "qwen2",
        "vocab_size": 151936,
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0,
        "sliding_window": 32768,
        "max_window_layers": 21,
        "use_sliding_window": False,
        "tie_word_embeddings": True,
    }
    found = families.read_config(qwen)
    assert found.qkv_bias and not found.sliding_window and found.head_dim == 128 and found.rope_theta == 1e6
    found = families.read_config(qwen | {"use_sliding_window": True, "max_window_layers": 0, "sliding_window": 99})
    assert found.sliding_window == 99 and all(found.sliding_layers)
    with pytest.raises(PretrainedError, match="every n-th layer is global"):
        families.read_config(qwen | {"use_sliding_window": True})
    gemma = families.read_config(
        {
            "model_type": "gemma3_text",
            "vocab_size": 262144,
            "hidden_size": 1152,
            "intermediate_size": 6912,
            "num_hidden_layers": 26,
            "num_attention_heads": 4,
            "num_key_value_heads": 1,
            "head_dim": 256,
            "hidden_activation": "gelu_pytorch_tanh",
            "rms_norm_eps": 1e-06,
            "rope_theta": 1000000,
            "rope_local_base_freq": 10000,
            "rope_scaling": None,
            "sliding_window": 512,
            "sliding_window_pattern": 6,
            "query_pre_attn_scalar": 256,
            "attn_logit_softcapping": None,
            "final_logit_softcapping": None,
        }
    )
    assert gemma.tied_embedding and gemma.norm_offset == 1 and gemma.post_norms and gemma.qk_norm
    assert gemma.embedding_scale == 1152**0.5 and gemma.query_scale == 1 / 16 and gemma.activation == "gelu"
    assert (gemma.rope_theta, gemma.local_rope_theta) == (1e6, 1e4)
    assert [i for i, slides in enumerate(gemma.sliding_layers) if not slides] == [5, 11, 17, 23]


# -- writing ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A policy of our own, with a tokenizer of two end tokens, and where it was saved."""
    config = ModelConfig(**SMALL | dict(vocab_size=400), qk_norm=True)
    tokenizer = dataclasses.replace(data.train_tokenizer(["ab ab 12"]), eos_ids=(2, 7), chat_template="{{ messages }}")
    policy = models.Policy(config, reference_decoder.random_params(config), tokenizer)
    directory = tmp_path_factory.mktemp("exported") / "deep" / "model"
    models.save_pretrained(directory, policy)
    return directory, policy


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
def test_what_came_in_goes_out_as_it_came(name, tmp_path):
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


@pytest.mark.parametrize("name", POLICIES)
def test_a_family_is_found_for_a_decoder_without_its_config(name, tmp_path):
    model = dataclasses.replace(load(name), source={})
    models.save_pretrained(tmp_path / "out", model, max_shard_bytes=9000)
    files = sorted(p.name for p in (tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 2 and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert all((tmp_path / "out" / f).stat().st_size < 12_000 for f in files)
    again = models.load_pretrained(tmp_path / "out")
    assert again.config == model.config
    jax.tree.map(np.testing.assert_array_equal, again.params, model.params)


def test_a_changed_decoder_is_not_described_by_the_config_it_came_with(tmp_path):
    model = load("qwen3")
    models.save_pretrained(
        tmp_path / "out", dataclasses.replace(model, config=dataclasses.replace(model.config, rope_theta=7.0))
    )
    assert models.load_pretrained(tmp_path / "out").config.rope_theta == 7.0


def test_bfloat16_weights_are_written_as_such(tmp_path):
    model = load("gemma3", dtype="bfloat16")
    models.save_pretrained(tmp_path / "out", model)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == "bfloat16"
    stored = safetensors.numpy.load_file(tmp_path / "out" / "model.safetensors")
    assert {str(x.dtype) for x in stored.values()} == {"bfloat16"}
    jax.tree.map(
        np.testing.assert_array_equal, models.load_pretrained(tmp_path / "out", dtype="bfloat16").params, model.params
    )


def test_what_cannot_be_written_is_refused(tmp_path):
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

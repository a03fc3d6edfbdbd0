"""Damaged and hostile model directories give one sentence, place no array on a device, and run no code."""

import json
import pickle
import shutil

import jax
import numpy as np
import pytest
import safetensors.numpy

from helpers.golden import Bomb, change_json, change_tensors, GOLDEN, load
from jaxrl_reason import data, models
from jaxrl_reason.models import PretrainedError


def a_pickle(directory):
    (directory / "model.safetensors").unlink()
    (directory / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb()))


def a_disguised_pickle(directory):
    (directory / "model.safetensors").write_bytes(pickle.dumps(Bomb()))


def an_index(file):
    def spoil(directory):
        alone = directory / "model.safetensors"
        weight_map = dict.fromkeys(safetensors.numpy.load_file(alone), file)
        alone.rename(directory / "weights.safetensors")  # next to model.safetensors, no index is read
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
    """Moves the file out of the directory and puts a link in its place, or a link to `target` if there is no file."""

    def spoil(directory):
        file, outside = directory / name, directory.parent / "outside" / name
        outside.parent.mkdir()
        if file.exists():
            file.rename(outside)
        file.symlink_to(outside if outside.exists() else target)

    return spoil


def an_index_to_a_link(directory):
    an_index("weights.safetensors")(directory)
    a_link("weights.safetensors", "")(directory)


def an_index_alone(spoil):
    def spoil_alone(directory):
        (directory / "model.safetensors").unlink()
        spoil(directory)

    return spoil_alone


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
        an_index_alone(a_link("model.safetensors.index.json", "/etc/passwd")),
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
    "no map": (an_index_alone(other_file("model.safetensors.index.json", b"{}")), "has no weight_map"),
    "bad index": (an_index_alone(other_file("model.safetensors.index.json", b"{")), "index.json is not JSON"),
    "missing": (tensors(lambda t: t.pop(FIRST)), f"lacks {FIRST}"),
    "surplus": (tensors(lambda t: t.update(extra=np.zeros(2))), "extra has dtype F64"),
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
def test_a_hostile_directory_raises_one_sentence_and_places_nothing(fault, tmp_path, monkeypatch):
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


def test_code_of_a_model_is_never_run_and_never_exported(tmp_path, monkeypatch):
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


def test_links_inside_a_directory_are_followed(tmp_path):
    directory = tmp_path / "model"
    shutil.copytree(GOLDEN / "qwen3", directory)
    (directory / "kept").mkdir()
    (directory / "model.safetensors").rename(directory / "kept" / "weights")
    (directory / "model.safetensors").symlink_to("kept/weights")
    (tmp_path / "by another name").symlink_to(directory)
    assert models.open_model(tmp_path / "by another name").weights.shapes


def test_a_stored_copy_of_a_tied_head_is_accepted(tmp_path):
    directory = tmp_path / "model"
    shutil.copytree(GOLDEN / "qwen3", directory)
    change_tensors(directory, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].copy()}))
    jax.tree.map(np.testing.assert_array_equal, models.load_pretrained(directory).params, load("qwen3").params)


def test_an_index_that_disagrees_with_its_files_raises(tmp_path):
    """Tries a tensor that is only in the file, and one that is only in the index."""
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


def test_multimodal_gemma_and_irregular_layer_types_raise(tmp_path):
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

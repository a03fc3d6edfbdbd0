"""Models go to `transformers` and PEFT and back, with new random weights. Needs torch and transformers."""

import dataclasses
import importlib.util
import json

import jax
import numpy as np
import pytest

from jaxrl_reason import data, models
from jaxrl_reason.models import lora

pytestmark = pytest.mark.slow
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

t = transformers
SIZES = dict(
    vocab_size=320,
    hidden_size=48,
    intermediate_size=80,
    num_hidden_layers=4,
    num_attention_heads=6,
    num_key_value_heads=2,
    max_position_embeddings=256,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
LLAMA3 = dict(
    rope_type="llama3",
    rope_theta=500_000.0,
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=32,
)
GEMMA = SIZES | dict(num_hidden_layers=7, head_dim=16, sliding_window=8, query_pre_attn_scalar=24)
FAMILIES = {
    "llama3": lambda: t.LlamaForCausalLM(t.LlamaConfig(**SIZES, rope_parameters=LLAMA3)),
    "llama_tied": lambda: t.LlamaForCausalLM(t.LlamaConfig(**SIZES, tie_word_embeddings=True, head_dim=12)),
    "qwen2": lambda: t.Qwen2ForCausalLM(t.Qwen2Config(**SIZES)),
    "qwen2_tied": lambda: t.Qwen2ForCausalLM(t.Qwen2Config(**SIZES, tie_word_embeddings=True)),
    "qwen2_sliding": lambda: t.Qwen2ForCausalLM(
        t.Qwen2Config(**SIZES, use_sliding_window=True, sliding_window=6, max_window_layers=0)
    ),
    "qwen3": lambda: t.Qwen3ForCausalLM(t.Qwen3Config(**SIZES, head_dim=10)),
    "mistral": lambda: t.MistralForCausalLM(t.MistralConfig(**SIZES, sliding_window=7)),
    "mistral_full": lambda: t.MistralForCausalLM(t.MistralConfig(**SIZES, sliding_window=None)),
    "gemma3": lambda: t.Gemma3ForCausalLM(t.Gemma3TextConfig(**GEMMA)),
    "gemma3_all_sliding": lambda: t.Gemma3ForCausalLM(t.Gemma3TextConfig(**GEMMA | dict(num_hidden_layers=3))),
}
TOKENS = np.random.default_rng(0).integers(3, 320, (3, 40))
MASK = np.arange(40) < np.array([[40], [25], [9]])


def randomised(model):
    torch.manual_seed(1)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight) * (0.15 if weight.ndim > 1 else 0.2))
    model.config._attn_implementation = "eager"
    return model.eval()


def theirs(model, tokens=TOKENS, mask=MASK):
    with torch.no_grad():
        return model(torch.tensor(tokens), attention_mask=torch.tensor(mask).long()).logits.float().numpy()


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_policies_survive_a_round_trip(name, dtype, tmp_path):
    model = randomised(FAMILIES[name]()).to(getattr(torch, dtype))
    model.save_pretrained(tmp_path / "in", max_shard_size="200KB")
    policy = models.load_pretrained(tmp_path / "in")
    read = lambda path: t.AutoModelForCausalLM.from_pretrained(
        path, attn_implementation="eager", dtype=torch.float32
    ).eval()
    expected = theirs(read(tmp_path / "in"))  # a later cast would keep rounded rotary frequencies
    found = np.asarray(policy.apply(policy.params, TOKENS, MASK))
    np.testing.assert_allclose(found[MASK], expected[MASK], atol=2e-4)
    tokenizer = data.train_tokenizer(["abc 12"] * 9, 300)
    for label, source in (("as it came", policy.source), ("described anew", {})):
        out = tmp_path / label
        models.save_pretrained(
            out, dataclasses.replace(policy, source=source, tokenizer=tokenizer), max_shard_bytes=100_000
        )
        again = read(out)
        assert type(again) is type(model) or not source  # a Mistral without a window is written as a Llama
        np.testing.assert_allclose(theirs(again), expected, atol=1e-5)
        found = t.AutoTokenizer.from_pretrained(out)
        assert found("abc 12").input_ids == tokenizer.encode("abc 12")
        assert found.eos_token_id == 2 and again.generation_config.eos_token_id == 2
        assert json.loads((out / "config.json").read_text())["torch_dtype"] == "float32"


@pytest.mark.parametrize("kind", ["Qwen2", "Llama", "Gemma3Text"])
def test_reward_models_survive_a_round_trip(kind, tmp_path):
    sizes = GEMMA if kind == "Gemma3Text" else SIZES
    config = getattr(t, f"{kind}Config")(**sizes, num_labels=1)
    classifier = getattr(t, f"{kind}ForSequenceClassification", None)
    if classifier is None:
        pytest.skip(f"transformers has no {kind}ForSequenceClassification")
    model = randomised(classifier(config))
    model.save_pretrained(tmp_path / "in")
    judge = models.load_reward_model(tmp_path / "in")
    padded = np.where(MASK, TOKENS, 0)
    expected = theirs(model, padded)[:, 0]
    np.testing.assert_allclose(judge.apply(judge.params, padded, MASK), expected, atol=2e-4)
    tokenizer = data.train_tokenizer(["abc 12"] * 9, 300)
    models.save_pretrained(tmp_path / "out", dataclasses.replace(judge, source={}, tokenizer=tokenizer))
    again = t.AutoModelForSequenceClassification.from_pretrained(tmp_path / "out", attn_implementation="eager").eval()
    assert type(again) is type(model)
    np.testing.assert_array_equal(theirs(again, padded)[:, 0], expected)


@pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="PEFT is not installed")
def test_adapters_in_peft_give_the_same_outputs(tmp_path):
    import peft

    model = randomised(FAMILIES["qwen3"]())
    model.save_pretrained(tmp_path / "base")
    base = models.load_pretrained(tmp_path / "base")
    config = dataclasses.replace(base.config, lora_rank=3, lora_alpha=7.0, lora_projections=("q", "v", "o", "down"))
    adapters = jax.tree.map(
        lambda x: 0.1 * jax.random.normal(jax.random.key(x.size), x.shape),
        lora.init_adapters(config, jax.random.key(0)),
    )
    policy = models.Policy(config, lora.join(adapters, base.params))
    models.save_adapters(tmp_path / "adapters", policy, str(tmp_path / "base"))
    with_adapters = peft.PeftModel.from_pretrained(model, tmp_path / "adapters").eval()
    found = np.asarray(policy.apply(policy.params, TOKENS, MASK))
    np.testing.assert_allclose(found[MASK], theirs(with_adapters)[MASK], atol=2e-4)
    assert np.abs(found - np.asarray(base.apply(base.params, TOKENS, MASK)))[MASK].max() > 0.05

"""Writes the model directories next to this file, and the outputs of `transformers` for them.

    python tests/golden/make.py

It needs torch and transformers, which no test needs. Weights are random and larger than initial weights, so that every
switch matters.
"""

import pathlib
import shutil

import numpy as np
import torch
import transformers as t

HERE = pathlib.Path(__file__).parent
SIZES = dict(
    vocab_size=40,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=0,
)
LLAMA3 = dict(
    rope_type="llama3",
    rope_theta=10_000.0,
    factor=4.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=8,
)
MODELS = {
    "llama": (
        t.LlamaForCausalLM,
        t.LlamaConfig(**SIZES, head_dim=8, rope_parameters=LLAMA3, tie_word_embeddings=False),
    ),
    "qwen2": (t.Qwen2ForCausalLM, t.Qwen2Config(**SIZES, tie_word_embeddings=False)),
    "qwen2_tied": (t.Qwen2ForCausalLM, t.Qwen2Config(**SIZES, tie_word_embeddings=True)),
    "qwen3": (t.Qwen3ForCausalLM, t.Qwen3Config(**SIZES, head_dim=6, tie_word_embeddings=True)),
    "mistral": (t.MistralForCausalLM, t.MistralConfig(**SIZES, sliding_window=5)),
    "gemma3": (
        t.Gemma3ForCausalLM,
        t.Gemma3TextConfig(
            **SIZES | dict(num_hidden_layers=4),
            head_dim=6,
            sliding_window=4,
            query_pre_attn_scalar=9,
            layer_types=["sliding_attention", "full_attention"] * 2,
            rope_parameters={
                "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
                "full_attention": {"rope_type": "linear", "rope_theta": 5_000.0, "factor": 3.0},
            },
        ),
    ),
    "qwen2_reward": (t.Qwen2ForSequenceClassification, t.Qwen2Config(**SIZES, num_labels=1, tie_word_embeddings=False)),
}


def main():
    for number, (name, (kind, config)) in enumerate(MODELS.items()):
        torch.manual_seed(number)
        config._attn_implementation = "eager"  # plain arithmetic
        model = kind(config).eval()
        with torch.no_grad():
            for weight in model.parameters():
                weight.copy_(torch.randn_like(weight) * (0.4 if weight.ndim > 1 else 0.3) + (weight.ndim == 1) * weight)
        directory = HERE / name
        shutil.rmtree(directory, ignore_errors=True)
        model.save_pretrained(directory, max_shard_size="12KB" if name == "llama" else "5GB")
        tokens = torch.randint(3, SIZES["vocab_size"], (3, 14))
        lengths = torch.tensor([14, 9, 3])
        right = torch.arange(14) < lengths[:, None]
        outputs = {}
        for side, mask in (("right", right), ("left", right.flip(1))):
            padded = torch.where(mask, tokens, 0)
            with torch.no_grad():
                # As in generation, padding has no positions.
                positions = (mask.cumsum(1) - 1).clamp(min=0)
                found = model(padded, attention_mask=mask.long(), position_ids=positions).logits.float().numpy()
            outputs |= {f"{side}_tokens": padded.numpy(), f"{side}_mask": mask.numpy(), f"{side}_output": found}
        np.savez(directory / "expected.npz", **outputs)


if __name__ == "__main__":
    main()

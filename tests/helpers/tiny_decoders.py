"""Decoders that are small enough for the float64 reference, one per family with every switch of the family."""

import functools

import jax

from jaxrl_reason.models import ModelConfig, RopeScaling

V = 23
LLAMA3 = dict(kind="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_length=100)


def make(**overrides):
    sizes = dict(vocab_size=V, width=16, layers=3, heads=4, kv_heads=2, mlp_width=24, head_dim=8)
    return ModelConfig(**(sizes | overrides))


# Windows are shorter than the prompts of the tests, and reach from the completion into the prompt.
GEMMA3 = dict(
    sliding_window=3,
    sliding_period=3,
    local_rope_theta=50.0,
    rope_theta=1000.0,
    qk_norm=True,
    post_norms=True,
    norm_offset=1.0,
    activation="gelu",
    embedding_scale=4.0,
    query_scale=0.3,
    rope_scaling=RopeScaling(kind="linear", factor=8.0),
)
FAMILIES = {
    "llama3": dict(tied_embedding=False, rope_scaling=RopeScaling(**LLAMA3)),
    "qwen2": dict(qkv_bias=True),
    "qwen3": dict(qk_norm=True, tied_embedding=False, rope_theta=1e6),
    "mistral": dict(sliding_window=4, tied_embedding=False),
    "gemma3": GEMMA3,
}

# Compiles with few optimizations, for programs that run once or twice.
jit_once = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})

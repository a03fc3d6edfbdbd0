"""GRPO on grade-school mathematics with Qwen3-1.7B, laid out for one TPU v5e-8: 8 chips with 16 GB each, of which 15.75 GiB are usable.

All weights are trained. What a chip holds (1.72 billion parameters): weights, float32 copy and two moments, 14 bytes a parameter over 8 chips,
3.0 GB. While sampling, also the weights in bfloat16 over 2 chips, 1.7 GB (over none, as in the recipe this one is derived from, 3.4 GB, and twice that
while they are laid out for decoding), and keys and values, 112 KiB a token over 8 chips: 8.0 GB for 64 prompts of 512 tokens with 8 completions of 1,024.
"""

import pathlib

from jaxrl_reason.config import Config, load, Mesh, Update


def get_config() -> Config:
    config = load(pathlib.Path(__file__).with_name("grpo_qwen3_1_7b.py"))
    config.mesh = Mesh(fsdp=8, rollout_tensor=2)
    config.update = Update(accumulation=8)  # 8 prompts at a time, one a chip
    return config

"""GRPO with Qwen3-1.7B on GSM8K, laid out for one TPU v5e-8: 8 chips of 16 GB, of which 15.75 GiB are usable.

    python -m jaxrl_reason.plan --config=configs/grpo_qwen3_1_7b_v5e8.py --topology=v5e:2x4
    python -m jaxrl_reason.train --config=configs/grpo_qwen3_1_7b_v5e8.py --workdir=DIR

All 1.72 billion parameters are trained. Memory per chip:

* 3.0 GB: weights, float32 copy and two moments, 14 bytes per parameter, over 8 chips
* 1.7 GB while sampling: the weights in bfloat16 over 2 chips. The recipe that this one changes splits them over none: 3.4 GB,
  and twice that during the layout for decoding
* 8.0 GB while sampling: keys and values, 112 KiB per token over 8 chips, for 64 prompts of 512 tokens with 8 completions of
  1,024 tokens
"""

import pathlib

from jaxrl_reason.config import Config, load, Mesh, Update


def get_config() -> Config:
    config = load(pathlib.Path(__file__).with_name("grpo_qwen3_1_7b.py"))
    config.mesh = Mesh(fsdp=8, rollout_tensor=2)
    config.update = Update(accumulation=8)  # 8 prompts at a time, one per chip
    return config

"""GRPO with adapters (LoRA) for Qwen3-1.7B on GSM8K, for one TPU v5e-8 and 20 GB of disk, which Kaggle gives.

    python -m jaxrl_reason.plan --config=configs/grpo_qwen3_1_7b_lora_v5e8.py --topology=v5e:2x4
    python -m jaxrl_reason.train --config=configs/grpo_qwen3_1_7b_lora_v5e8.py --workdir=DIR

Memory per chip:

* 0.71 GB: weights in bfloat16 over 8 chips, adapters of 35 million float32 numbers and two moments
* 1.8 GB while sampling: weights over 2 chips
* 8.0 GB while sampling: keys and values, as in grpo_qwen3_1_7b_v5e8.py

A checkpoint has 3.9 GB. Two exist while the newer one is written. If all weights were trained, one would have 24 GB.
Compiled for the chips, the rollout needs 12.8 of 15.75 GiB per chip and the update 3.7; a step of completions of full length
takes at least 12.1 seconds. The recipe was never run.
"""

import pathlib

from jaxrl_reason.config import Checkpoint, Config, load, Lora, Optimizer


def get_config() -> Config:
    config = load(pathlib.Path(__file__).with_name("grpo_qwen3_1_7b_v5e8.py"))
    config.lora = Lora(rank=32, alpha=64.0)
    config.optimizer = Optimizer(learning_rate=2e-5, warmup_steps=5)
    config.checkpoint = Checkpoint(every=10, keep=1)
    return config

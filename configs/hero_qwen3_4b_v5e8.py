"""HERO with Qwen3-4B-Base and AceMath-7B-RM, laid out for one TPU v5e-8: 8 chips of 16 GB, of which 15.75 GiB are usable.

    python -m jaxrl_reason.plan --config=configs/hero_qwen3_4b_v5e8.py --topology=v5e:2x4
    python -m jaxrl_reason.train --config=configs/hero_qwen3_4b_v5e8.py --workdir=DIR

Adapters are trained instead of the weights. Memory per chip:

* 1.3 GB: weights, adapters and moments
* 1.8 GB: the reward model
* 2.1 GB while sampling: the weights over 4 chips
* 5.1 GB while sampling: keys and values, 144 KiB per token over 8 chips, for 16 prompts of 1,024 tokens with 8 completions of
  2,048 tokens

Training all weights would take 7.0 GB (14 bytes per parameter) and 2.0 GB for the sums of their gradients. Next to the reward
model, too little would be left for the activations of a group.

Differences from hero_qwen3_4b.py: 16 prompts per step, in one update; completions of 2,048 tokens; learning rates ten times
those for all weights. Heads are split over 4 chips, because a chip cannot hold the attention scores of a group for all heads.
"""

import pathlib

from jaxrl_reason.config import Config, load, Lora, Mesh, Optimizer, Supervised, Update


def get_config() -> Config:
    config = load(pathlib.Path(__file__).with_name("hero_qwen3_4b.py"))
    config.mesh = Mesh(fsdp=2, tensor=4)
    config.prompts_per_step = 16
    config.max_completion_length = 2048
    config.lora = Lora(rank=32, alpha=64.0)
    config.supervised = Supervised(steps=248, batch_size=16, learning_rate=1e-4)  # 4,000 solutions
    config.reward_model.max_length = 4096
    config.optimizer = Optimizer(learning_rate=1e-5)
    config.update = Update(accumulation=8)
    return config

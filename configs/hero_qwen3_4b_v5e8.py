"""HERO with Qwen3-4B-Base and AceMath-7B-RM, laid out for one TPU v5e-8: 8 chips with 16 GB each, of which 15.75 GiB are usable.

Adapters are trained in place of the weights. All weights would take 14 bytes a parameter, 7.0 GB a chip, and another 2.0 GB for the sums of their
gradients; beside the reward model's 1.8 GB that leaves too little for the activations of a group. With adapters a chip holds 1.3 GB of weights,
adapters and moments, and the reward model; while sampling, also the weights over 4 chips, 2.1 GB, and keys and values, 144 KiB a token over 8 chips:
5.1 GB for 16 prompts of 1,024 tokens with 8 completions of 2,048.

Smaller than in the paper are therefore the prompts of a step (16 for 512, in one update) and the completions (2,048 tokens, where the recipe this one is
derived from has 4,096). Learning rates are ten times those for all weights. Heads are split over 4 chips: a chip cannot hold the attention scores of a
group under all of them.
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

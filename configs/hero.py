"""HERO (arXiv 2510.07242) on sums with answers in several forms: a strict verifier and a learned reward model.

    python -m jaxrl_reason.compare --config=configs/hero.py --workdir=/tmp/hero

Takes minutes on two CPU cores. The verifier misses half of the correct answers. A held-out judge, which accepts every form,
gives `eval/accuracy`; training never uses it.
Expect HERO to be about ten points ahead of the verifier alone, with a reward model that ranks more than 90 % of the pairs.
"""

from collections.abc import Mapping

from jaxrl_reason.config import Checkpoint, Config, Data, Eval, Model, Optimizer, Reward, RewardModel, Supervised


def get_config() -> Config:
    return Config(
        steps=80,
        prompts_per_step=32,
        group_size=8,
        max_prompt_length=32,
        max_completion_length=32,
        model=Model(width=128, layers=3, heads=4, kv_heads=2, mlp_width=384, qk_norm=True),
        data=Data(train="answer_forms"),
        supervised=Supervised(steps=800, batch_size=32, learning_rate=3e-3),
        reward=Reward(functions=["strict", "reward_model", "judge"], weights=[1.0, 0.0, 0.0]),
        reward_model=RewardModel(steps=2000, batch_size=32, learning_rate=1e-3),
        method={"name": "hero", "base": "grpo", "clip_high": 0.28, "aggregation": "token_mean"},
        optimizer=Optimizer(learning_rate=2e-4, warmup_steps=5),
        checkpoint=Checkpoint(every=50, keep=2),
        eval=Eval(every=20, prompts=256, samples=4, verdict="judge"),
    )


def get_baselines() -> Mapping[str, Mapping[str, object]]:
    grpo = {"name": "grpo", "clip_high": 0.28, "aggregation": "token_mean"}
    learned = ["strict", "reward_model", "reward_model_probability", "judge"]
    return {
        "verifier only": {"method": grpo},
        "reward model only": {"method": grpo, "reward.functions": learned, "reward.weights": [0.0, 1.0, 0.0, 0.0]},
        "HERO on dr_grpo": {"method": {"name": "hero", "base": "dr_grpo", "clip_high": 0.28}},
        "weak reward model": {"reward_model.steps": 500},
        "strong reward model": {"reward_model.steps": 6000},
        "naive mix": {"method": grpo, "reward.functions": learned, "reward.weights": [0.5, 0.0, 0.5, 0.0]},
    }

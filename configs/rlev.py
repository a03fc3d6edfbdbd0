"""RLEV (arXiv 2510.20187) on exams with questions of different values, for a policy too small to learn every topic.

    python -m jaxrl_reason.compare --config=configs/rlev.py --workdir=/tmp/rlev

Takes about 25 minutes per seed on two CPU cores. Expect 5 points more of the exams' total than with correctness only, and 3 points
less accuracy: some questions have two answers, of which the one that is worth more is expected less often.
"""

from collections.abc import Mapping

from jaxrl_reason.config import Checkpoint, Config, Data, Eval, Model, Optimizer, Supervised


def get_config() -> Config:
    return Config(
        steps=160,
        prompts_per_step=32,
        group_size=8,
        max_prompt_length=32,
        max_completion_length=32,
        model=Model(width=96, layers=2, heads=4, kv_heads=2, mlp_width=256, qk_norm=True),
        data=Data(train="exam"),
        supervised=Supervised(steps=1000, batch_size=32, learning_rate=3e-3),
        method={"name": "rlev", "base": "rloo"},
        optimizer=Optimizer(learning_rate=2e-4, warmup_steps=5),
        checkpoint=Checkpoint(every=50, keep=2),
        eval=Eval(every=20, prompts=504, samples=4),
    )


def get_baselines() -> Mapping[str, Mapping[str, object]]:
    return {
        "correctness only": {"method": {"name": "rloo"}},
        "uniform scaling": {"data.values": "uniform"},
        "shuffled values": {"data.values": "shuffled"},
        "weak values": {"data.values": "levels"},
        "RLEV on GRPO": {"method": {"name": "rlev", "base": "grpo"}},
        "GRPO": {"method": {"name": "grpo"}},
        "RLEV on REINFORCE++": {"method": {"name": "rlev", "base": "reinforce_pp"}},
        "REINFORCE++": {"method": {"name": "reinforce_pp"}},
        "RLEV on REINFORCE++ baseline": {"method": {"name": "rlev", "base": "reinforce_pp_baseline"}},
        "REINFORCE++ baseline": {"method": {"name": "reinforce_pp_baseline"}},
    }

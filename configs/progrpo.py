"""ProGRPO (arXiv 2602.05281) on prompts with many correct answers, of which plain GRPO keeps few.

    python -m jaxrl_reason.compare --config=configs/progrpo.py --workdir=/tmp/progrpo

Takes about 15 minutes per seed on two CPU cores. Expect more distinct correct answers than with GRPO, and a lower accuracy.
"""

from collections.abc import Mapping

from jaxrl_reason.config import Checkpoint, Config, Data, Eval, Model, Optimizer, Reward, Supervised


def get_config() -> Config:
    return Config(
        steps=100,
        prompts_per_step=32,
        group_size=8,
        max_prompt_length=32,
        max_completion_length=24,
        model=Model(width=128, layers=3, heads=4, kv_heads=2, mlp_width=384, qk_norm=True),
        data=Data(train="many_answers"),
        supervised=Supervised(steps=600, batch_size=32, learning_rate=3e-3),
        reward=Reward(functions=["many_answers"]),
        method=_method(alpha=1.0),
        optimizer=Optimizer(learning_rate=2e-4, warmup_steps=5),
        checkpoint=Checkpoint(every=50, keep=2),
        eval=Eval(every=20, prompts=256, samples=32),
    )


def _method(name: str = "progrpo", **more: object) -> dict[str, object]:
    base = {"base": "grpo"} if name == "progrpo" else {}
    return {"name": name, **base, "clip_high": 0.28, "aggregation": "token_mean", **more}


def get_baselines() -> Mapping[str, Mapping[str, object]]:
    return {
        "GRPO": {"method": _method("grpo")},
        "alpha 0.3": {"method": _method(alpha=0.3)},
        "centered": {"method": _method(alpha=1.0, center=True)},
        "entropy bonus": {"method": _method("grpo"), "update.entropy_coefficient": 0.01},
        "MaxRL": {"method": _method("maxrl")},
        "DAPO": {"method": {"name": "dapo"}},
        "ProGRPO on DAPO": {"method": {"name": "progrpo", "base": "dapo", "alpha": 1.0}},
        "ProGRPO on DAPO, alpha 0.3": {"method": {"name": "progrpo", "base": "dapo"}},
    }

"""ProGRPO (arXiv 2602.05281) from a policy that is seldom right, so that RL wins many prompts late and loses others.

    python -m jaxrl_reason.compare --config=configs/progrpo_weak_start.py --workdir=/tmp/progrpo_weak_start

It is progrpo.py with a fifth of the supervised steps, twice the steps of RL, and the library's alpha, 0.3. Takes about 10
minutes per seed on two CPU cores. Expect an accuracy near GRPO's, more entropy and more distinct correct answers.
"""

from collections.abc import Mapping

from jaxrl_reason.config import Checkpoint, Config, Data, Eval, Model, Optimizer, Reward, Supervised


def get_config() -> Config:
    return Config(
        steps=200,
        prompts_per_step=32,
        group_size=8,
        max_prompt_length=32,
        max_completion_length=24,
        model=Model(width=128, layers=3, heads=4, kv_heads=2, mlp_width=384, qk_norm=True),
        data=Data(train="many_answers"),
        supervised=Supervised(steps=120, batch_size=32, learning_rate=3e-3),
        reward=Reward(functions=["many_answers"]),
        method=_method("progrpo", base="grpo", alpha=0.3),
        optimizer=Optimizer(learning_rate=2e-4, warmup_steps=5),
        checkpoint=Checkpoint(every=100, keep=1),
        eval=Eval(every=50, prompts=256, samples=32),
    )


def _method(name: str, **more: object) -> dict[str, object]:
    return {"name": name, "clip_high": 0.28, "aggregation": "token_mean", **more}


def get_baselines() -> Mapping[str, Mapping[str, object]]:
    return {
        "GRPO": {"method": _method("grpo")},
        "MaxRL": {"method": _method("maxrl")},
        "ProGRPO on MaxRL": {"method": _method("progrpo", base="maxrl", alpha=0.3)},
    }

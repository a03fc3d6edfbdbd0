"""ProGRPO (arXiv 2602.05281) with eight updates per rollout.

    python -m jaxrl_reason.compare --config=configs/progrpo_off_policy.py --workdir=/tmp/progrpo_off_policy

It is progrpo.py with two passes over each rollout in four minibatches, and the library's alpha, 0.3. Takes about 5 minutes
per seed on two CPU cores. Expect an accuracy and a pass@32 near GRPO's, more entropy and more distinct correct answers.
"""

from collections.abc import Mapping

from jaxrl_reason.config import Checkpoint, Config, Data, Eval, Model, Optimizer, Reward, Supervised, Update


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
        method=_method("progrpo", base="grpo", alpha=0.3),
        optimizer=Optimizer(learning_rate=2e-4, warmup_steps=5),
        update=Update(epochs=2, minibatches=4),
        checkpoint=Checkpoint(every=50, keep=2),
        eval=Eval(every=20, prompts=256, samples=32),
    )


def _method(name: str, **more: object) -> dict[str, object]:
    return {"name": name, "clip_high": 0.28, "aggregation": "token_mean", **more}


def get_baselines() -> Mapping[str, Mapping[str, object]]:
    return {"GRPO": {"method": _method("grpo")}}

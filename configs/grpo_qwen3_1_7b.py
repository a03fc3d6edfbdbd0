"""GRPO with Qwen3-1.7B on GSM8K, for 8 TPU chips; grpo_qwen3_1_7b_v5e8.py has their layout.

    python -m jaxrl_reason.train --config=configs/grpo_qwen3_1_7b.py --workdir=DIR

Needs the internet once, for the model and the data. Thinking is off, so completions are short. Both clip ratios and the
token-mean loss are from DAPO (arXiv 2503.14476). It was never run to the end.

Data: GSM8K by the builder of TFDS, which names the columns question and answer; a test runs this builder on local files.
"""

from jaxrl_reason.config import Checkpoint, Config, Data, Eval, Model, Optimizer, Reward, Update


def get_config() -> Config:
    return Config(
        steps=200,
        prompts_per_step=64,
        group_size=8,
        max_prompt_length=512,
        max_completion_length=1024,
        model=Model(path="Qwen/Qwen3-1.7B", param_dtype="bfloat16", compute_dtype="bfloat16"),
        data=Data(train="gsm8k", template="boxed", chat=True, chat_options={"enable_thinking": False}),
        reward=Reward(functions=["accuracy"]),
        method={"name": "grpo", "clip_high": 0.28, "aggregation": "token_mean"},
        optimizer=Optimizer(learning_rate=1e-6, warmup_steps=5, float32_master=True),
        update=Update(accumulation=8),
        checkpoint=Checkpoint(every=50, keep=2),
        eval=Eval(every=25, prompts=512, samples=1),
    )

"""GRPO on grade-school mathematics with Qwen3-1.7B, for a TPU v5e-8: needs the internet once, for the model and GSM8K.

Without thinking turned on, so that completions are short; both clip ratios and the token-mean loss are DAPO's (arXiv 2503.14476).
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

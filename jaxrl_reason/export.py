"""Writes a trained policy, or the reward model of its run, as a directory that other programs load.

The directory holds config.json, safetensors, the tokenizer's files and generation_config.json, which `transformers`,
vLLM and llama.cpp's converter read. Adapters (config.lora) are merged into the weights.
"""

from collections.abc import Callable
import dataclasses
import functools
import pathlib
import sys
from typing import Any

import jax
import rich.console

from jaxrl_reason import config as config_lib
from jaxrl_reason import data, models, runs
from jaxrl_reason.config import ConfigError
from jaxrl_reason.models import sharding
from jaxrl_reason.rewards import model_files
from jaxrl_reason.runs import command
from jaxrl_reason.runs.workdir import model_source, tokenizer_of


def load_policy(workdir: pathlib.Path, checkpoint: int | None = None) -> tuple[int, models.Policy]:
    """Reads a run's policy, on the host, with any adapters. Returns the checkpoint's number, and the policy.

    None chooses the newest checkpoint that can be read. Raises ConfigError, ValueError or OSError for a run that cannot
    be read, or predicts numbers.
    """
    config = runs.load_config(workdir, {})
    if config.regression.tokenizer:
        raise ConfigError(
            f"The run in {workdir} predicts numbers in a vocabulary of its own, which a tokenizer.json cannot describe; only policies "
            "that write text can be exported."
        )
    tokenizer, source = tokenizer_of(workdir), model_source(workdir)
    model = config_lib.model_config(config, tokenizer.vocab_size, source)
    # The host has room for models that do not fit on one accelerator.
    host = jax.sharding.SingleDeviceSharding(jax.local_devices(backend="cpu")[0])
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=host), models.abstract_params(model))
    number, params = runs.load_weights(workdir, checkpoint, like, model)
    if source is None:
        source = {"max_position_embeddings": config.max_prompt_length + config.max_completion_length}
    return number, models.Policy(model, params, tokenizer, source, models.tokenizer_files(workdir / "tokenizer"))


def load_reward_model(workdir: pathlib.Path) -> models.RewardModel:
    """Reads a run's reward model, on the host. Raises ConfigError, ValueError or OSError without one to read."""
    runs.load_config(workdir, {})
    directory = workdir / "reward_model"
    if not model_files.is_ours(directory):
        raise ConfigError(f"The run in {workdir} has trained no reward model.")
    tokenizer = data.load_tokenizer(directory / "tokenizer")
    host = sharding.make_mesh(1, 1, 1, devices=jax.local_devices(backend="cpu")[:1])
    digest = model_files.tokenizer_digest(tokenizer)
    model, params = model_files.load_reward_model(directory, digest, mesh=host)
    return models.RewardModel(model, params, tokenizer, {}, models.tokenizer_files(directory / "tokenizer"))


def check_adapters(workdir: pathlib.Path) -> str:
    """Returns the pretrained model of a run's adapters; raises ConfigError without adapters that PEFT can put on it."""
    config, run = runs.load_config(workdir, {}), f"The run in {workdir}"
    base = config.model.path
    if base.endswith(".gguf"):
        raise ConfigError(f"{run} began with {base}, which PEFT cannot put adapters on: leave out --adapters.")
    if not config.lora.rank:
        raise ConfigError(f"{run} trained all weights (config.lora.rank is 0): leave out --adapters.")
    if not base:
        raise ConfigError(f"{run} began with random weights, which its adapters need and the export lacks.")
    return base


def in_dtype(policy: models.Policy, dtype: str | None) -> models.Policy:
    """Returns the policy or reward model with weights of a dtype; None leaves them as they are."""
    if not dtype:
        return policy
    params = jax.tree.map(lambda x: x.astype(dtype), policy.params)
    return dataclasses.replace(policy, config=dataclasses.replace(policy.config, param_dtype=dtype), params=params)


DTYPES = ("float32", "bfloat16")
COMMAND = command.Command(
    "export",
    __doc__,
    (
        command.WORKDIR,
        command.Flag("out", "DIR", "the directory to write; must not exist, or be empty", command.path, required=True),
        command.CHECKPOINT,
        command.Flag("reward-model", "", "writes the reward model that the run trained, as a sequence classifier"),
        command.Flag("adapters", "", "writes a PEFT directory: the adapters alone, for the model of config.model.path"),
        command.Flag("dtype", "DTYPE", "the dtype of the weights; as trained by default", choices=DTYPES),
        command.RECIPE,
    ),
    "--workdir=/tmp/sums --out=/tmp/sums_model",
)


def prepare(arguments: command.Arguments) -> tuple[str, pathlib.Path, Callable[[], Any]]:
    """Reads the policy or the reward model. Returns its name, the directory to write, and a function that writes it.

    Raises ConfigError, PretrainedError, ValueError or OSError for contradicting flags or an unreadable run.
    """
    workdir, out, dtype = arguments.workdir, arguments.out, arguments.dtype
    if arguments.reward_model and (arguments.adapters or arguments.checkpoint is not None):
        raise ConfigError(
            "--reward-model writes the trained reward model, which has neither checkpoints to choose from nor adapters."
        )
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"--out={out} is there already and not empty; choose another directory.")
    command.load_recipe(arguments)
    if arguments.reward_model:
        judge = in_dtype(load_reward_model(workdir), dtype)
        return "The reward model", out, functools.partial(models.save_pretrained, out, judge)
    if arguments.adapters:
        if dtype:
            raise ConfigError("--dtype is for merged weights; adapters are written as they were trained, in float32.")
        base = check_adapters(workdir)
        number, policy = load_policy(workdir, arguments.checkpoint)
        return f"Checkpoint {number}", out, functools.partial(models.save_adapters, out, policy, base)
    number, policy = load_policy(workdir, arguments.checkpoint)
    config, params = models.lora.merge(policy.config, policy.params)
    policy = in_dtype(dataclasses.replace(policy, config=config, params=params), dtype)
    return f"Checkpoint {number}", out, functools.partial(models.save_pretrained, out, policy)


def write(name: str, out: pathlib.Path, save: Callable[[], Any]) -> None:
    """Writes the model and prints its place. Arguments: see `prepare`."""
    save()
    rich.console.Console(highlight=False, markup=False).print(f"{name} is in {out}.", soft_wrap=True)


def main(argv: list[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    return command.run(COMMAND, argv, prepare, lambda prepared: write(*prepared))


if __name__ == "__main__":
    sys.exit(main())

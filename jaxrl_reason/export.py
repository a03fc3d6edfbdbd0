"""Writes a trained policy, or the reward model of its run, as a directory that other programs load.

The directory holds config.json, safetensors, the tokenizer's files and generation_config.json, which `transformers`,
vLLM and llama.cpp's converter read. Adapters (config.lora) are merged into the weights. README.md is a model card with
the recipe, the held-out metrics and the versions. --push uploads the directory to the Hugging Face hub.
"""

from collections.abc import Callable
import contextlib
import dataclasses
import json
import pathlib
import sys
import tempfile
from typing import Any, NamedTuple, TypeVar

import jax
import rich.console

from jaxrl_reason import config as config_lib
from jaxrl_reason import data, models, runs
from jaxrl_reason.config import ConfigError
from jaxrl_reason.data import hub
from jaxrl_reason.models import sharding
from jaxrl_reason.models.formats.source import TEXTS
from jaxrl_reason.rewards import learned, model_files
from jaxrl_reason.rl import hosts
from jaxrl_reason.runs import command
from jaxrl_reason.runs.workdir import model_source, tokenizer_of
from jaxrl_reason.tasks.model_card import Exported, model_card

Model = TypeVar("Model", bound=models.Policy)


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
    policy = models.Policy(model, params, tokenizer, source, models.tokenizer_files(workdir / "tokenizer"))
    return number, _with_bos(policy, config)


def load_reward_model(workdir: pathlib.Path) -> models.RewardModel:
    """Reads a run's reward model, on the host. Raises ConfigError, ValueError or OSError without one to read."""
    config = runs.load_config(workdir, {})
    directory = workdir / "reward_model"
    if not model_files.is_ours(directory):
        raise ConfigError(f"The run in {workdir} has trained no reward model.")
    tokenizer = data.load_tokenizer(directory / "tokenizer")
    host = sharding.make_mesh(1, 1, 1, devices=jax.local_devices(backend="cpu")[:1])
    digest = model_files.tokenizer_digest(tokenizer)
    model, params = model_files.load_reward_model(directory, digest, mesh=host)
    length = config.max_prompt_length + config.max_completion_length
    source = {"max_position_embeddings": length, TEXTS: learned.training_texts(config, tokenizer)}
    files = models.tokenizer_files(directory / "tokenizer")
    return _with_bos(models.RewardModel(model, params, tokenizer, source, files), config)


def _with_bos(model: Model, config: config_lib.Config) -> Model:
    """Returns the model with a tokenizer that begins plain prompts with the begin token, if config.data.add_bos asked for it."""
    tokenizer, name = model.tokenizer, "tokenizer_config.json"
    if tokenizer is None or tokenizer.adds_bos or not config.data.add_bos:
        return model
    content = json.loads(model.files.get(name, b"{}")) | {"add_bos_token": True}
    files = {**model.files, name: (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()}
    return dataclasses.replace(model, tokenizer=dataclasses.replace(tokenizer, adds_bos=True), files=files)


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
        command.Flag("out", "DIR", "the directory to write; must not exist, or be empty", command.path),
        command.Flag(
            "push",
            "OWNER/NAME",
            "uploads to this model of the hub, which is made private; --out is optional then",
            command.nonempty,
        ),
        command.Flag("public", "", "makes a new model of --push public"),
        command.CHECKPOINT,
        command.Flag("reward-model", "", "writes the reward model that the run trained, as a sequence classifier"),
        command.Flag("adapters", "", "writes a PEFT directory: the adapters alone, for the model of config.model.path"),
        command.Flag("dtype", "DTYPE", "the dtype of the weights; as trained by default", choices=DTYPES),
        command.RECIPE,
    ),
    "--workdir=/tmp/sums --out=/tmp/sums_model",
    errors=(hub.HubError,),
)


class Export(NamedTuple):
    """A model to write."""

    name: str  # in messages
    save: Callable[[pathlib.Path], Any]  # writes it to a directory
    out: pathlib.Path | None  # None: a directory that is removed after the upload
    upload: hub.Upload | None


def prepare(arguments: command.Arguments) -> Export:
    """Reads the policy or the reward model.

    Raises ConfigError, PretrainedError, HubError, ValueError or OSError for contradicting flags, an unreadable run, or a
    repository that cannot be written.
    """
    out, push = arguments.out, arguments.push
    _check_flags(arguments)
    command.load_recipe(arguments)
    config = runs.load_config(arguments.workdir, {})
    hosts.initialize(config.mesh.host_timeout, config.mesh.initialization_timeout, saves=False)

    def check_targets() -> None:
        if not hosts.is_first():
            return
        if out and out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise ConfigError(f"--out={out} is there already and not empty; choose another directory.")
        if push:
            hub.check_upload(push)

    hosts.agree(check_targets, ConfigError, hub.HubError)
    name, save = _read(arguments, config, push.rpartition("/")[2] if push else out.name)
    # After the model is read: a run that cannot be read makes no repository.
    made = lambda: hub.open_upload(push, private=not arguments.public) if push and hosts.is_first() else None
    return Export(name, save, out, hosts.agree(made, hub.HubError))


def _check_flags(arguments: command.Arguments) -> None:
    """Raises ConfigError for flags that contradict each other."""
    if not (arguments.out or arguments.push):
        raise ConfigError("--out=DIR is missing: the directory to write; or give --push=OWNER/NAME.")
    if arguments.public and not arguments.push:
        raise ConfigError("--public is for --push=OWNER/NAME; leave it out.")
    if arguments.reward_model and (arguments.adapters or arguments.checkpoint is not None):
        raise ConfigError(
            "--reward-model writes the trained reward model, which has neither checkpoints to choose from nor adapters."
        )
    if arguments.adapters and arguments.dtype:
        raise ConfigError("--dtype is for merged weights; adapters are written as they were trained, in float32.")


def _read(
    arguments: command.Arguments, config: config_lib.Config, title: str
) -> tuple[str, Callable[[pathlib.Path], Any]]:
    """Reads the model with its card. Returns its name in messages, and a function that writes it to a directory."""
    workdir, dtype = arguments.workdir, arguments.dtype

    def with_card(model: models.Policy, checkpoint: int | None) -> models.Policy:
        card = model_card(Exported(title, workdir, config, checkpoint, arguments.adapters))
        return dataclasses.replace(model, files={**model.files, "README.md": card.encode()})

    if arguments.reward_model:
        judge = in_dtype(with_card(load_reward_model(workdir), None), dtype)
        return "The reward model", lambda out: models.save_pretrained(out, judge)
    base = check_adapters(workdir) if arguments.adapters else ""
    number, policy = load_policy(workdir, arguments.checkpoint)
    policy = with_card(policy, number)
    if base:
        return f"Checkpoint {number}", lambda out: models.save_adapters(out, policy, base)
    merged, params = models.lora.merge(policy.config, policy.params, dtype)
    whole = in_dtype(dataclasses.replace(policy, config=merged, params=params), dtype)
    return f"Checkpoint {number}", lambda out: models.save_pretrained(out, whole)


def write(export: Export) -> None:
    """Writes the model, uploads it and prints its places. Raises HubError if the upload fails."""
    if hosts.is_first():
        console = rich.console.Console(highlight=False, markup=False, emoji=False)
        with contextlib.ExitStack() as stack:
            out = export.out or pathlib.Path(stack.enter_context(tempfile.TemporaryDirectory())) / "model"
            export.save(out)
            if export.out:
                console.print(f"{export.name} is in {out}.", soft_wrap=True)
            if export.upload:
                address = hub.upload(export.upload, out, f"{export.name}, exported by jaxrl_reason")
                console.print(f"{export.name} is at {address}.", soft_wrap=True)


def main(argv: list[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    return command.run(COMMAND, argv, prepare, write)


if __name__ == "__main__":
    sys.exit(main())

"""Opens the task of a configuration: for training, or for evaluation with held-out data only."""

import pathlib

import jax

from jaxrl_reason import runs
from jaxrl_reason.config import Config, ConfigError, remote
from jaxrl_reason.methods import Method
from jaxrl_reason.models import sharding
from jaxrl_reason.tasks import text
from jaxrl_reason.tasks.policies import OpenedPolicy
from jaxrl_reason.tasks.regression import opening as numbers
from jaxrl_reason.tasks.task import Task, TrainingTask


def open_task(config: Config, method: Method, mesh: jax.sharding.Mesh, workdir: str | pathlib.Path) -> TrainingTask:
    """Opens a task for training: reads and checks the data, and writes nothing.

    The devices of `mesh` share the prompts of a batch. The work directory need not exist. Raises ConfigError,
    RewardError, ValueError or OSError if the run cannot begin; the message names the cause and its place.
    """
    if elsewhere := remote(str(workdir)):
        raise ConfigError(f"The work directory is {str(workdir)!r}, and must be on this machine: {elsewhere}.")
    sharding.check_batch(mesh, "config.prompts_per_step", config.prompts_per_step)
    if config.supervised.steps:
        sharding.check_batch(mesh, "config.supervised.batch_size", config.supervised.batch_size)
    _check_start(config)
    if config.regression.tokenizer:
        return numbers.open_for_training(config, method, mesh, workdir)
    return text.open_for_training(config, method, mesh, workdir)


def open_for_evaluation(policy: OpenedPolicy, config: Config, directory: pathlib.Path) -> Task:
    """Opens the held-out data of `config` for a policy, and the rewards, whose prints go to `directory`.

    `config` is that of the policy, perhaps with other data and other fields of the evaluation. Errors: see `open_task`.
    """
    if policy.numbers is not None:
        return policy.numbers
    return text.open_for_evaluation(config, policy.method, policy.mesh, policy.tokenizer, policy.model, directory)


def _check_start(config: Config) -> None:
    """Raises ConfigError if config.supervised.start_from has no start, or adapters of other weights."""
    if not config.supervised.start_from:
        return
    start = pathlib.Path(config.supervised.start_from).expanduser()
    if not (start / "start").is_dir():
        raise ConfigError(
            f"config.supervised.start_from is {config.supervised.start_from!r}, which has no folder start/. Name the work directory of "
            "a run that was made with config.checkpoint.keep_start."
        )
    if not config.lora.rank:
        return
    theirs = runs.load_config(start, {})
    fields = ("model", "lora") if config.model.path else ("model", "lora", "seed")
    other = [name for name in fields if getattr(config, name) != getattr(theirs, name)]
    if other:
        raise ConfigError(
            f"config.supervised.start_from is {str(start)!r}, a run with another config.{other[0]}. Its adapters belong to other weights; "
            "name a run with the same model."
        )

"""Reads the configuration and the weights that a run saved, for the commands that follow training."""

from collections.abc import Mapping
import json
import logging
import pathlib

from jaxrl_reason import config as config_lib
from jaxrl_reason import models
from jaxrl_reason.config import Config, ConfigError
from jaxrl_reason.runs import checkpoints

_log = logging.getLogger(__name__)


def load_config(workdir: pathlib.Path, fields: Mapping[str, str]) -> Config:
    """Returns the configuration that the run in `workdir` began with, checked, with other values for some fields.

    `fields` maps the name of a field to the text of its new value. Raises ConfigError if there is no run in this directory, or if the
    configuration cannot run.
    """
    file = workdir / "config.json"
    if not file.is_file():
        missing = "it holds no config.json" if workdir.is_dir() else "there is no such directory"
        raise ConfigError(f"{workdir} is not the work directory of a run: {missing}.")
    try:
        config = config_lib.from_dict(json.loads(file.read_bytes())["config"])
    except ConfigError:
        raise
    except (ValueError, TypeError, KeyError) as e:
        raise ConfigError(f"{file} is damaged ({type(e).__name__}: {e}); restore it.") from e
    for name, text in fields.items():
        config_lib.override(config, name, text)
    if "data.eval" in fields and "data.eval_split" not in fields:
        config.data.eval_split = "all" if config.data.eval.endswith((".jsonl", ".parquet", ".csv")) else "test"
    if config.eval.temperature == 0 and "eval.samples" not in fields:
        config.eval.samples = 1  # greedy completions are all alike
    config_lib.validate(config)
    return config


def checkpoint_numbers(workdir: pathlib.Path) -> list[int]:
    """Returns the numbers of the complete checkpoints of a run, newest first."""
    return numbers_in(workdir / "checkpoints")


def numbers_in(directory: pathlib.Path) -> list[int]:
    """Returns the file names in a directory that are numbers, largest first; none if the directory does not exist."""
    names = [path.name for path in directory.iterdir()] if directory.is_dir() else []
    return sorted((int(name) for name in names if name.isascii() and name.isdigit()), reverse=True)


def load_weights(
    workdir: pathlib.Path, number: int | None, like: models.Params, model: models.ModelConfig
) -> tuple[int, models.Params]:
    """Reads the policy's weights from a checkpoint, without the optimizer's state; changes nothing in the directory.

    Args:
      workdir: the work directory of the run.
      number: the number of the checkpoint; None for the newest that can be read.
      like: ShapeDtypeStructs of the weights of the decoder `model`, with shardings.

    Returns:
      The number of the checkpoint, and the weights.

    Raises:
      ConfigError: there is no such checkpoint, it cannot be read, or its weights have other shapes.
    """
    numbers = checkpoint_numbers(workdir)
    if not numbers:
        raise ConfigError(f"The run in {workdir} has no checkpoint yet; train it first.")
    if number is not None and number not in numbers:
        raise ConfigError(f"The run in {workdir} has no checkpoint {number}; it has {', '.join(map(str, numbers))}.")
    directory = workdir / "checkpoints"
    trained, frozen = models.lora.split(model, like)
    wanted = {"trained": trained} | ({"frozen": frozen} if frozen else {})
    found, parts, faults = checkpoints.read_newest(directory, numbers if number is None else [number], wanted)
    messages = [f"Checkpoint {directory / str(bad)} cannot be read: {fault}" for bad, fault in faults.items()]
    if found is None:
        raise ConfigError(messages[0])
    for message in messages:
        _log.warning("%s", message)
    return found, models.lora.join(parts["trained"], parts.get("frozen", {}))

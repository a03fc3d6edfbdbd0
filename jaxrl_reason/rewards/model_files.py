"""A trained reward model on disk, DIR/reward_model/{params, reward_model.json}, and the source of a pretrained one."""

from collections.abc import Mapping
import dataclasses
import hashlib
import json
import pathlib
from typing import Any

import jax

from jaxrl_reason import data, models
from jaxrl_reason.models import reward_model, sharding
from jaxrl_reason.runs import checkpoints
from jaxrl_reason.runs.files import write_json

DESCRIPTION = "reward_model.json"  # written last: if it exists, the weights are complete
SOURCE = "source.json"  # path and config.json, with its commit, of a pretrained reward model


def tokenizer_digest(tokenizer: data.Tokenizer) -> str:
    """Returns the SHA-256 of everything that decides which ids a text gets, and which ids begin and end it. Saving and loading keep it."""
    content = [tokenizer.backend.to_str(), tokenizer.eos_ids, tokenizer.bos_id]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def is_ours(directory: str | pathlib.Path) -> bool:
    """Returns whether the directory holds a reward model that was trained here."""
    return (pathlib.Path(directory).expanduser() / DESCRIPTION).is_file()


def write_description(
    directory: pathlib.Path, model: models.ModelConfig, digest: str, facts: Mapping[str, Any]
) -> None:
    """Writes reward_model.json: the decoder, the tokenizer's digest, and facts about the training and held-out pairs."""
    content = {"model": dataclasses.asdict(model), "tokenizer_digest": digest} | dict(facts)
    write_json(directory / DESCRIPTION, content)


def described(directory: str | pathlib.Path, digest: str | None = None) -> models.ModelConfig:
    """Returns the decoder of the trained reward model in a directory.

    `digest` is of the tokenizer whose ids are to be scored; None: not checked. Raises FileNotFoundError if there is no
    reward model, ValueError if it was trained with another tokenizer or its description cannot be read.
    """
    directory = pathlib.Path(directory).expanduser()
    file = directory / DESCRIPTION
    if not file.is_file():
        raise FileNotFoundError(
            f"There is no trained reward model in {directory}: it has no {DESCRIPTION}. Give the reward_model folder of a work directory in "
            "which python -m jaxrl_reason.reward_training has ended."
        )
    try:
        content = json.loads(file.read_text())
        trained_with, sizes = str(content["tokenizer_digest"]), content["model"]
        scaling = sizes["rope_scaling"] and models.RopeScaling(**sizes["rope_scaling"])
        config = models.ModelConfig(**{**sizes, "rope_scaling": scaling})
    except (ValueError, KeyError, TypeError) as e:
        raise ValueError(f"{file} does not describe a reward model: {type(e).__name__}: {e}.") from e
    if digest not in (None, trained_with):
        raise ValueError(
            f"The reward model in {directory} was trained with another tokenizer (digest {trained_with[:12]} instead of {digest[:12]}), whose ids "
            f"mean other texts. Set config.data.tokenizer to {directory / 'tokenizer'}, or train a reward model with this tokenizer."
        )
    return config


def load_reward_model(
    directory: str | pathlib.Path, digest: str, *, mesh: jax.sharding.Mesh | None = None
) -> tuple[models.ModelConfig, models.Params]:
    """Loads a reward model that was trained here onto the mesh; None: onto the first device.

    Raises FileNotFoundError or ValueError as `described`, and CheckpointError if the weights cannot be read.
    """
    directory = pathlib.Path(directory).expanduser()
    config = described(directory, digest)
    mesh = sharding.make_mesh(1, 1, 1, devices=jax.devices()[:1]) if mesh is None else mesh
    place = lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s)
    like = jax.tree.map(place, reward_model.abstract_params(config), reward_model.param_shardings(config, mesh))
    return config, checkpoints.load_params(directory / "params", like)

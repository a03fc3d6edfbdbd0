"""Model directories that `transformers` wrote (tests/golden) with its outputs, and changes to copies of them."""

import json
import pathlib

import numpy as np
import safetensors.numpy

from jaxrl_reason import models

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
NAMES = ("llama", "qwen2", "qwen2_tied", "qwen3", "mistral", "gemma3", "qwen2_reward")
POLICIES = NAMES[:-1]


def load(name, **options):
    loader = models.load_reward_model if name == "qwen2_reward" else models.load_pretrained
    return loader(GOLDEN / name, **options)


def expected(name):
    return np.load(GOLDEN / name / "expected.npz")


def change_json(path, **changes):
    content = json.loads(path.read_text())
    for key, value in changes.items():
        if value is None:
            content.pop(key)
        else:
            content[key] = value
    path.write_text(json.dumps(content))


def change_tensors(directory, change):
    tensors = safetensors.numpy.load_file(directory / "model.safetensors")
    change(tensors)
    safetensors.numpy.save_file(tensors, directory / "model.safetensors")


class Bomb:
    """An object whose pickle makes the file `exploded` as soon as it is read."""

    def __reduce__(self):
        return pathlib.Path.touch, (pathlib.Path("exploded"),)

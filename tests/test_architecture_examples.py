"""The signal and the auxiliary loss of ARCHITECTURE.md work in a copy of the package, added in two files each."""

import json
import os
import re
import shutil
import subprocess
import sys

import pytest

from helpers.documents import blocks, ROOT

USE = """
import functools, json
import jax, jax.numpy as jnp, numpy as np, optax
from jaxrl_reason import models
from jaxrl_reason.advantages import center_by_group, chain
from jaxrl_reason.methods import Method, PolicyLoss
from jaxrl_reason.rl.auxiliary import Square
from jaxrl_reason.rl.experience import make_experience
from jaxrl_reason.rl.learner import make_update, UpdateOptions
from jaxrl_reason.rl.types import Groups, Rollout, TrainState

P, G, S, T, V = 2, 2, 3, 4, 7
config = models.ModelConfig(vocab_size=V, width=8, layers=1, heads=2, kv_heads=2, mlp_width=8)
params = jax.jit(functools.partial(models.init_params, config))(jax.random.key(0))
rng = np.random.default_rng(0)
lengths = np.array([[1, 4], [2, 3]])
mask = np.arange(T) < lengths[..., None]
prompts, tokens = rng.integers(0, V, (P, S)), rng.integers(0, V, (P, G, T))

# By hand: log-probabilities of one plain forward over whole rows.
rows = np.concatenate([np.repeat(prompts[:, None], G, axis=1), tokens], axis=2).reshape(P * G, S + T)
logits = np.asarray(jax.jit(functools.partial(models.apply, config))(params, rows), np.float64)[:, S - 1 : -1]
logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
logprobs = np.take_along_axis(logprobs, rows[:, S:, None], axis=-1)[..., 0].reshape(P, G, T)
square = (logprobs**2 * mask).sum() / mask.sum()
rewards = np.array([[1.0, 0.0], [0.0, 1.0]])
policy = -((rewards - 0.5) * lengths).sum() / mask.sum()  # the ratio is 1

sampled = np.where(mask, logprobs, 0.0).astype(np.float32)
rollout = Rollout(prompts, np.ones((P, S), bool), tokens, mask, sampled, np.zeros((P, G), bool))
loss = PolicyLoss(auxiliary=(Square(coefficient=0.5),))
method = Method(chain(center_by_group()), loss, signals={"lengths"})
experience = functools.partial(make_experience, method=method, weights={"r": 1.0}, verdict="r", mask_truncated=False)
prepared = jax.jit(experience)(Groups(rollout, {"r": rewards.astype(np.float32)}), method.advantage.init())
optimizer, zero = optax.sgd(0.1), np.int32(0)
state = TrainState(zero, params, {}, optimizer.init(params), prepared.advantage_state, zero)
update = jax.jit(make_update(config, UpdateOptions(loss=loss, accumulation=2), optimizer))
result = update(state, prepared.experience, np.float32(1.0), jax.random.key(0))
metrics = {k: float(v) for k, v in (prepared.metrics | result.metrics).items()}
print(json.dumps({"metrics": metrics, "square": square, "loss": policy + 0.5 * square}))
"""


def add_to_package(package):
    """Adds both examples to a copy of the package, as ARCHITECTURE.md describes."""
    text = (ROOT / "ARCHITECTURE.md").read_text()
    python = [block.text for block in blocks("ARCHITECTURE.md") if block.language == "python"]
    [signal] = [block for block in python if "SIGNALS[" in block]
    [loss] = [block for block in python if "AUXILIARY[" in block]
    file, field = re.search(r"1\. `(.*)`: a field of `AdvantageInputs`, `(.*)`\.", text).groups()
    types = (package / file).read_text()
    assert types.count("    kl: Float") == 1
    (package / file).write_text(re.sub(r"    kl: Float.*\n", rf"\g<0>    {field}\n", types))
    for name, block in {"rl/signals.py": signal, "rl/auxiliary.py": loss}.items():
        assert f"2. `{name}`: an entry of" in text
        (package / name).write_text(
            (package / name).read_text()
            + "\n\n"
            + re.sub(r"from jaxrl_reason\.rl\.(signals|auxiliary) .*\n", "", block)
        )


def test_a_signal_and_an_auxiliary_loss_in_two_files_each(tmp_path):
    shutil.copytree(ROOT / "jaxrl_reason", tmp_path / "jaxrl_reason", ignore=shutil.ignore_patterns("__pycache__"))
    add_to_package(tmp_path / "jaxrl_reason")
    environment = os.environ | {
        "PYTHONPATH": str(tmp_path),
        "JAX_PLATFORMS": "cpu",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    }
    done = subprocess.run([sys.executable, "-c", USE], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    assert found["metrics"]["lengths/mean"] == (1 + 4 + 2 + 3) / 4
    assert found["metrics"]["square/loss"] == pytest.approx(found["square"], rel=1e-5)
    assert found["metrics"]["loss"] == pytest.approx(found["loss"], rel=1e-5)

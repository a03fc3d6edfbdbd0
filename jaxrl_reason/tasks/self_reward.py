"""LaSeR's self-reward in a task: the probe token, the constant, and the rewards of a rollout (arXiv 2510.14943)."""

from collections.abc import Callable
import json
import pathlib
from typing import Any

import jax
import numpy as np

from jaxrl_reason import data, models
from jaxrl_reason.config import ConfigError
from jaxrl_reason.methods import Method
from jaxrl_reason.models import sharding
from jaxrl_reason.rl import hosts
from jaxrl_reason.rl.programs import Programs
from jaxrl_reason.rl.types import Rollout, TrainState
from jaxrl_reason.runs.files import write_json
from jaxrl_reason.runs.workdir import Workdir

Weights = Callable[[], models.Params]  # the policy's weights as rollouts read them
BATCHES = 4  # prompt batches over whose completions the constant is averaged


def probe_token(method: Method, tokenizer: data.Tokenizer) -> int | None:
    """Returns the id of the token whose log-probability after the end token is the self-reward; None without one.

    The padding token of the tokenizer is the default. Raises ConfigError for a configured text that is not one token,
    and for a padding token that is an end token.
    """
    settings = method.loss.find("self_reward")
    if not settings:
        return None
    if text := settings.token:
        ids = tokenizer.encode(text)
        if len(ids) != 1:
            raise ConfigError(
                f"config.method.token is {text!r}, which this tokenizer encodes as {len(ids)} tokens; name an unused text that is a "
                "single token."
            )
        return ids[0]
    if tokenizer.pad_id in tokenizer.eos_ids:
        raise ConfigError(
            "LaSeR needs an unused token, and the padding token of this tokenizer is also an end token; name another token in "
            "config.method.token."
        )
    return tokenizer.pad_id


def self_reward_of(method: Method, c_ref: float | jax.Array | None) -> Callable[[Rollout], np.ndarray] | None:
    """Returns rollout -> self-rewards f32[P, G], NaN if truncated; None without LaSeR's constant or a self-reward."""
    settings = method.loss.find("self_reward")
    if c_ref is None or not settings:
        return None
    beta, offset = settings.beta, float(c_ref)

    def self_rewards(rollout: Rollout) -> np.ndarray:
        assert rollout.probe_logprobs is not None  # the method has a probe token
        probe = hosts.to_host(rollout.probe_logprobs)
        return np.where(hosts.to_host(rollout.truncated), np.nan, beta * (probe - offset))

    return self_rewards


def read_constant(workdir: pathlib.Path) -> float | None:
    """Returns a run's LaSeR constant; None before it is measured. Raises ConfigError for a damaged self_reward.json."""
    file = workdir / "self_reward.json"
    try:
        return float(json.loads(file.read_bytes())["c_ref"]) if file.exists() else None
    except (ValueError, TypeError, KeyError) as e:
        raise ConfigError(f"{file} is damaged ({type(e).__name__}: {e}); restore it.") from e


def constant(
    method: Method, programs: Programs, prompts: Any, work: Workdir, state: TrainState, weights: Weights
) -> jax.Array | None:
    """Returns c_ref, f32 scalar, measured at step 0 and kept in self_reward.json; None without a self-reward.

    Evaluation uses it even if training scores every completion under the reference policy (reference "exact").
    `prompts` gives batches of training prompts by number. Raises ConfigError when no completion ended.
    """
    if not method.loss.find("self_reward"):
        return None
    file = work.path / "self_reward.json"
    if int(state.step) == 0:
        found, params = [], weights()
        for i in range(BATCHES):
            for chunk in prompts.batch(i).split(programs.config.sampling.parts):
                rollout = programs.generate(params, chunk, state.step)
                assert rollout.probe_logprobs is not None  # the method has a probe token
                values, truncated = hosts.to_host(rollout.probe_logprobs), hosts.to_host(rollout.truncated)
                found.append(values[~truncated & np.isfinite(values)])
        logprobs = np.concatenate(found)
        if not logprobs.size:
            raise ConfigError(
                "LaSeR's constant cannot be measured, because no completion of the policy that RL begins with has ended. Raise "
                "config.max_completion_length, or begin with config.supervised.steps."
            )
        c_ref = float(np.float32(logprobs.mean()))
        if hosts.is_first():
            write_json(file, {"c_ref": c_ref, "completions": int(logprobs.size)})
    else:
        c_ref = json.loads(file.read_text())["c_ref"]
    return hosts.put(np.float32(c_ref), sharding.replicated(programs.sharding.mesh))

"""LaSeR's self-reward: its constant, measured once on the policy that RL begins with."""

from collections.abc import Callable
import json
from typing import Any

import jax
import numpy as np

from jaxrl_reason import models
from jaxrl_reason.config import ConfigError
from jaxrl_reason.methods import Method
from jaxrl_reason.models import sharding
from jaxrl_reason.rl import hosts
from jaxrl_reason.rl.programs import Programs
from jaxrl_reason.rl.types import TrainState
from jaxrl_reason.runs.files import write_json
from jaxrl_reason.runs.workdir import Workdir

BATCHES = 4  # prompt batches over whose completions the constant is averaged


def constant(
    method: Method,
    programs: Programs,
    prompts: Any,
    work: Workdir,
    state: TrainState,
    weights: Callable[[], models.Params],
) -> jax.Array | None:
    """Returns c_ref, measured at step 0 and kept in self_reward.json.

    Evaluation uses it even if training scores every completion under the reference policy (reference "exact").

    Args:
      method, programs, work: of the run.
      prompts: batches of training prompts by number.
      state: of the policy that RL begins with, or of a later step.
      weights: () -> the policy's weights as rollouts read them.

    Returns:
      f32 scalar; None if the method has no self-reward.

    Raises:
      ConfigError: no completion ended.
    """
    if not method.loss.find("self_reward"):
        return None
    file = work.path / "self_reward.json"
    if int(state.step) == 0:
        found, params = [], weights()
        for i in range(BATCHES):
            for chunk in prompts.batch(i).split(programs.config.sampling.parts):
                rollout = programs.generate(params, chunk, state.step)
                values, truncated = hosts.whole(rollout.probe_logprobs), hosts.whole(rollout.truncated)
                found.append(values[~truncated & np.isfinite(values)])
        logprobs = np.concatenate(found)
        if not logprobs.size:
            raise ConfigError(
                "LaSeR's constant cannot be measured, because no completion of the policy that RL begins with has ended. Raise "
                "config.max_completion_length, or begin with config.supervised.steps."
            )
        c_ref = float(np.float32(logprobs.mean()))
        if hosts.first():
            write_json(file, {"c_ref": c_ref, "completions": int(logprobs.size)})
    else:
        c_ref = json.loads(file.read_text())["c_ref"]
    return hosts.put(np.float32(c_ref), sharding.replicated(programs.sharding.mesh))

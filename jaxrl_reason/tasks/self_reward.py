"""LaSeR's self-reward in a task: the probe token, the constant, and the rewards of a rollout (arXiv 2510.14943)."""

from collections.abc import Callable
import json
import pathlib
from typing import Any
import warnings

import jax
import numpy as np

from jaxrl_reason import data, models
from jaxrl_reason.config import ConfigError
from jaxrl_reason.methods import Method
from jaxrl_reason.models import sharding
from jaxrl_reason.rl import hosts
from jaxrl_reason.rl.programs import Programs
from jaxrl_reason.rl.types import Rollout, TrainState
from jaxrl_reason.runs import checkpoints
from jaxrl_reason.runs.files import write_json
from jaxrl_reason.runs.workdir import Workdir

Weights = Callable[[], models.Params]  # the policy's weights as rollouts read them
# LaSeR's constant, or rollout -> log-probabilities f32[P, G] of the probe token under the reference policy; None: unknown
ProbeReference = float | jax.Array | Callable[[Rollout], np.ndarray] | None
BATCHES = 4  # prompt batches over whose completions the constant is averaged
MAX_SPREAD = 0.2  # standard deviation of the self-rewards at the start above which their constant is reported


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


def self_reward_of(method: Method, reference: ProbeReference) -> Callable[[Rollout], np.ndarray] | None:
    """Returns rollout -> self-rewards f32[P, G], NaN if truncated; None without a reference or a self-reward."""
    settings = method.loss.find("self_reward")
    if reference is None or not settings:
        return None
    log_ref = reference if callable(reference) else lambda _: reference

    def self_rewards(rollout: Rollout) -> np.ndarray:
        assert rollout.probe_logprobs is not None  # the method has a probe token
        probe, offset = hosts.to_host(rollout.probe_logprobs), np.asarray(log_ref(rollout), np.float32)
        return np.where(hosts.to_host(rollout.truncated), np.nan, settings.beta * (probe - offset))

    return self_rewards


def is_exact(method: Method) -> bool:
    """Returns whether a method scores the probe token of every completion under the reference policy."""
    settings = method.loss.find("self_reward")
    return bool(settings and settings.reference == "exact")


def probe_reference(
    method: Method, programs: Programs, c_ref: ProbeReference, reference: models.Params | None, frozen: models.Params
) -> ProbeReference:
    """Returns the log-probabilities that the self-rewards of an evaluation subtract, as those of training do.

    They are `c_ref`, or with LaSeR's reference="exact" those of the probe token under the reference policy, whose trained
    weights are `reference`.
    """
    if not is_exact(method) or reference is None:
        return c_ref
    params = models.lora.join(reference, frozen)

    def log_ref(rollout: Rollout) -> np.ndarray:
        scored = programs.compute_logprobs(params, rollout).probe_logprobs
        assert scored is not None  # the method has a probe token
        return hosts.to_host(scored)

    return log_ref


def read_reference(
    method: Method, programs: Programs, workdir: pathlib.Path, params: models.Params, model: models.ModelConfig
) -> ProbeReference:
    """Returns the `probe_reference` of a run, whose weights are `params`; None before the run has one.

    Raises ConfigError for a damaged self_reward.json, and CheckpointError for damaged weights in start/.
    """
    if is_exact(method):
        trained, frozen = models.lora.split(model, params)
        start = workdir / "start"
        reference = checkpoints.load_params(start, trained) if start.is_dir() else None
        return probe_reference(method, programs, None, reference, frozen)
    return read_constant(workdir) if method.loss.find("self_reward") else None


def read_constant(workdir: pathlib.Path) -> float | None:
    """Returns a run's LaSeR constant; None before it is measured. Raises ConfigError for a damaged self_reward.json."""
    file = workdir / "self_reward.json"
    try:
        return float(json.loads(file.read_bytes())["c_ref"]) if file.exists() else None
    except (ValueError, TypeError, KeyError) as e:
        raise ConfigError(f"{file} is damaged ({type(e).__name__}: {e}); restore it.") from e


def cautions(c_ref: float, std: float, beta: float) -> list[str]:
    """Returns a sentence if the self-reward cannot reach 1, and one if it does not begin as a constant.

    `c_ref` and `std` are mean and standard deviation of the log-probability of the probe token at the start of RL.
    """
    found, highest = [], -beta * c_ref  # of a probe token that is certain
    if highest < 1:
        found.append(
            f"LaSeR's constant is {c_ref:.1f} nats, so a self-reward is at most {highest:.2f}, and a correct answer should have 1: raise "
            f"config.method.beta_v to {-1 / c_ref:.2g} or more, or name a less probable token in config.method.token."
        )
    if beta * std > MAX_SPREAD:
        found.append(
            f"LaSeR's constant stands for log-probabilities with a standard deviation of {std:.1f} nats, so self-rewards begin with one of "
            f"{beta * std:.2f} instead of 0; config.method.reference='exact' subtracts each completion's own."
        )
    return found


def constant(
    method: Method, programs: Programs, prompts: Any, work: Workdir, state: TrainState, weights: Weights
) -> jax.Array | None:
    """Returns c_ref, f32 scalar, measured at step 0 and kept in self_reward.json.

    None without a self-reward, and if training scores every completion under the reference policy (reference="exact").
    `prompts` gives batches of training prompts by number. Raises ConfigError when no completion ended.
    """
    if not method.loss.find("self_reward") or is_exact(method):
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
        c_ref, std = float(np.float32(logprobs.mean())), float(logprobs.std())
        if hosts.is_first():
            write_json(file, {"c_ref": c_ref, "std": std, "completions": int(logprobs.size)})
            for sentence in cautions(c_ref, std, method.loss.find("self_reward").beta):
                warnings.warn(sentence, stacklevel=2)
    else:
        measured = read_constant(work.path)
        if measured is None:
            raise ConfigError(f"{file} is missing, and a run writes it before its first step; restore it.")
        c_ref = measured
    return hosts.put(np.float32(c_ref), sharding.replicated(programs.sharding.mesh))

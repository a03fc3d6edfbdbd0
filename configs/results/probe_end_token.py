"""Measures how well a linear function of the state at the end token tells correct from incorrect completions.

python configs/results/probe_end_token.py /tmp/laser/seed-0/start /tmp/laser/seed-0/grpo

LaSeR's self-reward is a log-probability of one token at that state. So the result is an estimate of what self-rewards can
reach while the policy does not change; training changes the states.
Each work directory of a text run has one line: the AUC over all held-out completions, and over those of one question.
A ridge regression on half of the questions judges the completions of the other half, and the reverse. Truncated completions
have no end token and are left out.
"""

import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_reason import metrics, models
from jaxrl_reason.rl import scoring
from jaxrl_reason.tasks import evaluating, evaluation, policies

_RIDGE = 10.0  # weight of the squared weights, for standardised states


def end_states(config: models.ModelConfig, params: models.Params, rollout) -> jax.Array:
    """Computes the hidden states f32[P, G, D] at the last tokens of completions, which predict the token after the end."""
    prompts = scoring.prompt_cache(scoring.read_prompts(config, params, rollout))
    hidden = models.bind(config, params).extend(rollout.tokens, prompts)
    last = jnp.maximum(rollout.mask.sum(axis=-1) - 1, 0)
    return jnp.take_along_axis(hidden, last[..., None, None], axis=2)[:, :, 0].astype(jnp.float32)


def scores(states: np.ndarray, correct: np.ndarray, used: np.ndarray) -> np.ndarray:
    """Returns the scores f64[N, K] of states [N, K, D], each from the prompts of the other half; NaN if not `used`.

    A half without completions that are used gives the other half no scores.
    """
    out = np.full(correct.shape, np.nan)
    for half in (0, 1):
        learn, judge = used.copy(), used.copy()
        learn[half::2], judge[1 - half :: 2] = False, False
        if not learn.any():
            continue
        x, y = states[learn].astype(np.float64), 2.0 * correct[learn] - 1
        mean, spread = x.mean(axis=0), x.std(axis=0) + 1e-6
        scaled = (x - mean) / spread
        weights = np.linalg.solve(scaled.T @ scaled + _RIDGE * np.eye(x.shape[1]), scaled.T @ (y - y.mean()))
        out[judge] = (states[judge] - mean) / spread @ weights + y.mean()
    return out


def probe(workdir: pathlib.Path) -> dict[str, float]:
    """Samples the held-out completions of a run's newest checkpoint; returns the AUCs and the accuracy."""
    policy = policies.open_policy(workdir, {})
    task, programs = (opened := evaluating.open_evaluation(policy, policy.config, None)).task, opened.programs
    loaded, states = policy.load(), []
    read = jax.jit(lambda params, rollout: end_states(programs.model, params, rollout))

    def generate(batch):
        rollout = programs.generate_eval(loaded.weights, batch)
        states.append(np.asarray(read(loaded.weights, rollout))[batch.weight > 0])
        return rollout

    found = evaluation.join(evaluation.sample_and_judge(generate, task.held_out, task.scorer))
    x = scores(np.concatenate(states), found.correct, ~found.truncated)
    return {
        "AUC": metrics.pair_accuracy(x.ravel(), found.correct.ravel()),
        "within": metrics.pair_accuracy(x, found.correct),
        "accuracy": float(found.correct.mean()),
    }


if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1].startswith("-"):
        sys.exit(__doc__)
    for name in sys.argv[1:]:
        line = ", ".join(f"{key} {value:.3f}" for key, value in probe(pathlib.Path(name)).items())
        print(f"{name}: {line}", flush=True)

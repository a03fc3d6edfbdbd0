"""Batches of advantage inputs, and transformations that are built once, so that each compiles once per shape."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_reason import advantages
from jaxrl_reason.advantages import AdvantageInputs

NAN, INF = float("nan"), float("inf")
EAGER = pytest.param(
    False, id="eager", marks=pytest.mark.runs
)  # each operation compiles by itself, which takes seconds per file
either_way = pytest.mark.parametrize("compiled", [EAGER, pytest.param(True, id="jit")])
SELF_REWARDS = [[1, 0, 0.5, -0.2]]  # .1 (log pi + 23) for log pi of -13, -23, -18, -25
STRATIFY, MIX, SCALE = advantages.stratify_by_verifier(), advantages.mix_self_reward(), advantages.scale_by_value()
WEIGH, REWEIGH = advantages.weight_by_score_spread(), advantages.reweight_by_confidence()
WIDE, SKIP = advantages.stratify_by_verifier(0.3, 0.6), advantages.reweight_by_confidence(0.5, skip_all_correct=True)
EVERY = [STRATIFY, WEIGH, SCALE, MIX, REWEIGH, SKIP]


def inputs_of(rewards, lengths=None, T=4, **signals):
    """Returns AdvantageInputs of numpy arrays, with completions of two tokens by default."""
    rewards = np.asarray(rewards, np.float32)
    lengths = np.full(rewards.shape, 2) if lengths is None else np.asarray(lengths)
    mask = np.arange(T) < lengths[..., None]
    kinds = dict(verdicts=bool, truncated=bool)
    signals = {name: np.asarray(x, kinds.get(name, np.float32)) for name, x in signals.items()}
    return AdvantageInputs(rewards, mask, **signals)


@functools.cache
def jitted(transform):
    return jax.jit(advantages.chain(transform).update)


def compute(transform, inputs, start=None, state=None, compiled=True):
    """Applies a chain of one transformation from `start` (None: the rewards) and returns (advantages, state) as numpy."""
    chain = advantages.chain(transform)
    update = jitted(transform) if compiled else chain.update
    state = chain.init() if state is None else state
    out, state = update(None if start is None else jnp.asarray(start), state, jax.tree.map(jnp.asarray, inputs))
    return np.asarray(out), state


def a_batch(seed=0, P=6, G=5, T=4, missing=True):
    """Returns every field of AdvantageInputs: strata of every size, ties, truncation, missing rewards and scores."""
    rng = np.random.default_rng(seed)
    correct = rng.random((P, G)) < 0.5
    correct[0], correct[1], correct[2] = True, False, np.arange(G) == 1  # all are correct, none is, one is
    rewards = correct.astype(np.float32)
    scores = rng.normal(size=(P, G)).astype(np.float32) * rng.choice([0.3, 1.0, 4.0], (P, 1)).astype(np.float32)
    scores[3] = scores[3, 0]  # all scores are equal
    if missing:
        rewards[4, 0], rewards[0, 2], scores[5, 1], scores[5, 3], scores[1, 4] = NAN, NAN, NAN, INF, -INF
    lengths = rng.integers(1, T + 1, (P, G))
    mask = np.arange(T) < lengths[..., None]
    return AdvantageInputs(
        rewards,
        mask,
        verdicts=correct,
        greedy_rewards=rng.integers(0, 2, P).astype(np.float32),
        model_scores=scores,
        values=rng.choice([0, 0.02, 0.05, 0.3, 1.0], P).astype(np.float32),
        self_rewards=rng.normal(0.5, 0.6, (P, G)).astype(np.float32)
        * rng.choice([0.02, 1.0], (P, 1)).astype(np.float32),
        prompt_confidence=rng.random(P).astype(np.float32),
        answer_confidence=rng.random((P, G)).astype(np.float32),
        truncated=rng.random((P, G)) < 0.3,
        kl=rng.normal(size=mask.shape).astype(np.float32),
    )


def presence(x):
    return ~np.isnan(x.rewards) & np.isfinite(x.model_scores)


def signals_of(x, method):
    """Returns x with only the signals of the method."""
    keep = {"rewards", "completion_mask", *method.signals}
    return AdvantageInputs(*(value if name in keep else None for name, value in zip(x._fields, x)))

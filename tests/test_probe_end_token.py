"""Tests the linear function of the state at the end token that judges completions."""

import jax
import numpy as np
import pytest

from helpers import reference_decoder as reference
from helpers.documents import ROOT
from jaxrl_reason import config as config_lib
from jaxrl_reason import metrics, models
from jaxrl_reason.rl.types import Rollout

probe = config_lib.load_module(ROOT / "configs" / "results" / "probe_end_token.py")
RNG = np.random.default_rng(0)


def test_the_states_are_those_that_predict_the_token_after_the_end():
    config = models.ModelConfig(vocab_size=11, width=16, layers=2, heads=2, kv_heads=1, mlp_width=16)
    params = reference.random_params(config, scale=0.3)
    prompts, tokens = RNG.integers(1, 11, (2, 3)), RNG.integers(1, 11, (2, 2, 4))
    lengths = np.array([[4, 1], [2, 3]])
    mask = np.arange(4) < lengths[..., None]
    rollout = Rollout(prompts, np.ones((2, 3), bool), tokens, mask, np.zeros(mask.shape), np.zeros((2, 2), bool))
    found = jax.jit(lambda params: probe.end_states(config, params, rollout))(params)
    logits = np.asarray(models.bind(config, params).logits(found))
    for p, g in np.ndindex(2, 2):
        text = np.concatenate([prompts[p], tokens[p, g, : lengths[p, g]]])
        want = reference.forward(config, reference.float64(params), text)[-1]
        np.testing.assert_allclose(logits[p, g], want, atol=1e-4)


def test_a_direction_of_the_states_is_found_and_judges_the_other_half():
    correct = RNG.random((40, 8)) < 0.4
    states = RNG.normal(size=(40, 8, 6)).astype(np.float32)
    states[..., 2] += 8.0 * correct
    used = np.ones(correct.shape, bool)
    found = probe.scores(states, correct, used)
    assert metrics.pair_accuracy(found.ravel(), correct.ravel()) > 0.99
    # Scores of the even prompts come from the verdicts of the odd ones alone.
    turned = correct.copy()
    turned[::2] = ~turned[::2]
    again = probe.scores(states, turned, used)
    np.testing.assert_array_equal(again[::2], found[::2])
    assert np.abs(again[1::2] - found[1::2]).min() > 1e-3


def test_states_without_a_direction_give_one_half():
    correct, states = RNG.random((60, 4)) < 0.5, RNG.normal(size=(60, 4, 100)).astype(np.float32)
    found = probe.scores(states, correct, np.ones(correct.shape, bool))
    assert metrics.pair_accuracy(found.ravel(), correct.ravel()) == pytest.approx(0.5, abs=0.12)


def test_completions_that_are_left_out_have_no_score_and_teach_nothing():
    correct, states = RNG.random((10, 4)) < 0.5, RNG.normal(size=(10, 4, 3)).astype(np.float32)
    used = RNG.random((10, 4)) < 0.7
    found = probe.scores(states, correct, used)
    np.testing.assert_array_equal(np.isnan(found), ~used)
    spoilt = np.where(used[..., None], states, 1e6)
    np.testing.assert_array_equal(probe.scores(spoilt, correct ^ ~used, used), found)
    assert np.isnan(probe.scores(states, correct, used & False)).all()

"""Tests the sentences about LaSeR's constant."""

import types

import jax
import pytest

from jaxrl_reason import methods
from jaxrl_reason.config import ConfigError
from jaxrl_reason.models import sharding
from jaxrl_reason.tasks import self_reward


@pytest.mark.parametrize(
    "c_ref, std, words",
    [
        (-10.0, 2.0, []),  # just enough, because 0.1 * 10 is 1 and 0.1 * 2 is the largest spread
        (-9.5, 0.0, ["at most 0.95", "beta_v to 0.11 or more"]),
        (-4.0, 1.0, ["at most 0.40", "beta_v to 0.25 or more"]),
        (-23.0, 2.4, ["standard deviation of 2.4 nats", "one of 0.24 instead of 0", "reference='exact'"]),
    ],
)
def test_a_constant_that_bounds_or_blurs_the_self_rewards_is_reported(c_ref, std, words):
    sentences = self_reward.cautions(c_ref, std, beta=0.1)
    assert len(sentences) == bool(words) and all(word in sentences[0] for word in words)


def test_both_faults_are_two_sentences():
    assert len(self_reward.cautions(-3.0, 2.5, beta=0.1)) == 2


def test_a_resumed_run_reads_its_constant_or_says_what_is_wrong(tmp_path):
    mesh = sharding.make_mesh(1, 1, 1, devices=jax.devices()[:1])
    programs = types.SimpleNamespace(sharding=sharding.batch_sharding(mesh))
    work, state = types.SimpleNamespace(path=tmp_path), types.SimpleNamespace(step=3)
    resumed = lambda: self_reward.constant(methods.create("laser"), programs, None, work, state, None)
    with pytest.raises(ConfigError, match="self_reward.json is missing, and a run writes it before its first step"):
        resumed()
    (tmp_path / "self_reward.json").write_text('{"c_ref": -2.5}')
    assert resumed() == -2.5
    (tmp_path / "self_reward.json").write_text('{"c_ref": ')
    with pytest.raises(ConfigError, match="self_reward.json is damaged"):
        resumed()

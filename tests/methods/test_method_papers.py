"""Tests the five methods as extensions of an estimator: their numbers by hand, off switches and keywords."""

import dataclasses
import json
import os
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from helpers import reference_methods as reference
from helpers.advantage_batches import a_batch, either_way, INF, inputs_of, NAN, SELF_REWARDS, signals_of
from jaxrl_reason import losses, methods
from jaxrl_reason.advantages import AdvantageInputs
from jaxrl_reason.data import numbers

EXTENSIONS = ("genre2", "hero", "laser", "rlev", "progrpo")
every_base = pytest.mark.parametrize("base", reference.ESTIMATORS)


@either_way
def test_genre2_by_hand_from_digits_to_the_loss(compiled):
    """On ReMax, with the range [-1.5, 2.5], truth .5, samples .5 .75 .25 .4 and the greedy number .6."""
    tokenizer = numbers.make_tokenizer("normalized", base=10, digits=2)
    decoded = np.asarray(tokenizer.decode(jnp.array([[[5, 0], [7, 5], [2, 5], [4, 0], [6, 0]]])))
    z = decoded * 4 - 1.5
    rewards = -((z - 0.5) ** 2)
    np.testing.assert_allclose(rewards, [[0, -1, -1, -0.16, -0.16]], atol=1e-6)
    method = methods.create("genre2")
    assert method.signals == {"greedy_rewards"}

    def run(rewards, logprobs):
        inputs = AdvantageInputs(rewards[:, :4], jnp.ones((1, 4, 2), bool), greedy_rewards=rewards[:, 4])
        adv, _ = method.advantage.update(None, method.advantage.init(), inputs)
        return adv, losses.policy_loss(
            logprobs, logprobs, adv, inputs.completion_mask, **method.loss.policy_keywords()
        )[0]

    logprobs = -jnp.array([[[1.0, 2], [3, 4], [5, 6], [7, 8]]])
    adv, loss = (jax.jit(run) if compiled else run)(jnp.asarray(rewards), logprobs)
    np.testing.assert_allclose(adv, [[0.16, -0.84, -0.84, 0]], atol=1e-6)
    # minus the mean over samples of (sum of log p) A: (3 .16 - 7 .84 - 11 .84) / 4
    np.testing.assert_allclose(loss, (0.48 - 5.88 - 9.24) / 4, rtol=1e-5)


def test_genre2_on_grpo_is_the_standardized_advantage_with_the_same_loss():
    method = methods.create("genre2", base="grpo")
    rewards = np.array([[0, -1, -1, -0.16]], np.float32)
    adv, _ = method.advantage.update(None, method.advantage.init(), inputs_of(rewards))
    np.testing.assert_allclose(adv, (rewards - rewards.mean()) / rewards.std(ddof=1), rtol=1e-5)
    assert (method.loss.aggregation, method.loss.ratio, method.loss.auxiliary) == ("sequence_sum", "token", ())
    assert methods.create("genre2", expert_coefficient=0.05).loss.find("expert").coefficient == 0.05


def test_expert_targets_by_hand():
    truth = jnp.array([[5, 3, 7, 1]])
    rollouts = {6000: 5000, 4999: 5999, 5402: 5300, 5369: 5379, 5371: 5371}
    digits = lambda n: [int(c) for c in str(n)]
    got = numbers.expert_targets(jnp.array([digits(n) for n in rollouts]), jnp.repeat(truth, 5, axis=0), 10)
    np.testing.assert_array_equal(got, [digits(n) for n in rollouts.values()])


@pytest.mark.parametrize("warmups", [(0, 0), (2, 0), (0, 2), (1, 2)])
def test_laser_mixes_after_both_warmups(warmups):
    method = methods.create("laser", reasoning_warmup=warmups[0], self_reward_warmup=warmups[1])
    inputs = inputs_of([[1, 0, 1, 0]], self_rewards=SELF_REWARDS, truncated=[[0, 0, 0, 0]], verdicts=[[1, 0, 1, 0]])
    state, seen = method.advantage.init(), []
    for _ in range(5):
        adv, state = method.advantage.update(None, state, inputs)
        seen.append(np.asarray(adv)[0, 0])
    expected = [0.866024 if n < sum(warmups) else 0.909980 for n in range(5)]
    np.testing.assert_allclose(seen, expected, atol=2e-6)
    assert method.loss.find("self_reward").warmup_steps == warmups[0]


def test_a_self_reward_of_the_warmup_that_is_not_finite_changes_no_advantage():
    method = methods.create("laser", reasoning_warmup=3)
    inputs = inputs_of([[1, 0]], self_rewards=[[NAN, INF]], truncated=[[0, 0]], verdicts=[[1, 0]])
    adv, _ = method.advantage.update(None, method.advantage.init(), inputs)
    np.testing.assert_allclose(adv, [[0.707106, -0.707106]], atol=2e-6)


# -- off switches ----------------------------------------------------------------------------------


def bits(x):
    return np.asarray(x).view(np.uint32)


OFF = {
    "weight": ("hero", dict(w_min=1.0, w_max=1.0)),
    "mix": ("laser", dict(tau=0.0, reasoning_warmup=0, self_reward_warmup=0)),
    "warmup": ("laser", dict(reasoning_warmup=1)),
    "values": ("rlev", dict(alpha=0.0)),
    "clip": ("rlev", dict(clip=0.0)),
    "confidence": ("progrpo", dict(alpha=0.0)),
}


@pytest.mark.runs
@either_way
@every_base
@pytest.mark.parametrize("switch", OFF)
def test_a_method_that_is_switched_off_is_bitwise_its_base(switch, base, compiled):
    name, options = OFF[switch]
    off, plain = methods.create(name, base=base, **options), methods.create(base)
    x = a_batch(1, missing=name != "hero")  # HERO always leaves out completions whose score is not finite
    if name == "hero":  # with a = b = 0 its reward is the verdict
        off = methods.create(name, base=base, alpha=0.0, beta=0.0, **options)

    def run(method):
        x_of = jax.tree.map(jnp.asarray, signals_of(x, method))
        return method.advantage.update(None, method.advantage.init(), x_of)[0]

    if compiled:  # the whole chain is one program, which XLA rounds alike
        ours, theirs = run_both(off, plain, x)
    else:
        ours, theirs = run(off), run(plain)
    np.testing.assert_array_equal(bits(jnp.where(ours == 0, 0.0, ours)), bits(jnp.where(theirs == 0, 0.0, theirs)))
    assert np.abs(theirs).max() > 0.1


def run_both(off, plain, x):
    one = jax.jit(lambda x: off.advantage.update(None, off.advantage.init(), x)[0])
    two = jax.jit(lambda x: plain.advantage.update(None, plain.advantage.init(), x)[0])
    return one(signals_of(x, off)), two(signals_of(x, plain))


@pytest.mark.parametrize("name", ["hero", "laser", "rlev", "progrpo"])
def test_every_method_changes_every_base(name):
    now = {"laser": dict(reasoning_warmup=0, self_reward_warmup=0)}.get(name, {})
    x = a_batch(1)
    for base in reference.ESTIMATORS:
        on, plain = methods.create(name, base=base, **now), methods.create(base)
        run = lambda m: np.asarray(m.advantage.update(None, m.advantage.init(), signals_of(x, m))[0])
        assert np.abs(run(on) - run(plain)).max() > 1e-2, base


# -- keywords --------------------------------------------------------------------------------------

OTHER = {
    "genre2": dict(expert_coefficient=0.05, base="grpo"),
    "hero": dict(
        alpha=0.3, beta=0.4, strata_eps=1.0, w_min=0.9, w_max=4.0, k=1.0, momentum=0.5, weight_on="reward", base="rloo"
    ),
    "laser": dict(
        alpha=0.5,
        beta_v=0.3,
        tau=0.5,
        min_std=0.45,
        reasoning_warmup=1,
        self_reward_warmup=1,
        reference="exact",
        token="z",
        base="rloo",
    ),
    "rlev": dict(alpha=1.0, clip=0.1, scale_on="advantage", base="rloo"),
    "progrpo": dict(alpha=0.9, skip_all_correct=True, center=True, correct_only=True, base="rloo"),
}
OWN = {name: set(inner) for name, inner in OTHER.items()}


def test_progrpo_without_a_named_base_has_the_loss_of_its_paper():
    made, known = methods.create("progrpo").loss, methods.keywords("progrpo")
    assert (made.clip_low, made.clip_high, made.aggregation) == (0.2, 0.28, "token_mean")
    assert (known["clip_low"], known["clip_high"], known["aggregation"]) == (0.2, 0.28, "token_mean")
    assert methods.create("progrpo", clip_high=0.3).loss == dataclasses.replace(made, clip_high=0.3)
    for base in ("grpo", "rloo"):
        assert (
            methods.create("progrpo", base=base).loss
            == methods.create(base).loss
            == methods.stack("progrpo", base=base).loss
        )
        assert methods.keywords("progrpo", base)["clip_high"] == 0.2
    assert methods.stack("progrpo", "rlev").loss == methods.create("grpo").loss
    assert methods.keywords("progrpo+rlev")["clip_high"] == methods.keywords("grpo")["clip_high"] == 0.2


def behaviour(name, **options):
    """Returns (the advantages of two steps, the loss) of a method."""
    now = dict(reasoning_warmup=0, self_reward_warmup=0) if name == "laser" else {}
    method = methods.create(name, **now | options)
    state, seen = method.advantage.init(), []
    for seed in (1, 2):
        adv, state = method.advantage.update(None, state, signals_of(a_batch(seed), method))
        seen.append(np.asarray(adv))
    return np.stack(seen), method.loss


@pytest.mark.parametrize("name, key", [(name, key) for name in EXTENSIONS for key in OTHER[name]])
def test_every_keyword_of_an_extension_changes_the_result(name, key):
    assert set(methods.keywords(name)) >= OWN[name]
    needs = (
        dict(base="reinforce_pp_baseline") if key == "weight_on" else {}
    )  # the usual base does not allow it on the reward
    plain, changed = behaviour(name, **needs), behaviour(name, **needs | {key: OTHER[name][key]})
    assert plain[1] != changed[1] or np.abs(plain[0] - changed[0]).max() > 1e-4


def test_a_keyword_of_the_base_that_genre2_sets_raises():
    for base in ("remax", "grpo"):
        with pytest.raises(ValueError, match="aggregation"):
            methods.create("genre2", base=base, aggregation="sequence_mean")


def test_keywords_that_genre2_sets_are_not_offered():
    assert "aggregation" in methods.keywords("remax") and "aggregation" in methods.keywords("grpo")
    assert methods.keywords("genre2") == {"expert_coefficient": 0.0, "base": "remax"}
    assert "aggregation" not in methods.keywords("genre2", base="grpo")
    assert set(methods.keywords("genre2+rlev", base="remax")) == {"genre2", "rlev", "base"}
    assert "aggregation" in methods.keywords("hero") and "clip_low" in methods.keywords("genre2", base="grpo")


def test_the_keywords_above_are_all_keywords():
    for name in EXTENSIONS:
        base = methods.keywords(name)["base"]
        assert set(methods.keywords(name)) - set(methods.keywords(base)) <= OWN[name]


# -- eight devices ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "build, message",
    [
        (lambda: methods.create("hero", alpha=0.6, beta=0.4), "their sum below 1"),
        (lambda: methods.create("laser", alpha=-1.0), "alpha is -1.0 .* both must be at least 0"),
        (lambda: methods.create("laser", reasoning_warmup=-1), "reasoning_warmup is -1"),
        (lambda: methods.create("laser", self_reward_warmup=-1), "self_reward_warmup is -1"),
        (lambda: methods.create("laser", beta_v=0.0), "beta_v is 0.0; it must be greater than 0"),
        (lambda: methods.create("laser", reference="mean"), "reference is 'mean'; it must be 'constant' or 'exact'"),
        (lambda: methods.create("genre2", expert_coefficient=-1.0), "expert_coefficient is -1.0"),
        (
            lambda: methods.create("hero", weight_on="rewards"),
            "weight_on is 'rewards'; it must be 'reward' or 'advantage'",
        ),
        (lambda: methods.create("rlev", scale_on="loss"), "scale_on is 'loss'; it must be 'reward' or 'advantage'"),
    ],
)
def test_a_parameter_out_of_range_raises(build, message):
    with pytest.raises(ValueError, match=message):
        build()


# -- eight devices ---------------------------------------------------------------------------------

EIGHT_DEVICES = """
    import json
    import jax, numpy as np
    from jax.sharding import Mesh, NamedSharding, PartitionSpec
    from jaxrl_reason import losses, methods
    from helpers.advantage_batches import a_batch

    batches = [a_batch(seed, P=8) for seed in range(2)]
    at_once = dict(reasoning_warmup=0, self_reward_warmup=0)
    made = [methods.stack("hero", "rlev", "progrpo", "laser", base=base, laser=at_once)
            for base in ("grpo", "reinforce_pp", "rloo")]

    @jax.jit
    def everything(batches):
        out = []
        for method in made:
            state = method.advantage.init()
            for x in batches:
                adv, state = method.advantage.update(None, state, x)
            out.append((adv, state))
        x = batches[0]
        valid = ~x.truncated
        loss = lambda r: losses.self_reward_loss(r, x.verdicts, valid)
        return out, jax.value_and_grad(loss)(x.self_rewards)

    one = everything(jax.device_put(batches, jax.devices()[0]))
    spread = NamedSharding(Mesh(np.array(jax.devices()), ("prompts",)), PartitionSpec("prompts"))
    eight = everything(jax.device_put(batches, spread))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), one, eight)
    print(json.dumps({"devices": len(eight[1][1].sharding.device_set), "spread": [float(a.std()) for a, _ in one[0]],
                      "loss": float(one[1][0])}))
"""


@pytest.mark.processes
def test_eight_devices_give_the_numbers_of_one():
    here = os.path.dirname(os.path.abspath(__file__))
    env = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0",
        "PYTHONPATH": os.pathsep.join([os.path.dirname(here), *filter(None, [os.environ.get("PYTHONPATH")])]),
    }
    script = [sys.executable, "-c", textwrap.dedent(EIGHT_DEVICES)]
    done = subprocess.run(script, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    seen = json.loads(done.stdout)
    assert seen["devices"] == 8 and min(seen["spread"]) > 0.1 and seen["loss"] > 0.1

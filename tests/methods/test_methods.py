"""Tests whole methods: their numbers by hand, keywords and names, and a new estimator."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from helpers.advantage_batches import either_way
from jaxrl_reason import losses, methods
from jaxrl_reason.advantages import AdvantageInputs, AdvantageTransform, center_by_group, chain

ORDER = (
    "grpo dr_grpo dapo gspo cispo rloo reinforce_pp reinforce_pp_baseline remax maxrl genre2 hero laser rlev progrpo"
).split()
ESTIMATORS = ORDER[:10]


def a_batch():
    """Returns two groups of three with ratios from e^-2.5 to e^2.5 and advantages of both signs."""
    mask = (np.arange(5) < np.array([[2, 5, 3], [4, 1, 5]])[..., None]).astype(np.float32)
    log_ratio = np.linspace(-2.5, 2.5, 30).reshape(5, 2, 3).transpose(1, 2, 0) * mask
    rng = np.random.default_rng(0)
    logprobs, kl = -3 + rng.random(mask.shape), rng.normal(size=mask.shape)
    inputs = AdvantageInputs(np.array([[1, 0.2, 0], [0, 1, 1]]), mask, greedy_rewards=np.array([1.0, 0.5]), kl=kl)
    f32 = functools.partial(jax.tree.map, lambda x: jnp.asarray(x, jnp.float32))
    return f32((logprobs, logprobs - log_ratio, mask)), f32(inputs)


@functools.cache
def outcome(name, **options):
    """Returns (advantages, (loss, d loss / d logprobs), dynamic_sampling) of a method on the batch, as numpy."""
    method = methods.create(name, **options)
    (logprobs, old, mask), inputs = a_batch()

    @jax.jit
    def run(inputs, logprobs):
        adv, _ = method.advantage.update(None, method.advantage.init(), inputs)
        loss = lambda x: losses.policy_loss(x, old, adv, mask, **method.loss.policy_keywords())[0]
        return adv, jax.value_and_grad(loss)(logprobs)

    return [*map(np.asarray, jax.tree.leaves(run(inputs, logprobs))), np.array(method.dynamic_sampling)]


# -- names and errors ------------------------------------------------------------------------------


def test_names_are_complete_and_in_order():
    assert list(methods.names()) == ORDER
    for name in ORDER:
        assert methods.create(name).name == name
        assert methods.keywords(name)


@pytest.mark.parametrize(
    "name, options, message",
    [
        ("gpro", {}, "no method 'gpro'. Did you mean .*'grpo'"),
        ("reinforce++", {}, "Did you mean .*'reinforce_pp'"),
        ("drgrpo", {}, "'dr_grpo'"),
        ("xyz", {}, "no method 'xyz'. There are: grpo, dr_grpo, dapo"),
        ("", {}, "There are: grpo"),
        ("grpo", {"clip_hihg": 0.3}, "'grpo' has no parameter 'clip_hihg'. Did you mean 'clip_high'"),
        ("dapo", {"overlong_max": 9}, "Did you mean .*'overlong_max_length'"),
        ("remax", {"zz": 1}, "'remax' has no parameter 'zz'. There are: aggregation"),
        ("cispo", {"clip_low": 0.1}, "'cispo' has no parameter 'clip_low'"),
        ("grpo", {"dual_clip": 0.5}, "dual_clip is 0.5; it must be greater than 1"),
        ("grpo", {"aggregation": "mean"}, "aggregation is 'mean'; it must be one of"),
        ("rloo", {"clip_low": -0.1}, "clip_low and method.clip_high are -0.1 and 0.2"),
        ("gspo", {"clip_high": -0.1}, "must be at least 0"),
        ("reinforce_pp", {"kl_coef": -1.0}, "kl_coef is -1.0"),
        ("dapo", {"overlong_max_length": 9}, "set both or neither"),
        ("dapo", {"overlong_cache_length": 9}, "set both or neither"),
        ("dapo", {"overlong_max_length": 9, "overlong_cache_length": 10}, "cache_length is 10"),
    ],
    ids=lambda x: str(x)[:30],
)
def test_the_error_names_the_mistake_and_the_nearest_valid_names(name, options, message):
    with pytest.raises(ValueError, match=message):
        methods.create(name, **options)


@pytest.mark.parametrize("name", ["grpo", "dapo", "gspo", "cispo", "maxrl"])
def test_a_negative_eps_raises(name):
    with pytest.raises(ValueError, match="eps"):
        methods.create(name, eps=-1e-6)


def test_keywords_of_an_unknown_method_raise():
    with pytest.raises(ValueError, match="Did you mean .*'grpo'"):
        methods.keywords("grpoo")


@pytest.mark.parametrize("name", ["grpo", "dr_grpo", "dapo", "gspo", "cispo", "rloo", "reinforce_pp_baseline", "maxrl"])
def test_group_estimators_raise_for_a_group_of_one(name):
    method = methods.create(name)
    inputs = AdvantageInputs(jnp.ones((2, 1)), jnp.ones((2, 1, 3)))
    with pytest.raises(ValueError, match="group_size is 1"):
        jax.eval_shape(method.advantage.update, None, method.advantage.init(), inputs)


def test_signals_are_the_fields_that_the_chain_needs():
    for name in ESTIMATORS:
        assert methods.create(name).signals == ({"greedy_rewards"} if name == "remax" else set())
    for name in ("reinforce_pp", "reinforce_pp_baseline"):
        assert methods.create(name, kl_coef=0.1).signals == {"kl"}
    for name, options in [(n, {}) for n in ESTIMATORS] + [("reinforce_pp", {"kl_coef": 0.1})]:
        method, inputs = methods.create(name, **options), a_batch()[1]
        for field in method.signals:
            with pytest.raises(ValueError, match=f"{field}, which is None"):
                method.advantage.update(None, method.advantage.init(), inputs._replace(**{field: None}))
        only = {f: None for f in set(inputs._fields) - {"rewards", "completion_mask"} - method.signals}
        method.advantage.update(None, method.advantage.init(), inputs._replace(**only))  # it needs no other field
    with pytest.raises(ValueError, match="'humour'"):
        methods.Method(chain(), methods.PolicyLoss(), signals=frozenset({"humour"}))


# -- numbers ---------------------------------------------------------------------------------------

ROOT = 0.5**0.5
HAND = {  # rewards 1 and 0 (greedy .25), 1 and 3 tokens of 4; ratios e^.3 and e^-.3 e^.3 e^.3; logprobs -1
    # The advantages are +-ROOT. The first gain is clipped to 1.2. The second losses are .8 (clipped), e^.3 and e^.3.
    "grpo": ROOT * (-1.2 + (0.8 + 2 * math.exp(0.3)) / 3) / 2,
    "dr_grpo": 0.5 * (-1.2 + 0.8 + 2 * math.exp(0.3)) / (2 * 4),
    "dapo": ROOT * (-1.28 + 0.8 + 2 * math.exp(0.3)) / 4,
    "gspo": ROOT * (-1.0004 + math.exp(0.1)) / 2,
    "cispo": ROOT * (math.exp(0.3) - math.exp(-0.3) - 2 * math.exp(0.3)) / 4,
    "rloo": (-1.2 + 0.8 + 2 * math.exp(0.3)) / 4,
    # over tokens, the mean is 1/4 and the variance (9/16 + 3/16) / 3 = 1/4, so the advantages are 1.5 and -.5
    "reinforce_pp": (-1.2 * 1.5 + 0.5 * (0.8 + 2 * math.exp(0.3))) / 4,
    "reinforce_pp_baseline": (-1.2 * 1.5 + 0.5 * (0.8 + 2 * math.exp(0.3))) / 4,
    "remax": (0.75 - 0.25 * 3) / 4,
    "maxrl": (-1.2 + 0.8 + 2 * math.exp(0.3)) / 4,  # the mean is .5, the advantages are 1 and -1
}


@either_way
@pytest.mark.parametrize("name", ESTIMATORS)
def test_the_whole_method_by_hand(name, compiled):
    method = methods.create(name)
    mask = jnp.array([[[1, 0, 0, 0], [1, 1, 1, 0]]])
    log_ratio = jnp.array([[[0.3, 0, 0, 0], [-0.3, 0.3, 0.3, 0]]])
    inputs = AdvantageInputs(jnp.array([[1.0, 0.0]]), mask, greedy_rewards=jnp.array([0.25]))

    def loss(inputs):
        adv, _ = method.advantage.update(None, method.advantage.init(), inputs)
        logprobs = jnp.full((1, 2, 4), -1.0)
        return losses.policy_loss(logprobs, logprobs - log_ratio, adv, mask, **method.loss.policy_keywords())[0]

    np.testing.assert_allclose((jax.jit(loss) if compiled else loss)(inputs), HAND[name], rtol=1e-5, atol=1e-6)


# -- keywords --------------------------------------------------------------------------------------

OTHER = {
    "eps": 0.5,
    "clip_low": 0.6,
    "clip_high": 0.7,
    "dual_clip": 1.1,
    "aggregation": "constant",
    "kl_coef": 0.3,
    "dynamic_sampling": False,
    "overlong_max_length": 6,
    "overlong_cache_length": 2,
}
NEEDS = {"overlong_max_length": {"overlong_max_length": 5, "overlong_cache_length": 3}}
NEEDS["overlong_cache_length"] = NEEDS["overlong_max_length"]


@pytest.mark.parametrize("name, key", [(name, key) for name in ESTIMATORS for key in methods.keywords(name)])
def test_every_keyword_changes_what_the_method_does(name, key):
    base = outcome(name, **NEEDS.get(key, {}))
    changed = outcome(name, **NEEDS.get(key, {}) | {key: OTHER[key]})
    assert all(np.isfinite(x).all() for x in changed)
    assert any(a.shape != b.shape or np.abs(a - 1.0 * b).max() > 1e-4 for a, b in zip(base, changed))


def test_the_overlong_penalty_of_dapo_is_off_by_default():
    plain, penalized = outcome("dapo"), outcome("dapo", overlong_max_length=5, overlong_cache_length=3)
    np.testing.assert_array_equal(plain[0], outcome("grpo")[0])
    rewards = np.array([[1, 0.2 - 1, -1 / 3], [-2 / 3, 1, 0]])  # lengths 2 5 3 | 4 1 5: penalties 0 1 1/3 | 2/3 0 1
    expected = (rewards - rewards.mean(1, keepdims=True)) / (rewards.std(1, ddof=1, keepdims=True) + 1e-6)
    np.testing.assert_allclose(penalized[0], expected, atol=1e-5)


def test_only_dapo_samples_dynamically():
    assert [name for name in ESTIMATORS if methods.create(name).dynamic_sampling] == ["dapo"]


def test_methods_and_losses_are_frozen_values():
    assert methods.create("grpo").loss == methods.create("grpo").loss != methods.create("dapo").loss
    assert hash(methods.create("grpo").loss) == hash(methods.PolicyLoss(aggregation="sequence_mean"))
    with pytest.raises(dataclasses.FrozenInstanceError):
        methods.create("grpo").loss.clip_low = 1
    with pytest.raises(dataclasses.FrozenInstanceError):
        methods.create("grpo").name = "x"


# -- a new estimator -------------------------------------------------------------------------------


@pytest.fixture
def registry(monkeypatch):
    """Restores the registered methods after a test."""
    monkeypatch.setattr(methods.registry, "_ESTIMATORS", dict(methods.registry._ESTIMATORS))


def test_an_estimator_is_added_in_under_fifteen_lines(registry):
    @methods.register
    def running_baseline(*, momentum: float = 0.5, clip: float = 0.3):
        """Subtracts a running mean of the rewards, which is the state of the chain."""

        def update(advantages, mean, inputs):
            return advantages - mean, momentum * mean + (1 - momentum) * inputs.rewards.mean()

        moving = AdvantageTransform(lambda: jnp.zeros(()), update)
        return methods.Method(chain(moving), methods.PolicyLoss(clip_low=clip, clip_high=clip))

    assert methods.names() == (*ESTIMATORS, "running_baseline", *ORDER[10:])
    assert methods.keywords("running_baseline") == {"momentum": 0.5, "clip": 0.3}
    method = methods.create("running_baseline", momentum=0.75)
    inputs = AdvantageInputs(jnp.array([[1.0, 0.0]]), jnp.ones((1, 2, 3)))
    state, seen = method.advantage.init(), []
    for _ in range(2):
        adv, state = jax.jit(method.advantage.update)(None, state, inputs)
        seen.append(adv.tolist())
    assert seen == [[[1, 0]], [[0.875, -0.125]]] and method.loss.clip_high == 0.3
    with pytest.raises(ValueError, match="Did you mean 'momentum'"):
        methods.create("running_baseline", momentun=1)


@pytest.mark.parametrize("kind", [set, list, tuple, frozenset])
def test_signals_may_be_any_collection_of_names(kind):
    method = methods.Method(chain(center_by_group()), methods.PolicyLoss(), signals=kind(["verdicts"]))
    assert method.signals == frozenset({"verdicts"}) and isinstance(hash(method), int)


def test_an_estimator_that_cannot_be_configured_is_not_registered(registry):
    def grpo(*, eps=1.0):
        return methods.Method(chain(center_by_group()), methods.PolicyLoss())

    def positional(eps=1.0):
        return grpo()

    def no_default(*, eps):
        return grpo()

    with pytest.raises(ValueError, match="'grpo' is registered already"):
        methods.register(grpo)
    for factory in (positional, no_default):
        with pytest.raises(TypeError, match="parameter 'eps' must be keyword-only and have a default"):
            methods.register(factory)
    assert not {"positional", "no_default"} & set(methods.names())

"""Tests every stack of the five methods on every estimator. It equals its parts in numpy, or raises an error."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from helpers import reference_decoder
from helpers import reference_methods as reference
from helpers.shapes import check_fields
from jaxrl_reason import methods
from jaxrl_reason.advantages import AdvantageInputs, chain, stateless
from jaxrl_reason.models import ModelConfig
from jaxrl_reason.rl import learner
from jaxrl_reason.rl import optimizer as optimizers
from jaxrl_reason.rl.experience import make_experience
from jaxrl_reason.rl.types import Groups, Rollout, TrainState

pytestmark = pytest.mark.usefixtures("quick_compilation")

FIVE = ("genre2", "hero", "laser", "rlev", "progrpo")
JUDGES = {"hero", "laser", "progrpo"}  # methods that need verdicts
SETS = [parts for n in range(1, 6) for parts in itertools.combinations(FIVE, n)]
SOUND = [parts for parts in SETS if "genre2" not in parts or not JUDGES & set(parts)]
UNSOUND = [parts for parts in SETS if parts not in SOUND]
NEEDS = {
    "genre2": set(),
    "hero": {"model_scores", "verdicts"},
    "laser": {"self_rewards", "truncated", "verdicts"},
    "rlev": {"values"},
    "progrpo": {"prompt_confidence", "answer_confidence", "verdicts"},
}
AT_ONCE = {"laser": dict(reasoning_warmup=0, self_reward_warmup=0)}
every_base = pytest.mark.parametrize("base", reference.ESTIMATORS)
named = lambda parts: "+".join(parts)

P, G, T = 4, 5, 4


def a_batch(seed=0):
    """Returns all fields of AdvantageInputs, with one-sided groups, a missing reward and a non-finite score."""
    rng = np.random.default_rng(seed)
    correct = rng.random((P, G)) < 0.5
    correct[0], correct[1] = True, False
    rewards = correct.astype(np.float32)
    rewards[2, 3] = np.nan
    scores = rng.normal(size=(P, G)).astype(np.float32) * np.float32([[0.3], [1], [3], [1]])
    scores[3, 1] = np.inf
    mask = np.arange(T) < rng.integers(1, T + 1, (P, G, 1))
    self_rewards = rng.normal(0.5, 0.6, (P, G)).astype(np.float32)
    self_rewards[3] = 0.5 + 0.01 * self_rewards[3]  # too little spread to be mixed in
    return AdvantageInputs(
        rewards,
        mask,
        verdicts=correct,
        greedy_rewards=np.float32([1, 0, 1, 0]),
        model_scores=scores,
        values=np.float32([0, 0.02, 0.05, 0.5]),
        self_rewards=self_rewards,
        prompt_confidence=rng.random(P).astype(np.float32),
        answer_confidence=rng.random((P, G)).astype(np.float32),
        truncated=rng.random((P, G)) < 0.3,
        kl=rng.normal(size=mask.shape).astype(np.float32),
    )


def asked_for(x, method):
    keep = {"rewards", "completion_mask", *method.signals}
    return AdvantageInputs(*(value if name in keep else None for name, value in zip(x._fields, x)))


def run(method, batches):
    state, seen = method.advantage.init(), []
    for x in batches:
        adv, state = method.advantage.update(None, state, asked_for(x, method))
        seen.append(np.asarray(adv))
    return seen


def needed_options(parts, base):
    """Returns the options that a sound stack needs on this base."""
    return {"dynamic_sampling": False} if base == "dapo" and "genre2" in parts else {}


BATCHES = [a_batch(seed) for seed in range(2)]


# -- sound stacks ----------------------------------------------------------------------------------


@every_base
@pytest.mark.parametrize("parts", SOUND, ids=named)
def test_a_sound_stack_is_the_composition_of_its_parts(parts, base):
    options = {name: AT_ONCE[name] for name in parts if name in AT_ONCE}
    method = methods.stack(*parts, base=base, **options, **needed_options(parts, base))
    plain = methods.create(base, **needed_options(parts, base))
    assert method.signals == plain.signals.union(*(NEEDS[name] for name in parts))
    assert method.dynamic_sampling == plain.dynamic_sampling
    mean = None
    for x, got in zip(BATCHES, run(method, BATCHES)):
        expected, mean = reference.compose(base, parts, x, mean=mean)
        np.testing.assert_allclose(got, expected, rtol=3e-5, atol=3e-6)
        assert got.shape == (P, G) and np.abs(got).max() > 0.1
    loss = method.loss
    if "genre2" in parts:
        assert (loss.aggregation, loss.constant) == ("sequence_sum", None)
        loss = dataclasses.replace(loss, aggregation=plain.loss.aggregation, constant=plain.loss.constant)
    assert (loss.find("self_reward") is not None) == ("laser" in parts)
    assert dataclasses.replace(loss, auxiliary=()) == plain.loss


@pytest.mark.parametrize("parts", [p for p in SOUND if not {"hero", "genre2"} & set(p)], ids=named)
def test_a_stack_on_maxrl_is_the_composition_of_its_parts(parts):
    method = methods.stack(*parts, base="maxrl", **{name: AT_ONCE[name] for name in parts if name in AT_ONCE})
    for x, got in zip(BATCHES, run(method, BATCHES)):
        np.testing.assert_allclose(got, reference.compose("maxrl", parts, x)[0], rtol=3e-5, atol=3e-6)
    assert method.nonnegative_rewards


def test_maxrl_refuses_the_negative_rewards_of_hero_and_genre2_and_weights_that_cancel():
    with pytest.raises(ValueError, match=r"hero: incorrect answers have rewards down to -alpha \(-0.05\), and maxrl"):
        methods.create("hero", base="maxrl")
    with pytest.raises(ValueError, match="genre2: its rewards are negative, and maxrl refuses those"):
        methods.stack("genre2", "rlev", base="maxrl")
    with pytest.raises(ValueError, match="rlev: a weight on a prompt's rewards cancels when maxrl divides them by"):
        methods.create("rlev", base="maxrl", scale_on="reward")
    method = methods.create("hero", base="maxrl", alpha=0.0)
    assert all(np.isfinite(got).all() for got in run(method, BATCHES))


@pytest.mark.parametrize("parts", [parts for parts in SOUND if len(parts) > 1], ids=named)
@pytest.mark.parametrize("base", ["reinforce_pp", "reinforce_pp_baseline"])
def test_stacks_on_advantages_per_token(parts, base):
    options = {name: AT_ONCE[name] for name in parts if name in AT_ONCE}
    method = methods.stack(*parts, base=base, kl_coef=0.3, **options)
    assert "kl" in method.signals
    mean = None
    for x, got in zip(BATCHES, run(method, BATCHES)):
        assert got.shape == (P, G, T)
        expected, mean = reference.compose(base, parts, x, mean=mean, base_options={"kl_coef": 0.3})
        np.testing.assert_allclose(got[x.completion_mask], expected[x.completion_mask], rtol=3e-5, atol=3e-6)


@pytest.mark.parametrize("base", ["dr_grpo", "rloo", "reinforce_pp", "reinforce_pp_baseline"])
@pytest.mark.parametrize("hero, rlev", list(itertools.product(["reward", "advantage"], repeat=2)))
def test_weights_may_multiply_the_reward_if_no_group_std_divides(base, hero, rlev):
    places = {"hero": hero, "rlev": rlev}
    method = methods.stack("hero", "rlev", base=base, hero={"weight_on": hero}, rlev={"scale_on": rlev})
    mean = None
    for x, got in zip(BATCHES, run(method, BATCHES)):
        expected, mean = reference.compose(base, ("hero", "rlev"), x, mean=mean, places=places)
        np.testing.assert_allclose(got, expected, rtol=3e-5, atol=3e-6)


def test_weights_of_reward_and_advantage_differ_if_the_estimator_is_not_linear_in_the_group():
    for key, name in (("weight_on", "hero"), ("scale_on", "rlev")):
        on = {
            place: run(methods.create(name, base="reinforce_pp", **{key: place}), BATCHES)[1]
            for place in ("reward", "advantage")
        }
        assert np.abs(on["reward"] - on["advantage"]).max() > 0.01


def test_the_penalty_of_dapo_adds_to_the_reward_of_hero():
    method = methods.stack("hero", "rlev", base="dapo", overlong_max_length=4, overlong_cache_length=2)
    x = BATCHES[0]
    present = ~np.isnan(x.rewards) & np.isfinite(x.model_scores)
    rewards = reference.strata(x.model_scores, x.verdicts & present, present)
    rewards = rewards + reference.overlong(x.completion_mask.sum(axis=-1), 4, 2)
    weights, _ = reference.spread_weights(x.model_scores, present)
    expected = reference.estimate("dapo", rewards, x) * (weights * reference.value_scale(x.values))[:, None]
    np.testing.assert_allclose(run(method, [x])[0], expected, rtol=3e-5, atol=3e-6)


ORDERS = [parts for parts in SOUND if len(parts) > 1]


@pytest.mark.parametrize("parts", ORDERS, ids=named)
def test_the_order_of_names_does_not_matter(parts):
    for base in ("grpo", "rloo", "remax"):
        ways = [
            methods.stack(*order, base=base, **AT_ONCE if "laser" in parts else {})
            for order in itertools.permutations(parts)
        ]
        first = run(ways[0], BATCHES)
        for other in ways[1:]:
            np.testing.assert_allclose(run(other, BATCHES), first, rtol=1e-6, atol=1e-7)
            assert (other.loss, other.signals, other.dynamic_sampling) == (
                ways[0].loss,
                ways[0].signals,
                ways[0].dynamic_sampling,
            )


@pytest.mark.parametrize("parts", ORDERS, ids=named)
def test_the_order_of_names_does_not_choose_the_base(parts):
    bases = {methods.keywords("+".join(order))["base"] for order in itertools.permutations(parts)}
    assert len(bases) == 1


def test_a_stack_can_be_written_as_a_name():
    written = methods.create("hero+rlev+progrpo", base="rloo", hero={"alpha": 0.1}, rlev={"alpha": 3.0}, clip_high=0.4)
    stacked = methods.stack(
        "hero", "rlev", "progrpo", base="rloo", hero={"alpha": 0.1}, rlev={"alpha": 3.0}, clip_high=0.4
    )
    np.testing.assert_array_equal(run(written, BATCHES), run(stacked, BATCHES))
    assert written.loss == stacked.loss and written.name == stacked.name == "hero+rlev+progrpo"
    assert methods.create("rlev", base="rloo", alpha=2.0).name == "rlev"
    one = methods.stack("rlev", base="rloo", rlev={"alpha": 2.0}, clip_high=0.4)
    np.testing.assert_array_equal(run(one, BATCHES), run(methods.create("rlev", base="rloo", alpha=2.0), BATCHES))
    assert one.loss.clip_high == 0.4


def test_options_reach_the_part_they_are_for():
    """Three parts have a parameter alpha, and two have eps."""
    options = dict(
        hero=dict(alpha=0.2, beta=0.1, strata_eps=0.5, w_min=0.8, w_max=3.0, k=2.0, momentum=0.5),
        rlev=dict(alpha=4.0, clip=0.7),
        progrpo=dict(alpha=0.9, skip_all_correct=True),
        laser=dict(tau=0.4, min_std=0.2, **AT_ONCE["laser"], alpha=0.6, beta_v=0.2, reference="exact", token="<z>"),
    )
    method = methods.stack(
        "hero", "rlev", "progrpo", "laser", base="dapo", eps=0.1, clip_low=0.15, clip_high=0.35, **options
    )
    assert (method.loss.clip_low, method.loss.clip_high) == (0.15, 0.35)
    assert method.loss.find("self_reward") == methods.SelfReward(
        coefficient=0.6, beta=0.2, warmup_steps=0, reference="exact", token="<z>"
    )
    of_chain = {name: dict(inner) for name, inner in options.items()}
    of_chain["laser"] = dict(tau=0.4, min_std=0.2)
    mean = None
    for x, got in zip(BATCHES, run(method, BATCHES)):
        expected, mean = reference.compose("dapo", tuple(options), x, mean=mean, base_options={"eps": 0.1}, **of_chain)
        np.testing.assert_allclose(got, expected, rtol=3e-5, atol=3e-6)


def test_keywords_of_a_stack():
    known = methods.keywords("hero+rlev", base="gspo")
    assert known["hero"]["weight_on"] == "" and known["rlev"] == dict(alpha=10.0, clip=1.0, scale_on="")
    assert known["base"] == "gspo" and known["clip_low"] == 3e-4
    assert methods.keywords("hero", base="dapo")["overlong_max_length"] == 0
    assert methods.keywords("rlev")["base"] == "reinforce_pp" and methods.keywords("genre2")["base"] == "remax"


# -- errors ----------------------------------------------------------------------------------------


@every_base
@pytest.mark.parametrize("parts", UNSOUND, ids=named)
def test_a_reward_without_verdicts_raises_with_a_method_that_needs_them(parts, base):
    for order in (parts, parts[::-1]):
        judge = next(name for name in order if name in JUDGES)
        message = (
            f"contradicts itself: {judge} needs verdicts .correct or incorrect., and the reward of genre2 is a distance"
        )
        with pytest.raises(ValueError, match=message):
            methods.stack(*order, base=base)


@pytest.mark.parametrize("parts", [("genre2",), ("genre2", "rlev")], ids=named)
def test_dynamic_sampling_raises_with_a_reward_without_verdicts(parts):
    with pytest.raises(
        ValueError, match="dapo keeps groups with both correct and incorrect .* set dynamic_sampling to False"
    ):
        methods.stack(*parts, base="dapo")
    assert not methods.stack(*parts, base="dapo", dynamic_sampling=False).dynamic_sampling


@pytest.mark.parametrize("base", reference.DIVIDES)
@pytest.mark.parametrize("name, option", [("hero", "weight_on"), ("rlev", "scale_on")])
def test_a_weight_that_the_group_std_would_cancel_raises(name, option, base):
    message = (
        f"{name}: a weight on a prompt's rewards cancels when {base} divides them by the standard deviation .* {option}"
    )
    with pytest.raises(ValueError, match=message):
        methods.create(name, base=base, **{option: "reward"})
    with pytest.raises(ValueError, match=message):
        methods.stack("progrpo", name, base=base, **{name: {option: "reward"}})


@pytest.mark.parametrize("base", reference.DIVIDES)
def test_the_group_std_cancels_a_weight_of_rewards(base):
    x = BATCHES[0]
    plain = reference.estimate(base, x.rewards.astype(np.float64), x)
    weighted = reference.estimate(base, x.rewards * np.array([[1.0], [1.2], [1.5], [2.0]]), x)
    np.testing.assert_allclose(weighted, plain, atol=1e-5)
    assert np.abs(plain).max() > 0.5


@pytest.mark.parametrize("name, option", [("hero", "weight_on"), ("rlev", "scale_on")])
def test_a_weight_that_the_greedy_reward_does_not_have_raises(name, option):
    with pytest.raises(
        ValueError, match=f"{name}: remax compares rewards with the greedy completion's.*{option} to 'advantage'"
    ):
        methods.create(name, base="remax", **{option: "reward"})


@pytest.mark.parametrize(
    "build, message",
    [
        (lambda: methods.stack("hero", "hero"), "names a method twice; each acts once"),
        (lambda: methods.stack("rlev", "hero", "rlev"), "names a method twice"),
        (
            lambda: methods.stack("hero", "grpo"),
            "no method 'grpo' to stack. It is an estimator: give it as base='grpo'",
        ),
        (lambda: methods.create("rloo+hero"), "It is an estimator: give it as base='rloo'"),
        (lambda: methods.stack("grpo", base="rloo"), "grpo"),
        (lambda: methods.stack("hero", base="rlev"), "method.base is 'rlev' .a base must be an estimator; use stack"),
        (lambda: methods.create("hero", base="laser"), "a base must be an estimator; use stack"),
        (lambda: methods.create("hero", base="gpro"), "method.base is 'gpro' .unknown.. Did you mean .*'grpo'"),
        (lambda: methods.create("hero", base=3), "method.base is 3; it must be the name of an estimator"),
        (lambda: methods.create("grpo", base="rloo"), "'grpo' has no parameter 'base'"),
        (lambda: methods.create("heor"), "no method 'heor'. Did you mean .*'hero'"),
        (lambda: methods.stack("hero", "pro_grpo"), "no method 'pro_grpo' to stack. Did you mean .*'progrpo'"),
        (lambda: methods.create("hero+"), "no method '' to stack"),
        (lambda: methods.stack(), "needs at least one method; for a bare estimator use create"),
        (
            lambda: methods.create("hero", weigth_on="reward"),
            "'hero' has no parameter 'weigth_on'. Did you mean 'weight_on'",
        ),
        (lambda: methods.create("hero", clip_hihg=0.3), "Did you mean 'clip_high'"),
        (lambda: methods.stack("hero", "rlev", alpha=0.1), "'hero.rlev' has no parameter 'alpha'"),
        (
            lambda: methods.stack("hero", "rlev", hero={"alhpa": 0.1}),
            "Method 'hero' has no parameter 'alhpa'. Did you mean 'alpha'",
        ),
        (lambda: methods.stack("hero", "rlev", laser={"tau": 0.1}), "'hero.rlev' has no parameter 'laser'"),
        (lambda: methods.stack("hero", "rlev", hero=0.1), "method.hero is 0.1; it must be a dict of hero's parameters"),
        (lambda: methods.stack("hero", "rlev", base="remax", clip_low=0.1), "has no parameter 'clip_low'"),
        (lambda: methods.stack("hero", hero=0.1), "method.hero is 0.1; it must be a dict of hero's parameters"),
        (lambda: methods.stack("hero", hero={"alhpa": 0.1}), "has no parameter 'alhpa'. Did you mean 'alpha'"),
    ],
)
def test_the_error_names_the_mistake(build, message):
    with pytest.raises(ValueError, match=message):
        build()


# -- registration ----------------------------------------------------------------------------------


@pytest.fixture
def registry(monkeypatch):
    """Restores the registered methods after a test."""
    monkeypatch.setattr(methods.registry, "_ESTIMATORS", dict(methods.registry._ESTIMATORS))
    monkeypatch.setattr(methods.registry, "_EXTENSIONS", dict(methods.registry._EXTENSIONS))


def test_an_extension_is_added_in_a_few_lines_and_stacks(registry):
    @methods.register_extension(base="dr_grpo")
    def doubled(estimator, *, factor: float = 2.0):
        """Multiplies the advantages of an estimator that does not divide."""
        if estimator.divides_by_group_std:
            raise ValueError("doubled needs an estimator that does not divide.")
        return methods.Extension(scale_advantage=stateless(lambda adv, inputs: factor * adv))

    assert methods.names()[-1] == "doubled" and methods.keywords("doubled")["base"] == "dr_grpo"
    plain, twice = methods.create("dr_grpo"), methods.create("doubled", factor=3.0)
    np.testing.assert_allclose(run(twice, BATCHES), 3 * np.array(run(plain, BATCHES)), rtol=1e-6)
    both = methods.stack("progrpo", "doubled", base="rloo")  # scale_advantage, then add
    expected, _ = reference.compose("rloo", (), BATCHES[0])
    there = ~np.isnan(BATCHES[0].rewards)
    x = BATCHES[0]
    correct = x.verdicts & there
    expected = reference.reweighted(2 * expected, x.prompt_confidence, x.answer_confidence, correct, there)
    np.testing.assert_allclose(run(both, [x])[0], np.where(there, expected, 0), rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="needs an estimator that does not divide"):
        methods.stack("doubled", base="grpo")


def test_a_default_that_the_base_does_not_have_is_refused(registry):
    @methods.register_extension(base="grpo", clip_hihg=0.3)
    def plain(estimator):
        return methods.Extension()

    with pytest.raises(ValueError, match="Method 'grpo' has no parameter 'clip_hihg'. Did you mean 'clip_high'"):
        methods.create("plain")


def test_a_factory_that_cannot_be_configured_is_not_registered(registry):
    def hero(estimator, *, x=1.0):
        return methods.Extension()

    def grpo(estimator, *, x=1.0):
        return methods.Extension()

    def positional(estimator, x=1.0):
        return methods.Extension()

    for factory, message in ((hero, "'hero' is registered already"), (grpo, "'grpo' is registered already")):
        with pytest.raises(ValueError, match=message):
            methods.register_extension(base="grpo")(factory)
    with pytest.raises(ValueError, match="'hero' is registered already"):
        methods.register(hero)
    with pytest.raises(TypeError, match="parameter 'x' must be keyword-only and have a default"):
        methods.register_extension(base="grpo")(positional)
    assert (
        methods.names() == (*methods.registry._ESTIMATORS, *methods.registry._EXTENSIONS)
        and "positional" not in methods.names()
    )


# -- a whole update --------------------------------------------------------------------------------

S, V, PROBE = 3, 11, 9
CONFIG = ModelConfig(
    vocab_size=V, width=8, layers=1, heads=2, kv_heads=1, mlp_width=8, head_dim=4, tied_embedding=False
)
PARAMS = reference_decoder.random_params(CONFIG, scale=0.4)
OPTIMIZER = optax.sgd(0.1)
# These programs run a few times. Their optimization would take half of the time of compilation.
jit_once = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def scored_groups(greedy):
    """Returns off-policy groups as the training loop has them, with every signal."""
    rng = np.random.default_rng(0)
    x, G1 = BATCHES[0], G + greedy
    lengths = rng.integers(1, T + 1, (P, G1))
    mask = np.arange(T) < lengths[..., None]
    logprobs = np.where(mask, -rng.uniform(0.5, 3, mask.shape), 0).astype(np.float32)
    truncated = (lengths == T) & (rng.random((P, G1)) < 0.5)
    prompt_mask = np.arange(S) >= np.array([[0], [1], [2], [0]])
    rollout = Rollout(
        rng.integers(0, V, (P, S)),
        prompt_mask,
        rng.integers(0, V, (P, G1, T)),
        mask,
        logprobs,
        truncated,
        prompt_logprobs=np.where(prompt_mask, -rng.uniform(0.5, 3, (P, S)), 0).astype(np.float32),
        probe_logprobs=np.where(truncated, 0, -rng.uniform(13, 25, (P, G1))).astype(np.float32),
    )
    wide = lambda v: np.concatenate([v, x.greedy_rewards[:, None]], axis=1)[:, :G1]
    rewards = {"right": wide(x.rewards), "reward_model": wide(x.model_scores)}
    groups = Groups(rollout, rewards, {"values": x.values, "digits": rng.integers(0, V, (P, T))})
    return jax.tree.map(jnp.asarray, groups)


@functools.cache
def update_program(loss, expert):
    probe = PROBE if loss.find("self_reward") else None
    return jit_once(learner.make_update(CONFIG, learner.UpdateOptions(loss=loss, probe_token=probe), OPTIMIZER))


def one_update(parts, base):
    options = {name: AT_ONCE[name] for name in parts if name in AT_ONCE}
    if "genre2" in parts:
        options["genre2"] = {"expert_coefficient": 0.05}
    method = methods.stack(*parts, base=base, **options, **needed_options(parts, base))
    checking = stateless(lambda adv, inputs: check_fields(inputs) or adv)
    method = dataclasses.replace(method, advantage=chain(checking, method.advantage))
    groups = scored_groups(greedy="greedy_rewards" in method.signals)
    expert = (lambda tokens, digits: jnp.broadcast_to(digits, tokens.shape)) if "genre2" in parts else None
    weights = {"right": 1.0, "reward_model": 0.0}
    options = dict(method=method, weights=weights, verdict="right", mask_truncated=False, expert=expert)
    start = method.advantage.init()
    batch, advantage_state, metrics = make_experience(groups, start, None, jnp.float32(-23.0), **options)
    opt_state = optimizers.init_opt_state(OPTIMIZER, PARAMS)
    state = TrainState(jnp.int32(0), PARAMS, {}, opt_state, advantage_state, jnp.int32(0))
    batch = batch._replace(old_logprobs=batch.rollout.logprobs)
    state, learnt, _ = update_program(method.loss, expert is not None)(
        state, batch, jnp.float32(1.0), jax.random.key(0)
    )
    return state, {k: float(v) for k, v in (metrics | learnt).items()}, batch


FAST = ("grpo", "gspo", "rloo")
SOME = dict(  # each pair and each base once; the bases of FAST are in the default tier, and all others are slow
    grpo=("hero", "laser"),
    dr_grpo=("rlev", "progrpo"),
    dapo=("hero", "progrpo"),
    gspo=("laser", "rlev"),
    cispo=("hero", "rlev"),
    rloo=("hero", "laser", "rlev", "progrpo"),
    reinforce_pp=("laser", "progrpo"),
    reinforce_pp_baseline=("hero", "rlev", "progrpo"),
    remax=("genre2", "rlev"),
)


def marks_of(parts, base):
    return () if SOME[base] == parts and base in FAST else pytest.mark.slow


@pytest.mark.runs
@pytest.mark.parametrize(
    "parts, base",
    [
        pytest.param(parts, base, id=f"{named(parts)}-{base}", marks=marks_of(parts, base))
        for parts in SOUND
        for base in reference.ESTIMATORS
    ],
)
def test_every_sound_stack_updates_a_transformer(parts, base):
    state, metrics, batch = one_update(parts, base)
    assert np.isfinite(metrics["loss"]) and np.isfinite(metrics["grad_norm"]) and metrics["grad_norm"] > 1e-3
    assert metrics["skipped_update_ratio"] == 0
    moved = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), state.params, PARAMS)
    assert moved["head"] > 1e-5 and moved["embedding"] > 1e-5 and all(np.isfinite(x) for x in jax.tree.leaves(moved))
    assert ("self_reward/loss" in metrics) == ("laser" in parts) == ("self_reward/f1" in metrics)
    assert ("expert/loss" in metrics) == ("genre2" in parts)
    assert ("hero/score_spread" in metrics) == ("hero" in parts)
    assert ("rlev/h_acc" in metrics) == ("rlev" in parts)
    assert ("progrpo/answer_confidence" in metrics) == ("progrpo" in parts)
    assert batch.advantages.shape == (P, G) and np.isfinite(batch.advantages).all()

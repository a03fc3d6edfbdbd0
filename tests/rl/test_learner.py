"""Tests the update against the float64 reference: its loss, its gradient, and settings that must not change them."""

import dataclasses
import functools

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from helpers import reference_decoder as reference
from helpers.shapes import check_fields
from jaxrl_reason import losses
from jaxrl_reason.methods import PolicyLoss
from jaxrl_reason.models import ModelConfig
from jaxrl_reason.models.decoding.rollout import generate
from jaxrl_reason.rl import learner, scoring
from jaxrl_reason.rl import optimizer as optimizers
from jaxrl_reason.rl.learner import UpdateOptions
from jaxrl_reason.rl.types import Experience, Rollout, TrainState

pytestmark = pytest.mark.usefixtures("quick_compilation")

P, G, S, T, V = 4, 3, 4, 5, 23
CONFIG = ModelConfig(
    vocab_size=V,
    width=16,
    layers=2,
    heads=4,
    kv_heads=2,
    mlp_width=16,
    head_dim=4,
    tied_embedding=False,
    sliding_window=4,
    sliding_period=2,
)
PARAMS = reference.random_params(CONFIG, scale=0.25)
OTHER = jax.tree.map(lambda a, b: 0.9 * a + 0.1 * b, PARAMS, reference.random_params(CONFIG, seed=1, scale=0.25))
RNG = np.random.default_rng(0)
PROMPTS = RNG.integers(0, 10, (P, S)).astype(np.int32)  # prompts and completions share no token
PROMPT_MASK = np.arange(S) >= np.array([[0], [2], [3], [1]])
TOKENS = RNG.integers(10, V, (P, G, T)).astype(np.int32)
LENGTHS = np.array([[1, 5, 3], [2, 2, 5], [5, 1, 4], [3, 5, 1]])
MASK = np.arange(T) < LENGTHS[..., None]
ADVANTAGES = RNG.normal(size=(P, G)).astype(np.float32)
LEGAL = RNG.random((T, V)) < 0.5
LEGAL[np.arange(T), TOKENS] = True
HOT = 1.3

PPO = UpdateOptions(loss=PolicyLoss(clip_low=0.2, clip_high=0.28))
FULL = dataclasses.replace(PPO, kl_coefficient=0.5, kl_kind="k2", entropy_coefficient=0.2)

# These programs run a few times. Their optimization would take half of the time of compilation.
jit_once = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def reference_law(params=PARAMS, temperature=HOT, legal=LEGAL, tokens=TOKENS):
    logits = reference.completion_logits(CONFIG, reference.float64(params), PROMPTS, PROMPT_MASK, tokens)
    return reference.sampling_logprobs(logits, temperature, legal)


def chosen(law, tokens=TOKENS):
    return np.take_along_axis(law, tokens[..., None].astype(int), axis=-1)[..., 0]


def entropy_of(law):
    return -(np.exp(law) * np.where(np.isfinite(law), law, 0.0)).sum(axis=-1)


NOW = chosen(reference_law())
OLD = (NOW + 0.3 * RNG.normal(size=NOW.shape)).astype(np.float32)
REF = chosen(reference_law(OTHER)).astype(np.float32)


def per_token(advantages):
    return np.broadcast_to(advantages[..., None], MASK.shape)


def experience(mask=MASK, **fields):
    """Returns an off-policy batch with a reference. Masked log-probabilities are far from their true values."""
    spoil = lambda x: np.where(mask, x, np.float32(5))
    rollout = Rollout(PROMPTS, PROMPT_MASK, TOKENS, MASK, spoil(NOW.astype(np.float32)), ~MASK.any(axis=-1))
    batch = dict(
        rollout=rollout, mask=mask, advantages=per_token(ADVANTAGES), old_logprobs=spoil(OLD), ref_logprobs=spoil(REF)
    )
    return jax.tree.map(jnp.asarray, Experience(**(batch | fields)))


SGD = optax.inject_hyperparams(optax.sgd)(learning_rate=1.0)  # one program serves all rates


@functools.cache
def program(options, optimizer, config=CONFIG):
    """Returns the program of the update. Legal tokens are an argument, so that one program serves all masks."""
    return jit_once(lambda legal, *args: learner.make_update(config, options, optimizer, legal)(*args))


def update(
    batch, options=FULL, optimizer=SGD, params=PARAMS, temperature=HOT, config=CONFIG, key=0, rate=1.0, legal=LEGAL
):
    opt_state = optimizers.init_opt_state(optimizer, params)
    if optimizer is SGD:
        opt_state.hyperparams["learning_rate"] = jnp.float32(rate)
    state = TrainState(jnp.int32(3), params, {}, opt_state, (), jnp.int32(9))
    run = program(options, optimizer, config)
    state, metrics, mismatch = run(legal, state, batch, jnp.float32(temperature), jax.random.key(key))
    check_fields(mismatch)
    check_fields(state)
    assert (int(state.step), int(state.data_position)) == (4, 9)
    return state, {name: float(value) for name, value in metrics.items()}


def moved(state, params=PARAMS):
    """Returns the change of the weights, which is minus the gradient after SGD at rate 1."""
    return jax.tree.map(lambda a, b: np.asarray(a, np.float64) - np.asarray(b, np.float64), state.params, params)


def norm(tree):
    return np.linalg.norm(jax.flatten_util.ravel_pytree(jax.tree.map(np.asarray, tree))[0])


def assert_same(a, b, atol=1e-6):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=atol, rtol=1e-5), a, b)


# -- the loss and its gradient ---------------------------------------------------------------------------------------


def reference_loss(params, mask=MASK, options=FULL):
    """Computes the token mean of PPO + 0.5 k2 - 0.2 entropy in float64, token by token."""
    law = reference_law(params)
    total = 0.0
    for p, g, t in np.argwhere(mask):
        logp, advantage = law[p, g, t, TOKENS[p, g, t]], ADVANTAGES[p, g]
        rho = np.exp(logp - OLD[p, g, t])
        total += max(-advantage * rho, -advantage * min(max(rho, 0.8), 1.28))
        total += options.kl_coefficient * (logp - REF[p, g, t]) ** 2 / 2
        total -= options.entropy_coefficient * entropy_of(law[p, g, t])
    return total / mask.sum()


def test_loss_and_metrics_equal_the_references():
    _, metrics = update(experience())
    law = reference_law()
    rho, sign = np.exp(NOW - OLD), np.sign(ADVANTAGES)[..., None]
    want = {
        "loss": reference_loss(PARAMS),
        "entropy": entropy_of(law)[MASK].mean(),
        "kl": ((NOW - REF) ** 2 / 2)[MASK].mean(),
        "clip_ratio/low_mean": ((rho < 0.8) & (sign < 0))[MASK].mean(),
        "clip_ratio/high_mean": ((rho > 1.28) & (sign > 0))[MASK].mean(),
        "nonfinite_completions": 0.0,
    }
    for name, value in want.items():
        assert metrics[name] == pytest.approx(value, abs=2e-5), name
    assert want["clip_ratio/low_mean"] > 0 and want["clip_ratio/high_mean"] > 0
    assert metrics["sampling/logp_difference_max"] < 5e-5


@pytest.mark.parametrize("places", ["all", "first", "last"])
def test_gradient_equals_finite_differences_of_the_reference(places):
    mask = {"all": MASK, "first": MASK & (np.arange(T) == 0), "last": MASK & (np.arange(T) == T - 1)}[places]
    state, metrics = update(experience(mask=mask))
    grads = jax.tree.map(np.negative, moved(state))
    assert metrics["grad_norm"] == pytest.approx(norm(grads), rel=1e-4)
    params = reference.float64(PARAMS)
    rng = np.random.default_rng(1)
    for _ in range(4):
        direction = jax.tree.map(lambda x: rng.normal(size=x.shape), params)
        at = lambda eps: reference_loss(jax.tree.map(lambda x, d: x + eps * d, params, direction), mask)
        along = sum((g * d).sum() for g, d in zip(jax.tree.leaves(grads), jax.tree.leaves(direction), strict=True))
        assert along == pytest.approx((at(1e-6) - at(-1e-6)) / 2e-6, abs=1e-3 * float(norm(grads)))


def test_each_completion_token_is_predicted_from_what_stands_before_it():
    """The head is another matrix than the embedding, so rows with a gradient belong to tokens that were read."""
    for t in range(T):
        mask = MASK & (np.arange(T) == t)
        state, _ = update(experience(mask=mask))
        touched = set(np.flatnonzero(np.abs(moved(state)["embedding"]).max(axis=1)))
        rows = np.argwhere(mask.any(axis=-1))
        read = {int(x) for p, g in rows for x in [*PROMPTS[p, PROMPT_MASK[p]], *TOKENS[p, g, :t]]}
        assert touched <= read
        # One layer slides, and the other one is global and sees all tokens.
        assert touched == read, t


@pytest.mark.runs
@pytest.mark.parametrize("kind", ["k3", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("k1", "k2"))])
def test_kl_is_measured_by_its_kind_and_pulls_towards_the_reference(kind):
    options = UpdateOptions(loss=PolicyLoss(), kl_coefficient=1.0, kl_kind=kind)
    still = np.zeros((P, G, T), np.float32)
    batch = experience(advantages=still)
    state, metrics = update(batch, options, rate=0.1)
    d = (NOW - REF)[MASK]
    assert metrics["kl"] == pytest.approx({"k1": d, "k2": d * d / 2, "k3": np.exp(-d) - 1 + d}[kind].mean(), abs=2e-5)
    after = chosen(reference_law(state.params))
    assert (after - REF)[MASK].std() < (NOW - REF)[MASK].std()
    assert ((after - REF) ** 2)[MASK].mean() < 0.95 * ((NOW - REF) ** 2)[MASK].mean()
    # A reference that equals the policy does not pull it.
    own = scores(PARAMS, batch)
    state, metrics = update(experience(advantages=still, ref_logprobs=own), options, rate=0.1)
    assert norm(moved(state)) < 1e-6 and metrics["kl"] == pytest.approx(0, abs=1e-6)


@functools.cache
def score_program(parts, chunk):
    return jit_once(functools.partial(scoring.score, CONFIG, microbatches=parts, chunk=chunk))


def scores(params, batch, parts=1, chunk=0, legal=LEGAL):
    return np.asarray(score_program(parts, chunk)(params, batch.rollout, jnp.float32(HOT), legal).logprobs)


@pytest.mark.slow
def test_a_coefficient_of_zero_reports_the_kl_and_leaves_the_loss():
    with_ref, metrics = update(experience(), PPO)
    without, other = update(experience(ref_logprobs=None), PPO)
    assert metrics["kl"] > 0.01 and "kl" not in other
    assert metrics["loss"] == pytest.approx(other["loss"], abs=1e-6)
    assert_same(with_ref.params, without.params)


@pytest.mark.runs
@pytest.mark.parametrize("several", [False, True])
def test_a_sampler_of_another_law_is_corrected_by_capped_weights(several):
    """Each advantage is multiplied by min(p / p_sampled, cap), with p of the policy before the update."""
    sampled = np.where(MASK, NOW + np.where(np.arange(T) % 2, 0.4, -0.9), 5).astype(np.float32)  # as if rounded
    batch = experience(old_logprobs=NOW.astype(np.float32) if several else None, ref_logprobs=None)
    batch = batch._replace(rollout=batch.rollout._replace(logprobs=jnp.asarray(sampled)))
    options = dataclasses.replace(PPO, importance_cap=2.0)
    state, metrics = update(batch, options)
    weights = np.where(MASK, np.minimum(np.exp(NOW - sampled), 2.0), 0.0)
    expected, _ = update(
        experience(
            advantages=jnp.asarray(per_token(ADVANTAGES) * weights, jnp.float32), old_logprobs=None, ref_logprobs=None
        ),
        PPO,
    )
    assert_same(state.params, expected.params)
    even = (np.arange(T) % 2 == 0) & MASK
    assert metrics["sampling/importance_capped_ratio"] == pytest.approx(even.sum() / MASK.sum(), rel=1e-5)
    true = np.exp(np.where(even, 0.9, -0.4))[MASK].mean()  # before the cap
    assert metrics["sampling/importance_weight_mean"] == pytest.approx(true, rel=1e-4)
    difference = np.where(even, 0.9, 0.4)[MASK].mean()
    assert metrics["sampling/logp_difference_mean"] == pytest.approx(difference, rel=1e-4)
    assert metrics["sampling/logp_difference_max"] == pytest.approx(0.9, rel=1e-4)


def test_a_float32_master_adds_up_what_bfloat16_cannot_hold():
    adam = optax.adam(1e-4)
    params = {"w": jnp.asarray([1.0, -2.0, 0.01], jnp.bfloat16)}
    runs = {}
    for name, optimizer in (("plain", adam), ("master", optimizers.with_float32_master(adam))):
        weights, state = params, optimizers.init_opt_state(optimizer, params)
        for i in range(50):
            gradient = {"w": jnp.asarray([1.0, -1.0, (-1.0) ** i])}
            weights, state, _, _ = optimizers.apply_gradients(optimizer, weights, state, gradient, 0.0)
        runs[name] = weights["w"], state
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), params)
    state = adam.init(wide)
    for i in range(50):
        updates, state = adam.update({"w": jnp.asarray([1.0, -1.0, (-1.0) ** i])}, state, wide)
        wide = optax.apply_updates(wide, updates)
    assert runs["plain"][0][0] == 1.0  # every step was rounded away
    np.testing.assert_allclose(wide["w"][:2], [0.995, -1.995], atol=1e-4)
    np.testing.assert_array_equal(runs["master"][0], wide["w"].astype(jnp.bfloat16))
    np.testing.assert_allclose(runs["master"][1].master["w"], wide["w"], atol=1e-7)
    assert runs["master"][0].dtype == jnp.bfloat16 and runs["master"][1].master["w"].dtype == jnp.float32


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("loss, gradient", [(0.0, np.nan), (0.0, np.inf), (0.0, 3e38), (np.nan, 1.0), (-np.inf, 1.0)])
def test_what_is_not_finite_reaches_neither_weights_nor_moments(loss, gradient, dtype):
    adam = optax.adam(0.1)
    for optimizer in (adam, optimizers.with_float32_master(adam)):
        params = {"v": jnp.ones(2, dtype), "w": jnp.asarray([1.0, -2.0, 0.01], dtype)}
        good = {"v": jnp.ones(2), "w": jnp.ones(3)}
        state = optimizers.init_opt_state(optimizer, params)
        params, state, _, applied = optimizers.apply_gradients(optimizer, params, state, good, 1.0)
        assert applied and params["v"][0] != 1
        bad = good | {"w": jnp.asarray([1.0, gradient, 1.0])}
        new, new_state, norm, applied = optimizers.apply_gradients(optimizer, params, state, bad, loss)
        assert not applied and np.isfinite(norm) == (gradient == 1.0)
        jax.tree.map(np.testing.assert_array_equal, (new, new_state), (params, state))


# -- settings and values without effect ------------------------------------------------------------------------------


@functools.cache
def baseline():
    return update(experience())


@pytest.mark.runs
@pytest.mark.parametrize(
    "changes",
    [
        dict(accumulation=2, logprob_chunk=2),
        *(
            pytest.param(c, marks=pytest.mark.slow)
            for c in (
                dict(lengths=2, wave_tokens=2 * T),
                dict(accumulation=2),
                dict(accumulation=4),
                dict(logprob_chunk=1),
                dict(logprob_chunk=2),
                dict(logprob_chunk=T),
            )
        ),
    ],
    ids=lambda c: "-".join(f"{k}{v}" for k, v in c.items()),
)
def test_accumulation_and_chunks_change_neither_update_nor_metrics(changes):
    state, metrics = baseline()
    other, other_metrics = update(experience(), dataclasses.replace(FULL, **changes))
    assert_same(other.params, state.params)
    assert metrics.keys() == other_metrics.keys()
    for name, value in metrics.items():
        assert other_metrics[name] == pytest.approx(value, abs=2e-6, rel=2e-6), name


def largest(jaxpr, last):
    """Returns the size of the largest array with the last dimension `last` in a program and its loops."""
    sizes = [0]
    for eqn in jaxpr.eqns:
        sizes += [v.aval.size for v in eqn.outvars if v.aval.shape[-1:] == (last,)]
        for inner in jax.tree.leaves(list(eqn.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
            inner = getattr(inner, "jaxpr", inner)
            sizes += [largest(inner, last)] if hasattr(inner, "eqns") else []
    return max(sizes)


def test_the_logits_of_an_update_are_never_held_whole(monkeypatch):
    monkeypatch.setattr(scoring, "_CHUNK_ENTRIES", P * G * 3 * V)
    state = TrainState(jnp.int32(3), PARAMS, {}, optimizers.init_opt_state(SGD, PARAMS), (), jnp.int32(9))

    def held(chunk):
        run = learner.make_update(CONFIG, dataclasses.replace(FULL, logprob_chunk=chunk), SGD, LEGAL)
        return largest(jax.make_jaxpr(run)(state, experience(), jnp.float32(HOT), jax.random.key(0)).jaxpr, V)

    assert held(T) == P * G * T * V
    assert held(0) == P * G * 3 * V
    assert held(2) == P * G * 2 * V


@pytest.mark.parametrize(
    "loss",
    [
        pytest.param(PolicyLoss(aggregation="sequence_mean", ratio="sequence"), id="gspo", marks=pytest.mark.slow),
        pytest.param(PolicyLoss(aggregation="constant"), id="dr_grpo", marks=pytest.mark.slow),
        pytest.param(
            PolicyLoss(aggregation="constant", constant=7.0, ratio="cispo"), id="cispo", marks=pytest.mark.slow
        ),
    ],
)
def test_accumulation_keeps_every_denominator_global(loss):
    batch = experience(mask=MASK & (np.arange(P) != 2)[:, None, None])  # one prompt is left out entirely
    one, metrics = update(batch, dataclasses.replace(FULL, loss=loss))
    four, four_metrics = update(batch, dataclasses.replace(FULL, loss=loss, accumulation=4))
    assert_same(four.params, one.params)
    assert four_metrics["loss"] == pytest.approx(metrics["loss"], abs=2e-6)
    assert norm(moved(one)) > 1e-2


@pytest.mark.parametrize("junk", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("field", ["old_logprobs", "ref_logprobs", "advantages", "sampler"])
def test_masked_positions_may_hold_anything(field, junk):
    batch = experience(advantages=np.where(MASK, ADVANTAGES[..., None], np.float32(0)))
    spoil = lambda x: jnp.where(MASK, x, jnp.float32(junk))
    if field == "sampler":
        spoilt = batch._replace(rollout=batch.rollout._replace(logprobs=spoil(batch.rollout.logprobs)))
    else:
        spoilt = batch._replace(**{field: spoil(getattr(batch, field))})
    (state, metrics), (other, other_metrics) = update(batch), update(spoilt)
    assert norm(moved(state)) > 0.01
    assert_same(other.params, state.params, atol=0)
    assert other_metrics == metrics


def test_pad_tokens_behind_the_end_may_be_illegal_and_are_of_no_account():
    tokens = np.where(MASK, TOKENS, 0)
    legal = LEGAL.copy()
    legal[..., 0] = False
    batch = experience()
    padded = batch._replace(rollout=batch.rollout._replace(tokens=jnp.asarray(tokens)))
    behind = scores(OTHER, padded, legal=legal)
    assert np.isneginf(behind[~MASK]).all()  # the reference policy gives -inf too
    other, other_metrics = update(padded._replace(ref_logprobs=jnp.where(MASK, REF, behind)), legal=legal)
    state, metrics = update(batch, legal=legal)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(other.params)), "the weights are NaN"
    assert_same(other.params, state.params)
    assert other_metrics["loss"] == pytest.approx(metrics["loss"], abs=1e-6)


def test_completions_left_out_count_in_no_denominator():
    out = MASK & (np.arange(G) != 1)[:, None]  # the middle completion of each group
    state, metrics = update(experience(mask=out))
    assert metrics["loss"] == pytest.approx(reference_loss(PARAMS, out), abs=2e-5)
    assert metrics["entropy"] == pytest.approx(entropy_of(reference_law())[out].mean(), abs=2e-5)


def test_with_everything_masked_nothing_moves():
    state, metrics = update(experience(mask=np.zeros_like(MASK)))
    assert_same(state.params, PARAMS, atol=0)
    assert all(np.isfinite(value) for value in metrics.values())
    assert metrics["loss"] == 0 and metrics["grad_norm"] == 0


@pytest.mark.parametrize("field", ["old_logprobs", "ref_logprobs"])
def test_a_live_nan_drops_its_completion_and_is_counted(field):
    values = np.array(getattr(experience(), field))
    values[1, 2, 3] = np.nan
    state, metrics = update(experience(**{field: values}))
    left_out = MASK.copy()
    left_out[1, 2] = False
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(state.params)), "the weights are NaN"
    assert metrics["nonfinite_completions"] == 1
    assert metrics["loss"] == pytest.approx(reference_loss(PARAMS, left_out), abs=2e-5)
    assert_same(state.params, update(experience(mask=left_out))[0].params)


def test_temperature_is_part_of_the_trained_law_and_compiles_nothing_new():
    state, metrics = baseline()
    programs = program(FULL, SGD)._cache_size()
    other, other_metrics = update(experience(), temperature=0.6)
    assert program(FULL, SGD)._cache_size() == programs
    assert other_metrics["entropy"] == pytest.approx(entropy_of(reference_law(temperature=0.6))[MASK].mean(), abs=5e-5)
    assert norm(jax.tree.map(np.subtract, moved(other), moved(state))) > 0.01


# -- on and off policy -----------------------------------------------------------------------------------------------


def test_on_policy_the_ratio_is_exactly_one():
    options = UpdateOptions(loss=PolicyLoss(clip_low=0.0, clip_high=0.0))  # clips every ratio that is not exactly 1
    run = jit_once(functools.partial(learner.loss_and_metrics, CONFIG, options))
    batch = experience(old_logprobs=None, advantages=ADVANTAGES)
    _, (metrics, *_) = run(PARAMS, batch, losses.totals(MASK), {}, jnp.float32(HOT), LEGAL)
    assert metrics["clip_ratio/region_mean"] == 0
    assert metrics["loss"] == pytest.approx(-(ADVANTAGES[..., None] * MASK).sum() / MASK.sum(), abs=1e-6)


@pytest.mark.slow
def test_old_logprobs_from_score_are_on_policy():
    batch = experience()
    one, _ = update(batch._replace(old_logprobs=scores(PARAMS, batch)), PPO)
    two, _ = update(batch._replace(old_logprobs=None), PPO)
    assert_same(one.params, two.params, atol=2e-6)


@pytest.mark.runs
def test_later_epochs_train_against_the_policy_that_sampled():
    batch = experience()
    batch = batch._replace(old_logprobs=scores(PARAMS, batch))
    epochs = dataclasses.replace(PPO, epochs=2)
    state, metrics = update(batch, epochs, rate=0.3)
    first, first_metrics = update(batch, PPO, rate=0.3)
    second, second_metrics = update(batch, PPO, rate=0.3, params=first.params)
    assert_same(state.params, second.params, atol=2e-6)
    assert first_metrics["clip_ratio/region_mean"] == 0 and second_metrics["clip_ratio/region_mean"] > 0
    assert metrics["clip_ratio/region_mean"] == pytest.approx(second_metrics["clip_ratio/region_mean"] / 2)
    assert metrics["sampling/logp_difference_max"] < 5e-5  # before the weights change
    on_policy, _ = update(batch._replace(old_logprobs=scores(first.params, batch)), PPO, rate=0.3, params=first.params)
    assert norm(jax.tree.map(np.subtract, moved(on_policy), moved(second))) > 0.01


@pytest.mark.slow
def test_minibatches_of_one_rollout_train_against_the_policy_that_sampled():
    batch = experience()
    batch = batch._replace(old_logprobs=scores(PARAMS, batch))
    state, metrics = update(batch, dataclasses.replace(PPO, minibatches=2), rate=1.0)
    assert metrics["clip_ratio/region_mean"] > 0


def test_several_updates_without_old_logprobs_are_refused():
    with pytest.raises((ValueError, AssertionError)):
        update(experience(old_logprobs=None, ref_logprobs=None), dataclasses.replace(PPO, epochs=2))


def test_metrics_of_minibatches_are_of_those_that_have_a_token():
    """Dynamic sampling fills one place of four: with a rate of 0, its metrics are those of one update."""
    batch = experience(mask=MASK & (np.arange(P) == 2)[:, None, None])
    _, once = update(batch, FULL, rate=0.0)
    _, several = update(batch, dataclasses.replace(FULL, minibatches=2), rate=0.0)
    assert once["entropy"] > 1
    for name in ("entropy", "kl", "loss", "sampling/logp_difference_max"):
        assert several[name] == pytest.approx(once[name], rel=1e-5), name


def test_minibatches_that_do_not_divide_the_prompts_are_refused():
    # 3 does not divide 4. Without an error there would be four updates of one prompt.
    with pytest.raises((ValueError, AssertionError)):
        update(experience(), dataclasses.replace(FULL, minibatches=3))


@functools.cache
def recorder(updates):
    """Returns an optimizer that records the gradients of the embedding and changes no weight."""

    def init(params):
        return jnp.int32(0), jnp.zeros((updates, *params["embedding"].shape))

    def record(grads, state, params=None):
        count, seen = state
        return jax.tree.map(jnp.zeros_like, grads), (count + 1, seen.at[count].set(grads["embedding"]))

    return optax.GradientTransformation(init, record)


@pytest.mark.runs
def test_minibatches_cover_each_prompt_once_an_epoch_in_an_order_from_the_key():
    epochs, minibatches = 3, 2
    options = dataclasses.replace(FULL, epochs=epochs, minibatches=minibatches)
    # Prompt p has only the token p, so gradients show which prompts took part.
    prompts = np.arange(P)[:, None].repeat(S, axis=1)
    batch = experience()
    batch = batch._replace(rollout=batch.rollout._replace(prompt_tokens=jnp.asarray(prompts)))

    def parts(key):
        state, _ = update(batch, options, recorder(epochs * minibatches), key=key)
        count, seen = state.opt_state
        assert count == epochs * minibatches
        rows = np.abs(np.asarray(seen))[:, :P].max(axis=-1) > 0
        return rows.reshape(epochs, minibatches, P)

    orders = [parts(key) for key in range(4)]
    for order in orders:
        assert (order.sum(axis=2) == P // minibatches).all() and (order.sum(axis=1) == 1).all()
    assert len({x.tobytes() for order in orders for x in order}) > 1, "every epoch of every key has one order"
    assert len({x.tobytes() for x in orders[0]} | {x.tobytes() for x in orders[1]}) > 1
    np.testing.assert_array_equal(parts(0), orders[0])


@pytest.mark.slow
def test_minibatches_of_several_microbatches_equal_minibatches_of_one():
    one, metrics = update(experience(), dataclasses.replace(FULL, minibatches=2), rate=0.1)
    two, other = update(experience(), dataclasses.replace(FULL, minibatches=2, accumulation=2), rate=0.1)
    assert_same(two.params, one.params)
    assert other["loss"] == pytest.approx(metrics["loss"], abs=2e-6)


# -- score and entropy -----------------------------------------------------------------------------------------------


def test_score_equals_the_reference_whatever_the_parts():
    batch = experience()
    whole = scores(PARAMS, batch)
    np.testing.assert_allclose(whole, NOW, atol=5e-5)
    np.testing.assert_allclose(scores(PARAMS, batch, parts=4, chunk=2), whole, atol=1e-6)


@pytest.mark.slow
def test_score_equals_the_sampler_whatever_the_parts():
    batch = experience()
    rollout = jit_once(functools.partial(generate, CONFIG, group_size=G, max_length=T, eos_ids=(3,), pad_id=0))(
        PARAMS, PROMPTS, PROMPT_MASK, jnp.arange(P), jax.random.key(0), temperature=jnp.float32(HOT), legal=LEGAL
    )
    mask = np.asarray(rollout.mask)
    for parts in (1, 2):
        scored = scores(PARAMS, batch._replace(rollout=rollout), parts)
        np.testing.assert_allclose(scored[mask], np.asarray(rollout.logprobs)[mask], atol=1e-5)


def test_entropy_is_that_of_the_law_that_samples():
    run = jit_once(functools.partial(scoring.compute_logprobs, CONFIG))
    batch = experience()
    found = run(PARAMS, batch.rollout, jnp.float32(0.7))  # another test has legal tokens
    check_fields(found)
    logprobs, entropy, *others = found
    assert others == [{}, None]
    law = reference_law(temperature=0.7, legal=None)
    np.testing.assert_allclose(logprobs, chosen(law), atol=5e-5)
    np.testing.assert_allclose(entropy, entropy_of(law), atol=5e-5)


@pytest.mark.runs
def test_the_sampling_difference_is_that_of_live_tokens():
    batch = experience()
    logprobs = np.array(batch.rollout.logprobs)
    logprobs[0, 1, 4] += 0.25
    batch = batch._replace(rollout=batch.rollout._replace(logprobs=jnp.asarray(logprobs)))
    for options in (FULL, dataclasses.replace(FULL, accumulation=4)):
        _, metrics = update(batch, options)
        assert metrics["sampling/logp_difference_max"] == pytest.approx(0.25, abs=1e-4)


@pytest.mark.runs
@pytest.mark.parametrize(
    "options",
    [
        pytest.param(FULL, marks=pytest.mark.slow),
        pytest.param(dataclasses.replace(FULL, accumulation=4), marks=pytest.mark.slow),
        dataclasses.replace(FULL, minibatches=2),
    ],
)
def test_the_worst_token_is_named_whatever_part_of_the_batch_it_is_in(options):
    """With minibatches, only the first one counts, because the weights change before the others."""
    state = TrainState(jnp.int32(3), PARAMS, {}, optimizers.init_opt_state(SGD, PARAMS), (), jnp.int32(9))
    run, found = program(options, SGD), set()
    for p, g in [(0, 1), (3, 2), (2, 0), (1, 1)]:
        t = LENGTHS[p, g] - 1
        batch = experience()
        logprobs = np.array(batch.rollout.logprobs)
        logprobs[p, g, t] += 0.25
        logprobs[~MASK] = 9.0  # padding belongs to no completion
        batch = batch._replace(rollout=batch.rollout._replace(logprobs=jnp.asarray(logprobs)))
        *_, worst = run(LEGAL, state, batch, jnp.float32(HOT), jax.random.key(0))
        if abs(worst.difference) > 0.1:
            assert worst.difference == pytest.approx(-0.25, abs=1e-4)
            assert (int(worst.prompt), int(worst.sample), int(worst.position)) == (p, g, t)
            found.add(p)
    assert len(found) == (2 if options.minibatches == 2 else 4)


# -- the optimizer ---------------------------------------------------------------------------------------------------


# Momentum gives the optimizer a state. The first step is the clipped gradient.
CLIPPED = optax.chain(optax.clip_by_global_norm(0.5), optax.trace(0.9), optax.scale(-1.0))


@pytest.mark.runs
@pytest.mark.parametrize("dtype", ["bfloat16", pytest.param("float32", marks=pytest.mark.slow)])
def test_clipping_bounds_the_update_that_is_applied_and_the_optimizer_state_is_float32(dtype):
    config = dataclasses.replace(CONFIG, param_dtype=dtype)
    params = jax.tree.map(lambda x: x.astype(dtype), PARAMS)
    batch = experience(advantages=1e3 * per_token(ADVANTAGES))
    state, metrics = update(batch, optimizer=CLIPPED, params=params, config=config)
    assert {str(x.dtype) for x in jax.tree.leaves(state.params)} == {dtype}
    assert metrics["grad_norm"] > 50  # reported before clipping
    applied = norm(moved(state, params))
    # Rounding to bfloat16 at most doubles a change: less than half a unit vanishes, and more becomes a whole unit.
    assert 0.2 < applied <= 0.5 * (1 + 1e-5 if dtype == "float32" else 2)
    momentum = jax.tree.leaves(state.opt_state)
    assert {str(x.dtype) for x in momentum} == {"float32"} and len(momentum) == len(jax.tree.leaves(params))
    assert norm(momentum) == pytest.approx(0.5, rel=1e-3)


# -- supervised ------------------------------------------------------------------------------------------------------


@pytest.mark.runs
@pytest.mark.parametrize("parts", [1, 2])
def test_supervised_loss_is_cross_entropy_and_updates_lower_it(parts):
    tokens, mask = TOKENS[:, 1], MASK[:, 1] & MASK[:, 2] | (np.arange(T) == 0)
    want = -chosen(reference_law(temperature=1.0, legal=None))[:, 1]
    run = jit_once(learner.make_supervised_update(CONFIG, optax.sgd(0.2), parts=parts))
    state = TrainState(jnp.int32(0), PARAMS, {}, optimizers.init_opt_state(optax.sgd(0.2), PARAMS), (), jnp.int32(5))
    values = []
    for _ in range(6):
        batch = (PROMPTS, PROMPT_MASK, np.where(mask, tokens, 0), mask.astype(np.int32))
        state, metrics = run(state, batch, jax.random.key(0))
        values.append(float(metrics["sft/loss"]))
    assert values[0] == pytest.approx(want[mask].mean(), abs=5e-5)
    assert values[-1] < 0.8 * values[0]
    after = -chosen(reference_law(state.params, temperature=1.0, legal=None))[:, 1][mask].mean()
    assert after < values[0]
    assert (int(state.step), int(state.data_position)) == (6, 11)


def test_chunks_of_logits_are_whole_tiles():
    """2^24 logits are 55, 13 and 2 positions of 2, 8 and 50 completions with a vocabulary of 151,936."""
    lengths = [scoring.chunk_length(1, G, 1024, 151_936) for G in (2, 8, 50)]
    assert lengths == [48, 8, 2]
    assert scoring.chunk_length(1, 8, 1024, 151_936, chunk=13) == 13 and scoring.chunk_length(1, 8, 5, 151_936) == 5

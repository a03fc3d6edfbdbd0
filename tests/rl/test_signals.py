"""Tests signals, features, legal tokens and added losses against plain forwards and finite differences."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from helpers import reference_decoder as reference
from helpers import reference_methods
from jaxrl_reason import methods, models
from jaxrl_reason.advantages import AdvantageInputs
from jaxrl_reason.data.numbers import expert_targets
from jaxrl_reason.methods import ExpertDigits, PolicyLoss, SelfReward
from jaxrl_reason.metrics import self_verification_f1
from jaxrl_reason.models import ModelConfig
from jaxrl_reason.models.decoding.rollout import generate
from jaxrl_reason.rl import learner, scoring
from jaxrl_reason.rl import optimizer as optimizers
from jaxrl_reason.rl.experience import make_experience
from jaxrl_reason.rl.learner import UpdateOptions
from jaxrl_reason.rl.signals import prompt_confidence
from jaxrl_reason.rl.types import Experience, Groups, Rollout, TrainState

pytestmark = pytest.mark.usefixtures("quick_compilation")

P, G, S, T, V = 3, 8, 5, 5, 19
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
RNG = np.random.default_rng(0)
PROMPTS = RNG.integers(0, V, (P, S))
LEFT = np.arange(S) >= np.array([[0], [3], [2]])
IDS = np.array([7, 3, 11])
EOS = (2, 3, 5, 8)  # often sampled, so that completions end at every position
PROBE, PAD = 13, 0
LEGAL = RNG.random((T, V)) < 0.5
LEGAL[:, [2, 11]] = True
jit_once = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def right_aligned(prompts, mask):
    """Returns the same prompts with padding after their tokens."""
    order = np.argsort(~mask, axis=1, kind="stable")
    return np.take_along_axis(prompts, order, 1), np.take_along_axis(mask, order, 1)


def mixed(prompts, mask):
    """Returns the same prompts with padding before, between and after their tokens."""
    rng, out, where = np.random.default_rng(1), np.zeros((P, S + 3), int), np.zeros((P, S + 3), bool)
    for p in range(P):
        real = prompts[p, mask[p]]
        places = np.sort(rng.choice(S + 3, len(real), replace=False))
        out[p, places], where[p, places] = real, True
    return out, where


SIDES = {"left": (PROMPTS, LEFT), "right": right_aligned(PROMPTS, LEFT), "mixed": mixed(PROMPTS, LEFT)}


@functools.cache
def sampler(config=CONFIG, eos=EOS, length=T, **options):
    return jit_once(
        functools.partial(generate, config, group_size=G, max_length=length, eos_ids=eos, pad_id=PAD, **options)
    )


def sample(side="left", params=PARAMS, temperature=1.0, key=0, **options):
    names = ("config", "eos", "length", "with_prompt_logprobs", "probe_token", "probe_temperature")
    static = {k: options.pop(k) for k in names if k in options}
    run = sampler(**static)
    out = run(params, *SIDES[side], IDS, jax.random.key(key), temperature=jnp.float32(temperature), **options)
    return jax.tree.map(np.asarray, out)


@functools.cache
def trainer(config=CONFIG, **options):
    return jit_once(functools.partial(scoring.compute_logprobs, config, **options))


def train(rollout, params=PARAMS, temperature=1.0, legal=None, **options):
    return jax.tree.map(np.asarray, trainer(**options)(params, rollout, jnp.float32(temperature), legal))


def chosen(law, tokens):
    return np.take_along_axis(law, tokens[..., None].astype(int), axis=-1)[..., 0]


# -- the probe ---------------------------------------------------------------------------------------------------------


@functools.cache
def plain(rows):
    return jit_once(functools.partial(models.apply, CONFIG))


def behind_the_end(rollout, temperature=1.0, token=PROBE):
    """Returns log pi(token | prompt, completion), f64[P, G], by one plain forward over whole, unshared rows."""
    rows = np.repeat(rollout.prompt_tokens[:, None], G, axis=1), rollout.tokens
    masks = np.repeat(rollout.prompt_mask[:, None], G, axis=1), rollout.mask
    tokens, mask = (np.concatenate(x, axis=2).reshape(P * G, -1) for x in (rows, masks))
    logits = np.asarray(plain(tokens.shape)(PARAMS, tokens, mask), np.float64)
    last = mask.shape[1] - 1 - np.argmax(mask[:, ::-1], axis=1)
    law = reference.sampling_logprobs(logits[np.arange(P * G), last], temperature)
    return law[:, token].reshape(P, G)


@pytest.mark.runs
@pytest.mark.parametrize(
    "side, temperature, of_probe",
    [
        pytest.param("left", 1.0, 1.0, marks=pytest.mark.slow),
        pytest.param("right", 0.7, 0.7, marks=pytest.mark.slow),
        ("mixed", 1.3, 0.8),
    ],
)
def test_the_probe_is_the_law_behind_the_end_token_in_sampling_in_training_and_in_a_plain_forward(
    side, temperature, of_probe
):
    ends = set()
    for key in range(3):
        out = sample(side, temperature=temperature, key=key, probe_token=PROBE, probe_temperature=of_probe)
        ended = ~out.truncated
        assert out.probe_logprobs.dtype == np.float32 and (out.probe_logprobs[~ended] == 0).all()
        scored = train(out, temperature=of_probe, probe_token=PROBE)
        np.testing.assert_allclose(out.probe_logprobs[ended], scored.probe_logprobs[ended], atol=1e-5)
        np.testing.assert_allclose(out.probe_logprobs[ended], behind_the_end(out, of_probe)[ended], atol=1e-5)
        assert np.isfinite(scored.probe_logprobs).all()
        ends |= set(out.mask.sum(axis=-1)[ended]) | ({"truncated"} if out.truncated.any() else set())
    assert {1, 2, T, "truncated"} <= ends  # at the first and the last position, and without an end
    assert np.ptp(out.probe_logprobs[ended]) > 0.5


@pytest.mark.runs
@pytest.mark.parametrize("length", [pytest.param(1, marks=pytest.mark.slow), T])
def test_sampling_a_probe_changes_no_sample(length):
    for key in range(2):
        with_probe = sample(key=key, probe_token=PROBE, length=length)
        without = sample(key=key, length=length)
        for name in ("tokens", "mask", "truncated", "logprobs"):
            np.testing.assert_array_equal(getattr(with_probe, name), getattr(without, name), err_msg=name)
        assert with_probe.tokens.shape == (P, G, length) and without.probe_logprobs is None
    ended = ~with_probe.truncated
    assert ended.any() and with_probe.truncated.any()
    np.testing.assert_allclose(with_probe.probe_logprobs[ended], behind_the_end(with_probe)[ended], atol=1e-5)
    scored = train(with_probe, probe_token=PROBE)
    np.testing.assert_allclose(with_probe.probe_logprobs[ended], scored.probe_logprobs[ended], atol=1e-5)


@pytest.mark.runs
def test_a_probe_and_targets_change_no_score_whatever_the_chunk():
    out = sample(probe_token=PROBE)
    targets = RNG.integers(0, V, out.tokens.shape)
    base = train(out)
    assert base.targets == {} and base.probe_logprobs is None
    law = reference.sampling_logprobs(
        reference.completion_logits(CONFIG, reference.float64(PARAMS), *SIDES["left"], out.tokens), 1.0
    )
    for chunk in (0, 2):
        run = jit_once(functools.partial(scoring.compute_logprobs, CONFIG, chunk=chunk, probe_token=PROBE))
        scored = run(PARAMS, out, jnp.float32(1.0), None, targets={"other": targets})
        np.testing.assert_allclose(scored.logprobs, base.logprobs, atol=1e-5)
        np.testing.assert_allclose(scored.entropy, base.entropy, atol=1e-5)
        np.testing.assert_allclose(scored.targets["other"], chosen(law, targets), atol=5e-5)
    np.testing.assert_allclose(base.logprobs[out.mask], out.logprobs[out.mask], atol=1e-5)


@pytest.mark.runs
def test_a_score_keeps_its_probes_in_order_whatever_the_parts():
    out = sample(probe_token=PROBE)
    run = jit_once(functools.partial(scoring.score, CONFIG, microbatches=P, probe_token=PROBE))
    parts = run(PARAMS, out, jnp.float32(1.0))
    np.testing.assert_allclose(parts.probe_logprobs, train(out, probe_token=PROBE).probe_logprobs, atol=1e-5)
    np.testing.assert_allclose(np.asarray(parts.logprobs)[out.mask], out.logprobs[out.mask], atol=1e-5)


def test_the_greedy_member_of_a_group_has_a_probe_at_temperature_one():
    temperatures = np.float32([1.0] * (G - 1) + [0.0])
    run = sampler(probe_token=PROBE)
    out = jax.tree.map(np.asarray, run(PARAMS, *SIDES["left"], IDS, jax.random.key(0), temperature=temperatures))
    ended = ~out.truncated
    np.testing.assert_allclose(out.probe_logprobs[ended], behind_the_end(out)[ended], atol=1e-5)


# -- log-probabilities of prompts --------------------------------------------------------------------------------------


@pytest.mark.runs
@pytest.mark.parametrize("side", [*(pytest.param(s, marks=pytest.mark.slow) for s in ("left", "right")), "mixed"])
def test_prompt_logprobs_are_those_of_a_plain_forward_wherever_the_padding_stands(side):
    out = sample(side, temperature=0.6, with_prompt_logprobs=True)  # prompts have temperature 1, not the sampler's
    prompts, mask = SIDES[side]
    assert out.prompt_logprobs.shape == mask.shape and (out.prompt_logprobs[~mask] == 0).all()
    confidence = np.asarray(prompt_confidence(jax.tree.map(jnp.asarray, out)))
    for p in range(P):
        text = prompts[p, mask[p]]
        law = reference.log_softmax(reference.forward(CONFIG, reference.float64(PARAMS), text))
        expected = [0.0, *law[np.arange(len(text) - 1), text[1:]]]
        np.testing.assert_allclose(out.prompt_logprobs[p, mask[p]], expected, atol=2e-5)
        # The first token has no prediction.
        assert confidence[p] == pytest.approx(np.exp(np.mean(expected[1:])), rel=1e-4)
    assert np.ptp(confidence) > 0.01
    without = sample(side, temperature=0.6)
    assert without.prompt_logprobs is None
    np.testing.assert_array_equal(out.tokens, without.tokens)
    np.testing.assert_array_equal(out.logprobs, without.logprobs)


def test_a_prompt_of_one_token_has_confidence_one():
    rollout = Rollout(
        jnp.zeros((2, 3), int),
        jnp.array([[0, 0, 1], [1, 0, 1]], bool),
        *[None] * 4,
        prompt_logprobs=jnp.array([[0, 0, 0], [0, 7, -2.0]]),
    )
    np.testing.assert_allclose(prompt_confidence(rollout), [1, np.exp(-2)], rtol=1e-6)


# -- features ----------------------------------------------------------------------------------------------------------

F, N, W = 3, 2, 5
TABULAR = dataclasses.replace(CONFIG, features=F, prefix_length=N, encoder_width=W)
DEEP = dataclasses.replace(TABULAR, encoder_layers=3)
TAB_PARAMS = reference.random_params(TABULAR, scale=0.25)
FEATURES = RNG.normal(size=(P, F)).astype(np.float32)
ENCODER = ("encoder_in", "encoder_in_bias", "encoder_out", "encoder_out_bias")


def gelu(x):
    return x / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def tabular_logits(params, features, prompts, mask, completions, factors=None):
    """Returns float64 logits [P, G, T, V]. The encoder's output is appended to the embedding; the head is separate.

    Factors [P, layers, W] multiply the encoder's hidden units.
    """
    rows = []
    factors = np.ones((len(features), 3, W)) if factors is None else factors
    for x, tokens, there, group, kept in zip(np.asarray(features, np.float64), prompts, mask, completions, factors):
        hidden = gelu(x @ params["encoder_in"] + params["encoder_in_bias"]) * kept[0]
        for i in range(len(params.get("encoder_hidden", ()))):
            hidden = gelu(hidden @ params["encoder_hidden"][i] + params["encoder_hidden_bias"][i]) * kept[i + 1]
        prefix = np.einsum("w,wnd->nd", hidden, params["encoder_out"]) + params["encoder_out_bias"]
        widened = params | {"embedding": np.concatenate([params["embedding"], prefix])}
        text = np.concatenate([V + np.arange(N), tokens[there]])
        rows.append(
            [reference.forward(CONFIG, widened, np.concatenate([text, one]))[len(text) - 1 : -1] for one in group]
        )
    return np.array(rows)


@functools.cache
def tabular_sample(side="left"):
    return sample(side, TAB_PARAMS, config=TABULAR, features=FEATURES)


def test_features_stand_in_front_of_the_prompt_in_sampling_and_in_training():
    out = tabular_sample()
    np.testing.assert_array_equal(out.features, FEATURES)
    law = reference.sampling_logprobs(
        tabular_logits(reference.float64(TAB_PARAMS), FEATURES, *SIDES["left"], out.tokens), 1.0
    )
    np.testing.assert_allclose(out.logprobs[out.mask], chosen(law, out.tokens)[out.mask], atol=5e-5)
    trained = train(out, TAB_PARAMS, config=TABULAR).logprobs
    np.testing.assert_allclose(np.exp(trained - out.logprobs)[out.mask], 1, atol=1e-5)
    other = train(out._replace(features=FEATURES + 0.5), TAB_PARAMS, config=TABULAR).logprobs
    assert np.abs(other - trained)[out.mask].max(axis=0) > 0.01 and (np.abs(other - trained)[:, :, 0] > 1e-5).all()


def test_the_encoder_can_have_three_hidden_layers():
    params, out = reference.random_params(DEEP, scale=0.25), tabular_sample()
    found = train(out, params, config=DEEP).logprobs
    logits = tabular_logits(reference.float64(params), FEATURES, *SIDES["left"], out.tokens)
    law = reference.sampling_logprobs(logits, 1.0)
    np.testing.assert_allclose(found[out.mask], chosen(law, out.tokens)[out.mask], atol=5e-5)


def test_dropout_leaves_a_share_of_the_hidden_units_out_and_scales_the_others():
    wide = dataclasses.replace(DEEP, encoder_width=1000)
    factors = np.asarray(models.encoder_dropout(wide, jax.random.key(0), 0.25, 4))
    assert factors.shape == (4, 3, 1000)
    assert set(np.unique(factors)) == {0, np.float32(4 / 3)}
    shares = (factors == 0).mean(axis=-1)
    assert np.abs(shares - 0.25).max() < 0.06  # four standard deviations
    assert len(np.unique(shares)) > 6  # every prompt and layer has units of its own
    assert models.encoder_dropout(wide, jax.random.key(0), 0.0, 4) is None


@pytest.mark.runs
@pytest.mark.parametrize("parts", [1, 3])
def test_a_supervised_update_takes_dropout_from_its_key(parts):
    """The loss is the reference's with the key's factors, and each weight's gradient its difference quotient."""
    params, out = reference.random_params(DEEP, scale=0.25), tabular_sample()
    tokens, live = out.tokens[:, 0], out.mask[:, 0]
    batch = (*SIDES["left"], tokens, live, FEATURES)
    update = jax.jit(learner.make_supervised_update(DEEP, optax.sgd(1.0), dropout=0.5, parts=parts))
    state = lambda: TrainState(
        jnp.int32(0), params, {}, optimizers.init_opt_state(optax.sgd(1.0), params), (), jnp.int32(0)
    )
    losses = []
    for seed in (0, 1):
        new, metrics = update(state(), batch, jax.random.key(seed))
        factors = np.asarray(models.encoder_dropout(DEEP, jax.random.key(seed), 0.5, P), np.float64)

        def loss(params, factors=factors):
            logits = tabular_logits(params, FEATURES, *SIDES["left"], tokens[:, None], factors)
            return -chosen(reference.sampling_logprobs(logits, 1.0), tokens[:, None])[:, 0][live].mean()

        assert float(metrics["sft/loss"]) == pytest.approx(loss(reference.float64(params)), abs=5e-5)
        losses.append(float(metrics["sft/loss"]))
    assert abs(losses[0] - losses[1]) > 1e-3
    for name in (*ENCODER, "encoder_hidden"):
        assert_gradient(params, new.params, loss, only=name, trials=1)


def test_features_make_room_for_themselves_wherever_the_padding_stands():
    left, right = tabular_sample(), tabular_sample("right")
    np.testing.assert_array_equal(left.tokens, right.tokens)
    np.testing.assert_allclose(left.logprobs, right.logprobs, atol=1e-5)
    swapped = sampler(config=TABULAR)(
        TAB_PARAMS,
        *(x[::-1] for x in SIDES["left"]),
        IDS[::-1],
        jax.random.key(0),
        temperature=jnp.float32(1),
        features=FEATURES[::-1],
    )
    np.testing.assert_array_equal(swapped.tokens, left.tokens[::-1])  # features follow their prompt


def test_features_that_are_missing_or_unexpected_or_too_many_are_refused():
    out = jax.tree.map(np.asarray, tabular_sample())
    shape = lambda config, params, rollout: jax.eval_shape(
        functools.partial(scoring.compute_logprobs, config), params, rollout, jnp.float32(1)
    )
    shape(TABULAR, TAB_PARAMS, out)
    with pytest.raises(ValueError, match="carry 3 features, and model.features is 0"):
        shape(CONFIG, PARAMS, out)
    with pytest.raises(ValueError, match="carry 4 features, and model.features is 3"):
        shape(TABULAR, TAB_PARAMS, out._replace(features=np.ones((P, 4), np.float32)))
    with pytest.raises(ValueError, match="model.features is 3"):
        shape(TABULAR, TAB_PARAMS, out._replace(features=None))
    with pytest.raises(ValueError, match="model.features is 3"):
        jax.eval_shape(functools.partial(models.apply, TABULAR), TAB_PARAMS, PROMPTS)


@pytest.mark.parametrize(
    "sizes",
    [(3, 0, 0), (0, 2, 0), (0, 0, 5), (3, 2, 0), (3, 0, 5), (0, 2, 5), (-1, 0, 0), (-1, -1, -1), (3, 2, -5)],
)
def test_sizes_of_the_encoder_go_together(sizes):
    with pytest.raises(ValueError, match="model.features"):
        dataclasses.replace(CONFIG, features=sizes[0], prefix_length=sizes[1], encoder_width=sizes[2])


def test_the_encoder_is_described_like_every_other_weight():
    shapes = {name: models.abstract_params(TABULAR)[name].shape for name in ENCODER}
    assert shapes == dict(zip(ENCODER, [(F, W), (W,), (W, N, 16), (N, 16)]))
    assert {name: len(models.logical_axes(TABULAR)[name]) for name in ENCODER} == {k: len(v) for k, v in shapes.items()}
    assert not set(ENCODER) & set(models.abstract_params(CONFIG))
    fresh = jax.eval_shape(functools.partial(models.init_params, TABULAR), jax.random.key(0))
    assert jax.tree.map(lambda x: x.shape, fresh) == jax.tree.map(lambda x: x.shape, models.abstract_params(TABULAR))


# -- one update: a loss by finite differences --------------------------------------------------------------------------

A, B = 4, 3  # prompts and completions
SGD = optax.sgd(1.0)
KEYS = dict(clip_low=0.2, clip_high=0.28)


@functools.cache
def problem():
    """Returns A prompts with B completions.

    The fields are prompts, mask, tokens, live, truncated, advantages, verdicts, judged and c_ref.
    """
    rng = np.random.default_rng(5)
    prompts, mask = rng.integers(0, V, (A, S)), np.arange(S) >= np.array([[0], [2], [3], [1]])
    tokens, lengths = rng.integers(0, V, (A, B, T)), np.array([[1, 5, 3], [2, 2, 5], [5, 1, 4], [3, 5, 1]])
    live = np.arange(T) < lengths[..., None]
    truncated = (lengths == T) & np.array([[1], [1], [0], [1]], bool)
    verdicts = rng.random((A, B)) < 0.4
    judged = ~truncated
    judged[3, 0] = False  # left out for another reason
    reference_probe = rng.normal(-3, 0.5, (A, B))
    return prompts, mask, tokens, live, truncated, rng.normal(size=(A, B)), verdicts, judged, reference_probe


def batch_of(**fields):
    prompts, mask, tokens, live, truncated, adv, verdicts, judged, ref = problem()
    rollout = Rollout(prompts, mask, tokens, live, np.zeros(live.shape), truncated, fields.pop("features", None))
    whole = dict(rollout=rollout, mask=live, advantages=adv) | fields
    narrow = lambda x: jnp.asarray(x, jnp.float32 if np.asarray(x).dtype == float else None)
    return jax.tree.map(narrow, Experience(**whole))


def judged_batch(**fields):
    *_, verdicts, judged, ref = problem()
    return batch_of(auxiliary={"self_reward": dict(verdicts=verdicts, valid=judged, reference=ref) | fields})


def expert_batch(targets):
    return batch_of(auxiliary={"expert": targets})


@functools.cache
def updater(options, config=CONFIG):
    return jit_once(lambda legal, *args: learner.make_update(config, options, SGD, legal)(*args))


def update(batch, options, params=PARAMS, step=0, legal=None, config=CONFIG, temperature=1.0):
    state = TrainState(jnp.int32(step), params, {}, optimizers.init_opt_state(SGD, params), (), jnp.int32(0))
    state, metrics, _ = updater(options, config)(legal, state, batch, jnp.float32(temperature), jax.random.key(0))
    return state.params, {k: float(v) for k, v in metrics.items()}


def reinforce(law, tokens, live, adv):
    """Returns the token mean of -A log p, which has the gradient of the clipped loss at ratio 1."""
    return -(chosen(law, tokens) * adv[..., None])[live].sum() / live.sum()


def probes_of(params, prompts, mask, tokens, live):
    out = np.zeros(live.shape[:2])
    for p, g in np.ndindex(out.shape):
        row = np.concatenate([prompts[p, mask[p]], tokens[p, g, live[p, g]]])
        out[p, g] = reference.log_softmax(reference.forward(CONFIG, params, row)[-1])[PROBE]
    return out


def assert_gradient(params, new, value, only=None, trials=2):
    """Asserts that minus the step of SGD at rate 1 is the slope of `value` in random directions (of weights `only`)."""
    wide = reference.float64(params)
    grads = jax.tree.map(lambda old, x: old - np.asarray(x, np.float64), wide, new)
    size = np.sqrt(
        sum((g**2).sum() for path, g in jax.tree_util.tree_leaves_with_path(grads) if only in (None, path[0].key))
    )
    assert size > 1e-3
    rng = np.random.default_rng(0)
    for _ in range(trials):
        direction = jax.tree_util.tree_map_with_path(
            lambda path, x: rng.normal(size=x.shape) * (only in (None, path[0].key)), wide
        )
        at = lambda eps: value(jax.tree.map(lambda x, d: x + eps * d, wide, direction))
        along = sum((g * d).sum() for g, d in zip(jax.tree.leaves(grads), jax.tree.leaves(direction)))
        assert along == pytest.approx((at(1e-6) - at(-1e-6)) / 2e-6, abs=2e-3 * float(size))


JUDGE = SelfReward(coefficient=0.7, beta=0.3, warmup_steps=4)
PLAIN = UpdateOptions(loss=PolicyLoss(**KEYS))
JUDGING = UpdateOptions(loss=PolicyLoss(**KEYS, auxiliary=(JUDGE,)), probe_token=PROBE)


@pytest.mark.runs
def test_the_self_reward_loss_and_its_gradient_are_those_of_the_definition():
    prompts, mask, tokens, live, _, adv, verdicts, judged, ref = problem()
    new, metrics = update(judged_batch(), JUDGING, step=4)

    def self_reward(params):
        r = 0.3 * (probes_of(params, prompts, mask, tokens, live) - ref)
        return reference_methods.self_reward_loss(r, verdicts, judged)

    def loss(params):
        law = reference.sampling_logprobs(reference.completion_logits(CONFIG, params, prompts, mask, tokens), 1.0)
        return reinforce(law, tokens, live, adv) + 0.7 * self_reward(params)

    assert metrics["self_reward/loss"] == pytest.approx(self_reward(reference.float64(PARAMS)), rel=1e-4)
    assert metrics["loss"] == pytest.approx(
        -(adv[..., None] * live).sum() / live.sum() + 0.7 * metrics["self_reward/loss"], abs=1e-5
    )
    assert_gradient(PARAMS, new, loss)
    alone, _ = update(judged_batch()._replace(advantages=jnp.zeros((A, B))), JUDGING, step=4)
    assert_gradient(PARAMS, alone, lambda params: 0.7 * self_reward(params), trials=1)


@pytest.mark.runs
@pytest.mark.parametrize(
    "options",
    [
        JUDGING,
        pytest.param(
            dataclasses.replace(JUDGING, loss=PolicyLoss(**KEYS, auxiliary=(ExpertDigits(coefficient=0.5),))),
            marks=pytest.mark.slow,
        ),
    ],
    ids=["self", "expert"],
)
def test_the_added_losses_do_not_depend_on_accumulation(options):
    batch = judged_batch() if options is JUDGING else expert_batch(problem()[2][:, ::-1])
    one, metrics = update(batch, options, step=4)
    four, other = update(batch, dataclasses.replace(options, accumulation=4), step=4)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6, rtol=1e-5), one, four)
    assert other == pytest.approx(metrics, abs=2e-6, rel=1e-5)


@pytest.mark.runs
def test_before_the_warmup_is_over_only_the_policy_loss_acts():
    base, base_metrics = update(batch_of(), PLAIN)
    off = dataclasses.replace(
        JUDGING, loss=dataclasses.replace(JUDGING.loss, auxiliary=(dataclasses.replace(JUDGE, coefficient=0.0),))
    )
    none, _ = update(judged_batch(), off, step=0)  # the same shapes, but the loss has coefficient 0
    for step in (0, 3):
        early, metrics = update(judged_batch(), JUDGING, step=step)
        jax.tree.map(np.testing.assert_array_equal, early, none)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), early, base
        )  # with one more position, sums round differently
        assert metrics["self_reward/loss"] == 0 and metrics["loss"] == pytest.approx(base_metrics["loss"], abs=1e-6)
    for step in (4, 9):
        late, metrics = update(judged_batch(), JUDGING, step=step)
        assert metrics["self_reward/loss"] > 0.01
        assert max(jax.tree.leaves(jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), late, base))) > 1e-3


@pytest.mark.runs
def test_what_is_not_judged_is_not_noticed():
    *_, verdicts, judged, ref = problem()
    clean, metrics = update(judged_batch(), JUDGING, step=4)
    for junk in (np.nan, np.inf):
        other, other_metrics = update(judged_batch(reference=np.where(judged, ref, junk)), JUDGING, step=4)
        jax.tree.map(np.testing.assert_array_equal, other, clean)
        assert other_metrics == metrics
    nobody, metrics = update(judged_batch(valid=np.zeros((A, B), bool)), JUDGING, step=4)
    assert metrics["self_reward/loss"] == 0 and np.isfinite(metrics["grad_norm"])
    early, _ = update(judged_batch(), JUDGING, step=0)
    jax.tree.map(np.testing.assert_array_equal, nobody, early)


@pytest.mark.runs
def test_the_expert_term_is_the_cross_entropy_of_its_targets():
    prompts, mask, tokens, live, _, adv, *_ = problem()
    targets = np.random.default_rng(7).integers(0, V, tokens.shape)
    options = UpdateOptions(loss=PolicyLoss(**KEYS, auxiliary=(ExpertDigits(coefficient=0.05),)))
    new, metrics = update(expert_batch(targets), options)

    def terms(params):
        law = reference.sampling_logprobs(reference.completion_logits(CONFIG, params, prompts, mask, tokens), 1.0)
        return reinforce(law, tokens, live, adv), -chosen(law, targets)[live].mean()

    _, cross_entropy = terms(reference.float64(PARAMS))
    assert metrics["expert/loss"] == pytest.approx(cross_entropy, rel=1e-4)
    assert metrics["loss"] == pytest.approx(
        -(adv[..., None] * live).sum() / live.sum() + 0.05 * cross_entropy, abs=1e-4
    )
    large = dataclasses.replace(
        options, loss=dataclasses.replace(options.loss, auxiliary=(ExpertDigits(coefficient=2.0),))
    )
    new, _ = update(expert_batch(targets), large)
    assert_gradient(PARAMS, new, lambda params: np.dot(terms(params), [1, 2]), trials=1)
    unmasked, _ = update(expert_batch(np.where(live, targets, (targets + 1) % V)), large)
    jax.tree.map(np.testing.assert_array_equal, unmasked, new)  # targets after the end have no effect


@pytest.mark.runs
def test_features_reach_the_encoder_with_the_right_gradient():
    prompts, mask, tokens, live, _, adv, *_ = problem()
    features = np.random.default_rng(8).normal(size=(A, F))
    new, _ = update(batch_of(features=features), PLAIN, TAB_PARAMS, config=TABULAR)

    def loss(params):
        return reinforce(
            reference.sampling_logprobs(tabular_logits(params, features, prompts, mask, tokens), 1.0), tokens, live, adv
        )

    for name in ENCODER:
        assert_gradient(TAB_PARAMS, new, loss, only=name, trials=1)
    four, _ = update(
        batch_of(features=features), dataclasses.replace(PLAIN, accumulation=4), TAB_PARAMS, config=TABULAR
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6, rtol=1e-5), new, four)


# -- legal tokens ------------------------------------------------------------------------------------------------------


@pytest.mark.runs
@pytest.mark.parametrize("temperature", [0.7, pytest.param(1.3, marks=pytest.mark.slow)])
def test_legal_tokens_by_position_hold_in_sampling_and_in_training(temperature):
    drawn = 0
    for key in range(10):
        out = sample(temperature=temperature, key=key, legal=jnp.asarray(LEGAL))
        p, g, t = np.nonzero(out.mask)
        assert LEGAL[t, out.tokens[out.mask]].all()
        drawn += len(p)
    assert drawn > 300
    trained = train(out, temperature=temperature, legal=LEGAL).logprobs
    np.testing.assert_allclose(trained[out.mask], out.logprobs[out.mask], atol=1e-5)
    law = reference.completion_logits(CONFIG, reference.float64(PARAMS), *SIDES["left"], out.tokens)
    np.testing.assert_allclose(
        out.logprobs[out.mask],
        chosen(reference.sampling_logprobs(law, temperature, LEGAL), out.tokens)[out.mask],
        atol=5e-5,
    )


@pytest.mark.runs
def test_legal_tokens_may_be_a_constant_of_the_program():
    """The programs of a run have legal tokens as a numpy array, not as an argument."""
    constant = jit_once(
        lambda *args: generate(
            CONFIG,
            PARAMS,
            *args,
            group_size=G,
            max_length=T,
            eos_ids=EOS,
            pad_id=PAD,
            temperature=jnp.float32(1),
            legal=LEGAL,
        )
    )
    out = constant(*SIDES["left"], IDS, jax.random.key(0))
    np.testing.assert_array_equal(out.tokens, sample(legal=jnp.asarray(LEGAL)).tokens)


@pytest.mark.runs
def test_the_gradient_under_legal_tokens_is_exact():
    prompts, mask, tokens, live, _, adv, *_ = problem()
    legal = LEGAL.copy()
    legal[np.arange(T), tokens] = True
    legal[:, 4] = False
    legal[np.arange(T), tokens] = True
    new, _ = update(batch_of(), PLAIN, legal=legal, temperature=0.8)

    def loss(params):
        logits = reference.completion_logits(CONFIG, params, prompts, mask, tokens)
        return reinforce(reference.sampling_logprobs(logits, 0.8, legal), tokens, live, adv)

    assert_gradient(PARAMS, new, loss)
    illegal = np.flatnonzero(~legal.any(axis=0))
    assert not np.abs(np.asarray(new["head"]) - np.asarray(PARAMS["head"]))[:, illegal].any()


@pytest.mark.runs
def test_the_probe_is_of_the_whole_vocabulary_in_sampling_and_in_training():
    """The position after the end has no legal tokens of its own."""
    legal = LEGAL.copy()
    legal[:, PROBE] = False
    out = sample(legal=jnp.asarray(legal), probe_token=PROBE)
    ended = ~out.truncated
    assert ended.any()
    scored = train(out, legal=legal, probe_token=PROBE)
    np.testing.assert_allclose(out.probe_logprobs[ended], scored.probe_logprobs[ended], atol=1e-5)


def test_numbers_of_a_fixed_length_are_never_truncated():
    out = sample(eos=())
    assert out.mask.all() and not out.truncated.any() and out.truncated.shape == (P, G)
    np.testing.assert_allclose(out.logprobs, train(out).logprobs, atol=1e-5)


def test_a_probe_behind_an_end_that_never_comes_is_refused():
    with pytest.raises(ValueError, match="probe"):
        sample(eos=(), probe_token=PROBE)


# -- from signals to the chain -----------------------------------------------------------------------------------------

NAN = float("nan")
PROBES = np.float32([[-13, -23, 0], [-15, -25, -20]])


def scored_groups(**rewards):
    """Returns two prompts with three completions of two tokens. The third completion of the first was cut off."""
    mask = np.ones((2, 3, 2), bool)
    logprobs = np.log([[[0.5, 0.25], [0.8, 0.9], [0.1, 0.2]], [[0.3, 0.6], [0.7, 0.4], [0.2, 0.9]]]).astype(np.float32)
    prompts = np.log([[1, 0.5, 0.5], [1, 1, 0.16]]).astype(
        np.float32
    )  # c(q) is .5 and .16; the second prompt begins with padding
    rollout = Rollout(
        np.zeros((2, 3), int),
        np.array([[1, 1, 1], [0, 1, 1]], bool),
        np.zeros(mask.shape, int),
        mask,
        logprobs,
        np.array([[0, 0, 1], [0, 0, 0]], bool),
        prompt_logprobs=prompts,
        probe_logprobs=PROBES,
    )
    rewards = {name: np.float32(values) for name, values in rewards.items()}
    return jax.tree.map(jnp.asarray, Groups(rollout, rewards, {"values": np.float32([0.1, 0.3])}))


def prepared(method, groups, weights, **options):
    options = dict(mask_truncated=False) | options
    prepare = functools.partial(make_experience, method=method, weights=weights, verdict="right", **options)
    batch, _, metrics = jit_once(prepare)(groups, method.advantage.init(), None, jnp.float32(-23.0))
    return batch, {name: float(value) for name, value in metrics.items()}


def test_signals_reach_the_chain_the_batch_and_the_metrics():
    method = methods.stack("hero", "laser", "rlev", "progrpo", laser=dict(reasoning_warmup=0, self_reward_warmup=0))
    groups = scored_groups(right=[[1, 0, 1], [0, 0, NAN]], reward_model=[[2, 1, 4], [0, NAN, 5]])
    batch, metrics = prepared(method, groups, {"right": 1.0, "reward_model": 0.0})
    x = AdvantageInputs(
        np.array([[1, 0, 1], [0, NAN, NAN]]),  # left out: a non-finite score, and a missing verdict
        np.ones((2, 3, 2), bool),
        verdicts=np.array([[1, 0, 1], [0, 0, 0]], bool),
        model_scores=np.array([[2, 1, 4], [0, 9, 5.0]]),
        values=np.array([0.1, 0.3]),
        self_rewards=np.array([[1, 0, 2.3], [0.8, -0.2, 0.3]]),
        truncated=np.array([[0, 0, 1], [0, 0, 0]], bool),
        prompt_confidence=np.array([0.5, 0.16]),
        answer_confidence=np.array([[0.25, 0.8, 0.1], [0.3, 0.4, 0.2]]),  # the minimum of two tokens
    )
    expected, _ = reference_methods.compose("grpo", ("hero", "laser", "rlev", "progrpo"), x)
    np.testing.assert_allclose(batch.advantages, expected, rtol=1e-4, atol=1e-5)
    data = batch.auxiliary["self_reward"]
    np.testing.assert_array_equal(data["verdicts"], x.verdicts)
    np.testing.assert_array_equal(data["valid"], [[1, 1, 0], [1, 0, 0]])
    np.testing.assert_array_equal(data["reference"], np.full((2, 3), -23))
    np.testing.assert_array_equal(batch.mask[..., 0], [[1, 1, 1], [1, 0, 0]])
    own = {k: v for k, v in metrics.items() if k.split("/")[0] in ("hero", "rlev", "self_reward", "progrpo")}
    assert own == pytest.approx(
        {
            "hero/score_spread": (7 / 3) ** 0.5,
            "hero/score_correct": 3,
            "hero/score_incorrect": 0.5,
            "rlev/value": (0.3 + 0.3) / 4,
            "rlev/h_acc": 0.2 / 0.6,
            "self_reward/correct": 1,
            "self_reward/incorrect": 0.4,
            "self_reward/accuracy_correct": 1,
            "self_reward/accuracy_incorrect": 0.5,
            "self_reward/f1": 2 * 0.5 / 1.5,
            "progrpo/prompt_confidence": 0.33,
            "progrpo/answer_confidence": (0.25 + 0.8 + 0.1 + 0.3) / 4,
        },
        rel=1e-5,
    )


@pytest.mark.parametrize(
    "right", [[[1, 0, 1], [0, 1, 0]], [[1, 1, 1], [1, 1, 1]], [[0, 0, 0], [0, 0, 0]]], ids=["both", "right", "wrong"]
)
def test_the_f1_of_a_batch_is_that_of_the_figure_of_merit(right):
    _, metrics = prepared(methods.create("laser"), scored_groups(right=right), {"right": 1.0})
    ended = np.array([[1, 1, 0], [1, 1, 1]], bool)
    scores = 0.1 * (PROBES + 23)
    expected = self_verification_f1(scores[ended], np.array(right)[ended])
    assert metrics["self_reward/f1"] == pytest.approx(expected, rel=1e-5, nan_ok=True)


def test_a_completion_that_was_not_judged_is_not_taken_for_wrong():
    """Its verdict is missing, but its other reward is not."""
    groups = scored_groups(right=[[1, 0, 1], [0, NAN, 1]], shape=[[0.5, 0.5, 0.5], [0.5, 0.5, 0.5]])
    for name in ("laser", "progrpo"):
        batch, _ = prepared(methods.create(name), groups, {"right": 1.0, "shape": 1.0})
        assert batch.advantages[1, 1] == 0 and not batch.mask[1, 1].any()
    batch, _ = prepared(methods.create("laser"), groups, {"right": 1.0, "shape": 1.0})
    np.testing.assert_array_equal(batch.auxiliary["self_reward"]["valid"], [[1, 1, 0], [1, 0, 1]])


def test_without_a_method_that_asks_nothing_is_judged():
    batch, metrics = prepared(methods.create("grpo"), scored_groups(right=[[1, 0, 1], [0, 1, 1]]), {"right": 1.0})
    assert batch.auxiliary == {}
    assert not [k for k in metrics if k.split("/")[0] in ("hero", "rlev", "self_reward", "progrpo")]


def test_the_greedy_completion_has_its_probe_cut_off_too():
    method = methods.create("laser", base="remax", reasoning_warmup=0, self_reward_warmup=0)
    batch, _ = prepared(method, scored_groups(right=[[1, 0, 1], [0, 1, 0]]), {"right": 1.0})
    np.testing.assert_array_equal(batch.rollout.probe_logprobs, PROBES[:, :2])
    x = AdvantageInputs(
        np.array([[1.0, 0], [0, 1]]),
        np.ones((2, 2, 2)),
        greedy_rewards=np.array([1.0, 0]),
        self_rewards=np.array([[1, 0], [0.8, -0.2]]),
        truncated=np.zeros((2, 2), bool),
    )
    np.testing.assert_allclose(batch.advantages, reference_methods.compose("remax", ("laser",), x)[0], atol=1e-5)
    valid = batch.auxiliary["self_reward"]["valid"]
    assert valid.shape == (2, 2) and valid.all()


def test_targets_of_the_expert_come_from_the_digits_of_the_data():
    method = methods.create("genre2", base="grpo", expert_coefficient=0.05)
    groups = scored_groups(right=[[0, -1, -1], [-0.5, -1, 0]])
    tokens = jnp.array([[[5, 3], [4, 9], [6, 0]], [[1, 2], [1, 3], [0, 9]]])
    groups = groups._replace(
        rollout=groups.rollout._replace(tokens=tokens), columns={"digits": jnp.array([[5, 2], [1, 2]])}
    )
    expert = functools.partial(expert_targets, base=10)
    batch, _ = prepared(method, groups, {"right": 1.0}, expert=expert)
    np.testing.assert_array_equal(batch.auxiliary["expert"], [[[5, 2], [5, 9], [5, 0]], [[1, 2], [1, 2], [1, 9]]])


# -- costs -------------------------------------------------------------------------------------------------------------


def products(jaxpr, loops=1.0):
    """Counts the multiplications in a program's matrix products. The body of a while loop counts `loops` times."""
    total = 0.0
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            (contracted, _), _ = eqn.params["dimension_numbers"]
            total += np.prod(eqn.outvars[0].aval.shape) * np.prod([eqn.invars[0].aval.shape[i] for i in contracted])
        times = {"scan": eqn.params.get("length", 1), "while": loops}.get(eqn.primitive.name, 1)
        for inner in jax.tree.leaves(
            list(eqn.params.values()), is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")
        ):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                total += times * products(inner, loops)
    return total


def update_products(loss, T=T, probe=None):
    """Counts the multiplications of one update with a budget of T."""
    shape = lambda *s, dtype=jnp.float32: jax.ShapeDtypeStruct(s, dtype)
    rollout = Rollout(
        shape(A, S, dtype=int),
        shape(A, S, dtype=bool),
        shape(A, B, T, dtype=int),
        shape(A, B, T, dtype=bool),
        shape(A, B, T),
        shape(A, B, dtype=bool),
    )
    judged = shape(A, B, dtype=bool)
    data = {"verdicts": judged, "valid": judged, "reference": shape(A, B)}
    auxiliary = {"self_reward": data} if loss.auxiliary else {}
    batch = Experience(rollout, rollout.mask, shape(A, B), auxiliary=auxiliary)
    state = jax.eval_shape(
        lambda p: TrainState(jnp.int32(0), p, {}, optimizers.init_opt_state(SGD, p), (), jnp.int32(0)), PARAMS
    )
    run = learner.make_update(CONFIG, UpdateOptions(loss=loss, probe_token=probe, logprob_chunk=T + 9), SGD)
    return products(jax.make_jaxpr(run)(state, batch, jnp.float32(1), jax.random.key(0)).jaxpr)


def test_the_self_reward_costs_one_position_and_one_row_of_logits_a_completion():
    plain, judging = update_products(PolicyLoss()), update_products(PolicyLoss(auxiliary=(JUDGE,)), probe=PROBE)
    longer = update_products(PolicyLoss(), T=T + 1)  # one position and one row of logits more
    assert plain > 1e5  # the count is not trivial
    # The probe costs at least a row of logits and its two gradients, and at most one more token: no second forward.
    assert 3 * A * B * CONFIG.width * V <= judging - plain <= 1.001 * (longer - plain)


def rollout_jaxpr(**options):
    run = functools.partial(generate, CONFIG, group_size=G, max_length=T, eos_ids=EOS, pad_id=PAD, **options)
    return jax.make_jaxpr(run)(PARAMS, *SIDES["left"], IDS, jax.random.key(0), temperature=jnp.float32(1)).jaxpr


def test_sampling_with_signals_adds_no_forward_pass():
    plain, probe, prompt = rollout_jaxpr(), rollout_jaxpr(probe_token=PROBE), rollout_jaxpr(with_prompt_logprobs=True)
    once = products(plain, loops=1)
    assert products(probe, loops=1) == once > 1e5  # an iteration of the loop costs no more
    assert products(prompt, loops=1) - once == P * S * CONFIG.width * V  # one row of logits per prompt token
    assert [len(x.outvars) for x in (plain, probe, prompt)] == [6, 7, 7]


def test_a_method_pays_only_for_the_signals_it_asks_for():
    plain = jax.eval_shape(sampler(), PARAMS, *SIDES["left"], IDS, jax.random.key(0), temperature=jnp.float32(1))
    assert (plain.features, plain.prompt_logprobs, plain.probe_logprobs) == (None, None, None)
    for name in reference_methods.ESTIMATORS:
        method = methods.create(name)
        assert not method.signals & {"self_rewards", "prompt_confidence", "answer_confidence", "values", "model_scores"}
        assert method.loss.auxiliary == ()

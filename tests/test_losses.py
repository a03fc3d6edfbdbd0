"""Tests losses against numbers worked by hand, float64 loops over tokens, and finite differences of the loops."""

import functools
import itertools
import json
import math
import os
import subprocess
import sys
import textwrap

from hypothesis import given, settings
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from helpers.advantage_batches import either_way
from jaxrl_reason import losses

NAN, INF = float("nan"), float("inf")
every_ratio = pytest.mark.parametrize("ratio", ["token", "sequence", "cispo", "none"])
every_aggregation = pytest.mark.parametrize("aggregation", ["token_mean", "sequence_mean", "sequence_sum", "constant"])
BOTH = [dict(ratio=r, aggregation=a) for r, a in itertools.product(losses.RATIOS, losses.AGGREGATIONS)]
BOTH.append(dict(ratio="token", aggregation="constant", constant=7.0))
SOME = [case for case in BOTH if case["ratio"] == "token" or case["aggregation"] == "token_mean"]
every_case = pytest.mark.parametrize("case", BOTH, ids=lambda case: "-".join(map(str, case.values())))
some_cases = pytest.mark.parametrize("case", SOME, ids=lambda case: "-".join(map(str, case.values())))


@functools.cache
def jitted(**options):
    def loss(logprobs, old, adv, mask, total):
        return losses.policy_loss(logprobs, old, adv, mask, total=total, **options)

    return jax.jit(jax.value_and_grad(loss, has_aux=True))


def differentiate(batch, total=None, **options):
    """Returns (loss, d loss / d logprobs, metrics) of (logprobs, old, advantages, mask)."""
    (loss, metrics), gradient = jitted(**options)(*map(jnp.asarray, batch), total)
    return float(loss), np.asarray(gradient), {k: float(v) for k, v in metrics.items()}


def a_batch(seed=0, lengths=((3, 10), (1, 4), (7, 2), (5, 6)), T=10):
    """Returns float32 (logprobs, old, advantages [P, G], mask), with ratios outside all clips and A of both signs."""
    rng = np.random.default_rng(seed)
    mask = (np.arange(T) < np.array(lengths)[..., None]).astype(np.float32)
    logprobs = -rng.uniform(0.1, 3, mask.shape)
    old = logprobs - rng.uniform(-0.9, 0.9, mask.shape) - rng.choice([-0.5, 0, 0.5], mask.shape[:2])[..., None]
    return tuple(x.astype(np.float32) for x in (logprobs, old, rng.normal(size=mask.shape[:2]), mask))


def reference(
    logprobs,
    old,
    adv,
    mask,
    *,
    ratio="token",
    aggregation="token_mean",
    clip_low=0.2,
    clip_high=0.2,
    dual_clip=None,
    constant=None,
    weights=None,
):
    """Returns the loss in float64, token by token. The weights of CISPO come from the log-probabilities `weights`."""
    logprobs, old, adv = (np.asarray(x, np.float64) for x in (logprobs, old, adv))
    sums, lengths = [], []
    for p, g in np.ndindex(mask.shape[:2]):
        live = [t for t in range(mask.shape[2]) if mask[p, g, t]]
        if not live:
            continue
        mean_log_ratio = sum(logprobs[p, g, t] - old[p, g, t] for t in live) / len(live)
        total = 0.0
        for t in live:
            A, logp = (adv[p, g] if adv.ndim == 2 else adv[p, g, t]), logprobs[p, g, t]
            rho = math.exp(mean_log_ratio if ratio == "sequence" else logp - old[p, g, t])
            if ratio == "none":
                total -= A * logp
            elif ratio == "cispo":
                weight = math.exp((logp if weights is None else float(weights[p, g, t])) - old[p, g, t])
                total -= min(weight, 1 + clip_high) * A * logp
            else:
                loss = max(-A * rho, -A * min(max(rho, 1 - clip_low), 1 + clip_high))
                if dual_clip and A < 0:
                    loss = min(loss, -A * dual_clip)
                total += loss
        sums.append(total)
        lengths.append(len(live))
    if not sums:
        return 0.0
    if aggregation == "token_mean":
        return sum(sums) / sum(lengths)
    if aggregation == "sequence_mean":
        return sum(s / n for s, n in zip(sums, lengths)) / len(sums)
    if aggregation == "sequence_sum":
        return sum(sums) / len(sums)
    return sum(sums) / (len(sums) * (constant or mask.shape[2]))


def slope(function, x, step=1e-6):
    """Returns the gradient by central differences in float64."""
    x, gradient = np.asarray(x, np.float64), np.zeros(np.shape(x))
    for i in np.ndindex(x.shape):
        shift = np.zeros(x.shape)
        shift[i] = step
        gradient[i] = (function(x + shift) - function(x - shift)) / (2 * step)
    return gradient


# -- the surrogate ---------------------------------------------------------------------------------


clip_28_dual_3 = functools.partial(losses.policy_loss, clip_low=0.2, clip_high=0.28, dual_clip=3.0)
jit_clip_28_dual_3 = jax.jit(clip_28_dual_3)


@either_way
@pytest.mark.parametrize(
    "rho, A, loss, low, high",
    [
        (1.5, 1, -1.28, 0, 1),
        (0.5, 1, -0.5, 0, 0),
        (5, -1, 3, 0, 0),
        (0.5, -1, 0.8, 1, 0),
        (1.1, 1, -1.1, 0, 0),
        (2, -1, 2, 0, 0),
    ],
)
def test_clip_hand_numbers(rho, A, loss, low, high, compiled):
    f = jit_clip_28_dual_3 if compiled else clip_28_dual_3
    got, metrics = f(
        jnp.full((1, 1, 1), math.log(rho)), jnp.zeros((1, 1, 1)), jnp.full((1, 1), float(A)), jnp.ones((1, 1, 1))
    )
    np.testing.assert_allclose(got, loss, rtol=1e-6)
    assert (metrics["clip_ratio/low_mean"], metrics["clip_ratio/high_mean"]) == (low, high)


@either_way
def test_the_sequence_ratio_is_exp_of_the_mean_log_ratio(compiled):
    f = functools.partial(
        losses.policy_loss, ratio="sequence", aggregation="sequence_mean", clip_low=3e-4, clip_high=4e-4
    )
    f = jax.jit(f) if compiled else f
    log_ratio = jnp.array([[[0.1, 0.3, 9.0], [-0.3, 0.1, -9.0]]])  # the means over two tokens are .2 and -.1
    mask = jnp.array([[[1, 1, 0], [1, 1, 0]]])
    for adv, expected in (
        ([[-1.0, 0.0]], math.exp(0.2) / 2),
        ([[1.0, 0.0]], -1.0004 / 2),
        ([[0.0, 1.0]], -math.exp(-0.1) / 2),
        ([[0.0, -1.0]], 0.9997 / 2),
    ):
        got, _ = f(log_ratio - 1, jnp.full((1, 2, 3), -1.0), jnp.array(adv), mask)
        np.testing.assert_allclose(got, expected, rtol=1e-6)


@pytest.mark.parametrize(
    "case, extra",
    [(case, {}) for case in BOTH]
    + [
        ({"ratio": r, "aggregation": "token_mean"}, {"clip_low": 0.1, "clip_high": 0.4, "dual_clip": 1.5})
        for r in ("token", "sequence", "cispo")
    ],
    ids=lambda x: "-".join(map(str, x.values())),
)
def test_loss_and_gradient_follow_the_definition(case, extra):
    logprobs, old, adv, mask = batch = a_batch()
    loss, gradient, _ = differentiate(batch, **case, **extra)
    np.testing.assert_allclose(loss, reference(*batch, **case, **extra), rtol=1e-5, atol=1e-6)
    moved = lambda x: reference(x, old, adv, mask, **case, **extra, weights=logprobs)
    np.testing.assert_allclose(gradient, slope(moved, logprobs), rtol=1e-4, atol=1e-6)
    assert np.abs(gradient).max() > 1e-3 and (gradient[mask == 0] == 0).all()


@every_ratio
def test_advantages_may_be_per_token(ratio):
    logprobs, old, _, mask = a_batch()
    adv = np.random.default_rng(1).normal(size=mask.shape).astype(np.float32)
    loss, gradient, _ = differentiate((logprobs, old, adv, mask), ratio=ratio, aggregation="token_mean")
    np.testing.assert_allclose(loss, reference(logprobs, old, adv, mask, ratio=ratio), rtol=1e-5, atol=1e-6)
    if ratio != "sequence":  # the sequence ratio spreads the gradient over all tokens
        moved = lambda x: reference(x, old, adv, mask, ratio=ratio, weights=logprobs)
        np.testing.assert_allclose(gradient, slope(moved, logprobs), rtol=1e-4, atol=1e-6)


@every_aggregation
def test_at_ratio_one_every_ratio_has_the_gradient_of_reinforce(aggregation):
    logprobs, _, adv, mask = a_batch()
    counts = {
        "token_mean": mask.sum(),
        "sequence_mean": 8 * mask.sum(-1, keepdims=True),
        "sequence_sum": 8,
        "constant": 80,
    }
    expected = -adv[..., None] * mask / counts[aggregation]
    for ratio in losses.RATIOS:
        _, gradient, metrics = differentiate((logprobs, logprobs, adv, mask), ratio=ratio, aggregation=aggregation)
        np.testing.assert_allclose(gradient, expected, rtol=1e-5, atol=1e-7, err_msg=ratio)
        assert metrics["clip_ratio/region_mean"] == 0


def test_the_capped_weight_of_cispo_is_a_constant():
    # The ratios e^.5 and e^3 are kept or capped at 1 + 5. The gradient is the weight times -A, without rho's own slope.
    logprobs, old = jnp.array([[[-0.5, -0.5]]]), jnp.array([[[-1.0, -3.5]]])
    _, gradient, metrics = differentiate(
        (logprobs, old, jnp.ones((1, 1)) * 2, jnp.ones((1, 1, 2))),
        ratio="cispo",
        clip_high=5.0,
        aggregation="token_mean",
    )
    np.testing.assert_allclose(gradient[0, 0], [-math.exp(0.5), -6], rtol=1e-6)
    assert metrics["clip_ratio/high_mean"] == 0.5


def test_dual_clip_bounds_negative_advantages_and_leaves_positive_ones_alone():
    log_ratio = np.log(np.array([[[0.1, 0.9, 1.5, 4.0, 50.0]]], np.float32))
    for sign in (1.0, -1.0):
        batch = (log_ratio, np.zeros((1, 1, 5)), np.full((1, 1), sign), np.ones((1, 1, 5)))
        plain, dual = differentiate(batch), differentiate(batch, dual_clip=3.0)
        assert (plain[0] == dual[0]) == np.array_equal(plain[1], dual[1]) == (sign > 0)
    np.testing.assert_allclose(dual[0], (0.8 + 0.9 + 1.5 + 3 + 3) / 5, rtol=1e-6)
    np.testing.assert_allclose(dual[1][0, 0], [0, 0.18, 0.3, 0, 0], rtol=1e-5)


def test_clip_ratios_are_shares_of_tokens_without_gradient():
    rho = np.array([[[1.5, 1.5, 0.5, 1.0], [1.5, 0.5, 0.5, 9.0]]])
    batch = (np.log(rho), np.zeros((1, 2, 4)), np.array([[1.0, -1.0]]), np.array([[[1, 1, 1, 1], [1, 1, 1, 0]]]))
    _, gradient, metrics = differentiate([x.astype(np.float32) for x in batch])
    assert metrics == pytest.approx(
        {
            "clip_ratio/low_mean": 2 / 7,
            "clip_ratio/high_mean": 2 / 7,
            "clip_ratio/region_mean": 4 / 7,
            "nonfinite_completions": 0,
        }
    )
    assert (gradient[batch[3] == 1] == 0).sum() == 4


@pytest.mark.parametrize("A, dual_clip, loss", [(1, None, -1.2), (0, None, 0), (-1, 3.0, 3)])
def test_a_ratio_beyond_float32_is_clipped_like_any_other(A, dual_clip, loss):
    batch = (np.zeros((1, 1, 2)), np.array([[[-100.0, 0]]]), np.full((1, 1), A), np.array([[[1, 0]]]))  # rho = e^100
    got, gradient, _ = differentiate([x.astype(np.float32) for x in batch], dual_clip=dual_clip)
    assert got == pytest.approx(loss)
    assert (gradient == 0).all()


# -- aggregation -----------------------------------------------------------------------------------


@either_way
def test_aggregation_by_hand_on_lengths_1_3_10(compiled):
    # The losses are 4 | 1 2 3 | 1 .. 10, with the sums 4, 6 and 55 and the means 4, 2 and 5.5.
    values, mask = np.full((1, 3, 12), NAN, np.float32), np.zeros((1, 3, 12), np.float32)
    for g, row in enumerate(([4], [1, 2, 3], range(1, 11))):
        values[0, g, : len(row)], mask[0, g, : len(row)] = row, 1
    for kind, constant, expected in (
        ("token_mean", None, 65 / 14),
        ("sequence_mean", None, 11.5 / 3),
        ("sequence_sum", None, 65 / 3),
        ("constant", None, 65 / 36),
        ("constant", 20.0, 65 / (3 * 20)),
    ):
        f = functools.partial(losses.aggregate, kind=kind, constant=constant)
        np.testing.assert_allclose((jax.jit(f) if compiled else f)(values, mask), expected, rtol=1e-6)
        f = functools.partial(losses.policy_loss, ratio="none", aggregation=kind, constant=constant)
        got, _ = (jax.jit(f) if compiled else f)(-values, values, jnp.ones((1, 3)), mask)
        np.testing.assert_allclose(got, expected, rtol=1e-6)


@pytest.mark.parametrize("constant, expected", [(None, [0.5, 2.5, 1]), (2.0, [1, 5, 2]), (8.0, [0.25, 1.25, 0.5])])
def test_a_constant_divides_each_completion_by_hand(constant, expected):
    """The loss is the sum of token losses / (completions * constant), also for repeated batches."""
    values = jnp.array([[[2.0, 0, 0, 0], [1, 2, 3, 4]], [[0, 0, 0, 0], [4, 0, 0, 0]]])
    mask = jnp.array([[[1, 0, 0, 0], [1, 1, 1, 1]], [[1, 1, 0, 0], [1, 1, 1, 0]]])
    average = functools.partial(losses.aggregate, kind="constant", constant=constant)
    parts = [average(values[:1, :1], mask[:1, :1]), average(values[:1, 1:], mask[:1, 1:]), average(values, mask)]
    np.testing.assert_allclose(parts, expected)  # token losses sum to 2, 10 and 16
    for copies in (2, 4):
        again = average(jnp.tile(values, (copies, 1, 1)), jnp.tile(mask, (copies, 1, 1)))
        np.testing.assert_allclose(again, expected[2])
    batch = (-values, -values, jnp.ones((2, 2)), mask)
    loss, _, _ = differentiate(batch, ratio="none", aggregation="constant", constant=constant)
    np.testing.assert_allclose(loss, expected[2])


@every_case
def test_microbatches_add_up_to_the_batch(case):
    batch = a_batch()
    loss, gradient, metrics = differentiate(batch, **case)
    total = losses.totals(jnp.asarray(batch[3]))
    assert (total.tokens, total.sequences) == (38, 8)
    parts = [differentiate([x[i : i + 1] for x in batch], total, **case) for i in range(4)]
    np.testing.assert_allclose(sum(part[0] for part in parts), loss, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(np.concatenate([part[1] for part in parts]), gradient, rtol=1e-5, atol=1e-8)
    assert {k: sum(part[2][k] for part in parts) for k in metrics} == pytest.approx(metrics)
    assert case["ratio"] == "none" or metrics["clip_ratio/region_mean"] > 0


@every_aggregation
def test_the_derivative_in_the_kl_coefficient_does_not_depend_on_accumulation(aggregation):
    logprobs, ref, _, mask = a_batch()
    whole = losses.aggregate(losses.kl_penalty(logprobs, ref), mask, aggregation)
    total = losses.totals(mask)
    kl = [losses.kl_penalty(logprobs[i : i + 1], ref[i : i + 1]) for i in range(4)]
    parts = [losses.aggregate(kl[i], mask[i : i + 1], aggregation, total=total) for i in range(4)]
    np.testing.assert_allclose(sum(parts), whole, rtol=1e-5)
    assert whole > 0.01


@some_cases
def test_masked_completions_change_nothing(case):
    logprobs, old, adv, mask = a_batch()
    mask[1, 0] = mask[2, 1] = 0
    loss, gradient, metrics = differentiate((logprobs, old, adv, mask), **case)
    np.testing.assert_allclose(loss, reference(logprobs, old, adv, mask, **case), rtol=1e-5, atol=1e-6)
    other = [x.copy() for x in (logprobs, old, adv)]
    for x, value in zip(other, (-50.0, NAN, 1e9)):
        x[1, 0] = x[2, 1] = value
    assert differentiate((*other, mask), **case)[::2] == (loss, metrics)
    np.testing.assert_array_equal(differentiate((*other, mask), **case)[1], gradient)


@some_cases
def test_padding_changes_nothing(case):
    logprobs, old, adv, mask = batch = a_batch()
    if case["aggregation"] == "constant":
        case = {"constant": 50.0} | case  # None means T, which padding changes
    loss, gradient, metrics = differentiate(batch, **case)
    for before in (0, 3):
        wide = lambda x, value: np.pad(x, [(0, 0), (0, 0), (before, 3 - before)], constant_values=value)
        padded = differentiate((wide(logprobs, NAN), wide(old, -INF), adv, wide(mask, 0)), **case)
        np.testing.assert_allclose(padded[0], loss, rtol=1e-5, atol=1e-7)
        np.testing.assert_allclose(padded[1], wide(gradient, 0), rtol=1e-5, atol=1e-7)
        assert padded[2] == pytest.approx(metrics)


@some_cases
def test_everything_masked_is_zero_and_finite(case):
    logprobs, old, adv, mask = a_batch()
    for x in (logprobs, np.full_like(logprobs, NAN), np.full_like(logprobs, -INF)):
        loss, gradient, metrics = differentiate((x, old, adv, 0 * mask), **case)
        assert loss == 0 and (gradient == 0).all() and set(metrics.values()) == {0.0}


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(SOME), st.integers(0, 2**31))
def test_masked_tokens_may_hold_anything(case, seed):
    rng = np.random.default_rng(seed)
    logprobs, old, _, mask = a_batch(seed)
    adv = rng.normal(size=mask.shape).astype(np.float32)
    mask = mask * (rng.random(mask.shape) < 0.8).astype(np.float32)  # masks can have holes
    loss, gradient, metrics = differentiate((logprobs, old, adv, mask), **case)
    dirt = lambda x: np.where(mask > 0, x, rng.choice([NAN, INF, -INF, 1e30], mask.shape)).astype(np.float32)
    dirty = differentiate((dirt(logprobs), dirt(old), dirt(adv), mask), **case)
    assert dirty[::2] == (loss, metrics) and np.isfinite(loss)
    np.testing.assert_array_equal(dirty[1], gradient)
    assert np.isfinite(gradient).all()


@some_cases
@pytest.mark.parametrize("field", [0, 1], ids=["logprobs", "old_logprobs"])
def test_a_completion_with_a_live_nonfinite_logprob_is_dropped_and_counted(case, field):
    batch = a_batch()
    for value in (NAN, -INF, INF):
        broken, masked = [x.copy() for x in batch], [x.copy() for x in batch]
        broken[field][2, 0, 4] = broken[field][0, 1, 0] = broken[field][0, 1, 9] = value
        masked[3][2, 0] = masked[3][0, 1] = 0
        got, expected = differentiate(broken, **case), differentiate(masked, **case)
        assert got[0] == expected[0] != 0
        np.testing.assert_array_equal(got[1], expected[1])
        assert got[2] == expected[2] | {"nonfinite_completions": 2}


def test_no_gradient_flows_into_advantages_old_logprobs_or_the_reference():
    logprobs, old, adv, mask = a_batch()
    for ratio in losses.RATIOS:
        f = lambda old, adv: losses.policy_loss(logprobs, old, adv, mask, ratio=ratio)[0]
        assert all((g == 0).all() for g in jax.jit(jax.grad(f, (0, 1)))(old, adv))
    assert (jax.grad(lambda ref: losses.kl_penalty(logprobs, ref, "k3").sum())(old) == 0).all()


def test_losses_are_float32_for_bfloat16_logprobs():
    batch = [jnp.asarray(x, jnp.bfloat16) for x in a_batch()]
    loss, _ = losses.policy_loss(*batch)
    assert loss.dtype == jnp.float32 and losses.kl_penalty(*batch[:2]).dtype == jnp.float32
    np.testing.assert_allclose(loss, reference(*[np.asarray(x, np.float64) for x in batch]), rtol=1e-5)


# -- errors ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "position, shape",
    [
        (0, (3, 3)),
        (0, (3, 3, 1)),
        (1, (3, 3)),
        (1, (1, 3, 3)),
        (2, (3,)),
        (2, ()),
        (2, (3, 1)),
        (2, (1, 3)),
        (2, (3, 3, 1)),
        (3, (3, 3)),
        (3, (3, 3, 1)),
    ],
)
def test_a_wrong_shape_raises_even_if_p_g_and_t_are_equal(position, shape):
    batch = [jnp.ones((3, 3, 3)), jnp.ones((3, 3, 3)), jnp.ones((3, 3)), jnp.ones((3, 3, 3))]
    jax.eval_shape(losses.policy_loss, *batch)
    batch[position] = jnp.ones(shape)
    with pytest.raises((AssertionError, ValueError)):
        jax.eval_shape(losses.policy_loss, *batch)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"ratio": "tokens"}, "ratio is 'tokens'; it must be one of"),
        ({"aggregation": "mean"}, "aggregation is 'mean'; it must be one of"),
        ({"dual_clip": 1.0}, "dual_clip is 1.0; it must be greater than 1"),
        ({"clip_low": -0.5}, "clip_low is -0.5 and clip_high is 0.2; both must be at least 0"),
        ({"constant": 3.0}, "constant=3.0 has no effect"),
        (
            {"aggregation": "constant", "constant": 0.0},
            "constant is 0.0; it is a length in tokens and must be positive",
        ),
    ],
)
def test_an_option_out_of_range_raises(options, message):
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(functools.partial(losses.policy_loss, **options), *map(jnp.asarray, a_batch()))


def test_an_unknown_kind_of_kl_or_another_shape_raises():
    with pytest.raises(ValueError, match="KL kind is 'k4'; it must be one of"):
        losses.kl_penalty(jnp.zeros((1, 1, 2)), jnp.zeros((1, 1, 2)), "k4")
    with pytest.raises(AssertionError):
        losses.kl_penalty(jnp.zeros((2, 2, 2)), jnp.zeros((2, 2, 1)))


# -- KL --------------------------------------------------------------------------------------------


@either_way
@pytest.mark.parametrize(
    "kind, at_plus, at_minus", [("k1", 0.3, -0.3), ("k2", 0.045, 0.045), ("k3", 0.040818, 0.049859)]
)
def test_kl_hand_numbers(kind, at_plus, at_minus, compiled):
    f = functools.partial(losses.kl_penalty, kind=kind)
    got = (jax.jit(f) if compiled else f)(jnp.array([[[-1.0, -1.3, -2.0]]]), jnp.array([[[-1.3, -1.0, -2.0]]]))
    np.testing.assert_allclose(got, [[[at_plus, at_minus, 0]]], atol=1e-6)


@pytest.mark.parametrize("kind", losses.KL_KINDS)
def test_the_expected_gradient_of_the_kl_penalty_is_the_gradient_of_the_divergence(kind):
    theta, ref = np.array([0.3, -1.0, 0.8, 0.1]), np.array([-0.5, 0.4, 0.2, -0.1])
    ref = scipy.special.log_softmax(ref)

    def divergence(theta):  # float64
        logp = scipy.special.log_softmax(theta)
        return (np.exp(logp) * (logp - ref)).sum()

    def expected(theta):  # over all outcomes, weighted by their constant probabilities
        logp = jax.nn.log_softmax(theta)[None, None]
        penalty = losses.kl_penalty(logp, jnp.asarray(ref, jnp.float32)[None, None], kind)
        return (jax.lax.stop_gradient(jnp.exp(logp)) * penalty).sum()

    value, gradient = jax.value_and_grad(expected)(jnp.asarray(theta, jnp.float32))
    np.testing.assert_allclose(gradient, slope(divergence, theta), atol=1e-6)
    assert np.abs(gradient).max() > 0.1
    if kind != "k2":  # k1 and k3 are unbiased as values too
        np.testing.assert_allclose(value, divergence(theta), rtol=1e-5)


@pytest.mark.parametrize("kind", losses.KL_KINDS)
def test_the_kl_penalty_of_masked_tokens_may_be_anything(kind):
    logprobs, ref, _, mask = a_batch()

    def penalty(logprobs, ref):
        return losses.aggregate(losses.kl_penalty(logprobs, ref, kind), mask, "token_mean")

    penalty = jax.jit(jax.value_and_grad(penalty))
    clean, clean_gradient = penalty(logprobs, ref)
    for dirt in (NAN, INF, -INF):
        value, gradient = penalty(jnp.where(mask > 0, logprobs, dirt), jnp.where(mask > 0, ref, -1))
        assert value == clean
        np.testing.assert_array_equal(gradient, clean_gradient)


# -- log-probabilities of tokens -------------------------------------------------------------------


def entropy_of(logits):
    p = scipy.special.softmax(np.asarray(logits, np.float64), axis=-1)
    return scipy.special.entr(p).sum(-1)


@settings(max_examples=30, deadline=None)
@given(st.sampled_from([1e-3, 1.0, 30.0]), st.sampled_from([-1e4, 0.0, 1e4]), st.integers(0, 2**31))
def test_token_logprobs_equal_log_softmax(scale, shift, seed):
    rng = np.random.default_rng(seed)
    logits = (rng.normal(size=(2, 3, 4, 7)) * scale + shift).astype(np.float32)
    tokens = rng.integers(0, 7, (2, 3, 4))
    illegal = (rng.random(logits.shape) < 0.4) & (np.arange(7) != tokens[..., None])
    logits[illegal] = -INF
    logp, entropy = jax.jit(losses.token_logprobs)(logits, tokens)
    full = scipy.special.log_softmax(logits.astype(np.float64), axis=-1)
    np.testing.assert_allclose(logp, np.take_along_axis(full, tokens[..., None], -1)[..., 0], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(entropy, entropy_of(logits), rtol=1e-4, atol=1e-5)


@either_way
def test_token_logprobs_by_hand(compiled):
    f = jax.jit(losses.token_logprobs) if compiled else losses.token_logprobs
    logits = jnp.log(jnp.array([[0.5, 0.25, 0.25, 0], [0, 0, 1, 0]]))
    logp, entropy = f(logits, jnp.array([1, 2]))
    np.testing.assert_allclose(logp, [-2 * math.log(2), 0], atol=1e-6)
    np.testing.assert_allclose(entropy, [1.5 * math.log(2), 0], atol=1e-6)
    assert f(logits, jnp.array([3, 0]))[0].tolist() == [-INF, -INF]  # illegal tokens have probability 0


def test_token_logprobs_and_entropy_have_correct_gradients_and_illegal_tokens_none():
    logits = np.array([[0.5, -INF, 2.0, -1.0, -INF], [3.0, 1.0, -INF, 0.0, 0.0]])
    legal, tokens = np.isfinite(logits), np.array([2, 0])

    def value(z):
        z = np.where(legal, z, -INF)
        return scipy.special.log_softmax(z, axis=-1)[[0, 1], tokens] @ [1.0, 2.0] + entropy_of(z) @ [0.5, -1.0]

    def got(z):
        logp, entropy = losses.token_logprobs(jnp.where(legal, z, -jnp.inf), tokens)
        return logp @ jnp.array([1.0, 2.0]) + entropy @ jnp.array([0.5, -1.0])

    finite = np.where(legal, logits, 0.0).astype(np.float32)
    for f in (jax.grad(got), jax.jit(jax.grad(got))):
        np.testing.assert_allclose(f(finite), slope(value, finite), atol=1e-5)
    raw = jax.grad(lambda z: sum(x.sum() for x in losses.token_logprobs(z, tokens)))(jnp.asarray(logits, jnp.float32))
    assert np.isfinite(raw).all() and (np.asarray(raw)[~legal] == 0).all()


def test_token_logprobs_are_float32_for_bfloat16_logits():
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(3, 50)) * 5, jnp.bfloat16)
    logp, entropy = losses.token_logprobs(logits, jnp.array([0, 7, 49]))
    assert logp.dtype == entropy.dtype == jnp.float32
    full = scipy.special.log_softmax(np.asarray(logits, np.float64), axis=-1)
    np.testing.assert_allclose(logp, full[[0, 1, 2], [0, 7, 49]], rtol=1e-5)


# -- devices ---------------------------------------------------------------------------------------

EIGHT_DEVICES = """
    import json, sys
    import jax, jax.numpy as jnp, numpy as np
    from jax.sharding import Mesh, NamedSharding, PartitionSpec
    from jaxrl_reason import advantages, losses

    rng = np.random.default_rng(0)
    mask = (np.arange(6) < rng.integers(1, 7, (8, 4, 1))).astype(np.float32)
    logprobs, rewards = -rng.uniform(0.1, 3, mask.shape), rng.normal(size=(8, 4)).astype(np.float32)
    rewards[3, 1], rewards[5] = np.nan, np.nan
    old = logprobs - rng.uniform(-0.9, 0.9, mask.shape)
    kl = rng.normal(size=mask.shape)

    @jax.jit
    def everything(logprobs, old, rewards, mask, kl):
        inputs = advantages.AdvantageInputs(rewards, mask, kl=kl)
        get = lambda t: advantages.chain(t).update(None, ((),), inputs)[0]
        out = {"group": get(advantages.standardize_by_group()), "whiten": get(advantages.whiten_by_token()),
               "whiten_kl": get(advantages.whiten_by_token(0.3))}
        for ratio in losses.RATIOS:
            for kind in losses.AGGREGATIONS if ratio == "token" else ("token_mean",):
                f = lambda x: losses.policy_loss(x, old, out["group"], mask, ratio=ratio, aggregation=kind)
                out[ratio + kind] = jax.value_and_grad(f, has_aux=True)(logprobs)
        f = lambda x: losses.policy_loss(x, old, out["group"], mask, aggregation="constant", constant=5.0)[0]
        out["constant of 5"] = jax.value_and_grad(f)(logprobs)
        return out

    batch = [x.astype(np.float32) for x in (logprobs, old, rewards, mask, kl)]
    one = everything(*[jax.device_put(x, jax.devices()[0]) for x in batch])
    spread = NamedSharding(Mesh(np.array(jax.devices()), ("prompts",)), PartitionSpec("prompts"))
    eight = everything(*[jax.device_put(x, spread) for x in batch])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), one, eight)
    print(json.dumps({"devices": len(eight["group"].sharding.device_set),
                      "numbers": sum(x.size for x in jax.tree.leaves(one)),
                      "spread": float(np.std(one["whiten_kl"])), "loss": float(one["tokentoken_mean"][0][0])}))
"""


@pytest.mark.processes
def test_eight_devices_give_the_numbers_of_one():
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    script = [sys.executable, "-c", textwrap.dedent(EIGHT_DEVICES)]
    done = subprocess.run(script, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout)
    assert seen["devices"] == 8 and seen["numbers"] > 1000 and seen["spread"] > 0.1 and abs(seen["loss"]) > 1e-3

"""Tests advantages against numbers worked by hand and against float64 numpy written from the definitions."""

import functools

from hypothesis import given, settings
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from helpers.advantage_batches import either_way
from jaxrl_reason import advantages

NAN, INF = float("nan"), float("inf")
GROUPWISE = {
    "standardize": advantages.standardize_by_group(),
    "center": advantages.center_by_group(),
    "leave_one_out": advantages.leave_one_out(),
}
BY_MEAN = advantages.divide_by_group_mean()
WHITEN, WHITEN_KL = advantages.whiten_by_token(), advantages.whiten_by_token(0.5)
OVERLONG, GREEDY = advantages.soft_overlong_penalty(5, 3), advantages.subtract_greedy()


def mask_of(lengths, T=None):
    """Returns f32[P, G, T] with `lengths` ones at the start of each row."""
    lengths = np.asarray(lengths)
    return (np.arange(T or max(1, lengths.max())) < lengths[..., None]).astype(np.float32)


def make_inputs(rewards, lengths=None, T=None, **signals):
    rewards = np.asarray(rewards, np.float32)
    mask = mask_of(np.full(rewards.shape, 2) if lengths is None else lengths, T)
    signals = {name: np.asarray(value, np.float32) for name, value in signals.items()}
    return jax.tree.map(jnp.asarray, advantages.AdvantageInputs(rewards, mask, **signals))


@functools.cache
def in_chain(transform):
    chain = advantages.chain(transform)
    return chain, jax.jit(chain.update)


def compute(transform, inputs, compiled=True):
    chain, jitted = in_chain(transform)
    update = jitted if compiled else chain.update
    return np.asarray(update(None, chain.init(), inputs)[0])


# -- by hand ---------------------------------------------------------------------------------------


@either_way
@pytest.mark.parametrize(
    "transforms, rewards, lengths, expected",
    [
        ([GROUPWISE["standardize"]], [[1, 0, 0, 1]], None, [[0.866024, -0.866024, -0.866024, 0.866024]]),
        ([advantages.standardize_by_group(0.5)], [[1, 0, 0, 1]], None, [[0.464102, -0.464102, -0.464102, 0.464102]]),
        ([GROUPWISE["center"]], [[1, 0, 0, 0]], None, [[0.75, -0.25, -0.25, -0.25]]),
        ([GROUPWISE["leave_one_out"]], [[1, 0, 0, 0]], None, [[1, -1 / 3, -1 / 3, -1 / 3]]),
        ([GROUPWISE["leave_one_out"]], [[10, 0, 0, 0]], None, [[10, -10 / 3, -10 / 3, -10 / 3]]),
        (  # 1 and -1, then 3 and -1, up to eps
            [BY_MEAN],
            [[1, 0, 0, 1], [1, 0, 0, 0]],
            None,
            [[0.999998, -0.999998, -0.999998, 0.999998], [2.999988, -0.999996, -0.999996, -0.999996]],
        ),
        ([BY_MEAN], [[1, 1, 1], [0, 0, 0]], None, [[0, 0, 0], [0, 0, 0]]),
        ([BY_MEAN], [[0.5, 0.25, NAN]], None, [[1 / 3, -1 / 3, 0]]),  # the mean of the given rewards is .375
        ([advantages.divide_by_group_mean(0.25)], [[1, 0, 0, 0]], None, [[1.5, -0.5, -0.5, -0.5]]),
        ([WHITEN], [[1, 0, 0, 1]], [[2, 4, 4, 2]], [[1.354006, -0.677003, -0.677003, 1.354006]]),
        (
            [advantages.center_by_group(), advantages.whiten_by_token()],
            [[1, 0], [1, 1]],
            [[2, 4], [3, 3]],
            [[1.625471, -1.161051], [0.232210, 0.232210]],
        ),
    ],
    ids=[
        "grpo",
        "grpo eps",
        "dr_grpo",
        "rloo",
        "rloo scale",
        "maxrl",
        "maxrl tied",
        "maxrl missing",
        "maxrl eps",
        "reinforce_pp",
        "reinforce_pp_baseline",
    ],
)
def test_hand_numbers(transforms, rewards, lengths, expected, compiled):
    transform = transforms[0] if len(transforms) == 1 else advantages.chain(*transforms)
    got = compute(transform, make_inputs(rewards, lengths), compiled)
    np.testing.assert_allclose(got, expected, atol=2e-6)
    assert got.dtype == np.float32


@either_way
def test_a_negative_reward_spoils_the_group_that_is_divided_by_its_mean(compiled):
    got = compute(BY_MEAN, make_inputs([[1, 0, -0.5], [1, 0, 0], [-1, -1, -1]]), compiled)
    assert np.isnan(got).tolist() == [[True] * 3, [False] * 3, [True] * 3]


@either_way
def test_whitening_with_kl_by_hand(compiled):
    # returns-to-go: 1 - .5 (.2 + .4) = .7, 1 - .5 .4 = .8; 0 - .5 .6 = -.3. mean .4, variance (.09 + .16 + .49) / 2
    kl = [[[0.2, 0.4, NAN], [0.6, -INF, INF]]]
    inputs = make_inputs([[1, 0]], [[2, 1]], T=3, kl=kl)
    expected = [[[0.493197, 0.657596, 0], [-1.150793, 0, 0]]]
    np.testing.assert_allclose(compute(WHITEN_KL, inputs, compiled), expected, atol=2e-6)


@either_way
def test_subtract_greedy_by_hand(compiled):
    # the decoded numbers .5 .75 .25 .4 of a unit interval for [-1.5, 2.5], truth .5, greedy .6
    inputs = make_inputs([[0, -1, -1, -0.16], [1, 0, 1, NAN]], greedy_rewards=[-0.16, 0])
    expected = [[0.16, -0.84, -0.84, 0], [1, 0, 1, 0]]
    np.testing.assert_allclose(compute(GREEDY, inputs, compiled), expected, atol=1e-6)


@either_way
@pytest.mark.parametrize(
    "length, penalty",
    [(1, 0), (16383, 0), (16384, 0), (17408, -0.25), (18432, -0.5), (20480, -1), (20481, -1), (30000, -1)],
)
def test_overlong_penalty_by_hand(length, penalty, compiled):
    inputs = make_inputs([[1, 0]], [[length, 1]], T=30000)
    got = compute(advantages.soft_overlong_penalty(20480, 4096), inputs, compiled)
    np.testing.assert_allclose(got, [[1 + penalty, 0]], atol=1e-6)


def test_penalty_enters_the_reward_before_the_group_is_standardized():
    inputs = make_inputs([[1, 1, 0]], [[4, 8, 2]], T=8)  # rewards after the penalty: 1, 0, 0
    chain = advantages.chain(advantages.soft_overlong_penalty(8, 4), advantages.standardize_by_group())
    np.testing.assert_allclose(compute(chain, inputs), [[1.154699, -0.577349, -0.577349]], atol=2e-6)


# -- against float64 -------------------------------------------------------------------------------


def reference_group(name, rewards, eps=1e-6):
    out = np.zeros(rewards.shape)
    for p, group in enumerate(rewards):
        there = [g for g, r in enumerate(group) if not np.isnan(r)]
        if len(there) < 2:
            continue
        r = group[there].astype(np.float64)
        if name == "standardize":
            out[p, there] = (r - r.mean()) / (r.std(ddof=1) + eps)
        elif name == "center":
            out[p, there] = r - r.mean()
        else:
            out[p, there] = [r[i] - np.delete(r, i).mean() for i in range(len(r))]
    return out


def reference_whitened(rewards, mask, kl=None, kl_coef=0.0):
    """Returns REINFORCE++'s advantages per token, f64[P, G, T], and the tokens that have one."""
    returns, live = np.zeros(mask.shape), np.zeros(mask.shape, bool)
    for p, g in np.ndindex(rewards.shape):
        if np.isnan(rewards[p, g]):
            continue
        for t in np.flatnonzero(mask[p, g]):
            live[p, g, t] = True
            later = [s for s in np.flatnonzero(mask[p, g]) if s >= t]
            returns[p, g, t] = rewards[p, g] - sum(kl_coef * float(kl[p, g, s]) for s in later if kl_coef)
    every = returns[live]
    if len(every) < 2:
        return np.zeros(mask.shape), live
    return np.where(live, (returns - every.mean()) / np.sqrt(every.var(ddof=1) + 1e-8), 0.0), live


@st.composite
def batches(draw, missing=True):
    """Draws (rewards [P, G], lengths [P, G]). Rewards are on a coarse grid, and some are missing."""
    P, G = draw(st.sampled_from([(1, 2), (3, 4)]))
    grid = [-2, -1, -0.75, 0, 0.25, 1, 1.5] + ([NAN] if missing else [])
    several = lambda values: st.lists(st.sampled_from(values), min_size=P * G, max_size=P * G)
    array = lambda values: np.array(draw(several(values))).reshape(P, G)
    return array(grid).astype(np.float32), array([1, 2, 3, 5])


@settings(max_examples=25, deadline=None)
@given(batches())
def test_missing_rewards_enter_no_group_statistic(batch):
    rewards, lengths = batch
    inputs = make_inputs(rewards, lengths, T=5)
    for name, transform in GROUPWISE.items():
        got = compute(transform, inputs)
        np.testing.assert_allclose(got, reference_group(name, rewards), rtol=2e-5, atol=2e-6, err_msg=name)


@settings(max_examples=25, deadline=None)
@given(batches())
def test_division_by_the_mean_follows_its_definition(batch):
    rewards = np.abs(batch[0])
    expected = np.zeros(rewards.shape)
    for p, group in enumerate(rewards.astype(np.float64)):
        r = group[~np.isnan(group)]
        if r.size and r.mean() > 0:
            expected[p] = np.nan_to_num((group - r.mean()) / (r.mean() + 1e-6))
    np.testing.assert_allclose(compute(BY_MEAN, make_inputs(rewards)), expected, rtol=2e-5, atol=2e-6)


@settings(max_examples=25, deadline=None)
@given(batches())
def test_whitening_weights_completions_by_their_tokens(batch):
    rewards, lengths = batch
    got = np.asarray(compute(WHITEN, make_inputs(rewards, lengths, T=5)))
    expected, live = reference_whitened(rewards, mask_of(lengths, 5))
    np.testing.assert_allclose(np.where(live, got[..., None], 0), expected, rtol=1e-4, atol=1e-5)
    assert (got[np.isnan(rewards)] == 0).all()


@settings(max_examples=25, deadline=None)
@given(batches(), st.integers(0, 2**31))
def test_whitening_with_kl_is_of_returns_to_go_without_masked_kl(batch, seed):
    rewards, lengths = batch
    mask, rng = mask_of(lengths, 5), np.random.default_rng(seed)
    noise = rng.choice([NAN, INF, -INF, 1e30, 7.0], mask.shape)
    kl = np.where(mask > 0, rng.normal(size=mask.shape), noise).astype(np.float32)
    got = np.asarray(compute(WHITEN_KL, make_inputs(rewards, lengths, T=5, kl=kl)))
    expected, live = reference_whitened(rewards, mask, kl, 0.5)
    assert got.shape == mask.shape and (got[~live] == 0).all()
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)


@settings(max_examples=15, deadline=None)
@given(batches())
def test_padding_changes_no_advantage(batch):
    rewards, lengths = batch
    kl = np.random.default_rng(0).normal(size=rewards.shape + (5,)).astype(np.float32)
    wide = np.pad(kl, [(0, 0), (0, 0), (0, 2)], constant_values=NAN)
    short, long = make_inputs(rewards, lengths, T=5, kl=kl), make_inputs(rewards, lengths, T=7, kl=wide)
    for transform in (WHITEN, OVERLONG):
        np.testing.assert_allclose(compute(transform, short), compute(transform, long), rtol=1e-5, atol=1e-6)
    per_token = compute(WHITEN_KL, long)
    np.testing.assert_allclose(per_token[..., :5], compute(WHITEN_KL, short), rtol=1e-4, atol=1e-5)
    assert (per_token[..., 5:] == 0).all()
    left = jax.tree.map(lambda x: jnp.roll(x, 2, axis=-1) if x.ndim == 3 else x, long)  # padding on the left
    np.testing.assert_allclose(compute(WHITEN_KL, left)[..., 2:], per_token[..., :5], rtol=1e-4, atol=1e-5)


@settings(max_examples=15, deadline=None)
@given(st.lists(st.sampled_from([0, 0.25, 1, NAN]), min_size=6, max_size=6))
def test_a_group_does_not_depend_on_other_groups(values):
    rewards = np.array(values).reshape(2, 3)
    rewards = np.concatenate([rewards, rewards[:1]])  # the same prompt twice stays two groups
    for name, transform in GROUPWISE.items():
        together = compute(transform, make_inputs(rewards))
        alone = [compute(transform, make_inputs(rewards[p : p + 1]))[0] for p in range(3)]
        np.testing.assert_array_equal(together, alone, err_msg=name)


# -- spread ----------------------------------------------------------------------------------------


def test_a_huge_spread_does_not_overflow():
    """-1e20 and three small rewards have the advantages -1.5 and three times .5, as in exact arithmetic."""
    got = compute(GROUPWISE["standardize"], make_inputs([[-0.1, -0.2, -0.3, -1e20]]))
    np.testing.assert_allclose(got, [[0.5, 0.5, 0.5, -1.5]], rtol=1e-5)


@pytest.mark.parametrize("largest", [1e19, 1e30, 3e37])
def test_whitening_a_huge_spread_does_not_overflow(largest):
    """-x and three numbers near 0, one token each: the deviations are -3/4 x and x / 4, and their std is x / 2."""
    got = compute(WHITEN, make_inputs([[-0.1, -0.2], [-0.3, -largest]], [[1, 1], [1, 1]]))
    np.testing.assert_allclose(got, [[0.5, 0.5], [0.5, -1.5]], rtol=1e-5)


def test_a_small_spread_is_seen():
    inputs = make_inputs([[1, 1.00001]], [[1, 1]])
    got = compute(GROUPWISE["standardize"], inputs)
    half = (float(inputs.rewards[0, 1]) - 1) / 2
    np.testing.assert_allclose(got, [[-half / (half * 2**0.5 + 1e-6), half / (half * 2**0.5 + 1e-6)]], rtol=0.03)
    assert compute(GROUPWISE["center"], inputs)[0, 1] > 0
    # The offset is a thousand. Squares of the values would lose the differences.
    shifted = make_inputs([[1000, 1000.01, 1000.02]])
    np.testing.assert_allclose(compute(GROUPWISE["standardize"], shifted), [[-1, 0, 1]], atol=0.01)
    np.testing.assert_allclose(
        compute(WHITEN, make_inputs([[1000, 1001]], [[1, 1]])), [[-(0.5**0.5), 0.5**0.5]], atol=1e-5
    )


@pytest.mark.parametrize("name", [*GROUPWISE, "whiten"])
def test_eight_times_a_tenth_is_exactly_zero(name):
    transform = {**GROUPWISE, "whiten": WHITEN}[name]
    got = compute(transform, make_inputs(np.full((1, 8), 0.1)))
    assert (got == 0).all()


@settings(max_examples=30, deadline=None)
@given(st.floats(-1e6, 1e6, width=32), st.sampled_from([3, 8]))
def test_a_tied_group_is_exactly_zero(value, G):
    inputs = make_inputs(np.full((1, G), value), T=3)
    for transform in [*GROUPWISE.values(), WHITEN]:
        assert (np.asarray(compute(transform, inputs)) == 0).all()


def test_a_tied_group_is_exactly_zero_for_every_eps():
    for eps in (1e-8, 0.0):  # eps may be 0, which must not give 0 / 0
        got = compute(advantages.standardize_by_group(eps), make_inputs([[1, 1, 1], [0, 1, 2]]))
        np.testing.assert_allclose(got, [[0, 0, 0], [-1, 0, 1]], atol=1e-6)


# -- missing rewards -------------------------------------------------------------------------------


def test_a_missing_reward_enters_no_statistic_and_has_advantage_zero():
    for name, expected in {
        "standardize": [1.154699, 0, -0.577349, -0.577349],
        "center": [2 / 3, 0, -1 / 3, -1 / 3],
        "leave_one_out": [1, 0, -0.5, -0.5],
    }.items():
        got = compute(GROUPWISE[name], make_inputs([[1, NAN, 0, 0]]))
        np.testing.assert_allclose(got, [expected], atol=2e-6, err_msg=name)
    whitened = compute(WHITEN, make_inputs([[1, NAN, 0, 0, 1]], [[2, 9, 4, 4, 2]]))
    np.testing.assert_allclose(whitened, [[1.354006, 0, -0.677003, -0.677003, 1.354006]], atol=2e-6)
    penalized = compute(OVERLONG, make_inputs([[1, NAN]], [[5, 5]]))
    np.testing.assert_array_equal(penalized, [[0, 0]])


def test_reward_zero_is_a_reward():
    for name, transform in GROUPWISE.items():
        np.testing.assert_array_equal(
            compute(transform, make_inputs([[1, 0, NAN]]))[:, :2],
            compute(transform, make_inputs([[1, 0]])),
            err_msg=name,
        )
        assert compute(transform, make_inputs([[1, 0, NAN]]))[0, 1] < 0


@pytest.mark.parametrize("rewards", [[[NAN, NAN, NAN], [1, 0, 0]], [[NAN, 5, NAN], [1, 0, 0]]], ids=["none", "one"])
def test_a_group_with_nothing_to_compare_is_zero(rewards):
    for name, transform in GROUPWISE.items():
        got = compute(transform, make_inputs(rewards))
        assert (got[0] == 0).all(), name
        np.testing.assert_allclose(got[1:], reference_group(name, np.array([[1.0, 0, 0]])), atol=2e-6)


def test_everything_missing_is_zero_everywhere():
    lengths = np.full((3, 4), 2)
    inputs = make_inputs(np.full((3, 4), NAN), lengths, T=5, greedy_rewards=[NAN, 0, 1], kl=np.ones((3, 4, 5)))
    for transform in [*GROUPWISE.values(), WHITEN, WHITEN_KL, GREEDY, OVERLONG]:
        assert (compute(transform, inputs) == 0).all()
    empty = make_inputs(np.eye(3, 4), 0 * lengths, T=5, kl=np.ones((3, 4, 5)))  # rewards without a token
    assert (compute(WHITEN_KL, empty) == 0).all()
    assert np.isfinite(compute(WHITEN, empty)).all()


def test_the_advantages_of_a_prompt_without_a_greedy_reward_are_zero():
    inputs = make_inputs([[1, 0], [1, 0]], greedy_rewards=[NAN, 1])
    np.testing.assert_array_equal(compute(GREEDY, inputs), [[0, 0], [0, -1]])


# -- errors ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", GROUPWISE)
def test_a_group_of_one_raises(name):
    with pytest.raises(ValueError, match="group_size is 1; it must be at least 2"):
        compute(GROUPWISE[name], make_inputs([[1], [0]]), False)


@pytest.mark.parametrize(
    "build, message",
    [
        (lambda: advantages.whiten_by_token(-0.1), "kl_coef is -0.1"),
        (lambda: advantages.soft_overlong_penalty(10, 11), "cache_length is 11"),
        (lambda: advantages.soft_overlong_penalty(10, 0), "cache_length is 0"),
    ],
)
def test_a_parameter_out_of_range_raises(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_the_error_names_a_missing_signal():
    with pytest.raises(ValueError, match="greedy_rewards, which is None"):
        compute(GREEDY, make_inputs([[1, 0]]))
    with pytest.raises(ValueError, match="kl, which is None"):
        compute(WHITEN_KL, make_inputs([[1, 0]]))


@pytest.mark.parametrize(
    "change",
    [
        {"rewards": np.ones(3)},
        {"rewards": np.ones((3, 3, 3))},
        {"rewards": np.ones((3, 2))},
        {"completion_mask": np.ones((3, 3))},
        {"completion_mask": np.ones((3, 2, 3))},
        {"kl": np.ones((3, 3))},
        {"kl": np.ones((3, 3, 1))},
        {"kl": np.ones((1, 3, 3))},
        {"greedy_rewards": np.ones((3, 3))},
        {"greedy_rewards": np.ones((3, 1))},
        {"greedy_rewards": np.ones(())},
        {"greedy_rewards": np.ones(2)},
        {"greedy_rewards": np.ones(1)},
    ],
    ids=lambda change: " ".join(f"{k}{v.shape}" for k, v in change.items()),
)
def test_a_wrong_shape_raises_even_if_p_g_and_t_are_equal(change):
    inputs = make_inputs(np.eye(3), np.full((3, 3), 3), kl=np.ones((3, 3, 3)), greedy_rewards=np.ones(3))
    both = advantages.chain(advantages.subtract_greedy(), advantages.whiten_by_token(0.1))
    shape = lambda inputs: jax.eval_shape(both.update, None, both.init(), inputs)[0].shape
    assert shape(inputs) == (3, 3, 3)
    with pytest.raises((AssertionError, ValueError, TypeError)):
        shape(inputs._replace(**{name: jnp.asarray(value) for name, value in change.items()}))


def test_greedy_rewards_of_two_prompts_raise_for_one_prompt():
    with pytest.raises((AssertionError, ValueError, TypeError)):
        compute(GREEDY, make_inputs([[1, 0]], greedy_rewards=[1, 0]), False)

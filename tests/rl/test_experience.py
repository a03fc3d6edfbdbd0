"""Tests experience from scored groups against numbers by hand, and `fill` against a list in Python."""

import functools

from hypothesis import given, settings
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from helpers.advantage_batches import either_way
from helpers.shapes import check_fields
from jaxrl_reason import methods
from jaxrl_reason.advantages import AdvantageTransform, chain
from jaxrl_reason.rl.experience import (
    empty_like,
    fill,
    log_ratio,
    make_experience,
    mean_length,
    mean_reward,
    total_reward,
)
from jaxrl_reason.rl.types import Groups, Rollout

NAN = float("nan")


def make_groups(lengths, T, truncated=None, logprobs=None, **rewards):
    """Returns groups whose tokens name their prompt, completion and position: 100 p + 10 g + t."""
    lengths = np.asarray(lengths)
    P, G = lengths.shape
    p, g, t = np.indices((P, G, T))
    mask = t < lengths[..., None]
    logprobs = np.where(mask, -1.0, 0.0) if logprobs is None else logprobs
    tokens = np.where(mask, 100 * p + 10 * g + t, -1)
    truncated = np.zeros((P, G), bool) if truncated is None else np.array(truncated, bool)
    rollout = Rollout(
        np.arange(P * 3).reshape(P, 3), np.ones((P, 3), bool), tokens, mask, np.asarray(logprobs, np.float32), truncated
    )
    rewards = {name: jnp.asarray(values, jnp.float32) for name, values in rewards.items()}
    groups = Groups(jax.tree.map(jnp.asarray, rollout), rewards)
    check_fields(groups.rollout)
    check_fields(groups)
    return groups


def prepared(method, groups, weights=(1.0,), verdict="right", mask_truncated=False, kl=None, compiled=True, **options):
    method = methods.create(method, **options)
    weights = dict(zip(groups.rewards, weights))
    keywords = dict(method=method, weights=weights, verdict=verdict, mask_truncated=mask_truncated)
    prepare = functools.partial(make_experience, **keywords)
    experience, _, metrics = (jax.jit(prepare) if compiled else prepare)(groups, method.advantage.init(), kl)
    check_fields(experience)
    return experience, {name: float(value) for name, value in metrics.items()}


# -- the total reward ------------------------------------------------------------------------------


@either_way
def test_the_total_is_weighted_and_zero_is_a_reward(compiled):
    rewards = {"a": jnp.array([[1, 0, 0, NAN, NAN, 3]]), "b": jnp.array([[1, 2, 0, 4, NAN, NAN]])}
    f = functools.partial(total_reward, weights={"a": 2.0, "b": -0.5})
    np.testing.assert_array_equal((jax.jit(f) if compiled else f)(rewards), [[1.5, -1, 0, -2, NAN, 6]])


def test_a_reward_of_weight_zero_neither_counts_nor_makes_a_sample_present():
    rewards = {"a": jnp.array([[1.0, NAN, 2]]), "b": jnp.array([[9.0, 9, NAN]])}
    np.testing.assert_array_equal(total_reward(rewards, {"b": 0, "a": 1}), [[1, NAN, 2]])


def test_the_total_keeps_its_shape_where_every_weight_is_zero():
    total = total_reward({"a": jnp.ones((2, 3))}, {"a": 0.0})
    assert total.shape == (2, 3) and np.isnan(total).all()


def test_every_reward_needs_a_weight():
    with pytest.raises(KeyError):
        total_reward({"a": jnp.ones((1, 2)), "b": jnp.ones((1, 2))}, {"a": 1.0})


@either_way
def test_weights_belong_to_rewards_in_the_order_given_not_in_that_of_their_names(compiled):
    groups = make_groups([[1, 1]], 1, right=[[1, 0]], format=[[0, 1]])  # totals 10 and 1
    experience, metrics = prepared("dr_grpo", groups, weights=(10.0, 1.0), compiled=compiled)
    np.testing.assert_allclose(experience.advantages, [[4.5, -4.5]], rtol=1e-6)
    assert metrics["reward"] == 5.5 and metrics["rewards/right/mean"] == 0.5


# -- prepare ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, options, expected",
    [
        ("grpo", {}, [0.866024, -0.866024]),
        ("dr_grpo", {}, [0.5, -0.5]),
        ("dapo", {}, [0.866024, -0.866024]),
        # the penalty takes 1 from the rewards of four tokens: 1 -1 -1 1, of std1 1.154701
        ("dapo", {"overlong_max_length": 4, "overlong_cache_length": 2, "eps": 1.0}, [0.464102, -0.464102]),
        ("dapo", {"overlong_max_length": 4, "overlong_cache_length": 2, "eps": 0.5}, [0.604339, -0.604339]),
        ("gspo", {}, [0.866024, -0.866024]),
        ("cispo", {}, [0.866024, -0.866024]),
        ("rloo", {}, [2 / 3, -2 / 3]),
        ("maxrl", {}, [0.999998, -0.999998]),
        ("reinforce_pp", {}, [1.354006, -0.677003]),
        ("reinforce_pp_baseline", {}, [1.354006, -0.677003]),
    ],
    ids=lambda x: str(x)[:21],
)
def test_advantages_of_each_method_by_hand(name, options, expected):
    groups = make_groups([[2, 4, 4, 2]], 5, right=[[1, 0, 0, 1]])
    experience, metrics = prepared(name, groups, **options)
    np.testing.assert_allclose(experience.advantages, np.array([expected])[:, [0, 1, 1, 0]], atol=2e-6)
    np.testing.assert_array_equal(experience.mask, groups.rollout.mask)
    np.testing.assert_array_equal(experience.rollout.tokens, groups.rollout.tokens)
    assert metrics["reward"] == 0.5 and metrics["reward_std"] == pytest.approx(3**-0.5)


def test_kl_enters_the_tokens_reward():
    groups = make_groups([[2, 1]], 3, right=[[1, 0]])
    kl = jnp.array([[[0.2, 0.4, NAN], [0.6, NAN, NAN]]])
    experience, _ = prepared("reinforce_pp", groups, kl=kl, kl_coef=0.5)
    np.testing.assert_allclose(experience.advantages, [[[0.493197, 0.657596, 0], [-1.150793, 0, 0]]], atol=2e-6)
    with pytest.raises(ValueError, match="kl, which is None"):
        prepared("reinforce_pp", groups, kl_coef=0.5)


def test_the_greedy_completion_is_the_baseline_and_is_not_learnt_from():
    groups = make_groups(
        [[2, 3, 1], [1, 1, 4], [1, 2, 4]],
        4,
        right=[[1, 0, 1], [1, 0, 0], [1, 0, NAN]],
        truncated=[[0, 0, 1], [0, 1, 1], [0, 0, 1]],
    )
    experience, metrics = prepared("remax", groups)
    np.testing.assert_array_equal(experience.advantages, [[0, -1], [1, 0], [0, 0]])
    for name in ("tokens", "mask", "logprobs", "truncated"):
        np.testing.assert_array_equal(getattr(experience.rollout, name), getattr(groups.rollout, name)[:, :2])
    np.testing.assert_array_equal(experience.rollout.prompt_tokens, groups.rollout.prompt_tokens)
    np.testing.assert_array_equal(experience.mask, experience.rollout.mask)
    assert metrics["reward"] == metrics["rewards/right/mean"] == 0.5
    assert metrics["completions/max_length"] == 3 and metrics["completions/clipped_ratio"] == pytest.approx(1 / 6)


def test_a_missing_reward_is_left_out_of_statistics_and_masked():
    groups = make_groups([[2, 2, 2, 2]], 2, right=[[1, NAN, 0, 0]])
    experience, metrics = prepared("grpo", groups)
    np.testing.assert_allclose(experience.advantages, [[1.154699, 0, -0.577349, -0.577349]], atol=2e-6)
    np.testing.assert_array_equal(experience.mask.any(-1), [[True, False, True, True]])
    assert metrics["reward"] == pytest.approx(1 / 3) and metrics["completions/missing_reward_ratio"] == 0.25
    assert metrics["rewards/right/mean"] == pytest.approx(1 / 3)
    assert metrics["rewards/right/std"] == metrics["reward_std"] == pytest.approx(3**-0.5)


def test_a_truncated_completion_leaves_the_loss_but_not_the_statistics_of_its_group():
    groups = make_groups([[2, 4, 4, 2]], 4, truncated=[[False, True, False, False]], right=[[1, 0, 0, 1]])
    kept, _ = prepared("grpo", groups)
    masked, metrics = prepared("grpo", groups, mask_truncated=True)
    np.testing.assert_array_equal(kept.mask, groups.rollout.mask)
    np.testing.assert_array_equal(masked.mask.sum(-1), [[2, 0, 4, 2]])
    np.testing.assert_array_equal(masked.advantages, kept.advantages)
    np.testing.assert_allclose(masked.advantages, [[0.866024, -0.866024, -0.866024, 0.866024]], atol=2e-6)
    assert metrics["completions/clipped_ratio"] == 0.25


def test_a_completion_with_a_nonfinite_logprob_is_masked_and_counted():
    logprobs = np.full((1, 3, 3), -1.0)
    logprobs[0, 0, 1], logprobs[0, 1, 2] = NAN, NAN  # the second NaN is after the end
    experience, metrics = prepared("grpo", make_groups([[3, 2, 3]], 3, logprobs=logprobs, right=[[1, 0, 1]]))
    np.testing.assert_array_equal(experience.mask.sum(-1), [[0, 2, 3]])
    assert metrics["sampling/nonfinite_completions"] == 1


@pytest.mark.parametrize("name", ["reinforce_pp", "reinforce_pp_baseline"])
def test_a_nonfinite_kl_spoils_its_own_completion_only(name):
    logprobs, kl = np.full((2, 2, 2), -1.0), np.full((2, 2, 2), 0.5, np.float32)
    logprobs[0, 0, 1] = kl[0, 0, 1] = NAN  # a NaN of log pi is also in log pi - log pi_ref
    groups = make_groups([[2, 2], [1, 2]], 2, logprobs=logprobs, right=[[1, 0], [1, 0]])
    experience, metrics = prepared(name, groups, kl=jnp.asarray(kl), kl_coef=0.1)
    assert metrics["sampling/nonfinite_completions"] == 1
    np.testing.assert_array_equal(experience.mask.sum(-1), [[0, 2], [1, 2]])
    live = np.asarray(experience.advantages)[np.asarray(experience.mask)]
    assert np.isfinite(live).all() and live.std() > 0.5


@either_way
def test_metrics_by_hand(compiled):
    groups = make_groups(
        [[2, 4, 4], [1, 3, 4], [1, 1, 1]],
        4,
        right=[[1, 0, 0], [1, 1, 1], [NAN, NAN, 1]],
        shape=[[0.5, 0.5, 0.5], [0, 0, 0], [NAN, NAN, 0]],
        truncated=[[False, True, True], [False, False, True], [False, False, False]],
    )
    _, metrics = prepared("grpo", groups, weights=(1.0, 2.0), compiled=compiled)
    # totals: 2 1 1 | 1 1 1 | - - 1: std 3^-1/2, 0, 0
    assert metrics == pytest.approx(
        {
            "reward": 8 / 7,
            "reward_std": 3**-0.5 / 3,
            "frac_reward_zero_std": 2 / 3,
            "frac_advantage_zero": 2 / 3,
            "completions/mean_length": 21 / 9,
            "completions/min_length": 1,
            "completions/max_length": 4,
            "completions/mean_terminated_length": 9 / 6,
            "completions/clipped_ratio": 3 / 9,
            "completions/missing_reward_ratio": 2 / 9,
            "completions/left_out_ratio": 2 / 9,
            "sampling/nonfinite_completions": 0,
            "rewards/right/mean": 5 / 7,
            "rewards/right/std": (10 / 42) ** 0.5,
            "rewards/shape/mean": 1.5 / 7,
            "rewards/shape/std": ((0.75 - 2.25 / 7) / 6) ** 0.5,
        },
        rel=1e-5,
    )


def test_metrics_of_nothing_are_not_numbers_and_nothing_is_learnt():
    groups = make_groups([[2, 1]], 2, right=[[NAN, NAN]], truncated=[[True, True]])
    experience, metrics = prepared("grpo", groups)
    assert not experience.mask.any() and (experience.advantages == 0).all()
    for name in (
        "reward",
        "reward_std",
        "rewards/right/mean",
        "rewards/right/std",
        "completions/mean_terminated_length",
    ):
        assert np.isnan(metrics[name]), name
    assert metrics["completions/missing_reward_ratio"] == metrics["completions/left_out_ratio"] == 1


@pytest.mark.parametrize(
    "name, right, zero",
    [
        ("reinforce_pp", [[1], [0]], 0.0),  # it compares groups
        ("reinforce_pp", [[1, 1], [0, 0]], 0.0),
        ("reinforce_pp", [[1, 1], [1, 1]], 1.0),
        ("grpo", [[1, 1], [0, 0]], 1.0),
        ("grpo", [[1, 1], [1, 0]], 0.5),
        ("grpo", [[1, 1], [NAN, 0]], 1.0),
    ],
)
def test_equal_rewards_of_a_group_may_have_advantages(name, right, zero):
    groups = make_groups(np.ones((2, len(right[0])), int), 2, right=right)
    assert prepared(name, groups)[1]["frac_advantage_zero"] == zero


@pytest.mark.parametrize("options", [{}, {"center": True}, {"center": True, "correct_only": True}], ids=str)
def test_a_completion_without_confidence_leaves_its_group_alone(options):
    logprobs = np.full((1, 4, 3), [[[-0.1], [-0.5], [-0.2], [-0.7]]])
    right, lengths = [[1, 0, 0, 1]], [[3, 3, 3, 3]]
    alone, _ = prepared_with_prompts("progrpo", make_groups(lengths, 3, logprobs=logprobs, right=right), **options)
    broken = np.where(np.arange(4)[:, None] == 0, NAN, logprobs)
    experience, metrics = prepared_with_prompts(
        "progrpo", make_groups(lengths, 3, logprobs=broken, right=right), **options
    )
    assert metrics["sampling/nonfinite_completions"] == 1 and 0 < metrics["progrpo/answer_confidence"] < 1
    assert np.isfinite(experience.advantages).all()
    np.testing.assert_array_equal(experience.mask.sum(-1), [[0, 3, 3, 3]])
    if not options:  # without a mean, the others are as before
        np.testing.assert_allclose(experience.advantages[:, 1:], alone.advantages[:, 1:], rtol=1e-6)
    # The mean is over the others: of two correct completions, one is left, whose term is its own mean.
    if "correct_only" in options:
        expected, _ = prepared("grpo", make_groups(lengths, 3, right=right))
        np.testing.assert_allclose(experience.advantages, expected.advantages, atol=1e-6)


def prepared_with_prompts(name, groups, **options):
    rollout = groups.rollout._replace(prompt_logprobs=jnp.full(groups.rollout.prompt_tokens.shape, -0.3))
    return prepared(name, groups._replace(rollout=rollout), **options)


def test_the_state_of_the_chain_is_carried():
    counting = AdvantageTransform(lambda: jnp.int32(0), lambda adv, n, inputs: (adv * (n + 1), n + 1))
    method = methods.Method(chain(counting), methods.PolicyLoss())
    keywords = dict(method=method, weights={"right": 1.0}, verdict="right", mask_truncated=False)
    prepare = jax.jit(functools.partial(make_experience, **keywords))
    groups, state = make_groups([[1, 1]], 1, right=[[1, 0]]), method.advantage.init()
    for step in (1, 2):
        experience, state, _ = prepare(groups, state)
        assert jax.tree.leaves(state) == [step]
        np.testing.assert_array_equal(experience.advantages, [[step, 0]])


def test_the_log_ratio_is_zero_behind_the_end():
    groups = make_groups([[1, 2]], 2, right=[[1, 0]])
    ref = jnp.array([[[-1.5, NAN], [-0.5, -1.25]]])
    np.testing.assert_array_equal(log_ratio(groups.rollout, ref), [[[0.5, 0], [-0.5, 0.25]]])


# -- dynamic sampling ------------------------------------------------------------------------------


def test_the_verdict_decides_what_is_kept_not_the_shaped_reward():
    right = [[1, 1], [0, 0], [1, 0], [NAN, 1], [NAN, NAN], [0.5, 0.6]]  # groups 2 and 5 are kept
    new = make_groups(np.ones((6, 2), int), 1, right=right, shape=[[1, 0.2], [0, 0.9], [1, 1], [0, 1], [0, 1], [0, 0]])
    buffer, filled, share = jax.jit(fill, static_argnums=3)(empty_like(new), jnp.int32(0), new, "right")
    assert filled == 2 and share == pytest.approx(1 / 3)
    np.testing.assert_array_equal(buffer.rollout.tokens[:2], np.asarray(new.rollout.tokens)[[2, 5]])
    _, filled, share = jax.jit(fill, static_argnums=3)(empty_like(new), jnp.int32(0), new, "shape")
    assert filled == 4 and share == pytest.approx(2 / 3)


def test_the_mean_reward_is_over_all_groups_that_were_drawn():
    nan = np.nan
    rewards = {"right": jnp.array([[1.0, 1, 0], [0, nan, 1]]), "shape": jnp.array([[2.0, nan, 0], [4, nan, 0]])}
    groups = Groups(None, rewards, {})
    # The totals are 2 and 1, and 2 and missing. The third completion is greedy and does not count.
    got = jax.jit(lambda g: mean_reward(g, {"right": 1.0, "shape": 0.5}, 2))(groups)
    assert got == pytest.approx((2 + 1 + 2) / 3)


def test_the_mean_length_is_over_all_completions_but_the_greedy_one():
    groups = make_groups([[1, 2, 9], [3, 4, 9]], 9, right=np.zeros((2, 3)))
    assert jax.jit(mean_length, static_argnums=1)(groups, 2) == pytest.approx((1 + 2 + 3 + 4) / 4)


FILL = jax.jit(fill, static_argnums=3)


@settings(max_examples=50, deadline=None)
@given(
    st.lists(
        st.lists(st.tuples(*[st.sampled_from([0.0, 1.0, NAN])] * 2), min_size=4, max_size=4), min_size=1, max_size=5
    )
)
def test_fill_keeps_informative_groups_in_order_and_drops_the_overflow(rounds):
    kept, buffer, filled = [], None, jnp.int32(0)
    for n, verdicts in enumerate(rounds):
        shaped = np.arange(8).reshape(4, 2) + 10 * n
        new = make_groups([[1, 2], [2, 2], [3, 1], [1, 1]], 3, right=verdicts, shape=shaped)
        new = new._replace(rollout=new.rollout._replace(tokens=new.rollout.tokens + 1000 * n))
        buffer, filled, share = FILL(empty_like(new) if buffer is None else buffer, filled, new, "right")
        informs = [0.0 in v and 1.0 in v for v in verdicts]
        assert share == np.mean(informs)
        kept += [jax.tree.map(lambda x: x[p], new) for p in range(4) if informs[p]]
        assert filled == min(len(kept), 4)
    kept = kept[:4]
    for p, group in enumerate(kept):
        jax.tree.map(np.testing.assert_array_equal, jax.tree.map(lambda x: x[p], buffer), group)
    assert not buffer.rollout.mask[len(kept) :].any()
    for values in buffer.rewards.values():
        assert np.isnan(values[len(kept) :]).all()


@pytest.mark.parametrize("name", ["dapo", "reinforce_pp"])
def test_an_unfilled_place_teaches_nothing_and_disturbs_no_other(name):
    new = make_groups(
        [[1, 3], [2, 2], [2, 1]],
        3,
        right=[[1, 1], [1, 0], [0, 0]],
        truncated=[[True, True], [False, False], [True, True]],
    )
    buffer, filled, _ = FILL(empty_like(new), jnp.int32(0), new, "right")
    experience, metrics = prepared(name, buffer)
    alone, alone_metrics = prepared(name, jax.tree.map(lambda x: x[:1], buffer))
    assert filled == 1
    np.testing.assert_array_equal(experience.mask.any((1, 2)), [True, False, False])
    np.testing.assert_allclose(experience.advantages[:1], alone.advantages, rtol=1e-6)
    assert (experience.advantages[1:] == 0).all()
    for key in ("reward", "reward_std", "rewards/right/mean", "rewards/right/std"):
        assert metrics[key] == pytest.approx(alone_metrics[key]), key


def test_completion_metrics_are_of_the_filled_places_only():
    new = make_groups(
        [[1, 3], [2, 2], [2, 1]],
        3,
        right=[[1, 1], [1, 0], [0, 0]],
        truncated=[[True, True], [False, False], [True, True]],
    )
    buffer, _, _ = FILL(empty_like(new), jnp.int32(0), new, "right")
    _, metrics = prepared("dapo", buffer)
    _, alone = prepared("dapo", jax.tree.map(lambda x: x[:1], buffer))
    assert {k: v for k, v in metrics.items() if "missing" not in k} == pytest.approx(
        {k: v for k, v in alone.items() if "missing" not in k}
    )

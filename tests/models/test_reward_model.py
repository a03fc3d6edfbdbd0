"""Tests scores and pairwise loss against the float64 reference, and their independence of padding and microbatches."""

import functools

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import pytest

from helpers import reference_decoder as reference
from jaxrl_reason import models
from jaxrl_reason.data.preferences import PreferenceBatch
from jaxrl_reason.models import ModelConfig, reward_model, RopeScaling, sharding
from jaxrl_reason.rl.types import Rollout

P, G, S, T, V = 4, 3, 5, 6, 24
SIZES = dict(vocab_size=V, width=16, layers=2, heads=4, kv_heads=2, mlp_width=24, head_dim=8)
CONFIG = ModelConfig(**SIZES, qkv_bias=True, tied_embedding=False)
# Windows are shorter than the prompts, and reach from the completions into them.
GEMMA3 = ModelConfig(
    **SIZES, sliding_window=3, sliding_period=2, local_rope_theta=50.0, qk_norm=True, post_norms=True, norm_offset=1.0,
    activation="gelu", embedding_scale=4.0, query_scale=0.3, rope_scaling=RopeScaling(kind="linear", factor=8.0),
)  # fmt: skip
CONFIGS = {"qwen2": CONFIG, "gemma3": GEMMA3}
RNG = np.random.default_rng(0)
PROMPTS = RNG.integers(0, V, (P, S)).astype(np.int32)
PROMPT_MASK = np.arange(S) >= np.array([[0], [2], [4], [1]])
TOKENS = RNG.integers(0, V, (P, G, T)).astype(np.int32)
LENGTHS = np.array([[1, 6, 3], [2, 2, 5], [6, 1, 4], [3, 5, 1]])
MASK = np.arange(T) < LENGTHS[..., None]

# Compiles with few optimizations, for programs that run a few times.
jit_once = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def random_params(config, seed=0):
    decoder = reference.random_params(config, seed=seed)
    score = np.random.default_rng([seed, 9]).normal(size=config.width)
    return {"decoder": {k: v for k, v in decoder.items() if k != "head"}, "score": jnp.asarray(score, jnp.float32)}


def reference_score(config, params, tokens):
    """Returns the score f64 of one unpadded text, the only "logit" of the reference with the score vector as head."""
    untied = ModelConfig(**{**vars(config), "tied_embedding": False})
    params = reference.float64(params)
    return reference.forward(untied, {**params["decoder"], "head": params["score"][:, None]}, tokens)[-1, 0]


def whole_texts():
    """Returns [P][G] lists of token arrays, each a prompt and a completion without padding."""
    return [
        [np.concatenate([prompt[real], tokens[mask]]) for tokens, mask in zip(*group)]
        for prompt, real, *group in zip(PROMPTS, PROMPT_MASK, TOKENS, MASK)
    ]


def rollout(tokens=TOKENS, mask=MASK, prompts=PROMPTS, prompt_mask=PROMPT_MASK):
    return Rollout(prompts, prompt_mask, tokens, mask, np.zeros(mask.shape, np.float32), np.zeros(mask.shape[:2], bool))


def pairs():
    return PreferenceBatch(PROMPTS, PROMPT_MASK, TOKENS[:, :2], MASK[:, :2])


@functools.cache
def scored(config, parts=1):
    return jit_once(functools.partial(reward_model.group_scores, config, parts=parts))


@functools.cache
def plain(config):
    return jit_once(functools.partial(reward_model.scores, config))


@functools.cache
def loss_and_gradient(config):
    return jit_once(jax.value_and_grad(functools.partial(reward_model.pair_loss, config), has_aux=True))


# -- scores ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONFIGS)
def test_scores_equal_the_reference_with_padding_on_any_side(name):
    config, params = CONFIGS[name], random_params(CONFIGS[name])
    texts = [np.arange(1, 8), np.array([3, 1, 4, 1, 5]), np.array([2, 7]), np.array([9])]
    want = [reference_score(config, params, text) for text in texts]
    assert np.std(want) > 0.1
    run = plain(config)
    for side in ("right", "left", "both"):
        tokens, mask = np.full((4, 9), 20), np.zeros((4, 9), np.int32)
        for i, text in enumerate(texts):
            start = {"right": 0, "left": 9 - len(text), "both": 1}[side]
            tokens[i, start : start + len(text)] = text
            mask[i, start : start + len(text)] = 1
        got = run(params, tokens, mask)
        assert got.shape == (4,) and got.dtype == jnp.float32
        np.testing.assert_allclose(got, want, atol=2e-5 * np.abs(want).max())


def test_without_a_mask_every_token_counts():
    params = random_params(CONFIG)
    got = plain(CONFIG)(params, PROMPTS)
    want = [reference_score(CONFIG, params, row) for row in PROMPTS]
    np.testing.assert_allclose(got, want, atol=2e-5 * np.abs(want).max())


@pytest.mark.parametrize("name", CONFIGS)
def test_group_scores_equal_the_scores_of_the_whole_texts(name):
    config, params = CONFIGS[name], random_params(CONFIGS[name])
    got = scored(config)(params, rollout())
    assert got.shape == (P, G) and got.dtype == jnp.float32
    texts = sum(whole_texts(), [])
    tokens, mask = np.zeros((P * G, S + T), np.int32), np.arange(S + T) < np.array([[len(t)] for t in texts])
    for row, text in zip(tokens, texts):
        row[: len(text)] = text
    flat = plain(config)(params, tokens, mask)
    np.testing.assert_allclose(got.reshape(-1), flat, atol=1e-5 * np.abs(flat).max())
    want = [reference_score(config, params, text) for text in texts]
    np.testing.assert_allclose(got.reshape(-1), want, atol=2e-5 * np.abs(want).max())


def test_tokens_after_the_end_and_padding_change_nothing():
    params = random_params(GEMMA3)
    want = scored(GEMMA3)(params, rollout())
    for garbage in (0, V - 1, -1, V + 5):
        spoilt = rollout(np.where(MASK, TOKENS, garbage), prompts=np.where(PROMPT_MASK, PROMPTS, abs(garbage) % V))
        np.testing.assert_array_equal(scored(GEMMA3)(params, spoilt), want)
    # The prompts get two more columns on the left, and the completions three more on the right.
    wide = lambda x, left, right, fill: np.pad(x, [(0, 0)] * (x.ndim - 1) + [(left, right)], constant_values=fill)
    padded = rollout(
        wide(TOKENS, 0, 3, 7), wide(MASK, 0, 3, False), wide(PROMPTS, 2, 0, 7), wide(PROMPT_MASK, 2, 0, False)
    )
    np.testing.assert_allclose(scored(GEMMA3)(params, padded), want, atol=1e-5)


def test_the_end_token_is_read():
    """Completions of at least two tokens have other scores without their last token."""
    params = random_params(CONFIG)
    shorter = np.arange(T) < LENGTHS[..., None] - 1
    a, b = scored(CONFIG)(params, rollout()), scored(CONFIG)(params, rollout(mask=shorter))
    assert (np.abs(a - b) > 1e-3)[LENGTHS > 1].all()
    np.testing.assert_array_equal(np.isnan(b), LENGTHS == 1)


def test_a_text_without_tokens_scores_nan_and_changes_no_other_score():
    params = random_params(CONFIG)
    empty = MASK & ~(np.arange(G) == 1)[None, :, None]
    got, want = np.array(scored(CONFIG)(params, rollout(mask=empty))), np.array(scored(CONFIG)(params, rollout()))
    assert np.isnan(got[:, 1]).all()
    np.testing.assert_array_equal(got[:, [0, 2]], want[:, [0, 2]])
    alone = plain(CONFIG)(params, PROMPTS, PROMPT_MASK & (np.arange(P) != 2)[:, None])
    assert np.isnan(alone).tolist() == [False, False, True, False]


@pytest.mark.parametrize("parts", [2, 4])
def test_parts_change_neither_scores_nor_their_order(parts):
    params = random_params(CONFIG)
    np.testing.assert_allclose(scored(CONFIG, parts)(params, rollout()), scored(CONFIG)(params, rollout()), atol=1e-5)


def test_parts_that_do_not_divide_the_prompts_raise():
    with pytest.raises(
        ValueError, match="^4 prompts cannot be scored in 3 equal parts; choose a number that divides 4.$"
    ):
        reward_model.group_scores(CONFIG, random_params(CONFIG), rollout(), parts=3)


def test_scores_of_a_bfloat16_decoder_are_float32_sums():
    """The scores equal float32 sums of the hidden states; bfloat16 would round them."""
    config = ModelConfig(**SIZES, param_dtype="bfloat16", compute_dtype="bfloat16")
    params = random_params(config)
    assert params["decoder"]["embedding"].dtype == jnp.bfloat16

    def both(params):  # in one program, because two programs might round differently
        prompts = jnp.asarray(PROMPTS)
        hidden, _ = models.bind(config, params["decoder"]).prefill(prompts, jnp.ones(prompts.shape, bool))
        return reward_model.scores(config, params, prompts), hidden

    got, hidden = jit_once(both)(params)
    want = np.asarray(hidden[:, -1], np.float64) @ np.asarray(params["score"], np.float64)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, want, atol=1e-5)


# -- the loss --------------------------------------------------------------------------------------


def reference_loss(params):
    total = 0.0
    for chosen, rejected, _ in whole_texts():
        margin = reference_score(CONFIG, params, chosen) - reference_score(CONFIG, params, rejected)
        total += np.log1p(np.exp(-margin))
    return total / P


def test_loss_and_metrics_equal_hand_values():
    """The pairs of scores differ by 2, 0 and -4, with -log sigmoid 0.126928, 0.693147 and 4.018150."""
    wanted = np.array([2.0, 0.0, 1.0, 1.0, -1.0, 3.0])
    # Layers add 0, and embeddings are (cos, sin). So the score of a text is 4 times the cosine of its last token.
    config = ModelConfig(vocab_size=6, width=2, layers=1, heads=1, kv_heads=1, mlp_width=1)
    decoder = jax.tree.map(jnp.zeros_like, reference.random_params(config))
    cos = wanted / 4
    decoder |= {"embedding": jnp.float32(np.stack([cos, np.sqrt(1 - cos**2)], axis=1)), "final_norm": jnp.ones(2)}
    params = {"decoder": decoder, "score": jnp.float32([4 / np.sqrt(2), 0])}
    ends = np.arange(6).reshape(3, 2, 1)
    batch = PreferenceBatch(np.zeros((3, 1), int), np.ones((3, 1)), ends, np.ones(ends.shape))
    np.testing.assert_allclose(scored(config)(params, batch).reshape(-1), wanted, atol=1e-5)
    batch = batch._replace(
        tokens=np.array([[0, 1], [2, 2], [4, 5]])[..., None]
    )  # two equal tokens, because tokens 2 and 3 have equal scores only up to rounding
    loss, metrics = jit_once(functools.partial(reward_model.pair_loss, config))(params, batch)
    assert float(loss) == pytest.approx((0.126928 + 0.693147 + 4.018150) / 3, abs=1e-5)
    assert float(metrics["reward_model/accuracy"]) == pytest.approx(1 / 3)
    assert float(metrics["reward_model/margin"]) == pytest.approx(-2 / 3, abs=1e-5)


def test_loss_and_gradient_equal_the_reference():
    # Scores of size ten would saturate the loss.
    params = random_params(CONFIG) | {"score": random_params(CONFIG)["score"] / 4}
    (loss, metrics), grads = loss_and_gradient(CONFIG)(params, pairs())
    assert float(loss) == pytest.approx(reference_loss(params), abs=1e-5)
    margins = [np.diff([reference_score(CONFIG, params, t) for t in group[1::-1]])[0] for group in whole_texts()]
    assert float(metrics["reward_model/margin"]) == pytest.approx(np.mean(margins), abs=1e-5)
    assert float(metrics["reward_model/accuracy"]) == np.mean(np.array(margins) > 0)
    params = reference.float64(params)
    rng = np.random.default_rng(1)
    for which in ("score", "decoder"):
        direction = jax.tree_util.tree_map_with_path(
            lambda path, x: rng.normal(size=x.shape) * (which in str(path[0])), params
        )
        at = lambda eps: reference_loss(jax.tree.map(lambda x, d: x + eps * d, params, direction))
        want = (at(1e-6) - at(-1e-6)) / 2e-6
        got = sum((np.asarray(g, np.float64) * d).sum() for g, d in zip(*map(jax.tree.leaves, (grads, direction))))
        assert got == pytest.approx(want, rel=1e-3, abs=1e-5) and abs(want) > 1e-2


def test_a_large_margin_neither_overflows_nor_stops_the_gradient():
    params = random_params(CONFIG)
    params["score"] = params["score"] * 1e4
    (loss, metrics), grads = loss_and_gradient(CONFIG)(params, pairs())
    assert np.isfinite(loss) and loss > 100 and 0 < metrics["reward_model/accuracy"] < 1
    flat = jax.flatten_util.ravel_pytree(grads)[0]
    assert np.isfinite(flat).all() and np.abs(flat).max() > 1


def test_a_group_of_three_raises():
    with pytest.raises(ValueError, match="^A pair is one chosen and one rejected completion; the groups have 3.$"):
        reward_model.pair_loss(CONFIG, random_params(CONFIG), rollout())


# -- parameters ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONFIGS)
def test_one_structure_serves_shapes_axes_shardings_and_weights(name):
    config = CONFIGS[name]
    abstract = reward_model.abstract_params(config)
    shapes = lambda tree: jax.tree.map(lambda x: (x.shape, str(x.dtype)), tree)
    for decoder in (None, models.abstract_params(config)):
        params = jax.eval_shape(functools.partial(reward_model.init_params, config), jax.random.key(0), decoder)
        assert shapes(params) == shapes(abstract)
    assert "head" not in abstract["decoder"] and abstract["score"].shape == (16,)
    axes = reward_model.logical_axes(config)
    lengths = jax.tree.map(len, axes, is_leaf=lambda x: isinstance(x, tuple))
    assert lengths == jax.tree.map(lambda x: len(x.shape), abstract)
    mesh = jax.sharding.AbstractMesh((1, 1, 2, 2), sharding.AXES)
    shardings = reward_model.param_shardings(config, mesh)
    assert jax.tree.structure(shardings) == jax.tree.structure(abstract)
    assert axes["score"] == ("embed",) and shardings["score"].shard_shape((16,)) == (8,)
    assert shardings["decoder"]["layers"]["q"].shard_shape((2, 16, 32)) == (2, 8, 16)


def test_a_new_reward_model_is_a_copy_of_its_policy():
    policy = reference.random_params(CONFIG)
    params = reward_model.init_params(CONFIG, jax.random.key(0), policy)
    jax.tree.map(np.testing.assert_array_equal, params["decoder"], {k: v for k, v in policy.items() if k != "head"})
    jax.jit(lambda p: jax.tree.map(jnp.negative, p), donate_argnums=0)(params)  # a training step may free its weights
    assert np.isfinite(policy["embedding"]).all()


def test_new_weights_depend_on_their_key_and_scores_begin_near_each_other():
    init = jit_once(functools.partial(reward_model.init_params, CONFIG))
    a, b, c = init(jax.random.key(0)), init(jax.random.key(0)), init(jax.random.key(1))
    jax.tree.map(np.testing.assert_array_equal, a, b)
    assert (a["score"] != c["score"]).all() and (a["decoder"]["embedding"] != c["decoder"]["embedding"]).all()
    assert 0 < np.std(scored(CONFIG)(a, rollout())) < 0.3

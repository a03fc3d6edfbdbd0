"""Reward models: one weight vector on the decoder's last hidden state, scoring in batches, and the loss that trains it on pairs.

A text's score is the dot product of that vector with the hidden state, final norm included, at the text's last token: what Hugging
Face's *ForSequenceClassification computes with one label. Parameters are {"decoder": the decoder's without an output head,
"score": f32[D]}. Completions are scored against the KV of their prompt, computed once a group, as the policy is trained.
"""

import dataclasses

import jax
import jax.numpy as jnp

from jaxrl_reason.models import decoder as decoder_lib
from jaxrl_reason.models import sharding
from jaxrl_reason.models.config import ModelConfig

Params = dict  # a nested dict of arrays

_INIT_STD = 0.02  # of the new score vector, as Hugging Face draws it: all scores begin near each other


def abstract_params(config: ModelConfig) -> Params:
    """Shapes and dtypes, as ShapeDtypeStruct, in the structure of the parameters."""
    score = jax.ShapeDtypeStruct((config.width,), jnp.float32)
    return {"decoder": decoder_lib.abstract_params(_headless(config)), "score": score}


def logical_axes(config: ModelConfig) -> Params:
    """A tuple of names a weight, see `models.logical_axes`."""
    return {"decoder": decoder_lib.logical_axes(_headless(config)), "score": ("embed",)}


def param_shardings(config: ModelConfig, mesh: jax.sharding.Mesh):
    """A NamedSharding a weight; raises as `sharding.param_shardings`."""
    of_decoder = sharding.param_shardings(_headless(config), mesh)
    return {"decoder": of_decoder, "score": of_decoder["final_norm"]}  # the other weight with the one axis "embed"


def init_params(config: ModelConfig, key: jax.Array, decoder: Params | None = None) -> Params:
    """A random score vector on a copy of `decoder` (a policy's weights; its output head is left out), or on random weights."""
    decoder_key, score_key = jax.random.split(key)
    if decoder is None:
        decoder = decoder_lib.init_params(_headless(config), decoder_key)
    else:
        decoder = jax.tree.map(jnp.copy, {name: weight for name, weight in decoder.items() if name != "head"})
    return {"decoder": decoder, "score": _INIT_STD * jax.random.normal(score_key, (config.width,))}


def scores(config: ModelConfig, params: Params, tokens: jax.Array, mask: jax.Array | None = None) -> jax.Array:
    """Scores f32[B] of texts int[B, S]; mask [B, S] (1 = real token, padding on any side). A text without a token scores NaN."""
    mask = jnp.ones(tokens.shape, bool) if mask is None else mask
    hidden, _ = decoder_lib.bind(_headless(config), params["decoder"]).prefill(tokens, mask)
    return _at_last(hidden, mask, params["score"])


def group_scores(config: ModelConfig, params: Params, rollout, *, parts: int = 1) -> jax.Array:
    """Scores f32[P, G] of completions after their prompts, the end token included: `scores` of each whole text.

    Args:
      config, params: the reward model.
      rollout: a `rollout.Rollout` or a `data.preferences.PreferenceBatch`; of its fields, prompt_tokens int[P, S] with prompt_mask
        (padding anywhere) and tokens int[P, G, T] with mask (real tokens first) are read. What lies behind a completion's end changes
        nothing.
      parts: microbatches of prompts, one after another: less memory, the same numbers. Divides P.

    Returns:
      f32[P, G]; NaN for a completion without a token.

    Raises:
      ValueError: `parts` does not divide P.
    """
    P, G, _ = rollout.tokens.shape
    if P % parts:
        raise ValueError(f"{P} prompts cannot be scored in {parts} equal parts; choose a number that divides {P}.")
    model = decoder_lib.bind(_headless(config), params["decoder"])

    def one(part):
        prompt_tokens, prompt_mask, tokens, mask = part
        _, prompt = model.prefill(prompt_tokens, prompt_mask)
        return _at_last(model.extend(tokens, prompt), mask, params["score"])

    # By stride, so that on a sharded axis every device keeps its own.
    cut = lambda x: x.reshape(P // parts, parts, *x.shape[1:]).swapaxes(0, 1)
    ys = jax.lax.map(one, tuple(map(cut, (rollout.prompt_tokens, rollout.prompt_mask, rollout.tokens, rollout.mask))))
    return ys.swapaxes(0, 1).reshape(P, G)


def pair_loss(config: ModelConfig, params: Params, pairs) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Bradley-Terry: the mean of -log sigmoid(score of the chosen - score of the rejected). arXiv 2203.02155, eq. 1; 1706.03741, 2.2.3.

    Args:
      config, params: the reward model.
      pairs: as `rollout` in `group_scores`, with G = 2: the chosen completion first, then the rejected one.

    Returns:
      (loss, metrics), f32 scalars: `reward_model/accuracy`, the share of pairs with the chosen one strictly above, and
      `reward_model/margin`, the mean difference.

    Raises:
      ValueError: a group has not two completions.
    """
    if pairs.tokens.shape[1] != 2:
        raise ValueError(
            f"A pair is one chosen and one rejected completion; these groups have {pairs.tokens.shape[1]}."
        )
    chosen, rejected = group_scores(config, params, pairs).T
    margin = chosen - rejected
    metrics = {"reward_model/accuracy": (margin > 0).mean(dtype=jnp.float32), "reward_model/margin": margin.mean()}
    return -jax.nn.log_sigmoid(margin).mean(), metrics


def _headless(config: ModelConfig) -> ModelConfig:
    return dataclasses.replace(config, tied_embedding=True)  # an untied decoder would own an output head


def _at_last(hidden, mask, weight):
    """The scores f32[...] at the last real token of hidden [..., T, D], mask [..., T]; NaN where there is none."""
    mask = mask.astype(bool)
    last = mask.shape[-1] - 1 - jnp.argmax(mask[..., ::-1], axis=-1)
    hidden = jnp.take_along_axis(hidden, last[..., None, None], axis=-2)[..., 0, :]
    # A sum of products: as a matrix product a TPU would round its operands to bfloat16.
    score = (hidden.astype(jnp.float32) * weight).sum(axis=-1)
    return jnp.where(mask.any(axis=-1), score, jnp.nan)

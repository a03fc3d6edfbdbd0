"""Reward models: a score vector on the decoder's last hidden state, scores of batches, and the loss on pairs that trains them.

The score of a text is the dot product of the score vector and the hidden state, final norm included, at the last token of the text.
Hugging Face's *ForSequenceClassification computes the same with one label, but reads the score at the last token that is not the
pad_token_id of its config.json, whatever the mask: `scores` does so if it is given this id. Parameters are {"decoder": the weights of a decoder
without an output head, "score": f32[D]}. Completions are scored against the KV of their prompt, which is computed once per group.
"""

import dataclasses
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key, Shaped

from jaxrl_reason.models import decoder as decoder_lib
from jaxrl_reason.models.config import ModelConfig
from jaxrl_reason.models.decoder import Params
from jaxrl_reason.models.layers import PromptCache
from jaxrl_reason.models.sharding import AnyMesh

_INIT_STD = 0.02  # of a new score vector, as in Hugging Face: all scores begin near each other


@runtime_checkable
class Completions(Protocol):
    """Prompts with G completions each: the fields of `rl.types.Rollout` and `data.preferences.PreferenceBatch` that are read here.

    Masks are 1 on real tokens. Padding of prompts can be anywhere; real tokens of completions come first, and tokens after them change
    nothing.
    """

    @property
    def prompt_tokens(self) -> Int[Array, "P S"]: ...
    @property
    def prompt_mask(self) -> Shaped[Array, "P S"]: ...
    @property
    def tokens(self) -> Int[Array, "P G T"]: ...
    @property
    def mask(self) -> Shaped[Array, "P G T"]: ...


def abstract_params(config: ModelConfig) -> Params:
    """Returns the shapes and dtypes of the weights as ShapeDtypeStruct, in the structure of the parameters."""
    score = jax.ShapeDtypeStruct((config.width,), jnp.float32)
    return {"decoder": decoder_lib.abstract_params(headless(config)), "score": score}


def logical_axes(config: ModelConfig) -> Params:
    """Returns a tuple of names per weight, see `models.logical_axes`."""
    return {"decoder": decoder_lib.logical_axes(headless(config)), "score": ("embed",)}


def param_shardings(config: ModelConfig, mesh: AnyMesh) -> Params:
    """Returns a NamedSharding per weight; raises a ValueError if `models.param_shardings` does."""
    of_decoder = decoder_lib.param_shardings(headless(config), mesh)
    return {"decoder": of_decoder, "score": of_decoder["final_norm"]}  # a weight with the same axis, "embed"


def init_params(config: ModelConfig, key: Key[Array, ""], decoder: Params | None = None) -> Params:
    """Draws a score vector, next to a copy of the decoder of a policy without its output head; None: next to random weights."""
    decoder_key, score_key = jax.random.split(key)
    if decoder is None:
        decoder = decoder_lib.init_params(headless(config), decoder_key)
    else:
        decoder = jax.tree.map(jnp.copy, {name: weight for name, weight in decoder.items() if name != "head"})
    return {"decoder": decoder, "score": _INIT_STD * jax.random.normal(score_key, (config.width,))}


def scores(
    config: ModelConfig,
    params: Params,
    tokens: Int[Array, "B S"],
    mask: Shaped[Array, "B S"] | None = None,
    pad_id: int | None = None,
) -> Float[Array, " B"]:
    """Computes the scores of whole texts in float32, NaN for a text without a token to read the score at.

    Args:
      config, params: the reward model.
      tokens, mask: the texts, see `models.apply`.
      pad_id: the score is read at the last real token that is not this one, as in Hugging Face; None: at the last real token.
    """
    mask = jnp.ones(tokens.shape, bool) if mask is None else mask
    hidden, _ = decoder_lib.bind(headless(config), params["decoder"]).prefill(tokens, mask)
    read = mask if pad_id is None else mask.astype(bool) & (tokens != pad_id)
    return _at_last(hidden, read, params["score"])


def group_scores(config: ModelConfig, params: Params, rollout: Completions, *, parts: int = 1) -> Float[Array, "P G"]:
    """Computes `scores` of completions after their prompts, end token included; NaN without a token.

    For less memory, `parts` microbatches of prompts follow each other. Raises ValueError if `parts` does not divide P.
    """
    P, G, _ = rollout.tokens.shape
    if P % parts:
        raise ValueError(f"{P} prompts cannot be scored in {parts} equal parts; choose a number that divides {P}.")

    def one(part):
        prompt_tokens, prompt_mask, tokens, mask = part
        _, prompt = decoder_lib.bind(headless(config), params["decoder"]).prefill(prompt_tokens, prompt_mask)
        return completion_scores(config, params, tokens, mask, prompt)

    # By stride: then each device keeps its own prompts if the axis is sharded.
    cut = lambda x: x.reshape(P // parts, parts, *x.shape[1:]).swapaxes(0, 1)
    ys = jax.lax.map(one, tuple(map(cut, (rollout.prompt_tokens, rollout.prompt_mask, rollout.tokens, rollout.mask))))
    return ys.swapaxes(0, 1).reshape(P, G)


def completion_scores(
    config: ModelConfig, params: Params, tokens: Int[Array, "P G T"], mask: Bool[Array, "P G T"], prompt: PromptCache
) -> Float[Array, "P G"]:
    """Computes `group_scores` of completions after prompts that the decoder has read."""
    model = decoder_lib.bind(headless(config), params["decoder"])
    return _at_last(model.extend(tokens, prompt), mask, params["score"])


def pair_loss(
    config: ModelConfig, params: Params, pairs: Completions
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """Computes the Bradley-Terry loss, the mean of -log sigmoid(score of the chosen - score of the rejected).

    arXiv 2203.02155, eq. 1; 1706.03741, 2.2.3. Metrics are the share of pairs whose chosen completion has the higher
    score, and the mean difference. Raises ValueError if a group does not have two completions, first the chosen one.
    """
    if pairs.tokens.shape[1] != 2:
        raise ValueError(f"A pair is one chosen and one rejected completion; the groups have {pairs.tokens.shape[1]}.")
    chosen, rejected = group_scores(config, params, pairs).T
    margin = chosen - rejected
    metrics = {"reward_model/accuracy": (margin > 0).mean(dtype=jnp.float32), "reward_model/margin": margin.mean()}
    return -jax.nn.log_sigmoid(margin).mean(), metrics


def headless(config: ModelConfig) -> ModelConfig:
    """Returns the configuration of a reward model's decoder, which has no output head."""
    return dataclasses.replace(config, tied_embedding=True)  # an untied decoder would have an output head


def _at_last(hidden, mask, weight):
    """Returns the scores f32[...] at the last position of hidden [..., T, D] that mask [..., T] marks; NaN if it marks none."""
    mask = mask.astype(bool)
    last = mask.shape[-1] - 1 - jnp.argmax(mask[..., ::-1], axis=-1)
    hidden = jnp.take_along_axis(hidden, last[..., None, None], axis=-2)[..., 0, :]
    # A sum of products: in a matrix product, a TPU would round the operands to bfloat16.
    score = (hidden.astype(jnp.float32) * weight).sum(axis=-1)
    return jnp.where(mask.any(axis=-1), score, jnp.nan)

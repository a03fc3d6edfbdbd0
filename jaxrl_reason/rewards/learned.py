"""A pretrained reward model with a tokenizer of its own: completions are decoded, put into its chat template, and scored on the device."""

from collections.abc import Mapping
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_reason.data import chat_template, ChatTemplate, get_template, PromptBatch, Tokenizer
from jaxrl_reason.models import ModelConfig, reward_model
from jaxrl_reason.models.sharding import microbatches, on_mesh
from jaxrl_reason.rewards.host import RewardError
from jaxrl_reason.rl import hosts
from jaxrl_reason.rl.types import Rollout

_QUESTION = get_template("{question}")
_BUCKET = 64  # texts are padded to a multiple: few lengths are compiled


class TextScorer:
    """Rollouts in one tokenizer, scored by a reward model with another.

    Args:
      config, params, tokenizer: of the reward model. With a chat template the question is the user's turn and the completion the
        assistant's; without one they are joined.
      policy_tokenizer: of the run; decodes completions.
      system: system prompt of the reward model's chat.
      max_length: tokens of a text. A longer one has no score: a missing reward, never a cut text.
      parts: the groups of a batch are scored in so many parts, one after another, as far as these divide it.
      sharding: of the leading axis.
    """

    def __init__(
        self,
        config: ModelConfig,
        params,
        tokenizer: Tokenizer,
        *,
        policy_tokenizer: Tokenizer,
        system: str,
        max_length: int,
        parts: int,
        sharding: jax.sharding.NamedSharding,
    ):
        self._params, self._tokenizer, self._policy_tokenizer = params, tokenizer, policy_tokenizer
        self._chat = chat_of(tokenizer, system)
        self._max_length, self._parts, self._sharding = max_length, parts, sharding
        self._score = scoring_program(config, sharding)

    def __call__(self, rollout: Rollout, batch: PromptBatch) -> tuple[jax.Array, dict[str, float]]:
        """Scores f32[P, G], NaN where a text is too long; and the share of these."""
        P, G, _ = rollout.tokens.shape
        encoded = hosts.agree(lambda: self._encode(rollout, batch), RewardError)
        fits = np.array([0 < len(ids) <= self._max_length for ids in encoded])
        longest = hosts.largest(max((len(ids) for ids, ok in zip(encoded, fits) if ok), default=1))
        padded = np.full((len(encoded), -(-longest // _BUCKET) * _BUCKET), self._tokenizer.pad_id, np.int32)
        lengths = np.zeros(len(encoded), np.int32)
        for i in np.flatnonzero(fits):
            lengths[i] = len(encoded[i])
            padded[i, : lengths[i]] = encoded[i]
        split = lambda x: hosts.put_share(x.reshape(-1, G, *x.shape[1:]), self._sharding, P)
        parts = microbatches(self._sharding.mesh, P, self._parts)
        scores = self._score(self._params, split(padded), split(lengths), parts)
        return scores, hosts.mean({"rewards/reward_model/too_long_ratio": float(1 - fits.mean())})

    def _encode(self, rollout: Rollout, batch: PromptBatch) -> list[list[int]]:
        """The reward model's tokens of each text of this process's share."""
        tokens, mask = (hosts.share(x, self._sharding) for x in (rollout.tokens, rollout.mask))
        ids = [[row[live].tolist() for row, live in zip(*group)] for group in zip(tokens, mask)]
        texts = [
            self.text(row, completion)
            for row, group in zip(batch.rows, ids)
            for completion in self._policy_tokenizer.decode_batch(group)
        ]
        # A chat template writes the begin token itself, where there is to be one.
        return self._tokenizer.encode_batch(texts, add_bos=self._chat is None and self._tokenizer.adds_bos)

    def text(self, row: Mapping[str, Any], completion: str) -> str:
        """What the reward model reads: the question as the data have it, without what the policy's template puts around it."""
        question = _QUESTION.render_prompt(row)
        if self._chat is None:
            return f"{question}\n{completion}"
        turns = [{"role": "user", "content": question}, {"role": "assistant", "content": completion}]
        try:
            return self._chat.render(turns, add_generation_prompt=False)
        except ValueError as e:  # some templates look into what was said
            raise RewardError(f"The reward model's chat cannot be rendered around a completion: {e}") from e


def chat_of(tokenizer: Tokenizer, system: str) -> ChatTemplate | None:
    """The chat of a reward model, tried out on one conversation; None where its tokenizer has no chat template.

    Raises:
      ValueError: a system prompt without a chat, or a template that cannot render.
    """
    if not tokenizer.chat_template:
        if system:
            raise ValueError(
                "config.reward_model.system is set, and the reward model's tokenizer has no chat template; leave it empty."
            )
        return None
    chat = chat_template(_QUESTION, tokenizer, system)
    chat.render([{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}], add_generation_prompt=False)
    return chat


def scoring_program(config: ModelConfig, sharding: jax.sharding.NamedSharding):
    """The jitted (params, texts int[P, G, L], lengths int[P, G], parts, static) -> scores f32[P, G], NaN where a length is 0."""
    score = on_mesh(sharding.mesh, functools.partial(_in_parts, config))
    return jax.jit(score, static_argnums=3, out_shardings=sharding)


def _in_parts(config: ModelConfig, params, tokens, lengths, parts: int) -> jax.Array:
    """Scores f32[P, G] of texts int[P, G, L]; NaN where a length is 0."""
    P, G, L = tokens.shape
    # By stride, so that on a sharded axis every device keeps its own.
    cut = lambda x: x.reshape(P // parts, parts, *x.shape[1:]).swapaxes(0, 1)

    def one(part):
        tokens, lengths = part
        mask = jnp.arange(L) < lengths[..., None]
        return reward_model.scores(config, params, tokens.reshape(-1, L), mask.reshape(-1, L)).reshape(-1, G)

    return jax.lax.map(one, (cut(tokens), cut(lengths))).swapaxes(0, 1).reshape(P, G)

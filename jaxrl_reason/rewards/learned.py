"""A pretrained reward model with a tokenizer of its own: completions are decoded, put into its chat template, and scored on the device."""

from collections.abc import Mapping
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_reason.data import ChatTemplate, PromptBatch, PromptTemplate, Tokenizer, chat_template
from jaxrl_reason.models import ModelConfig, reward_model
from jaxrl_reason.rollout import Rollout

_BUCKET = 64  # texts are padded to a multiple: few lengths are compiled


class TextScorer:
    """Rollouts in one tokenizer, scored by a reward model with another.

    Args:
      config, params, tokenizer: of the reward model. With a chat template the question is the user's turn and the completion the
        assistant's; without one they are joined.
      policy_tokenizer, template: of the run; decode completions and render questions (inside the policy's chat, what the user says).
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
        template: PromptTemplate | ChatTemplate,
        system: str,
        max_length: int,
        parts: int,
        sharding: jax.sharding.NamedSharding,
    ):
        self._params, self._tokenizer, self._policy_tokenizer = params, tokenizer, policy_tokenizer
        self._template = template.inner if isinstance(template, ChatTemplate) else template
        self._chat = chat_template(self._template, tokenizer, system) if tokenizer.chat_template else None
        if system and self._chat is None:
            raise ValueError(
                "config.reward_model.system is set, and the reward model's tokenizer has no chat template; leave it empty."
            )
        self._max_length, self._parts, self._sharding = max_length, parts, sharding
        self._score = jax.jit(functools.partial(_in_parts, config), static_argnums=3, out_shardings=sharding)

    def __call__(self, rollout: Rollout, batch: PromptBatch) -> tuple[jax.Array, dict[str, float]]:
        """Scores f32[P, G], NaN where a text is too long; and the share of these."""
        P, G, _ = rollout.tokens.shape
        tokens, mask = jax.device_get((rollout.tokens, rollout.mask))
        ids = [[row[live].tolist() for row, live in zip(*group)] for group in zip(tokens, mask)]
        texts = [
            self.text(row, completion)
            for row, group in zip(batch.rows, ids)
            for completion in self._policy_tokenizer.decode_batch(group)
        ]
        encoded = self._tokenizer.encode_batch(texts)
        fits = np.array([0 < len(ids) <= self._max_length for ids in encoded])
        longest = max((len(ids) for ids, ok in zip(encoded, fits) if ok), default=1)
        padded = np.full((len(encoded), -(-longest // _BUCKET) * _BUCKET), self._tokenizer.pad_id, np.int32)
        lengths = np.zeros(len(encoded), np.int32)
        for i in np.flatnonzero(fits):
            lengths[i] = len(encoded[i])
            padded[i, : lengths[i]] = encoded[i]
        split = lambda x: jax.device_put(x.reshape(P, G, *x.shape[1:]), self._sharding)
        scores = self._score(self._params, split(padded), split(lengths), math.gcd(P, self._parts))
        return scores, {"rewards/reward_model/too_long_ratio": float(1 - fits.mean())}

    def text(self, row: Mapping[str, Any], completion: str) -> str:
        """What the reward model reads."""
        question = self._template.render_prompt(row)
        if self._chat is None:
            return question + completion
        turns = [{"role": "user", "content": question}, {"role": "assistant", "content": completion}]
        return self._chat.render(turns, add_generation_prompt=False)


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

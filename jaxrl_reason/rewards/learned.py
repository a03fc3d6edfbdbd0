"""Scores completions on the device by a pretrained reward model, in its own tokenizer and chat template.

A reward model that was trained and exported here reads texts as in its training: config.json has their template, under `TEXTS`.
"""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_reason import config as config_lib
from jaxrl_reason.config import Config
from jaxrl_reason.data import chat_template, ChatTemplate, get_template, PromptBatch, Template, Tokenizer
from jaxrl_reason.models import ModelConfig, pad_id_of, Params, reward_model
from jaxrl_reason.models.formats.source import TEXTS
from jaxrl_reason.models.sharding import microbatches, num_prompt_shards, on_mesh
from jaxrl_reason.rewards.host import RewardError
from jaxrl_reason.rewards.scorer import local_token_ids
from jaxrl_reason.rl import hosts, waves
from jaxrl_reason.rl.types import Rollout

_QUESTION = get_template("{question}")
_BUCKET = 64  # texts are padded to a multiple of this length, so that few lengths are compiled


@dataclasses.dataclass(frozen=True)
class TrainingTexts:
    """How the training of a reward model made token ids: those of the prompt, of the completion, and the first end token."""

    template: Template
    add_bos: bool  # whether prompts begin with the begin token

    def encode(self, rows: Sequence[tuple[Mapping[str, Any], str]], tokenizer: Tokenizer) -> list[list[int]]:
        """Returns the ids of (row, completion) pairs. Raises ValueError if a row cannot be rendered.

        Some templates write text before a solution, such as a space. A completion that has it already is not given it twice.
        """
        before = self.template.render_solution({"solution": ""})
        solved = [{**row, "solution": completion.removeprefix(before)} for row, completion in rows]
        prompts = tokenizer.encode_batch([self.template.render_prompt(row) for row, _ in rows], self.add_bos)
        completions = tokenizer.encode_batch([self.template.render_solution(row) for row in solved])
        return [[*prompt, *completion, tokenizer.eos_ids[0]] for prompt, completion in zip(prompts, completions)]


class TextScorer:
    """Scores the rollouts of a policy by a reward model that has another tokenizer.

    Args:
      config, params, tokenizer: the reward model. If it was trained here, texts are those of its training, which end with
        the end token. Else, if its tokenizer has a chat template, the question is the user's turn and the completion the
        assistant's; otherwise question and completion are joined by a line break.
      source: its config.json.
      policy_tokenizer, skip_special: the tokenizer of the run, which decodes completions; with their special tokens or
        without.
      system: the system prompt of the reward model's chat.
      max_length: maximum number of tokens of a text. A longer text is never cut; it has no score and no reward.
      parts: the number of microbatches, as far as they divide the groups of a batch.
      lengths, wave_tokens: see `waves.sizes`.
    """

    def __init__(
        self,
        config: ModelConfig,
        params: Params,
        tokenizer: Tokenizer,
        source: Mapping[str, Any],
        *,
        policy_tokenizer: Tokenizer,
        skip_special: bool,
        system: str,
        max_length: int,
        parts: int,
        sharding: jax.sharding.NamedSharding,
        lengths: int = 1,
        wave_tokens: int = 0,
    ):
        self._params, self._tokenizer, self._policy_tokenizer = params, tokenizer, policy_tokenizer
        self._skip_special = skip_special
        self._trained, self._chat = texts_of(source, tokenizer, system)
        self._max_length, self._parts, self._sharding = max_length, parts, sharding
        self._score = scoring_program(config, sharding, lengths, wave_tokens, pad_id_of(source))

    def __call__(self, rollout: Rollout, batch: PromptBatch) -> tuple[jax.Array, dict[str, float]]:
        """Returns scores f32[P, G], NaN for texts that are too long, and the share of such texts."""
        P, G, _ = rollout.tokens.shape
        encoded = hosts.agree(lambda: self._encode(rollout, batch), RewardError)
        fits = np.array([0 < len(ids) <= self._max_length for ids in encoded])
        longest = hosts.largest(max((len(ids) for ids, ok in zip(encoded, fits) if ok), default=1))
        padded = np.full((len(encoded), -(-longest // _BUCKET) * _BUCKET), self._tokenizer.pad_id, np.int32)
        lengths = np.array([len(ids) if ok else 0 for ids, ok in zip(encoded, fits)], np.int32)
        for row, ids, length in zip(padded, encoded, lengths):
            row[:length] = ids[:length]
        split = lambda x: hosts.put_rows(x.reshape(-1, G, *x.shape[1:]), self._sharding, P)
        parts = microbatches(_mesh(self._sharding), P, self._parts)
        scores = self._score(self._params, split(padded), split(lengths), parts)
        return scores, hosts.mean({"rewards/reward_model/too_long_ratio": float(1 - fits.mean())})

    def _encode(self, rollout: Rollout, batch: PromptBatch) -> list[list[int]]:
        """Returns the reward model's tokens of each text in this process's rows."""
        rows = [
            (row, completion)
            for row, group in zip(batch.rows, local_token_ids(rollout, self._sharding))
            for completion in self._policy_tokenizer.completions(group, self._skip_special)
        ]
        if self._trained:
            try:
                return self._trained.encode(rows, self._tokenizer)
            except ValueError as e:
                raise RewardError(f"The reward model's template cannot render a row: {e}") from e
        texts = [self.text(row, completion) for row, completion in rows]
        # A chat template writes the begin token itself if the model uses one.
        return self._tokenizer.encode_batch(texts, add_bos=self._chat is None and self._tokenizer.adds_bos)

    def text(self, row: Mapping[str, Any], completion: str) -> str:
        """Returns the text that a reward model of others reads. The question is without the policy's template."""
        try:
            if self._chat is None:
                return f"{_QUESTION.render_prompt(row)}\n{completion}"
            turns = _QUESTION.turns(row)
            if self._chat.system:  # instead of the policy's
                turns = [turn for turn in turns if turn["role"] != "system"]
            return self._chat.render(
                [*turns, {"role": "assistant", "content": completion}], add_generation_prompt=False
            )
        except ValueError as e:  # some templates depend on the content of the turns
            raise RewardError(f"The reward model's chat cannot be rendered around a completion: {e}") from e


def training_texts(config: Config, tokenizer: Tokenizer) -> dict[str, Any]:
    """Returns the entry `TEXTS` of config.json for the reward model of a run: the fields of `data` that made its texts."""
    fields = {name: getattr(config.data, name) for name in ("template", "chat", "system", "chat_options")}
    return fields | {"add_bos": config_lib.begins_with_bos(config, tokenizer)}


def texts_of(
    source: Mapping[str, Any], tokenizer: Tokenizer, system: str
) -> tuple[TrainingTexts | None, ChatTemplate | None]:
    """Returns how the training of a reward model made texts, or the chat of a reward model of others, see `chat_of`.

    `source` is its config.json, and `system` is config.reward_model.system. Raises ValueError if `chat_of` does, and if
    the template of the training cannot be read.
    """
    if TEXTS not in source:
        return None, chat_of(tokenizer, system)
    if system:
        fault = "config.reward_model.system is set, and the reward model reads texts as in its training"
        raise ValueError(f"{fault}; leave the field empty.")
    try:
        config = config_lib.from_dict({"data": source[TEXTS]})
        config_lib.validate(config)
        return TrainingTexts(config_lib.prompt_template(config, tokenizer), config.data.add_bos), None
    except (ValueError, TypeError, AttributeError) as e:  # the file can hold anything
        fault = f"its config.json has {TEXTS} {source[TEXTS]!r:.200}, which describes no texts: {e}"
        raise ValueError(f"{fault.rstrip('.')}. Export the reward model again.") from e


def chat_of(tokenizer: Tokenizer, system: str) -> ChatTemplate | None:
    """Returns the chat of a reward model, tried on one conversation; None if its tokenizer has no chat template.

    Raises ValueError if there is a system prompt without a chat, or if the template cannot be rendered.
    """
    if not tokenizer.chat_template:
        if system:
            fault = "config.reward_model.system is set, and the reward model's tokenizer has no chat template"
            raise ValueError(f"{fault}; leave the field empty.")
        return None
    chat = chat_template(_QUESTION, tokenizer, system)
    turns = [{"role": "user", "content": "How much is 2 + 3?"}, {"role": "assistant", "content": "!"}]
    chat.check_complete(chat.render(turns, add_generation_prompt=False), turns)
    return chat


def scoring_program(
    config: ModelConfig,
    sharding: jax.sharding.NamedSharding,
    lengths: int = 1,
    wave_tokens: int = 0,
    pad_id: int | None = None,
) -> Callable[..., jax.Array]:
    """Returns the jitted (params, texts int[P,G,L], lengths int[P,G], static parts) -> f32[P,G], NaN for no tokens.

    For `lengths` and `wave_tokens` see `waves.sizes`, for which a text is a completion without a prompt; for `pad_id` see
    `reward_model.scores`.
    """

    def score(params: Params, texts: jax.Array, used: jax.Array, parts: int) -> jax.Array:
        P, G, L = texts.shape
        sizes = waves.sizes(P // num_prompt_shards(), G, 0, L, lengths, wave_tokens or P * G * L, parts)

        def of_wave(wave, found):
            tokens, own = waves.take(wave, (texts, used))
            scores = reward_model.scores(config, params, tokens[:, 0], jnp.arange(wave.length) < own, pad_id)
            return waves.put(wave, found, scores[:, None])

        return waves.for_each(sizes, waves.queue(used), of_wave, jnp.full((P, G), jnp.nan))

    return jax.jit(on_mesh(_mesh(sharding), score), static_argnums=3, out_shardings=sharding)


def _mesh(sharding: jax.sharding.NamedSharding) -> jax.sharding.Mesh:
    return cast(jax.sharding.Mesh, sharding.mesh)  # it is abstract only inside of traced functions

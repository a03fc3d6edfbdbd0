"""Samples completions of single prompts from an opened policy, all at once or as a stream of text."""

from collections.abc import Callable, Sequence
import functools
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh
import numpy as np

from jaxrl_reason import data
from jaxrl_reason.data.streams import Padded
from jaxrl_reason.models import sharding
from jaxrl_reason.models.decoding import compaction, rollout, texts
from jaxrl_reason.rl import hosts
from jaxrl_reason.rl.programs import EVAL
from jaxrl_reason.tasks.policies import LoadedPolicy, OpenedPolicy
from jaxrl_reason.tasks.self_reward import probe_token, self_reward_of

Write = Callable[[str], None]


class Sample(NamedTuple):
    """One completion."""

    text: str  # without end tokens
    tokens: int  # the end token included
    truncated: bool  # no end token within the budget
    logprob: float  # of the whole completion under the distribution that sampled it
    self_reward: float | None  # LaSeR's; None without one, and if truncated


class Sampler:
    """Samples K completions per prompt with the keys of an evaluation: seed, place of the prompt, sample and position."""

    def __init__(self, opened: OpenedPolicy, loaded: LoadedPolicy):
        self._opened, self._loaded, self._c = opened, loaded, opened.config
        top_p, top_k = self._c.eval.top_p, self._c.eval.top_k
        self._cut = {"top_k": np.int32(top_k), "top_p": np.float32(top_p)} if top_k or top_p < 1 else {}
        self._self_reward = self_reward_of(opened.method, loaded.reference)
        self._program = functools.cache(self._compiled)
        self._stream: Stream | None = None  # takes the tokens of the completion that is written

    def __call__(self, prompts: Sequence[list[int]], first: int = 0, write: Write | None = None) -> list[list[Sample]]:
        """Returns K completions per prompt, the ids of a text; `first` is the place of the first prompt.

        With `write`, the text of the first completion of one prompt is written: on one device as it is sampled, on several
        at the end.
        """
        placement, tokenizer, K = self._loaded.programs.decoding, self._opened.tokenizer, self._c.eval.samples
        shards = sharding.num_shards(placement.mesh)
        size = -(-max(min(texts.COMPLETIONS // K, len(prompts)), 1) // shards) * shards
        padded, out = Padded(list(prompts), tokenizer.pad_id), []
        self._stream = Stream(tokenizer, write) if write else None
        run = self._program(streams=write is not None and placement.mesh.size == 1)
        whole = sharding.replicated(placement.mesh)
        scalars = jax.tree.map(lambda x: hosts.put(x, whole), self._scalars())
        for start in range(0, len(prompts), size):
            places = start + np.arange(size)
            places = np.where(places < len(prompts), places, start)
            tokens, mask = padded.take(places)
            more = ((0, 0), (0, padded_length(tokens.shape[1], doubling=write is not None) - tokens.shape[1]))
            inputs = np.pad(tokens, more, constant_values=tokenizer.pad_id), np.pad(mask, more), places + first
            mine = hosts.local_rows(placement, size)
            put = [
                hosts.put_rows(x[mine].astype(x.dtype if x.dtype == bool else np.int32), placement, size)
                for x in inputs
            ]
            found = run(self._loaded.weights, *put, **scalars)
            out += self._samples(found)[: len(prompts) - start]
        if self._stream:
            jax.effects_barrier()
            self._stream.end(out[0][0].text)
        return out

    def _scalars(self) -> dict[str, Any]:
        return {"seed": np.int32(self._c.seed), "temperature": np.float32(self._c.eval.temperature), **self._cut}

    def _samples(self, found: rollout.Rollout) -> list[list[Sample]]:
        rewards = None if self._self_reward is None else self._self_reward(found)
        fields = found.tokens, found.mask, found.logprobs, found.truncated
        tokens, mask, logprobs, truncated = (hosts.to_host(x) for x in fields)
        out: list[list[Sample]] = []
        for p, group in enumerate(tokens):
            ids = [row[live].tolist() for row, live in zip(group, mask[p])]
            out.append(
                [
                    Sample(
                        text,
                        len(ids[g]),
                        bool(truncated[p, g]),
                        float(logprobs[p, g][mask[p, g]].sum()),
                        None if rewards is None or np.isnan(rewards[p, g]) else float(rewards[p, g]),
                    )
                    for g, text in enumerate(self._opened.tokenizer.completions(ids))
                ]
            )
        return out

    def _watch(self, tokens: np.ndarray, live: np.ndarray) -> None:
        if self._stream and live[0, 0]:
            self._stream.token(int(tokens[0, 0]))

    def _compiled(self, streams: bool) -> Callable[..., rollout.Rollout]:
        c, made, tokenizer = self._c, self._loaded.programs, self._opened.tokenizer
        pieces, halvings = compaction.loop_sizes(c.max_completion_length)

        def sample(params, tokens, mask, prompt_ids, seed, **scalars):
            key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), EVAL), 0)
            return rollout.generate(
                made.model,
                params,
                tokens,
                mask,
                prompt_ids,
                key,
                group_size=c.eval.samples,
                max_length=c.max_completion_length,
                eos_ids=tokenizer.eos_ids,
                pad_id=tokenizer.pad_id,
                probe_token=probe_token(self._opened.method, tokenizer),
                probe_temperature=c.sampling.temperature,
                cache_pieces=pieces,
                halvings=0 if streams else halvings,  # rows stay in their places
                watch=self._watch if streams else None,
                **scalars,
            )

        assert isinstance(made.decoding.mesh, Mesh)
        return jax.jit(sharding.on_mesh(made.decoding.mesh, sample), out_shardings=made.decoding)


def padded_length(tokens: int, doubling: bool) -> int:
    """Returns the length of a batch of prompts: a multiple of 32, or with `doubling` 32, 64, 128, ...

    A session doubles, so that a growing conversation compiles few programs.

    Example:
      >>> padded_length(70, doubling=False), padded_length(70, doubling=True)
      (96, 128)
    """
    parts = -(-tokens // texts.LENGTHS)
    return texts.LENGTHS * (1 << (parts - 1).bit_length() if doubling else parts)


class Stream:
    """Writes the text of a completion while its tokens arrive; characters of several tokens only whole."""

    def __init__(self, tokenizer: data.Tokenizer, write: Write):
        self._tokenizer, self._write, self._ids, self._written = tokenizer, write, list[int](), ""

    def token(self, token_id: int) -> None:
        """Takes the next token."""
        self._ids.append(int(token_id))
        text = self._tokenizer.completions([self._ids])[0].rstrip("\N{REPLACEMENT CHARACTER}")
        if text.startswith(self._written):
            self._write(text[len(self._written) :])
            self._written = text

    def end(self, text: str) -> None:
        """Writes the rest of the whole text."""
        self._write(text.removeprefix(self._written))

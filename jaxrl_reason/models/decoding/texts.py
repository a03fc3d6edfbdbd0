"""Texts from a policy: completions of prompts that are texts or conversations."""

from collections.abc import Callable, Mapping, Sequence
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
import numpy as np

from jaxrl_reason.data import chat as chat_lib
from jaxrl_reason.data.prompts import PromptTemplate
from jaxrl_reason.data.streams import Padded
from jaxrl_reason.data.tokenizer import Tokenizer
from jaxrl_reason.models import sharding
from jaxrl_reason.models.config import ModelConfig
from jaxrl_reason.models.decoder import Params
from jaxrl_reason.models.decoding import compaction, rollout

Prompt = str | Sequence[Mapping[str, Any]]
EVALUATION = (
    3  # the purpose of random numbers in evaluations, as in `rl.programs`: the samples are then those of an evaluation
)
COMPLETIONS = 64  # at once, if the caller names no number of prompts
LENGTHS = 32  # prompts are padded to a multiple, so that prompts of similar lengths share a compiled program


def sample_texts(
    config: ModelConfig,
    params: Params,
    tokenizer: Tokenizer,
    prompts: Sequence[Prompt],
    samples: int,
    *,
    max_completion_length: int,
    temperature: float,
    top_p: float,
    top_k: int,
    seed: int,
    chat: bool | None,
    batch_size: int | None,
) -> list[list[str]]:
    """Returns `samples` completions per prompt; see `Policy.generate`. Raises ValueError for arguments that do not fit."""
    sizes = dict(samples=samples, max_completion_length=max_completion_length, batch_size=batch_size)
    for name, size in sizes.items():
        if size is not None and size < 1:
            raise ValueError(f"{name} is {size}; it has to be at least 1.")
    check_sampling(temperature, top_p, top_k)
    ids = encode_prompts(tokenizer, prompts, chat)
    if not ids:
        return []
    mesh = _mesh_of(params)
    shards = sharding.num_shards(mesh) if mesh else 1
    at_once = min(batch_size or max(COMPLETIONS // samples, 1), len(ids))
    at_once = math.ceil(at_once / shards) * shards
    run = _program(config, mesh, samples, max_completion_length, tokenizer.eos_ids, tokenizer.pad_id)
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), EVALUATION), 0)
    settings: dict[str, Any] = {"temperature": jnp.float32(temperature)}
    if top_k or top_p < 1:
        settings |= {"top_k": jnp.int32(top_k), "top_p": jnp.float32(top_p)}
    put = (lambda x: jax.device_put(x, sharding.batch_sharding(mesh))) if mesh else jnp.asarray
    padded, texts = Padded(ids, tokenizer.pad_id), []
    for start in range(0, len(ids), at_once):
        places = np.arange(start, start + at_once)
        places = np.where(places < len(ids), places, start).astype(np.int32)
        tokens, mask = padded.take(places)
        more = ((0, 0), (0, -tokens.shape[1] % LENGTHS))
        inputs = np.pad(tokens, more, constant_values=tokenizer.pad_id), np.pad(mask, more), places
        found = run(params, *map(put, inputs), key, **settings)
        real = min(at_once, len(ids) - start)
        tokens, mask = np.asarray(found.tokens)[:real], np.asarray(found.mask)[:real]
        texts += [tokenizer.completions([t[m].tolist() for t, m in zip(*group)]) for group in zip(tokens, mask)]
    return texts


def check_sampling(temperature: float, top_p: float, top_k: int) -> None:
    """Raises ValueError if a setting of sampling is out of its range."""
    if not 0 <= temperature < math.inf:
        raise ValueError(f"temperature is {temperature}; it has to be a number that is at least 0 (0: greedy).")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p is {top_p}; it has to be above 0 and at most 1 (1: keeps all tokens).")
    if top_k < 0:
        raise ValueError(f"top_k is {top_k}; it has to be at least 0 (0: keeps all tokens).")


def encode_prompts(tokenizer: Tokenizer, prompts: Sequence[Prompt], chat: bool | None) -> list[list[int]]:
    """Returns the ids of prompts; see `Policy.generate`. Raises ValueError, with its number, for a prompt that does not fit."""
    if isinstance(prompts, str):
        raise ValueError("prompts is one text; give a list of prompts.")
    ids = []
    for i, prompt in enumerate(prompts):
        is_text = isinstance(prompt, str)
        if not is_text and not isinstance(prompt, Sequence):
            raise ValueError(f"Prompt {i} is {prompt!r:.60}; a prompt is a text or a list of turns.")
        if chat is False and not is_text:
            raise ValueError(
                f"Prompt {i} is a conversation, and chat is False; set it to True or None, or give a text."
            )
        try:
            render = not is_text if chat is None else chat
            text = _template(tokenizer).render_prompt({"question": _turns(prompt)}) if render else str(prompt)
        except ValueError as e:
            raise ValueError(f"Prompt {i} cannot be rendered: {e}") from e
        ids.append(tokenizer.encode(text, add_bos=tokenizer.adds_bos and not render))
        if not ids[-1]:
            raise ValueError(f"Prompt {i} is empty; a prompt has at least one token.")
    return ids


def _turns(prompt: Prompt) -> list[dict[str, Any]]:
    if isinstance(prompt, str):
        return [{"role": "user", "content": prompt}]
    return [dict(turn) if isinstance(turn, Mapping) else turn for turn in prompt]


@functools.lru_cache(maxsize=8)
def _template(tokenizer: Tokenizer) -> chat_lib.ChatTemplate:
    if not tokenizer.chat_template:
        raise ValueError("the tokenizer has no chat template; give the prompt as text, with chat=None or False.")
    return chat_lib.chat_template(PromptTemplate("question", prompt="{question}"), tokenizer)


def _mesh_of(params: Params) -> Mesh | None:
    """Returns the mesh on which the weights are, or None."""
    found = jax.tree.leaves(params)[0].sharding
    return found.mesh if isinstance(found, NamedSharding) and isinstance(found.mesh, Mesh) else None


@functools.lru_cache(maxsize=16)
def _program(
    config: ModelConfig, mesh: Mesh | None, samples: int, length: int, eos_ids: tuple[int, ...], pad_id: int
) -> Callable[..., rollout.Rollout]:
    """Returns the compiled sampler of prompts on a mesh; None: on the first device."""
    pieces, halvings = compaction.loop_sizes(length)
    sample = functools.partial(
        rollout.generate,
        config,
        group_size=samples,
        max_length=length,
        eos_ids=eos_ids,
        pad_id=pad_id,
        cache_pieces=pieces,
        halvings=halvings,
    )
    if mesh is None:
        return jax.jit(sample)
    return jax.jit(sharding.on_mesh(mesh, sample), out_shardings=sharding.batch_sharding(mesh))

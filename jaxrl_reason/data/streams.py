"""Endless shuffled batches whose whole position is one integer: `stream.batch(i)` is a pure function of `i`.

Prompts and completions are tokenised separately and joined as ids, so that RL meets exactly the prompt ids of the supervised phase.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar
import warnings

import grain
import numpy as np

from jaxrl_reason.data import files
from jaxrl_reason.data.prompts import PromptTemplate
from jaxrl_reason.data.sources import Source
from jaxrl_reason.data.tokenizer import Tokenizer

Rows = Sequence[Mapping[str, Any]]  # a Source, or a list of dicts
T = TypeVar("T")


class PromptBatch(NamedTuple):
    """P prompts, right padded to S tokens.

    Attributes:
      tokens: int32[P, S].
      mask: bool[P, S], True on real tokens.
      prompt_ids: int32[P]. In training the position in the endless stream, never repeated; in evaluation the row of the source.
      weight: float32[P], 1 on real rows, 0 on the copies that fill up the last evaluation batch.
      rows: the P rows of the source, for rewards.
      features: float32[P, F], numbers that the prompts carry beside their tokens, or None.
      columns: name -> [P, ...], arrays that a method or a device reward needs.
    """

    tokens: np.ndarray
    mask: np.ndarray
    prompt_ids: np.ndarray
    weight: np.ndarray
    rows: list[dict[str, Any]]
    features: np.ndarray | None = None
    columns: Mapping[str, np.ndarray] = {}

    def take(self, places: np.ndarray) -> "PromptBatch":
        """The prompts at these places, int[n]."""
        if np.array_equal(places, np.arange(len(self.rows))):
            return self
        cut = lambda x: None if x is None else x[places]
        rows = [self.rows[i] for i in places]
        columns = {name: cut(column) for name, column in self.columns.items()}
        return PromptBatch(*map(cut, self[:4]), rows, cut(self.features), columns)

    def split(self, parts: int) -> "list[PromptBatch]":
        """The batch in so many parts, by stride: as `learner.split` splits arrays on the device."""
        return [self.take(np.arange(part, len(self.rows), parts)) for part in range(parts)]


class SolutionBatch(NamedTuple):
    """B prompts with the completions to learn, each right padded: prompts to S tokens, completions, end token included, to T.

    Attributes:
      prompt_tokens: int32[B, S].
      prompt_mask: bool[B, S], True on real tokens.
      completion_tokens: int32[B, T].
      completion_mask: bool[B, T], True on real tokens, the end token among them.
      features: float32[B, F], as in `PromptBatch`, or None.
    """

    prompt_tokens: np.ndarray
    prompt_mask: np.ndarray
    completion_tokens: np.ndarray
    completion_mask: np.ndarray
    features: np.ndarray | None = None


class PromptStream:
    """Prompts for training, shuffled anew each epoch. Batches run on across the end of an epoch: no row is dropped or repeated within one.

    Args:
      source: the rows.
      tokenizer: turns rendered prompts into ids, once, here.
      template: turns rows into prompts.
      batch_size: P, prompts a batch; it need not divide the number of rows.
      max_prompt_length: S, tokens a prompt may have.
      seed: of the shuffle, in [0, 2**32).
      shuffle: False keeps the order of the source in every epoch.
      on_long: what a prompt of more than S tokens, or of none, does: "refuse" raises, "skip" leaves the row out, counts and warns.
      add_bos: whether prompts begin with the tokenizer's begin token.
      columns: name -> [rows of the source, ...], arrays that batches carry along.
      places: int[n], the places of a batch that are read and returned, one process's share; None: all.

    Attributes:
      skipped: the number of rows left out.

    Raises:
      ValueError: no rows, prompts that do not fit, a column the template needs is missing, or an argument is out of range.
    """

    def __init__(
        self,
        source: Rows,
        tokenizer: Tokenizer,
        template: PromptTemplate,
        *,
        batch_size: int,
        max_prompt_length: int,
        seed: int,
        shuffle: bool = True,
        on_long: str = "refuse",
        add_bos: bool = False,
        columns: Mapping[str, np.ndarray] = {},
        places: np.ndarray | None = None,
    ):
        prompts = tokenizer.encode_batch(rendered(source, template.render_prompt), add_bos)
        self._columns = dict(columns)
        self._kept = fitting(source, on_long, prompt=(prompts, max_prompt_length))
        self.skipped = len(source) - len(self._kept)
        self._source = source
        self._prompts = Padded([prompts[i] for i in self._kept], max_prompt_length, tokenizer.pad_id)
        self._order = endless(len(self._kept), batch_size, seed, shuffle)
        self._batch_size = batch_size
        self._places = np.arange(batch_size) if places is None else places

    def batch(self, i: int) -> PromptBatch:
        """Batch `i` of the stream, for any i >= 0; the same whenever and in whatever order it is asked for."""
        chosen = batch_at(self._order, i)[self._places]
        tokens, mask = self._prompts.take(chosen)
        rows = [self._kept[k] for k in chosen]
        return PromptBatch(
            tokens=tokens,
            mask=mask,
            prompt_ids=np.int32(i * self._batch_size + self._places),
            weight=np.ones(len(chosen), np.float32),
            rows=_read(self._source, rows),
            columns={name: column[rows] for name, column in self._columns.items()},
        )


class SolutionStream:
    """Prompts with worked solutions for the supervised phase; the stream behaves as `PromptStream`.

    A completion is the rendered solution and the tokenizer's first end token. `on_long` covers completions of more than T tokens too.
    """

    def __init__(
        self,
        source: Rows,
        tokenizer: Tokenizer,
        template: PromptTemplate,
        *,
        batch_size: int,
        max_prompt_length: int,
        max_completion_length: int,
        seed: int,
        shuffle: bool = True,
        on_long: str = "refuse",
        add_bos: bool = False,
        places: np.ndarray | None = None,
    ):
        texts = rendered(source, lambda row: (template.render_prompt(row), template.render_solution(row)))
        prompts = tokenizer.encode_batch([prompt for prompt, _ in texts], add_bos)
        completions = [
            ids + [tokenizer.eos_ids[0]] for ids in tokenizer.encode_batch([solution for _, solution in texts])
        ]
        kept = fitting(
            source, on_long, prompt=(prompts, max_prompt_length), completion=(completions, max_completion_length)
        )
        self.skipped = len(source) - len(kept)
        self._prompts = Padded([prompts[i] for i in kept], max_prompt_length, tokenizer.pad_id)
        self._completions = Padded([completions[i] for i in kept], max_completion_length, tokenizer.pad_id)
        self._order = endless(len(kept), batch_size, seed, shuffle)
        self._places = np.arange(batch_size) if places is None else places

    def batch(self, i: int) -> SolutionBatch:
        """Batch `i` of the stream, for any i >= 0; the same whenever and in whatever order it is asked for."""
        chosen = batch_at(self._order, i)[self._places]
        return SolutionBatch(*self._prompts.take(chosen), *self._completions.take(chosen))


def eval_prompts(
    source: Rows,
    tokenizer: Tokenizer,
    template: PromptTemplate,
    count: int,
    *,
    batch_size: int,
    max_prompt_length: int,
    on_long: str = "refuse",
    add_bos: bool = False,
) -> list[PromptBatch]:
    """The first `count` rows of the source (all, where it has fewer), in order, in batches of one size.

    The last batch is filled up with copies of its own first row that have weight 0. Under on_long="skip" the rows that
    do not fit are left out with a warning, not replaced by later ones.

    Raises:
      ValueError: as `PromptStream`, or `count` is below 1.
    """
    _positive(count=count, batch_size=batch_size)
    count = min(count, len(source))
    prompts = tokenizer.encode_batch(rendered(source, template.render_prompt, _read(source, range(count))), add_bos)
    kept = fitting(source, on_long, prompt=(prompts, max_prompt_length))
    padded = Padded(prompts, max_prompt_length, tokenizer.pad_id)
    batches = []
    for start in range(0, len(kept), batch_size):
        real = kept[start : start + batch_size]
        chosen = np.array(real + real[:1] * (batch_size - len(real)), np.int32)
        weight = (np.arange(batch_size) < len(real)).astype(np.float32)
        batches.append(PromptBatch(*padded.take(chosen), chosen, weight, _read(source, chosen)))
    return batches


class Padded:
    """Token sequences of different lengths, kept end to end and padded only when taken."""

    def __init__(self, sequences: list[list[int]], length: int, pad_id: int):
        self._flat = np.array([token for ids in sequences for token in ids], np.int32)
        self._starts = np.cumsum([0, *map(len, sequences)])
        self._length = length
        self._pad_id = pad_id

    def take(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The sequences at `indices`: tokens int32[len(indices), length] and mask bool of the same shape."""
        tokens = np.full((len(indices), self._length), self._pad_id, np.int32)
        lengths = self._starts[indices + 1] - self._starts[indices]
        mask = np.arange(self._length) < lengths[:, None]
        for row, index in zip(tokens, indices):
            ids = self._flat[self._starts[index] : self._starts[index + 1]]
            row[: len(ids)] = ids
        return tokens, mask


def endless(size: int, batch_size: int, seed: int, shuffle: bool) -> grain.MapDataset:
    """Batches of row positions, int64[batch_size], over epoch after epoch."""
    _positive(batch_size=batch_size)
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed is {seed}; it has to be at least 0 and below 2**32.")
    order = grain.MapDataset.range(size).seed(seed)
    if shuffle:
        order = order.shuffle()
    # Repeating before batching lets a batch run on into the next epoch, which grain shuffles differently.
    return order.repeat().batch(batch_size)


def batch_at(order: grain.MapDataset, i: int) -> np.ndarray:
    if i < 0:
        raise IndexError(f"Batch {i} was asked for; batches are numbered from 0.")
    return order[i]


def _read(source: Rows, indices: Sequence[int]) -> list[dict[str, Any]]:
    # A file read once for many rows is several times faster than once a row.
    return source.read(indices) if isinstance(source, Source) else [dict(source[i]) for i in indices]


def place_of(source: Rows, i: int) -> str:
    """What messages call row `i`: its file and line, where it has one."""
    return source.place(i) if isinstance(source, Source) else f"row {i}"


def rendered(source: Rows, render: Callable[[Mapping[str, Any]], T], first: Rows | None = None) -> list[T]:
    """`render` of the source's first rows, where they are read already, else of all; a ValueError names the row."""
    out = []
    try:
        for row in source if first is None else first:
            out.append(render(row))
    except ValueError as error:
        raise ValueError(f"{place_of(source, len(out))}: {error}") from error
    return out


def fitting(source: Rows, on_long: str, **sequences: tuple[list[list[int]], int]) -> list[int]:
    """The rows whose every sequence has between 1 and its limit of tokens; the others are refused or counted in a warning.

    Args:
      source: the rows, for their places in messages.
      on_long: "refuse" or "skip".
      **sequences: the ids of the first rows, or of all, and the most that fit.
    """
    if on_long not in ("refuse", "skip"):
        raise ValueError(f"on_long is {on_long!r}; it has to be 'refuse' or 'skip'.")
    rows = len(next(iter(sequences.values()))[0])
    if not rows:
        raise ValueError("The data set has no rows.")
    reasons = {}
    for kind, (ids, limit) in sequences.items():
        _positive(**{f"max_{kind}_length": limit})
        for row, tokens in enumerate(ids):
            if not 0 < len(tokens) <= limit:
                reasons.setdefault(row, f"a {kind} of {len(tokens)} tokens, where 1 to {limit} fit (max_{kind}_length)")
    if not reasons:
        return list(range(rows))
    first = [f"{place_of(source, row)} has {reasons[row]}" for row in sorted(reasons)[: files.REPORTED]]
    if on_long == "refuse" or len(reasons) == rows:
        advice = (
            "Raise the limit."
            if len(reasons) == rows
            else "Raise the limit, or set config.data.on_long_prompt to 'skip' to leave such rows out."
        )
        raise ValueError(files.listed(f"{len(reasons)} of {rows} rows do not fit", first, len(reasons)) + f"\n{advice}")
    summary = f"Skipped: {len(reasons)} of {rows} rows do not fit"
    warnings.warn(files.listed(summary, first, len(reasons)), stacklevel=3)
    return [row for row in range(rows) if row not in reasons]


def _positive(**values: int) -> None:
    for name, value in values.items():
        if value < 1:
            raise ValueError(f"{name} is {value}; it has to be at least 1.")

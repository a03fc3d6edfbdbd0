"""Endless shuffled batches whose position is one integer: `stream.batch(i)` is a pure function of `i`.

Prompts and completions are tokenised apart and joined as ids: RL uses exactly the prompt ids of the supervised phase.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar
import warnings

import grain
import numpy as np

from jaxrl_reason.data import files
from jaxrl_reason.data.prompts import Template, WITHOUT_SOLUTIONS
from jaxrl_reason.data.sources import Source
from jaxrl_reason.data.tokenizer import Tokenizer

Rows = Sequence[Mapping[str, Any]] | Source
Arrays = Mapping[str, np.ndarray]
T = TypeVar("T")


class PromptBatch(NamedTuple):
    """P prompts, right padded to S tokens, the longest prompt of the stream."""

    tokens: np.ndarray  # int32[P, S]
    mask: np.ndarray  # bool[P, S], True on real tokens
    prompt_ids: np.ndarray  # int32[P]: places in the endless stream, never repeated; in evaluation, rows of the source
    weight: np.ndarray  # float32[P], 1 on real rows, 0 on the copies that fill up the last evaluation batch
    rows: list[dict[str, Any]]  # the P rows of the source, for rewards
    features: np.ndarray | None = None  # float32[P, F], the numbers of a table's rows
    columns: Arrays = {}  # name -> [P, ...], arrays that a method or a device reward needs

    def take(self, places: np.ndarray) -> "PromptBatch":
        """Returns the prompts at these places, int[n]."""
        if np.array_equal(places, np.arange(len(self.rows))):
            return self
        tokens, mask, ids, weight = (array[places] for array in self[:4])
        features = None if self.features is None else self.features[places]
        columns = {name: column[places] for name, column in self.columns.items()}
        return PromptBatch(tokens, mask, ids, weight, [self.rows[i] for i in places], features, columns)

    def split(self, parts: int) -> "list[PromptBatch]":
        """Returns the batch in `parts` strided parts, as `scoring.split_prompts` splits arrays on the device."""
        return [self.take(np.arange(part, len(self.rows), parts)) for part in range(parts)]


class SolutionBatch(NamedTuple):
    """B prompts and the completions to learn, right padded to S and T tokens, the longest ones of the stream."""

    prompt_tokens: np.ndarray  # int32[B, S]
    prompt_mask: np.ndarray  # bool[B, S], True on real tokens
    completion_tokens: np.ndarray  # int32[B, T]
    completion_mask: np.ndarray  # bool[B, T], True on real tokens, the end token included
    features: np.ndarray | None = None  # float32[B, F], as in `PromptBatch`


class TextStream:
    """Tokenises rows once and reads them in an endless order; the base of the streams of prompts, solutions and pairs.

    Each epoch has another order. A batch may cross the end of an epoch: no row is dropped, or repeated within an epoch.
    An epoch has `size` rows; `skipped` rows are left out.

    Args:
      batch_size: rows per batch; it need not divide the number of rows.
      max_prompt_length, max_completion_length: S and T, the most tokens of prompts, and of completions with end token.
      seed, shuffle: the seed of the shuffle, in [0, 2**32); shuffle=False keeps the order of the source in every epoch.
      on_long: the treatment of rows with no tokens or too many: "refuse" raises; "skip" leaves them out and warns.
      add_bos: whether prompts begin with the tokenizer's begin token.
      local_rows: int[n], the rows of a batch that this process reads and returns; None: all.

    Raises ValueError if no row exists, rows do not fit, a column is missing, or an argument is out of range.
    """

    def __init__(
        self,
        source: Rows,
        tokenizer: Tokenizer,
        template: Template,
        *,
        batch_size: int,
        max_prompt_length: int,
        max_completion_length: int = 0,
        seed: int,
        shuffle: bool = True,
        on_long: str = "refuse",
        add_bos: bool = False,
        local_rows: np.ndarray | None = None,
    ):
        texts = render_rows(source, lambda row: (template.render_prompt(row), *self._completions(template, row)))
        prompts = tokenizer.encode_batch([prompt for prompt, *_ in texts], add_bos)
        ids = tokenizer.encode_batch([completion for _, *completions in texts for completion in completions])
        self._per_row = k = len(texts[0]) - 1 if texts else 0
        completions = [[[*x, tokenizer.eos_ids[0]] for x in ids[k * i : k * (i + 1)]] for i in range(len(texts))]
        self._check(source, texts, completions)
        limits = {"prompt": (prompts, max_prompt_length)}
        if k:
            limits["completion"] = ([max(group, key=len) for group in completions], max_completion_length)
        self._kept = fitting_rows(source, on_long, **limits)
        self.size, self.skipped = len(self._kept), len(source) - len(self._kept)
        self._batch_size = batch_size
        self._prompts = Padded([prompts[i] for i in self._kept], tokenizer.pad_id)
        kept = [ids for i in self._kept for ids in completions[i]]
        self._padded_completions = Padded(kept, tokenizer.pad_id)
        self._order = endless(self.size, batch_size, seed, shuffle)
        self._local_rows = np.arange(batch_size) if local_rows is None else local_rows

    def _completions(self, template: Template, row: Mapping[str, Any]) -> tuple[str, ...]:
        """Returns the texts of the completions of a row; every row has the same number."""
        return ()

    def _check(self, source: Rows, texts: list[tuple[str, ...]], completions: list[list[list[int]]]) -> None:
        """Raises ValueError if the rows, each a rendered (prompt, *completions), cannot be used together."""

    def _read(self, i: int) -> tuple[np.ndarray, tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:
        """Returns the positions in `_kept` of batch `i`, the prompts and the completions, each as tokens and mask."""
        chosen, k = batch_at(self._order, i)[self._local_rows], self._per_row
        completions = (k * chosen[:, None] + np.arange(k)).ravel()
        return chosen, self._prompts.take(chosen), self._padded_completions.take(completions)


class PromptStream(TextStream):
    """Prompts for training; a batch has its rows of the arrays in `columns`. Other arguments are as in `TextStream`."""

    def __init__(
        self, source: Rows, tokenizer: Tokenizer, template: Template, *, columns: Arrays | None = None, **options: Any
    ):
        super().__init__(source, tokenizer, template, **options)
        self._source, self._columns = source, dict(columns or {})

    def batch(self, i: int) -> PromptBatch:
        """Returns batch `i` of the stream, for any i >= 0."""
        chosen, (tokens, mask), _ = self._read(i)
        rows = [self._kept[k] for k in chosen]
        ids, weight = np.asarray(i * self._batch_size + self._local_rows, np.int32), np.ones(len(chosen), np.float32)
        columns = {name: column[rows] for name, column in self._columns.items()}
        return PromptBatch(tokens, mask, ids, weight, _read_rows(self._source, rows), columns=columns)


class SolutionStream(TextStream):
    """Prompts with worked solutions for the supervised phase: the rendered solution, then the tokenizer's first end token."""

    def _completions(self, template: Template, row: Mapping[str, Any]) -> tuple[str, ...]:
        if row.get("solution") == "":
            raise ValueError(f"column 'solution' is empty, and would teach an empty completion{WITHOUT_SOLUTIONS}")
        return (template.render_solution(row),)

    def batch(self, i: int) -> SolutionBatch:
        """Returns batch `i` of the stream, for any i >= 0."""
        _, prompts, completions = self._read(i)
        return SolutionBatch(*prompts, *completions)


def eval_prompts(
    source: Rows,
    tokenizer: Tokenizer,
    template: Template,
    count: int,
    *,
    batch_size: int,
    max_prompt_length: int,
    on_long: str = "refuse",
    add_bos: bool = False,
) -> list[PromptBatch]:
    """Returns the first `count` rows of the source, or all if it has fewer, in order, in batches of one size.

    The last batch is filled up with copies of its first row, which have weight 0. Under on_long="skip", no later rows
    replace the rows that do not fit. `count` is at least 1. The other arguments and errors are as in `TextStream`.
    """
    _positive(count=count, batch_size=batch_size)
    count = min(count, len(source))
    texts = render_rows(source, template.render_prompt, _read_rows(source, range(count)))
    prompts = tokenizer.encode_batch(texts, add_bos)
    kept = fitting_rows(source, on_long, prompt=(prompts, max_prompt_length))
    padded = Padded([prompts[i] for i in kept], tokenizer.pad_id)
    batches = []
    for start in range(0, len(kept), batch_size):
        places = start + np.arange(batch_size)
        real = places < len(kept)
        places = np.where(real, places, start)
        chosen = np.array(kept, np.int32)[places]
        rows = _read_rows(source, chosen)
        batches.append(PromptBatch(*padded.take(places), chosen, real.astype(np.float32), rows))
    return batches


class Padded:
    """Token sequences of different lengths, stored end to end and padded on access to the length of the longest one."""

    def __init__(self, sequences: list[list[int]], pad_id: int):
        self._flat = np.array([token for ids in sequences for token in ids], np.int32)
        self._starts = np.cumsum([0, *map(len, sequences)])
        self._length, self._pad_id = max(map(len, sequences), default=0), pad_id

    def take(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns the sequences at `indices`, int[n], as tokens int32[n, length] and mask bool[n, length]."""
        tokens = np.full((len(indices), self._length), self._pad_id, np.int32)
        lengths = self._starts[indices + 1] - self._starts[indices]
        mask = np.arange(self._length) < lengths[:, None]
        for row, index in zip(tokens, indices):
            ids = self._flat[self._starts[index] : self._starts[index + 1]]
            row[: len(ids)] = ids
        return tokens, mask


def endless(size: int, batch_size: int, seed: int, shuffle: bool) -> grain.MapDataset:
    """Returns batches of row positions, int64[batch_size], over epoch after epoch."""
    _positive(batch_size=batch_size)
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed is {seed}; it has to be at least 0 and below 2**32.")
    order = grain.MapDataset.range(size).seed(seed)
    # Repeating before batching lets a batch continue into the next epoch, which grain shuffles differently.
    return (order.shuffle() if shuffle else order).repeat().batch(batch_size)


def batch_at(order: grain.MapDataset, i: int) -> np.ndarray:
    """Returns batch `i` of `endless`; raises IndexError if `i` is negative."""
    if i < 0:
        raise IndexError(f"There is no batch {i}; batches are numbered from 0.")
    return order[i]


def _read_rows(source: Rows, indices: Sequence[int] | np.ndarray) -> list[dict[str, Any]]:
    # One read of many rows is several times faster than one read per row.
    return source.read(list(indices)) if isinstance(source, Source) else [dict(source[i]) for i in indices]


def place_of(source: Rows, i: int) -> str:
    """Returns the name of row `i` in messages: its file and line, if known."""
    return source.place(i) if isinstance(source, Source) else f"row {i}"


def render_rows(source: Rows, render: Callable[[Mapping[str, Any]], T], rows: Rows | None = None) -> list[T]:
    """Renders the first rows of a source, if they are read already, else all; a ValueError of `render` names the row."""
    out: list[T] = []
    try:
        for row in source if rows is None else rows:
            out.append(render(row))
    except ValueError as error:
        raise ValueError(f"{place_of(source, len(out))}: {error}") from error
    return out


def fitting_rows(source: Rows, on_long: str, **sequences: tuple[list[list[int]], int]) -> list[int]:
    """Returns the rows of which every sequence has between 1 and its limit of tokens.

    `sequences` maps kind -> (the ids of the first rows or of all rows, the limit). `on_long` is "refuse" or "skip".
    Raises ValueError if there are no rows, a limit is below 1, no row fits, or a row does not fit under "refuse".
    """
    if on_long not in ("refuse", "skip"):
        raise ValueError(f"on_long is {on_long!r}; it has to be 'refuse' or 'skip'.")
    count = len(next(iter(sequences.values()))[0])
    if not count:
        raise ValueError("The data set has no rows.")
    reasons: dict[int, str] = {}
    for kind, (ids, limit) in sequences.items():
        _positive(**{f"max_{kind}_length": limit})
        for row, tokens in enumerate(ids):
            if not 0 < len(tokens) <= limit:
                reasons.setdefault(row, f"a {kind} of {len(tokens)} tokens; 1 to {limit} fit (max_{kind}_length)")
    if not reasons:
        return list(range(count))
    first = [f"{place_of(source, row)} has {reasons[row]}" for row in sorted(reasons)[: files.REPORTED]]
    if on_long == "refuse" or len(reasons) == count:
        skip = "" if len(reasons) == count else ", or set config.data.on_long_prompt to 'skip' to leave such rows out"
        summary = f"{len(reasons)} of {count} rows do not fit"
        raise ValueError(files.listed(summary, first, len(reasons)) + f"\nRaise the limit{skip}.")
    summary = f"Skipped: {len(reasons)} of {count} rows do not fit"
    warnings.warn(files.listed(summary, first, len(reasons)), stacklevel=4)
    return [row for row in range(count) if row not in reasons]


def _positive(**values: int) -> None:
    for name, value in values.items():
        if value < 1:
            raise ValueError(f"{name} is {value}; it has to be at least 1.")

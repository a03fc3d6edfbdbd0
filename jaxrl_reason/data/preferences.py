"""Preference pairs for reward models: batches by number, each prompt with a chosen and a rejected completion."""

from collections.abc import Mapping
from typing import Any, NamedTuple
import warnings

import numpy as np

from jaxrl_reason.data import files
from jaxrl_reason.data.prompts import Template
from jaxrl_reason.data.sources import Source
from jaxrl_reason.data.streams import place_of, Rows, TextStream


class PreferenceBatch(NamedTuple):
    """B prompts, each with a group of two completions: first the chosen one, then the rejected one. All are right padded."""

    prompt_tokens: np.ndarray  # int32[B, S]
    prompt_mask: np.ndarray  # bool[B, S], True on real tokens
    tokens: np.ndarray  # int32[B, 2, T]
    mask: np.ndarray  # bool[B, 2, T], True on real tokens, the end token included


class PreferenceStream(TextStream):
    """Pairs for training a reward model, with the arguments of `TextStream`.

    The columns `chosen` and `rejected` are completions without their end token. The template renders each of them as a
    `solution`: a template whose solutions begin with a space adds the space. A row fits if its longer completion does.
    Raises ValueError also if a column is missing or not text, or the tokens of a pair are equal.
    """

    def _completions(self, template: Template, row: Mapping[str, Any]) -> tuple[str, ...]:
        for column in ("chosen", "rejected"):
            if column not in row:
                fault = f"there is no column {column!r}, which preference pairs need"
                raise ValueError(f"{fault}; its columns are {', '.join(sorted(row))}. Rename the columns of the file.")
            if not isinstance(row[column], str):
                raise ValueError(f"column {column!r} is {row[column]!r:.80}; it has to be text.")
        return tuple(template.render_solution({**row, "solution": row[column]}) for column in ("chosen", "rejected"))

    def _check(self, source: Rows, texts: list[tuple[str, ...]], completions: list[list[list[int]]]) -> None:
        equal = [place_of(source, i) for i, (chosen, rejected) in enumerate(completions) if chosen == rejected]
        if equal:
            summary = "Rows with the same tokens as 'chosen' and as 'rejected' prefer nothing; remove them"
            raise ValueError(files.listed(summary, equal, len(equal)))
        if isinstance(source, Source) and source.where is not None:
            _warn_of_repeats(source, texts)

    def batch(self, i: int) -> PreferenceBatch:
        """Returns batch `i` of the stream, for any i >= 0."""
        _, prompts, completions = self._read(i)
        return PreferenceBatch(*prompts, *(x.reshape(len(x) // 2, 2, -1) for x in completions))


def warn_of_leaks(train: Source, held_out: Source) -> None:
    """Warns of training pairs among held-out ones, if either is a file; the order of a pair does not matter."""
    if train.where is None and held_out.where is None:
        return
    key = lambda row: (repr(row["question"]), *sorted((row["chosen"], row["rejected"])))
    first: dict[tuple[str, ...], int] = {}
    for i, row in enumerate(train):
        first.setdefault(key(row), i)
    leaks = [
        f"{held_out.place(i)} is {train.place(first[key(row)])}" for i, row in enumerate(held_out) if key(row) in first
    ]
    if leaks:
        share = f"{len(leaks)} of {len(held_out)} held-out pairs"
        summary = f"{held_out.name}: training pairs of {train.name} are {share}, so held-out metrics are too high"
        warnings.warn(files.listed(summary, leaks, len(leaks)), stacklevel=2)


def _warn_of_repeats(source: Source, texts: list[tuple[str, ...]]) -> None:
    """Warns of pairs that a file repeats or reverses; all rows are kept."""
    first: dict[tuple[str, ...], int] = {}
    repeats, reversals = [], []
    for i, (prompt, chosen, rejected) in enumerate(texts):
        if (prompt, rejected, chosen) in first:
            reversals.append((i, first[prompt, rejected, chosen]))
        earlier = first.setdefault((prompt, chosen, rejected), i)
        if earlier != i:
            repeats.append((i, earlier))
    for pairs, what in (
        (repeats, "earlier pairs repeat in {} rows; the rows are kept and count again"),
        (reversals, "earlier pairs are reversed in {} rows; one of the two is incorrect"),
    ):
        if pairs:
            reports = [f"{source.place(i)} and {source.place(earlier)}" for i, earlier in pairs[: files.REPORTED]]
            summary = f"{source.name}: {what.format(f'{len(pairs)} of {len(source)}')}"
            warnings.warn(files.listed(summary, reports, len(pairs)), stacklevel=4)

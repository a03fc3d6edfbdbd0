"""Preference pairs for reward models: batches by number, each prompt with a chosen and a rejected completion."""

from collections.abc import Mapping
from typing import Any, NamedTuple
import warnings

import numpy as np

from jaxrl_reason.data import files
from jaxrl_reason.data.prompts import PromptTemplate
from jaxrl_reason.data.sources import Source
from jaxrl_reason.data.streams import batch_at, endless, fitting, Padded, place_of, rendered, Rows
from jaxrl_reason.data.tokenizer import Tokenizer


class PreferenceBatch(NamedTuple):
    """B prompts, each with a group of two completions: the chosen one first. All are right padded.

    Attributes:
      prompt_tokens: int32[B, S].
      prompt_mask: bool[B, S], True on real tokens.
      tokens: int32[B, 2, T].
      mask: bool[B, 2, T], True on real tokens, the end token among them.
    """

    prompt_tokens: np.ndarray
    prompt_mask: np.ndarray
    tokens: np.ndarray
    mask: np.ndarray


class PreferenceStream:
    """Pairs for training a reward model; the stream behaves as `pipeline.SolutionStream`.

    A row's columns `chosen` and `rejected` are completions without their end token, to the template what `solution` is elsewhere: a
    template that begins solutions with a space does so here. `on_long` covers the longer of the two completions.

    Attributes:
      size: the number of pairs in an epoch.
      skipped: the number of rows left out.

    Raises:
      ValueError: as `pipeline.SolutionStream`; also a column that is missing or not text, or a pair of one and the same tokens, each
        naming the row.
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
        texts = rendered(source, lambda row: _render(template, row))
        prompts = tokenizer.encode_batch([prompt for prompt, _ in texts], add_bos)
        completions = tokenizer.encode_batch([text for _, pair in texts for text in pair])
        completions = [ids + [tokenizer.eos_ids[0]] for ids in completions]
        pairs = list(zip(completions[::2], completions[1::2], strict=True))
        same = [number for number, (chosen, rejected) in enumerate(pairs) if chosen == rejected]
        if same:
            summary = "Rows with the same tokens as 'chosen' and as 'rejected' prefer nothing; remove them"
            raise ValueError(files.listed(summary, [place_of(source, i) for i in same[: files.REPORTED]], len(same)))
        if isinstance(source, Source) and source.where is not None:
            _warn_of_repeats(source, texts)
        longer = [max(pair, key=len) for pair in pairs]
        kept = fitting(source, on_long, prompt=(prompts, max_prompt_length), completion=(longer, max_completion_length))
        self.size = len(kept)
        self.skipped = len(source) - len(kept)
        self._prompts = Padded([prompts[i] for i in kept], max_prompt_length, tokenizer.pad_id)
        self._completions = Padded([ids for i in kept for ids in pairs[i]], max_completion_length, tokenizer.pad_id)
        self._order = endless(len(kept), batch_size, seed, shuffle)
        self._places = np.arange(batch_size) if places is None else places

    def batch(self, i: int) -> PreferenceBatch:
        """Batch `i` of the stream, for any i >= 0; the same whenever and in whatever order it is asked for."""
        rows = batch_at(self._order, i)[self._places]
        completions = self._completions.take((2 * rows[:, None] + np.arange(2)).ravel())
        return PreferenceBatch(*self._prompts.take(rows), *(x.reshape(len(rows), 2, -1) for x in completions))


def _warn_of_repeats(source: Source, texts: list[tuple[str, tuple[str, str]]]) -> None:
    """Warns of pairs that stand in a file twice, or a second time the other way round; all are kept."""
    first: dict[tuple[str, tuple[str, str]], int] = {}
    repeats, reversals = [], []
    for i, (prompt, (chosen, rejected)) in enumerate(texts):
        if (prompt, (rejected, chosen)) in first:
            reversals.append((first[prompt, (rejected, chosen)], i))
        earlier = first.setdefault((prompt, (chosen, rejected)), i)
        if earlier != i:
            repeats.append((earlier, i))
    for pairs, how, what in (
        (repeats, "again", "these are kept and weigh more"),
        (reversals, "the other way round", "one of the two is wrong"),
    ):
        if pairs:
            reports = [f"{source.place(j)} and {source.place(i)}" for i, j in pairs[: files.REPORTED]]
            summary = f"{source.name}: earlier pairs stand {how} in {len(pairs)} of {len(source)} rows; {what}"
            warnings.warn(files.listed(summary, reports, len(pairs)), stacklevel=3)


def _render(template: PromptTemplate, row: Mapping[str, Any]) -> tuple[str, tuple[str, str]]:
    """(prompt, (chosen, rejected)) of a row."""
    for column in ("chosen", "rejected"):
        if column not in row:
            raise ValueError(
                f"there is no column {column!r}, which preference pairs need; its columns are {', '.join(sorted(row))}."
            )
        if not isinstance(row[column], str):
            raise ValueError(f"column {column!r} is {row[column]!r:.80}; it has to be text.")
    write = lambda text: template.render_solution({**row, "solution": text})
    return template.render_prompt(row), (write(row["chosen"]), write(row["rejected"]))

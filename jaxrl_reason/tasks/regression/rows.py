"""Encoded rows of a table, and the batches that training and evaluation read."""

from collections.abc import Callable
import dataclasses
from typing import Generic, TypeVar

import numpy as np

from jaxrl_reason.data import PromptBatch, SolutionBatch, streams

Batch = TypeVar("Batch")


@dataclasses.dataclass(frozen=True)
class Rows:
    """A table, encoded.

    Attributes:
      padded: the N prompts.
      features: f32[N, F] for the policy; None if rows enter as text.
      numeric: f32[N, F], the features for the pointwise regressor, also if rows enter as text.
      digits: int32[N, L], encoded targets.
      z: f32[N], targets as z-scores.
      targets: float64[N].
      values: f32[N], human values of the rows, or None.
    """

    padded: streams.Padded
    features: np.ndarray | None
    numeric: np.ndarray
    digits: np.ndarray
    z: np.ndarray
    targets: np.ndarray
    values: np.ndarray | None = None

    def prompts(self, chosen: np.ndarray, prompt_ids: np.ndarray, weight: np.ndarray | None = None) -> PromptBatch:
        """Returns a batch of prompts.

        Args:
          chosen: int[P], positions in the table.
          prompt_ids: int32[P], see `data.PromptBatch`.
          weight: f32[P]; None: ones.
        """
        tokens, mask = self.padded.take(chosen)
        columns = {"digits": self.digits[chosen], "z": self.z[chosen]}
        if self.values is not None:
            columns["values"] = self.values[chosen]
        return PromptBatch(
            tokens=tokens,
            mask=mask,
            prompt_ids=prompt_ids,
            weight=np.ones(len(chosen), np.float32) if weight is None else weight,
            rows=[{"row": int(i), "target": float(self.targets[i])} for i in chosen],
            features=None if self.features is None else self.features[chosen],
            columns=columns,
        )

    def solutions(self, chosen: np.ndarray) -> SolutionBatch:
        """Returns a batch of prompts with their digits; `chosen` int[B] are positions in the table."""
        digits = self.digits[chosen]
        features = None if self.features is None else self.features[chosen]
        return SolutionBatch(*self.padded.take(chosen), digits, np.ones(digits.shape, bool), features)


class Stream(Generic[Batch]):
    """Rows of a table as endless shuffled batches; `batch(i)` is a pure function of i, as in `data.PromptStream`.

    Args:
      rows: number of rows.
      make: (positions in the table int[P], prompt ids int32[P]) -> a batch.
      batch_size: rows per batch.
      seed: of the shuffle.
      local_rows: see `data.PromptStream`.
    """

    skipped = 0

    def __init__(
        self,
        rows: int,
        make: Callable[[np.ndarray, np.ndarray], Batch],
        *,
        batch_size: int,
        seed: int,
        local_rows: np.ndarray | None = None,
    ):
        self._make, self._batch_size = make, batch_size
        self._order = streams.endless(rows, batch_size, seed, shuffle=True)
        self._local_rows = np.arange(batch_size) if local_rows is None else local_rows

    def batch(self, i: int) -> Batch:
        """Returns batch `i`, for any i >= 0."""
        chosen = streams.batch_at(self._order, i)[self._local_rows]
        return self._make(chosen, (i * self._batch_size + self._local_rows).astype(np.int32))


def eval_batches(rows: Rows, count: int, batch_size: int) -> list[PromptBatch]:
    """Returns the first `count` rows in batches, as `data.eval_prompts` does.

    Args:
      rows: encoded rows.
      count: the most rows.
      batch_size: rows per batch. The last batch is filled with copies of its first row that have weight 0.
    """
    count = min(count, len(rows.targets))
    batches = []
    for start in range(0, count, batch_size):
        real = np.arange(start, min(start + batch_size, count))
        chosen = np.concatenate([real, np.full(batch_size - len(real), start)]).astype(np.int32)
        weight = (np.arange(batch_size) < len(real)).astype(np.float32)
        batches.append(rows.prompts(chosen, chosen, weight))
    return batches

"""Human values of questions for RLEV: points over the total points of their exam, or a column of ready values."""

from collections.abc import Sequence
import itertools
import math

import numpy as np

from jaxrl_reason.data.sources import Source

KINDS = ("own", "uniform", "shuffled")


def read_values(source: Source) -> np.ndarray:
    """The value of every row, f32[N] in [0, 1].

    Taken from the column `value`; else from `points` / `exam_total`; else from `points` over the sum of the points of
    the rows with the same `exam`.

    Raises:
      ValueError: none of these columns, or a row whose value is missing, not a number, negative or above 1.
    """
    # Of any row: one that lacks what others have is refused by its number.
    columns = set(itertools.chain.from_iterable(source))
    if "value" in columns:
        values = [_number(source, i, row, "value") for i, row in enumerate(source)]
    elif "points" in columns and "exam_total" in columns:
        values = [
            _share(source, i, _number(source, i, row, "points"), _number(source, i, row, "exam_total"))
            for i, row in enumerate(source)
        ]
    elif "points" in columns and "exam" in columns:
        points = [_number(source, i, row, "points") for i, row in enumerate(source)]
        exams = [row.get("exam") for row in source]
        totals: dict = {}
        for i, (exam, worth) in enumerate(zip(exams, points)):
            if exam is None:
                raise ValueError(f"{source.place(i)} has points and no exam; name the exam it belongs to.")
            if not isinstance(exam, str | int):
                raise ValueError(f"{source.place(i)} has the exam {exam!r:.80}; name it by a text or a whole number.")
            totals[exam] = totals.get(exam, 0.0) + worth
        values = [_share(source, i, worth, totals[exam]) for i, (exam, worth) in enumerate(zip(exams, points))]
    else:
        raise ValueError(
            f"Values of questions are needed, and {source.name} has neither a column 'value' nor 'points' with 'exam' or "
            f"'exam_total', only {', '.join(sorted(columns))}; name them with config.data.columns."
        )
    for i, value in enumerate(values):
        if value > 1:
            raise ValueError(
                f"{source.place(i)} has the value {value:g}; a value is a share of an exam and lies in [0, 1]."
            )
    return np.array(values, np.float32)


def held_out_values(source: Source, needed: bool) -> np.ndarray | None:
    """The values that held-out figures are counted by; None where the data have none and the method needs none."""
    if not needed and not {"value", "points"} & set(source[0]):
        return None
    try:
        return read_values(source)
    except ValueError:
        if needed:
            raise
        return None  # a column of that name that means something else


def altered(values: Sequence[float], kind: str, *, alpha: float, clip: float, seed: int) -> np.ndarray:
    """The values a run trains with, f32[N]: RLEV's own, or those of its two ablations.

    Args:
      values: f32[N].
      kind: "own"; "shuffled": the same values on other rows; "uniform": one value for all, at which RLEV's
        scale 1 + min(alpha v, clip) is the mean scale of the rows.
      alpha, clip: of that scale.
      seed: of the shuffle.
    """
    values = np.asarray(values, np.float32)
    if kind == "own":
        return values
    if kind == "shuffled":
        return np.random.default_rng(seed).permutation(values)
    if kind == "uniform":
        extra = float(np.minimum(alpha * values, clip).mean())
        return np.full_like(values, extra / alpha if alpha else 0.0)
    raise ValueError(f"data.values is {kind!r}; it must be one of {KINDS}.")


def _number(source: Source, i: int, row: dict, column: str) -> float:
    value = row.get(column)
    try:
        # Of texts `float` takes more than people mean: 0_1, and the digits of every script.
        plain = not isinstance(value, bool | str) or isinstance(value, str) and value.isascii() and "_" not in value
        number = float(value) if plain else math.nan
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number) or number < 0:
        raise ValueError(
            f"{source.place(i)} has {value!r:.80} in the column {column!r}; it must be a number and not negative."
        )
    return number


def _share(source: Source, i: int, points: float, total: float) -> float:
    if not total:
        raise ValueError(f"{source.place(i)} belongs to an exam of 0 points in total; an exam is worth something.")
    return points / total

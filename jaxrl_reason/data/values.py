"""Columns of numbers, and human values of questions for RLEV: points over the total points of the exam, or a column of values."""

from collections.abc import Sequence
import itertools
import math
from typing import Any

import numpy as np

from jaxrl_reason.data.sources import Source

KINDS = ("own", "uniform", "shuffled", "levels")
_LEVELS = (0.01, 0.02, 0.04, 0.06, 0.08)  # of difficulty, the paper's weak values


def read_values(source: Source) -> np.ndarray:
    """Returns the value of every row, f32[N] in [0, 1].

    The value is the column `value`; else `points` / `exam_total`; else `points` over the sum of the points of all rows
    with the same `exam`. Raises ValueError without such columns, and for a value that is no number or not in [0, 1].
    """
    # The columns of all rows: a row that lacks a column of the others is reported by its number.
    columns = set(itertools.chain.from_iterable(source))
    if "value" in columns:
        values = [_number(source, i, row, "value") for i, row in enumerate(source)]
    elif "points" in columns and "exam_total" in columns:
        pair = lambda i, row: (_number(source, i, row, "points"), _number(source, i, row, "exam_total"))
        values = [_share(source, i, *pair(i, row)) for i, row in enumerate(source)]
    elif "points" in columns and "exam" in columns:
        values = _shares_of_exams(source)
    else:
        fault = "has neither a column 'value' nor 'points' with 'exam' or 'exam_total'"
        remedy = f"only {', '.join(sorted(columns))}; name them with --config.data.columns"
        raise ValueError(f"Values of questions are needed, and {source.name} {fault}, {remedy}.")
    for i, value in enumerate(values):
        if value > 1:
            raise ValueError(f"{source.place(i)} has the value {value:g}; a value is a share of an exam, in [0, 1].")
    return np.array(values, np.float32)


def read_numbers(source: Source, column: str) -> np.ndarray:
    """Returns a column of numbers, f32[N]. Raises ValueError that names the first row without a finite number."""
    return np.array([_number(source, i, row, column, least=-math.inf) for i, row in enumerate(source)], np.float32)


def held_out_values(source: Source, needed: bool) -> np.ndarray | None:
    """Returns the values that weight held-out metrics, or None for data without values if the method needs none."""
    if not needed and not {"value", "points"} & set(source[0]):
        return None
    try:
        return read_values(source)
    except ValueError:
        if needed:
            raise
        return None  # a column of that name with another meaning


def altered(values: Sequence[float] | np.ndarray, kind: str, *, alpha: float, clip: float, seed: int) -> np.ndarray:
    """Returns the values that a run trains with, f32[N]: RLEV's own, or the values of one of its ablations.

    The kind is "own"; "shuffled", the values in another order by `seed`; "uniform", one value for all rows, for
    which RLEV's scale 1 + min(alpha v, clip) is the mean scale of the rows; or "levels", 0.01, 0.02, 0.04, 0.06 or 0.08 by
    the fifth of the rows in which a value is: equal values have one level.
    """
    own = np.asarray(values, np.float32)
    if kind == "own":
        return own
    if kind == "shuffled":
        return np.random.default_rng(seed).permutation(own)
    if kind == "uniform":
        extra = float(np.minimum(alpha * own, clip).mean())
        return np.full_like(own, extra / alpha if alpha else 0.0)
    if kind == "levels":
        fifths = np.quantile(own, (0.2, 0.4, 0.6, 0.8), method="inverted_cdf")
        return np.array(_LEVELS, np.float32)[np.searchsorted(fifths, own)]
    raise ValueError(f"data.values is {kind!r}; it must be one of {KINDS}.")


def _shares_of_exams(source: Source) -> list[float]:
    points = [_number(source, i, row, "points") for i, row in enumerate(source)]
    exams: list[Any] = [row.get("exam") for row in source]
    totals: dict[str | int, float] = {}
    for i, (exam, worth) in enumerate(zip(exams, points)):
        if exam is None:
            raise ValueError(f"{source.place(i)} has points and no exam; name the exam it belongs to.")
        if not isinstance(exam, str | int):
            raise ValueError(f"{source.place(i)} has the exam {exam!r:.80}; name it by a text or a whole number.")
        totals[exam] = totals.get(exam, 0.0) + worth
    return [_share(source, i, worth, totals[exam]) for i, (exam, worth) in enumerate(zip(exams, points))]


def _number(source: Source, i: int, row: dict[str, Any], column: str, least: float = 0.0) -> float:
    value: Any = row.get(column)
    try:
        # `float` also reads 0_1 and the digits of every script.
        plain = not isinstance(value, bool | str) or isinstance(value, str) and value.isascii() and "_" not in value
        number = float(value) if plain else math.nan
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number) or number < least:
        cell, rule = f"{value!r:.80} in the column {column!r}", " and not negative" if least == 0 else ""
        raise ValueError(f"{source.place(i)} has {cell}; it must be a number{rule}.")
    return number


def _share(source: Source, i: int, points: float, total: float) -> float:
    if not total:
        raise ValueError(f"{source.place(i)} belongs to an exam of 0 points in total; an exam needs points.")
    return points / total

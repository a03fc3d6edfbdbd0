"""Predictions for new rows of a table, which have no target: rows in, numbers with their spread out."""

from collections.abc import Mapping, Sequence
import math
import sys
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxrl_reason.config import ConfigError
from jaxrl_reason.data import PromptBatch
from jaxrl_reason.data.tables import Table
from jaxrl_reason.data.tables.load import is_gap, is_number, is_rounded
from jaxrl_reason.methods import nearest
from jaxrl_reason.rl import hosts
from jaxrl_reason.rl.programs import Programs
from jaxrl_reason.tasks.regression.vocabulary import Digits

Row = Mapping[str, Any]  # column -> number, text, or None for a missing value


class Prediction(NamedTuple):
    """The prediction for one row, in the units of the target."""

    mean: float  # of the samples
    median: float
    spread: float  # the standard deviation of the samples
    samples: list[float]


def table_of(rows: Sequence[Row], like: Table, missing: str) -> Table:
    """Returns the table of new rows with the columns of the training table `like`; its targets have no meaning.

    A number may be a text such as "59", as in a CSV file, and texts are read as the cells of a training table. The target's
    column and those that training leaves out may be there, and are not read. Raises ConfigError for a row without a column,
    with an unknown one, or with a cell of the wrong kind; and for a missing value (None, or a text such as "" or "NA")
    unless `missing`, config.regression.missing, is "mean".
    """
    numbers, labels = [], []
    exact: dict[tuple[int, str], str] = {}
    known = (*like.names, *like.label_names)
    for i, row in enumerate(rows):
        for name in known:
            if name not in row:
                needs = f"the run reads the columns {', '.join(known)}"
                raise ConfigError(f"Row {i} of the prompts has no column {name!r}; {needs}.{nearest(name, list(row))}")
        for name in row:
            if name not in (*known, like.target, *like.left_out):
                raise ConfigError(f"Row {i} of the prompts has a column {name!r}, which the training table lacks.")
        row = {name: x.strip() if isinstance(x, str) else x for name, x in row.items()}
        empty = [name for name in known if (x := row[name]) is None or (isinstance(x, str) and is_gap(x))]
        if empty and missing != "mean":
            raise ConfigError(
                f"Row {i} of the prompts has no value in the column {empty[0]!r}, and config.regression.missing is {missing!r}."
            )
        numbers.append([math.nan if name in empty else _number(i, name, row[name]) for name in like.names])
        exact |= {(i, name): str(row[name]) for name in like.names if name not in empty and _is_rounded(row[name])}
        for name in like.label_names:
            if name not in empty and not isinstance(row[name], str):
                raise ConfigError(
                    f"Row {i} of the prompts has {row[name]!r} in the column {name!r}, which holds texts."
                )
        labels.append(["" if name in empty else row[name] for name in like.label_names])
    features = np.array(numbers, np.float64).reshape(len(rows), len(like.names))
    texts = np.array(labels, str).reshape(len(rows), len(like.label_names))
    targets = np.full(len(rows), like.targets.mean())
    return Table("the prompts", like.names, features, like.label_names, texts, like.target, targets, exact=exact)


def _is_rounded(cell: Any) -> bool:
    """Returns whether float64 does not keep all digits of a number."""
    return is_rounded(cell) if isinstance(cell, str) else isinstance(cell, int) and int(float(cell)) != cell


def _number(i: int, name: str, cell: Any) -> float:
    if isinstance(cell, str):
        is_finite = is_number(cell)
    else:
        is_finite = isinstance(cell, int | float) and not isinstance(cell, bool) and abs(cell) <= sys.float_info.max
    if is_finite:
        return float(cell)
    raise ConfigError(f"Row {i} of the prompts has {cell!r:.60} in the column {name!r}, which is no finite number.")


def predict_rows(programs: Programs, weights: Any, batches: Sequence[PromptBatch], digits: Digits) -> list[Prediction]:
    """Samples config.eval.samples numbers per row of the batches; rows of weight 0 are left out."""
    decode, out = jax.jit(digits.decode), list[Prediction]()
    for batch in batches:
        z = hosts.to_host(decode(programs.generate_eval(weights, batch).tokens))[batch.weight > 0]
        for samples in digits.target.from_z(z.astype(np.float64)):
            mean, median, spread = samples.mean(), np.median(samples), samples.std()
            out.append(Prediction(float(mean), float(median), float(spread), samples.tolist()))
    return out

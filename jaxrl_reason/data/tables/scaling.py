"""Scaling of features and targets, learned from the training table."""

import dataclasses
import math
from typing import TypeVar

import jax
import numpy as np

from jaxrl_reason.data.tables.load import Table

Numbers = TypeVar("Numbers", float, np.ndarray, jax.Array)


@dataclasses.dataclass(frozen=True)
class FeatureScaler:
    """Converts tables like the training table to inputs of a model. All fields are lists: `asdict` of it is JSON."""

    names: list[str]  # the columns of numbers
    means: list[float]  # their training means, over the values that are not missing
    stds: list[float]  # their training standard deviations (ddof 0), 0 for a constant column
    label_names: list[str]  # the columns of texts
    levels: list[list[str]]  # the different training texts of each

    @property
    def outputs(self) -> list[str]:
        """The names of the columns of `transform`."""
        pairs = zip(self.label_names, self.levels, strict=True)
        return [*self.names, *(f"{name}={level}" for name, levels in pairs for level in levels)]

    def transform(self, table: Table) -> np.ndarray:
        """Returns z-scores of the numbers, then one 0/1 column per known text: float32[N, len(outputs)].

        A constant column is 0. A missing value is 0, the training mean. A text that is missing, or that no training row
        has, is 0 in all columns. Raises ValueError if the table has other columns, or a number that overflows float32.
        """
        expected, found = {"numbers": self.names, "texts": self.label_names}, (table.names, table.label_names)
        for (kind, ours), theirs in zip(expected.items(), found, strict=True):
            if sorted(ours) != sorted(theirs):
                fault = f"the columns of {kind} {list(theirs)}, but the training table had {ours}"
                raise ValueError(f"{table.name} has {fault}; both need the same.")
        features = table.features[:, [table.names.index(name) for name in self.names]]
        stds = np.array(self.stds)
        with np.errstate(over="ignore"):
            scores = (features - np.array(self.means)) / np.where(stds > 0, stds, 1)
        scores = np.where((stds == 0) | np.isnan(features), 0, scores)
        rows, columns = np.nonzero(np.abs(scores) > np.finfo(np.float32).max)
        if rows.size:
            row, column = rows[0], columns[0]
            cell = f"Column {self.names[column]!r} is {features[row, column]} in {table.place(row)}"
            raise ValueError(f"{cell}, too far from the training mean for float32; correct or remove that row.")
        indicators = [
            table.labels[:, table.label_names.index(name)] == level
            for name, levels in zip(self.label_names, self.levels, strict=True)
            for level in levels
        ]
        return np.column_stack([scores, *indicators]).astype(np.float32)


def fit_features(train: Table) -> FeatureScaler:
    """Learns the scaling; raises ValueError if a column has no value, or values too large for a standard deviation."""
    means, stds = [], []
    for name, column in zip(train.names, train.features.T, strict=True):
        known = column[~np.isnan(column)]
        if not known.size:
            fault = f"has no value in any of the {len(train)} training rows"
            raise ValueError(f"Column {name!r} of {train.name} {fault}; remove it, or train on more rows.")
        mean, std = _mean_and_std(known, f"Column {name!r} of {train.name}")
        means.append(mean)
        stds.append(std)
    levels = [sorted(set(column.tolist()) - {""}) for column in train.labels.T]
    return FeatureScaler(list(train.names), means, stds, list(train.label_names), levels)


@dataclasses.dataclass(frozen=True)
class TargetScaler:
    """Scales targets to z-scores and, by the range of the training z-scores, to [0, 1] (GenRe2, arXiv 2512.06533)."""

    mean: float  # of the training targets
    std: float  # of the training targets, ddof 0
    low: float  # the smallest training z-score
    high: float  # the largest training z-score

    @classmethod
    def fit(cls, targets: np.ndarray, name: str = "The training target") -> "TargetScaler":
        """Learns the scaling from the training targets, float[N]; `name` is that of the column in messages.

        Raises ValueError if targets do not have one axis, are not finite, are all equal, or are too far apart to scale.
        """
        targets = np.asarray(targets, np.float64)
        if targets.ndim != 1 or not targets.size:
            need = "one axis of at least two different numbers"
            raise ValueError(f"The training targets have the shape {targets.shape}; give {need}.")
        bad = np.flatnonzero(~np.isfinite(targets))
        if bad.size:
            raise ValueError(f"Training target {bad[0]} is {targets[bad[0]]}; targets have to be finite numbers.")
        mean, std = _mean_and_std(targets, name)
        if std == 0:
            same = f"{targets[0]} in all {len(targets)} rows"
            raise ValueError(f"{name} is {same}, so there is nothing to learn.")
        return cls(mean, std, float((targets.min() - mean) / std), float((targets.max() - mean) / std))

    def to_z(self, targets: Numbers) -> Numbers:
        """Returns the z-scores of targets of any shape."""
        return (targets - self.mean) / self.std

    def from_z(self, z: Numbers) -> Numbers:
        """Returns the targets, in their own unit, of z-scores of any shape."""
        return self.mean + self.std * z

    def to_unit(self, targets: Numbers) -> Numbers:
        """Returns the targets in the unit interval; a target beyond the training range is outside [0, 1]."""
        return (self.to_z(targets) - self.low) / (self.high - self.low)

    def unit_to_z(self, unit: Numbers) -> Numbers:
        """Returns the z-scores of numbers in the unit interval. A NumPy or JAX array keeps its kind and dtype."""
        return self.low + unit * (self.high - self.low)


def _mean_and_std(values: np.ndarray, name: str) -> tuple[float, float]:
    """Returns the mean and the standard deviation (ddof 0), exactly 0 for equal values, whose mean would be rounded."""
    if values.min() == values.max():
        return float(values[0]), 0.0
    with np.errstate(over="ignore", invalid="ignore"):
        mean, std = float(values.mean()), float(values.std())
    if not math.isfinite(std) or std == 0:
        span = f"{name} goes from {values.min()} to {values.max()}"
        raise ValueError(f"{span}, for which float64 has no standard deviation; change its unit.")
    return mean, std

"""A table in memory: numbers, texts and one number per row to predict."""

import dataclasses
import functools
import hashlib
import json

import numpy as np


@dataclasses.dataclass(frozen=True, eq=False)
class Table:
    """N rows of F numbers and C texts, with one number per row to predict.

    Attributes:
      name: the name given to `load_table`.
      names: the F columns of numbers.
      features: float64[N, F]; NaN if a value is missing, which only missing="mean" allows.
      label_names: the C columns of texts; empty unless categorical="onehot".
      labels: str[N, C], "" if a value is missing.
      target: the column to predict.
      targets: float64[N].
      noise_std: float64[N], the standard deviation of the target given the features, or None if it is unknown.
    """

    name: str
    names: tuple[str, ...]
    features: np.ndarray
    label_names: tuple[str, ...]
    labels: np.ndarray
    target: str
    targets: np.ndarray
    noise_std: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.targets)

    @functools.cached_property
    def fingerprint(self) -> str:
        """Hex SHA-256 of columns and cells; it does not depend on the file."""
        columns = [self.names, self.label_names, self.target, self.labels.tolist()]
        digest = hashlib.sha256(json.dumps(columns).encode())
        digest.update(np.ascontiguousarray(self.features, "<f8").tobytes())
        digest.update(np.ascontiguousarray(self.targets, "<f8").tobytes())
        return digest.hexdigest()

    @property
    def best_r2(self) -> float | None:
        """The expected R2 of the true function on these rows, which no regressor exceeds; None if it is unknown."""
        if self.noise_std is None:
            return None
        return float(1 - np.mean(self.noise_std**2) / np.var(self.targets))

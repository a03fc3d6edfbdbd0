"""Two tables for regression: TFDS builders without network. `data.tables.load_table` reads them."""

from collections.abc import Callable, Iterator, Mapping
import dataclasses
import hashlib
import math
import random
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from jaxrl_reason.data.builders.offline import OfflineBuilder
from jaxrl_reason.data.tables.load import NOISE, TARGETS


class Diabetes(OfflineBuilder):
    """442 patients: age, sex, body mass index, blood pressure, six blood values; diabetes progression a year later.

    The raw numbers, from scikit-learn's copy. A hash of a row's features assigns its split (about 7/10, 1/10, 2/10).
    """

    DESCRIPTION = "Diabetes progression by ten measurements (Efron et al., Least Angle Regression, 2004)."
    SIZES = {"train": 317, "validation": 35, "test": 90}
    COLUMNS = dict.fromkeys([*"age sex bmi bp s1 s2 s3 s4 s5 s6".split(), TARGETS["diabetes"]], np.float32)

    def rows(self, split: str) -> Iterator[dict[str, float]]:
        try:
            from sklearn import datasets
        except ImportError as error:
            source = "is prepared, once, from the copy in scikit-learn: pip install scikit-learn"
            raise ImportError(f"The data set 'diabetes' {source}.") from error
        data = datasets.load_diabetes(scaled=False)
        for features, target in zip(data.data.tolist(), data.target.tolist(), strict=True):
            bucket = int.from_bytes(hashlib.sha256(repr(features).encode()).digest()[:8], "big") % 10
            if {0: "validation", 1: "test", 2: "test"}.get(bucket, "train") == split:
                row = dict(zip(data.feature_names, features, strict=True)) | {TARGETS["diabetes"]: target}
                yield {name: row[name] for name in self.COLUMNS}

    def key(self, split: str, i: int, row: Mapping[str, Any]) -> int:
        return i


@dataclasses.dataclass(frozen=True)
class _Function:
    """A smooth function of `features` numbers of [0, 1]; `level` scales its noise so that the best R2 is about 0.85."""

    features: int
    value: Callable[..., float]
    level: float


_FUNCTIONS = {
    # Friedman, Multivariate Adaptive Regression Splines, Annals of Statistics 19(1), 1991, section 4.3.
    "friedman": _Function(
        5, lambda a, b, c, d, e: 10 * math.sin(math.pi * a * b) + 20 * (c - 0.5) ** 2 + 10 * d + 5 * e, level=2.0
    ),
    "ripple": _Function(2, lambda a, b: (0.5 + b) * math.sin(2 * math.pi * a), level=0.3),
}
_BETWEEN_MODES = 0.95  # share of the standard deviation; sqrt(1 - 0.95**2) = 0.31 remains within each mode


@dataclasses.dataclass
class SyntheticConfig(tfds.core.BuilderConfig):
    """The function, and the number of modes of its noise."""

    function: str = ""  # a key of `_FUNCTIONS`
    bimodal: bool = False  # whether the noise is on either side of the function and seldom near it; else Gaussian


def _synthetic_rows(config: SyntheticConfig, split: str, size: int) -> Iterator[dict[str, float]]:
    function = _FUNCTIONS[config.function]
    rng = random.Random(f"{config.name} {split}")
    for _ in range(size):
        features = [rng.random() for _ in range(function.features)]
        std = function.level * (0.5 + features[0])
        noise = rng.gauss(0, 1)
        if config.bimodal:
            noise = rng.choice((-1, 1)) * _BETWEEN_MODES + noise * math.sqrt(1 - _BETWEEN_MODES**2)
        names = [f"x{i + 1}" for i in range(function.features)]
        yield {**dict(zip(names, features, strict=True)), "y": function.value(*features) + std * noise, NOISE: std}


class Synthetic(OfflineBuilder):
    """A smooth function y of uniform features x1 ... plus noise of known std, which grows with the first feature."""

    DESCRIPTION = "Smooth functions with noise of known, uneven size, so that the best reachable R2 is known."
    SIZES = {"train": 3000, "validation": 500, "test": 1000}
    BUILDER_CONFIGS = [
        SyntheticConfig(
            name=f"{function}_bimodal" if bimodal else function,
            description=f"The function {function!r} with {'bimodal' if bimodal else 'Gaussian'} noise.",
            function=function,
            bimodal=bimodal,
        )
        for function in ("friedman", "ripple")
        for bimodal in (False, True)
    ]

    @property
    def COLUMNS(self) -> dict[str, type]:  # type: ignore[override]  # the configs have different columns
        names = [f"x{i + 1}" for i in range(_FUNCTIONS[self.builder_config.function].features)]
        return dict.fromkeys((*names, TARGETS["synthetic"], NOISE), np.float32)

    def rows(self, split: str) -> Iterator[dict[str, float]]:
        return _synthetic_rows(self.builder_config, split, self.SIZES[split])

    def key(self, split: str, i: int, row: Mapping[str, Any]) -> int:
        return i

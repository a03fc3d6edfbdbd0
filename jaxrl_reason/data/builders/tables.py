"""Tables for regression: two TFDS builders that need no network, CSV files, and scaling learned from training rows.

`load_table` decides about single rows and nothing else. Whatever needs a statistic (the mean that fills a gap, the
texts of a column, the scale) is learned by `fit_features` and `TargetScaler.fit` from the training table and applied
unchanged to every other, so that nothing of a test row reaches training:

    train, test = load_table("diabetes", "train"), load_table("diabetes", "test")
    features, scaler = fit_features(train), TargetScaler.fit(train.targets)
    features.transform(test), scaler.to_unit(test.targets)
"""

from collections.abc import Callable, Iterator, Sequence
import csv
import dataclasses
import difflib
import functools
import hashlib
import io
import json
import math
import pathlib
import random
import re
from typing import Any
import warnings

import numpy as np
import tensorflow_datasets as tfds

from jaxrl_reason.data import files

_TARGETS = {"diabetes": "progression", "synthetic": "y"}  # our builders and the column to predict
_NOISE = "noise_std"
_CATEGORICAL = ("refuse", "onehot", "drop")
_MISSING = ("refuse", "mean", "drop")

_GAPS = frozenset({"", "?", "na", "n/a", "nan", "null"})  # cells without a value, in lower case
_NUMBER = re.compile(r"[-+]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][-+]?[0-9]+)?")  # float() also reads 1_000
_INFINITY = re.compile(r"[-+]?inf(?:inity)?", re.IGNORECASE)
_LISTED = 10  # lines spelled out in a message; the rest are counted


@dataclasses.dataclass(frozen=True, eq=False)
class Table:
    """Rows of numbers, and of texts where the file has such columns, with one number each to predict.

    Attributes:
      name: what was asked for.
      names: the F columns of numbers.
      features: float64[N, F]; NaN where a value is missing, which only missing="mean" lets through.
      label_names: the C columns of texts; none unless categorical="onehot".
      labels: str[N, C], "" where a value is missing.
      target: the column to predict.
      targets: float64[N].
      noise_std: float64[N], the standard deviation of the target given the features, where it is known; otherwise None.
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
        """Hex SHA-256 of columns and cells: of the content, whatever file it came from."""
        columns = [self.names, self.label_names, self.target, self.labels.tolist()]
        digest = hashlib.sha256(json.dumps(columns).encode())
        digest.update(np.ascontiguousarray(self.features, "<f8").tobytes())
        digest.update(np.ascontiguousarray(self.targets, "<f8").tobytes())
        return digest.hexdigest()

    @property
    def best_r2(self) -> float | None:
        """The expected R2 of the true function on these rows, which no regressor exceeds; None where it is unknown."""
        if self.noise_std is None:
            return None
        return float(1 - np.mean(self.noise_std**2) / np.var(self.targets))


def load_table(
    name: str,
    split: str,
    *,
    target: str = "",
    categorical: str = "refuse",
    missing: str = "refuse",
    data_dir: str | pathlib.Path | None = None,
) -> Table:
    """Opens a table, preparing it on first use.

    Args:
      name: "diabetes"; "synthetic", which is "synthetic/friedman", or another config of `Synthetic`; or a path that
        ends in .csv.
      split: for our data sets "train", "validation", "test[:100]" and so on; for a file, "all" or a slice in the order
        of its rows, such as "[:90%]".
      target: the column of a file to predict. Our data sets have their own.
      categorical: what a column of texts does: "refuse" raises, "onehot" keeps it for `fit_features`, "drop" leaves it
        out. A column of numbers and texts is refused.
      missing: what a missing value (an empty cell, NA, N/A, NaN, null or ?) does: "refuse" raises, "mean" keeps the gap
        for `fit_features` to fill, "drop" leaves the row out and warns. A target is never filled.
      data_dir: where TFDS keeps prepared data; None means its default, ~/tensorflow_datasets. Files do not use it.

    Raises:
      FileNotFoundError: no such file.
      ImportError: "diabetes" is to be prepared and scikit-learn, which brings the data, is not installed.
      ValueError: unknown name, split or option, or a file that is no such table; it names file, line and column.
    """
    for option, value, allowed in (("categorical", categorical, _CATEGORICAL), ("missing", missing, _MISSING)):
        if value not in allowed:
            raise ValueError(f"{option} is {value!r}; it has to be one of {', '.join(map(repr, allowed))}.")
    if name.endswith(".csv"):
        return _csv_table(pathlib.Path(name).expanduser(), split, target, categorical, missing)
    builder = re.split("[/:]", name)[0]
    if builder not in _TARGETS:
        raise ValueError(f"There is no table {name!r}: give {', '.join(_TARGETS)}, or a path that ends in .csv.")
    if target not in ("", _TARGETS[builder]):
        raise ValueError(
            f"The table {name!r} predicts {_TARGETS[builder]!r}, not {target!r}; leave `target` empty, it is for files."
        )
    return _prepared_table(name, split, _TARGETS[builder], data_dir)


# -- scaling -----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class FeatureScaler:
    """From a table with the columns of the training table to the inputs of a model; made by `fit_features`.

    Plain lists: `dataclasses.asdict` goes through JSON and comes back as `FeatureScaler(**saved)`.

    Attributes:
      names, means, stds: the columns of numbers with their training mean and standard deviation (ddof 0, over the
        values that are not missing; 0 for a constant column).
      label_names, levels: the columns of texts with the texts that training rows have there.
    """

    names: list[str]
    means: list[float]
    stds: list[float]
    label_names: list[str]
    levels: list[list[str]]

    @property
    def outputs(self) -> list[str]:
        """The names of the columns that `transform` gives."""
        pairs = zip(self.label_names, self.levels, strict=True)
        return [*self.names, *(f"{name}={level}" for name, levels in pairs for level in levels)]

    def transform(self, table: Table) -> np.ndarray:
        """z-scores of the numbers, then one 0/1 column for each known text.

        A constant column is 0, and so is a missing value, which thereby takes the training mean. A text that is
        missing, or that training rows do not have, is 0 in all columns.

        Returns:
          float32[N, len(outputs)].

        Raises:
          ValueError: the table has other columns, or a number that overflows float32.
        """
        for kind, expected, found in (
            ("numbers", self.names, table.names),
            ("texts", self.label_names, table.label_names),
        ):
            if sorted(expected) != sorted(found):
                raise ValueError(
                    f"{table.name} has the columns of {kind} {list(found)}, but the training table had {expected}; "
                    "both need the same."
                )
        features = table.features[:, [table.names.index(name) for name in self.names]]
        stds = np.array(self.stds)
        with np.errstate(over="ignore"):
            scores = (features - np.array(self.means)) / np.where(stds > 0, stds, 1)
        scores = np.where((stds == 0) | np.isnan(features), 0, scores)
        rows, columns = np.nonzero(np.abs(scores) > np.finfo(np.float32).max)
        if rows.size:
            value = features[rows[0], columns[0]]
            raise ValueError(
                f"Column {self.names[columns[0]]!r} of {table.name} is {value} in row {rows[0]}, too far from the "
                "training mean for float32; correct or remove that row."
            )
        indicators = [
            table.labels[:, table.label_names.index(name)] == level
            for name, levels in zip(self.label_names, self.levels, strict=True)
            for level in levels
        ]
        return np.column_stack([scores, *indicators]).astype(np.float32)


def fit_features(train: Table) -> FeatureScaler:
    """Learns the scaling of features from the training table.

    Raises:
      ValueError: a column has no value in any row, or values too large for a standard deviation.
    """
    means, stds = [], []
    for name, column in zip(train.names, train.features.T, strict=True):
        known = column[~np.isnan(column)]
        if not known.size:
            raise ValueError(
                f"Column {name!r} of {train.name} has no value in any of the {len(train)} training rows; remove it, or "
                "train on more rows."
            )
        mean, std = _mean_and_std(known, f"Column {name!r} of {train.name}")
        means.append(mean)
        stds.append(std)
    levels = [sorted(set(column.tolist()) - {""}) for column in train.labels.T]
    return FeatureScaler(list(train.names), means, stds, list(train.label_names), levels)


@dataclasses.dataclass(frozen=True)
class TargetScaler:
    """Targets as z-scores and, by the range of the training z-scores, in [0, 1] (GenRe2, arXiv 2512.06533).

    Attributes:
      mean, std: of the training targets, ddof 0.
      low, high: the smallest and the largest training z-score.
    """

    mean: float
    std: float
    low: float
    high: float

    @classmethod
    def fit(cls, targets: np.ndarray) -> "TargetScaler":
        """Learns the scaling from the training targets, float[N].

        Raises:
          ValueError: not one axis, a target that is not finite, or targets all equal or too far apart to scale.
        """
        targets = np.asarray(targets, np.float64)
        if targets.ndim != 1 or not targets.size:
            raise ValueError(
                f"The training targets have the shape {targets.shape}; give one axis of at least two different numbers."
            )
        bad = np.flatnonzero(~np.isfinite(targets))
        if bad.size:
            raise ValueError(f"Training target {bad[0]} is {targets[bad[0]]}; targets have to be finite numbers.")
        mean, std = _mean_and_std(targets, "The training target")
        if std == 0:
            raise ValueError(
                f"The training target is {targets[0]} in all {len(targets)} rows, so there is nothing to learn."
            )
        return cls(mean, std, float((targets.min() - mean) / std), float((targets.max() - mean) / std))

    def to_z(self, targets):
        """z-scores of targets, of any shape."""
        return (targets - self.mean) / self.std

    def from_z(self, z):
        """Targets in their own unit, of any shape."""
        return self.mean + self.std * z

    def to_unit(self, targets):
        """Targets in the unit interval; those beyond the training range lie outside it."""
        return (self.to_z(targets) - self.low) / (self.high - self.low)

    def unit_to_z(self, unit):
        """z-scores from the unit interval; a NumPy or a JAX array, of any shape, keeps its kind and dtype."""
        return self.low + unit * (self.high - self.low)


def _mean_and_std(values: np.ndarray, what: str) -> tuple[float, float]:
    """Mean and standard deviation (ddof 0), exactly 0 for equal values, whose computed mean may differ from them."""
    if values.min() == values.max():
        return float(values[0]), 0.0
    with np.errstate(over="ignore", invalid="ignore"):
        mean, std = float(values.mean()), float(values.std())
    if not math.isfinite(std) or std == 0:
        raise ValueError(
            f"{what} goes from {values.min()} to {values.max()}, for which float64 has no standard deviation; change "
            "its unit."
        )
    return mean, std


# -- CSV ---------------------------------------------------------------------------------------------------------------


def _csv_table(path: pathlib.Path, split: str, target: str, categorical: str, missing: str) -> Table:
    header, rows, lines = _read_csv(path)
    if target not in header:
        close = difflib.get_close_matches(target, header, n=1, cutoff=0.5)
        hint = f"Did you mean {close[0]!r}?" if close else f"There are {files.quoted(header)}."
        asked = f"has no column {target!r} to predict" if target else "needs `target`, the column to predict"
        raise ValueError(f"{path} {asked}. {hint}")

    cells = {name: [row[i] for row in rows] for i, name in enumerate(header)}
    columns = {name: _parse_column(path, name, cells[name], lines) for name in header}
    if columns[target] is None:
        line = lines[next(i for i, cell in enumerate(cells[target]) if not _is_gap(cell))]
        raise ValueError(f"The target {target!r} of {path} holds text (line {line}); regression needs numbers.")
    texts = [name for name in header if columns[name] is None]
    if texts and categorical == "refuse":
        raise ValueError(
            f"{path} holds text in {_listed('column', texts)}: set categorical to 'onehot' for one 0/1 column a text, "
            "or to 'drop' to leave such columns out."
        )
    texts = texts if categorical == "onehot" else []
    names = [name for name in header if columns[name] is not None and name != target]
    if not names + texts:
        raise ValueError(
            f"{path} has no column to predict {target!r} from; it needs a header and cells separated by commas."
        )

    gaps = {name: [i for i, cell in enumerate(cells[name]) if _is_gap(cell)] for name in [*names, *texts, target]}
    kept = _kept_rows(path, gaps, lines, target, missing)
    targets = columns[target]
    if len({targets[i] for i in kept}) == 1:
        raise ValueError(
            f"The target {target!r} of {path} is {targets[kept[0]]} in every row, so there is nothing to predict."
        )
    part = files.slice_rows(kept, split, path)
    labels = [["" if _is_gap(cells[name][i]) else cells[name][i] for name in texts] for i in part]
    return Table(
        name=str(path),
        names=tuple(names),
        features=np.array([[columns[name][i] for name in names] for i in part], np.float64).reshape(
            len(part), len(names)
        ),
        label_names=tuple(texts),
        labels=np.array(labels, str).reshape(len(part), len(texts)),
        target=target,
        targets=np.array([targets[i] for i in part], np.float64),
    )


def _kept_rows(
    path: pathlib.Path, gaps: dict[str, list[int]], lines: Sequence[int], target: str, missing: str
) -> list[int]:
    """The rows to keep, given the rows that have gaps, by column."""
    rows = range(len(lines))
    if not any(gaps.values()):
        return list(rows)
    reports = {name: _listed("line", [lines[i] for i in where]) for name, where in gaps.items() if where}
    if missing == "refuse":
        columns = [f"column {name!r}, {where}" for name, where in reports.items()]
        raise ValueError(
            "\n  ".join([f"{path} has missing values:", *columns])
            + "\nCorrect the file, or set missing to 'mean' to fill them with training means, or to 'drop' to leave "
            "such rows out."
        )
    if missing == "mean":
        if target in reports:
            raise ValueError(
                f"The target {target!r} of {path} is missing in {reports[target]}, and a target cannot be filled in; "
                "correct the file, or set missing to 'drop'."
            )
        return list(rows)
    dropped = {i for where in gaps.values() for i in where}
    kept = [i for i in rows if i not in dropped]
    if not kept:
        raise ValueError(f"Every row of {path} has a missing value; set missing to 'mean', or correct the file.")
    warnings.warn(f"{path}: rows with missing values left out: {len(dropped)}, kept: {len(kept)}.", stacklevel=4)
    return kept


def _read_csv(path: pathlib.Path) -> tuple[list[str], list[list[str]], list[int]]:
    """The header, the rows of stripped cells, and the line on which each starts: quoted cells may hold line breaks."""
    if not path.is_file():
        raise FileNotFoundError(f"There is no data file {path}.")
    content = path.read_bytes()
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{path}, line {line} is not UTF-8; save the file in that encoding.") from error

    rows, lines = [], []
    reader = csv.reader(io.StringIO(text, newline=""), strict=True, skipinitialspace=True)
    line = 1
    try:
        for row in reader:
            rows.append([cell.strip() for cell in row])
            lines.append(line)
            line = reader.line_num + 1
    except csv.Error as error:
        raise ValueError(f"{path}, line {line} is not readable as CSV: {error}.") from error
    while rows and rows[-1] in ([], [""]):  # blank lines at the end
        rows.pop()
        lines.pop()
    if len(rows) < 2:
        raise ValueError(f"{path} has {'a header and no rows' if rows else 'no header: it is empty'}.")

    header = rows[0]
    if not header:
        raise ValueError(f"{path}, line 1 is blank; the first line has to name every column.")
    first: dict[str, int] = {}
    for i, name in enumerate(header):
        if not name:
            raise ValueError(
                f"{path}, line {lines[0]}: column {i + 1} has no name; the first line has to name every column."
            )
        if first.setdefault(name, i) < i:
            raise ValueError(
                f"{path}, line {lines[0]}: columns {first[name] + 1} and {i + 1} are both named {name!r:.80}; "
                "rename one of them."
            )
    for row, line in zip(rows, lines, strict=True):
        if len(row) != len(header):
            cells = "1 cell" if len(row) == 1 else f"{len(row)} cells"
            raise ValueError(
                f"{path}, line {line} has {cells if row else 'nothing'}, where the header names {len(header)} columns."
            )
    return header, rows[1:], lines[1:]


def _parse_column(path: pathlib.Path, name: str, cells: Sequence[str], lines: Sequence[int]) -> list[float] | None:
    """The numbers of a column, NaN for gaps; None for texts. The whole column decides, so that all splits agree."""
    values = []
    texts = []
    for cell, line in zip(cells, lines, strict=True):
        if _is_gap(cell):
            values.append(math.nan)
        elif _NUMBER.fullmatch(cell) and math.isfinite(float(cell)):
            values.append(float(cell))
        elif _NUMBER.fullmatch(cell) or _INFINITY.fullmatch(cell):
            raise ValueError(f"{path}, line {line}, column {name!r} is {_short(cell)}, not a finite number.")
        else:
            texts.append((cell, line))
    only_gaps = all(map(math.isnan, values))
    if not texts and only_gaps:
        raise ValueError(f"Column {name!r} of {path} has no value in any row; remove it.")
    if not texts:
        return values
    if not only_gaps:
        # One slip of the pen would otherwise turn a column of numbers into hundreds of texts.
        raise ValueError(
            f"Column {name!r} of {path} holds both numbers and text, such as {_short(texts[0][0])!r}, in "
            f"{_listed('line', [line for _, line in texts])}; correct the cells."
        )
    return None


def _is_gap(cell: str) -> bool:
    return cell.lower() in _GAPS


def _short(cell: str) -> str:
    return cell if len(cell) <= 20 else f"{cell[:17]}..."


def _listed(what: str, items: Sequence[Any]) -> str:
    """ "line 3", "lines 3, 5", "lines 3, 5, ... and 7 more"."""
    shown = ", ".join(map(repr, items[:_LISTED]))
    more = f" and {len(items) - _LISTED} more" if len(items) > _LISTED else ""
    return f"{what}{'s' if len(items) > 1 else ''} {shown}{more}"


# -- TFDS --------------------------------------------------------------------------------------------------------------


def _prepared_table(name: str, split: str, target: str, data_dir: str | pathlib.Path | None) -> Table:
    try:
        data = tfds.data_source(
            name,
            split=split,
            data_dir=None if data_dir is None else pathlib.Path(data_dir).expanduser(),
            builder_kwargs={"file_format": "array_record"},  # the default format needs TensorFlow
        )
    except ValueError as error:
        raise ValueError(f"Split {split!r} of table {name!r} cannot be opened: {error}") from error
    if not len(data):
        raise ValueError(f"Split {split!r} of table {name!r} has no rows.")
    rows = data.__getitems__(list(range(len(data))))
    # TFDS stores float32: through its shortest decimal, 32.1 is 32.1 again and not 32.0999985.
    columns = {key: np.array([float(str(np.float32(row[key]))) for row in rows]) for key in sorted(rows[0])}
    noise_std = columns.pop(_NOISE, None)
    targets = columns.pop(target)
    return Table(
        name=name,
        names=tuple(columns),
        features=np.column_stack(list(columns.values())),
        label_names=(),
        labels=np.empty((len(rows), 0), str),
        target=target,
        targets=targets,
        noise_std=noise_std,
    )


def _numbers(*names: str) -> tfds.features.FeaturesDict:
    return tfds.features.FeaturesDict({name: tfds.features.Scalar(np.float32) for name in names})


class Diabetes(tfds.core.GeneratorBasedBuilder):
    """442 patients: age, sex, body mass index, blood pressure, six blood values; diabetes progression a year later.

    The raw numbers, from the copy that scikit-learn brings. A hash of its features decides on the split of a row: about
    7/10 train, 1/10 validation, 2/10 test.
    """

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "Initial release."}

    _COLUMNS = ("age", "sex", "bmi", "bp", "s1", "s2", "s3", "s4", "s5", "s6")

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description="Diabetes progression by ten measurements (Efron et al., Least Angle Regression, 2004).",
            features=_numbers(*self._COLUMNS, _TARGETS["diabetes"]),
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager):
        del dl_manager  # nothing to download
        try:
            from sklearn import datasets
        except ImportError as error:
            raise ImportError(
                "The data set 'diabetes' is prepared, once, from the copy in scikit-learn: pip install scikit-learn."
            ) from error
        data = datasets.load_diabetes(scaled=False)
        parts: dict[str, list[dict[str, float]]] = {"train": [], "validation": [], "test": []}
        for features, target in zip(data.data.tolist(), data.target.tolist(), strict=True):
            row = dict(zip(data.feature_names, features, strict=True))
            bucket = int.from_bytes(hashlib.sha256(repr(features).encode()).digest()[:8], "big") % 10
            split = {0: "validation", 1: "test", 2: "test"}.get(bucket, "train")
            parts[split].append({**{name: row[name] for name in self._COLUMNS}, _TARGETS["diabetes"]: target})
        return {split: self._generate_examples(rows) for split, rows in parts.items()}

    def _generate_examples(self, rows: list[dict[str, float]]) -> Iterator[tuple[int, dict[str, float]]]:
        yield from enumerate(rows)


@dataclasses.dataclass(frozen=True)
class _Function:
    """A smooth function of `features` numbers of [0, 1]; `level` sets its noise so that the best R2 is about 0.85."""

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
_SIZES = {"train": 3000, "validation": 500, "test": 1000}
_BETWEEN_MODES = 0.95  # of the standard deviation; what is left to each mode is sqrt(1 - 0.95**2) = 0.31


@dataclasses.dataclass
class SyntheticConfig(tfds.core.BuilderConfig):
    """Which function, and whether the noise has one mode or two.

    Attributes:
      function: a key of `_FUNCTIONS`.
      bimodal: noise is Gaussian, or else falls on either side of the function, seldom near it.
    """

    function: str = ""
    bimodal: bool = False


def _synthetic_rows(config: SyntheticConfig, split: str) -> Iterator[dict[str, float]]:
    function = _FUNCTIONS[config.function]
    rng = random.Random(f"{config.name} {split}")
    for _ in range(_SIZES[split]):
        features = [rng.random() for _ in range(function.features)]
        std = function.level * (0.5 + features[0])
        noise = rng.gauss(0, 1)
        if config.bimodal:
            noise = rng.choice((-1, 1)) * _BETWEEN_MODES + noise * math.sqrt(1 - _BETWEEN_MODES**2)
        names = [f"x{i + 1}" for i in range(function.features)]
        yield {**dict(zip(names, features, strict=True)), "y": function.value(*features) + std * noise, _NOISE: std}


class Synthetic(tfds.core.GeneratorBasedBuilder):
    """A smooth function of uniform features plus noise of known standard deviation, which grows with the first feature.

    Features: `x1` ..., `y` to predict, and `noise_std`, the standard deviation of y given the others.
    """

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "Initial release."}
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

    def _info(self) -> tfds.core.DatasetInfo:
        names = [f"x{i + 1}" for i in range(_FUNCTIONS[self.builder_config.function].features)]
        return tfds.core.DatasetInfo(
            builder=self,
            description="Smooth functions with noise of known, uneven size, so that the best reachable R2 is known.",
            features=_numbers(*names, _TARGETS["synthetic"], _NOISE),
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager):
        del dl_manager  # nothing to download
        return {split: self._generate_examples(split) for split in _SIZES}

    def _generate_examples(self, split: str) -> Iterator[tuple[int, dict[str, float]]]:
        yield from enumerate(_synthetic_rows(self.builder_config, split))

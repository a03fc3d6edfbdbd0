"""JSONL and Parquet files as rows. Every row is checked when a file is read; a bad row is reported with its number."""

import collections
from collections.abc import Iterable, Iterator, Mapping, Sequence
import dataclasses
import hashlib
import json
import math
import pathlib
import re
from typing import Any, TypeVar
import warnings

Row = dict[str, Any]
T = TypeVar("T")

# Columns that some module of this package reads by name.
_OURS = {"question", "answer", "solution", "chosen", "rejected", "value", "points", "exam", "exam_total"}
_REQUIRED = {"question": "question", "answer": "answer"}
REPORTED = 10  # messages list so many rows and count the rest


@dataclasses.dataclass(frozen=True)
class FileRows:
    """The rows of a file."""

    path: pathlib.Path
    unit: str  # "line", counted from 1, or "row", counted from 0
    rows: list[Row]  # the good rows under our column names; other columns are kept
    numbers: list[int]  # the number of the line or row in the file, for each of `rows`
    skipped: int  # the number of bad rows left out
    digest: str  # the SHA-256 of the file


def read_jsonl(path: pathlib.Path, columns: Mapping[str, str], on_bad_row: str) -> FileRows:
    """Reads and checks a whole file: UTF-8, one JSON object per line, blank lines at the end only.

    The file may begin with a byte order mark. `columns` maps our names to the file's. `question`, `answer` and every
    column named there must be non-empty text or a finite number. `on_bad_row` "refuse" raises after the last line;
    "skip" leaves bad rows out, counts them and warns.

    Raises FileNotFoundError, and ValueError if a row is bad under "refuse", no row is usable, or the file is UTF-16 or
    UTF-32.
    """
    if not path.is_file():
        raise FileNotFoundError(f"There is no data file {path}.")
    reader, digest = _FileReader(path, "line"), hashlib.sha256()
    blank: list[int] = []  # lines that are bad only if a row follows
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            digest.update(line)
            if number == 1 and line.startswith((b"\xff\xfe", b"\xfe\xff", b"\0\0\xfe\xff")):
                raise ValueError(f"{path} is UTF-16 or UTF-32 by its first bytes; save it as UTF-8.")
            line = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
            if not line.strip():
                blank.append(number)
                continue
            for earlier in blank:
                reader.report(earlier, "the line is blank")
            blank.clear()
            try:
                reader.keep(number, _parse(line, columns))
            except ValueError as error:
                reader.report(number, str(error))
    return reader.settle(on_bad_row, digest.hexdigest())


def read_parquet(path: pathlib.Path, columns: Mapping[str, str], on_bad_row: str) -> FileRows:
    """Reads and checks a Parquet file as `read_jsonl` does. Only columns that this package needs enter memory.

    A needed column is a column in `columns` or one of our names (`question`, `answer`, `solution`, `value`, ...). Dots
    select a field of a structured column: {"question": "prompt.0.content", "answer": "reward_model.ground_truth"}.
    Raises ValueError also if the file is not Parquet or lacks a column.
    """
    import pyarrow  # costs a second; needed only for Parquet
    import pyarrow.parquet

    if not path.is_file():
        raise FileNotFoundError(f"There is no data file {path}.")
    reader = _FileReader(path, "row")
    theirs = set((_REQUIRED | dict(columns)).values())
    needed = _OURS | theirs | {name.split(".")[0] for name in theirs}
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(columns=[name for name in file.schema_arrow.names if name in needed]):
                for i in range(len(batch)):
                    number = len(reader.rows) + reader.count
                    try:
                        (row,) = batch.slice(i, 1).to_pylist()
                        reader.keep(number, _checked(row, columns))
                    except (ValueError, OverflowError) as error:  # also text that is not UTF-8, a date beyond Python's
                        reader.report(number, str(error))
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{path} is not a Parquet file that can be read: {error}.") from error
    with path.open("rb") as content:
        return reader.settle(on_bad_row, hashlib.file_digest(content, "sha256").hexdigest())


class _FileReader:
    """Collects the good rows of a file, counts the bad rows and describes the first few."""

    def __init__(self, path: pathlib.Path, unit: str):
        self.path, self.unit, self.count = path, unit, 0
        self.rows: list[Row] = []
        self.numbers: list[int] = []
        self.reports: list[str] = []

    def keep(self, number: int, row: Row) -> None:
        self.rows.append(row)
        self.numbers.append(number)

    def report(self, number: int, reason: str) -> None:
        self.count += 1
        if len(self.reports) < REPORTED:
            self.reports.append(f"{self.path}, {self.unit} {number}: {reason}")

    def settle(self, on_bad_row: str, digest: str) -> FileRows:
        """Returns the rows of the whole file; raises ValueError or warns of bad rows, depending on `on_bad_row`."""
        bad = "1 bad row" if self.count == 1 else f"{self.count} bad rows"
        if self.count and on_bad_row == "refuse":
            remedy = "Correct the file, or set config.data.on_bad_row to 'skip' to leave such rows out."
            raise ValueError(f"{listed(f'{self.path} has {bad}', self.reports, self.count)}\n{remedy}")
        if not self.rows:
            why = f"{bad} skipped, the first at {self.reports[0]}" if self.count else "the file is empty"
            raise ValueError(f"{self.path} has no usable row: {why}.")
        if self.count:
            summary = f"{self.path}: {bad} skipped, {len(self.rows)} kept"
            warnings.warn(listed(summary, self.reports, self.count), stacklevel=4)
        return FileRows(self.path, self.unit, self.rows, self.numbers, self.count, digest)


def quoted(names: Iterable[str]) -> str:
    """Returns the names of columns for a message: at most ten, each cut to 80 characters."""
    names = list(names)
    more = f" and {len(names) - 10} more" if len(names) > 10 else ""
    return ", ".join(f"{name!r:.80}" for name in names[:10]) + more


def listed(summary: str, reports: Sequence[str], count: int) -> str:
    """Returns the summary, one line per report, and the number of the remaining `count` rows."""
    shown = reports[:REPORTED]
    more = [f"and {count - len(shown)} more"] if count > len(shown) else []
    return "\n  ".join([f"{summary}:", *shown, *more])


def rename_columns(row: Row, columns: Mapping[str, str]) -> Row:
    """Returns the row under our names: `columns` maps them to the row's, and other columns keep their names.

    A name that the row lacks can be a path into a structured column: "prompt.0.content". Raises ValueError if
    `question`, `answer` or a column in `columns` is missing.
    """
    wanted = _REQUIRED | dict(columns)
    row = dict(row)
    for ours, theirs in wanted.items():
        if theirs not in row and "." in theirs:
            for value in _inside(row, theirs):
                row[theirs] = value
        if theirs not in row:
            purpose = "" if ours == theirs else f" (to be used as {ours!r})"
            raise ValueError(f"there is no column {theirs!r}{purpose}, only {quoted(row) or 'an empty row'}")
    rest = {name: value for name, value in row.items() if name not in wanted.values()}
    return rest | {ours: row[theirs] for ours, theirs in wanted.items()}


def slice_rows(rows: list[T], split: str, path: pathlib.Path | str) -> list[T]:
    """Returns a part of the rows by TFDS's slice notation: "all", "[:90%]", "[90%:]", "[100:200]", "[-50:]".

    Percentages round to the nearest row, so that "[:90%]" and "[90%:]" share no row and miss none. Raises ValueError if
    the notation is unknown, or the slice reaches outside the file or is empty.
    """
    if split == "all":
        return rows
    border = r"(-?\d+|\d\d?%|100%)?"
    match = re.fullmatch(rf"\[{border}:{border}\]", split)
    if not match:
        forms = "a file takes 'all' or a slice such as '[:90%]', '[90%:]' or '[100:200]'"
        raise ValueError(f"The split {split!r} of {path} is not understood: {forms}.")
    borders = [0, len(rows)]
    for side, text in enumerate(match.groups()):
        if text is not None:
            value = (int(text[:-1]) * len(rows) + 50) // 100 if text.endswith("%") else int(text)
            borders[side] = value + len(rows) if value < 0 else value
            if not 0 <= borders[side] <= len(rows):
                raise ValueError(f"The split {split!r} reaches outside {path}, which has {len(rows)} usable rows.")
    part = rows[slice(*borders)]
    if not part:
        raise ValueError(f"The split {split!r} of {path} selects none of its {len(rows)} usable rows.")
    return part


def _parse(line: bytes, columns: Mapping[str, str]) -> Row:
    """Returns one checked row; raises ValueError with the reason if the line is bad."""
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"byte {error.start + 1} is not UTF-8") from error
    if "\0" in text:  # JSON writes it as \u0000
        raise ValueError(f"byte {line.index(0) + 1} is NUL, as in a damaged file or one in UTF-16")
    try:
        row = json.loads(text, object_pairs_hook=_object)
    except json.JSONDecodeError as error:
        cut = "" if line.endswith(b"\n") else "; the file ends in this line, which may be cut off"
        raise ValueError(f"not JSON: {error.msg} at character {error.pos + 1}{cut}") from error
    except _RepeatedNameError:
        raise
    except (ValueError, RecursionError) as error:  # integers of thousands of digits, thousands of brackets
        raise ValueError(f"not readable as JSON: {error}") from error
    if not isinstance(row, dict):
        raise ValueError(f"{_kind(row)}; a row has to be an object with columns")
    return _checked(row, columns)


class _RepeatedNameError(ValueError):
    """An object has two values under one name; `json` would take the last."""


def _object(pairs: list[tuple[str, Any]]) -> Row:
    row = dict(pairs)
    if len(row) < len(pairs):
        (name, _), *_ = collections.Counter(name for name, _ in pairs).most_common(1)
        raise _RepeatedNameError(f"{name!r:.80} occurs twice in one object")
    return row


def _inside(row: Row, path: str) -> Iterator[Any]:
    """Yields the value at a path such as "prompt.0.content", if the path exists."""
    at: Any = row
    for part in path.split("."):
        if isinstance(at, dict) and part in at:
            at = at[part]
        elif isinstance(at, list) and part.isascii() and part.isdigit() and int(part) < len(at):
            at = at[int(part)]
        else:
            return
    yield at


def _checked(row: Row, columns: Mapping[str, str]) -> Row:
    """Returns the row under our names; raises ValueError with the reason if it is bad."""
    row = rename_columns(row, columns)
    for name in _REQUIRED | dict(columns):
        value = row[name]
        if not isinstance(value, str | int | float) or isinstance(value, bool):
            raise ValueError(f"column {name!r} is {_kind(value)}; it has to be text or a number")
        if isinstance(value, str) and not value.strip():
            raise ValueError(f"column {name!r} is empty")
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"column {name!r} is {value}, not a finite number")
    for name, value in row.items():
        for text in _texts(value):
            if not text.isascii() and any("\ud800" <= char <= "\udfff" for char in text):
                raise ValueError(f"column {name!r} holds half of a surrogate pair, which is not a character")
    return row


def _texts(value: Any) -> Iterator[str]:
    """Yields all texts in the value of a column, which may be structured."""
    waiting = [value]
    while waiting:
        value = waiting.pop()
        if isinstance(value, str):
            yield value
        elif isinstance(value, dict):
            waiting += [*value, *value.values()]
        elif isinstance(value, list):
            waiting += value


def _kind(value: Any) -> str:
    name = type(value).__name__
    kinds = {"NoneType": "null", "bool": "boolean", "dict": "object", "list": "list", "str": "string"}
    kind = "number" if name in ("int", "float") else kinds.get(name)
    return f"a JSON {kind}" if kind else f"of type {name}"  # Parquet also has bytes, dates and decimals

"""Files of rows, parsed: JSON Lines, JSON lists, CSV and TSV, plain or gzipped, and Parquet. A fault belongs to its row."""

import collections
from collections.abc import Callable, Iterable, Iterator, Sequence
import csv
import gzip
import io
import json
import pathlib
from typing import Any, BinaryIO, NamedTuple
import warnings
import zlib

import numpy as np

Row = dict[str, Any]
Numbered = Iterator[tuple[int, Row | ValueError]]  # the number of a row in its file, and the row or its fault

_TEXT = (".jsonl", ".json", ".csv", ".tsv")
SUFFIXES = f"{', '.join(_TEXT)} (also with .gz) or .parquet"  # for messages


class Parsed(NamedTuple):
    """A file whose rows are parsed one by one."""

    unit: str  # "line", counted from 1, or "row", counted from 0
    columns: Sequence[str] | None  # of all rows, if the file states them
    rows: Numbered


def kind_of(name: str | pathlib.Path) -> str:
    """Returns the suffix that decides how a file is read, ".csv" for "Rows.CSV.gz"; "" if no such file can be read."""
    name = str(name).lower()
    plain = name.removesuffix(".gz")
    return next((kind for kind in _TEXT if plain.endswith(kind)), ".parquet" if name.endswith(".parquet") else "")


def parse(path: pathlib.Path, needed: Callable[[Sequence[str]], Sequence[str]], optional: Iterable[str] = ()) -> Parsed:
    """Opens a file whose `kind_of` is known.

    `needed` chooses the columns of a Parquet file that enter memory. Columns of a CSV file in `optional` count as absent
    if all their cells are empty. Raises ValueError if the file as a whole cannot be
    read: it is no such file, it is UTF-16 or UTF-32, a .json file is no list, or a header does not name every column.
    """
    kind = kind_of(path)
    if kind == ".parquet":
        return _parquet(path, needed)
    if kind in (".csv", ".tsv"):
        header, cells = read_cells(path, "," if kind == ".csv" else "\t")
        return _without_empty(Parsed("line", header, _named(header, cells)), set(optional) & set(header))
    if kind == ".json":
        return _json_file(path)
    return Parsed("line", None, _json_lines(path, _binary_lines(path)))


def read_cells(path: pathlib.Path, delimiter: str) -> tuple[list[str], Iterator[tuple[int, list[str] | ValueError]]]:
    """Returns the header of a CSV file, and its rows of cells with their first lines: quoted cells can hold line breaks.

    A first column without a name is left out with a warning: pandas writes its index so. Further columns without a name
    are left out if they have no cell with content.

    Raises ValueError if the header does not name every other column once, no row follows, or the file is damaged: after an
    open quote, nothing can tell where the next row begins.
    """
    content = b"".join(_binary_lines(path))
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{path}, line {line} is not UTF-8; save the file in that encoding.") from error
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise ValueError(f"{path}, line {line} holds NUL, as in a damaged file or one in UTF-16.")
    rows = _cells(path, text, delimiter)
    first_line, header = next(rows, (1, None))
    if header is None:
        raise ValueError(f"{path} has no header: it is empty.")
    names = [name.strip() for name in header]
    _check_names(path, names, first_line)
    found = list(_of_width(len(names), rows))
    if not found:
        raise ValueError(f"{path} has a header and no rows.")
    named = _named_columns(path, names, found, first_line)
    if len(named) < len(names):
        found = [(line, [row[i] for i in named] if isinstance(row, list) else row) for line, row in found]
    return [names[i] for i in named], iter(found)


def _named_columns(
    path: pathlib.Path, names: Sequence[str], rows: Sequence[tuple[int, list[str] | ValueError]], line: int
) -> list[int]:
    """Returns the positions of the columns with a name. Raises ValueError if another column but the first has content."""
    has_content = lambda i: any(isinstance(row, list) and row[i].strip() for _, row in rows)
    unnamed = [i for i, name in enumerate(names) if not name and has_content(i)]
    if unnamed and unnamed[-1]:
        fault = f"column {unnamed[-1] + 1} has no name"
        raise ValueError(f"{path}, line {line}: {fault}; the first line has to name every column.")
    if unnamed:
        why = "as an index that pandas writes; it is left out"
        warnings.warn(f"{path}: the first column has no name, {why}.", stacklevel=5)
    return [i for i, name in enumerate(names) if name]


def _cells(path: pathlib.Path, text: str, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """Yields rows without the blank lines at the end."""
    csv.field_size_limit(2**31 - 1)  # solutions are longer than the default, 131,072
    reader, line = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True, skipinitialspace=True), 1
    blank: list[tuple[int, list[str]]] = []
    try:
        for row in reader:
            if row in ([], [""]):
                blank.append((line, row))
            else:
                yield from blank
                blank.clear()
                yield line, row
            line = reader.line_num + 1
    except csv.Error as error:
        raise ValueError(f"{path}, line {line} is not readable as CSV: {error}.") from error


def _of_width(width: int, rows: Iterable[tuple[int, list[str]]]) -> Iterator[tuple[int, list[str] | ValueError]]:
    for line, row in rows:
        cells = "1 cell" if len(row) == 1 else f"{len(row) or 'no'} cells"
        fault = ValueError(f"{cells}, but the header names {width} column{'s' if width > 1 else ''}")
        yield line, row if len(row) == width else fault


def _named(header: Sequence[str], rows: Iterable[tuple[int, list[str] | ValueError]]) -> Numbered:
    for line, cells in rows:
        yield line, cells if isinstance(cells, ValueError) else dict(zip(header, cells, strict=True))


def _without_empty(parsed: Parsed, optional: set[str]) -> Parsed:
    """Returns the rows without the optional columns that no row fills."""
    rows = list(parsed.rows)
    filled = {name for _, row in rows if isinstance(row, dict) for name in optional if row[name].strip()}
    kept = [name for name in parsed.columns or () if name not in optional - filled]
    pick = lambda row: {name: row[name] for name in kept} if isinstance(row, dict) else row
    return Parsed(parsed.unit, kept, ((number, pick(row)) for number, row in rows))


def _check_names(path: pathlib.Path, header: Sequence[str], line: int) -> None:
    if not any(header):
        raise ValueError(f"{path}, line 1 is blank; the first line has to name every column.")
    first: dict[str, int] = {}
    for i, name in enumerate(header):
        if name and first.setdefault(name, i) < i:
            fault = f"columns {first[name] + 1} and {i + 1} are both named {name!r:.80}"
            raise ValueError(f"{path}, line {line}: {fault}; rename one of them.")


def _binary_lines(path: pathlib.Path) -> Iterator[bytes]:
    """Yields the lines of a file, which may be gzipped, without a byte order mark."""
    zipped = str(path).lower().endswith(".gz")
    opened: BinaryIO = gzip.open(path) if zipped else path.open("rb")  # type: ignore[assignment]
    try:
        with opened as file:
            for number, line in enumerate(file):
                if number == 0 and line.startswith((b"\xff\xfe", b"\xfe\xff", b"\0\0\xfe\xff")):
                    raise ValueError(f"{path} is UTF-16 or UTF-32 by its first bytes; save it as UTF-8.")
                yield line.removeprefix(b"\xef\xbb\xbf") if number == 0 else line
    except (gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise ValueError(f"{path} is not a whole gzip file: {error}.") from error


def _json_lines(path: pathlib.Path, lines: Iterable[bytes]) -> Numbered:
    blank: list[int] = []  # lines that are bad only if a row follows
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            blank.append(number)
            continue
        yield from ((earlier, ValueError("the line is blank")) for earlier in blank)
        blank.clear()
        try:
            yield number, _json_row(line)
        except ValueError as error:
            yield number, error


def _json_file(path: pathlib.Path) -> Parsed:
    """Parses a list of rows, or one row per line."""
    content = b"".join(_binary_lines(path))
    if not content.lstrip().startswith(b"["):
        rows = list(_json_lines(path, io.BytesIO(content)))
        if len(rows) > 1 and all(isinstance(row, ValueError) for _, row in rows) and _is_json(content):
            raise ValueError(f"{path} holds one JSON object; it has to hold a list of rows, or one row per line.")
        return Parsed("line", None, iter(rows))
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{path}, line {line} is not UTF-8; save the file in that encoding.") from error
    return Parsed("row", None, enumerate(_json_list(path, text)))


def _json_list(path: pathlib.Path, text: str) -> Iterator[Row | ValueError]:
    space, decoder = json.decoder.WHITESPACE, json.JSONDecoder(object_pairs_hook=_object)  # type: ignore[attr-defined]
    at, number = space.match(text, text.index("[") + 1).end(), 0
    if text[at : at + 1] == "]":
        return
    while True:
        try:
            row, at = decoder.raw_decode(text, at)
        except json.JSONDecodeError as error:
            raise ValueError(
                f"{path} is not JSON: {error.msg} at line {error.lineno}, character {error.colno}."
            ) from error
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}, row {number} is not readable as JSON: {error}.") from error
        yield row if isinstance(row, dict) else _no_object(row)
        at, number = space.match(text, at).end(), number + 1
        mark, at = text[at : at + 1], space.match(text, at + 1).end()
        if mark == "]" and at >= len(text):
            return
        if mark != ",":
            line = text.count("\n", 0, at) + 1
            raise ValueError(f"{path} is not a whole JSON list: row {number - 1} is followed by {mark!r}, line {line}.")


def _json_row(line: bytes) -> Row:
    """Returns one row; raises ValueError with the reason if the line is bad."""
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
        raise _no_object(row)
    return row


def _no_object(row: Any) -> ValueError:
    return ValueError(f"{kind(row)}; a row has to be an object with columns")


def _is_json(content: bytes) -> bool:
    try:
        json.loads(content)
    except (ValueError, RecursionError):
        return False
    return True


class _RepeatedNameError(ValueError):
    """An object has two values under one name; `json` would take the last."""


def _object(pairs: list[tuple[str, Any]]) -> Row:
    row = dict(pairs)
    if len(row) < len(pairs):
        (name, _), *_ = collections.Counter(name for name, _ in pairs).most_common(1)
        raise _RepeatedNameError(f"{name!r:.80} occurs twice in one object")
    return row


def _parquet(path: pathlib.Path, needed: Callable[[Sequence[str]], Sequence[str]]) -> Parsed:
    import pyarrow  # costs a second; needed only for Parquet
    import pyarrow.parquet

    fault = lambda error: ValueError(f"{path} is not a Parquet file that can be read: {error}.")
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            names = list(file.schema_arrow.names)
    except (pyarrow.ArrowException, OSError) as error:
        raise fault(error) from error

    def rows() -> Numbered:
        number = 0
        try:
            with pyarrow.parquet.ParquetFile(path) as file:
                for batch in file.iter_batches(columns=list(needed(names))):
                    for i in range(len(batch)):
                        try:
                            (row,) = batch.slice(i, 1).to_pylist()
                            yield (
                                number,
                                {field.name: _as_printed(row[field.name], field.type) for field in batch.schema},
                            )
                        except (ValueError, OverflowError) as error:  # text that is not UTF-8, a date beyond Python's
                            yield number, ValueError(str(error))
                        number += 1
        except (pyarrow.ArrowException, OSError) as error:
            raise fault(error) from error

    return Parsed("row", names, rows())


_SMALL = {"float": np.float32, "halffloat": np.float16}  # Arrow's names


def _as_printed(value: Any, arrow: Any) -> Any:
    """Returns a value of an Arrow type with numbers of 16 and 32 bits as they print: 0.1 instead of 0.10000000149011612."""
    if isinstance(value, float) and str(arrow) in _SMALL:
        return float(str(_SMALL[str(arrow)](value)))
    if isinstance(value, dict):
        return {name: _as_printed(x, arrow.field(name).type) for name, x in value.items()}
    if isinstance(value, list) and arrow.num_fields == 1:
        return [_as_printed(x, arrow.field(0).type) for x in value]
    return value


def kind(value: Any) -> str:
    """Returns the kind of a value for messages: "a JSON list"."""
    name = type(value).__name__
    kinds = {"NoneType": "null", "bool": "boolean", "dict": "object", "list": "list", "str": "string"}
    found = "number" if name in ("int", "float") else kinds.get(name)
    return f"a JSON {found}" if found else f"of type {name}"  # Parquet also has bytes, dates and decimals

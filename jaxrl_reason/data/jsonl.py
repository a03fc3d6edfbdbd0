"""JSONL files as rows: every line is checked when the file is read, and every bad one reported with its number and the reason."""

from collections.abc import Mapping
import hashlib
import json
import math
import pathlib
import re
from typing import Any
import warnings

Row = dict[str, Any]

_REPORTED = 10  # bad rows spelled out in a message; the rest are counted


def read_jsonl(path: pathlib.Path, columns: Mapping[str, str], on_bad_row: str) -> tuple[list[Row], int, str]:
    """Reads and checks a whole file: UTF-8, one JSON object a line, blank lines at the end only.

    Args:
      path: the file; a byte order mark is tolerated.
      columns: our names to the file's. `question`, `answer` and every column named here must be non-empty text or a finite number.
      on_bad_row: "refuse" raises after the last line; "skip" leaves bad rows out, counts them and warns.

    Returns:
      The rows under our column names (other columns kept), the number skipped, and the SHA-256 of the file.

    Raises:
      FileNotFoundError: no such file.
      ValueError: bad rows under "refuse", or no usable row at all.
    """
    if not path.is_file():
        raise FileNotFoundError(f"There is no data file {path}.")
    rows: list[Row] = []
    reports: list[str] = []
    bad = 0

    def report(number: int, reason: str) -> None:
        nonlocal bad
        bad += 1
        if len(reports) < _REPORTED:
            reports.append(f"{path}, line {number}: {reason}")

    blank: list[int] = []  # lines that are bad only if something follows them
    digest = hashlib.sha256()
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            digest.update(line)
            line = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
            if not line.strip():
                blank.append(number)
                continue
            for earlier in blank:
                report(earlier, "the line is blank")
            blank.clear()
            try:
                rows.append(_parse(line, columns))
            except ValueError as error:
                report(number, str(error))

    if bad and on_bad_row == "refuse":
        more = [f"and {bad - len(reports)} more"] if bad > len(reports) else []
        lines = "\n  ".join([f"{path} has {_count(bad)}:", *reports, *more])
        raise ValueError(f"{lines}\nCorrect the file, or set config.data.on_bad_row to 'skip' to leave such rows out.")
    if not rows:
        why = f"{_count(bad)} skipped, the first at {reports[0]}" if bad else "the file is empty"
        raise ValueError(f"{path} has no usable row: {why}.")
    if bad:
        warnings.warn(f"{path}: {_count(bad)} skipped, {len(rows)} kept. The first: {reports[0]}.", stacklevel=3)
    return rows, bad, digest.hexdigest()


def rename_columns(row: Row, columns: Mapping[str, str]) -> Row:
    """The row under our names: `columns` maps them to the row's own; columns it does not mention keep their names.

    Raises:
      ValueError: `question`, `answer` or a column that `columns` mentions is missing.
    """
    wanted = {"question": "question", "answer": "answer", **columns}
    for ours, theirs in wanted.items():
        if theirs not in row:
            purpose = "" if ours == theirs else f" (to be used as {ours!r})"
            raise ValueError(
                f"there is no column {theirs!r}{purpose}, only {', '.join(map(repr, row)) or 'an empty row'}"
            )
    rest = {name: value for name, value in row.items() if name not in wanted.values()}
    return rest | {ours: row[theirs] for ours, theirs in wanted.items()}


def slice_rows(rows: list[Row], split: str, path: pathlib.Path) -> list[Row]:
    """Part of a file by the slice notation of TFDS: "all", "[:90%]", "[90%:]", "[100:200]", "[-50:]".

    Percentages round to the nearest row, so that "[:90%]" and "[90%:]" share none and miss none.

    Raises:
      ValueError: another notation, a border outside the file, or a slice without rows.
    """
    if split == "all":
        return rows
    border = r"(-?\d+|\d\d?%|100%)?"
    match = re.fullmatch(rf"\[{border}:{border}\]", split)
    if not match:
        raise ValueError(
            f"The split {split!r} of {path} is not understood: a file takes 'all' or a slice such as '[:90%]', '[90%:]' or '[100:200]'."
        )
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
    """One checked row; raises ValueError with the reason where the line is bad."""
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"byte {error.start + 1} is not UTF-8") from error
    try:
        row = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error.msg} at character {error.pos + 1}") from error
    except (ValueError, RecursionError) as error:  # integers of thousands of digits, thousands of brackets
        raise ValueError(f"not readable as JSON: {error}") from error
    if not isinstance(row, dict):
        raise ValueError(f"a JSON {_kind(row)}, where an object with columns has to be")
    row = rename_columns(row, columns)
    for name in {"question": None, "answer": None, **columns}:
        value = row[name]
        if not isinstance(value, str | int | float) or isinstance(value, bool):
            raise ValueError(f"column {name!r} is a JSON {_kind(value)}; it has to be text or a number")
        if isinstance(value, str) and not value.strip():
            raise ValueError(f"column {name!r} is empty")
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"column {name!r} is {value}, not a finite number")
    for name, value in row.items():
        if isinstance(value, str) and not value.isascii() and any("\ud800" <= char <= "\udfff" for char in value):
            raise ValueError(f"column {name!r} holds half of a surrogate pair, which is not a character")
    return row


def _kind(value: Any) -> str:
    return {type(None): "null", bool: "boolean", list: "list", dict: "object", str: "string"}.get(type(value), "number")


def _count(bad: int) -> str:
    return "1 bad row" if bad == 1 else f"{bad} bad rows"

"""Files as rows under our names of columns. Every row is checked when a file is read; a bad row is reported with its number."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
import dataclasses
import hashlib
import math
import pathlib
import re
from typing import Any, TypeVar
import warnings

from jaxrl_reason.data import parsers
from jaxrl_reason.data.parsers import kind, Row
from jaxrl_reason.data.prompts import parse_turns, turns_of

T = TypeVar("T")

# Columns that some module of this package reads by name: text or numbers, apart from a question that is a conversation.
_OURS = {"question", "answer", "solution", "chosen", "rejected", "value", "points", "exam", "exam_total"}
_QUESTIONS = ("question", "prompt", "messages")  # the first of them that a row has is the question
REPORTED = 10  # messages list so many rows and count the rest


class MissingColumnError(ValueError):
    """A row lacks a column."""


@dataclasses.dataclass(frozen=True)
class FileRows:
    """The rows of a file."""

    path: pathlib.Path
    unit: str  # "line", counted from 1, or "row", counted from 0
    rows: list[Row]  # the good rows under our column names; other columns are kept
    numbers: list[int]  # the number of the line or row in the file, for each of `rows`
    skipped: int  # the number of bad rows left out
    digest: str  # the SHA-256 of the file


NAMING = (
    "Name the columns with --config.data.columns, such as --config.data.columns=\"{'question': 'problem'}\"; "
    "--config.data.eval_columns is for held-out data with other columns."
)


def read(path: pathlib.Path, columns: Mapping[str, str], on_bad_row: str, naming: str = NAMING) -> FileRows:
    """Reads and checks a whole file of a kind that `parsers.kind_of` knows: UTF-8, blank lines at the end only.

    `columns` maps our names to the file's. Dots select a field of a structured column: {"answer":
    "reward_model.ground_truth"}. Of a Parquet file, only columns in `columns` and our names enter memory.

    `question` must be non-empty text, a finite number, or a conversation (see `prompts.turns_of`). Our other columns, if
    named in `columns`, and `answer`, if any row has it, must be non-empty text or a finite number. Columns that only
    rewards read can hold anything. `on_bad_row` "refuse" raises after the last row; "skip" leaves bad rows out, counts
    them and warns.

    Raises FileNotFoundError, and ValueError if a row is bad under "refuse", no row is usable, all rows lack a column
    (`naming` says what to do then), or the file as a whole cannot be read.
    """
    if not path.is_file():
        raise FileNotFoundError(f"There is no data file {path}.")
    optional = {*_OURS, *_QUESTIONS} - {*columns, *columns.values()}
    parsed = parsers.parse(path, lambda names: _needed(names, columns), optional)
    reader = _FileReader(path, parsed.unit, naming)
    for number, row in parsed.rows:
        try:
            if isinstance(row, ValueError):
                raise row
            reader.keep(number, _checked(row, columns, parsed.columns or row))
        except ValueError as error:
            reader.report(number, error)
    if "answer" not in columns:
        reader.settle_answers()
    with path.open("rb") as content:
        return reader.settle(on_bad_row, hashlib.file_digest(content, "sha256").hexdigest())


def _needed(names: Sequence[str], columns: Mapping[str, str]) -> list[str]:
    """Returns the columns of a Parquet file that this package needs."""
    wanted = _OURS | set(_wanted(names, columns).values())
    wanted |= {name.split(".")[0] for name in wanted}
    return [name for name in names if name in wanted]


class _FileReader:
    """Collects the good rows of a file, and the faults of the bad rows."""

    def __init__(self, path: pathlib.Path, unit: str, advice: str):
        self.path, self.unit, self.advice = path, unit, advice
        self.rows: list[Row] = []
        self.numbers: list[int] = []
        self.faults: list[tuple[int, ValueError]] = []

    def keep(self, number: int, row: Row) -> None:
        self.rows.append(row)
        self.numbers.append(number)

    def report(self, number: int, fault: ValueError) -> None:
        self.faults.append((number, fault))

    def settle_answers(self) -> None:
        """Reports rows without an answer if other rows have one; otherwise no row has the column."""
        answered = [row.get("answer") is not None for row in self.rows]
        if not any(answered):
            for row in self.rows:
                row.pop("answer", None)
        pairs = list(zip(self.numbers, self.rows, strict=True))
        if not any(answered) or all(answered):
            return
        for number, row in (pair for pair, has in zip(pairs, answered, strict=True) if not has):
            null = ValueError(f"column 'answer' is {kind(None)}; it has to be text or a number")
            self.report(number, null if "answer" in row else _missing("answer", "answer", row))
        self.faults.sort(key=lambda fault: fault[0])
        self.numbers = [number for (number, _), has in zip(pairs, answered, strict=True) if has]
        self.rows = [row for (_, row), has in zip(pairs, answered, strict=True) if has]

    def settle(self, on_bad_row: str, digest: str) -> FileRows:
        """Returns the rows of the whole file; raises ValueError or warns of bad rows, depending on `on_bad_row`."""
        count = len(self.faults)
        if count and not self.rows and all(isinstance(fault, MissingColumnError) for _, fault in self.faults):
            raise ValueError(f"In {self.path}, {self.faults[0][1]}. {self.advice}")
        bad = "1 bad row" if count == 1 else f"{count} bad rows"
        reports = [f"{self.path}, {self.unit} {number}: {fault}" for number, fault in self.faults[:REPORTED]]
        if count and on_bad_row == "refuse":
            remedy = "Correct the file, or set config.data.on_bad_row to 'skip' to leave such rows out."
            raise ValueError(f"{listed(f'{self.path} has {bad}', reports, count)}\n{remedy}")
        if not self.rows:
            why = f"{bad} skipped, the first at {reports[0]}" if count else "the file is empty"
            raise ValueError(f"{self.path} has no usable row: {why}.")
        if count:
            summary = f"{self.path}: {bad} skipped, {len(self.rows)} kept"
            warnings.warn(listed(summary, reports, count), stacklevel=4)
        return FileRows(self.path, self.unit, self.rows, self.numbers, count, digest)


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


def rename_columns(row: Row, columns: Mapping[str, str], names: Iterable[str] | None = None) -> Row:
    """Returns the row under our names: `columns` maps them to the row's, and other columns keep their names.

    A name that the row lacks can be a path into a structured column: "reward_model.ground_truth". Without a column
    `question`, `prompt` or `messages` is the question. A question that is a conversation as JSON text becomes a list.

    Raises MissingColumnError, which lists `names` (None: the row's), if the question or a column in `columns` is missing,
    and ValueError if the question is a conversation's turn that is not the user's, or text that looks like a conversation.
    Warns if the question is one turn of several.
    """
    wanted = _wanted(row, columns)
    wanted |= {"answer": "answer"} if "answer" in row and "answer" not in wanted else {}
    row = dict(row)
    for ours, theirs in wanted.items():
        if theirs not in row and "." in theirs:
            if ours == "question":
                _check_turn(row, theirs)
            for value in _inside(row, theirs):
                row[theirs] = value
        if theirs not in row:
            raise _missing(ours, theirs, row if names is None else names)
    rest = {name: value for name, value in row.items() if name not in wanted.values()}
    return rest | {
        ours: parse_turns(row[theirs]) if ours == "question" else row[theirs] for ours, theirs in wanted.items()
    }


def _check_turn(row: Row, path: str) -> None:
    """Checks a question that is one turn of a conversation: "prompt.0.content", or "prompt.content.0" of TFDS."""
    before, *last = path.rsplit(".", 2)
    at = next(_inside(row, before), None) if len(last) == 2 else None
    key = next((key for key in ("role", "from") if _roles(at, key)), "")
    if not key:
        return
    roles, place = _roles(at, key), last[0] if isinstance(at, list) else last[1]
    naming = f"'question': {before!r}"
    whole = f"{naming} takes the whole conversation"
    takes_all = f'--config.data.columns="{{{naming}}}" takes all'
    if key != "role":
        whole = takes_all = "turns of role and content can be taken whole"
    role = roles[int(place)] if place.isascii() and place.isdigit() and int(place) < len(roles) else None
    if role not in (None, "user", "human"):
        raise ValueError(f"the question {path!r} is the {role}'s turn; {whole}")
    if len(roles) > 1:
        left_out = f"the question {path!r} leaves out the other turns of its conversation"
        warnings.warn(f"In some rows {left_out}; {takes_all}.", stacklevel=6)


def _roles(turns: Any, key: str) -> list[str]:
    """Returns who has the turns of a conversation, a list of turns or a dict of lists; [] for anything else."""
    if isinstance(turns, list):
        roles: Any = [turn.get(key) if isinstance(turn, dict) else None for turn in turns]
    else:
        roles = turns.get(key) if isinstance(turns, dict) else None
    return roles if isinstance(roles, list) and all(isinstance(role, str) for role in roles) else []


def _wanted(names: Iterable[str], columns: Mapping[str, str]) -> dict[str, str]:
    """Returns our name -> theirs for the columns that every row needs; `names` are the columns of a row."""
    names = set(names)
    return {"question": next((name for name in _QUESTIONS if name in names), "question")} | dict(columns)


def _missing(ours: str, theirs: str, names: Iterable[str]) -> MissingColumnError:
    purpose = "" if ours == theirs else f" (to be used as {ours!r})"
    return MissingColumnError(f"there is no column {theirs!r}{purpose}, only {quoted(names) or 'an empty row'}")


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


def _inside(row: Row, path: str) -> Iterator[Any]:
    """Yields the value at a path such as "reward_model.ground_truth", if the path exists."""
    at: Any = row
    for part in path.split("."):
        if isinstance(at, dict) and part in at:
            at = at[part]
        elif isinstance(at, list) and part.isascii() and part.isdigit() and int(part) < len(at):
            at = at[int(part)]
        else:
            return
    yield at


def _checked(row: Row, columns: Mapping[str, str], names: Iterable[str]) -> Row:
    """Returns the row under our names; raises ValueError with the reason if it is bad."""
    row = rename_columns(row, columns, names)
    for name in dict.fromkeys(["question", *(() if row.get("answer") is None else ["answer"]), *columns]):
        if name == "question" and isinstance(row[name], list | dict):
            _check_conversation(row[name])
        elif name in _OURS:
            _check_scalar(name, row[name])
    for name, value in row.items():
        for text in _texts(value):
            if not text.isascii() and any("\ud800" <= char <= "\udfff" for char in text):
                raise ValueError(f"column {name!r} holds half of a surrogate pair, which is not a character")
    return row


def _check_conversation(value: Any) -> None:
    try:
        turns_of(value)
    except ValueError as error:
        raise ValueError(f"column 'question' is {kind(value)}, and {error}") from error


def _check_scalar(name: str, value: Any) -> None:
    if not isinstance(value, str | int | float) or isinstance(value, bool):
        raise ValueError(f"column {name!r} is {kind(value)}; it has to be text or a number")
    if isinstance(value, str) and not value.strip():
        raise ValueError(f"column {name!r} is empty")
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"column {name!r} is {value}, not a finite number")


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

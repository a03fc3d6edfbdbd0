"""Files of a run that survive a kill: JSON that is complete or absent, and JSON lines that only ever grow.

A `.jsonl` file holds one JSON object per line, each with its `step`. Every append is one write to the system, so a
killed run leaves at most its last line torn. Opening the file again removes the torn line. A run that resumes from a
checkpoint of step k passes `resume_step=k`: the lines of later steps are dropped, because the run writes them again. A
file that cannot be written (a full or a read-only disk) raises an OSError whose message names the file.
"""

from collections.abc import Iterable, Iterator, Mapping
import contextlib
import fcntl
import json
import math
import os
from pathlib import Path
from typing import Any, IO, SupportsFloat


class MetricsError(ValueError):
    """A `.jsonl` file of a run is damaged; the message names the file and the line."""


@contextlib.contextmanager
def writing(path: str | os.PathLike) -> Iterator[None]:
    """Turns an OSError of the body into one whose message names `path`."""
    try:
        yield
    except OSError as e:
        raise OSError(
            f"{path} cannot be written: {e.strerror or e}. Once it can, give the same command again; a run resumes from its newest checkpoint."
        ) from e


def write_text(path: str | os.PathLike, text: str) -> None:
    """Writes a file that is complete or absent; half of a surrogate pair becomes its escape."""
    replace(path, text.encode("utf-8", "backslashreplace"))


def replace(path: str | os.PathLike, content: bytes) -> None:
    """Writes a file that is complete or absent: `content` is written to the file .NAME.tmp, which is then renamed.

    Processes that write the same file wait for each other. The next write takes the place of the remains of a kill.
    """
    scratch = Path(path).with_name(f".{Path(path).name}.tmp")
    with writing(path), _open_alone(scratch) as file:
        try:
            if os.fstat(file.fileno()).st_size:
                file.truncate(0)  # of a killed process
            file.write(content)
            file.flush()
            os.replace(scratch, path)
        except BaseException:
            scratch.unlink(missing_ok=True)
            raise


def _open_alone(path: Path) -> IO[bytes]:
    """Opens a file for appending, which no other caller has open until it is closed."""
    while True:
        file = open(path, "ab")
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(file, fcntl.LOCK_EX)
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
                return file
        file.close()  # another caller has renamed it in the meantime


def write_json(path: str | os.PathLike, content: Mapping[str, Any]) -> None:
    """Writes an indented JSON file that is complete or absent."""
    write_text(path, json.dumps(content, indent=2) + "\n")


def finite(x: SupportsFloat) -> float | None:
    """Returns x as a number for JSON, which has neither NaN nor infinity: None for both."""
    number = float(x)
    return number if math.isfinite(number) else None


class AppendOnly:
    """A file open for appending. After `append` returns, a kill of the process loses nothing of the content."""

    def __init__(self, path: Path):
        self._path = path
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(path, "ab", buffering=0)  # unbuffered: one write() is one system call

    def append(self, content: bytes) -> None:
        """Writes `content` at the end."""
        with writing(self._path):
            while content:  # a nearly full disk takes a part without an error; the next write raises it
                content = content[self._file.write(content) :]

    def close(self) -> None:
        self._file.close()


class JsonLines(AppendOnly):
    """A `.jsonl` file open for appending; its directory is made if needed.

    Lines of steps after `resume_step` are dropped; None keeps every complete line. Raises MetricsError for damage
    before the last line of the existing file.
    """

    def __init__(self, path: Path, resume_step: int | None):
        if path.exists():
            kept = (r for r in read_json_lines(path) if resume_step is None or r["step"] <= resume_step)
            with writing(path):
                content = b"".join(map(json_line, kept))  # before anything is written: a damaged file stays as it is
            replace(path, content)
        super().__init__(path)

    def write(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Writes one line per record, all in one write."""
        self.append(b"".join(map(json_line, records)))


def read_json_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Yields the records of a `.jsonl` file in order, without a torn last line.

    Raises FileNotFoundError, and MetricsError for a line before the last that is not a JSON object with a step.
    """
    with open(path, "rb") as lines:  # bytes: text mode also breaks lines at characters that completions may hold
        torn = None
        for number, line in enumerate(lines, start=1):
            if torn is not None:
                raise MetricsError(
                    f"Line {torn} of {path} is not a JSON object with a step; repair or remove the line, or move the file away."
                )
            try:
                record = json.loads(line, parse_constant=lambda _: None)  # NaN of a repaired line: unknown
                valid = isinstance(record["step"], int)
            except (ValueError, TypeError, KeyError):  # ValueError: also bytes that are not UTF-8
                valid = False
            if valid:
                yield record
            else:
                torn = number  # an error only if another line follows


def json_line(record: Mapping[str, Any]) -> bytes:
    """Returns a record as a line of a `.jsonl` file."""
    # backslashreplace: a lone surrogate of a byte-level tokenizer becomes its JSON escape instead of an error.
    return json.dumps(record, ensure_ascii=False, allow_nan=False).encode("utf-8", "backslashreplace") + b"\n"

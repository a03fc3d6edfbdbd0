"""The completions of an evaluation in progress: batches are appended to a file, and a second evaluation continues after them."""

from collections.abc import Callable, Iterable, Mapping, Sequence
import json
import os
import pathlib
from typing import Any, IO

from jaxrl_reason.config import ConfigError
from jaxrl_reason.data import PromptBatch
from jaxrl_reason.rl import hosts
from jaxrl_reason.runs import locks
from jaxrl_reason.runs.files import AppendOnly, json_line, writing

FILE = "completions.jsonl"
Lines = list[dict[str, Any]]


class Journal:
    """completions.jsonl, one line per completion, in the order of prompts and samples.

    `batches` holds the lines of the first batches that are there in full, and `done` their number, on all processes. A batch
    of which lines are missing is judged again, so that a batch is always computed as a whole. Only the first process
    reads and writes.

    Args:
      directory: of the results.
      resume: whether the file belongs to this evaluation; otherwise the first `append` replaces it.
      held_out, samples: the batches of prompts, and the completions per prompt.
      begin: called before the first line is written.

    Raises ConfigError for a line that is damaged, unless it is the last one.
    """

    def __init__(
        self,
        directory: pathlib.Path,
        resume: bool,
        held_out: Sequence[PromptBatch],
        samples: int,
        begin: Callable[[], None],
    ):
        self._path, self._begin = directory / FILE, begin
        self._file: AppendOnly | None = None
        self._lock: IO[bytes] | None = None
        self.batches: list[Lines] = []
        self._size = self._kept = 0  # bytes of the file, and of the batches at its begin
        if hosts.is_first() and self._path.exists():
            content = self._path.read_bytes()
            self._size = len(content)
            if resume:
                self._find(held_out, samples, parsed_lines(self._path, content), content.split(b"\n"))
        (self.done,) = hosts.from_first([len(self.batches)])

    def _find(self, held_out: Sequence[PromptBatch], samples: int, lines: Lines, texts: Sequence[bytes]) -> None:
        at = 0
        for batch in held_out:
            expected = [(int(i), k) for i in batch.prompt_ids[batch.weight > 0] for k in range(samples)]
            found = lines[at : at + len(expected)]
            if [(line.get("row"), line.get("sample")) for line in found] != expected:
                break
            self.batches.append(found)
            at += len(expected)
        self._kept = sum(len(text) + 1 for text in texts[:at])

    def append(self, lines: Iterable[Mapping[str, Any]]) -> None:
        """Writes the lines of the next batch, in one write. Raises ConfigError if another process writes the file too."""
        if not hosts.is_first():
            return
        if self._file is None:
            self._lock = locks.take(self._path, needed=False)
            if self._lock is None or os.fstat(self._lock.fileno()).st_size != self._size:
                raise ConfigError(
                    f"Another process writes {self._path}: wait for its end, or name another directory by --out."
                )
            with writing(self._path):
                os.truncate(self._path, self._kept)  # before evaluation.json says whose lines these are
            self._begin()
            self._file = AppendOnly(self._path)
        self._file.append(b"".join(map(json_line, lines)))

    def close(self) -> None:
        """Ends the file, and lets other processes write it."""
        for file in (self._file, self._lock):
            if file is not None:
                file.close()


def whole_lines(path: pathlib.Path) -> Lines:
    """Returns the lines of the file, without a torn last line. Lines of an earlier version get the present names.

    Raises ConfigError for a damaged line.
    """
    return parsed_lines(path, path.read_bytes())


def parsed_lines(path: pathlib.Path, content: bytes) -> Lines:
    """Returns the lines of the content of a file, as `whole_lines`."""
    lines: Lines = []
    for number, line in enumerate(content.split(b"\n")[:-1], start=1):
        try:
            found = json.loads(line)
            if not isinstance(found, dict):
                raise ValueError("it is no JSON object")
        except (ValueError, RecursionError) as e:
            raise ConfigError(
                f"Line {number} of {path} is damaged ({e}); remove this line and all later ones, and the evaluation continues there."
            ) from e
        if "right" in found:  # of an earlier version
            found["correct"] = found.pop("right")
        lines.append(found)
    return lines

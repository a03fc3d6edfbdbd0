"""The completions of an evaluation in progress: batches are appended to a file, and a second evaluation continues after them."""

from collections.abc import Callable, Iterable, Mapping, Sequence
import json
import os
import pathlib
from typing import Any

from jaxrl_reason.config import ConfigError
from jaxrl_reason.data import PromptBatch
from jaxrl_reason.rl import hosts
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
        self.batches: list[Lines] = []
        if hosts.is_first() and resume and self._path.exists():
            lines, at = whole_lines(self._path), 0
            for batch in held_out:
                expected = [(int(i), k) for i in batch.prompt_ids[batch.weight > 0] for k in range(samples)]
                found = lines[at : at + len(expected)]
                if [(line.get("row"), line.get("sample")) for line in found] != expected:
                    break
                self.batches.append(found)
                at += len(expected)
        (self.done,) = hosts.from_first([len(self.batches)])

    def append(self, lines: Iterable[Mapping[str, Any]]) -> None:
        """Writes the lines of the next batch, in one write."""
        if not hosts.is_first():
            return
        if self._file is None:
            self._begin()
            kept = b"".join(json_line(line) for batch in self.batches for line in batch)
            scratch = self._path.with_suffix(".tmp")
            with writing(self._path):
                scratch.write_bytes(kept)
                os.replace(scratch, self._path)
            self._file = AppendOnly(self._path)
        self._file.append(b"".join(map(json_line, lines)))

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


def whole_lines(path: pathlib.Path) -> Lines:
    """Returns the lines of the file, without a torn last line."""
    lines: Lines = []
    content = path.read_bytes().split(b"\n")
    for number, line in enumerate(content[:-1], start=1):
        try:
            found = json.loads(line)
            if not isinstance(found, dict):
                raise ValueError("it is no JSON object")
        except ValueError as e:
            raise ConfigError(
                f"Line {number} of {path} is damaged ({e}); remove this line and all later ones, and the evaluation continues there."
            ) from e
        lines.append(found)
    return lines

"""The metrics and samples of a run: metrics.jsonl, samples.jsonl and TensorBoard events."""

from collections.abc import Mapping, Sequence
import os
from pathlib import Path
import socket
import struct
import time
from typing import Any, Protocol, Self

import numpy as np
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary
from tensorboardX.record_writer import masked_crc32c

from jaxrl_reason.runs import files


class _Closable(Protocol):
    def close(self) -> None: ...


class _Writer:
    """A context manager that closes its files."""

    def __init__(self, *opened: _Closable | None):
        self._opened = [file for file in opened if file is not None]

    def close(self) -> None:
        for file in self._opened:
            file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class MetricsWriter(_Writer):
    """Appends the metrics of a step to `metrics.jsonl` and, as scalars, to TensorBoard events under `tensorboard/`.

    A context manager. When `write` returns, the system has the content of both files: a kill loses nothing of it.

    Args:
      workdir: the directory of the files; made if needed.
      tensorboard: whether to write events.
      resume_step: the last step to keep (-1: none, for a run that starts over); None keeps every complete line.
      enabled: False writes nothing, for all processes of a run but the first.

    Raises:
      MetricsError, OSError: the existing file is damaged before its last line, or a file cannot be written.
    """

    def __init__(
        self,
        workdir: str | os.PathLike,
        tensorboard: bool = True,
        resume_step: int | None = None,
        *,
        enabled: bool = True,
    ):
        self._lines = files.JsonLines(Path(workdir) / "metrics.jsonl", resume_step) if enabled else None
        self._events = None
        if tensorboard and enabled:
            # purge_step makes TensorBoard forget the events of an interrupted run from that step on.
            purge_step = None if resume_step is None else resume_step + 1
            self._events = _Events(Path(workdir) / "tensorboard", purge_step)
        super().__init__(self._lines, self._events)

    def write(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Writes one line, {"step": step, **metrics}; a value that is not finite becomes null, and no event.

        Raises ValueError if a value is not a scalar number or a metric is named "step", and OSError if a file cannot be written.
        """
        if "step" in metrics:
            raise ValueError('A metric is named "step", which every line already has; rename it.')
        numbers = {name: _number(name, value) for name, value in metrics.items()}
        if self._lines is not None:
            self._lines.append([{"step": int(step), **numbers}])
        if self._events is not None:
            self._events.append(int(step), numbers)


class SampleTable(_Writer):
    """Appends sampled completions and their rewards to `samples.jsonl`, one line per completion.

    A line is {"step", "prompt", "completion", "rewards": {name: number}, "total", "advantage", "length", "truncated"}; a missing
    reward is null. A context manager. Arguments and errors of the constructor: see `MetricsWriter`.
    """

    def __init__(self, workdir: str | os.PathLike, resume_step: int | None = None, *, enabled: bool = True):
        self._lines = files.JsonLines(Path(workdir) / "samples.jsonl", resume_step) if enabled else None
        super().__init__(self._lines)

    def write(
        self,
        step: int,
        prompts: Sequence[str],
        completions: Sequence[Sequence[str]],
        *,
        rewards: Mapping[str, np.ndarray],
        total: np.ndarray,
        advantages: np.ndarray,
        lengths: np.ndarray,
        truncated: np.ndarray,
    ) -> None:
        """Writes P prompts with G completions each; pass fewer prompts to keep the file small.

        Args:
          step, prompts, completions: the training step, P texts, and P lists of G texts.
          rewards: name -> float[P,G].
          total, advantages: float[P,G].
          lengths, truncated: int[P,G], in tokens, with the end token; bool[P,G].

        Raises:
          ValueError, OSError: an array is not [P,G], or the file cannot be written.
        """
        shape = (len(prompts), len(completions[0]) if completions else 0)
        arrays = {"total": total, "advantages": advantages, "lengths": lengths, "truncated": truncated, **rewards}
        for name, array in arrays.items():
            if np.shape(array) != shape:
                raise ValueError(
                    f"{name} has shape {np.shape(array)}; for {shape[0]} prompts x {shape[1]} completions it must be {shape}."
                )
        records = [
            {
                "step": int(step),
                "prompt": prompts[p],
                "completion": completions[p][g],
                "rewards": {name: files.finite(values[p][g]) for name, values in rewards.items()},
                "total": files.finite(total[p][g]),
                "advantage": files.finite(advantages[p][g]),
                "length": int(lengths[p][g]),
                "truncated": bool(truncated[p][g]),
            }
            for p, g in np.ndindex(*shape)
        ]
        if self._lines is not None:
            self._lines.append(records)


def read_metrics(path: str | os.PathLike) -> list[dict[str, Any]]:
    """Returns the records of a `.jsonl` file of a run in order, without a torn last line.

    Raises FileNotFoundError if there is no such file, and MetricsError if a line before the last is not a JSON object with a step.
    """
    return list(files.read_json_lines(Path(path)))


class _Events:
    """A file of scalars for TensorBoard, written without tensorboardX's own writer.

    That writer works in a thread: a kill loses its pending events, and if it fails on a full disk, the run waits for it forever.
    """

    def __init__(self, directory: Path, purge_step: int | None):
        # TensorBoard reads the files of a directory in the order of their names.
        name = f"events.out.tfevents.{int(time.time()):010d}.{socket.gethostname()}.{os.getpid()}"
        self._file = files.AppendOnly(directory / name)
        self._append(Event(file_version="brain.Event:2"))
        if purge_step is not None:
            self._append(Event(step=purge_step, session_log=SessionLog(status=SessionLog.START)))

    def append(self, step: int, numbers: Mapping[str, float | None]) -> None:
        values = [Summary.Value(tag=name, simple_value=x) for name, x in numbers.items() if x is not None]
        self._append(Event(step=step, summary=Summary(value=values)))

    def _append(self, event: Event) -> None:
        """Appends a record in TensorFlow's format: length, its checksum, content, its checksum."""
        event.wall_time = time.time()
        content = event.SerializeToString()
        length = struct.pack("<Q", len(content))
        length_crc, content_crc = (struct.pack("<I", masked_crc32c(part)) for part in (length, content))
        self._file.append(length + length_crc + content + content_crc)

    def close(self) -> None:
        self._file.close()


def _number(name: str, value: Any) -> float | None:
    if isinstance(value, (bool, int)):
        return value
    if np.ndim(value) == 0 and not isinstance(value, (str, bytes)):
        try:
            return files.finite(value)
        except (TypeError, ValueError):
            pass
    raise ValueError(f"Metric {name!r} is {value!r:.80}; a metric is one number.")

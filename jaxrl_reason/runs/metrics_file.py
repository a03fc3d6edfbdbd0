"""The metrics and samples of a run: metrics.jsonl, samples.jsonl and TensorBoard events."""

from collections.abc import Iterable, Mapping, Sequence
import contextlib
import itertools
import math
import os
from pathlib import Path
import socket
import struct
import time
from typing import Any

import numpy as np
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary
from tensorboardX.record_writer import masked_crc32c

from jaxrl_reason.runs import files

PathLike = str | os.PathLike
HELD_OUT_ACCURACY = "held_out_accuracy.jsonl"


class MetricsWriter(contextlib.ExitStack):
    """Appends the metrics of a step to `metrics.jsonl` and, as scalars, to TensorBoard events under `tensorboard/`.

    A context manager. When `write` returns, the system has the content of both files: a kill loses nothing of it.
    Raises MetricsError for damage before the last line of the existing file, and OSError when a file cannot be written.

    Args:
      workdir: the directory of the files; made if needed.
      resume_step: the last step to keep (-1: none, for a run that starts over); None keeps every complete line.
      enabled: False writes nothing, for all processes of a run but the first.
    """

    def __init__(
        self, workdir: PathLike, tensorboard: bool = True, resume_step: int | None = None, *, enabled: bool = True
    ):
        super().__init__()
        self._lines = self.enter_context(_lines(workdir, "metrics.jsonl", resume_step)) if enabled else None
        self._events = None
        if tensorboard and enabled:
            # purge_step makes TensorBoard forget the events of an interrupted run from that step on.
            purge_step = None if resume_step is None else resume_step + 1
            self._events = self.enter_context(contextlib.closing(_Events(Path(workdir) / "tensorboard", purge_step)))

    def write(self, step: int, metrics: Mapping[str, Any]) -> dict[str, float | None]:
        """Writes one line, {"step": step, **metrics}; a value that is not finite becomes null, and no event.

        Returns the metrics as they are written. Raises ValueError if a value is not a scalar number or a metric is named "step", and OSError on a full disk.
        """
        if "step" in metrics:
            raise ValueError('A metric is named "step", which every line already has; rename it.')
        numbers = {name: _number(name, value) for name, value in metrics.items()}
        if self._lines is not None:
            self._lines.write([{"step": int(step), **numbers}])
        if self._events is not None:
            self._events.write(int(step), numbers)
        return numbers


class SampleTable(contextlib.ExitStack):
    """Appends sampled completions and their rewards to `samples.jsonl`, one line per completion.

    A line is {"step", "prompt", "completion", "rewards": {name: number}, "total", "advantage", "length", "truncated",
    "correct", "tokens": [text], "logprobs": [number]}; a missing reward is null. The last three are absent if they are
    not given. A context manager. Arguments and errors of the constructor: see `MetricsWriter`.
    """

    def __init__(self, workdir: PathLike, resume_step: int | None = None, *, enabled: bool = True):
        super().__init__()
        self._lines = self.enter_context(_lines(workdir, "samples.jsonl", resume_step)) if enabled else None

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
        correct: np.ndarray | None = None,
        tokens: Sequence[Sequence[Sequence[str]]] | None = None,
        logprobs: Sequence[Sequence[Sequence[float]]] | None = None,
    ) -> None:
        """Writes P prompts with G completions each; pass fewer prompts to keep the file small.

        Rewards by name, `total` and `advantages` are float[P,G]; `lengths` are int[P,G] in tokens, with the end token,
        and `truncated` and `correct` bool[P,G]. `tokens` has the text of each token, as in `Tokenizer.pieces`, and
        `logprobs` its log-probability in nats, which is rounded. Raises ValueError for an array that is not [P,G], and
        OSError when the file cannot be written.
        """
        shape = (len(prompts), len(completions[0]) if completions else 0)
        arrays = {"total": total, "advantages": advantages, "lengths": lengths, "truncated": truncated, **rewards}
        arrays |= {} if correct is None else {"correct": correct}
        for name, array in arrays.items():
            if np.shape(array) != shape:
                size = f"{shape[0]} prompts x {shape[1]} completions"
                raise ValueError(f"{name} has shape {np.shape(array)}; for {size} it must be {shape}.")
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
            | ({} if correct is None else {"correct": bool(correct[p][g])})
            | ({} if tokens is None else {"tokens": list(tokens[p][g])})
            | ({} if logprobs is None else {"logprobs": [files.finite(round(float(x), 3)) for x in logprobs[p][g]]})
            for p, g in np.ndindex(*shape)
        ]
        if self._lines is not None:
            self._lines.write(records)


class HeldOutTable(contextlib.ExitStack):
    """Appends samples of held-out prompts to `held_out.jsonl`: the first `count` lines of each evaluation, with its step.

    `held_out_accuracy.jsonl` has a line per evaluation: its step, and the accuracy of each prompt. The prompts are the
    same in each evaluation. A context manager. Arguments and errors: see `MetricsWriter`.
    """

    def __init__(self, workdir: PathLike, count: int, resume_step: int | None = None, *, enabled: bool = True):
        super().__init__()
        self._count = count
        open_one = lambda name: self.enter_context(_lines(workdir, name, resume_step)) if enabled else None
        self._lines, self._accuracy = open_one("held_out.jsonl"), open_one(HELD_OUT_ACCURACY)

    def write(
        self, step: int, lines: Iterable[Mapping[str, Any]], accuracies: Sequence[float] | np.ndarray = ()
    ) -> None:
        """Writes the first lines of an evaluation, and the accuracy of each prompt, if there are accuracies."""
        if self._lines is not None and self._accuracy is not None:
            self._lines.write([{"step": int(step), **line} for line in itertools.islice(lines, self._count)])
            if len(accuracies):
                self._accuracy.write([{"step": int(step), "accuracy": [round(float(x), 6) for x in accuracies]}])


def _lines(workdir: PathLike, name: str, resume_step: int | None) -> contextlib.closing[files.JsonLines]:
    return contextlib.closing(files.JsonLines(Path(workdir) / name, resume_step))


def drop_later(workdir: PathLike, step: int) -> None:
    """Drops what a run has written of steps after `step`, whose weights a kill has lost. TensorBoard events stay.

    Raises MetricsError for damage before the last line of a file, and OSError when a file cannot be written.
    """
    for name in ("metrics.jsonl", "samples.jsonl", "held_out.jsonl", HELD_OUT_ACCURACY):
        path = Path(workdir) / name
        if path.exists() and any(record["step"] > step for record in files.read_json_lines(path)):
            files.JsonLines(path, step).close()


def read_metrics(path: PathLike) -> list[dict[str, Any]]:
    """Returns the records of a `.jsonl` file of a run in order; see `files.read_json_lines` for its errors."""
    return list(files.read_json_lines(Path(path)))


# With dynamic sampling, means over everything that was sampled; the metrics themselves are over the groups that are kept.
_OVER_ALL = {"reward": "dynamic_sampling/reward", "completions/mean_length": "dynamic_sampling/mean_length"}


def mean_over_all(metrics: Mapping[str, Any], name: str) -> float | None:
    """Returns a metric of a step over all its completions, kept by dynamic sampling or not; None if it is unknown."""
    value = metrics.get(_OVER_ALL.get(name, name), metrics.get(name))
    return None if value is None or math.isnan(value) else value


class _Events(files.AppendOnly):
    """A file of scalars for TensorBoard, written without tensorboardX's own writer, which works in a thread."""

    # A kill loses the pending events of such a thread, and a run waits forever for one that fails on a full disk.

    def __init__(self, directory: Path, purge_step: int | None):
        # TensorBoard reads the files of a directory in the order of their names.
        name = f"events.out.tfevents.{int(time.time()):010d}.{socket.gethostname()}.{os.getpid()}"
        super().__init__(directory / name)
        self._append(Event(file_version="brain.Event:2"))
        if purge_step is not None:
            self._append(Event(step=purge_step, session_log=SessionLog(status=SessionLog.START)))

    def write(self, step: int, numbers: Mapping[str, float | None]) -> None:
        values = [Summary.Value(tag=name, simple_value=x) for name, x in numbers.items() if x is not None]
        self._append(Event(step=step, summary=Summary(value=values)))

    def _append(self, event: Event) -> None:
        """Appends a record in TensorFlow's format: length, its checksum, content, its checksum."""
        event.wall_time = time.time()
        content = event.SerializeToString()
        length = struct.pack("<Q", len(content))
        length_crc, content_crc = (struct.pack("<I", masked_crc32c(part)) for part in (length, content))
        self.append(length + length_crc + content + content_crc)


def _number(name: str, value: Any) -> float | None:
    if isinstance(value, (bool, int)):
        return value
    if np.ndim(value) == 0 and not isinstance(value, (str, bytes)):
        try:
            return files.finite(value)
        except (TypeError, ValueError):
            pass
    raise ValueError(f"Metric {name!r} is {value!r:.80}; a metric is one number.")

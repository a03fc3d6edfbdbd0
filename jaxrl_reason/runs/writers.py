"""What a run leaves in its work directory for people: metrics.jsonl, TensorBoard events, samples.jsonl, the learning curve.

The `.jsonl` files hold one JSON object a line, each with its `step`. A line is handed to the system in one write, so a killed run
leaves at most its last line torn; opening the file again removes that line. A run that goes on from a checkpoint of step k passes
`resume_step=k`, and the lines of later steps, which it is about to write again, are dropped.

Whatever cannot be written (a full or a read-only disk) is an OSError whose message is a sentence that names the file.
"""

from collections.abc import Iterator, Mapping, Sequence
import contextlib
import io
import json
import math
import os
from pathlib import Path
import socket
import struct
import time

from matplotlib.figure import Figure
import numpy as np
import rich.table
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary
from tensorboardX.record_writer import masked_crc32c


class MetricsError(ValueError):
    """A `.jsonl` file of a run that is damaged; the message is a sentence that names file and line."""


class MetricsWriter:
    """Appends the metrics of a step to `metrics.jsonl` and, as scalars, to the TensorBoard events under `tensorboard/`.

    A context manager. Both are with the system when `write` returns: a kill costs nothing of them.

    Args:
      workdir: made where it does not exist.
      tensorboard: whether to write events.
      resume_step: the last step to keep (-1: none, a run that starts over); None keeps every complete line.
      enabled: False writes nothing: for all processes of a run but the first.

    Raises:
      MetricsError: the existing file is damaged elsewhere than in its last line.
      OSError: a file cannot be written.
    """

    def __init__(
        self,
        workdir: str | os.PathLike,
        tensorboard: bool = True,
        resume_step: int | None = None,
        *,
        enabled: bool = True,
    ):
        self._lines = _Lines(Path(workdir) / "metrics.jsonl", resume_step) if enabled else None
        self._events = None
        if tensorboard and enabled:
            # purge_step tells TensorBoard to forget what an interrupted run wrote at or after that step.
            purge_step = None if resume_step is None else resume_step + 1
            self._events = _Events(Path(workdir) / "tensorboard", purge_step)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """One line: {"step": step, **metrics}. Values that are not finite become null, and no event.

        Raises:
          ValueError: a value is not a scalar number, or a metric is named "step".
          OSError: a file cannot be written.
        """
        if "step" in metrics:
            raise ValueError('A metric is named "step", which every line already has; rename it.')
        numbers = {name: _number(name, value) for name, value in metrics.items()}
        if self._lines is not None:
            self._lines.append([{"step": int(step), **numbers}])
        if self._events is not None:
            self._events.append(int(step), numbers)

    def close(self) -> None:
        if self._lines is not None:
            self._lines.close()
        if self._events is not None:
            self._events.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


class SampleTable:
    """Appends sampled completions, with what they earned, to `samples.jsonl`: one line a completion.

    A line is {"step", "prompt", "completion", "rewards": {name: number}, "total", "advantage", "length", "truncated"}; a missing
    reward is null. A context manager. Arguments and errors of the constructor as in `MetricsWriter`.
    """

    def __init__(self, workdir: str | os.PathLike, resume_step: int | None = None, *, enabled: bool = True):
        self._lines = _Lines(Path(workdir) / "samples.jsonl", resume_step) if enabled else None

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
        """Writes P prompts x G completions; pass fewer prompts to keep the file small.

        Args:
          step: the training step.
          prompts: P texts.
          completions: P lists of G texts.
          rewards: name -> float[P,G].
          total: float[P,G].
          advantages: float[P,G].
          lengths: int[P,G], in tokens, end token included.
          truncated: bool[P,G].

        Raises:
          ValueError: an array is not [P,G].
          OSError: the file cannot be written.
        """
        shape = (len(prompts), len(completions[0]) if completions else 0)
        arrays = {"total": total, "advantages": advantages, "lengths": lengths, "truncated": truncated, **rewards}
        for name, array in arrays.items():
            if np.shape(array) != shape:
                raise ValueError(
                    f"{name} has shape {np.shape(array)}; for {shape[0]} prompts x {shape[1]} completions it must be {shape}."
                )
        records = []
        for p, g in np.ndindex(*shape):
            records.append(
                {
                    "step": int(step),
                    "prompt": prompts[p],
                    "completion": completions[p][g],
                    "rewards": {name: _number(name, values[p][g]) for name, values in rewards.items()},
                    "total": _number("total", total[p][g]),
                    "advantage": _number("advantages", advantages[p][g]),
                    "length": int(lengths[p][g]),
                    "truncated": bool(truncated[p][g]),
                }
            )
        if self._lines is not None:
            self._lines.append(records)

    def close(self) -> None:
        if self._lines is not None:
            self._lines.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


def read_metrics(path: str | os.PathLike) -> list[dict]:
    """The lines of a `.jsonl` file of this module, in order; a torn last line is left out.

    Raises:
      FileNotFoundError: there is no such file.
      MetricsError: another line is not a JSON object with a step.
    """
    return list(_records(Path(path)))


def plot_learning_curve(metrics_path: str | os.PathLike, out_png: str | os.PathLike, *, title: str) -> None:
    """Draws a run: the reward of every step, its running mean and the held-out accuracy (or R2); below, the mean completion length.

    Reads the metrics `reward`, `eval/accuracy` or `eval/r2`, and `completions/mean_length`; a curve without data is left out.

    Args:
      metrics_path: a `metrics.jsonl`.
      out_png: where the picture goes.
      title: stands above it.

    Raises:
      FileNotFoundError, MetricsError: as `read_metrics`.
      OSError: the picture cannot be written.
    """
    records = read_metrics(metrics_path)
    figure = Figure(figsize=(8, 6), layout="constrained")  # not pyplot: no global state, no display
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=[2, 1])
    steps, rewards = _series(records, "reward")
    if steps:
        top.plot(steps, rewards, linewidth=0.7, alpha=0.4, color="tab:blue", label="reward")
        window = max(1, len(rewards) // 20)
        top.plot(
            steps, _running_mean(rewards, window), color="tab:blue", label=f"reward, mean of the last {window} steps"
        )
    for name, label in (("eval/accuracy", "held-out accuracy"), ("eval/r2", "held-out R2")):
        steps, figures = _series(records, name)
        if steps:
            top.plot(steps, figures, "o-", color="tab:orange", label=label)
    if top.lines:
        top.legend(loc="best")
    top.set_ylabel("reward, held-out figure")
    top.set_title(title)
    steps, lengths = _series(records, "completions/mean_length")
    if steps:
        bottom.plot(steps, lengths, color="tab:green")
    bottom.set_ylabel("mean length (tokens)")
    bottom.set_xlabel("step")
    for axis in (top, bottom):
        axis.grid(alpha=0.3)
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=120, format="png")
    with writing(out_png):
        Path(out_png).write_bytes(drawn.getvalue())


def summary_table(before: Mapping[str, float], after: Mapping[str, float]) -> rich.table.Table:
    """The table that ends a run: one row a metric, before, after and the change.

    Args:
      before: metric name -> value, for instance {"eval/accuracy": .41, "eval/pass@4": .6, "eval/mean_length": 37.2}. Accuracy and
        pass@k are shares and shown in percent. NaN, and a metric that only one side has, is shown as a dash.
      after: the same, later. Rows come in the order of `before`, then what only `after` has.

    Where one of the two is empty, the table has the other's column alone.
    """
    table = rich.table.Table()
    table.add_column("")
    columns = {"before": bool(before), "after": bool(after), "change": bool(before and after)}
    for heading, shown in columns.items():
        if shown:
            table.add_column(heading, justify="right")
    for name in dict.fromkeys([*before, *after]):
        old, new = (math.nan if side.get(name) is None else side[name] for side in (before, after))
        change = cell(name, new - old, signed=True).replace("%", "points")
        cells = [c for c, shown in zip((cell(name, old), cell(name, new), change), columns.values()) if shown]
        table.add_row(name.rpartition("/")[2].replace("_", " "), *cells)
    return table


_FINE = (
    "entropy",
    "r2",
    "rmse",
    "spearman",
    "spread",
    "density",
    "f1",
    "error",
    "loss",
    "margin",
)  # shown with three places


def cell(name: str, value: float, *, signed: bool = False) -> str:
    """A figure for a table: accuracies and the like in percent, small numbers with three places; a dash for NaN."""
    if value is None or math.isnan(value):
        return "-"
    short = name.rpartition("/")[2]
    sign = "+" if signed else ""
    if short.endswith("accuracy") or short.startswith(("pass@", "maj@", "avg@")) or short.endswith("vote"):
        return f"{100 * value:{sign}.1f} %"
    return f"{value:{sign}.3f}" if short.endswith(_FINE) else f"{value:{sign}.1f}"


def write_json(path: str | os.PathLike, content: Mapping) -> None:
    """Writes a JSON file that is complete or absent.

    Raises:
      OSError: it cannot be written.
    """
    scratch = Path(path).with_suffix(".tmp")
    with writing(path):
        scratch.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        os.replace(scratch, path)


@contextlib.contextmanager
def writing(path: str | os.PathLike):
    """Around what writes `path`: an OSError becomes one with a sentence that names it, which that of a full disk does not.

    Raises:
      OSError: it cannot be written.
    """
    try:
        yield
    except OSError as e:
        raise OSError(
            f"{path} cannot be written: {e.strerror or e}. Once it can, the same command goes on from the newest checkpoint."
        ) from e


class _Appended:
    """A file open for appending; every `append` is one write, and with the system when it returns."""

    def __init__(self, path: Path):
        self._path = path
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(path, "ab", buffering=0)  # unbuffered: one write() is one system call

    def append(self, content: bytes) -> None:
        with writing(self._path):
            while content:  # a disk with room for a part takes that part without an error, which comes with the rest
                content = content[self._file.write(content) :]

    def close(self) -> None:
        self._file.close()


class _Events:
    """Scalars for TensorBoard, a file of them; without tensorboardX's own writer, which writes in a thread.

    What that thread has not written yet a kill would lose; and where it fails, on a full disk, the run would wait for it for ever.
    """

    def __init__(self, directory: Path, purge_step: int | None):
        # TensorBoard reads the files of a directory in the order of their names.
        name = f"events.out.tfevents.{int(time.time()):010d}.{socket.gethostname()}.{os.getpid()}"
        self._file = _Appended(directory / name)
        self._append(Event(file_version="brain.Event:2"))
        if purge_step is not None:
            self._append(Event(step=purge_step, session_log=SessionLog(status=SessionLog.START)))

    def append(self, step: int, numbers: Mapping[str, float | None]) -> None:
        known = {name: value for name, value in numbers.items() if value is not None}
        values = [Summary.Value(tag=name, simple_value=value) for name, value in known.items()]
        self._append(Event(step=step, summary=Summary(value=values)))

    def _append(self, event: Event) -> None:
        event.wall_time = time.time()
        content = event.SerializeToString()
        length = struct.pack("<Q", len(content))
        crc = [struct.pack("<I", masked_crc32c(part)) for part in (length, content)]
        self._file.append(length + crc[0] + content + crc[1])  # a record as TensorFlow has it

    def close(self) -> None:
        self._file.close()


class _Lines:
    """A `.jsonl` file open for appending, cut to what a resumed run keeps."""

    def __init__(self, path: Path, resume_step: int | None):
        if path.exists():
            self._cut(path, resume_step)
        self._file = _Appended(path)

    @staticmethod
    def _cut(path: Path, resume_step: int | None) -> None:
        """Rewrites the file beside itself and moves it into place, so that being killed here loses nothing."""
        kept = (r for r in _records(path) if resume_step is None or r["step"] <= resume_step)
        scratch = path.with_name(path.name + ".tmp")
        with writing(path):
            scratch.write_bytes(b"".join(map(_line, kept)))  # joined first: what cannot be read leaves nothing behind
            os.replace(scratch, path)

    def append(self, records: Sequence[Mapping]) -> None:
        self._file.append(b"".join(map(_line, records)))

    def close(self) -> None:
        self._file.close()


def _line(record: Mapping) -> bytes:
    # backslashreplace: a lone surrogate from a byte-level tokenizer becomes its JSON escape instead of an error.
    return json.dumps(record, ensure_ascii=False, allow_nan=False).encode("utf-8", "backslashreplace") + b"\n"


def _records(path: Path) -> Iterator[dict]:
    with open(path, "rb") as lines:  # bytes: text mode would also break lines at characters that completions may hold
        torn = None
        for number, line in enumerate(lines, start=1):
            if torn is not None:
                raise MetricsError(
                    f"Line {torn} of {path} is not a JSON object with a step; mend or remove that line, or move the file away."
                )
            try:
                record = json.loads(line)
                valid = isinstance(record["step"], int)
            except (ValueError, TypeError, KeyError):  # ValueError: also bytes that are not UTF-8
                valid = False
            if valid:
                yield record
            else:
                torn = number  # forgiven if no line follows


def _number(name: str, value) -> float | int | bool | None:
    if isinstance(value, (bool, int)):
        return value
    if np.ndim(value) != 0 or isinstance(value, (str, bytes)):
        raise ValueError(f"Metric {name!r} is {value!r:.80}; a metric is one number.")
    try:
        value = float(value)
    except (TypeError, ValueError):
        raise ValueError(f"Metric {name!r} is {value!r:.80}; a metric is one number.") from None
    return value if math.isfinite(value) else None


def _series(records: Sequence[Mapping], name: str) -> tuple[list[int], list[float]]:
    points = [(record["step"], record[name]) for record in records if record.get(name) is not None]
    return [step for step, _ in points], [value for _, value in points]


def _running_mean(values: Sequence[float], window: int) -> np.ndarray:
    """The mean of the last `window` values, of fewer at the start."""
    sums = np.concatenate([[0.0], np.cumsum(values)])
    end = np.arange(1, len(values) + 1)
    begin = np.maximum(end - window, 0)
    return (sums[end] - sums[begin]) / (end - begin)

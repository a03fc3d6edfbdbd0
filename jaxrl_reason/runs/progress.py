"""Progress bar, heartbeat and timings of a run."""

from collections.abc import Callable, Iterator
import contextlib
import statistics
import threading
import time
from typing import NamedTuple, Self

import rich.console
import rich.progress
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn


class Progress:
    """A progress bar with a text and the remaining time; a context manager.

    Without a terminal it prints one line per tenth of the `total` steps, of which `done` are already done. It prints
    nothing unless `enabled`.
    """

    def __init__(self, console: rich.console.Console, name: str, total: int, done: int = 0, *, enabled: bool = True):
        self._console, self._name, self._total, self._done, self._enabled = console, name, total, done, enabled
        self._begin: tuple[int, float] | None = None  # steps done and time, after the first step of this process
        texts = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[text]}"))
        times = (TimeElapsedColumn(), TimeRemainingColumn())
        hidden = not (enabled and console.is_terminal)
        self._bar = rich.progress.Progress(*texts, *times, console=console, disable=hidden)
        self._task = self._bar.add_task(name, total=total, completed=done, text="")

    @property
    def begun(self) -> bool:
        """Whether this process has done a step. The first one also compiles."""
        return self._begin is not None

    def advance(self, text: str) -> None:
        """Counts one step and shows `text` next to the bar."""
        self._done += 1
        self._bar.update(self._task, advance=1, text=text)
        if self._enabled and not self._console.is_terminal and self._done % max(self._total // 10, 1) == 0:
            self._console.print(f"{self._name} {self._done}/{self._total}  {text}{self._left()}", soft_wrap=True)
        if self._begin is None:  # the first step compiles, so its duration predicts nothing
            self._begin = self._done, time.monotonic()

    def _left(self) -> str:
        if self._begin is None or self._done == self._total:
            return ""
        done, since = self._begin
        return f"  about {duration((time.monotonic() - since) / (self._done - done) * (self._total - self._done))} left"

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()


def duration(seconds: float) -> str:
    """Returns a duration as text: "40 s", "5 min", "3 h 20 min"."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"


class _Step(NamedTuple):
    name: str
    begin: float
    limit: float  # seconds
    clock: "Clock"
    compiling: str  # the end of its message, if it also compiles
    usual: bool  # whether its duration says how long the next steps take


class Heartbeat:
    """Prints, from a thread of its own, that a step takes long; a context manager.

    A step takes long after `patience` seconds, if that is also five times the median of the last steps. The message,
    given to `say`, is repeated whenever the duration has doubled. A patience of 0 prints nothing.
    """

    def __init__(self, say: Callable[[str], None], patience: float):
        self._say, self._patience = say, patience
        self._times: list[float] = []  # seconds of the last steps
        self._step: _Step | None = None
        self._compiles = True  # until the first step of the training has begun
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def step(self, name: str, clock: "Clock", *, extra: bool = False) -> None:
        """Begins the next step, which ends the step before it.

        An `extra` step, such as an evaluation or a checkpoint, is not one of the training. Neither its duration nor that of
        the first step, which also compiles, says how long the next steps take.
        """
        now, compiling = time.monotonic(), ""
        if self._step is not None and self._step.usual:
            self._times = [*self._times[-19:], now - self._step.begin]
        if self._compiles:
            compiling = "; it also compiles" if extra else "; the first step also compiles"
        limit = max(self._patience, 5 * statistics.median(self._times) if self._times else 0.0)
        self._step = _Step(name, now, limit, clock, compiling, not extra and not compiling)
        self._compiles = self._compiles and extra

    def _watch(self) -> None:
        watched, due = None, 0.0
        while not self._ended.wait(min(1.0, self._patience / 4)):
            step = self._step
            if step is None:
                continue
            if watched != step.name:
                watched, due = step.name, step.limit
            took = time.monotonic() - step.begin
            if took >= due:
                due = 2 * took
                part = f"is in its {step.clock.part}" if step.clock.part else "is not done"
                self._say(f"{step.name} has been going on for {duration(took)}, and {part}{step.compiling}.")

    def __enter__(self) -> Self:
        if self._patience:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()


class Clock:
    """Measures the wall-clock seconds of a step and of its parts, each of which must end synchronised with the device.

        with clock("rollout"):
            rollout = jax.block_until_ready(generate(params, batch))
        clock.metrics()  # {"perf/step_seconds/rollout": ..., "perf/step_seconds": ...}

    The attribute `part` is the name of the current part, or "".
    """

    def __init__(self) -> None:
        self._begin = time.perf_counter()
        self._parts: dict[str, float] = {}
        self._tokens: dict[str, int] = {}
        self.part = ""

    @contextlib.contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        """Adds the duration of the body to a part."""
        begin, self.part = time.perf_counter(), part
        yield
        self._parts[part] = self._parts.get(part, 0.0) + time.perf_counter() - begin
        self.part = ""

    def count(self, part: str, tokens: int) -> None:
        """Adds completion tokens that a part has processed."""
        self._tokens[part] = self._tokens.get(part, 0) + tokens

    def metrics(self) -> dict[str, float]:
        """Returns perf/*: seconds of the step and of each part, tokens per second of parts with counted tokens."""
        seconds = {f"perf/step_seconds/{part}": s for part, s in self._parts.items()}
        speeds = {f"perf/{part}_tokens_per_s": n / self._parts[part] for part, n in self._tokens.items()}
        return seconds | speeds | {"perf/step_seconds": time.perf_counter() - self._begin}

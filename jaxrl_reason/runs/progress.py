"""What a person sees while a run goes on, and how long its parts take."""

from collections.abc import Callable
import contextlib
import statistics
import threading
import time

import rich.console
import rich.progress


class Progress:
    """A progress bar with a live text and the time left; a context manager. Off a terminal, a line about every tenth of the way."""

    def __init__(self, console: rich.console.Console, name: str, total: int, done: int = 0, *, enabled: bool = True):
        self._console, self._name, self._total, self._done = console, name, total, done
        self._enabled, self._begin = enabled, None
        self._bar = rich.progress.Progress(
            rich.progress.TextColumn("{task.description}"),
            rich.progress.BarColumn(),
            rich.progress.MofNCompleteColumn(),
            rich.progress.TextColumn("{task.fields[text]}"),
            rich.progress.TimeElapsedColumn(),
            rich.progress.TimeRemainingColumn(),
            console=console,
            disable=not (enabled and console.is_terminal),
        )
        self._task = self._bar.add_task(name, total=total, completed=done, text="")

    def advance(self, text: str) -> None:
        """One step is done; `text` is shown beside the bar."""
        self._done += 1
        self._bar.update(self._task, advance=1, text=text)
        if self._enabled and not self._console.is_terminal and self._done % max(self._total // 10, 1) == 0:
            self._console.print(f"{self._name} {self._done}/{self._total}  {text}{self._left()}", soft_wrap=True)
        if self._begin is None:  # the first step compiles: it says nothing about those to come
            self._begin = self._done, time.monotonic()

    def _left(self) -> str:
        if self._begin is None or self._done == self._total:
            return ""
        done, since = self._begin
        return f"  about {duration((time.monotonic() - since) / (self._done - done) * (self._total - self._done))} left"

    def __enter__(self):
        self._bar.start()
        return self

    def __exit__(self, *_):
        self._bar.stop()


def duration(seconds: float) -> str:
    """ "40 s", "5 min", "3 h 20 min"."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"


class Heartbeat:
    """Says, from a thread of its own, that a step is still going on when it takes long: `patience` seconds, and five times as long as usual.

    A context manager. It says so again each time the step has taken twice as long as then.

    Args:
      say: takes a sentence.
      patience: in seconds; 0: it never says anything.
    """

    def __init__(self, say: Callable[[str], None], patience: float):
        self._say, self._patience = say, patience
        self._times: list[float] = []  # of the last steps
        self._step, self._ended = None, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def step(self, name: str, clock: "Clock") -> None:
        """The next step begins; the one before is over."""
        now = time.monotonic()
        if self._step is not None:
            self._times = [*self._times[-19:], now - self._step[1]]
        usual = statistics.median(self._times) if self._times else 0.0
        self._step = name, now, max(self._patience, 5 * usual), clock

    def _watch(self) -> None:
        told, due = None, 0.0
        while not self._ended.wait(min(1.0, self._patience / 4)):
            if self._step is None:
                continue
            name, begin, limit, clock = self._step
            if told != name:
                told, due = name, limit
            took = time.monotonic() - begin
            if took >= due:
                due = 2 * took
                where = f" in its {clock.part}" if clock.part else ""
                compiling = "; the first step also compiles" if not self._times else ""
                self._say(f"{name} has been going on for {duration(took)}, and is{where or ' not done'}{compiling}.")

    def __enter__(self):
        if self._patience:
            self._thread.start()
        return self

    def __exit__(self, *_):
        self._ended.set()


class Clock:
    """Wall-clock seconds of a step and of its named parts. Parts must end synchronised with the device.

    Attributes:
      part: the name of the part that goes on, or "".
    """

    def __init__(self):
        self._begin, self._parts, self._tokens = time.perf_counter(), {}, {}
        self.part = ""

    @contextlib.contextmanager
    def __call__(self, part: str):
        begin, self.part = time.perf_counter(), part
        yield
        self._parts[part] = self._parts.get(part, 0.0) + time.perf_counter() - begin
        self.part = ""

    def count(self, part: str, tokens: int) -> None:
        """A part has worked on so many more completion tokens."""
        self._tokens[part] = self._tokens.get(part, 0) + tokens

    def metrics(self) -> dict[str, float]:
        """perf/* metrics: seconds of the step and of each part, tokens a second of the parts that have counted some."""
        seconds = {f"perf/step_seconds/{part}": s for part, s in self._parts.items()}
        speeds = {f"perf/{part}_tokens_per_s": n / self._parts[part] for part, n in self._tokens.items()}
        return seconds | speeds | {"perf/step_seconds": time.perf_counter() - self._begin}

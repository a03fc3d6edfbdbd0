"""What a person sees while a run goes on, and how long its parts take."""

import contextlib
import time

import rich.console
import rich.progress


class Progress:
    """A progress bar with a live text; a context manager. Off a terminal, a line about every tenth of the way."""

    def __init__(self, console: rich.console.Console, name: str, total: int, done: int = 0, *, enabled: bool = True):
        self._console, self._name, self._total, self._done = console, name, total, done
        self._enabled = enabled
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
            self._console.print(f"{self._name} {self._done}/{self._total}  {text}")

    def __enter__(self):
        self._bar.start()
        return self

    def __exit__(self, *_):
        self._bar.stop()


class Clock:
    """Wall-clock seconds of a step and of its named parts. Parts must end synchronised with the device."""

    def __init__(self):
        self._begin, self._parts, self._tokens = time.perf_counter(), {}, {}

    @contextlib.contextmanager
    def __call__(self, part: str):
        begin = time.perf_counter()
        yield
        self._parts[part] = self._parts.get(part, 0.0) + time.perf_counter() - begin

    def count(self, part: str, tokens: int) -> None:
        """A part has worked on so many more completion tokens."""
        self._tokens[part] = self._tokens.get(part, 0) + tokens

    def metrics(self) -> dict[str, float]:
        """perf/* metrics: seconds of the step and of each part, tokens a second of the parts that have counted some."""
        seconds = {f"perf/step_seconds/{part}": s for part, s in self._parts.items()}
        speeds = {f"perf/{part}_tokens_per_s": n / self._parts[part] for part, n in self._tokens.items()}
        return seconds | speeds | {"perf/step_seconds": time.perf_counter() - self._begin}

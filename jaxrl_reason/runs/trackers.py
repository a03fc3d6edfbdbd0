"""Experiment trackers: the metrics of metrics.jsonl also go to Weights & Biases, Trackio or MLflow (config.log.trackers).

A tracker is an entry of `TRACKERS`. A thread of its own imports it and calls it, so that a run neither waits for it nor ends
with it. A tracker that fails or does not keep up is left alone after one warning: metrics.jsonl has everything.
"""

from collections.abc import Callable, Mapping, Sequence
import importlib
import importlib.util
import json
import logging
import os
import pathlib
import queue
import re
import secrets
import sys
import threading
import time
from typing import Any, NamedTuple

from jaxrl_reason import config as config_lib
from jaxrl_reason.config import Config, ConfigError
from jaxrl_reason.runs.files import write_json

_log = logging.getLogger(__name__)
Metrics = Mapping[str, float]
WAITING = 1000  # metrics of so many steps wait for a slow tracker
PATIENCE = 30.0  # seconds that the end of a phase waits for all trackers
_PHASES = ("supervised", "reward_model")  # directories of phases in the work directory of a run


class TrackedRun(NamedTuple):
    """The facts about a run that a tracker gets."""

    directory: pathlib.Path  # of metrics.jsonl
    project: str
    name: str
    id: str  # of an earlier start in this directory; "": the run is new
    config: Mapping[str, Any]  # as nested dicts


class Tracker(NamedTuple):
    """How to use a tracker. `module` is the imported package."""

    start: Callable[[Any, TrackedRun], tuple[str, Any]]  # (module, run) -> the run's id, and a handle
    log: Callable[[Any, int, Metrics], None]  # (handle, step, metrics)
    finish: Callable[[Any], None]  # takes the handle


def _start_wandb(wandb: Any, run: TrackedRun) -> tuple[str, Any]:
    project = os.environ.get("WANDB_PROJECT") or run.project
    settings = dict(id=run.id or secrets.token_hex(8), resume="allow", config=run.config, dir=str(run.directory))
    handle = wandb.init(project=project, name=run.name, **settings)
    return handle.id, handle


def _start_trackio(trackio: Any, run: TrackedRun) -> tuple[str, Any]:
    name = run.id or f"{run.name}-{secrets.token_hex(4)}"  # the name identifies a run
    handle = trackio.init(project=run.project, name=name, resume="allow", config=run.config)
    return name, handle


def _start_mlflow(mlflow: Any, run: TrackedRun) -> tuple[str, Any]:
    if not os.environ.get("MLFLOW_EXPERIMENT_NAME"):
        mlflow.set_experiment(run.project)
    started = mlflow.start_run(**({"run_id": run.id} if run.id else {"run_name": run.name}))
    mlflow.log_dict(run.config, "config.json")
    return started.info.run_id, mlflow


def _log_mlflow(mlflow: Any, step: int, metrics: Metrics) -> None:
    # MLflow allows no other characters: eval/pass@4 becomes eval/pass_4.
    mlflow.log_metrics({re.sub(r"[^\w\-. :/]", "_", name): value for name, value in metrics.items()}, step=step)


def _log_with(handle: Any, step: int, metrics: Metrics) -> None:
    handle.log(dict(metrics), step=step)


TRACKERS = {  # name in config.log.trackers, which is the name of the package -> how to use it
    "wandb": Tracker(_start_wandb, _log_with, lambda handle: handle.finish()),
    "trackio": Tracker(_start_trackio, _log_with, lambda handle: handle.finish()),
    "mlflow": Tracker(_start_mlflow, _log_mlflow, lambda mlflow: mlflow.end_run()),
}


def check(config: Config) -> None:
    """Raises ConfigError for a tracker of config.log.trackers that is not installed."""
    for name in config.log.trackers:
        if name not in sys.modules and importlib.util.find_spec(name) is None:
            raise ConfigError(
                f"config.log.trackers names {name!r}, which is not installed; run: pip install {name}, or leave it out."
            )


def names(directory: pathlib.Path) -> tuple[str, str]:
    """Returns the names of the project and of the run whose metrics are in a directory.

    They are the names of the parent and of the directory. Phases, and the runs of a comparison, have longer names.

    Example:
      >>> names(pathlib.Path("/runs/hero/seed-0/method/supervised"))
      ('hero', 'seed-0/method/supervised')
    """
    *above, last = directory.parts
    parts = [last]
    while above and (parts[0] in _PHASES or above[-1].startswith("seed-")):
        parts.insert(0, above.pop())
    project = re.sub(r"[^\w.-]", "-", above[-1] if above else "").strip("-")  # no tracker refuses this name
    return project or "jaxrl_reason", "/".join(parts)


class Trackers:
    """The trackers of one phase of a run; a context manager.

    The ids of its runs are kept in `trackers.json` next to metrics.jsonl, so that a resumed run goes on in them. Only a
    process with `enabled` has trackers.
    """

    def __init__(self, config: Config, directory: pathlib.Path, *, enabled: bool = True):
        chosen = config.log.trackers if enabled else []
        file = directory / "trackers.json"
        ids = _Ids(file, chosen)
        project, name = names(directory)
        values = config_lib.to_dict(config)
        self._threads = [
            _Thread(tracker, TrackedRun(directory, project, name, ids.of(tracker), values), ids) for tracker in chosen
        ]

    def log(self, step: int, numbers: Mapping[str, float | None]) -> None:
        """Hands the metrics of a step to all trackers, without metrics that are not finite (None)."""
        metrics = {name: float(value) for name, value in numbers.items() if value is not None}
        for thread in self._threads:
            thread.put((step, metrics))

    def __enter__(self) -> "Trackers":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Waits until the trackers have everything, at most PATIENCE seconds."""
        end = time.monotonic() + PATIENCE
        for thread in self._threads:
            thread.put(None)
        for thread in self._threads:
            thread.join(0.0 if thread.has_given_up() else max(end - time.monotonic(), 0.0))
            if thread.is_alive():
                thread.give_up(f"has not taken everything {PATIENCE:.0f} s after the last step")


class _Ids:
    """The ids of the trackers' runs, in a file."""

    def __init__(self, file: pathlib.Path, chosen: Sequence[str]):
        self._file, self._lock = file, threading.Lock()
        self._ids: dict[str, str] = {}
        if chosen and file.exists():
            try:
                self._ids = dict(json.loads(file.read_text()))
            except (ValueError, TypeError):
                _log.warning("%s is damaged, so the trackers begin new runs.", file)

    def of(self, tracker: str) -> str:
        return self._ids.get(tracker, "")

    def keep(self, tracker: str, id: str) -> None:
        with self._lock:
            if self._ids.get(tracker) != id:
                self._ids[tracker] = id
                write_json(self._file, self._ids)


class _Thread(threading.Thread):
    """Serves one tracker from a queue; the last item is None."""

    def __init__(self, name: str, run: TrackedRun, ids: _Ids):
        super().__init__(name=f"tracker {name}", daemon=True)  # a daemon: the end of the process does not wait for it
        self._tracker, self._run, self._ids = name, run, ids
        self._queue: queue.Queue[tuple[int, Metrics] | None] = queue.Queue(WAITING)
        self._given_up = threading.Event()

    def has_given_up(self) -> bool:
        return self._given_up.is_set()

    def put(self, item: tuple[int, Metrics] | None) -> None:
        """Adds an item, without waiting."""
        if not self._given_up.is_set():
            try:
                self._queue.put_nowait(item)
            except queue.Full:
                self.give_up(f"does not keep up: the metrics of {WAITING} steps wait")

    def give_up(self, reason: str) -> None:
        """Prints one warning, and takes no more items."""
        if not self._given_up.is_set():
            self._given_up.set()
            _log.warning(
                "The tracker %s %s. The run goes on without it; %s has all metrics.",
                self._tracker, reason, self._run.directory / "metrics.jsonl",
            )  # fmt: skip

    def run(self) -> None:
        doing = "start"
        try:
            tracker = TRACKERS[self._tracker]
            id, handle = tracker.start(importlib.import_module(self._tracker), self._run)
            self._ids.keep(self._tracker, id)
            doing = "log"
            while (item := self._queue.get()) is not None:
                if self._given_up.is_set():
                    return
                tracker.log(handle, *item)
            doing = "finish"
            tracker.finish(handle)
        except BaseException as e:  # a tracker can fail in any way, also by SystemExit
            text = " ".join(str(e).split())
            self.give_up(f"failed to {doing} ({type(e).__name__}{': ' if text else ''}{text:.200})")

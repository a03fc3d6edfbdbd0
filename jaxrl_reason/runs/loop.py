"""The skeleton of the training loops (supervised, reward model, RL): metrics, checkpoints, progress bar, early end."""

from collections.abc import Callable, Mapping
import contextlib
import dataclasses
import functools
import pathlib
from typing import Any

import rich.console

from jaxrl_reason.config import Config
from jaxrl_reason.rl import hosts
from jaxrl_reason.rl.memory import memory_metrics
from jaxrl_reason.runs.metrics_file import MetricsWriter
from jaxrl_reason.runs.progress import Clock, Heartbeat, Progress
from jaxrl_reason.runs.trackers import Trackers
from jaxrl_reason.runs.watch import history, SkippedUpdates


@dataclasses.dataclass(frozen=True)
class Loop:
    """One training loop of a run."""

    name: str  # of the progress bar
    step_name: str  # of a step, with a place for its number: "step {}"
    directory: pathlib.Path  # of metrics.jsonl
    begin: int  # steps done before
    end: int  # steps to do in all
    config: Config
    console: rich.console.Console
    should_stop: Callable[[], bool]  # whether to save and end, from `hosts.preemption`; called once per step
    saves_last: bool = True  # whether the last step is saved as a checkpoint


def run_loop(
    loop: Loop,
    state: Any,
    train_step: Callable[[int, Any, Clock], tuple[Any, dict[str, float], Any]],
    save: Callable[[int, Any], None],
    *,
    progress: Callable[[Mapping[str, float]], str],
    advice: Callable[[int, Any, Any], str],
    before: Callable[[], dict[str, float]] | None = None,
    after: Callable[[int, Any, dict[str, float], Any, Clock], dict[str, float]] | None = None,
    observe: Callable[[list[dict[str, float]]], Callable[[int, dict[str, float], Any], None]] | None = None,
) -> Any:
    """Runs the steps `loop.begin` to `loop.end`, from `state`, and returns the state after the last step.

    Args:
      train_step: (step, state, clock) -> the new state, metrics, and details for the other functions.
      save: (steps done, state) -> writes a checkpoint.
      progress: metrics -> text next to the progress bar.
      advice: (steps done, state, details) -> what to do after too many updates that were not finite; the end of the
        error message.
      before: () -> metrics of step 0, computed unless the loop goes on from a checkpoint.
      after: (steps done, state, metrics, details, clock) -> further metrics of a step.
      observe: takes the metrics of the steps done before, and returns (steps done, metrics, details) -> None, called
        when the metrics of a step are written.

    Raises NonFiniteError after `config.optimizer.max_skipped` steps in a row without a finite update, and Preempted
    when `should_stop` was true; the last step is saved.
    """
    c, say = loop.config, functools.partial(loop.console.print, soft_wrap=True)
    with contextlib.ExitStack() as stack:
        writer = MetricsWriter(loop.directory, c.log.tensorboard, loop.begin or -1, enabled=hosts.is_first())
        metrics_file = stack.enter_context(writer)
        trackers = stack.enter_context(Trackers(c, loop.directory, enabled=hosts.is_first()))
        write = lambda step, metrics: trackers.log(step, metrics_file.write(step, metrics))
        heart = stack.enter_context(Heartbeat(say, c.log.heartbeat))
        if loop.begin == 0 and before:
            heart.step("The evaluation before training", Clock(), extra=True)
            write(0, before())
        past = history(loop.directory, loop.begin)
        skipped, written = SkippedUpdates(c.optimizer.max_skipped, past), observe(past) if observe else None
        bar = stack.enter_context(Progress(loop.console, loop.name, loop.end, loop.begin, enabled=c.log.progress))
        clock = Clock()
        for step in range(loop.begin, loop.end):
            done, last = step + 1, step + 1 == loop.end
            name = loop.step_name.format(done)
            heart.step(name[0].upper() + name[1:], clock)
            state, metrics, details = train_step(step, state, clock)
            if after:
                metrics |= after(done, state, metrics, details, clock)
            write(done, metrics | clock.metrics() | memory_metrics())
            clock = Clock()  # of the next line, which also has the seconds of this step's checkpoint
            if written:
                written(done, metrics, details)
            if skipped.look(metrics):
                raise skipped.error(name, advice(done, state, details))
            ending = loop.should_stop() and not last
            if ending or (loop.saves_last if last else done % c.checkpoint.every == 0):
                heart.step(f"The checkpoint of {name}", clock, extra=True)
                with clock("checkpoint"):
                    save(done, state)
            if ending:
                raise hosts.Preempted(name)
            bar.advance(progress(metrics))
    return state

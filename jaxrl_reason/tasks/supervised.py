"""The policy that RL begins with: another run's start, a pretrained model or random weights, then the supervised phase."""

from collections.abc import Callable
import pathlib

import jax
import rich.console

from jaxrl_reason import models
from jaxrl_reason.rl.programs import Programs
from jaxrl_reason.rl.types import TrainState
from jaxrl_reason.runs import checkpoints
from jaxrl_reason.runs.loop import Loop, run_loop
from jaxrl_reason.runs.progress import Clock
from jaxrl_reason.tasks.task import TrainingTask


def first_state(task: TrainingTask, programs: Programs) -> TrainState:
    """Returns step 0 of a run: another run's start, a pretrained model, or random weights."""
    start, abstract = programs.config.supervised.start_from, programs.abstract_state
    if not start and not task.load_weights:
        return programs.init()
    trained, frozen = abstract.trained, abstract.frozen
    if not start or frozen:
        weights = task.load_weights() if task.load_weights else programs.init().params
        trained, frozen = models.lora.split(task.model, weights)
    if start:
        trained = checkpoints.load_params(pathlib.Path(start).expanduser() / "start", trained)
    return programs.restart(models.lora.join(trained, frozen))


def train(
    task: TrainingTask,
    programs: Programs,
    state: TrainState,
    saver: checkpoints.Checkpoints,
    console: rich.console.Console,
    should_stop: Callable[[], bool],
) -> TrainState:
    """Runs the supervised phase: cross-entropy on worked solutions, with checkpoints and metrics of its own."""
    solutions = task.solutions
    assert solutions is not None  # the run has config.supervised.steps

    def step(i: int, state: TrainState, clock: Clock):
        state, metrics = programs.supervised_update(state, solutions.batch(i))
        return state, {name: float(value) for name, value in jax.device_get(metrics).items()}, None

    return run_loop(
        Loop(
            name="supervised",
            step_name="supervised step {}",
            directory=task.work.path / "supervised",
            begin=int(state.step),
            end=programs.config.supervised.steps,
            config=programs.config,
            console=console,
            should_stop=should_stop,
            saves_last=False,  # RL begins with a checkpoint of its own
        ),
        state,
        step,
        saver.save,
        progress=lambda metrics: f"loss {metrics['sft/loss']:.3f}",
        advice=lambda *_: "Lower config.supervised.learning_rate.",
    )

"""The policy that RL begins with: another run's start, a pretrained model or random weights, then the supervised phase.

With validation rows, the phase ends with the weights of the lowest cross-entropy on them, which are in supervised/best/.
"""

from collections.abc import Callable
import math
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
    """Runs the supervised phase: cross-entropy on worked solutions, with checkpoints and metrics of its own.

    Returns the state after the last step; with `task.validation`, the weights of the lowest validation loss are in it.
    """
    solutions, c = task.solutions, programs.config
    directory = task.work.path / "supervised"
    best = directory / "best"
    assert solutions is not None  # the run has config.supervised.steps

    def step(i: int, state: TrainState, clock: Clock):
        state, metrics = programs.supervised_update(state, solutions.batch(i))
        return state, {name: float(value) for name, value in jax.device_get(metrics).items()}, None

    with_best = lambda: state._replace(trained=checkpoints.load_params(best, state.trained))
    lowest = math.inf
    if task.validation and int(state.step) and best.exists():  # the run goes on from a checkpoint
        lowest = programs.cross_entropy(with_best().params, task.validation)

    def after(done: int, state: TrainState, metrics: dict, details: None, clock: Clock) -> dict[str, float]:
        nonlocal lowest
        if not task.validation or (done % c.regression.validation_every and done != c.supervised.steps):
            return {}
        with clock("evaluation"):
            loss = programs.cross_entropy(state.params, task.validation)
            if loss < lowest:
                lowest = loss
                checkpoints.save_params(best, state.trained)
        return {"validation/loss": loss}

    state = run_loop(
        Loop(
            name="supervised",
            step_name="supervised step {}",
            directory=directory,
            begin=int(state.step),
            end=c.supervised.steps,
            config=c,
            console=console,
            should_stop=should_stop,
            saves_last=False,  # RL begins with a checkpoint of its own
        ),
        state,
        step,
        saver.save,
        progress=lambda metrics: f"loss {metrics['sft/loss']:.3f}",
        advice=lambda *_: "Lower config.supervised.learning_rate.",
        after=after,
    )
    return with_best() if task.validation else state

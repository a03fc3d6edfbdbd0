"""Trains a reward model on preference pairs.

The decoder begins as the policy of the work directory if its supervised phase is done, else with the weights that the
policy would begin with. The reward model is written to DIR/reward_model. The same command continues from the newest
checkpoint.
"""

import pathlib
import sys

import rich.console

from jaxrl_reason import models, train
from jaxrl_reason.config import ConfigError
from jaxrl_reason.rewards import RewardError
from jaxrl_reason.rewards.model_training import get_reward_model, Phase
from jaxrl_reason.rl import hosts
from jaxrl_reason.runs import checkpoints, command
from jaxrl_reason.tasks import supervised


def start_decoder(run: train.Run, console: rich.console.Console) -> models.Params:
    """Returns the weights that a reward model begins with, and prints their origin.

    They are the newest weights of a policy past its supervised phase, else the weights that the policy would begin
    with.
    """
    c = run.config
    saver = checkpoints.Checkpoints(run.work.path / "checkpoints", c.checkpoint.keep)
    restored = saver.restore(run.programs.abstract_state)
    saver.close()
    if restored is not None and restored[0] >= c.supervised.steps:
        origin, state = str(saver.directory / str(restored[0])), restored[1]
    else:
        random = "random weights: the run has no policy yet that is past its supervised phase"
        start, state = c.supervised.start_from, supervised.first_state(run.task, run.programs)
        origin = str(pathlib.Path(start).expanduser() / "start") if start else c.model.path or random
    _, params = models.lora.merge(run.model, state.params)
    console.print(f"The reward model starts from {origin}.", soft_wrap=True)
    return params


COMMAND = command.Command(
    "reward_training",
    __doc__,
    command.TRAINING,
    "--config=configs/hero.py --workdir=/tmp/hero",
    errors=(RewardError,),
)


def prepare(arguments: command.Arguments) -> tuple[train.Run, Phase]:
    """Connects the processes and sets the run up; raises as `train.setup` does, and ConfigError without a reward model to train."""
    config = arguments.configuration()
    hosts.initialize(config.mesh.host_timeout, config.mesh.initialization_timeout)
    run = train.setup(config, arguments.training_workdir())
    if run.reward_phase is None:
        raise ConfigError(
            "config.reward.functions names no learned reward, so this run has no reward model to train; add 'reward_model' there."
        )
    if run.reward_phase.pretrained:
        raise ConfigError("config.reward_model.path names a pretrained reward model, so there is none to train.")
    return run, run.reward_phase


def work(run: train.Run, phase: Phase) -> None:
    """Trains the reward model of a run. Raises ConfigError if another process trains in its work directory."""
    console = rich.console.Console(highlight=False, markup=False, emoji=False, quiet=not hosts.is_first())
    with hosts.preemption() as should_stop, train.locked(run):
        get_reward_model(phase, start_decoder(run, console), console, should_stop)


def main(argv: list[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    return command.run(COMMAND, argv, prepare, lambda prepared: work(*prepared))


if __name__ == "__main__":
    sys.exit(main())

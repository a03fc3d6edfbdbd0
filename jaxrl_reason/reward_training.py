"""Trains a reward model on preference pairs: python -m jaxrl_reason.reward_training --config=configs/hero.py --workdir=DIR

The decoder begins as the policy of the work directory if its supervised phase is done, else with random weights. The same command continues
from the newest checkpoint.
"""

import pathlib
import sys

import rich.console

from jaxrl_reason import config as config_lib
from jaxrl_reason import models, train
from jaxrl_reason.config import ConfigError
from jaxrl_reason.rewards import RewardError
from jaxrl_reason.rewards.model_training import get_reward_model
from jaxrl_reason.rl import hosts
from jaxrl_reason.runs import checkpoints, writers
from jaxrl_reason.runs.watch import NonFiniteError


def start_decoder(run, console: rich.console.Console) -> models.Params:
    """What a `train.Run` has of a policy past its supervised phase: its newest weights, else those it would start from."""
    c = run.config
    saver = checkpoints.Checkpoints(run.work.path / "checkpoints", c.checkpoint.keep)
    number, state = saver.restore(run.programs.abstract_state) or (-1, None)
    saver.close()
    if number >= c.supervised.steps:
        origin, params = saver.directory / str(number), state.params
    else:
        start = c.supervised.start_from and pathlib.Path(c.supervised.start_from).expanduser() / "start"
        nothing = "random weights: the run has no policy yet that is past its supervised phase"
        origin = start or c.model.path or nothing
        params = train.first_state(run).params
    _, params = models.lora.merge(run.model, params)
    console.print(f"The reward model starts from {origin}.", soft_wrap=True)
    return params


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or "--help" in argv or "-h" in argv:
        print(
            f"{__doc__}\nAny field of the configuration can be set as --config.section.field=value. Defaults:\n\n{config_lib.help_text()}"
        )
        return 0
    try:
        run = train.setup(*config_lib.parse_args(argv))
        if run.reward_phase is not None and run.reward_phase.pretrained:
            raise ConfigError("config.reward_model.path names a pretrained reward model, so there is none to train.")
        if run.reward_phase is None:
            raise ConfigError(
                "config.reward.functions names no learned reward, so this run has no reward model to train; add 'reward_model' there."
            )
    except (ConfigError, RewardError, ValueError, OSError) as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    console = rich.console.Console(highlight=False, markup=False)
    try:
        with hosts.preemption() as asked:
            get_reward_model(run.reward_phase, start_decoder(run, console), console, asked)
    except (ConfigError, checkpoints.CheckpointError, writers.MetricsError, NonFiniteError, OSError) as e:
        print(f"error: {e}", file=sys.stderr)
        return 1
    except hosts.Preempted as e:
        print(e, file=sys.stderr)
        return e.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())

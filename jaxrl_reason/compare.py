"""Trains a method and its baselines from the same start, and compares their held-out metrics.

The recipe's `get_baselines()` names the baselines: {"verifier only": {"method": {"name": "grpo"}}, ...}, each a dict of
the configuration fields that differ. All runs have the same seed, data and budget, and begin with the same weights: the
recipe's supervised start (and its reward model) is trained once, in DIR/method. A table is printed and written to
DIR/comparison.json. The same command again resumes.
"""

from collections.abc import Callable, Mapping
import dataclasses
import pathlib
import re
import sys

import rich.console

from jaxrl_reason import config as config_lib
from jaxrl_reason import tasks, train
from jaxrl_reason.config import Config, ConfigError
from jaxrl_reason.methods import Method
from jaxrl_reason.rewards import RewardError
from jaxrl_reason.rl import hosts
from jaxrl_reason.runs import command, pictures, read_metrics
from jaxrl_reason.runs.files import write_json

Rows = dict[str, dict[str, float]]  # row name -> metrics
METHOD = "method"  # the directory and the row of the recipe itself


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Runs to compare."""

    workdir: pathlib.Path  # holds the work directory of each run
    configs: Mapping[str, Config]  # row name -> configuration; the method comes first
    method: Method
    pending: list[
        train.Run
    ]  # the method's run, set up; `train_all` takes it, so that it ends before the baselines begin


def variant(config: Config, changes: Mapping[str, object]) -> Config:
    """Returns a copy with other values for some fields; raises ConfigError for an unknown field.

    `changes` maps fields to values, such as {"method": {...}, "reward.weights": [...]}.
    """
    copy = config_lib.from_dict(config_lib.to_dict(config))
    for name, value in changes.items():
        *sections, leaf = name.split(".")
        at = copy
        for part in (*sections, leaf):
            if not dataclasses.is_dataclass(at) or not hasattr(at, part):
                raise ConfigError(f"A baseline changes config.{name}, and there is no such field.")
            at, parent = getattr(at, part), at
        setattr(parent, leaf, value)
    return copy


def compare(config: Config, baselines: Mapping[str, Mapping[str, object]], workdir: str | pathlib.Path) -> Rows:
    """Trains a method and its baselines, one after another, each in a work directory under `workdir`.

    `config` is that of the method; `baselines` maps names to configuration fields that differ. Returns row name ->
    metrics; the row "start" is the policy that all runs begin with.
    """
    return train_all(prepare(config, baselines, workdir))


def prepare(config: Config, baselines: Mapping[str, Mapping[str, object]], workdir: str | pathlib.Path) -> Comparison:
    """Makes the configurations and sets the method's run up. Arguments: see `compare`.

    Raises ConfigError without evaluations to compare, and for a baseline that changes an unknown field.
    """
    if elsewhere := config_lib.remote(str(workdir)):
        raise ConfigError(f"The work directory is {str(workdir)!r}, and must be on this machine: {elsewhere}.")
    workdir = pathlib.Path(workdir).expanduser().resolve()  # the configurations of the baselines hold it
    if not config.eval.every:
        raise ConfigError("config.eval.every is 0, and a comparison needs held-out metrics; set it above 0.")
    config = variant(config, {"checkpoint.keep_start": True})
    shared: dict[str, object] = {"supervised.steps": 0, "supervised.start_from": str(workdir / METHOD)}
    if any(name.startswith("reward_model") for name in config.reward.functions) and not config.reward_model.path:
        shared["reward_model"] = config_lib.RewardModel(path=str(workdir / METHOD / "reward_model"))
    configs = {METHOD: config}
    for name, changes in baselines.items():
        changed = variant(config, shared | dict(changes))
        if not any(n.startswith("reward_model") for n in changed.reward.functions):
            changed.reward_model = config_lib.RewardModel()
        configs[name] = changed
    run = train.setup(config, workdir / METHOD)
    return Comparison(workdir, configs, run.method, [run])


def train_all(comparison: Comparison) -> Rows:
    """Trains all runs and writes comparison.json. Returns its content, see `compare`."""
    with hosts.preemption() as should_stop:  # around all runs: a signal in one of them ends the comparison
        return _train_all(comparison, should_stop)


def _train_all(comparison: Comparison, should_stop: Callable[[], bool]) -> Rows:
    workdir, rows = comparison.workdir, {}
    console, count = rich.console.Console(highlight=False, markup=False), len(comparison.configs)
    for number, (name, config) in enumerate(comparison.configs.items(), 1):
        directory = workdir / re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")
        left = count - number
        follow = "none follows" if not left else "1 follows" if left == 1 else f"{left} follow"
        who = f"the method, {config.method['name']}" if name == METHOD else f"the baseline {name!r}"
        console.print(f"Run {number} of {count}, {who}, in {directory}; {follow}.", soft_wrap=True)
        if name != METHOD:
            comparison.pending.append(_set_up(name, config, directory))
        train.train(comparison.pending.pop())
        if should_stop() and left:
            raise hosts.Preempted(f"the last step of the run in {directory}")
        lines = read_metrics(directory / "metrics.jsonl")
        prefixes = ("eval/", *tasks.BASELINES)
        evaluations = [e for line in lines if (e := {k: v for k, v in line.items() if k.startswith(prefixes)})]
        if name == METHOD:
            rows["start"] = evaluations[0]
            rows |= _other_approaches(evaluations[0])
            name = config.method["name"]
        rows[name] = evaluations[-1]
    write_json(workdir / "comparison.json", rows)
    return rows


def _set_up(name: str, config: Config, directory: pathlib.Path) -> train.Run:
    """Sets a baseline up. Raises ConfigError, which names the baseline, for everything that `train.setup` refuses."""
    try:
        return train.setup(config, directory)
    except (ValueError, OSError) as e:
        raise ConfigError(f"The baseline {name!r} cannot begin: {e}") from e


def _other_approaches(metrics: Mapping[str, float]) -> Rows:
    """Returns rows of other measured approaches: the metric "pointwise/r2" is eval/r2 of the row "pointwise"."""
    rows: Rows = {}
    for name, value in metrics.items():
        if name.startswith(tasks.BASELINES):
            kind, _, metric = name.partition("/")
            rows.setdefault(kind.replace("_", " "), {})[f"eval/{metric}"] = value
    return rows


def print_rows(console: rich.console.Console, rows: Mapping[str, Mapping[str, float]], shown: tuple[str, ...]) -> None:
    """Prints one row per metric whose name, without "eval/", begins with `shown`, and one column per run."""
    names = dict.fromkeys(n for row in rows.values() for n in row if n.removeprefix("eval/").startswith(shown))
    columns = {title: [pictures.cell(name, row.get(name)) for name in names] for title, row in rows.items()}
    pictures.print_table(console, [name.removeprefix("eval/").replace("_", " ") for name in names], columns)


COMMAND = command.Command(
    "compare", __doc__, command.TRAINING, "--config=configs/hero.py --workdir=/tmp/hero", errors=(RewardError,)
)


def main(argv: list[str] | None = None) -> int:
    """Runs the command and returns its exit code."""

    def begin(arguments: command.Arguments) -> Comparison:
        module = config_lib.load_module(arguments.config)
        if not hasattr(module, "get_baselines"):
            raise ConfigError(f"{arguments.config} has no get_baselines(); it names the baselines of the method.")
        return prepare(arguments.configuration(), module.get_baselines(), arguments.training_workdir())

    def work(comparison: Comparison) -> None:
        rows, console = train_all(comparison), rich.console.Console(highlight=False, markup=False)
        print_rows(console, rows, tasks.headlines(comparison.method))
        console.print(f"Written: {comparison.workdir / 'comparison.json'}", soft_wrap=True)

    return command.run(COMMAND, argv, begin, work)


if __name__ == "__main__":
    sys.exit(main())

"""A method beside its baselines: python -m jaxrl_reason.compare --config=configs/hero.py --workdir=DIR

The recipe's `get_baselines()` names the others: {"verifier only": {"method": {"name": "grpo"}}, ...}, each a dict of configuration
fields that differ. All runs have the same seed, data and budget, and begin with the same weights: the recipe's
supervised start (and its reward model) is trained once, in DIR/method. A table is printed and kept in DIR/comparison.json;
run the same command again and it goes on.
"""

from collections.abc import Mapping
import dataclasses
import pathlib
import re
import sys

import rich.console
import rich.table

from jaxrl_reason import config as config_lib
from jaxrl_reason import tasks, train
from jaxrl_reason.config import Config, ConfigError
from jaxrl_reason.rewards import RewardError
from jaxrl_reason.rl import hosts
from jaxrl_reason.runs import checkpoints, writers
from jaxrl_reason.runs.watch import NonFiniteError

METHOD = "method"  # the directory and the row of the recipe itself


def variant(config: Config, changes: Mapping[str, object]) -> Config:
    """A copy of `config` with fields changed: {"method": {...}, "reward.weights": [...]}.

    Raises:
      ConfigError: there is no such field.
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


def compare(config: Config, baselines: Mapping[str, Mapping[str, object]], workdir: str | pathlib.Path) -> dict:
    """Trains all of them, one after another.

    Args:
      config: of the method.
      baselines: name -> configuration fields that differ.
      workdir: gets a work directory for each.

    Returns:
      row name -> its figures; "start" is the policy that all begin with.
    """
    workdir = pathlib.Path(workdir).expanduser().resolve()  # kept in the configurations of the others
    if not config.eval.every:
        raise ConfigError("config.eval.every is 0, and a comparison is one of held-out figures; set it above 0.")
    config = variant(config, {"checkpoint.keep_start": True})
    shared = {"supervised.steps": 0, "supervised.start_from": str(workdir / METHOD)}
    if any(name.startswith("reward_model") for name in config.reward.functions) and not config.reward_model.path:
        shared["reward_model"] = config_lib.RewardModel(path=str(workdir / METHOD / "reward_model"))
    runs = {METHOD: config}
    for name, changes in baselines.items():
        changed = variant(config, shared | dict(changes))
        if not any(n.startswith("reward_model") for n in changed.reward.functions):
            changed.reward_model = config_lib.RewardModel()
        runs[name] = changed
    rows = {}
    for name, c in runs.items():
        directory = workdir / re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")
        train.train(train.setup(c, directory))
        evaluations = [
            {k: v for k, v in line.items() if k.startswith(("eval/", *tasks.BASELINES))}
            for line in writers.read_metrics(directory / "metrics.jsonl")
        ]
        evaluations = [e for e in evaluations if e]
        if name == METHOD:
            rows["start"] = evaluations[0]
            name = config.method["name"]
            rows |= {kind: beside for kind, beside in _beside(evaluations[0]).items()}
        rows[name] = evaluations[-1]
    writers.write_json(workdir / "comparison.json", rows)
    return rows


def _beside(figures: Mapping[str, float]) -> dict[str, dict[str, float]]:
    """Rows of other approaches that a run measured: {"pointwise/r2": .6} is the figure eval/r2 of a row "pointwise"."""
    rows: dict[str, dict[str, float]] = {}
    for name, value in figures.items():
        if name.startswith(tasks.BASELINES):
            kind, _, figure = name.partition("/")
            rows.setdefault(kind.replace("_", " "), {})[f"eval/{figure}"] = value
    return rows


def table(rows: Mapping[str, Mapping[str, float]], shown: tuple[str, ...]) -> rich.table.Table:
    """One row a figure, one column a run; `shown` are the beginnings of the figures' names."""
    names = dict.fromkeys(n for row in rows.values() for n in row if n.removeprefix("eval/").startswith(shown))
    out = rich.table.Table()
    out.add_column("")
    for row in rows:
        out.add_column(row, justify="right")
    for name in names:
        figures = (writers.cell(name, row.get(name)) for row in rows.values())
        out.add_row(name.removeprefix("eval/").replace("_", " "), *figures)
    return out


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or "--help" in argv or "-h" in argv:
        print(__doc__)
        return 0
    try:
        config, workdir = config_lib.parse_args(argv)
        words = [word for arg in argv for word in arg.split("=", 1)]  # --config=FILE and --config FILE
        path = words[words.index("--config") + 1]
        module = config_lib.load_module(path)
        if not hasattr(module, "get_baselines"):
            raise ConfigError(f"{path} has no get_baselines(); it names what the method is compared with.")
        rows = compare(config, module.get_baselines(), workdir)
    except (
        ConfigError,
        RewardError,
        checkpoints.CheckpointError,
        writers.MetricsError,
        NonFiniteError,
        ValueError,
        OSError,
    ) as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    except hosts.Preempted as e:
        print(e, file=sys.stderr)
        return e.exit_code
    console = rich.console.Console(highlight=False, markup=False)
    console.print(table(rows, tasks.headlines(config_lib.make_method(config))))
    console.print(f"Written: {pathlib.Path(workdir) / 'comparison.json'}", soft_wrap=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())

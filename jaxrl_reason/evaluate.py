"""Evaluates a run, or a pretrained model, on held-out data.

Samples several completions per prompt, scores them by the rewards of the run, and prints a table with 95 % intervals over
prompts. Writes evaluation.json (every number), evaluation.png and completions.jsonl (predictions.jsonl if a run predicts
numbers) to WORKDIR/evaluation. Another evaluation is written to evaluation-2, evaluation-3, ... Nothing else in the work
directory changes; the output of rewards goes to rewards.log. Completions are appended as they come: the same command
continues an evaluation that was ended. Fields on which the weights do not depend can be set as in training:
--config.seed=1, --config.mesh.fsdp=-1 on another number of devices, --config.data.columns={} for other names of columns.
"""

import pathlib
import sys
from typing import NamedTuple

import jax
import rich.console

from jaxrl_reason.config import ConfigError
from jaxrl_reason.data.named_sets import NAMED_SETS
from jaxrl_reason.rewards import RewardError
from jaxrl_reason.rl import hosts
from jaxrl_reason.runs import command
from jaxrl_reason.runs.command import Flag
from jaxrl_reason.runs.files import write_json
from jaxrl_reason.tasks import asked, comparison, evaluating, policies
from jaxrl_reason.tasks.evaluating import Evaluation, Evaluations
from jaxrl_reason.tasks.policies import OpenedPolicy


class Against(NamedTuple):
    """The other side of a comparison: a directory of results, or a policy that is evaluated after them."""

    directory: pathlib.Path | None
    policy: OpenedPolicy | None = None
    sets: dict[str, Evaluation] = {}


def prepare(arguments: command.Arguments) -> tuple[Evaluations, Against | None]:
    """Opens policies and held-out data; a ConfigError, RewardError, ValueError or OSError names the cause and its place."""
    command.load_recipe(arguments)
    source, fields, out = policies.chosen_source(arguments.workdir, arguments.model), arguments.fields, arguments.out
    if arguments.model:
        if not out:
            raise ConfigError("--out=DIR is missing: a model has no work directory for the results.")
        if not (arguments.sets or fields.get("data.eval")):
            raise ConfigError("--data=NAME_OR_PATH or --sets is missing: a model has no held-out data of its own.")
    policy = policies.open_policy(source, policies.asks_for_boxes(source) | fields, arguments.checkpoint)
    configs = asked.configs_of_sets(policy, arguments.sets, fields) if arguments.sets else {"": policy.config}
    sets = {label: evaluating.open_evaluation(policy, c, out) for label, c in configs.items()}
    against = _open_other(arguments, sets) if arguments.against else None
    evaluations = evaluating.begin(policy, sets, out, policy.workdir or out, arguments.command_line)
    if against and (theirs := against.directory):
        check = lambda: comparison.read_record(theirs, evaluations.record) if hosts.is_first() else None
        hosts.agree(check, ConfigError)
    return evaluations, against


def _open_other(arguments: command.Arguments, sets: dict[str, Evaluation]) -> Against:
    directory = pathlib.Path(arguments.against).expanduser().resolve()
    if hosts.from_first([comparison.is_results(directory)])[0]:
        return Against(directory)
    kept = ("mesh.", "model.", "log.", "compilation_cache", "prompts_per_step", "group_size")
    fields = {name: text for name, text in arguments.fields.items() if name.startswith(kept)}
    is_run = (directory / "config.json").is_file() and (directory / "tokenizer").is_dir()
    other = policies.open_policy(directory if is_run else arguments.against, fields)
    configs = {label: asked.config_like(x.config, other) for label, x in sets.items()}
    out = arguments.out or arguments.workdir
    return Against(None, other, {label: evaluating.open_evaluation(other, c, out) for label, c in configs.items()})


def evaluate(prepared: tuple[Evaluations, Against | None]) -> None:
    """Samples, scores, prints the tables and writes the results. Raises ConfigError, RewardError or OSError."""
    evaluations, against = prepared
    console = rich.console.Console(highlight=False, markup=False, emoji=False, quiet=not hosts.is_first())
    record, directory = evaluating.run(evaluations, console), evaluations.directory
    if against is None:
        return
    name, theirs = str(against.directory), against.directory
    if against.policy is not None:
        jax.tree.map(lambda x: x.delete(), evaluations.loaded.weights)  # two policies need not fit into memory
        begun = evaluating.begin(against.policy, against.sets, None, directory, record["command"], "against")
        name, theirs = against.policy.name, begun.directory
        evaluating.run(begun, console)
    if hosts.is_first():
        assert theirs is not None
        differences = comparison.compare(directory, theirs, record)
        if said := comparison.other_settings(record, comparison.read_record(theirs, record)):
            console.print(said, soft_wrap=True)
        console.print(comparison.table(differences, f"{evaluations.policy.name} against {name}"))
        found = differences.get("", differences)
        write_json(
            directory / "evaluation.json", record | {"against": {"directory": str(theirs), "differences": found}}
        )


COMMAND = command.Command(
    "evaluate",
    __doc__,
    (
        policies.WORKDIR,
        policies.MODEL,
        Flag(
            "data",
            "NAME_OR_PATH",
            "other data, as config.data.eval; the split is then test, or all of a file",
            command.nonempty,
            field="data.eval",
        ),
        Flag("split", "SPLIT", "as config.data.eval_split", field="data.eval_split"),
        Flag(
            "sets",
            "SET@K,...",
            f"several sets instead of --data, with K completions per prompt: {', '.join(NAMED_SETS)}, or other data",
            asked.read_sets,
        ),
        Flag(
            "prompts",
            "N",
            "the largest number of prompts; config.eval.prompts by default, all of --sets and of a --model",
            field="eval.prompts",
        ),
        Flag(
            "samples",
            "K",
            "completions per prompt; config.eval.samples by default, 1 at temperature 0",
            field="eval.samples",
        ),
        *policies.SAMPLING,
        Flag(
            "against",
            "OTHER",
            "a second run, model or directory of results, for the difference paired by prompt",
            command.local,
        ),
        command.RECIPE,
        command.CHECKPOINT,
        Flag(
            "out",
            "DIR",
            "the directory of the results; of a run WORKDIR/evaluation or evaluation-N by default",
            command.path,
        ),
        Flag("config.", "FIELD=VALUE", "sets a field of the configuration"),
    ),
    "--workdir=/tmp/quickstart --samples=16",
    errors=(RewardError,),
    interrupted="Ended by Ctrl-C. The same command continues after the completions that are written.",
)


def main(argv: list[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    return command.run(COMMAND, argv, prepare, evaluate)


if __name__ == "__main__":
    sys.exit(main())

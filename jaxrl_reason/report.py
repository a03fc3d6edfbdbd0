"""Writes the report of a run, which a run also writes as it goes: one HTML file for a browser.

report.html in the work directory has curves, warnings, completions and the configuration, and needs neither network nor
server.
"""

import sys

import rich.console

from jaxrl_reason import runs
from jaxrl_reason.config import Config, ConfigError
from jaxrl_reason.runs import command
from jaxrl_reason.runs.report import report_of

COMMAND = command.Command("report", __doc__, (command.WORKDIR, command.RECIPE), "--workdir=/tmp/quickstart")


def prepare(arguments: command.Arguments) -> tuple[command.Arguments, Config]:
    """Reads the configuration of the run. Raises ConfigError without a run that has metrics."""
    command.load_recipe(arguments)
    config = runs.load_config(arguments.workdir, {})
    if not (arguments.workdir / "metrics.jsonl").is_file():
        raise ConfigError(f"{arguments.workdir} has no metrics.jsonl, so there is nothing to report yet; train first.")
    return arguments, config


def main(argv: list[str] | None = None) -> int:
    """Runs the command and returns its exit code."""

    def work(prepared: tuple[command.Arguments, Config]) -> None:
        arguments, config = prepared
        console = rich.console.Console(highlight=False, markup=False, emoji=False)
        console.print(f"Report: {report_of(arguments.workdir, config)}", soft_wrap=True)

    return command.run(COMMAND, argv, prepare, work)


if __name__ == "__main__":
    sys.exit(main())

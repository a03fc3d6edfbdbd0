"""Predicts the memory, the FLOPs and the least time of a run's programs on TPUs before they are rented.

The programs are compiled by the TPU compiler, which needs no TPU (pip install -e '.[tpu]'). Nothing is run, and of
pretrained models only config.json is read.
"""

from collections.abc import Callable, Mapping
import pathlib
import sys
from typing import Any

import jax
import rich.console

from jaxrl_reason.config import ConfigError
from jaxrl_reason.plan.chips import devices_of
from jaxrl_reason.plan.measure import find_largest, GIB, make_plan
from jaxrl_reason.runs import command, pictures
from jaxrl_reason.runs.files import write_json

_SLICE = "generation and shape of a slice in chips: v5e:4x4, v6e:4x4, v5p:2x2x2, v4:2x2x2, tpu7x:2x2x1, ..."
_SIZES = "prompts_per_step, group_size and max_completion_length"
FLAGS = (
    command.TRAINING[0],
    command.Flag("topology", "NAME", _SLICE, required=True),
    command.Flag("slices", "N", "number of slices (config.mesh.slice)", command.number, 1),
    command.Flag(
        "mean-length", "N", "mean tokens per completion, of skewed lengths; else all have the most", command.number
    ),
    command.Flag("search", "", f"also finds the largest {_SIZES} that fit, each with the others as configured"),
    command.Flag("out", "FILE", "JSON file for the numbers", command.path, "plan.json"),
    command.FIELDS,
)
EXAMPLE = "--config=configs/grpo_qwen3_1_7b_v5e8.py --topology=v5e:2x4 --search"
COMMAND = command.Command("plan", __doc__, FLAGS, EXAMPLE)


def main(argv: list[str] | None = None) -> int:
    """Runs the command and returns its exit code: 0 also if the run does not fit, which is an answer."""
    return command.run(COMMAND, argv, write_plan, lambda plan: print_plan(*plan))


def write_plan(arguments: command.Arguments) -> tuple[dict[str, Any], rich.console.Console, pathlib.Path]:
    """Makes a plan, writes it as JSON and returns the arguments of `print_plan`.

    Raises ConfigError or OSError if a flag or the configuration is invalid, or if the run cannot be planned.
    """
    topology, slices, path = arguments.topology, arguments.slices, pathlib.Path(arguments.out)
    if not slices:
        raise ConfigError("--slices is 0; give the number of slices, at least 1.")
    jax.config.update("jax_platforms", "cpu")  # nothing runs
    if not path.parent.is_dir() or path.is_dir():  # before the minutes that the compiler takes
        raise ConfigError(f"--out is {str(path)!r}; give a file in a directory that exists.")
    config = arguments.configuration()
    mean, most = arguments.mean_length, config.max_completion_length
    if mean is not None and not 1 <= mean <= most:
        raise ConfigError(f"--mean-length is {mean}; it must be between 1 and config.max_completion_length ({most}).")
    devices = devices_of(topology, slices)
    if slices > 1:
        config.mesh.slice = slices
    console = rich.console.Console(highlight=False, markup=False, emoji=False)
    if not console.is_terminal:
        console.width = 140  # a file has no width
    say = lambda text: console.print(text, style="dim")
    plan = make_plan(config, topology, devices, say, mean)
    write_json(path, plan)
    if arguments.search:
        plan["largest"] = find_largest(config, topology, devices, say)
        write_json(path, plan)
    return plan, console, path


def print_plan(plan: Mapping[str, Any], console: rich.console.Console, path: pathlib.Path) -> None:
    """Prints the table of a plan, the least time of a step, the largest sizes that fit, and the path of the JSON file."""
    print_parts(plan, console)
    step = plan["step"]
    console.print(f"Attention: {plan['attention']}. The backward pass computes again (remat): {plan['remat']}.")
    host = plan["host"]
    console.print(
        f"A checkpoint has {host['state_gib']:.2f} GiB per host of {host['chips']} chips. While it is written, the host needs up to "
        f"{host['checkpoint_gib_at_most']:.2f} GiB of its own memory for it.",
        soft_wrap=True,
    )
    too_large = "It does NOT fit: lower the batch, raise update.accumulation, split more, or take larger chips."
    console.print(
        f"{'It fits.' if plan['fits'] else too_large} A step takes at least {step['seconds_at_least']:.3g} s, at most "
        f"{step['completion_tokens_per_second_at_most']:.4g} completion tokens per second. Assumptions:",
        soft_wrap=True,
    )
    for assumption in step["assumptions"]:
        console.print(f"  - {assumption}", soft_wrap=True)
    for name, value in plan.get("largest", {}).items():
        console.print(f"Largest {name} that fits, with the rest as configured: {value or 'none'}")
    console.print(f"Numbers: {path}", soft_wrap=True)


def print_parts(plan: Mapping[str, Any], console: rich.console.Console) -> None:
    """Prints a table of a plan with one column per program."""
    parts = plan["parts"]
    rows: dict[str, list[str]] = {}

    def row(name: str, cell: Callable[[Any], str]) -> None:
        rows[name] = [cell(part) for part in parts]

    row("fits", lambda p: "yes" if p["fits"] else "NO")
    row("memory per chip", lambda p: f"{p['total_gib']:.2f} of {p['limit_gib']} GiB")
    row("  peak of the program", lambda p: f"{p['peak_gib']:.2f}")
    for name in dict.fromkeys(name for p in parts for name in p["filled_gib"]):
        row(f"    {name}", lambda p: f"{p['filled_gib'][name]:.2f}" if name in p["filled_gib"] else "")
    row("  other arrays", lambda p: f"{p['beside_gib']:.2f}")
    row("FLOPs", lambda p: f"{p['flops']:.3g}")
    row("  formula / compiled", lambda p: f"{p['flops_over_hlo']:.3f}" if p.get("flops_over_hlo") else "")
    row("memory traffic", lambda p: f"{p['bytes'] / GIB:.4g} GiB")
    for kind in dict.fromkeys(kind for p in parts for kind in p.get("collectives", ())):
        gib = lambda p: p["collectives"][kind]["gib"] if kind in p.get("collectives", ()) else None
        row(f"{kind} per chip", lambda p: "" if gib(p) is None else f"{gib(p):.3g} GiB")
    row("donation", lambda p: "" if p.get("donation") is None else f"{100 * p['donation']:.0f} %")
    row("seconds at least", lambda p: f"{p['seconds'] * p['times']:.3g}")
    row("  bound by", lambda p: p["bound_by"])
    row("compiled in", lambda p: f"{p['compile_seconds']:.0f} s" + ("" if p["compiled"] else ", too large"))
    title = f"{plan['devices']} x {plan['topology'].partition(':')[0]} ({plan['topology']})"
    columns = {part["name"]: [cells[i] for cells in rows.values()] for i, part in enumerate(parts)}
    pictures.print_table(console, list(rows), columns, title=title)


if __name__ == "__main__":
    sys.exit(main())

"""Predicts the memory, the FLOPs and the least time of a run's programs on TPUs before they are rented.

  python -m jaxrl_reason.plan --config=configs/grpo_qwen3_1_7b_v5e8.py --topology=v5e:2x4 --search

  --topology=NAME        generation and shape of a slice in chips: v5e:4x4, v6e:4x4, v5p:2x2x2, v4:2x2x2, tpu7x:2x2x1, ...
  --slices=N             number of slices (config.mesh.slice); 1 by default
  --search               also find the largest prompts_per_step, group_size and max_completion_length that fit, each with
                         the others as configured
  --out=FILE             JSON file for the numbers; plan.json by default
  --config.field=value   as in training

The programs are compiled by the TPU compiler, which needs no TPU (pip install -e '.[tpu]'). Nothing is run, and of
pretrained models only config.json is read.
"""

from collections.abc import Mapping
import json
import pathlib
import sys
from typing import Any

import jax
import rich.console
import rich.table

from jaxrl_reason import config as config_lib
from jaxrl_reason import models
from jaxrl_reason.config import ConfigError
from jaxrl_reason.plan.chips import devices_of
from jaxrl_reason.plan.measure import find_largest, GIB, make_plan


def main(argv: list[str] | None = None) -> int:
    """Runs the command line and returns the exit code: 0 also if the run does not fit, which is an answer."""
    argv = sys.argv[1:] if argv is None else list(argv)
    if not argv or "--help" in argv or "-h" in argv:
        print(__doc__)
        return 0
    try:
        own, rest = _split_flags(argv)
        write_plan(rest, own["topology"], own["slices"], own["out"], search="--search" in argv)
    except (ConfigError, models.PretrainedError, OSError) as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    return 0


def _split_flags(argv: list[str]) -> tuple[dict[str, str], list[str]]:
    """Returns the values of the plan's own flags, and the flags of the configuration."""
    own, rest, flags = {"topology": "", "slices": "1", "out": "plan.json"}, [], iter(argv)
    for flag in flags:
        name, equals, value = flag.removeprefix("--").partition("=")
        if name in own:
            own[name] = value if equals else next(flags, "")  # --flag value
        elif flag != "--search":
            rest.append(flag)
    return own, rest


def write_plan(config_flags: list[str], topology: str, slices: str, out: str, *, search: bool = False) -> None:
    """Makes a plan, writes it as JSON and prints it.

    Args:
      config_flags: --config=FILE and --config.field=value.
      topology, slices, out, search: the command's flags.

    Raises:
      ConfigError: if a flag or the configuration is invalid, or if the run cannot be planned.
    """
    if not slices.isdigit() or not int(slices):
        raise ConfigError(f"--slices is {slices!r}; give the number of slices, at least 1.")
    jax.config.update("jax_platforms", "cpu")  # nothing runs
    path = pathlib.Path(out).expanduser()
    if not path.parent.is_dir() or path.is_dir():  # before the minutes that the compiler takes
        raise ConfigError(f"--out is {out!r}; give a file in a directory that exists.")
    devices = devices_of(topology, int(slices))
    config, _ = config_lib.parse_args(config_flags)
    if int(slices) > 1:
        config.mesh.slice = int(slices)
    console = rich.console.Console(highlight=False, markup=False)
    if not console.is_terminal:
        console.width = 140  # a file has no width
    say = lambda text: console.print(text, style="dim")
    plan = make_plan(config, topology, devices, say)
    path.write_text(json.dumps(plan, indent=2) + "\n")
    if search:
        plan["largest"] = find_largest(config, topology, devices, say)
        path.write_text(json.dumps(plan, indent=2) + "\n")
    print_plan(plan, console)
    console.print(f"Numbers: {path}", soft_wrap=True)


def print_plan(plan: Mapping[str, Any], console: rich.console.Console) -> None:
    """Prints the table of a plan, the least time of a step and the largest sizes that fit."""
    console.print(table(plan))
    step = plan["step"]
    fits = (
        "It fits."
        if plan["fits"]
        else "It does NOT fit: lower the batch, raise update.accumulation, split more, or take larger chips."
    )
    console.print(
        f"{fits} A step takes at least {step['seconds_at_least']:.3g} s, at most "
        f"{step['completion_tokens_per_second_at_most']:.4g} completion tokens per second. Assumptions:",
        soft_wrap=True,
    )
    for assumption in step["assumptions"]:
        console.print(f"  - {assumption}", soft_wrap=True)
    for name, value in plan.get("largest", {}).items():
        console.print(f"Largest {name} that fits, with the rest as configured: {value or 'none'}")


def table(plan: Mapping[str, Any]) -> rich.table.Table:
    """Returns a table of a plan with one column per program."""
    parts = plan["parts"]
    out = rich.table.Table(title=f"{plan['devices']} x {plan['topology'].partition(':')[0]} ({plan['topology']})")
    out.add_column("", no_wrap=True)
    for part in parts:
        out.add_column(part["name"], justify="right", no_wrap=True)
    row = lambda name, cell: out.add_row(name, *map(cell, parts))
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
    return out


if __name__ == "__main__":
    sys.exit(main())

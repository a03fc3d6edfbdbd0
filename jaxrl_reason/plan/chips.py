"""The TPU generations, and the devices of a slice for compiling only."""

import dataclasses
import importlib.util
import math
import os
import re
from typing import Any

import jax
from jax.experimental import topologies

from jaxrl_reason.config import ConfigError


@dataclasses.dataclass(frozen=True)
class Chip:
    """One device of a TPU generation, from its data sheet."""

    hbm: float  # GiB that the compiler gives to a program
    flops: float  # bfloat16, per second
    bandwidth: float  # memory, bytes per second
    links: float  # bytes per second to the other chips of the slice in one direction, all links together


CHIPS = {
    "v2": Chip(7.48, 46e12 / 2, 700e9 / 2, 248e9 / 2),  # two devices per chip
    "v3": Chip(15.48, 123e12 / 2, 900e9 / 2, 328e9 / 2),
    "v4": Chip(30.75, 275e12, 1228e9, 300e9),
    "v5e": Chip(15.75, 197e12, 819e9, 200e9),
    "v5p": Chip(95.73, 459e12, 2765e9, 600e9),
    "v6e": Chip(31.24, 918e12, 1640e9, 400e9),
    "tpu7x": Chip(94.74, 2307e12 / 2, 7370e9 / 2, 600e9 / 2),  # two devices per chip
}


def chip_of(topology: str) -> Chip:
    """Returns the chip of a topology such as "v5e:4x4"."""
    return CHIPS[topology.partition(":")[0]]


def devices_of(topology: str, slices: int = 1) -> list[jax.Device]:
    """Returns the devices of slices such as "v5e:4x4" (in chips). Programs can be compiled for them, nothing can run.

    Raises ConfigError if no such slice exists, or if libtpu is not installed.
    """
    kind, _, shape = topology.partition(":")
    if kind not in CHIPS or not re.fullmatch(r"\w+:\d+(x\d+)+", topology):
        raise ConfigError(
            f"--topology is {topology!r}; give a generation and the shape of a slice in chips, such as v5e:4x4 or "
            f"v5p:2x2x2. Generations are {', '.join(CHIPS)}."
        )
    if importlib.util.find_spec("libtpu") is None:
        raise ConfigError(
            "The compiler for TPUs (libtpu) is not installed. It needs no TPU: pip install 'jaxrl_reason[tpu]' "
            "(from a clone: pip install -e '.[tpu]')."
        )
    # libtpu searches for a TPU unless it is told the type, and locks itself against a second process.
    quiet = {"TPU_ACCELERATOR_TYPE": "v5litepod-4", "TPU_WORKER_HOSTNAMES": "localhost", "TPU_LOG_DIR": "disabled"}
    for name, value in (quiet | {"ALLOW_MULTIPLE_LIBTPU_LOAD": "true"}).items():
        os.environ.setdefault(name, value)
    options: dict[str, Any] = {"num_slices": slices} if slices > 1 else {}
    if kind == "v4":
        options["chip_config_name"] = "megacore"  # one device per chip
    if math.prod(map(int, shape.split("x"))) == 1:
        options["chips_per_host_bounds"] = (1, 1, 1)
    try:
        return list(topologies.get_topology_desc(platform="tpu", topology_name=topology, **options).devices)
    except Exception as e:  # libtpu has no exception class of its own for an unknown shape
        raise ConfigError(f"libtpu knows no slice --topology={topology} with --slices={slices}: {first_line(e)}") from e


def first_line(error: Exception) -> str:
    """Returns at most 300 characters of the first line of an error, or the name of its class if it has no text."""
    return str(error).strip().partition("\n")[0][:300] or type(error).__name__

"""Derives the work of a compiled program on each device from its text: products, collectives, kernels.

`Compiled.cost_analysis()` counts the body of a loop once: a scan over 36 layers counts as one layer. Here every
computation is walked from the entry, and the contents of a loop are multiplied by its trips. The trips are the
compiler's own count if the text has one (CPU), else they are derived from the loop's condition, start and step (TPU).
If the condition depends on data, as in decoding, the caller gives the trips.

Counted are `dot` and `convolution` instructions, to which matrix products are compiled. Elementwise work and the
inside of custom calls (Pallas kernels) are not counted. On TPU matrix products are convolutions whose batch dimensions
are windows over padding: only positions of the input count. The compiler writes very narrow products as a
multiplication and a sum. They are counted separately, in `reduced_flops`.
"""

from collections.abc import Mapping
import dataclasses
import functools
import math
import re
from typing import NamedTuple

import numpy as np

from jaxrl_reason.plan import hlo_text
from jaxrl_reason.plan.hlo_loops import Later, Loop, Trips
from jaxrl_reason.plan.hlo_text import Computation, dims, Instruction

COLLECTIVES = (
    *("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all"),
    *("collective-permute", "collective-broadcast", "send", "recv"),
)


class Collective(NamedTuple):
    """Collectives of one kind on one device, over a whole run of the program.

    `bytes` is of the result for all-gather and recv, of the operands for the others. If a collective has a whole and a
    part, it is the whole. A ring of n devices moves (n - 1) / n of it through each link, an all-reduce twice that.
    """

    executions: float
    bytes: float


class CustomCall(NamedTuple):
    """Calls of code that the text does not show."""

    name: str  # of a Pallas kernel, else the target
    target: str  # the function that XLA calls: "tpu_custom_call" for Pallas kernels on TPU
    operands: tuple[str, ...]  # shapes as in the text, without layout: ("bf16[2,4,512,128]", ...)
    executions: float


@dataclasses.dataclass(frozen=True)
class Program:
    """One run of a compiled program on one device."""

    flops: float  # of matrix products and convolutions, two per multiply-add
    # Of products that were compiled to a multiplication of two different arrays and a sum: matrix products with few
    # rows (decoding on one prompt), and sums of squares and of weighted terms, of which every model has a few.
    reduced_flops: float
    collectives: dict[str, Collective]  # by kind, see `COLLECTIVES`
    custom_calls: tuple[CustomCall, ...]  # by name and operands
    # Name -> most trips that the condition allows (or None), for loops whose length depends on data. The numbers above
    # assume that they run `loop_trips` times.
    unknown_loops: dict[str, int | None]


def read(text: str, *, loop_trips: Mapping[str, int] | int | None = None, unlimited: int = 1) -> Program:
    """Returns the work of an executable from its text, for CPU or TPU. Branches of a conditional count
    equally if all have FLOPs, as those that read more and more pieces of a cache; else the branch with most FLOPs counts.

    `loop_trips` are the trips of the loops of unknown length, one number for all or one per name. Loops without a number
    run as often as their condition allows, and `unlimited` times if it gives no limit. Raises ValueError if the text is not a compiled
    program's, or if `loop_trips` names a loop that does not exist or whose length is known.
    """
    computations, entry = hlo_text.parse(text)
    walk = _Walk(computations, loop_trips, unlimited)
    total = walk.computation(entry, ())
    if isinstance(loop_trips, Mapping):
        strange = [name for name in loop_trips if name.removeprefix("%") not in walk.unknown]
        if strange:
            raise ValueError(
                f"loop_trips names {strange[0]!r}, which is no loop of unknown length in this program. Loops of unknown "
                f"length: {', '.join(sorted(walk.unknown)) or 'none'}."
            )
    calls = tuple(CustomCall(*key, count) for key, count in total.calls.items())
    collectives = {kind: total.moved[kind] for kind in COLLECTIVES if kind in total.moved}
    return Program(total.flops, total.reduced, collectives, calls, dict(walk.unknown))


@dataclasses.dataclass
class _Tally:
    """Sums over a computation."""

    flops: float = 0.0
    reduced: float = 0.0
    moved: dict[str, Collective] = dataclasses.field(default_factory=dict)
    calls: dict[tuple[str, str, tuple[str, ...]], float] = dataclasses.field(default_factory=dict)
    # TPU spreads collectives over a chain of fusions, each of which repeats the instruction. Their kind and bytes count
    # once in the computation that runs the chain.
    chained: dict[tuple[str, str, str | None], tuple[str, float]] = dataclasses.field(default_factory=dict)

    def add(self, other: "_Tally", times: float = 1.0) -> None:
        self.flops += times * other.flops
        self.reduced += times * other.reduced
        for kind, collective in other.moved.items():
            self.move(kind, collective, times)
        for key, count in other.calls.items():
            self.calls[key] = self.calls.get(key, 0.0) + times * count
        self.chained.update(other.chained)

    def move(self, kind: str, more: Collective, times: float = 1.0) -> None:
        old = self.moved.get(kind, Collective(0.0, 0.0))
        self.moved[kind] = Collective(old.executions + times * more.executions, old.bytes + times * more.bytes)

    def close(self) -> None:
        for kind, size in self.chained.values():
            self.move(kind, Collective(1.0, size))
        self.chained = {}


class _Walk:
    def __init__(
        self, computations: Mapping[str, Computation], loop_trips: Mapping[str, int] | int | None, unlimited: int
    ):
        self.computations, self.loop_trips, self.unlimited = computations, loop_trips, unlimited
        self.unknown: dict[str, int | None] = {}
        self._trips_of = Trips(computations).of
        self._fused: dict[str, _Tally] = {}

    def computation(self, name: str, arguments: tuple[Later | Loop, ...]) -> _Tally:
        """Returns the work of one run of a computation. `arguments` are the known values of its parameters."""
        tally = self._open_tally(name, arguments)
        tally.close()
        return tally

    def _instruction(self, tally: _Tally, within: str, i: Instruction, arguments: tuple[Later | Loop, ...]) -> None:
        later = lambda: tuple(Later(within, operand, arguments) for operand in i.operands)
        kind = i.opcode.removesuffix("-start")
        if i.opcode == "while":
            loop = Loop(later()[0], i.required("body").removeprefix("%"))
            tally.add(self.computation(loop.body, (loop,)), self._trips(i, loop))
        elif i.opcode == "conditional":
            branches = [self.computation(name, ()) for name in i.called()]
            if all(branch.flops for branch in branches):
                for branch in branches:
                    tally.add(branch, 1 / len(branches))
            else:
                tally.add(max(branches, key=lambda branch: branch.flops))
        elif i.opcode in ("call", "async-start"):
            for name in i.called():
                tally.add(self.computation(name, later()))
        elif i.opcode == "fusion":
            for name in i.called():
                tally.add(self._fusion(name))
        elif kind in COLLECTIVES:
            self._collective(tally, within, i, kind)
        elif i.opcode == "custom-call":
            target = (i.attribute("custom_call_target") or "").strip('"')
            operands = tuple(array for shape in self._shapes(within, i) if (array := hlo_text.array_in(shape)))
            key = _kernel_name(i) if "tpu_custom_call" == target else target, target, operands
            tally.calls[key] = tally.calls.get(key, 0.0) + 1
        elif i.opcode == "dot":
            tally.flops += self._dot(within, i)
        elif i.opcode == "convolution":
            tally.flops += self._convolution(within, i)
        elif i.opcode == "reduce":
            tally.reduced += self._reduced(within, i)

    def _fusion(self, name: str) -> _Tally:
        """Like `computation`, once per fused computation; chains of collectives stay open."""
        if name not in self._fused:
            self._fused[name] = self._open_tally(name, ())
        return self._fused[name]

    def _open_tally(self, name: str, arguments: tuple[Later | Loop, ...]) -> _Tally:
        tally = _Tally()
        for instruction in self.computations[name].instructions.values():
            self._instruction(tally, name, instruction, arguments)
        return tally

    def _trips(self, i: Instruction, loop: Loop) -> int:
        known = re.search(r'"known_trip_count":\{"n":"(\d+)"', i.attributes)
        if known:
            return int(known[1])
        most, exact = self._trips_of(loop, i.required("condition").removeprefix("%"))
        if exact and most is not None:
            return most
        self.unknown[i.name] = most
        given = self.loop_trips
        if isinstance(given, Mapping):
            given = {name.removeprefix("%"): trips for name, trips in given.items()}.get(i.name)
        return given if given is not None else self.unlimited if most is None else most

    def _shapes(self, within: str, i: Instruction) -> list[str]:
        """Returns the operands' shapes; "" for an operand that is not in the computation."""
        instructions = self.computations[within].instructions
        return [instructions[name].shape if name in instructions else "" for name in i.operands]

    def _dot(self, within: str, i: Instruction) -> float:
        lhs = dims(self._shapes(within, i)[0])
        contracted = math.prod(lhs[axis] for axis in i.numbers("lhs_contracting_dims"))
        return 2.0 * math.prod(dims(i.shape)) * contracted

    def _convolution(self, within: str, i: Instruction) -> float:
        lhs, rhs = (dims(shape) for shape in self._shapes(within, i))
        out = dims(i.shape)
        lhs_labels, rhs_labels, out_labels = re.split(r"_|->", i.required("dim_labels"))
        window = {}
        for part in (i.attribute("window") or "").split():
            key, value = part.split("=")
            window[key] = [tuple(map(int, v.split("_"))) for v in value.split("x")]
        products = 1.0
        for axis, label in enumerate(sorted(label for label in out_labels if label.isdigit())):
            sizes = (x[labels.index(label)] for x, labels in ((rhs, rhs_labels), (lhs, lhs_labels), (out, out_labels)))
            defaults = {"stride": 1, "pad": 0, "lhs_dilate": 1, "rhs_dilate": 1}
            products *= _meetings(*sizes, *(window[k][axis][0] if k in window else x for k, x in defaults.items()))
        # The kernel's shape has the input features of one group, and the result's shape the rows of one batch group.
        features = rhs[rhs_labels.index("i")] * rhs[rhs_labels.index("o")]
        return 2.0 * products * features * out[out_labels.index("b")]

    def _reduced(self, within: str, i: Instruction) -> float:
        """Returns the FLOPs of a sum of products of two different arrays, 0 for other reductions."""
        instructions = self.computations[within].instructions
        applied = self.computations[i.required("to_apply").removeprefix("%")]
        source = instructions.get(i.operands[0])
        while source is not None and source.opcode in ("convert", "bitcast", "copy", "reshape", "transpose"):
            source = instructions.get(source.operands[0])
        if source is None or source.opcode != "multiply" or applied.instructions[applied.root].opcode != "add":
            return 0.0
        return 2.0 * math.prod(dims(source.shape)) if source.operands[0] != source.operands[1] else 0.0

    def _collective(self, tally: _Tally, within: str, i: Instruction, kind: str) -> None:
        if "is_host_transfer=true" in i.attributes:
            return
        operands = sum(hlo_text.bytes_of(shape) for shape in self._shapes(within, i))
        size = operands
        if kind == "recv":  # a tuple of the array, a number and a token
            size = hlo_text.bytes_of(hlo_text.array_in(i.shape.lstrip("(")) or "")
        elif kind == "all-gather":  # the shape of a start holds operands and results
            size = hlo_text.bytes_of(i.shape) - (operands if i.opcode.endswith("-start") else 0.0)
        if kind == "all-reduce" and "all-reduce-scatter" in within:
            kind = "reduce-scatter"  # TPU fuses the reduction with the slice that follows
        chain = re.search(r'chain_id="(\d+)"', i.attributes)
        if chain:
            tally.chained[kind, chain[1], i.attribute("channel_id")] = kind, size
        else:
            tally.move(kind, Collective(1.0, size))


def _kernel_name(i: Instruction) -> str:
    """Returns the name of a Pallas kernel. Its instruction has the same name, followed by a number."""
    named = re.search(r'op_name="[^"]*?([^/"]+)/pallas_call', i.attributes)
    return named[1] if named else re.sub(r"\.\d+$", "", i.name)


@functools.cache
def _meetings(kernel: int, size: int, out: int, stride: int, pad: int, lhs_dilate: int, rhs_dilate: int) -> int:
    """Returns the pairs of an output and a kernel position, along one axis, that meet an input element."""
    # Padding and the holes between dilated elements are no input elements.
    starts = np.arange(out) * stride - pad
    inside = lambda at: int(((at >= 0) & (at < size * lhs_dilate) & (at % lhs_dilate == 0)).sum())
    return sum(inside(starts + k * rhs_dilate) for k in range(kernel))

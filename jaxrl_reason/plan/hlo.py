"""What a compiled program does on each device, read from its text: products, collectives, kernels, loops with their trip counts.

`Compiled.cost_analysis()` counts the body of a loop once, which for a scan over 36 layers is off by 36. Here every computation is walked from
the entry, and what a loop holds is multiplied by the number of times it runs: the compiler's own count where the text has one (CPU), else
derived from the loop's condition, start and step (TPU). A loop whose condition depends on data, as that of decoding, is given by the caller.

What is counted: `dot` and `convolution` instructions, which is what matrix products are after compilation. Element by element work is not, nor
is what a custom call (a Pallas kernel) does inside. On TPU matrix products are convolutions whose batch dimensions are windows over mostly
padding: only positions that exist count. Products so narrow that the compiler writes them as a multiplication and a sum are counted apart, in
`reduced_flops`.
"""

from collections.abc import Iterator, Mapping
import dataclasses
import functools
import math
import re
from typing import Any, NamedTuple

import numpy as np

COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
    "send",
    "recv",
)


class Collective(NamedTuple):
    """Collectives of one kind on one device, over a whole run of the program.

    Attributes:
      count: how many are executed.
      bytes: their arrays' bytes, the whole one where a collective has a whole and a part: what is gathered for all-gather, what goes in for
        the others, what arrives for recv. A ring of n devices moves (n - 1) / n of it through each link, an all-reduce twice that.
    """

    count: float
    bytes: float


class CustomCall(NamedTuple):
    """Calls of code that the text does not show.

    Attributes:
      name: the kernel's for Pallas kernels, else the target.
      target: what XLA calls, "tpu_custom_call" for Pallas kernels on TPU.
      operands: shapes as in the text, without layout: ("bf16[2,4,512,128]", ...).
      count: how many are executed on one device.
    """

    name: str
    target: str
    operands: tuple[str, ...]
    count: float


@dataclasses.dataclass(frozen=True)
class Program:
    """One run of a compiled program on one device.

    Attributes:
      flops: of matrix products and convolutions, two a multiply-add.
      reduced_flops: of products that were compiled to a multiplication of two different arrays and a sum, two a multiply-add. Matrix products
        with few rows among them (decoding on one prompt), but sums of squares and of weighted terms too, of which every model has a few.
      collectives: by kind, see `COLLECTIVES`.
      custom_calls: by name and operands.
      unknown_loops: loops that run as often as the data say: their names, each with the most trips that their condition allows, or None. In
        `flops` and the others they run `loop_trips` times.
    """

    flops: float
    reduced_flops: float
    collectives: dict[str, Collective]
    custom_calls: tuple[CustomCall, ...]
    unknown_loops: dict[str, int | None]


def read(text: str, *, loop_trips: Mapping[str, int] | int | None = None) -> Program:
    """Reads an executable's text.

    Of a conditional, the branch with most FLOPs counts.

    Args:
      text: `jax.stages.Compiled.as_text()`, for CPU or TPU.
      loop_trips: how often loops of unknown length run: one number for all, or one by name. None, and loops that are not named: as often as
        their condition allows, once where it does not say.

    Raises:
      ValueError: the text is not a compiled program's; or `loop_trips` names a loop that is not there or whose length is known.
    """
    computations, entry = _parse(text)
    walk = _Walk(computations, loop_trips)
    total = walk.computation(entry, ())
    if isinstance(loop_trips, Mapping):
        strange = [name for name in loop_trips if name.removeprefix("%") not in walk.unknown]
        if strange:
            raise ValueError(
                f"loop_trips names {strange[0]!r}, which is no loop of unknown length in this program; those are: "
                f"{', '.join(sorted(walk.unknown)) or 'none'}."
            )
    calls = tuple(CustomCall(*key, count) for key, count in total.calls.items())
    collectives = {kind: Collective(*total.moved[kind]) for kind in COLLECTIVES if kind in total.moved}
    return Program(total.flops, total.reduced, collectives, calls, dict(walk.unknown))


# -- the text ------------------------------------------------------------------------------------------------------------------------------


class _Instruction(NamedTuple):
    name: str
    shape: str
    opcode: str
    operands: tuple[str, ...]  # names, or the literal of a constant, or the number of a parameter
    attributes: str


class _Computation(NamedTuple):
    name: str
    instructions: dict[str, _Instruction]
    root: str


_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_END = re.compile(r"^\}(, execution_thread=.*)?$")  # what other cores than the tensor core run says so
_START = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = ")
_ARRAY = re.compile(r"\b([a-z]+\d*\w*)\[([\d,<= ]*)\]")


def _parse(text: str) -> tuple[dict[str, _Computation], str]:
    """The computations by name, and the name of the entry."""
    computations, entry = {}, None
    name, instructions, root, lines = None, {}, None, []

    def finish():
        if lines:
            instruction = _instruction(" ".join(lines))
            instructions[instruction.name] = instruction
            lines.clear()

    for line in text.splitlines():
        if name is None:
            header = _HEADER.match(line)
            if header:
                name, instructions, root = header[2], {}, None
                entry = name if header[1] else entry
        elif _END.match(line):
            finish()
            if root is None:
                raise ValueError(f"Computation {name!r} of the program's text has no ROOT instruction.")
            computations[name] = _Computation(name, instructions, root)
            name = None
        else:
            start = _START.match(line)
            if start:
                finish()
                root = start[2] if start[1] else root
            if start or lines:  # attributes can run over several lines
                lines.append(line.strip())
    if entry is None:
        raise ValueError("This text has no ENTRY computation; give what jax.stages.Compiled.as_text() returns.")
    return computations, entry


def _instruction(line: str) -> _Instruction:
    """`[ROOT] %name = shape opcode(operands), attributes`."""
    name, rest = line.removeprefix("ROOT ").split(" = ", 1)
    rest = re.sub(r"/\*.*?\*/", "", rest)
    end = _closing(rest) if rest.startswith("(") else rest.index(" ")
    shape, rest = rest[:end].strip(), rest[end:].strip()
    opcode, rest = rest.split("(", 1)
    end = _closing("(" + rest) - 2
    inside, attributes = rest[:end], rest[end + 1 :]
    if opcode in ("constant", "parameter"):
        operands = (inside,)
    else:  # each is `%name`, or `shape %name`
        operands = tuple(part.split(" ")[-1].removeprefix("%") for part in _split(inside))
    return _Instruction(name.removeprefix("%"), shape, opcode, operands, attributes)


def _closing(text: str) -> int:
    """The place behind the bracket that closes the one at the start."""
    depth = 0
    for match in re.finditer(r"[()]", text):
        depth += 1 if match[0] == "(" else -1
        if not depth:
            return match.end()
    raise ValueError(f"A bracket is not closed in {text[:80]!r}.")


def _split(text: str) -> Iterator[str]:
    """By the commas that stand in no bracket."""
    depth, begin = 0, 0
    for match in re.finditer(r"[()\[\]{},]", text):
        if match[0] != ",":
            depth += 1 if match[0] in "([{" else -1
        elif not depth:
            yield text[begin : match.start()].strip()
            begin = match.end()
    if text[begin:].strip():
        yield text[begin:].strip()


def _attribute(attributes: str, name: str) -> str | None:
    """The value of `name=value` or `name={value}`."""
    match = re.search(rf"(?:^|[,\s]){name}=(?:\{{([^}}]*)\}}|([^\s,]+))", attributes)
    return None if match is None else match[1] if match[1] is not None else match[2]


def _numbers(attributes: str, name: str) -> list[int]:
    return [int(x) for x in (_attribute(attributes, name) or "").split(",") if x.strip()]


def _dims(shape: str) -> tuple[int, ...]:
    """Of an array."""
    match = _ARRAY.match(shape)
    if match is None:
        raise ValueError(f"{shape!r} is not the shape of an array.")
    return tuple(int(x.strip().removeprefix("<=")) for x in match[2].split(",") if x.strip())


def _bytes(shape: str) -> float:
    """Of an array or of all arrays of a tuple. Tokens and other opaque things have none."""
    total = 0.0
    for dtype, dims in _ARRAY.findall(shape):
        bits = 8 if dtype == "pred" else int((re.search(r"\d+", dtype) or [0])[0])
        total += bits / 8 * math.prod(int(x.strip().removeprefix("<=")) for x in dims.split(",") if x.strip())
    return total


# -- the walk ------------------------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class _Tally:
    """Sums of what a computation does.

    Attributes:
      flops, reduced: see `Program`.
      moved: kind -> [count, bytes].
      calls: (name, target, operands) -> count.
      chained: collectives that TPU spreads over a chain of fusions, each of which repeats the instruction: key -> (kind, bytes). Counted
        once in the computation that the chain runs in.
    """

    flops: float = 0.0
    reduced: float = 0.0
    moved: dict[str, list[float]] = dataclasses.field(default_factory=dict)
    calls: dict[tuple, float] = dataclasses.field(default_factory=dict)
    chained: dict[tuple, tuple[str, float]] = dataclasses.field(default_factory=dict)

    def add(self, other: "_Tally", times: float = 1.0) -> None:
        self.flops += times * other.flops
        self.reduced += times * other.reduced
        for kind, (count, size) in other.moved.items():
            self.move(kind, size, count, times)
        for key, count in other.calls.items():
            self.calls[key] = self.calls.get(key, 0.0) + times * count
        self.chained.update(other.chained)

    def move(self, kind: str, size: float, count: float = 1.0, times: float = 1.0) -> None:
        sums = self.moved.setdefault(kind, [0.0, 0.0])
        sums[0] += times * count
        sums[1] += times * size

    def close(self) -> None:
        for kind, size in self.chained.values():
            self.move(kind, size)
        self.chained = {}


class _Slot(NamedTuple):
    """An integer in a loop's state: element `index` at the start of a trip, plus `offset`."""

    loop: "_Loop"
    index: int
    offset: int


class _Later(NamedTuple):
    """A value that is looked at when it is needed: an instruction of a computation that was called with `arguments`."""

    computation: str
    name: str
    arguments: tuple


@dataclasses.dataclass(frozen=True, eq=False)
class _Loop:
    """The state of a running while loop; `start` is what it begins with, `body` the computation that changes it."""

    start: _Later
    body: str


class _Walk:
    """One reading of a program; see `read`."""

    def __init__(self, computations, loop_trips):
        self.computations = computations
        self.loop_trips = loop_trips
        self.unknown: dict[str, int | None] = {}
        self._fused = {}

    def computation(self, name: str, arguments: tuple) -> _Tally:
        """What one run of a computation does. `arguments` are what is known of its parameters."""
        tally = _Tally()
        for instruction in self.computations[name].instructions.values():
            self._instruction(tally, name, instruction, arguments)
        tally.close()
        return tally

    def _instruction(self, tally, where, i: _Instruction, arguments):
        later = lambda: tuple(_Later(where, operand, arguments) for operand in i.operands)
        kind = i.opcode.removesuffix("-start")
        if i.opcode == "while":
            condition, body = _attribute(i.attributes, "condition"), _attribute(i.attributes, "body")
            loop = _Loop(later()[0], body.removeprefix("%"))
            trips = self._trips(i, loop, condition.removeprefix("%"))
            tally.add(self.computation(loop.body, (loop,)), trips)
        elif i.opcode == "conditional":
            branches = [self.computation(name, ()) for name in _called(i.attributes)]
            tally.add(max(branches, key=lambda branch: branch.flops))
        elif i.opcode in ("call", "async-start"):
            for name in _called(i.attributes):
                tally.add(self.computation(name, later()))
        elif i.opcode == "fusion":
            for name in _called(i.attributes):
                tally.add(self._fusion(name))
        elif kind in COLLECTIVES:
            self._collective(tally, where, i, kind)
        elif i.opcode == "custom-call":
            target = (_attribute(i.attributes, "custom_call_target") or "").strip('"')
            operands = tuple(_ARRAY.match(shape)[0] for shape in self._shapes(where, i) if _ARRAY.match(shape))
            key = _kernel_name(i) if "tpu_custom_call" == target else target, target, operands
            tally.calls[key] = tally.calls.get(key, 0.0) + 1
        elif i.opcode == "dot":
            tally.flops += self._dot(where, i)
        elif i.opcode == "convolution":
            tally.flops += self._convolution(where, i)
        elif i.opcode == "reduce":
            tally.reduced += self._reduced(where, i)

    def _fusion(self, name):
        """As `computation`, once for each fused computation; chains of collectives stay open."""
        if name not in self._fused:
            tally = _Tally()
            for instruction in self.computations[name].instructions.values():
                self._instruction(tally, name, instruction, ())
            self._fused[name] = tally
        return self._fused[name]

    def _shapes(self, where, i):
        """The operands' shapes; operands that are not there have none."""
        instructions = self.computations[where].instructions
        return [instructions[name].shape if name in instructions else "" for name in i.operands]

    # -- products

    def _dot(self, where, i):
        lhs = _dims(self._shapes(where, i)[0])
        contracted = math.prod(lhs[axis] for axis in _numbers(i.attributes, "lhs_contracting_dims"))
        return 2.0 * math.prod(_dims(i.shape)) * contracted

    def _convolution(self, where, i):
        lhs, rhs = (_dims(shape) for shape in self._shapes(where, i))
        out = _dims(i.shape)
        lhs_labels, rhs_labels, out_labels = re.split(r"_|->", _attribute(i.attributes, "dim_labels"))
        window = {}
        for part in (_attribute(i.attributes, "window") or "").split():
            key, value = part.split("=")
            window[key] = [tuple(map(int, v.split("_"))) for v in value.split("x")]
        products = 1.0
        for place, label in enumerate(sorted(label for label in out_labels if label.isdigit())):
            one = lambda key, default: window[key][place] if key in window else default
            products *= _meetings(
                rhs[rhs_labels.index(label)],
                lhs[lhs_labels.index(label)],
                out[out_labels.index(label)],
                one("stride", (1,))[0],
                one("pad", (0, 0))[0],
                one("lhs_dilate", (1,))[0],
                one("rhs_dilate", (1,))[0],
            )
        # The kernel's input features are those of one group already, and so are the result's rows of one batch group.
        features = rhs[rhs_labels.index("i")] * rhs[rhs_labels.index("o")]
        return 2.0 * products * features * out[out_labels.index("b")]

    def _reduced(self, where, i):
        """Of a sum of products of two different arrays: a product of matrices, where no dot is left."""
        instructions = self.computations[where].instructions
        applied = _attribute(i.attributes, "to_apply").removeprefix("%")
        applied = self.computations[applied]
        source = instructions.get(i.operands[0])
        while source is not None and source.opcode in ("convert", "bitcast", "copy", "reshape", "transpose"):
            source = instructions.get(source.operands[0])
        if source is None or source.opcode != "multiply" or applied.instructions[applied.root].opcode != "add":
            return 0.0
        return 2.0 * math.prod(_dims(source.shape)) if source.operands[0] != source.operands[1] else 0.0

    # -- collectives

    def _collective(self, tally, where, i, kind):
        ins = sum(_bytes(shape) for shape in self._shapes(where, i))
        if "is_host_transfer=true" in i.attributes:
            return
        if kind == "recv":
            size = _bytes(_ARRAY.search(i.shape)[0])  # beside it stand a number and a token
        elif kind == "all-gather":
            size = _bytes(i.shape) - (ins if i.opcode.endswith("-start") else 0.0)  # a pair's shape holds both sides
        else:
            size = ins
        if kind == "all-reduce" and "all-reduce-scatter" in where:
            kind = "reduce-scatter"  # TPU's fusion of the reduction with the slice that follows
        chain = re.search(r'chain_id="(\d+)"', i.attributes)
        if chain:
            tally.chained[kind, chain[1], _attribute(i.attributes, "channel_id")] = kind, size
        else:
            tally.move(kind, size)

    # -- loops

    def _trips(self, i, loop, condition):
        known = re.search(r'"known_trip_count":\{"n":"(\d+)"', i.attributes)
        if known:
            return int(known[1])
        at = self.computations[condition]
        most, exact = self._limit(loop, _Later(condition, at.root, (loop,)))
        if exact:
            return most
        self.unknown[i.name] = most
        given = self.loop_trips
        if isinstance(given, Mapping):
            given = {name.removeprefix("%"): trips for name, trips in given.items()}.get(i.name)
        return given if given is not None else 1 if most is None else most

    def _limit(self, loop: _Loop, at: _Later) -> tuple[int | None, bool]:
        """The most trips while a condition holds, and whether it holds exactly so long."""
        i = self.computations[at.computation].instructions[at.name]
        if i.opcode in _SAME:
            return self._limit(loop, at._replace(name=i.operands[0]))
        if i.opcode == "fusion":
            return self._limit(loop, self._inside(i, at))
        if i.opcode == "and":
            sides = [self._limit(loop, at._replace(name=name)) for name in i.operands]
            limits = [most for most, _ in sides if most is not None]
            return min(limits, default=None), all(exact for _, exact in sides)
        if i.opcode == "compare":
            direction = _attribute(i.attributes, "direction")
            left, right = (self._value(at._replace(name=name)) for name in i.operands)
            if isinstance(right, _Slot):
                left, right = right, left
                direction = {"LT": "GT", "GT": "LT", "LE": "GE", "GE": "LE"}.get(direction, direction)
            trips = self._counted(loop, left, direction, right)
            return trips, trips is not None
        return None, False

    def _counted(self, loop, slot, direction, limit):
        """Trips while `slot` stands in `direction` to the constant `limit`; None where it cannot be said."""
        if not isinstance(slot, _Slot) or slot.loop is not loop or not isinstance(limit, int):
            return None
        start, step = self._element(loop.start, slot.index), self._step(loop, slot.index)
        if not isinstance(start, int) or not step:
            return None
        start += slot.offset
        if direction in ("LE", "GE"):
            limit += 1 if direction == "LE" else -1
        if direction == "NE":
            return (limit - start) // step if (limit - start) % step == 0 and (limit - start) // step >= 0 else None
        if (step > 0) != (direction in ("LT", "LE")) or direction == "EQ":
            return None
        return max(0, -(-(limit - start) // step))

    def _step(self, loop, index):
        """What a trip adds to an element of the state, or None."""
        body = self.computations[loop.body]
        after = self._element(_Later(loop.body, body.root, (loop,)), index)
        return after.offset if isinstance(after, _Slot) and after[:2] == (loop, index) else None

    def _inside(self, i, at: _Later) -> _Later:
        """The root of what a fusion or a call runs."""
        inner = self.computations[_called(i.attributes)[0]]
        return _Later(inner.name, inner.root, tuple(at._replace(name=name) for name in i.operands))

    def _value(self, at: Any) -> int | _Slot | _Loop | None:
        """An integer, an element of a loop's state or a loop's state; None for anything else."""
        if not isinstance(at, _Later):
            return at
        i = self.computations[at.computation].instructions.get(at.name)
        if i is None:
            return None
        if i.opcode == "constant":
            return int(i.operands[0]) if re.fullmatch(r"-?\d+", i.operands[0]) else None
        if i.opcode == "parameter":
            number = int(i.operands[0])
            return self._value(at.arguments[number]) if number < len(at.arguments) else None
        if i.opcode == "get-tuple-element":
            return self._element(at._replace(name=i.operands[0]), int(_attribute(i.attributes, "index")))
        if i.opcode in _SAME:
            return self._value(at._replace(name=i.operands[0]))
        if i.opcode in ("fusion", "call"):
            return self._value(self._inside(i, at))
        if i.opcode in ("add", "subtract"):
            left, right = (self._value(at._replace(name=name)) for name in i.operands)
            if i.opcode == "add" and isinstance(left, int):
                left, right = right, left
            if not isinstance(right, int):
                return None
            right = right if i.opcode == "add" else -right
            if isinstance(left, _Slot):
                return left._replace(offset=left.offset + right)
            return left + right if isinstance(left, int) else None
        return None

    def _element(self, at: Any, index: int):
        """The value of an element of a tuple."""
        if isinstance(at, _Later):
            i = self.computations[at.computation].instructions.get(at.name)
            if i is not None and i.opcode == "tuple":
                return self._value(at._replace(name=i.operands[index]))
            if i is not None and i.opcode in ("fusion", "call"):
                return self._element(self._inside(i, at), index)
            if i is not None and i.opcode in _SAME:
                return self._element(at._replace(name=i.operands[0]), index)
            if i is not None and i.opcode == "parameter" and int(i.operands[0]) < len(at.arguments):
                return self._element(at.arguments[int(i.operands[0])], index)
            return None
        if isinstance(at, _Loop):
            slot = _Slot(at, index, 0)
            return self._unchanged(slot)
        return None

    def _unchanged(self, slot: _Slot):
        """What an element of a loop's state was at the start, where no trip changes it; else the element."""
        body = self.computations[slot.loop.body]
        root = body.instructions[body.root]
        if root.opcode != "tuple":
            return slot
        kept = body.instructions.get(root.operands[slot.index])
        if (
            kept is None
            or kept.opcode != "get-tuple-element"
            or int(_attribute(kept.attributes, "index")) != slot.index
        ):
            return slot
        state = body.instructions[kept.operands[0]]
        if state.opcode != "parameter":
            return slot
        start = self._element(slot.loop.start, slot.index)
        return slot if start is None else start


# Whose value is that of the first operand, as far as an integer is concerned.
_SAME = ("bitcast", "copy", "convert", "reshape", "copy-start", "copy-done", "optimization-barrier")


def _called(attributes: str) -> list[str]:
    """Names of the computations that an instruction runs."""
    for name in ("calls", "to_apply", "branch_computations", "called_computations"):
        value = _attribute(attributes, name)
        if value:
            return [part.strip().removeprefix("%") for part in value.split(",")]
    both = [_attribute(attributes, name) for name in ("true_computation", "false_computation")]
    return [name.removeprefix("%") for name in both if name]


def _kernel_name(i: _Instruction) -> str:
    """A Pallas kernel's: its instruction is called after it, with a number behind."""
    named = re.search(r'op_name="[^"]*?([^/"]+)/pallas_call', i.attributes)
    return named[1] if named else re.sub(r"\.\d+$", "", i.name)


@functools.cache
def _meetings(kernel: int, size: int, out: int, stride: int, pad: int, lhs_dilate: int, rhs_dilate: int) -> int:
    """Along one window dimension, pairs of an output and a kernel position that meet an input element, not padding and not a hole."""
    places = np.arange(out) * stride - pad
    count = 0
    for k in range(kernel):
        at = places + k * rhs_dilate
        count += int(((at >= 0) & (at < size * lhs_dilate) & (at % lhs_dilate == 0)).sum())
    return count

"""Parses the text of a compiled program, `jax.stages.Compiled.as_text()`, into computations and instructions."""

from collections.abc import Iterator
import math
import re
from typing import NamedTuple

_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_END = re.compile(r"^\}(, execution_thread=.*)?$")  # computations of other cores than the tensor core name their thread
_START = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = ")
_ARRAY = re.compile(r"\b([a-z]+\d*\w*)\[([\d,<= ]*)\]")


class Instruction(NamedTuple):
    """One line `[ROOT] %name = shape opcode(operands), attributes`. Names are without "%"."""

    name: str
    shape: str  # of the result, with layout; a tuple's is in parentheses
    opcode: str
    operands: tuple[str, ...]  # names; a constant has its literal, a parameter its number
    attributes: str  # the rest of the line

    def attribute(self, name: str) -> str | None:
        """Returns the value of `name=value` or `name={value}`, or None."""
        match = re.search(rf"(?:^|[,\s]){name}=(?:\{{([^}}]*)\}}|([^\s,]+))", self.attributes)
        return None if match is None else match[1] if match[1] is not None else match[2]

    def required(self, name: str) -> str:
        """Returns the value of an attribute. Raises ValueError if the instruction does not have it."""
        value = self.attribute(name)
        if value is None:
            raise ValueError(f"Instruction {self.name!r} ({self.opcode}) has no attribute {name!r}.")
        return value

    def numbers(self, name: str) -> list[int]:
        """Returns the integers of an attribute; [] without the attribute."""
        return [int(x) for x in (self.attribute(name) or "").split(",") if x.strip()]

    def called(self) -> list[str]:
        """Returns the names of the computations that the instruction runs."""
        for name in ("calls", "to_apply", "branch_computations", "called_computations"):
            value = self.attribute(name)
            if value:
                return [part.strip().removeprefix("%") for part in value.split(",")]
        both = [self.attribute(name) for name in ("true_computation", "false_computation")]
        return [name.removeprefix("%") for name in both if name]


class Computation(NamedTuple):
    """Named instructions in the order of the text. `root` names the one with the result. Names are without "%"."""

    name: str
    instructions: dict[str, Instruction]
    root: str


def parse(text: str) -> tuple[dict[str, Computation], str]:
    """Returns the computations by name, and the entry's name. Raises ValueError if the text is no compiled program's."""
    computations: dict[str, Computation] = {}
    entry = name = root = None
    instructions: dict[str, Instruction] = {}
    lines: list[str] = []

    def finish() -> None:
        if lines:
            instruction = parse_instruction(" ".join(lines))
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
            computations[name] = Computation(name, instructions, root)
            name = None
        else:
            start = _START.match(line)
            if start:
                finish()
                root = start[2] if start[1] else root
            if start or lines:  # attributes can continue on the next lines
                lines.append(line.strip())
    if entry is None:
        raise ValueError("This text has no ENTRY computation; give the result of jax.stages.Compiled.as_text().")
    return computations, entry


def parse_instruction(line: str) -> Instruction:
    """Returns the instruction of a line, continuation lines included."""
    name, rest = line.removeprefix("ROOT ").split(" = ", 1)
    rest = re.sub(r"/\*.*?\*/", "", rest)
    end = _closing(rest) if rest.startswith("(") else rest.index(" ")
    shape, rest = rest[:end].strip(), rest[end:].strip()
    opcode, rest = rest.split("(", 1)
    end = _closing("(" + rest) - 2
    inside, attributes = rest[:end], rest[end + 1 :]
    operands: tuple[str, ...] = (inside,)
    if opcode not in ("constant", "parameter"):  # each operand is `%name` or `shape %name`
        operands = tuple(part.split(" ")[-1].removeprefix("%") for part in _split(inside))
    return Instruction(name.removeprefix("%"), shape, opcode, operands, attributes)


def array_in(shape: str) -> str | None:
    """Returns an array's shape without layout ("bf16[2,4]"), or None if the shape does not begin with an array."""
    match = _ARRAY.match(shape)
    return match[0] if match else None


def dims(shape: str) -> tuple[int, ...]:
    """Returns the sizes of an array's axes. Raises ValueError if the shape is not an array's."""
    match = _ARRAY.match(shape)
    if match is None:
        raise ValueError(f"{shape!r} is not the shape of an array.")
    return _sizes(match[2])


def bytes_of(shape: str) -> float:
    """Returns the bytes of an array, or of all arrays of a tuple. Tokens and other opaque values have none."""
    total = 0.0
    for dtype, axes in _ARRAY.findall(shape):
        digits = re.search(r"\d+", dtype)
        bits = 8 if dtype == "pred" else int(digits[0]) if digits else 0
        total += bits / 8 * math.prod(_sizes(axes))
    return total


def _sizes(axes: str) -> tuple[int, ...]:
    return tuple(int(x.strip().removeprefix("<=")) for x in axes.split(",") if x.strip())


def _closing(text: str) -> int:
    """Returns the index after the bracket that closes the first one."""
    depth = 0
    for match in re.finditer(r"[()]", text):
        depth += 1 if match[0] == "(" else -1
        if not depth:
            return match.end()
    raise ValueError(f"A bracket is not closed in {text[:80]!r}.")


def _split(text: str) -> Iterator[str]:
    """Splits at the commas outside of brackets."""
    depth, begin = 0, 0
    for match in re.finditer(r"[()\[\]{},]", text):
        if match[0] != ",":
            depth += 1 if match[0] in "([{" else -1
        elif not depth:
            yield text[begin : match.start()].strip()
            begin = match.end()
    if text[begin:].strip():
        yield text[begin:].strip()

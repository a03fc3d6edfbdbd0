"""Derives how often the while loops of a compiled program run, from their condition, start and step.

Integers are followed through fusions, calls and tuples: from a loop's condition back to the constant that it starts
with, and through its body to the constant that each trip adds.
"""

from collections.abc import Mapping
import dataclasses
import re
from typing import NamedTuple

from jaxrl_reason.plan.hlo_text import Computation, Instruction

# Opcodes that keep the value of their first operand, if it is an integer.
_SAME = ("bitcast", "copy", "convert", "reshape", "copy-start", "copy-done", "optimization-barrier")
_MIRRORED = {"LT": "GT", "GT": "LT", "LE": "GE", "GE": "LE"}


class Later(NamedTuple):
    """An instruction whose value is followed when it is needed, and the known values of its computation's parameters."""

    computation: str
    name: str
    arguments: tuple["Later | Loop", ...]


@dataclasses.dataclass(frozen=True, eq=False)
class Loop:
    """The state of a running while loop: the state before the first trip, and the computation that changes it."""

    start: Later
    body: str


class _Slot(NamedTuple):
    """An integer in a loop's state: element `position` at the start of a trip, plus `offset`."""

    loop: Loop
    position: int
    offset: int


class Trips:
    """Follows the integers of a program; see `of`."""

    def __init__(self, computations: Mapping[str, Computation]):
        self._computations = computations

    def of(self, loop: Loop, condition: str) -> tuple[int | None, bool]:
        """Returns the most trips that a loop's condition allows (None: no limit), and whether there are exactly so many."""
        return self._limit(loop, Later(condition, self._computations[condition].root, (loop,)))

    def _limit(self, loop: Loop, at: Later) -> tuple[int | None, bool]:
        i = self._computations[at.computation].instructions[at.name]
        if i.opcode in _SAME:
            return self._limit(loop, at._replace(name=i.operands[0]))
        if i.opcode == "fusion":
            return self._limit(loop, self._inside(i, at))
        if i.opcode == "and":
            sides = [self._limit(loop, at._replace(name=name)) for name in i.operands]
            limits = [most for most, _ in sides if most is not None]
            return min(limits, default=None), all(exact for _, exact in sides)
        if i.opcode == "compare":
            direction = i.required("direction")
            left, right = (self._value(at._replace(name=name)) for name in i.operands)
            if isinstance(right, _Slot):
                left, right, direction = right, left, _MIRRORED.get(direction, direction)
            trips = self._counted(loop, left, direction, right)
            return trips, trips is not None
        return None, False

    def _counted(self, loop: Loop, slot: object, direction: str, limit: object) -> int | None:
        """Returns the trips while `slot` compares with the constant `limit` by `direction`; None if unknown."""
        if not isinstance(slot, _Slot) or slot.loop is not loop or not isinstance(limit, int):
            return None
        start, step = self._element(loop.start, slot.position), self._step(loop, slot.position)
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

    def _step(self, loop: Loop, position: int) -> int | None:
        """Returns the number that a trip adds to an element of the state, or None."""
        after = self._element(Later(loop.body, self._computations[loop.body].root, (loop,)), position)
        if isinstance(after, _Slot) and after.loop is loop and after.position == position:
            return after.offset
        return None

    def _inside(self, i: Instruction, at: Later) -> Later:
        """Returns the root of the computation that a fusion or a call runs."""
        inner = self._computations[i.called()[0]]
        return Later(inner.name, inner.root, tuple(at._replace(name=name) for name in i.operands))

    def _value(self, at: Later | Loop) -> int | _Slot | Loop | None:
        """Returns an integer, an element of a loop's state or a loop's state; None for anything else."""
        if not isinstance(at, Later):
            return at
        i = self._computations[at.computation].instructions.get(at.name)
        if i is None:
            return None
        if i.opcode == "constant":
            return int(i.operands[0]) if re.fullmatch(r"-?\d+", i.operands[0]) else None
        if i.opcode == "parameter":
            number = int(i.operands[0])
            return self._value(at.arguments[number]) if number < len(at.arguments) else None
        if i.opcode == "get-tuple-element":
            return self._element(at._replace(name=i.operands[0]), int(i.required("index")))
        if i.opcode in _SAME:
            return self._value(at._replace(name=i.operands[0]))
        if i.opcode in ("fusion", "call"):
            return self._value(self._inside(i, at))
        if i.opcode in ("add", "subtract"):
            left, right = (self._value(at._replace(name=name)) for name in i.operands)
            return _sum(left, right, i.opcode)
        return None

    def _element(self, at: Later | Loop, position: int) -> int | _Slot | Loop | None:
        """Returns the value of an element of a tuple, as `_value`."""
        if isinstance(at, Loop):
            return self._unchanged(_Slot(at, position, 0))
        i = self._computations[at.computation].instructions.get(at.name)
        if i is None:
            return None
        if i.opcode == "tuple":
            return self._value(at._replace(name=i.operands[position]))
        if i.opcode in ("fusion", "call"):
            return self._element(self._inside(i, at), position)
        if i.opcode in _SAME:
            return self._element(at._replace(name=i.operands[0]), position)
        if i.opcode == "parameter" and int(i.operands[0]) < len(at.arguments):
            return self._element(at.arguments[int(i.operands[0])], position)
        return None

    def _unchanged(self, slot: _Slot) -> int | _Slot | Loop:
        """Returns the start value of an element of a loop's state if no trip changes it, else the element."""
        body = self._computations[slot.loop.body]
        root = body.instructions[body.root]
        if root.opcode != "tuple":
            return slot
        kept = body.instructions.get(root.operands[slot.position])
        if kept is None or kept.opcode != "get-tuple-element" or int(kept.required("index")) != slot.position:
            return slot
        from_state = body.instructions[kept.operands[0]].opcode == "parameter"
        start = self._element(slot.loop.start, slot.position) if from_state else None
        return slot if start is None else start


def _sum(left: int | _Slot | Loop | None, right: int | _Slot | Loop | None, opcode: str) -> int | _Slot | None:
    """Returns left + right or left - right; None unless one of them is an integer and the other is known."""
    if opcode == "add" and isinstance(left, int):
        left, right = right, left
    if not isinstance(right, int):
        return None
    right = right if opcode == "add" else -right
    if isinstance(left, _Slot):
        return left._replace(offset=left.offset + right)
    return left + right if isinstance(left, int) else None

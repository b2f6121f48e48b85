"""Parses the text of a compiled program (`jax.stages.Compiled.as_text()`) into instructions.

Reads only what `lm.hardware.hlo_cost` needs: names, types, operands and attributes, as XLA prints
them for TPU, GPU and CPU. Grammar: xla/hlo/parser in openxla/xla. No JAX.

XLA does not promise this text to be stable. When a release of jaxlib or libtpu changes it:

  1. Run tests/hardware/test_hlo_cost.py. It compares products and traffic with XLA's own
     `cost_analysis`, and holds programs as libtpu writes them; a failure names the instruction.
  2. Syntax (types, attributes, operands) is read here; trip counts, replica groups and asynchronous
     forms in `hlo_cost`. Add the new form beside the old, and the new text to that test.
  3. Run `pytest -m aot tests/aot`, then record the golden figures anew with
     `python -m tests.aot.aot_cases` and read the difference: other collectives are a change of the
     compiler, other byte counts of the same collectives most likely a misread type.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Mapping

BITS = {
    "pred": 8, "s2": 2, "u2": 2, "s4": 4, "u4": 4, "s8": 8, "u8": 8, "s16": 16, "u16": 16,
    "s32": 32, "u32": 32, "s64": 64, "u64": 64, "bf16": 16, "f16": 16, "f32": 32, "f64": 64,
    "f4e2m1fn": 4, "f8e8m0fnu": 8, "f8e3m4": 8, "f8e4m3": 8, "f8e4m3fn": 8, "f8e4m3b11fnuz": 8,
    "f8e4m3fnuz": 8, "f8e5m2": 8, "f8e5m2fnuz": 8, "c64": 64, "c128": 128,
}  # fmt: skip
_SHAPE = re.compile(r"(\w+)\[([\d,]*)\](?:\{([^}]*)\})?")
_COMPUTATION = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_INSTRUCTION = re.compile(r"\s+(ROOT )?%?([\w.\-]+) = (.*)$")
_OPERAND = re.compile(r"%([\w.\-]+)")


@dataclasses.dataclass(frozen=True)
class Array:
    """One array of a type.

    Attributes:
      dtype: as XLA names it ("bf16").
      dims: its dimensions.
      space: memory space of its layout: 0 device memory (HBM), 1 fast memory on the chip (VMEM), 5
        the host's memory; other numbers are for semaphores and scalars.
    """

    dtype: str
    dims: tuple[int, ...]
    space: int

    @property
    def size(self) -> int:
        return math.prod(self.dims)

    @property
    def bytes(self) -> float:
        return self.size * BITS.get(self.dtype, 0) / 8


@dataclasses.dataclass(frozen=True, eq=False)
class Instruction:
    """One instruction.

    Attributes:
      name: without "%".
      type: its text; `arrays` reads it.
      op: "dot", "all-gather-start", ...
      operands: the instructions whose results it takes.
      arguments: the text between the operation's parentheses (a parameter's number, a constant).
      attributes: the text after them.
      is_root: of its computation.
    """

    name: str
    type: str
    op: str
    operands: tuple[Instruction, ...] = dataclasses.field(repr=False)
    arguments: str
    attributes: str
    is_root: bool

    @property
    def arrays(self) -> tuple[Array, ...]:
        """The arrays of its type, those of a tuple in order."""
        return arrays(self.type)

    @property
    def bytes(self) -> float:
        return sum(a.bytes for a in self.arrays)

    def attribute(self, name: str) -> str | None:
        """An attribute's text up to the next: a computation's name, `{...}` or a number."""
        match = re.search(rf"\b{name}=(\{{[^}}]*\}}|%?[\w.\-]+)", self.attributes)
        return None if match is None else match[1].lstrip("%")


class Computation:
    """Instructions by name, in order."""

    def __init__(self) -> None:
        self.instructions: dict[str, Instruction] = {}

    @property
    def root(self) -> Instruction:
        return next(i for i in reversed(self.instructions.values()) if i.is_root)

    @functools.cached_property
    def parameters(self) -> dict[int, Instruction]:
        found = (i for i in self.instructions.values() if i.op == "parameter")
        return {int(i.arguments): i for i in found}

    @functools.cached_property
    def users(self) -> dict[str, list[Instruction]]:
        """By name of an operand."""
        found: dict[str, list[Instruction]] = {}
        for instruction in self.instructions.values():
            for operand in dict.fromkeys(instruction.operands):
                found.setdefault(operand.name, []).append(instruction)
        return found


@functools.lru_cache(maxsize=100_000)
def arrays(text: str) -> tuple[Array, ...]:
    """The arrays of a type, `bf16[8,128]{1,0:T(8,128)S(1)}` or a tuple of such."""
    found = []
    for dtype, dims, layout in _SHAPE.findall(text):
        space = re.search(r"S\((\d+)\)", layout)
        sizes = tuple(int(size) for size in dims.split(",") if size)
        found.append(Array(dtype, sizes, int(space[1]) if space else 0))
    return tuple(found)


def parse(text: str) -> tuple[Mapping[str, Computation], str]:
    """(computations by name, the entry's name) of a module.

    Raises:
      ValueError: the text is not an HLO module, or uses an operand before it is defined.
    """
    computations: dict[str, Computation] = {}
    current, entry = None, None
    for line in text.splitlines():
        if not line.startswith(" "):
            match = _COMPUTATION.match(line)
            if match:
                current = computations[match[2]] = Computation()
                entry = match[2] if match[1] else entry
        elif current is not None:
            instruction = _instruction(line, current.instructions)
            if instruction is not None:
                current.instructions[instruction.name] = instruction
    if entry is None:
        raise ValueError("the text is not an HLO module: it has no ENTRY; give Compiled.as_text()")
    return computations, entry


def _instruction(line: str, known: Mapping[str, Instruction]) -> Instruction | None:
    match = _INSTRUCTION.match(line)
    if match is None:
        return None
    root, name, rest = match.groups()
    end = _closing(rest, 0) if rest.startswith("(") else rest.index(" ")
    kind, rest = rest[:end], rest[end:].lstrip()
    opening = rest.find("(")
    op = rest[:opening]
    if opening < 0 or not re.fullmatch(r"[\w\-]+", op):
        return None
    closing = _closing(rest, opening)
    arguments = rest[opening + 1 : closing - 1]
    operands = _OPERAND.findall(arguments) if op != "constant" else []
    if unknown := [operand for operand in operands if operand not in known]:
        raise ValueError(
            f"operand {unknown[0]!r} of HLO instruction {name!r} is not defined before"
        )
    inputs = tuple(known[operand] for operand in operands)
    return Instruction(name, kind, op, inputs, arguments, rest[closing:], root is not None)


def _closing(text: str, opening: int) -> int:
    """Index after the parenthesis that closes the one at `opening`."""
    depth = 0
    for match in re.finditer(r"[()]", text[opening:]):
        depth += 1 if match[0] == "(" else -1
        if depth == 0:
            return opening + match.end()
    raise ValueError(f"unbalanced parentheses in HLO: {text[:200]}")

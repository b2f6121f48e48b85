"""Collectives of a compiled step, read from its HLO text."""

from __future__ import annotations

import collections
import dataclasses
import itertools
import re
from collections.abc import Iterator

import numpy as np
from jax.sharding import Mesh

OPS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
BYTES = {
    "pred": 1,
    "u64": 8,
    "f64": 8,
    "s8": 1,
    "u8": 1,
    "bf16": 2,
    "f16": 2,
    "s32": 4,
    "u32": 4,
    "f32": 4,
    "s64": 8,
}
INSTRUCTION = re.compile(rf"= (.+?) ({'|'.join(OPS)})(?:-start)?\((.*)")
ARRAY = re.compile(r"([a-z]+\d*)\[([\d,]*)\]")

Groups = frozenset[frozenset[int]]


@dataclasses.dataclass(frozen=True)
class Collective:
    """One array of one collective.

    Attributes:
      op: such as "all-gather".
      axes: mesh axes whose devices it brings together.
      loops: while loops around it.
      shape: of the result on one device.
      num_bytes: of the result on one device.
      source: the operation of the traced program it came from.
    """

    op: str
    axes: tuple[str, ...]
    loops: int
    shape: tuple[int, ...]
    num_bytes: int
    source: str


def collectives(text: str, mesh: Mesh) -> list[Collective]:
    """Every array that a collective of the module touches."""
    computations = dict(_computations(text))
    loops = _loop_depths(computations)
    found = []
    for name, lines in computations.items():
        for line in lines:
            match = INSTRUCTION.search(line)
            if match is None:
                continue
            result, op, rest = match.groups()
            axes = _axes(op, rest, mesh)
            source = re.search(r'op_name="([^"]*)"', rest)
            where = source.group(1) if source else ""
            for shape, size in _arrays(result):
                found.append(Collective(op, axes, loops[name], shape, size, where))
    return found


def summary(found: list[Collective]) -> list[str]:
    """A line for each operation, mesh axes and loop depth: how many arrays, how many bytes."""
    table = collections.defaultdict(list)
    for c in found:
        table[c.op, "+".join(c.axes), c.loops].append(c.num_bytes)
    return [
        f"{op} over {axes}, loop depth {depth}: {len(sizes)} arrays, {sum(sizes)} bytes"
        for (op, axes, depth), sizes in sorted(table.items())
    ]


def loop_carries(text: str) -> list[int]:
    """Bytes of what each loop of the entry computation carries, invariants too."""
    lines = dict(_computations(text))["ENTRY"]
    results = [line.split(" while(")[0] for line in lines if " while(" in line]
    return [sum(size for _, size in _arrays(result)) for result in results]


def _arrays(types: str) -> list[tuple[tuple[int, ...], int]]:
    """Shape and bytes of each array of an HLO type, a tuple or not."""
    found = []
    for dtype, dims in ARRAY.findall(re.sub(r"/\*.*?\*/|\{[\d,]*\}", "", types)):
        shape = tuple(int(d) for d in dims.split(",") if d)
        found.append((shape, BYTES[dtype] * int(np.prod(shape, dtype=int))))
    return found


def _computations(text: str) -> Iterator[tuple[str, list[str]]]:
    name, lines = None, []
    for line in text.splitlines():
        header = re.match(r"(ENTRY )?%?([\w.-]+) .*\{$", line)
        if header and not line.startswith(" ") and not line.startswith("HloModule"):
            name, lines = ("ENTRY" if header.group(1) else header.group(2)), []
        elif line.startswith("}") and name is not None:
            yield name, lines
            name = None
        elif name is not None:
            lines.append(line)


def _loop_depths(computations: dict[str, list[str]]) -> dict[str, int]:
    """While loops around each computation that the entry reaches."""
    depths: dict[str, int] = {}
    waiting = [("ENTRY", 0)]
    while waiting:
        name, depth = waiting.pop()
        if depths.get(name, -1) >= depth:
            continue
        depths[name] = depth
        for line in computations.get(name, ()):
            inside = depth + (" while(" in line)
            called = re.findall(r"(?:body|condition|to_apply|calls)=%?([\w.-]+)", line)
            for names in re.findall(r"branch_computations=\{(.*?)\}", line):
                called += [name.strip(" %") for name in names.split(",")]
            waiting += [(name, inside) for name in called]
    return depths


def _axes(op: str, rest: str, mesh: Mesh) -> tuple[str, ...]:
    """The fewest mesh axes that explain who talks to whom."""
    if op == "collective-permute":
        pairs = re.search(r"source_target_pairs=\{(.*?)\}\}", rest)
        assert pairs is not None, rest
        ids = [int(i) for i in re.findall(r"\d+", pairs.group(1))]
        wanted = frozenset(frozenset(p) for p in zip(ids[::2], ids[1::2], strict=True))
    else:
        wanted = _groups(rest, mesh.devices.size)
    large = [axis for axis in mesh.axis_names if mesh.shape[axis] > 1]

    def inside(groups: Groups) -> bool:
        return all(any(w <= g for g in groups) for w in wanted)

    for count in range(len(large) + 1):
        for axes in itertools.combinations(large, count):
            groups = _groups_of(mesh, axes)
            if wanted == groups or (op == "collective-permute" and inside(groups)):
                return axes
    # Part of an axis: what XLA makes of two shardings that do not fit each other.
    return (f"part of {'+'.join(large)}",)


def _groups_of(mesh: Mesh, axes: tuple[str, ...]) -> Groups:
    positions = np.arange(mesh.devices.size).reshape(mesh.devices.shape)
    dims = [mesh.axis_names.index(axis) for axis in axes]
    moved = np.moveaxis(positions, dims, range(-len(dims), 0)) if dims else positions[..., None]
    size = int(np.prod([mesh.shape[axis] for axis in axes], dtype=int))
    return frozenset(frozenset(int(i) for i in group) for group in moved.reshape(-1, size))


def _groups(rest: str, num_devices: int) -> Groups:
    """Replica groups in any of the three ways XLA writes them."""
    if match := re.search(r"replica_groups=\{(\{.*?\})\}", rest):
        rows = [
            [int(i) for i in row.split(",")] for row in re.findall(r"\{([\d,]+)\}", match.group(1))
        ]
    elif match := re.search(r"replica_groups=(\[[\d,]+\])<=(\[[\d,]+\](?:T\([\d,]+\))?)", rest):
        rows = _iota(match.group(2)).reshape(_numbers(match.group(1))).tolist()
    elif match := re.search(
        r"replica_groups=mesh\[(.*?)\](?:, device_ids=\((.*?\])(T\([\d,]+\))?\))? \{(.*?)\}", rest
    ):
        sizes = re.findall(r"'(\w+)'=(\d+)", match.group(1))
        order = (match.group(2) or f"[{num_devices}]") + (match.group(3) or "")
        names, dims = [], []
        parts = dict(re.findall(r"'(\w+)'(:\(\d+\)\d+)?", match.group(4)))
        used = []
        for name, size in sizes:
            if parts.get(name):  # part of an axis: (sizes before it)its own size
                before, own = _numbers(parts[name])
                dims += [before, own, int(size) // (before * own)]
                names += [None, name, None]
                used.append(len(dims) - 2)
            else:
                dims.append(int(size))
                names.append(name)
                if name in parts:
                    used.append(len(dims) - 1)
        grid = np.moveaxis(_iota(order).reshape(dims), used, range(-len(used), 0))
        rows = grid.reshape(-1, int(np.prod([dims[i] for i in used]))).tolist()
    else:
        raise ValueError(f"no replica groups in {rest[:300]}")
    return frozenset(frozenset(row) for row in rows)


def _numbers(text: str) -> list[int]:
    return [int(n) for n in re.findall(r"\d+", text)]


def _iota(text: str) -> np.ndarray:
    """`[4,2]T(1,0)`: 0..7 as [4, 2], transposed, in a row."""
    dims, _, transpose = text.partition("T")
    shape = _numbers(dims)
    grid = np.arange(int(np.prod(shape))).reshape(shape)
    return (grid.transpose(_numbers(transpose)) if transpose else grid).ravel()

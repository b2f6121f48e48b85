"""Cost of a compiled program: collectives, matrix products, custom calls, memory traffic.

    found = program_cost(compiled.as_text(), mesh)
    found.matmul_flops, found.collectives, found.custom_calls, found.hbm_bytes

Figures are per device and per run of the program. A loop's body counts as often as it runs, a
conditional as its most expensive branch. XLA's own `cost_analysis` counts a loop's body once, and
nothing inside a custom call.

Bytes on the wire are what a device sends by an algorithm that wastes nothing: of a buffer of n
bytes, whole, over g devices, (g-1)/g n for an all-gather, a reduce-scatter and an all-to-all, twice
that for an all-reduce, n for a permute (Chan et al., "Collective communication", 2007).
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import itertools
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from lm.hardware.hlo import Array, Computation, Instruction, parse

COLLECTIVES = (
    "all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all",
    "collective-permute", "collective-broadcast",
)  # fmt: skip
# Operations that move nothing by themselves.
_FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "while", "call",
    "conditional", "iota", "partition-id", "replica-id", "opt-barrier",
    "async-update", "async-done", "domain", "add-dependency",
}  # fmt: skip
_SLICES = ("dynamic-slice", "slice", "gather")  # read a part of their operand
# Their computations say how to combine two numbers.
_COMBINING = {
    "all-reduce", "all-reduce-start", "reduce-scatter", "reduce", "reduce-window", "scatter",
    "sort", "map", "select-and-scatter",
}  # fmt: skip


_Key = tuple[str, tuple[str, ...], str, int, bool]  # op, axes, dtype, size, is_async


@dataclasses.dataclass(frozen=True)
class Collective:
    """Collectives of one kind over the same devices, in one run of the program.

    Attributes:
      op: one of `COLLECTIVES`.
      axes: mesh axes it spans, in the mesh's order; `("groups of 4",)` for groups that are not a
        product of axes.
      dtype: of what is sent.
      size: devices per group.
      is_async: split into a start and a done, so that other work may run between them.
      num_calls: instructions in the program.
      count: times it runs.
      payload_bytes: of the whole buffers: gathered, before scattering, reduced.
      wire_bytes: sent by one device.
    """

    op: str
    axes: tuple[str, ...]
    dtype: str
    size: int
    is_async: bool
    num_calls: int
    count: float
    payload_bytes: float
    wire_bytes: float


@dataclasses.dataclass(frozen=True)
class ProgramCost:
    """Cost per device of one run.

    Attributes:
      collectives: the largest on the wire first.
      matmul_flops: of `dot` and `convolution`, two per multiply-add; custom calls not counted.
      custom_calls: times each target runs, Pallas kernels under their names.
      hbm_bytes: read and written by instructions that are not fused into others; arrays that the
        compiler keeps on the chip do not count. Custom calls count as if they read all operands.
      host_bytes: copied to and from the host's memory.
      loops: (name, times it is entered, trips) of every loop; trips are None where the program does
        not state them, and its body then counts once.
    """

    collectives: tuple[Collective, ...]
    matmul_flops: float
    custom_calls: Mapping[str, float]
    hbm_bytes: float
    host_bytes: float
    loops: tuple[tuple[str, float, int | None], ...]

    @property
    def wire_bytes(self) -> float:
        return sum(c.wire_bytes for c in self.collectives)


def program_cost(text: str, mesh: Any) -> ProgramCost:
    """The cost of a compiled program.

    Args:
      text: `jax.stages.Compiled.as_text()`.
      mesh: what it was compiled for (a `jax.sharding.Mesh`), for the names of axes; partition i of
        the program is its i-th device.

    Raises:
      ValueError: the text is not an HLO module, or has replica groups in an unknown form.
    """
    computations, entry = parse(text)
    totals = _Counter(computations, tuple(mesh.shape.items())).of(entry, "", False)
    listed = [
        Collective(*key, int(calls), count, payload, wire)
        for key, (calls, count, payload, wire) in totals.collectives.items()
    ]
    return ProgramCost(
        tuple(sorted(listed, key=lambda c: -c.wire_bytes)), totals.flops, dict(totals.calls),
        totals.hbm, totals.host, tuple(totals.loops),
    )  # fmt: skip


class _Totals:
    """Sums over a computation run once. Collectives: (calls, count, payload, wire) by key."""

    def __init__(self) -> None:
        self.collectives: dict[_Key, tuple[float, ...]] = {}
        self.calls: collections.Counter[str] = collections.Counter()
        self.flops = self.hbm = self.host = 0.0
        self.loops: list[tuple[str, float, int | None]] = []

    def add(self, other: _Totals, times: float = 1) -> None:
        for key, (calls, *figures) in other.collectives.items():
            self.put(key, (calls, *(times * figure for figure in figures)))
        for name, count in other.calls.items():
            self.calls[name] += times * count  # type: ignore[assignment]
        self.flops += times * other.flops
        self.hbm += times * other.hbm
        self.host += times * other.host
        self.loops += [(name, times * entered, trips) for name, entered, trips in other.loops]

    def put(self, key: _Key, figures: Iterable[float]) -> None:
        old = self.collectives.get(key, (0.0,) * 4)
        self.collectives[key] = tuple(a + b for a, b in zip(old, figures, strict=True))

    @property
    def weight(self) -> tuple[float, float, float]:
        """Orders the branches of a conditional."""
        return self.flops, sum(f[3] for f in self.collectives.values()), self.hbm


class _Counter:
    """Totals of each computation, cached by name."""

    def __init__(
        self, computations: Mapping[str, Computation], sizes: tuple[tuple[str, int], ...]
    ) -> None:
        self.computations, self.sizes = computations, sizes  # of the mesh axes
        self.num_devices = math.prod(size for _, size in sizes)
        self.of = functools.cache(self._of)

    def _of(self, name: str, fusion: str, beside: bool) -> _Totals:
        """Totals of a computation; `fusion` names the fusion it is inside, `beside`: runs async."""
        computation, totals = self.computations[name], _Totals()
        for instruction in computation.instructions.values():
            self.count(instruction, computation, totals, fusion, beside)
            for part, times in self.called(instruction, totals, beside):
                totals.add(part, times)
        return totals

    def count(
        self, instruction: Instruction, computation: Computation, totals: _Totals, fusion: str,
        beside: bool,
    ) -> None:  # fmt: skip
        """What an instruction does by itself."""
        op = instruction.op
        base = op.removesuffix("-start")
        if base in COLLECTIVES:
            self.count_collective(instruction, totals, fusion, beside)
        elif op == "send" and "xla_megascale_runtime" in instruction.attributes:
            self.count_between_slices(instruction, computation, totals)
        elif op in ("dot", "convolution"):
            totals.flops += matmul_flops(instruction)
        elif op == "custom-call":
            totals.calls[_target(instruction)] += 1
        if not fusion and not beside:  # else counted where it is called
            if op not in _FREE and not op.endswith("-done"):
                totals.hbm += self.traffic(instruction)
            totals.host += host_bytes(instruction)

    def called(
        self, instruction: Instruction, totals: _Totals, beside: bool
    ) -> Iterator[tuple[_Totals, float]]:
        """The totals of what an instruction calls, and how often."""
        op = instruction.op
        if op == "while":
            trips = trip_count(instruction, self.computations)
            totals.loops.append((instruction.name, 1, trips))
            yield self.of(instruction.attribute("body"), "", beside), 1 if trips is None else trips
            return
        if op == "conditional":
            names = instruction.attribute("branch_computations")
            pair = [instruction.attribute(f"{c}_computation") for c in ("true", "false")]
            branches = re.findall(r"[\w.\-]+", names) if names else [n for n in pair if n]
            yield max((self.of(n, "", beside) for n in branches), key=lambda t: t.weight), 1
            return
        for name in ("calls", "to_apply", "called_computations"):
            called = None if op in _COMBINING else instruction.attribute(name)
            for each in re.findall(r"[\w.\-]+", called or ""):
                if each in self.computations:
                    inside = f"{instruction.name} {each}" if op == "fusion" else ""
                    yield self.of(each, inside, beside or op.endswith("-start")), 1

    def count_collective(
        self, instruction: Instruction, totals: _Totals, fusion: str, beside: bool
    ) -> None:
        op = instruction.op.removesuffix("-start")
        groups = self.groups(instruction)
        operands = [i.bytes for i in instruction.operands]
        payload = sum(operands)
        if op == "all-gather":
            payload *= len(groups[0])
        elif op == "all-reduce" and "reduce-scatter" in fusion.replace("_", "-"):
            op = "reduce-scatter"  # how libtpu writes one: the slice is in the fusion
        elif op == "ragged-all-to-all":  # rows, the buffer they go to, offsets, sizes
            payload = min(operands[:2])
        dtype = instruction.operands[0].arrays[0].dtype
        synchronous = '"is_sync":true' in instruction.attributes
        is_async = beside or (instruction.op.endswith("-start") and not synchronous)
        self.put(totals, op, groups, dtype, is_async, payload)

    def put(
        self, totals: _Totals, op: str, groups: tuple[tuple[int, ...], ...], dtype: str,
        is_async: bool, payload: float,
    ) -> None:  # fmt: skip
        axes, size = _axes_of(groups, self.sizes)
        share = (size - 1) / size
        wire = payload * {"all-reduce": 2 * share, "collective-permute": 1.0}.get(op, share)
        totals.put((op, axes, dtype, size, is_async), (1, 1, payload, wire))

    def count_between_slices(
        self, instruction: Instruction, computation: Computation, totals: _Totals
    ) -> None:
        """A collective that the hosts carry over the data-centre network.

        libtpu writes it as a `send` and a `recv` of one name, with what it is in their attributes.
        Each device speaks with those of its place in the other slices.
        """
        kind = _quoted(instruction, "_xla_megascale_transfer_type")
        key = "_xla_host_transfer_rendezvous"
        num_slices = dict(self.sizes).get("slice", 1)
        inside = self.num_devices // num_slices
        groups = tuple(tuple(range(i, self.num_devices, inside)) for i in range(inside))
        op = kind.lower().replace("_", "-")
        sent = instruction.operands[0].arrays[0]
        payload = sent.bytes * (num_slices if op == "all-gather" else 1)
        order = computation.instructions.values()
        is_async = not any(
            each.op == "recv" and after.op == "recv-done"
            for each, after in itertools.pairwise(order)
            if _quoted(each, key) == _quoted(instruction, key)
        )
        self.put(totals, op, groups, sent.dtype, is_async, payload)

    def groups(self, instruction: Instruction) -> tuple[tuple[int, ...], ...]:
        """The partitions of each group; of a permute, its pairs joined into cycles or paths."""
        text = instruction.attributes
        if match := re.search(r"source_target_pairs=\{((?:\{\d+,\d+\},?)*)\}", text):
            pairs = [tuple(map(int, p)) for p in re.findall(r"\{(\d+),(\d+)\}", match[1])]
            return _joined(pairs)
        match = re.search(r"replica_groups=(.*?)(?:, (?!device_ids)\w+=|$)", text)
        return replica_groups(match[1] if match else "{}") or (tuple(range(self.num_devices)),)

    def traffic(self, instruction: Instruction) -> float:
        """Bytes of device memory an instruction reads and writes."""
        operands = instruction.operands
        if instruction.op in _SLICES:
            return 2 * _hbm(instruction.arrays)
        if instruction.op in ("dynamic-update-slice", "scatter"):
            return 2 * _hbm(operands[1 if instruction.op == "dynamic-update-slice" else -1].arrays)
        if instruction.op == "fusion":
            return self.fusion_traffic(instruction)
        written = instruction.arrays
        if instruction.op == "send":
            written = ()
        elif instruction.op.endswith("-start"):  # its type repeats the operands
            written = written[len(written) // 2 :]
        return _hbm(written) + sum(_hbm(operand.arrays) for operand in operands)

    def fusion_traffic(self, instruction: Instruction) -> float:
        """A fusion reads what it slices from an operand, and may update another in place."""
        inside = self.computations[instruction.attribute("calls") or ""]
        total, updated = 0.0, set()
        root = inside.root
        roots = root.operands if root.op == "tuple" else [root]
        for array, each in zip(instruction.arrays, roots, strict=False):
            source = _through(each)
            if source.op == "dynamic-update-slice":
                total += (array.space == 0) * source.operands[1].bytes
                updated.add(_through(source.operands[0]).name)
            else:
                total += _hbm((array,))
        for i, operand in enumerate(instruction.operands):
            parameter = inside.parameters.get(i)
            if parameter is None or parameter.name in updated:
                continue
            users = inside.users.get(parameter.name, [])
            if users and all(user.op in _SLICES for user in users):
                in_hbm = operand.arrays[0].space == 0
                total += in_hbm * sum(user.bytes for user in users)
            else:
                total += _hbm(operand.arrays)
        return total


def _hbm(arrays: Iterable[Array]) -> float:
    return sum(a.bytes for a in arrays if a.space == 0)


def _through(instruction: Instruction) -> Instruction:
    """The instruction whose values this one passes on."""
    while instruction.op in ("bitcast", "copy", "convert", "reshape", "transpose"):
        instruction = instruction.operands[0]
    return instruction


def host_bytes(instruction: Instruction) -> float:
    """Bytes a copy moves between the device's and the host's memory."""
    if instruction.op not in ("copy", "copy-start", "dynamic-update-slice", "dynamic-slice"):
        return 0.0
    operands = instruction.operands
    here, there = instruction.arrays[0], operands[0].arrays[0]
    if instruction.op == "dynamic-update-slice":
        return operands[1].bytes if here.space == 5 else 0.0
    return here.bytes if (here.space == 5) != (there.space == 5) else 0.0


def _quoted(instruction: Instruction, name: str) -> str:
    """The value of `name="value"` in an instruction's attributes; "?" without."""
    match = re.search(rf'{name}="([^"]*)"', instruction.attributes)
    return match[1] if match else "?"


def _target(instruction: Instruction) -> str:
    target = _quoted(instruction, "custom_call_target")
    if target in ("tpu_custom_call", "mosaic_gpu", "__gpu$xla.gpu.triton"):
        return f"{target}:{re.sub(r'[.][0-9]+$', '', instruction.name)}"
    return target


def matmul_flops(instruction: Instruction) -> float:
    """Operations of a `dot` or a `convolution` (libtpu writes most products as the latter)."""
    left, right = (instruction.operands[i].arrays[0].dims for i in (0, 1))
    out = instruction.arrays[0]
    if instruction.op == "dot":
        contracted = instruction.attribute("lhs_contracting_dims") or "{}"
        return 2.0 * out.size * math.prod(left[int(d)] for d in re.findall(r"\d+", contracted))
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.attributes)
    if labels is None:
        raise ValueError(f"convolution {instruction.name} has no dim_labels")
    total = 2.0 * out.dims[labels[3].index("b")] * out.dims[labels[3].index("f")]
    total *= right[labels[2].index("i")]
    window = _window(instruction.attributes)
    shapes = list(zip((left, right, out.dims), labels.groups(), strict=True))
    for digit in sorted(set(labels[2]) - {"i", "o"}):
        sizes = (dims[names.index(digit)] for dims, names in shapes)
        keys = ("stride", "pad", "lhs_dilate", "rhs_dilate")
        total *= _valid_pairs(*sizes, *(window(key, int(digit)) for key in keys))
    return total


def _window(attributes: str):
    """(key, dimension) -> its number in `window={size=2x3 pad=0_1x0_0}`; of pads, the lower one."""
    match = re.search(r"window=\{([^}]*)\}", attributes)
    items = dict(item.split("=") for item in match[1].split()) if match else {}

    def get(key: str, dimension: int) -> int:
        if key not in items:
            return 0 if key == "pad" else 1
        return int(items[key].split("x")[dimension].split("_")[0])

    return get


@functools.cache
def _valid_pairs(
    size: int, kernel: int, out: int, stride: int, pad: int, dilate: int, kernel_dilate: int
) -> int:
    """Pairs of output and kernel position that meet an element, not padding or dilation."""
    at, found = np.arange(out, dtype=np.int64) * stride - pad, 0
    for k in range(kernel):
        positions = at + k * kernel_dilate
        inside = (positions >= 0) & (positions <= (size - 1) * dilate)
        found += int(np.count_nonzero(inside & (positions % dilate == 0)))
    return found


def trip_count(loop: Instruction, computations: Mapping[str, Computation]) -> int | None:
    """How often a loop's body runs; None where the program does not state it.

    XLA for GPUs writes it down. Otherwise it follows from the condition, which compares a counter
    that starts at a constant with a constant. (libtpu counts in ones.)
    """
    match = re.search(r'known_trip_count":\{"n":"(\d+)"', loop.attributes)
    if match:
        return int(match[1])
    inner = condition = computations[loop.attribute("condition") or ""]
    outer = None
    if condition.root.op == "fusion":
        outer = condition.root.operands
        inner = computations[condition.root.attribute("calls") or ""]
    test = inner.root
    if test.op != "compare" or len(test.operands) != 2:
        return None
    begin = loop.operands[0]

    def value(instruction: Instruction, scope: Computation) -> tuple[int | None, bool]:
        """(constant at the loop's beginning, whether it is an element of the loop's tuple)."""
        if instruction.op == "parameter" and scope is inner and outer is not None:
            return value(outer[int(instruction.arguments)], condition)
        if instruction.op == "get-tuple-element" and scope is condition:
            index = int(instruction.attribute("index") or 0)
            if begin.op != "tuple":
                return None, True
            return _constant(begin.operands[index]), True
        return _constant(instruction), False

    pair = [value(i, inner) for i in test.operands]
    direction = test.attribute("direction")
    if direction == "GT":
        pair, direction = pair[::-1], "LT"
    (start, varies), (limit, _) = pair
    if direction not in ("LT", "NE") or not varies or start is None or limit is None:
        return None
    return max(0, limit - start)


def _constant(instruction: Instruction) -> int | None:
    instruction = _through(instruction)
    if instruction.op == "constant" and re.fullmatch(r"-?\d+", instruction.arguments):
        return int(instruction.arguments)
    return None


@functools.cache
def replica_groups(text: str) -> tuple[tuple[int, ...], ...]:
    """Partitions of each group, from the three forms XLA writes; () for one group of all.

    `{{0,1},{2,3}}`; `[2,2]<=[2,2]T(1,0)`, a reshaped and transposed iota; `mesh['a'=2,'b'=4]
    {'a','b':(1)2}`, groups along axes of a mesh, or along a part of one: the factor 2 of 4 that has
    1 before it. The mesh's partitions may be an iota too.

    Raises:
      ValueError: it is none of them.
    """
    if text.startswith("{"):
        groups = re.findall(r"\{([\d,]+)\}", text)
        return tuple(tuple(_ints(group)) for group in groups)
    match = re.fullmatch(rf"\[(\d+),(\d+)\]<={_IOTA}", text)
    if match:
        grid = _iota(match[3], match[4]).reshape(int(match[1]), int(match[2]))
        return tuple(map(tuple, grid.tolist()))
    match = re.fullmatch(rf"mesh\[(.*?)\](?:, device_ids=\({_IOTA}\))? \{{(.*)\}}", text)
    if match is None:
        raise ValueError(f"replica groups {text[:200]!r} are of an unknown form")
    axes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", match[1])}
    grid = _iota(match[2] or str(math.prod(axes.values())), match[3])
    shape: list[int] = []
    along: list[int] = []
    chosen = re.findall(r"'(\w+)'(?::\((\d+)\)(\d+))?", match[4])
    for name, size in axes.items():
        begin, own = 1, []
        for before, part in sorted(
            (int(b or 1), int(p or size)) for n, b, p in chosen if n == name
        ):
            shape.append(before // begin)
            own.append(len(shape))
            shape.append(part)
            begin = before * part
        shape.append(size // begin)
        along += own
    others = [i for i in range(len(shape)) if i not in along]
    grid = grid.reshape(shape).transpose(others + along)
    return tuple(map(tuple, grid.reshape(-1, math.prod(shape[i] for i in along)).tolist()))


_IOTA = r"\[([\d,]+)\](?:T\(([\d,]+)\))?"


def _iota(shape: str, order: str | None) -> np.ndarray:
    grid = np.arange(math.prod(_ints(shape))).reshape(_ints(shape))
    return grid.transpose(_ints(order)) if order else grid


def _ints(text: str) -> tuple[int, ...]:
    return tuple(int(i) for i in text.split(","))


def _joined(pairs: list[tuple[int, ...]]) -> tuple[tuple[int, ...], ...]:
    """Sets of partitions that pairs connect, the largest first: some may send to themselves."""
    group_of: dict[int, set[int]] = {}
    for a, b in pairs:
        joined = group_of.get(a, {a}) | group_of.get(b, {b})
        group_of |= dict.fromkeys(joined, joined)
    groups = {tuple(sorted(group)) for group in group_of.values()}
    return tuple(sorted(groups, key=lambda group: (-len(group), group))) or ((0,),)


@functools.cache
def _axes_of(
    groups: tuple[tuple[int, ...], ...], sizes: tuple[tuple[str, int], ...]
) -> tuple[tuple[str, ...], int]:
    """(names of the mesh axes that groups span, devices per group); `sizes` of the mesh axes."""
    group = groups[0]
    coordinates = np.unravel_index(group, tuple(size for _, size in sizes))
    varying = dict(axis for axis, at in zip(sizes, coordinates, strict=True) if np.ptp(at))
    whole = math.prod(varying.values()) == len(group)
    return (tuple(varying) if whole else (f"groups of {len(group)}",)), len(group)

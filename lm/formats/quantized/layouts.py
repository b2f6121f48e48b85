"""How other libraries lay out a quantized matrix, and the leaf made from their tensors.

A format says which tensors a module `[out, in]` has and makes from them a leaf `[in, out]` of NumPy
arrays. Sources: GPTQModel and AutoAWQ (their linear modules), compressed-tensors, bitsandbytes
(`QuantState`).
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np

from lm.files import FormatError
from lm.weights import NF4, Fp8, Int4, Int8, Int8Groups
from lm.weights.blocked import Blocked
from lm.weights.nf4 import LEVELS, NESTED_BLOCK, dynamic_map

FLOATS = ("F16", "BF16", "F32")
INDICES = ("I32", "I64")
FP8, FP8_BLOCK = ("F8_E4M3", "F8_E5M2"), 128
Arrays = Mapping[str, np.ndarray]
Shape = tuple[int, ...]
# Shape of a tensor, or None where any is accepted, and the dtypes it may have.
Wanted = tuple[Shape | None, tuple[str, ...]]


class Format:
    """One way to store a matrix. `marker` is the tensor whose presence shows that it is used."""

    marker: str

    def wanted(self, shape: Shape, present: Mapping[str, tuple[Shape, str]]) -> dict[str, Wanted]:
        """Suffixes of names -> what the tensors of a module [out, in] must be.

        Raises:
          FormatError: the module's size does not fit the format.
        """
        raise NotImplementedError

    def leaf(self, arrays: Arrays, shape: Shape) -> Blocked:
        """The matrix, from tensors by the suffixes of their names."""
        raise NotImplementedError


def unpack(words: np.ndarray, bits: int, axis: int, order: Sequence[int] | None = None):
    """The integers packed into int32 words, as uint8; `axis` becomes 32/bits times as long.

    Args:
      words: of any shape; a word's first integer is in its lowest bits.
      bits: per integer, 4 or 8.
      axis: along which they are packed.
      order: from the lowest bits, a word's integers are number order[0], order[1], ...
    """
    moved = np.ascontiguousarray(np.moveaxis(words, axis, -1), "<i4")
    data = moved.view(np.uint8)
    if bits == 4:
        data = np.stack([data & 15, data >> 4], axis=-1).reshape(*data.shape[:-1], -1)
    if order is not None:
        grouped = data.reshape(*data.shape[:-1], -1, len(order))
        data = grouped[..., np.argsort(order)].reshape(data.shape)
    return np.moveaxis(data, -1, axis)


def _whole(size: int, part: int, what: str) -> int:
    if size % part:
        raise FormatError(f"{what}={size} is not a multiple of {part}")
    return size // part


def _check_setting(method: str, key: str, value: Any, *allowed: Any) -> None:
    if value not in allowed:
        names = " or ".join(map(str, allowed))
        raise ValueError(f"{method} with {key}={value!r} is not read; use {names}")


def _group_size(method: str, value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or (value < 1 and value != -1):
        raise ValueError(f"{method} with group_size={value!r} is not read; use -1 or 1 and more")
    return value


def _groups(size: int, group: int) -> int:
    """Groups of `group` rows, of which the last may be short; one where `group` is -1."""
    return 1 if group == -1 else -(-size // group)


def _size_of(rows: int, groups: int, sizes: tuple[int, ...]) -> int:
    """Rows of each group but the last: the one of `sizes` that makes so many, or equal parts."""
    found = [size for size in sizes if _groups(rows, size) == groups]
    if len(found) == 1:
        return found[0]
    if sizes and not found and groups > 1:
        raise FormatError(f"{groups} groups of in={rows} are not of group_size={sizes}")
    return _whole(rows, groups, "in")


def _leaf_of(
    bits: int, values: Any, scale: Any, zero: Any, g_idx: Any = None, group: int | None = None
) -> Blocked:
    """Int4 or Int8Groups of values [in, out], rows in the file's order.

    Zero points [groups, out] that are all in the middle are dropped; `g_idx` [in] is the group of
    each row, None where groups are consecutive rows. `group` is the number of rows in each but the
    last, which may be short; None, or -1, where all are as long.

    Raises:
      FormatError: `g_idx` does not say such groups, or a short one has an odd number of rows.
    """
    kind, rows = Int4 if bits == 4 else Int8Groups, len(values)
    if zero is not None:
        middle = 1 << (bits - 1)
        zero = None if np.all(zero == middle) else zero.astype(np.uint8 if bits == 4 else np.uint16)
    group = -(-rows // len(scale)) if group in (None, -1) else group
    order = None if g_idx is None else _order(g_idx, np.arange(rows) // group)
    if rows % group:
        # Leaves have groups of one size: the largest of which both kinds are made.
        size = math.gcd(rows, group)
        _whole(size, kind.values_per_byte, "common divisor of in and group_size")
        owners = np.arange(0, rows, size) // group
        scale, zero = scale[owners], None if zero is None else zero[owners]
    values = np.ascontiguousarray(values if order is None else values[order])
    return kind.encode(values, np.ascontiguousarray(scale), zero, order)  # pyright: ignore[reportArgumentType]


def _order(g_idx: np.ndarray, groups: np.ndarray) -> np.ndarray | None:
    """The rows sorted by group, which are then `groups` [in]; None where they are sorted."""
    order = np.argsort(g_idx, kind="stable").astype(np.int32)
    if not np.array_equal(g_idx[order], groups):
        raise FormatError(
            f"g_idx does not divide {len(groups)} rows into {groups[-1] + 1} groups of "
            f"{np.sum(groups == 0)}"
        )
    return None if np.array_equal(order, np.arange(len(order))) else order


@dataclasses.dataclass(frozen=True)
class GPTQ(Format):
    """`qweight` int32 [in bits/32, out] packed along in, `qzeros` [groups, out bits/32] along out,
    `scales` [groups, out], `g_idx` [in].

    Attributes:
      bits: 4 or 8.
      group: rows per scale; -1 for one scale per column.
      symmetric: every zero point is in the middle.
      ordered: rows are grouped by importance, so that `g_idx` has to be there.
      version: 1 stores zero points minus one, 2 as they are.
    """

    bits: int = 4
    group: int = 128
    symmetric: bool = True
    ordered: bool = False
    version: int = 1

    marker = "qweight"

    @classmethod
    def from_config(cls, q: Mapping[str, Any]) -> GPTQ:
        kind = q.get("checkpoint_format", "gptq")
        _check_setting("GPTQ", "bits", q.get("bits"), 4, 8)
        _check_setting("GPTQ", "checkpoint_format", kind, "gptq", "gptq_v2")
        _check_setting("GPTQ", "pack_dtype", q.get("pack_dtype", "int32"), "int32")
        _check_setting("GPTQ", "dynamic", q.get("dynamic") or None, None)
        group = _group_size("GPTQ", q.get("group_size", 128))
        ordered = bool(q.get("desc_act")) and group != -1
        return cls(q["bits"], group, q.get("sym", True), ordered, 2 if kind == "gptq_v2" else 1)

    def wanted(self, shape, present):
        out, rows = shape
        per_word = 32 // self.bits
        groups = _groups(rows, self.group)
        wanted: dict[str, Wanted] = {
            "qweight": ((_whole(rows, per_word, "in"), out), ("I32",)),
            "qzeros": ((groups, _whole(out, per_word, "out")), ("I32",)),
            "scales": ((groups, out), FLOATS),
        }
        has_index = self.ordered or "g_idx" in present
        return wanted | ({"g_idx": ((rows,), INDICES)} if has_index else {})

    def version_of(self, stored: np.ndarray) -> int:
        """1 or 2. Some files claim one and hold the other; symmetric zero points show which."""
        middle = 1 << (self.bits - 1)
        if self.symmetric and np.all(stored == middle):
            return 2
        if self.symmetric and np.all(stored == middle - 1):
            return 1
        return self.version

    def leaf(self, arrays, shape):
        stored = unpack(arrays["qzeros"], self.bits, 1)
        zero = stored.astype(np.uint16) + (2 - self.version_of(stored))
        values = unpack(arrays["qweight"], self.bits, 0)
        g_idx = arrays.get("g_idx")
        return _leaf_of(self.bits, values, arrays["scales"], zero, g_idx, self.group)


@dataclasses.dataclass(frozen=True)
class AWQ(Format):
    """Version GEMM: `qweight` int32 [in, out/8] and `qzeros` [groups, out/8] packed along out in
    `order`, `scales` [groups, out].

    Attributes:
      group: see `GPTQ`.
    """

    group: int = 128

    marker = "qweight"
    order = (0, 2, 4, 6, 1, 3, 5, 7)

    @classmethod
    def from_config(cls, q: Mapping[str, Any]) -> AWQ:
        _check_setting("AWQ", "bits", q.get("bits", q.get("w_bit")), 4)
        _check_setting("AWQ", "version", str(q.get("version", "gemm")).lower(), "gemm")
        _check_setting("AWQ", "zero_point", q.get("zero_point", True), True)
        return cls(_group_size("AWQ", q.get("group_size", q.get("q_group_size", 128))))

    def wanted(self, shape, present):
        out, rows = shape
        groups, packed = _groups(rows, self.group), _whole(out, 8, "out")
        return {
            "qweight": ((rows, packed), ("I32",)),
            "qzeros": ((groups, packed), ("I32",)),
            "scales": ((groups, out), FLOATS),
        }

    def leaf(self, arrays, shape):
        values, zero = (unpack(arrays[name], 4, 1, self.order) for name in ("qweight", "qzeros"))
        return _leaf_of(4, values, arrays["scales"], zero, group=self.group)


@dataclasses.dataclass(frozen=True)
class PackQuantized(Format):
    """compressed-tensors `pack-quantized`: `weight_packed` int32 [out, in bits/32] packed along in,
    offset to start at 0; `weight_scale` [out, groups]; `weight_zero_point` packed along out.

    Attributes:
      sizes: of groups, in the configuration.
    """

    sizes: tuple[int, ...] = ()

    marker = "weight_packed"

    def wanted(self, shape, present):
        out, rows = shape
        words = present["weight_packed"][0][-1]
        bits = 32 * words // rows
        if bits not in (4, 8) or words * 32 != bits * rows:
            raise FormatError(f"{words} words for in={rows} are neither 4 nor 8 bits per number")
        groups = present.get("weight_scale", ((out, 1),))[0][-1]
        _size_of(rows, groups, self.sizes)
        wanted: dict[str, Wanted] = {
            "weight_packed": ((out, words), ("I32",)),
            "weight_scale": ((out, groups), FLOATS),
            "weight_shape": ((2,), ("I64", "I32")),
        }
        if "weight_zero_point" in present:
            _whole(out, 32 // bits, "out")
            wanted["weight_zero_point"] = ((out * bits // 32, groups), ("I32",))
        if "weight_g_idx" in present:
            wanted["weight_g_idx"] = ((rows,), INDICES)
        return wanted

    def leaf(self, arrays, shape):
        if tuple(arrays["weight_shape"]) != tuple(shape):
            raise FormatError(
                f"weight_shape is {arrays['weight_shape'].tolist()}, the model wants {list(shape)}"
            )
        bits = 32 * arrays["weight_packed"].shape[1] // shape[1]
        values, scale = unpack(arrays["weight_packed"], bits, 1).T, arrays["weight_scale"].T
        zero, g_idx = arrays.get("weight_zero_point"), arrays.get("weight_g_idx")
        if zero is not None:
            zero = unpack(zero, bits, 0).T
        if g_idx is not None and np.any(g_idx < 0):  # -1 where it is not in use
            g_idx = None
        return _leaf_of(
            bits, values, scale, zero, g_idx, _size_of(shape[1], len(scale), self.sizes)
        )


@dataclasses.dataclass(frozen=True)
class Plain(Format):
    """compressed-tensors `int-quantized`, `float-quantized` and `naive-quantized`: `weight` int8 or
    float8 [out, in], `weight_scale` [out, groups], [out, 1], [1] or [out/128, in/128].

    Scales of activations are not read: activations stay in floating point, except with int8 where
    their rows may be rounded dynamically.

    Attributes:
      dynamic: see `Int8`.
      sizes: of groups, in the configuration.
    """

    dynamic: bool = False
    sizes: tuple[int, ...] = ()

    marker = "weight_scale"

    def wanted(self, shape, present):
        wanted = {"weight": (shape, ("I8", *FP8)), "weight_scale": (None, FLOATS)}
        zero = {"weight_zero_point": (None, ("I8", *FP8))}
        return wanted | (zero if "weight_zero_point" in present else {})

    def leaf(self, arrays, shape):
        out, rows = shape
        values = np.ascontiguousarray(arrays["weight"].T)
        scale = np.atleast_1d(arrays["weight_scale"])
        zero = arrays.get("weight_zero_point")
        if zero is not None and np.any(zero.astype(np.float32)):
            raise FormatError("weight_zero_point is not 0: only symmetric eight-bit is read")
        if scale.size == 1:
            scale = scale.reshape(1, 1)
        transposed = np.ascontiguousarray(scale.T)
        if values.dtype != np.int8:
            if scale.shape in ((1, 1), (out, 1)):
                return Fp8(values, transposed)
            if scale.shape == (-(-out // FP8_BLOCK), -(-rows // FP8_BLOCK)):
                return Fp8(values, transposed, FP8_BLOCK)
        elif scale.shape in ((1, 1), (out, 1)):
            columns = np.broadcast_to(transposed, (1, out)).astype(np.float32)
            return Int8(values, columns, self.dynamic)
        elif scale.ndim == 2 and scale.shape[0] == out:
            group = _size_of(rows, scale.shape[1], self.sizes)
            return _leaf_of(8, values.view(np.uint8) ^ np.uint8(128), transposed, None, group=group)
        raise FormatError(f"weight_scale {list(scale.shape)} does not fit {list(shape)}")


@dataclasses.dataclass(frozen=True)
class BitsAndBytes(Format):
    """`weight` uint8 [out in/2, 1], `weight.absmax`, `weight.quant_map` and, with double
    quantization, `weight.nested_absmax` and `weight.nested_quant_map`; the rest is JSON in
    `weight.quant_state.bitsandbytes__nf4`.

    Attributes:
      kind: "nf4" or "fp4".
    """

    kind: Literal["nf4", "fp4"] = "nf4"

    marker = "weight.absmax"

    @classmethod
    def from_config(cls, q: Mapping[str, Any]) -> BitsAndBytes:
        kind = q.get("bnb_4bit_quant_type", "fp4")
        if not q.get("load_in_4bit", q.get("_load_in_4bit")) or kind not in ("nf4", "fp4"):
            raise ValueError("of bitsandbytes, only load_in_4bit with nf4 or fp4 is read")
        storage = q.get("bnb_4bit_quant_storage", "uint8")
        _check_setting("bitsandbytes", "bnb_4bit_quant_storage", storage, "uint8")
        return cls(kind)

    @property
    def state(self) -> str:
        return f"weight.quant_state.bitsandbytes__{self.kind}"

    def wanted(self, shape, present):
        size = _whole(shape[0] * shape[1], 2, "out x in")
        double = "weight.nested_absmax" in present
        wanted: dict[str, Wanted] = {
            "weight": ((size, 1), ("U8",)),
            "weight.absmax": (None, ("U8",) if double else ("F32",)),
            "weight.quant_map": ((16,), ("F32",)),
            self.state: (None, ("U8",)),
        }
        if double:
            wanted["weight.nested_absmax"] = (None, ("F32",))
            wanted["weight.nested_quant_map"] = ((256,), ("F32",))
        return wanted

    def leaf(self, arrays, shape):
        state = json.loads(arrays[self.state].tobytes())
        if tuple(state["shape"]) != tuple(shape) or state["quant_type"] != self.kind:
            raise FormatError(f"{self.state} says {state}, the model wants {list(shape)}")
        out, rows = shape
        block, absmax = state["blocksize"], arrays["weight.absmax"]
        blocks = -(-out * rows // block)
        levels = np.array(LEVELS[self.kind], np.float32)
        # With a map in another order, or of other levels, the codes mean other numbers.
        if not np.allclose(arrays["weight.quant_map"], levels, atol=1e-6):
            raise FormatError(f"weight.quant_map is not that of {self.kind}")
        nested, offset = arrays.get("weight.nested_absmax"), None
        if nested is not None:
            offset = np.asarray(np.float32(state["nested_offset"]))
            if state["nested_blocksize"] != NESTED_BLOCK or not np.allclose(
                arrays["weight.nested_quant_map"], dynamic_map(), atol=1e-6
            ):
                raise FormatError("weight.nested_quant_map or nested_blocksize is not usual")
        if absmax.shape != (blocks,):
            raise FormatError(f"weight.absmax is {list(absmax.shape)}, not {[blocks]}")
        codes = arrays["weight"].reshape(-1)
        return NF4.from_bytes(codes, absmax, nested, offset, (out, rows), self.kind, block)


def formats_of(q: Mapping[str, Any]) -> tuple[Format, ...]:
    """The formats of a `quantization_config`.

    Raises:
      ValueError: it names a method, format or setting that is not supported.
    """
    method = q.get("quant_method")
    if method == "compressed-tensors":
        return _compressed(q)
    known = {"gptq": GPTQ, "awq": AWQ, "bitsandbytes": BitsAndBytes}
    if method not in known:
        names = ", ".join((*known, "compressed-tensors"))
        raise ValueError(f"quant_method {method!r} is not read; use one of {names}")
    return (known[method].from_config(q),)


def _compressed(q: Mapping[str, Any]) -> tuple[Format, ...]:
    known = ("pack-quantized", "int-quantized", "float-quantized", "naive-quantized")
    groups = (q.get("config_groups") or {}).values()
    kinds = {q.get("format"), *(group.get("format") for group in groups)} - {None}
    for kind in kinds - {*known, "mixed-precision", "dense"}:
        raise ValueError(f"compressed-tensors format {kind!r} is not read; use {', '.join(known)}")
    for key in ("sparsity_config", "transform_config"):
        value = q.get(key)
        if value and value.get("format") != "dense":
            raise ValueError(f"compressed-tensors with {key} is not read")
    activations = [group.get("input_activations") or {} for group in groups]
    dynamic = any(a.get("dynamic") and a.get("type", "int") == "int" for a in activations)
    weights = [group.get("weights") or {} for group in groups]
    sizes = tuple({w["group_size"] for w in weights if (w.get("group_size") or 0) > 0})
    return (PackQuantized(sizes), Plain(dynamic, sizes))

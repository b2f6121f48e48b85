"""Tensors of GGUF files as leaves: ggml's blocks, computed on as they are.

The bytes of a block are kept field by field (its scales apart from its quants), and the rows of a
file's tensor, `[out, in]`, are stored along the last dimension. Not a bit is changed: `to_bytes`
gives the file's bytes back. Left interleaved, unpacking took four times as long on CPU.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from lm import files
from lm.files.ggml import FP4_LEVELS, IQ4_LEVELS, BlockType, block_type
from lm.weights.blocked import BlockAxis, Blocked, Groups, lookup

F32 = jnp.float32
Fields = Mapping[str, jax.Array]  # each [*stack, blocks, count, R]
Decoder = Callable[[Fields, BlockType], Groups]


@flax.struct.dataclass
class GGUFBlocks(Blocked):
    """A matrix in one of ggml's block types.

    `dequantize(float32)` has the bits of `lm.files.dequantize`, except that XLA may count numbers
    below float32's normal range as zero.

    Attributes:
      fields: of the type, each of its own dtype: [*stack, K/block * numbers a block, R].
      kind: the type, as `Q4_K`.
      block_axis: "in", or "out" for an embedding table: K is that dimension.
    """

    fields: dict[str, Any]
    kind: str = flax.struct.field(pytree_node=False, default="Q8_0")
    block_axis: BlockAxis = flax.struct.field(pytree_node=False, default="in")

    @classmethod
    def quantize(cls, weight: jax.Array, kind: str, block_axis: BlockAxis = "in") -> GGUFBlocks:
        """ggml's reference rounding, on the host.

        Args:
          weight: [*stack, in, out].
          kind: one of `lm.files.gguf_blocks.QUANTIZERS` that is computed on here.
          block_axis: which dimension is cut into blocks.

        Raises:
          ValueError: no such type, or its blocks do not divide that dimension.
        """
        _decoder(kind)
        rows = np.asarray(weight, np.float32)
        rows = np.swapaxes(rows, -1, -2) if block_axis == "in" else rows
        raw = files.quantize(rows, kind)
        return jax.device_put(cls.from_bytes(raw, kind, rows.shape, block_axis))

    @classmethod
    def from_bytes(
        cls, raw: np.ndarray, kind: str, shape: Sequence[int], block_axis: BlockAxis = "in"
    ) -> GGUFBlocks:
        """From a file's tensor, with NumPy arrays: `jax.device_put` them where they belong.

        Args:
          raw: its bytes, uint8.
          kind: its type.
          shape: its shape, row-major: `[*stack, out, in]`, or `[vocab, embed]` of an embedding
            table, whose rows are taken, with `block_axis="out"`.
          block_axis: which dimension of the leaf's matrix is the last of `shape`.

        Raises:
          ValueError: a type that is not computed on here, or other bytes than `shape` needs.
        """
        _decoder(kind)
        layout = block_type(kind)
        *stack, R, K = shape
        nbytes = layout.row_bytes(K) * R * math.prod(stack)
        if raw.size != nbytes:
            raise ValueError(f"{raw.size} bytes given as {kind} {list(shape)}, which is {nbytes}")
        blocks = np.ascontiguousarray(raw).reshape(-1).view(layout.dtype)
        fields = {}
        for field in layout.fields:
            rows = blocks[field.name].reshape(*stack, R, -1)
            fields[field.name] = np.ascontiguousarray(np.swapaxes(rows, -1, -2))
        return cls(fields, kind, block_axis)

    def to_bytes(self) -> np.ndarray:
        """The bytes of the file's tensor: uint8 [*stack, R, bytes per row]."""
        layout = block_type(self.kind)
        K, R = self.size
        blocks = np.empty((*self.stack, R, K // layout.block), layout.dtype)
        for field in layout.fields:
            rows = np.swapaxes(np.asarray(self.fields[field.name]), -1, -2)
            blocks[field.name] = rows.reshape(*blocks.shape, field.count)
        return blocks.view(np.uint8)

    @property
    def size(self) -> tuple[int, int]:
        layout = block_type(self.kind)
        field = layout.fields[0]
        k, R = self.fields[field.name].shape[-2:]
        return k // field.count * layout.block, R

    @property
    def granularity(self) -> tuple[int, int]:
        return block_type(self.kind).block, 1

    def decode(self, dtype: DTypeLike) -> jax.Array:
        return self.groups().decode().astype(dtype).reshape(*self.stack, *self.size)

    def groups(self) -> Groups:
        """The blocks unpacked: quants [*stack, blocks, numbers of a block, R]."""
        layout = block_type(self.kind)
        K, R = self.size
        fields = {
            field.name: self.fields[field.name].reshape(
                *self.stack, K // layout.block, field.count, R
            )
            for field in layout.fields
        }
        return _decoder(self.kind)(fields, layout)

    def __str__(self) -> str:
        return f"GGUFBlocks {self.kind}"


# -- Decoders: fields, named as in ggml, to groups of numbers, in the order of ggml's reference
# code. Products of a 16-bit scale, a small scale and a quant are exact in float32, so that fusing
# the last addition into them changes nothing. ---------------------------------------------------


def unpack(b: Fields, kind: BlockType) -> jax.Array:
    """The quants in the order of the numbers: uint8 [*stack, blocks, kind.block, R]."""
    quants = None
    for plane in kind.planes:
        data = b[plane.field]
        *stack, count, R = data.shape
        data = data.reshape(*stack, count // plane.chunk, 1, plane.chunk, R)
        shifts = jnp.arange(0, 8, plane.bits, dtype=jnp.uint8)[:, None, None]
        part = (data >> shifts & ((1 << plane.bits) - 1)) << plane.shift
        part = part.reshape(*stack, kind.block, R)
        quants = part if quants is None else quants | part
    assert quants is not None, kind.name
    return quants


def _symmetric(zero: int) -> Decoder:
    return lambda b, kind: Groups(unpack(b, kind), b["d"].astype(F32), zero)


def _affine(b: Fields, kind: BlockType) -> Groups:
    return Groups(unpack(b, kind), b["d"].astype(F32), minimum=b["m"].astype(F32))


def _whole(b: Fields, kind: BlockType) -> Groups:
    return Groups(b["qs"], b["d"].astype(F32))


def _q2_k(b: Fields, kind: BlockType) -> Groups:
    scale = b["d"].astype(F32) * (b["scales"] & 15).astype(F32)
    minimum = b["dmin"].astype(F32) * (b["scales"] >> 4).astype(F32)
    return Groups(unpack(b, kind), scale, minimum=-minimum)


def _q3_k(b: Fields, kind: BlockType) -> Groups:
    """Sixteen scales of 6 bits: four in the halves of bytes 0-7, two more in bytes 8-11."""
    scales = b["scales"]
    low = jnp.concatenate([scales[..., :8, :] & 15, scales[..., :8, :] >> 4], axis=-2)
    shifts = jnp.arange(0, 8, 2, dtype=jnp.uint8)[:, None, None]
    high = scales[..., None, 8:, :] >> shifts & 3
    scale = (low | high.reshape(low.shape) << 4).astype(F32) - 32
    # A mask bit of 0 subtracts 4, which is a third bit of weight 4 and a zero point of 4.
    return Groups(unpack(b, kind), b["d"].astype(F32) * scale, zero=4)


def _q4_k(b: Fields, kind: BlockType) -> Groups:
    """Eight scales and minima of 6 bits: four whole in bytes 0-3 and 4-7, whose top bits go with
    the halves of bytes 8-11."""
    s, m, rest = (b["scales"][..., start : start + 4, :] for start in (0, 4, 8))
    scale = jnp.concatenate([s & 63, rest & 15 | s >> 6 << 4], axis=-2)
    minimum = jnp.concatenate([m & 63, rest >> 4 | m >> 6 << 4], axis=-2)
    scale = b["d"].astype(F32) * scale.astype(F32)
    return Groups(unpack(b, kind), scale, minimum=-(b["dmin"].astype(F32) * minimum.astype(F32)))


def _q6_k(b: Fields, kind: BlockType) -> Groups:
    return Groups(unpack(b, kind), b["d"].astype(F32) * b["scales"].astype(F32), zero=32)


def _iq4_nl(b: Fields, kind: BlockType) -> Groups:
    return Groups(lookup(unpack(b, kind), IQ4_LEVELS), b["d"].astype(F32))


def _iq4_xs(b: Fields, kind: BlockType) -> Groups:
    """Eight scales of 6 bits less 32: four in the halves of a byte, two in a 16-bit word."""
    low = b["scales_l"]
    low = jnp.stack([low & 15, low >> 4], axis=-2).reshape(*low.shape[:-2], 8, low.shape[-1])
    shifts = jnp.arange(0, 16, 2, dtype=jnp.uint16)[:, None]
    high = (b["scales_h"] >> shifts & 3).astype(jnp.uint8)
    scale = b["d"].astype(F32) * ((low | high << 4).astype(F32) - 32)
    return Groups(lookup(unpack(b, kind), IQ4_LEVELS), scale)


def _mxfp4(b: Fields, kind: BlockType) -> Groups:
    """The levels are doubled, so the scale is half of 2^(e - 127): two steps down in the exponent
    bits of a float32, and its two least values are below the normal range."""
    exponent = b["e"].astype(jnp.int32)
    bits = jnp.where(exponent > 1, (exponent - 1) << 23, 0x00200000 << exponent)
    half = jax.lax.bitcast_convert_type(bits, F32)
    return Groups(lookup(unpack(b, kind), FP4_LEVELS), half)


_DECODERS: Mapping[str, Decoder] = {
    "Q4_0": _symmetric(8),
    "Q4_1": _affine,
    "Q5_0": _symmetric(16),
    "Q5_1": _affine,
    "Q8_0": _whole,
    "Q2_K": _q2_k,
    "Q3_K": _q3_k,
    "Q4_K": _q4_k,
    "Q5_K": _q4_k,
    "Q6_K": _q6_k,
    "IQ4_NL": _iq4_nl,
    "IQ4_XS": _iq4_xs,
    "TQ2_0": _symmetric(1),
    "MXFP4": _mxfp4,
}
KINDS = tuple(_DECODERS)


def _decoder(kind: str) -> Decoder:
    if kind not in _DECODERS:
        raise ValueError(
            f"no products on {kind!r} blocks; those of {', '.join(KINDS)} can be kept, others "
            "take lm.files.dequantize"
        )
    return _DECODERS[kind]

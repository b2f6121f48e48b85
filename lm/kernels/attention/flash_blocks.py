"""Block sizes of flash attention, by TPU generation and head size, and the VMEM they need."""

from __future__ import annotations

from typing import NamedTuple

MIB = 1 << 20
LANES = 128

# VMEM of a core, from `jax.experimental.pallas.tpu.get_tpu_info_for_chip`, by the chip's name in
# `lm.sharding.chips`.
VMEM = {
    "TPU v4": 16 * MIB, "TPU v5e": 128 * MIB, "TPU v5p": 64 * MIB, "TPU v6e": 128 * MIB,
    "TPU7x": 64 * MIB,
}  # fmt: skip
SMALLEST = 16 * MIB


class Blocks(NamedTuple):
    """Tokens of a block, and the heads and keys one kernel call holds.

    Attributes:
      forward: (queries, keys) of the forward kernel.
      backward: (queries, keys) of the backward kernel.
      heads: most query heads that are visited together.
      resident: most keys whose gradients the backward kernel holds in VMEM; longer rows take a
        call for each so many keys.
    """

    forward: tuple[int, int]
    backward: tuple[int, int]
    heads: int
    resident: int


# (chip, padded head size of queries and keys); None: the safe default, within 16 MiB.
TABLE: dict[tuple[str | None, int], Blocks] = {
    (None, 128): Blocks((512, 512), (256, 512), 4, 2048),
    (None, 256): Blocks((256, 512), (256, 256), 2, 1024),
    (None, 640): Blocks((256, 256), (128, 128), 1, 512),
}


def blocks_for(chip: str | None, head_dim: int) -> Blocks:
    """The entry of the table for this chip and head size, or the next larger size's.

    Raises:
      ValueError: no entry is large enough.
    """
    for key in (chip, None):
        sizes = sorted(size for c, size in TABLE if c == key and size >= head_dim)
        if sizes:
            return TABLE[key, sizes[0]]
    largest = max(size for _, size in TABLE)
    raise ValueError(
        f"flash attention's largest head size is {largest}, got {head_dim}; "
        "use implementation='reference'"
    )


def even(length: int, block: int) -> int:
    """The block size that cuts `length` into as many parts as `block` would, with least padding."""
    parts = -(-length // block)
    return min(block, -(-length // (parts * LANES)) * LANES)


def _lanes(size: int) -> int:
    return -(-size // LANES) * LANES


def forward_vmem(blocks: Blocks, heads: int, h: int, d: int, itemsize: int) -> int:
    """Bytes the forward kernel holds: two of each block of its operands, scratch, and scores."""
    (t, s), h, d = blocks.forward, _lanes(h), _lanes(d)
    operands = heads * t * (h + d) * itemsize + s * (h + d) * itemsize + 8 * 8 * (t + s)
    scratch = heads * t * (d + 16) * 4
    return 2 * operands + scratch + 3 * s * t * 4 + heads * t * d * 4


def backward_vmem(blocks: Blocks, heads: int, keys: int, h: int, d: int, itemsize: int) -> int:
    """Bytes the backward kernel holds, with the gradients of `keys` keys."""
    (t, s), h, d = blocks.backward, _lanes(h), _lanes(d)
    operands = heads * t * ((h + d) * itemsize + h * 4 + 64) + s * (h + d) * itemsize
    resident = 2 * keys * (h + d) * 4
    return 2 * operands + resident + heads * t * h * 4 + 5 * s * t * 4

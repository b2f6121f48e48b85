"""Block sizes of flash attention, by TPU generation and head size, and the VMEM they need."""

from __future__ import annotations

from typing import NamedTuple

MIB = 1 << 20
LANES = 128

# VMEM of a core, from `jax.experimental.pallas.tpu.get_tpu_info_for_chip`, by the chip's name in
# `lm.hardware.chips`.
VMEM = {
    "TPU v4": 16 * MIB, "TPU v5e": 128 * MIB, "TPU v5p": 64 * MIB, "TPU v6e": 128 * MIB,
    "TPU7x": 64 * MIB,
}  # fmt: skip
SMALLEST = 16 * MIB


def vmem_of(chip: str | None) -> int:
    """Bytes of a core's VMEM that a kernel may ask for, by the name in `lm.hardware.chips`."""
    return VMEM.get(chip or "", SMALLEST) * 15 // 16


def vmem_limit(estimate: int, chip: str | None) -> int:
    """Bytes to ask for: half as much again as the estimate, for what the compiler spills."""
    return min(max(estimate * 3 // 2, SMALLEST), vmem_of(chip))


class Blocks(NamedTuple):
    """Tokens of a block, and the heads and keys one kernel call holds.

    Attributes:
      forward: (queries, keys) of the forward kernel.
      backward: (queries, keys) of the backward kernel.
      heads: most query heads that are visited together.
      resident: most keys whose gradients the backward kernel holds in VMEM; longer rows take
        one call per that many keys.
    """

    forward: tuple[int, int]
    backward: tuple[int, int]
    heads: int
    resident: int


# By chip and largest head size; None: any chip, within 16 MiB. Chosen by the compiler's static
# schedules (bundles of a visit) and the cost of a grid step, not measured on hardware.
_LARGE = {
    128: Blocks((512, 1024), (512, 512), 4, 8192),
    256: Blocks((512, 1024), (512, 512), 2, 8192),
    640: Blocks((256, 512), (256, 256), 1, 2048),
}
TABLE: dict[tuple[str | None, int], Blocks] = {
    (None, 128): Blocks((512, 512), (256, 512), 4, 2048),
    (None, 256): Blocks((256, 512), (256, 256), 2, 1024),
    (None, 640): Blocks((256, 256), (128, 128), 1, 512),
    **{
        (chip, size): blocks
        for chip in ("TPU v5e", "TPU v5p", "TPU v6e", "TPU7x")
        for size, blocks in _LARGE.items()
    },
}
MOST_KEYS = 1024


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
    """The block size that cuts `length` into as many parts as `block` does, with least padding."""
    parts = -(-length // block)
    return min(block, -(-length // (parts * LANES)) * LANES)


def grown(block: tuple[int, int], heads: int, blocks: Blocks) -> tuple[int, int]:
    """A block with more keys where fewer heads share them, so that a visit is as much work."""
    query, key = block
    return query, max(key, min(MOST_KEYS, key * blocks.heads // heads))


def _lanes(size: int) -> int:
    return -(-size // LANES) * LANES


def forward_vmem(query: int, key: int, heads: int, h: int, d: int, itemsize: int) -> int:
    """Bytes the forward kernel holds: two of each block of its operands, scratch, and scores."""
    h, d = _lanes(h), _lanes(d)
    operands = heads * query * ((h + d) * itemsize + 4) + key * (h + d) * itemsize
    scratch = heads * query * (d + 16) * 4
    return 2 * operands + scratch + heads * query * d * 4 + 4 * query * key * 4


def backward_vmem(
    query: int, key: int, keys: int, heads: int, h: int, d: int, itemsize: int
) -> int:
    """Bytes the backward kernel holds, the gradients of `keys` keys and values among them."""
    h, d = _lanes(h), _lanes(d)
    operands = heads * query * ((h + d) * itemsize + h * 8 + 8) + key * (h + d) * itemsize
    return 2 * operands + 2 * keys * (h + d) * 4 + heads * query * h * 4 + 4 * query * key * 4

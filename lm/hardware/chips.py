"""Peak figures of accelerators, by the names JAX gives them. No JAX.

Peaks are dense bfloat16 with float32 accumulation, as the vendors state them. TPUs: the pages of
each version at docs.cloud.google.com/tpu/docs (v2 ... v6e, tpu7x); v4's links: "TPU v4: An
Optically Reconfigurable Supercomputer" (arXiv:2304.01433, table 4). GPUs: NVIDIA's data sheets,
whose larger figures "with sparsity" are twice these.
"""

from __future__ import annotations

import dataclasses
import math

GIB = 2.0**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """An accelerator chip. Figures that are unknown, or unused, are None.

    Attributes:
      name: its common name.
      kinds: prefixes of `jax.Device.device_kind`.
      flops: peak operations per second of the chip.
      num_devices: devices that JAX counts for one chip: v2, v3 and TPU7x show each of their two
        cores; v4 and v5p join theirs (megacore).
      hbm_bytes: memory.
      usable_hbm_bytes: memory a program may use: libtpu's "available HBM" (libtpu 0.0.42), whose
        last digit differs between programs; for GPUs all of the data sheet's.
      hbm_bandwidth: bytes per second.
      links: to neighbouring chips: 2 per dimension of a torus; 1 for a switch between all.
      link_bandwidth: bytes per second of one link, one way. (The vendors' "bidirectional" figure is
        for all links both ways.)
      dcn_bandwidth: bytes per second, one way, of a chip's share of the data-centre network.
      wraps: a torus dimension of at least this many chips has its ends joined; the dimensions of
        v4, v5p and TPU7x must be multiples of it.
    """

    name: str
    kinds: tuple[str, ...]
    flops: float
    num_devices: int = 1
    hbm_bytes: float | None = None
    usable_hbm_bytes: float | None = None
    hbm_bandwidth: float | None = None
    links: int | None = None
    link_bandwidth: float | None = None
    dcn_bandwidth: float | None = None
    wraps: int = 0

    def share(self, figure: float | None) -> float:
        """One device's part of a figure of the chip; infinite where the figure is not known."""
        return (figure or math.inf) / self.num_devices


CHIPS = (
    Chip("TPU v2", ("TPU v2",), 45e12, num_devices=2),
    Chip("TPU v3", ("TPU v3",), 123e12, num_devices=2),
    Chip("TPU v4", ("TPU v4",), 275e12, 1, 32 * GIB, 30.75 * GIB, 1200e9, 6, 50e9, None, 4),
    Chip("TPU v5e", ("TPU v5 lite", "TPU v5e"), 197e12, 1, 16 * GIB, 15.75 * GIB, 819e9, 4, 50e9,
         25e9 / 8, 16),
    Chip("TPU v5p", ("TPU v5", "TPU v5p"), 459e12, 1, 96 * GIB, 95.73 * GIB, 2765e9, 6, 100e9,
         50e9 / 8, 4),
    Chip("TPU v6e", ("TPU v6 lite", "TPU v6e"), 918e12, 1, 32 * GIB, 31.24 * GIB, 1638e9, 4, 100e9,
         100e9 / 8, 16),
    Chip("TPU7x", ("TPU7x", "TPU v7x"), 2307e12, 2, 192 * GIB, 189.5 * GIB, 7380e9, 6, 100e9,
         100e9 / 8, 4),
    Chip("A100", ("NVIDIA A100",), 312e12),
    Chip("L4", ("NVIDIA L4",), 121e12),
    Chip("H100 PCIe", ("NVIDIA H100 PCIe",), 756e12),
    Chip("H100", ("NVIDIA H100 80GB HBM3",), 989e12, 1, 80e9, 80e9, 3350e9, 1, 450e9, 50e9),
    Chip("H200", ("NVIDIA H200",), 989e12, 1, 141e9, 141e9, 4800e9, 1, 450e9, 50e9),
    Chip("H100 and H200 NVL", ("NVIDIA H100 NVL", "NVIDIA H200 NVL"), 835e12),
)  # fmt: skip


def chip_of(device_kind: str) -> Chip | None:
    """The chip of a `jax.Device.device_kind`, e.g. "TPU v5 lite"; None for one not in the table.

    A TPU's kind must match in full ("TPU v4 lite" is not a v4); a GPU's may be longer
    ("NVIDIA A100-SXM4-40GB"), and the longest prefix counts.
    """
    found = [
        (len(kind), chip)
        for chip in CHIPS
        for kind in chip.kinds
        if device_kind == kind or (kind.startswith("NVIDIA") and _begins(device_kind, kind))
    ]
    return max(found, key=lambda pair: pair[0])[1] if found else None


def _begins(device_kind: str, kind: str) -> bool:
    """Whether `kind` is a prefix that ends a word: "NVIDIA L40S" is not an L4."""
    return device_kind.startswith(kind) and not device_kind[len(kind) :][:1].isalnum()


def peak_flops(device_kind: str) -> float | None:
    """Peak operations per second of one device as JAX counts devices; None where unknown."""
    chip = chip_of(device_kind)
    return None if chip is None else chip.share(chip.flops)

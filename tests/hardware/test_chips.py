"""What is known of accelerators, against what their compiler says."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lm.hardware import topologies
from lm.hardware.chips import CHIPS, GIB, Chip, chip_of, peak_flops
from tests.hardware.compilers import need

SHAPES = {"v4": "2x2x1", "v5e": "2x2", "v5p": "2x2x1", "v6e": "2x2", "tpu7x": "2x2x1"}


def test_names_of_kinds() -> None:
    for kind, name in {
        "TPU v4": "TPU v4", "TPU v5 lite": "TPU v5e", "TPU v5": "TPU v5p", "TPU v6 lite": "TPU v6e",
        "TPU7x": "TPU7x", "NVIDIA H100 80GB HBM3": "H100", "NVIDIA H100 PCIe": "H100 PCIe",
        "NVIDIA H200": "H200", "NVIDIA L4": "L4", "NVIDIA A100-SXM4-40GB": "A100",
        "NVIDIA A100 80GB PCIe": "A100", "TPU v4 lite": None, "NVIDIA L40S": None,
        "NVIDIA GH200 480GB": None, "cpu": None,
    }.items():  # fmt: skip
        chip = chip_of(kind)
        assert (chip and chip.name) == name
    assert peak_flops("TPU7x") == 2307e12 / 2 and peak_flops("cpu") is None


@pytest.mark.parametrize("chip", [chip for chip in CHIPS if chip.name.startswith("TPU")])
def test_tpus_against_the_table_pallas_keeps(chip: Chip) -> None:
    """They agree within rounding, v3 aside: 123e12 where it is sold, 140e12 in Pallas."""
    version = pltpu.ChipVersion(chip.name.removeprefix("TPU").strip())
    info = pltpu.get_tpu_info_for_chip(version, 1)
    cores = version.num_physical_tensor_cores_per_chip
    assert chip.flops == pytest.approx(info.bf16_ops_per_second * cores, rel=0.13)
    assert chip.num_devices == (cores if chip.name in ("TPU v2", "TPU v3", "TPU7x") else 1)
    assert peak_flops(chip.kinds[0]) == pytest.approx(chip.flops / chip.num_devices)


def test_figures_are_of_one_chip_and_hang_together() -> None:
    for chip in CHIPS:
        if chip.hbm_bytes is None:
            continue
        assert chip.usable_hbm_bytes is not None
        assert chip.usable_hbm_bytes <= chip.hbm_bytes
        assert chip.hbm_bandwidth is not None
        # Between one and two thousand operations a byte would be no chip that exists.
        assert 100 < chip.flops / chip.hbm_bandwidth < 600


@pytest.mark.aot
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[] if n == "v6e" else [pytest.mark.slow]) for n in SHAPES]
)
def test_usable_memory_is_what_the_compiler_says(name: str) -> None:
    need(f"{name}:{SHAPES[name]}")
    devices = topologies.describe(f"{name}:{SHAPES[name]}")
    mesh = Mesh(np.array(devices), ("x",))
    replicated = NamedSharding(mesh, PartitionSpec())
    x = jax.ShapeDtypeStruct((65536, 2**19), jnp.float32, sharding=replicated)
    with pytest.raises(jax.errors.JaxRuntimeError) as error:
        jax.jit(lambda x: jnp.sum(jnp.tanh(x) @ x.T)).lower(x).compile()
    match = re.search(r"exceeds available HBM \(([\d.]+)G\)", str(error.value))
    assert match is not None
    chip = chip_of(devices[0].device_kind)
    assert chip is not None
    usable = chip.share(chip.usable_hbm_bytes) / GIB
    assert usable == pytest.approx(float(match[1]), abs=0.02)

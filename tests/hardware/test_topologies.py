"""Devices that are not here: their names, what is refused, and what is written to stderr."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from lm.hardware import topologies
from tests.hardware.compilers import need
from tests.refuses import refuses


def test_names() -> None:
    for name, parsed in {
        "v5e:2x2": (1, "v5e", (2, 2)), "V6E:16x16": (1, "v6e", (16, 16)),
        "2*v5p:4x4x8": (2, "v5p", (4, 4, 8)), "h200:8": (1, "h200", (8,)),
    }.items():  # fmt: skip
        assert topologies.parse(name) == parsed


def test_wrong_names_are_refused_with_what_works() -> None:
    for name, message in {
        "v9:2x2": "topology 'v9:2x2' is unknown; known chips are v4, v5e",
        "v5e": "is unknown",
        "v5e:2x2x2": "a v5e slice has 2 dimensions; v5e:4x4",
        "v5e:0x2": "has no chips",
        "h200:9": "one host of 1 to 8",
        "2*h200:8": "one host of 1 to 8",
    }.items():
        refuses(lambda name=name: topologies.parse(name), message, error=topologies.TopologyError)


@pytest.mark.aot
@pytest.mark.parametrize(
    ("name", "count", "kind"),
    [
        ("v5e:1x1", 1, "TPU v5 lite"),
        ("v6e:4x8", 32, "TPU v6 lite"),
        ("v4:2x2x1", 4, "TPU v4"),
        ("v5p:4x4x4", 64, "TPU v5"),
        ("tpu7x:2x2x1", 8, "TPU7x"),
        ("2*v5e:2x2", 8, "TPU v5 lite"),
        ("h200:4", 4, "NVIDIA H200"),
    ],
)
def test_devices_of_a_topology(name, count, kind) -> None:
    need(name)
    slices = topologies.parse(name)[0]
    devices = topologies.describe(name)
    assert [d.device_kind for d in devices] == [kind] * count
    assert len({getattr(d, "slice_index", 0) for d in devices}) == slices


@pytest.mark.aot
def test_sizes_that_make_no_hosts_are_refused() -> None:
    need("v5e:3x3")
    refuses(lambda: topologies.describe("v5e:3x3"), "does not divide into hosts of 2x2 chips")


@pytest.mark.aot
def test_nothing_is_written_about_hardware_that_is_not_here() -> None:
    need("v5e:2x2")
    code = "from lm.hardware import topologies; print(len(topologies.describe('v5e:2x2')))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
    )  # fmt: skip
    assert (done.stdout, done.stderr) == ("4\n", "")


def test_everything_is_written_of_a_failure(capfd) -> None:
    with topologies.quiet():
        os.write(2, b"noise\n")
    assert capfd.readouterr().err == ""

    def fail() -> None:
        with topologies.quiet():
            os.write(2, b"the reason\n")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    os.write(2, b"after\n")
    assert capfd.readouterr().err == "the reason\nafter\n"

"""Compilers for devices that are not here; they are not installed everywhere."""

import pytest

from lm.hardware import topologies


def need(topology: str) -> None:
    """Skips the test where nothing compiles for a topology."""
    chip = topologies.parse(topology)[1]
    if not topologies.available(chip):
        pytest.skip(f"no compiler for {chip} here; `make compilers` installs it")

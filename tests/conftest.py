"""Eight fake CPU devices and one persistent compile cache for the whole suite."""

from __future__ import annotations

import os
import pathlib

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent

os.environ.setdefault("JAX_PLATFORMS", "cpu")
_flags = os.environ.get("XLA_FLAGS", "")
if "xla_force_host_platform_device_count" not in _flags:
    # On a loaded machine a fake device may wait long for the others; by default that is an abort.
    _flags += " --xla_force_host_platform_device_count=8"
    _flags += " --xla_cpu_collective_call_terminate_timeout_seconds=600"
    os.environ["XLA_FLAGS"] = _flags.strip()
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".cache" / "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("HF_HUB_OFFLINE", "1")


@pytest.fixture(autouse=True)
def quick_to_compile(request: pytest.FixtureRequest):
    """Without most of LLVM's passes: they take longer than they save of programs so small.

    Not where commands are tested, which compute more, nor where what the compiler makes is.
    """
    import jax

    of_commands = request.path.relative_to(ROOT).parts[1] in (
        "aot",
        "distributed",
        "experiments",
        "hardware",
        "notebooks",
        "sharding",
    )
    quick = not of_commands and request.node.get_closest_marker("aot") is None
    jax.config.update("jax_disable_most_optimizations", quick)
    yield
    jax.config.update("jax_disable_most_optimizations", False)

"""Eight fake CPU devices, one compile cache for all clones, and what the tests took."""

from __future__ import annotations

import importlib.metadata
import os
import pathlib
import zlib

import pytest

from lm.files.packaged import cache_folder
from tests import budgets

ROOT = pathlib.Path(__file__).resolve().parent.parent


def compile_cache() -> pathlib.Path:
    """The user's, of this jaxlib and kind of CPU: its programs may not run on another."""
    cpu = pathlib.Path("/proc/cpuinfo")
    lines = cpu.read_text().splitlines() if cpu.exists() else []
    kind = sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))})
    name = f"{importlib.metadata.version('jaxlib')}-{zlib.crc32(repr(kind).encode()):08x}"
    return cache_folder() / "xla" / name


os.environ.setdefault("JAX_PLATFORMS", "cpu")
_flags = os.environ.get("XLA_FLAGS", "")
if "xla_force_host_platform_device_count" not in _flags:
    # On a loaded machine a fake device may wait long for the others; by default that is an abort.
    _flags += " --xla_force_host_platform_device_count=8"
    _flags += " --xla_cpu_collective_call_terminate_timeout_seconds=600"
    # Without a module of MLIR for every fusion a program compiles in half the time. Users' programs
    # keep XLA's defaults; XLA_FLAGS=--xla_force_host_platform_device_count=8 tests with these.
    if importlib.metadata.version("jaxlib") == "0.10.2":  # of an unknown flag XLA aborts
        _flags += " --xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
    os.environ["XLA_FLAGS"] = _flags.strip()
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(compile_cache())
    # A limit is also what makes JAX lock the folder, which several processes write.
    os.environ.setdefault("JAX_COMPILATION_CACHE_MAX_SIZE", str(4 << 30))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")
# Most of LLVM's passes take longer than they save of programs so small, in processes apart as well.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("HF_HUB_OFFLINE", "1")


@pytest.fixture(autouse=True)
def quick_to_compile(request: pytest.FixtureRequest):
    """With all of LLVM's passes only where what the compiler makes is tested."""
    import jax

    folder = budgets.folder_of(request.node.nodeid)
    thorough = folder in ("aot", "hardware") or request.node.get_closest_marker("aot")
    jax.config.update("jax_disable_most_optimizations", not thorough)
    yield
    jax.config.update("jax_disable_most_optimizations", True)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config):
    found = [r for some in terminalreporter.stats.values() for r in some if hasattr(r, "duration")]
    if found:
        terminalreporter.section("seconds by folder")
        for line in budgets.table(found, budgeted=config.option.markexpr == "not slow"):
            terminalreporter.write_line(line)

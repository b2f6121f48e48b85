"""Accelerators that are not here: devices to compile for, as the compiler describes them.

    devices = describe("v5e:16x16")          # a TPU slice, as the cloud names its shapes
    devices = describe("2*v5p:4x4x8")        # two of them, joined by the data-centre network
    devices = describe("h200:8")             # a host of GPUs

Nothing can run on such a device; `jax.jit(f).lower(...).compile()` for it gives the program, its
memory and its collectives. TPUs need the package `libtpu`, GPUs `jax-cuda12-plugin` and its
`jax-cuda12-pjrt` (no driver), in this environment or in the folder `COMPILERS`, where other
programs do not find them.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import math
import os
import pathlib
import re
import sys
import tempfile
from collections.abc import Iterator
from typing import Any

import jax
from jax.experimental import topologies

COMPILERS = pathlib.Path(os.environ.get("LM_COMPILERS", pathlib.Path(sys.prefix) / "aot"))

TPUS = {"v4": 3, "v5e": 2, "v5p": 3, "v6e": 2, "tpu7x": 3}  # dimensions of the torus
GPUS = {"h200": 8}  # at most on a host
_CUDA = ("jax_plugins.xla_cuda12", "jax_plugins.xla_cuda13")

# A GpuTargetConfigProto. Figures: NVIDIA H200 data sheet and CUDA C programming guide, table of
# technical specifications, compute capability 9.0.
_H200 = """
gpu_device_info {
  cuda_compute_capability { major: 9 }
  core_count: 132  fpus_per_core: 128  clock_rate_ghz: 1.98
  threads_per_warp: 32  threads_per_block_limit: 1024  threads_per_core_limit: 2048
  block_dim_limit_x: 2147483647  block_dim_limit_y: 65535  block_dim_limit_z: 65535
  registers_per_block_limit: 65536  registers_per_core_limit: 65536
  shared_memory_per_block: 49152  shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472  l2_cache_size: 52428800
  memory_bandwidth: 4800000000000  device_memory_size: 151397597184
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 }
device_description_str: "NVIDIA H200"
"""


class TopologyError(ValueError):
    """There is no such topology, or nothing here compiles for it; the message says what works."""


def parse(name: str) -> tuple[int, str, tuple[int, ...]]:
    """(slices, chip, sizes) of a topology's name.

    Raises:
      TopologyError: the name is not one.
    """
    match = re.fullmatch(r"(?:(\d+)\*)?([a-z0-9]+):(\d+(?:x\d+)*)", name.lower())
    known = f"{', '.join(TPUS)} (v5e:4x4, v5p:4x4x8, 2*v5p:4x4x8) and {', '.join(GPUS)} (h200:8)"
    if match is None or match[2] not in (*TPUS, *GPUS):
        raise TopologyError(f"topology {name!r} is unknown; known chips are {known}")
    slices, chip = int(match[1] or 1), match[2]
    sizes = tuple(int(size) for size in match[3].split("x"))
    if 0 in (slices, *sizes):
        raise TopologyError(f"topology {name!r} has no chips; sizes start at 1")
    if chip in GPUS and (len(sizes) != 1 or slices != 1 or sizes[0] > GPUS[chip]):
        raise TopologyError(f"topology {name!r}: {chip} is one host of 1 to {GPUS[chip]}; {chip}:8")
    if chip in TPUS and len(sizes) != TPUS[chip]:
        example = "x".join(["4"] * TPUS[chip])
        raise TopologyError(
            f"topology {name!r}: a {chip} slice has {TPUS[chip]} dimensions; {chip}:{example}"
        )
    return slices, chip, sizes


def describe(name: str) -> list[Any]:
    """The devices of a topology, for `make_mesh`.

    Raises:
      TopologyError: no such topology, its compiler is not installed, or it refuses the shape.
    """
    slices, chip, sizes = parse(name)
    if not available(chip):
        raise TopologyError(
            "compiling for this topology needs the package "
            f"{'libtpu' if chip in TPUS else 'jax-cuda12-plugin'}; `make compilers` puts it into "
            f"{COMPILERS}, or set LM_COMPILERS to a folder that has it"
        )
    if chip in GPUS:
        options: dict[str, Any] = {
            "platform": "cuda", "topology_name": "", "target_config": _H200,
            "topology": f"1x1x{sizes[0]}",
        }  # fmt: skip
    else:
        options = {"platform": "tpu", "topology_name": f"{chip}:{'x'.join(map(str, sizes))}"}
        hosts = (2, 2, 1)[: len(sizes)]
        if any(size % host for size, host in zip(sizes, hosts, strict=True)):
            if math.prod(sizes) > 4:
                raise TopologyError(
                    f"topology {name!r} does not divide into hosts of 2x2 chips; use even sizes"
                )
            options["chips_per_host_bounds"] = (*sizes, 1)[:3]
        if chip == "v4":
            options["chip_config_name"] = "megacore"
        if slices > 1:
            options["num_slices"] = slices
    try:
        with quiet():
            jax.devices("cpu")  # what starting JAX loads speaks too
            try:
                return list(topologies.get_topology_desc(**options).devices)
            except NotImplementedError:  # JAX was started before its plugin could be found
                if chip not in GPUS:
                    raise
                importlib.import_module(next(filter(_found, _CUDA))).initialize()
                return list(topologies.get_topology_desc(**options).devices)
    except (jax.errors.JaxRuntimeError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise TopologyError(f"topology {name!r} is refused by its compiler: {reason}") from error


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Drops what libtpu and XLA write to stderr about missing hardware, unless the block raises.

    They write to the file descriptor, past Python's `sys.stderr`.
    """
    sys.stderr.flush()
    kept = os.dup(2)
    with tempfile.TemporaryFile() as said:
        os.dup2(said.fileno(), 2)
        try:
            yield
        except BaseException:
            os.dup2(kept, 2)
            said.seek(0)
            os.write(2, said.read())
            raise
        finally:
            os.dup2(kept, 2)
            os.close(kept)


def _prepare() -> None:
    """Makes the packages in COMPILERS importable, and lets several processes compile at once."""
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    runtime = COMPILERS / "jax_cuda12_plugin" / "libmosaic_gpu_runtime.so"
    if runtime.exists():  # JAX looks for it once, when Pallas is imported: maybe before this
        os.environ.setdefault("MOSAIC_GPU_RUNTIME_LIB_PATH", str(runtime))
    if COMPILERS.is_dir() and str(COMPILERS) not in sys.path:
        sys.path.append(str(COMPILERS))
        importlib.invalidate_caches()


def available(chip: str) -> bool:
    """Whether programs for this chip can be compiled here."""
    _prepare()
    return any(_found(name) for name in (("libtpu",) if chip in TPUS else _CUDA))


def _found(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False

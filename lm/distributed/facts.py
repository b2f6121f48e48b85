"""What must be the same on all hosts of a run for them to compute the same program."""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import pathlib
import platform
import re
import sys
from collections.abc import Mapping

PACKAGES = ("jax", "jaxlib", "libtpu", "flax", "optax", "orbax-checkpoint", "numpy")
SOURCES = ("lm", "data_pipelines", "experiments")
# Variables of JAX that say where a host is, where its files go or what it prints.
OF_A_HOST = re.compile(
    "DIR|PATH|CACHE|LOG|DUMP|TRACE|PROFIL|COORDINATOR|PROCESS|HOST|PARTITION|SLICE|LOCAL|PORT"
)
FLAGS = ("XLA_FLAGS", "LIBTPU_INIT_ARGS")
FLAG_OF_A_HOST = re.compile(
    "dump|log|cache|path|_dir|results|force_host_platform_device_count|threads"
)


def program_facts(environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Program, versions, environment and a hash of each source file, by name."""
    main = sys.modules["__main__"]
    spec = getattr(main, "__spec__", None)
    found = {"program": spec.name if spec else pathlib.Path(sys.argv[0]).name}
    if spec is None and os.path.isfile(sys.argv[0]):
        found["code of the program"] = _hash(pathlib.Path(sys.argv[0]))
    found["version of python"] = platform.python_version()
    for package in PACKAGES:
        try:
            found[f"version of {package}"] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found | environment(environ) | sources(pathlib.Path(__file__).parents[2])


def environment(environ: Mapping[str, str]) -> dict[str, str]:
    """Variables and compiler flags that decide the program, each flag by itself."""
    found = {
        name: value
        for name, value in sorted(environ.items())
        if name.startswith("JAX_") and not OF_A_HOST.search(name)
    }
    for name in FLAGS:
        for flag in environ.get(name, "").split():
            key, _, value = flag.partition("=")
            if not FLAG_OF_A_HOST.search(key):
                found[f"{name} {key}"] = value
    return found


def sources(root: pathlib.Path) -> dict[str, str]:
    """Hashes of this project's source files below `root`, by relative path."""
    return {
        f"code of {path.relative_to(root)}": _hash(path)
        for folder in SOURCES
        for path in sorted((root / folder).rglob("*.py"))
    }


def _hash(path: pathlib.Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:8]

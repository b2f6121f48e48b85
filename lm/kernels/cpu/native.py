"""The C++ files beside this one: compiled where they are first used, then registered with JAX.

Nothing depends on them: where there is no compiler, or it fails, one line is logged and plain JAX
computes the same. `LM_NATIVE=0` turns them off. Libraries are kept in the user's cache directory
(`XDG_CACHE_HOME` or ~/.cache), named by what they were made of: sources, jaxlib, this CPU.
"""

from __future__ import annotations

import atexit
import ctypes
import functools
import hashlib
import importlib.metadata
import logging
import os
import pathlib
import platform
import shutil
import subprocess
import tempfile

import jax

FOLDER = pathlib.Path(__file__).parent
COMPILERS = ("c++", "g++", "clang++")
FLAGS = ("-std=c++17", "-O3", "-march=native", "-fPIC", "-shared")
TIMEOUT = 120.0  # seconds of a compiler, which takes about ten
log = logging.getLogger(__name__)


@functools.cache
def available(name: str) -> bool:
    """Whether the kernel in the file `name`.cc can be called, as FFI target "lm_" and its name.

    Builds it if need be.
    """
    if os.environ.get("LM_NATIVE", "1") == "0":
        return False
    try:
        path = built(name)
        try:
            library = ctypes.CDLL(str(path))
        except OSError:
            path.unlink(missing_ok=True)  # damaged; the next process compiles it again
            raise
        jax.ffi.register_ffi_target(
            f"lm_{name}", jax.ffi.pycapsule(getattr(library, name)), platform="cpu"
        )
    except Exception as error:
        log.warning(
            "the CPU kernel %s cannot be used (%s); plain JAX computes the same, slower",
            name,
            error,
        )
        return False
    return True


def cache_directory() -> pathlib.Path:
    """Where libraries are kept."""
    base = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    return pathlib.Path(base) / "lm" / "native"


def built(name: str) -> pathlib.Path:
    """The library, compiled if it is not in the cache.

    Raises:
      OSError: it cannot be compiled; the message says why.
    """
    sources = FOLDER / f"{name}.cc", FOLDER / "lanes.h"
    made_of = [source.read_bytes() for source in sources]
    made_of += [importlib.metadata.version("jaxlib").encode(), " ".join(FLAGS).encode(), _cpu()]
    key = hashlib.sha256(b"\0".join(made_of)).hexdigest()[:20]
    path = cache_directory() / f"{name}-{key}.so"
    if path.is_file():
        return path
    gave_up = path.with_suffix(".failed")
    if gave_up.is_file():
        raise OSError(f"it did not compile before: {gave_up}; delete that file to try again")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        folder = tempfile.mkdtemp(dir=path.parent)
    except OSError:  # read-only or full: for this process alone
        folder = tempfile.mkdtemp()
        path = pathlib.Path(folder, path.name)
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
    made = pathlib.Path(folder, "made.so")
    try:
        _compile(sources[0], made)
        os.replace(made, path)  # of processes that build at once, the last one's
    except TimeoutError:
        gave_up.write_text("the compiler did not end\n")
        raise
    finally:
        if path.parent != pathlib.Path(folder):
            shutil.rmtree(folder, ignore_errors=True)
    return path


def _compile(source: pathlib.Path, target: pathlib.Path) -> None:
    """Raises OSError: there is no compiler, or it fails; TimeoutError: it does not end."""
    named = os.environ.get("CXX")
    compiler = next(filter(None, map(shutil.which, [named] if named else COMPILERS)), None)
    if compiler is None:
        raise OSError(f"no C++ compiler {named or ' or '.join(COMPILERS)} is installed")
    log.info("compiling %s, once", source.name)
    command = [compiler, *FLAGS, f"-I{jax.ffi.include_dir()}", str(source), "-o", str(target)]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=TIMEOUT, stdin=subprocess.DEVNULL
        )
    except subprocess.TimeoutExpired as error:
        raise TimeoutError(f"{compiler} did not end within {TIMEOUT:.0f} s") from error
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[0]
        raise OSError(f"{compiler} failed: {reason}")


def _cpu() -> bytes:
    """What `-march=native` depends on."""
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
        kept = {line for line in lines if line.startswith(("flags", "Features", "model name"))}
        return "\n".join(sorted(kept)).encode()
    except OSError:
        return f"{platform.node()} {platform.machine()} {platform.processor()}".encode()

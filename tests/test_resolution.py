"""The extras resolve against the package index; nothing is installed, `uv` reads metadata only."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.utils import canonicalize_name
from packaging.version import Version

from tests.test_packaging import (
    INSTALLED_BY_MAKE,
    NEVER_IN_CORE,
    PYTHONS,
    ROOT,
    core,
    extra,
    pins,
    requirements,
)

LINUX = "x86_64-manylinux_2_31"  # the oldest C library that libtpu's wheels allow

pytestmark = pytest.mark.slow


@pytest.fixture
def metadata(tmp_path) -> Path:
    """A copy of the files that hold the metadata: building it writes beside them."""
    for name in ("setup.cfg", "pyproject.toml", "constraints.txt", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "README.md").touch()
    return tmp_path


def resolve(metadata: Path, python: str, *extras: str) -> dict[str, Version]:
    """What `pip install -c constraints.txt '.[extras]'` needs on Linux; skips without an index."""
    beside = Path(sys.executable).parent / "uv"
    program = str(beside) if beside.exists() else shutil.which("uv")
    if program is None:
        pytest.skip("uv is not installed: pip install -e '.[test]'")
    options = [f"--extra={name}" for name in extras]
    options += [f"--python-version={python}", f"--python-platform={LINUX}", "--quiet"]
    options += ["--no-header", "--no-annotate", "--no-python-downloads"]
    command = [program, "pip", "compile", "setup.cfg", "--constraint=constraints.txt", *options]
    command += ["--python", sys.executable]
    result = subprocess.run(command, cwd=metadata, capture_output=True, text=True, timeout=300)
    if "error sending request" in result.stderr:
        pytest.skip(f"no package index is reachable: {result.stderr.strip()[-300:]}")
    assert result.returncode == 0, result.stderr
    found = requirements(result.stdout)
    return {canonicalize_name(r.name): Version(next(iter(r.specifier)).version) for r in found}


@pytest.mark.parametrize("python", PYTHONS)
@pytest.mark.parametrize(
    ("extras", "plugin"),
    [
        ((), "jaxlib"),
        (("cuda",), "jax-cuda13-plugin"),
        (("cuda12",), "jax-cuda12-plugin"),
        (("tpu",), "libtpu"),
        (("data", "serve", "eval", "agents", *INSTALLED_BY_MAKE), "jaxlib"),
    ],
)
def test_extras_resolve(metadata, extras, plugin, python):
    resolved, pinned = resolve(metadata, python, *extras), pins(python)
    asked = [*core(), *(r for name in extras for r in extra(name))]
    assert {canonicalize_name(r.name) for r in asked if r.marker is None} <= resolved.keys()
    assert resolved["jax"] == resolved["jaxlib"] == pinned["jax"]
    assert plugin in resolved
    if plugin != "libtpu":  # which has versions of its own
        assert resolved[plugin] == resolved["jax"]
    if "cuda" in plugin:
        assert any(package.startswith("nvidia-cudnn") for package in resolved)
    if not extras:
        assert {name: pinned.get(name) for name in resolved} == resolved
        assert not resolved.keys() & NEVER_IN_CORE


def test_resolving_sees_a_conflict(metadata):
    (metadata / "constraints.txt").write_text("jax==0.10.2\nlibtpu==0.0.50\n")
    with pytest.raises(AssertionError, match="libtpu"):
        resolve(metadata, "3.11", "tpu")

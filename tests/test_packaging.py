"""What a newcomer installs: metadata, pins, extras, licence; and what the repository must not hold.

The accelerator extras are resolved against the package index, and nothing is installed: `uv` reads
the metadata only.
"""

import configparser
import functools
import importlib.metadata
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parent.parent
PYTHONS = ("3.11", "3.12", "3.13")
NEVER_IN_CORE = {"torch", "tensorflow", "wandb", "transformers"}
LINUX = "x86_64-manylinux_2_31"  # the oldest C library that libtpu's wheels allow
INSTALLED_BY_MAKE = ("report", "test", "peers")

# Traces of one machine, and registry hosts. Written so that this file does not match itself.
FORBIDDEN = re.compile(
    r"(?<![\w.~$}])/(?:work|farm)/\w"
    r"|(?<![\w.])/(?:root|home/[a-z]\w*)/[\w.]"
    r"|/tmp/(?:venv|bash_jobs)"
    r"|/opt/(?:pypi|wheels)"
    r"|pypi\.org/simple|files\.pythonhosted|registry\.npmjs|download\.pytorch\.org"
)


@functools.cache
def setup_cfg() -> configparser.ConfigParser:
    parser = configparser.ConfigParser()
    parser.read_string((ROOT / "setup.cfg").read_text(encoding="utf-8"))
    return parser


def requirements(text: str) -> list[Requirement]:
    lines = (line.split("#", 1)[0].strip() for line in text.splitlines())
    return [Requirement(line) for line in lines if line]


def core() -> list[Requirement]:
    return requirements(setup_cfg()["options"]["install_requires"])


def extra(name: str) -> list[Requirement]:
    return requirements(setup_cfg()["options.extras_require"][name])


def pins(python: str) -> dict[str, Version]:
    """The versions constraints.txt gives on `python`; two pins of one package are an error."""
    environment = {"python_version": python, "python_full_version": f"{python}.0"}
    found: dict[str, Version] = {}
    for pin in requirements((ROOT / "constraints.txt").read_text(encoding="utf-8")):
        if pin.marker is None or pin.marker.evaluate(environment):
            name = canonicalize_name(pin.name)
            assert name not in found, f"{name} is pinned twice on Python {python}"
            (specifier,) = pin.specifier
            found[name] = Version(specifier.version)
    return found


def test_constraints_are_plain_pins():
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    lines = [line for line in lines if line and not line.startswith("#")]
    assert lines
    plain = re.compile(r'[a-z0-9][a-z0-9.-]*==[0-9][a-z0-9.]*(; python_version (<|>=) "3\.\d+")?')
    odd = [line for line in lines if not plain.fullmatch(line)]
    assert not odd, "expected name==version with at most a python_version marker"


@pytest.mark.parametrize("python", PYTHONS)
def test_what_make_installs_is_pinned(python):
    pinned = pins(python)
    for requirement in core() + [r for name in INSTALLED_BY_MAKE for r in extra(name)]:
        version = pinned.get(canonicalize_name(requirement.name))
        assert version is not None, f"{requirement.name} is not pinned on Python {python}"
        assert version in requirement.specifier, f"{requirement} excludes the pin {version}"


def test_core_is_light_and_has_lower_bounds():
    names = {canonicalize_name(r.name) for r in core()}
    assert not names & NEVER_IN_CORE
    assert {"jax", "flax", "optax", "orbax-checkpoint"} <= names
    for requirement in core():
        assert [s.operator for s in requirement.specifier] == [">="], requirement


@functools.cache
def uv() -> str:
    """The path of the `uv` program; skips the calling test where it is not installed."""
    beside = Path(sys.executable).parent / "uv"
    program = str(beside) if beside.exists() else shutil.which("uv")
    if program is None:
        pytest.skip("uv is not installed: pip install -e '.[test]'")
    return program


def run_uv(*arguments: str, cwd: Path, timeout: float) -> subprocess.CompletedProcess[str]:
    command = [uv(), "pip", "compile", "--quiet", "--no-header", "--no-annotate", *arguments]
    command += ["--no-python-downloads", "--python", sys.executable]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=timeout)


@pytest.fixture(scope="module")
def metadata(tmp_path_factory) -> Path:
    """A copy of the files that hold the metadata: building it writes beside them.

    Skips where no package index answers.
    """
    folder = tmp_path_factory.mktemp("metadata")
    (folder / "probe.in").write_text("absl-py\n")
    try:
        probe = run_uv("probe.in", "--refresh-package=absl-py", cwd=folder, timeout=60)
    except subprocess.TimeoutExpired:
        pytest.skip("no package index is reachable: no answer in 60 s")
    if probe.returncode != 0:
        pytest.skip(f"no package index is reachable: {probe.stderr.strip()[-300:]}")
    for name in ("setup.cfg", "pyproject.toml", "constraints.txt", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    (folder / "README.md").touch()
    return folder


def resolve(metadata: Path, python: str, *extras: str) -> dict[str, Version]:
    """The package set that `pip install -c constraints.txt '.[extras]'` needs on Linux."""
    options = [f"--extra={name}" for name in extras]
    options += [f"--python-version={python}", f"--python-platform={LINUX}"]
    arguments = ("setup.cfg", "--constraint=constraints.txt", *options)
    result = run_uv(*arguments, cwd=metadata, timeout=300)
    assert result.returncode == 0, result.stderr
    found = requirements(result.stdout)
    return {canonicalize_name(r.name): Version(next(iter(r.specifier)).version) for r in found}


@pytest.mark.parametrize("python", PYTHONS)
def test_core_resolves_to_the_pins_alone(metadata, python):
    resolved = resolve(metadata, python)
    pinned = pins(python)
    assert {name: pinned.get(name) for name in resolved} == resolved
    assert not resolved.keys() & NEVER_IN_CORE
    assert {canonicalize_name(r.name) for r in core()} <= resolved.keys()


@pytest.mark.parametrize("python", PYTHONS)
@pytest.mark.parametrize(
    ("name", "plugin"),
    [("cuda", "jax-cuda13-plugin"), ("cuda12", "jax-cuda12-plugin"), ("tpu", "libtpu")],
)
def test_accelerator_extras_resolve(metadata, name, plugin, python):
    resolved = resolve(metadata, python, name)
    assert resolved["jax"] == resolved["jaxlib"] == pins(python)["jax"]
    assert plugin in resolved
    if name != "tpu":  # libtpu has versions of its own
        assert resolved[plugin] == resolved["jax"]
        assert any(package.startswith("nvidia-cudnn") for package in resolved)


def test_other_extras_resolve_together(metadata):
    extras = ("data", "serve", "eval", "agents", *INSTALLED_BY_MAKE)
    resolved = resolve(metadata, "3.11", *extras)
    assert {canonicalize_name(r.name) for e in extras for r in extra(e)} <= resolved.keys()


def test_resolving_sees_a_conflict(metadata, tmp_path):
    for name in ("setup.cfg", "pyproject.toml", "LICENSE", "README.md"):
        shutil.copy(metadata / name, tmp_path)
    (tmp_path / "constraints.txt").write_text("jax==0.10.2\nlibtpu==0.0.50\n")
    with pytest.raises(AssertionError, match="libtpu"):
        resolve(tmp_path, "3.11", "tpu")


def test_license_is_apache_2():
    def terms(text: str) -> str:
        return " ".join(text.split("END OF TERMS AND CONDITIONS")[0].split())

    ours = (ROOT / "LICENSE").read_text(encoding="utf-8")
    (theirs,) = (f for f in importlib.metadata.files("absl-py") or () if f.name == "LICENSE")
    assert terms(ours) == terms(theirs.read_text(encoding="utf-8"))
    assert "Version 2.0, January 2004" in ours
    assert "The lm authors" in ours
    assert "[yyyy]" not in ours
    assert setup_cfg()["metadata"]["license"] == "Apache-2.0"


def test_every_source_folder_is_packaged():
    include = setup_cfg()["options.packages.find"]["include"].split()
    assert {name for name in include if "." not in name} == {"lm", "data_pipelines", "experiments"}
    assert all(f"{name}.*" in include for name in include if "." not in name)


@pytest.fixture(scope="module")
def repository_files() -> list[Path]:
    """The files git holds or would add; skips outside a git checkout."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    except FileNotFoundError:
        pytest.skip("git is not installed")
    if result.returncode != 0:
        pytest.skip(f"not a git checkout: {result.stderr.strip()}")
    files = (ROOT / name for name in result.stdout.split("\0") if name)
    return [file for file in files if file.is_file()]


def test_no_file_names_one_machine_or_a_registry(repository_files):
    assert ROOT / "setup.cfg" in repository_files
    found = []
    for file in repository_files:
        try:
            text = file.read_text(encoding="utf-8")
        except UnicodeDecodeError:  # a picture
            continue
        for match in FORBIDDEN.finditer(text):
            line = text.count("\n", 0, match.start()) + 1
            found.append(f"{file.relative_to(ROOT)}:{line}: {match.group()!r}")
    assert not found, "\n".join(found)


@pytest.mark.parametrize("trace", ["wor{}k/main", "root{}/x.py", "home{}/ann/x", "opt{}/wheels"])
def test_forbidden_traces_are_seen(trace):
    assert FORBIDDEN.search(f"open('/{trace.format('')}')")
    assert not FORBIDDEN.search(f"open('{trace.format('')}')")


def test_no_large_or_generated_file(repository_files):
    large = {str(f.relative_to(ROOT)): f.stat().st_size for f in repository_files}
    large = {name: size for name, size in large.items() if size > 1 << 20}
    assert not large, "files over 1 MiB"
    generated = {"__pycache__", ".venv", "runs", ".cache"}
    assert not [f for f in repository_files if generated & set(f.relative_to(ROOT).parts)]

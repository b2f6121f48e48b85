"""What a newcomer installs: metadata, pins, licence; and what the repository must not hold."""

import configparser
import functools
import importlib.metadata
import re
import subprocess
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parent.parent
PYTHONS = ("3.11", "3.12", "3.13")
NEVER_IN_CORE = {"torch", "tensorflow", "wandb", "transformers"}
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
            assert specifier.operator == "==" and "*" not in specifier.version, pin
            found[name] = Version(specifier.version)
    return found


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
        assert [s.operator for s in requirement.specifier][:1] == [">="], requirement


def test_license_is_apache_2():
    def terms(text: str) -> str:
        return " ".join(text.split("END OF TERMS AND CONDITIONS")[0].split())

    ours = (ROOT / "LICENSE").read_text(encoding="utf-8")
    (theirs,) = (f for f in importlib.metadata.files("absl-py") or () if f.name == "LICENSE")
    assert terms(ours) == terms(theirs.read_text(encoding="utf-8"))
    assert "The lm authors" in ours and "[yyyy]" not in ours
    assert setup_cfg()["metadata"]["license"] == "Apache-2.0"


def test_every_source_folder_is_packaged():
    include = setup_cfg()["options.packages.find"]["include"].split()
    folders = ("lm", "data_pipelines", "experiments")
    assert sorted(include) == sorted(f"{name}{end}" for name in folders for end in ("", ".*"))


def test_no_file_names_one_machine_or_a_registry_is_large_or_generated():
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    if listed.returncode:
        pytest.skip(f"not a git checkout: {listed.stderr.strip()}")
    files = [ROOT / name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()]
    assert ROOT / "setup.cfg" in files
    found = []
    for file in files:
        name, text = str(file.relative_to(ROOT)), file.read_bytes().decode(errors="replace")
        found += [f"{name}: {match.group()!r}" for match in FORBIDDEN.finditer(text)]
        found += [f"{name}: over 1 MiB"] * (file.stat().st_size > 1 << 20)
        found += [f"{name}: generated"] * bool({"__pycache__", ".venv", "runs"} & {*file.parts})
    assert not found, "\n".join(found)


@pytest.mark.parametrize("trace", ["wor{}k/main", "root{}/x.py", "home{}/ann/x", "opt{}/wheels"])
def test_forbidden_traces_are_seen(trace):
    assert FORBIDDEN.search(f"open('/{trace.format('')}')")
    assert not FORBIDDEN.search(f"open('{trace.format('')}')")

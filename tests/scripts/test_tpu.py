"""The TPU script: its gcloud commands against gcloud's reference, its life against a stand-in."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import pathlib
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Sequence

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
SCRIPT = [sys.executable, str(ROOT / "scripts" / "tpu.py")]
WHERE = ["--name=llama", "--zone=us-east5-a"]

# From the reference pages of gcloud compute tpus ...: flags that must be there / that may.
EVERYWHERE = {"--zone", "--project", "--quiet", "--format"}
REFERENCE = {
    "tpu-vm create": "--accelerator-type --version / --spot",
    "tpu-vm describe": "/",
    "tpu-vm delete": "/ --async",
    "tpu-vm ssh": "/ --worker --command",
    "tpu-vm scp": "/ --worker --recurse --compress",
    "queued-resources create": "--accelerator-type --runtime-version / "
    "--node-id --node-count --node-prefix --spot --async",
    "queued-resources describe": "/",
    "queued-resources delete": "/ --force --async",
    "queued-resources ssh": "/ --node --worker --command --batch-size",
    "queued-resources scp": "/ --node --worker --recurse --batch-size",
}


def call(*args: str, **kwargs) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*SCRIPT, *args], capture_output=True, text=True, timeout=120, **kwargs)


def dry(*args: str) -> list[list[str]]:
    """The gcloud commands that would be run."""
    result = call(*args[:1], *WHERE, "--dry_run", *args[1:], env={"PATH": ""})
    assert result.returncode == 0, result.stderr
    words = shlex.split(result.stdout)
    starts = [i for i, word in enumerate(words) if word == "gcloud"] + [len(words)]
    return [words[a:b] for a, b in itertools.pairwise(starts)]


@pytest.mark.parametrize("kind", [[], ["--direct"], ["--num_slices=2"], ["--project=p", "--spot"]])
def test_commands_are_what_the_reference_allows(kind):
    commands = dry("watch", "--accelerator_type=v5litepod-16", *kind, "--", "true")
    for verb in ("create", "copy", "setup", "status", "teardown"):
        commands += dry(verb, "--accelerator_type=v5litepod-16", *kind)
    assert len(commands) >= 14
    assert sum(bool(re.search("LM_RUN_TOKEN=[0-9a-f]{32};", " ".join(c))) for c in commands) == 1
    for command in commands:
        assert command[:3] == ["gcloud", "compute", "tpus"]
        listed = REFERENCE[" ".join(command[3:5])].split("/")
        required, allowed = ({*flags.split()} for flags in listed)
        flags = {word.partition("=")[0] for word in command[5:] if word.startswith("--")}
        assert required <= flags <= required | allowed | EVERYWHERE, command
        assert ("--project" in flags) == ("--project=p" in kind)
        places = [word for word in command[5:] if not word.startswith("--")]
        assert len(places) == (2 if command[4] == "scp" else 1)


@pytest.mark.parametrize(
    ("args", "group", "wanted"),
    [
        ("create --accelerator_type=v6e-64 --spot", "queued-resources",
         "--node-id=llama --runtime-version=v2-alpha-tpuv6e --spot"),
        ("create --accelerator_type=v5p-8 --num_slices=4 --version=mine", "queued-resources",
         "--node-count=4 --node-prefix=llama --runtime-version=mine"),
        ("create --accelerator_type=v4-8 --direct", "tpu-vm", "--version=tpu-ubuntu2204-base"),
        ("teardown", "queued-resources", "--force"),
        ("teardown --direct", "tpu-vm", ""),
        ("setup", "tpu-vm", "--worker=all"),
        ("setup --num_slices=2", "queued-resources", "--node=all --worker=all"),
    ],
)  # fmt: skip
def test_what_the_options_ask_for(args, group, wanted):
    (command,) = dry(*args.split())
    assert command[3] == group and {"llama", *wanted.split()} <= {*command}


def test_mistakes():
    for args, message in (
        (["create"], "create needs --accelerator_type, for example"),
        (["create", "--accelerator_type=v99-8"], "no usual runtime image for v99-8; give --ver"),
        (["run"], "run needs a command; give it after --"),
        (["setup", "--", "true"], "setup takes no command; remove what follows --"),
        (["setup", "--name=Llama"], "--name=Llama: use lower-case letters"),
        (["setup", "--direct", "--num_slices=2"], "several only without --direct"),
    ):
        result = call(args[0], *WHERE, *args[1:])
        assert result.returncode == 2 and message in result.stderr.replace("\n", " ")
    result = call("teardown", *WHERE, env={"PATH": "/nonexistent"})
    assert result.returncode == 1 and "gcloud is not installed; see" in result.stderr


class World:
    """The stand-in on PATH, and the calls it received."""

    def __init__(self, folder: pathlib.Path) -> None:
        self.folder = folder
        program = folder / "bin" / "gcloud"
        program.parent.mkdir()
        fake = ROOT / "tests" / "scripts" / "fake_gcloud.py"
        program.write_text(f'#!/bin/sh\nexec {sys.executable} {fake} "$@"\n')
        program.chmod(0o755)
        path = f"{program.parent}:{os.environ['PATH']}"
        self.environ = {**os.environ, "PATH": path, "FAKE_GCLOUD": str(folder)}
        self.set(state="", queue=[], lives=[])

    def set(self, **state) -> None:
        (self.folder / "state.json").write_text(json.dumps(state))

    def set_active(self, fail: Sequence[str] = ()) -> None:
        self.set(state="ACTIVE", queue=[], lives=[], fail=fail)
        (self.folder / "home").mkdir(exist_ok=True)

    def verbs(self) -> list[str]:
        """Verbs of the calls, without polls of the state."""
        calls = [json.loads(line) for line in (self.folder / "calls").read_text().splitlines()]
        scripts = [" ".join(c) for c in calls if c[4] != "describe"]
        return [
            "setup" if "pip install" in s else "run" if "setsid" in s
            else "probe" if "run.status ]" in s else "unpack" if "tar -x" in s else s.split()[4]
            for s in scripts
        ]  # fmt: skip

    def script(self, *args: str) -> subprocess.CompletedProcess[str]:
        verb, *rest = args
        return call(verb, *WHERE, "--interval=0.1", *rest, env=self.environ)


@pytest.fixture
def world(tmp_path):
    world = World(tmp_path)
    yield world
    pid = tmp_path / "home/lm/run.pid"
    if pid.exists():
        with contextlib.suppress(ProcessLookupError):
            os.killpg(int(pid.read_text()), signal.SIGKILL)


# A run in ten steps that resumes from what it has written to the bucket; it notes its argument.
RUN = """
import pathlib, sys, time
steps = pathlib.Path(sys.argv[1])
for step in range(len(steps.read_text()) if steps.exists() else 0, 10):
    time.sleep(0.3)
    with steps.open("a") as file:
        file.write("x")
    print("step", step + 1, "of 10", sys.argv[2], flush=True)
"""
BIRTH = ["WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"]
TYPE = "--accelerator_type=v6e-8"
AWKWARD = 'it\'s $HOME; "b" `c` &'


def test_watch_lives_through_preemption(world):
    world.set(state="", queue=[], lives=[[*BIRTH, *["ACTIVE"] * 4, "SUSPENDED"], BIRTH])
    bucket = world.folder / "bucket"
    command = ["python3", "-c", RUN, str(bucket), AWKWARD]
    result = world.script("watch", TYPE, "--", *command)
    assert result.returncode == 0, result.stdout + result.stderr
    assert bucket.read_text() == "x" * 10, "every step once"
    assert f"step 10 of 10 {AWKWARD}" in result.stdout
    assert "llama is SUSPENDED; starting again in" in result.stdout
    life = ["create", "scp", "unpack", "setup", "run"]
    verbs = [verb for verb in world.verbs() if verb != "probe"]
    assert verbs == [*life, "delete", *life]
    # What was copied is the checkout without what .gitignore names.
    home = world.folder / "home/lm"
    assert (home / "scripts/tpu.py").read_bytes() == (ROOT / "scripts/tpu.py").read_bytes()
    assert not (home / ".git").exists() and not (home / ".venv").exists()


def test_watch_gives_up_on_what_always_fails(world):
    world.set_active()
    result = world.script("watch", TYPE, "--max_restarts=1", "--", "sh", "-c", "echo no; exit 7")
    assert result.returncode == 1
    assert "run ended 7 after 2 starts in a row; not started again" in result.stderr
    assert world.verbs().count("run") == 2 and "delete" not in world.verbs()
    result = world.script("watch", TYPE, "--", "sh", "-c", "exit 2")
    assert result.returncode == 1, "what it finds is the other command's end; it starts this one"
    assert "refused its arguments" in result.stderr


def test_watch_bears_a_gcloud_that_fails_now_and_then(world):
    world.set_active(fail=["ssh"])
    process = subprocess.Popen(
        [*SCRIPT, "watch", *WHERE, TYPE, "--interval=0.1", "--", "echo", "well"],
        env=world.environ, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert process.stdout is not None
        while "no answer (2)" not in process.stdout.readline():
            assert process.poll() is None
        world.set_active()
        output = process.stdout.read()
        assert process.wait(60) == 0 and "# well" in output
    finally:
        process.kill()


def test_a_run_ends_the_one_before(world):
    world.set_active()
    home = world.folder / "home/lm"
    home.mkdir()
    alive = []
    for number in range(2):
        assert world.script("run", "--", "sleep", f"30{number}").returncode == 0
        alive.append(pathlib.Path("/proc", (home / "run.pid").read_text().strip(), "cwd"))
        assert [path.is_dir() for path in alive] == [False] * number + [True]  # or a zombie
    assert "running" in world.script("status").stdout

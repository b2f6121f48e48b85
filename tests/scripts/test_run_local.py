"""Several processes on one machine: what each knows, and how all end."""

from __future__ import annotations

import pathlib
import re
import signal
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
SCRIPT = [sys.executable, str(ROOT / "scripts" / "run_local.py")]

TELL = """
import os
keys = "LM_COORDINATOR LM_RUN_TOKEN LM_NUM_PROCESSES LM_PROCESS_ID JAX_PLATFORMS XLA_FLAGS".split()
print(*(os.environ[key] for key in keys))
"""


def run(*args: str, **kwargs) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*SCRIPT, *args], capture_output=True, text=True, timeout=120, **kwargs)


def test_each_process_knows_its_place_and_the_token(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=8 --xla_other=1")
    result = run("--num_processes=3", "--devices=2", "--", sys.executable, "-c", TELL)
    assert result.returncode == 0
    lines = sorted(result.stdout.splitlines())
    shared = {" ".join(line.split()[1:3]) for line in lines}
    assert len(lines) == 3 and len(shared) == 1
    assert re.fullmatch(r"127.0.0.1:\d+ [0-9a-f]{32}", min(shared))
    flags = "--xla_other=1 --xla_force_host_platform_device_count=2"
    for i, line in enumerate(lines):
        assert line == f"[{i}] {min(shared)} 3 {i} cpu {flags}"


def test_one_failure_ends_all():
    program = "import os, time; os.environ['LM_PROCESS_ID'] == '1' and exit(7); time.sleep(10**6)"
    assert run("--grace=0.5", "--", sys.executable, "-c", program).returncode == 7


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_go_to_all(number):
    program = "trap 'echo got it; exit 3' TERM INT; echo READY; while :; do sleep 0.1; done"
    process = subprocess.Popen(
        [*SCRIPT, "--", "sh", "-c", program], stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        assert [process.stdout.readline()[4:] for _ in range(2)] == ["READY\n"] * 2
        process.send_signal(number)
        assert process.wait(60) == 3
        assert sorted(process.stdout.read().splitlines()) == ["[0] got it", "[1] got it"]
    finally:
        process.kill()


def test_mistakes():
    assert "must be at least 1" in run("--num_processes=0", "--", "true").stderr

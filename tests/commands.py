"""A command as a user types it, in a process of its own."""

import os
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent


def command(name: str, *arguments: object, status: int = 0, timeout: float = 300) -> str:
    """What `python -m experiments.NAME` prints; of one that is to fail, its only lines: the error.

    On a machine with one CPU device.
    """
    done = subprocess.run(
        [sys.executable, "-m", f"experiments.{name}", *map(str, arguments)], cwd=ROOT,
        env=os.environ | {"XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"}, capture_output=True, text=True,
        timeout=timeout,
    )  # fmt: skip
    assert done.returncode == status, done.stderr[-3000:]
    if status:
        assert not done.stdout and "Traceback" not in done.stderr, done.stderr
    return done.stderr if status else done.stdout

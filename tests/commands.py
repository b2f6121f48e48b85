"""Commands as a user types them: in this process, or where only a process shows it in their own.

`python -m tests.commands NAME` calls one for each list of arguments on standard input.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import os
import pathlib
import runpy
import subprocess
import sys
from collections.abc import Sequence
from unittest import mock

from absl import app, flags, logging
from absl.testing import flagsaver

ROOT = pathlib.Path(__file__).resolve().parent.parent
Done = tuple[int, str, str]  # exit status, stdout, stderr
assert app.RUN_WITH_PDB.name in flags.FLAGS  # not defined in a call, and gone after it


def call(name: str, *arguments: object) -> Done:
    """Run `python -m experiments.NAME` in this process."""
    module = importlib.import_module(f"experiments.{name}")  # defines the flags that stay
    path = module.__file__ or ""
    if hasattr(module, "__path__"):
        path = path.replace("__init__", "__main__")
    out, err, parsed = io.StringIO(), io.StringIO(), flags.FLAGS.is_parsed()
    verbosity = logging.get_verbosity()
    with (
        flagsaver.flagsaver(),
        mock.patch.object(sys, "argv", [path, *map(str, arguments)]),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        status: object = 0
        try:
            runpy.run_path(path, run_name="__main__")
        except SystemExit as end:
            status = end.code or 0
    logging.set_verbosity(verbosity)
    if not parsed:
        flags.FLAGS.unparse_flags()
    assert isinstance(status, int), status
    return status, out.getvalue(), err.getvalue()


def call_apart(name: str, *arguments: object, timeout: float = 300) -> Done:
    """Run it in a process of its own, on a machine with one CPU device."""
    return in_python(f"experiments.{name}", *map(str, arguments), timeout=timeout)


def calls_apart(name: str, each: Sequence[Sequence[str]]) -> list[Done]:
    """Run it for each of several lists of arguments, one after another in a process apart."""
    status, out, err = in_python("tests.commands", name, given=json.dumps(each))
    assert status == 0, err[-3000:]
    return json.loads(out)


def in_python(module: str, *arguments: str, given: str = "", timeout: float = 300) -> Done:
    done = subprocess.run(
        [sys.executable, "-m", module, *arguments], cwd=ROOT, input=given, timeout=timeout,
        env=of_one_device(), capture_output=True, text=True,
    )  # fmt: skip
    return done.returncode, done.stdout, done.stderr


def of_one_device() -> dict[str, str]:
    """The environment of a process with one CPU device, which compiles as these tests do."""
    kept = [f for f in os.environ.get("XLA_FLAGS", "").split() if "device_count" not in f]
    return os.environ | {"XLA_FLAGS": " ".join(kept), "JAX_PLATFORMS": "cpu"}


def command(name: str, *arguments: object, status: int = 0) -> str:
    """What a command prints, run in this process; of one that fails, its only lines: the error."""
    return printed(call(name, *arguments), status)


def apart(name: str, *arguments: object, status: int = 0, timeout: float = 300) -> str:
    """The same of a process of its own."""
    return printed(call_apart(name, *arguments, timeout=timeout), status)


def printed(done: Done, status: int = 0) -> str:
    """Its stdout, or of one that fails its stderr; asserts that it ends as it should."""
    found, out, err = done
    assert found == status, err[-3000:]
    if status:
        assert not out and "Traceback" not in err, err
    return err if status else out


if __name__ == "__main__":
    print(json.dumps([call(sys.argv[1], *arguments) for arguments in json.load(sys.stdin)]))

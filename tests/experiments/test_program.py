"""What every command shares: flags that get on with each other, and one way to refuse."""

from __future__ import annotations

import importlib
import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
NAMES = sorted(path.stem for path in (ROOT / "experiments").glob("*.py") if path.stem != "__init__")
RUNS = re.compile(r"^    program(_lib)?\.run\(", re.MULTILINE)
COMMANDS = [n for n in NAMES if RUNS.search((ROOT / "experiments" / f"{n}.py").read_text())]


def test_all_modules_can_be_imported_into_one_process() -> None:
    for name in NAMES:
        importlib.import_module(f"experiments.{name}")


@pytest.mark.parametrize("name", COMMANDS)
def test_an_unknown_flag_is_refused(name: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", f"experiments.{name}", "--no_such_flag=1"],
        cwd=ROOT, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert done.stderr.startswith("error: ") and "no_such_flag" in done.stderr

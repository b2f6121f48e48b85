"""What every command shares: flags that get on with each other, and one way to refuse."""

from __future__ import annotations

import importlib
import re

import pytest

from experiments import generate
from lm.config.command_line import ConfigError
from tests.commands import ROOT, call_apart, command
from tests.refuses import refuses

NAMES = sorted(path.stem for path in (ROOT / "experiments").glob("*.py") if path.stem != "__init__")
RUNS = re.compile(r"^    program(_lib)?\.run\(", re.MULTILINE)
COMMANDS = [n for n in NAMES if RUNS.search((ROOT / "experiments" / f"{n}.py").read_text())]


def test_all_modules_can_be_imported_into_one_process() -> None:
    for name in NAMES:
        importlib.import_module(f"experiments.{name}")


@pytest.mark.parametrize("name", COMMANDS)
def test_an_unknown_flag_is_refused(name: str) -> None:
    error = command(name, "--no_such_flag=1", status=2)
    assert error.startswith("error: ") and "no_such_flag" in error


def test_help_lists_the_flags_of_every_model() -> None:
    _, shown, _ = call_apart("generate", "--help")
    assert all(flag in shown for flag in ("--model:", "--dtype:", "keep_quantized:", "--adapter:"))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": "x", "adapter": ["a"]}', "it has to be a name"),
        ('{"prompt": "x", "temperature": 2}', "unknown key 'temperature'; a row has prompt"),
        ("[" * 100_000, "nested too deeply"),
        ('{"messages": [{}]}', 'has to be a list of objects with "role"'),
    ],
)
def test_rows_that_are_no_prompts_are_refused(tmp_path, line: str, message: str) -> None:
    (tmp_path / "rows.jsonl").write_text(f'\ufeff{{"prompt": "fine"}}\n{line}\n', "utf-8")
    read = lambda: list(generate.read_rows(str(tmp_path / "rows.jsonl")))  # noqa: E731
    error = refuses(read, message, error=ConfigError)
    assert "rows.jsonl:2" in str(error) or "rows.jsonl', line 2" in str(error)

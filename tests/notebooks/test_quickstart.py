"""The quickstart notebook runs, and its .ipynb holds the same cells as its script."""

from __future__ import annotations

import os
import pathlib
import runpy

import pytest

NOTEBOOKS = pathlib.Path(__file__).resolve().parents[2] / "notebooks"


def test_the_script_runs_and_learns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(os.environ, "NUM_STEPS", "20")
    names = runpy.run_path(str(NOTEBOOKS / "quickstart.py"))
    assert names["after"] < names["before"] - 0.5
    assert len(names["losses"]) == 20


@pytest.mark.parametrize("script", sorted(NOTEBOOKS.glob("*.py")), ids=lambda p: p.stem)
def test_the_notebook_is_generated_from_its_script(script: pathlib.Path) -> None:
    jupytext = pytest.importorskip("jupytext", reason="jupytext is in the extra `test`")
    notebook = jupytext.read(script.with_suffix(".ipynb"))
    source = jupytext.read(script)
    cells = [(cell.cell_type, cell.source) for cell in notebook.cells]
    assert cells == [(cell.cell_type, cell.source) for cell in source.cells], (
        f"{script.name} and its .ipynb differ; run `make notebooks`"
    )

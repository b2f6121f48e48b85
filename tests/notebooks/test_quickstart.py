"""The quickstart notebook runs, and its .ipynb holds the same cells as its script."""

from __future__ import annotations

import os
import pathlib
import runpy

import pytest

from data_pipelines import local_text

NOTEBOOKS = pathlib.Path(__file__).resolve().parents[2] / "notebooks"


def test_the_script_runs_and_learns(monkeypatch: pytest.MonkeyPatch) -> None:
    build = local_text.build
    smaller = lambda *args, **kwargs: build(*args, **kwargs | {"max_bytes": 300_000})  # noqa: E731
    monkeypatch.setattr(local_text, "build", smaller)
    monkeypatch.setitem(os.environ, "NUM_STEPS", "10")
    names = runpy.run_path(str(NOTEBOOKS / "quickstart.py"))
    assert names["after"] < names["before"] - 0.3
    assert len(names["losses"]) == 10


@pytest.mark.parametrize("script", sorted(NOTEBOOKS.glob("*.py")), ids=lambda p: p.stem)
def test_the_notebook_is_generated_from_its_script(script: pathlib.Path) -> None:
    jupytext = pytest.importorskip("jupytext", reason="jupytext is in the extra `test`")
    notebook = jupytext.read(script.with_suffix(".ipynb"))
    source = jupytext.read(script)
    cells = [(cell.cell_type, cell.source) for cell in notebook.cells]
    assert cells == [(cell.cell_type, cell.source) for cell in source.cells], (
        f"{script.name} and its .ipynb differ; run `make notebooks`"
    )

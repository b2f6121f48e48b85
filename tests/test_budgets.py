"""Every folder of tests has a budget, and the run says what it took beside it."""

from pathlib import Path
from types import SimpleNamespace

from tests import budgets

TESTS = Path(__file__).parent


def test_every_folder_has_a_budget_and_together_they_fit():
    folders = {path.parent.name for path in TESTS.glob("*/test_*.py")}
    assert folders | {budgets.TOP} == budgets.SECONDS.keys()
    assert sum(budgets.SECONDS.values()) <= budgets.WORKERS * budgets.SUITE_SECONDS


def test_the_table():
    def phase(nodeid, seconds):
        return SimpleNamespace(nodeid=nodeid, when="call", duration=seconds)

    half = budgets.SECONDS["model"] / 2
    reports = [phase("tests/test_a.py::test", 1), phase("tests/model/test_b.py::test[c/d]", half)]
    reports.append(phase("tests/model/test_b.py::test[c/d]", half + 9))
    _, model, top, both = budgets.table(reports)
    assert model.split() == f"model {2 * half:.0f} {2 * half + 9:.0f} 1 over by 9 s".split()
    assert top.split() == f"{budgets.TOP} {budgets.SECONDS[budgets.TOP]} 1 1".split()
    assert both.split()[3] == "2"
    assert "over" not in "".join(budgets.table(reports, budgeted=False))

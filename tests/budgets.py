"""What the tests of each folder may take, and beside it what they took."""

from __future__ import annotations

import collections
from collections.abc import Iterable, Iterator
from typing import Protocol

WORKERS, SUITE_SECONDS = 2, 510  # of `make test` on two cores, every cache empty
TOP = "tests"  # files that lie in no folder

# Seconds of set-ups, tests and what follows them, of both workers together, raised only on purpose.
SECONDS = {
    TOP: 5,
    "adapters": 40,
    "aot": 70,
    "checkpoints": 25,
    "config": 10,
    "data": 15,
    "data_pipelines": 10,
    "distributed": 30,
    "experiments": 190,
    "files": 20,
    "formats": 58,
    "hardware": 5,
    "infer": 70,
    "kernels": 113,
    "model": 95,
    "notebooks": 15,
    "parallel": 47,
    "run": 15,
    "scripts": 15,
    "sharding": 10,
    "tokenizers": 15,
    "train": 95,
    "weights": 50,
}


class Report(Protocol):
    """One of the three phases of a test."""

    nodeid: str
    when: str | None
    duration: float


def folder_of(nodeid: str) -> str:
    """The folder below `tests` of `tests/folder/test_file.py::test_name`."""
    parts = nodeid.partition("::")[0].split("/")
    return parts[1] if len(parts) > 2 else TOP


def table(reports: Iterable[Report], budgeted: bool = True) -> Iterator[str]:
    """Lines of budget, seconds and number of tests by folder, the largest first.

    Args:
      reports: of every phase of every test.
      budgeted: show the budgets, which are of the tests that run by default.
    """
    took: collections.Counter[str] = collections.Counter()
    tests: dict[str, set[str]] = collections.defaultdict(set)
    for report in reports:
        folder = folder_of(report.nodeid)
        took[folder] += report.duration
        tests[folder].add(report.nodeid)
    rows = [(f, SECONDS.get(f, 0), s, len(tests[f])) for f, s in took.most_common()]
    rows.append(("all", sum(row[1] for row in rows), took.total(), sum(row[3] for row in rows)))
    yield f"{'':<16}{'budget':>8}{'took':>8}{'tests':>7}"
    for folder, budget, seconds, count in rows:
        over = f"  over by {seconds - budget:.0f} s" if budgeted and seconds > budget else ""
        yield f"{folder:<16}{budget if budgeted else '':>8}{seconds:>8.0f}{count:>7}{over}"

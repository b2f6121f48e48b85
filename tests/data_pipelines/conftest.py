"""Shared by the tests of pipelines."""

import sysconfig

import pytest


@pytest.fixture
def small_system(monkeypatch):
    """Python's library alone as the system's text: packages take ten times as long to look at."""
    library = sysconfig.get_path("stdlib")
    packages = f"{library}/json"
    paths = {"stdlib": library, "purelib": packages, "platlib": packages}
    monkeypatch.setattr(sysconfig, "get_paths", lambda: paths)

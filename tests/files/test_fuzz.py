"""Changed files never crash the readers, and the fuzzer sees it where they would."""

import pytest

from lm.files import gguf_values, safetensors
from tests.files.fuzz import run


def test_changed_files_are_read_or_refused(tmp_path):
    outcomes = run(0, 5000, 0, tmp_path)
    assert sum(outcomes.values()) == 5000
    # Both happen to every kind of file, or the changes would be too timid or too wild.
    kinds = {kind for kind, _ in outcomes}
    assert len(kinds) == 7
    for kind in kinds:
        assert outcomes[kind, "read"] >= 5 and outcomes[kind, "refused"] >= 5


def test_it_sees_memory_that_a_count_asks_for(tmp_path, monkeypatch):
    monkeypatch.setattr(gguf_values.Cursor, "check_count", lambda *args: None)
    with pytest.raises(AssertionError, match="--first="):
        run(0, 1500, 0, tmp_path)


def test_it_sees_another_error(tmp_path, monkeypatch):
    monkeypatch.setattr(safetensors, "RecursionError", KeyError, raising=False)
    with pytest.raises(AssertionError, match="RecursionError"):
        run(0, 3000, 0, tmp_path)

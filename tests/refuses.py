"""Refusals, in a line each."""

from collections.abc import Callable
from typing import Any

import pytest


def refuses(call: Callable[[], Any], *words: str, error: type[Exception] = ValueError) -> Exception:
    """Asserts that `call` raises `error` with all of `words` in its message; gives the error."""
    with pytest.raises(error) as caught:
        call()
    missing = [word for word in words if word not in str(caught.value)]
    assert not missing, f"{missing} not in: {caught.value}"
    return caught.value

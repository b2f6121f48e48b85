"""Paths of checkpoints, as Orbax needs them: absolute, each character standing for itself."""

from __future__ import annotations

import glob
from collections.abc import Iterator
from typing import Any

from etils import epath
from etils.epath.gpath import PosixGPath


class _Literal(PosixGPath):
    """A path whose `glob` takes the folder as it is: Orbax joins the parts of a save with it.

    Without this a folder named `[lr=3e-4]` is searched for as a folder named `l`, or `r`, or ...
    """

    def glob(self, pattern: str) -> Iterator[_Literal]:
        return super(_Literal, type(self)(glob.escape(str(self)))).glob(pattern)


def absolute(path: Any) -> epath.Path:
    """`path`, from here if it is relative; addresses (`gs://...`) as they are."""
    path = _Literal(path).expanduser()
    return path if "://" in str(path) else path.resolve()

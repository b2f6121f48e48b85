"""Models of GGUF files, straight into the serving form.

Weights are read one at a time, each shard from the rows it holds: beside the weights kept, the host
holds about the largest of them. Blocks may be kept as they are in the file.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lm.files import GGUF, dequantize, ggml, read_gguf
from lm.formats.common import Path, refuse, tree_of
from lm.formats.gguf.config import Keys, from_gguf
from lm.formats.gguf.tensors import IGNORED, Rows, rows
from lm.model import ModelConfig, ModelWeights
from lm.model.params import unstacked_specs
from lm.sharding import Layout, named_sharding
from lm.weights import GGUFBlocks
from lm.weights.gguf import KINDS

INTEGERS = ("I8", "I16", "I32", "I64")


def read_gguf_config(file: Path | GGUF, ignore: Collection[str] = ()) -> ModelConfig:
    """The `ModelConfig` of a GGUF file. Arguments and errors as `load_gguf`."""
    file = _opened(file)
    return from_gguf(
        file.metadata,
        {name: info.shape for name, info in file.tensors.items()},
        rope_factors=file.dequantize,
        source=str(file.paths[0]),
        ignore=ignore,
    )


def _opened(file: Path | GGUF) -> GGUF:
    return file if isinstance(file, GGUF) else read_gguf(file)


def load_gguf(
    file: Path | GGUF,
    *,
    dtype: Any = jnp.float32,
    keep_quantized: bool | Collection[str] = False,
    layout: Layout | None = None,
    ignore: Collection[str] = (),
) -> tuple[ModelWeights, ModelConfig]:
    """The weights of a GGUF file, unstacked, and the model's configuration.

    Args:
      file: its path, or that of the first part of a split model; or the open file.
      dtype: of the weights that are arrays.
      keep_quantized: keep matrices in blocks as `lm.weights.GGUFBlocks`, or those of the types
        given; plain numbers, and blocks of types that are not computed on, become arrays all the
        same.
      layout: place each shard by these rules; None for the default device.
      ignore: see `from_gguf`.

    Raises:
      FormatError: it is not a GGUF file, its architecture or something in it is not supported, or
        tensors are missing, surplus, or of another shape; all are named.
      OSError: it cannot be opened.
      ValueError: sizes do not fit each other, or a mesh axis does not divide a weight.
    """
    file = _opened(file)
    source, config = str(file.paths[0]), read_gguf_config(file, ignore)
    wanted = list(rows(config, Keys(file.metadata, source).gguf))
    _check_tensors(file, wanted, config, source)
    kept = keep_quantized or ()
    kinds = frozenset(KINDS) if kept is True else frozenset(KINDS) & frozenset(kept)
    done = {}
    for each in wanted:
        done[each.path] = _place(file, each, dtype, kinds, layout)
        file.release(each.tensor)
    return tree_of(done, unstacked_specs(config)), config


def _check_tensors(file: GGUF, wanted: list[Rows], config: ModelConfig, source: str) -> None:
    """Raises FormatError, with every fault, unless the tensors are those of the model."""
    shapes = {each.tensor: each.tensor_shape for each in wanted}
    faults = []
    for name, shape in shapes.items():
        if name not in file.tensors:
            faults.append(f"{name} {list(shape)} is missing")
            continue
        found = file.tensors[name]
        if found.shape != shape:
            faults.append(f"{name} is {list(found.shape)}, the model wants {list(shape)}")
        elif found.type in INTEGERS:
            faults.append(f"{name} is of type {found.type}, which no weight can be")
    faults += [
        f"{name} {list(file.tensors[name].shape)} is not in this model"
        for name in sorted(file.tensors.keys() - shapes.keys() - set(IGNORED))
    ]
    refuse(faults, source, config)


def _place(file: GGUF, each: Rows, dtype: Any, kept: Collection[str], layout: Layout | None) -> Any:
    """One of our weights, on its devices; a matrix of one of the types `kept` in its blocks."""
    kind = ggml.TYPES[file.tensors[each.tensor].type]
    raw = raw_rows(file, each)
    if len(each.spec.shape) == 2 and kind.name in kept:
        block_axis = "in" if each.transposed else "out"
        shape = (len(raw), each.tensor_shape[1])
        leaf = GGUFBlocks.from_bytes(raw, kind.name, shape, block_axis)
        if layout is None:
            return jax.device_put(leaf)
        return jax.device_put(leaf, leaf.shardings(each.spec.axes, layout.rules, layout.mesh))
    read = _reader(raw, kind, each, dtype)
    shape = each.spec.shape
    if layout is None:
        return jnp.asarray(read(tuple(slice(0, size) for size in shape)))
    sharding = named_sharding(layout.mesh, layout.rules.weights, each.spec.axes, shape)
    return jax.make_array_from_callback(shape, sharding, read)


def raw_rows(file: GGUF, each: Rows) -> np.ndarray:
    """The bytes of a weight's rows in our order, uint8 [rows, bytes per row]; padding is zeros."""
    raw = file.raw(each.tensor).reshape(each.tensor_shape[0], -1)
    raw = raw[each.start : each.start + each.count]
    if (order := each.order) is not None:
        raw = raw[order]
    padded = each.spec.shape[-1 if each.transposed else 0]
    return np.pad(raw, ((0, padded - each.count), (0, 0))) if padded > each.count else raw


def _reader(
    raw: np.ndarray, kind: ggml.BlockType, each: Rows, dtype: Any
) -> Callable[[Any], np.ndarray]:
    """A function from an index (slices) of our weight to its numbers, decoding what it needs."""
    width = each.tensor_shape[1:]

    def read(index: Any) -> np.ndarray:
        row_slice = index[-1] if each.transposed else index[0]
        part = raw[row_slice]
        numbers = dequantize(part.reshape(-1), kind.name, (len(part), *width))
        if each.minus:
            numbers = numbers - np.float32(each.minus)
        if each.transposed:
            return np.ascontiguousarray(numbers[:, index[0]].T, dtype)
        return np.ascontiguousarray(numbers[:, index[1]] if width else numbers, dtype)

    return read

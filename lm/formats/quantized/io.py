"""Hugging Face directories into the serving form, quantized ones into leaves of their formats.

GPTQ, AWQ, compressed-tensors and bitsandbytes have a `quantization_config` in `config.json` and, in
place of a module's `weight`, the tensors of a format (`layouts.py`). Other modules are read as they
are.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lm.files import FormatError, Safetensors
from lm.formats.common import Path, by_path, put, read_json, refuse, tensor_fault, tree_of
from lm.formats.huggingface.config import from_huggingface
from lm.formats.huggingface.io import surplus_tensors, weight_fault
from lm.formats.huggingface.names import open_tensors
from lm.formats.huggingface.tensors import Tensor, tensors
from lm.formats.huggingface.transforms import Transform, Vocabulary
from lm.formats.quantized.layouts import Format, formats_of
from lm.model import ModelConfig, ModelWeights
from lm.model.params import unstacked_specs
from lm.sharding import Layout, named_sharding
from lm.weights import NF4, Fp8, ParamSpec
from lm.weights.blocked import Blocked

# Beside a module's own: scales of activations and caches, which here stay in floating point.
IGNORED = r".*\.(input_scale|output_scale|input_zero_point|k_scale|v_scale|q_scale|weight_format)"


def read_quantization(path: Path) -> Mapping[str, Any] | None:
    """`quantization_config` of a directory's `config.json` or `quantize_config.json`, or None."""
    directory = pathlib.Path(path)
    q = read_json(directory / "config.json").get("quantization_config")
    if q is None and (directory / "quantize_config.json").exists():
        q = {"quant_method": "gptq", **read_json(directory / "quantize_config.json")}
    return q


def load_quantized(
    path: Path,
    *,
    dtype: Any = None,
    layout: Layout | None = None,
    ignore: Collection[str] = (),
) -> tuple[ModelWeights, ModelConfig]:
    """The weights of a quantized Hugging Face model, unstacked, and its configuration.

    4-bit GPTQ, AWQ and `pack-quantized` become `Int4`; their 8-bit kind `Int8Groups`; int8 by
    channel `Int8`; float8 `Fp8`; bitsandbytes `NF4`. `lm.model.stack` makes the training form,
    where layers have leaves of the same kind.

    Args:
      path: directory with `config.json` and safetensors.
      dtype: of the weights that are arrays; None for the file's.
      layout: place each shard by these rules; None for the default device.
      ignore: see `from_huggingface`.

    Raises:
      FormatError: tensors are missing, surplus, of another shape or dtype (all are named), or
        their values break the format.
      ValueError: the model or its quantization is not supported, or a shard would end inside a
        block.
    """
    q = read_quantization(path)
    if q is None:
        raise FormatError(f"{path} is not quantized: config.json has no 'quantization_config'")
    formats = formats_of(q)
    data = {**read_json(pathlib.Path(path) / "config.json"), "quantization_config": None}
    config = from_huggingface(data, ignore=ignore)
    return load_unstacked(path, config, formats, dtype=dtype, layout=layout)


def load_unstacked(
    path: Path,
    config: ModelConfig,
    formats: tuple[Format, ...] = (),
    *,
    dtype: Any = None,
    layout: Layout | None = None,
) -> tuple[ModelWeights, ModelConfig]:
    """The weights in a directory, unstacked, and the model as it has them.

    `formats` are those its matrices may be in. Other arguments and errors are those of
    `load_quantized`.
    """
    file, config = open_tensors(path, config)
    modules = _match(config, formats, file, str(path))
    specs = unstacked_specs(config)
    spec_of = by_path(specs)
    done: dict[str, Any] = {}
    for module in modules:
        for place, weight in zip(module.tensor.places, _parts(module, file, dtype), strict=True):
            own = place.unstacked_path
            done[own] = _placed(weight, spec_of[own], layout, own)
        for name in module.names.values():
            file.release(name)
    return tree_of(done, specs), config


@dataclasses.dataclass(frozen=True)
class _Module:
    """One tensor of the family, and what the file has for it.

    Attributes:
      tensor: of the family.
      format: None where the file has the tensor itself.
      names: ends of the format's names (or "") -> names in the file.
    """

    tensor: Tensor
    format: Format | None
    names: dict[str, str]


def _match(
    config: ModelConfig, formats: tuple[Format, ...], file: Safetensors, source: str
) -> list[_Module]:
    """What the file has for every tensor. Raises FormatError with every fault."""
    faults: list[str] = []
    modules = [_find(tensor, formats, file, faults, config) for tensor in tensors(config)]
    known = {name for module in modules for name in module.names.values()}
    biases = {
        module.names[marker].removesuffix(marker) + "bias"
        for module in modules
        if module.format and (marker := module.format.marker) in module.names
    }
    ignored = (IGNORED,) if formats else ()
    for name in surplus_tensors(file.tensors.keys() - known, config, *ignored):
        # Old GPTQ files have a bias of zeros where the model has none.
        if name not in biases or np.any(file.array(name)):
            faults.append(f"{name} {list(file.tensors[name].shape)} is not in this model")
    refuse(faults, source, config)
    return modules


def _find(
    tensor: Tensor,
    formats: tuple[Format, ...],
    file: Safetensors,
    faults: list[str],
    config: ModelConfig,
) -> _Module:
    if not tensor.name.endswith(".weight") or tensor.transform in (Transform(), Vocabulary()):
        formats = ()  # not a matrix
    for each in (tensor.name, *tensor.aliases):
        stem = each.removesuffix(".weight")
        for form in formats:
            if f"{stem}.{form.marker}" in file.tensors:
                return _quantized(tensor, stem, form, file, faults)
        if each in file.tensors:
            info = file.tensors[each]
            if fault := weight_fault(tensor, each, (info.shape, info.type), config):
                faults.append(fault)
            return _Module(tensor, None, {"": each})
    markers = " or ".join(form.marker for form in formats)
    hint = f", and so is {markers} in its place" if markers else ""
    faults.append(f"{weight_fault(tensor, tensor.name, None, config)}{hint}")
    return _Module(tensor, None, {})


def _quantized(
    tensor: Tensor, stem: str, form: Format, file: Safetensors, faults: list[str]
) -> _Module:
    prefix = f"{stem}."
    present = {
        name.removeprefix(prefix): (info.shape, info.type)
        for name, info in file.tensors.items()
        if name.startswith(prefix)
    }
    try:
        wanted = form.wanted(tensor.shape, present)
    except FormatError as error:
        faults.append(f"{stem}: {error}")
        return _Module(tensor, form, {end: prefix + end for end in present})
    for end, (shape, dtypes) in wanted.items():
        if fault := tensor_fault(prefix + end, shape, present.get(end), dtypes):
            faults.append(fault)
    return _Module(tensor, form, {end: prefix + end for end in wanted})


def _parts(module: _Module, file: Safetensors, dtype: Any) -> list[Any]:
    """Our weights out of a module: arrays, or leaves of arrays, on the host."""
    tensor = module.tensor
    if module.format is None:
        parts = tensor.read(file.array(module.names[""]))
        return [part.astype(dtype or part.dtype, copy=False) for part in parts]
    arrays = {end: file.array(name) for end, name in module.names.items()}
    try:
        leaf = module.format.leaf(arrays, tensor.shape)
    except FormatError as error:
        raise FormatError(f"{tensor.name}: {error}") from None
    # The columns of the module that each weight has, read off a matrix of their numbers.
    numbers = np.arange(1, tensor.shape[0] + 1)[:, None]
    ours = [(1, place.shape[1]) for place in tensor.places]
    columns = [part[0] - 1 for part in tensor.read(numbers, ours)]
    if len(columns) == 1 and np.array_equal(columns[0], numbers[:, 0] - 1):
        return [leaf]
    try:
        return [_columns(leaf, own) for own in columns]
    except ValueError as error:
        raise ValueError(f"{tensor.name}: {error}") from None


def _columns(leaf: Blocked, columns: np.ndarray) -> Blocked:
    """Some columns of a matrix, by number; -1 for one of zeros."""
    if isinstance(leaf, NF4) and leaf.nested is not None and leaf.granularity[0] == leaf.block:
        leaf = leaf.canonical()
    if (isinstance(leaf, Fp8) and leaf.block) or leaf.granularity[1] != 1:
        raise ValueError(
            f"blocks of {type(leaf).__name__} {list(leaf.shape)} cross the columns of several "
            "weights, or of the vocabulary's padding"
        )

    def take(array: Any) -> np.ndarray:
        array = np.asarray(array)
        if array.shape[-1] == 1:
            return array
        part = array[..., columns]
        part[..., columns < 0] = 0
        return part

    kept = {name: getattr(leaf, name) for name in leaf.other_arrays}
    moved = jax.tree.map(take, dataclasses.replace(leaf, **dict.fromkeys(kept)))  # type: ignore[type-var]
    return dataclasses.replace(moved, **kept)


def _placed(weight: Any, spec: ParamSpec, layout: Layout | None, path: str) -> Any:
    """A weight on its devices."""
    try:
        if layout is None:
            return jax.tree.map(jnp.array, weight)
        if isinstance(weight, Blocked):
            wanted = weight.shardings(spec.axes, layout.rules, layout.mesh)
        else:
            wanted = named_sharding(layout.mesh, layout.rules.weights, spec.axes, spec.shape)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return jax.tree.map(put, weight, wanted)

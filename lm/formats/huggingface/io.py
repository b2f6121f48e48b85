"""Models of Hugging Face on disk: `config.json` and safetensors, in and out.

Tensors are read and placed one at a time, so that the host never holds much more than the weights
it keeps. Import and export follow the tensors of the family (`lm.formats.families`).
"""

from __future__ import annotations

import functools
import json
import pathlib
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from lm.files import FormatError, LazyTensor, write_sharded
from lm.files.safetensors import INDEX
from lm.formats.common import (
    DTYPES,
    Header,
    Path,
    by_path,
    put,
    read_json,
    refuse,
    tensor_fault,
    tree_of,
)
from lm.formats.families import family_of
from lm.formats.huggingface.config import from_huggingface, to_huggingface
from lm.formats.huggingface.keys import NOTHING
from lm.formats.huggingface.names import as_held, open_tensors
from lm.formats.huggingface.tensors import Tensor, tensors
from lm.model import ModelConfig, ModelWeights, param_specs
from lm.weights import is_structured, path_name


def read_config(
    path: Path, *, vocab_multiple: int = 128, ignore: Collection[str] = ()
) -> ModelConfig:
    """The `ModelConfig` of the `config.json` in directory `path`; see `from_huggingface`.

    Raises:
      FormatError: there is none, or it is not JSON.
      ValueError: it says what is not supported.
    """
    data = read_json(pathlib.Path(path) / "config.json", "; give a Hugging Face model's directory")
    return from_huggingface(data, vocab_multiple=vocab_multiple, ignore=ignore)


def load_huggingface(
    path: Path,
    config: ModelConfig | None = None,
    *,
    dtype: Any = None,
    shardings: Any = None,
    vocab_multiple: int = 128,
    ignore: Collection[str] = (),
) -> tuple[ModelWeights, ModelConfig]:
    """The weights of a Hugging Face model, stacked, and its configuration.

    Of a model of more than text it is the text model. It is not tied where the file has another
    output than the embedding.

    Args:
      path: directory with `config.json` and `model.safetensors`, or its shards and their index.
      config: instead of the one `config.json` says.
      dtype: of the weights; None for the file's.
      shardings: a tree of shardings like the weights (`lm.weights.shardings`); None for the
        default device.
      vocab_multiple: see `ModelConfig`. Rows of padding are zeros.
      ignore: see `from_huggingface`.

    Raises:
      FormatError: tensors are missing, surplus, of another shape or not floating-point; all are
        named. Or a file is damaged.
      FileNotFoundError: there are no safetensors.
      ValueError: see `from_huggingface`.
    """
    if config is None:
        config = read_config(path, vocab_multiple=vocab_multiple, ignore=ignore)
    file, config = open_tensors(path, config)
    headers = {name: (info.shape, info.type) for name, info in file.tensors.items()}
    params = _assemble(config, headers, file.array, dtype, shardings, str(path), file.release)
    return params, config


def from_tensors(
    arrays: Mapping[str, np.ndarray], config: ModelConfig, *, dtype: Any = None
) -> ModelWeights:
    """The stacked weights of a model from tensors by name. Errors as `load_huggingface`.

    Raises also:
      FormatError: the output is not the embedding that `config` ties it to.
    """
    names, held = as_held(arrays, arrays.__getitem__, config)
    if held != config:
        raise FormatError("the output differs from the embedding it is tied to; use tied=False")
    arrays = {name: arrays[old] for name, old in names.items()}
    codes = {name: code for code, name in DTYPES.items()}
    headers = {
        name: (tuple(array.shape), codes.get(str(array.dtype), str(array.dtype)))
        for name, array in arrays.items()
    }
    return _assemble(
        config, headers, lambda name: np.asarray(arrays[name]), dtype, None, "the input"
    )


def save_huggingface(
    params: ModelWeights,
    config: ModelConfig,
    path: Path,
    *,
    dtype: Any = None,
    max_shard_size: int = 5_000_000_000,
    extra: Mapping[str, Any] = NOTHING,
    overwrite: bool = False,
) -> None:
    """Write a model as Hugging Face's `config.json` and safetensors, the vocabulary trimmed.

    Args:
      params: the weights, stacked or unstacked.
      config: the model.
      path: directory; created if it does not exist.
      dtype: of the tensors; None for that of the weights.
      max_shard_size: bytes per file; more than one file gets an index.
      extra: further keys of `config.json` (`eos_token_id`, ...).
      overwrite: replace the model that is there.

    Raises:
      FormatError: a model is there already.
      ValueError: the format cannot say what the model is, a weight is not an array, or its shape
        is not that of the configuration.
    """
    directory = pathlib.Path(path)
    data = to_huggingface(config, extra)
    _check_weights(params, config)
    directory.mkdir(parents=True, exist_ok=True)
    present = [*directory.glob("model*.safetensors"), *directory.glob(INDEX)]
    if present and not overwrite:
        raise FormatError(f"{present[0]} exists; use another directory, or overwrite=True")
    for file in present:
        file.unlink()

    def lazy(tensor: Tensor) -> LazyTensor:
        own = np.dtype(dtype or tensor.places[0].weight(params).dtype)
        return LazyTensor(own, tensor.shape, lambda: _export(tensor, config, params, dtype))

    written = {tensor.name: lazy(tensor) for tensor in tensors(config)}
    write_sharded(directory, written, max_shard_size=max_shard_size, metadata={"format": "pt"})
    dtypes = {str(tensor.dtype) for tensor in written.values()}
    if len(dtypes) == 1:
        data.setdefault("torch_dtype", dtypes.pop())
    text = json.dumps(data, indent=2) + "\n"
    (directory / "config.json").write_text(text, encoding="utf-8")


def to_tensors(params: ModelWeights, config: ModelConfig) -> Iterator[tuple[str, np.ndarray]]:
    """Names and values of Hugging Face's tensors, one at a time. Errors as `save_huggingface`."""
    _check_weights(params, config)
    for tensor in tensors(config):
        yield tensor.name, _export(tensor, config, params)


def _assemble(
    config: ModelConfig,
    headers: Mapping[str, Header],
    read: Callable[[str], np.ndarray],
    dtype: Any,
    shardings: Any,
    source: str,
    release: Callable[[str], None] = lambda name: None,
) -> ModelWeights:
    """The weights from tensors that `read` gives by name, each released after its use."""
    wanted = list(tensors(config))
    names = _match(config, wanted, headers, dtype, source)
    specs = param_specs(config)
    placed = jax.tree_util.tree_leaves_with_path(shardings)
    sharding_of = {path_name(path): sharding for path, sharding in placed}
    spec_of = by_path(specs)
    done: dict[str, jax.Array] = {}
    for tensor, name in zip(wanted, names, strict=True):
        for place, part in zip(tensor.places, tensor.read(read(name)), strict=True):
            part = part.astype(dtype or part.dtype, copy=False)
            sharding = sharding_of.get(place.path)
            if place.stack is None:
                done[place.path] = put(part, sharding)
                continue
            one = put(part, _of_one_layer(sharding))
            if place.path not in done:
                done[place.path] = _zeros(spec_of[place.path].shape, part.dtype, sharding)
            done[place.path] = _set_layer(done[place.path], one, place.repeat)
        release(name)
    return tree_of(done, specs)


def _match(
    config: ModelConfig,
    wanted: list[Tensor],
    headers: Mapping[str, Header],
    dtype: Any,
    source: str,
) -> list[str]:
    """The name in the file of each wanted tensor. Raises FormatError with every fault."""
    faults: list[str] = []
    names: list[str] = []
    dtypes: dict[str, tuple[str, str | None]] = {}
    for tensor in wanted:
        name = next((n for n in (tensor.name, *tensor.aliases) if n in headers), tensor.name)
        names.append(name)
        if fault := weight_fault(tensor, name, headers.get(name), config):
            faults.append(fault)
        code = headers[name][1] if name in headers else None
        for place in tensor.places if code in DTYPES else ():
            first, first_code = dtypes.setdefault(place.path, (name, code))
            if dtype is None and first_code != code:
                faults.append(f"{name} is {code} but {first} is {first_code}; give a dtype")
    surplus = surplus_tensors(headers.keys() - set(names), config)
    faults += [f"{name} {list(headers[name][0])} is not in this model" for name in surplus]
    refuse(faults, source, config)
    return names


def weight_fault(
    tensor: Tensor, name: str, found: Header | None, config: ModelConfig
) -> str | None:
    """What is wrong with the tensor of that name in a file, or None."""
    fault = tensor_fault(name, tensor.shape, found)
    if fault and found and tensor.places[0].field in ("embed", "output"):
        fault += f" (vocab_size={config.vocab_size})"
    if fault and not found and tensor.places[0].field == "output":
        fault += ' (with "tie_word_embeddings": true in config.json, it is the embedding)'
    return fault


def surplus_tensors(names: Collection[str], config: ModelConfig, *ignored: str) -> list[str]:
    """Those of `names` that are not passed over, by the family or the regular expressions."""
    patterns = (*family_of(config).huggingface.ignored, *ignored)
    return sorted(n for n in names if not any(re.fullmatch(pattern, n) for pattern in patterns))


def _of_one_layer(sharding: Any) -> Any:
    """The sharding of one layer's weight, from that of the stack."""
    if not isinstance(sharding, NamedSharding):
        return sharding
    return NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[1:]))


def _zeros(shape: tuple[int, ...], dtype: Any, sharding: Any) -> jax.Array:
    return jax.jit(lambda: jnp.zeros(shape, dtype), out_shardings=sharding)()


@functools.partial(jax.jit, donate_argnums=0)
def _set_layer(stack: jax.Array, one: jax.Array, index: int) -> jax.Array:
    return jax.lax.dynamic_update_index_in_dim(stack, one, index, 0)


def _export(
    tensor: Tensor, config: ModelConfig, params: ModelWeights, dtype: Any = None
) -> np.ndarray:
    weights = [place.weight(params) for place in tensor.places]
    arrays = [np.asarray(x if dtype is None else x.astype(dtype)) for x in weights]
    return tensor.transform.write(arrays, config, tensor.layer)


def _check_weights(params: ModelWeights, config: ModelConfig) -> None:
    """Raises ValueError, naming them all, where weights are not arrays of the right shapes."""
    faults = []
    for place in (place for tensor in tensors(config) for place in tensor.places):
        weight = place.weight(params)
        if weight is None:
            faults.append(f"{place.path} is missing")
        elif is_structured(weight):
            faults.append(f"{place.path} is a {type(weight).__name__}; dequantize it first")
        elif weight.shape != place.shape:
            faults.append(
                f"{place.path} is {list(weight.shape)}, the configuration wants {list(place.shape)}"
            )
    if faults:
        raise ValueError(f"these weights cannot be saved: {'; '.join(dict.fromkeys(faults))}")

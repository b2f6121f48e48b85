"""Models of Hugging Face on disk: `config.json` and safetensors, in and out.

Tensors are read and placed one at a time, so that the host never holds much more than the weights
it keeps. Import and export follow one table a family (`huggingface_tables.py`).
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

from lm.checkpoints.store import CheckpointError
from lm.files.base import FileFormatError
from lm.files.safetensors import INDEX, Safetensors, open_safetensors
from lm.files.safetensors_writer import LazyTensor, write_sharded
from lm.formats.huggingface.config import from_huggingface, to_huggingface
from lm.formats.huggingface.families import NOTHING
from lm.formats.huggingface.tensors import TABLES, Place, Tensor, attribute, tensors
from lm.model import ModelConfig, ModelWeights, Unstacked, param_specs
from lm.model.params import unstacked_specs
from lm.weights import StructuredWeight, is_spec, path_name

DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
Path = str | pathlib.Path


def read_config(
    path: Path, *, vocab_multiple: int = 128, ignore: Collection[str] = ()
) -> ModelConfig:
    """The `ModelConfig` of the `config.json` in directory `path`; see `from_huggingface`.

    Raises:
      CheckpointError: there is none, or it is not JSON.
      ValueError: it says what is not supported.
    """
    file = pathlib.Path(path) / "config.json"
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(
            f"{file} does not exist; give a Hugging Face model's directory"
        ) from None
    except ValueError as error:
        raise CheckpointError(f"{file} is not JSON: {error}") from None
    return from_huggingface(data, vocab_multiple=vocab_multiple, ignore=ignore)


def load_huggingface(
    path: Path,
    config: ModelConfig | None = None,
    *,
    dtype: Any = None,
    shardings: Any = None,
    vocab_multiple: int = 128,
    ignore: Collection[str] = (),
    stacked: bool = True,
) -> tuple[ModelWeights, ModelConfig]:
    """The weights of a Hugging Face model and its configuration.

    Args:
      path: directory with `config.json` and `model.safetensors`, or its shards and their index.
      config: instead of the one `config.json` says.
      dtype: of the weights; None for the file's.
      shardings: a tree of shardings like the stacked weights (`lm.weights.shardings`); None for
        the default device.
      vocab_multiple: see `ModelConfig`. Rows of padding are zeros.
      ignore: see `from_huggingface`.
      stacked: the training form; otherwise the serving form, each layer its own arrays.

    Raises:
      CheckpointError: tensors are missing, surplus, of another shape or not floating-point; all
        are named.
      ValueError: see `from_huggingface`.
    """
    if config is None:
        config = read_config(path, vocab_multiple=vocab_multiple, ignore=ignore)
    file = _open(path)
    headers = {name: (info.shape, info.dtype) for name, info in file.tensors.items()}
    params = _assemble(
        config, headers, file.array, dtype, shardings, str(path), file.release, stacked
    )
    return params, config


def from_tensors(
    arrays: Mapping[str, np.ndarray], config: ModelConfig, *, dtype: Any = None
) -> ModelWeights:
    """The stacked weights of a model from tensors by name. Errors as `load_huggingface`."""
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
      path: directory; made where it does not exist.
      dtype: of the tensors; None for that of the weights.
      max_shard_size: bytes a file; more than one file gets an index.
      extra: further keys of `config.json` (`eos_token_id`, ...).
      overwrite: replace the model that is there.

    Raises:
      CheckpointError: a model is there already.
      ValueError: the format cannot say what the model is, a weight is not an array, or its shape
        is not that of the configuration.
    """
    directory = pathlib.Path(path)
    data = to_huggingface(config, extra)
    _check_weights(params, config)
    directory.mkdir(parents=True, exist_ok=True)
    present = [*directory.glob("model*.safetensors"), *directory.glob(INDEX)]
    if present and not overwrite:
        raise CheckpointError(f"{present[0]} exists; use another directory, or overwrite=True")
    for file in present:
        file.unlink()

    def weight(place: Place) -> jax.Array:
        array = _weight(params, config, place)
        return array if dtype is None else array.astype(dtype)

    written = {t.name: _lazy(t, params, config, dtype, weight) for t in tensors(config)}
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
        yield tensor.name, _export(tensor, config, functools.partial(_weight, params, config))


def _open(path: Path) -> Safetensors:
    try:
        return open_safetensors(path)
    except (FileFormatError, FileNotFoundError) as error:
        raise CheckpointError(str(error)) from error


def _assemble(
    config: ModelConfig,
    headers: Mapping[str, tuple[tuple[int, ...], str]],
    read: Callable[[str], np.ndarray],
    dtype: Any,
    shardings: Any,
    source: str,
    release: Callable[[str], None] = lambda name: None,
    stacked: bool = True,
) -> ModelWeights:
    """The weights from tensors that `read` gives by name, each released after its use."""
    wanted = list(tensors(config))
    names = _match(config, wanted, headers, dtype, source)
    specs = param_specs(config)
    placed = jax.tree_util.tree_leaves_with_path(shardings)
    sharding_of = {path_name(path): sharding for path, sharding in placed}
    shapes = {
        path_name(path): spec.shape
        for path, spec in jax.tree_util.tree_leaves_with_path(specs, is_leaf=is_spec)
    }
    done: dict[str, jax.Array] = {}
    for tensor, name in zip(wanted, names, strict=True):
        parts = tensor.transform.read(read(name), [p.shape for p in tensor.places], tensor.layer)
        for place, part in zip(tensor.places, parts, strict=True):
            part = part.astype(dtype or part.dtype, copy=False)
            sharding = sharding_of.get(place.path)
            if place.stack is None:
                done[place.path] = _put(part, sharding)
                continue
            if not stacked:
                done[_unstacked_path(place, config)] = _put(part, _of_one_layer(sharding))
                continue
            if place.path not in done:
                done[place.path] = _zeros(shapes[place.path], part.dtype, sharding)
            one = _put(part, _of_one_layer(sharding))
            done[place.path] = _set_layer(done[place.path], one, place.repeat)
        release(name)
    return jax.tree_util.tree_map_with_path(
        lambda path, _: done[path_name(path)],
        specs if stacked else unstacked_specs(config),
        is_leaf=is_spec,
    )


def _unstacked_path(place: Place, config: ModelConfig) -> str:
    assert place.stack is not None
    index = place.repeat * len(config.stacks[place.stack].pattern) + place.position
    return f"stacks/{place.stack}/layers/{index}/{place.field}"


def _match(
    config: ModelConfig,
    wanted: list[Tensor],
    headers: Mapping[str, tuple[tuple[int, ...], str]],
    dtype: Any,
    source: str,
) -> list[str]:
    """The name in the file of each wanted tensor. Raises CheckpointError with every fault."""
    faults: list[str] = []
    names: list[str] = []
    dtypes: dict[str, tuple[str, str]] = {}
    for tensor in wanted:
        name = next((n for n in (tensor.name, *tensor.aliases) if n in headers), None)
        names.append(name or tensor.name)
        if name is None:
            faults.append(f"{tensor.name} {list(tensor.shape)} is missing")
            continue
        shape, code = headers[name]
        if code not in DTYPES:
            faults.append(f"{name} is of dtype {code}; weights are {', '.join(DTYPES)}")
            continue
        if shape != tensor.shape:
            rows = tensor.places[0].stack is None and "norm" not in name
            hint = (
                f" (vocab_size={config.vocab_size})"
                if rows and shape[:1] != tensor.shape[:1]
                else ""
            )
            faults.append(f"{name} is {list(shape)}, the model wants {list(tensor.shape)}{hint}")
        for place in tensor.places:
            first, first_code = dtypes.setdefault(place.path, (name, code))
            if dtype is None and first_code != code:
                faults.append(f"{name} is {code} but {first} is {first_code}; give a dtype")
    ignored = TABLES[config.family].ignored
    if config.tied:
        ignored += (r"lm_head\.weight", r"embed_out\.weight")
    for name in sorted(headers.keys() - set(names)):
        if not any(re.fullmatch(pattern, name) for pattern in ignored):
            faults.append(f"{name} {list(headers[name][0])} is not in this model")
    if faults:
        raise CheckpointError(
            f"{source} does not fit a {config.family!r} model of {config.num_layers} layers, "
            f"{len(faults)} faults: " + "; ".join(_by_layer(faults))
        )
    return names


def _by_layer(faults: list[str]) -> list[str]:
    """Faults that differ by the number of a layer alone, told as one."""
    grouped: dict[tuple[str, str], list[str]] = {}
    for fault in faults:
        before, number, after = fault, "", ""
        if fault.count(".layers.") == 1:
            before, number, after = re.split(r"(?<=\.layers\.)(\d+)", fault, maxsplit=1)
        grouped.setdefault((before, after), []).append(number)
    return [
        f"{before}{numbers[0] if len(numbers) == 1 else '{' + ','.join(numbers) + '}'}{after}"
        for (before, after), numbers in grouped.items()
    ]


def _of_one_layer(sharding: Any) -> Any:
    """The sharding of one layer's weight, from that of the stack."""
    if not isinstance(sharding, NamedSharding):
        return sharding
    return NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[1:]))


def _put(array: np.ndarray, sharding: Any) -> jax.Array:
    """`array` on the devices, each host reading and placing its own part."""
    if sharding is None:
        return jnp.array(array)
    # Copied, because on a CPU the result would otherwise be the file's memory.
    return jax.make_array_from_callback(array.shape, sharding, lambda index: np.array(array[index]))


def _zeros(shape: tuple[int, ...], dtype: Any, sharding: Any) -> jax.Array:
    return jax.jit(lambda: jnp.zeros(shape, dtype), out_shardings=sharding)()


@functools.partial(jax.jit, donate_argnums=0)
def _set_layer(stack: jax.Array, one: jax.Array, index: int) -> jax.Array:
    return jax.lax.dynamic_update_index_in_dim(stack, one, index, 0)


def _weight(params: ModelWeights, config: ModelConfig, place: Place) -> Any:
    """One of our weights, a layer's own."""
    if place.stack is None:
        return attribute(params, place.field)
    stack = params.stacks[place.stack]
    if isinstance(stack, Unstacked):
        index = place.repeat * len(config.stacks[place.stack].pattern) + place.position
        return attribute(stack.layers[index], place.field)
    weight = attribute(stack.layers[place.position], place.field)
    return (
        weight if weight is None or isinstance(weight, StructuredWeight) else weight[place.repeat]
    )


def _export(tensor: Tensor, config: ModelConfig, weight: Callable[[Place], Any]) -> np.ndarray:
    arrays = [np.asarray(weight(place)) for place in tensor.places]
    return tensor.transform.write(arrays, config, tensor.layer)


def _check_weights(params: ModelWeights, config: ModelConfig) -> None:
    """Raises ValueError, naming them all, where weights are not arrays of the right shapes."""
    faults = []
    for tensor in tensors(config):
        for place in tensor.places:
            weight = _weight(params, config, place)
            if weight is None:
                faults.append(f"{place.path} is missing")
            elif isinstance(weight, StructuredWeight):
                faults.append(f"{place.path} is a {type(weight).__name__}; dequantize it first")
            elif weight.shape != place.shape:
                faults.append(
                    f"{place.path} is {list(weight.shape)}, the configuration wants "
                    f"{list(place.shape)}"
                )
    if faults:
        raise ValueError(f"these weights cannot be saved: {'; '.join(dict.fromkeys(faults))}")


def _lazy(
    tensor: Tensor,
    params: ModelWeights,
    config: ModelConfig,
    dtype: Any,
    weight: Callable[[Place], Any],
) -> LazyTensor:
    """A tensor that is made when it is written."""
    own = np.dtype(dtype or _weight(params, config, tensor.places[0]).dtype)
    return LazyTensor(own, tensor.shape, lambda: _export(tensor, config, weight))

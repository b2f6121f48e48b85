"""Models of Hugging Face on disk: `config.json` and safetensors, in and out.

Tensors are read and placed one at a time, so that the host never holds much more than the weights
it keeps. Import and export follow one table a family (`huggingface_tables.py`).
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import pathlib
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from safetensors import safe_open
from safetensors.numpy import save_file

from lm.checkpoints.huggingface_config import from_huggingface, to_huggingface
from lm.checkpoints.huggingface_formats import NOTHING
from lm.checkpoints.huggingface_tables import TABLES, Place, Tensor, attribute, tensors
from lm.checkpoints.store import CheckpointError
from lm.model import ModelConfig, ModelWeights, Unstacked, param_specs
from lm.weights import Leaf, is_spec, path_name

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
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


def load(
    path: Path,
    config: ModelConfig | None = None,
    *,
    dtype: Any = None,
    shardings: Any = None,
    vocab_multiple: int = 128,
    ignore: Collection[str] = (),
) -> tuple[ModelWeights, ModelConfig]:
    """The weights of a Hugging Face model, stacked, and its configuration.

    Args:
      path: directory with `config.json` and `model.safetensors`, or its shards and their index.
      config: instead of the one `config.json` says.
      dtype: of the weights; None for the file's.
      shardings: a tree of shardings like the weights (`lm.weights.shardings`); None for the
        default device.
      vocab_multiple: see `ModelConfig`. Rows of padding are zeros.
      ignore: see `from_huggingface`.

    Raises:
      CheckpointError: tensors are missing, surplus, of another shape or not floating-point; all
        are named.
      ValueError: see `from_huggingface`.
    """
    if config is None:
        config = read_config(path, vocab_multiple=vocab_multiple, ignore=ignore)
    with contextlib.ExitStack() as stack:
        file = _Files(pathlib.Path(path), stack)
        return _assemble(config, file.headers, file.read, dtype, shardings, str(path)), config


def from_tensors(
    arrays: Mapping[str, np.ndarray], config: ModelConfig, *, dtype: Any = None
) -> ModelWeights:
    """The weights of a model, stacked, from Hugging Face's tensors by name. Errors as `load`."""
    codes = {name: code for code, name in DTYPES.items()}
    headers = {
        name: (tuple(array.shape), codes.get(str(array.dtype), str(array.dtype)))
        for name, array in arrays.items()
    }
    return _assemble(
        config, headers, lambda name: np.asarray(arrays[name]), dtype, None, "the input"
    )


def save(
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

    shards = _shards(params, config, dtype, max_shard_size)
    names: dict[str, str] = {}
    total = 0
    dtypes = set()
    for number, shard in enumerate(shards, 1):
        single = len(shards) == 1
        name = SINGLE if single else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        # safetensors writes the buffer as it lies, so that a transposed view has to be copied.
        out = {t.name: np.ascontiguousarray(_export(t, config, weight)) for t in shard}
        save_file(out, directory / name, metadata={"format": "pt"})
        names |= dict.fromkeys(out, name)
        total += sum(array.nbytes for array in out.values())
        dtypes |= {str(array.dtype) for array in out.values()}
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": names}
        (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    if len(dtypes) == 1:
        data.setdefault("torch_dtype", dtypes.pop())
    text = json.dumps(data, indent=2) + "\n"
    (directory / "config.json").write_text(text, encoding="utf-8")


def to_tensors(params: ModelWeights, config: ModelConfig) -> Iterator[tuple[str, np.ndarray]]:
    """Names and values of Hugging Face's tensors, one at a time. Errors as `save`."""
    _check_weights(params, config)
    for tensor in tensors(config):
        yield tensor.name, _export(tensor, config, functools.partial(_weight, params, config))


class _Files:
    """The safetensors files of a directory, open for reading."""

    def __init__(self, directory: pathlib.Path, stack: contextlib.ExitStack) -> None:
        index = directory / INDEX
        if index.exists():
            weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            files = sorted(set(weight_map.values()))
        else:
            weight_map, files = None, [SINGLE]
        missing = [name for name in files if not (directory / name).exists()]
        if missing:
            raise CheckpointError(
                f"{directory} has no {', '.join(missing)}; a model's directory holds {SINGLE}, or "
                f"{INDEX} and the files it names"
            )
        self.handle: dict[str, Any] = {}
        self.headers: dict[str, tuple[tuple[int, ...], str]] = {}
        for name in files:
            try:
                handle = stack.enter_context(safe_open(directory / name, framework="np"))
            except Exception as error:  # the library has its own error class for a broken header
                raise CheckpointError(f"{directory / name} cannot be read: {error}") from error
            for key in handle.keys():  # noqa: SIM118  (a handle is not a mapping)
                part = handle.get_slice(key)
                self.handle[key] = handle
                self.headers[key] = tuple(part.get_shape()), part.get_dtype()
        lost = sorted(set(weight_map or ()) - self.headers.keys())
        if lost:
            raise CheckpointError(f"{index} names {', '.join(lost[:8])}, which no file holds")

    def read(self, name: str) -> np.ndarray:
        return self.handle[name].get_tensor(name)


def _assemble(
    config: ModelConfig,
    headers: Mapping[str, tuple[tuple[int, ...], str]],
    read: Callable[[str], np.ndarray],
    dtype: Any,
    shardings: Any,
    source: str,
) -> ModelWeights:
    """The stacked weights from tensors that `read` gives by name."""
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
            if place.path not in done:
                done[place.path] = _zeros(shapes[place.path], part.dtype, sharding)
            one = _put(part, _of_one_layer(sharding))
            done[place.path] = _set_layer(done[place.path], one, place.repeat)
    return jax.tree_util.tree_map_with_path(
        lambda path, _: done[path_name(path)], specs, is_leaf=is_spec
    )


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
    """`array` on the devices, each host placing its own part."""
    if sharding is None:
        return jnp.asarray(array)
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


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
    return weight if weight is None or isinstance(weight, Leaf) else weight[place.repeat]


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
            elif isinstance(weight, Leaf):
                faults.append(f"{place.path} is a {type(weight).__name__}; dequantize it first")
            elif weight.shape != place.shape:
                faults.append(
                    f"{place.path} is {list(weight.shape)}, the configuration wants "
                    f"{list(place.shape)}"
                )
    if faults:
        raise ValueError(f"these weights cannot be saved: {'; '.join(dict.fromkeys(faults))}")


def _shards(
    params: ModelWeights, config: ModelConfig, dtype: Any, max_size: int
) -> list[list[Tensor]]:
    """The tensors in files of at most `max_size` bytes, or of one tensor where that is larger."""
    shards: list[list[Tensor]] = []
    room = 0
    for tensor in tensors(config):
        own = attribute(params, "embed").dtype if tensor.layer is None else None
        own = own or _weight(params, config, tensor.places[0]).dtype
        size = math.prod(tensor.shape) * jnp.dtype(dtype or own).itemsize
        if not shards or size > room:
            shards.append([])
            room = max_size
        shards[-1].append(tensor)
        room -= size
    return shards

"""Reads and writes LoRA adapters in PEFT's directories (`adapter_config.json` and safetensors).

The adapter of module m is `base_model.model.m.lora_A.weight` [r, in] and `lora_B.weight` [out, r];
of an embedding, `lora_embedding_A` [r, vocab] and `lora_embedding_B` [dim, r]; DoRA adds
`lora_magnitude_vector` [out]. A tensor named as one of the model, `base_model.model.m.weight`,
replaces the model's. The family's record maps m to our weights.
Source: https://huggingface.co/docs/peft/developer_guides/checkpoint
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lm.files import FormatError, Safetensors, open_safetensors, write_safetensors
from lm.files.safetensors import other_weights
from lm.formats.common import Path, attribute, refuse, tensor_fault
from lm.formats.huggingface.names import text_names
from lm.formats.huggingface.tensors import Place, Tensor, tensors
from lm.formats.huggingface.transforms import Transform
from lm.formats.peft.config import CONFIG, AdapterConfig, read_adapter_config, write_adapter_config
from lm.model import ModelConfig, ModelWeights, Unstacked
from lm.weights import LoRA, MultiLoRA, StructuredWeight, is_structured, path_name
from lm.weights.blocked import Blocked

WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."
_TABLES = ("embed", "output")  # the weights with a row per token


@dataclasses.dataclass(frozen=True)
class _Module:
    """One of PEFT's modules that may have an adapter.

    Attributes:
      name: in the family's files.
      own_name: in the adapter, which may be of a model of more than text.
    """

    name: str
    tensor: Tensor
    config: ModelConfig
    own_name: str = ""

    @property
    def is_embedding(self) -> bool:
        return self.tensor.places[0].field == "embed"

    def names(self) -> tuple[str, str, str]:
        """Names of the tensors of a, b and the magnitude, without `PREFIX`."""
        stem = self.name
        a, b = f"{stem}.lora_A.weight", f"{stem}.lora_B.weight"
        if self.is_embedding:
            a, b = f"{stem}.lora_embedding_A", f"{stem}.lora_embedding_B"
        return a, b, f"{stem}.lora_magnitude_vector"

    def shapes(self, rank: int) -> tuple[tuple[int, ...], ...]:
        """Shapes of the tensors of a, b and the magnitude."""
        inside, out = self.tensor.shape if self.is_embedding else self.tensor.shape[::-1]
        return (rank, inside), (out, rank), (out,)

    def read(
        self, a: np.ndarray, b: np.ndarray, length: np.ndarray | None
    ) -> list[tuple[np.ndarray, np.ndarray, np.ndarray | None]]:
        """a [in, r], b [r, out] and magnitude [out] of each of our weights in the module."""
        shapes, rank = [place.shape for place in self.tensor.places], len(a)
        if self.is_embedding:
            (rows,) = self.tensor.read(a.T, [(shapes[0][0], rank)])
            return [(rows, b.T, length)]
        lengths = [None] * len(shapes)
        if length is not None:
            ones = self.tensor.read(length[:, None], [(1, shape[1]) for shape in shapes])
            lengths = [one[0] for one in ones]
        parts = self.tensor.read(b, [(rank, shape[1]) for shape in shapes])
        return [(a.T, part, own) for part, own in zip(parts, lengths, strict=True)]

    def write(self, b: list[np.ndarray]) -> np.ndarray:
        """The module's [out, r] from our [r, out]; of an embedding [vocab, r] from [padded, r]."""
        return np.ascontiguousarray(self.tensor.transform.write(b, self.config, self.tensor.layer))


def _modules(config: ModelConfig) -> Iterator[_Module]:
    for tensor in tensors(config):
        if tensor.name.endswith(".weight") and type(tensor.transform) is not Transform:
            yield _Module(tensor.name.removesuffix(".weight"), tensor, config)


def load_peft(
    path: Path,
    params: ModelWeights,
    config: ModelConfig,
    *,
    dtype: Any = None,
    ignore: Collection[str] = (),
) -> tuple[ModelWeights, ModelConfig]:
    """The model with one of PEFT's LoRA adapters, and its configuration.

    Stacked layers share a rank: smaller adapters, and those of layers without one, are filled up
    with zeros. Weights stored whole in the adapter replace ours: modules of `modules_to_save`,
    embedding layers saved with it (a vocabulary of another size too), trained biases. Where the
    output was tied to the embedding and one of them alone changes, the model is not tied any more.

    Args:
      path: directory with `adapter_config.json` and `adapter_model.safetensors`.
      params: the model, stacked or not, with leaves of any type. The caller places the result on a
        mesh: `jax.device_put(params, lm.weights.shardings(lm.weights.specs_of(...), ...))`.
      config: the model.
      dtype: of `a` and `b`; None for the file's.
      ignore: keys of `adapter_config.json` to pass over.

    Raises:
      FormatError: there is no adapter, or it is for another model: tensors are missing, surplus,
        of another shape or not floating-point; all are named.
      ValueError: `adapter_config.json` has a setting that is not supported, or a weight of the
        model has an adapter already.
    """
    directory = pathlib.Path(path).expanduser()
    adapter = read_adapter_config(directory, ignore)
    if not (directory / WEIGHTS).exists():
        raise FormatError(f"{directory / WEIGHTS} does not exist{other_weights(directory)}")
    file = open_safetensors(directory / WEIGHTS)
    own_names = {name.removeprefix(PREFIX): name for name in file.tensors}
    names = text_names(own_names)
    file = file.under({name: own_names[own] for name, own in names.items()})
    # The output has tensors of its own at first; at the end it may be tied again.
    wanted = dataclasses.replace(config, tied=False)
    wanted = _resized(_whole(file, wanted), file, wanted)
    whole, modules = _whole(file, wanted), _targeted(adapter, names, wanted)
    rows = _token_rows(adapter, names, wanted)
    _check(adapter, modules, whole, rows, file, wanted, str(directory))
    replaced: dict[str, dict[int, np.ndarray]] = {}
    for name, tensor in whole.items():
        for place, part in zip(tensor.places, tensor.read(file.array(name)), strict=True):
            key, index = _ours(place, params)
            replaced.setdefault(key, {})[index] = part
    for name, (tensor, indices) in rows.items():
        field = tensor.places[0].field
        old = replaced[field][0] if field in replaced else _dense(attribute(params, field))
        new = np.array(old.T if field == "output" else old)
        new[list(indices)] = file.array(name)
        replaced[field] = {0: new.T if field == "output" else new}
    found: dict[str, dict[int, LoRA]] = {}
    for module in modules:
        scale = np.float32(adapter.scale_of(module.own_name))
        a, b = (np.asarray(array, dtype) for array in map(file.array, module.names()[:2]))
        length = np.asarray(file.array(module.names()[2]), np.float32) if adapter.dora else None
        for place, part in zip(module.tensor.places, module.read(a, b, length), strict=True):
            key, index = _ours(place, params)
            found.setdefault(key, {})[index] = LoRA(None, *part[:2], scale, part[2])
    saved = {t.places[0].field for own, t in whole.items() if adapter.replaces(names[own])}
    if config.tied:
        tied = not (found.keys() & {"embed", "output"}) and _stays_tied(params, replaced, saved)
        wanted = dataclasses.replace(wanted, tied=tied)
        params, replaced = _output(params, replaced, saved, tied)
    _check_rows(wanted, config, replaced)
    return _insert(params, found, replaced), wanted


def _resized(whole: dict[str, Tensor], file: Safetensors, config: ModelConfig) -> ModelConfig:
    """The model with the vocabulary of the embedding or output in the adapter."""
    tables = [name for name, tensor in whole.items() if tensor.places[0].field in _TABLES]
    rows = {file.tensors[name].shape[0] for name in tables if len(file.tensors[name].shape) == 2}
    return dataclasses.replace(config, vocab_size=rows.pop()) if len(rows) == 1 else config


def _check_rows(config: ModelConfig, was: ModelConfig, replaced: Collection[str]) -> None:
    """Raises FormatError where a new vocabulary lacks the rows of one of the two matrices."""
    tables = ("embed",) if config.tied else _TABLES
    missing = [table for table in tables if table not in replaced]
    if config.vocab_size != was.vocab_size and missing:
        raise FormatError(
            f"the adapter is for a vocabulary of {config.vocab_size} tokens, the model has "
            f"{was.vocab_size}, and the adapter does not hold all of it ({missing[0]} is missing); "
            "save it with save_embedding_layers=True"
        )


def _stays_tied(
    params: ModelWeights, replaced: Mapping[str, Mapping[int, np.ndarray]], saved: set[str]
) -> bool:
    """Whether the output of a tied model is still the embedding.

    PEFT trains what `modules_to_save` names as a copy, and leaves what it was tied to as it was;
    a tensor that is in the file for another reason is that of both.
    """
    if "output" not in replaced:
        return "embed" not in saved
    embed = replaced["embed"][0] if "embed" in replaced else np.asarray(_dense(params.embed))
    return np.array_equal(embed.astype(np.float32), replaced["output"][0].T.astype(np.float32))


def _output(
    params: ModelWeights,
    replaced: dict[str, dict[int, np.ndarray]],
    saved: set[str],
    tied: bool,
) -> tuple[ModelWeights, dict[str, dict[int, np.ndarray]]]:
    """Weights of a tied model, with an output of its own unless it stays tied; what replaces."""
    if tied:
        return params, {path: parts for path, parts in replaced.items() if path != "output"}
    if "embed" in replaced and "embed" not in saved:
        replaced = {"output": {0: replaced["embed"][0].T}, **replaced}
    embed = params.embed
    if isinstance(embed, Blocked):  # its transpose is the same blocks along the other dimension
        flipped = "in" if embed.block_axis == "out" else "out"
        output: Any = dataclasses.replace(embed, block_axis=flipped)  # type: ignore[type-var]
    else:
        output = _dense(embed).T
    return dataclasses.replace(params, output=output), replaced


def _dense(weight: Any) -> jax.Array:
    return weight.dequantize(jnp.float32) if isinstance(weight, StructuredWeight) else weight


def _ours(place: Place, params: ModelWeights) -> tuple[str, int]:
    """Path of a weight in the tree, stacked or not, and its index in the stack."""
    if place.stack is not None and isinstance(params.stacks[place.stack], Unstacked):
        return place.unstacked_path, 0
    return place.path, place.repeat


def _targeted(
    adapter: AdapterConfig, names: Mapping[str, str], config: ModelConfig
) -> list[_Module]:
    """The modules with an adapter; where the configuration names none, those in the file.

    `names` are the family's -> the adapter's.
    """
    found = []
    for module in _modules(config):
        a = module.names()[0]
        own = names.get(a, a).removesuffix(a.removeprefix(module.name))
        is_output = module.tensor.places[0].field == "output"
        wanted = adapter.targets(own, is_output, module.is_embedding)
        if a in names if wanted is None else wanted:
            found.append(dataclasses.replace(module, own_name=own))
    return found


def _whole(file: Safetensors, config: ModelConfig) -> dict[str, Tensor]:
    """Tensors in the file that replace the model's, by their names."""
    found = {}
    for tensor in tensors(config):
        for name in (tensor.name, *tensor.aliases):
            module, _, end = name.rpartition(".")
            for between in ("", "base_layer.", "token_adapter.base_layer."):
                if (each := f"{module}.{between}{end}") in file.tensors:
                    found[each] = tensor
    return found


def _token_rows(
    adapter: AdapterConfig, names: Mapping[str, str], config: ModelConfig
) -> dict[str, tuple[Tensor, tuple[int, ...]]]:
    """Tensors that replace some rows of the embedding or the output, and which."""
    found = {}
    for module in _modules(config):
        name = f"{module.name}.token_adapter.trainable_tokens_delta"
        if name in names and (rows := adapter.rows_of(module.name, module.is_embedding)):
            found[name] = module.tensor, rows
    return found


def _check(
    adapter: AdapterConfig,
    modules: list[_Module],
    whole: dict[str, Tensor],
    rows: dict[str, tuple[Tensor, tuple[int, ...]]],
    file: Safetensors,
    config: ModelConfig,
    source: str,
) -> None:
    """Raises FormatError with every fault."""
    wanted: dict[str, tuple[int, ...]] = {name: tensor.shape for name, tensor in whole.items()}
    faults = []
    for name, (_, indices) in rows.items():
        wanted[name] = (len(indices), config.embed_dim)
        if not 0 <= min(indices) <= max(indices) < config.vocab_size:
            faults.append(f"trainable_token_indices {indices} are not all of {config.vocab_size}")
    for module in modules:
        shapes = module.shapes(adapter.rank_of(module.own_name))
        names = module.names() if adapter.dora else module.names()[:2]
        wanted |= dict(zip(names, shapes, strict=False))
    headers = {name: (info.shape, info.type) for name, info in file.tensors.items()}
    found = (tensor_fault(name, shape, headers.get(name)) for name, shape in wanted.items())
    faults += [fault for fault in found if fault]
    for name in sorted(file.tensors.keys() - wanted.keys()):
        shape = list(file.tensors[name].shape)
        faults.append(f"{name} {shape} is not in this model, or not among its target_modules")
    if not modules and not whole and not rows:
        faults.append(f"target_modules {adapter.target_modules!r} names no module of this model")
    refuse(faults, source, config, "is not an adapter for this")


def _insert(
    params: ModelWeights,
    found: dict[str, dict[int, LoRA]],
    replaced: dict[str, dict[int, np.ndarray]],
) -> ModelWeights:
    plain = params.norm.scale.dtype

    def leaf(path: tuple[Any, ...], weight: Any) -> Any:
        name = path_name(path)
        if isinstance(weight, LoRA | MultiLoRA) and (name in found or name in replaced):
            raise ValueError(f"{name} has an adapter already; merge or remove it first")
        if name in replaced:
            dtype = plain if isinstance(weight, StructuredWeight) else weight.dtype
            weight = _replaced(weight, replaced[name], dtype)
        return _joined(weight, found[name]) if name in found else weight

    return jax.tree_util.tree_map_with_path(leaf, params, is_leaf=is_structured)


def _replaced(weight: Any, parts: dict[int, np.ndarray], dtype: Any) -> jax.Array:
    """The whole of a weight, or some layers of a stacked one, by those in an adapter."""
    if next(iter(parts.values())).ndim == len(weight.shape):
        return jnp.array(parts[0], dtype)
    stacked = _dense(weight).astype(dtype)
    for index, part in parts.items():
        stacked = stacked.at[index].set(jnp.asarray(part, dtype))
    return stacked


def _joined(base: Any, parts: dict[int, LoRA]) -> LoRA:
    """The adapter of a weight, or of a stacked weight from those of its layers."""
    if len(base.shape) == 2:
        return dataclasses.replace(jax.tree.map(jnp.asarray, parts[0]), base=base)
    repeats, rows, columns = base.shape
    first = next(iter(parts.values()))
    rank = max(part.a.shape[-1] for part in parts.values())
    a = np.zeros((repeats, rows, rank), first.a.dtype)
    b = np.zeros((repeats, rank, columns), first.b.dtype)
    scale, magnitude = np.ones(repeats, np.float32), None
    if first.magnitude is not None:
        dense = base.dequantize(jnp.float32) if isinstance(base, StructuredWeight) else base
        magnitude = np.array(jnp.linalg.norm(dense.astype(jnp.float32), axis=-2))
    for i, part in parts.items():
        own = part.a.shape[-1]
        a[i, :, :own], b[i, :own], scale[i] = part.a, part.b, part.scale
        if magnitude is not None:
            magnitude[i] = part.magnitude
    return LoRA(base, *jax.tree.map(jnp.asarray, (a, b, scale, magnitude)))


def save_peft(
    params: ModelWeights,
    config: ModelConfig,
    path: Path,
    *,
    base_model: str | None = None,
    dtype: Any = None,
    overwrite: bool = False,
) -> None:
    """Write the adapters of a model as a PEFT directory; the base weights are not written.

    Weights that share a module in PEFT (Phi-3's `qkv_proj`) become one adapter: with their rank if
    they share `a`, else with the sum of their ranks. Ranks whose numbers are all zero are left out.

    Args:
      params: the model, stacked or not.
      config: the model.
      path: directory; created if it does not exist.
      base_model: name or path of the base model, recorded for the reader.
      dtype: of the tensors; None for that of `a`.
      overwrite: replace an existing adapter.

    Raises:
      FormatError: the directory has an adapter already.
      ValueError: no weight has an adapter, one has several, only some have magnitudes, or the
        embedding has one and the output is tied to it.
    """
    directory = pathlib.Path(path)
    written: dict[str, np.ndarray] = {}
    modules: dict[str, tuple[int, float]] = {}
    lengths: dict[str, bool] = {}
    others: set[str] = set()
    for module in _modules(config):
        weights = [_adapter_at(params, place) for place in module.tensor.places]
        adapter = _of_module(weights, module)
        if adapter is None:
            others.add(module.name)
            continue
        if module.is_embedding and config.tied:
            raise ValueError(
                f"the adapter changes {module.name}, and the model's output is tied to it, which "
                "PEFT does not adapt; untie the model first (tied=False, and the embedding's "
                "transpose as output)"
            )
        a, b, scale, magnitude = adapter
        modules[module.name] = (a.shape[0], scale)
        lengths[module.name] = magnitude is not None
        names = [PREFIX + name for name in module.names()]
        written |= {names[0]: np.asarray(a, dtype), names[1]: np.asarray(b, dtype)}
        if magnitude is not None:
            written[names[2]] = magnitude
    if not modules:
        raise ValueError("no weight of the model has an adapter")
    if len(set(lengths.values())) > 1:
        without = next(name for name, has in lengths.items() if not has)
        raise ValueError(f"{without} has no magnitude but others have; PEFT has all or none (DoRA)")
    directory.mkdir(parents=True, exist_ok=True)
    if (directory / WEIGHTS).exists() and not overwrite:
        raise FormatError(f"{directory / WEIGHTS} exists; use another directory, or overwrite")
    data = write_adapter_config(modules, others, any(lengths.values()), base_model)
    write_safetensors(directory / WEIGHTS, written, metadata={"format": "pt"})
    (directory / CONFIG).write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")


def _adapter_at(params: ModelWeights, place: Place) -> LoRA | None:
    """The adapter of one layer's weight, on the host, without its base."""
    weight = place.weight(params)
    if isinstance(weight, MultiLoRA):
        raise ValueError(f"{place.path} has {weight.num_adapters} adapters; select one first")
    if not isinstance(weight, LoRA):
        return None
    weight = dataclasses.replace(weight, base=None)
    if weight.a.ndim == 3:
        weight = weight.layer(place.repeat)
    weight = jax.tree.map(np.asarray, jax.device_get(weight))
    used = np.any(weight.a, axis=0) | np.any(weight.b, axis=1)
    return dataclasses.replace(weight, a=weight.a[:, used], b=weight.b[used])


def _of_module(
    weights: list[LoRA | None], module: _Module
) -> tuple[np.ndarray, np.ndarray, float, np.ndarray | None] | None:
    """PEFT's a [r, in], b [out, r], scale and magnitude [out] of a module; None without adapter."""
    present = [w for w in weights if w is not None and w.a.shape[1]]
    if not present:
        return None
    if module.is_embedding:
        (one,) = present
        a = module.write([one.a])
        return a.T, np.ascontiguousarray(one.b.T), float(one.scale), one.magnitude
    first = present[0]
    magnitudes = [w.magnitude for w in weights if w is not None and w.magnitude is not None]
    if magnitudes and min(len(present), len(magnitudes)) < len(weights):
        raise ValueError(f"{module.name}: only some of its weights have magnitudes (DoRA)")
    scale = Counter(float(w.scale) for w in present).most_common(1)[0][0]
    shared = all(np.array_equal(w.a, first.a) and w.scale == first.scale for w in present)
    rank = first.a.shape[1] if shared else sum(w.a.shape[1] for w in present)
    blocks, at = [], 0
    for weight, place in zip(weights, module.tensor.places, strict=True):
        block = np.zeros((rank, place.shape[1]), first.b.dtype)
        if weight is not None and weight.a.shape[1]:
            own = weight.a.shape[1]
            block[at : at + own] = weight.b * np.asarray(weight.scale / scale, weight.b.dtype)
            at += 0 if shared else own
        blocks.append(block)
    a = first.a if shared else np.concatenate([w.a for w in present], axis=1)
    magnitude = module.write([m[None] for m in magnitudes])[:, 0] if magnitudes else None
    return np.ascontiguousarray(a.T), module.write(blocks), scale, magnitude

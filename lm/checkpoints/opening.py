"""Opening the model of a training checkpoint, given only its path."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

import jax
from etils import epath

from lm.checkpoints import arrays, checksums, model_json
from lm.checkpoints.checksums import CheckpointError, DamagedError
from lm.checkpoints.names import flatten, parse, unflatten
from lm.checkpoints.paths import absolute
from lm.checkpoints.reference import digest
from lm.model import ModelConfig
from lm.model.params import specs_for
from lm.sharding import Layout
from lm.weights import shardings

SIDECARS = (model_json.FILE, "metadata.json")


def all_steps(directory: epath.Path) -> list[int]:
    """Steps with a finished checkpoint, in order; checksums are not read."""
    if not directory.is_dir():
        return []
    return sorted(int(path.name) for path in directory.iterdir() if path.name.isdecimal())


def model_of(directory: epath.Path) -> model_json.ModelJson:
    """Read `model.json` of a step's directory.

    Raises:
      CheckpointError: it is missing, damaged, or not readable by this version.
    """
    path = directory / model_json.FILE
    try:
        values = json.loads(path.read_text())
    except FileNotFoundError:
        raise DamagedError(f"{path} is missing") from None
    except ValueError as error:
        raise DamagedError(f"{path} is damaged: {error}") from None
    return model_json.from_dict(values, path)


def find(
    path: Any, verify: bool = True, items: tuple[str, ...] = ("weights/", "ema/")
) -> epath.Path:
    """The directory of one step: `path`, or the newest sound one in it or in its `checkpoints/`.

    Args:
      path: a step, a folder of checkpoints, or a run.
      verify: read the files and compare checksums; otherwise the newest is taken unchecked.
      items: the trees to verify.

    Raises:
      CheckpointError: there is none, or all are damaged; the message says how.
    """
    path = absolute(path)
    under = (*items, *SIDECARS)
    if (path / checksums.FILE).exists() or (path / model_json.FILE).exists():
        if verify:
            checksums.verify(path, under=under)
        return path
    for directory in (path, path / "checkpoints"):
        faults = []
        for step in reversed(all_steps(directory)):
            try:
                if verify:
                    checksums.verify(directory / str(step), under=under)
                return directory / str(step)
            except DamagedError as error:
                faults.append(str(error))
        if faults:
            raise DamagedError(f"every checkpoint in {directory} is damaged: {'; '.join(faults)}")
    raise CheckpointError(
        f"{path} holds no checkpoint: neither {model_json.FILE}, nor folders named by step, "
        "nor checkpoints/ with such"
    )


def _stored_name(name: str, stored: Mapping[str, str], ema: bool) -> str | None:
    fields = ("ema", "trainable", "frozen") if ema else ("trainable", "frozen")
    return next((f"{field}/{name}" for field in fields if f"{field}/{name}" in stored), None)


def read_named(
    directory: epath.Path,
    model: model_json.ModelJson,
    wanted: Mapping[str, Any],
    *,
    ema: bool = False,
    host: bool = False,
    verify: bool = True,
) -> dict[str, Any]:
    """Read weights of a step by their paths in the model, including frozen ones stored elsewhere.

    Args:
      directory, model: the step's directory and `model.json`.
      wanted: sharding or None, by path in the model.
      ema: read the average of a weight that has one.
      host: return NumPy arrays.
      verify: check that frozen weights stored elsewhere are sound and the right ones; `wanted`
        must then name all of them.

    Raises:
      CheckpointError: a weight is missing, or the frozen weights are missing or not the right ones.
    """
    structs, source, elsewhere = {}, {}, {}
    for name, sharding in wanted.items():
        stored = _stored_name(name, model.arrays, ema)
        if stored is not None:
            struct = parse(model.arrays[stored])
            structs[stored] = jax.ShapeDtypeStruct(struct.shape, struct.dtype, sharding=sharding)
            source[stored] = name
        elif model.frozen is not None:
            elsewhere[name] = sharding
        else:
            raise CheckpointError(f"{directory} has no weight {name}")
    found = arrays.read(directory, structs, host)
    read = {source[stored]: leaf for stored, leaf in found.items()}
    if elsewhere:
        read |= read_frozen(directory, model, elsewhere, host=host, verify=verify)
    return read


def read_frozen(
    directory: epath.Path,
    model: model_json.ModelJson,
    wanted: Mapping[str, Any],
    path: Any = None,
    *,
    host: bool = False,
    verify: bool = True,
) -> dict[str, Any]:
    """Read the frozen weights that a step refers to, from `path` or from the path it stores.

    Raises:
      CheckpointError: they are missing, or not those that the run was trained on.
    """
    assert model.frozen is not None
    path = directory / model.frozen["path"] if path is None else absolute(path)
    try:
        step = find(path, verify, ("weights/",))
        read = read_named(step, model_of(step), wanted, host=host, verify=verify)
    except CheckpointError as error:
        raise CheckpointError(
            f"{directory} was trained on frozen weights stored in {path}, which cannot be read: "
            f"{error}. Put them back, or give their new path"
        ) from error
    if verify:
        check_digest(directory, model, read, path)
    return read


def check_digest(
    directory: epath.Path, model: model_json.ModelJson, frozen: Mapping[str, Any], path: Any
) -> None:
    """Raises CheckpointError unless `frozen` are the weights the checkpoint refers to."""
    assert model.frozen is not None
    names = {name for name in frozen if _stored_name(name, model.arrays, False) is None}
    if (found := digest({name: frozen[name] for name in names})) != model.frozen["digest"]:
        raise CheckpointError(
            f"{directory} was trained on frozen weights with digest {model.frozen['digest']}; "
            f"those in {path} have {found}"
        )


def open_checkpoint(
    path: Any, layout: Layout | None = None, *, ema: bool = False, verify: bool = True
) -> tuple[Any, ModelConfig]:
    """Weights and configuration of a checkpoint, given nothing but its path.

    The optimizer's state is neither read nor checked.

    Args:
      path: a step, a folder of checkpoints (for its newest sound one), or a run.
      layout: where to read each shard to; by default all to the first device.
      ema: return the average of a weight that has one.
      verify: compare checksums first, which reads the files once more.

    Raises:
      CheckpointError: there is no sound checkpoint, or it has no model or (`ema`) no averages.
    """
    directory = find(path, verify, ("weights/", "ema/") if ema else ("weights/",))
    model = model_of(directory)
    if model.config is None or model.weights is None:
        raise CheckpointError(f"{directory} holds no model: it was saved without a configuration")
    if ema and not any(name.startswith("ema/") for name in model.arrays):
        raise CheckpointError(f"{directory} has no averaged weights; open it without `ema`")
    weights = model_json.decode_tree(model.weights)
    wanted: dict[str, Any] = dict.fromkeys(flatten(weights))
    if layout is not None:
        specs = specs_for(weights, model.config)
        wanted = flatten(shardings(specs, layout.rules, layout.mesh, weights))
    found = read_named(directory, model, wanted, ema=ema, verify=verify)
    return unflatten(found, weights), model.config


def weight_names(path: Any) -> list[str]:
    """Paths in the model of the arrays of a checkpoint's weights."""
    model = model_of(find(path, verify=False))
    return list(flatten(model_json.decode_tree(model.weights)))


def read_weights(path: Any, names: Iterable[str], *, ema: bool = False) -> dict[str, Any]:
    """Some of a checkpoint's weights as NumPy arrays, for work that cannot hold a whole model.

    Args:
      path: as for `open_checkpoint`; checksums are not compared.
      names: some of `weight_names`.
      ema: return the average of a weight that has one.
    """
    directory = find(path, verify=False)
    model, wanted = model_of(directory), dict.fromkeys(names)
    return read_named(directory, model, wanted, ema=ema, host=True, verify=False)

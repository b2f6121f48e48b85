"""The arrays of a checkpoint, written and read by Orbax.

A directory holds up to three Orbax trees, so that weights can be read, checked and copied alone:
`weights/` (trainable and frozen), `ema/`, and `state/` (everything else). All processes write
together; each computes the checksums of its own files, and process 0 adds the rest just before
Orbax renames the finished directory into place.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.sharding import SingleDeviceSharding

from lm.checkpoints import checksums
from lm.checkpoints.names import nest
from lm.distributed import reached

# Names of Orbax's own: tests/checkpoints/test_orbax_names.py says which no longer holds.
PARTIAL = ".orbax-checkpoint-tmp"  # suffix of what is being written
MANIFEST = "manifest.ocdbt"  # without it an item cannot be opened
OWN_FOLDER = "ocdbt.process_{}"  # of the files that only one process writes
ITEMS = {"trainable": "weights", "frozen": "weights", "ema": "ema"}
# TensorStore lacks the unsigned types of these widths; the bits are the same.
STORED_AS = {"uint4": "int4", "uint2": "int2"}


def item_of(name: str) -> str:
    """The Orbax tree that holds the leaf of this name."""
    return ITEMS.get(name.split("/")[0], "state")


def _same_bits(array: Any, dtype: Any) -> Any:
    if isinstance(array, jax.Array):
        convert = jax.jit(
            lambda x: jax.lax.bitcast_convert_type(x, dtype), out_shardings=array.sharding
        )
        return convert(array)
    return np.asarray(array).view(dtype)


class _Writing:
    """This process's part of a save: a future that keeps an error instead of raising it.

    A process that raised would leave the others waiting at Orbax's barriers.
    """

    def __init__(self, handler: Handler, directory: Any, futures: Sequence[Any]) -> None:
        self.handler, self.directory, self.futures = handler, directory, futures

    def result(self, timeout: float | None = None) -> None:
        deadline = None if timeout is None else time.monotonic() + timeout
        fault: Exception | None = None
        for future in self.futures:  # to the last: what a failed save left is removed afterwards
            try:
                future.result(None if deadline is None else max(0, deadline - time.monotonic()))
            except Exception as error:
                fault = fault or error
        try:
            if fault is not None:
                raise fault
            if jax.process_count() > 1:
                self.handler.write_own_checksums(self.directory)
        except Exception as error:
            self.handler.error = error
            if jax.process_count() == 1:
                raise
        finally:
            reached(self.handler.end)

    def cancel(self) -> None:
        for future in self.futures:
            future.cancel()


class Handler(ocp.CompositeCheckpointHandler):
    """Orbax's handler of several trees; adds small files and checksums to the directory."""

    def __init__(self, timeout: float) -> None:
        trees: dict[str, Any] = {
            name: ocp.PyTreeCheckpointHandler(use_compression=False)
            for name in ("weights", "ema", "state")
        }
        # In the background, a directory could be created after a failed start was cleaned up.
        self.options = ocp.AsyncOptions(
            timeout_secs=int(timeout), create_directories_asynchronously=False
        )
        super().__init__(
            composite_options=ocp.CompositeOptions(async_options=self.options), **trees
        )
        self.files: dict[str, bytes] = {}
        self.end = ""  # the point that each process reports when its part is written
        self.error: Exception | None = None

    async def async_save(self, directory: Any, args: Any) -> Any:
        self.error = None
        futures = await super().async_save(directory, args)
        return [_Writing(self, directory, list(futures or ()))]

    def write_own_checksums(self, directory: Any) -> None:
        """Writes the checksums of the files that only this process wrote, to their own file."""
        directory, process = epath.Path(directory), jax.process_index()
        folder = f"/{OWN_FOLDER.format(process)}/"
        own = [path for path in checksums.files(directory) if folder in path]
        sums = checksums.compute(directory, own)
        final = {path.replace(PARTIAL, ""): entry for path, entry in sums.items()}
        (directory / f"{checksums.FILE}.{process}").write_bytes(checksums.dump(final))

    def finalize(self, directory: epath.Path) -> None:
        """On process 0: joins the parts, then writes the checksums that mark it as complete."""
        try:
            if self.error is None:
                self._seal(directory)
        except Exception as error:
            if jax.process_count() == 1:
                raise
            self.error = error

    def _seal(self, directory: epath.Path) -> None:
        sums: checksums.Sums = {}
        for process in range(jax.process_count() if jax.process_count() > 1 else 0):
            part = directory / f"{checksums.FILE}.{process}"
            if not part.exists():
                raise OSError(f"process {process} has not written its part")
            sums |= checksums.load(directory, part.name)
            part.unlink()
        super().finalize(directory)
        for item in directory.iterdir():
            if item.is_dir() and not (item / MANIFEST).exists():
                raise OSError(f"{item} has no {MANIFEST}: Orbax did not join its parts")
        for name, content in self.files.items():
            (directory / name).write_bytes(content)
        rest = [path for path in checksums.files(directory) if path not in sums]
        sums |= checksums.compute(directory, rest)
        (directory / checksums.FILE).write_bytes(checksums.dump(sums))


@ocp.args.register_with_handler(Handler, for_save=True, for_restore=True)
class _Trees(ocp.args.Composite):
    pass


def make_writer(handler: Handler) -> ocp.AsyncCheckpointer:
    """Orbax's background writer, for all processes together."""
    return ocp.AsyncCheckpointer(handler, async_options=handler.options)


def start(writer: ocp.AsyncCheckpointer, directory: epath.Path, leaves: Mapping[str, Any]) -> None:
    """Copy the arrays to the host and start writing; they may be donated afterwards."""
    trees: dict[str, dict[str, Any]] = {}
    for name, leaf in leaves.items():
        stored = STORED_AS.get(leaf.dtype.name)
        leaf = _same_bits(leaf, jnp.dtype(stored)) if stored else leaf
        trees.setdefault(item_of(name), {})[name] = leaf
    writer.save(
        directory,
        args=_Trees(**{item: ocp.args.PyTreeSave(nest(tree)) for item, tree in trees.items()}),
    )


def read(directory: epath.Path, like: Mapping[str, Any], host: bool = False) -> dict[str, Any]:
    """Read arrays of a checkpoint by name.

    Args:
      directory: the directory of one step.
      like: arrays or ShapeDtypeStructs by name; one without a sharding goes to the first device.
      host: return NumPy arrays.
    """
    trees: dict[str, dict[str, Any]] = {}
    for name, leaf in like.items():
        trees.setdefault(item_of(name), {})[name] = leaf
    found: dict[str, Any] = {}
    for item, wanted in trees.items():
        structs, arguments = {}, {}
        for name, leaf in wanted.items():
            dtype = jnp.dtype(STORED_AS.get(leaf.dtype.name, leaf.dtype))
            structs[name] = jax.ShapeDtypeStruct(leaf.shape, dtype)
            arguments[name] = ocp.RestoreArgs(restore_type=np.ndarray)
            if not host:
                sharding = getattr(leaf, "sharding", None)
                sharding = sharding or SingleDeviceSharding(jax.local_devices()[0])
                arguments[name] = ocp.ArrayRestoreArgs(
                    sharding=sharding, global_shape=leaf.shape, dtype=dtype, strict=True
                )
        tree = ocp.PyTreeCheckpointHandler(use_compression=False).restore(
            directory / item,
            args=ocp.args.PyTreeRestore(
                item=nest(structs), restore_args=nest(arguments), partial_restore=True
            ),
        )
        for name, leaf in wanted.items():
            node = tree
            for part in name.split("/"):
                node = node[part]
            again = leaf.dtype.name in STORED_AS
            found[name] = _same_bits(node, leaf.dtype) if again else node
    return found


def to_json(value: Any) -> bytes:
    """Indented JSON.

    Raises:
      TypeError: the value is not of JSON's types.
    """
    return (json.dumps(value, indent=1, allow_nan=True) + "\n").encode()

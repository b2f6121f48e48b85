"""Checkpoints on a host's own disk: fast to write and read, lost with the host.

Each process writes the shards its devices hold, and reads them back into the same layout on the
same hosts; with any other layout, or after a host was replaced, durable checkpoints are used.
`<directory>/process_<i>/<step>` holds `data` (the shards' bytes), `index.json` and `checksums`.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.sharding import SingleDeviceSharding

from lm.checkpoints import checksums
from lm.checkpoints.arrays import to_json
from lm.checkpoints.checksums import CheckpointError
from lm.checkpoints.names import check_fit, describe, matches
from lm.checkpoints.opening import all_steps
from lm.checkpoints.paths import absolute

PARTIAL = ".partial"
Place = tuple[tuple[int, int], ...]


def _place(index: tuple[slice, ...], shape: tuple[int, ...]) -> Place:
    bounds = [part.indices(size) for part, size in zip(index, shape, strict=True)]
    return tuple((start, stop) for start, stop, _ in bounds)


def to_host(leaves: Mapping[str, Any]) -> dict[str, dict[Place, np.ndarray]]:
    """Copies of the distinct shards that this process holds."""
    shards: dict[str, dict[Place, Any]] = {}
    for name, leaf in leaves.items():
        if isinstance(leaf, jax.Array):
            held = {_place(s.index, leaf.shape): s.data for s in leaf.addressable_shards}
            for data in held.values():
                data.copy_to_host_async()
        else:
            held = {tuple((0, size) for size in leaf.shape): leaf}
        shards[name] = held
    # On CPU the host's view is the device's memory, which donation may overwrite: copy it.
    return {
        name: {place: np.array(data, copy=True) for place, data in held.items()}
        for name, held in shards.items()
    }


class LocalTier:
    """The latest checkpoints of this process on its own disk."""

    def __init__(self, directory: Any, run: str, keep: int = 2) -> None:
        """Use a folder of `directory` that is this process's own; other runs' files are ignored.

        Args:
          directory: a folder on the host's own disk.
          run: name of the run (its durable directory).
          keep: number of checkpoints to keep.
        """
        self.root = absolute(directory) / f"process_{jax.process_index()}"
        self.run, self.keep = run, keep

    def steps(self) -> list[int]:
        """Steps of this run, in order."""
        return [step for step in all_steps(self.root) if self._run_of(step) in (self.run, None)]

    def _run_of(self, step: int) -> str | None:
        try:
            return json.loads((self.root / str(step) / "index.json").read_text())["run"]
        except (OSError, ValueError, KeyError):
            return None  # damaged: reported when it is read

    def write(
        self, step: int, shards: dict[str, dict[Place, np.ndarray]], index: dict[str, Any]
    ) -> None:
        """Write the result of `to_host` atomically, then delete the oldest."""
        partial, final = self.root / f"{step}{PARTIAL}", self.root / str(step)
        self.root.mkdir(parents=True, exist_ok=True)
        for left in self.root.iterdir():
            if left.name.endswith(PARTIAL):
                shutil.rmtree(left)
        try:
            partial.mkdir()
            self._write_data(partial, shards, index)
            if final.exists():
                shutil.rmtree(final)
            partial.rename(final)
        except Exception:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        own = all_steps(self.root)
        for old in [s for s in own if s != step][: max(0, len(own) - self.keep)]:
            shutil.rmtree(self.root / str(old))

    def _write_data(self, directory: epath.Path, shards: Any, index: dict[str, Any]) -> None:
        entries, offset = [], 0
        with (directory / "data").open("wb") as file:
            for name, held in shards.items():
                for place, data in held.items():
                    content = np.ascontiguousarray(data).view(np.uint8).reshape(-1).data
                    file.write(content)
                    entries.append([name, place, data.dtype.name, offset, content.nbytes])
                    offset += content.nbytes
        index = index | {"run": self.run, "shards": entries}
        (directory / "index.json").write_bytes(to_json(index))
        sums = checksums.compute(directory, ("data", "index.json"))
        (directory / checksums.FILE).write_bytes(checksums.dump(sums))

    def discard_after(self, step: int) -> None:
        for later in [s for s in self.steps() if s > step]:
            shutil.rmtree(self.root / str(later))

    def read(
        self, step: int, like: Mapping[str, Any], ignore: tuple[str, ...] = ()
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Arrays by name, laid out like `like`, and the index.

        Raises:
          CheckpointError: it is missing, damaged, of another run, or has other shards.
        """
        directory = self.root / str(step)
        checksums.verify(directory)
        index = json.loads((directory / "index.json").read_text())
        if index["run"] != self.run:
            raise CheckpointError(f"{directory} belongs to another run, {index['run']}")
        like = {name: leaf for name, leaf in like.items() if not matches(name, ignore)}
        have = {name: x for name, x in index["arrays"].items() if not matches(name, ignore)}
        check_fit(directory, have, {name: describe(leaf) for name, leaf in like.items()})
        entries = {
            (name, tuple(map(tuple, place))): (dtype, offset, size)
            for name, place, dtype, offset, size in index["shards"]
        }
        filled = any(size for _, _, size in entries.values())
        content = np.memmap(directory / "data", np.uint8, "r") if filled else np.empty(0, np.uint8)

        def shard(name: str, part: Any, shape: tuple[int, ...]) -> np.ndarray:
            place = _place(part, shape)
            if (name, place) not in entries:
                raise CheckpointError(f"{directory} was written with another layout of {name}")
            dtype, offset, size = entries[name, place]
            shape = tuple(stop - start for start, stop in place)
            return content[offset : offset + size].view(jnp.dtype(dtype)).reshape(shape)

        leaves = {}
        for name, leaf in like.items():
            sharding = getattr(leaf, "sharding", None)
            sharding = sharding or SingleDeviceSharding(jax.local_devices()[0])
            leaves[name] = jax.make_array_from_callback(
                leaf.shape,
                sharding,
                lambda part, name=name, leaf=leaf: np.array(shard(name, part, leaf.shape)),
            )
        return leaves, index

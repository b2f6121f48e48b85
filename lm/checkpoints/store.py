"""Training checkpoints: Orbax on disk, leaves named by path.

`<directory>/<step>/state` holds the arrays; `<directory>/<step>/metadata` a version and what the
caller wants kept beside them (configuration, place in the data). Arrays are read straight into the
shardings of the tree asked for, so a run may go on with another mesh or ZeRO stage.
"""

from __future__ import annotations

import pathlib
from typing import Any

import jax
import orbax.checkpoint as ocp

from lm.weights import path_name

VERSION = 1
Tree = Any


class CheckpointError(ValueError):
    """A checkpoint that is missing, or that does not hold what was asked for."""


def to_names(tree: Tree) -> dict[str, Any]:
    """The tree as nested dictionaries keyed by the parts of each leaf's path."""
    named: dict[str, Any] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        *parents, last = path_name(path).split("/")
        node = named
        for part in parents:
            node = node.setdefault(part, {})
        node[last] = leaf
    return named


def from_names(named: dict[str, Any], like: Tree) -> Tree:
    """The inverse of `to_names`, for a tree shaped like `like`."""

    def leaf(path: tuple[Any, ...], _: Any) -> Any:
        node: Any = named
        for part in path_name(path).split("/"):
            node = node[part]
        return node

    return jax.tree_util.tree_map_with_path(leaf, like)


class Checkpoints:
    """The checkpoints of one run. Saving is synchronous and atomic."""

    def __init__(self, directory: str | pathlib.Path, keep: int | None = None) -> None:
        """Open, or make, `directory`; keep the last `keep` checkpoints (None: all)."""
        self.directory = pathlib.Path(directory).absolute()
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep, enable_async_checkpointing=False, create=True
        )
        self.manager = ocp.CheckpointManager(
            self.directory,
            options=options,
            item_handlers={
                "state": ocp.StandardCheckpointHandler(),
                "metadata": ocp.JsonCheckpointHandler(),
            },
        )

    def steps(self) -> list[int]:
        """Steps that have a complete checkpoint, in order."""
        return sorted(self.manager.all_steps())

    def latest(self) -> int | None:
        """The last of them, or None."""
        return self.manager.latest_step()

    def save(self, step: int, state: Tree, metadata: dict[str, Any]) -> None:
        """Write `state` and JSON-like `metadata` as the checkpoint of `step`."""
        self.manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(to_names(state)),
                metadata=ocp.args.JsonSave({"version": VERSION, **metadata}),
            ),
            force=True,
        )
        self.manager.wait_until_finished()

    def metadata(self, step: int) -> dict[str, Any]:
        """What was kept beside the arrays.

        Raises:
          CheckpointError: there is none, or a version this code does not read wrote it.
        """
        self._check_step(step)
        restored = self.manager.restore(
            step, args=ocp.args.Composite(metadata=ocp.args.JsonRestore())
        )
        metadata = dict(restored["metadata"])
        if metadata.get("version") != VERSION:
            raise CheckpointError(
                f"{self.directory}/{step} has format version {metadata.get('version')}; "
                f"this code reads version {VERSION}"
            )
        return metadata

    def restore(self, step: int, like: Tree) -> Tree:
        """The state of `step`, shaped, typed and laid out like `like` (ShapeDtypeStructs).

        Raises:
          CheckpointError: there is none, or leaves are missing, surplus or of another shape.
        """
        self._check_step(step)
        wanted = to_names(like)
        self._check(step, wanted)
        restored = self.manager.restore(
            step, args=ocp.args.Composite(state=ocp.args.StandardRestore(wanted))
        )
        return from_names(restored["state"], like)

    def _check_step(self, step: int) -> None:
        steps = self.steps()
        if step not in steps:
            have = ", ".join(map(str, steps)) or "none"
            raise CheckpointError(
                f"{self.directory} has no checkpoint of step {step}; it has {have}"
            )

    def _check(self, step: int, wanted: dict[str, Any]) -> None:
        stored = self.manager.item_metadata(step)["state"]
        stored = getattr(stored, "tree", stored)
        have = {
            path_name(p): tuple(x.shape) for p, x in jax.tree_util.tree_leaves_with_path(stored)
        }
        want = {
            path_name(p): tuple(x.shape) for p, x in jax.tree_util.tree_leaves_with_path(wanted)
        }
        faults = [f"{name} is missing" for name in sorted(want.keys() - have.keys())]
        faults += [
            f"{name} is {list(have[name])}, the model wants {list(want[name])}"
            for name in sorted(want.keys() & have.keys())
            if want[name] != have[name]
        ]
        faults += [f"{name} is not in this model" for name in sorted(have.keys() - want.keys())]
        if faults:
            shown = "; ".join(faults[:8])
            more = f"; and {len(faults) - 8} more" if len(faults) > 8 else ""
            raise CheckpointError(
                f"checkpoint {self.directory}/{step} does not fit this model: {shown}{more}. "
                "Use the configuration it was written with, or another workdir"
            )

    def close(self) -> None:
        """Release the manager."""
        self.manager.close()

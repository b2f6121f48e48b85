"""Training checkpoints: written by Orbax in the background, checked by checksums when read.

`<directory>/<step>/` holds the arrays (`weights/`, `ema/`, `state/`), `model.json`,
`metadata.json` (the caller's, as its position in the data) and `checksums`. A directory gets its
step's name once complete; arrays are read straight into the shardings of the tree asked for, so a
run can resume with another mesh, ZeRO stage or number of processes.

Not with `ocp.CheckpointManager`: it gives a checkpoint its final name before anything of ours could
add checksums to it (a kill between the two would leave one that cannot be checked), counts damaged
ones among those to keep, and raises a storage's errors on the path of the next save.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar, cast

import jax
import numpy as np
from absl import logging
from etils import epath
from jax.experimental import multihost_utils

from lm.checkpoints import arrays, checksums, model_json, opening
from lm.checkpoints.checksums import CheckpointError, DamagedError
from lm.checkpoints.local import LocalTier, to_host
from lm.checkpoints.names import check_fit, describe, flatten, matches, unflatten
from lm.checkpoints.paths import absolute
from lm.checkpoints.reference import Reference
from lm.distributed import barrier, broadcast, reached, waits
from lm.model import ModelConfig

T = TypeVar("T")
Tree = Any
PROBE_BYTES = 1 << 16


@dataclasses.dataclass(frozen=True)
class SaveInterval:
    """When to save: every `steps` steps or `minutes` minutes after the last save.

    Attributes:
      steps: None for never.
      minutes: None for never.
      ask_every: several processes check the minutes only every so many steps: they follow the
        clock of process 0, and asking it makes them wait for each other.
    """

    steps: int | None = None
    minutes: float | None = None
    ask_every: int = 10

    def __post_init__(self) -> None:
        for name, value in dataclasses.asdict(self).items():
            if value is not None and value <= 0:
                raise ValueError(f"the interval of {name}={value} must be positive, or None")

    def due(self, step: int, now: float, last: float) -> bool:
        """Whether to save after `step` steps. All processes must call it at the same steps.

        Args:
          step: steps done.
          now: a monotonic clock, in seconds.
          last: the same clock at the last save, or at the start.
        """
        if self.steps is not None and step % self.steps == 0:
            return True
        if self.minutes is None:
            return False
        late = now - last >= 60 * self.minutes
        if jax.process_count() == 1:
            return late
        return step % self.ask_every == 0 and broadcast(late)


class Failure(NamedTuple):
    """A save that failed."""

    step: int
    error: str


class Restored(NamedTuple):
    """The result of `restore_last`.

    Attributes:
      step: the checkpoint's step.
      state: the tree asked for.
      metadata: the caller's, saved with it.
      skipped: newer checkpoints that were damaged, and how.
      source: its directory.
    """

    step: int
    state: Tree
    metadata: dict[str, Any]
    skipped: tuple[str, ...]
    source: str


def _agreed(
    call: Callable[[], T], otherwise: str, errors: tuple[type[Exception], ...] = (DamagedError,)
) -> T:
    """The result of `call` once it has worked on every process; else DamagedError on all."""
    result, fault = None, None
    try:
        result = call()
    except errors as error:
        fault = error if isinstance(error, DamagedError) else DamagedError(str(error))
    sound = np.int32(fault is None)
    if jax.process_count() > 1:
        sound = multihost_utils.process_allgather(sound)
    if not np.all(sound):
        raise fault or DamagedError(otherwise)
    return cast(T, result)


def _arrays(state: Tree) -> dict[str, Any]:
    return {
        name: leaf if hasattr(leaf, "dtype") else np.asarray(leaf)
        for name, leaf in flatten(state).items()
    }


class Checkpoints:
    """The checkpoints of one run. All its processes create one and call the same methods."""

    def __init__(
        self,
        directory: Any,
        keep: int | None = None,
        *,
        config: ModelConfig | None = None,
        keep_every: int | None = None,
        local: Any = None,
        keep_local: int = 2,
        timeout: float = 600.0,
    ) -> None:
        """Writes and removes nothing before the first save.

        Args:
          directory: of the checkpoints; several processes need a shared file system.
          keep: number of latest checkpoints to keep (None: all).
          config: the model's, which makes the checkpoints readable by `open_checkpoint`.
          keep_every: steps divisible by this are never deleted.
          local: directory on the host's own disk for `save_local`.
          keep_local: number of those to keep.
          timeout: seconds after which a background write has failed.
        """
        self.directory = absolute(directory)
        self.config, self.keep, self.keep_every = config, keep, keep_every
        self.local = None if local is None else LocalTier(local, str(self.directory), keep_local)
        self._handler = arrays.Handler(timeout)
        self._writer = arrays.make_writer(self._handler)
        self._threads: dict[str, threading.Thread] = {}  # what is being written
        self._failures: list[Failure] = []
        self._current: set[int] = set()  # steps this run has written or resumed from
        self._damaged: set[int] = set()
        self._clean = False

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    # Writing.

    def save(
        self,
        step: int,
        state: Tree,
        metadata: dict[str, Any],
        *,
        wait: bool = False,
        frozen: Reference | None = None,
        prune: bool = True,
    ) -> None:
        """Write `state` as the checkpoint of `step`, in the background.

        Waits for a save in progress, and returns once the arrays are copied to the host, when they
        may be donated. A storage error is never raised here: see `failures`. A step that this run
        has already saved, or resumed from, is left as it is.

        Args:
          step: steps done.
          state: a tree of arrays; a TrainState's model is described in `model.json`.
          metadata: values of JSON's types.
          wait: return only when it is on disk, or has failed.
          frozen: where the leaves below `frozen/` are stored; they are then not written.
          prune: remove those older than the last `keep`, once this one is complete.

        Raises:
          TypeError: `metadata` is not of JSON's types.
          CheckpointError: a class in the tree of weights is not known; see `register`.
        """
        self.wait()
        if step in self._current:
            return
        leaves = _arrays(state)
        if frozen is not None:
            leaves = {name: x for name, x in leaves.items() if not matches(name, ("frozen",))}
        self._handler.files = self._sidecars(state, leaves, metadata, frozen)
        self._handler.end = f"the end of the save of step {step}"
        reached(f"the save of step {step}")
        try:
            self._prepare(step)
            arrays.start(self._writer, self.directory / str(step), leaves)
        except Exception as error:
            with contextlib.suppress(Exception):  # else its own last writes fail the next save
                self._writer.wait_until_finished()
            self._fail(step, error)
            return
        self._start("checkpoint", self._finish, step, prune)
        if wait:
            self.wait()

    def save_local(self, step: int, state: Tree, metadata: dict[str, Any]) -> None:
        """Write this process's shards to its own disk in the background; otherwise as `save`."""
        if self.local is None:
            raise ValueError("Checkpoints was made without a `local` directory")
        self._join("local checkpoint")
        leaves = _arrays(state)
        described = {name: describe(leaf) for name, leaf in leaves.items()}
        index = {"version": model_json.VERSION, "metadata": metadata, "arrays": described}
        arrays.to_json(index)
        self._start("local checkpoint", self._write_local, step, to_host(leaves), index)

    def _write_local(self, step: int, shards: Any, index: dict[str, Any]) -> None:
        assert self.local is not None
        try:
            self.local.write(step, shards, index)
        except Exception as error:
            self._fail(step, error, str(self.local.root))

    def _start(self, name: str, call: Callable[..., None], *args: Any) -> None:
        self._threads[name] = threading.Thread(target=call, args=args, name=name)
        self._threads[name].start()

    def _join(self, *names: str) -> None:
        for name in names:
            if (thread := self._threads.pop(name, None)) is not None:
                thread.join()

    def wait(self) -> None:
        """Wait for all writes in progress."""
        self._join(*self._threads)

    def failures(self) -> list[Failure]:
        """Saves that failed since the last call. Older checkpoints are unchanged."""
        failed, self._failures = self._failures, []
        return failed

    def close(self) -> None:
        """Wait, and release Orbax's threads."""
        self.wait()
        self._writer.close()

    def discard_after(self, step: int) -> None:
        """Remove later checkpoints, when a run restarts from `step` on another course."""
        self.wait()
        for later in [s for s in opening.all_steps(self.directory) if s > step]:
            self._current.discard(later)
            if jax.process_index() == 0:
                self._remove(later)
        if self.local is not None:
            self.local.discard_after(step)
        barrier("discarded")

    def _sidecars(
        self, state: Tree, leaves: dict[str, Any], metadata: Any, frozen: Reference | None
    ) -> dict[str, bytes]:
        weights = getattr(state, "params", None) if self.config is not None else None
        reference = None if frozen is None else dataclasses.asdict(frozen)
        model = model_json.to_dict(self.config, weights, leaves, reference)
        contents = zip(opening.SIDECARS, (model, metadata), strict=True)
        return {name: arrays.to_json(content) for name, content in contents}

    def _prepare(self, step: int) -> None:
        """Process 0 makes room for `step`; all learn whether the disk can be written to."""
        error: Exception | None = None
        if jax.process_index() == 0:
            try:
                self.directory.mkdir(parents=True, exist_ok=True)
                if not self._clean:
                    self._remove_partial()
                if (self.directory / str(step)).exists():
                    self._remove(step)
                probe = self.directory / f"probe{arrays.PARTIAL}"
                try:
                    probe.write_bytes(bytes(PROBE_BYTES))
                finally:
                    probe.unlink(missing_ok=True)
            except Exception as caught:
                error = caught
        if not broadcast(error is None):
            raise error or OSError("process 0 cannot write there")
        self._clean = True
        self._damaged.discard(step)

    def _finish(self, step: int, prune: bool) -> None:
        """In the background: wait for Orbax, then remove old checkpoints or the failed one."""
        directory = self.directory / str(step)
        try:
            self._writer.wait_until_finished()
            if not (directory / checksums.FILE).exists():
                raise self._handler.error or OSError("another process failed to write its part")
        except Exception as error:
            self._fail(step, error)
            return
        self._current.add(step)
        if prune and jax.process_index() == 0:
            try:
                for old in self._superfluous(step):
                    self._remove(old)
            except Exception as error:
                self._fail(step, error, "old checkpoints")

    def _superfluous(self, step: int) -> list[int]:
        if self.keep is None:
            return []
        sound, every = [s for s in self.steps() if s <= step], self.keep_every
        return [s for s in sound[: -self.keep] if not (every and s % every == 0)]

    def _fail(self, step: int, error: Exception, what: str = "") -> None:
        message = f"{what or self.directory / str(step)}: {type(error).__name__}: {error}"
        message += f"; {late}" if (late := waits(self._handler.end)) else ""
        logging.error("checkpoint of step %d failed: %s", step, message)
        self._failures.append(Failure(step, message))
        if what or jax.process_index() != 0:
            return
        self._clean = False
        try:
            self._remove_partial()
            directory = self.directory / str(step)
            if directory.exists() and not (directory / checksums.FILE).exists():
                self._remove(step)
        except OSError as again:
            logging.error("and what it left cannot be removed: %s", again)

    def _remove(self, step: int) -> None:
        removed = self.directory / f"{step}.removed{arrays.PARTIAL}"
        if removed.exists():
            removed.rmtree()
        (self.directory / str(step)).rename(removed)
        removed.rmtree()

    def _remove_partial(self) -> None:
        if not self.directory.is_dir():
            return
        for path in self.directory.iterdir():
            if path.name.endswith(arrays.PARTIAL):
                path.rmtree() if path.is_dir() else path.unlink()

    # Reading.

    def steps(self) -> list[int]:
        """Steps with a complete checkpoint, in order, except those found damaged."""
        return [s for s in opening.all_steps(self.directory) if s not in self._damaged]

    def latest(self) -> int | None:
        """The last of `steps`, or None."""
        return max(self.steps(), default=None)

    def metadata(self, step: int) -> dict[str, Any]:
        """The metadata saved with a checkpoint.

        Raises:
          CheckpointError: there is no such checkpoint, or it is damaged.
        """
        self.wait()
        directory = self._directory(step)
        checksums.verify(directory, under=opening.SIDECARS)
        return json.loads((directory / "metadata.json").read_text())

    def restore(
        self, step: int, like: Tree, *, ignore: Sequence[str] = (), frozen: Any = None
    ) -> Tree:
        """The state of `step`, with the shapes, dtypes and shardings of `like`.

        Args:
          step: the checkpoint's step.
          like: a tree of ShapeDtypeStructs (with shardings) or arrays.
          ignore: names, such as `ema`, that may be missing on either side; leaves of `like` below
            them are returned unchanged.
          frozen: weights stored elsewhere: their path, or their tree (its digest is checked). By
            default the path in the checkpoint.

        Raises:
          DamagedError: a file is missing or not what was written; the message names it.
          CheckpointError: there is none, or leaves are missing, unexpected or of another type.
        """
        self.wait()
        directory = self._directory(step)
        share = jax.process_index(), jax.process_count()
        _agreed(
            lambda: checksums.verify(directory, share),
            f"{directory}: another process found a damaged file",
        )
        state = self._read(directory, like, tuple(ignore), frozen)
        self._current = {s for s in self._current if s < step} | {step}
        return state

    def restore_last(
        self,
        like: Tree,
        *,
        ignore: Sequence[str] = (),
        frozen: Any = None,
        up_to: int | None = None,
    ) -> Restored | None:
        """The newest sound checkpoint, durable or local; None if there is none at all.

        Takes the arguments of `restore`; `up_to` is the last step that may be taken. Damaged ones
        are skipped, with a message that names the file at fault.

        Raises:
          CheckpointError: none is sound, or the newest sound one does not fit `like`.
        """
        self.wait()
        skipped: list[str] = []
        tried: set[tuple[int, bool]] = set()
        while (candidate := self._newest(tried, up_to)) is not None:
            step, local = candidate
            try:
                if local:
                    return self._read_local(step, like, tuple(ignore), tuple(skipped))
                state = self.restore(step, like, ignore=ignore, frozen=frozen)
                where = str(self.directory / str(step))
                return Restored(step, state, self.metadata(step), tuple(skipped), where)
            except DamagedError as error:
                tried.add(candidate)
                if not local:
                    self._damaged.add(step)
                skipped.append(f"checkpoint of step {step} passed over: {error}")
                logging.warning("%s", skipped[-1])
        if skipped:
            raise CheckpointError(
                f"no checkpoint in {self.directory} is sound: {'; '.join(skipped)}. To start anew, "
                "move the directory away"
            )
        return None

    def _newest(self, tried: set[tuple[int, bool]], up_to: int | None) -> tuple[int, bool] | None:
        """Step, and whether local, of the next candidate, as process 0 sees it."""
        durable = [(step, False) for step in opening.all_steps(self.directory)]
        local = [(step, True) for step in self.local.steps()] if self.local is not None else []
        found = {each for each in (*durable, *local) if up_to is None or each[0] <= up_to}
        newest = broadcast(max(found - tried, default=None))
        return None if newest is None else (newest[0], newest[1])

    def _read(
        self, directory: epath.Path, like: Tree, ignore: tuple[str, ...], frozen: Any
    ) -> Tree:
        model = opening.model_of(directory)
        leaves = flatten(like)
        wanted = {name: leaf for name, leaf in leaves.items() if not matches(name, ignore)}
        elsewhere = {}
        if model.frozen is not None:
            elsewhere = {n: leaf for n, leaf in wanted.items() if matches(n, ("frozen",))}
        here = {name: leaf for name, leaf in wanted.items() if name not in elsewhere}
        have = {name: x for name, x in model.arrays.items() if not matches(name, ignore)}
        check_fit(directory, have, {name: describe(leaf) for name, leaf in here.items()})
        leaves |= arrays.read(directory, here)
        if elsewhere:
            leaves |= _frozen(directory, model, elsewhere, frozen)
        return unflatten(leaves, like)

    def _read_local(
        self, step: int, like: Tree, ignore: tuple[str, ...], skipped: tuple[str, ...]
    ) -> Restored:
        """The local checkpoint of a step, once every process has read its own shards."""
        tier, leaves = self.local, flatten(like)
        assert tier is not None
        read, index = _agreed(
            lambda: tier.read(step, leaves, ignore),
            f"another process has no sound local copy of step {step}",
            (CheckpointError, OSError),
        )
        self._current = {step}
        state = unflatten(leaves | read, like)
        return Restored(step, state, index["metadata"], skipped, str(tier.root / str(step)))

    def _directory(self, step: int) -> epath.Path:
        steps = opening.all_steps(self.directory)
        if step not in steps:
            have = ", ".join(map(str, steps)) or "none"
            raise CheckpointError(
                f"{self.directory} has no checkpoint of step {step}; it has {have}"
            )
        return self.directory / str(step)


def _frozen(
    directory: epath.Path, model: model_json.ModelJson, wanted: dict[str, Any], frozen: Any
) -> dict[str, Any]:
    """The leaves `frozen/...`, from the path or tree given, or from the model's reference."""
    strip = {name: name.removeprefix("frozen/") for name in wanted}
    if frozen is None or isinstance(frozen, str) or hasattr(frozen, "__fspath__"):
        shardings = {strip[name]: leaf.sharding for name, leaf in wanted.items()}
        found = opening.read_frozen(directory, model, shardings, frozen)
    else:
        found = flatten(frozen)
        opening.check_digest(directory, model, found, "the tree given")
    have = {name: describe(found[strip[name]]) for name in wanted if strip[name] in found}
    check_fit(directory, have, {name: describe(leaf) for name, leaf in wanted.items()})
    return {name: found[strip[name]] for name in wanted}

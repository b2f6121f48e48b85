"""Packed batches: any step, any rows of it, on any host, from arithmetic alone.

Legend: B rows of a batch, T positions of a row, N rows asked for.
"""

import copy
import hashlib
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from lm.data.mixtures import CappedShare, Share
from lm.data.order import DEFAULT_BLOCK, epoch_row
from lm.data.packed import PackedSource
from lm.data.prefetch import Prefetcher
from lm.data.stages import ActiveStage, DataStage, Timeline

if TYPE_CHECKING:
    import jax

Batch = dict[str, np.ndarray]
_STATE_VERSION = 2
_DTYPES = {
    "ids": np.int32,
    "targets": np.int32,
    "positions": np.int32,
    "segment_ids": np.int32,
    "weights": np.float32,
}


class Batches:
    """The stream of packed batches of a run, as a function of the step.

    Step n reads the global rows after those of step n - 1. Which source and plan row a global row
    is depends on (seed, row) and the mixture in force alone, so neither the number of hosts nor a
    restart nor the batch size changes a token. Within an epoch of a source each row of its plan
    comes once, across stages too. A source that reaches its cap leaves its share to the rest.

    Two things change a run under way, and both are recorded in `state`: `resume` goes on with
    another batch size or mixture, `skipped` passes over rows after a rewind. Steps before them
    stay what they were.

    A batch is a dict of [B, T] arrays: `ids` and `targets` int32; `positions` int32, from 0 in
    each piece; `segment_ids` int32, 1, 2, ... by piece and 0 for padding; `weights` float32, 1
    where a target counts.

    Args:
      sources: what to mix, by distinct names. Plans of another sequence length are other sources.
      batch_size: rows of every step, over all hosts; or stages of batch sizes and mixtures.
      seed: of the order.
      num_steps: steps the run will ask for; checked against the caps.
      block: rows in which a mixture is exact.

    Raises:
      ValueError: no sources or two of one name; stages out of order, of unequal sequence lengths
        or a batch size below 1; a mixture of unknown sources or of weights that round to nothing;
        caps that end before `num_steps` steps.
    """

    def __init__(
        self,
        sources: Sequence[PackedSource],
        batch_size: int | Sequence[DataStage],
        *,
        seed: int = 0,
        num_steps: int | None = None,
        block: int = DEFAULT_BLOCK,
    ):
        names = [s.name for s in sources]
        if not sources or len(set(names)) < len(names):
            raise ValueError(f"sources {names} must be at least one, of distinct names")
        self.sources = tuple(sources)
        # What is known of a source without its data: of those here and those of earlier stages.
        self._about = {
            s.name: {"plan": s.hash, "num_rows": s.num_rows, "seq_len": s.seq_len} for s in sources
        }
        stages = [DataStage(batch_size)] if isinstance(batch_size, int) else list(batch_size)
        self.timeline = Timeline(names, self._active(stages), (), seed, block, num_steps)

    def _active(self, stages: Sequence[DataStage]) -> list[ActiveStage]:
        """The stages with their caps in rows."""
        first_steps = [stage.first_step for stage in stages]
        if first_steps[:1] != [0] or any(a >= b for a, b in itertools.pairwise(first_steps)):
            raise ValueError(f"first steps {first_steps} of the stages must be 0 and then grow")
        for i, stage in enumerate(stages):
            if stage.batch_size < 1:
                raise ValueError(f"batch_size={stage.batch_size} of stage {i} must be at least 1")
        return [ActiveStage(s.first_step, s.batch_size, self._capped(s.mixture)) for s in stages]

    def _capped(self, mixture: Sequence[Share] | None) -> tuple[CappedShare, ...]:
        if mixture is None:
            mixture = [Share(s.name, s.num_rows) for s in self.sources]
        names = [share.source for share in mixture]
        unknown = [name for name in names if name not in self._about]
        if unknown or len(set(names)) < len(names):
            raise ValueError(
                f"a mixture of {names} must name each source once, out of {list(self._about)}"
            )
        lengths = {s.source: self._about[s.source]["seq_len"] for s in mixture if s.weight}
        if len(set(lengths.values())) > 1:
            raise ValueError(
                f"plans differ in seq_len: {lengths}; those of a stage must have the same"
            )
        shares = []
        for share in mixture:
            about = self._about[share.source]
            rows = share.limit(about["num_rows"], about["seq_len"])
            shares.append(CappedShare(share.source, float(share.weight), rows))
        return tuple(shares)

    @property
    def skips(self) -> list[tuple[int, int]]:
        """(step, rows) of the rows passed over."""
        return list(self.timeline.skips)

    def batch_size(self, step: int) -> int:
        """Rows of a step, over all hosts."""
        return self.timeline.stage(step).batch_size

    def seq_len(self, step: int) -> int:
        """Positions of a row of a step."""
        shares = self.timeline.stage(step).shares
        return next(self._about[s.source]["seq_len"] for s in shares if s.weight)

    @property
    def num_rows(self) -> int:
        """Rows of all plans together."""
        return sum(s.num_rows for s in self.sources)

    def num_tokens(self, step: int) -> float:
        """Targets that count in the batches before `step`, by the mean row of each source."""
        drawn = self.timeline.drawn(step)
        pairs = sum(n * s.num_pairs / s.num_rows for n, s in zip(drawn, self.sources, strict=False))
        skipped = self.timeline.num_skipped(step)
        return pairs * (1 - skipped / max(1, sum(drawn)))

    def epochs(self, step: int) -> list[float]:
        """How often each source has been gone through before `step`, skipped rows included."""
        drawn = self.timeline.drawn(step)
        return [n / s.num_rows for n, s in zip(drawn, self.sources, strict=False)]

    def first_row(self, step: int) -> int:
        """The first global row of a step, after those skipped at it."""
        return self.timeline.first_row(step)

    def rows(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """(source, plan row) of each row of a step: int64 arrays [B]."""
        first = self.first_row(step)
        return self.locate(np.arange(first, first + self.batch_size(step)))

    def locate(self, global_rows) -> tuple[np.ndarray, np.ndarray]:
        """(source, plan row) of global rows: int64 arrays of their shape.

        Raises:
          ValueError: rows beyond the caps.
        """
        source, rank = self.timeline.locate(np.asarray(global_rows, dtype=np.int64))
        row = np.empty_like(rank)
        for s in np.unique(source).tolist():
            here = source == s
            name = self.timeline.names[s]
            # A number that identifies the source whatever its place in the list.
            key = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")
            num_rows = self._about[name]["num_rows"]
            row[here] = epoch_row(rank[here], num_rows, self.timeline.seed, key)
        return source, row

    def host_batch(self, step: int, rows: Sequence[int] | np.ndarray | None = None) -> Batch:
        """Rows `rows` (all by default) of the batch of a step, as arrays [N, T].

        Raises:
          ValueError: `step` is beyond the caps, or of an earlier stage with a source that this
            stream lacks.
        """
        source, row = self.rows(step)
        wanted = np.arange(len(row)) if rows is None else np.asarray(rows)
        batch = empty_batch(len(wanted), self.seq_len(step))
        for i, r in enumerate(wanted):
            if source[r] >= len(self.sources):
                name = self.timeline.names[source[r]]
                raise ValueError(
                    f"step {step} reads source '{name}' of an earlier stage, which this run no "
                    "longer has; add it again to read that step"
                )
            self.sources[source[r]].fill(int(row[r]), batch, i)
        return batch

    def device_batch(self, step: int, sharding: "jax.sharding.Sharding") -> "dict[str, jax.Array]":
        """The batch of a step as global arrays [B, T]; reads only rows of this host's devices."""
        shape = (self.batch_size(step), self.seq_len(step))
        return _place(lambda rows: self.host_batch(step, rows), shape, sharding)

    def prefetch(
        self,
        step: int = 0,
        num_steps: int | None = None,
        *,
        sharding: "jax.sharding.Sharding | None" = None,
    ) -> Prefetcher:
        """Batches of steps `step`, `step` + 1, ..., read ahead by a thread.

        Host batches, or global arrays if a sharding is given. Use it in a `with` statement.
        """

        read = self.host_batch if sharding is None else lambda s: self.device_batch(s, sharding)
        return Prefetcher(read, step, num_steps)

    def state(self, step: int) -> dict[str, Any]:
        """What a checkpoint stores to continue at `step`, and to read every earlier step again."""
        stages = [stage.record() for stage in self.timeline.past(step)[0]]
        used = dict.fromkeys(n for stage in stages for n, weight, _ in stage["shares"] if weight)
        return {
            "step": step,
            "version": _STATE_VERSION,
            "seed": self.timeline.seed,
            "block": self.timeline.block,
            "sources": {name: self._about[name] for name in used},
            "stages": stages,
            "skips": [list(skip) for skip in self.skips],
        }

    def resume(self, state: Mapping[str, Any]) -> "Batches":
        """The stream that reads what `state` records before its step, and this one's stages after.

        So a batch size or mixture that differs from the recorded one starts a new stage at the
        step, on the global row where the last one stopped. Skips are the recorded ones. Sources of
        earlier stages may be missing; only reading their steps again asks for them.

        Raises:
          ValueError: another seed or block, or a source whose plan changed.
        """
        self._check_kin(state)
        resumed = copy.copy(self)
        resumed._about = dict(state["sources"]) | self._about
        stages = [ActiveStage.of_record(record) for record in state["stages"]]
        skips = [(at, rows) for at, rows in state["skips"]]
        resumed.timeline = self.timeline.resume(state["step"], stages, skips)
        return resumed

    def check(self, state: Mapping[str, Any]) -> int:
        """The step to go on at, if this stream reads up to it what `state` records.

        Raises:
          ValueError: as `resume`; or stages or skips before the step differ.
        """
        step = state["step"]
        theirs, mine = self.resume(state).timeline.past(step), self.timeline.past(step)
        whats = ("batch size or mixture", "skips")
        for what, recorded, own in zip(whats, theirs, mine, strict=True):
            if recorded != own:
                raise ValueError(
                    f"data order: {what} before step {step} differs: {own}, in the checkpoint "
                    f"{recorded}; restore it, or go on with resume(state)"
                )
        return step

    def _check_kin(self, state: Mapping[str, Any]) -> None:
        if state.get("version") != _STATE_VERSION:
            raise ValueError(
                f"data order: the checkpoint's version is {state.get('version')}, and this code "
                f"reads version {_STATE_VERSION}; go on with the code that wrote it"
            )
        for name, mine in (("seed", self.timeline.seed), ("block", self.timeline.block)):
            if state[name] != mine:
                raise ValueError(
                    f"data order: {name}={mine} differs from the checkpoint's {state[name]}; "
                    "restore it"
                )
        for name, about in state["sources"].items():
            mine = self._about.get(name, about)
            if mine != about:
                raise ValueError(
                    f"data order: plan of source '{name}' is {mine}, in the checkpoint {about}; "
                    "the dataset, tokenizer or sequence length changed; restore it, or give the "
                    "changed source another name"
                )
            for other in self._about.keys() - state["sources"].keys():
                if name not in self._about and self._about[other] == about:
                    raise ValueError(
                        f"data order: source '{other}' is what the checkpoint calls '{name}'; name "
                        "it so, or its epoch would begin again"
                    )

    def skipped(self, at_step: int, rows: int) -> "Batches":
        """The stream whose steps from `at_step` on begin `rows` rows further on.

        The rows passed over count towards epochs and caps. Skips add up.

        Raises:
          ValueError: `rows` below 1, `at_step` below 0, or caps that end too early now.
        """
        if rows < 1 or at_step < 0:
            raise ValueError(
                f"rows={rows} to skip must be at least 1, at_step={at_step} at least 0"
            )
        stream = copy.copy(self)
        stream.timeline = self.timeline.skipped(at_step, rows)
        return stream


class HeldOut:
    """Every pair of a plan exactly once, in plan order; the last batch padded with weight 0.

    Bits per byte is the summed negative log-likelihood in nats over all batches, divided by
    log(2) * `num_bytes`. The text's bytes count; EOS is predicted and so adds to the numerator.
    """

    def __init__(self, packed: PackedSource, batch_size: int):
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size} must be at least 1")
        self.packed, self.batch_size = packed, batch_size
        self.seq_len = packed.seq_len
        self.num_bytes = packed.num_bytes
        self.num_pairs = packed.num_pairs

    def __len__(self) -> int:
        return -(-self.packed.num_rows // self.batch_size)

    def host_batch(self, step: int, rows: Sequence[int] | np.ndarray | None = None) -> Batch:
        """Batch `step` < len(self), or some rows of it, as `Batches.host_batch`."""
        wanted = np.arange(self.batch_size) if rows is None else np.asarray(rows)
        batch = empty_batch(len(wanted), self.seq_len)
        for i, r in enumerate(wanted):
            row = step * self.batch_size + int(r)
            if row < self.packed.num_rows:
                self.packed.fill(row, batch, i)
        return batch

    def device_batch(self, step: int, sharding: "jax.sharding.Sharding") -> "dict[str, jax.Array]":
        """As `Batches.device_batch`."""
        shape = (self.batch_size, self.seq_len)
        return _place(lambda rows: self.host_batch(step, rows), shape, sharding)

    def __iter__(self) -> Iterator[Batch]:
        return (self.host_batch(step) for step in range(len(self)))


def empty_batch(num_rows: int, seq_len: int) -> Batch:
    """Arrays [num_rows, seq_len] of padding."""
    return {name: np.zeros((num_rows, seq_len), dtype) for name, dtype in _DTYPES.items()}


def _place(read, shape: tuple[int, int], sharding) -> "dict[str, jax.Array]":
    """Global arrays of `shape` from `read(rows)`, called once with this host's rows."""
    import jax

    indices = sharding.addressable_devices_indices_map(shape)
    rows = np.unique(np.concatenate([np.arange(shape[0])[index[0]] for index in indices.values()]))
    batch = read(rows)

    def shard(name: str):
        def callback(index):
            wanted = np.arange(shape[0])[index[0]]
            return batch[name][np.searchsorted(rows, wanted)][:, index[1]]

        return callback

    return {n: jax.make_array_from_callback(shape, sharding, shard(n)) for n in batch}

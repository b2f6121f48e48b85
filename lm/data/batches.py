"""Packed batches: any step, any rows of it, on any host, from arithmetic alone.

Legend: B rows of a batch, T positions of a row, N rows asked for.
"""

import dataclasses
import hashlib
import json
import queue
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from lm.data.order import DEFAULT_BLOCK, block_counts, epoch_row, mixture_source
from lm.data.packing import PackPlan
from lm.data.sources import TokenSource

if TYPE_CHECKING:
    import jax

Batch = dict[str, np.ndarray]
_DTYPES = {
    "ids": np.int32,
    "targets": np.int32,
    "positions": np.int32,
    "segment_ids": np.int32,
    "weights": np.float32,
}


@dataclasses.dataclass(frozen=True)
class PackedSource:
    """Documents and the plan that packs them."""

    source: TokenSource
    plan: PackPlan
    name: str = ""

    def fill(self, row: int, out: Mapping[str, np.ndarray], i: int) -> None:
        """Writes plan row `row` into row i of zeroed arrays of a batch."""
        at = 0
        for segment, (document, start, length) in enumerate(self.plan.row(row).tolist(), 1):
            tokens = self.source.read(document, start, length + 1)
            to = at + length
            out["ids"][i, at:to] = tokens[:-1]
            out["targets"][i, at:to] = tokens[1:]
            out["positions"][i, at:to] = np.arange(length)
            out["segment_ids"][i, at:to] = segment
            out["weights"][i, at:to] = 1.0
            at = to


class Batches:
    """The endless stream of packed batches of a mixture.

    Global row g of the stream is row (g - row_offset) mod B of step (g - row_offset) // B; which
    source and plan row it is depends on (seed, g) alone. So neither the number of hosts nor a
    restart changes a token, and skipping data is adding to `row_offset`.

    A batch is a dict of [B, T] arrays: `ids` and `targets` int32; `positions` int32, from 0 in
    each piece; `segment_ids` int32, 1, 2, ... by piece and 0 for padding; `weights` float32, 1
    where a target counts.

    Args:
      sources: what to mix; all plans with one sequence length.
      batch_size: rows of a step, over all hosts.
      weights: share of rows by source; by default each source's share of all rows.
      row_offset: global row that step 0 starts at.
      block: rows in which the mixture is exact, see `mixture_source`.

    Raises:
      ValueError: no sources, plans of unequal sequence length, weights that do not match the
        sources or round to nothing, a batch size below 1 or a negative offset.
    """

    def __init__(
        self,
        sources: Sequence[PackedSource],
        batch_size: int,
        *,
        weights: Sequence[float] | None = None,
        seed: int = 0,
        row_offset: int = 0,
        block: int = DEFAULT_BLOCK,
    ):
        if not sources:
            raise ValueError("a batch stream needs at least one source")
        lengths = {s.name or i: s.plan.seq_len for i, s in enumerate(sources)}
        if len(set(lengths.values())) > 1:
            raise ValueError(f"plans differ in seq_len: {lengths}; pack all with the same one")
        if weights is None:
            weights = [s.plan.num_rows for s in sources]
        if len(weights) != len(sources):
            raise ValueError(f"{len(weights)} mixture weights for {len(sources)} sources")
        if batch_size < 1 or row_offset < 0:
            raise ValueError(
                f"batch_size={batch_size} must be at least 1, row_offset={row_offset} at least 0"
            )
        block_counts(weights, block)
        self.sources, self.weights = tuple(sources), tuple(float(w) for w in weights)
        self.batch_size, self.seq_len = batch_size, sources[0].plan.seq_len
        self.seed, self.row_offset, self.block = seed, row_offset, block

    @property
    def plan_hash(self) -> str:
        """Names what global rows mean: the plans, the mixture and the seed."""
        plans = [s.plan.hash for s in self.sources]
        key = json.dumps([plans, self.weights, self.seed, self.block])
        return hashlib.sha256(key.encode()).hexdigest()[:32]

    @property
    def num_rows(self) -> int:
        """Rows of all plans together."""
        return sum(s.plan.num_rows for s in self.sources)

    @property
    def pairs_per_row(self) -> float:
        """Mean number of targets that count in a row, padding left out."""
        total = sum(self.weights)
        means = [s.plan.num_pairs / s.plan.num_rows for s in self.sources]
        return sum(w / total * m for w, m in zip(self.weights, means, strict=True))

    def rows(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """(source, plan row) of each row of a step: int64 arrays [B]."""
        first = self.row_offset + step * self.batch_size
        return self.locate(np.arange(first, first + self.batch_size))

    def locate(self, global_rows) -> tuple[np.ndarray, np.ndarray]:
        """(source, plan row) of global rows: int64 arrays of their shape."""
        source, rank = mixture_source(global_rows, self.weights, self.seed, self.block)
        row = np.empty_like(rank)
        for s, packed in enumerate(self.sources):
            here = source == s
            if here.any():
                row[here] = epoch_row(rank[here], packed.plan.num_rows, self.seed, s)
        return source, row

    def epochs(self, step: int) -> list[float]:
        """How often each source has been read before `step`."""
        done = self.row_offset + step * self.batch_size
        total = sum(self.weights)
        return [
            done * w / total / s.plan.num_rows
            for w, s in zip(self.weights, self.sources, strict=True)
        ]

    def host_batch(self, step: int, rows: Sequence[int] | np.ndarray | None = None) -> Batch:
        """Rows `rows` (all by default) of the batch of a step, as arrays [N, T]."""
        source, row = self.rows(step)
        wanted = np.arange(self.batch_size) if rows is None else np.asarray(rows)
        batch = _empty(len(wanted), self.seq_len)
        for i, r in enumerate(wanted):
            self.sources[source[r]].fill(int(row[r]), batch, i)
        return batch

    def device_batch(self, step: int, sharding: "jax.sharding.Sharding") -> "dict[str, jax.Array]":
        """The batch of a step as global arrays [B, T]; reads only rows of this host's devices."""
        shape = (self.batch_size, self.seq_len)
        return _place(lambda rows: self.host_batch(step, rows), shape, sharding)

    def state(self, step: int) -> dict[str, Any]:
        """What a checkpoint stores to go on at `step`."""
        return {
            "step": step,
            "row_offset": self.row_offset,
            "batch_size": self.batch_size,
            "plan_hash": self.plan_hash,
        }

    def check(self, state: Mapping[str, Any]) -> int:
        """The step to go on at, if `state` belongs to this stream.

        Raises:
          ValueError: the data, mixture, seed, batch size or offset changed.
        """
        mine = self.state(state["step"])
        remedy = {
            "plan_hash": "the data set, tokenizer, seq_len, mixture or seed changed; restore "
            "them, or start a new stage",
            "batch_size": "restore it, or start a new stage with row_offset="
            f"{state['row_offset'] + state['step'] * state['batch_size']}",
            "row_offset": "restore it, or start a new stage",
        }
        for name, advice in remedy.items():
            if state[name] != mine[name]:
                raise ValueError(
                    f"data order: {name}={mine[name]!r} differs from the checkpoint's "
                    f"{state[name]!r}; {advice}"
                )
        return state["step"]

    def prefetch(
        self,
        step: int = 0,
        num_steps: int | None = None,
        *,
        sharding: "jax.sharding.Sharding | None" = None,
        depth: int = 2,
    ) -> "Prefetcher":
        """Batches of steps `step`, `step` + 1, ..., read ahead by a thread.

        Host batches, or global arrays if a sharding is given. Use it in a `with` statement.
        """

        def read(s: int):
            return self.host_batch(s) if sharding is None else self.device_batch(s, sharding)

        return Prefetcher(read, step, num_steps, depth)


class HeldOut:
    """Every pair of a plan exactly once, in plan order; the last batch padded with weight 0.

    Bits per byte is the summed negative log-likelihood in nats over all batches, divided by
    log(2) * `num_bytes`. The text's bytes count; EOS is predicted and so adds to the numerator.
    """

    def __init__(self, packed: PackedSource, batch_size: int):
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size} must be at least 1")
        self.packed, self.batch_size = packed, batch_size
        self.seq_len = packed.plan.seq_len
        self.num_bytes = int(np.sum(packed.source.num_bytes))
        self.num_pairs = packed.plan.num_pairs

    def __len__(self) -> int:
        return -(-self.packed.plan.num_rows // self.batch_size)

    def host_batch(self, step: int, rows: Sequence[int] | np.ndarray | None = None) -> Batch:
        """Batch `step` < len(self), or some rows of it, as `Batches.host_batch`."""
        wanted = np.arange(self.batch_size) if rows is None else np.asarray(rows)
        batch = _empty(len(wanted), self.seq_len)
        for i, r in enumerate(wanted):
            row = step * self.batch_size + int(r)
            if row < self.packed.plan.num_rows:
                self.packed.fill(row, batch, i)
        return batch

    def device_batch(self, step: int, sharding: "jax.sharding.Sharding") -> "dict[str, jax.Array]":
        """As `Batches.device_batch`."""
        shape = (self.batch_size, self.seq_len)
        return _place(lambda rows: self.host_batch(step, rows), shape, sharding)

    def __iter__(self) -> Iterator[Batch]:
        return (self.host_batch(step) for step in range(len(self)))


class Prefetcher:
    """Runs `read(step)`, `read(step + 1)`, ... on a thread, at most `depth` ahead.

    An error in `read` is raised by the `next` that would have returned its batch. Leaving the
    `with` block, or `close`, stops the thread.
    """

    def __init__(self, read, step: int = 0, num_steps: int | None = None, depth: int = 2):
        self._queue: queue.Queue[tuple[Any, BaseException | None]] = queue.Queue(max(1, depth))
        self._stop = threading.Event()
        self._finished = False
        self._thread = threading.Thread(
            target=self._run, args=(read, step, num_steps), name="prefetch", daemon=True
        )
        self._thread.start()

    def __iter__(self) -> "Prefetcher":
        return self

    def __next__(self):
        if self._finished or self._stop.is_set():
            raise StopIteration
        batch, error = self._queue.get()
        if error is not None:
            self._finished = True
            raise error
        return batch

    def __enter__(self) -> "Prefetcher":
        return self

    def __exit__(self, *exception) -> None:
        self.close()

    def close(self) -> None:
        """Stops the thread and drops what it read ahead."""
        self._stop.set()
        while self._thread.is_alive():
            try:
                self._queue.get_nowait()
            except queue.Empty:
                self._thread.join(0.01)

    def _run(self, read, step: int, num_steps: int | None) -> None:
        end = None if num_steps is None else step + num_steps
        while not self._stop.is_set():
            if end is not None and step >= end:
                self._put(None, StopIteration())
                return
            try:
                batch = read(step)
            except Exception as error:
                self._put(None, error)
                return
            self._put(batch, None)
            step += 1

    def _put(self, batch, error: BaseException | None) -> None:
        if not self._stop.is_set():
            self._queue.put((batch, error))


def _empty(num_rows: int, seq_len: int) -> Batch:
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

"""`grain.MapDataset`: our rows for others' loaders and workers, and their datasets as sources."""

import functools
from collections.abc import Callable, Iterable
from typing import Any

import grain
import numpy as np

from lm.data.batches import Batches, empty_batch
from lm.data.packed import PackedSource
from lm.data.sources import ArraySource, Document


class _Opened:
    """A `grain.sources.RandomAccessDataSource` that every worker process opens for itself."""

    def __init__(self, open: Callable[[], Any], size: Callable, read: Callable) -> None:
        self._open, self._size, self._read = open, size, read

    @functools.cached_property
    def _opened(self) -> Any:
        return self._open()

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k != "_opened"}

    def __len__(self) -> int:
        return self._size(self._opened)

    def __getitem__(self, index: Any) -> dict[str, np.ndarray]:
        return self._read(self._opened, int(index))


def rows_dataset(open_packed: Callable[[], PackedSource]) -> grain.MapDataset:
    """The rows of a source in plan order, each a dict of [T] arrays as a row of a batch.

    Args:
      open_packed: called once per process, `partial(corpus.packed, "train", 2048)` for example.
    """
    return grain.MapDataset.source(_Opened(open_packed, lambda packed: packed.num_rows, _read_row))


def _read_row(packed: PackedSource, row: int) -> dict[str, np.ndarray]:
    batch = empty_batch(1, packed.seq_len)
    packed.fill(row, batch, 0)
    return {name: array[0] for name, array in batch.items()}


def batches_dataset(open_batches: Callable[[], Batches], num_steps: int) -> grain.MapDataset:
    """The batches of steps 0 to `num_steps` - 1 in the order of a run, dicts of [B, T] arrays."""
    return grain.MapDataset.source(_Opened(open_batches, lambda _: num_steps, Batches.host_batch))


def source_of(dataset: grain.MapDataset) -> ArraySource:
    """Documents from a dataset of dicts with `tokens` [n] and, if known, `num_bytes`; in memory."""
    documents: Iterable[Any] = map(dataset.__getitem__, range(len(dataset)))
    return ArraySource.from_documents(
        Document(np.asarray(d["tokens"], np.int32), int(d.get("num_bytes", 0))) for d in documents
    )

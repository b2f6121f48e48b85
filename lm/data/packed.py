"""Documents with the plans that pack them: one plan per shard of a large source."""

import dataclasses
import functools
import hashlib
import os
from collections.abc import Mapping, Sequence

import numpy as np

from lm.data.packing import PackPlan, make_plan, open_plan
from lm.data.sources import ArraySource

# Documents packed together: about 1.2 GB of memory and 10 s per plan.
SHARD_DOCUMENTS = 10_000_000


@dataclasses.dataclass(frozen=True)
class PackedSource:
    """Rows of packed documents; those of the second shard follow those of the first.

    Attributes:
      shards: (documents, plan) of each, all of one sequence length.
      name: of the source, in mixtures and checkpoints.
    """

    shards: Sequence[tuple[ArraySource, PackPlan]]
    name: str = ""

    def __post_init__(self) -> None:
        lengths = sorted({plan.seq_len for _, plan in self.shards})
        if len(lengths) != 1:
            raise ValueError(
                f"shards of source '{self.name}' have plans of seq_len {lengths}; pack all with one"
            )

    @functools.cached_property
    def row_offsets(self) -> np.ndarray:
        """int64 [shards + 1]: shard s holds rows row_offsets[s] to row_offsets[s + 1] - 1."""
        return np.cumsum([0, *(plan.num_rows for _, plan in self.shards)])

    @property
    def seq_len(self) -> int:
        return self.shards[0][1].seq_len

    @property
    def num_rows(self) -> int:
        return int(self.row_offsets[-1])

    @functools.cached_property
    def num_pairs(self) -> int:
        """(input, target) pairs in all rows."""
        return sum(plan.num_pairs for _, plan in self.shards)

    @functools.cached_property
    def num_bytes(self) -> int:
        """Bytes of the documents' text."""
        return sum(int(np.sum(source.num_bytes)) for source, _ in self.shards)

    @functools.cached_property
    def hash(self) -> str:
        """Names the plans in their order; of a single shard, that of its plan."""
        hashes = [plan.hash for _, plan in self.shards]
        if len(hashes) == 1:
            return hashes[0]
        return hashlib.sha256("\n".join(hashes).encode()).hexdigest()[:32]

    def row(self, row: int) -> tuple[ArraySource, np.ndarray]:
        """(documents, pieces [p, 3] of them) of a row; see `PackPlan`."""
        shard = int(np.searchsorted(self.row_offsets, row, side="right")) - 1
        source, plan = self.shards[shard]
        return source, plan.row(row - int(self.row_offsets[shard]))

    def fill(self, row: int, out: Mapping[str, np.ndarray], i: int) -> None:
        """Writes row `row` into row i of zeroed arrays of a batch."""
        source, pieces = self.row(row)
        at = 0
        for segment, (document, start, length) in enumerate(pieces.tolist(), 1):
            tokens = source.read(document, start, length + 1)
            to = at + length
            out["ids"][i, at:to] = tokens[:-1]
            out["targets"][i, at:to] = tokens[1:]
            out["positions"][i, at:to] = np.arange(length)
            out["segment_ids"][i, at:to] = segment
            out["weights"][i, at:to] = 1.0
            at = to


def pack_source(
    source: ArraySource,
    seq_len: int,
    directory: str | os.PathLike[str] | None = None,
    tokenizer_fingerprint: str = "",
    *,
    name: str = "",
    shard_documents: int = SHARD_DOCUMENTS,
) -> PackedSource:
    """Packs a source, `shard_documents` at a time.

    Time grows with the documents, memory with those of a shard. A source of one shard has the plan
    that `make_plan` gives.

    Args:
      directory: where plans are written and found again (`open_plan`); None for memory.

    Raises:
      ValueError: as `open_plan`; `shard_documents` below 1.
    """
    if shard_documents < 1:
        raise ValueError(f"shard_documents={shard_documents} must be at least 1")
    parts = [source]
    if len(source) > shard_documents:
        starts = range(0, len(source), shard_documents)
        parts = [source.part(start, start + shard_documents) for start in starts]
        parts = [part for part in parts if part.lengths.max() > 1] or [source]
    if directory is None:
        plans = [make_plan(part, seq_len, tokenizer_fingerprint) for part in parts]
    else:
        plans = [open_plan(part, seq_len, directory, tokenizer_fingerprint) for part in parts]
    return PackedSource(tuple(zip(parts, plans, strict=True)), name)

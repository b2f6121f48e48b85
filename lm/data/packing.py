"""Pack plans: which pieces of which documents fill each row.

A document of n tokens, BOS and EOS included, has n - 1 (input, target) pairs. A piece (document,
start, length) covers the inputs at start, ..., start + length - 1; its targets are one token
further on and so inside the document. Every pair of every document is in exactly one piece, every
piece in exactly one row, and no row holds more than `seq_len` pairs.
"""

import dataclasses
import errno
import hashlib
import json
import os
from pathlib import Path

import numpy as np
from absl import logging

from lm.data.sources import ArraySource, written_once

ALGORITHM = "best_fit_decreasing"
VERSION = 1


@dataclasses.dataclass(frozen=True)
class PackPlan:
    """Rows of at most `seq_len` pairs.

    Attributes:
      row_offsets: int64 [rows + 1]; row r holds pieces[row_offsets[r]:row_offsets[r + 1]].
      pieces: int32 or int64 [P, 3] of (document, start, length).
      seq_len: pairs that fit in a row.
      num_pairs: (input, target) pairs in all rows.
      hash: names the plan: its pieces, its dataset and its tokenizer.
    """

    row_offsets: np.ndarray
    pieces: np.ndarray
    seq_len: int
    num_pairs: int
    hash: str

    @property
    def num_rows(self) -> int:
        return len(self.row_offsets) - 1

    @property
    def waste(self) -> float:
        """Share of the rows' places that hold no pair."""
        return 1.0 - self.num_pairs / max(1, self.num_rows * self.seq_len)

    def row(self, r: int) -> np.ndarray:
        """Pieces [p, 3] of row r."""
        return self.pieces[self.row_offsets[r] : self.row_offsets[r + 1]]


def pack(lengths: np.ndarray, seq_len: int) -> tuple[np.ndarray, np.ndarray]:
    """Splits documents into pieces of at most `seq_len` pairs and packs them best-fit decreasing.

    Pieces go, longest first, to the row with the least room that still holds them (Johnson, 1973).
    Rows are kept by the room they have left, so the cost is a sort and, per distinct length, a few
    vector operations.

    Args:
      lengths: int [documents], tokens per document, BOS and EOS included.
      seq_len: pairs per row.

    Returns:
      (row_offsets int64 [rows + 1], pieces [P, 3]), see `PackPlan`.

    Raises:
      ValueError: `seq_len` below 1.
    """
    if seq_len < 1:
        raise ValueError(f"seq_len={seq_len} must be at least 1")
    pairs = np.maximum(np.asarray(lengths, dtype=np.int64) - 1, 0)
    full, rest = np.divmod(pairs, seq_len)
    num_full = int(full.sum())

    documents = np.repeat(np.arange(len(pairs)), full)
    nth = np.arange(num_full) - np.repeat(np.cumsum(full) - full, full)
    whole = np.stack([documents, nth * seq_len, np.full(num_full, seq_len)], axis=1)

    tails = np.flatnonzero(rest)
    # Of 16 bits at most, so that the sort is by radix.
    keys = (seq_len - rest[tails]).astype(np.min_scalar_type(seq_len))
    tails = tails[np.argsort(keys, kind="stable")]
    rows = _best_fit(rest[tails], seq_len)
    by_row = np.argsort(rows, kind="stable")
    tails = tails[by_row]
    packed = np.stack([tails, full[tails] * seq_len, rest[tails]], axis=1)

    pieces = np.concatenate([whole, packed])
    per_row = np.concatenate([np.ones(num_full, np.int64), np.bincount(rows)])
    row_offsets = np.concatenate([[0], np.cumsum(per_row)]).astype(np.int64)
    small = pieces.size == 0 or pieces.max() < 1 << 31
    return row_offsets, pieces.astype(np.int32 if small else np.int64)


def _best_fit(lengths: np.ndarray, seq_len: int) -> np.ndarray:
    """Row of each piece, given in decreasing order of length.

    Pieces of one length are placed together: the row that holds the first of them has, if it holds
    a second, the least room for that too. So a row is filled with as many as it holds, and all
    rows of equal room are filled at once.
    """
    rows_with_room: list[list[np.ndarray]] = [[] for _ in range(seq_len + 1)]
    occupied = 0  # bit s is set where rows_with_room[s] is not empty
    num_rows = at = 0
    chosen = np.empty(len(lengths), np.int64)
    values, counts = np.unique(lengths, return_counts=True)
    for length, count in zip(values[::-1].tolist(), counts[::-1].tolist(), strict=True):
        while count:
            fitting = occupied >> length
            if fitting:
                room = length + (fitting & -fitting).bit_length() - 1
                rows = rows_with_room[room].pop()
                needed = -(-count // (room // length))
                if needed < len(rows):
                    rows_with_room[room].append(rows[:-needed])
                    rows = rows[-needed:]
                rows = rows[::-1]
                if not rows_with_room[room]:
                    occupied ^= 1 << room
            else:
                room = seq_len
                rows = np.arange(num_rows, num_rows - (-count // (room // length)))
                num_rows += len(rows)
            each = room // length
            placed = min(count, each * len(rows))
            chosen[at : at + placed] = np.repeat(rows, each)[:placed]
            at, count = at + placed, count - placed
            last = placed - each * (len(rows) - 1)  # pieces in the last row
            for filled, pieces in ((rows[:-1], each), (rows[-1:], last)):
                left = room - pieces * length
                if left and len(filled):
                    rows_with_room[left].append(filled)
                    occupied |= 1 << left
    return chosen


def make_plan(source: ArraySource, seq_len: int, tokenizer_fingerprint: str = "") -> PackPlan:
    """Packs the documents of `source`, in memory.

    Raises:
      ValueError: no document has two tokens.
    """
    row_offsets, pieces = pack(source.lengths, seq_len)
    if not len(pieces):
        raise ValueError(
            f"the {len(source)} documents of dataset {source.fingerprint} hold no (input, "
            "target) pair; each needs at least two tokens"
        )
    digest = hashlib.sha256(json.dumps(_key(source, seq_len, tokenizer_fingerprint)).encode())
    digest.update(np.ascontiguousarray(row_offsets, "<i8").data)
    digest.update(np.ascontiguousarray(pieces, "<i8").data)
    return PackPlan(
        row_offsets, pieces, seq_len, int(pieces[:, 2].sum(dtype=np.int64)), digest.hexdigest()[:32]
    )


def open_plan(
    source: ArraySource,
    seq_len: int,
    directory: str | os.PathLike[str],
    tokenizer_fingerprint: str = "",
) -> PackPlan:
    """The plan of `source` below `directory`, made and written there the first time.

    A plan is named by its dataset, tokenizer, sequence length and algorithm; its arrays are
    memory-mapped. Writing is atomic: processes that race write the same plan and one of them stays.
    Where nothing may be written the plan is made in memory.

    Raises:
      ValueError: as `make_plan`; or a plan on disk is damaged.
    """
    key = _key(source, seq_len, tokenizer_fingerprint)
    name = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:32]
    path = Path(directory) / name
    if not path.exists():
        plan = make_plan(source, seq_len, tokenizer_fingerprint)
        try:
            _write(plan, key, path)
        except OSError as error:
            if error.errno not in (errno.EROFS, errno.EACCES, errno.EPERM):
                raise
            logging.warning(
                "'%s' cannot be written (%s): the plan is made anew each time", path, error
            )
            return plan
    about = json.loads((path / "plan.json").read_text())
    plan = PackPlan(
        np.load(path / "row_offsets.npy", mmap_mode="r"),
        np.load(path / "pieces.npy", mmap_mode="r"),
        seq_len,
        about["num_pairs"],
        about["hash"],
    )
    damaged = (
        {k: about.get(k) for k in key} != key
        or plan.num_rows != about["num_rows"]
        or int(plan.row_offsets[-1]) != len(plan.pieces)
    )
    if damaged:
        raise ValueError(f"pack plan '{path}' does not match its plan.json; delete the directory")
    return plan


def _key(source: ArraySource, seq_len: int, tokenizer_fingerprint: str) -> dict[str, object]:
    return {
        "dataset": source.fingerprint,
        "tokenizer": tokenizer_fingerprint,
        "seq_len": seq_len,
        "algorithm": ALGORITHM,
        "version": VERSION,
    }


def _write(plan: PackPlan, key: dict[str, object], path: Path) -> None:
    about = key | {
        "hash": plan.hash,
        "num_rows": plan.num_rows,
        "num_pairs": plan.num_pairs,
        "num_pieces": len(plan.pieces),
        "waste": plan.waste,
    }
    with written_once(path) as partial:
        np.save(partial / "row_offsets.npy", plan.row_offsets)
        np.save(partial / "pieces.npy", plan.pieces)
        (partial / "plan.json").write_text(json.dumps(about, indent=2) + "\n")

"""Mixtures: which source a global row comes from, and how many rows that source gave before it.

A mixture with caps is a sequence of phases. In a phase the shares are fixed and exact in every
block of rows; it ends with the last row of a source that reaches its cap, whose share then goes to
the rest in proportion. There are no more phases than sources, so any row is found by arithmetic.
"""

import dataclasses
import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np

from lm.data.order import block_counts, block_pattern, derive_key


@dataclasses.dataclass(frozen=True)
class Share:
    """A source's part in a mixture. The smallest of its caps holds.

    Attributes:
      source: its name.
      weight: share of the rows, relative to the other sources' weights.
      max_epochs: times its rows may be read in the whole run; a fraction's rows are rounded down.
      max_rows: rows that may be read in the whole run.
      max_tokens: (input, target) pairs that may be read in the whole run; a row counts as full.
    """

    source: str
    weight: float = 1.0
    max_epochs: float | None = None
    max_rows: int | None = None
    max_tokens: int | None = None

    def limit(self, num_rows: int, seq_len: int) -> int | None:
        """Rows that may be read of a source of `num_rows` rows of `seq_len`; None for no end.

        Raises:
          ValueError: a cap that is not positive, or allows no row.
        """
        caps = []
        for name in ("max_epochs", "max_rows", "max_tokens"):
            value = getattr(self, name)
            if value is None:
                continue
            if not (math.isfinite(value) and value > 0):
                raise ValueError(
                    f"{name}={value} of source '{self.source}' must be above 0; leave it out for "
                    "no cap, or give the source weight 0"
                )
            if name == "max_epochs":  # 0.29 of 100 rows is 29, as the decimal number says
                rows = int(Fraction(str(value)) * num_rows)
            else:
                rows = int(value) // (seq_len if name == "max_tokens" else 1)
            if not rows:
                raise ValueError(
                    f"{name}={value} of source '{self.source}' allows not one of its {num_rows} "
                    f"rows of {seq_len} tokens; raise it"
                )
            caps.append(rows)
        return min(caps, default=None)


@dataclasses.dataclass(frozen=True)
class CappedShare:
    """A share with its caps in rows: all that the order of the data depends on."""

    source: str
    weight: float
    max_rows: int | None


@dataclasses.dataclass(frozen=True)
class Phase:
    """The global rows from `start` on, while the shares stay the same.

    Attributes:
      start: its first global row.
      sources: numbers of the sources that take part.
      counts: rows of each of them in a block.
      drawn: rows that every source has given before `start`.
      seed: of the order within blocks.
    """

    start: int
    sources: tuple[int, ...]
    counts: tuple[int, ...]
    drawn: tuple[int, ...]
    seed: int

    @property
    def block(self) -> int:
        return sum(self.counts)

    def locate(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(source, rows it gave before) of global rows of this phase: int64 of their shape."""
        numbers, within = np.divmod(rows - self.start, self.block)
        which, rank = np.empty_like(rows), np.empty_like(rows)
        for number in np.unique(numbers).tolist():
            here = numbers == number
            sources, ranks = self._pattern(number)
            which[here] = sources[within[here]]
            rank[here] = ranks[within[here]]
        base = np.asarray(self.drawn)[list(self.sources)]
        rank += base[which] + numbers * np.asarray(self.counts)[which]
        return np.asarray(self.sources)[which], rank

    def drawn_before(self, row: int) -> tuple[int, ...]:
        """Rows that every source has given before global row `row` of this phase."""
        number, within = divmod(row - self.start, self.block)
        partial = np.bincount(self._pattern(number)[0][:within], minlength=len(self.counts))
        drawn = list(self.drawn)
        for source, count, more in zip(self.sources, self.counts, partial.tolist(), strict=True):
            drawn[source] += number * count + more
        return tuple(drawn)

    def row_after(self, source: int, num_rows: int) -> int:
        """The global row that follows the `num_rows`-th that `source` gives in this phase."""
        i = self.sources.index(source)
        number, rank = divmod(num_rows - 1, self.counts[i])
        sources, _ = self._pattern(number)
        return self.start + number * self.block + int(np.flatnonzero(sources == i)[rank]) + 1

    def _pattern(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        return block_pattern(self.counts, derive_key(self.seed, 0, self.start, number))


def make_phases(
    start: int,
    shares: Sequence[CappedShare],
    numbers: Sequence[int],
    drawn: Sequence[int],
    seed: int,
    block: int,
) -> tuple[list[Phase], int | None]:
    """The phases of a mixture from global row `start` on, and the row at which all have run out.

    Args:
      shares: of the mixture.
      numbers: of their sources.
      drawn: rows that each source, by number, has given before `start`.

    Returns:
      (phases, end); `end` is None if a source has no cap.

    Raises:
      ValueError: weights that `block_counts` refuses, in any phase.
    """
    block_counts([share.weight for share in shares], block)
    phases: list[Phase] = []
    drawn = tuple(drawn)
    while True:
        live = [
            (number, share)
            for number, share in zip(numbers, shares, strict=True)
            if share.weight > 0 and (share.max_rows is None or drawn[number] < share.max_rows)
        ]
        if not live:
            return phases, start
        counts = block_counts([share.weight for _, share in live], block)
        phase = Phase(start, tuple(number for number, _ in live), counts, drawn, seed)
        phases.append(phase)
        ends = [
            phase.row_after(number, share.max_rows - drawn[number])
            for number, share in live
            if share.max_rows is not None
        ]
        if not ends:
            return phases, None
        start = min(ends)
        drawn = phase.drawn_before(start)

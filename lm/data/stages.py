"""Stages: which global rows a step reads, when batch size and mixture change and rows are skipped.

Global rows run on through the whole. A step reads the rows that follow those of the step before;
a skip at step s makes s and every later step begin that many rows further on. Neighbouring stages
with the same mixture are one as far as the order of rows goes, so a change of the batch size moves
no row.
"""

import bisect
import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from lm.data.mixtures import CappedShare, Phase, Share, make_phases


@dataclasses.dataclass(frozen=True)
class DataStage:
    """A part of a run.

    Attributes:
      batch_size: rows of a step, over all hosts.
      mixture: the sources' shares; None for every source by its number of rows.
      first_step: of the stage; it lasts until the next one begins.
    """

    batch_size: int
    mixture: tuple[Share, ...] | None = None
    first_step: int = 0


@dataclasses.dataclass(frozen=True)
class ActiveStage:
    """A stage with its caps in rows."""

    first_step: int
    batch_size: int
    shares: tuple[CappedShare, ...]

    def record(self) -> dict[str, Any]:
        """JSON's types, as a checkpoint stores it."""
        shares = [[s.source, s.weight, s.max_rows] for s in self.shares]
        return {"first_step": self.first_step, "batch_size": self.batch_size, "shares": shares}

    @classmethod
    def of_record(cls, record: dict[str, Any]) -> "ActiveStage":
        shares = tuple(CappedShare(*share) for share in record["shares"])
        return cls(record["first_step"], record["batch_size"], shares)


Skip = tuple[int, int]  # (step, rows)


class Timeline:
    """Steps to global rows, and global rows to (source, rank), for good.

    Args:
      names: of the sources; a source's number is its place here.
      stages: in order, the first from step 0.
      skips: (step, rows): how many rows the steps from `step` on begin further on.
      seed, block: of the mixtures.
      num_steps: steps the run will ask for, if known.

    Raises:
      ValueError: caps that end before the steps that need rows do.
    """

    def __init__(
        self,
        names: Sequence[str],
        stages: Sequence[ActiveStage],
        skips: Sequence[Skip],
        seed: int,
        block: int,
        num_steps: int | None = None,
    ):
        self.names, self.seed, self.block, self.num_steps = tuple(names), seed, block, num_steps
        self.skips = tuple(sorted(skips))
        self.stages = _merged(stages)
        self._phases: list[Phase] = []
        self._end: int | None = None
        shares: tuple[CappedShare, ...] | None = None
        for stage in self.stages:
            if stage.shares != shares:
                self._change_mixture(stage)
            shares = stage.shares
        self._starts = [phase.start for phase in self._phases]
        if num_steps:
            self._check_rows(num_steps)

    def _change_mixture(self, stage: ActiveStage) -> None:
        """Ends the phases at the first row of `stage` and appends those of its mixture."""
        drawn = (0,) * len(self.names)
        start = 0
        if self._phases:
            self._check_rows(stage.first_step)
            # Rows skipped at a stage's first step are its own.
            start = self._row(stage.first_step, stage.first_step - 1)
            self._phases = [phase for phase in self._phases if phase.start < start]
            drawn = self._phases[-1].drawn_before(start)
        numbers = [self.names.index(share.source) for share in stage.shares]
        phases, self._end = make_phases(start, stage.shares, numbers, drawn, self.seed, self.block)
        self._phases += phases
        if not phases:
            self._check_rows(stage.first_step + 1)

    def stage(self, step: int) -> ActiveStage:
        """The stage that a step belongs to."""
        return self.stages[bisect.bisect_right(self.stages, step, key=lambda s: s.first_step) - 1]

    def first_row(self, step: int) -> int:
        """The first global row of a step."""
        return self._row(step, step)

    def _row(self, step: int, last_skip: int) -> int:
        ends = [stage.first_step for stage in self.stages[1:]] + [step]
        read = sum(
            max(0, min(step, end) - stage.first_step) * stage.batch_size
            for stage, end in zip(self.stages, ends, strict=True)
        )
        return read + sum(rows for at, rows in self.skips if at <= last_skip)

    def _last_row(self, step: int) -> int:
        return self.first_row(step) + self.stage(step).batch_size

    def num_skipped(self, step: int) -> int:
        """Rows skipped up to the first row of a step."""
        return sum(rows for at, rows in self.skips if at <= step)

    def locate(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(source, rows it gave before) of global rows: int64 of their shape.

        Raises:
          ValueError: a row after the caps' end.
        """
        if self._end is not None and rows.size and rows.max() >= self._end:
            raise ValueError(self._exhausted(f"global row {rows.max()} is"))
        source, rank = np.empty_like(rows), np.empty_like(rows)
        phases = np.searchsorted(self._starts, rows, side="right") - 1
        for i in np.unique(phases).tolist():
            here = phases == i
            source[here], rank[here] = self._phases[i].locate(rows[here])
        return source, rank

    def drawn(self, step: int) -> tuple[int, ...]:
        """Rows of each source that were read or skipped before the first row of a step."""
        row = self.first_row(step)
        if self._end is not None:
            row = min(row, self._end)
        return self._phases[bisect.bisect_right(self._starts, row) - 1].drawn_before(row)

    def past(self, step: int) -> tuple[list[ActiveStage], list[Skip]]:
        """What decides the rows before a step, and where the step begins."""
        stages = [stage for stage in self.stages if stage.first_step < step]
        return stages, [(at, rows) for at, rows in self.skips if at <= step]

    def resume(self, step: int, stages: Sequence[ActiveStage], skips: Sequence[Skip]) -> "Timeline":
        """The past of `stages` and `skips` before `step`, and the stages of this one from it on."""
        past = [stage for stage in stages if stage.first_step < step]
        ends = [stage.first_step for stage in self.stages[1:]] + [None]
        future = [
            dataclasses.replace(stage, first_step=max(step, stage.first_step))
            for stage, end in zip(self.stages, ends, strict=True)
            if end is None or end > step
        ]
        known = {share.source: None for stage in past for share in stage.shares}
        names = list(dict.fromkeys([*self.names, *known]))
        return Timeline(names, past + future, skips, self.seed, self.block, self.num_steps)

    def skipped(self, step: int, rows: int) -> "Timeline":
        """This one with `rows` more skipped at `step`."""
        skips = [*self.skips, (step, rows)]
        return Timeline(self.names, self.stages, skips, self.seed, self.block, self.num_steps)

    def _check_rows(self, num_steps: int) -> None:
        """Raises ValueError unless the mixture in force has the rows of steps before this one."""
        needed = self._last_row(num_steps - 1)
        if self._end is not None and needed > self._end:
            raise ValueError(self._exhausted(f"{num_steps} steps need {needed} rows,", num_steps))

    def _exhausted(self, need: str, num_steps: int | None = None) -> str:
        assert self._end is not None
        stage = [s for s in self.stages if self._row(s.first_step, s.first_step - 1) <= self._end][
            -1
        ]
        high = num_steps or stage.first_step + self._end + 1
        steps = bisect.bisect_right(range(high), self._end, key=self._last_row)
        caps = ", ".join(f"{s.source} {s.max_rows}" for s in stage.shares if s.weight > 0)
        skipped = self.num_skipped(steps)
        return (
            f"{need} beyond what the caps of the mixture allow: {self._end} rows"
            + (f", {skipped} of them skipped" if skipped else "")
            + f", enough for {steps} steps (rows at most, by source: {caps}); raise max_epochs, "
            f"max_rows or max_tokens, or lower the number of steps to {steps}"
        )


def _merged(stages: Sequence[ActiveStage]) -> tuple[ActiveStage, ...]:
    """Neighbours that differ in nothing but their start made one."""
    merged: list[ActiveStage] = []
    for stage in stages:
        if merged and dataclasses.replace(stage, first_step=merged[-1].first_step) == merged[-1]:
            continue
        merged.append(stage)
    return tuple(merged)

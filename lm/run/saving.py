"""When a run is saved, and where to."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable

from lm.checkpoints import Checkpoints, Reference, SaveInterval
from lm.config.fields import Checked, Count, Positive
from lm.data.stream import Stream
from lm.run.loop import Kind
from lm.train.state import TrainState


@dataclasses.dataclass(frozen=True)
class Checkpointing(Checked):
    """Checkpoints beyond those that `intervals.save` asks for, and how long they stay.

    Attributes:
      keep: the last so many; none for all.
      keep_every: one of a step divisible by this stays for ever; none for no such step.
      save_minutes: one also where the last is this old; none for never.
      local: folder on each host's own disk for more frequent ones; none for no such.
      local_steps: how often, in steps.
      keep_local: how many of those.
    """

    keep: Count | None = None
    keep_every: Count | None = None
    save_minutes: Positive | None = None
    local: str = ""
    local_steps: Count = 10
    keep_local: Count = 2


class Saving:
    """Which checkpoint is due after a step, and the writing of it.

    Args:
      checkpoints: of the run.
      stream: whose place in the data is stored beside the state.
      config: minutes, and how often to the local disk.
      every: steps between durable checkpoints.
      frozen: where the frozen weights are, which are then not written again.
      report_failures: called before each save, with earlier ones that failed still unreported.
    """

    def __init__(
        self,
        checkpoints: Checkpoints,
        stream: Stream,
        config: Checkpointing,
        every: int,
        frozen: Reference | None = None,
        report_failures: Callable[[], None] = lambda: None,
    ) -> None:
        self.checkpoints, self.stream, self.frozen = checkpoints, stream, frozen
        self.report_failures = report_failures
        self.interval = SaveInterval(every, config.save_minutes)
        self.local_steps = config.local_steps if config.local else None
        self.last = time.monotonic()

    def due(self, done: int) -> Kind | None:
        """The kind of checkpoint that is due after `done` steps. Equal on all hosts."""
        if self.interval.due(done, time.monotonic(), self.last):
            return "durable"
        return "local" if self.local_steps and done % self.local_steps == 0 else None

    def save(self, state: TrainState, done: int, kind: Kind, ends: bool, spiking: bool) -> None:
        """Write a checkpoint of that kind; at the end of training wait until it is written.

        One made between skipped steps (`spiking`) takes no older one's place: the run may yet have
        to go back to that.
        """
        self.report_failures()
        metadata = {"data": self.stream.state(done)}
        if kind == "local":
            self.checkpoints.save_local(done, state, metadata)
        else:
            self.checkpoints.save(
                done, state, metadata, wait=ends, frozen=self.frozen, prune=not spiking
            )
            self.last = time.monotonic()

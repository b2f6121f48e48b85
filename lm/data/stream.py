"""What a training run asks of its data, whatever the batches hold."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Protocol, Self

if TYPE_CHECKING:
    from jax.sharding import NamedSharding

Batch = Mapping[str, Any]


class Stream(Protocol):
    """The batches of a run as a function of the step: `lm.data.batches.Batches`, or another.

    `sharding` is that of arrays [B, T]; a stream with other leaves takes their axes from it.
    """

    @property
    def num_rows(self) -> int:
        """Rows of one epoch."""
        ...

    @property
    def skips(self) -> Sequence[Any]:
        """What was passed over after rewinds."""
        ...

    def batch_size(self, step: int) -> int:
        """Rows of a step, over all hosts."""
        ...

    def seq_len(self, step: int) -> int:
        """Tokens of a row."""
        ...

    def num_tokens(self, step: int) -> float:
        """Tokens of the first `step` steps."""
        ...

    def epochs(self, step: int) -> Sequence[float]:
        """Epochs of each source in the first `step` steps."""
        ...

    def first_row(self, step: int) -> int:
        """Global rows before a step."""
        ...

    def prefetch(
        self, step: int, num_steps: int, *, sharding: NamedSharding
    ) -> AbstractContextManager[Iterator[Batch]]:
        """Global arrays of `num_steps` steps from `step` on."""
        ...

    def state(self, step: int) -> dict[str, Any]:
        """What a checkpoint stores to continue at `step`."""
        ...

    def resume(self, state: Any) -> Self:
        """This stream, going on from what a checkpoint stored. Raises ValueError if it cannot."""
        ...

    def skipped(self, at_step: int, rows: int) -> Self:
        """This stream with so many rows passed over before `at_step`."""
        ...


class HeldOutSet(Protocol):
    """Batches to evaluate on, each once: `lm.data.batches.HeldOut`, or another.

    Attributes:
      num_bytes: of their text, for bits per byte; None where that is not a figure of the set.
    """

    @property
    def num_bytes(self) -> int | None: ...

    def __len__(self) -> int: ...

    def device_batch(self, step: int, sharding: NamedSharding) -> Batch:
        """Batch `step` < len(self) as global arrays; see `Stream`."""
        ...

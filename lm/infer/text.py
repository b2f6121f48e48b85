"""Text of a growing sample, cut at the first text that stops it. Without JAX."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol


class Stream(Protocol):
    """Decodes token by token; see `lm.tokenizers.TextStream`."""

    def push(self, token_id: int) -> str: ...

    def finish(self) -> str: ...


class StoppedText:
    """Text that is certain as tokens arrive; what may become a stop text is held back.

    Attributes:
      text: text returned so far.
      stopped: whether a stop text was found.
    """

    def __init__(self, stream: Stream, stops: Sequence[str] = ()) -> None:
        self._stream, self._stops = stream, tuple(stops)
        self._held = ""
        self.text, self.stopped = "", False

    def push(self, token_id: int) -> str:
        """Adds a token; returns the text that became certain."""
        return self._give(self._stream.push(token_id), last=False)

    def finish(self) -> str:
        """Returns the text that was still held back."""
        return self._give(self._stream.finish(), last=True)

    def _give(self, new: str, last: bool) -> str:
        if self.stopped:
            return ""
        held = self._held + new
        found = [at for stop in self._stops if (at := held.find(stop)) >= 0]
        if found:
            self.stopped, certain = True, min(found)
        else:
            certain = len(held) if last else len(held) - self._open_end(held)
        out, self._held = held[:certain], held[certain:]
        self.text += out
        return out

    def _open_end(self, held: str) -> int:
        """Length of the longest end of `held` that begins a stop text."""
        longest = max((len(stop) - 1 for stop in self._stops), default=0)
        sizes = range(min(longest, len(held)), 0, -1)
        return next((n for n in sizes if any(s.startswith(held[-n:]) for s in self._stops)), 0)

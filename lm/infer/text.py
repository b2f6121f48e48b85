"""Text of a growing sample, cut at the first text that stops it. Without JAX."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Protocol

NO_TOKENS: Mapping[str, int] = {}
_FIRST_MARK = 0xDC00  # lone surrogates, which decoded text has none of


class Stream(Protocol):
    """Decodes token by token; see `lm.tokenizers.TextStream`."""

    def push(self, token_id: int) -> str: ...

    def finish(self) -> str: ...


class StoppedText:
    """Text that is certain as tokens arrive; what may become a stop text is held back.

    A stop text that names special tokens is met by these as well, which have no text of their own:
    while text is looked through, each stands in it as one character that no text has.

    Attributes:
      text: text returned so far.
      stopped: whether a stop text was found.
    """

    def __init__(
        self,
        stream: Stream,
        stops: Sequence[str] = (),
        special_tokens: Mapping[str, int] = NO_TOKENS,
    ) -> None:
        self._stream = stream
        names = [name for name in special_tokens if any(name in stop for stop in stops)]
        names.sort(key=len, reverse=True)
        marks = {name: chr(_FIRST_MARK + n) for n, name in enumerate(names)}
        self._marks = {special_tokens[name]: mark for name, mark in marks.items()}
        self._unmarked = dict.fromkeys(map(ord, marks.values()))
        found = re.compile("|".join(map(re.escape, names)) or "(?!)")
        marked = [found.sub(lambda match: marks[match[0]], stop) for stop in stops]
        self._stops = tuple(dict.fromkeys((*stops, *marked)))
        self._held = ""
        self.text, self.stopped = "", False

    def push(self, token_id: int) -> str:
        """Adds a token; returns the text that became certain."""
        return self._give(self._marks.get(token_id) or self._stream.push(token_id), last=False)

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
        out, self._held = held[:certain].translate(self._unmarked), held[certain:]
        self.text += out
        return out

    def _open_end(self, held: str) -> int:
        """Length of the longest end of `held` that begins a stop text."""
        longest = max((len(stop) - 1 for stop in self._stops), default=0)
        sizes = range(min(longest, len(held)), 0, -1)
        return next((n for n in sizes if any(s.startswith(held[-n:]) for s in self._stops)), 0)

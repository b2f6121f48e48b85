"""Where the wall time of a run goes, and the rates its steps reach. No JAX when imported.

Goodput is the share of wall time spent in steps that count; MFU, the share of the hardware's peak
that the model's own operations reach in those steps (arXiv:2204.02311, appendix B; attention
counted causal, as in `lm.model.train_flops`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import os
import threading
import time
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np

T = TypeVar("T")

KINDS = {
    "step": "steps that count",
    "compile": "tracing and compiling",
    "data_wait": "the device idle for want of data",
    "evaluation": "held-out data",
    "checkpoint": "saving, while training stood still",
    "restore": "reading a checkpoint",
    "start_up": "before the first step",
    "lost": "steps thrown away, or taken again",
    "other": "the rest",
}


@dataclasses.dataclass
class Span:
    """Time being spent; its kind may be changed until it ends."""

    kind: str
    seconds: float = 0.0


class Goodput:
    """Accounts for a process's wall time by kind: every moment belongs to exactly one of `KINDS`.

    `with timed(kind):` may nest, and the inner one takes its time from the outer one. Time outside
    is "start_up" before the first step and "other" after it. For one thread.

    Args:
      clock: seconds, never running backwards.
      already: seconds the process had lived when this was made (see `process_age`).
    """

    def __init__(self, *, clock: Callable[[], float] = time.monotonic, already: float = 0.0):
        self._clock = clock
        self._thread = threading.get_ident()
        self._closed = dict.fromkeys(KINDS, 0.0)
        self._open = [Span("start_up", already)]
        self._since = clock()
        self._compiled: list[tuple[float, float]] = []
        # Steps done, and the seconds in steps that counted when each was: for rewinding.
        self._steps, self._marks = array("q", [0]), array("d", [0.0])
        self.num_starts = 1

    @contextlib.contextmanager
    def timed(self, kind: str) -> Iterator[Span]:
        """The time inside is of this kind. ValueError names the kinds there are."""
        if kind not in KINDS:
            raise ValueError(f"time of kind {kind!r} is unknown; use {', '.join(KINDS)}")
        self._settle()
        span = Span(kind)
        self._open.append(span)
        try:
            yield span
        finally:
            self._settle()
            self._open.pop()
            self._closed[span.kind] += span.seconds
            if kind == "step" and self._open[0].kind == "start_up":
                self._closed["start_up"] += self._open[0].seconds
                self._open[0] = Span("other")

    def waiting(self, items: Iterable[T], busy: Callable[[], bool] = lambda: False) -> Iterator[T]:
        """The items, the time it takes to get each spent as "data_wait".

        A wait at whose end the device is still `busy` with earlier steps has cost nothing and is
        time of these steps; any other counts whole, so that the figure is an upper bound.
        """
        iterator = iter(items)
        while True:
            with self.timed("data_wait") as span:
                try:
                    item = next(iterator)
                except StopIteration:
                    return
                if busy():
                    span.kind = "step"
            yield item

    @contextlib.contextmanager
    def watch_compilation(self) -> Iterator[None]:
        """Inside, all that this thread traces, lowers and compiles counts as "compile".

        It is taken from the kind in force: a step that is compiled at its first call, or again for
        another shape, does not make training look slow.
        """
        monitoring = importlib.import_module("jax.monitoring")

        def heard(event: str, seconds: float, **_: Any) -> None:
            if event.startswith("/jax/core/compile/") and threading.get_ident() == self._thread:
                self.has_compiled(seconds)

        monitoring.register_event_duration_secs_listener(heard)
        try:
            yield
        finally:
            monitoring.unregister_event_duration_listener(heard)

    def has_compiled(self, seconds: float) -> None:
        """The last `seconds` went into compiling. Such times may contain one another."""
        now = self._settle()
        start = now - seconds
        while self._compiled and self._compiled[-1][1] > start:
            inner_start, inner_end = self._compiled.pop()
            seconds -= inner_end - max(inner_start, start)
            start = min(start, inner_start)
        self._compiled.append((start, now))
        span = self._open[-1]
        moved = min(max(seconds, 0.0), span.seconds)
        span.seconds -= moved
        self._closed["compile"] += moved

    def done(self, step: int) -> None:
        """`step` steps have been done by now."""
        self._steps.append(step)
        self._marks.append(self._total("step"))

    def rewind(self, step: int) -> float:
        """Training goes back to `step` steps done: the time since then is lost. Returns it."""
        at = float(np.interp(step, self._steps, self._marks))
        lost = max(self._total("step") - at, 0.0)
        self._closed["step"] -= lost
        self._closed["lost"] += lost
        while self._steps and self._steps[-1] >= step:
            self._steps.pop()
            self._marks.pop()
        self._steps.append(step)
        self._marks.append(at)
        return lost

    def resume(self, rows: Sequence[Mapping[str, Any]], step: int) -> None:
        """Goes on with the account of the processes before, from the rows of their metrics file.

        Call it before `MetricsWriter.truncate_after(step)`. Steps beyond `step`, to be taken again,
        are lost; their time, and that of a process that was killed, is known up to its last row.
        """
        accounts = [i for i, row in enumerate(rows) if row.get("event") == "goodput"]
        before = dict.fromkeys(KINDS, 0.0)
        if accounts:
            before |= {k: v for k, v in rows[accounts[-1]]["seconds"].items() if k in KINDS}
            self.num_starts += rows[accounts[-1]]["num_starts"]
        else:
            self.num_starts += any("event" not in row for row in rows)
        measured = [(i, row) for i, row in enumerate(rows) if "step_seconds" in row]
        if measured and measured[-1][0] > (accounts or [-1])[-1]:
            last = measured[-1][1]
            stepped = last["step_seconds"] - before["step"]
            before["other"] += max(last["seconds"] - sum(before.values()) - stepped, 0.0)
            before["step"] += stepped
        for kind, seconds in before.items():
            self._closed[kind] += seconds
        points = {0: 0.0} | {row["step"]: row["step_seconds"] for _, row in measured}
        self._steps = array("q", sorted(points))
        self._marks = array("d", (points[s] for s in self._steps))
        if self._steps[-1] >= step:
            self.rewind(step)

    @property
    def seconds(self) -> dict[str, float]:
        """Wall seconds of the run so far by kind, over all its processes."""
        self._settle()
        totals = dict(self._closed)
        for span in self._open:
            totals[span.kind] += span.seconds
        return totals

    @property
    def share(self) -> float:
        """Goodput: the share of wall time in steps that count."""
        seconds = self.seconds
        return seconds["step"] / max(sum(seconds.values()), 1e-9)

    def step_clock(self) -> float:
        """Seconds of stepping, thrown away later or not: a clock that stands still otherwise."""
        return self._total("step") + self._closed["lost"]

    def row(self) -> dict[str, float]:
        """For a row of metrics: `seconds` of wall time, and `step_seconds` of it that count."""
        seconds = self.seconds
        return {"seconds": sum(seconds.values()), "step_seconds": seconds["step"]}

    def event(self) -> dict[str, Any]:
        """Details of a "goodput" event: `share`, `seconds` by kind, `num_starts` of processes."""
        seconds = {kind: round(value, 3) for kind, value in self.seconds.items()}
        return {"share": round(self.share, 4), "seconds": seconds, "num_starts": self.num_starts}

    def _total(self, kind: str) -> float:
        self._settle()
        return self._closed[kind] + sum(span.seconds for span in self._open if span.kind == kind)

    def _settle(self) -> float:
        now = self._clock()
        self._open[-1].seconds += now - self._since
        self._since = now
        return now


def table(seconds: Mapping[str, float]) -> str:
    """Seconds by kind for reading: a headline, then a line for each kind that took any time."""
    total = max(sum(seconds.values()), 1e-9)
    shown = {kind: value for kind, value in seconds.items() if value >= 0.0005 * total}
    lines = [f"goodput {seconds['step'] / total:.1%} of {duration(total)}"]
    for kind, value in sorted(shown.items(), key=lambda item: -item[1]):
        name = kind.replace("_", " ")
        lines.append(f"  {name:<10} {duration(value):>9} {value / total:>7.1%}  {KINDS[kind]}")
    return "\n".join(lines)


def duration(seconds: float) -> str:
    """3723 -> '1:02:03'; 4.21 -> '4.2 s'."""
    return f"{seconds:.1f} s" if seconds < 9.95 else clock_time(seconds)


def clock_time(seconds: float) -> str:
    """3723 -> '1:02:03'; 4.21 -> '0:04'."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


def process_age() -> float:
    """Seconds since this process began, so that imports count as start-up; 0 where not known."""
    try:
        with open("/proc/self/stat") as file:
            ticks = int(file.read().rpartition(")")[2].split()[19])  # proc(5): starttime
    except OSError:
        return 0.0
    return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")


@dataclasses.dataclass(frozen=True)
class Hardware:
    """What turns tokens per second into tokens per second and device, and into MFU.

    Attributes:
      num_devices: of the whole run.
      flops_per_token: of training, `lm.model.train_flops`.
      peak_flops: of one device, per second, `lm.hardware.chips.peak_flops`; None for no MFU.
    """

    num_devices: int = 1
    flops_per_token: float = 0.0
    peak_flops: float | None = None

    def rates(self, tokens_per_second: float) -> dict[str, float]:
        """`tokens_per_second`, `tokens_per_second_per_device`, and `mfu` where it is known."""
        each = tokens_per_second / self.num_devices
        rates = {"tokens_per_second": tokens_per_second, "tokens_per_second_per_device": each}
        if self.peak_flops:
            rates["mfu"] = each * self.flops_per_token / self.peak_flops
        return rates


class Throughput:
    """Rates since the last reading, over the time of steps alone.

    Args:
      clock: stands still outside of steps: `Goodput.step_clock`.
      hardware: for the rates of a device.
    """

    def __init__(self, clock: Callable[[], float], hardware: Hardware | None = None):
        self._clock, self._hardware = clock, hardware or Hardware()
        self._tokens, self._start = 0.0, clock()

    def add(self, num_tokens: float) -> None:
        """A step of so many tokens is done."""
        self._tokens += num_tokens

    def read(self) -> dict[str, float]:
        """`Hardware.rates` of the tokens added since the last reading."""
        now = self._clock()
        rate = self._tokens / max(now - self._start, 1e-9)
        self._tokens, self._start = 0.0, now
        return self._hardware.rates(rate)

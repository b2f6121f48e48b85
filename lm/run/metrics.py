"""Metrics of a run: `metrics.jsonl`, TensorBoard event files, and a progress bar. No JAX.

`metrics.jsonl` holds one object per line: `{"step": 10, "loss": 3.1415927410125732, ...}` for what
was measured at a step, `{"event": "resumed", "step": 10}` for what happened. Floats are written in
full (`float(repr(x)) == x`); the numbers strict JSON lacks are the strings "NaN", "Infinity" and
"-Infinity", as in protobuf's JSON mapping, and `read` turns them back into floats.

What cannot be written, on a disk that is full, is lost and said to be; the run goes on.
"""

import contextlib
import errno
import functools
import importlib
import json
import math
import os
import pathlib
import resource
import socket
import struct
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from typing import Any, BinaryIO, TextIO

from absl import logging
from tqdm import tqdm

from lm.config.codec import NON_FINITE
from lm.files.base import replacing
from lm.run.goodput import Hardware, clock_time


class MetricsWriter:
    """Appends to `workdir/metrics.jsonl` and `workdir/tensorboard/`; a context manager.

    Opening cuts off a line torn by a crash. On resuming from step N, call `truncate_after(N)`
    first, so that no step appears twice. With `enabled=False` (any host but the first) nothing is
    written. Rows that a full disk does not take are lost; how many is an event, "rows_lost", as
    soon as there is room.
    """

    def __init__(
        self, workdir: str | os.PathLike, *, enabled: bool = True, tensorboard: bool = True
    ):
        self.path = pathlib.Path(workdir) / "metrics.jsonl"
        self.enabled = enabled
        self._events = EventFile(self.path.parent / "tensorboard", enabled and tensorboard)
        self._file: TextIO | None = None
        self._num_lost = 0
        if enabled:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self._open()

    def write(self, step: int, scalars: Mapping[str, Any]) -> None:
        """Writes one row. A scalar is a Python or NumPy number, or a 0-d array of any library.

        TypeError for anything else, and for the reserved names `step` and `event`.
        """
        if not self.enabled:
            return
        values = {name: _number(name, value) for name, value in scalars.items()}
        self._append({"step": int(step)} | values)
        self._events.write(int(step), values)

    def event(self, name: str, step: int, **details: Any) -> None:
        """Writes `{"event": name, "step": step, ...}`; details are JSON values."""
        if self.enabled:
            self._append({"event": name, "step": int(step)} | details)

    def truncate_after(self, step: int) -> int:
        """Drops rows of later steps, in TensorBoard too, and marks events of later steps as undone.

        For going on from an earlier step, after a kill or in a rewind. The file is replaced as a
        whole. Returns how many rows were dropped.
        """
        if not self.enabled:
            return 0
        rows = read(self.path)
        kept = [
            row | {"undone": True} if row.get("step", 0) > step else row
            for row in rows
            if "event" in row or row.get("step", 0) <= step
        ]
        if kept != rows:
            try:
                with replacing(self.path) as file:
                    file.write("".join(map(_line, kept)).encode())
            except OSError as error:  # the later of two rows of a step counts, for all who read
                logging.error("%s keeps what is undone: %s", self.path, error.strerror or error)
            self._drop_file()
        self._events.forget(step + 1)
        return len(rows) - len(kept)

    def close(self) -> None:
        self._events.close()
        self._drop_file()
        self.enabled = False

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _append(self, row: dict[str, Any]) -> None:
        try:
            if self._file is None:
                self._file = self._open()
            if self._num_lost:
                lost = {"event": "rows_lost", "step": row["step"], "rows": self._num_lost}
                self._file.write(_line(lost))
                self._num_lost = 0
            self._file.write(_line(row))  # line-buffered: it is in the file at once
        except OSError as error:
            if not self._num_lost:
                logging.error("%s: %s; rows are lost, training goes on", self.path, error.strerror)
            self._num_lost += 1
            self._drop_file()

    def _open(self) -> TextIO:
        _cut_torn_line(self.path)
        return self.path.open("a", encoding="utf-8", buffering=1)

    def _drop_file(self) -> None:
        """Closed, with what it still wanted to write; it is opened again when there is a row."""
        if self._file is not None:
            with contextlib.suppress(OSError):
                self._file.close()
        self._file = None


class EventFile:
    """Scalars for TensorBoard, each row one record (TFRecord of `Event`) in the file at once.

    tensorboardX's own writer has a thread that a full disk ends, and then waits for it for ever.
    """

    def __init__(self, folder: pathlib.Path, enabled: bool = True):
        self.folder, self.enabled = folder, enabled
        self._file: BinaryIO | None = None
        self._purge_step: int | None = None
        self._failing = False

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """One row; lost, and said to be, where it cannot be written."""
        if self.enabled:
            proto = _tensorboardx("proto.summary_pb2")
            shown = [proto.Summary.Value(tag=k, simple_value=v) for k, v in values.items()]
            self._write({"step": step, "summary": proto.Summary(value=shown)})

    def forget(self, step: int) -> None:
        """TensorBoard forgets what earlier files have of `step` and later ones."""
        self.close()
        self._purge_step = step
        if self.enabled and self.folder.exists():
            self._write()  # should this process be killed before its first row

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
        self._file = None

    def _write(self, *events: Mapping[str, Any]) -> None:
        try:
            if self._file is None:
                # Opened at the first value, when it is known which steps are to be forgotten.
                self.folder.mkdir(parents=True, exist_ok=True)
                now = time.time_ns()  # whole seconds alone: a quick restart would share the file
                name = f"events.out.tfevents.{now // 10**9}.{socket.gethostname()}.{now}"
                self._file = (self.folder / name).open("ab", buffering=0)
                begins: list[Mapping[str, Any]] = [{"file_version": "brain.Event:2"}]
                if self._purge_step is not None:
                    begins.append({"step": self._purge_step, "session_log": {"status": "START"}})
                events = (*begins, *events)
            data = b"".join(map(_record, events))
            if self._file.write(data) < len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            self._purge_step, self._failing = None, False
        except OSError as error:
            if not self._failing:
                logging.error(
                    "%s: %s; rows are lost, training goes on", self.folder, error.strerror
                )
            self._failing = True
            self.close()  # a record may be torn: the next begins a new file


def read(path: str | os.PathLike) -> list[dict[str, Any]]:
    """The rows of a metrics file, which may still be growing: an unfinished last line is left out.

    A line that a crash or a full disk left damaged is passed over, and named with its number.
    """
    rows = []
    *lines, _ = pathlib.Path(path).read_text("utf-8", errors="replace").split("\n")
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            if not isinstance(row, dict) or not isinstance(row["step"], int):
                raise ValueError("not a row")
        except (ValueError, KeyError, RecursionError):
            logging.warning("%s:%d is passed over: not a row: %.80r", path, number, line)
            continue
        rows.append({
            key: NON_FINITE.get(value, value) if isinstance(value, str) else value
            for key, value in row.items()
        })  # fmt: skip
    return rows


def _number(name: str, value: Any) -> int | float:
    if name in ("step", "event"):
        raise TypeError(f"{name!r} is a reserved name of a metrics row; choose another")
    if isinstance(value, bool | int):
        return int(value)
    shape = getattr(value, "shape", ())
    if isinstance(value, str | bytes) or shape != ():
        kind = f"shape {shape}" if shape else repr(value)
        raise TypeError(f"metric {name!r} must be a scalar, not {kind}; reduce it first")
    kind = getattr(getattr(value, "dtype", None), "kind", "f")
    return int(value) if kind in "iub" else float(value)


def _line(row: Mapping[str, Any]) -> str:
    return json.dumps(to_json(row), allow_nan=False) + "\n"


def to_json(value: Any) -> Any:
    """The same in JSON's types: numbers that strict JSON lacks as "NaN", "Infinity" and so on."""
    if isinstance(value, Mapping):
        return {name: to_json(each) for name, each in value.items()}
    if isinstance(value, list):
        return [to_json(each) for each in value]
    if isinstance(value, float) and not math.isfinite(value):
        return json.dumps(value)
    return value


def _cut_torn_line(path: pathlib.Path) -> None:
    """Cuts the file after its last whole line: a crash may leave half of one, or NUL bytes."""
    if not path.exists() or not path.stat().st_size:
        return
    with path.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        if file.read() != b"\n":
            file.seek(0)
            file.truncate(file.read().rfind(b"\n") + 1)


def _record(event: Mapping[str, Any]) -> bytes:
    """A TFRecord: length, its checksum, the event, its checksum; little-endian."""
    data = _tensorboardx("proto.event_pb2").Event(wall_time=time.time(), **event)
    data = data.SerializeToString()
    checksum = _tensorboardx("record_writer").masked_crc32c
    length = struct.pack("<Q", len(data))
    sums = (struct.pack("<I", checksum(part)) for part in (length, data))
    return b"".join((length, next(sums), data, next(sums)))


@functools.cache
def _tensorboardx(module: str) -> Any:
    """A module of tensorboardX, imported without PyTorch, which it would load where installed."""
    name = f"tensorboardX.{module}"
    if "torch" in sys.modules:
        return importlib.import_module(name)
    sys.modules["torch"] = None  # type: ignore[assignment]  # makes `import torch` an ImportError
    try:
        return importlib.import_module(name)
    finally:
        del sys.modules["torch"]


def memory(devices: Iterable[Any]) -> dict[str, int]:
    """Bytes of memory in use, under a name that says which.

    Args:
      devices: `jax.local_devices()`.

    Returns:
      `device_memory_bytes` and `device_memory_peak_bytes`, of the fullest device, where the backend
      reports them (GPU, TPU); else `host_memory_bytes`, the process's resident set, or
      `host_memory_peak_bytes` where the system reports no more.
    """
    if known := [stats for device in devices if (stats := device.memory_stats())]:
        return {
            f"device_memory_{name}": max(int(stats.get(key, 0)) for stats in known)
            for name, key in (("bytes", "bytes_in_use"), ("peak_bytes", "peak_bytes_in_use"))
        }
    try:
        resident = int(pathlib.Path("/proc/self/statm").read_text().split()[1])  # proc(5), in pages
    except OSError:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return {"host_memory_peak_bytes": peak * (1 if sys.platform == "darwin" else 1024)}
    return {"host_memory_bytes": resident * resource.getpagesize()}


class Progress:
    """Shows how training goes in one line of at most the terminal's width, or 100 columns.

    A bar on a terminal, else a line now and then: step, loss, gradient norm, learning rate, tokens
    per second (of all devices and of one), MFU, memory, steps skipped, and the time left. Where
    they do not all fit, the ones that matter least are left out.

    Args:
      num_steps: of the run.
      start: steps done before.
      clock: seconds of stepping; `Goodput.step_clock` counts nothing else.
      hardware: for the rates of a device.
      enabled: whether anything is shown.
      stream: standard error by default.
    """

    SECONDS_BETWEEN_LINES = 15.0

    def __init__(
        self,
        num_steps: int,
        *,
        start: int = 0,
        clock: Callable[[], float] = time.monotonic,
        hardware: Hardware | None = None,
        enabled: bool = True,
        stream: TextIO | None = None,
    ):
        self.num_steps = num_steps
        self._enabled, self._stream, self._clock = enabled, stream or sys.stderr, clock
        self._hardware = hardware or Hardware()
        self._last_line = -math.inf
        # (time, step, tokens so far) at the last updates; the rate is over this window.
        self._marks: deque[tuple[float, int, int]] = deque(maxlen=50)
        self._tokens = 0
        self._values: dict[str, float] = {}
        self._bar: tqdm | None = None
        if enabled and self._stream.isatty():
            self._bar = tqdm(
                total=num_steps,
                initial=start,
                file=self._stream,
                ncols=self._columns(),
                bar_format="{percentage:3.0f}% |{bar}| {n_fmt}/{total_fmt}{postfix}",
            )

    def update(self, step: int, *, loss: float, num_tokens: int, **values: float) -> None:
        """Shows that `step` is done, with `num_tokens` more tokens since the last update.

        Of `values`, those named as in a metrics row are shown: `grad_norm`, `learning_rate`,
        `skipped_steps`, and what `memory` returns. One that is not given again stays.
        """
        now = self._clock()
        self._tokens += num_tokens
        self._values |= values
        self._marks.append((now, step, self._tokens))
        if self._bar is not None:
            self._bar.ncols = self._columns()
            room = self._bar.ncols - len(f"100% |{' ' * 10}| {step}/{self.num_steps}, ")
            self._bar.set_postfix_str(_fit(self._parts(loss), room), refresh=False)
            self._bar.update(step - self._bar.n)
            return
        due = now - self._last_line >= self.SECONDS_BETWEEN_LINES or step >= self.num_steps
        if self._enabled and due:
            self._last_line = now
            start = f"step {step}/{self.num_steps}  "
            line = start + _fit(self._parts(loss), 100 - len(start))
            print(line, file=self._stream, flush=True)

    def _parts(self, loss: float) -> list[tuple[int, str]]:
        """(rank, text) from left to right; rank 0 is never left out, the highest goes first."""
        values, parts = self._values, [(0, f"loss {float(loss):.4f}")]
        if "grad_norm" in values:
            parts.append((2, f"grad {values['grad_norm']:.3g}"))
        if "learning_rate" in values:
            parts.append((3, f"lr {values['learning_rate']:.2e}".replace("e-0", "e-")))
        (start, first, before), (now, last, after) = self._marks[0], self._marks[-1]
        if seconds := len(self._marks) > 1 and max(now - start, 1e-9):
            rates = self._hardware.rates((after - before) / seconds)
            parts.append((0, f"{_shown(rates['tokens_per_second'])} tok/s"))
            if self._hardware.num_devices > 1:
                parts.append((5, f"{_shown(rates['tokens_per_second_per_device'])}/device"))
            if "mfu" in rates:
                parts.append((1, f"MFU {rates['mfu']:.1%}"))
        if memory := [name for name in _MEMORY if name in values]:
            parts.append((4, f"{_MEMORY[memory[0]]}{values[memory[0]] / 1e9:.3g} GB"))
        if values.get("skipped_steps"):
            parts.append((0, f"{values['skipped_steps']:.0f} skipped"))
        if seconds:
            left = (self.num_steps - last) * seconds / (last - first)
            parts.append((0, f"{clock_time(left)} left"))
        return parts

    def _columns(self) -> int:
        try:
            return os.get_terminal_size(self._stream.fileno()).columns or 100
        except (OSError, ValueError):
            return 100

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


_MEMORY = {
    "device_memory_peak_bytes": "",
    "host_memory_bytes": "host ",
    "host_memory_peak_bytes": "host ",
}


def _fit(parts: list[tuple[int, str]], width: int) -> str:
    """The parts side by side, those of the highest ranks left out until `width` holds the rest."""
    while sum(len(text) + 2 for _, text in parts) - 2 > width and any(rank for rank, _ in parts):
        parts = [part for part in parts if part != max(parts, key=lambda part: part[0])]
    return "  ".join(text for _, text in parts)


def _shown(per_second: float) -> str:
    return f"{per_second:,.0f}" if per_second < 1e7 else f"{per_second / 1e6:,.4g}M"

"""A metrics file survives crashes and resumes; the throughput counts only what it should."""

import contextlib
import io
import json
import math
import re
import resource
import struct
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lm.run.goodput import Hardware
from lm.run.metrics import MetricsWriter, Progress, memory, read


def lines(workdir):
    return (workdir / "metrics.jsonl").read_text().splitlines()


@given(st.lists(st.floats(), max_size=5))
def test_floats_come_back_bit_for_bit(tmp_path_factory, values):
    workdir = tmp_path_factory.mktemp("run")
    with MetricsWriter(workdir, tensorboard=False) as writer:
        for step, value in enumerate(values):
            writer.write(step, {"loss": value})
    for row, value in zip(read(workdir / "metrics.jsonl"), values, strict=True):
        if math.isnan(value):
            assert math.isnan(row["loss"])
        else:
            assert struct.pack("<d", row["loss"]) == struct.pack("<d", value)


def test_rows_are_strict_json_with_the_rule_for_other_numbers(tmp_path):
    with MetricsWriter(tmp_path, tensorboard=False) as writer:
        writer.write(3, {"a": math.nan, "b": math.inf, "c": -math.inf, "d": 0.1})
        row = '{"step": 3, "a": "NaN", "b": "Infinity", "c": "-Infinity", "d": 0.1}'
        assert lines(tmp_path) == [row]  # it has reached the file at once
        writer.event("resumed", step=3, nested={"a": [math.nan, 1.0]}, none=None)
    found = {"event": "resumed", "step": 3, "nested": {"a": ["NaN", 1.0]}, "none": None}
    assert json.loads(lines(tmp_path)[1]) == found


def test_scalars_of_any_library(tmp_path):
    values = (np.float32(0.1), jnp.float32(0.1), jnp.bfloat16(1.5), np.int64(7), jnp.int32(7),
              np.array(2.5), True)  # fmt: skip
    with MetricsWriter(tmp_path, tensorboard=False) as writer:
        writer.write(1, {str(i): value for i, value in enumerate(values)})
    (row,) = read(tmp_path / "metrics.jsonl")
    rounded = 0.10000000149011612
    expected = {str(i): x for i, x in enumerate([rounded, rounded, 1.5, 7, 7, 2.5, 1])}
    assert repr(row) == repr({"step": 1} | expected)  # 7 is not 7.0


@pytest.mark.parametrize("value", [np.zeros(1), "text"])
def test_what_is_no_scalar_is_refused_by_name(tmp_path, value):
    with MetricsWriter(tmp_path, tensorboard=False) as writer:
        with pytest.raises(TypeError, match="metric 'grads' must be a scalar, not"):
            writer.write(1, {"loss": 1.0, "grads": value})
        with pytest.raises(TypeError, match="'step' is a reserved name"):
            writer.write(1, {"step": 2})
    assert lines(tmp_path) == []


@pytest.mark.parametrize("cut", range(1, 25))
def test_a_torn_line_is_cut_wherever_it_was_torn(tmp_path, cut):
    with MetricsWriter(tmp_path, tensorboard=False) as writer:
        writer.write(1, {"loss": 1.0})
        writer.write(2, {"loss": 2.25})
    path = tmp_path / "metrics.jsonl"
    data = path.read_bytes()
    path.write_bytes(data[:-cut])
    assert [row["step"] for row in read(path)] == [1]
    with MetricsWriter(tmp_path, tensorboard=False) as writer:
        writer.write(2, {"loss": 2.25})
    assert path.read_bytes() == data


BROKEN = (
    '{"st', "\0" * 40, '\0\0{"step": 9}', '{"step": 1, "lo{"step": 2}', "[1]", '"a"', "3", "{}",
    '{"step": null}', "[" * 9999,
)  # fmt: skip


def test_a_damaged_line_is_passed_over_with_its_number(tmp_path, caplog):
    path = tmp_path / "metrics.jsonl"
    path.write_text("\n".join(['{"step": 1}', *BROKEN, '{"step": 3, "loss": "NaN"}', ""]))
    assert [row["step"] for row in read(path)] == [1, 3]
    found = [re.search(r"metrics\.jsonl:(\d+) is passed over", r.message) for r in caplog.records]
    assert [int(each[1]) for each in found if each] == list(range(2, 2 + len(BROKEN)))
    with MetricsWriter(tmp_path, tensorboard=False) as writer:
        assert writer.truncate_after(2) == 1
    assert lines(tmp_path) == ['{"step": 1}']


@contextlib.contextmanager
def room_for(num_bytes):
    """No file can be larger: writes stop in the middle, as on a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_rows_that_find_no_room_are_lost_and_counted(tmp_path, caplog):
    """Not the run; TensorBoard neither, whatever of a record was written."""
    with MetricsWriter(tmp_path) as writer:
        writer.write(1, {"loss": 1.0})
        size = (tmp_path / "metrics.jsonl").stat().st_size
        with room_for(size + 8):
            for step in range(2, 31):
                writer.write(step, {"loss": 1.0})
            writer.event("note", 30)
            assert writer.truncate_after(28) == 0
        writer.write(29, {"loss": 3.0})
    lost = {"event": "rows_lost", "step": 29, "rows": 30}
    assert read(tmp_path / "metrics.jsonl")[1:] == [lost, {"step": 29, "loss": 3.0}]
    assert len([r for r in caplog.records if "rows are lost" in r.message]) == 2
    steps = {e.step for e in tensorboard_events(tmp_path) if e.summary.value}
    assert {1, 29} <= steps


def test_resuming_repeats_no_step_and_events_outlive_theirs(tmp_path):
    with MetricsWriter(tmp_path, tensorboard=False) as writer:
        writer.event("started", step=0)
        for step in range(1, 8):
            writer.write(step, {"loss": float(step)})
        before = lines(tmp_path)
        writer.event("save_failed", step=6, reason="disk full")
    with MetricsWriter(tmp_path, tensorboard=False) as writer:
        assert writer.truncate_after(4) == 3
        writer.event("resumed", step=4)
        for step in range(5, 8):
            writer.write(step, {"loss": float(step)})
    rows = read(tmp_path / "metrics.jsonl")
    failed = {"event": "save_failed", "step": 6, "reason": "disk full", "undone": True}
    assert rows[5:7] == [failed, {"event": "resumed", "step": 4}]
    after = lines(tmp_path)
    assert [line for line in after if "undone" not in line and "resumed" not in line] == before
    with MetricsWriter(tmp_path, tensorboard=False) as writer:
        assert writer.truncate_after(7) == 0
        assert lines(tmp_path) == after
        assert writer.truncate_after(3) == 4
    assert read(tmp_path / "metrics.jsonl")[4:] == [failed, rows[6] | {"undone": True}]


KILLED = """
import itertools, sys
from lm.run.metrics import MetricsWriter
start = int(sys.argv[2])
with MetricsWriter(sys.argv[1]) as writer:
    for step in itertools.count(start + 1):
        writer.write(step, {"loss": 1 / step, "padding": 0.1 * step})
        if step % 10 == 0:
            writer.event("note", step, text="x" * (step % 700))
        if step == start + 200:
            print("going", flush=True)
"""


def test_a_writer_killed_at_any_moment_leaves_whole_rows(tmp_path):
    """In a row or in a TensorBoard record; the run goes on, and no step is there twice."""
    for start, target in ((0, 150), (150, 300), (300, 450)):
        command = [sys.executable, "-c", KILLED, str(tmp_path), str(start)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE)
        assert process.stdout is not None
        with process.stdout:
            assert process.stdout.readline() == b"going\n"
            process.kill()
        process.wait(60)
        with MetricsWriter(tmp_path) as writer:
            assert writer.truncate_after(target) >= 50
            writer.event("resumed", target)
    rows = [row for row in read(tmp_path / "metrics.jsonl") if "event" not in row]
    assert [row["step"] for row in rows] == list(range(1, 451))
    assert all(row["loss"] == 1 / row["step"] for row in rows)
    with MetricsWriter(tmp_path) as writer:
        writer.truncate_after(450)
        writer.write(451, {"loss": 0.5})
    events = tensorboard_events(tmp_path)
    assert [e.step for e in events if e.HasField("session_log")] == [151, 301, 451, 451]
    shown = {
        event.step: value.simple_value
        for event in events
        for value in event.summary.value
        if value.tag == "loss"
    }
    assert set(range(1, 452)) <= set(shown)
    assert shown[451] == 0.5


def test_other_hosts_write_nothing(tmp_path):
    with MetricsWriter(tmp_path / "run", enabled=False) as writer:
        writer.write(1, {"loss": 1.0})
        writer.event("resumed", step=1)
        assert writer.truncate_after(0) == 0
    assert not (tmp_path / "run").exists()


def tensorboard_events(workdir):
    """Events of all files, oldest first, by the TFRecord framing: length, crc, payload, crc."""
    from tensorboardX.proto import event_pb2

    events = []
    for path in sorted((workdir / "tensorboard").iterdir(), key=lambda p: p.name.split(".")[-1]):
        data = path.read_bytes()
        while len(data) >= 8:
            (length,) = struct.unpack_from("<Q", data)
            if len(data) < 16 + length:  # torn by a kill
                break
            event = event_pb2.Event()
            event.ParseFromString(data[12 : 12 + length])
            events.append(event)
            data = data[16 + length :]
    return events


def test_metrics_load_neither_jax_nor_torch(tmp_path):
    program = (
        "import sys; from lm.run import metrics\n"
        f"with metrics.MetricsWriter({str(tmp_path)!r}) as writer: writer.write(1, {{'x': 1.0}})\n"
        "assert 'tensorboardX' in sys.modules\n"
        "print(sorted({'jax', 'torch', 'tensorflow'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.strip() == "[]"


class Clock:
    now = 100.0

    def __call__(self):
        return self.now


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_lines_appear_at_intervals_and_at_the_end():
    clock, stream = Clock(), io.StringIO()
    with Progress(20, start=10, stream=stream, clock=clock) as progress:
        for step in range(11, 21):
            clock.now += 6.0
            progress.update(step, loss=3.14159, num_tokens=6_000_000)
    shown = stream.getvalue().splitlines()
    assert [line.split("  ")[0] for line in shown] == [
        "step 11/20", "step 14/20", "step 17/20", "step 20/20",
    ]  # fmt: skip
    assert shown[1] == "step 14/20  loss 3.1416  1,000,000 tok/s  0:36 left"
    silent = io.StringIO()
    Progress(1, stream=silent, enabled=False).update(1, loss=1.0, num_tokens=10)
    assert silent.getvalue() == ""


EVERYTHING = {
    "grad_norm": 123.456789,
    "learning_rate": 1.2345e-4,
    "skipped_steps": 12,
    "device_memory_bytes": 1,
    "device_memory_peak_bytes": 123.4e9,
    "held_out_loss": 3.0,
}


@pytest.mark.parametrize("stream", [Terminal(), io.StringIO()])
@pytest.mark.parametrize("scale", [1, 1000])
def test_the_line_stays_one_line_of_100_columns(stream, scale):
    clock = Clock()
    hardware = Hardware(4096, 5e11, 459e12)
    with Progress(10**6, stream=stream, clock=clock, hardware=hardware) as progress:
        for step in range(123_450, 123_456):
            clock.now += 20.0
            tokens = 4_000_000 * scale
            progress.update(step, loss=3.14159, num_tokens=tokens, **EVERYTHING)
    (*_, last) = [line for line in re.split(r"[\r\n]+", stream.getvalue()) if line.strip()]
    assert len(last) <= 100
    wanted = ["loss 3.1416", " tok/s", "MFU ", "12 skipped", " left"]
    assert all(words in last for words in wanted)
    assert ("|" in last) == stream.isatty()
    assert "123455/1000000" in last


def test_the_line_shows_what_there_is_room_for():
    clock, stream = Clock(), io.StringIO()
    hardware = Hardware(8, 3e6, 1e9)
    with Progress(20, stream=stream, clock=clock, hardware=hardware) as progress:
        for step in (1, 2):
            clock.now += 20.0
            progress.update(
                step, loss=3.0, num_tokens=16_000, grad_norm=0.5, learning_rate=3e-4,
                device_memory_peak_bytes=12.3e9, skipped_steps=0,
            )  # fmt: skip
    # 800 tokens/s are 100 a device: 3e8 operations a second of 1e9.
    assert stream.getvalue().splitlines()[1] == (
        "step 2/20  loss 3.0000  grad 0.5  lr 3.00e-4  800 tok/s  100/device  MFU 30.0%  "
        "12.3 GB  6:00 left"
    )


class Device:
    def __init__(self, stats):
        self.memory_stats = lambda: stats


def test_memory_is_the_fullest_devices_where_the_backend_tells():
    devices = [
        Device({"bytes_in_use": 5, "peak_bytes_in_use": 9, "bytes_limit": 16}),
        Device({"bytes_in_use": 7, "peak_bytes_in_use": 8, "bytes_limit": 16}),
    ]
    assert memory(devices) == {"device_memory_bytes": 7, "device_memory_peak_bytes": 9}


def test_memory_is_the_hosts_where_the_backend_is_silent():
    before = memory([Device(None)])
    block = np.ones(100_000_000, np.uint8)
    after = memory(jax.local_devices())
    assert before.keys() == after.keys() == {"host_memory_bytes"}
    assert after["host_memory_bytes"] - before["host_memory_bytes"] > 0.8 * block.nbytes

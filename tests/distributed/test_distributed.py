"""Runs of several processes: they find each other, compute the same, and end together."""

from __future__ import annotations

import contextlib
import os
import pathlib
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from lm.distributed.collectives import broadcast
from lm.distributed.guard import PEER_FAILED
from lm.distributed.preemption import PreemptionNotice
from lm.distributed.startup import start
from scripts.run_local import environment, free_port
from tests.distributed import worker

ROOT = pathlib.Path(__file__).resolve().parents[2]
PATIENCE = 300.0  # seconds, for a machine that does much else
RESUME = "Start the same command again on all hosts to go on from the last checkpoint"


class Run:
    """Two processes of `tests.distributed.worker`, their output in files."""

    def __init__(self, folder: pathlib.Path, *args: str, devices: int = 1) -> None:
        self.files = [folder / f"{i}.out" for i in (0, 1)]
        port = free_port()
        self.processes = []
        for i, file in enumerate(self.files):
            with file.open("wb") as stream:
                process = subprocess.Popen(
                    [sys.executable, "-m", "tests.distributed.worker", *args],
                    env=environment(i, 2, devices, port, os.environ),
                    stdout=stream, stderr=subprocess.STDOUT, cwd=ROOT,
                )  # fmt: skip
            self.processes.append(process)

    def output(self, i: int) -> str:
        return self.files[i].read_text(errors="replace")

    def wait_for(self, text: str, i: int | None = None) -> None:
        """Until all have printed `text`, and run on; or `i` has, or its watchdog a moment later."""
        deadline = time.monotonic() + PATIENCE
        while not all(text in self.output(j) for j in ((0, 1) if i is None else (i,))):
            ended = [p.returncode for p in self.processes if i is None and p.poll() is not None]
            assert not ended and time.monotonic() < deadline, (ended, *map(self.output, (0, 1)))
            time.sleep(0.05)

    def statuses(self) -> list[int]:
        deadline = time.monotonic() + PATIENCE
        return [p.wait(max(0.1, deadline - time.monotonic())) for p in self.processes]


@pytest.fixture
def launch(tmp_path):
    with contextlib.ExitStack() as stack:

        def launch(*args: str, **kwargs: int) -> Run:
            run = Run(tmp_path, *args, **kwargs)
            for process in run.processes:
                stack.callback(process.wait, 30)
                stack.callback(process.kill)
            return run

        yield launch


def test_sigterm_on_one_process_ends_all_at_one_step(launch):
    run = launch("loop")
    run.wait_for("READY")
    run.processes[1].send_signal(signal.SIGTERM)
    assert run.statuses() == [PreemptionNotice.EXIT] * 2
    steps = [run.output(i).partition("AGREED ")[2].split()[0] for i in (0, 1)]
    assert steps[0] == steps[1] and int(steps[0]) > 5
    # What the processes exchanged before the first step.
    for i in (0, 1):
        assert run.output(i).count("RECEIVED true") == 4 and "RECEIVED false" not in run.output(i)
    assert "SAID by 0" in run.output(0) and "SAID" not in run.output(1)


@pytest.mark.parametrize(
    ("victim", "number"),
    [
        (1, signal.SIGKILL),
        pytest.param(0, signal.SIGKILL, marks=pytest.mark.slow),
        pytest.param(1, signal.SIGSTOP, marks=pytest.mark.slow),
        pytest.param(0, signal.SIGSTOP, marks=pytest.mark.slow),
    ],
)
def test_a_dead_or_hung_process_ends_the_others(launch, victim, number):
    run = launch("loop", "--timeout=10")
    run.wait_for("READY")
    run.processes[victim].send_signal(number)
    statuses = run.statuses()
    # Where the service is gone, the runtime aborts at once and is faster than the watch.
    assert statuses[1 - victim] in (
        (PEER_FAILED, -signal.SIGABRT) if victim == 0 else (PEER_FAILED,)
    )
    assert statuses[victim] == -signal.SIGKILL, "a hung process is killed, and leaves its devices"
    what = "was killed or crashed" if number == signal.SIGKILL else "stopped answering"
    run.wait_for(f") {what}; the run ends. {RESUME}", 1 - victim)
    assert f"host {victim} of 2 (" in run.output(1 - victim)


@pytest.mark.parametrize("failing", [1, pytest.param(0, marks=pytest.mark.slow)])
def test_an_exception_in_one_process_ends_the_others(launch, failing):
    run = launch("loop", f"--failing={failing}")
    statuses = run.statuses()
    assert statuses[failing] == 1 and statuses[1 - failing] == PEER_FAILED
    assert "Traceback" in run.output(failing)
    reason = "ended with FloatingPointError: the loss of step 10 is nan; the run ends"
    assert reason in run.output(1 - failing) and reason not in run.output(failing)


def test_two_processes_compute_what_one_does(launch, tmp_path):
    """Loss, gradients and held-out loss; batches read by each process for its own devices."""
    run = launch("train", f"--path={tmp_path / 'two.npz'}", devices=4)
    worker.train_once(tmp_path / "one.npz")  # 8 devices
    assert run.statuses() == [0, 0], run.output(0)
    one, two = np.load(tmp_path / "one.npz"), np.load(tmp_path / "two.npz")
    assert one.files == two.files and len(one.files) > 14
    for name in one.files:
        largest = np.max(np.abs(one[name]))
        assert largest > 0, name
        np.testing.assert_allclose(two[name], one[name], rtol=0, atol=1e-6 * largest, err_msg=name)


def test_alone_nothing_is_started(monkeypatch):
    for name in ("LM_COORDINATOR", "LM_NUM_PROCESSES", "LM_PROCESS_ID"):
        monkeypatch.delenv(name, raising=False)
    import jax

    with start():
        assert not jax.distributed.is_initialized()
        assert broadcast({"a": 1}) == {"a": 1}
    with pytest.raises(ZeroDivisionError), start("localhost:1", 1, 0):
        raise ZeroDivisionError


ALONE = """
import os, signal, sys, time
from lm.distributed.preemption import PreemptionNotice
signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job may be started without
notice = PreemptionNotice()
notice.install()
assert not notice.agreed(0)
os.kill(os.getpid(), signal.SIGTERM)
assert notice.agreed(1) and notice.agreed(2)
print("NOTICED", flush=True)
os.kill(os.getpid(), getattr(signal, sys.argv[1]))
time.sleep(30)
"""


@pytest.mark.parametrize(("second", "status"), [("SIGTERM", -signal.SIGTERM), ("SIGINT", None)])
def test_alone_a_first_sigterm_is_a_notice_and_a_second_signal_ends(second, status):
    result = subprocess.run(
        [sys.executable, "-c", ALONE, second], cwd=ROOT, capture_output=True, text=True,
        timeout=PATIENCE, env={**os.environ, "JAX_PLATFORMS": "cpu"},
    )  # fmt: skip
    assert "NOTICED" in result.stdout and "a second SIGTERM ends it at once" in result.stderr
    assert result.returncode == (status or -signal.SIGINT)

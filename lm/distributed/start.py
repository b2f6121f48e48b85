"""Several hosts: start-up, an end for all when one fails, preemption, small exchanges.

    with distributed.start():
        ...  # the program, the same on every host

One process is simply run. For several, `start` finds the others (`find_cluster`), calls the roll,
starts JAX's distributed runtime and a watch. Whatever ends one host ends all within `timeout`, with
a line that names the host, so that the same command can be started again.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from typing import IO, Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from lm.distributed import watchdog as watch
from lm.distributed.cluster import Cluster, find_cluster
from lm.distributed.rendezvous import roll_call

PEER_FAILED = 75  # exit status: another host failed, try again (EX_TEMPFAIL of sysexits.h)
_GRACE_SECONDS = 2.0
# How long hosts that have finished wait for those still at work, such as writing a report.
_FINISH_SECONDS = 4 * 3600
# How much later than a broken collective the word of its cause may come.
_CONSEQUENCE_SECONDS = 5.0
_RUNTIME_ERROR = re.compile(
    "(UNKNOWN|INTERNAL|UNAVAILABLE|ABORTED|CANCELLED|DEADLINE_EXCEEDED|FAILED_PRECONDITION): "
)


@contextlib.contextmanager
def start(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    *,
    timeout: float = 30.0,
    start_timeout: float = 300.0,
) -> Iterator[None]:
    """Be one of the run's processes for the length of the `with` block; alone, do nothing.

    To be entered before the first use of a device. Leaving the block normally waits for the other
    hosts; leaving it with an exception ends them, and this process does not wait for them at exit.

    Args:
      coordinator, num_processes, process_id: see `find_cluster`, which finds them if not given.
      timeout: seconds without a sign of life after which a host counts as dead.
      start_timeout: seconds to wait for all hosts at the start.

    Raises:
      ClusterError: the settings do not fit together, or not every host came.
    """
    cluster = find_cluster(coordinator, num_processes, process_id)
    if cluster is None:
        yield
        return
    watcher = _initialize(cluster, timeout, start_timeout)
    try:
        yield
    except BaseException as error:
        code = _exit_code(error)
        if code:
            watcher.end_if_consequence(error)
            watcher.fail(error)
            # Else JAX would wait at exit for hosts that have no reason to come.
            atexit.register(_exit_at_once, code)
        else:
            _finish(watcher)
        raise
    _finish(watcher)


def _initialize(cluster: Cluster, timeout: float, start_timeout: float) -> _Watcher:
    hub = _hub_socket() if cluster.process_id == 0 else None
    names, port = roll_call(cluster, hub.getsockname()[1] if hub else None, start_timeout)
    watcher = _Watcher(cluster, names, port, hub, timeout)
    jax.distributed.initialize(
        cluster.coordinator,
        cluster.num_processes,
        cluster.process_id,
        cluster.local_device_ids,
        cluster_detection_method="deactivate",
        initialization_timeout=int(start_timeout),
        # The watch speaks first; the runtime is there for what it cannot see.
        heartbeat_timeout_seconds=max(10, int(1.5 * timeout)),
        shutdown_timeout_seconds=_FINISH_SECONDS,
    )
    return watcher


def _hub_socket() -> socket.socket:
    dual = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if dual else socket.AF_INET
    return socket.create_server(("", 0), family=family, dualstack_ipv6=dual, backlog=1024)


def _finish(watcher: _Watcher) -> None:
    """Wait until every host has finished."""
    jax.distributed.shutdown()
    watcher.close()


def _exit_code(error: BaseException) -> int:
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else int(error.code is not None)
    return 128 + signal.SIGINT if isinstance(error, KeyboardInterrupt) else 1


def _exit_at_once(code: int) -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


def _summary(error: BaseException) -> str:
    text = str(error).strip().split("\n", 1)[0][:300]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


class _Watcher:
    """This process's end of its watch (`lm.distributed.watchdog`)."""

    def __init__(
        self,
        cluster: Cluster,
        names: list[str],
        port: int,
        hub: socket.socket | None,
        timeout: float,
    ) -> None:
        settings = {
            "id": cluster.process_id,
            "names": names,
            "pid": os.getpid(),
            "timeout": timeout,
            "hub": [cluster.address[0], port],
            "server": hub.fileno() if hub else None,
        }
        self.process = subprocess.Popen(
            [sys.executable, "-I", str(pathlib.Path(watch.__file__)), json.dumps(settings)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            pass_fds=[hub.fileno()] if hub else [],
            start_new_session=True,  # a signal to the run's group is not meant for it
        )
        if hub:
            hub.close()
        assert self.process.stdin and self.process.stdout
        self.stdin = self.process.stdin
        self.told = threading.Event()
        self.leaving = False
        self.verdict: str | None = None
        threading.Thread(
            target=self._listen, args=(self.process.stdout,), name="watch", daemon=True
        ).start()

    def end_if_consequence(self, error: BaseException) -> None:
        """End this process if the error is but what the fault of another host looks like here."""
        # Broken collectives are a JaxRuntimeError or a ValueError, as it happens.
        if _RUNTIME_ERROR.match(str(error)) and self.told.wait(_CONSEQUENCE_SECONDS):
            assert self.verdict is not None
            self._end(self.verdict, f"{_summary(error)}\n")

    def fail(self, error: BaseException) -> None:
        """Let the others know why this process ends; returns when they do."""
        self.leaving = True
        self._send(failed=_summary(error))
        self.told.wait(3.0)
        if jax.process_index() == 0:
            # The runtime's service goes with this process, and would abort those still reading.
            time.sleep(_GRACE_SECONDS + 1.0)

    def close(self) -> None:
        """This process has done its part."""
        self.leaving = True
        self._send(done=True)

    def _send(self, **message: Any) -> None:
        with contextlib.suppress(OSError):
            self.stdin.write(json.dumps(message).encode() + b"\n")
            self.stdin.flush()

    def _listen(self, stream: IO[bytes]) -> None:
        for line in stream:
            verdict = json.loads(line)["verdict"]
            self.verdict = verdict
            self.told.set()
            # A host that failed for the same reason prints its own traceback first.
            time.sleep(_GRACE_SECONDS)
            if not self.leaving:
                self._end(verdict)

    def _end(self, verdict: str, before: str = "") -> None:
        self._send(ends=True)
        print(before + watch.sentence(verdict), file=sys.stderr, flush=True)
        _exit_at_once(PEER_FAILED)


class PreemptionNotice:
    """SIGTERM on any host, agreed on by all at one step.

    Cloud machines and Slurm send SIGTERM before they take a host away. With several processes JAX's
    runtime holds that signal's handler (do not install another after `start`) and agrees on a step
    that every host has yet to reach. Alone, `install` puts a handler in place.

        notice = PreemptionNotice()
        notice.install()
        ...
        if notice.agreed(step):
            save(state); sys.exit(notice.EXIT)

    A second SIGTERM, or Ctrl-C, ends the process at once.
    """

    EXIT = 128 + signal.SIGTERM

    def __init__(self) -> None:
        self.received = False
        self.num_calls = 0

    def install(self) -> None:
        """Be told of SIGTERM; call it on the main thread, after `start`."""
        if not jax.distributed.is_initialized():
            signal.signal(signal.SIGTERM, self._on_signal)

    def agreed(self, step: int) -> bool:
        """Whether every host saves and ends now, `step` steps done; asked by all after each step.

        It is the number of questions that hosts agree on, so a run may go back to an earlier step.
        """
        self.num_calls += 1
        if jax.distributed.is_initialized():
            return multihost_utils.reached_preemption_sync_point(self.num_calls)
        return self.received

    def _on_signal(self, number: int, frame: Any) -> None:
        self.received = True
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        print(
            "SIGTERM: the run saves after this step and ends; a second SIGTERM ends it at once",
            file=sys.stderr, flush=True,
        )  # fmt: skip


def is_first_process() -> bool:
    """Whether this process is the one that prints and writes; true if it is alone."""
    return jax.process_index() == 0


def say(*words: Any) -> None:
    """Print on the first process alone."""
    if is_first_process():
        print(*words, flush=True)


def barrier(name: str) -> None:
    """Wait until every process has come to the barrier of this name."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def broadcast(value: Any) -> Any:
    """The first process's value on every process. Small trees of what JSON can hold.

    Other processes' values are not looked at, and may be None.
    """
    if jax.process_count() == 1:
        return value
    data = json.dumps(value).encode() if is_first_process() else b""
    length = int(multihost_utils.broadcast_one_to_all(np.int32(len(data))))
    # A power of two, so that few sizes are compiled.
    buffer = np.zeros(max(1024, 1 << (length - 1).bit_length()), np.uint8)
    buffer[: len(data)] = np.frombuffer(data, np.uint8)
    return json.loads(multihost_utils.broadcast_one_to_all(buffer)[:length].tobytes())


def fetch(tree: Any) -> Any:
    """Whole arrays of a tree, on every host, as NumPy arrays. To be called by all processes.

    An array spread over hosts cannot be read by one of them alone.
    """
    if jax.process_count() == 1:
        return jax.device_get(tree)
    return multihost_utils.process_allgather(tree, tiled=True)

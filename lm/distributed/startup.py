"""Start-up of a run over several hosts, and an end for all of them when one fails.

    with distributed.start():
        ...  # the program, the same on every host

One process is simply run. For several, `start` finds the others (`find_cluster`), meets them at the
rendezvous, starts JAX's distributed runtime and a watchdog. Whatever ends one host ends all
within `timeout`, with a line that names the host, so that the same command can be started again.
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

from lm.distributed import watchdog
from lm.distributed.cluster import Cluster, find_cluster
from lm.distributed.rendezvous import rendezvous

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
    names, port = rendezvous(cluster, hub.getsockname()[1] if hub else None, start_timeout)
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
            [sys.executable, "-I", str(pathlib.Path(watchdog.__file__)), json.dumps(settings)],
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
        print(before + watchdog.sentence(verdict), file=sys.stderr, flush=True)
        _exit_at_once(PEER_FAILED)

"""Start-up of a run over several hosts, and an end for all of them when one fails.

    with distributed.start():
        ...  # the program, the same on every host

One process is simply run. Of several, each starts a watchdog (`lm.distributed.watchdog`), which
finds the others, and JAX's distributed runtime. Whatever ends one host ends all within `timeout`,
with a line that names the host, so that the same command can be started again.
"""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
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
from lm.distributed.cluster import Cluster, ClusterError, find_cluster

PEER_FAILED = 75  # exit status: another host failed, try again (EX_TEMPFAIL of sysexits.h)
_GRACE_SECONDS = 2.0
# How long hosts that have finished wait for those still at work, such as writing a report.
_FINISH_SECONDS = 4 * 3600
# How much later than a broken collective the report of its cause may come.
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
    cluster = find_cluster(coordinator, num_processes, process_id, start_timeout)
    if cluster is None:
        yield
        return
    guard = _initialize(cluster, timeout, start_timeout)
    try:
        yield
    except BaseException as error:
        code = _exit_code(error)
        if code:
            guard.end_if_consequence(error)
            guard.fail(error)
            # Else JAX would wait at exit for hosts that have no reason to come.
            atexit.register(_exit_at_once, code)
        else:
            guard.finish()
        raise
    guard.finish()


def _initialize(cluster: Cluster, timeout: float, start_timeout: float) -> _Guard:
    host, port = cluster.address
    bound = watchdog.bind_address(host)
    with socket.socket(socket.AF_INET6 if ":" in bound else socket.AF_INET) as placeholder:
        # Keeps a port free for the runtime of process 0, which may take one that is shared so.
        placeholder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        placeholder.bind((bound, 0))
        settings = watchdog.Settings(
            id=cluster.process_id,
            num=cluster.num_processes,
            host=socket.gethostname(),
            pid=os.getpid(),
            token=os.environ.get("LM_RUN_TOKEN", ""),
            coordinator=(host, port),
            port=placeholder.getsockname()[1],
            timeout=timeout,
            start_timeout=start_timeout,
        )
        guard = _Guard(settings)
        port = guard.meet()
        address, own = (f"[{name}]" if ":" in name else name for name in (host, bound))
        jax.distributed.initialize(
            f"{address}:{port}",
            cluster.num_processes,
            cluster.process_id,
            cluster.local_device_ids,
            cluster_detection_method="deactivate",
            initialization_timeout=int(start_timeout),
            coordinator_bind_address=f"{own}:{port}" if own else None,
            # The watchdog speaks first; the runtime is there for what it cannot see.
            heartbeat_timeout_seconds=max(10, int(1.5 * timeout)),
            shutdown_timeout_seconds=_FINISH_SECONDS,
        )
    return guard


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


class _Guard:
    """This process's end of its watchdog."""

    def __init__(self, settings: watchdog.Settings) -> None:
        process = subprocess.Popen(
            [sys.executable, "-I", str(pathlib.Path(watchdog.__file__))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,  # a signal to the run's group is not meant for it
        )
        assert process.stdin and process.stdout
        self.stdin, self.stdout = process.stdin, process.stdout
        self.process, self.settings = process, settings
        self.informed = threading.Event()
        self.leaving = False
        self.failure: str | None = None
        self._send(**dataclasses.asdict(settings))

    def meet(self) -> int:
        """Wait for all hosts; the port of the runtime.

        Raises:
          ClusterError: not all came, or they do not fit together.
        """
        answer = json.loads(self.stdout.readline() or '{"error": "the watchdog ended"}')
        if "error" in answer:
            raise ClusterError(answer["error"])
        threading.Thread(
            target=self._listen, args=(self.stdout,), name="watchdog", daemon=True
        ).start()
        return answer["port"]

    def end_if_consequence(self, error: BaseException) -> None:
        """End this process if the error is but what the fault of another host looks like here."""
        # Broken collectives are a JaxRuntimeError or a ValueError, as it happens.
        if _RUNTIME_ERROR.match(str(error)) and self.informed.wait(_CONSEQUENCE_SECONDS):
            assert self.failure is not None
            self._end(self.failure, f"{_summary(error)}\n")

    def fail(self, error: BaseException) -> None:
        """Report to the others why this process ends; returns when they know."""
        self.leaving = True
        self._send(raised=_summary(error))
        self.informed.wait(3.0)
        if self.settings.id == 0:
            # The runtime's service goes with this process, and would abort those still reading.
            time.sleep(_GRACE_SECONDS + 1.0)

    def finish(self) -> None:
        """Wait until every host has finished."""
        jax.distributed.shutdown()
        self.leaving = True
        self._send(done=True)

    def _send(self, **message: Any) -> None:
        with contextlib.suppress(OSError):
            self.stdin.write(json.dumps(message).encode() + b"\n")
            self.stdin.flush()

    def _listen(self, stream: IO[bytes]) -> None:
        for line in stream:
            self.failure = json.loads(line)["failure"]
            self.informed.set()
            # A host that failed for the same reason prints its own traceback first.
            time.sleep(_GRACE_SECONDS)
            if not self.leaving:
                self._end(self.failure)

    def _end(self, failure: str | None, before: str = "") -> None:
        self._send(ends=True)
        print(before + watchdog.sentence(failure or ""), file=sys.stderr, flush=True)
        _exit_at_once(PEER_FAILED)

"""Start-up of a run over several hosts, and an end for all of them when one fails.

    with distributed.start():
        ...  # the program, the same on every host

One process is simply run. Of several, each starts a watchdog (`lm.distributed.watchdog`), which
finds the others, and JAX's distributed runtime. Hosts with another configuration, code or
environment, or that do not share the run's folder, are refused before anything is computed.
Whatever ends one host ends all within `timeout`, with a line that names the host, so that the same
command can be started again.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import socket
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any

import jax

from lm.distributed import watchdog
from lm.distributed.cluster import Cluster, find_cluster
from lm.distributed.facts import program_facts
from lm.distributed.guard import Folders, Guard, exit_at_once, exit_code

# How long hosts that have finished wait for those still at work, such as writing a report.
_FINISH_SECONDS = 4 * 3600
_GUARDS: list[Guard] = []  # of the run that this process takes part in


@contextlib.contextmanager
def start(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    *,
    facts: Mapping[str, Any] = MappingProxyType({}),
    folders: Folders = MappingProxyType({}),
    timeout: float = 30.0,
    start_timeout: float = 300.0,
) -> Iterator[None]:
    """Be one of the run's processes for the length of the `with` block; alone, do nothing.

    To be entered before the first use of a device. Leaving the block normally waits for the other
    hosts; leaving it with an exception ends them, and this process does not wait for them at exit.

    Args:
      coordinator, num_processes, process_id: see `find_cluster`, which finds them if not given.
      facts: values of JSON's types, by name, that must be the same on all hosts, beside those of
        `program_facts`.
      folders: paths, by name, that must lead all hosts to one folder.
      timeout: seconds without a sign of life after which a host counts as dead.
      start_timeout: seconds to wait for all hosts at the start.

    Raises:
      ClusterError: the settings do not fit together, not every host came, or hosts differ.
    """
    cluster = find_cluster(coordinator, num_processes, process_id, start_timeout)
    if cluster is None:
        yield
        return
    guard = _initialize(cluster, {**program_facts(), **facts}, folders, timeout, start_timeout)
    _GUARDS.append(guard)
    try:
        devices = jax.local_devices()
        guard.agree("devices", {"devices": f"{len(devices)} x {devices[0].device_kind}"}, {})
        yield
    except BaseException as error:
        code = exit_code(error)
        if code:
            guard.end_if_consequence(error)
            guard.fail(error)
            # Else JAX would wait at exit for hosts that have no reason to come.
            atexit.register(exit_at_once, code)
        else:
            guard.finish()
        raise
    finally:
        _GUARDS.remove(guard)
    guard.finish()


def _initialize(
    cluster: Cluster,
    facts: Mapping[str, Any],
    folders: Folders,
    timeout: float,
    start_timeout: float,
) -> Guard:
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
        guard = Guard(settings)
        port = guard.meet()
        guard.agree("start", facts, folders)
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


def agree(point: str, facts: Mapping[str, Any]) -> bool:
    """Wait for all hosts at a point of the program, and compare what they say there.

    Args:
      point: its name, the same on all hosts.
      facts: values of JSON's types that must be the same on all.

    Returns:
      Whether there was anyone to ask: not alone, nor where `start` was not used.

    Raises:
      ClusterError: they differ; the message names the first difference, on all hosts.
    """
    for guard in _GUARDS:
        guard.agree(point, facts, {})
    return bool(_GUARDS)


def reached(point: str) -> None:
    """Report that this process has reached a point, without waiting for the others.

    Where some have not while others have, the first host names them every 30 seconds.
    """
    for guard in _GUARDS:
        guard.reached(point)


def waits(point: str) -> str:
    """For whom a point waits, as last reported on the first process; else empty."""
    return next((guard.waits.get(point, "") for guard in _GUARDS), "")

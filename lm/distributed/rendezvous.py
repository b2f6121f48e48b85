"""Every process of a run reports to process 0 before anything else starts.

The runtime ends a process that waits in vain with a stack dump and no names. The rendezvous, on
the coordinator's port before the runtime takes it, tells every host which hosts are missing,
which number was given twice, and that all agree on how many they are.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
from typing import Any

from lm.distributed.cluster import Cluster, ClusterError

_WORD = "rendezvous"
_RETRY_SECONDS = 0.5


def rendezvous(cluster: Cluster, watch_port: int | None, timeout: float) -> tuple[list[str], int]:
    """(host names by process, port of process 0's watch), when every process is there.

    Args:
      cluster: this process's place.
      watch_port: on process 0, the port the others' watches connect to.
      timeout: seconds to wait for all.

    Raises:
      ClusterError: not every process came in time, or they do not fit together. All that came
        raise it, with the same reason.
    """
    if cluster.process_id == 0:
        assert watch_port is not None
        return _call(cluster, watch_port, timeout)
    return _answer(cluster, timeout)


def _call(cluster: Cluster, watch_port: int, timeout: float) -> tuple[list[str], int]:
    deadline = time.monotonic() + timeout
    present: dict[int, tuple[dict[str, Any], socket.socket]] = {}
    connections: list[socket.socket] = []
    me = _report(cluster)
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(_listen(cluster, timeout))
        try:
            while len(present) < cluster.num_processes - 1 or _forget_gone(present):
                server.settimeout(max(0.01, deadline - time.monotonic()))
                try:
                    connection = stack.enter_context(server.accept()[0])
                except TimeoutError:
                    _forget_gone(present)
                    raise ClusterError(_missing(cluster, set(present), timeout)) from None
                if (report := _receive(connection, 5.0)) is not None:
                    connections.append(connection)
                    _check(cluster, report, present, me)
                    present[report["id"]] = (report, connection)
        except ClusterError as error:
            for connection in connections:
                _send(connection, {"error": str(error)})
            raise
        names = [me["host"]] + [present[i][0]["host"] for i in sorted(present)]
        for _, connection in present.values():
            _send(connection, {"hosts": names, "watch": watch_port})
        # The others hang up first, so that the port is free at once for the runtime.
        for _, connection in present.values():
            _receive(connection, 5.0)
    return names, watch_port


def _answer(cluster: Cluster, timeout: float) -> tuple[list[str], int]:
    deadline = time.monotonic() + timeout
    reason = "nothing answers there"
    while time.monotonic() < deadline:
        try:
            with socket.create_connection(cluster.address, timeout=5.0) as connection:
                _send(connection, _report(cluster))
                reply = _receive(connection, deadline + 5.0 - time.monotonic())
        except OSError as error:
            reply, reason = None, error.strerror or str(error)
        else:
            reason = "something else answers there, perhaps an earlier run"
        if reply is not None and "error" in reply:
            raise ClusterError(reply["error"])
        if reply is not None and "hosts" in reply:
            return reply["hosts"], reply["watch"]
        time.sleep(_RETRY_SECONDS)
    raise ClusterError(
        f"process {cluster.process_id} of {cluster.num_processes} found no process 0 at "
        f"coordinator={cluster.coordinator} within {timeout:.0f} s: {reason}. Start process 0, "
        "check the address as other hosts reach it, and that the port is open between hosts"
    )


def _listen(cluster: Cluster, timeout: float) -> socket.socket:
    """A socket on the coordinator's port, on every interface.

    A port still held by a run that is just ending is waited for.
    """
    host, port = cluster.address
    deadline = time.monotonic() + min(timeout, 20.0)
    dual = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if dual else socket.AF_INET
    while True:
        try:
            return socket.create_server(
                ("", port), family=family, dualstack_ipv6=dual, backlog=cluster.num_processes
            )
        except OSError as error:
            if time.monotonic() > deadline:
                raise ClusterError(
                    f"process 0 cannot listen on port {port} of {host}: {error.strerror}; end the "
                    "earlier run that holds it, or choose another port for coordinator"
                ) from error
            time.sleep(_RETRY_SECONDS)


def _report(cluster: Cluster) -> dict[str, Any]:
    return {
        "word": _WORD,
        "id": cluster.process_id,
        "num": cluster.num_processes,
        "host": socket.gethostname(),
        "pid": os.getpid(),
    }


def _check(
    cluster: Cluster,
    report: dict[str, Any],
    present: dict[int, tuple[dict[str, Any], socket.socket]],
    me: dict[str, Any],
) -> None:
    i, n = report["id"], cluster.num_processes
    if report["num"] != n:
        raise ClusterError(
            f"process {i} on {report['host']} was started with num_processes={report['num']}, "
            f"process 0 with {n}; give all the same"
        )
    earlier = me if i == 0 else present[i][0] if i in present else None
    if earlier is not None and (i == 0 or not _hung_up(present[i][1])):
        raise ClusterError(
            f"process_id={i} was given twice: to pid {earlier['pid']} on {earlier['host']} and pid "
            f"{report['pid']} on {report['host']}; number processes from 0 to {n - 1}, and end "
            "those of an earlier run"
        )


def _forget_gone(present: dict[int, tuple[dict[str, Any], socket.socket]]) -> bool:
    """Drop those that reported and ended since, to be expected again; whether there were any."""
    gone = [i for i, (_, connection) in present.items() if _hung_up(connection)]
    for i in gone:
        del present[i]
    return bool(gone)


def _hung_up(connection: socket.socket) -> bool:
    connection.setblocking(False)
    try:
        return connection.recv(1, socket.MSG_PEEK) == b""
    except BlockingIOError:
        return False
    except OSError:
        return True


def _missing(cluster: Cluster, present: set[int], timeout: float) -> str:
    missing = sorted(set(range(1, cluster.num_processes)) - present)
    shown = ", ".join(map(str, missing[:20])) + (", ..." if len(missing) > 20 else "")
    noun = "process" if len(missing) == 1 else "processes"
    return (
        f"{noun} {shown} of {cluster.num_processes} did not come to coordinator="
        f"{cluster.coordinator} within {timeout:.0f} s; start the program on every host, and look "
        "at what the missing ones printed"
    )


def _send(connection: socket.socket, message: dict[str, Any]) -> None:
    with contextlib.suppress(OSError):
        connection.sendall(json.dumps(message).encode() + b"\n")


def _receive(connection: socket.socket, timeout: float) -> dict[str, Any] | None:
    """The other side's line; None if it hangs up, is late or speaks of something else."""
    data, deadline = b"", time.monotonic() + timeout
    try:
        while not data.endswith(b"\n"):
            connection.settimeout(max(0.01, deadline - time.monotonic()))
            more = connection.recv(65536)
            if not more:
                return None
            data += more
            if not data.startswith(b"{"):
                return None
        message = json.loads(data)
    except (OSError, ValueError):
        return None
    if not isinstance(message, dict):
        return None
    return message if {"hosts", "error"} & message.keys() or message.get("word") == _WORD else None

"""A small process beside each process of a run: it finds the others, and notices when one fails.

Rendezvous: the watchdog of process 0 listens on the coordinator's port until every other one has
reported. All then receive the hosts' names and the port of JAX's runtime, or the reason why the run
cannot start. The port is closed before the run begins, so that nobody can reach it later.

Agree: at points of the program every process waits for all others, which must say the same there
and find the files that each has written to a folder they share. Process 0 compares; where some are
late, it names them every `remind` seconds, also at points that a process but reports.

Watch: the connections stay. Every watchdog reports a few times per timeout, as long as its process
is alive and not stopped. The first fault is the run's failure, sent to all; each watchdog passes it
to its process, kills that if it does not end by itself, and prints it if that is dead already.

JAX's own runtime cannot take its place (jax 0.10.2, two processes on CPU): where one is missing at
the start or dies, it aborts the others with a stack dump and no host's name; numbers of processes
that differ start all the same; and a process that raised leaves the others waiting for ever.

Whom it trusts: while the run starts, whoever knows LM_RUN_TOKEN, which a launcher sets to the same
random value on all hosts; without it, whoever reaches the port in that time. Anything else that
connects is ignored and reported once. Nothing is encrypted: this keeps out strangers, scanners
and other runs, not those who can read the network or the environment of a process.

Run as a program (standard library alone, so that it costs little and shares no lock with JAX):
standard input and output are pipes to the process it belongs to, with one JSON object per line.
Into it: the settings; `done`; `raised`, an exception; `ends`, if the process prints the failure
itself; `point`, with facts and folders. Out of it: `names` and `port`, or `error`; then `failure`;
`point`, with the `error` or "", when all have come; on process 0 `waits`, while some have not.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hmac
import ipaddress
import json
import os
import selectors
import signal
import socket
import sys
import time
from typing import Any

RETRY_SECONDS = 0.5
KILL_SECONDS = 6.0
REPLY_SECONDS = 3.0
MAX_LINE = 1 << 22  # thousands of hosts' names
USAGE = 2  # exit status of a program that refuses its input, and would again
MAX_SHOWN = 100  # characters of a value
REPORT = {"id": int, "num": int, "host": str, "pid": int, "token": str}


class StartError(Exception):
    """Why the run cannot start."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """Settings of one watchdog: `num` processes; `port` is that of JAX's runtime on process 0.

    A host counts as dead after `timeout` seconds of silence, as missing after `start_timeout`.
    Those that a point of the program waits for are named every `remind` seconds.
    """

    id: int
    num: int
    host: str
    pid: int
    token: str
    coordinator: tuple[str, int]
    port: int
    timeout: float
    start_timeout: float
    remind: float = 30.0

    @property
    def address(self) -> str:
        return ":".join(map(str, self.coordinator))


class Link:
    """Lines of JSON objects over a socket or a pair of pipes.

    Attributes:
      report: what the process at the other end said of itself; None until it is admitted.
      open: False once the other end is gone or has sent anything else.
    """

    def __init__(self, readable: Any, write: Any) -> None:
        self.readable, self.write = readable, write
        self.report: dict[str, Any] | None = None
        self.data, self.open, self.heard = b"", True, time.monotonic()

    @classmethod
    def of_socket(cls, connection: socket.socket) -> Link:
        connection.settimeout(2.0)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        return cls(connection, connection.sendall)

    def send(self, **message: Any) -> None:
        try:
            self.write(json.dumps(message).encode() + b"\n")
        except OSError:
            self.open = False

    def receive(self) -> list[dict[str, Any]]:
        try:
            more = os.read(self.readable.fileno(), 65536)
        except OSError:
            more = b""
        self.open = self.open and bool(more)
        self.heard = time.monotonic()
        *lines, self.data = (self.data + more).split(b"\n")
        messages = []
        for line in [*lines, *([self.data] if len(self.data) > MAX_LINE else [])]:
            message = None
            with contextlib.suppress(ValueError, RecursionError):
                message = json.loads(line)
            if not isinstance(message, dict):
                self.open = False
                break
            messages.append(message)
        return messages


class Point:
    """A point of the program, until all processes have come there."""

    def __init__(self, remind: float) -> None:
        self.since = time.monotonic()
        self.next = self.since + remind
        self.messages: dict[int, dict[str, Any]] = {}


class Watchdog:
    """`meet` the others, then `watch` until there is nothing left to watch."""

    def __init__(self, settings: Settings) -> None:
        self.settings, self.id = settings, settings.id
        self.interval = max(0.2, settings.timeout / 6)
        self.names: list[str] = []
        self.selector = selectors.DefaultSelector()
        self.main = Link(sys.stdin.buffer.raw, sys.stdout.buffer.raw.write)  # type: ignore[attr-defined]
        self.register(self.main)
        self.members: dict[int, Link] = {}  # of process 0: the others
        self.first: Link | None = None  # of the others: process 0
        self.warned = False
        self.finished: set[int] = set()
        self.points: dict[str, Point] = {}  # of process 0
        self.failure: dict[str, Any] | None = None
        self.failed_at = self.last_alive = time.monotonic()
        self.main_gone, self.main_knows = 0.0, False

    def register(self, link: Link) -> None:
        self.selector.register(link.readable, selectors.EVENT_READ, link)

    def close(self, link: Link) -> None:
        self.selector.unregister(link.readable)
        if link is not self.main:
            link.readable.close()

    # Rendezvous.

    def meet(self) -> None:
        """Raises StartError if not all came or they do not fit together."""
        deadline = time.monotonic() + self.settings.start_timeout
        answer = self.join(deadline) if self.id else self.gather(deadline)
        self.names = answer["names"]
        for link in self.members.values():
            link.heard = time.monotonic()  # some waited long for the others
        self.main.send(**answer)

    def gather(self, deadline: float) -> dict[str, Any]:
        """Process 0: wait until all are there, and answer them."""
        with listen(self.settings) as server:
            self.selector.register(server, selectors.EVENT_READ)
            try:
                self.admit_all(server, deadline)
                reports = [self.members[i].report or {} for i in sorted(self.members)]
                names = [self.settings.host, *(report["host"] for report in reports)]
                answer = {"names": names, "port": self.settings.port}
            except StartError as error:
                answer = {"error": str(error)}
                raise
            finally:
                self.selector.unregister(server)
                for key in [*self.selector.get_map().values()]:
                    if key.data.report:
                        key.data.send(**answer)
                    elif key.data is not self.main:
                        self.close(key.data)
        return answer

    def admit_all(self, server: socket.socket, deadline: float) -> None:
        while True:
            complete = len(self.members) == self.settings.num - 1
            remaining = deadline - time.monotonic()
            if remaining < 0 and not complete:
                raise StartError(missing(self.settings, self.members.keys()))
            events = self.selector.select(0.0 if complete else remaining)
            if complete and not events:
                return
            # Members first: the place of one that has ended is free for one started again.
            for key, _ in sorted(events, key=lambda e: getattr(e[0].data, "report", None) is None):
                if key.data is None:
                    with contextlib.suppress(OSError):  # it may be gone already
                        self.register(Link.of_socket(server.accept()[0]))
                elif key.data is self.main:
                    raise SystemExit
                else:
                    self.hear_of(key.data)

    def hear_of(self, link: Link) -> None:
        """Admit a process that reports; drop one that is gone, and strangers."""
        for report in link.receive():
            if link.report is not None:
                continue
            if not is_report(report):
                link.open = False
            elif not hmac.compare_digest(report["token"].encode(), self.settings.token.encode()):
                link.send(error="LM_RUN_TOKEN is not that of process 0; set it to the same value")
                link.open = False
            else:
                link.report = report
                check(self.settings, report, self.members.get(report["id"]))
                self.members[report["id"]] = link
        if link.open:
            return
        if link.report is not None:
            del self.members[link.report["id"]]
        elif not self.warned:
            self.warned = True
            with contextlib.suppress(OSError):
                print(
                    f"{link.readable.getpeername()[0]} connected to coordinator="
                    f"{self.settings.address} without a report of this run or without its "
                    "LM_RUN_TOKEN; it and any other such is ignored",
                    file=sys.stderr, flush=True,
                )  # fmt: skip
        self.close(link)

    def join(self, deadline: float) -> dict[str, Any]:
        """The others: report to process 0 until it answers."""
        settings, reason = self.settings, "nothing answers there"
        while time.monotonic() < deadline:
            try:
                link = Link.of_socket(socket.create_connection(settings.coordinator, timeout=5.0))
            except OSError as error:
                reason = error.strerror or str(error)
                self.wait(RETRY_SECONDS)
                continue
            link.send(**{name: getattr(settings, name) for name in REPORT})
            self.register(link)
            while link.open and time.monotonic() < deadline + 5.0:
                if not self.wait(deadline + 5.0 - time.monotonic()):
                    continue
                for answer in link.receive():
                    if "error" in answer:
                        raise StartError(str(answer["error"]))
                    if {"names", "port"} <= answer.keys():
                        self.first = link
                        return answer
            self.close(link)
            reason = "something else answers there, perhaps an earlier run"
            self.wait(RETRY_SECONDS)
        raise StartError(
            f"process {settings.id} of {settings.num} found no process 0 at coordinator="
            f"{settings.address} within {settings.start_timeout:.0f} s: {reason}. Start process 0, "
            "check the address as other hosts reach it, and that the port is open between hosts"
        )

    def wait(self, seconds: float) -> bool:
        """Whether anything came; ends this program if its process has ended."""
        events = self.selector.select(max(0.0, seconds))
        if any(key.data is self.main for key, _ in events):
            raise SystemExit
        return bool(events)

    # Watch.

    def name(self, id: int) -> str:
        return f"host {id} of {len(self.names)} ({self.names[id]})"

    def watch(self) -> None:
        next_beat = 0.0
        while not self.is_over():
            for key, _ in self.selector.select(min(self.interval / 2, self.settings.remind)):
                self.read(key.data)
            now = time.monotonic()
            if now >= next_beat:
                next_beat = now + self.interval
                self.beat(now)
            self.remind(now)
            self.enforce(now)

    def is_over(self) -> bool:
        """Whether the process is gone or done, and no other depends on this watchdog."""
        mine = not self.main.open or self.id in self.finished
        if self.first is not None:
            waiting = self.main_gone and time.monotonic() < self.main_gone + REPLY_SECONDS
            return mine and (not self.first.open or not waiting)
        others = any(link.open and i not in self.finished for i, link in self.members.items())
        late = self.failure and time.monotonic() > self.failed_at + KILL_SECONDS + REPLY_SECONDS
        return mine and (not others or bool(late))

    def read(self, link: Link) -> None:
        id = 0 if link is self.first else link.report["id"] if link.report else self.id
        for message in link.receive():
            if link is self.main:
                self.main_knows = self.main_knows or "point" not in message
                if "done" in message:
                    self.report(done=True)
                elif "raised" in message:
                    refused = {"status": USAGE} if message.get("status") == USAGE else {}
                    self.report(fault=f"ended with {message['raised']}", **refused)
                elif "point" in message:
                    self.report(**message)
            elif link is not self.first:
                self.judge(id, message)
            elif "failure" in message:
                self.fail(**message)
            elif "point" in message:
                self.main.send(**message)
        if link.open:
            return
        self.close(link)
        if link is self.main:
            self.on_main_gone()
        elif (self.id if link is self.first else id) not in self.finished:
            self.fail(f"{self.name(id)} stopped answering")

    def on_main_gone(self) -> None:
        self.main_gone = time.monotonic()
        if self.main_knows:
            return
        if self.failure is None:
            self.report(fault="was killed or crashed")
        else:  # the runtime was faster
            print(sentence(**self.failure), file=sys.stderr, flush=True)

    def report(self, **message: Any) -> None:
        """Report on this watchdog's own process."""
        if "done" in message:
            self.finished.add(self.id)
        if self.first is not None and self.first.open:
            self.first.send(**message)
        else:
            self.judge(self.id, message)

    def judge(self, id: int, message: dict[str, Any]) -> None:
        """A report on a process, to process 0; on its own, where process 0 is gone."""
        if "done" in message:
            self.finished.add(id)
        if "fault" in message and id not in self.finished:
            status = {"status": message["status"]} if "status" in message else {}
            self.fail(f"{self.name(id)} {message['fault']}", **status)
        if "point" in message:
            self.arrive(id, message)

    def arrive(self, id: int, message: dict[str, Any]) -> None:
        """A process has come to a point; the last one's coming lets all go on, or ends them."""
        name = message["point"]
        point = self.points.setdefault(name, Point(self.settings.remind))
        point.messages[id] = message
        if len(point.messages) < len(self.names):
            return
        del self.points[name]
        hosts = {self.name(i): point.messages[i] for i in sorted(point.messages)}
        error = difference({host: each["facts"] for host, each in hosts.items()})
        error = error or separate({host: each["folders"] for host, each in hosts.items()})
        for link in [*self.members.values(), self.main]:
            link.send(point=name, error=error)

    def remind(self, now: float) -> None:
        """Name those that points wait for."""
        for name, point in self.points.items():
            if self.failure is not None or now < point.next:
                continue
            point.next = now + self.settings.remind
            absent = [self.name(i) for i in range(len(self.names)) if i not in point.messages]
            text = f"{name} waits for {', '.join(absent[:8])}{', ...' if absent[8:] else ''}"
            print(f"{text}: {now - point.since:.0f} s so far", file=sys.stderr, flush=True)
            self.main.send(waits=name, text=text)

    def beat(self, now: float) -> None:
        """Report that this host is alive, and look which others are."""
        if not (self.main.open and is_stopped(self.settings.pid)):
            self.last_alive = now
            for link in [*self.members.values(), self.first]:
                if link is not None and link.open:
                    link.send(beat=True)
        if self.failure is not None or self.id in self.finished:
            return
        heard = {0: self.first.heard if self.first is not None else self.last_alive}
        heard |= {i: link.heard for i, link in self.members.items()}
        for i, last in heard.items():
            if i not in self.finished and now - last > self.settings.timeout:
                self.fail(f"{self.name(i)} stopped answering")

    def fail(self, failure: str, **status: int) -> None:
        """The first failure is what all report, with the status to end with if it is a refusal."""
        if self.failure is not None:
            return
        self.failure, self.failed_at = {"failure": failure, **status}, time.monotonic()
        for link in self.members.values():
            link.send(**self.failure)
        if self.main.open:
            self.main.send(**self.failure)
        elif not self.main_knows:
            print(sentence(**self.failure), file=sys.stderr, flush=True)

    def enforce(self, now: float) -> None:
        """Kill a process that knows of the failure and did not end."""
        if self.failure is None or not self.main.open or self.id in self.finished:
            return
        if now - self.failed_at > KILL_SECONDS:
            print(sentence(**self.failure), file=sys.stderr, flush=True)
            os.kill(self.settings.pid, signal.SIGKILL)
            self.main.open = False


def check(settings: Settings, report: dict[str, Any], earlier: Link | None) -> None:
    """Raises StartError if a process does not fit those that are there."""
    i, n = report["id"], settings.num
    if report["num"] != n:
        raise StartError(
            f"process {i} on {report['host']} was started with num_processes={report['num']}, "
            f"process 0 with {n}; give all the same"
        )
    known = dataclasses.asdict(settings) if i == 0 else earlier.report if earlier else None
    if known:
        raise StartError(
            f"process_id={i} was given twice: to pid {known['pid']} on {known['host']} and pid "
            f"{report['pid']} on {report['host']}; number processes from 0 to {n - 1}, and end "
            "those of an earlier run"
        )


def is_report(message: dict[str, Any]) -> bool:
    kinds = {name: type(value) for name, value in message.items()}
    return kinds == REPORT and 0 <= message["id"] < message["num"]


def missing(settings: Settings, present: Any) -> str:
    absent = sorted(set(range(1, settings.num)) - set(present))
    shown = ", ".join(map(str, absent[:20])) + (", ..." if len(absent) > 20 else "")
    return (
        f"{'process' if len(absent) == 1 else 'processes'} {shown} of {settings.num} did not come "
        f"to coordinator={settings.address} within {settings.start_timeout:.0f} s; start the "
        "program on every host, and look at what the missing ones printed"
    )


def listen(settings: Settings) -> socket.socket:
    host, port = settings.coordinator
    bound, dual = bind_address(host), socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if (":" in bound if bound else dual) else socket.AF_INET
    try:
        return socket.create_server(
            (bound, port), family=family, dualstack_ipv6=dual and not bound, backlog=1024
        )
    except OSError as error:
        raise StartError(
            f"process 0 cannot listen on port {port} of {host}: {error.strerror}; end the earlier "
            "run that holds it, or choose another port for coordinator"
        ) from error


def bind_address(host: str) -> str:
    """The interface to listen on: `host` if it is a number and of this machine; all ("") else.

    Other hosts may resolve a name to another interface than this one does.
    """
    try:
        six = ipaddress.ip_address(host).version == 6
        with socket.socket(socket.AF_INET6 if six else socket.AF_INET) as probe:
            probe.bind((host, 0))
    except (ValueError, OSError):
        return ""
    return host


def difference(facts: dict[str, dict[str, Any]]) -> str:
    """The first of the facts in which a host differs from the first one; empty if none does."""
    first, *others = facts
    keys = dict.fromkeys(key for each in facts.values() for key in each)
    values = {key: {host: each.get(key) for host, each in facts.items()} for key in keys}
    odd = {
        key: found
        for key, each in values.items()
        if (found := [host for host in others if each[host] != each[first]])
    }
    if not odd:
        return ""
    (key, hosts), *more = odd.items()
    own, other = (show(values[key][host]) for host in (first, hosts[0]))
    alike = sum(values[key][host] == values[key][hosts[0]] for host in hosts[1:])
    return (
        f"hosts differ in {key}: {first} has {own}, {hosts[0]} "
        + (f"and {alike} more have {other}" if alike else f"has {other}")
        + (f"; they also differ in {', '.join(key for key, _ in more[:3])}" if more else "")
        + (f" and {len(more) - 3} more" if more[3:] else "")
        + "; start the same command with the same code, environment and data on all hosts"
    )


def separate(folders: dict[str, dict[str, dict[str, Any]]]) -> str:
    """Which host has not the first one's folder of a name; empty if they are all one."""
    first, *_ = folders
    for name, own in folders[first].items():
        for host, each in folders.items():
            path = each[name]["path"]
            if "error" in each[name]:
                return (
                    f"{name}={path} cannot be written to on {host}: {each[name]['error']}; give a "
                    "directory that all hosts share and can write to"
                )
            if not os.path.exists(os.path.join(own["path"], each[name]["file"])):
                return (
                    f"{name}={own['path']} of {first} and {name}={path} of {host} are not one "
                    "folder; give a directory that all hosts share"
                )
    return ""


def show(value: Any) -> str:
    text = "none" if value is None else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= MAX_SHOWN else text[:MAX_SHOWN] + "..."


def sentence(failure: str, status: int = 0) -> str:
    """The line a host prints."""
    if status == USAGE:
        return f"{failure}; the run ends"
    return (
        f"{failure}; the run ends. Start the same command again on all hosts to go on from the "
        "last checkpoint"
    )


def is_stopped(pid: int) -> bool:
    """Whether a process exists but does not run (SIGSTOP, a debugger)."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            return file.read().rpartition(b")")[2].split()[0] in (b"T", b"t")
    except (OSError, IndexError):
        return False


def main() -> None:
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    values = json.loads(sys.stdin.buffer.raw.readline())  # type: ignore[attr-defined]
    settings = Settings(**values | {"coordinator": tuple(values["coordinator"])})
    watchdog = Watchdog(settings)
    try:
        watchdog.meet()
    except StartError as error:
        watchdog.main.send(error=str(error))
        return
    watchdog.watch()


if __name__ == "__main__":
    main()

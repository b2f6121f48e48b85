"""A small process beside each process of a run: it notices when one dies, hangs or fails.

JAX's runtime notices too, but names no host, prints a stack dump, and does not hear of an ordinary
exception at all: the others would wait in a collective for ever. The watch of process 0 is the
hub; the others' report to it every few seconds as long as the process they belong to is alive and
not stopped. The first fault becomes the verdict, told to all; each watch hands it to its process,
kills that if it does not end by itself, and prints the verdict if it is dead already.

Run as a program (standard library alone, so that it costs little and shares no lock with JAX):
standard input and output are pipes to the process it belongs to, with one JSON object a line: from
it `done`, `failed` (with an exception) and `ends` (it prints the verdict itself), to it `verdict`.
"""

from __future__ import annotations

import json
import os
import selectors
import signal
import socket
import sys
import time
from typing import Any

CONNECT_SECONDS = 20.0
KILL_SECONDS = 6.0
REPLY_SECONDS = 3.0


class Link:
    """Lines of JSON over a socket or a pair of pipes."""

    def __init__(self, readable: Any, write: Any, id: int | None = None) -> None:
        self.fd, self.readable, self.write, self.id = readable.fileno(), readable, write, id
        self.data, self.open, self.heard = b"", True, time.monotonic()

    def send(self, **message: Any) -> None:
        try:
            self.write(json.dumps(message).encode() + b"\n")
        except OSError:
            self.open = False

    def receive(self) -> list[dict[str, Any]]:
        """Messages that have come; `open` turns False at the end."""
        try:
            more = os.read(self.fd, 65536)
        except OSError:
            more = b""
        self.open = self.open and bool(more)
        self.heard = time.monotonic()
        *lines, self.data = (self.data + more).split(b"\n")
        try:
            messages = [json.loads(line) for line in lines]
        except ValueError:
            messages, self.open = [], False
        return messages


class Watch:
    """The state of one watch; `run` returns when there is nothing left to watch.

    Args:
      id, names: of the process this belongs to, and the hosts of all.
      pid: of that process.
      timeout: seconds of silence after which a host counts as dead.
      hub: the hub's address.
      server: on process 0, the socket the others connect to.
    """

    def __init__(
        self,
        id: int,
        names: list[str],
        pid: int,
        timeout: float,
        hub: tuple[str, int],
        server: socket.socket | None,
    ) -> None:
        self.id, self.names, self.pid, self.timeout = id, names, pid, timeout
        self.server, self.interval = server, max(0.2, timeout / 6)
        self.selector = selectors.DefaultSelector()
        self.main = Link(sys.stdin.buffer.raw, sys.stdout.buffer.raw.write)  # type: ignore[attr-defined]
        self.selector.register(self.main.fd, selectors.EVENT_READ, self.main)
        self.members: dict[int, Link] = {}
        self.finished: set[int] = set()
        self.verdict: str | None = None
        self.verdict_time = self.last_alive = time.monotonic()
        self.main_gone, self.main_knows = 0.0, False
        self.hub: Link | None = None
        if server is not None:
            self.selector.register(server, selectors.EVENT_READ)
        else:
            self.hub = self.connect(hub)

    def connect(self, hub: tuple[str, int]) -> Link | None:
        deadline = time.monotonic() + CONNECT_SECONDS
        while time.monotonic() < deadline:
            try:
                return self.link(socket.create_connection(hub, timeout=5.0))
            except OSError:
                time.sleep(0.2)
        print(
            f"{self.name(self.id)} cannot reach port {hub[1]} of {hub[0]}; a host that dies will "
            "be noticed by the runtime alone",
            file=sys.stderr, flush=True,
        )  # fmt: skip
        return None

    def link(self, connection: socket.socket) -> Link:
        connection.settimeout(2.0)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        link = Link(connection, connection.sendall)
        self.selector.register(connection, selectors.EVENT_READ, link)
        link.send(id=self.id)
        return link

    def name(self, id: int) -> str:
        return f"host {id} of {len(self.names)} ({self.names[id]})"

    def run(self) -> None:
        next_beat = 0.0
        while not self.is_over():
            for key, _ in self.selector.select(self.interval / 2):
                if key.data is None:
                    assert self.server is not None
                    self.link(self.server.accept()[0])
                else:
                    self.read(key.data)
            now = time.monotonic()
            if now >= next_beat:
                next_beat = now + self.interval
                self.beat(now)
            self.enforce(now)

    def is_over(self) -> bool:
        """Whether the process is gone, or done, and no other depends on this watch."""
        mine = not self.main.open or self.id in self.finished
        if self.server is None:
            hub_done = self.hub is None or not self.hub.open
            waiting = self.main_gone and time.monotonic() < self.main_gone + REPLY_SECONDS
            return mine and (hub_done or not waiting)
        others = any(link.open and i not in self.finished for i, link in self.members.items())
        late = self.verdict and time.monotonic() > self.verdict_time + KILL_SECONDS + REPLY_SECONDS
        return mine and (not others or bool(late))

    def read(self, link: Link) -> None:
        messages = link.receive()
        for message in messages:
            if link is self.main:
                self.on_main(message)
            elif link is self.hub:
                if "verdict" in message:
                    self.decide(message["verdict"])
            else:
                self.on_member(link, message)
        if link.open:
            return
        self.selector.unregister(link.readable if link is not self.main else link.fd)
        if link is self.main:
            self.on_main_gone()
        elif link is self.hub:
            if self.id not in self.finished:
                self.decide(f"{self.name(0)} stopped answering")
        elif link.id is not None and link.id not in self.finished:
            self.decide(f"{self.name(link.id)} stopped answering")

    def on_main(self, message: dict[str, Any]) -> None:
        self.main_knows = True
        if "done" in message:
            self.report(done=True)
        elif "failed" in message:
            self.report(fault=f"ended with {message['failed']}")

    def on_main_gone(self) -> None:
        self.main_gone = time.monotonic()
        if self.main_knows:
            return
        if self.verdict is None:
            self.report(fault="was killed or crashed")
        else:  # the runtime was faster
            print(sentence(self.verdict), file=sys.stderr, flush=True)

    def on_member(self, link: Link, message: dict[str, Any]) -> None:
        if "id" in message:
            link.id = int(message["id"])
            self.members[link.id] = link
            if self.verdict is not None:
                link.send(verdict=self.verdict)
        if link.id is not None:
            self.hear(link.id, message)

    def report(self, **message: Any) -> None:
        """Tell the hub of this watch's own process."""
        if "done" in message:
            self.finished.add(self.id)
        if self.server is not None:
            self.hear(self.id, message)
        elif self.hub is not None and self.hub.open:
            self.hub.send(**message)
        elif "fault" in message:
            self.decide(f"{self.name(self.id)} {message['fault']}")

    def hear(self, id: int, message: dict[str, Any]) -> None:
        """What the hub makes of a report."""
        if "done" in message:
            self.finished.add(id)
        if "fault" in message and id not in self.finished:
            self.decide(f"{self.name(id)} {message['fault']}")

    def beat(self, now: float) -> None:
        """Tell the others that this host is alive; on the hub, look who is not."""
        stopped = self.main.open and is_stopped(self.pid)
        if not stopped:
            self.last_alive = now
            for link in [*self.members.values(), self.hub]:
                if link is not None and link.open:
                    link.send(beat=True)
        if self.verdict is not None or self.id in self.finished:
            return
        if self.server is None:
            if self.hub is not None and now - self.hub.heard > self.timeout:
                self.decide(f"{self.name(0)} stopped answering")
            return
        if now - self.last_alive > self.timeout:
            self.decide(f"{self.name(0)} stopped answering")
        for i, link in self.members.items():
            if i not in self.finished and now - link.heard > self.timeout:
                self.decide(f"{self.name(i)} stopped answering")

    def decide(self, verdict: str) -> None:
        """The first fault is what all are told."""
        if self.verdict is not None:
            return
        self.verdict, self.verdict_time = verdict, time.monotonic()
        for link in self.members.values():
            link.send(verdict=verdict)
        if self.main.open:
            self.main.send(verdict=verdict)
        elif not self.main_knows:
            print(sentence(verdict), file=sys.stderr, flush=True)

    def enforce(self, now: float) -> None:
        """Kill a process that has been told to end and did not."""
        if self.verdict is None or not self.main.open or self.id in self.finished:
            return
        if now - self.verdict_time > KILL_SECONDS:
            print(sentence(self.verdict), file=sys.stderr, flush=True)
            os.kill(self.pid, signal.SIGKILL)
            self.main.open = False


def sentence(verdict: str) -> str:
    """The line a host prints."""
    return (
        f"{verdict}; the run ends. Start the same command again on all hosts to go on from the "
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
    settings = json.loads(sys.argv[1])
    fd = settings.pop("server")
    server = None if fd is None else socket.socket(fileno=fd)
    Watch(server=server, **settings).run()


if __name__ == "__main__":
    main()

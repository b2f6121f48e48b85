"""This process's end of its watchdog: who is there, what all agree on, who failed."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import pathlib
import queue
import re
import secrets
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from typing import IO, Any

import jax

from lm.config.codec import ConfigError
from lm.distributed import watchdog
from lm.distributed.cluster import ClusterError

PEER_FAILED = 75  # exit status: another host failed, try again (EX_TEMPFAIL of sysexits.h)
_GRACE_SECONDS = 2.0
# How much later than a broken collective the report of its cause may come.
_CONSEQUENCE_SECONDS = 5.0
_RUNTIME_ERROR = re.compile(
    "(UNKNOWN|INTERNAL|UNAVAILABLE|ABORTED|CANCELLED|DEADLINE_EXCEEDED|FAILED_PRECONDITION): "
)
Folders = Mapping[str, str | os.PathLike[str]]


def exit_code(error: BaseException) -> int:
    """The status a program ends with when `error` leaves it."""
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else int(error.code is not None)
    if isinstance(error, ConfigError | ClusterError):
        return watchdog.USAGE
    return 128 + signal.SIGINT if isinstance(error, KeyboardInterrupt) else 1


def exit_at_once(code: int) -> None:
    """End without waiting for other threads or hosts."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


class Guard:
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
        self.informed, self.lock = threading.Event(), threading.Lock()
        self.leaving = False
        self.failure: dict[str, Any] = {}
        self.waits: dict[str, str] = {}  # on process 0: for whom points wait that all report
        self.answers: dict[str, queue.SimpleQueue[str]] = {}
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

    def agree(self, point: str, facts: Mapping[str, Any], folders: Folders) -> None:
        """Wait for all hosts at a point, and compare what they say there.

        Args:
          point: its name, the same on all hosts.
          facts: values of JSON's types that must be the same on all.
          folders: paths by name that must lead all to one folder, which each can write to.

        Raises:
          ClusterError: they differ; the message names the first difference, on all hosts.
        """
        answer = self.answers[point] = queue.SimpleQueue()
        with _marks(folders, self.settings.id) as marks:
            self._send(point=point, facts=dict(facts), folders=marks)
            while True:
                with contextlib.suppress(queue.Empty):
                    error = answer.get(timeout=5.0)
                    break
                if self.process.poll() is not None:
                    error = "the watchdog ended"
                    break
        if error:
            self.leaving = True
            self._send(done=True)
            for name, path in folders.items():  # what the mark made
                with contextlib.suppress(OSError):
                    if marks[name].get("made"):
                        os.rmdir(path)
            raise ClusterError(error)

    def reached(self, point: str) -> None:
        """Report that this process has reached a point; the first host says who has not."""
        self._send(point=point, facts={}, folders={})

    def end_if_consequence(self, error: BaseException) -> None:
        """End this process if the error is but what the fault of another host looks like here."""
        # Broken collectives are a JaxRuntimeError or a ValueError, as it happens.
        if _RUNTIME_ERROR.match(str(error)) and self.informed.wait(_CONSEQUENCE_SECONDS):
            self._end(f"{_summary(error)}\n")

    def fail(self, error: BaseException) -> None:
        """Report to the others why this process ends; returns when they know."""
        if not self.leaving:
            self.leaving = True
            self._send(raised=_summary(error), status=exit_code(error))
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
        with contextlib.suppress(OSError), self.lock:
            self.stdin.write(json.dumps(message).encode() + b"\n")
            self.stdin.flush()

    def _listen(self, stream: IO[bytes]) -> None:
        for line in stream:
            message = json.loads(line)
            if "point" in message:
                self.waits.pop(message["point"], None)
                if (answer := self.answers.pop(message["point"], None)) is not None:
                    answer.put(message["error"])
            elif "waits" in message:
                self.waits[message["waits"]] = message["text"]
            else:
                self.failure = message
                self.informed.set()
                # A host that failed for the same reason prints its own traceback first.
                time.sleep(_GRACE_SECONDS)
                if not self.leaving:
                    self._end()

    def _end(self, before: str = "") -> None:
        self._send(ends=True)
        print(before + watchdog.sentence(**self.failure), file=sys.stderr, flush=True)
        exit_at_once(self.failure.get("status", PEER_FAILED))


def _summary(error: BaseException) -> str:
    text = str(error).strip().split("\n", 1)[0][:300]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


@contextlib.contextmanager
def _marks(folders: Folders, process: int) -> Iterator[dict[str, dict[str, Any]]]:
    """A file of random name in each folder while the block lasts; made if it does not exist."""
    marks: dict[str, dict[str, Any]] = {}
    files = []
    for name, path in folders.items():
        folder = pathlib.Path(path).absolute()
        made, file = not folder.exists(), folder / f".host-{process}-{secrets.token_hex(8)}"
        marks[name] = {"path": str(folder), "file": file.name, "made": made}
        try:
            folder.mkdir(parents=True, exist_ok=True)
            file.touch()
            files.append(file)
        except OSError as error:
            marks[name]["error"] = error.strerror or str(error)
    try:
        yield marks
    finally:
        for file in files:
            with contextlib.suppress(OSError):
                file.unlink()

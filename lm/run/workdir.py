"""Whose workdir it is: one process owns it, and goes on only with the configuration it began with.

The owner holds the operating system's lock (`flock`) on `<workdir>/owner.json`, which says who it
is; of several hosts, the first holds it for all. The system takes the lock back when the process
ends, however it ends. Programs that only read a run do not ask.

Between machines the lock holds where the file system has such locks (NFS, Lustre with `-o flock`,
GPFS). One that has none is said to have none, and the run begins. A bucket mounted as a folder
locks on one machine only, without saying so: there, two machines are kept apart by whoever starts
them. Addresses (`gs://...`) are no workdirs at all.
"""

from __future__ import annotations

import contextlib
import datetime
import errno
import fcntl
import json
import os
import pathlib
import re
import socket
from collections.abc import Iterator
from typing import IO, Any

from absl import logging

from lm.config import codec
from lm.config.changes import Change, changes
from lm.config.codec import ConfigError

OWNER = "owner.json"
_NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK)


def check_path(workdir: pathlib.Path) -> None:
    """Raises ConfigError if `workdir` is not a path that a run can be written to."""
    if re.match(r"\w+:/", str(workdir)):
        raise ConfigError(
            f"workdir {workdir} is an address, and a run writes to a file system: mount the bucket "
            "(gcsfuse, s3fs) and give the path below it"
        )
    path = os.fsencode(workdir.absolute())
    if b"\\" in path or os.fsdecode(path) != path.decode(errors="replace"):
        raise ConfigError(
            f"workdir {os.fsdecode(path)!r}: TensorStore, which writes checkpoints, takes no "
            "backslash and only UTF-8; give a path without"
        )


@contextlib.contextmanager
def result(path: pathlib.Path, remedy: str) -> Iterator[None]:
    """Around the writing of a result that is not worth a run: where it fails that is said."""
    try:
        yield
    except OSError as error:
        logging.error("%s is not written: %s; %s", path, error.strerror or error, remedy)


@contextlib.contextmanager
def owned(workdir: pathlib.Path) -> Iterator[None]:
    """Own `workdir` for the length of the block; it is made if need be.

    Raises:
      ConfigError: another process owns it (the message says which, and since when), or it cannot
        be written to.
    """
    made, path = not workdir.exists(), workdir / OWNER
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        file = _locked(path)
    except OSError as error:
        raise ConfigError(
            f"workdir {workdir} cannot be written to: {error.strerror or error}; give another "
            "--workdir"
        ) from None
    with file:
        since = datetime.datetime.now().astimezone().isoformat(" ", "seconds")
        owner = {"host": socket.gethostname(), "pid": os.getpid(), "since": since}
        with contextlib.suppress(OSError):  # a full disk: the lock holds all the same
            file.truncate(0)
            file.write(json.dumps(owner).encode() + b"\n")
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                path.unlink()
                if made:
                    workdir.rmdir()  # where nothing was written


def _locked(path: pathlib.Path) -> IO[bytes]:
    """The file at `path`, made if need be, open and locked."""
    while True:
        file = path.open("a+b", buffering=0)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(_held(path, file)) from None
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            print(f"{path.parent}: {error.strerror}: no lock keeps a second run out of this folder")
        if path.exists():
            return file
        file.close()  # its owner has ended since, and removed it


def _held(path: pathlib.Path, file: IO[bytes]) -> str:
    """That the workdir is in use, and by whom."""
    file.seek(0)
    try:
        owner = "by pid {pid} on {host} since {since}".format(**json.loads(file.read()))
    except (ValueError, TypeError, KeyError):  # it has not said so yet
        owner = "by another process"
    return (
        f"{path.parent} is in use {owner}; wait for that run or end it, or give another --workdir "
        f"(if that machine is gone, remove {path})"
    )


def claim_workdir(config: Any, workdir: pathlib.Path) -> list[Change]:
    """Check that the run begun in `workdir`, if any, is that of `config`.

    Returns:
      What has changed in the configuration since, all of it in fields that may change.

    Raises:
      ConfigError: `workdir` is not a path, or the folder holds a run with another configuration;
        every difference is named.
    """
    check_path(workdir)
    path = workdir / "config.json"
    if not any((workdir / name).exists() for name in ("metrics.jsonl", "checkpoints")):
        return []
    if not path.exists():
        raise ConfigError(
            f"{workdir} holds metrics or checkpoints but no config.json, so it is not known "
            "whose they are; give another --workdir"
        )
    found = changes(codec.load(path, type(config)), config)
    other = [change.text for change in found if change.allowed is None]
    if other:
        raise ConfigError(
            f"{workdir} holds another run: {'; '.join(other[:8])}. Give another --workdir, "
            "or the configuration it began with"
        )
    return found

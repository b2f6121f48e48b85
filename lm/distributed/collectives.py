"""Small exchanges between the processes of a run: broadcast, fetch, barrier, printing once."""

from __future__ import annotations

import json
from typing import Any, TextIO

import jax
import numpy as np
from jax.experimental import multihost_utils

from lm.distributed.startup import agree


def is_first_process() -> bool:
    """Whether this process is the one that prints and writes; true if it is alone.

    A process that runs alone asks no device for it.
    """
    return not jax.distributed.is_initialized() or jax.process_index() == 0


def print_once(*words: Any, file: TextIO | None = None) -> None:
    """Print on the first process alone, at once; to standard output by default."""
    if is_first_process():
        print(*words, file=file, flush=True)


def barrier(name: str) -> None:
    """Wait until every process has reached the barrier of this name; late ones are named."""
    if jax.process_count() > 1 and not agree(name, {}):
        multihost_utils.sync_global_devices(name)


def broadcast(value: Any) -> Any:
    """The first process's value on every process. Small trees of what JSON can hold.

    The values of other processes are ignored and may be None.
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
    """Whole arrays of a tree as NumPy arrays, on every host. All processes must call it.

    An array sharded over hosts cannot be read by one of them alone.
    """
    if jax.process_count() == 1:
        return jax.device_get(tree)
    return multihost_utils.process_allgather(tree, tiled=True)

"""Reading ahead on a thread."""

import contextlib
import itertools
import queue
import threading
from typing import Any


class Prefetcher:
    """Runs `read(step)`, `read(step + 1)`, ... on a thread, at most `depth` ahead.

    An error in `read` is raised by the `next` that would have returned its batch. Leaving the
    `with` block, or `close`, stops the thread.
    """

    def __init__(self, read, step: int = 0, num_steps: int | None = None, depth: int = 2):
        self._queue: queue.Queue[tuple[Any, BaseException | None]] = queue.Queue(max(1, depth))
        self._stop = threading.Event()
        self._thread = threading.Thread(
            target=self._run, args=(read, step, num_steps), name="prefetch", daemon=True
        )
        self._thread.start()

    def __iter__(self) -> "Prefetcher":
        return self

    def __next__(self):
        if self._stop.is_set():
            raise StopIteration
        batch, error = self._queue.get()
        if error is not None:
            self._stop.set()
            raise error
        return batch

    def __enter__(self) -> "Prefetcher":
        return self

    def __exit__(self, *exception) -> None:
        self.close()

    def close(self) -> None:
        """Stops the thread, when it has read the batch in hand, and drops what it read ahead."""
        self._stop.set()
        while self._thread.is_alive():
            try:
                self._queue.get_nowait()
            except queue.Empty:
                self._thread.join(0.01)
        with contextlib.suppress(queue.Full):  # a `next` that another thread waits in
            self._queue.put_nowait((None, StopIteration()))

    def _run(self, read, step: int, num_steps: int | None) -> None:
        error: BaseException = StopIteration()
        try:
            for each in itertools.islice(itertools.count(step), num_steps):
                if self._stop.is_set():
                    return
                self._put(read(each), None)
        except BaseException as raised:
            error = raised
        self._put(None, error)

    def _put(self, batch, error: BaseException | None) -> None:
        if not self._stop.is_set():
            self._queue.put((batch, error))

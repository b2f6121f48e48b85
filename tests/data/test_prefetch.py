import threading
import time
from unittest.mock import Mock

import pytest

from lm.data import Prefetcher


@pytest.mark.parametrize("error", [OSError, SystemExit])
def test_prefetch_passes_errors_on_after_the_good_batches(error):
    """Not even an exit in the thread leaves the consumer waiting."""
    with Prefetcher(Mock(side_effect=[0, 1, error("disk gone")])) as stream:
        assert [next(stream), next(stream)] == [0, 1]
        with pytest.raises(error, match="disk gone"):
            next(stream)
        with pytest.raises(StopIteration):
            next(stream)


def test_closing_stops_the_thread_and_depth_bounds_it():
    read = []
    before = threading.active_count()
    with Prefetcher(lambda step: read.append(step) or step, depth=2) as stream:
        assert next(stream) == 0
        deadline = time.monotonic() + 100
        while len(read) < 4 and time.monotonic() < deadline:
            time.sleep(0.005)
        time.sleep(0.05)
        assert len(read) == 4  # one taken, two waiting, one in hand
    assert threading.active_count() == before
    with pytest.raises(StopIteration):
        next(stream)


def test_closing_ends_a_next_that_waits_in_another_thread():
    entered, release = threading.Event(), threading.Event()

    def read(step):
        entered.set()
        release.wait(100)
        return step

    stream = Prefetcher(read)
    outcome = []
    waiting = threading.Thread(target=lambda: outcome.append(next(stream, "closed")))
    waiting.start()
    assert entered.wait(100)
    closing = threading.Thread(target=stream.close)
    closing.start()
    time.sleep(0.05)
    release.set()
    for thread in (closing, waiting):
        thread.join(100)
        assert not thread.is_alive()
    assert outcome == ["closed"]

import threading
import time

import pytest

from lm.data import Prefetcher


def test_prefetch_passes_errors_on_after_the_good_batches():
    def read(step):
        if step == 2:
            raise OSError("disk gone")
        return step

    with Prefetcher(read) as stream:
        assert [next(stream), next(stream)] == [0, 1]
        with pytest.raises(OSError, match="disk gone"):
            next(stream)
        with pytest.raises(StopIteration):
            next(stream)


def test_closing_stops_the_thread_and_depth_bounds_it():
    read = []
    before = threading.active_count()
    with Prefetcher(lambda step: read.append(step) or step, depth=2) as stream:
        assert next(stream) == 0
        deadline = time.monotonic() + 10
        while len(read) < 4 and time.monotonic() < deadline:
            time.sleep(0.005)
        time.sleep(0.05)
        assert len(read) == 4  # one taken, two waiting, one in hand
    assert threading.active_count() == before
    with pytest.raises(StopIteration):
        next(stream)


def test_not_even_an_exit_in_the_thread_leaves_the_consumer_waiting():
    def read(step):
        raise SystemExit(3)

    with Prefetcher(read) as stream, pytest.raises(SystemExit):
        next(stream)


def test_closing_ends_a_next_that_waits_in_another_thread():
    entered, release = threading.Event(), threading.Event()

    def read(step):
        entered.set()
        release.wait(10)
        return step

    stream = Prefetcher(read)
    outcome = []
    waiting = threading.Thread(target=lambda: outcome.append(next(stream, "closed")))
    waiting.start()
    assert entered.wait(10)
    closing = threading.Thread(target=stream.close)
    closing.start()
    time.sleep(0.05)
    release.set()
    for thread in (closing, waiting):
        thread.join(10)
        assert not thread.is_alive()
    assert outcome == ["closed"]


def test_waiting_is_counted():
    with Prefetcher(lambda step: step, num_steps=5) as stream:
        assert stream.wait_seconds == 0
        list(stream)
        assert stream.wait_seconds > 0

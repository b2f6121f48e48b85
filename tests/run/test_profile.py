"""Traces appear for the steps asked for, whole, and never stand in the way of training."""

import gzip
import json

import jax
import jax.numpy as jnp

from lm.run.profile import Profiler, parse_steps
from tests.refuses import refuses


def test_ranges_are_half_open_and_hold_steps_of_the_run():
    assert list(parse_steps("10:13", 13)) == [10, 11, 12]
    for text, *words in (
        ("10", "not a range of steps; give FIRST:END, such as 10:15"),
        ("a:b", "not a range of steps"),
        ("1:2:3", "not a range of steps"),
        ("5:5", "holds no step; ", " such as 5:10"),
        ("7:3", "holds no step"),
        ("-1:3", "holds no step; ", " such as 0:5"),
        ("98:103", "beyond the run's 100 steps; give for instance 95:100"),
        ("200:201", "give for instance 95:100"),
    ):
        refuses(lambda text=text: parse_steps(text, 100), *words)


def run(folder, steps, first, last):
    said = []
    step = jax.jit(lambda x: jnp.tanh(x @ x))
    x = jnp.ones((64, 64))
    with Profiler(folder, steps, said.append) as profiler:
        for i in range(first, last):
            with profiler.at(i, x):
                x = step(x)
    return said


def traced_steps(folder):
    (path,) = folder.rglob("*.trace.json.gz")
    events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    return sorted(int(e["args"]["step_num"]) for e in events if e.get("name") == "train")


def test_the_trace_holds_the_steps_of_the_range(tmp_path):
    said = run(tmp_path / "a", range(2, 5), 0, 8)
    assert traced_steps(tmp_path / "a") == [2, 3, 4]
    assert len(said) == 1
    assert str(tmp_path / "a") in said[0] and "xprof" in said[0] and "perfetto" in said[0]
    # Resumed inside the range, and ended inside it.
    run(tmp_path / "b", range(2, 9), 5, 7)
    assert traced_steps(tmp_path / "b") == [5, 6]


def test_no_range_no_trace(tmp_path):
    assert run(tmp_path / "profile", None, 0, 3) == []
    assert run(tmp_path / "profile", range(2), 2, 4) == []
    assert not (tmp_path / "profile").exists()


def test_a_profiler_that_fails_ends_no_training(tmp_path):
    (tmp_path / "profile").write_text("a file where the folder should be")
    jax.profiler.start_trace(tmp_path / "other")  # only one trace at a time
    try:
        (said,) = run(tmp_path / "profile", range(1, 3), 0, 4)
    finally:
        jax.profiler.stop_trace()
    assert "no profile, training goes on" in said
    (said,) = run(tmp_path / "profile", range(1, 3), 0, 4)
    assert "profile" in said

"""Every moment of wall time has one kind, over kills and rewinds; rates are over steps alone."""

import contextlib
import itertools

import jax
import jax.numpy as jnp
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lm.formats.known import known_model
from lm.hardware.chips import peak_flops
from lm.model import train_flops
from lm.run.goodput import KINDS, Goodput, Hardware, Throughput, duration, process_age, table
from lm.run.metrics import MetricsWriter, read
from tests.refuses import refuses


class Clock:
    now = 1000.0

    def __call__(self):
        return self.now


# A tree of spans: (kind, what happens inside), where a number is time that passes.
PASSING = st.floats(0.0, 100.0)
SPANS = st.recursive(
    PASSING, lambda inner: st.tuples(st.sampled_from(sorted(KINDS)), st.lists(inner, max_size=4))
)


@given(st.lists(SPANS, max_size=6), st.floats(0.0, 50.0))
def test_every_moment_belongs_to_the_innermost_span(tree, already):
    clock = Clock()
    goodput = Goodput(clock=clock, already=already)
    expected = dict.fromkeys(KINDS, 0.0) | {"start_up": already}
    stepped = False

    def run(node, kind):
        nonlocal stepped
        if isinstance(node, float):
            clock.now += node
            expected[kind or ("other" if stepped else "start_up")] += node
            return
        with goodput.timed(node[0]):
            for child in node[1]:
                run(child, node[0])
        stepped = stepped or node[0] == "step"

    for node in tree:
        run(node, None)
    assert goodput.seconds == pytest.approx(expected)
    assert sum(goodput.seconds.values()) == pytest.approx(clock.now - 1000.0 + already)


def test_time_is_known_while_it_is_being_spent_and_a_span_ends_when_its_block_raises():
    clock = Clock()
    goodput = Goodput(clock=clock)
    clock.now += 1.0
    with contextlib.suppress(KeyError), goodput.timed("step"):
        clock.now += 3.0
        with goodput.timed("evaluation"):
            clock.now += 4.0
            assert goodput.share == pytest.approx(3 / 8)
            assert goodput.row() == {"seconds": 8.0, "step_seconds": 3.0}
            raise KeyError
    clock.now += 5.0
    assert goodput.seconds["evaluation"] == 4.0 and goodput.seconds["other"] == 5.0
    refuses(lambda: goodput.timed("eval").__enter__(), "'eval' is unknown; use ", "evaluation")


def test_waiting_for_data_costs_only_an_idle_device():
    clock = Clock()
    goodput = Goodput(clock=clock)

    def slow():
        for i in range(4):
            clock.now += 2.0
            yield i
        clock.now += 2.0

    busy = itertools.cycle([False, True])
    with goodput.timed("step"):
        for _ in goodput.waiting(slow(), busy=lambda: next(busy)):
            clock.now += 7.0
    # Two of the four waits ended with the device at work; the one for the end found it idle.
    assert goodput.seconds["data_wait"] == 6.0
    assert goodput.seconds["step"] == 4 * 7.0 + 2 * 2.0


@given(st.lists(st.tuples(st.floats(0.01, 10.0), st.integers(0, 3)), max_size=20))
def test_compilations_inside_compilations_count_once(events):
    """Each event: some time passes, then a compilation ends that began before n earlier events."""
    clock = Clock()
    goodput = Goodput(clock=clock)
    ends, covered = [1000.0], []
    with goodput.timed("step"):
        for passing, reach in events:
            clock.now += passing
            start = ends[-1 - min(reach, len(ends) - 1)]
            goodput.has_compiled(clock.now - start)
            covered.append((start, clock.now))
            ends.append(clock.now)
    points = sorted({p for interval in covered for p in interval})
    union = sum(
        b - a for a, b in itertools.pairwise(points) if any(s <= a and b <= e for s, e in covered)
    )
    assert goodput.seconds["compile"] == pytest.approx(union)
    assert sum(goodput.seconds.values()) == pytest.approx(clock.now - 1000.0)


def test_what_jax_compiles_counts_as_compiling_wherever_it_happens():
    goodput = Goodput()
    double = jax.jit(lambda x: x * 2)
    with goodput.watch_compilation():
        with goodput.timed("step"):
            double(jnp.zeros(3)).block_until_ready()
        first = goodput.seconds["compile"]
        with goodput.timed("step"):
            double(jnp.zeros(3)).block_until_ready()
        again = goodput.seconds["compile"]
        with goodput.timed("evaluation"):
            double(jnp.zeros(5)).block_until_ready()
        other_shape = goodput.seconds["compile"]
    assert 0 < first == again < other_shape
    double(jnp.zeros(7)).block_until_ready()
    assert goodput.seconds["compile"] == other_shape


def test_steps_thrown_away_are_lost_and_count_as_throughput_all_the_same():
    clock = Clock()
    goodput = Goodput(clock=clock)
    throughput = Throughput(goodput.step_clock)

    def steps(first, last, seconds):
        for step in range(first, last + 1):
            clock.now += seconds
            goodput.done(step)
            throughput.add(100)

    with goodput.timed("step"):
        steps(1, 10, 2.0)
        assert goodput.rewind(6) == pytest.approx(8.0)
        with goodput.timed("restore"):
            clock.now += 5.0
        steps(7, 12, 2.0)
        assert throughput.read()["tokens_per_second"] == pytest.approx(50.0)
        assert goodput.rewind(0) == pytest.approx(24.0)
        steps(1, 3, 1.0)
    assert goodput.seconds["step"] == pytest.approx(3.0)
    assert goodput.seconds["lost"] == pytest.approx(32.0)
    assert goodput.seconds["restore"] == 5.0
    assert throughput.read()["tokens_per_second"] == pytest.approx(100.0)


def process(workdir, clock, start, stop, *, save=None, killed=False):
    """A process of a run: 3 s of start-up, 2 s a step, 1 s a checkpoint; a row every step."""
    clock.now += 1000.0  # nothing ran in between
    goodput = Goodput(clock=clock)
    clock.now += 3.0
    with MetricsWriter(workdir, tensorboard=False) as writer:
        goodput.resume(read(writer.path), start)
        writer.truncate_after(start)
        writer.event("goodput", start, **goodput.event())
        with goodput.timed("step"):
            for step in range(start + 1, stop + 1):
                clock.now += 2.0
                goodput.done(step)
                writer.write(step, goodput.row())
                if step == save:
                    with goodput.timed("checkpoint"):
                        clock.now += 1.0
                    writer.event("goodput", step, **goodput.event())
        if not killed:
            writer.event("goodput", stop, **goodput.event())
    return goodput


def test_the_account_goes_on_over_kills(tmp_path):
    clock = Clock()
    process(tmp_path, clock, 0, 7, save=4, killed=True)
    goodput = process(tmp_path, clock, 4, 9, save=8, killed=True)
    assert goodput.seconds["lost"] == pytest.approx(3 * 2.0)
    goodput = process(tmp_path, clock, 8, 10)
    found = goodput.seconds
    assert found["step"] == pytest.approx(10 * 2.0)
    assert found["lost"] == pytest.approx(4 * 2.0)
    assert found["start_up"] == pytest.approx(3 * 3.0)
    assert found["checkpoint"] == pytest.approx(2 * 1.0)
    assert sum(found.values()) == pytest.approx(20 + 8 + 9 + 2)
    assert goodput.num_starts == 3
    *_, last = [row for row in read(tmp_path / "metrics.jsonl") if row.get("event") == "goodput"]
    assert last["seconds"] == pytest.approx(found)
    assert last["share"] == pytest.approx(20 / 39, abs=1e-4)
    # A run that had ended goes on; then it is rewound to before this process began.
    goodput = process(tmp_path, clock, 10, 12)
    assert goodput.seconds["step"] == pytest.approx(24.0)
    assert goodput.rewind(5) == pytest.approx(14.0)


def test_a_run_killed_before_its_first_checkpoint_has_lost_all_its_steps(tmp_path):
    clock = Clock()
    process(tmp_path, clock, 0, 5, killed=True)
    goodput = process(tmp_path, clock, 0, 5)
    assert goodput.seconds["lost"] == pytest.approx(10.0)
    assert goodput.seconds["step"] == pytest.approx(10.0)


def test_files_without_times_are_no_account():
    goodput = Goodput(clock=Clock())
    goodput.resume([{"step": 10, "loss": 1.0}, {"event": "resumed", "step": 5}], 8)
    assert sum(goodput.seconds.values()) == 0.0


def test_the_table_adds_up():
    seconds = dict.fromkeys(KINDS, 0.0) | {"step": 3600.0, "compile": 30.0, "data_wait": 370.0}
    headline, *lines = table(seconds).splitlines()
    assert headline == "goodput 90.0% of 1:06:40"
    assert [line.split()[0] for line in lines] == ["step", "data", "compile"]
    assert all(len(line) <= 100 for line in lines)
    assert [duration(s) for s in (0.04, 9.96, 3723.4)] == ["0.0 s", "0:10", "1:02:03"]


def test_the_process_has_lived_for_a_while():
    assert 0 <= process_age() < 1e6


# Reported step logs of MaxText on TPU7x (github.com/AI-Hypercomputer/tpu-recipes,
# training/ironwood): (model, length, TFLOP/s a chip, tokens/s a chip). Attention counted causal.
IRONWOOD = [
    ("llama3_1_70b", 8192, 1207, 2687),
    ("llama3_405b", 8192, 1261, 500),
    ("llama3_1_70b", 131072, 898, 963),
]


@pytest.mark.parametrize(("model", "length", "tflops", "tokens_per_second"), IRONWOOD)
def test_mfu_as_published(model, length, tflops, tokens_per_second):
    """On the table's own chip, which JAX counts as two devices."""
    peak = peak_flops("TPU7x")
    hardware = Hardware(128, train_flops(known_model(model), length), peak)
    rates = hardware.rates(64 * tokens_per_second)
    assert rates["mfu"] == pytest.approx(tflops / 2307, rel=2e-3)
    assert rates["tokens_per_second_per_device"] == pytest.approx(tokens_per_second / 2)


def test_no_peak_no_mfu():
    assert "mfu" not in Hardware(1, 1e9, None).rates(10.0)
    assert Hardware(2, 1e9, 1e12).rates(10.0)["mfu"] == pytest.approx(0.005)

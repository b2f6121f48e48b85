"""Schedules against optax's and transformers', and at the points their definitions name."""

from typing import get_args

import jax
import numpy as np
import optax
import pytest

from lm.train.schedules import BatchRamp, BatchStage, Kind, Schedule, linear_ramp, ramp_by_tokens

KINDS = get_args(Kind)


def rates(schedule, steps):
    return np.asarray([float(schedule(step)) for step in steps])


def test_warm_up_is_linear_and_reaches_the_peak_once():
    for kind in KINDS:
        schedule = Schedule(kind, 2.0, warmup_steps=4, num_steps=104)
        np.testing.assert_allclose(rates(schedule, range(5)), [0.4, 0.8, 1.2, 1.6, 2.0], rtol=1e-6)
        assert (schedule(5) < 2.0) == (kind in ("cosine", "linear", "inverse_sqrt"))


@pytest.mark.parametrize("kind", ["cosine", "linear"])
def test_decays_to_a_fraction_equal_optax(kind):
    schedule = Schedule(kind, 3.0, 10, 110, final_fraction=0.2)
    theirs = {
        "cosine": optax.cosine_decay_schedule(3.0, 100, alpha=0.2),
        "linear": optax.linear_schedule(3.0, 0.6, 100),
    }[kind]
    steps = np.arange(10, 140)
    np.testing.assert_allclose(rates(schedule, steps), theirs(steps - 10), rtol=1e-5)


def wsd(cooldown):
    ours = Schedule("wsd", 2.0, 10, 120, 0.05, decay_fraction=0.25, cooldown=cooldown)
    theirs = {"num_stable_steps": 80, "decay_type": cooldown, "min_lr_ratio": 0.05}
    return ours, "get_wsd_schedule", {"num_warmup_steps": 10, "num_decay_steps": 30} | theirs


def inverse_sqrt(time_scale):
    ours = Schedule("inverse_sqrt", 2.0, 10, 150, decay_fraction=0.0, time_scale=time_scale)
    theirs = {"num_warmup_steps": 10, "timescale": time_scale}
    return ours, "get_inverse_sqrt_schedule", theirs


@pytest.mark.oracle
@pytest.mark.parametrize(
    ("schedule", "name", "arguments"),
    [wsd("linear"), wsd("1-sqrt"), inverse_sqrt(10), inverse_sqrt(300)],
)
def test_equals_transformers(schedule, name, arguments):
    torch = pytest.importorskip("torch")
    optimization = pytest.importorskip("transformers.optimization")
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(()))], lr=2.0)
    scheduler, theirs = getattr(optimization, name)(optimizer, **arguments), []
    for _ in range(200):
        theirs.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    np.testing.assert_allclose(rates(schedule, range(10, 200)), theirs[10:], rtol=1e-5)


def test_inverse_sqrt_is_the_transformers_of_2017():
    """arXiv:1706.03762, equation 3: d^-0.5 min(n^-0.5, n warmup^-1.5), n counted from 1."""
    width, warmup = 512, 40
    schedule = Schedule(
        "inverse_sqrt", width**-0.5 * warmup**-0.5, warmup - 1, 1000,
        decay_fraction=0.0, time_scale=warmup,
    )  # fmt: skip
    n = np.arange(1, 1000)
    expected = width**-0.5 * np.minimum(n**-0.5, n * warmup**-1.5)
    np.testing.assert_allclose(rates(schedule, n - 1), expected, rtol=1e-5)


def test_a_cool_down_multiplies_the_inverse_square_root():
    without = Schedule("inverse_sqrt", 1.0, 10, 100, decay_fraction=0.0, time_scale=20)
    cooled = Schedule("inverse_sqrt", 1.0, 10, 100, 0.0, decay_fraction=0.4, time_scale=20)
    np.testing.assert_allclose(rates(cooled, range(61)), rates(without, range(61)), rtol=1e-6)
    factor = rates(cooled, [70, 80, 90, 100]) / rates(without, [70, 80, 90, 100])
    np.testing.assert_allclose(factor, [0.75, 0.5, 0.25, 0.0], atol=1e-6)


@pytest.mark.parametrize(
    ("schedule", "steps", "expected"),
    [
        # arXiv:2405.18392, section 3: 1 - sqrt((n - start) / (end - start)).
        (Schedule("wsd", 1.0, 0, 100, 0.0, 0.16, "1-sqrt"), (84, 85, 88, 93, 100, 200),
         (1.0, 0.75, 0.5, 0.25, 0, 0)),
        (Schedule("wsd", 1.0, 10, 100, 0.0, 0.2), (10, 50, 80, 85, 90, 100),
         (1.0, 1.0, 1.0, 0.75, 0.5, 0.0)),
        # A warm-up that ends within the decay starts it at the peak.
        (Schedule("wsd", 1.0, 90, 100, 0.0, 0.5), (90, 95), (1.0, 0.5)),
        (Schedule("constant", 3.0, 1, 10), (0, 1, 9, 99), (1.5, 3, 3, 3)),
    ],
)  # fmt: skip
def test_points(schedule, steps, expected):
    np.testing.assert_allclose(rates(schedule, steps), expected, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_no_steps_and_no_warm_up_are_finite_and_traceable(kind):
    assert np.isfinite(Schedule(kind, 1.0, 0, 0)(0))
    schedule = Schedule(kind, 1.0, 5, 50)
    np.testing.assert_allclose(jax.jit(schedule)(np.int32(20)), schedule(20), rtol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("step", 1.0, 0, 1), "kind='step' is not one of cosine, linear, wsd, inverse_sqrt"),
        (("cosine", -1.0, 0, 1), "peak=-1.0 is not"),
        (("wsd", 1.0, 0, 1, 0.1, 0.2, "sqrt"), "cooldown='sqrt' is not one of linear, 1-sqrt"),
        (("inverse_sqrt", 1.0, 0, 1, 0.1, 0.2, "linear", 0), "time_scale=0 is not"),
        (("cosine", 1.0, -1, 10), "warmup_steps=-1"),
    ],
)
def test_bad_schedules(arguments, message):
    with pytest.raises(ValueError, match=message):
        Schedule(*arguments)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("warmup_steps", "num_steps"), [(90, 100), (100, 100), (20, 6)])
def test_a_long_warm_up_is_not_cut(kind, warmup_steps, num_steps):
    schedule = Schedule(kind, 3.0, warmup_steps, num_steps, decay_fraction=0.0)
    steps = range(min(warmup_steps, num_steps))
    expected = [3.0 * (step + 1) / (warmup_steps + 1) for step in steps]
    np.testing.assert_allclose(rates(schedule, steps), expected, rtol=1e-6)


def test_a_batch_ramp_counts_the_rows_of_its_steps():
    ramp = BatchRamp((BatchStage(0, 4), BatchStage(3, 8), BatchStage(7, 32)), divisor=4)
    sizes = [ramp(step) for step in range(12)]
    assert sizes == [4] * 3 + [8] * 4 + [32] * 5
    for step in range(13):
        assert ramp.rows_before(step) == sum(sizes[:step])


def test_stages_by_tokens_end_with_the_first_step_that_reaches_them():
    ramp = ramp_by_tokens([(1000, 2), (5e3, 8)], 16, sequence_length=100, divisor=2)
    tokens = [100 * ramp.rows_before(step) for step in range(20)]
    for step, size in enumerate(map(ramp, range(19))):
        assert size == (2 if tokens[step] < 1000 else 8 if tokens[step] < 5000 else 16)


@pytest.mark.parametrize("divisor", [1, 8])
@pytest.mark.parametrize(("first", "last"), [(8, 64), (64, 8), (16, 24)])
def test_a_linear_ramp_follows_the_line(first, last, divisor):
    ramp = linear_ramp(first, last, 5, 100, divisor)
    assert ramp(0) == first and {ramp(100), ramp(10_000)} == {last}
    for stage in ramp.stages:
        line = first + (last - first) * stage.first_step / 100
        assert stage.batch_size % divisor == 0
        # Off by half a multiple, and by the half a stage that a rounded size may begin earlier.
        assert abs(stage.batch_size - line) <= divisor / 2
    sizes = [stage.batch_size for stage in ramp.stages]
    assert sizes in (sorted(set(sizes)), sorted(set(sizes), reverse=True))
    assert len(sizes) == (5 if divisor == 1 or abs(last - first) > 8 else 2)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: BatchRamp(()), "begins at step 0"),
        (lambda: BatchRamp((BatchStage(2, 4),)), "begins at step 0"),
        (lambda: BatchRamp((BatchStage(0, 4), BatchStage(0, 8))), "step 0 must begin after"),
        (lambda: BatchRamp((BatchStage(0, 12),), 8), "batch_size=12 .* of 8; use 8 or 16"),
        (lambda: BatchRamp((BatchStage(0, 3),), 8), "batch_size=3 .* of 8; use 8$"),
        (lambda: BatchRamp((BatchStage(0, 0),)), "batch_size=0 .*; use 1"),
        (lambda: BatchRamp((BatchStage(0, 8),), 0), "divisor=0"),
        (lambda: ramp_by_tokens([(100, 4), (90, 8)], 16, 10), "90 tokens would be empty: 120"),
        (lambda: linear_ramp(8, 16, 1, 10), "num_stages=1 must be at least 2"),
        (lambda: linear_ramp(8, 16, 5, 3), "at most num_steps"),
        (lambda: linear_ramp(8, 20, 3, 10, 8), "batch_size=20 at step 10"),
    ],
)
def test_bad_batch_ramps(make, message):
    with pytest.raises(ValueError, match=message):
        make()

"""Schedules at the points their definitions name."""

import jax
import numpy as np
import pytest

from lm.train.schedules import Schedule


def test_warm_up_is_linear_and_reaches_the_peak_once():
    schedule = Schedule("cosine", 2.0, warmup_steps=4, num_steps=104)
    rates = [float(schedule(step)) for step in range(6)]
    np.testing.assert_allclose(rates[:5], [0.4, 0.8, 1.2, 1.6, 2.0], rtol=1e-6)
    assert rates[5] < 2.0


def test_cosine_is_half_way_half_way():
    schedule = Schedule("cosine", 1.0, 0, 100, final_fraction=0.2)
    np.testing.assert_allclose(schedule(0), 1.0)
    np.testing.assert_allclose(schedule(50), 0.6, rtol=1e-6)
    np.testing.assert_allclose(schedule(25), 0.2 + 0.8 * (1 + np.sqrt(0.5)) / 2, rtol=1e-6)
    np.testing.assert_allclose(schedule(100), 0.2, rtol=1e-6)
    np.testing.assert_allclose(schedule(1000), 0.2, rtol=1e-6)


def test_wsd_is_stable_then_linear():
    schedule = Schedule("wsd", 1.0, 10, 100, final_fraction=0.0, decay_fraction=0.2)
    np.testing.assert_allclose([float(schedule(s)) for s in (10, 50, 80)], 1.0)
    np.testing.assert_allclose(
        [float(schedule(s)) for s in (85, 90, 100)], [0.75, 0.5, 0.0], atol=1e-6
    )


def test_wsd_with_a_warm_up_into_its_decay_starts_at_the_peak():
    schedule = Schedule("wsd", 1.0, 90, 100, final_fraction=0.0, decay_fraction=0.5)
    np.testing.assert_allclose(schedule(90), 1.0)
    np.testing.assert_allclose(schedule(95), 0.5, rtol=1e-6)


def test_constant_stays():
    schedule = Schedule("constant", 3.0, 1, 10)
    np.testing.assert_allclose([float(schedule(s)) for s in (0, 1, 9, 99)], [1.5, 3, 3, 3])


@pytest.mark.parametrize("kind", ["cosine", "wsd", "constant"])
def test_no_steps_and_no_warm_up_are_finite_and_traceable(kind):
    assert np.isfinite(Schedule(kind, 1.0, 0, 0)(0))
    schedule = Schedule(kind, 1.0, 5, 50)
    np.testing.assert_allclose(jax.jit(schedule)(np.int32(20)), schedule(20), rtol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("linear", 1.0, 0, 1), "kind 'linear' is unknown; use cosine, wsd, constant"),
        (("cosine", -1.0, 0, 1), "peak=-1.0 must not be negative"),
        (("cosine", 1.0, 0, 1, 1.5), r"final_fraction=1.5 outside \[0, 1\]"),
        (("wsd", 1.0, 0, 1, 0.1, 0.0), "decay_fraction=0.0 must lie in"),
        (("cosine", 1.0, 11, 10), "warmup_steps=11 must lie between 0 and num_steps=10"),
        (("cosine", 1.0, -1, 10), "warmup_steps=-1"),
    ],
)
def test_bad_schedules(arguments, message):
    with pytest.raises(ValueError, match=message):
        Schedule(*arguments)

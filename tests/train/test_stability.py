"""Skipped steps and recovery: what is decided, that nothing moves, and that meshes agree."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm.checkpoints.store import Checkpoints
from lm.model import param_specs
from lm.sharding import MeshShape
from lm.train.accumulation import Accumulation
from lm.train.ema import Ema, ema_params
from lm.train.objective import NextToken, Objective
from lm.train.optimizers import AdamW, make_optimizer
from lm.train.stability import Stability, begin_recovery, restart_statistics
from lm.train.state import Health, abstract_state
from lm.weights import path_name
from tests.refuses import refuses
from tests.train.tiny import OBJECTIVE, UNTIED, Case, begin, make_batch

STABILITY = Stability(sigmas=6.0, window=8, warmup=5)
EMA = Ema(decay=0.8)
SCALES = ("loss_scale", "gradient_scale")
ONE = Case(num_micro_batches=2)
MESH = Case(MeshShape(data=2, fsdp=2, tensor=2), zero=2, num_micro_batches=2)


@dataclasses.dataclass(frozen=True)
class ScaledLoss(Objective):
    """The loss of each token times `loss_scale`; what counts is as before."""

    inner: NextToken = OBJECTIVE

    def inputs(self, batch):
        return self.inner.inputs(batch)

    def loss(self, head, output, batch, rng):
        scaled = {**batch, "weights": batch["weights"] * batch["loss_scale"]}
        terms = self.inner.loss(head, output, scaled, rng)
        count = jnp.sum(batch["weights"])
        return {name: dataclasses.replace(term, count=count) for name, term in terms.items()}


@dataclasses.dataclass(frozen=True)
class ScaledGradient(Accumulation):
    """The gradients times the mean of `gradient_scale`; the loss is as before."""

    def __call__(self, objective, trainable, frozen, batch, rng):
        gradients, *rest = super().__call__(objective, trainable, frozen, batch, rng)
        return jax.tree.map(lambda g: g * jnp.mean(batch["gradient_scale"]), gradients), *rest


def schedule(step):
    return 1e-2 / (1 + 0.1 * step)


def step_and_state(case: Case):
    gradient = ScaledGradient(UNTIED, case.num_micro_batches, loss=case.loss)
    return begin(
        case, make_optimizer(AdamW()), ScaledLoss(), schedule, gradient,
        stability=STABILITY, ema=EMA, max_grad_norm=1.0,
    )  # fmt: skip


@functools.cache
def compiled(case: Case):
    step, state = step_and_state(case)
    return step.lower(state, batch_of(0)).compile()


def new_state(case: Case):
    return step_and_state(case)[1]


def batch_of(step: int, loss=1.0, gradient=1.0, rows=slice(None)):
    """The batch of a step, with its loss (of some rows) and its gradient scaled."""
    batch = make_batch(seed=step % 4)
    for name, scale in zip(SCALES, (loss, gradient), strict=True):
        batch[name] = np.ones_like(batch["weights"])
        batch[name][rows if name == "loss_scale" else slice(None)] = scale
    return batch


def take(case: Case, state, batch):
    step = compiled(case)
    state, metrics = step(state, jax.device_put(batch, step.input_shardings[0][1]))
    return state, {name: float(value) for name, value in metrics.items()}


NAN, INF = math.nan, math.inf
# What is done to which step; the others are healthy.
FAULTS = {
    2: {"loss": NAN, "rows": slice(3, 4)},  # in the warm-up; one row of one micro-batch
    3: {"gradient": 20.0},  # finite: nothing is a spike before the warm-up is over
    8: {"loss": 50.0},
    9: {"gradient": NAN},  # the loss is fine
    10: {"gradient": INF},
    12: {"gradient": 1000.0},  # finite, of a loss that is fine
    14: {"loss": INF},
    15: {"loss": 0.5},  # far below the mean: no harm
    17: {"loss": 50.0},
}
SKIPPED = {2, 8, 9, 10, 12, 14, 17}
NUM_STEPS = 20


@functools.cache
def scripted(case: Case):
    """(states on the host, before and after every step; metrics of every step)."""
    state = new_state(case)
    states, metrics = [jax.device_get(state)], []
    for i in range(NUM_STEPS):
        state, found = take(case, state, batch_of(i, **FAULTS.get(i, {})))
        states.append(jax.device_get(state))
        metrics.append(found)
    return states, metrics


def weighted_moments(values, window):
    """Mean and deviation of values that each came with a weight 1 / min(count, window)."""
    weights = np.zeros(0)
    for i in range(len(values)):
        newest = max(1 / (i + 1), 1 / window)
        weights = np.append(weights * (1 - newest), newest)
    mean = np.sum(weights * values)
    return mean, math.sqrt(np.sum(weights * np.square(np.asarray(values) - mean)))


@pytest.mark.parametrize("num", [1, 2, 7, 8, 9, 40])
def test_statistics_are_weighted_moments(num):
    rng = np.random.default_rng(num)
    losses, norms = rng.normal(5.0, 0.3, num), rng.lognormal(size=num)
    observe = lambda health, x: (STABILITY.observe(health, *x), None)  # noqa: E731
    values = jnp.asarray(np.stack([losses, norms], 1), jnp.float32)
    health, _ = jax.lax.scan(observe, Health.new(), values)
    assert int(health.count) == num
    for found, given in [
        ((health.loss_mean, health.loss_variance), losses),
        ((health.grad_norm_mean, health.grad_norm_variance), norms),
    ]:
        mean, sigma = weighted_moments(given, STABILITY.window)
        np.testing.assert_allclose(found[0], mean, rtol=1e-5)
        np.testing.assert_allclose(np.sqrt(found[1]), sigma, rtol=1e-4, atol=1e-6)
        if num <= STABILITY.window:
            np.testing.assert_allclose(mean, np.mean(given))
            np.testing.assert_allclose(sigma, np.std(given), atol=1e-12)


def test_a_loss_that_stands_still_has_no_spikes_of_rounding():
    health = dataclasses.replace(
        Health.new(), count=jnp.int32(100), loss_mean=jnp.float32(2), grad_norm_mean=jnp.float32(1)
    )
    healthy = lambda loss, norm: bool(STABILITY.is_healthy(health, loss, norm))  # noqa: E731
    assert healthy(2 + 1e-6, 1 - 1e-6)
    assert not healthy(2.1, 1.0) and not healthy(2.0, 1.1)


@pytest.mark.parametrize("case", [ONE, MESH], ids=str)
def test_the_steps_skipped_are_those_that_would_do_harm(case):
    _, metrics = scripted(case)
    assert {i for i, m in enumerate(metrics) if m["skipped"]} == SKIPPED
    losses, norms = [], []
    for i, m in enumerate(metrics):  # the rule, from the reported figures alone
        loss, norm = m["loss"] + OBJECTIVE.z_loss * m["z_loss"], m["grad_norm"]
        bad = not (math.isfinite(loss) and math.isfinite(norm))
        if len(losses) >= STABILITY.warmup:
            for value, seen in [(loss, losses), (norm, norms)]:
                mean, sigma = weighted_moments(seen, STABILITY.window)
                bad |= value > mean + STABILITY.sigmas * sigma
        assert bad == (m["skipped"] == 1), i
        if not bad:
            losses.append(loss)
            norms.append(norm)
        for name, seen in [("loss", losses), ("grad_norm", norms)]:
            mean, sigma = weighted_moments(seen, STABILITY.window)
            np.testing.assert_allclose(m[f"{name}_mean"], mean, rtol=1e-4)
            np.testing.assert_allclose(m[f"{name}_sigma"], sigma, rtol=1e-2, atol=1e-3)


def test_the_faults_are_what_they_say():
    _, metrics = scripted(ONE)
    assert math.isnan(metrics[2]["loss"])
    for i in (9, 10, 12):
        assert metrics[i]["loss"] < 7 and not metrics[i]["grad_norm"] < 100
    assert metrics[15]["loss"] < 0.7 * metrics[15]["loss_mean"]


def test_a_skipped_step_changes_no_bit_but_the_counters():
    states, _ = scripted(ONE)
    for i in range(NUM_STEPS):
        before = jax.tree_util.tree_leaves_with_path(states[i])
        pairs = zip(before, jax.tree.leaves(states[i + 1]), strict=True)
        changed = {path_name(path) for (path, x), y in pairs if x.tobytes() != y.tobytes()}
        if i in SKIPPED:
            assert changed == {"step", "health/skipped", "health/in_a_row"}, (i, changed)
        else:
            names = [name for name in map(path_name, (p for p, _ in before)) if "trainable" in name]
            assert {*names, *(name.replace("trainable", "ema") for name in names)} <= changed
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(states[-1]))


def test_counts():
    states, metrics = scripted(ONE)
    total = in_a_row = 0
    for i, m in enumerate(metrics):
        total += i in SKIPPED
        in_a_row = in_a_row + 1 if i in SKIPPED else 0
        assert (m["skipped_total"], m["spikes_in_a_row"]) == (total, in_a_row), i
        np.testing.assert_allclose(m["learning_rate"], schedule(i), rtol=1e-6)
        assert int(states[i + 1].step) == i + 1
        assert int(states[i + 1].health.count) == i + 1 - total
    assert metrics[10]["spikes_in_a_row"] == 3


def test_the_average_is_of_the_steps_taken():
    states, _ = scripted(ONE)
    taken = [0] + [i + 1 for i in range(NUM_STEPS) if i not in SKIPPED]
    # The weight of each state in the average, by the published decay of each update.
    decays = [min(EMA.decay, (1 + t) / (10 + t)) for t in range(len(taken) - 1)]
    shares = [math.prod(decays)]
    shares += [(1 - d) * math.prod(decays[t + 1 :]) for t, d in enumerate(decays)]
    assert decays[0] == 0.1 and abs(sum(shares) - 1) < 1e-12
    averages = jax.tree.map(
        lambda *xs: sum(share * x.astype(np.float64) for share, x in zip(shares, xs, strict=True)),
        *[states[i].trainable for i in taken],
    )
    close = functools.partial(np.testing.assert_allclose, atol=1e-6)
    jax.tree.map(close, ema_params(states[-1]), averages)


def test_a_mesh_takes_the_same_steps():
    states, _ = scripted(ONE)
    others, _ = scripted(MESH)
    for name in ("count", "skipped", "in_a_row"):
        assert getattr(states[-1].health, name) == getattr(others[-1].health, name)
    averages = (jax.tree.leaves(ema_params(run[-1])) for run in (states, others))
    for x, y in zip(*averages, strict=True):
        # Adam divides by the root of moments that may be rounding errors of zero.
        assert np.mean(np.abs(x - y)) < 1e-4


def test_recovery_scales_the_rate_for_so_many_steps():
    state = new_state(ONE)
    for i in range(3):
        state, _ = take(ONE, state, batch_of(i))
    before, plain = jax.device_get(state), jax.tree.map(jnp.copy, state)
    plain, _ = take(ONE, plain, batch_of(3))
    state = begin_recovery(state, 0.25, 2)
    after = []
    for i in range(3, 7):
        bad = {"gradient": NAN} if i == 4 else {}  # a skipped step is a step of recovery
        state, metrics = take(ONE, state, batch_of(i, **bad))
        expected = schedule(i) * (0.25 if i < 5 else 1.0)
        np.testing.assert_allclose(metrics["learning_rate"], expected, rtol=1e-6)
        after.append(jax.device_get(state))

    def moved_by_a_quarter(old, x, y):
        np.testing.assert_allclose(x - old, 0.25 * (y - old), atol=1e-6)

    jax.tree.map(moved_by_a_quarter, before.trainable, after[0].trainable, plain.trainable)
    jax.tree.map(np.testing.assert_array_equal, after[0].opt_state, plain.opt_state)


def test_a_checkpoint_holds_all_that_decides(tmp_path):
    """Saved in recovery, after spikes, and restored: the same bits, the same decisions."""
    state = new_state(ONE)
    for i in range(11):
        state, _ = take(ONE, state, batch_of(i, **FAULTS.get(i, {})))
    state = begin_recovery(state, 0.5, 3)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(11, state, {})
    other = abstract_state(
        param_specs(UNTIED), make_optimizer(AdamW()), MESH.layout, ema=True, health=True
    )
    elsewhere = checkpoints.restore(11, other)
    jax.tree.map(np.testing.assert_array_equal, state, elsewhere)
    restored = checkpoints.restore(11, jax.tree.map(as_abstract, state))
    for i in range(11, 16):
        batch = batch_of(i, **FAULTS.get(i, {}))
        state, metrics = take(ONE, state, batch)
        restored, found = take(ONE, restored, batch)
        assert str(found) == str(metrics)  # NaN is not equal to itself
    jax.tree.map(np.testing.assert_array_equal, state, restored)


def as_abstract(x):
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)


def test_statistics_begin_anew():
    state = new_state(ONE)
    for i in range(3):
        state, _ = take(ONE, state, batch_of(i))
    state, _ = take(ONE, state, batch_of(3, gradient=NAN))
    shardings = jax.tree.map(lambda x: x.sharding, state)
    fresh = restart_statistics(begin_recovery(state, 0.5, 7))
    assert jax.tree.map(lambda x: x.sharding, fresh) == shardings
    expected = dataclasses.replace(
        Health.new(), skipped=1, recovery_scale=0.5, recovery_until=4 + 7
    )
    assert jax.tree.leaves(jax.device_get(fresh.health)) == jax.tree.leaves(expected)
    _, metrics = take(ONE, fresh, batch_of(4))
    assert abs(metrics["loss_mean"] - metrics["loss"] - OBJECTIVE.z_loss * metrics["z_loss"]) < 1e-5


def test_refusals():
    state = new_state(ONE)
    unhealthy = dataclasses.replace(state, health=None)
    refuses(lambda: begin_recovery(state, 0.0, 3), "scale=0.0", "must be in (0, 1]")
    refuses(lambda: begin_recovery(state, 0.5, 0), "num_steps=0 of recovery must be at least 1")
    refuses(lambda: begin_recovery(unhealthy, 0.5, 3), "the state has no health; make it")

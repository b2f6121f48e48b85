"""Adafactor and Lion, which keep less than Adam: against optax and transformers."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lm.train.optimizers import Adafactor, Lion
from tests.train.trajectories import (
    GRADIENTS,
    NOT_MATRICES,
    assert_close,
    flat,
    on_tree,
    random_tree,
    schedule,
    scheduled,
    torch_trajectory,
    trajectory,
)


def test_lion_equals_optax():
    mask = {"stacks": {"up": True, "down": True, "square": True}, "embed": True}
    mask |= {"norm": {"scale": False}, "up_bias": False}
    theirs = optax.lion(schedule, 0.8, 0.97, weight_decay=0.3, mask=mask)
    ours = scheduled(on_tree(Lion(0.8, 0.97, 0.3)))
    assert_close(*(trajectory(o, random_tree(0), GRADIENTS) for o in (ours, theirs)), 1e-6, 1e-7)


def test_adafactor_with_relative_steps_equals_optax():
    theirs = optax.adafactor(
        schedule, min_dim_size_to_factor=1, clipping_threshold=0.9, decay_rate=0.7, eps=1e-12
    )
    config = Adafactor(0.7, 0.9, relative_step=True, eps=1e-12, weight_decay=0.0)
    ours = scheduled(on_tree(config))
    assert_close(*(trajectory(o, random_tree(0), GRADIENTS) for o in (ours, theirs)), 1e-5, 1e-6)


def test_adafactor_with_momentum_equals_optax():
    """optax averages after the learning rate, so that only a constant one compares."""
    theirs = optax.adafactor(
        0.02, min_dim_size_to_factor=1, multiply_by_parameter_scale=False, momentum=0.9
    )
    direction = on_tree(Adafactor(momentum=0.9, weight_decay=0.0))
    ours = optax.chain(direction, optax.scale(-0.02))
    assert_close(*(trajectory(o, random_tree(0), GRADIENTS) for o in (ours, theirs)), 1e-5, 1e-6)


@pytest.mark.oracle
def test_adafactor_equals_transformers():
    optimization = pytest.importorskip("transformers.optimization")

    def make(params):
        groups = [
            {"params": [p for n, p in params.items() if n not in NOT_MATRICES]},
            {"params": [params[n] for n in NOT_MATRICES], "weight_decay": 0.0},
        ]
        return [
            optimization.Adafactor(
                groups, lr=1.0, weight_decay=0.3, scale_parameter=False, relative_step=False
            )
        ]

    ours = trajectory(scheduled(on_tree(Adafactor(weight_decay=0.3))), random_tree(0), GRADIENTS)
    assert_close(ours, torch_trajectory(make, GRADIENTS))


@pytest.mark.parametrize("config", [Adafactor(momentum=0.5, relative_step=True), Lion()])
def test_a_stack_is_each_of_its_weights(config):
    """Factors, clipping and scale are each layer's own."""
    rng = np.random.default_rng(0)
    shapes = {"stacks": {"up": (3, 2, 6, 8), "scale": (3, 2, 6)}}
    sizes = 10.0 ** rng.integers(-2, 3, (3, 2))

    def draw(shape):
        x = rng.normal(size=shape)
        return jnp.asarray(x * sizes.reshape(3, 2, *(1,) * (len(shape) - 2)), jnp.float32)

    params, *gradients = (
        jax.tree.map(draw, shapes, is_leaf=lambda s: isinstance(s, tuple)) for _ in range(4)
    )
    optimizer = optax.chain(on_tree(config), optax.scale(-0.1))
    together = list(trajectory(optimizer, params, gradients))[-1]
    for i in range(3):
        for j in range(2):
            pick = lambda tree: jax.tree.map(lambda x: x[i, j], tree)  # noqa: B023, E731
            alone = list(trajectory(optimizer, pick(params), map(pick, gradients)))[-1]
            jax.tree.map(
                lambda x, y: np.testing.assert_allclose(x, y, 1e-5, 1e-6), pick(together), alone
            )


def test_adafactor_keeps_a_row_and_a_column():
    params = random_tree(0)
    sizes = {name: x.size for name, x in flat(on_tree(Adafactor()).init(params)).items()}
    for name, x in flat(params).items():
        kept = sum(size for path, size in sizes.items() if path.endswith("/" + name))
        assert kept == (x.size if name in NOT_MATRICES else sum(x.shape))


def test_nothing_as_a_gradient_is_no_direction():
    params = random_tree(0)
    zeros = jax.tree.map(jnp.zeros_like, params)
    for config in (Adafactor(weight_decay=0.0, relative_step=True), Lion(weight_decay=0.0)):
        optimizer = on_tree(config)
        directions, _ = optimizer.update(zeros, optimizer.init(params), params)
        assert all(not np.any(x) for x in jax.tree.leaves(directions))

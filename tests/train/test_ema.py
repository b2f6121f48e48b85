"""The average of weights against optax's, and its published warm-up."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lm.model import param_specs
from lm.train.ema import Ema, ema_params
from lm.train.state import init_state
from lm.weights import path_name
from tests.train.tiny import UNTIED, Case

RNG = np.random.default_rng(0)
WEIGHTS = [{"a": RNG.normal(size=(3, 4)).astype(np.float32), "b": None} for _ in range(12)]


def averages(ema: Ema):
    """The average after each update, from the first weights on."""
    average = jax.tree.map(jnp.asarray, WEIGHTS[0])
    for t, weights in enumerate(WEIGHTS[1:]):
        average = ema.update(average, weights, jnp.int32(t))
        assert average["b"] is None
        yield average["a"]


def test_equals_optax():
    other = optax.ema(0.7, debias=False)  # begins at zero: of the way from the first weights
    state = other.init(jnp.zeros((3, 4)))
    for found, weights in zip(averages(Ema(0.7, warmup=False)), WEIGHTS[1:], strict=True):
        expected, state = other.update(jnp.asarray(weights["a"] - WEIGHTS[0]["a"]), state)
        np.testing.assert_allclose(found, expected + WEIGHTS[0]["a"], atol=1e-6)


def test_warm_up_forgets_the_first_weights():
    """With decays 1/10, 2/11, 3/12, ... the first weights' share after t is a product of them."""
    average, zero = {"a": jnp.ones((3,))}, {"a": jnp.zeros((3,))}
    for t, expected in enumerate(np.cumprod([1 / 10, 2 / 11, 3 / 12, 4 / 13, 5 / 14])):
        average = Ema(0.999).update(average, zero, jnp.int32(t))
        np.testing.assert_allclose(average["a"], expected, rtol=1e-6)


def test_it_is_float32_whatever_the_weights_are():
    low = {"a": jnp.full((3,), 2.0, jnp.bfloat16)}
    average = Ema(0.5, warmup=False).update({"a": jnp.ones((3,))}, low, jnp.int32(0))
    assert average["a"].dtype == jnp.float32
    np.testing.assert_array_equal(average["a"], 1.5)


def test_ema_params_is_the_average_where_weights_train():
    def trains(path: str) -> bool:
        return "feed_forward" not in path.split("/")

    state = init_state(
        param_specs(UNTIED), optax.identity(), jax.random.key(0), Case().layout, trains, ema=True
    )
    state = state.replace(ema=jax.tree.map(lambda x: x + 1, state.ema))
    before = jax.tree_util.tree_leaves_with_path(state.params)
    for (path, x), y in zip(before, jax.tree.leaves(ema_params(state)), strict=True):
        np.testing.assert_array_equal(y, x + 1 if trains(path_name(path)) else x)
    with pytest.raises(ValueError, match="the state has no average"):
        ema_params(state.replace(ema=None))


@pytest.mark.parametrize("decay", [1.0, -0.1, float("nan")])
def test_bad_decay(decay):
    with pytest.raises(ValueError, match=r"decay=.* is not a finite float32 in \[0, 1\)"):
        Ema(decay)

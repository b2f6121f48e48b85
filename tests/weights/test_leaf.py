"""The four functions over arrays, over Int8, and over a leaf that only knows its own matrix."""

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm.sharding import MeshShape, make_mesh, make_rules
from lm.weights import Int8, StructuredWeight, grouped_linear, linear, take, unembed


@flax.struct.dataclass
class Halved(StructuredWeight):
    """The least a leaf must say."""

    double: jax.Array

    @property
    def shape(self):
        return self.double.shape

    def dequantize(self, dtype):
        return (self.double / 2).astype(dtype)


def matrix(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


FORMS = {
    "array": jnp.asarray,
    "int8": Int8.quantize,
    "own matrix only": lambda w: Halved(2 * jnp.asarray(w)),
}


def dense(weight) -> np.ndarray:
    return np.asarray(
        weight.dequantize(jnp.float32) if isinstance(weight, StructuredWeight) else weight
    )


@pytest.fixture(params=FORMS)
def form(request):
    return FORMS[request.param]


def test_linear(form):
    x, bias, weight = matrix(3, 5, 6), matrix(4, seed=1), form(matrix(6, 4, seed=2))
    expected = x.astype(float) @ dense(weight).astype(float)
    np.testing.assert_allclose(linear(x, weight), expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(linear(x, weight, bias), expected + bias, rtol=1e-5, atol=1e-5)
    half = linear(jnp.asarray(x, jnp.bfloat16), weight, bias)
    assert half.dtype == jnp.bfloat16
    np.testing.assert_allclose(half.astype(jnp.float32), expected + bias, rtol=0.05, atol=0.1)


def test_grouped_linear(form):
    x, weight = matrix(7, 6), form(matrix(3, 6, 4, seed=2))
    y = grouped_linear(jnp.asarray(x), weight, jnp.array([4, 0, 3], jnp.int32))
    expected = np.concatenate([x[:4] @ dense(weight)[0], x[4:] @ dense(weight)[2]])
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)


def test_take(form):
    weight, ids = form(matrix(9, 4)), jnp.array([[0, 8], [3, 3]])
    rows = take(weight, ids, jnp.float32)
    np.testing.assert_allclose(rows, dense(weight)[np.asarray(ids)], rtol=1e-6)
    assert take(weight, ids, jnp.bfloat16).dtype == jnp.bfloat16


@pytest.mark.parametrize("transposed", [False, True])
def test_unembed(form, transposed):
    x, weight = matrix(2, 3, 4), form(matrix(9, 4) if transposed else matrix(4, 9))
    expected = x @ (dense(weight).T if transposed else dense(weight))
    np.testing.assert_allclose(unembed(x, weight, transposed), expected, rtol=1e-5, atol=1e-5)
    assert unembed(jnp.asarray(x, jnp.bfloat16), weight, transposed).dtype == jnp.float32


def test_int8_rounds_to_nearest():
    weight = matrix(5, 16, 8) * np.logspace(-3, 3, 8, dtype=np.float32)
    weight[:, :, 2] = 0
    leaf = Int8.quantize(jnp.asarray(weight))
    assert leaf.shape == (5, 16, 8)
    assert leaf.values.dtype == jnp.int8
    error = np.abs(dense(leaf) - weight)
    assert np.all(error <= np.asarray(leaf.scale) * 0.5001)
    assert np.all(dense(leaf)[:, :, 2] == 0)
    # The largest of each column is kept exactly.
    np.testing.assert_allclose(np.abs(dense(leaf)).max(1), np.abs(weight).max(1), rtol=1e-6)


def test_a_layer_of_a_stacked_leaf():
    leaf = Int8.quantize(jnp.asarray(matrix(3, 6, 4)))
    np.testing.assert_array_equal(dense(leaf.layer(1)), dense(leaf)[1])


def test_int8_shardings():
    mesh = make_mesh(MeshShape(fsdp=2, tensor=2))
    leaf = Int8.quantize(jnp.asarray(matrix(3, 6, 4)))
    placed = jax.device_put(leaf, leaf.shardings(("layers", "embed", "heads"), make_rules(), mesh))
    assert placed.values.addressable_shards[0].data.shape == (3, 3, 2)
    assert placed.scale.addressable_shards[0].data.shape == (3, 1, 2)
    np.testing.assert_array_equal(dense(placed), dense(leaf))
    odd = Int8.quantize(jnp.asarray(matrix(5, 4)))
    with pytest.raises(ValueError, match="mesh axis 'fsdp'=2 does not divide embed=5; use 1 or 5"):
        odd.shardings(("embed", "heads"), make_rules(), mesh)

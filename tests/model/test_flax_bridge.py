"""The nnx module computes what `forward` computes, and is a module like any other."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from lm.model import (
    Attention,
    FeedForward,
    Layer,
    ModelConfig,
    Tokens,
    forward,
    make_head,
    make_stacks,
    param_specs,
    unstack,
)
from lm.model.flax_bridge import Transformer
from lm.weights import is_spec, path_name
from tests.model.drawn import weights
from tests.refuses import refuses

LAYERS = tuple(
    Layer(Attention(4, 2, 8, window=window, qk_norm="head"), FeedForward(24))
    for window in (3, None)
)
CONFIG = ModelConfig(40, 16, make_stacks(LAYERS * 2), vocab_multiple=16)
IDS = jnp.asarray(np.random.default_rng(0).integers(0, 40, (2, 9)))


@pytest.fixture(scope="module")
def params():
    return weights(CONFIG, others=0.1)


@jax.jit
def logits(params, tokens):
    return make_head(params, CONFIG).logits(forward(params, tokens, CONFIG).hidden)


def same(one, other) -> bool:
    return jax.tree.structure(one) == jax.tree.structure(other) and jax.tree.all(
        jax.tree.map(np.array_equal, one, other)
    )


@pytest.mark.parametrize("form", [lambda params: params, unstack], ids=["stacked", "unstacked"])
def test_logits_are_bit_equal(params, form):
    params = form(params)
    model, call = Transformer(CONFIG, params), nnx.jit(lambda model, tokens: model(tokens))
    assert same(model.params(), params)
    whole = Tokens.of(IDS)
    positions = jnp.array([[0, 1, 2, 3, 0, 1, 2, 3, 4]] * 2)
    packed = Tokens(IDS, positions, jnp.array([[1] * 4 + [2] * 5] * 2))
    for tokens in (whole, packed):
        np.testing.assert_array_equal(call(model, tokens), logits(params, tokens))
    assert not np.allclose(call(model, packed), call(model, whole))
    # Positions known at compile time: XLA folds their cosines itself, with its own rounding.
    np.testing.assert_allclose(call(model, IDS), call(model, whole), rtol=1e-5, atol=2e-6)


def test_gradients_are_those_of_the_function(params):
    """And named by their weights' paths."""

    def loss(params):
        return jnp.mean(jnp.square(logits(params, Tokens.of(IDS))[..., :40]))

    def module_loss(model):
        return jnp.mean(jnp.square(model(IDS)[..., :40]))

    value, gradients = jax.jit(jax.value_and_grad(loss))(params)
    module_value, module_gradients = nnx.jit(nnx.value_and_grad(module_loss))(
        Transformer(CONFIG, params)
    )
    np.testing.assert_allclose(module_value, value, rtol=1e-6)
    leaves = jax.tree_util.tree_leaves_with_path(gradients)
    expected = {f"weights/{path_name(path)}": gradient for path, gradient in leaves}
    flat = {"/".join(map(str, p)): v[...] for p, v in nnx.to_flat_state(module_gradients)}
    assert flat.keys() == expected.keys()
    for name, gradient in expected.items():
        np.testing.assert_allclose(flat[name], gradient, rtol=1e-5, atol=1e-7, err_msg=name)


def test_split_and_merge(params):
    model = Transformer(CONFIG, params)
    graph, state = nnx.split(model)
    doubled = nnx.merge(graph, jax.tree.map(lambda x: 2 * x, state))
    assert same(doubled.params(), jax.tree.map(lambda x: 2 * x, params))
    assert same(model.params(), params)
    assert doubled.config == CONFIG


def test_an_optimizer_trains_it(params):
    model = Transformer(CONFIG, params)
    optimizer = nnx.Optimizer(model, optax.sgd(0.5), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer):
        def loss(model):
            logprobs = jax.nn.log_softmax(model(IDS[:, :-1]))
            return -jnp.mean(jnp.take_along_axis(logprobs, IDS[:, 1:, None], axis=-1))

        value, gradients = nnx.value_and_grad(loss)(model)
        optimizer.update(model, gradients)
        return value

    losses = [float(step(model, optimizer)) for _ in range(5)]
    assert losses[-1] < losses[0] - 0.1
    trained = logits(model.params(), Tokens.of(IDS))
    assert not np.allclose(trained, logits(params, Tokens.of(IDS)))


def test_fresh_weights_come_from_rngs():
    layer = Layer(Attention(1, 1, 4), FeedForward(4, gated=False))
    config = ModelConfig(8, 4, make_stacks((layer,)), tied=True, vocab_multiple=8)
    one, same_seed, other = (Transformer(config, rngs=nnx.Rngs(seed)) for seed in (0, 0, 1))
    assert same(one.params(), same_seed.params())
    assert not same(one.params(), other.params())
    specs = jax.tree.map(lambda spec: spec.shape, param_specs(config), is_leaf=is_spec)
    assert jax.tree.map(lambda w: w.shape, one.params()) == specs


def test_weights_or_rngs(params):
    refuses(lambda: Transformer(CONFIG), "neither of params and rngs given")
    refuses(lambda: Transformer(CONFIG, params, rngs=nnx.Rngs(0)), "both of params and rngs given")

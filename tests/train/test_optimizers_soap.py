"""SOAP against the paper's algorithm in numpy, and against AdamW where it should win."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm.train.optimizers import AdamW, Soap
from lm.train.optimizers.soap import orthonormal
from tests.train.trajectories import on_tree, trajectory

RATE = 0.03
# The rounding of a basis shows in all later steps, so exact arithmetic is approached slowly.
CLOSE = {"rtol": 2e-3, "atol": 2e-4}


def paper_soap(weight, gradients, config, bases):
    """arXiv:2409.11321, algorithms 3 and 4, in float64; weights after each step.

    Its first step only makes the bases, as the paper's section on implementation has it; here they
    are `bases`, since eigenvectors of a singular matrix are nobody's to choose. One that is None is
    the identity.
    """
    (left, right), first = bases, gradients[0].astype(np.float64)
    W, keep = weight.astype(np.float64), config.stats_decay
    L, R = (1 - keep) * first @ first.T, (1 - keep) * first.T @ first
    QL = np.eye(len(L)) if left is None else left
    QR = np.eye(len(R)) if right is None else right
    M, V = np.zeros_like(W), np.zeros_like(W)
    W = W - RATE * config.weight_decay * W
    yield W
    for t, G in enumerate(np.asarray(gradients[1:], np.float64), 1):
        M = config.b1 * M + (1 - config.b1) * G
        V = config.b2 * V + (1 - config.b2) * (QL.T @ G @ QR) ** 2
        M_hat, V_hat = M / (1 - config.b1**t), V / (1 - config.b2**t)
        N = (QL.T @ M_hat @ QR) / (np.sqrt(V_hat) + config.eps)
        W = W - RATE * (QL @ N @ QR.T + config.weight_decay * W)
        yield W
        L = keep * L + (1 - keep) * G @ G.T
        R = keep * R + (1 - keep) * G.T @ G
        if t % config.frequency == 0:
            QL = QL if left is None else np.linalg.qr(L @ QL)[0]
            QR = QR if right is None else np.linalg.qr(R @ QR)[0]


def iterate(P):
    """Ten steps of orthogonal iteration from the identity."""
    Q = np.eye(len(P))
    for _ in range(10):
        Q = np.linalg.qr(P @ Q)[0]
    return Q


def problem(shape, num_steps=14, seed=0):
    rng = np.random.default_rng(seed)
    scales = np.geomspace(1, 30, shape[-2])[:, None]
    draw = lambda: (scales * rng.normal(size=shape)).astype(np.float32)  # noqa: E731
    return draw(), [draw() for _ in range(num_steps)]


def run(config, weight, gradients):
    """Weights after each step, and the bases after the first."""
    optimizer = on_tree(config)
    tree = {"stacks": {"up": jnp.asarray(weight)}}
    update, state = jax.jit(optimizer.update), optimizer.init(tree)
    weights, bases = [], {}
    for gradient in gradients:
        directions, state = update({"stacks": {"up": jnp.asarray(gradient)}}, state, tree)
        tree = jax.tree.map(lambda w, d: w - RATE * d, tree, directions)
        weights.append(np.asarray(tree["stacks"]["up"]))
        bases = bases or {
            name.removesuffix("_basis"): np.asarray(slot["stacks"]["up"], np.float64)
            for name, slot in state.slots.items()
            if name.endswith("_basis")
        }
    return np.asarray(weights), bases


def test_a_square_matrix_follows_the_paper():
    weight, gradients = problem((6, 6))
    config = Soap(0.9, 0.8, 1e-6, 0.7, frequency=3, weight_decay=0.2)
    G = gradients[0].astype(np.float64)
    bases = [iterate(P) for P in (G @ G.T, G.T @ G)]
    found, _ = run(config, weight, gradients)
    np.testing.assert_allclose(found, list(paper_soap(weight, gradients, config, bases)), **CLOSE)


@pytest.mark.parametrize("shape", [(5, 8), (8, 5)])
@pytest.mark.parametrize("max_precond_dim", [8, 5])
def test_a_rectangle_follows_the_paper_on_one_side_or_both(shape, max_precond_dim):
    weight, gradients = problem(shape)
    config = Soap(frequency=2, max_precond_dim=max_precond_dim)
    found, bases = run(config, weight, gradients)
    rotated = [
        side for side, n in zip(("left", "right"), shape, strict=True) if n <= max_precond_dim
    ]
    assert sorted(bases) == rotated
    G = gradients[0].astype(np.float64)
    for side, gram in (("left", G @ G.T), ("right", G.T @ G)):
        if side in bases:
            Q, rank = bases[side], min(shape)
            np.testing.assert_allclose(Q.T @ Q, np.eye(len(Q)), atol=1e-5)
            same = np.abs(Q.T @ iterate(gram))[:rank, :rank]
            np.testing.assert_allclose(same, np.eye(rank), atol=1e-2)
    expected = paper_soap(weight, gradients, config, (bases.get("left"), bases.get("right")))
    np.testing.assert_allclose(found, list(expected), **CLOSE)


@pytest.mark.parametrize("rank", [40, 25, 1, 0])
@pytest.mark.parametrize("panel", [8, 16, 39])
def test_panels_make_an_orthonormal_basis(rank, panel):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 40, rank)) @ rng.normal(size=(2, rank, 40))
    x *= np.geomspace(1, 1e-3, 40)
    found = np.asarray(orthonormal(jnp.asarray(x, jnp.float32), panel), np.float64)
    for Q, matrix in zip(found, x, strict=True):
        np.testing.assert_allclose(Q.T @ Q, np.eye(40), atol=3e-6)
        same = np.abs(Q.T @ np.linalg.qr(matrix)[0])[:rank, :rank]
        np.testing.assert_allclose(same, np.eye(rank), atol=1e-3)


def test_a_stack_is_each_of_its_matrices():
    weight, gradients = problem((3, 2, 4, 4))
    config = Soap(frequency=3)
    together, _ = run(config, weight, gradients)
    for i, j in np.ndindex(3, 2):
        alone, _ = run(config, weight[i, j], [g[i, j] for g in gradients])
        np.testing.assert_allclose(together[:, i, j], alone, **CLOSE)


def test_what_is_not_rotated_is_adams():
    """Embeddings and norms, and matrices too large on both sides."""
    rng = np.random.default_rng(0)
    shapes = {"stacks": {"up": (9, 8), "scale": (8,)}, "embed": (8, 6)}
    draw = lambda shape: jnp.asarray(rng.normal(size=shape), jnp.float32)  # noqa: E731
    params, *gradients = (
        jax.tree.map(draw, shapes, is_leaf=lambda s: isinstance(s, tuple)) for _ in range(4)
    )
    adam = AdamW(0.8, 0.9, 1e-6)
    soap = Soap(max_precond_dim=7, adam=adam)
    for mine, theirs in zip(
        *(trajectory(on_tree(c), params, gradients) for c in (soap, adam)), strict=True
    ):
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6), mine, theirs)


def test_the_first_update_moves_nothing():
    weight, gradients = problem((5, 8), 1)
    found, _ = run(Soap(weight_decay=0.0), weight, gradients)
    np.testing.assert_array_equal(found[0], weight)


@pytest.mark.parametrize("scale", [0.0, 1e-12, 1e6])
def test_gradients_of_any_scale_make_bases(scale):
    weight, gradients = problem((6, 9), 4)
    found, bases = run(Soap(frequency=2), weight, [scale * gradients[0], *gradients[1:]])
    for Q in bases.values():
        np.testing.assert_allclose(Q.T @ Q, np.eye(len(Q)), atol=1e-5)
    assert np.all(np.isfinite(found))


def steps_until_solved(config, rates, num_steps=1500):
    """Updates until a badly conditioned regression's loss is 1e-5 of what it was, at the best rate.

    Inputs are drawn anew for each step, correlated (condition 1e4) along directions that no
    coordinate axis follows. The rate falls linearly to 0.
    """
    rng = np.random.default_rng(0)
    rotation = np.linalg.qr(rng.normal(size=(16, 16)))[0]
    root = jnp.asarray(rotation * np.geomspace(1, 1e-2, 16), jnp.float32)
    target = jnp.asarray(rotation @ rng.normal(size=(16, 8)), jnp.float32)
    optimizer = on_tree(config)

    def step(carry, key):
        params, state, rate, left = carry
        x = jax.random.normal(key, (64, 16)) @ root.T
        error = x @ (params["stacks"]["up"] - target)
        gradient = {"stacks": {"up": x.T @ error / len(x)}}
        directions, state = optimizer.update(gradient, state, params)
        params = jax.tree.map(lambda w, d: w - rate * left * d, params, directions)
        loss = jnp.sum(jnp.square(root.T @ (params["stacks"]["up"] - target)))
        return (params, state, rate, left - 1 / num_steps), loss

    @jax.jit
    def losses(rate):
        params = {"stacks": {"up": jnp.zeros_like(target)}}
        keys = jax.random.split(jax.random.key(0), num_steps)
        carry = (params, optimizer.init(params), rate, jnp.float32(1.0))
        return jax.lax.scan(step, carry, keys)[1] / jnp.sum(jnp.square(root.T @ target))

    curves = [np.asarray(losses(jnp.float32(rate))) for rate in rates]
    return min(int(np.argmax(c < 1e-5)) for c in curves if (c < 1e-5).any())


def test_beats_adamw_in_steps_on_a_badly_conditioned_regression():
    rates = (0.01, 0.03, 0.1, 0.3)
    adamw = steps_until_solved(AdamW(weight_decay=0.0), rates)
    soap = steps_until_solved(Soap(weight_decay=0.0, frequency=5), rates)
    assert 50 < soap < 0.6 * adamw, (soap, adamw)

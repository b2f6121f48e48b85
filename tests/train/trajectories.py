"""Trees small enough for an oracle, and the weights that optimizers make of them."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lm.train.optimizers import make_optimizer
from lm.weights import ParamSpec, path_name

# Specs of every weight of these trees; their shapes are not read.
KINDS = {"stacks": dict.fromkeys(("up", "down", "square"), "matrix") | {"scale": "vector"}}
KINDS |= {"embed": "embedding", "norm": {"scale": "vector"}, "up_bias": "vector"}
SPECS = jax.tree.map(lambda kind: ParamSpec((), (), kind=kind), KINDS)
NOT_MATRICES = ("norm/scale", "up_bias")
RATES = [0.01, 0.02, 0.015, 0.01, 0.005, 0.01, 0.02, 0.01, 0.01, 0.03]


def schedule(step):
    return jnp.asarray(RATES)[step]


def on_tree(config):
    """The optimizer of a configuration, for these trees."""
    return make_optimizer(config, SPECS)


def scheduled(direction):
    """What the step makes of directions."""
    return optax.chain(direction, optax.scale_by_learning_rate(schedule))


def trajectory(optimizer, params, gradients):
    """Weights after each step."""
    state = optimizer.init(params)
    update = jax.jit(optimizer.update)
    for gradient in gradients:
        updates, state = update(gradient, state, params)
        params = optax.apply_updates(params, updates)
        yield params


def random_tree(seed: int, scale: float = 1.0):
    """Weights, or gradients, with names such as a model's."""
    rng = np.random.default_rng(seed)
    shapes = {"stacks": {"up": (6, 10), "down": (10, 6), "square": (5, 5)}}
    shapes |= {"embed": (12, 6), "norm": {"scale": (6,)}, "up_bias": (10,)}
    draw = lambda s: jnp.asarray(scale * rng.normal(size=s), jnp.float32)  # noqa: E731
    return jax.tree.map(draw, shapes, is_leaf=lambda s: isinstance(s, tuple))


GRADIENTS = [random_tree(1 + i, 10.0 ** (i % 3 - 1)) for i in range(len(RATES))]


def flat(tree):
    return {path_name(p): np.asarray(x) for p, x in jax.tree_util.tree_leaves_with_path(tree)}


def torch_trajectory(make, gradients):
    """Weights after each step of the PyTorch optimizers that `make(parameters)` returns."""
    torch = pytest.importorskip("torch")
    params = {k: torch.nn.Parameter(torch.tensor(v)) for k, v in flat(random_tree(0)).items()}
    optimizers = make(params)
    for rate, gradient in zip(RATES, gradients, strict=True):
        for name, g in flat(gradient).items():
            params[name].grad = torch.tensor(g)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate * group.get("factor", 1.0)
            optimizer.step()
        yield {k: v.detach().numpy().copy() for k, v in params.items()}


def assert_close(ours, theirs, rtol=2e-5, atol=2e-6):
    """Two trajectories, of trees or of arrays by path, are the same; and go somewhere."""
    steps = 0
    for mine, yours in zip(ours, theirs, strict=True):
        yours = yours if set(yours) == set(flat(mine)) else flat(yours)
        for name, x in flat(mine).items():
            np.testing.assert_allclose(x, yours[name], rtol, atol, err_msg=f"{name}, {steps}")
        steps += 1
    assert steps == len(RATES)

"""Optimizers against PyTorch's and optax's, and on a mesh against one device."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest

from lm.model import Attention, FeedForward, Layer, ModelConfig, Norm, Stack, param_specs
from lm.model.config import Latent
from lm.sharding import MeshShape
from lm.train.optimizers import (
    NEWTON_SCHULZ,
    Adafactor,
    AdamW,
    Muon,
    Soap,
    clip_by_global_norm,
    make_optimizer,
    orthogonalize,
)
from lm.weights import LoRA, ParamSpec, path_name
from tests.train.tiny import TIED, Case, train
from tests.train.trajectories import (
    GRADIENTS,
    assert_close,
    on_tree,
    random_tree,
    schedule,
    scheduled,
    torch_trajectory,
    trajectory,
)


@pytest.mark.oracle
def test_adamw_equals_pytorch():
    torch = pytest.importorskip("torch")
    config = AdamW(b1=0.8, b2=0.97, eps=1e-5, weight_decay=0.3)

    def make(params):
        groups = [
            {"params": [p for n, p in params.items() if n not in ("norm/scale", "up_bias")]},
            {"params": [params["norm/scale"], params["up_bias"]], "weight_decay": 0.0},
        ]
        return [torch.optim.AdamW(groups, betas=(0.8, 0.97), eps=1e-5, weight_decay=0.3)]

    ours = trajectory(scheduled(on_tree(config)), random_tree(0), GRADIENTS)
    assert_close(ours, torch_trajectory(make, GRADIENTS))


def test_adamw_equals_optax():
    config = AdamW(0.8, 0.97, 1e-6, 0.3)
    mask = {"stacks": {"up": True, "down": True, "square": True}, "embed": True}
    mask |= {"norm": {"scale": False}, "up_bias": False}
    other = optax.adamw(schedule, 0.8, 0.97, 1e-6, weight_decay=0.3, mask=mask)
    ours = trajectory(scheduled(on_tree(config)), random_tree(0), GRADIENTS)
    theirs = trajectory(other, random_tree(0), GRADIENTS)
    assert_close(ours, theirs, 1e-6, 1e-7)


@pytest.mark.oracle
def test_muon_equals_pytorch(monkeypatch):
    torch = pytest.importorskip("torch")
    # PyTorch iterates in bfloat16, whose roundings grow a hundredfold; in float32 equal is equal.
    monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.float)
    adam = AdamW(0.9, 0.95, 1e-8, 0.0)
    config = Muon(momentum=0.9, weight_decay=0.2, dtype="float32", adam=adam)

    def make(params):
        hidden = [p for n, p in params.items() if n.startswith("stacks/")]
        rest = [p for n, p in params.items() if not n.startswith("stacks/")]
        muon = torch.optim.Muon(
            hidden, momentum=0.9, weight_decay=0.2, adjust_lr_fn="match_rms_adamw"
        )
        return [muon, torch.optim.AdamW(rest, betas=(0.9, 0.95), weight_decay=0.0)]

    ours = trajectory(scheduled(on_tree(config)), random_tree(0), GRADIENTS)
    assert_close(ours, torch_trajectory(make, GRADIENTS), atol=1e-5)


@pytest.mark.parametrize("shape", [(8, 8), (6, 20), (20, 6)])
def test_orthogonalize_acts_on_singular_values_alone(shape):
    rng = np.random.default_rng(0)
    matrix = rng.normal(size=shape)
    u, s, vt = np.linalg.svd(matrix, full_matrices=False)
    s /= np.linalg.norm(s)
    a, b, c = NEWTON_SCHULZ
    for _ in range(5):
        s = a * s + b * s**3 + c * s**5
    found = orthogonalize(jnp.asarray(matrix, jnp.float32), 5, jnp.float32)
    np.testing.assert_allclose(found, (u * s) @ vt, atol=2e-4)


def test_orthogonalize_in_bfloat16_brings_singular_values_near_one():
    rng = np.random.default_rng(0)
    u, _ = np.linalg.qr(rng.normal(size=(24, 24)))
    v, _ = np.linalg.qr(rng.normal(size=(24, 24)))
    matrix = u @ np.diag(np.geomspace(0.03, 3.0, 24)) @ v
    found = orthogonalize(jnp.asarray(matrix, jnp.float32))
    values = np.linalg.svd(np.asarray(found, np.float32), compute_uv=False)
    assert values.min() > 0.6 and values.max() < 1.25, values


def test_orthogonalize_takes_each_matrix_of_a_stack_by_itself():
    stack = jax.random.normal(jax.random.key(0), (3, 2, 7, 12)).at[2, 1].set(0.0)
    together = orthogonalize(stack, dtype=jnp.float32)
    for i in np.ndindex(3, 2):
        alone = orthogonalize(stack[i], dtype=jnp.float32)
        np.testing.assert_allclose(together[i], alone, atol=1e-5)
    assert not np.any(together[2, 1])


def test_every_weight_says_what_it_is():
    everywhere = Attention(4, 2, 8, bias=True, out_bias=True, qk_norm="head")
    latent = Attention(4, 4, 12, bias=True, latent=Latent(8, 8, 4, 8, 6))
    layers = [
        Layer(a, FeedForward(32, bias=True), Norm(bias=True), "both") for a in (everywhere, latent)
    ]
    config = ModelConfig(500, 32, tuple(Stack((x,), 2) for x in layers), score_dim=2)
    for path, spec in jax.tree_util.tree_leaves_with_path(param_specs(config)):
        name = path_name(path)
        in_layer = name.startswith("stacks/")
        matrix = len(spec.shape) - in_layer == 2
        assert spec.kind == (("matrix" if in_layer else "embedding") if matrix else "vector"), name


@pytest.mark.parametrize("config", [Muon(), Soap(), Adafactor(), AdamW()])
def test_stacked_vectors_are_no_matrices(config):
    """DoRA's magnitude [layers, out] and LoRA's scale are each layer's vector."""
    weight = LoRA(*(jnp.zeros((3, *s)) for s in ((8, 6), (8, 2), (2, 6), (), (6,))))
    specs = weight.specs(ParamSpec((3, 8, 6), ("layers", "embed", "heads")))
    assert [s.kind for s in (specs.a, specs.b, specs.scale, specs.magnitude)] == [
        "matrix", "matrix", "vector", "vector",
    ]  # fmt: skip
    state = make_optimizer(config).specs({"query": dataclasses.replace(specs, base=None)})
    whole = {n for n, slot in state.slots.items() if getattr(slot["query"], "magnitude", None)}
    assert whole == ({"nu"} if isinstance(config, Adafactor) else {"mu", "nu"})
    assert config.decay(specs.magnitude) == 0 < config.decay(specs.a)


@pytest.mark.parametrize(
    "config",
    [
        pytest.param(AdamW(weight_decay=0.5), marks=pytest.mark.slow),
        Muon(dtype="float32"),
        pytest.param(Adafactor(), marks=pytest.mark.slow),
        pytest.param(Soap(frequency=2), marks=pytest.mark.slow),
    ],
    ids=["adamw", "muon", "adafactor", "soap"],
)
def test_training_on_a_mesh_equals_one_device(config):
    cases = Case(config=TIED), Case(MeshShape(data=2, fsdp=2, tensor=2), 2, True, 2, config=TIED)
    (expected, one), (found, many) = (
        train(case, make_optimizer(config), 4, num_batches=2) for case in cases
    )
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    assert expected[2] < expected[0] and expected[3] < expected[1]
    if isinstance(config, Soap):
        return  # gradients are of low rank here: rounding chooses the other eigenvectors
    one, many = (jax.tree.leaves(jax.device_get(state.params)) for state in (one, many))
    for x, y in zip(one, many, strict=True):
        # Adam divides by the root of moments that may be rounding errors of zero.
        assert np.mean(np.abs(x - y)) < 1e-5


@pytest.mark.parametrize(
    "optimizer",
    [
        optax.adamw(1.0, weight_decay=0.1),
        pytest.param(optax.contrib.muon(1.0, weight_decay=0.1), marks=pytest.mark.slow),
    ],
    ids=["adamw", "muon"],
)
def test_any_of_optaxs_optimizers_trains_on_a_zero_mesh(optimizer):
    """Its updates are minus the directions; moments are sharded as their weights are."""
    directions = optax.chain(optimizer, optax.scale(-1.0))
    expected, _ = train(Case(config=TIED), directions, 3)
    found, state = train(Case(MeshShape(data=2, fsdp=4), 1, config=TIED), directions, 3)
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    assert expected[2] < expected[0]
    held = [x for x in jax.tree.leaves(state.opt_state) if x.size > 1000]  # not the norms
    assert held and all(x.size == 4 * x.addressable_shards[0].data.size for x in held)


def test_clip_by_global_norm():
    tree = {"a": jnp.asarray([3.0]), "b": jnp.asarray([[4.0]]), "c": None}
    clipped, norm = clip_by_global_norm(tree, 1.0)
    assert norm == 5.0
    np.testing.assert_allclose([clipped["a"][0], clipped["b"][0, 0]], [0.6, 0.8], rtol=1e-5)
    for limit in (None, 6.0):
        same, norm = clip_by_global_norm(tree, limit)
        assert norm == 5.0 and same["a"] == 3.0 and same["b"] == 4.0

"""Adapters on whole models: added, trained alone, combined, selected, merged."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lm.adapters import add_lora, combine, count, linear_layers, merge, remove, select, trains
from lm.model import Tokens, forward, make_head, param_specs, stack, unstack
from lm.sharding import MeshShape, use_layout
from lm.train.state import TrainState, bytes_per_device, partition, state_shardings
from lm.weights import (
    Int8,
    LoRA,
    bind,
    is_structured,
    path_name,
    specs_of,
)
from tests.model import drawn
from tests.refuses import refuses
from tests.train.tiny import OBJECTIVE, TIED, UNTIED, Case, make_batch

KEY = jax.random.key(3)


@functools.cache
def plain(tied: bool = False):
    return drawn.weights(TIED if tied else UNTIED)


def quantized():
    """Every matrix of the layers in int8."""
    return jax.tree_util.tree_map_with_path(
        lambda path, w: Int8.quantize(w) if linear_layers(UNTIED)(path_name(path)) else w, plain()
    )


def trained(params, seed: int = 5):
    """With noise in everything that trains."""
    rng = np.random.default_rng(seed)

    def move(path, x):
        if not trains(path_name(path)):
            return x
        return x + jnp.asarray(0.1 * rng.standard_normal(x.shape), x.dtype)

    return jax.tree_util.tree_map_with_path(move, params)


@functools.partial(jax.jit, static_argnames="config")
def logits(params, ids, config=UNTIED, rows=None):
    if rows is not None:
        params = bind(params, rows)
    hidden = forward(params, Tokens.of(ids), config).hidden
    return make_head(params, config).logits(hidden)[..., : config.vocab_size]


IDS = jnp.asarray(np.random.default_rng(1).integers(0, 500, (3, 7)), jnp.int32)


@pytest.mark.parametrize("dora", [False, True])
def test_new_adapters_change_nothing(dora):
    base = plain()
    adapted = add_lora(base, UNTIED, KEY, rank=4, alpha=8, dora=dora)
    np.testing.assert_allclose(logits(adapted, IDS), logits(base, IDS), rtol=1e-5, atol=1e-5)
    assert jax.tree.all(jax.tree.map(lambda x, y: x is y, remove(adapted), base))
    query = adapted.stacks[0].layers[0].attention.query
    assert isinstance(query, LoRA) and not np.any(query.b)
    np.testing.assert_array_equal(query.scale, [2.0, 2.0])
    # Kaiming's uniform with a = sqrt(5), as in PEFT: variance 1 / (3 in).
    assert np.abs(query.a).max() <= 32**-0.5
    np.testing.assert_allclose(np.std(query.a), (3 * 32) ** -0.5, rtol=0.1)
    assert not np.allclose(query.a, adapted.stacks[0].layers[0].attention.key.a)
    sizes = [(32, 32)] * 4 + [(32, 64), (32, 64), (64, 32)]
    assert count(adapted) == 2 * sum(4 * (i + o) + o * dora for i, o in sizes)


def test_targets_ranks_and_scales():
    only = lambda pattern: lambda path: re.search(pattern, path) is not None  # noqa: E731
    adapted = add_lora(plain(), UNTIED, KEY, rank=2, targets=only("query"))
    adapted = add_lora(adapted, UNTIED, KEY, rank=4, alpha=6, rslora=True, targets=only("embed$"))
    leaves = jax.tree_util.tree_leaves_with_path(adapted, is_leaf=is_structured)
    found = {path_name(path): w for path, w in leaves if isinstance(w, LoRA)}
    assert found.keys() == {"embed", "stacks/0/layers/0/attention/query"}
    assert found["embed"].scale == 3.0 and found["embed"].shape == (512, 32)
    assert not np.any(found["embed"].a) and 0.8 < np.std(found["embed"].b) < 1.2
    # One more adapter does not change the random numbers of another.
    again = add_lora(plain(), UNTIED, KEY, rank=2)
    query = again.stacks[0].layers[0].attention.query
    np.testing.assert_array_equal(query.a, found["stacks/0/layers/0/attention/query"].a)
    for arguments, message in (
        ({"targets": only("nothing")}, "chose no weight"),
        ({"targets": only("query")}, "attention/query has an adapter already"),
        ({"targets": only("norm")}, "scale [2, 32] is not a matrix"),
        ({"rank": 0}, "rank=0"),
    ):
        refuses(functools.partial(add_lora, adapted, UNTIED, KEY, **arguments), message)


@pytest.mark.parametrize(("tied", "dora"), [(False, True), (True, False)])
def test_merging_keeps_the_logits(tied, dora):
    """Adapters on every matrix, the embedding and the output too, stacked and unstacked."""
    config = TIED if tied else UNTIED
    everywhere = lambda p: linear_layers(config)(p) or p in ("embed", "output")  # noqa: E731
    adapted = trained(add_lora(plain(tied), config, KEY, targets=everywhere, dora=dora))
    expected = logits(adapted, IDS, config)
    assert np.abs(expected - logits(plain(tied), IDS, config)).max() > 0.1
    merged = merge(adapted)
    assert not any(map(is_structured, jax.tree.leaves(merged, is_leaf=is_structured)))
    np.testing.assert_allclose(logits(merged, IDS, config), expected, rtol=1e-4, atol=1e-4)
    served = unstack(adapted)
    np.testing.assert_allclose(logits(served, IDS, config), expected, rtol=1e-4, atol=1e-4)
    again = stack(served, config)
    assert jax.tree.structure(again) == jax.tree.structure(adapted)
    assert jax.tree.all(jax.tree.map(lambda x, y: bool(jnp.all(x == y)), again, adapted))


def test_merging_into_the_weights_that_were_quantized():
    adapted = trained(add_lora(quantized(), UNTIED, KEY))
    over_int8, over_plain = merge(adapted), merge(adapted, base=plain())
    query = adapted.stacks[0].layers[0].attention.query
    delta = np.asarray(query.scale)[:, None, None] * np.asarray(query.a) @ np.asarray(query.b)
    for merged, base in ((over_int8, merge(quantized())), (over_plain, plain())):
        beneath = base.stacks[0].layers[0].attention.query
        beneath = beneath.dequantize(jnp.float32) if is_structured(beneath) else beneath
        found = merged.stacks[0].layers[0].attention.query
        np.testing.assert_allclose(found, beneath + delta, rtol=1e-5, atol=1e-6)
    assert merge(adapted, jnp.bfloat16).stacks[0].layers[0].attention.query.dtype == jnp.bfloat16


def test_only_adapters_have_gradients_and_they_follow_the_chain_rule():
    """Of the merged model's gradient G: da = s G b^T, db = s a^T G."""
    adapted = trained(add_lora(quantized(), UNTIED, KEY, rank=4, alpha=6))
    trainable, frozen = partition(adapted, trains)
    batch, gradient = make_batch(), Case().gradient
    found, terms, _ = jax.jit(functools.partial(gradient, OBJECTIVE))(trainable, frozen, batch, KEY)
    assert sum(x.size for x in jax.tree.leaves(found)) == count(adapted)
    merged = merge(adapted)
    nothing = jax.tree.map(lambda _: None, merged)
    dense, same, _ = jax.jit(functools.partial(gradient, OBJECTIVE))(merged, nothing, batch, KEY)
    np.testing.assert_allclose(terms["loss"].sum, same["loss"].sum, rtol=1e-5)
    checked = 0
    for name in ("attention", "feed_forward"):
        ours = getattr(found.stacks[0].layers[0], name)
        theirs = getattr(dense.stacks[0].layers[0], name)
        weights = getattr(adapted.stacks[0].layers[0], name)
        for field in dataclasses.fields(ours):
            leaf = getattr(weights, field.name)
            if not isinstance(leaf, LoRA):
                continue
            G = leaf.scale[:, None, None] * getattr(theirs, field.name)
            own = getattr(ours, field.name)
            for x, y in (
                (own.a, jnp.einsum("lio,lro->lir", G, leaf.b)),
                (own.b, jnp.einsum("lir,lio->lro", leaf.a, G)),
            ):
                np.testing.assert_allclose(x, y, rtol=0, atol=1e-5 * np.abs(y).max())
                assert np.abs(y).max() > 0
                checked += 1
    assert checked == 14


def test_training_on_a_mesh():
    """Steps over frozen int8 weights, sharded and in micro-batches: the same as on one device."""
    results = []
    for case in (Case(), Case(MeshShape(fsdp=2, tensor=2), num_micro_batches=2)):
        layout, optimizer = case.layout, optax.adam(1e-2)
        adapted = add_lora(quantized(), UNTIED, KEY, rank=4)
        specs = specs_of(adapted, param_specs(UNTIED))
        wanted = state_shardings(specs, optimizer, layout, trains)
        train, frozen = partition(adapted, trains)
        state = TrainState(jnp.zeros((), jnp.int32), train, frozen, optimizer.init(train))
        assert jax.tree.structure(wanted) == jax.tree.structure(state)

        def step(state, batch, case=case, layout=layout, optimizer=optimizer):
            with use_layout(layout):
                parts = state.trainable, state.frozen, batch, KEY
                gradients, terms, _ = case.gradient(OBJECTIVE, *parts)
            updates, opt_state = optimizer.update(gradients, state.opt_state)
            train = optax.apply_updates(state.trainable, updates)
            after = dataclasses.replace(state, trainable=train, opt_state=opt_state)
            return after, terms["loss"].sum

        step = jax.jit(step, in_shardings=(wanted, None), out_shardings=(wanted, None))
        before = state = jax.device_put(state, wanted)
        losses = []
        for _ in range(3):
            state, loss = step(state, make_batch())
            losses.append(float(loss))
        assert losses[2] < losses[1] < losses[0]
        for x, y in zip(*map(jax.tree.leaves, (before.frozen, state.frozen)), strict=True):
            np.testing.assert_array_equal(x, y)
        results.append((losses, jax.device_get(state.trainable)))
        held = bytes_per_device(state.opt_state)
        whole = 2 * 4 * count(adapted)
        assert len(held) == layout.mesh.size and max(held.values()) < whole / len(held) * 2 + 8
    (one, weights), (many, sharded) = results
    np.testing.assert_allclose(many, one, rtol=1e-5)
    for x, y in zip(*map(jax.tree.leaves, (weights, sharded)), strict=True):
        np.testing.assert_allclose(x, y, atol=2e-3)


def test_adapters_made_on_a_mesh_are_the_same():
    layout = Case(MeshShape(fsdp=2, tensor=2)).layout
    alone = add_lora(plain(), UNTIED, KEY, dora=True)
    adapted = add_lora(plain(), UNTIED, KEY, dora=True, layout=layout)
    query, same = (m.stacks[0].layers[0].attention.query for m in (adapted, alone))
    assert query.a.addressable_shards[0].data.shape == (2, 16, 8)
    assert query.b.addressable_shards[0].data.shape == (2, 8, 16)
    np.testing.assert_array_equal(query.a, same.a)
    np.testing.assert_allclose(query.magnitude, same.magnitude, rtol=1e-6)


@pytest.mark.parametrize("form", [lambda x: x, unstack], ids=["stacked", "unstacked"])
def test_every_row_its_own_adapter(form):
    """Ranks, scales and adapted weights differ; each row is what it is with its adapter alone."""
    base = plain()
    attention = lambda path: "/attention/" in path and linear_layers(UNTIED)(path)  # noqa: E731
    one = trained(add_lora(base, UNTIED, KEY, rank=2, alpha=3), 1)
    two = trained(add_lora(base, UNTIED, KEY, rank=5, targets=attention), 2)
    head = trained(add_lora(base, UNTIED, KEY, rank=1, targets=lambda p: p == "output"), 3)
    together = form(combine(base, [one, two, head]))
    rows = jnp.array([1, 0, -1])
    found = logits(together, IDS, rows=rows)
    for i, alone in enumerate((two, one, base)):
        np.testing.assert_allclose(found[i], logits(alone, IDS)[i], rtol=1e-4, atol=1e-5)
    assert np.abs(found[0] - logits(base, IDS)[0]).max() > 0.01
    found = logits(together, IDS, rows=jnp.array([2, 2, 0]))
    np.testing.assert_allclose(found[1], logits(head, IDS)[1], rtol=1e-4, atol=1e-5)
    alone = logits(select(together, 1), IDS)
    np.testing.assert_allclose(alone, logits(two, IDS), rtol=1e-4, atol=1e-5)


def test_what_cannot_be_combined():
    base = plain()
    refuses(lambda: combine(base, []), "no adapter to combine")
    magnitudes = add_lora(base, UNTIED, KEY, dora=True)
    refuses(lambda: combine(base, [magnitudes]), "DoRA cannot be one of several")
    two = combine(base, [add_lora(base, UNTIED, KEY)] * 2)
    refuses(lambda: merge(two), "query has 2 adapters; select one first")
    refuses(lambda: select(two, 2), "adapter 2 of 2")

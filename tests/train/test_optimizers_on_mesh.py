"""Optimizers on eight fake devices: bytes as ZeRO promises, updates as on one device."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm.model import param_specs
from lm.sharding import MeshShape, use_layout
from lm.train.optimizers import Adafactor, Lion, Muon, Soap, make_optimizer
from lm.train.state import bytes_per_device, state_shardings
from lm.weights import abstract, path_name, shardings
from tests.model import drawn
from tests.train.hlo import collectives
from tests.train.tiny import UNTIED, Case

SPECS = param_specs(UNTIED)
SOAP = Soap(frequency=2, max_precond_dim=32)  # feed-forward matrices, 32 by 64, on one side
CONFIGS = [Adafactor(momentum=0.9, relative_step=True), Lion(), SOAP]
each = pytest.mark.parametrize("config", CONFIGS, ids=lambda config: type(config).__name__)


def promised(config, parts):
    """Bytes a device holds of the state when each weight's part is 1 / parts, counted by hand."""
    total = 4  # the count
    for path, spec in jax.tree_util.tree_leaves_with_path(
        SPECS, is_leaf=lambda x: hasattr(x, "axes")
    ):
        name, size = path_name(path), 4 * math.prod(spec.shape)
        if name.endswith("scale"):
            total += size * {Lion: 1, Adafactor: 2, Soap: 2}[type(config)]
            continue
        *stack, rows, columns = spec.shape
        if isinstance(config, Lion):
            total += size // parts
        elif isinstance(config, Adafactor):
            # The mean over the axis that is split is whole on every device.
            split = {"embed": parts}
            factors = [
                n // split.get(axis, 1)
                for n, axis in zip((rows, columns), spec.axes[-2:], strict=True)
            ]
            total += size // parts + 4 * math.prod(stack) * sum(factors)
        else:
            rotated = [n for n in (rows, columns) if n <= 32 and name.startswith("stacks")]
            squares = sum(2 * 4 * math.prod(stack) * n * n for n in rotated)
            total += (2 * size + squares) // parts
    return total


@each
@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_zero_divides_the_state(config, zero):
    layout = Case(MeshShape(fsdp=8), zero).layout
    optimizer = make_optimizer(config, SPECS)
    lies = state_shardings(SPECS, optimizer, layout).opt_state
    state = jax.jit(lambda: optimizer.init(abstract(SPECS)), out_shardings=lies)()
    held = bytes_per_device(state)
    assert len(held) == 8
    assert set(held.values()) == {promised(config, 8 if zero else 1)}


@functools.cache
def updates(config, mesh):
    """(directions and states of some updates, the compiled update), state held between them."""
    layout, optimizer = Case(mesh, 3).layout, make_optimizer(config, SPECS)
    lies = shardings(SPECS, layout.rules, layout.mesh, kind="optimizer")
    state_lies = state_shardings(SPECS, optimizer, layout).opt_state

    def update(gradients, state, weights):
        with use_layout(layout):
            return optimizer.update(gradients, state, weights)

    jitted = jax.jit(
        update, in_shardings=(lies, state_lies, lies), out_shardings=(lies, state_lies)
    )
    weights = jax.device_put(drawn.weights(UNTIED), lies)
    state = jax.device_put(optimizer.init(weights), state_lies)
    compiled, found = jitted.lower(weights, state, weights).compile(), []
    for i in range(4):
        keys = drawn.weights(UNTIED, 1 + i)
        gradients = jax.device_put(
            jax.tree.map(lambda x: 0.1 * x + 0.01 * jnp.sin(7 * x), keys), lies
        )
        directions, state = compiled(gradients, state, weights)
        found.append(jax.device_get(directions))
    return found, state, compiled


ALL = MeshShape(data=2, fsdp=2, tensor=2)


@pytest.mark.parametrize(
    ("config", "mesh"),
    [(config, MeshShape(fsdp=8)) for config in CONFIGS] + [(SOAP, ALL)],
    ids=["adafactor-fsdp8", "lion-fsdp8", "soap-fsdp8", "soap-all"],
)
def test_updates_equal_one_devices(config, mesh):
    expected, _, _ = updates(config, MeshShape())
    found, state, _ = updates(config, mesh)
    for mine, theirs in zip(found, expected, strict=True):
        for x, y in zip(jax.tree.leaves(mine), jax.tree.leaves(theirs), strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-3, atol=2e-3 * np.abs(y).max())
    assert any(np.any(x) for x in jax.tree.leaves(found[-1]))
    if mesh == MeshShape(fsdp=8):
        assert set(bytes_per_device(state).values()) == {promised(config, 8)}


@pytest.mark.parametrize("config", [SOAP, Muon(dtype="float32")], ids=["soap", "muon"])
def test_matrices_are_exchanged_and_none_is_gathered(config):
    mesh = MeshShape(fsdp=8)
    compiled = updates(config, mesh)[2]
    ops = {c.op for c in collectives(compiled.as_text(), Case(mesh).layout.mesh)}
    assert "all-to-all" in ops and "all-gather" not in ops


def test_soap_decomposes_whole_matrices_dealt_to_devices():
    compiled = updates(SOAP, MeshShape(fsdp=8))[2]
    # One of the two layers' matrices, and on six devices a padding of zeros.
    decomposed = [line for line in compiled.as_text().splitlines() if "lapack_sgeqrf" in line]
    assert decomposed and all("f32[1,32,32]" in line for line in decomposed)

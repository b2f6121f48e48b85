"""Dealing stacks of matrices to devices: the same numbers, whole matrices, no gathering."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from lm.parallel import distribute_matrices
from lm.sharding import Layout, MeshShape, make_mesh, make_rules, use_layout
from tests.train.hlo import collectives


def inverse_and_norm(stacks, shift):
    """Of a square matrix beside one that is not: nothing that splits within a matrix."""
    square, other = stacks["square"], stacks["other"]
    eye = jnp.eye(square.shape[-1])
    return {"inverse": jnp.linalg.inv(square + shift * eye), "scaled": other / jnp.linalg.norm(
        other, axis=(-2, -1), keepdims=True
    )}  # fmt: skip


def case(shape, stack):
    layout = Layout(make_mesh(shape), make_rules(3))
    mesh = layout.mesh
    key = jax.random.key(0)
    stacks = {
        "square": jax.random.normal(key, (*stack, 8, 8)),
        "other": jax.random.normal(key, (*stack, 16, 8)),
    }
    lies = NamedSharding(mesh, PartitionSpec(*(None for _ in stack), "fsdp", "tensor"))

    def compute(stacks, shift):
        with use_layout(layout):
            return distribute_matrices(inverse_and_norm, stacks, shift)

    lies_in = {"square": lies, "other": lies}
    lies_out = {"inverse": lies, "scaled": lies}
    jitted = jax.jit(compute, in_shardings=(lies_in, None), out_shardings=lies_out)
    return stacks, jitted, mesh


@pytest.mark.parametrize("stack", [(), (3,), (2, 5)], ids=str)
@pytest.mark.parametrize(
    "shape", [MeshShape(), MeshShape(fsdp=4, tensor=2), MeshShape(data=2, fsdp=2, tensor=2)]
)
def test_equals_the_function_itself(shape, stack):
    stacks, jitted, _ = case(shape, stack)
    found = jitted(stacks, jnp.float32(3.0))
    expected = inverse_and_norm(stacks, 3.0)
    for name, x in expected.items():
        np.testing.assert_allclose(found[name], x, rtol=2e-3, atol=1e-4)


def test_parts_are_exchanged_for_wholes():
    stacks, jitted, mesh = case(MeshShape(fsdp=4, tensor=2), (16,))
    text = jitted.lower(stacks, jnp.float32(3.0)).compile().as_text()
    ops = {c.op for c in collectives(text, mesh)}
    assert "all-to-all" in ops and not ops & {"all-gather", "all-reduce"}, ops
    factored = [line for line in text.splitlines() if "lapack_sgetrf" in line]
    assert factored and all("f32[2,8,8]" in line for line in factored)

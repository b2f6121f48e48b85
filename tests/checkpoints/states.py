"""States to save: small, every leaf different, every dtype, any layout."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec

from lm.model import param_specs
from lm.sharding import Layout, MeshShape, make_mesh, make_rules
from lm.train.state import init_state
from tests.train.tiny import UNTIED

ADAM = optax.scale_by_adam()
SPECS = param_specs(UNTIED)
DTYPES = (
    "float32", "bfloat16", "float16", "int8", "uint8", "int32", "uint32", "bool", "int4", "uint4",
    "float8_e4m3fn", "float8_e5m2",
)  # fmt: skip


def layout(zero: int = 3, **axes: int) -> Layout:
    """Mesh axes and a ZeRO stage."""
    return Layout(make_mesh(MeshShape(**axes)), make_rules(zero, False))


def make_state(where: Layout, **options):
    """A TrainState whose every leaf differs from the initial values and from zero."""
    state = init_state(SPECS, ADAM, jax.random.key(7), where, **options)
    leaves, structure = jax.tree.flatten(state)
    shift = lambda i, x: (x + jnp.asarray(i, x.dtype)).astype(x.dtype)  # noqa: E731
    moved = [jax.device_put(shift(i, x), x.sharding) for i, x in enumerate(leaves)]
    return jax.tree.unflatten(structure, moved)


def every_dtype(num_devices: int = 1) -> dict[str, jax.Array]:
    """Random bits in every dtype (NaNs and infinities included), sharded over the devices."""
    mesh = jax.make_mesh((num_devices,), ("x",), devices=jax.devices()[:num_devices])
    rng = np.random.default_rng(0)
    arrays = {}
    for name in DTYPES:
        dtype = jnp.dtype(name)
        if name == "bool" or name.endswith("int4"):
            x = rng.integers(0, 2 if name == "bool" else 8, (8, 6)).astype(dtype)
        else:
            x = np.frombuffer(rng.bytes(48 * dtype.itemsize), dtype).reshape(8, 6)
        arrays[name] = jax.device_put(x, NamedSharding(mesh, PartitionSpec("x")))
    return arrays


def assert_same_bits(found, expected) -> None:
    """Same structure, dtypes and bits."""
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for x, y in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
        assert x.dtype == y.dtype and x.shape == y.shape
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


def structs(tree):
    """ShapeDtypeStructs with the shardings of `tree`; without for NumPy's arrays."""

    def struct(x):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=getattr(x, "sharding", None))

    return jax.tree.map(struct, tree)

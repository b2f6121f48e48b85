"""The flash kernels compiled for TPUs that are not here: accepted, and no score held in memory."""

import functools
import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import pytest

from lm.hardware import topologies
from lm.kernels.attention import View
from lm.sharding import Layout, MeshShape, make_mesh, make_rules, use_layout
from lm.sharding.layout import named_sharding
from tests.kernels.calls import attention, attention_backward

pytestmark = pytest.mark.aot
OPTIONS = {"exec_time_optimization_effort": -1.0}


class Shape(NamedTuple):
    """A call: T queries and keys, H and K heads of sizes h and d."""

    T: int = 8192
    H: int = 32
    K: int = 8
    h: int = 128
    d: int = 128
    causal: bool = True
    window: int | None = None
    softcap: float | None = None
    sinks: bool = False
    segments: bool = False
    in_order: bool = True
    dtype: str = "bfloat16"


SHAPES = {
    "llama": Shape(),
    "head 64, packed, sinks": Shape(h=64, d=64, segments=True, sinks=True, window=128),
    "head 256, packed, window, softcap": Shape(
        H=16, h=256, d=256, window=1024, softcap=50.0, segments=True
    ),
    "mla": Shape(H=16, K=16, h=192, d=128),
    "any positions, ragged": Shape(T=8200, h=80, d=80, H=8, segments=True, in_order=False),
    "all see all": Shape(T=1000, H=4, K=4, causal=False),
    "float32": Shape(T=2048, H=8, K=2, dtype="float32"),
    "long, in chunks of keys": Shape(T=65536, H=8, K=2),
    "latent, absorbed": Shape(T=2048, H=16, K=1, h=576, d=512),
}


def layout_of(topology: str, **shape: int) -> Layout:
    chip = topologies.parse(topology)[1]
    if not topologies.available(chip):
        pytest.skip(f"nothing here compiles for {chip}; `make compilers` installs what does")
    devices = topologies.describe(topology)
    mesh = MeshShape(**(shape or {"fsdp": len(devices)}))
    return Layout(make_mesh(mesh, devices), make_rules())


def compiled(layout: Layout, shape: Shape, *, backward: bool = True, B: int = 1, **options):
    """Attention and its gradients, as a model calls it."""
    T, dtype = shape.T, jnp.dtype(shape.dtype)

    def array(*axes_and_sizes, dtype=dtype):
        sizes, axes = zip(*axes_and_sizes, strict=True)
        sharding = named_sharding(layout.mesh, layout.rules.activations, axes, sizes)
        return jax.ShapeDtypeStruct(sizes, dtype, sharding=sharding)

    batch, tokens = (B, "batch"), (T, "sequence")
    q, out = (array(batch, tokens, (shape.H, "heads"), (n, None)) for n in (shape.h, shape.d))
    k, v = (array(batch, tokens, (shape.K, "kv_heads"), (n, None)) for n in (shape.h, shape.d))
    sinks = array((shape.H, "heads"))
    row = array(batch, tokens, dtype=jnp.int32)

    def run(q, k, v, sinks, dout, positions, segments):
        segments = segments if shape.segments else None
        view = View(positions, positions, segments, segments, in_order=shape.in_order)

        def attend(q, k, v, sinks):
            return attention(
                q, k, v, view, scale=shape.h**-0.5, causal=shape.causal, window=shape.window,
                softcap=shape.softcap, sinks=sinks if shape.sinks else None, **options,
            )  # fmt: skip

        with use_layout(layout):
            if not backward:
                return attend(q, k, v, sinks)
            out, pull = jax.vjp(attend, q, k, v, sinks)
            return out, pull(dout)

    lowered = jax.jit(run).lower(q, k, v, sinks, out, row, row)
    return lowered.compile(compiler_options=OPTIONS)


def check(program, shape: Shape) -> None:
    assert program.as_text().count('custom_call_target="tpu_custom_call"') == 2
    # A few float32 copies of the arrays are needed, but nothing of the size of the scores.
    arrays = 4 * shape.T * max(128, shape.h) * (shape.H + 2 * shape.K)
    temporary = program.memory_analysis().temp_size_in_bytes
    assert temporary < 5 * arrays, (temporary, arrays)
    if shape.T >= 8192:
        assert temporary < 2 * shape.H * shape.T**2 / 2, temporary  # bfloat16 scores, half of them


# What `make test` compiles: packed rows, sinks and windows, soft-caps, large heads, ragged blocks.
DRAWN = {
    ("v5e:1x1", "head 64, packed, sinks"), ("v6e:1x1", "head 256, packed, window, softcap"),
    ("v5e:1x1", "any positions, ragged"), ("v6e:1x1", "mla"),
}  # fmt: skip
TOPOLOGIES = ("v4:1x1x1", "v5e:1x1", "v5p:1x1x1", "v6e:1x1", "tpu7x:1x1x1")


@pytest.mark.parametrize(
    ("topology", "name"),
    [
        pytest.param(*pair, marks=() if pair in DRAWN else pytest.mark.slow)
        for pair in itertools.product(TOPOLOGIES, SHAPES)
    ],
)
def test_every_generation_compiles(topology, name):
    layout = layout_of(topology)
    B = layout.mesh.devices.size  # two devices a chip of tpu7x
    check(compiled(layout, SHAPES[name], B=B), SHAPES[name])


def test_on_a_mesh_nothing_is_communicated():
    """Batch over fsdp, heads over tensor: each device has all it needs."""
    shape = Shape(T=2048, H=8, K=2)
    text = compiled(layout_of("v5e:2x2", fsdp=2, tensor=2), shape, B=2).as_text()
    assert text.count('custom_call_target="tpu_custom_call"') == 2
    for collective in ("all-gather", "all-reduce", "all-to-all", "collective-permute"):
        assert f"{collective}(" not in text and f"{collective}-start(" not in text


def test_parts_of_keys_in_a_shard_map():
    """As a ring calls it: no layout, arrays that are the device's own already."""
    layout = layout_of("v5e:2x2", context=4)
    B, T, H, h = 1, 4096, 4, 128
    axes = named_sharding(layout.mesh, layout.rules.activations, ("batch", "sequence"))
    spec = axes.spec

    @functools.partial(
        jax.shard_map, mesh=layout.mesh, in_specs=(spec,) * 4, out_specs=spec, check_vma=False
    )
    def step(q, k, v, positions):
        view = View(positions, positions)
        with use_layout(None):
            out, lse = attention(q, k, v, view, scale=0.1, return_lse=True)
            return attention_backward(q, k, v, view, out, lse, out, scale=0.1)[0]

    def array(*sizes, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(sizes, dtype, sharding=axes)

    x = array(B, T, H, h)
    lowered = jax.jit(step).lower(x, x, x, array(B, T, dtype=jnp.int32))
    text = lowered.compile(compiler_options=OPTIONS).as_text()
    assert text.count('custom_call_target="tpu_custom_call"') == 2


def test_remat_keeps_the_forward_kernel():
    """Keeping "attention" keeps what the backward kernel reads: two kernels run, not three."""
    layout = layout_of("v5e:1x1")
    x = jax.ShapeDtypeStruct(
        (1, 1024, 2, 128), jnp.bfloat16, sharding=named_sharding(layout.mesh, {}, (None,) * 4)
    )

    def kernels(*names: str) -> int:
        policy = jax.checkpoint_policies.save_only_these_names(*names)

        def loss(q, k, v):
            positions = jnp.arange(q.shape[1])[None]
            view = View(positions, positions, in_order=True)
            with use_layout(layout):
                f = jax.checkpoint(functools.partial(attention, scale=0.1), policy=policy)
                return jnp.sum(f(q, k, v, view) ** 2)

        lowered = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(x, x, x)
        text = lowered.compile(compiler_options=OPTIONS).as_text()
        return text.count('custom_call_target="tpu_custom_call"')

    assert kernels("attention") == 2
    assert kernels("nothing") == 3


def test_a_mesh_of_gpus_is_refused():
    with pytest.raises(ValueError, match=r"flash attention is a TPU kernel .* of gpu devices"):
        compiled(layout_of("h200:1"), Shape(T=256), implementation="flash")
    program = compiled(layout_of("h200:1"), Shape(T=256, H=2, K=2))
    assert "tpu_custom_call" not in program.as_text()

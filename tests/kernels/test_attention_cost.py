"""The operations attention kernels declare are those of the scores that count."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl

from lm.aot.figures import count_flops
from lm.kernels.attention import Scores, View, mask
from lm.kernels.attention.common import num_scores
from lm.kernels.attention.flash import flash_attention
from lm.kernels.attention.flash_blocks import Blocks
from lm.sharding import Layout, MeshShape, make_mesh, make_rules, use_layout
from tests.kernels.calls import attention

# Of the gradients, in products of the size of one forward; JAX's and the GPU's kernels compute the
# scores and the gradient of the weights for dq, and again for dk and dv.
BACKWARD = {"flash": 5, "splash": 7, "mosaic_gpu": 7}


def view_of(T: int, S: int, B: int = 1) -> View:
    return View(*(np.tile(np.arange(n), (B, 1)) for n in (T, S)), in_order=T == S)


def exact(T: int, S: int, causal: bool, window: int | None) -> int:
    return int(np.asarray(mask(view_of(T, S), Scores(1.0, causal, window))).sum())


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [None, 1, 4, 20])
@pytest.mark.parametrize(("T", "S"), [(9, 9), (5, 9), (16, 64), (9, 5), (30, 4)])
def test_scores_that_count(T, S, window, causal):
    assert num_scores(T, S, Scores(1.0, causal, window)) == exact(T, S, causal, window)


def declared(function, T, S, *, gradient=False, H=4, K=2, h=64):
    """Of one row, over all heads, in products: twice the head size for a score."""

    def run(q, k, v):
        out = function(q, k, v, view_of(T, S))
        return out.astype(jnp.float32).sum()

    shapes = [(1, T, H, h), (1, S, K, h), (1, S, K, h)]
    given = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes]
    traced = jax.make_jaxpr(jax.grad(run, argnums=(0, 1, 2)) if gradient else run)(*given)
    return count_flops(traced.jaxpr)[1] / (2 * h * H)


@pytest.mark.parametrize(("causal", "window"), [(True, None), (True, 50), (False, None)])
@pytest.mark.parametrize("name", BACKWARD)
def test_every_implementation_declares_its_products(name, causal, window):
    T = 256
    layout = Layout(make_mesh(MeshShape(), jax.devices()[:1]), make_rules())
    options = {"implementation": name, "causal": causal, "window": window}
    scores = exact(T, T, causal, window)

    def attend(*arrays, **more):
        with use_layout(None if name == "mosaic_gpu" else layout):
            return attention(*arrays, **options, **more)

    assert declared(attend, T, T) == 2 * scores
    assert declared(attend, T, T, gradient=True) == (2 + BACKWARD[name]) * scores


def test_on_a_mesh_every_device_counts():
    T, B = 128, 4
    layout = Layout(make_mesh(MeshShape(fsdp=4, tensor=2)), make_rules())
    q, k = (jax.ShapeDtypeStruct((B, T, heads, 16), jnp.float32) for heads in (4, 2))
    for name in ("flash", "splash"):

        def run(q, k, v, name=name):
            with use_layout(layout):
                return attention(q, k, v, view_of(T, T, B), scale=1.0, implementation=name)

        flops = count_flops(jax.make_jaxpr(run)(q, k, k).jaxpr)[1]
        assert flops == B * 4 * 2 * 2 * 16 * exact(T, T, True, None)


def test_calls_of_parts_of_the_keys_declare_parts():
    blocks = Blocks(forward=(16, 32), backward=(32, 16), heads=2, resident=48)
    attend = functools.partial(flash_attention, scores=Scores(0.1), blocks=blocks, interpret=True)
    scores = exact(96, 96, True, None)
    assert declared(attend, 96, 96, gradient=True) == 7 * scores


@pytest.mark.parametrize("name", ["flash", "mosaic_gpu"])
def test_a_prompt_is_counted_without_the_rest_of_its_cache(name):
    attend = functools.partial(attention, implementation=name)
    assert declared(attend, 128, 1024) == 2 * exact(128, 128, True, None)


def test_a_kernel_that_declares_nothing_is_refused():
    def copy(x_ref, y_ref):
        y_ref[...] = x_ref[...]

    x = jnp.zeros(8)
    call = pl.pallas_call(copy, out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype), name="copy")
    with pytest.raises(ValueError, match=r"kernel 'copy' declares no operations; .*cost_estimate"):
        count_flops(jax.make_jaxpr(call)(x).jaxpr)

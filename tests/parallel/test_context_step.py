"""A training step whose rows are split along the sequence computes the step of one device."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm.model import Attention, FeedForward, Layer, ModelConfig, Rope, Stack
from lm.parallel import context_attention, reorder_for
from lm.sharding import MeshShape, use_layout
from lm.train.accumulation import Accumulation
from lm.train.objective import NextToken
from tests.model import drawn
from tests.train import tiny
from tests.train.tiny import Result, assert_same, begin, make_batch, take

# A layer with a window and one without, as in Gemma 2, twice.
LOCAL = Layer(Attention(8, 4, 4, window=7, softcap=3.0, rope=Rope(100.0)), FeedForward(64))
GLOBAL = dataclasses.replace(LOCAL, attention=dataclasses.replace(LOCAL.attention, window=None))
CONFIG = ModelConfig(500, 32, (Stack((LOCAL, GLOBAL), 2),), logit_softcap=5.0)
BATCH = make_batch(8, 32)
ALL = MeshShape(fsdp=2, context=2, tensor=2)


@dataclasses.dataclass(frozen=True)
class Case(tiny.Case):
    """One way to compute the same step."""

    strategy: str | None = None

    def __str__(self) -> str:
        return f"{self.strategy}-{super().__str__()}"

    @property
    def gradient(self) -> Accumulation:
        return Accumulation(
            CONFIG, self.num_micro_batches, self.dtype, self.remat,
            attention=context_attention(self.strategy), reorder=reorder_for(self.strategy),
        )  # fmt: skip


@functools.cache
def run(case: Case) -> Result:
    """Metrics and gradients of one step from the weights of key 0."""
    return take(*begin(case), BATCH)


def slow(case: Case) -> Any:
    return pytest.param(case, marks=pytest.mark.slow)


CASES = [
    Case(ALL, strategy="zigzag", remat="full"),
    Case(ALL, strategy="ulysses", sequence_parallel=True),
    slow(Case(MeshShape(context=8), strategy="ring")),
    slow(Case(ALL, strategy="ring", num_micro_batches=2)),
    slow(Case(MeshShape(data=2, context=4), 1, strategy="zigzag", remat="save:attention")),
    slow(Case(MeshShape(context=8), strategy="ulysses")),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_one_device(case):
    assert_same(run(case), run(Case()), 2e-5)


@pytest.mark.slow
def test_bfloat16_strays_no_further_than_on_one_device():
    """Gradients lie as far from float32's as those of one device in bfloat16 do, by a quarter."""
    exact, one, many = (
        jax.tree.leaves(run(case).gradients)
        for case in (
            Case(),
            Case(dtype=jnp.bfloat16),
            Case(ALL, strategy="zigzag", dtype=jnp.bfloat16),
        )
    )

    def error(gradients):
        return np.sqrt(sum(np.sum((x - y) ** 2) for x, y in zip(gradients, exact, strict=True)))

    assert 0 < error(many) < 1.25 * error(one)


def test_the_model_hears_that_tokens_are_not_in_order():
    """So the default attention, which may skip later keys of rows in order, is right as well."""
    layout = Case(mesh=MeshShape(context=2)).layout
    config = dataclasses.replace(CONFIG, stacks=(Stack((LOCAL,), 1),))
    params = drawn.weights(config)
    batch = jax.tree.map(jnp.asarray, BATCH)

    def hidden(strategy, layout):
        with use_layout(layout):
            gradient = Accumulation(config, reorder=reorder_for(strategy))
            return gradient.run(NextToken(), params, batch).hidden

    plain = jax.jit(lambda: hidden(None, None))()
    zigzag = jax.jit(lambda: hidden("zigzag", layout))()
    counts = (BATCH["segment_ids"] > 0)[..., None]
    np.testing.assert_allclose(zigzag * counts, plain * counts, atol=1e-5)

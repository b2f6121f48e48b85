"""Objectives that are more than a sum over tokens: pairs, auxiliary sums, buffers, scores."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lm.checkpoints import Checkpoints
from lm.model import Output, Stack, Tokens, make_head, param_specs
from lm.parallel import context_attention, reorder_for
from lm.sharding import MeshShape
from lm.train.accumulation import Accumulation
from lm.train.batch import batch_shardings, rows_multiple
from lm.train.objective import Objective, Term
from lm.train.stability import Stability
from lm.train.state import abstract_state
from lm.train.step import make_eval_step
from tests.train.tiny import (
    LAYER,
    UNTIED,
    Case,
    Result,
    assert_same,
    begin,
    first_weights,
    make_batch,
    take,
)

CONFIG = dataclasses.replace(UNTIED, stacks=(Stack((LAYER,), 1),), score_dim=2)


@dataclasses.dataclass(frozen=True)
class Pairs(Objective):
    """DPO over adjacent rows, a reward read at the last position, an auxiliary loss, statistics.

    A batch holds pairs [P, 2, T], and `reference` [P], `label` [B] and `temperature` [].
    """

    rows_per_example = 2

    def inputs(self, batch):
        rows = (batch[name].reshape(-1, batch["ids"].shape[-1]) for name in FIELDS)
        return Tokens(*rows)

    def loss(self, head, output, batch, rng):
        hidden = output.hidden
        targets, weights = (
            batch[name].reshape(hidden.shape[:2]) for name in ("targets", "weights")
        )
        rows = jnp.sum(weights * head.logprobs(hidden, targets)[0], axis=1).reshape(-1, 2)
        margin = (rows[:, 0] - rows[:, 1] - batch["reference"]) / batch["temperature"]
        last = head.scores(hidden)[:, -1, 0]  # of the whole row, whatever order it was read in
        total = jnp.sum(output.aux["square"])
        return {
            "dpo": Term(-jnp.sum(jax.nn.log_sigmoid(margin)), jnp.float32(margin.size)),
            "reward": Term(jnp.sum(jnp.square(last - batch["label"])), jnp.float32(last.size), 0.5),
            "aux": Term(total, jnp.float32(hidden.shape[0]), 0.1),
        }

    def init_buffers(self):
        return {"seen": jnp.zeros(()), "rows": jnp.zeros((), jnp.int32)}

    def stats(self, output, batch):
        return {"labels": jnp.sum(batch["label"]), "rows": len(batch["label"])}

    def update(self, buffers, frozen, stats):
        seen = 0.5 * buffers["seen"] + stats["labels"]
        return {"seen": seen, "rows": buffers["rows"] + stats["rows"]}, frozen


FIELDS = ("ids", "positions", "segment_ids")


class WithAux(Accumulation):
    """A forward pass that returns an auxiliary sum, as experts will."""

    def run(self, objective, params, batch):
        output = super().run(objective, params, batch)
        square = jnp.sum(jnp.square(output.hidden), axis=(1, 2))
        return Output(output.hidden, aux={"square": square * (1 + jnp.arange(1))})


def make_pairs(packed: bool) -> dict[str, np.ndarray]:
    rows = make_batch(32, 16)
    if not packed:
        rows["positions"] = np.tile(np.arange(16, dtype=np.int32), (32, 1))
        rows["segment_ids"] = np.ones_like(rows["ids"])
    rng = np.random.default_rng(1)
    batch = {name: x.reshape(16, 2, 16) for name, x in rows.items()}
    batch |= {"reference": rng.normal(size=16), "label": rng.normal(size=32)}
    batch["temperature"] = np.float32(3.0)
    return {n: x.astype(np.float32) if x.dtype == np.float64 else x for n, x in batch.items()}


def begin_pairs(mesh: MeshShape, num_micro_batches: int):
    strategy = "zigzag" if mesh.context > 1 else None
    gradient = WithAux(
        CONFIG, num_micro_batches, loss="fused",
        attention=context_attention(strategy), reorder=reorder_for(strategy),
    )  # fmt: skip
    return begin(Case(mesh), objective=Pairs(), gradient=gradient)


@functools.cache
def run(mesh: MeshShape, num_micro_batches: int, packed: bool) -> Result:
    return take(*begin_pairs(mesh, num_micro_batches), make_pairs(packed))


ONE = MeshShape()


MESH = MeshShape(data=2, fsdp=2, tensor=2)
slow = functools.partial(pytest.param, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("mesh", "num_micro_batches", "packed"),
    [
        (ONE, 4, True),
        (MESH, 4, False),
        (MeshShape(data=2, context=2, tensor=2), 2, True),
        *[slow(ONE, num, packed) for num, packed in ((2, True), (2, False), (4, False))],
        *[slow(MESH, num, packed) for num, packed in ((1, True), (1, False), (4, True))],
        slow(MeshShape(data=2, context=2, tensor=2), 2, False),
    ],
    ids=str,
)
def test_pairs_are_whole_however_they_are_computed(mesh, num_micro_batches, packed):
    expected = run(ONE, 1, packed)
    assert_same(run(mesh, num_micro_batches, packed), expected, 2e-5)
    assert expected.metrics["rows"] == 32
    batch = make_pairs(packed)
    np.testing.assert_allclose(expected.metrics["seen"], batch["label"].sum(), rtol=1e-5)
    np.testing.assert_allclose(expected.metrics["tokens"], (batch["segment_ids"] > 0).sum())
    parts = [expected.metrics[name] for name in ("dpo", "reward", "aux")]
    total = np.dot(parts, [1.0, 0.5, 0.1])
    np.testing.assert_allclose(expected.metrics["total_loss"], total, rtol=1e-6)


def test_pairs_equal_plain_jax():
    batch = jax.tree.map(jnp.asarray, make_pairs(True))
    gradient = WithAux(CONFIG)
    params = first_weights(CONFIG)

    @jax.jit
    def loss(params):
        hidden = gradient.run(Pairs(), params, batch).hidden
        head = make_head(params, CONFIG)
        logprobs = jax.nn.log_softmax(head.logits(hidden)[..., : CONFIG.vocab_size])
        targets = batch["targets"].reshape(32, 16, 1)
        chosen = jnp.take_along_axis(logprobs, targets, -1)[..., 0].reshape(16, 2, 16)
        rows = jnp.sum(chosen * batch["weights"], -1)
        margin = (rows[:, 0] - rows[:, 1] - batch["reference"]) / 3
        last = hidden[:, -1] @ params.score[:, 0]
        parts = jnp.mean(jnp.log1p(jnp.exp(-margin))), jnp.mean((last - batch["label"]) ** 2)
        return parts[0] + 0.5 * parts[1] + 0.1 * jnp.sum(hidden**2) / 32

    found = run(ONE, 4, True).metrics["total_loss"]
    np.testing.assert_allclose(found, loss(params), rtol=1e-5)


def test_an_example_is_never_cut():
    mesh = MeshShape(data=4)
    assert rows_multiple(Pairs(), Case(mesh).layout, 4) == 32
    step, state = begin_pairs(mesh, 8)
    wanted = r"=8 does not divide .* 32 rows, 2 per example, over 4 shards; .* 1, 2, 4, .* of 64"
    with pytest.raises(ValueError, match=wanted):
        step.lower(state, make_pairs(True))
    odd = make_pairs(True) | {"odd": np.zeros(12, np.float32)}
    step, state = begin_pairs(ONE, 2)
    with pytest.raises(ValueError, match=r"leaf odd \[12\] must count 32 rows or 16 ex"):
        step.lower(state, odd)


def test_leaves_are_sharded_by_what_they_count():
    layout = Case(MeshShape(data=2, context=2, tensor=2)).layout
    batch = make_pairs(True) | {"rows": np.zeros((32, 16)), "embedded": np.zeros((32, 16, 8))}
    found = {name: tuple(x.spec) for name, x in batch_shardings(batch, layout).items()}
    assert found["ids"] == ("data", None, "context")
    assert found["rows"] == ("data", "context") and found["embedded"] == ("data", "context", None)
    assert found["label"] == found["reference"] == ("data",) and found["temperature"] == ()
    with pytest.raises(ValueError, match=r"label .*: mesh axis 'data'=2 does not divide batch=3"):
        batch_shardings({"ids": batch["rows"], "label": np.zeros(3)}, layout)
    with pytest.raises(ValueError, match="has no `ids`; give row_length"):
        batch_shardings({"label": batch["label"]}, layout)


def test_evaluation_runs_in_micro_batches():
    params = first_weights(CONFIG)
    evaluate = make_eval_step(Pairs(), Case().layout, WithAux(CONFIG, 4, loss="fused"))
    expected = run(ONE, 1, True).metrics
    for name, term in evaluate(params, make_pairs(True)).items():
        np.testing.assert_allclose(term.sum / term.count, expected[name], rtol=1e-5)
    text = evaluate.lower(params, make_pairs(True)).as_text()
    assert "tensor<4x4x2x16xi32>" in text and "tensor<8x16x32xf32>" in text
    assert "tensor<32x16x32xf32>" not in text  # no hidden states of the whole batch


def test_a_skipped_step_keeps_buffers_and_frozen_weights(tmp_path):
    """And a checkpoint brings the buffers back; one without buffers still opens."""

    @dataclasses.dataclass(frozen=True)
    class Moving(Pairs):
        def update(self, buffers, frozen, stats):
            frozen = jax.tree.map(lambda x: x + stats["rows"], frozen)
            return super().update(buffers, frozen, stats)

    case, optimizer, batch = Case(MeshShape(fsdp=2)), optax.adamw(1.0), make_pairs(True)
    trains = lambda path: path != "norm/scale"  # noqa: E731
    step, state = begin(
        case, optimizer, Moving(), gradient=WithAux(CONFIG, 2), trains=trains, stability=Stability()
    )
    state, _ = step(state, batch)
    before = jax.device_get(state)
    assert before.buffers["rows"] == 32 and np.all(before.frozen.norm.scale == 33)
    state, metrics = step(state, batch | {"label": np.full(32, np.nan, np.float32)})
    assert metrics["skipped"] == 1
    after = jax.device_get(state)
    changed = dataclasses.replace(after, step=before.step, health=before.health)
    jax.tree.map(np.testing.assert_array_equal, changed, before)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(2, state, {})
    parts = {"health": True, "buffers": Moving().init_buffers()}
    wanted = abstract_state(param_specs(CONFIG), optimizer, case.layout, trains, **parts)
    jax.tree.map(np.testing.assert_array_equal, checkpoints.restore(2, wanted), after)
    checkpoints.save(3, dataclasses.replace(state, buffers=None), {})
    checkpoints.restore(3, dataclasses.replace(wanted, buffers=None))

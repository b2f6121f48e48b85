"""The step on one device: against plain JAX, and against itself computed in other ways."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm.model import Tokens, forward, make_head
from lm.train.objective import NextToken, Objective, Term
from lm.train.optimizers import AdamW, make_optimizer
from lm.train.step import make_eval_step
from lm.weights import path_name
from tests.train.tiny import (
    OBJECTIVE,
    TIED,
    UNTIED,
    Case,
    Result,
    assert_same,
    begin,
    first_weights,
    make_batch,
    run,
    take,
    train,
)


def norm_of(tree):
    return jnp.sqrt(sum(jnp.sum(jnp.square(x)) for x in jax.tree.leaves(tree)))


def plain(config, objective: NextToken) -> Result:
    """The step as a textbook has it: one loss, differentiated."""
    batch = jax.tree.map(jnp.asarray, make_batch())

    def loss(params):
        tokens = Tokens(batch["ids"], batch["positions"], batch["segment_ids"])
        hidden = forward(params, tokens, config).hidden
        logits = make_head(params, config).logits(hidden)[..., : config.vocab_size]
        lse = jax.nn.logsumexp(logits, axis=-1)
        target = jnp.take_along_axis(logits, batch["targets"][..., None], axis=-1)[..., 0]
        mean = lambda x: jnp.sum(batch["weights"] * x) / jnp.sum(batch["weights"])  # noqa: E731
        parts = {"loss": mean(lse - target), "z_loss": mean(lse**2)}
        return parts["loss"] + objective.z_loss * parts["z_loss"], parts

    params = first_weights(config)
    gradients, metrics = jax.jit(jax.grad(loss, has_aux=True))(params)
    metrics |= {"grad_norm": norm_of(gradients), "tokens": jnp.sum(batch["weights"])}
    return Result(*jax.device_get((metrics, gradients)))


@pytest.mark.parametrize("config", [UNTIED, TIED], ids=["untied", "tied"])
def test_equals_plain_jax(config):
    assert_same(run(Case(config=config, loss="reference")), plain(config, OBJECTIVE))


@pytest.mark.parametrize(
    "case",
    [
        Case(loss="fused"),
        Case(num_micro_batches=2),
        Case(num_micro_batches=4, loss="reference"),
        Case(num_micro_batches=4, config=TIED),
        Case(remat="full"),
        Case(remat="matmuls", num_micro_batches=2),
        Case(remat="save:query,key,value,attention"),
    ],
    ids=str,
)
def test_equals_one_pass_that_keeps_everything(case):
    assert_same(run(case), run(Case(config=case.config, loss="reference")))


def test_bfloat16_compute_is_close_and_keeps_float32_weights():
    exact, rough = run(Case(loss="reference")), run(Case(dtype=jnp.bfloat16, num_micro_batches=2))
    assert rough.metrics["loss"] != exact.metrics["loss"]
    np.testing.assert_allclose(rough.metrics["loss"], exact.metrics["loss"], rtol=2e-3)
    assert_same(rough, exact, 0.1)
    assert all(g.dtype == np.float32 for g in jax.tree.leaves(rough.gradients))


@dataclasses.dataclass(frozen=True)
class TwoTerms(Objective):
    """Mean log-probability over counted tokens, and mean square over the rows that are odd."""

    def inputs(self, batch):
        return Tokens(batch["ids"], batch["positions"], batch["segment_ids"])

    def loss(self, head, output, batch, rng):
        logprobs, lse = head.logprobs(output.hidden, batch["targets"])
        rows = jnp.sum(batch["ids"], axis=1, keepdims=True) % 2 == 0
        square = jnp.where(rows, jnp.square(lse), 0.0)
        count = jnp.sum(jnp.broadcast_to(rows, lse.shape)).astype(jnp.float32)
        return {
            "loss": Term(-jnp.sum(batch["weights"] * logprobs), jnp.sum(batch["weights"])),
            "square": Term(jnp.sum(square), count, 0.3),
            "unweighted": Term(-jnp.sum(logprobs), jnp.float32(1.0) * logprobs.size, 0.0),
        }


def two_terms(num_micro_batches: int) -> Result:
    case = Case(num_micro_batches=num_micro_batches)
    return take(*begin(case, objective=TwoTerms()), make_batch())


def test_terms_with_counts_of_their_own_add_up():
    batch = make_batch()
    rows = batch["ids"].sum(1) % 2 == 0
    halves = rows[:8].sum(), rows[8:].sum()
    assert halves[0] != halves[1]  # else a mean of means would pass
    whole = two_terms(1)
    assert_same(two_terms(2), whole)
    assert_same(two_terms(4), whole)


def test_a_batch_that_micro_batches_do_not_divide():
    wanted = r"num_micro_batches=3 .* of 16 rows, .*; use num_micro_batches of 1, 2, 4, 8, 16, or"
    with pytest.raises(ValueError, match=wanted):
        run(Case(num_micro_batches=3))


@pytest.mark.parametrize("frozen", ["embed", "attention"])
def test_frozen_weights_stay_and_have_no_optimizer_state(frozen):
    def trains(path: str) -> bool:
        return frozen not in path.split("/")

    step, state = begin(Case(num_micro_batches=2), make_optimizer(AdamW()), trains=trains)
    paths = [path_name(p) for p, _ in jax.tree_util.tree_leaves_with_path(state.opt_state)]
    assert any("norm" in path for path in paths)
    assert not any(frozen in path.split("/") for path in paths)
    before = jax.device_get(state.params)
    state, _ = step(state, make_batch())
    after = jax.device_get(state.params)
    for (path, x), y in zip(
        jax.tree_util.tree_leaves_with_path(before), jax.tree.leaves(after), strict=True
    ):
        assert np.array_equal(x, y) == (not trains(path_name(path))), path_name(path)


def test_frozen_weights_leave_the_gradients_of_the_others_alone():
    trains = lambda path: path.startswith("stacks/")  # noqa: E731
    found = take(*begin(Case(), trains=trains), make_batch()).gradients
    wanted = run(Case()).gradients.stacks
    for x, y in zip(*map(jax.tree.leaves, (found, wanted)), strict=True):
        np.testing.assert_allclose(x, y, atol=1e-5 * np.abs(y).max())


def test_clipping_scales_to_the_norm_and_reports_it_before():
    norm = run(Case()).metrics["grad_norm"]
    metrics, gradients = take(*begin(Case(), max_grad_norm=0.25), make_batch())
    np.testing.assert_allclose(metrics["grad_norm"], norm, rtol=1e-5)
    assert norm > 1
    np.testing.assert_allclose(norm_of(gradients), 0.25, rtol=1e-4)


def test_a_batch_in_which_nothing_counts_moves_nothing():
    batch = make_batch()
    batch["weights"] *= 0
    metrics, gradients = take(*begin(Case()), batch)
    assert float(metrics["loss"]) == 0.0
    assert all(not np.any(g) for g in jax.tree.leaves(gradients))


def test_the_eval_step_gives_the_sums_of_the_train_step():
    case = Case()
    expected = run(case).metrics
    params = first_weights(UNTIED)
    evaluate = make_eval_step(OBJECTIVE, case.layout, case.gradient)
    batch = make_batch()
    halves = [evaluate(params, {k: v[i::2] for k, v in batch.items()}) for i in (0, 1)]
    total = jax.tree.map(lambda a, b: a + b, *halves)
    for name in ("loss", "z_loss"):
        np.testing.assert_allclose(total[name].sum / total[name].count, expected[name], rtol=1e-5)


def test_steps_count_and_train():
    losses, state = train(Case(), make_optimizer(AdamW()), 8, rate=1e-2)
    assert int(state.step) == 8
    assert losses[-1] < 0.8 * losses[0]

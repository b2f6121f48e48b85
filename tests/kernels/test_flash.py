"""The flash kernels, interpreted: values and gradients against the reference; errors of bfloat16.

Blocks are of a few tokens, so that skipped blocks, ragged ends and chunks of keys all occur.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm.kernels import attention as kernels
from lm.kernels.attention import Scores, View, flash_kernels, mask
from lm.kernels.attention.flash import flash_attention, flash_attention_backward
from lm.kernels.attention.flash_blocks import TABLE, Blocks, blocks_for
from lm.kernels.attention.schedule import FIRST, LAST, RUN, key_block, query_block, schedule
from lm.sharding import Layout, MeshShape, make_mesh, make_rules, use_layout
from tests.refuses import refuses

BLOCKS = Blocks(forward=(16, 32), backward=(32, 16), heads=2, resident=48)
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


@pytest.fixture(autouse=True)
def small_units(monkeypatch):
    """Blocks of 16 and 32 keys are several units and several parts of a loop, as large ones are."""
    monkeypatch.setattr(flash_kernels, "UNIT", 8)


class Case(NamedTuple):
    """T, S: tokens; H, K: heads; h, d: head sizes. `packed` rows have three documents each."""

    T: int = 70
    S: int = 70
    H: int = 4
    K: int = 2
    h: int = 8
    d: int = 8
    causal: bool = True
    window: int | None = None
    softcap: float | None = None
    sinks: bool = False
    segments: bool = False
    in_order: bool = True
    B: int = 2

    @property
    def scores(self) -> Scores:
        return Scores(0.3, self.causal, self.window, self.softcap)

    def view(self, rng) -> View:
        B, T, S = self.B, self.T, self.S
        if not self.in_order:  # some queries see nothing
            positions = rng.integers(0, S, (B, T)), rng.integers(3, S, (B, S))
            segments = rng.integers(0, 2, (B, T)), rng.integers(0, 2, (B, S))
        else:
            cuts = np.sort(rng.integers(0, T, (B, 2, 1)), axis=1)
            packed = (np.arange(T) >= cuts[:, 0]).astype(int) + (np.arange(T) >= cuts[:, 1])
            starts = np.maximum(*(np.where(packed > i, cuts[:, i], 0) for i in (0, 1)))
            in_row = np.broadcast_to(np.arange(T), (B, T))
            positions = (in_row - starts if self.segments else in_row,) * 2
            segments = (2 - packed,) * 2
        return View(*positions, *(segments if self.segments else ()), in_order=self.in_order)


CASES = [
    pytest.param(Case(), marks=pytest.mark.slow),  # its part of the kernels runs in all others
    Case(window=20, softcap=3.0, sinks=True, segments=True, d=6),
    Case(T=50, S=110, H=8, d=16, segments=True, in_order=False),
    Case(T=50, S=110, H=3, K=1, causal=False, window=9, sinks=True, in_order=False),
    pytest.param(
        Case(T=40, S=90, H=2, causal=False, softcap=2.0, in_order=False), marks=pytest.mark.slow
    ),
]


def arrays(case: Case, rng, dtype=jnp.float32):
    """q, k, v, sinks, dout, dlse."""
    B, T, S, H, K = case.B, case.T, case.S, case.H, case.K
    shapes = (B, T, H, case.h), (B, S, K, case.h), (B, S, K, case.d), (H,), (B, T, H, case.d)
    drawn = [jnp.asarray(rng.normal(0, 1, shape), dtype) for shape in shapes]
    return *drawn, jnp.asarray(rng.normal(0, 1, (B, T, H)), jnp.float32)


def value_and_gradients(function, case: Case):
    @functools.partial(jax.jit, compiler_options=QUICK)
    def run(q, k, v, sinks, dout, dlse, view):
        def apply(q, k, v, sinks):
            return function(
                q, k, v, view, case.scores, sinks=sinks if case.sinks else None, return_lse=True
            )

        results, pull = jax.vjp(apply, q, k, v, sinks)
        blind = results[1] < -1e37
        return *results, *pull((dout, jnp.where(blind, 0, dlse)))

    return run


@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_reference(case):
    """Output, log-sum-exp and the gradients of q, k, v and sinks, over drawn positions."""
    flash = value_and_gradients(functools.partial(flash_attention, blocks=BLOCKS), case)
    plain = functools.partial(kernels.attention, implementation="reference")
    reference = value_and_gradients(plain, case)
    for seed in range(4):
        rng = np.random.default_rng(seed)
        given, view = arrays(case, rng), case.view(rng)
        actual, expected = flash(*given, view), reference(*given, view)
        names = ("out", "lse", "dq", "dk", "dv", "dsinks")
        for name, a, e in zip(names, actual, expected, strict=True):
            np.testing.assert_allclose(a, e, rtol=2e-5, atol=2e-5, err_msg=f"{name}, draw {seed}")
        blind = ~mask(view, case.scores).any(2)
        if not case.sinks:
            assert not np.any(actual[0][blind])
            assert np.all(np.asarray(actual[1])[blind] == np.asarray(expected[1])[blind])


def test_parts_of_keys_add_up():
    """Of a ring: out and log-sum-exp of all keys, gradients of one part of them at a time."""
    case = Case(T=40, S=60, segments=True, in_order=False)
    rng = np.random.default_rng(0)
    (q, k, v, _, dout, dlse), view = arrays(case, rng), case.view(rng)

    @jax.jit
    def run(q, k, v, view):
        return kernels.attention(q, k, v, view, case.scores, return_lse=True)

    out, lse = run(q, k, v, view)
    dlse = jnp.where(lse < -1e37, 0, dlse)
    expected = kernels.attention_backward(q, k, v, view, case.scores, out, lse, dout, dlse=dlse)
    part_of = jax.jit(
        lambda q, k, v, view, *rest: flash_attention_backward(
            q, k, v, view, case.scores, *rest, dlse=dlse, blocks=BLOCKS
        )
    )
    parts = []
    for keys in (slice(0, 30), slice(30, 60)):
        rows = [view.query_positions, view.key_positions[:, keys]]
        rows += [view.query_segments, view.key_segments[:, keys]]
        parts.append(part_of(q, k[:, keys], v[:, keys], View(*rows), out, lse, dout))
    (dq_a, dk_a, dv_a), (dq_b, dk_b, dv_b) = parts
    actual = dq_a + dq_b, jnp.concatenate([dk_a, dk_b], 1), jnp.concatenate([dv_a, dv_b], 1)
    for a, e in zip(actual, expected, strict=True):
        assert a.dtype == jnp.float32
        np.testing.assert_allclose(a, e, rtol=2e-5, atol=2e-5)


def in_float64(q, k, v, dout, seen, scale):
    """out, dq, dk, dv of [B, T, H, h] arrays, in float64 NumPy, from the definitions."""
    q, k, v, dout = (np.asarray(x, np.float64) for x in (q, k, v, dout))
    G = q.shape[2] // k.shape[2]
    k, v = np.repeat(k, G, axis=2), np.repeat(v, G, axis=2)
    scores = np.where(seen[:, None], np.einsum("bthx,bshx->bhts", q, k) * scale, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    out = np.einsum("bhts,bshx->bthx", weights, v)
    dweights = np.einsum("bthx,bshx->bhts", dout, v)
    delta = np.sum(dweights * weights, -1, keepdims=True)
    dscores = weights * (dweights - delta) * scale
    dq = np.einsum("bhts,bshx->bthx", dscores, k)
    dk, dv = np.einsum("bhts,bthx->bshx", dscores, q), np.einsum("bhts,bthx->bshx", weights, dout)
    return out, dq, *(x.reshape(*x.shape[:2], -1, G, x.shape[3]).sum(3) for x in (dk, dv))


def test_errors_of_bfloat16(record_property):
    """No larger than one and a quarter of the reference's own, against float64."""
    case = Case(T=256, S=256, h=64, d=64, B=1)
    rng = np.random.default_rng(0)
    (q, k, v, _, dout, _), view = arrays(case, rng, jnp.bfloat16), case.view(rng)
    expected = in_float64(q, k, v, dout, mask(view, Scores(1.0)), 0.125)

    def errors(function):
        @jax.jit
        def run(q, k, v, dout):
            out, pull = jax.vjp(lambda *qkv: function(*qkv, view, Scores(0.125)), q, k, v)
            return out, *pull(dout)

        results = (np.asarray(x, np.float64) for x in run(q, k, v, dout))
        return [
            float(np.sqrt(np.mean((x - e) ** 2) / np.mean(e**2)))
            for x, e in zip(results, expected, strict=True)
        ]

    blocks = Blocks((64, 64), (64, 64), 2, 256)
    flash = errors(functools.partial(flash_attention, blocks=blocks))
    reference = errors(functools.partial(kernels.attention, implementation="reference"))
    for name, ours, theirs in zip(("out", "dq", "dk", "dv"), flash, reference, strict=True):
        record_property(name, f"{ours:.2e} against {theirs:.2e}")
        assert ours < 1.25 * theirs + 1e-4, (name, flash, reference)
        assert ours < 1e-2


@pytest.mark.parametrize("implementation", ["flash", "splash"])
def test_on_a_mesh(implementation):
    """Batch over fsdp and heads over tensor; the sharded arrays are never gathered."""
    case = Case(T=128, S=128, B=4, h=16, d=16, segments=True, window=50, softcap=5.0)
    rng = np.random.default_rng(0)
    (q, k, v, _, dout, _), view = arrays(case, rng), case.view(rng)
    layout = Layout(make_mesh(MeshShape(fsdp=4, tensor=2)), make_rules())

    def run(layout, implementation):
        @functools.partial(jax.jit, compiler_options=QUICK)
        def gradients(q, k, v):
            with use_layout(layout):
                out, pull = jax.vjp(
                    lambda *qkv: kernels.attention(
                        *qkv, view, case.scores, implementation=implementation
                    ),
                    q, k, v,
                )  # fmt: skip
            return out, *pull(dout)

        return gradients(q, k, v)

    expected = run(None, "reference")
    for a, e in zip(run(layout, implementation), expected, strict=True):
        assert "fsdp" in a.sharding.spec[0] and a.sharding.spec[2] == "tensor"
        np.testing.assert_allclose(a, e, rtol=2e-5, atol=2e-5)


def test_backward_on_a_mesh():
    case = Case(T=40, S=40, B=4)
    rng = np.random.default_rng(0)
    (q, k, v, _, dout, dlse), view = arrays(case, rng), case.view(rng)
    out, lse = kernels.attention(q, k, v, view, case.scores, return_lse=True)
    layout = Layout(make_mesh(MeshShape(data=2, fsdp=2, tensor=2)), make_rules())

    @functools.partial(jax.jit, compiler_options=QUICK)
    def run(q, k, v, out, lse, dout):
        with use_layout(layout):
            return kernels.attention_backward(
                q, k, v, view, case.scores, out, lse, dout, dlse=dlse, implementation="flash"
            )

    expected = kernels.attention_backward(q, k, v, view, case.scores, out, lse, dout, dlse=dlse)
    for a, e in zip(run(q, k, v, out, lse, dout), expected, strict=True):
        np.testing.assert_allclose(a, e, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize(
    "case",
    [
        Case(T=64, S=64, B=3),
        Case(T=64, S=64, B=3, window=9),
        Case(T=64, S=64, B=3, segments=True),
        Case(T=64, S=64, B=3, segments=True, causal=False, window=4),
        Case(T=64, S=96, B=3, segments=True, in_order=False),
        Case(T=64, S=96, B=3, in_order=False, window=3),
    ],
    ids=str,
)
def test_schedule_visits_what_is_seen(case):
    query, key = 16, 8
    for seed in range(5):
        view = case.view(np.random.default_rng(seed))
        plan = schedule(jax.tree.map(jnp.asarray, view), query, key, case.scores)
        seen = np.asarray(mask(view, case.scores))
        blocks = seen.reshape(case.B, case.T // query, query, case.S // key, key)
        some, every = blocks.any((2, 4)), blocks.all((2, 4))
        assert int(plan.count) <= plan.visits.shape[1]
        for row in range(case.B):
            visits = np.asarray(plan.visits)[row % plan.visits.shape[0], : int(plan.count)]
            i, j = query_block(visits), key_block(visits)
            run = np.zeros(some.shape[1:], int)
            np.add.at(run, (i, j), visits & RUN)
            assert np.all(run <= 1) and np.all(run >= some[row])
            unmasked = visits & 3 == RUN
            assert np.all(every[row][i[unmasked], j[unmasked]])
            for flag in (FIRST, LAST):  # each block of queries is begun and written once
                assert sorted(i[visits & flag != 0]) == list(range(some.shape[1]))
            if isinstance(plan.count, int):  # known beforehand: not a visit more than needed
                assert run.sum() == some[row].sum() == plan.count


def test_zigzag_skips_what_no_query_sees():
    """Of a ring over 4 devices, the parts of device 0 meet those of device 1."""
    size = 32
    mine, theirs = ([*range(i * size, (i + 1) * size)] for i in (0, 1))
    last = [*range(7 * size, 8 * size)], [*range(6 * size, 7 * size)]
    view = View(jnp.array([mine + last[0]]), jnp.array([theirs + last[1]]))
    plan = schedule(view, 16, 16, Scores(1.0))
    visits = np.asarray(plan.visits)[0, : int(plan.count)]
    runs = visits[visits & RUN != 0]
    assert sorted(zip(query_block(runs), key_block(runs), strict=True)) == [
        (i, j) for i in (2, 3) for j in range(4)  # the first half sees nothing, the second all
    ]  # fmt: skip
    assert not np.any(runs & 2)


def test_blocks_are_found_for_every_head_size():
    for chip in {chip for chip, _ in TABLE}:
        assert all(blocks_for(chip, head_dim) for head_dim in (64, 80, 128, 192, 256, 576))
    refuses(lambda: blocks_for(None, 700), "largest head size is 640, got 700")


@pytest.mark.parametrize(
    ("implementation", "mesh", "options", "words"),
    [
        ("flash", {"fsdp": 4, "context": 2}, {}, ["context", "context-parallel attention"]),
        ("flash", {"fsdp": 2, "tensor": 4}, {}, ["'tensor'=4 does not divide kv_heads=2; use 1"]),
        ("flash", {"fsdp": 8}, {}, ["'fsdp'=8 does not divide batch=4"]),
        ("splash", {}, {"in_order": False}, ["cannot do arbitrary positions; use", "'flash'"]),
        ("splash", {}, {"sinks": True}, ["cannot do sinks; use", "'flash'"]),
        ("splash", {}, {"return_lse": True}, ["cannot do log-sum-exp (return_lse); use"]),
        ("splash", {}, {}, ["needs lengths that 128 divides, got 16"]),
    ],
)
def test_refusals(implementation, mesh, options, words):
    case = Case(T=16, S=16, B=4, in_order=options.get("in_order", True))
    rng = np.random.default_rng(0)
    (q, k, v, sinks, *_), view = arrays(case, rng), case.view(rng)
    given = {"sinks": sinks} if "sinks" in options else {}
    given |= {"return_lse": "return_lse" in options, "implementation": implementation}
    with use_layout(Layout(make_mesh(MeshShape(**mesh or {"fsdp": 4, "tensor": 2})), make_rules())):
        refuses(lambda: kernels.attention(q, k, v, view, case.scores, **given), *words)

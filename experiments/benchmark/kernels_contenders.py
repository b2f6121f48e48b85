"""Contenders of the benchmark of the kernels.

A kernel may hang or take its process down at its first run on a chip; the others go on. Neither JAX
nor PyTorch is imported before its process has begun.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from experiments.benchmark.harness import Answer, per_call

CONTENDERS = {  # of attention, by platform
    "cpu": ("flash", "blocked"),
    "gpu": ("mosaic_gpu", "cudnn", "blocked", "torch"),
    "tpu": ("flash", "splash", "blocked"),
}
RESULTS = ("out", "dq", "dk", "dv")


@dataclasses.dataclass(frozen=True)
class Case:
    """Causal attention of a batch of rows.

    Attributes:
      num_documents: packed into each row; 1 for whole rows.
    """

    length: int
    batch_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    num_documents: int = 1
    window: int | None = None
    softcap: float | None = None

    def scores(self) -> Any:
        """What `lm.kernels.attention` takes."""
        from lm.kernels.attention import Scores

        return Scores(self.head_dim**-0.5, window=self.window, softcap=self.softcap)

    @property
    def name(self) -> str:
        shape = f"{self.batch_size}x{self.length}, {self.num_heads}/{self.num_kv_heads} heads"
        shape += f" of {self.head_dim}"
        shape += f", {self.num_documents} documents" if self.num_documents > 1 else ""
        shape += f", window {self.window}" if self.window is not None else ""
        return shape + (f", softcap {self.softcap:g}" if self.softcap is not None else "")

    @property
    def documents(self) -> np.ndarray:
        """Lengths of a row's documents, uneven."""
        shares = np.arange(1, self.num_documents + 1)
        ends = np.cumsum(shares) * self.length // shares.sum()
        return np.diff(ends, prepend=0)

    @property
    def flops(self) -> int:
        """Operations of the forward pass, for the scores that are not masked."""
        window = self.window or self.length
        seen = sum(int(np.minimum(np.arange(1, n + 1), window).sum()) for n in self.documents)
        return 4 * self.batch_size * self.num_heads * self.head_dim * seen

    @property
    def sample(self) -> slice:
        """Queries whose results are compared: the last, which see most."""
        return slice(max(0, self.length - 256), self.length)

    def arrays(self) -> tuple[np.ndarray, ...]:
        """q, k, v and the gradient of the output, float32 [B, T, heads, h]."""
        rng = np.random.default_rng(0)
        heads = (self.num_heads, self.num_kv_heads, self.num_kv_heads, self.num_heads)
        return tuple(
            rng.standard_normal((self.batch_size, self.length, n, self.head_dim), np.float32)
            for n in heads
        )

    def rows(self) -> tuple[np.ndarray, np.ndarray]:
        """Positions and segments, int32 [B, T]."""
        lengths = self.documents
        positions = np.concatenate([np.arange(n) for n in lengths])
        segments = np.repeat(np.arange(1, len(lengths) + 1), lengths)
        batch = np.ones((self.batch_size, 1), np.int32)
        return batch * positions.astype(np.int32), batch * segments.astype(np.int32)


def expected(case: Case, path: str) -> None:
    """Writes outputs and gradients of the sampled queries, by the reference in float32."""
    import jax
    import jax.numpy as jnp

    from lm.kernels.attention import View, attention

    q, k, v, dout = (jnp.asarray(x, jnp.bfloat16).astype(jnp.float32) for x in case.arrays())
    positions, segments = case.rows()
    part = case.sample
    view = View(positions[:, part], positions, segments[:, part], segments)

    @jax.jit
    def run(q, k, v, dout, view):
        attend = functools.partial(
            attention, view=view, scores=case.scores(), implementation="reference"
        )
        out, pull = jax.vjp(attend, q, k, v)
        return out, *pull(dout)

    with jax.default_matmul_precision("highest"):
        results = run(q[:, part], k, v, dout[:, part], view)
    arrays: dict[str, Any] = {n: np.asarray(x) for n, x in zip(RESULTS, results, strict=True)}
    np.savez(path, **arrays)


class JaxContender:
    """One implementation of `lm.kernels.attention.attention`."""

    def __init__(self, implementation: str, case: Case) -> None:
        import jax
        import jax.numpy as jnp

        from lm.kernels.attention import View, attention
        from lm.sharding import Layout, MeshShape, make_mesh, make_rules, use_layout

        layout = Layout(make_mesh(MeshShape(), jax.devices()[:1]), make_rules())
        self.arrays = [jnp.asarray(x, jnp.bfloat16) for x in case.arrays()]
        positions, segments = (jnp.asarray(x) for x in case.rows())
        rows = (segments, segments) if case.num_documents > 1 else (None, None)
        view = self.view = View(positions, positions, *rows, in_order=True)

        def forward(q, k, v, view):
            with use_layout(layout):
                return attention(q, k, v, view, case.scores(), implementation=implementation)

        def both(q, k, v, dout, view):
            out, pull = jax.vjp(lambda q, k, v: forward(q, k, v, view), q, k, v)
            return out, *pull(dout)

        self.forward = jax.jit(forward).lower(*self.arrays[:3], view).compile()
        self.both = jax.jit(both).lower(*self.arrays, view).compile()

    def results(self, keep: slice) -> list[np.ndarray]:
        q, k, v, dout = self.arrays
        seen = np.zeros((1, dout.shape[1], 1, 1), bool)
        seen[:, keep] = True
        return [np.asarray(x, np.float32) for x in self.both(q, k, v, dout * seen, self.view)]

    def seconds(self, what: str, repeats: int) -> float:
        import jax

        call, count = (self.forward, 3) if what == "forward" else (self.both, 4)
        arrays = self.arrays[:count]
        return per_call(lambda: call(*arrays, self.view), repeats, jax.block_until_ready)


class TorchContender:
    """`scaled_dot_product_attention` of PyTorch, its choice of backend."""

    def __init__(self, implementation: str, case: Case) -> None:
        if case.num_documents > 1 or case.window or case.softcap:
            raise ValueError("scaled_dot_product_attention is causal without a mask only")
        torch = self.torch = importlib.import_module("torch")
        if not torch.cuda.is_available():
            raise ValueError("PyTorch has no CUDA here")
        q, k, v, dout = (
            torch.from_numpy(x).to("cuda", torch.bfloat16).transpose(1, 2).contiguous()
            for x in case.arrays()
        )
        self.arrays, self.dout = [x.requires_grad_() for x in (q, k, v)], dout
        self.attend = functools.partial(
            torch.nn.functional.scaled_dot_product_attention,
            is_causal=True, enable_gqa=case.num_heads != case.num_kv_heads,
        )  # fmt: skip

    def both(self, dout: Any) -> list[Any]:
        out = self.attend(*self.arrays)
        return [out, *self.torch.autograd.grad(out, self.arrays, dout)]

    def results(self, keep: slice) -> list[np.ndarray]:
        dout = self.torch.zeros_like(self.dout)
        dout[:, :, keep] = self.dout[:, :, keep]
        return [x.detach().transpose(1, 2).float().cpu().numpy() for x in self.both(dout)]

    def seconds(self, what: str, repeats: int) -> float:
        both, wait = what == "both", self.torch.cuda.synchronize
        call = (lambda: self.both(self.dout)) if both else (lambda: self.attend(*self.arrays))
        wait()
        with self.torch.set_grad_enabled(both):
            return per_call(call, repeats, lambda _: wait())


def errors(case: Case, results: list[np.ndarray], path: str) -> dict[str, float]:
    """Largest differences, as shares of the largest value expected."""
    wanted = np.load(path)
    found = {}
    for name, x in zip(RESULTS, results, strict=True):
        x = x[:, case.sample] if name in ("out", "dq") else x
        found[name] = float(np.abs(x - wanted[name]).max() / np.abs(wanted[name]).max())
    return found


def time_paged(name: str, size: str, rounds: int) -> Answer:
    """Decoding over pages with one implementation, and a copy, as a row."""
    import jax
    import jax.numpy as jnp

    from lm.kernels.attention import Scores, View, attention
    from lm.kernels.paged_attention import PageBatch, make_pages, paged_attention

    B, T, H, K, h, page = (4, 64, 4, 2, 64, 16) if size == "tiny" else (64, 8192, 32, 8, 128, 64)
    keys = [jax.random.key(i) for i in range(3)]
    empty = make_pages(B * T // page, page, K, h)
    data = jax.random.normal(keys[0], empty.data.shape, empty.data.dtype)
    table = jax.random.permutation(keys[1], B * T // page).reshape(B, -1).astype(jnp.int32)
    q = jax.random.normal(keys[2], (B, H, h), jnp.bfloat16)
    large = jnp.ones((1 << (23 if size == "tiny" else 29),), jnp.bfloat16)
    copy = _median(jax.jit(lambda x: x + 1).lower(large).compile(), large, rounds=rounds)
    # One sequence at a time, so that its keys side by side in float32 fit anywhere.
    rows = data[table[0]].swapaxes(1, 2).reshape(T, K, -1).astype(jnp.float32)
    wanted = attention(
        q[:1, None].astype(jnp.float32), rows[None, ..., :h], rows[None, ..., h : 2 * h],
        View(np.full((1, 1), T - 1), np.arange(T)[None]), Scores(h**-0.5),
        implementation="reference",
    )[0, 0]  # fmt: skip
    call = functools.partial(paged_attention, scores=Scores(h**-0.5), implementation=name)
    lens, starts = jnp.full((B,), T, jnp.int32), jnp.arange(B + 1, dtype=jnp.int32)
    batch = PageBatch(table, lens, starts, max_q_len=1)
    arguments = (q, dataclasses.replace(empty, data=data), batch)
    run = jax.jit(call).lower(*arguments).compile()
    out = run(*arguments)[0].astype(jnp.float32)
    seconds = _median(run, *arguments, rounds=rounds)
    rate, copied = 2 * B * T * K * h * 2 / seconds / 1e9, 2 * large.nbytes / copy / 1e9
    return {
        "case": f"{B} sequences of {T}, {H}/{K} heads of {h}, pages of {page}",
        "max_error": float(jnp.abs(out - wanted).max() / jnp.abs(wanted).max()),
        "seconds": seconds, "gb_per_second": rate, "copy_gb_per_second": copied,
        "of_copy": rate / copied,
    }  # fmt: skip


def _median(run: Any, *arguments: Any, rounds: int) -> float:
    """Seconds of a call, of `rounds` times ten."""
    import jax

    wait = jax.block_until_ready
    wait(run(*arguments))
    return statistics.median(per_call(lambda: run(*arguments), 10, wait) for _ in range(rounds))


def contender(name: str) -> dict[str, Callable[..., Answer]]:
    """What a contender's process answers: `paged`, or `open` with a case, then `check`, `time`."""
    opened: list[Any] = []

    def open(case: dict[str, Any]) -> Answer:
        opened.clear()
        before = time.perf_counter()
        make = TorchContender if name == "torch" else JaxContender
        found = Case(**case)
        opened.extend((make(name, found), found))
        return {"compile_seconds": time.perf_counter() - before}

    def expect(case: dict[str, Any], path: str) -> Answer:
        expected(Case(**case), path)
        return {}

    def check(path: str) -> Answer:
        made, case = opened
        return errors(case, made.results(case.sample), path)

    def time_(what: str, repeats: int) -> Answer:
        return {"seconds": opened[0].seconds(what, repeats)}

    paged = functools.partial(time_paged, name)
    return {"open": open, "expect": expect, "check": check, "time": time_, "paged": paged}

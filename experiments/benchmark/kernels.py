"""How fast the kernels are on the accelerator that is there, and whether they are right.

    python -m experiments.benchmark kernels                        # all of it, a table
    python -m experiments.benchmark kernels --json=kernels.json    # and a file
    python -m experiments.benchmark kernels --parts=attention --contenders=mosaic_gpu,cudnn
    python -m experiments.benchmark kernels --sizes=tiny           # small enough for a CPU

Attention: causal, forward and forward with backward, bfloat16. TFLOP/s count the scores that are
seen, backward as 2.5 times forward. Every contender is a process of its own, they take turns, and
medians count. Errors are the largest difference from the reference in float32, of the last 256
queries of each row and of what they give to keys and values, as a share of the largest value: a few
thousandths are bfloat16's.

Paged: one new token of each sequence attends to its pages; bytes of keys and values a second,
beside what a copy of a large array reads and writes a second.

Train: `python -m experiments.benchmark train` of each of `--train_models`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import os
import pathlib
import select
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import Any

from absl import flags

from experiments.benchmark.kernel_contenders import CONTENDERS, Case
from experiments.benchmark.train import BenchmarkError, accelerator, environment, processor, say

ROOT = pathlib.Path(__file__).resolve().parents[2]
PARTS = ("attention", "paged", "train")
LONG_ROW = 16384  # tokens of a batch; longer rows are alone in theirs

FLAGS = flags.FLAGS


def cases(size: str) -> list[Case]:
    """What attention is timed on."""
    if size == "tiny":
        tiny = Case(256, 1, 2, 1, 64)
        return [tiny, dataclasses.replace(tiny, num_documents=3, window=64, softcap=20.0)]
    plain = [
        Case(length, max(1, LONG_ROW // length), 4096 // head_dim, 1024 // head_dim, head_dim)
        for head_dim in (128, 64, 256)
        for length in (4096, 8192, 16384, 32768)
    ]
    base = Case(16384, 1, 32, 8, 128)
    changes: list[dict[str, Any]] = [
        {"num_documents": 8}, {"window": 1024}, {"softcap": 50.0},
        {"num_documents": 8, "window": 1024, "softcap": 50.0},
    ]  # fmt: skip
    return plain + [dataclasses.replace(base, **change) for change in changes]


class Worker:
    """The parent's end of a contender's process; one that hangs or dies is not asked again."""

    def __init__(self, name: str, timeout: float) -> None:
        self.name, self.timeout, self.lost = name, timeout, ""
        self.process = subprocess.Popen(
            [sys.executable, "-m", "experiments.benchmark", "kernels", f"--worker={name}"],
            cwd=ROOT,
            env=os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"},
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip

    def ask(self, **question: Any) -> dict[str, Any]:
        """The answer; of a process that gives none, an error."""
        if self.lost:
            return {"error": self.lost}
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        reply = ""
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(json.dumps(question) + "\n")
            self.process.stdin.flush()
            if not select.select([self.process.stdout], [], [], self.timeout)[0]:
                self.lost = f"no answer for {self.timeout:.0f} s"
                self.process.kill()
            else:
                reply = self.process.stdout.readline()
        if not reply:
            self.lost = self.lost or f"died, exit status {self.process.wait()}"
            return {"error": self.lost}
        return json.loads(reply)

    def close(self) -> None:
        for pipe in (self.process.stdin, self.process.stdout):
            with contextlib.suppress(OSError):
                if pipe is not None:
                    pipe.close()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def time_attention(
    names: Sequence[str], what: Sequence[Case], rounds: int, timeout: float
) -> list[dict[str, Any]]:
    """A row for each case and contender."""
    rows = []
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        open_worker = functools.partial(Worker, timeout=timeout)
        reference, *workers = (
            stack.enter_context(contextlib.closing(open_worker(n))) for n in ("reference", *names)
        )
        for case in what:
            say(case.name)
            fields = dataclasses.asdict(case)
            path = str(pathlib.Path(folder) / "expected.npz")
            wanted = reference.ask(do="expect", case=fields, path=path)
            if "error" in wanted:
                say(f"  no reference: {wanted['error']}")
            group = [_opened(w, case, path, "error" not in wanted) for w in workers]
            _race(workers, group, case, rounds)
            rows += group
    return rows


def _opened(worker: Worker, case: Case, path: str, is_known: bool) -> dict[str, Any]:
    row: dict[str, Any] = {"case": case.name, "contender": worker.name}
    row |= dataclasses.asdict(case)
    row |= worker.ask(do="open", case=dataclasses.asdict(case))
    if "error" not in row and is_known:
        found = worker.ask(do="check", path=path)
        if "error" in found:
            row["error"] = found["error"]
        else:
            row["max_errors"] = found
    told = row.get("error") or row.get("max_errors")
    say(f"  {worker.name}: {told}")
    return row


def _race(workers: list[Worker], rows: list[dict[str, Any]], case: Case, rounds: int) -> None:
    """Adds medians of seconds and TFLOP/s; contenders take turns, each first as often."""
    for what, share in (("forward", 1.0), ("both", 3.5)):
        pairs = [(w, r) for w, r in zip(workers, rows, strict=True) if "error" not in r]
        taken: dict[str, list[float]] = {w.name: [] for w, _ in pairs}
        repeats: dict[str, int] = {}
        for i in range(-1, rounds):
            shift = max(i, 0) % max(1, len(pairs))
            for worker, row in pairs[shift:] + pairs[:shift]:
                if "error" in row:
                    continue
                answer = worker.ask(do="time", what=what, repeats=repeats.get(worker.name, 1))
                if "error" in answer:
                    row["error"] = answer["error"]
                elif i >= 0:
                    taken[worker.name].append(answer["seconds"])
                else:  # warms up, and tells how many make 50 ms, as launches do not count then
                    repeats[worker.name] = max(1, min(100, int(0.05 / answer["seconds"])))
        for worker, row in pairs:
            if "error" not in row:
                seconds = statistics.median(taken[worker.name])
                row[f"{what}_seconds"] = seconds
                row[f"{what}_tflops"] = share * case.flops / seconds / 1e12


def time_paged(size: str, rounds: int) -> list[dict[str, Any]]:
    """Decoding over pages, and a copy, in this process."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from lm.kernels.attention import View, attention
    from lm.kernels.paged_attention import make_pages, paged_attention

    B, T, H, K, h, page = (4, 64, 4, 2, 64, 16) if size == "tiny" else (64, 8192, 32, 8, 128, 64)
    keys = [jax.random.key(i) for i in range(4)]
    per_row = T // page
    empty = make_pages(B * per_row, page, K, h)
    data = jax.random.normal(keys[0], empty.data.shape, empty.data.dtype)
    pages = dataclasses.replace(empty, data=data)
    table = jax.random.permutation(keys[1], B * per_row).reshape(B, per_row).astype(jnp.int32)
    q = jax.random.normal(keys[2], (B, H, h), jnp.bfloat16)
    lens = jnp.full((B,), T, jnp.int32)
    starts = jnp.arange(B + 1, dtype=jnp.int32)
    copy_size = (1 << 24) if size == "tiny" else (1 << 30)
    large = jnp.ones((copy_size // 2,), jnp.bfloat16)
    rate = 2 * large.nbytes / _median(jax.jit(lambda x: x + 1).lower(large).compile(), large,
                                      rounds=rounds)  # fmt: skip
    # One sequence at a time, so that its keys side by side in float32 fit anywhere.
    rows = data[table[0]].swapaxes(1, 2).reshape(T, K, -1).astype(jnp.float32)
    view = View(np.full((1, 1), T - 1), np.arange(T)[None])
    wanted = attention(
        q[:1, None].astype(jnp.float32), rows[None, ..., :h], rows[None, ..., h : 2 * h], view,
        scale=h**-0.5, implementation="reference",
    )[0, 0]  # fmt: skip
    implementations = ["reference", *["tpu"] * (jax.default_backend() == "tpu")]
    found = []
    for name in implementations:
        row: dict[str, Any] = {
            "case": f"{B} sequences of {T}, {H}/{K} heads of {h}, pages of {page}",
            "contender": name, "copy_gb_per_second": rate / 1e9,
        }  # fmt: skip
        call = functools.partial(paged_attention, scale=h**-0.5, max_q_len=1, implementation=name)
        arguments = (q, pages, table, lens, starts)
        try:
            run = jax.jit(call).lower(*arguments).compile()
            out = run(*arguments)[0].astype(jnp.float32)
            row["max_error"] = float(jnp.abs(out - wanted).max() / jnp.abs(wanted).max())
            row["seconds"] = _median(run, *arguments, rounds=rounds)
            row["gb_per_second"] = 2 * B * T * K * h * 2 / row["seconds"] / 1e9
            row["of_copy"] = row["gb_per_second"] / row["copy_gb_per_second"]
        except (ValueError, NotImplementedError, jax.errors.JaxRuntimeError) as error:
            row["error"] = f"{type(error).__name__}: {error}".splitlines()[0][:300]
        found.append(row)
    return found


def _median(run: Any, *arguments: Any, rounds: int) -> float:
    import jax

    jax.block_until_ready(run(*arguments))
    taken = []
    for _ in range(rounds):
        before = time.perf_counter()
        for _ in range(10):
            result = run(*arguments)
        jax.block_until_ready(result)
        taken.append((time.perf_counter() - before) / 10)
    return statistics.median(taken)


def time_train(size: str, kind: str, rounds: int, timeout: float) -> list[dict[str, Any]]:
    """The benchmark of the training step, each model and attention in a process."""
    common = ["train", f"--rounds={rounds}", "--format=json"]
    if size == "tiny":
        asked = [["--sizes=tiny", "--precisions=bfloat16", "--contenders=jax"]]
    else:
        attentions = {"gpu": ("mosaic_gpu", "cudnn"), "tpu": ("flash",)}[kind]
        asked = [
            [f"--model={model}", f"--attention={a}", f"--batch_size={FLAGS.batch_size}"]
            for model in FLAGS.train_models
            for a in attentions
        ]
    rows = []
    for arguments in asked:
        say(f"train {' '.join(arguments)}")
        row: dict[str, Any] = {"command": " ".join(common + arguments)}
        try:
            reply = subprocess.run(
                [sys.executable, "-m", "experiments.benchmark", *common, *arguments],
                cwd=ROOT, capture_output=True, text=True, check=False,
                timeout=timeout,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            rows.append(row | {"error": f"no result in {timeout:.0f} s"})
            continue
        if reply.returncode:
            said = reply.stderr.strip().splitlines() or [f"exit status {reply.returncode}"]
            rows.append(row | {"error": said[-1][:300]})
        else:
            rows += [row | found for found in json.loads(reply.stdout)["rows"]]
    return rows


def tables(report: dict[str, Any]) -> str:
    """The rows of all parts as Markdown."""
    lines = []

    def start(*columns: str) -> None:
        lines.extend(["", f"| {' | '.join(columns)} |", f"|---|---{'|---:' * (len(columns) - 2)}|"])

    if "attention" in report:
        start("attention", "contender", "fwd ms", "fwd TFLOP/s", "fwd+bwd ms", "fwd+bwd TFLOP/s",
              "error out", "dq", "dk", "dv")  # fmt: skip
    for r in report.get("attention", []):
        head = f"| {r['case']} | {r['contender']} | "
        if "error" in r:
            lines.append(head + r["error"] + " |" * 8)
            continue
        found = [f"{x:.1e}" for x in r.get("max_errors", {}).values()] or ["?"] * 4
        figures = (f"{1e3 * r['forward_seconds']:.3f}", f"{r['forward_tflops']:.4g}",
                   f"{1e3 * r['both_seconds']:.3f}", f"{r['both_tflops']:.4g}")  # fmt: skip
        lines.append(head + " | ".join([*figures, *found]) + " |")
    if "paged" in report:
        start("paged decoding", "contender", "ms", "GB/s", "copy GB/s", "of copy", "error")
    for r in report.get("paged", []):
        figures = [r.get("error", ""), *[""] * 4]
        if "error" not in r:
            figures = [f"{1e3 * r['seconds']:.3f}", f"{r['gb_per_second']:.4g}",
                       f"{r['copy_gb_per_second']:.4g}", f"{r['of_copy']:.0%}",
                       f"{r['max_error']:.1e}"]  # fmt: skip
        lines.append(f"| {r['case']} | {r['contender']} | {' | '.join(figures)} |")
    if "train" in report:
        start("training step", "attention", "s/step", "tokens/s", "MFU")
    for r in report.get("train", []):
        name = r.get("model") or r.get("size") or r["command"]
        figures = [r.get("error", ""), "", ""]
        if "error" not in r:
            figures = [f"{r['seconds_per_step']:.3f}", f"{r['tokens_per_second']:,.0f}",
                       f"{r['mfu']:.1%}" if "mfu" in r else ""]  # fmt: skip
        lines.append(f"| {name} | {r.get('attention') or ''} | {' | '.join(figures)} |")
    return "\n".join(lines[1:])


def benchmark_kernels() -> None:
    """The command `kernels`."""
    kind, device = accelerator()
    kind = "gpu" if kind in ("cuda", "rocm") else kind
    size = FLAGS.sizes[0] if FLAGS["sizes"].present else ("tiny" if kind == "cpu" else "full")
    if size not in ("tiny", "full") or (FLAGS["sizes"].present and len(FLAGS.sizes) > 1):
        raise BenchmarkError(f"--sizes={','.join(FLAGS.sizes)}: kernels have tiny or full")
    if size == "full" and kind == "cpu":
        raise BenchmarkError("--sizes=full needs an accelerator, JAX has a CPU; use --sizes=tiny")
    known = CONTENDERS.get(kind, ("blocked",))
    names = FLAGS.contenders if FLAGS["contenders"].present else known
    for flag, given, allowed in (("contenders", names, known), ("parts", FLAGS.parts, PARTS)):
        wrong = [value for value in given if value not in allowed]
        if wrong or not given:
            raise BenchmarkError(f"--{flag}={','.join(given)}: use some of {', '.join(allowed)}")
    path = pathlib.Path(FLAGS.json) if FLAGS.json else None
    if path is not None and not path.parent.is_dir():
        raise BenchmarkError(f"--json={path}: there is no folder {path.parent}")
    # This process too shares the accelerator, with those of the contenders.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    report: dict[str, Any] = {"environment": environment(processor() if kind == "cpu" else device)}
    rounds, timeout = FLAGS.rounds, FLAGS.timeout
    if "train" in FLAGS.parts:  # first: it wants all of the memory
        report["train"] = time_train(size, kind, rounds, timeout)
    if "attention" in FLAGS.parts:
        report["attention"] = time_attention(names, cases(size), rounds, timeout)
    if "paged" in FLAGS.parts:
        report["paged"] = time_paged(size, rounds)
    if path is not None:
        path.write_text(json.dumps(report, indent=2) + "\n")
    if FLAGS.format == "json":
        print(json.dumps(report, indent=2))
        return
    facts = report["environment"]
    print(tables(report))
    print(f"\n{facts['device']}, {facts['cores']} cores, {facts['date']}")
    print(", ".join(f"{name} {version}" for name, version in facts["versions"].items()))
    print(facts["command"])

"""How fast the kernels are on the accelerator that is there, and whether they are right.

    python -m experiments.benchmark kernels                        # all of it, a table
    python -m experiments.benchmark kernels --json=kernels.json    # and a file
    python -m experiments.benchmark kernels --parts=attention --contenders=mosaic_gpu,cudnn
    python -m experiments.benchmark kernels --sizes=tiny           # small enough for a CPU

Attention: causal, forward and forward with backward, bfloat16. TFLOP/s count the scores that are
not masked, backward as 2.5 times forward. Errors are the largest difference from the reference in
float32, for the last 256 queries of each row and their gradients to keys and values, as a share of
the largest value: a few thousandths are bfloat16's.

Paged: one new token of each sequence attends to its pages; bytes of keys and values per second,
beside the bytes per second that a copy of a large array reads and writes.

Train: the training step of each of `--train_models`, as `python -m experiments.benchmark train`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import pathlib
import tempfile
from collections.abc import Sequence
from typing import Any

from absl import flags

from experiments.benchmark import harness, train
from experiments.benchmark.harness import BenchmarkError, Worker, interleaved, median, say
from experiments.benchmark.kernels_contenders import CONTENDERS, RESULTS, Case
from lm.config.fields import Count, Positive
from lm.config.program import Number

PARTS = ("attention", "paged", "train")
LONG_ROW = 16384  # tokens per batch; longer rows are alone in theirs
SHARED = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}  # contenders share the accelerator
FLAGS = flags.FLAGS
Rows = list[dict[str, Any]]
COLUMNS: dict[str, list[harness.Column]] = {
    "attention": [
        ("attention", "case", ""), ("contender", "contender", ""),
        ("fwd ms", lambda row: 1e3 * row["forward_seconds"], ".3f"),
        ("fwd TFLOP/s", "forward_tflops", ".4g"),
        ("fwd+bwd ms", lambda row: 1e3 * row["both_seconds"], ".3f"),
        ("fwd+bwd TFLOP/s", "both_tflops", ".4g"),
        *((f"error {n}", lambda row, n=n: row["max_errors"].get(n), ".1e") for n in RESULTS),
    ],
    "paged": [
        ("paged decoding", "case", ""), ("contender", "contender", ""),
        ("ms", lambda row: 1e3 * row["seconds"], ".3f"), ("GB/s", "gb_per_second", ".4g"),
        ("copy GB/s", "copy_gb_per_second", ".4g"), ("of copy", "of_copy", ".0%"),
        ("error", "max_error", ".1e"),
    ],
    "train": [
        ("training step", lambda row: row.get("model") or row["size"], ""),
        ("attention", "attention", ""), ("s/step", "seconds_per_step", ".3f"),
        ("tokens/s", "tokens_per_second", ",.0f"), ("MFU", "mfu", ".1%"),
    ],
}  # fmt: skip


def define_flags() -> None:
    flags.DEFINE_list("parts", list(PARTS), "What is timed.")
    flags.DEFINE_list("sizes", None, "tiny or full; default what suits the device.")
    flags.DEFINE_list("contenders", None, "Attention: who takes part; default all there are.")
    flags.DEFINE(Number(Count), "rounds", 10, "Turns of each contender.")
    flags.DEFINE(Number(Positive), "timeout", 300, "Seconds a contender may be silent.")
    flags.DEFINE_list(
        "train_models", ["llama3_2_1b", "llama3_8b"], "On accelerators: names in lm.formats.known."
    )
    flags.DEFINE(Number(Count), "batch_size", 8, "Training, on accelerators: rows per step.")


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


def time_attention(names: Sequence[str], what: Sequence[Case], rounds: int, timeout: float) -> Rows:
    """One row per case and contender."""
    rows = []
    with contextlib.ExitStack() as stack:
        path = str(pathlib.Path(stack.enter_context(tempfile.TemporaryDirectory())) / "wanted.npz")
        reference, *workers = (
            stack.enter_context(Worker("kernels", name, timeout, SHARED))
            for name in ("reference", *names)
        )
        for case in what:
            say(case.name)
            fields = dataclasses.asdict(case)
            wanted = reference.ask("expect", case=fields, path=path)
            if "error" in wanted:
                say(f"  no reference: {wanted['error']}")
            group = {}
            for worker in workers:
                row = {"case": case.name, "contender": worker.name} | fields
                row |= worker.ask("open", case=fields)
                found = worker.ask("check", path=path) if not {"error"} & {*row, *wanted} else {}
                row |= found if "error" in found else {"max_errors": found}
                say(f"  {worker.name}: {row.get('error') or found}")
                group[worker.name] = row
            race(workers, group, case, rounds)
            rows += group.values()
    return rows


def race(workers: Sequence[Worker], rows: dict[str, Any], case: Case, rounds: int) -> None:
    """Adds medians of seconds and TFLOP/s to the rows by contender, or the error."""
    for what, share in (("forward", 1.0), ("both", 3.5)):
        running = [worker for worker in workers if "error" not in rows[worker.name]]
        repeats = dict.fromkeys(rows, 1)

        def turn(worker: Worker, what: str = what, repeats: dict[str, int] = repeats) -> Any:
            return worker.ask("time", what=what, repeats=repeats[worker.name])

        for name, (warm, *_) in interleaved(running, 1, turn).items():
            # As many calls as make 50 ms, so that launching them does not count.
            repeats[name] = max(1, min(100, int(0.05 / warm.get("seconds", 1))))
        for name, taken in interleaved(running, rounds, turn).items():
            if "error" in taken[-1]:
                rows[name] |= taken[-1]
                continue
            seconds = median(taken, "seconds")
            rows[name][f"{what}_seconds"] = seconds
            rows[name][f"{what}_tflops"] = share * case.flops / seconds / 1e12


def time_paged(size: str, kind: str, rounds: int, timeout: float) -> Rows:
    """One row per implementation of decoding over pages."""
    rows = []
    for name in ("reference", *["tpu"] * (kind == "tpu")):
        with Worker("kernels", name, timeout, SHARED) as worker:
            found = worker.ask("paged", size=size, rounds=rounds)
        rows.append({"case": size, "contender": name} | found)
    return rows


def time_train(size: str, kind: str, rounds: int, timeout: float) -> Rows:
    """The benchmark of the training step, each model and attention in a process."""
    if size == "tiny":
        return train.race(["jax"], "tiny", "bfloat16", rounds, None)
    rows = []
    for model in FLAGS.train_models:
        for attention in {"gpu": ("mosaic_gpu", "cudnn"), "tpu": ("flash",)}[kind]:
            say(f"train {model} with {attention}")
            asked = {"model": model, "batch_size": FLAGS.batch_size, "attention": attention}
            with Worker("train", "jax", timeout, {}) as worker:
                rows.append(asked | worker.ask("accelerator", **asked, rounds=rounds))
    return rows


def tables(report: dict[str, Any]) -> str:
    """The rows of all parts as Markdown."""
    parts = [part for part in PARTS if report.get(part)]
    return "\n\n".join(harness.table(report[part], COLUMNS[part], 2) for part in parts)


def main() -> None:
    kind, device = harness.accelerator()
    (size, *more) = FLAGS.sizes or ["tiny" if kind == "cpu" else "full"]
    if size not in ("tiny", "full") or more:
        raise BenchmarkError(f"--sizes={','.join(FLAGS.sizes)}: kernels have tiny or full")
    if size == "full" and kind == "cpu":
        raise BenchmarkError("--sizes=full needs an accelerator, JAX has a CPU; use --sizes=tiny")
    known = CONTENDERS.get(kind, ("blocked",))
    names = known if FLAGS.contenders is None else FLAGS.contenders
    harness.check_choices("contenders", names, known)
    harness.check_choices("parts", FLAGS.parts, PARTS)
    facts = harness.environment(harness.processor() if kind == "cpu" else device)
    report: dict[str, Any] = {"environment": facts}
    rounds, timeout = FLAGS.rounds, FLAGS.timeout
    if "train" in FLAGS.parts:  # first: it wants all of the memory
        report["train"] = time_train(size, kind, rounds, timeout)
    if "attention" in FLAGS.parts:
        report["attention"] = time_attention(names, cases(size), rounds, timeout)
    if "paged" in FLAGS.parts:
        report["paged"] = time_paged(size, kind, rounds, timeout)
    harness.publish(report, tables(report))

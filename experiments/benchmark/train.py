"""How fast a training step is.

    python -m experiments.benchmark train                   # two sizes, two precisions
    python -m experiments.benchmark train --sizes=small --precisions=bfloat16 --rounds=20
    python -m experiments.benchmark train --format=json

On CPU: this project's step against `LlamaForCausalLM` of `transformers` on PyTorch, eager and,
where a C++ compiler is found, compiled (`pip install 'lm-lifecycle[peers]'`; without it, ours
alone). Same shapes, token ids, precision (bfloat16: PyTorch under autocast, ours with bfloat16
compute, both over float32 weights), AdamW and clipping. Peak memory includes compilation. About 15
minutes on two cores.

On a GPU or TPU: tokens/s, TFLOP/s and MFU of one step of `--model` on one device. FLOPs are
`lm.model.train_flops`: causal, without what is computed again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
import time
from collections.abc import Sequence
from typing import Any

from absl import flags

from experiments.benchmark import harness
from experiments.benchmark.harness import BenchmarkError, Worker, interleaved, median, say
from experiments.benchmark.train_contenders import NEEDS, SIZES, time_accelerator
from lm.config.fields import Count, Positive
from lm.config.program import Number

PRECISIONS = ("float32", "bfloat16")
COLUMNS = (
    ("size", "size", ""), ("precision", "precision", ""), ("contender", "contender", ""),
    ("s/step", "seconds_per_step", ".3f"), ("tokens/s", "tokens_per_second", ",.0f"),
    ("ratio", "ratio", ".2f"), ("CPU s", "cpu_seconds_per_step", ".2f"),
    ("peak MB", lambda row: row["peak_bytes"] / 1e6, ",.0f"), ("loss", "loss", ".3f"),
)  # fmt: skip
FLAGS = flags.FLAGS


def define_flags() -> None:
    flags.DEFINE_list("sizes", ["small", "large"], "On CPU: sizes to time.")
    flags.DEFINE_list("precisions", list(PRECISIONS), "On CPU: precisions to time.")
    flags.DEFINE_list("contenders", list(NEEDS), "On CPU: who takes part.")
    flags.DEFINE(Number(Count), "rounds", 10, "Timed steps of each contender.")
    flags.DEFINE_string("remat", None, "See lm.model.remat; default none, full on accelerators.")
    flags.DEFINE_string("model", "llama3_2_1b", "On accelerators: a name in lm.formats.known.")
    flags.DEFINE(Number(Count), "sequence_length", 4096, "On accelerators.")
    flags.DEFINE(Number(Count), "batch_size", 8, "On accelerators: rows per step.")
    flags.DEFINE_string("attention", None, "On accelerators: implementation; cudnn on GPU.")
    flags.DEFINE(
        Number(Positive),
        "peak_tflops",
        None,
        "The accelerator's, dense bfloat16; default from lm.hardware.chips.",
    )


def available(names: Sequence[str]) -> list[str]:
    """As `harness.available`; PyTorch's compiler also needs one for C++."""
    compiler = os.environ.get("CXX") or next(filter(shutil.which, ("g++", "c++", "clang++")), None)
    if "torch_compile" in names and compiler is None:
        say("without torch_compile: no C++ compiler; install g++ or clang++, or set CXX")
        names = [name for name in names if name != "torch_compile"]
    return harness.available(names, NEEDS)


def race(
    names: Sequence[str], size_name: str, precision: str, rounds: int, remat: str | None
) -> list[dict[str, Any]]:
    """One row per contender, with medians over the rounds."""
    size = SIZES[size_name]
    say(f"{size_name}, {precision}: {size}")
    with contextlib.ExitStack() as stack:
        workers, facts = [], {}
        for name in names:
            worker = stack.enter_context(Worker("train", name, None, harness.ON_CPU))
            before = time.perf_counter()
            found = worker.ask(
                "open", size=dataclasses.asdict(size), precision=precision, remat=remat
            )
            if "error" in found and name == "jax":
                raise BenchmarkError(f"jax failed: {found['error']}")
            if "error" in found:
                say(f"without {name}: {found['error']}")
                continue
            say(f"  {name}: ready after {time.perf_counter() - before:.0f} s")
            workers.append(worker)
            facts[name] = found
        counts = {name: found["num_parameters"] for name, found in facts.items()}
        if len(set(counts.values())) > 1:
            raise BenchmarkError(f"the contenders are not the same model: parameters {counts}")
        taken = interleaved(workers, rounds, lambda worker: worker.demand("step"), log=True)
    return [
        {
            "size": size_name,
            "precision": precision,
            "contender": name,
            "seconds_per_step": median(steps, "seconds"),
            "fastest_seconds_per_step": min(step["seconds"] for step in steps),
            "cpu_seconds_per_step": median(steps, "cpu_seconds"),
            "tokens_per_second": size.num_tokens / median(steps, "seconds"),
            "peak_bytes": steps[-1]["peak_bytes"],
            "loss": steps[-1]["loss"],
        }
        | facts[name]
        for name, steps in taken.items()
    ]


def add_ratios(rows: list[dict[str, Any]]) -> None:
    """Adds `ratio`: seconds of the fastest PyTorch contender over the row's own."""
    peers = [row["seconds_per_step"] for row in rows if row["contender"] != "jax"]
    for row in rows:
        row["ratio"] = min(peers) / row["seconds_per_step"] if peers else None


def sentence(row: dict[str, Any]) -> str:
    """The row of an accelerator."""
    peak = "unknown" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 1e9:.1f} GB"
    return (
        f"{row['model']}, {row['batch_size']} x {row['sequence_length']} tokens, remat "
        f"{row['remat']}, attention {row['attention']}: {row['seconds_per_step']:.3f} s/step, "
        f"{row['tokens_per_second']:,.0f} tokens/s, {row['tflops']:.0f} TFLOP/s, MFU "
        f"{row['mfu']:.1%} of {row['peak_tflops']:g}, peak memory {peak}"
    )


def main() -> None:
    harness.check_choices("sizes", FLAGS.sizes, SIZES)
    harness.check_choices("precisions", FLAGS.precisions, PRECISIONS)
    kind, device = harness.accelerator()
    facts = harness.environment(harness.processor() if kind == "cpu" else device)
    rows: list[dict[str, Any]] = []
    if kind == "cpu":
        names = available(FLAGS.contenders)
        for size in FLAGS.sizes:
            for precision in FLAGS.precisions:
                group = race(names, size, precision, FLAGS.rounds, FLAGS.remat)
                add_ratios(group)
                rows += group
        text = harness.table(rows, COLUMNS, 3)
    else:
        row = time_accelerator(
            FLAGS.model, FLAGS.batch_size, FLAGS.rounds,
            FLAGS.attention or ("cudnn" if kind == "gpu" else None), FLAGS.remat or "full",
            FLAGS.sequence_length, FLAGS.peak_tflops,
        )  # fmt: skip
        rows, text = [row], sentence(row)
    harness.publish({"environment": facts, "rows": rows}, text)

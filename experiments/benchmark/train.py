"""Benchmarks: how fast a training step is, and the kernels (`benchmark_kernels`).

    python -m experiments.benchmark train                   # two sizes, two precisions
    python -m experiments.benchmark train --sizes=small --precisions=bfloat16 --rounds=20
    python -m experiments.benchmark train --format=json
    python -m experiments.benchmark kernels

On CPU: this project's step against `LlamaForCausalLM` of `transformers` on PyTorch, eager and,
where a C++ compiler is found, compiled (`pip install 'lm-lifecycle[peers]'`; without it, ours
alone). Same shapes, token ids, precision (bfloat16: PyTorch under autocast, ours with bfloat16
compute, both over float32 weights), AdamW and clipping. Every contender is a process of its own, so
that its peak memory is its own (compilation included); they take turns of one step, so that load of
the machine falls on all alike.
About 15 minutes on two cores.

On a GPU or TPU: tokens/s, TFLOP/s and MFU of one step of `--model` on one device. FLOPs are
`lm.model.train_flops`: causal, without what is computed again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import importlib.metadata
import importlib.util
import json
import os
import pathlib
import platform
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

from absl import flags

from experiments.benchmark import kernel_contenders
from experiments.benchmark.train_contenders import CONTENDERS, SIZES, Size, make_jax_step, work
from lm.config import program
from lm.config.command_line import ConfigError

PRECISIONS = ("float32", "bfloat16")
PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy", "torch", "transformers")

FLAGS = flags.FLAGS


class BenchmarkError(ConfigError):
    """The benchmark cannot go on; the message says why and what to do."""


class Worker:
    """The parent's end of a contender's process."""

    def __init__(self, name: str, size: Size, precision: str, remat: str | None) -> None:
        self.name = name
        environment = os.environ | {"JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1"}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "experiments.benchmark", f"--worker={name}"],
            cwd=pathlib.Path(__file__).resolve().parents[2],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        case = {"size": dataclasses.asdict(size), "precision": precision,
                "options": {"remat": remat}}  # fmt: skip
        self.steps: list[dict[str, Any]] = []
        try:
            self.facts = self.ask(json.dumps(case))
        except BaseException:
            self.close()
            raise

    def ask(self, line: str) -> dict[str, Any]:
        """The answer to a line."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        reply = ""
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(line + "\n")
            self.process.stdin.flush()
            reply = self.process.stdout.readline()
        if not reply:
            code = self.process.wait()
            raise BenchmarkError(f"{self.name} died (exit status {code}; {-9} is lack of memory)")
        values = json.loads(reply)
        if "error" in values:
            raise BenchmarkError(f"{self.name} failed: {values['error']}")
        return values

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


def say(text: str) -> None:
    """Progress; standard output is for the result."""
    print(text, file=sys.stderr, flush=True)


def available(contenders: Sequence[str]) -> list[str]:
    """Those that can run here; says why the others cannot."""
    unknown = [name for name in contenders if name not in CONTENDERS]
    if unknown or not contenders:
        raise BenchmarkError(f"contenders={list(contenders)}; use some of {','.join(CONTENDERS)}")
    missing = [m for m in ("torch", "transformers") if importlib.util.find_spec(m) is None]
    compiler = os.environ.get("CXX") or next(filter(shutil.which, ("g++", "c++", "clang++")), None)
    found = []
    for name in contenders:
        if name != "jax" and missing:
            say(f"without {name}: {' and '.join(missing)} missing; "
                "pip install 'lm-lifecycle[peers]'")  # fmt: skip
        elif name == "torch_compile" and compiler is None:
            say("without torch_compile: no C++ compiler; install g++ or clang++, or set CXX")
        else:
            found.append(name)
    if not found:
        raise BenchmarkError("no contender is left")
    return found


@contextlib.contextmanager
def started(
    names: Sequence[str], size: Size, precision: str, remat: str | None
) -> Iterator[list[Worker]]:
    """Contenders, compiled and warmed up one after another."""
    workers: list[Worker] = []
    try:
        for name in names:
            before = time.perf_counter()
            try:
                workers.append(Worker(name, size, precision, remat))
            except BenchmarkError as error:
                if name == "jax":
                    raise
                say(f"without {error}")
                continue
            say(f"  {name}: ready after {time.perf_counter() - before:.0f} s")
        counts = {worker.name: worker.facts["num_parameters"] for worker in workers}
        if len(set(counts.values())) > 1:
            raise BenchmarkError(f"the contenders are not the same model: parameters {counts}")
        yield workers
    finally:
        for worker in workers:
            worker.close()


def race(
    names: Sequence[str], size_name: str, precision: str, rounds: int, remat: str | None
) -> list[dict[str, Any]]:
    """One row a contender, with medians over the rounds."""
    size = SIZES[size_name]
    say(f"{size_name}, {precision}: {size}")
    with started(names, size, precision, remat) as workers:
        for i in range(rounds):
            # Each goes first as often as the others: what follows a neighbour finds its cache cold.
            shift = i % len(workers)
            for worker in workers[shift:] + workers[:shift]:
                worker.steps.append(worker.ask("step"))
            times = ", ".join(f"{w.name} {w.steps[-1]['seconds']:.3f} s" for w in workers)
            say(f"  round {i + 1}/{rounds}: {times}")
        return [_row(worker, size_name, precision) for worker in workers]


def _row(worker: Worker, size_name: str, precision: str) -> dict[str, Any]:
    seconds = [step["seconds"] for step in worker.steps]
    return {
        "size": size_name,
        "precision": precision,
        "contender": worker.name,
        "seconds_per_step": statistics.median(seconds),
        "fastest_seconds_per_step": min(seconds),
        "cpu_seconds_per_step": statistics.median(step["cpu_seconds"] for step in worker.steps),
        "tokens_per_second": SIZES[size_name].num_tokens / statistics.median(seconds),
        "peak_bytes": worker.steps[-1]["peak_bytes"],
        "loss": worker.steps[-1]["loss"],
    } | worker.facts


def add_ratios(rows: list[dict[str, Any]]) -> None:
    """Adds `ratio`: seconds of the fastest PyTorch contender over the row's own."""
    peers = [row["seconds_per_step"] for row in rows if row["contender"] != "jax"]
    for row in rows:
        row["ratio"] = min(peers) / row["seconds_per_step"] if peers else None


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as Markdown."""
    lines = [
        "| size | precision | contender | s/step | tokens/s | ratio | CPU s | peak MB | loss |",
        "|---|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        ratio = "" if row["ratio"] is None else f"{row['ratio']:.2f}"
        lines.append(
            f"| {row['size']} | {row['precision']} | {row['contender']} "
            f"| {row['seconds_per_step']:.3f} | {row['tokens_per_second']:,.0f} | {ratio} "
            f"| {row['cpu_seconds_per_step']:.2f} | {row['peak_bytes'] / 1e6:,.0f} "
            f"| {row['loss']:.3f} |"
        )
    return "\n".join(lines)


def time_accelerator(
    model: str,
    batch_size: int,
    length: int,
    remat: str,
    attention: str | None,
    rounds: int,
    peak_tflops: float,
    **changes: Any,
) -> dict[str, Any]:
    """One model's step in bfloat16 on the first device, as a row.

    Args:
      model: a name in `lm.model.known`.
      batch_size, length: rows of whole documents, and their tokens.
      remat: see `lm.model.remat`.
      attention: implementation, see `lm.kernels.attention.attention`.
      rounds: timed steps.
      peak_tflops: what MFU is a share of.
      **changes: of the model, see `known_model`.
    """
    import jax
    import numpy as np

    from lm.model import num_params, train_flops
    from lm.model.known import known_model

    config = known_model(model, **changes)
    ids = np.random.default_rng(0).integers(0, config.vocab_size, (batch_size, length))
    say(
        f"{model}: {num_params(config):,} parameters, {batch_size} x {length} tokens, remat {remat}"
    )
    try:
        step, _, seconds_to_compile = make_jax_step(config, ids, "bfloat16", remat, attention)
        say(f"compiled in {seconds_to_compile:.0f} s")
        loss = [step() for _ in range(2)][-1]
        seconds = []
        for i in range(rounds):
            before = time.perf_counter()
            loss = step()
            seconds.append(time.perf_counter() - before)
            say(f"  step {i + 1}/{rounds}: {seconds[-1]:.3f} s, loss {loss:.3f}")
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise BenchmarkError(
            f"batch_size={batch_size} with remat={remat} does not fit the device; use a smaller "
            "--batch_size, or --remat=full"
        ) from error
    rate = batch_size * length / statistics.median(seconds)
    flops = rate * train_flops(config, length)
    memory = jax.devices()[0].memory_stats() or {}
    return {
        "model": model,
        "batch_size": batch_size,
        "sequence_length": length,
        "remat": remat,
        "attention": attention,
        "seconds_per_step": statistics.median(seconds),
        "tokens_per_second": rate,
        "tflops": flops / 1e12,
        "mfu": flops / 1e12 / peak_tflops,
        "peak_tflops": peak_tflops,
        "peak_bytes": memory.get("peak_bytes_in_use"),
        "compile_seconds": seconds_to_compile,
        "loss": loss,
    }


def environment(device: str) -> dict[str, Any]:
    """What the figures were measured on."""
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return {
        "device": device,
        "cores": len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count(),
        "load_average": os.getloadavg()[0],
        "versions": versions,
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "command": " ".join(["python -m experiments.benchmark", *sys.argv[1:]]),
    }


def processor() -> str:
    """The processor's name."""
    with contextlib.suppress(OSError):
        for line in pathlib.Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def accelerator() -> tuple[str, str]:
    """(platform, name) of JAX's first device, asked in a process of its own."""
    ask = "import jax; d = jax.devices()[0]; print('device:', d.platform, d.device_kind)"
    reply = subprocess.run(
        [sys.executable, "-c", ask], capture_output=True, text=True, timeout=300, check=False
    )
    for line in reply.stdout.splitlines():
        if line.startswith("device: "):
            _, kind, name = line.split(" ", 2)
            return kind, name
    raise BenchmarkError(f"JAX finds no device:\n{reply.stderr.strip()[-500:]}")


def benchmark_train() -> None:
    """The command `train`."""
    for name, given, known in (
        ("sizes", FLAGS.sizes, SIZES), ("precisions", FLAGS.precisions, PRECISIONS)
    ):  # fmt: skip
        wrong = [value for value in given if value not in known]
        if wrong or not given:
            raise BenchmarkError(f"--{name}={','.join(given)}: use some of {', '.join(known)}")
    kind, device = accelerator()
    rows: list[dict[str, Any]] = []
    if kind == "cpu":
        names = available(FLAGS.contenders)
        facts = environment(processor())
        for size in FLAGS.sizes:
            for precision in FLAGS.precisions:
                group = race(names, size, precision, FLAGS.rounds, FLAGS.remat)
                add_ratios(group)
                rows += group
        text = table(rows)
    else:
        from lm.hardware.chips import peak_flops

        peak_tflops = FLAGS.peak_tflops or (peak_flops(device) or 0) / 1e12
        if not peak_tflops:
            raise BenchmarkError(f"the peak of {device!r} is not known; give --peak_tflops")
        attention = FLAGS.attention or ("cudnn" if kind in ("gpu", "cuda", "rocm") else None)
        row = time_accelerator(
            FLAGS.model, FLAGS.batch_size, FLAGS.sequence_length, FLAGS.remat or "full", attention,
            FLAGS.rounds, peak_tflops,
        )  # fmt: skip
        rows.append(row)
        facts = environment(device)
        peak = "unknown" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 1e9:.1f} GB"
        text = (
            f"{row['model']}, {row['batch_size']} x {row['sequence_length']} tokens, remat "
            f"{row['remat']}, attention {row['attention']}: {row['seconds_per_step']:.3f} s/step, "
            f"{row['tokens_per_second']:,.0f} tokens/s, {row['tflops']:.0f} TFLOP/s, MFU "
            f"{row['mfu']:.1%} of {row['peak_tflops']:g}, peak memory {peak}"
        )
    if FLAGS.format == "json":
        print(json.dumps({"environment": facts, "rows": rows}, indent=2))
        return
    print(text)
    print(f"\n{facts['device']}, {facts['cores']} cores, load {facts['load_average']:.1f}, "
          f"{facts['date']}")  # fmt: skip
    print(", ".join(f"{name} {version}" for name, version in facts["versions"].items()))
    print(facts["command"])


def main(names: Sequence[str]) -> None:
    if FLAGS.worker:
        # Answers go to the original standard output; what libraries print goes to the error stream.
        answers = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)
        turn = kernel_contenders.work if list(names) == ["kernels"] else work
        turn(FLAGS.worker, sys.stdin, answers)
        return
    if list(names) == ["kernels"]:
        from experiments.benchmark.kernels import benchmark_kernels

        benchmark_kernels()
        return
    if list(names) != ["train"]:
        known = "train and kernels"
        raise BenchmarkError(f"which benchmark? Known: {known}; got {' '.join(names) or 'none'}")
    benchmark_train()


if __name__ == "__main__":
    flags.DEFINE_list("sizes", ["small", "large"], "On CPU: sizes to time.")
    flags.DEFINE_list("precisions", list(PRECISIONS), "On CPU: precisions to time.")
    flags.DEFINE_list("contenders", list(CONTENDERS), "On CPU: who takes part.")
    flags.DEFINE_integer("rounds", 10, "Timed steps of each contender.", lower_bound=1)
    flags.DEFINE_string("remat", None, "See lm.model.remat; default none, full on accelerators.")
    flags.DEFINE_enum("format", "table", ["table", "json"], "Of the result.")
    flags.DEFINE_string("model", "llama3_2_1b", "On accelerators: a name in lm.model.known.")
    flags.DEFINE_integer("sequence_length", 4096, "On accelerators.", lower_bound=1)
    flags.DEFINE_integer("batch_size", 8, "On accelerators: rows of a step.", lower_bound=1)
    flags.DEFINE_string("attention", None, "On accelerators: implementation; cudnn on GPU.")
    flags.DEFINE_float(
        "peak_tflops", None, "Of the accelerator, dense bfloat16; default from lm.hardware.chips."
    )
    flags.DEFINE_list("parts", ["attention", "paged", "train"], "Of kernels: what is timed.")
    flags.DEFINE_string("json", None, "Of kernels: a file to write the result to as well.")
    flags.DEFINE_list(
        "train_models", ["llama3_2_1b", "llama3_8b"], "Of kernels, on accelerators: see --model."
    )
    flags.DEFINE_float("timeout", 300, "Of kernels: seconds a contender may be silent.")
    flags.DEFINE_string("worker", None, "Internal: the contender this process is.")
    program.run(main, positional=True)

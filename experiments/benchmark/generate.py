"""How fast models are opened and generate, against transformers and llama.cpp.

    python -m experiments.benchmark.generate --model=smollm2-135m-instruct
    python -m experiments.benchmark.generate --model=model.gguf --batch_sizes=1,8,32 --format=json

Each contender opens the same GGUF file in a process of its own, so that its peak memory is its own;
then they take turns of one generation, so that load of the machine falls on all alike. Greedy, ends
of sequence ignored, prompts of 32 tokens. Decoding is timed as the difference of a long and a short
generation, medians over `--rounds`.

The bound of decoding: every step reads all weights once. `bandwidth` is what a sum over a large
array reads a second on this machine, idle or not as it was; `of bound` is the share of
batch x bandwidth / bytes of weights that a contender reaches.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import pathlib
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

from absl import flags

from experiments.benchmark.generate_contenders import CONTENDERS, NEEDS
from lm.config import program
from lm.config.command_line import ConfigError, input_errors
from lm.formats.open import locate

FLAGS = flags.FLAGS
SHORT = 1


class Worker:
    """The parent's end of a contender's process."""

    def __init__(self, name: str, path: pathlib.Path) -> None:
        self.name = name
        self.process = subprocess.Popen(
            [sys.executable, "-m", "experiments.benchmark.generate", f"--worker={name}",
             f"--model={path}"],
            cwd=pathlib.Path(__file__).resolve().parents[2],
            env=os.environ | {"JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1"},
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        try:
            self.facts = self.read()
        except BaseException:
            self.close()
            raise

    def read(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise ConfigError(f"{self.name} died; its reason is above")
        return json.loads(line)

    def generate(self, batch: int, new: int) -> dict[str, float]:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps([batch, new]) + "\n")
        self.process.stdin.flush()
        return self.read()

    def close(self) -> None:
        with contextlib.suppress(OSError):
            if self.process.stdin is not None:
                self.process.stdin.close()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def work(name: str, path: pathlib.Path) -> None:
    """A contender's process: opens the model, then generates as each line of stdin says."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever libraries print is no answer
    before = time.perf_counter()
    generate, facts = CONTENDERS[name](path)
    facts["load_seconds"] = time.perf_counter() - before
    facts["load_peak_mb"] = peak_mb()
    print(json.dumps(facts), file=answers, flush=True)
    for line in sys.stdin:
        batch, new = json.loads(line)
        wall, cpu = time.perf_counter(), time.process_time()
        generate(batch, new)
        used = {"seconds": time.perf_counter() - wall, "cpu_seconds": time.process_time() - cpu}
        print(json.dumps(used | {"peak_mb": peak_mb()}), file=answers, flush=True)


def peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def bandwidth() -> float:
    """Bytes a second that a sum over 256 MB reads, the best of ten."""
    import jax
    import jax.numpy as jnp

    x = jnp.ones((1 << 26,), jnp.float32)
    total = jax.jit(jnp.sum)
    total(x).block_until_ready()
    times = []
    for _ in range(10):
        before = time.perf_counter()
        total(x).block_until_ready()
        times.append(time.perf_counter() - before)
    return x.nbytes / min(times)


def available(names: Sequence[str]) -> Iterator[str]:
    """Those that can run here; says why the others cannot."""
    for name in names:
        if name not in CONTENDERS:
            raise ConfigError(f"contender {name!r} is unknown; use some of {','.join(CONTENDERS)}")
        needed = NEEDS[name.partition("_")[0]]
        missing = [module for module in needed if importlib.util.find_spec(module) is None]
        if missing:
            say(f"without {name}: pip install {' '.join(missing)}")
        else:
            yield name


def measure(path: pathlib.Path, names: Sequence[str]) -> list[dict[str, Any]]:
    """A row for each contender and batch size."""
    reads = bandwidth()
    rows = []
    with contextlib.ExitStack() as stack:
        workers = []
        for name in names:
            say(f"opening in {name} ...")
            workers.append(stack.enter_context(contextlib.closing(Worker(name, path))))
        for batch in map(int, FLAGS.batch_sizes):
            taken: dict[str, list[dict[str, float]]] = {name: [] for name in names}
            for turn in range(-1, FLAGS.rounds):  # the first warms up
                for worker in workers:
                    one = worker.generate(batch, SHORT)
                    many = worker.generate(batch, FLAGS.new_tokens)
                    if turn >= 0:
                        taken[worker.name].append(
                            {key: many[key] - one[key] for key in ("seconds", "cpu_seconds")}
                            | {"first": one["seconds"], "peak_mb": many["peak_mb"]}
                        )
            rows += [row(w, batch, taken[w.name], reads) for w in workers]
    return rows


def row(worker: Worker, batch: int, taken: list[dict[str, float]], reads: float) -> dict[str, Any]:
    steps = FLAGS.new_tokens - SHORT
    seconds, cpu, first = (
        statistics.median(each[key] for each in taken)
        for key in ("seconds", "cpu_seconds", "first")
    )
    return {
        "contender": worker.name,
        "batch_size": batch,
        "tokens_per_second": batch * steps / seconds,
        "tokens_per_cpu_second": batch * steps / cpu,
        "first_token_ms": 1e3 * first,
        "of_bound": steps / seconds * worker.facts["weight_bytes"] / reads,
        "bandwidth_gb_s": reads / 1e9,
        "peak_mb": max(each["peak_mb"] for each in taken),
        **worker.facts,
    }


def table(rows: list[dict[str, Any]]) -> str:
    names = ("contender", "batch", "tokens/s", "tokens/s of CPU", "first token", "of bound",
             "weights", "load", "peak at load", "peak")  # fmt: skip
    lines = [f"| {' | '.join(names)} |", "|---" * len(names) + "|"]
    for r in rows:
        lines.append(
            f"| {r['contender']} | {r['batch_size']} | {r['tokens_per_second']:.1f} "
            f"| {r['tokens_per_cpu_second']:.1f} | {r['first_token_ms']:.0f} ms "
            f"| {r['of_bound']:.0%} | {r['weight_bytes'] / 1e6:.0f} MB "
            f"| {r['load_seconds']:.1f} s | {r['load_peak_mb']:.0f} MB | {r['peak_mb']:.0f} MB |"
        )
    return "\n".join(lines)


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main() -> None:
    if not FLAGS.model:
        raise ConfigError("no model; give a .gguf file or a package's model with --model")
    with input_errors():
        path = locate(FLAGS.model).resolve()
    if path.suffix != ".gguf":
        raise ConfigError(f"{path} is no .gguf file, which all contenders read")
    if FLAGS.worker:
        work(FLAGS.worker, path)
        return
    sizes = FLAGS.batch_sizes
    if not sizes or not all(size.isdecimal() and int(size) for size in sizes):
        raise ConfigError(f"--batch_sizes={','.join(sizes)} has to be numbers of at least 1: 1,8")
    names = list(available(FLAGS.contenders))
    if not names:
        raise ConfigError(f"no contender can run here; use some of {','.join(CONTENDERS)}")
    rows = measure(path, names)
    if FLAGS.format == "json":
        print(json.dumps(rows))
        return
    print(f"{path.name}, {os.cpu_count()} CPU cores, a sum reads "
          f"{rows[0]['bandwidth_gb_s']:.1f} GB/s\n")  # fmt: skip
    print(table(rows))


if __name__ == "__main__":
    flags.DEFINE_string("model", None, "A .gguf file, or a package's model.")
    flags.DEFINE_list("batch_sizes", ["1", "8"], "Prompts at once.")
    flags.DEFINE_integer("new_tokens", 33, "Tokens of the long generation.", lower_bound=2)
    flags.DEFINE_integer("rounds", 5, "Turns of each contender.", lower_bound=1)
    flags.DEFINE_list("contenders", list(CONTENDERS), "Who takes part.")
    flags.DEFINE_enum("format", "table", ["table", "json"], "Of the result.")
    flags.DEFINE_string("worker", None, "Internal: the contender this process is.")
    program.run(main)

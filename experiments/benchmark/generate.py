"""How fast models are opened and generate, against transformers and llama.cpp.

    python -m experiments.benchmark generate --model=smollm2-135m-instruct --rounds=5
    python -m experiments.benchmark generate --model=model.gguf --batch_sizes=1,8,32 --format=json

Each contender opens the same GGUF file; then they take turns of one generation. Greedy, ends of
sequence ignored, prompts of 32 tokens. Decoding is timed as the difference of a long and a short
generation.

The bound of decoding: every step reads all weights once. `bandwidth` is what a sum over a large
array reads per second on this machine, idle or not as it was; `of bound` is the share of
batch x bandwidth / bytes of weights that a contender reaches.
"""

from __future__ import annotations

import contextlib
import pathlib
from collections.abc import Sequence
from typing import Any

from absl import flags

from experiments.benchmark import harness
from experiments.benchmark.generate_contenders import NEEDS, bandwidth
from experiments.benchmark.harness import Worker, interleaved, median, say
from lm.config.command_line import ConfigError, input_errors
from lm.config.fields import Count, Several
from lm.config.program import Number

FLAGS = flags.FLAGS
SHORT = 1  # tokens of the short generation
COLUMNS = (
    ("contender", "contender", ""), ("batch", "batch_size", ""),
    ("tokens/s", "tokens_per_second", ".1f"), ("tokens/s of CPU", "tokens_per_cpu_second", ".1f"),
    ("first token ms", "first_token_ms", ".0f"), ("of bound", "of_bound", ".0%"),
    ("weights MB", lambda row: row["weight_bytes"] / 1e6, ".0f"),
    ("load s", "load_seconds", ".1f"),
    ("peak at load MB", lambda row: row["load_peak_bytes"] / 1e6, ".0f"),
    ("peak MB", lambda row: row["peak_bytes"] / 1e6, ".0f"),
)  # fmt: skip


def define_flags() -> None:
    flags.DEFINE_string("model", None, "A .gguf file, or a package's model.")
    flags.DEFINE_list("batch_sizes", ["1", "8"], "Prompts at once.")
    flags.DEFINE(Number(Several), "new_tokens", 33, "Tokens of the long generation.")
    flags.DEFINE(Number(Count), "rounds", 5, "Turns of each contender.")
    flags.DEFINE_list("contenders", list(NEEDS), "Who takes part.")


def measure(
    path: pathlib.Path, names: Sequence[str], batch_sizes: Sequence[int], rounds: int, long: int
) -> list[dict[str, Any]]:
    """One row per contender and batch size, with medians over the rounds."""
    rate, rows = bandwidth(), []
    with contextlib.ExitStack() as stack:
        facts, workers = {}, []
        for name in names:
            say(f"opening in {name} ...")
            worker = stack.enter_context(Worker("generate", name, None, harness.ON_CPU))
            facts[name] = worker.demand("open", path=str(path))
            workers.append(worker)
        for batch in batch_sizes:

            def turn(worker: Worker, batch: int = batch) -> dict[str, Any]:
                one = worker.demand("generate", batch=batch, new=SHORT)
                many = worker.demand("generate", batch=batch, new=long)
                decoding = {key: many[key] - one[key] for key in ("seconds", "cpu_seconds")}
                return decoding | {"first": one["seconds"], "peak_bytes": many["peak_bytes"]}

            interleaved(workers, 1, turn)  # warms up
            for name, taken in interleaved(workers, rounds, turn).items():
                steps = (long - SHORT) / median(taken, "seconds")
                rows.append({
                    "contender": name,
                    "batch_size": batch,
                    "tokens_per_second": batch * steps,
                    "tokens_per_cpu_second": batch * (long - SHORT) / median(taken, "cpu_seconds"),
                    "first_token_ms": 1e3 * median(taken, "first"),
                    "of_bound": steps * facts[name]["weight_bytes"] / rate,
                    "bandwidth_gb_s": rate / 1e9,
                    "peak_bytes": max(each["peak_bytes"] for each in taken),
                    **facts[name],
                })  # fmt: skip
    return rows


def main() -> None:
    from lm.formats.open import locate

    if not FLAGS.model:
        raise ConfigError("no model; give a .gguf file or a package's model with --model")
    with input_errors():
        path = locate(FLAGS.model).resolve()
    if not path.is_file():
        raise ConfigError(f"{path} is not a .gguf file, which all contenders read")
    sizes = FLAGS.batch_sizes
    if not sizes or not all(size.isdecimal() and int(size) for size in sizes):
        raise ConfigError(f"--batch_sizes={','.join(sizes)} has to be numbers of at least 1: 1,8")
    names = harness.available(FLAGS.contenders, NEEDS)
    facts = harness.environment(harness.processor())
    rows = measure(path, names, [int(size) for size in sizes], FLAGS.rounds, FLAGS.new_tokens)
    where = f"{path.name}; a sum reads {rows[0]['bandwidth_gb_s']:.1f} GB/s\n\n"
    text = where + harness.table(rows, COLUMNS, 2)
    harness.publish({"environment": facts, "rows": rows}, text)

"""How fast models are opened and generate, against transformers and llama.cpp.

    python -m experiments.benchmark generate --model=smollm2-135m-instruct --rounds=5
    python -m experiments.benchmark generate --model=model.gguf --batch_sizes=1,8,32 --format=json

Each contender opens the same GGUF file; then they take turns of one generation. Greedy, ends of
sequence ignored, prompts of 32 tokens. Decoding is timed as the difference of a long and a short
generation, prefill as the first token after 512. The last table has how many times as fast as each
other one the contender `--subject` is: ratios of medians, of the same rounds.

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
PROMPT, LONG_PROMPT = 32, 512  # tokens of a prompt, where decoding and where prefill is timed
COLUMNS = (
    ("contender", "contender", ""), ("batch", "batch_size", ""),
    ("tokens/s", "tokens_per_second", ".1f"), ("tokens/s of CPU", "tokens_per_cpu_second", ".1f"),
    ("first token ms", "first_token_ms", ".0f"), ("of bound", "of_bound", ".0%"),
    ("weights MB", lambda row: row["weight_bytes"] / 1e6, ".0f"),
    ("load s", "load_seconds", ".1f"),
    ("peak at load MB", lambda row: row["load_peak_bytes"] / 1e6, ".0f"),
    ("peak MB", lambda row: row["peak_bytes"] / 1e6, ".0f"),
)  # fmt: skip
PREFILL = (
    ("contender", "contender", ""), ("prefill tokens/s", "tokens_per_second", ".0f"),
    ("tokens/s of CPU", "tokens_per_cpu_second", ".0f"),
)  # fmt: skip


def define_flags() -> None:
    flags.DEFINE_string("model", None, "A .gguf file, or a package's model.")
    flags.DEFINE_list("batch_sizes", ["1", "8"], "Prompts at once.")
    flags.DEFINE(Number(Several), "new_tokens", 33, "Tokens of the long generation.")
    flags.DEFINE(Number(Count), "rounds", 5, "Turns of each contender.")
    flags.DEFINE_list("contenders", list(NEEDS), "Who takes part.")
    flags.DEFINE_enum("subject", "ours_blocks", list(NEEDS), "Who is compared with the others.")


def measure(
    path: pathlib.Path, names: Sequence[str], batch_sizes: Sequence[int], rounds: int, long: int
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Rows of decoding per contender and batch size, and of prefill per contender: medians."""
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
                one = worker.demand("generate", batch=batch, new=SHORT, length=PROMPT)
                many = worker.demand("generate", batch=batch, new=long, length=PROMPT)
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
        return rows, measure_prefill(workers, rounds)


def measure_prefill(workers: Sequence[Worker], rounds: int) -> list[dict[str, Any]]:
    """One row per contender: tokens of a long prompt per second, to the first new token."""

    def turn(worker: Worker) -> dict[str, Any]:
        return worker.demand("generate", batch=1, new=SHORT, length=LONG_PROMPT)

    interleaved(workers, 1, turn)
    return [
        {
            "contender": name,
            "tokens_per_second": LONG_PROMPT / median(taken, "seconds"),
            "tokens_per_cpu_second": LONG_PROMPT / median(taken, "cpu_seconds"),
        }
        for name, taken in interleaved(workers, rounds, turn).items()
    ]


def ratios(
    rows: Sequence[dict[str, Any]], prefill: Sequence[dict[str, Any]], subject: str
) -> tuple[list[dict[str, Any]], list[harness.Column]]:
    """How many times as fast as each other contender the subject is, and the columns of that."""
    rates = {(f"{row['batch_size']} rows", row["contender"]): row for row in rows}
    rates |= {(f"prefill of {LONG_PROMPT}", row["contender"]): row for row in prefill}
    names = list(dict.fromkeys(row["contender"] for row in rows if row["contender"] != subject))
    whats = list(dict.fromkeys(what for what, _ in rates))
    table: list[dict[str, Any]] = [{"than": name} for name in names]
    columns: list[harness.Column] = [(f"{subject} to", "than", "")]
    for what in whats:
        for unit, key in (("", "tokens_per_second"), (", per CPU s", "tokens_per_cpu_second")):
            columns.append((what + unit, what + unit, ".2f"))
            for row in table:
                own, other = rates[what, subject][key], rates[what, row["than"]][key]
                row[what + unit] = own / other
    return table, columns


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
    batches = [int(size) for size in sizes]
    rows, prefill = measure(path, names, batches, FLAGS.rounds, FLAGS.new_tokens)
    where = f"{path.name}; a sum reads {rows[0]['bandwidth_gb_s']:.1f} GB/s\n\n"
    report = {"environment": facts, "rows": rows, "prefill": prefill}
    text = where + harness.table(rows, COLUMNS, 2) + "\n\n" + harness.table(prefill, PREFILL, 1)
    if FLAGS.subject in names and len(names) > 1:
        compared, columns = ratios(rows, prefill, FLAGS.subject)
        report["ratios"] = compared
        text += "\n\n" + harness.table(compared, columns, 1)
    harness.publish(report, text)

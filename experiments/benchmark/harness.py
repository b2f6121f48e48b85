"""What the benchmarks share: contenders in processes of their own, rounds, and the report.

A contender is a process, so that its peak memory is its own and the others go on where it hangs or
dies. It answers lines of standard input: `{"do": name, **arguments}` calls one of its functions,
whose result, a dict, is the answer; `{"error": reason}` where the function raised. Contenders take
turns, so that load of the machine falls on all alike, and medians over the rounds count.
"""

from __future__ import annotations

import contextlib
import datetime
import importlib.metadata
import importlib.util
import json
import os
import pathlib
import platform
import select
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Self

from absl import flags

from lm.config.command_line import ConfigError

ROOT = pathlib.Path(__file__).resolve().parents[2]
PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy", "torch", "transformers", "xllamacpp")
ON_CPU = {"JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1"}
COMMAND: list[str] = []  # the subcommand that runs, for the record

FLAGS = flags.FLAGS
Answer = dict[str, Any]
Column = tuple[str, str | Callable[[Answer], Any], str]


class BenchmarkError(ConfigError):
    """The benchmark cannot go on; the message says why and what to do."""


def define_flags() -> None:
    """Flags that all subcommands have."""
    flags.DEFINE_enum("format", "table", ["table", "json"], "Form of the result.")
    flags.DEFINE_string("json", None, "A file to write the result to as well.")
    flags.DEFINE_string("worker", None, "Internal: the contender this process is.")


def check_output() -> None:
    """Raises BenchmarkError where the file of `--json` cannot be written."""
    if FLAGS.json and not pathlib.Path(FLAGS.json).parent.is_dir():
        folder = pathlib.Path(FLAGS.json).parent
        raise BenchmarkError(f"--json={FLAGS.json}: there is no folder {folder}; make it first")


def check_choices(flag: str, given: Sequence[str], known: Iterable[str]) -> None:
    """Raises BenchmarkError unless `given` are some of `known`."""
    if not given or not {*given} <= {*known}:
        raise BenchmarkError(f"--{flag}={','.join(given)}: use some of {', '.join(known)}")


def available(names: Sequence[str], needs: Mapping[str, Sequence[str]]) -> list[str]:
    """The contenders that can run here; logs why others cannot.

    Args:
      names: those asked for.
      needs: of every contender, the modules it imports.
    """
    check_choices("contenders", names, needs)
    found = []
    for name in names:
        missing = [module for module in needs[name] if importlib.util.find_spec(module) is None]
        if not missing:
            found.append(name)
            continue
        what = " and ".join(missing)
        say(f"without {name}: {what} missing; pip install 'lm-lifecycle[peers]'")
    if not found:
        raise BenchmarkError("no contender can run here")
    return found


def say(text: str) -> None:
    """Progress; standard output is for the result."""
    print(text, file=sys.stderr, flush=True)


class Worker:
    """The parent's end of a contender's process; one that hangs or died is not asked again.

    Args:
      command: the subcommand.
      name: the contender.
      timeout: seconds to wait for an answer; None waits forever.
      environment: variables of the process.
    """

    def __init__(
        self, command: str, name: str, timeout: float | None, environment: Mapping[str, str]
    ) -> None:
        self.name, self.timeout, self.lost = name, timeout, ""
        self.process = subprocess.Popen(
            [sys.executable, "-m", "experiments.benchmark", command, f"--worker={name}"],
            cwd=ROOT, env={**os.environ, **environment}, stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, text=True,
        )  # fmt: skip

    def ask(self, do: str, **arguments: Any) -> Answer:
        """The answer; `{"error": reason}` from a process that gives none."""
        if self.lost:
            return {"error": self.lost}
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        reply = ""
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(json.dumps({"do": do} | arguments) + "\n")
            self.process.stdin.flush()
            if select.select([self.process.stdout], [], [], self.timeout)[0]:
                reply = self.process.stdout.readline()
            else:
                self.lost = f"no answer for {self.timeout:.0f} s"
                self.process.kill()
        if reply:
            return json.loads(reply)
        code = self.process.wait()
        self.lost = self.lost or f"died, exit status {code}{' (out of memory?)' * (code == -9)}"
        return {"error": self.lost}

    def demand(self, do: str, **arguments: Any) -> Answer:
        """The answer. Raises BenchmarkError where it is an error."""
        answer = self.ask(do, **arguments)
        if "error" in answer:
            raise BenchmarkError(f"{self.name} failed: {answer['error']}")
        return answer

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for pipe in (self.process.stdin, self.process.stdout):
            with contextlib.suppress(OSError):
                if pipe is not None:
                    pipe.close()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def serve(functions: Mapping[str, Callable[..., Answer]]) -> None:
    """The contender's end: answers every line of standard input."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is not an answer
    for line in sys.stdin:
        arguments = json.loads(line)
        try:
            answer = functions[arguments.pop("do")](**arguments)
        except Exception as error:  # reported to the parent, which goes on with the others
            text = f"{type(error).__name__}: {error}".strip().splitlines()[0]
            answer = {"error": text[:300]}
        print(json.dumps(answer), file=answers, flush=True)


def interleaved(
    workers: Sequence[Worker], rounds: int, turn: Callable[[Worker], Answer], log: bool = False
) -> dict[str, list[Answer]]:
    """Answers of `rounds` turns by contender; one that answered an error has no further turn.

    Each goes first as often as the others: what follows a neighbour finds its cache cold.
    """
    taken: dict[str, list[Answer]] = {worker.name: [] for worker in workers}
    for i in range(rounds):
        shift = i % max(1, len(workers))
        for worker in (*workers[shift:], *workers[:shift]):
            answers = taken[worker.name]
            if not (answers and "error" in answers[-1]):
                answers.append(turn(worker))
        if log:
            times = (f"{name} {each[-1]['seconds']:.3f} s" for name, each in taken.items())
            say(f"  round {i + 1}/{rounds}: {', '.join(times)}")
    return taken


def median(answers: Iterable[Answer], key: str) -> float:
    return statistics.median(answer[key] for answer in answers)


def per_call(call: Callable[[], Any], repeats: int, wait: Callable[[Any], Any]) -> float:
    """Seconds of one of `repeats` calls in a row; `wait` is for the last one's result."""
    before = time.perf_counter()
    for _ in range(repeats):
        result = call()
    wait(result)
    return (time.perf_counter() - before) / repeats


def timed(call: Callable[[], Any]) -> tuple[Any, Answer]:
    """(result of the call, its seconds, seconds of CPU, and the peak memory since the start)."""
    wall, cpu = time.perf_counter(), time.process_time()
    result = call()
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    return result, {"seconds": wall, "cpu_seconds": cpu, "peak_bytes": peak_bytes()}


def peak_bytes() -> int:
    """The largest resident size this process ever had."""
    with contextlib.suppress(OSError):
        for line in pathlib.Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def environment(device: str) -> Answer:
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
        "command": " ".join(["python -m experiments.benchmark", *COMMAND, *sys.argv[1:]]),
    }


def processor() -> str:
    """The processor's name."""
    with contextlib.suppress(OSError):
        for line in pathlib.Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def accelerator() -> tuple[str, str]:
    """(cpu, gpu or tpu; name) of JAX's first device, asked in a process of its own."""
    ask = "import jax; d = jax.devices()[0]; print('device:', d.platform, d.device_kind)"
    reply = subprocess.run(
        [sys.executable, "-c", ask], capture_output=True, text=True, timeout=300, check=False
    )
    for line in reply.stdout.splitlines():
        if line.startswith("device: "):
            _, kind, name = line.split(" ", 2)
            return ("gpu" if kind in ("cuda", "rocm") else kind), name
    raise BenchmarkError(f"JAX finds no device:\n{reply.stderr.strip()[-500:]}")


def table(rows: Iterable[Answer], columns: Sequence[Column], num_names: int) -> str:
    """Rows as Markdown. A row with an `error` has it in place of its figures.

    Args:
      rows: what was measured.
      columns: (title, key of the row or a function of it, format of the value).
      num_names: columns that name a row; figures follow.
    """
    rule = ["---"] * num_names + ["---:"] * (len(columns) - num_names)
    lines = [[title for title, _, _ in columns], rule]
    for row in rows:
        shown = columns[:num_names] if "error" in row else columns
        values = [(key(row) if callable(key) else row.get(key), form) for _, key, form in shown]
        cells = ["" if value is None else format(value, form) for value, form in values]
        cells += [row["error"]] if "error" in row else []
        lines.append(cells + [""] * (len(columns) - len(cells)))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def publish(report: Answer, text: str) -> None:
    """Prints the report, as the text or as JSON, and writes it to the file of `--json`."""
    whole = json.dumps(report, indent=2)
    if FLAGS.json:
        pathlib.Path(FLAGS.json).write_text(whole + "\n")
    if FLAGS.format == "json":
        print(whole)
        return
    facts = report["environment"]
    print(text)
    print(f"\n{facts['device']}, {facts['cores']} cores, load {facts['load_average']:.1f}, "
          f"{facts['date']}")  # fmt: skip
    print(", ".join(f"{name} {version}" for name, version in facts["versions"].items()))
    print(facts["command"])

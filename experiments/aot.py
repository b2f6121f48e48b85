"""Ask the compiler whether a model fits on accelerators that are not here, and how fast it can be.

    python -m experiments.aot --config=llama3_8b --topology=v5p:4x4x4 --config.mesh.fsdp=16 \\
        --config.mesh.tensor=4
    python -m experiments.aot --config=llama3_70b --topology=v6e:16x16 --search
    python -m experiments.aot --config=llama3_8b --topology=h200:8 --program=decode --format=json

Compiles this project's training step, prefill or decoding loop for the topology (see
`lm.hardware.topologies`), and prints memory, operations, collectives and a roofline; with
`--format=json` one object on the last line. Nothing runs on an accelerator, so every time is a
prediction. `--config` is any model of `lm.formats.known`; `--config.KEY=VALUE` changes a setting
(see `experiments.configs.aot`). Exit status 0 whether it fits or not, 2 for a question that makes
no sense.
"""

from __future__ import annotations

import functools
import json
import pathlib
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from absl import flags

from experiments.configs.aot import CONFIGS, Aot
from lm.aot.answer import answer, no_answer, table
from lm.aot.programs import compile_program, make_program
from lm.aot.search import candidates, first, machine_of, nothing_fits, remedies
from lm.config import program as program_lib
from lm.config.command_line import ConfigError, config_arguments, input_errors
from lm.config.fields import Count
from lm.config.program import Number
from lm.distributed.collectives import print_once

progress = functools.partial(print_once, file=sys.stderr)  # standard output is for the result


def ask(
    name: Any, config: Aot, topology: str, *, full: bool = False,
    options: Mapping[str, str] | None = None, hlo: str | None = None,
) -> dict[str, Any]:  # fmt: skip
    """The answer to one question. Arguments as `make_program` and `compile_program`.

    Raises:
      ValueError: it makes no sense.
    """
    program = make_program(name, config, topology)
    progress(f"compiling {name} for {topology} ({program.num_devices} devices) ...")
    compiled = compile_program(program, full=full, options=options)
    if hlo is not None and compiled.text:
        pathlib.Path(hlo).expanduser().write_text(compiled.text, "utf-8")
    return answer(program, compiled)


def compiler_options(texts: Sequence[str]) -> dict[str, str]:
    """`name=value` of each. Raises ValueError for one that is not of that form."""
    pairs = [text.partition("=") for text in texts]
    for name, equals, value in pairs:
        if not name or not equals:
            raise ValueError(f"--compiler_options: {name + equals + value!r} is not NAME=VALUE")
    return {name: value for name, _, value in pairs}


def ask_apart(arguments: Sequence[str]) -> dict[str, Any]:
    """The answer of this command in a process of its own, whose compiler may abort.

    Raises:
      ConfigError: the command refuses, for the reason it has printed.
      RuntimeError: it failed, and its traceback is on stderr.
    """
    command = [sys.executable, "-m", "experiments.aot", "--here", "--format=json", *arguments]
    root = pathlib.Path(__file__).resolve().parent.parent
    with subprocess.Popen(
        command, cwd=root, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as child:
        assert child.stdout is not None
        assert child.stderr is not None
        died = refused = None
        for line in child.stderr:
            if died is None and re.match(r"F\d{4} ", line):
                died = line.split("] ", 1)[-1].strip()
            elif line.startswith("error: "):
                refused = line.removeprefix("error: ").strip()
            elif died is None:
                print(line, end="", file=sys.stderr, flush=True)
        answered = child.stdout.read()
    if refused is not None:
        raise ConfigError(refused)
    if died is not None or child.returncode < 0:
        return no_answer(refusal=f"the compiler died: {died or f'signal {-child.returncode}'}")
    if child.returncode or not answered.strip():
        raise RuntimeError(f"{' '.join(command)} failed with exit status {child.returncode}")
    return json.loads(answered.splitlines()[-1])


def search(
    name: Any, config: Aot, topology: str, most: int, extra: Sequence[str]
) -> dict[str, Any]:
    """The fastest configuration, by its roofline, of the few that estimates put first.

    Args:
      name, config, topology: of the question.
      most: configurations to compile.
      extra: arguments of this command for each.

    Raises:
      ValueError: no mesh of these devices divides the model.
    """
    machine = machine_of(topology)
    found = candidates(name, config, machine)
    none = no_answer(program=name, topology=topology, refusal="none fits")
    if not found:
        return none | {"advice": nothing_fits(name, config, machine)}
    progress(f"{len(found)} meshes, remat policies and batches may fit; compiling the best {most}")
    tried: list[dict[str, Any]] = []
    best: dict[str, Any] | None = None
    chosen = first(found, most)
    for i, each in enumerate(chosen):
        progress(f"{i + 1}/{len(chosen)}: {' '.join(each.flags) or 'as it is'}")
        try:
            answered = ask_apart(
                [f"--topology={topology}", f"--program={name}", *extra, *each.flags]
            )
        except ConfigError as error:
            answered = no_answer(refusal=str(error))
        speed = answered["tokens_per_second"]
        tried.append({
            "flags": list(each.flags), "fits": answered["fits"], "tokens_per_second": speed,
            "bytes": (answered["bytes_per_device"] or {}).get("total"),
            "estimated_bytes": each.estimate.total_bytes,
            "estimated_tokens_per_second": each.estimate.tokens_per_second,
            "refusal": answered["refusal"],
        })  # fmt: skip
        progress(
            f"  fits, {speed:,.0f} tokens/s" if answered["fits"] else f"  {answered['refusal']}"
        )
        if answered["fits"] and (best is None or speed > best["tokens_per_second"]):
            best = answered | {"flags": list(each.flags)}
    return (best or none) | {"search": {"considered": len(found), "compiled": tried}}


def main(config: Aot) -> None:
    jax.config.update("jax_platforms", "cpu")  # an accelerator that is here is left alone
    values = flags.FLAGS
    if not values.topology:
        raise ConfigError("no topology; give one with --topology=v5e:4x4")
    if values.hlo and values.search:
        raise ConfigError("--hlo writes one program, and --search compiles several; use one")
    if values.hlo and not pathlib.Path(values.hlo).expanduser().parent.is_dir():
        raise ConfigError(f"--hlo={values.hlo}: there is no such folder; make it first")
    with input_errors():
        options = compiler_options(values.compiler_options)
        own = [*config_arguments(sys.argv[1:]), f"--full_effort={values.full_effort}"]
        own += [f"--compiler_options={each}" for each in values.compiler_options]
        if values.search:
            found = search(values.program, config, values.topology, values.compiled, own)
        elif values.here:
            found = ask(
                values.program, config, values.topology, full=values.full_effort, options=options,
                hlo=values.hlo,
            )  # fmt: skip
        else:
            own += [f"--hlo={values.hlo}"] if values.hlo else []
            own += [f"--topology={values.topology}", f"--program={values.program}"]
            found = ask_apart(own)
        if not found["fits"] and "advice" not in found:
            machine = machine_of(values.topology)
            needed = (found["bytes_per_device"] or {}).get("total", 0.0)
            found["would_fit"] = remedies(values.program, config, machine, needed)
            if not found["would_fit"]:
                found["advice"] = nothing_fits(values.program, config, machine)
    print(json.dumps(found) if values.format == "json" else table(found))


if __name__ == "__main__":
    flags.DEFINE_string("topology", None, "What to compile for: v5e:4x4, 2*v5p:4x4x8, h200:8 ...")
    flags.DEFINE_enum("program", "train", ["train", "prefill", "decode"], "What to compile.")
    flags.DEFINE_enum("format", "table", ["table", "json"], "For people, or for programs.")
    flags.DEFINE_bool("search", False, "Choose mesh, remat and batch.")
    flags.DEFINE(Number(Count), "compiled", 4, "How many a search compiles.")
    flags.DEFINE_bool("full_effort", False, "Compile as a run would; minutes instead of seconds.")
    flags.DEFINE_string("hlo", None, "Write the compiled program's text to this file.")
    flags.DEFINE_multi_string("compiler_options", [], "NAME=VALUE of the compiler, repeatable.")
    flags.DEFINE_bool("here", False, "Compile in this process, which a dying compiler takes along.")
    program_lib.run(main, configs=CONFIGS)

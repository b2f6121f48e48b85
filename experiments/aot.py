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

import dataclasses
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
from lm.aot.figures import (
    asked_flops,
    assumptions,
    calibration,
    chip_for,
    memory,
    model_flops,
    roofline,
    usable_bytes,
)
from lm.aot.programs import Compiled, Program, compile_program, make_program
from lm.aot.search import Machine, candidates, first, nothing_fits, remedies
from lm.config import program as program_lib
from lm.config.command_line import ConfigError, config_arguments, input_errors
from lm.distributed.collectives import print_once
from lm.hardware import topologies

# What every answer has; None where it is not known.
FIGURES = (
    "program", "topology", "mesh", "rows", "tokens", "fits", "bytes_per_device", "hbm_bytes",
    "flops_per_device", "recomputed_flops_per_device", "refusal", "hbm_traffic_bytes",
    "collectives", "roofline", "predicted_step_seconds", "tokens_per_second", "mfu", "chip",
    "assumptions", "calibration", "compile_seconds",
)  # fmt: skip


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


def answer(program: Program, compiled: Compiled) -> dict[str, Any]:
    """Everything that is known of a compiled program."""
    chip, mesh = chip_for(program.device), program.layout.mesh
    held = memory(program, compiled)
    available = compiled.available_bytes or usable_bytes(chip)
    # libtpu refuses what does not fit; XLA for GPUs compiles it all the same.
    fits = compiled.refusal is None and (
        program.device.platform == "tpu" or held["total"] <= available
    )
    asked, count = asked_flops(program), program.num_devices
    analytic = model_flops(program) / count
    found: dict[str, Any] = dict.fromkeys(FIGURES) | {
        "program": program.name,
        "topology": program.topology,
        "mesh": {axis: size for axis, size in mesh.shape.items() if size > 1},
        "rows": program.rows,
        "tokens": program.tokens,
        "fits": fits,
        "bytes_per_device": held,
        "hbm_bytes": available,
        "flops_per_device": analytic,
        "recomputed_flops_per_device": (asked.matmul + asked.kernels) / count - analytic,
        "refusal": compiled.refusal,
    }
    if compiled.cost is not None:
        found |= timing(program, compiled, asked, analytic)
    chip_figures = dataclasses.asdict(chip) | {"kinds": list(chip.kinds)}
    return found | {
        "chip": chip_figures,
        "assumptions": list(assumptions(mesh, chip)),
        "calibration": calibration(chip),
        "lower_seconds": compiled.lower_seconds,
        "compile_seconds": compiled.compile_seconds,
    }


def timing(program: Program, compiled: Compiled, asked: Any, analytic: float) -> dict[str, Any]:
    """Operations, traffic and the roofline of a program that was compiled."""
    cost, chip = compiled.cost, chip_for(program.device)
    assert cost is not None
    terms = roofline(program, compiled, asked.kernels, chip)
    seconds = terms["total_seconds"]
    return {
        "compiled_matmul_flops_per_device": cost.matmul_flops,
        "compiled_over_asked_matmul_flops": (
            cost.matmul_flops * program.num_devices / asked.matmul
        ),
        "kernel_flops_per_device": asked.kernels / program.num_devices,
        "hbm_traffic_bytes": cost.hbm_bytes,
        "host_traffic_bytes": cost.host_bytes,
        "collectives": [
            {
                "op": c.op, "axis": "+".join(c.axes), "size": c.size, "dtype": c.dtype,
                "count": c.count, "calls": c.num_calls, "bytes_per_step": c.payload_bytes,
                "wire_bytes": c.wire_bytes, "async": c.is_async,
            }
            for c in cost.collectives
            if c.size > 1
        ],
        "wire_bytes": cost.wire_bytes,
        "custom_calls": cost.custom_calls,
        "roofline": terms,
        "predicted_step_seconds": seconds,
        "tokens_per_second": program.tokens / seconds,
        "mfu": analytic / seconds / (chip.flops / chip.num_devices),
        "mfu_is": "predicted",
        "loops_of_unknown_length": [n for n, _, trips in cost.loops if trips is None],
    }  # fmt: skip


def table(found: dict[str, Any]) -> str:
    """The answer for the eye."""
    if found["bytes_per_device"] is None:
        return "\n".join([f"does not fit: {found['refusal']}", *_choice_lines(found)])
    mesh = " x ".join(f"{axis} {size}" for axis, size in found["mesh"].items()) or "one device"
    lines = [
        f"{found['program']} on {found['topology']} ({mesh}), {found['rows']:,} rows, "
        f"{found['tokens']:,} tokens: {'fits' if found['fits'] else 'DOES NOT FIT'}",
        "",
        "memory of a device, GiB",
    ]
    for kind, size in found["bytes_per_device"].items():
        lines.append(f"  {kind:<14}{size / 2**30:10.3f}")
    lines.append(f"  {'available':<14}{found['hbm_bytes'] / 2**30:10.3f}")
    if found["refusal"]:
        lines += ["", f"the compiler: {found['refusal']}"]
    if found["roofline"] is not None:
        lines += _timing_lines(found)
    lines += _choice_lines(found)
    lines += ["", f"compiled in {found['compile_seconds']:.1f} s"]
    return "\n".join(lines)


def _choice_lines(found: dict[str, Any]) -> list[str]:
    """What would fit, and what a search found."""
    lines = []
    if "advice" in found:
        lines += ["", found["advice"]]
    if found.get("would_fit"):
        lines += ["", "what would fit, by estimate"]
        lines += [
            f"  {row['change']}: {row['estimated_bytes'] / 2**30:.1f} GiB, "
            f"{row['estimated_tokens_per_second']:,.0f} tokens/s: {' '.join(row['flags'])}"
            for row in found["would_fit"]
        ]
    for row in found.get("search", {}).get("compiled", ()):
        speed = f"{row['tokens_per_second']:,.0f} tokens/s" if row["fits"] else "does not fit"
        lines.append(f"  {speed}: {' '.join(row['flags'])}")
    if "flags" in found:
        lines += ["", f"best: {' '.join(found['flags'])}"]
    return lines


def _timing_lines(found: dict[str, Any]) -> list[str]:
    tera, gib = 1e-12, 2.0**-30
    lines = [
        "",
        "operations of a device, T",
        f"  model            {found['flops_per_device'] * tera:12.3f}",
        f"  computed again   {found['recomputed_flops_per_device'] * tera:12.3f}",
        f"  in the program   {found['compiled_matmul_flops_per_device'] * tera:12.3f} and kernels "
        f"{found['kernel_flops_per_device'] * tera:.3f}; products "
        f"{found['compiled_over_asked_matmul_flops']:.3f} of those asked for",
        "",
        f"collectives{'':<12}{'axis':<16}{'type':<6}{'count':>8}{'GiB':>10}{'wire GiB':>10}",
    ]
    for c in found["collectives"]:
        if c["wire_bytes"] * 1000 > found["wire_bytes"]:
            how = "" if c["async"] else "  waits"
            lines.append(
                f"  {c['op']:<21}{c['axis']:<16}{c['dtype']:<6}{c['count']:8,.0f}"
                f"{c['bytes_per_step'] * gib:10.3f}{c['wire_bytes'] * gib:10.3f}{how}"
            )
    lines.append(f"  {'all':<51}{'':>10}{found['wire_bytes'] * gib:10.3f}")
    lines += ["", "roofline, seconds"]
    for term, seconds in found["roofline"].items():
        shown = f"{seconds:12.5f}" if isinstance(seconds, float) else f"{seconds:>12}"
        lines.append(f"  {term.replace('_seconds', ''):<14}{shown}")
    lines += ["", f"predicted: {found['predicted_step_seconds']:.4g} s a run, "
              f"{found['tokens_per_second']:,.0f} tokens/s, MFU {found['mfu']:.1%}"]  # fmt: skip
    for row in found["calibration"]:
        lines.append(
            f"  {row['run']}: predicted {row['predicted_mfu']:.1%}, measured "
            f"{row['measured_mfu']:.1%} ({row['measured_over_predicted']:.2f})"
        )
    return lines


def compiler_options(texts: Sequence[str]) -> dict[str, str]:
    """`name=value` of each.

    Raises:
      ValueError: one is not of that form.
    """
    pairs = [text.partition("=") for text in texts]
    wrong = [
        text for text, (name, equals, _) in zip(texts, pairs, strict=True) if not name or not equals
    ]
    if wrong:
        raise ValueError(f"--compiler_options: {wrong[0]!r} is not NAME=VALUE")
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
        why = f"the compiler died: {died or f'signal {-child.returncode}'}"
        return dict.fromkeys(FIGURES) | {"fits": False, "refusal": why}
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
    none = {"fits": False, "program": name, "topology": topology, "refusal": "none fits"}
    if not found:
        return dict.fromkeys(FIGURES) | none | {"advice": nothing_fits(name, config, machine)}
    progress(f"{len(found)} meshes, remat policies and batches may fit; compiling the best {most}")
    tried: list[dict[str, Any]] = []
    best: dict[str, Any] | None = None
    chosen = first(found, most)
    for i, each in enumerate(chosen):
        progress(f"{i + 1}/{len(chosen)}: {' '.join(each.flags) or 'as it is'}")
        arguments = [f"--topology={topology}", f"--program={name}", *extra, *each.flags]
        answered: dict[str, Any]
        try:
            answered = ask_apart(arguments)
        except ConfigError as error:
            answered = dict.fromkeys(FIGURES) | {"fits": False, "refusal": str(error)}
        speed = answered["tokens_per_second"]
        total = (answered["bytes_per_device"] or {}).get("total")
        tried.append({
            "flags": list(each.flags), "fits": answered["fits"], "tokens_per_second": speed,
            "bytes": total, "estimated_bytes": each.estimate.total_bytes,
            "estimated_tokens_per_second": each.estimate.tokens_per_second,
            "refusal": answered["refusal"],
        })  # fmt: skip
        progress(
            f"  fits, {speed:,.0f} tokens/s" if answered["fits"] else f"  {answered['refusal']}"
        )
        if answered["fits"] and (best is None or speed > best["tokens_per_second"]):
            best = answered | {"flags": list(each.flags)}
    best = best or dict.fromkeys(FIGURES) | none
    return best | {"search": {"considered": len(found), "compiled": tried}}


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


def machine_of(topology: str) -> Machine:
    """The devices of a topology."""
    devices = topologies.describe(topology)
    return Machine(devices, chip_for(devices[0]))


if __name__ == "__main__":
    flags.DEFINE_string("topology", None, "What to compile for: v5e:4x4, 2*v5p:4x4x8, h200:8 ...")
    flags.DEFINE_enum("program", "train", ["train", "prefill", "decode"], "What to compile.")
    flags.DEFINE_enum("format", "table", ["table", "json"], "For people, or for programs.")
    flags.DEFINE_bool("search", False, "Choose mesh, remat and batch.")
    flags.DEFINE_integer("compiled", 4, "How many a search compiles.", lower_bound=1)
    flags.DEFINE_bool("full_effort", False, "Compile as a run would; minutes instead of seconds.")
    flags.DEFINE_string("hlo", None, "Write the compiled program's text to this file.")
    flags.DEFINE_multi_string("compiler_options", [], "NAME=VALUE of the compiler, repeatable.")
    flags.DEFINE_bool("here", False, "Compile in this process, which a dying compiler takes along.")
    program_lib.run(main, configs=CONFIGS)

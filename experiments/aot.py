"""Ask the compiler whether a model fits on accelerators that are not here, and how fast it can be.

    python -m experiments.aot --config=llama3_8b --topology=v5p:4x4x4 --config.mesh.fsdp=16 \\
        --config.mesh.tensor=4
    python -m experiments.aot --config=llama3_70b --topology=v6e:16x16 --search
    python -m experiments.aot --config=llama3_8b --topology=h200:8 --program=decode --format=json

Compiles this project's training step, prefill or decoding loop for the topology (see
`lm.sharding.topologies`), and prints memory, operations, collectives and a roofline; with
`--format=json` one object on the last line. Nothing runs on an accelerator, so every time is a
prediction. `--config` is any model of `lm.model.known`; `--config.KEY=VALUE` changes a setting (see
`experiments.configs.aot`). Exit status 0 whether it fits or not, 2 for a question that makes no
sense.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from typing import Any

from absl import flags

from experiments import program as program_lib
from experiments.aot_figures import (
    asked_flops,
    assumptions,
    calibration,
    device_chip,
    memory,
    model_flops,
    roofline,
    usable_bytes,
)
from experiments.aot_programs import Compiled, Program, compile_program, make_program
from experiments.config import ConfigError, input_errors
from experiments.configs.aot import CONFIGS, Aot


def say(text: str) -> None:
    """Progress; standard output is for the result."""
    print(text, file=sys.stderr, flush=True)


def ask(name: Any, config: Aot, topology: str, *, full: bool = False) -> dict[str, Any]:
    """The answer to one question.

    Raises:
      ValueError: it makes no sense.
    """
    program = make_program(name, config, topology)
    say(f"compiling {name} for {topology} ({program.num_devices} devices) ...")
    return answer(program, compile_program(program, full=full))


def answer(program: Program, compiled: Compiled) -> dict[str, Any]:
    """Everything that is known of a compiled program."""
    chip, mesh = device_chip(program), program.layout.mesh
    held = memory(program, compiled)
    available = compiled.available_bytes or usable_bytes(chip)
    # libtpu refuses what does not fit; XLA for GPUs compiles it all the same.
    fits = compiled.refusal is None and (
        program.device.platform == "tpu" or held["total"] <= available
    )
    asked, count = asked_flops(program), program.num_devices
    analytic = model_flops(program) / count
    found: dict[str, Any] = {
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
    if compiled.census is not None:
        found |= timing(program, compiled, asked, analytic)
    chip_figures = dataclasses.asdict(chip) | {"figures": "of a chip; see lm.sharding.chips"}
    return found | {
        "chip": chip_figures,
        "assumptions": list(assumptions(program.device.platform)),
        "calibration": calibration(chip),
        "lower_seconds": compiled.lower_seconds,
        "compile_seconds": compiled.compile_seconds,
    }


def timing(program: Program, compiled: Compiled, asked: Any, analytic: float) -> dict[str, Any]:
    """Operations, traffic and the roofline of a program that was compiled."""
    census, chip = compiled.census, device_chip(program)
    assert census is not None
    terms = roofline(program, compiled, asked.kernels, chip)
    seconds = terms["total_seconds"]
    return {
        "compiled_matmul_flops_per_device": census.matmul_flops,
        "compiled_over_asked_matmul_flops": (
            census.matmul_flops * program.num_devices / asked.matmul
        ),
        "kernel_flops_per_device": asked.kernels / program.num_devices,
        "hbm_traffic_bytes": census.hbm_bytes,
        "host_traffic_bytes": census.host_bytes,
        "collectives": [
            {
                "op": c.op, "axis": "+".join(c.axes), "size": c.size, "dtype": c.dtype,
                "count": c.count, "calls": c.num_calls, "bytes_per_step": c.payload_bytes,
                "wire_bytes": c.wire_bytes, "async": c.is_async,
            }
            for c in census.collectives
        ],
        "wire_bytes": census.wire_bytes,
        "custom_calls": census.custom_calls,
        "roofline": terms,
        "predicted_step_seconds": seconds,
        "tokens_per_second": program.tokens / seconds,
        "mfu": analytic / seconds / (chip.flops / chip.num_devices),
        "mfu_is": "predicted",
        "loops_of_unknown_length": [n for n, _, trips in census.loops if trips is None],
    }  # fmt: skip


def table(found: dict[str, Any]) -> str:
    """The answer for the eye."""
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
    if "roofline" in found:
        lines += _timing_lines(found)
    lines += ["", f"compiled in {found['compile_seconds']:.1f} s"]
    return "\n".join(lines)


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


def main(config: Aot) -> None:
    values = flags.FLAGS
    if not values.topology:
        raise ConfigError("no topology; give one with --topology=v5e:4x4")
    with input_errors():
        found = ask(values.program, config, values.topology, full=values.full_effort)
    print(json.dumps(found) if values.format == "json" else table(found))


if __name__ == "__main__":
    flags.DEFINE_string("topology", None, "What to compile for: v5e:4x4, 2*v5p:4x4x8, h200:8 ...")
    flags.DEFINE_enum("program", "train", ["train", "prefill", "decode"], "What to compile.")
    flags.DEFINE_enum("format", "table", ["table", "json"], "For people, or for programs.")
    flags.DEFINE_bool("full_effort", False, "Compile as a run would; minutes instead of seconds.")
    program_lib.run(main, configs=CONFIGS)

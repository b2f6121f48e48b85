"""The answer to a question about a machine that is not here, as one object and as text."""

from __future__ import annotations

import dataclasses
from typing import Any

from lm.aot.figures import (
    asked_flops,
    assumptions,
    calibration,
    chip_for,
    memory,
    model_flops,
    roofline,
)
from lm.aot.programs import Compiled, Program

# What every answer has; None where it is not known.
FIGURES = (
    "program", "topology", "mesh", "rows", "tokens", "fits", "bytes_per_device", "hbm_bytes",
    "flops_per_device", "recomputed_flops_per_device", "refusal", "hbm_traffic_bytes",
    "collectives", "roofline", "predicted_step_seconds", "tokens_per_second", "mfu", "chip",
    "assumptions", "calibration", "compile_seconds",
)  # fmt: skip


def answer(program: Program, compiled: Compiled) -> dict[str, Any]:
    """Everything known about a compiled program."""
    chip, mesh = chip_for(program.device), program.layout.mesh
    held = memory(program, compiled)
    available = compiled.available_bytes or chip.share(chip.usable_hbm_bytes)
    # libtpu refuses what does not fit; XLA for GPUs compiles it all the same.
    fits = compiled.refusal is None and (
        program.device.platform == "tpu" or held["total"] <= available
    )
    asked = asked_flops(program)
    analytic = model_flops(program) / program.num_devices
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
        "recomputed_flops_per_device": sum(asked) / program.num_devices - analytic,
        "refusal": compiled.refusal,
    }
    if compiled.cost is not None:
        found |= timing(program, compiled, asked, analytic)
    return found | {
        "chip": dataclasses.asdict(chip) | {"kinds": list(chip.kinds)},
        "assumptions": list(assumptions(mesh, chip)),
        "calibration": calibration(chip),
        "lower_seconds": compiled.lower_seconds,
        "compile_seconds": compiled.compile_seconds,
    }


def timing(
    program: Program, compiled: Compiled, asked: tuple[float, float], analytic: float
) -> dict[str, Any]:
    """Operations, traffic and the roofline of a program that was compiled."""
    cost, chip, (matmul, kernels) = compiled.cost, chip_for(program.device), asked
    assert cost is not None
    terms = roofline(program, compiled, kernels, chip)
    seconds = terms["total_seconds"]
    return {
        "compiled_matmul_flops_per_device": cost.matmul_flops,
        "compiled_over_asked_matmul_flops": cost.matmul_flops * program.num_devices / matmul,
        "kernel_flops_per_device": kernels / program.num_devices,
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
        "mfu": analytic / seconds / chip.share(chip.flops),
        "mfu_is": "predicted",
        "loops_of_unknown_length": [n for n, _, trips in cost.loops if trips is None],
    }  # fmt: skip


def table(found: dict[str, Any]) -> str:
    """The answer as text."""
    if found["bytes_per_device"] is None:
        return "\n".join([f"does not fit: {found['refusal']}", *_choice_lines(found)])
    mesh = " x ".join(f"{axis} {size}" for axis, size in found["mesh"].items()) or "one device"
    sizes = found["bytes_per_device"] | {"available": found["hbm_bytes"]}
    lines = [
        f"{found['program']} on {found['topology']} ({mesh}), {found['rows']:,} rows, "
        f"{found['tokens']:,} tokens: {'fits' if found['fits'] else 'DOES NOT FIT'}",
        "",
        "memory per device, GiB",
        *(f"  {kind:<14}{size / 2**30:10.3f}" for kind, size in sizes.items()),
    ]
    if found["refusal"]:
        lines += ["", f"the compiler: {found['refusal']}"]
    if found["roofline"] is not None:
        lines += _timing_lines(found)
    lines += _choice_lines(found)
    return "\n".join([*lines, "", f"compiled in {found['compile_seconds']:.1f} s"])


def _choice_lines(found: dict[str, Any]) -> list[str]:
    """What would fit, and what a search found."""
    lines = ["", found["advice"]] if "advice" in found else []
    if found.get("would_fit"):
        lines += ["", "what would fit, by estimate"]
    for row in found.get("would_fit", ()):
        lines.append(
            f"  {row['change']}: {row['estimated_bytes'] / 2**30:.1f} GiB, "
            f"{row['estimated_tokens_per_second']:,.0f} tokens/s: {' '.join(row['flags'])}"
        )
    for row in found.get("search", {}).get("compiled", ()):
        speed = f"{row['tokens_per_second']:,.0f} tokens/s" if row["fits"] else "does not fit"
        lines.append(f"  {speed}: {' '.join(row['flags'])}")
    return lines + (["", f"best: {' '.join(found['flags'])}"] if "flags" in found else [])


def _timing_lines(found: dict[str, Any]) -> list[str]:
    tera, gib = 1e-12, 2.0**-30
    lines = [
        "",
        "operations per device, T",
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
            lines.append(
                f"  {c['op']:<21}{c['axis']:<16}{c['dtype']:<6}{c['count']:8,.0f}"
                f"{c['bytes_per_step'] * gib:10.3f}{c['wire_bytes'] * gib:10.3f}"
                f"{'' if c['async'] else '  waits'}"
            )
    lines += [f"  {'all':<51}{'':>10}{found['wire_bytes'] * gib:10.3f}", "", "roofline, seconds"]
    for term, seconds in found["roofline"].items():
        shown = f"{seconds:12.5f}" if isinstance(seconds, float) else f"{seconds:>12}"
        lines.append(f"  {term.replace('_seconds', ''):<14}{shown}")
    lines += ["", f"predicted: {found['predicted_step_seconds']:.4g} s per run, "
              f"{found['tokens_per_second']:,.0f} tokens/s, MFU {found['mfu']:.1%}"]  # fmt: skip
    return lines + [
        f"  {row['run']}: predicted {row['predicted_mfu']:.1%}, measured "
        f"{row['measured_mfu']:.1%} ({row['measured_over_predicted']:.2f})"
        for row in found["calibration"]
    ]


def no_answer(**known: Any) -> dict[str, Any]:
    """The answer where no program was compiled."""
    return dict.fromkeys(FIGURES) | {"fits": False} | known

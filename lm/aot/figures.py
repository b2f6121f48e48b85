"""Figures of a compiled program: memory, operations, time on the wire, and a roofline of them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.interpreters import partial_eval

from lm.aot.programs import Compiled, Program, bytes_per_device
from lm.hardware.chips import Chip, chip_of
from lm.hardware.hlo_cost import Collective
from lm.kernels.attention.common import declared_flops
from lm.model import forward_flops, train_flops


@dataclasses.dataclass(frozen=True)
class Published:
    """A run of MaxText as published (tpu-recipes), and its step as its compiler saw it.

    Attributes:
      name: of the run.
      chip: as in `lm.hardware.chips`.
      seconds: measured time of a step.
      model_flops: per device, by the causal convention of `lm.model.train_flops`.
      matmul_flops, kernel_flops: computed per device: products in the compiled program, and
        attention forward, again forward, and two and a half times that backward.
      wire_bytes: sent by a device, all by synchronous collectives.
      links: links of a device that carry them.
    """

    name: str
    chip: str
    seconds: float
    model_flops: float
    matmul_flops: float
    kernel_flops: float
    wire_bytes: float
    links: int


# MaxText 0.2.5, compiled with libtpu 0.0.48.1 from the arguments of its recipes; seconds from their
# logs (README.md of each recipe at github.com/AI-Hypercomputer/tpu-recipes).
_KERNELS = 4.5 / 3  # of the attention's part of `model_flops`
PUBLISHED = (
    Published("llama3.1-8b, 256 chips", "TPU v6e", 4.546, 1686.6e12, 1790.6e12,
              _KERNELS * 211.1e12, 57.6 * 2**30, 4),
    Published("llama3.1-70b, 256 chips", "TPU v6e", 42.656, 18400e12, 20771.3e12,
              _KERNELS * 1319e12, 519.7 * 2**30, 4),
    Published("llama3.1-405b, 512 chips", "TPU v5p", 131.474, 41352e12, 49455.8e12,
              _KERNELS * 1662e12, 3062.6 * 2**30, 6),
)  # fmt: skip


def calibration(chip: Chip) -> list[dict[str, Any]]:
    """Utilization of published runs on a chip: as this roofline predicts it, and measured."""
    rows = []
    for run in PUBLISHED:
        if run.chip != chip.name or chip.link_bandwidth is None:
            continue
        compute = (run.matmul_flops + run.kernel_flops) / chip.flops
        predicted = compute + run.wire_bytes / (run.links * chip.link_bandwidth)
        mfu = [run.model_flops / chip.flops / seconds for seconds in (predicted, run.seconds)]
        rows.append({
            "run": f"MaxText {run.name}", "predicted_mfu": mfu[0], "measured_mfu": mfu[1],
            "measured_over_predicted": mfu[1] / mfu[0],
        })  # fmt: skip
    return rows


def model_flops(program: Program) -> float:
    """Operations of a run over all devices by the convention of `lm.model.forward_flops`.

    Prefill computes the logits of each row's last token only; a decoded token sees a full cache.
    """
    config, model = program.config, program.config.model
    if program.name == "train":
        return program.tokens * train_flops(model, config.sequence_length)
    output = 2.0 * model.vocab_size * model.embed_dim
    if program.name == "prefill":
        length = config.prompt_length
        return program.tokens * (forward_flops(model, length) - output) + program.rows * output
    return program.tokens * forward_flops(model, 2 * config.cache_length - 1)


def asked_flops(program: Program) -> tuple[float, float]:
    """Operations of the traced program over all devices: (of matrix products, of Pallas kernels).

    Includes what is computed again for the backward pass. What the compiled program has beyond it,
    the compiler added.
    """
    with jax.set_mesh(program.layout.mesh):
        closed = program.function.trace(*program.call).jaxpr
    jaxpr, _ = partial_eval.dce_jaxpr(closed.jaxpr, [True] * len(closed.jaxpr.outvars))
    matmul, kernels = count_flops(jaxpr).tolist()
    return matmul, kernels


def count_flops(jaxpr: Any) -> np.ndarray:
    """(matmul, kernels) of a jaxpr; the body of a `while`, of unknown length, counts once."""
    total = np.zeros(2)
    for equation in jaxpr.eqns:
        name, params = equation.primitive.name, equation.params
        if name == "dot_general":
            (contracted, _), _ = params["dimension_numbers"]
            shape = equation.invars[0].aval.shape
            inner = math.prod(shape[d] for d in contracted)
            total[0] += 2.0 * equation.outvars[0].aval.size * inner
        elif name in ("pallas_call", "mpmd_map"):
            estimate = params["cost_estimate"]
            metadata = equation.ctx.xla_metadata
            total[1] += estimate.flops if estimate else declared_flops(params["name"], metadata)
        else:
            parts = [count_flops(inner) for inner in _inner(params)]
            if not parts:
                continue
            if name == "cond":
                total += max(parts, key=lambda part: float(part.sum()))
            elif name == "scan":
                total += params["length"] * sum(parts)
            elif name == "shard_map":
                names = params.get("newly_manual_axes", params.get("manual_axes"))
                sizes = dict(params["mesh"].shape)
                total += math.prod(sizes[name] for name in names) * sum(parts)
            else:
                total += sum(parts)
    return total


def _inner(params: dict[str, Any]) -> Iterator[Any]:
    for value in params.values():
        for each in value if isinstance(value, tuple | list) else (value,):
            each = getattr(each, "jaxpr", each)
            if hasattr(each, "eqns"):
                yield each


def chip_for(device: Any) -> Chip:
    """The chip of a device.

    Raises:
      ValueError: its figures are not in the table.
    """
    chip = chip_of(device.device_kind)
    if chip is None or chip.hbm_bandwidth is None:
        raise ValueError(f"no figures for {device.device_kind} in lm.hardware.chips")
    return chip


def memory(program: Program, compiled: Compiled) -> dict[str, float]:
    """Bytes per device by kind, which add up to `total`.

    Arguments are known exactly. Temporaries are the rest of the compiler's peak: activations,
    gradients, weights in compute precision and gathered, all at their worst moment together. A
    refused program has the compiler's own total.
    """
    found = {kind: float(bytes_per_device(tree)) for kind, tree in program.arguments.items()}
    if compiled.refusal is not None:
        if compiled.needed_bytes is None:
            return found
        rest = compiled.needed_bytes - sum(found.values())
        return found | {"temporaries": rest, "code": 0.0, "total": compiled.needed_bytes}
    m = compiled.memory
    padding = m["argument_size"] - sum(found.values())
    if program.name == "prefill":  # the cache is made, not given
        found["cache"] = float(m["output_size"])
    # With buffers on the host the peak is not the device's; this is an upper bound.
    peak = 0 if m["host_temp_size"] else m["peak_memory"]
    peak = peak or m["argument_size"] + m["temp_size"]
    temporaries = peak - sum(found.values()) - padding
    code = float(m["generated_code_size"])
    return found | {
        "padding": padding, "temporaries": temporaries, "code": code, "total": peak + code,
    }  # fmt: skip


def collective_seconds(collective: Collective, mesh: Any, chip: Chip) -> tuple[float, float]:
    """(seconds on the links between chips, seconds on the data-centre network), at best.

    Every link along the torus dimensions that the group spans is busy all the time: two per
    dimension where its ends are joined, one where they are not. Over several slices, a device's
    share after the part inside the slice crosses the network.
    """
    links, slices = group_links(collective.axes, mesh, chip)
    inside = collective.size // slices
    wire, across = collective.wire_bytes, 0.0
    if slices > 1:
        factor = 2.0 if collective.op == "all-reduce" else 1.0
        whole = collective.payload_bytes
        across = factor * whole / inside * (slices - 1) / slices
        wire = factor * whole * (inside - 1) / inside
    return wire / links / chip.share(chip.link_bandwidth), across / chip.share(chip.dcn_bandwidth)


def group_links(axes: Sequence[str], mesh: Any, chip: Chip) -> tuple[int, int]:
    """(links of a device within a group along these mesh axes, slices the group spans)."""
    index = tuple(slice(None) if name in axes else slice(1) for name in mesh.axis_names)
    group = mesh.devices[index].ravel()
    slices = len({getattr(device, "slice_index", 0) for device in group})
    if chip.links == 1:  # a switch
        return 1, slices
    if len(group) == 1:  # groups that are not axes
        return 2, slices
    everything = mesh.devices.ravel()
    links = 0
    for dimension in range(len(group[0].coords)):
        there = {device.coords[dimension] for device in group}
        whole = {device.coords[dimension] for device in everything}
        if len(there) > 1:
            joined = there == whole and len(whole) >= chip.wraps and len(whole) % chip.wraps == 0
            links += 2 if joined else 1
    return max(links, 1), slices  # two cores of a chip


def roofline(
    program: Program, compiled: Compiled, kernel_flops: float, chip: Chip
) -> dict[str, Any]:
    """Seconds of a run by term, and in total.

    Compute, memory and asynchronous collectives run at once, and the longest counts; synchronous
    collectives are added, since nothing runs beside them.
    """
    assert compiled.cost is not None
    found, mesh = compiled.cost, program.layout.mesh
    flops = found.matmul_flops + kernel_flops / program.num_devices
    compute = flops / chip.share(chip.flops)
    memory_seconds = found.hbm_bytes / chip.share(chip.hbm_bandwidth)
    timed = [(c, collective_seconds(c, mesh, chip)) for c in found.collectives]
    links, network = (sum(seconds[i] for _, seconds in timed) for i in (0, 1))
    waiting = sum(sum(seconds) for c, seconds in timed if not c.is_async)
    terms = {"compute": compute, "hbm": memory_seconds, "asynchronous": links + network - waiting}
    total = max(terms.values()) + waiting
    terms["synchronous"] = waiting
    return {
        "compute_seconds": compute,
        "hbm_seconds": memory_seconds,
        ("ici_seconds" if program.device.platform == "tpu" else "nvlink_seconds"): links,
        "dcn_seconds": network,
        "synchronous_seconds": waiting,
        "total_seconds": total,
        "bound": max(terms, key=lambda name: terms[name]),
    }


def assumptions(mesh: Any, chip: Chip) -> tuple[str, ...]:
    """Assumptions of the prediction."""
    platform = mesh.devices.flat[0].platform
    shared = (
        "every unit at its published peak; compute, memory and asynchronous collectives overlap "
        "wholly, synchronous collectives not at all",
        "attention kernels at the operations they declare",
        "hbm_traffic_bytes: operands and results of every instruction outside fusions, loops "
        "multiplied, arrays kept on the chip left out",
        "wire bytes of algorithms that waste nothing; no latency",
    )
    if mesh.shape["slice"] > 1 and chip.dcn_bandwidth is None:
        shared += (f"the network between slices of {chip.name}, whose speed is not known, is free",)
    if platform == "tpu":
        return (*shared, "a ring where a mesh axis is a whole torus dimension with joined ends")
    return (
        *shared,
        "all of the data sheet's memory is the program's (XLA_PYTHON_CLIENT_MEM_FRACTION near 1)",
        "no autotuning while compiling",
    )

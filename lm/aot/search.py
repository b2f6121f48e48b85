"""Estimates without a compiler: what may fit, what would be fast, and what to compile first."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from lm.aot.figures import chip_for, group_links
from lm.aot.programs import check
from lm.aot.question import Aot, Name
from lm.config import codec
from lm.hardware import topologies
from lm.hardware.chips import Chip
from lm.infer.cache import make_cache
from lm.model import forward_flops, param_specs
from lm.model.count import activation_widths, mean_positions
from lm.sharding import MeshShape, make_mesh
from lm.train.optimizers import make_optimizer
from lm.train.state import state_specs
from lm.weights import abstract, is_spec

REMATS = ("none", "matmuls", "save:query,key,value,attention", "save:attention", "full")
ROWS = (0.25, 0.5, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0, 12.0, 16.0)
HEADROOM = 0.95  # share of the memory that an estimate may fill
PER_MESH = 2  # candidates of one mesh that are compiled
# Sparse cores of these chips send along one torus dimension beside the matrix products.
BESIDE = ("TPU v5p", "TPU v6e", "TPU7x")


class Machine:
    """The devices of a topology; meshes of them are cached."""

    def __init__(self, devices: Sequence[Any], chip: Chip) -> None:
        self.devices, self.chip = devices, chip
        self.usable_bytes = chip.share(chip.usable_hbm_bytes)  # of one device
        self.num_slices = len({getattr(device, "slice_index", 0) for device in devices})
        self.mesh = functools.cache(lambda shape: make_mesh(shape, self.devices))
        self.span = functools.cache(self._span)

    def _span(self, shape: MeshShape, axis: str) -> tuple[int, int]:
        """(links, slices) of a group along a mesh axis."""
        return group_links((axis,), self.mesh(shape), self.chip)

    def beside(self, shape: MeshShape, axis: str) -> bool:
        """Whether collectives along an axis run beside other work."""
        return self.chip.links == 1 or (self.chip.name in BESIDE and self.span(shape, axis)[0] <= 2)


def machine_of(topology: str) -> Machine:
    """The devices of a topology, see `lm.hardware.topologies`."""
    devices = topologies.describe(topology)
    return Machine(devices, chip_for(devices[0]))


@dataclasses.dataclass(frozen=True)
class Estimate:
    """What one run takes on one device.

    Attributes:
      bytes: memory by kind.
      compute: seconds of the operations.
      beside: seconds of collectives that run beside them.
      waiting: seconds of collectives that do not.
      tokens: tokens of a run over all devices.
    """

    bytes: dict[str, float]
    compute: float
    beside: float
    waiting: float
    tokens: float

    @property
    def total_bytes(self) -> float:
        return sum(self.bytes.values())

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / (max(self.compute, self.beside) + self.waiting)


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A configuration, the flags that make it from the one asked about, and its estimate."""

    config: Aot
    flags: tuple[str, ...]
    estimate: Estimate


def estimate(name: Name, config: Aot, machine: Machine) -> Estimate:
    """Memory and time of a configuration, from its sizes.

    Memory: what is stored, exactly but for rounding; gradients in float32; weights in compute
    precision; one layer's weights gathered twice over; the values that remat keeps; and the widest
    layer at work. Time: operations at peak, then collectives at the bandwidth of their links.

    Raises:
      ValueError: the mesh cannot be made of the devices, or does not divide the model.
    """
    check(name, config, machine.mesh(config.mesh))
    sizes = _Sizes(name, config, machine)
    return sizes.train() if name == "train" else sizes.serve()


@functools.lru_cache(maxsize=64)
def _stored(model: Any, optimizer: Any) -> tuple[int, int]:
    """(number of parameters, bytes of optimizer state) of a model."""
    specs = param_specs(model)
    leaves = jax.tree.leaves(state_specs(specs, make_optimizer(optimizer)), is_leaf=is_spec)
    state = sum(math.prod(x.shape) * jnp.dtype(x.dtype).itemsize for x in leaves)
    return sum(x.size for x in jax.tree.leaves(abstract(specs))), state


class _Sizes:
    """The sizes of one configuration on one mesh."""

    def __init__(self, name: Name, config: Aot, machine: Machine) -> None:
        self.name, self.config, self.machine, self.chip = name, config, machine, machine.chip
        self.mesh = machine.mesh(config.mesh).shape
        self.shards = math.prod(self.mesh[a] for a in ("slice", "data", "fsdp"))
        self.num_devices = len(machine.devices)
        self.rows = config.of(name).rows_per_device * self.num_devices
        self.itemsize = jnp.dtype(config.of(name).dtype).itemsize
        self.tensor = self.mesh["tensor"]
        self.waits = {True: 0.0, False: 0.0}  # seconds, by whether they run beside other work
        self.weights, self.state = _stored(config.model, config.optimizer)
        self.widths = [activation_widths(layer) for layer in config.model.layers]
        self.widest = max(self.widths, key=lambda widths: sum(widths.values()))

    def kept(self, remat: str) -> float:
        """Values per token that all layers keep for the backward pass, on one device."""
        model, total = self.config.model, 0.0
        stream = model.embed_dim / (self.tensor if self.config.sharding.sequence_parallel else 1)
        for widths in self.widths:
            total += stream
            if remat.startswith("save:"):
                total += sum(widths[n] for n in saved(remat)) / self.tensor
            elif remat == "matmuls":
                total += (sum(widths.values()) - widths["attention"]) / self.tensor + 2 * stream
            elif remat == "none":
                inside = sum(widths.values()) + widths["query"] + widths["up"]
                total += inside / self.tensor + 4 * stream
        return total

    def again(self, remat: str, length: int) -> float:
        """Operations per token that are computed again, over all layers."""
        total = 0.0
        if remat == "none":
            return total
        names = saved(remat)
        for layer, widths in zip(self.config.model.layers, self.widths, strict=True):
            a = layer.attention
            pairs = 2.0 * a.num_heads * (a.head_dim + a.value_dim)
            total += 0.0 if "attention" in names else pairs * mean_positions(length, a.window)
            if remat != "matmuls":  # the projection of what attention returns is always computed
                again = (w for n, w in widths.items() if n == "attention" or n not in names)
                total += 2.0 * self.config.model.embed_dim * sum(again)
        return total

    def train(self) -> Estimate:
        config, model, t = self.config, self.config.model, self.config.train
        length, sharding, size = config.sequence_length, config.sharding, self.itemsize
        tokens = self.rows * length
        here = tokens / self.shards / self.mesh["context"] / t.num_micro_batches
        zero = math.prod(self.mesh[a] for a in sharding.zero_axes)
        split = [self.tensor * (zero if sharding.zero >= stage else 1) for stage in (1, 2, 3)]
        ends = model.padded_vocab_size * model.embed_dim
        in_layers = (self.weights - (1 if model.tied else 2) * ends) / len(self.widths)
        inside = 2 * sum(self.widest.values()) + 4 * self.widest["up"]
        work = 6 * model.embed_dim + inside / self.tensor
        held = {
            "weights": 4.0 * self.weights / split[2],
            "optimizer": self.state / split[0],
            "gradients": 4.0 * self.weights / split[1],
            "cast": size * self.weights / split[2],
            "gathered": size * (2 * in_layers + 2 * ends) / self.tensor if split[2] > 1 else 0.0,
            "activations": size * here * self.kept(t.remat),
            "work": size * here * work + 16.0 * 1024 * model.padded_vocab_size / self.tensor,
            "batch": 20.0 * here,
        }
        flops = tokens * (3 * forward_flops(model, length) + self.again(t.remat, length))
        flops += tokens * 2.0 * model.vocab_size * model.embed_dim  # logits twice
        wire = size * self.weights / self.tensor
        gathers = 2.0 * t.num_micro_batches if sharding.zero >= 3 else 1.0
        for axis in (a for a in sharding.zero_axes if self.mesh[a] > 1):
            # Over several dimensions of a torus libtpu reduces everywhere and throws away the rest.
            whole = self.machine.span(config.mesh, axis)[0] > 2
            scatter = (2.0 if whole or sharding.zero < 2 else 1.0) * t.num_micro_batches
            self.send((gathers + scatter) * wire, axis)
            wire /= self.mesh[axis]
        for axis in ("data", "fsdp", "slice"):
            if axis not in sharding.zero_axes:
                self.send(2.0 * wire, axis)
        passes = 4 if t.remat in ("none", "matmuls") else 6
        stream = size * here * t.num_micro_batches * model.embed_dim * len(self.widths)
        self.send(2.0 * passes * stream, "tensor", wait=True)
        compute = flops / self.num_devices / self.chip.share(self.chip.flops)
        return Estimate(held, compute, self.waits[True], self.waits[False], tokens)

    def serve(self) -> Estimate:
        model, s, size = self.config.model, self.config.serve, self.itemsize
        positions, dtype = self.config.cache_length, jnp.dtype(s.dtype)
        split = self.tensor * (self.mesh["fsdp"] if s.zero == 3 else 1)
        rows = self.rows / self.shards
        caches = jax.eval_shape(lambda: make_cache(model, 1, positions, dtype, kind="sliding"))
        cache = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(caches))
        cache *= rows / self.tensor
        prefill = self.name == "prefill"
        here = rows * (self.config.prompt_length if prefill else 1)
        work = 6 * model.embed_dim + 2 * sum(self.widest.values()) / self.tensor
        held = {
            "weights": size * self.weights / split,
            "cache": cache,
            "work": size * here * work
            + 8.0 * rows * model.padded_vocab_size
            + 2.0 * cache / len(self.widths),
        }
        read = held["weights"] + (0 if prefill else cache)
        length = self.config.prompt_length if prefill else 2 * positions - 1
        tokens = here * self.shards
        flops = tokens * forward_flops(model, length) / self.num_devices
        chip = self.chip
        compute = max(flops / chip.share(chip.flops), read / chip.share(chip.hbm_bandwidth))
        self.send(4.0 * size * here * model.embed_dim * len(self.widths), "tensor", wait=True)
        self.send(size * self.weights / self.tensor if s.zero == 3 else 0.0, "fsdp")
        return Estimate(held, compute, self.waits[True], self.waits[False], tokens)

    def send(self, size: float, axis: str, *, wait: bool = False) -> None:
        """Counts the time to send (g-1)/g of `size` bytes along an axis of g devices."""
        g, chip = self.mesh[axis], self.chip
        if g == 1 or not size:
            return
        links, slices = self.machine.span(self.config.mesh, axis)
        bandwidth = chip.dcn_bandwidth if slices > 1 else links * (chip.link_bandwidth or math.inf)
        beside = not wait and self.machine.beside(self.config.mesh, axis)
        self.waits[beside] += size * (g - 1) / g / chip.share(bandwidth)


def saved(remat: str) -> list[str]:
    """Names of the activations that a policy `save:a,b` keeps; none of another policy's."""
    return [n for n in remat.removeprefix("save:").split(",") if n] if "save:" in remat else []


def candidates(
    name: Name, config: Aot, machine: Machine, *, factor: float = 1.0
) -> list[Candidate]:
    """Configurations of the same model that an estimate says fit, the fastest first.

    Args:
      name: of the program.
      config: its model, lengths, optimizer, dtypes and ZeRO stage are kept; mesh, remat and rows
        are chosen.
      machine: what they run on.
      factor: estimates of memory are multiplied by it.

    Raises:
      ValueError: no mesh divides the model, its rows and lengths.
    """
    found, limit = [], HEADROOM * machine.usable_bytes
    sensible, refused = False, None
    for each in _variants(name, config, machine):
        try:
            guess = estimate(name, each, machine)
        except ValueError as error:  # sizes that do not divide, of this one
            refused = refused or error
            continue
        sensible = True
        if factor * guess.total_bytes <= limit:
            found.append(Candidate(each, flags_of(config, each), guess))
    if not sensible:
        raise ValueError(
            f"no mesh of these devices suits the question: {refused or 'none divides'}"
        )
    return sorted(found, key=lambda c: -c.estimate.tokens_per_second)


def nothing_fits(name: Name, config: Aot, machine: Machine) -> str:
    """Advice where `candidates` finds none."""
    weights, state = _stored(config.model, config.optimizer)
    what, usable = "weights", machine.usable_bytes
    if name == "train":
        what, held = "weights and optimizer", 4 * weights + state
    else:
        held = weights * jnp.dtype(config.serve.dtype).itemsize
    return (
        f"by the estimates nothing of this model fits on {len(machine.devices)} devices of "
        f"{usable / 2**30:.1f} GiB, with any mesh, remat and batch that was tried; {what} alone "
        f"are {held / 2**30:,.1f} GiB: use more than {math.ceil(held / usable):,} devices"
    )


def first(found: Sequence[Candidate], most: int) -> list[Candidate]:
    """The first `most`, at most `PER_MESH` of each mesh."""
    chosen: list[Candidate] = []
    for each in found:
        key = each.config.mesh, each.config.sharding.zero_axes
        same = [c for c in chosen if (c.config.mesh, c.config.sharding.zero_axes) == key]
        if len(same) < PER_MESH and len(chosen) < most:
            chosen.append(each)
    return chosen


def _variants(name: Name, config: Aot, machine: Machine) -> Iterator[Aot]:
    """Every mesh, remat and batch worth an estimate."""
    fixed, num_devices = config.mesh, len(machine.devices)
    if fixed.slice == 1:
        fixed = dataclasses.replace(fixed, slice=machine.num_slices)
    rest = num_devices // (fixed.slice * fixed.stage * fixed.expert * fixed.context)
    for tensor in (1, 2, 4, 8, 16):
        if rest % tensor or tensor > rest:
            continue
        for data, zero_axes in _replicas(rest // tensor):
            mesh = dataclasses.replace(fixed, data=data, fsdp=rest // tensor // data, tensor=tensor)
            if name != "train":
                yield from _serving(config, mesh)
                continue
            sharding = dataclasses.replace(
                config.sharding, zero_axes=zero_axes, sequence_parallel=tensor > 1
            )
            for remat in REMATS:
                for rows in ROWS:
                    train = dataclasses.replace(config.train, remat=remat, rows_per_device=rows)
                    whole = rows * num_devices
                    parts = mesh.data * mesh.fsdp * mesh.slice * train.num_micro_batches
                    if whole % parts == 0:
                        yield dataclasses.replace(config, mesh=mesh, sharding=sharding, train=train)


def _replicas(count: int) -> Iterator[tuple[int, tuple[str, ...]]]:
    """(devices along `data`, axes that share the state) for `count` replicas."""
    yield 1, ("fsdp",)
    data = 2
    while data * data <= count:
        if count % data == 0:
            yield data, ("fsdp", "data")
            yield data, ("fsdp",)
        data *= 2


def _serving(config: Aot, mesh: MeshShape) -> Iterator[Aot]:
    for zero in (0, 3):
        for rows in (*ROWS, 32.0, 64.0):
            if mesh.data == 1 and rows * mesh.tensor % 1 == 0:
                serve = dataclasses.replace(config.serve, rows_per_device=rows, zero=zero)
                yield dataclasses.replace(config, mesh=mesh, serve=serve)


def flags_of(old: Aot, new: Aot) -> tuple[str, ...]:
    """The flags that turn one configuration into another."""
    changed = (line.split(": ", 1) for line in codec.difference(old, new))
    return tuple(f"--config.{key}={value.split(' -> ')[1]}" for key, value in changed)


def remedies(name: Name, config: Aot, machine: Machine, needed: float) -> list[dict[str, Any]]:
    """What would fit where a configuration needs `needed` bytes per device, more than there are.

    Estimates, scaled by what the compiler needed over what was estimated: on the same mesh the most
    rows with the same remat, and the cheapest remat with the same rows; then the fastest of any
    mesh with the same rows, and the fastest of all.
    """
    try:
        guess = estimate(name, config, machine)
    except ValueError:
        return []
    factor = max(1.0, needed / guess.total_bytes)
    found = candidates(name, config, machine, factor=factor)
    sizes = machine.mesh(config.mesh).shape

    def rows(c: Candidate) -> float:
        return c.config.of(name).rows_per_device

    asked, axes = config.of(name).rows_per_device, config.sharding.zero_axes
    here = [c for c in found if machine.mesh(c.config.mesh).shape == sizes]
    here = [c for c in here if c.config.sharding.zero_axes == axes]
    fewer = [c for c in here if c.config.train.remat == config.train.remat and rows(c) < asked]
    choices = {
        "fewer rows": max(fewer, key=rows, default=None),
        "another remat": next((c for c in here if rows(c) == asked), None),
        "another mesh": next((c for c in found if rows(c) == asked), None),
        "the fastest": next(iter(found), None),
    }
    return [
        {
            "change": change,
            "flags": list(c.flags),
            "estimated_bytes": factor * c.estimate.total_bytes,
            "estimated_tokens_per_second": c.estimate.tokens_per_second,
        }
        for change, c in choices.items()
        if c is not None
    ]

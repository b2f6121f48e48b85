"""The programs to compile for machines that are not here: this project's training step, prefill
and decoding loop, over shapes alone. No array is ever made.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
import time
import warnings
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from lm.aot.question import Aot, Name
from lm.hardware import topologies
from lm.hardware.hlo_cost import ProgramCost, program_cost
from lm.infer import programs as infer
from lm.infer.cache import make_cache
from lm.infer.generate import MIN_STOPS
from lm.model import check_layout, param_specs
from lm.model.params import unstacked_specs
from lm.parallel import choose_strategy, context_attention, reorder_for
from lm.run.layout import check_sizes
from lm.sharding import Layout, check_divides, make_mesh, make_rules, named_sharding
from lm.train.accumulation import Accumulation
from lm.train.objective import NextToken
from lm.train.optimizers import make_optimizer
from lm.train.state import abstract_state
from lm.train.step import make_train_step
from lm.weights import abstract

Tree = Any
# Effort that libtpu spends; its default is 0. Compiles ten times faster.
FAST = {"exec_time_optimization_effort": -1.0}


@dataclasses.dataclass(frozen=True)
class Program:
    """A program to compile.

    Attributes:
      name: "train", "prefill" or "decode".
      config, topology, layout: the question's.
      function: jitted.
      arguments: ShapeDtypeStructs with shardings, by what they are: weights, optimizer, batch, ...
      call: positional arguments of `function`, made of those.
      rows: rows of one run, over all devices.
      tokens: tokens that one run trains on, reads or writes.
    """

    name: Name
    config: Aot
    topology: str
    layout: Layout
    function: Any
    arguments: dict[str, Tree]
    call: tuple[Any, ...]
    rows: int
    tokens: int

    @property
    def device(self) -> Any:
        return self.layout.mesh.devices.flat[0]

    @property
    def num_devices(self) -> int:
        return self.layout.mesh.devices.size


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What the compiler made of a program, or why it did not.

    Attributes:
      lower_seconds, compile_seconds: time that lowering and compiling took.
      refusal: the compiler's message where it ran out of memory, else None.
      needed_bytes, available_bytes: its figures in that case; None where HBM was not the reason.
      memory: figures of `memory_analysis()`, by name; none of a refused program.
      cost: of the compiled program; None of a refused one.
      text: the compiled program; "" of a refused one.
    """

    lower_seconds: float
    compile_seconds: float
    refusal: str | None = None
    needed_bytes: float | None = None
    available_bytes: float | None = None
    memory: dict[str, int] = dataclasses.field(default_factory=dict)
    cost: ProgramCost | None = None
    text: str = ""


def make_program(name: Name, config: Aot, topology: str) -> Program:
    """The program of a question.

    Raises:
      ValueError: sizes that do not divide, an unknown topology, implementation or policy.
    """
    mesh = make_mesh(config.mesh, topologies.describe(topology))
    layout, rows = check(name, config, mesh)
    make = _train if name == "train" else _serve
    return make(name, config, topology, layout, rows)


def check(name: Name, config: Aot, mesh: Any) -> tuple[Layout, int]:
    """The layout of a program on a mesh, and the rows of a run over all devices.

    Raises:
      ValueError: sizes that make no sense, or that the mesh does not divide.
    """
    train = name == "train"
    per_device = config.of(name).rows_per_device
    rows = per_device * mesh.devices.size
    if not 1 <= rows < math.inf or abs(rows - round(rows)) > 1e-6:
        raise ValueError(
            f"{'train' if train else 'serve'}.rows_per_device={per_device:g} gives {rows:g} rows "
            f"on {mesh.devices.size} devices; use a multiple of 1/{mesh.devices.size}"
        )
    rows, s = round(rows), config.sharding
    rules = (
        make_rules(s.zero, s.sequence_parallel, s.zero_axes)
        if train
        else make_rules(config.serve.zero)
    )
    layout = Layout(mesh, rules)
    if not train:
        _check_serve(name, config, layout, rows)
        return layout, rows
    check_sizes(
        config.model, layout, s, batch_size=rows, sequence_length=config.sequence_length,
        num_micro_batches=config.train.num_micro_batches,
    )  # fmt: skip
    check_attention(config.train.attention, mesh.devices.flat[0].platform)
    return layout, rows


def _check_serve(name: Name, config: Aot, layout: Layout, rows: int) -> None:
    check_layout(config.model, layout)
    length, mesh = config.cache_length, layout.mesh
    if not 1 <= length <= config.model.max_length:
        raise ValueError(
            f"serve.cache_length={length} is not between 1 and model.max_length="
            f"{config.model.max_length}; use a shorter cache or raise the model's length"
        )
    if name == "prefill" and not 0 < config.prompt_length < length:
        raise ValueError(
            f"serve.prompt_length={config.prompt_length} leaves no room in serve.cache_length="
            f"{length}; use a longer cache"
        )
    if mesh.shape["context"] > 1:
        raise ValueError(
            f"mesh.context={mesh.shape['context']}: {name} does not split the sequence; use 1"
        )
    if config.train.attention is not None:
        raise ValueError(
            f"train.attention={config.train.attention!r} is the training step's; {name} uses what "
            "its cache chooses, so leave it out"
        )
    check_divides(mesh, layout.rules.activations["batch"], "serve's rows", rows)


def check_attention(name: str | None, platform: str) -> None:
    """Raises ValueError where the attention of that name is not for the platform."""
    if name == "cudnn":
        raise ValueError(
            "train.attention='cudnn' needs cuDNN and its GPU to compile; use mosaic_gpu or blocked"
        )
    written_for = {"flash": "tpu", "splash": "tpu", "mosaic_gpu": "gpu"}.get(name or "")
    if written_for not in (None, "gpu" if platform == "cuda" else platform):
        others = "flash, splash" if platform == "tpu" else "mosaic_gpu"
        raise ValueError(
            f"train.attention={name!r} is written for {written_for.upper()}s; use {others}, "
            "blocked or reference"
        )


def _train(name: Name, config: Aot, topology: str, layout: Layout, rows: int) -> Program:
    t, length = config.train, config.sequence_length
    sharding = named_sharding(
        layout.mesh, layout.rules.activations, ("batch", "sequence"), (rows, length)
    )
    ids, weights = (
        jax.ShapeDtypeStruct((rows, length), dtype, sharding=sharding)
        for dtype in (jnp.int32, jnp.float32)
    )
    batch = {"ids": ids, "positions": ids, "targets": ids, "weights": weights}
    batch |= {"segment_ids": ids} if t.packed else {}
    optimizer = make_optimizer(config.optimizer)
    state = abstract_state(param_specs(config.model), optimizer, layout)
    strategy = choose_strategy(config.sharding.context, layout)
    gradient = Accumulation(
        config.model, t.num_micro_batches, jnp.dtype(t.dtype), t.remat, loss=t.loss,
        attention=context_attention(strategy, t.attention), reorder=reorder_for(strategy),
    )  # fmt: skip
    step = make_train_step(NextToken(), optimizer, lambda _: 1e-4, layout, gradient)
    arguments = {"weights": state.trainable, "optimizer": state.opt_state, "batch": batch}
    return Program(
        name, config, topology, layout, step.jitted(batch), arguments, (state, batch), rows,
        rows * length,
    )  # fmt: skip


def _serve(name: Name, config: Aot, topology: str, layout: Layout, rows: int) -> Program:
    model, mesh, dtype = config.model, layout.mesh, jnp.dtype(config.serve.dtype)

    def struct(shape: tuple[int, ...], kind: Any, *axes: str | None) -> jax.ShapeDtypeStruct:
        sharding = named_sharding(mesh, layout.rules.activations, axes, shape)
        return jax.ShapeDtypeStruct(shape, kind, sharding=sharding)

    def by_row(*shape: int, kind: Any = jnp.int32) -> jax.ShapeDtypeStruct:
        return struct((rows, *shape), kind, "batch", *(None,) * len(shape))

    params = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, dtype, sharding=x.sharding),
        abstract(unstacked_specs(model), layout.rules, mesh),
    )
    f32 = functools.partial(by_row, kind=jnp.float32)
    sampling = infer.SamplingParams(
        by_row(kind=jnp.uint32), f32(), by_row(), f32(), f32(), by_row(MIN_STOPS), by_row()
    )
    cache_config = infer.CacheConfig("sliding", dtype)

    def cached(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        rest = ("kv_heads", None, None) if len(x.shape) == 4 else (None,) * (len(x.shape) - 1)
        return struct(x.shape, x.dtype, "batch", *rest)  # latents have no heads

    S = config.cache_length
    empty = jax.eval_shape(lambda: make_cache(model, rows, S, dtype, kind=cache_config.kind))
    cache = jax.tree.map(cached, empty)
    state = infer.DecodeState(
        cache, by_row(S), f32(S), f32(S), by_row(S, 0), f32(S, 0), f32(0), by_row(), by_row(),
        by_row(kind=jnp.bool_),
    )  # fmt: skip
    if name == "prefill":
        prompt = by_row(config.prompt_length), by_row(), sampling
        arguments = {"weights": params, "batch": prompt}
        call = (params, *prompt, model, layout, S, dtype, cache_config)
        function, tokens = infer.prefill, rows * config.prompt_length
    else:
        replicated = NamedSharding(mesh, PartitionSpec())
        steps = jax.ShapeDtypeStruct((), jnp.int32, sharding=replicated)
        rest = dataclasses.replace(state, cache=None)
        arguments = {"weights": params, "cache": cache, "batch": (rest, sampling, steps)}
        call = params, state, sampling, steps, model, layout, dtype
        function, tokens = infer.decode, rows
    return Program(name, config, topology, layout, function, arguments, call, rows, tokens)


def compile_program(
    program: Program, *, full: bool = False, options: Mapping[str, Any] | None = None
) -> Compiled:
    """Compiles a program for its topology.

    Args:
      program: see `make_program`.
      full: with the compiler's default effort, as for a run.
      options: further options of the compiler.

    Raises:
      ValueError: the program cannot be compiled, for another reason than memory.
    """
    begin = time.perf_counter()
    with jax.set_mesh(program.layout.mesh):
        lowered = program.function.lower(*program.call)
        chosen: dict[str, Any] = {"xla_gpu_autotune_level": 0}
        if program.device.platform == "tpu":
            chosen = {} if full else dict(FAST)
        middle = time.perf_counter()
        try:
            with warnings.catch_warnings():
                # The cache takes programs for devices that are not here, and cannot read them.
                warnings.filterwarnings("ignore", message="Error reading persistent compilation")
                compiled = lowered.compile(compiler_options=chosen | dict(options or {}))
        except jax.errors.JaxRuntimeError as error:
            seconds = middle - begin, time.perf_counter() - middle
            return Compiled(*seconds, **_refusal(str(error)))
    seconds = middle - begin, time.perf_counter() - middle
    found = compiled.memory_analysis()
    memory = {
        name.removesuffix("_in_bytes"): int(getattr(found, name))
        for name in dir(found)
        if name.endswith("_in_bytes")
    }
    text = compiled.as_text() or ""
    cost = program_cost(text, program.layout.mesh)
    return Compiled(*seconds, memory=memory, cost=cost, text=text)


_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_SIZE = r"([\d.]+)\s*([KMGT]?)i?B?"


def _refusal(message: str) -> dict[str, Any]:
    """Fields of `Compiled` from libtpu's message.

    It says `total memory required for HLO temporaries (123.90G) exceeds available HBM (95.73G)`, or
    `Used 20.1G of 15.75G hbm`.
    """
    first = message.splitlines()[0]
    match = re.search(rf"\({_SIZE}\) exceeds available HBM \({_SIZE}\)", message)
    match = match or re.search(rf"Used {_SIZE} of {_SIZE} hbm", message)
    if "RESOURCE_EXHAUSTED" not in first:
        raise ValueError(f"the compiler refuses the program: {message[:1500]}")
    if match is None:  # of memory on the chip, by a kernel
        return {"refusal": " ".join(message.split())[:400]}
    needed, available = (float(match[i]) * _UNITS[match[i + 1]] for i in (1, 3))
    return {"refusal": first, "needed_bytes": needed, "available_bytes": available}


def bytes_per_device(tree: Tree) -> int:
    """Bytes of the arrays on one device, unpadded."""
    return sum(
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree)
    )

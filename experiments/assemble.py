"""The parts of a pre-training run, made from its configuration: what `experiments.pretrain` trains
with, and what other commands open a workdir with.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from data_pipelines import local_text
from experiments.configs.pretrain import Pretrain
from lm.checkpoints.store import Checkpoints
from lm.config import codec
from lm.config import command_line as config_lib
from lm.config.command_line import ConfigError, input_errors
from lm.data.batches import Batches, HeldOut, PackedSource
from lm.data.corpus import Corpus, open_corpus
from lm.data.packing import make_plan
from lm.data.sources import TokenSource
from lm.data.stages import DataStage
from lm.distributed.collectives import barrier, is_first_process
from lm.kernels.attention import IMPLEMENTATIONS
from lm.model import check_mesh, param_specs
from lm.parallel import check_context, context_attention, in_order_of
from lm.sharding import (
    Layout,
    check_divides,
    make_mesh,
    make_rules,
    named_sharding,
    pretend_cpu_devices,
)
from lm.tokenizers.base import Tokenizer
from lm.train.accumulation import Accumulation
from lm.train.objective import NextToken, Objective
from lm.train.optimizers import Optimizer, make_optimizer
from lm.train.schedules import BatchRamp, BatchStage, Schedule, linear_ramp
from lm.train.state import TrainState, abstract_state, init_state
from lm.train.step import TrainStep, make_eval_step, make_train_step

Tree = Any


@dataclasses.dataclass(frozen=True)
class Run:
    """Everything a run is made of but its state.

    Attributes:
      config, workdir: what it was made from.
      layout: mesh and rules.
      text: the corpus on disk.
      tokenizer: of the corpus.
      stream: batches by step.
      held_out: held-out sets by name.
      objective, optimizer, schedule, gradient: of the step.
      specs: of the model's weights.
      checkpoints: of the workdir.
    """

    config: Pretrain
    workdir: pathlib.Path
    layout: Layout
    text: Corpus
    tokenizer: Tokenizer
    stream: Batches
    held_out: Mapping[str, HeldOut]
    objective: Objective
    optimizer: Optimizer
    schedule: Schedule
    gradient: Accumulation
    specs: Tree
    checkpoints: Checkpoints

    @property
    def rows(self) -> NamedSharding:
        """How a batch lies on the mesh."""
        return named_sharding(
            self.layout.mesh, self.layout.rules.activations, ("batch", "sequence")
        )

    def step(self) -> TrainStep:
        """The jitted training step."""
        t = self.config.train
        return make_train_step(
            self.objective, self.optimizer, self.schedule, self.layout, self.gradient,
            max_grad_norm=t.max_grad_norm, seed=t.seed,
            stability=self.config.stability, ema=self.config.ema,
        )  # fmt: skip

    def new_state(self) -> TrainState:
        """The state of step 0."""
        key = jax.random.key(self.config.train.seed)
        return init_state(
            self.specs, self.optimizer, key, self.layout, ema=self._has_ema, health=self._has_health
        )

    def abstract_state(self) -> TrainState:
        """Shapes, types and shardings of the state, to restore into."""
        return abstract_state(
            self.specs, self.optimizer, self.layout, ema=self._has_ema, health=self._has_health
        )

    @property
    def _has_ema(self) -> bool:
        return self.config.ema is not None

    @property
    def _has_health(self) -> bool:
        return self.config.stability is not None

    @functools.cached_property
    def _eval_step(self) -> Callable[..., Any]:
        return make_eval_step(self.objective, self.layout, self.gradient)

    def evaluate(self, params: Tree) -> dict[str, float]:
        """`held_out_loss` in nats a token and `held_out_bits_per_byte` of text.

        Of every held-out set after the first, under its name: `held_out_loss/books`.
        """
        found = {}
        for i, (name, held_out) in enumerate(self.held_out.items()):
            terms = [
                self._eval_step(params, held_out.device_batch(j, self.rows))["loss"]
                for j in range(len(held_out))
            ]
            nats = math.fsum(float(term.sum) for term in terms)
            suffix = f"/{name}" if i else ""
            found[f"held_out_loss{suffix}"] = nats / held_out.num_pairs
            bits = nats / math.log(2) / held_out.num_bytes
            found[f"held_out_bits_per_byte{suffix}"] = bits
        return found


def open_run(workdir: str | pathlib.Path, edits: Mapping[str, str] | None = None) -> Run:
    """The run that a workdir holds, with its own configuration and edits of it.

    Raises:
      ConfigError: there is no run in `workdir`, or its files do not fit together.
    """
    workdir = pathlib.Path(workdir).expanduser()
    if not (workdir / "config.json").exists():
        raise ConfigError(
            f"{workdir} has no config.json, so it is not the folder of a run; give one that "
            "experiments.pretrain was given as --workdir"
        )
    config = config_lib.override(codec.load(workdir / "config.json", Pretrain), edits or {})
    with input_errors():
        return assemble(config, workdir, open_corpus(corpus_directory(config, workdir)))


def assemble(config: Pretrain, workdir: pathlib.Path, text: Corpus | None = None) -> Run:
    """The parts of a run.

    Args:
      config, workdir: of the run.
      text: the corpus; None to build it, or to open it if it has been built.

    Raises:
      ConfigError: sizes that do not divide, a corpus that is empty or does not fit the model.
    """
    if not jax.distributed.is_initialized():
        pretend_cpu_devices(config.mesh)
    with input_errors():
        layout = make_layout(config)
        text = text or build_corpus(config, workdir)
        tokenizer = text.tokenizer()
        check_vocabulary(config, tokenizer.vocab_size, text.directory)
        t = config.train
        stream = make_stream(config, text)
        held_out = {
            name: HeldOut(
                PackedSource(
                    small := held_out_source(config, text, name),
                    make_plan(small, t.sequence_length),
                    name,
                ),
                t.batch_size,
            )
            for name in text.validation_names
        }
        return Run(
            config=config,
            workdir=workdir,
            layout=layout,
            text=text,
            tokenizer=tokenizer,
            stream=stream,
            held_out=held_out,
            objective=in_order_of(config.sharding.context, NextToken(t.z_loss)),
            optimizer=make_optimizer(config.optimizer),
            schedule=make_schedule(config),
            gradient=Accumulation(
                config.model, t.num_micro_batches, jnp.dtype(t.dtype), t.remat,
                attention=named_attention(config), unroll=t.unroll,
            ),
            specs=param_specs(config.model),
            checkpoints=make_checkpoints(config, workdir),
        )  # fmt: skip


def make_layout(config: Pretrain) -> Layout:
    """Mesh and rules, with every size they must divide checked before anything is computed."""
    mesh = make_mesh(config.mesh)
    sharding = config.sharding
    rules = make_rules(sharding.zero, sharding.sequence_parallel, sharding.zero_axes)
    check_mesh(config.model, mesh)
    t = config.train
    if t.num_micro_batches < 1 or t.batch_size % t.num_micro_batches:
        raise ValueError(
            f"train.num_micro_batches={t.num_micro_batches} does not divide "
            f"train.batch_size={t.batch_size}"
        )
    per_micro_batch = t.batch_size // t.num_micro_batches
    check_divides(
        mesh, rules.activations["batch"], "batch_size / num_micro_batches", per_micro_batch
    )
    check_divides(
        mesh, rules.activations["residual_sequence"], "sequence_length", t.sequence_length
    )
    heads = [(a.num_heads, a.num_kv_heads) for a in (x.attention for x in config.model.layers)]
    check_context(sharding.context, Layout(mesh, rules), t.sequence_length, heads)
    if t.sequence_length > config.model.max_length:
        raise ValueError(
            f"train.sequence_length={t.sequence_length} is beyond model.max_length="
            f"{config.model.max_length}; shorten the rows or raise the model's length"
        )
    return Layout(mesh, rules)


def corpus_directory(config: Pretrain, workdir: pathlib.Path) -> pathlib.Path:
    """Where tokenizer and data sets are."""
    directory = config.data.directory
    return pathlib.Path(directory).expanduser() if directory else workdir / "data"


def build_corpus(config: Pretrain, workdir: pathlib.Path) -> Corpus:
    """Tokenizer and data sets, made the first time: by the first process, for all."""
    data = config.data
    return local_text.build(
        corpus_directory(config, workdir),
        data.files.replace(",", " ").split() or None,
        sources=data.sources,
        validation=data.validation,
        tokenizer=data.tokenizer or None,
        vocab_size=config.model.vocab_size,
        max_bytes=int(data.max_megabytes * 1e6) or None,
        held_out=data.held_out,
        progress=is_first_process(),
        process_index=jax.process_index(),
        wait=barrier if jax.process_count() > 1 else None,
    )


def held_out_source(config: Pretrain, text: Corpus, name: str) -> TokenSource:
    """The documents of a held-out set that are evaluated."""
    return text.source("validation", name).head(config.data.max_held_out_tokens)


def make_checkpoints(config: Pretrain, workdir: pathlib.Path) -> Checkpoints:
    """The checkpoints of a workdir."""
    c = config.checkpoints
    return Checkpoints(
        workdir / "checkpoints", c.keep, config=config.model, keep_every=c.keep_every,
        local=c.local or None, keep_local=c.keep_local,
    )  # fmt: skip


def make_stream(config: Pretrain, text: Corpus) -> Batches:
    """The batches of every step: a function of the pack plans, the mixture, the seed, the step."""
    t, data = config.train, config.data
    mixture = tuple(source.share for source in data.sources) or None
    stages = make_ramp(config).stages
    return Batches(
        [text.packed("train", t.sequence_length, name) for name in text.names],
        [DataStage(stage.batch_size, mixture, stage.first_step) for stage in stages],
        seed=data.seed,
        num_steps=t.num_steps,
    )


def make_ramp(config: Pretrain) -> BatchRamp:
    """The batch size as a function of the step.

    Raises:
      ValueError: a size that micro-batches and the mesh do not divide.
    """
    t = config.train
    if t.ramp is None:
        return BatchRamp((BatchStage(0, t.batch_size),))
    mesh, rules = make_mesh(config.mesh), make_rules()
    shards = math.prod(mesh.shape[axis] for axis in rules.activations["batch"])
    return linear_ramp(
        t.ramp.first, t.batch_size, t.ramp.num_stages, t.ramp.num_steps,
        divisor=shards * t.num_micro_batches,
    )  # fmt: skip


def check_vocabulary(config: Pretrain, vocab_size: int, directory: pathlib.Path) -> None:
    """Raises ConfigError unless model and tokenizer agree."""
    if vocab_size != config.model.vocab_size:
        raise ConfigError(
            f"model.vocab_size={config.model.vocab_size}, but the tokenizer in {directory} has "
            f"{vocab_size}; set --config.model.vocab_size={vocab_size}, or another data.directory"
        )


def make_schedule(config: Pretrain) -> Schedule:
    """The learning rate as a function of the step."""
    rate, num_steps = config.learning_rate, config.train.num_steps
    return Schedule(
        rate.decay, rate.peak, min(rate.warmup_steps, num_steps // 2), num_steps,
        rate.final_fraction, rate.decay_fraction, rate.cooldown, rate.time_scale,
    )  # fmt: skip


def named_attention(config: Pretrain) -> Any:
    """The attention asked for, across the mesh axis `context` where there is one.

    Raises:
      ConfigError: there is none of that name.
    """
    name = config.train.attention
    if name is not None and name not in IMPLEMENTATIONS:
        raise ConfigError(
            f"train.attention={name!r} is unknown; use {', '.join(IMPLEMENTATIONS)}, or none"
        )
    return context_attention(config.sharding.context, name)

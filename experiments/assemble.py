"""What training programs assemble alike, from the groups of keys their configurations share."""

from __future__ import annotations

import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from absl import flags

from experiments.configs.pretrain import Pretrain
from experiments.configs.sft import Sft
from lm.checkpoints import Checkpoints
from lm.data.batches import Batches, HeldOut
from lm.data.mixtures import Share
from lm.data.packed import PackedSource
from lm.data.stages import DataStage
from lm.hardware.chips import peak_flops
from lm.model import ModelConfig, param_specs
from lm.parallel import choose_strategy, context_attention, reorder_for
from lm.run.layout import check_sizes
from lm.run.parts import Run
from lm.sharding import Layout, make_mesh, make_rules, pretend_cpu_devices
from lm.tokenizers import Tokenizer
from lm.train.accumulation import Accumulation
from lm.train.batch import rows_multiple
from lm.train.objective import NextToken
from lm.train.optimizers import make_optimizer
from lm.train.schedules import BatchRamp, BatchStage, linear_ramp

Config = Pretrain | Sft
_PROFILE_STEPS = flags.DEFINE_string(
    "profile_steps", None, "Steps to trace, such as 10:15.", module_name=sys.argv[0]
)


def profile_steps() -> str | None:
    """What `--profile_steps` says."""
    return _PROFILE_STEPS.value if flags.FLAGS.is_parsed() else None


def layout_of(config: Config, model: ModelConfig) -> Layout:
    """Mesh and rules to train `model`.

    Raises:
      ValueError: a mesh axis or the number of micro-batches does not divide a size, the devices do
        not make up the mesh, or rows are longer than the model allows.
    """
    if not jax.distributed.is_initialized():
        pretend_cpu_devices(config.mesh)
    t, s = config.train, config.sharding
    rules = make_rules(s.zero, s.sequence_parallel, s.zero_axes)
    layout = Layout(make_mesh(config.mesh), rules)
    check_sizes(
        model, layout, s, batch_size=t.batch_size, num_micro_batches=t.num_micro_batches,
        sequence_length=t.sequence_length,
    )  # fmt: skip
    batch_sizes(config, layout)
    return layout


def batch_sizes(config: Config, layout: Layout) -> BatchRamp:
    """The batch size of every step.

    Raises:
      ValueError: a size on the way that micro-batches and the mesh do not divide, or a ramp of more
        stages than steps.
    """
    t, ramp = config.train, config.train.ramp
    if ramp is None:
        return BatchRamp((BatchStage(0, t.batch_size),))
    multiple = rows_multiple(NextToken(), layout, t.num_micro_batches)
    return linear_ramp(ramp.first, t.batch_size, ramp.num_stages, ramp.num_steps, multiple)


def make_stream(
    config: Config,
    sources: Sequence[PackedSource],
    layout: Layout,
    mixture: tuple[Share, ...] | None = None,
) -> Batches:
    """The batches of every step: a function of the pack plans, the mixture, the seed, the step."""
    sizes = batch_sizes(config, layout)
    stages = [DataStage(s.batch_size, mixture, s.first_step) for s in sizes.stages]
    return Batches(sources, stages, seed=config.data.seed, num_steps=config.train.num_steps)


def make_run(
    config: Config,
    workdir: pathlib.Path,
    model: ModelConfig,
    layout: Layout,
    tokenizer: Tokenizer,
    stream: Batches,
    held_out: Mapping[str, HeldOut],
    data: pathlib.Path,
    **others: Any,
) -> Run:
    """A run that minimizes the cross-entropy of the next token.

    Args:
      config, workdir: of the run.
      model, layout, tokenizer, stream, held_out, data: see `Run`.
      others: fields of `Run` that only some programs set, such as `trains`.
    """
    t, c = config.train, config.checkpoints
    strategy = choose_strategy(config.sharding.context, layout)
    return Run(**{
        "workdir": workdir,
        "layout": layout,
        "tokenizer": tokenizer,
        "stream": stream,
        "held_out": held_out,
        "objective": NextToken(t.z_loss),
        "optimizer": make_optimizer(config.optimizer),
        "schedule": config.learning_rate.schedule(t.num_steps),
        "gradient": Accumulation(
            model, t.num_micro_batches, jnp.dtype(t.dtype), t.remat, unroll=t.unroll,
            attention=context_attention(strategy, t.attention), reorder=reorder_for(strategy),
            specs=others.get("specs"),
        ),
        "specs": param_specs(model),
        "checkpoints": Checkpoints(
            workdir / "checkpoints", c.keep, config=model, keep_every=c.keep_every,
            local=c.local or None, keep_local=c.keep_local,
        ),
        "data": data,
        "num_steps": t.num_steps,
        "seed": t.seed,
        "max_grad_norm": t.max_grad_norm or None,
        "stability": config.stability,
        "rewind": config.rewind,
        "ema": config.ema,
        "intervals": config.intervals,
        "saving": c,
        "peak_flops": t.peak_tflops * 1e12 or peak_flops(jax.devices()[0].device_kind),
    } | others)  # fmt: skip

"""Pre-train a language model on text.

    python -m experiments.pretrain --config=quicktest --workdir=runs/quicktest

Makes a tokenizer and a packed data set from text (Python's own documentation and source, or
--config.data.files='dir/**/*.txt'), trains, evaluates on held-out text in bits per byte, samples,
and writes a report. The same command resumes. The workdir receives `config.json`, `metrics.jsonl`,
`tensorboard/`, `checkpoints/<step>`, `data/`, `summary.json` and `report.html`.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import pathlib
import time
from typing import Any

import jax
import jax.numpy as jnp
from absl import logging

from data_pipelines import local_text
from experiments import config as config_lib
from experiments.config import ConfigError, input_errors
from experiments.configs import pretrain as configs
from experiments.configs.pretrain import Pretrain
from experiments.summary import say, summarize
from lm.checkpoints.store import Checkpoints
from lm.data.batches import Batches, HeldOut, PackedSource
from lm.data.packing import make_plan
from lm.kernels.attention import IMPLEMENTATIONS, attention
from lm.model import check_mesh, num_params, param_specs
from lm.sharding import (
    Layout,
    check_divides,
    make_mesh,
    make_rules,
    named_sharding,
    pretend_cpu_devices,
)
from lm.train.host import keep_freed_memory
from lm.train.loop import Intervals, train
from lm.train.metrics import MetricsWriter, Progress
from lm.train.objective import NextToken
from lm.train.optimizers import make_optimizer
from lm.train.schedules import Schedule
from lm.train.state import TrainState, abstract_state, init_state
from lm.train.step import Accumulation, make_eval_step, make_train_step

# What may differ between the first start of a run and a later one.
MAY_CHANGE = (
    "mesh.",
    "sharding.",
    "intervals.",
    "sampling.",
    "data.directory",
    "train.num_steps",
    "train.num_micro_batches",
    "train.remat",
    "train.attention",
    "train.keep",
)


def main(config: Pretrain, workdir: pathlib.Path) -> None:
    resuming = claim_workdir(config, workdir)
    if logging.get_verbosity() == logging.INFO:
        logging.set_verbosity(logging.WARNING)  # Orbax tells every detail of every save
    keep_freed_memory()
    pretend_cpu_devices(config.mesh)
    with input_errors():
        layout = make_layout(config)
        text = build_corpus(config, workdir)
        tokenizer = text.tokenizer()
        check_vocabulary(config, tokenizer.vocab_size, text.directory)
        workdir.mkdir(parents=True, exist_ok=True)
        config_lib.save(config, workdir / "config.json")

    # Data: the stream is a function of the pack plan, the seed and the step.
    length, seed = config.train.sequence_length, config.data.seed
    packed = PackedSource(text.source("train"), text.plan("train", length), "train")
    batches = Batches([packed], config.train.batch_size, seed=seed)
    held_out_text = text.source("validation")
    small = held_out_text.head(config.data.max_held_out_tokens)
    held_out = HeldOut(PackedSource(small, make_plan(small, length)), config.train.batch_size)
    rows = named_sharding(layout.mesh, layout.rules.activations, ("batch", "sequence"))

    # The step.
    schedule = make_schedule(config)
    optimizer = make_optimizer(config.optimizer)
    objective = NextToken(config.train.z_loss)
    gradient = Accumulation(
        config.model, config.train.num_micro_batches, jnp.dtype(config.train.dtype),
        config.train.remat, attention=named_attention(config),
    )  # fmt: skip
    step = make_train_step(
        objective, optimizer, schedule, layout, gradient,
        max_grad_norm=config.train.max_grad_norm, seed=config.train.seed,
    )  # fmt: skip
    evaluate = make_evaluation(make_eval_step(objective, layout, gradient), held_out, rows)

    # The state: from the last checkpoint, or new.
    checkpoints = Checkpoints(workdir / "checkpoints", config.train.keep)
    specs = param_specs(config.model)
    state = restore(checkpoints, abstract_state(specs, optimizer, layout), batches)
    with MetricsWriter(workdir) as writer:
        if state is None:
            writer.truncate_after(-1)
            state = init_state(specs, optimizer, jax.random.key(config.train.seed), layout)
        done = int(state.step)
        if resuming and done:
            writer.truncate_after(done)
            writer.event("resumed", step=done)
            say(f"resumed from step {done} of {config.train.num_steps}")
        say(describe(config, layout, text, batches))

        def save(state: TrainState, done: int) -> None:
            checkpoints.save(done, state, {"data": batches.state(done)})

        remaining = config.train.num_steps - done
        if remaining > 0:
            compiled = compile_step(step, state, batches.device_batch(done, rows))
            with (
                batches.prefetch(done, remaining, sharding=rows) as stream,
                Progress(config.train.num_steps, start=done) as progress,
            ):
                state = train(
                    state, compiled, stream, config.train.num_steps, fit_intervals(config),
                    writer=writer, progress=progress, evaluate=evaluate, save=save,
                )  # fmt: skip
    checkpoints.close()
    summarize(config, workdir, state, text, tokenizer)


def claim_workdir(config: Pretrain, workdir: pathlib.Path) -> bool:
    """Check that the run begun here, if any, is this one. True if there is one.

    Raises:
      ConfigError: the folder holds a run with another configuration; every difference is named.
    """
    path = workdir / "config.json"
    if not any((workdir / name).exists() for name in ("metrics.jsonl", "checkpoints")):
        return False
    if not path.exists():
        raise ConfigError(
            f"{workdir} holds metrics or checkpoints but no config.json, so it is not known "
            "whose they are; give another --workdir"
        )
    changed = config_lib.difference(json.loads(path.read_text()), config)
    other = [line for line in changed if not line.startswith(MAY_CHANGE)]
    if other:
        raise ConfigError(
            f"{workdir} holds another run: {'; '.join(other[:8])}. Give another --workdir, "
            "or the configuration it began with"
        )
    return True


def make_layout(config: Pretrain) -> Layout:
    """Mesh and rules, with every size they must divide checked before anything is computed."""
    mesh = make_mesh(config.mesh)
    rules = make_rules(config.sharding.zero, config.sharding.sequence_parallel)
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
    if t.sequence_length > config.model.max_length:
        raise ValueError(
            f"train.sequence_length={t.sequence_length} is beyond model.max_length="
            f"{config.model.max_length}; shorten the rows or raise the model's length"
        )
    return Layout(mesh, rules)


def build_corpus(config: Pretrain, workdir: pathlib.Path) -> local_text.LocalText:
    """Tokenizer and data set, made the first time."""
    data = config.data
    directory = pathlib.Path(data.directory).expanduser() if data.directory else workdir / "data"
    return local_text.build(
        directory,
        data.files.replace(",", " ").split() or None,
        vocab_size=config.model.vocab_size,
        max_bytes=int(data.max_megabytes * 1e6) or None,
        held_out=data.held_out,
    )


def check_vocabulary(config: Pretrain, vocab_size: int, directory: pathlib.Path) -> None:
    """Raises ConfigError unless model and tokenizer agree."""
    if vocab_size != config.model.vocab_size:
        raise ConfigError(
            f"model.vocab_size={config.model.vocab_size}, but the tokenizer in {directory} has "
            f"{vocab_size}; set --config.model.vocab_size={vocab_size}, or another data.directory"
        )


def make_schedule(config: Pretrain) -> Any:
    """The learning rate as a function of the step."""
    rate = config.learning_rate
    with input_errors():
        return Schedule(
            rate.decay, rate.peak, min(rate.warmup_steps, config.train.num_steps // 2),
            config.train.num_steps, rate.final_fraction, rate.decay_fraction,
        )  # fmt: skip


def named_attention(config: Pretrain) -> Any:
    """The attention implementation asked for; None for the default.

    Raises:
      ConfigError: there is none of that name.
    """
    name = config.train.attention
    if name is None:
        return None
    if name not in IMPLEMENTATIONS:
        raise ConfigError(
            f"train.attention={name!r} is unknown; use {', '.join(IMPLEMENTATIONS)}, or none"
        )
    return functools.partial(attention, implementation=name)


def restore(checkpoints: Checkpoints, like: TrainState, batches: Batches) -> TrainState | None:
    """The last checkpoint, laid out like `like`; None where there is none."""
    last = checkpoints.latest()
    if last is None:
        return None
    with input_errors():
        batches.check(checkpoints.metadata(last)["data"])
        return checkpoints.restore(last, like)


def make_evaluation(eval_step: Any, held_out: HeldOut, rows: Any) -> Any:
    """state -> held-out loss in nats a token, and bits per byte of text."""

    def evaluate(state: TrainState) -> dict[str, float]:
        terms = [
            eval_step(state.params, held_out.device_batch(i, rows))["loss"]
            for i in range(len(held_out))
        ]
        nats = math.fsum(float(term.sum) for term in terms)
        return {
            "held_out_loss": nats / held_out.num_pairs,
            "held_out_bits_per_byte": nats / math.log(2) / held_out.num_bytes,
        }

    return evaluate


def compile_step(step: Any, state: TrainState, batch: Any) -> Any:
    """The step, compiled before the clock of the first one starts."""
    before = time.perf_counter()
    compiled = step.lower(state, batch).compile()
    say(f"compiled the step in {time.perf_counter() - before:.1f} s")
    return compiled


def fit_intervals(config: Pretrain) -> Intervals:
    """The intervals, shortened for a short run: 20 rows and 10 checkpoints at least."""
    num_steps, every = config.train.num_steps, config.intervals
    return dataclasses.replace(
        every,
        log=min(every.log, max(1, num_steps // 20)),
        save=min(every.save, max(1, num_steps // 10)),
    )


def describe(config: Pretrain, layout: Layout, text: local_text.LocalText, batches: Batches) -> str:
    """What is about to happen, in three lines."""
    t = config.train
    devices = layout.mesh.devices.flat
    axes = " x ".join(f"{axis}={n}" for axis, n in layout.mesh.shape.items() if n > 1)
    tokens = t.num_steps * t.batch_size * batches.pairs_per_row
    return "\n".join(
        [
            f"model: {num_params(config.model):,} weights, {config.model.num_layers} layers, "
            f"vocabulary {config.model.vocab_size:,}",
            f"data: {text.directory}, {batches.num_rows:,} rows of {t.sequence_length} tokens; "
            f"{tokens:,.0f} tokens in {t.num_steps} steps, "
            f"{batches.epochs(t.num_steps)[0]:.2f} epochs",
            f"devices: {len(devices)} x {devices[0].device_kind}"
            + (f", mesh {axes}, ZeRO-{config.sharding.zero}" if axes else ""),
        ]
    )


if __name__ == "__main__":
    config_lib.run(main, {"quicktest": configs.quicktest, "demo": configs.demo})

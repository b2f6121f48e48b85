"""Configurations of `experiments.pretrain`.

Each is a function returning a frozen dataclass; a new one replaces fields of the nearest.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

from data_pipelines.documents import DataSource, ValidationSet
from lm.model import Attention, FeedForward, Layer, ModelConfig, Norm, Rope, Stack
from lm.run.loop import Intervals, Rewind
from lm.sharding import MeshShape, Sharding
from lm.train.ema import Ema
from lm.train.optimizers import Adafactor, AdamW, Lion, Muon, Soap
from lm.train.stability import Stability


@dataclasses.dataclass(frozen=True)
class Data:
    """The corpus.

    Attributes:
      files: glob patterns of UTF-8 text files, separated by commas or blanks; none for the
        documentation, docstrings and source that come with Python and its packages.
      sources: instead of `files`: named sources, with weights and caps.
      validation: named held-out sets, beside the held-out part of every source.
      tokenizer: a SentencePiece model to use; none to train one.
      directory: where tokenizer and data set are, or are made; none for `<workdir>/data`.
      max_megabytes: of text, about; 0 for all of `files`.
      held_out: share of the documents kept for evaluation.
      max_held_out_tokens: of them, evaluated during training.
      seed: of the data's order.
    """

    files: str = ""
    sources: tuple[DataSource, ...] = ()
    validation: tuple[ValidationSet, ...] = ()
    tokenizer: str = ""
    directory: str = ""
    max_megabytes: float = 30.0
    held_out: float = 0.05
    max_held_out_tokens: int = 100_000
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class LearningRate:
    """Linear warm-up to `peak`, then a decay to `final_fraction` of it at the last step.

    Attributes:
      decay: the kind of `lm.train.schedules.Schedule`.
      decay_fraction: of the steps, for the cool-down of "wsd" and "inverse_sqrt".
      cooldown: its shape.
      time_scale: of "inverse_sqrt", in steps.
    """

    peak: float = 1e-3
    warmup_steps: int = 20
    decay: Literal["cosine", "linear", "wsd", "inverse_sqrt", "constant"] = "cosine"
    final_fraction: float = 0.1
    decay_fraction: float = 0.2
    cooldown: Literal["linear", "1-sqrt"] = "linear"
    time_scale: float = 10_000.0


@dataclasses.dataclass(frozen=True)
class Ramp:
    """A batch size that grows to `train.batch_size` in equal steps.

    Attributes:
      first: rows of a step at the beginning.
      num_stages: sizes on the way, both ends included; each is compiled for.
      num_steps: after which `train.batch_size` is reached.
    """

    first: int = 8
    num_stages: int = 4
    num_steps: int = 100


@dataclasses.dataclass(frozen=True)
class Train:
    """The run.

    Attributes:
      num_steps: of the optimizer.
      batch_size: rows of a step, over all devices and micro-batches.
      ramp: smaller batches at the beginning; none for none.
      sequence_length: tokens of a row.
      num_micro_batches: a step's rows are taken in this many parts.
      dtype: of compute; weights and their updates are float32.
      remat: what the backward pass computes again: none, full, matmuls, or save:NAME,...
      attention: implementation; none for the default.
      unroll: write the layers out instead of looping over them: faster on CPU, slow to compile.
      z_loss: coefficient of the squared log-sum-exp of the logits.
      max_grad_norm: gradients are scaled down to this norm.
      peak_tflops: of a device, for MFU where the chip is not known; 0 for the table's figure.
      seed: of the initial weights.
    """

    num_steps: int = 300
    batch_size: int = 16
    ramp: Ramp | None = None
    sequence_length: int = 256
    num_micro_batches: int = 1
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    remat: str = "none"
    attention: str | None = None
    unroll: bool = False
    z_loss: float = 0.0
    max_grad_norm: float = 1.0
    peak_tflops: float = 0.0
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class Checkpointing:
    """Checkpoints beyond those that `intervals.save` asks for, and how long they stay.

    Attributes:
      keep: the last so many; none for all.
      keep_every: one of a step divisible by this stays for ever; none for no such step.
      save_minutes: one also where the last is this old; none for never.
      local: folder on each host's own disk for more frequent ones; none for no such.
      local_steps: how often, in steps.
      keep_local: how many of those.
    """

    keep: int | None = None
    keep_every: int | None = None
    save_minutes: float | None = None
    local: str = ""
    local_steps: int = 10
    keep_local: int = 2


@dataclasses.dataclass(frozen=True)
class Sampling:
    """What the model is asked to go on with at the end."""

    prompts: tuple[str, ...] = ("def main(argv):\n", "Return the number of ", "The most important ")
    max_new_tokens: int = 96
    temperature: float = 0.8


@dataclasses.dataclass(frozen=True)
class Pretrain:
    """A pre-training run."""

    model: ModelConfig
    data: Data = Data()
    mesh: MeshShape = MeshShape(fsdp=-1)
    sharding: Sharding = Sharding()
    optimizer: AdamW | Muon | Adafactor | Lion | Soap = AdamW()
    learning_rate: LearningRate = LearningRate()
    train: Train = Train()
    stability: Stability | None = Stability()
    rewind: Rewind | None = Rewind()
    ema: Ema | None = None
    checkpoints: Checkpointing = Checkpointing()
    intervals: Intervals = Intervals()
    sampling: Sampling = Sampling()


def llama(
    vocab_size: int, embed_dim: int, num_layers: int, num_heads: int, num_kv_heads: int,
    hidden_dim: int, max_length: int = 1024,
) -> ModelConfig:  # fmt: skip
    """A small Llama-style decoder with a tied output."""
    attention = Attention(num_heads, num_kv_heads, embed_dim // num_heads, rope=Rope(10_000.0))
    layer = Layer(attention, FeedForward(hidden_dim), Norm(eps=1e-5))
    return ModelConfig(
        vocab_size, embed_dim, (Stack((layer,), num_layers),), tied=True, max_length=max_length
    )


def quicktest() -> Pretrain:
    """One to two minutes on two cores: about a million weights, 6 MB of local text.

    Command: python -m experiments.pretrain --config=quicktest --workdir=runs/quicktest
    """
    return Pretrain(
        model=llama(2048, 128, 4, 4, 2, 384, max_length=256),
        data=Data(max_megabytes=6.0),
        optimizer=Muon(),
        train=Train(num_steps=400, batch_size=16, sequence_length=128, unroll=True),
        learning_rate=LearningRate(peak=1e-2, warmup_steps=20),
        intervals=Intervals(log=10, evaluate=100, save=40),
    )


def demo() -> Pretrain:
    """Under six minutes on two cores: what `make demo` runs.

    Command: python -m experiments.pretrain --config=demo --workdir=runs/demo
    """
    return dataclasses.replace(
        quicktest(),
        model=llama(4096, 192, 5, 6, 3, 512, max_length=512),
        data=Data(max_megabytes=20.0),
        train=Train(num_steps=340, batch_size=16, sequence_length=256, unroll=True),
        learning_rate=LearningRate(peak=1e-2, warmup_steps=20),
        intervals=Intervals(log=10, evaluate=90, save=36),
    )


def twenty_minutes() -> Pretrain:
    """Twenty minutes on two cores: the demo's model and corpus, for longer, with an average.

    Command: python -m experiments.pretrain --config=twenty_minutes --workdir=runs/twenty_minutes
    """
    return dataclasses.replace(
        demo(),
        train=Train(num_steps=1400, batch_size=16, sequence_length=256, unroll=True),
        learning_rate=LearningRate(
            peak=1e-2, warmup_steps=50, decay="wsd", decay_fraction=0.4, final_fraction=0.0,
            cooldown="1-sqrt",
        ),
        intervals=Intervals(log=10, evaluate=200, save=100),
        ema=Ema(0.99),
    )  # fmt: skip

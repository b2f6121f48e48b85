"""Groups of configuration keys that training programs share.

`may_change` marks what may differ when a run is started again; all else is the run's for good.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

from data_pipelines.documents import DataSource, ValidationSet
from lm.config.changes import may_change
from lm.config.fields import (
    BelowOne,
    Checked,
    Count,
    Fraction,
    NonNegative,
    Positive,
    Seed,
    Several,
    Whole,
)  # fmt: skip
from lm.kernels.attention import Implementation
from lm.model.remat import Remat
from lm.run.loop import Intervals, Rewind
from lm.run.saving import Checkpointing
from lm.sharding import MeshShape, Sharding
from lm.train.ema import Ema
from lm.train.optimizers import Adafactor, AdamW, Lion, Muon, Soap
from lm.train.schedules import Cooldown, Kind, Schedule
from lm.train.stability import Stability

OWN_TOKENS = "the run goes on with the tokens that it began with"
NEW_SCHEDULE = "the learning-rate schedule changes with it, from the step that follows"


@dataclasses.dataclass(frozen=True)
class Data(Checked):
    """The corpus.

    Attributes:
      files: names or glob patterns of UTF-8 text files, separated by commas or blanks, or as a JSON
        list; none for the documentation, docstrings and source that come with Python and its
        packages.
      sources: instead of `files`: named sources, with weights and caps.
      validation: named held-out sets, beside the held-out part of every source.
      tokenizer: a SentencePiece model to use; none to train one.
      directory: where tokenizer and dataset are, or are made; none for `<workdir>/data`.
      max_megabytes: of text, about; 0 for all of `files`.
      held_out: share of the documents kept for evaluation; 0 for none.
      max_held_out_tokens: of them, evaluated during training.
      seed: of the data's order.
    """

    files: str = may_change("", OWN_TOKENS)
    sources: tuple[DataSource, ...] = may_change((), new_statistics=True)
    validation: tuple[ValidationSet, ...] = may_change((), OWN_TOKENS)
    tokenizer: str = may_change("", OWN_TOKENS)
    directory: str = may_change("")
    max_megabytes: NonNegative = 30.0
    held_out: BelowOne = 0.05
    max_held_out_tokens: Count = 100_000
    seed: Seed = 0


@dataclasses.dataclass(frozen=True)
class LearningRate(Checked):
    """Linear warm-up to `peak`, then a decay to `final_fraction` of it at the last step.

    Attributes:
      decay: the kind of `lm.train.schedules.Schedule`.
      decay_fraction: of the steps, for the cool-down of "wsd" and "inverse_sqrt".
      cooldown: its shape.
      time_scale: of "inverse_sqrt", in steps.
    """

    peak: NonNegative = 1e-3
    warmup_steps: Whole = 20
    decay: Kind = "cosine"
    final_fraction: Fraction = 0.1
    decay_fraction: Fraction = 0.2
    cooldown: Cooldown = "linear"
    time_scale: Positive = 10_000.0

    def schedule(self, num_steps: int) -> Schedule:
        """The rate of each step of a run of `num_steps`."""
        return Schedule(
            self.decay, self.peak, self.warmup_steps, num_steps,
            self.final_fraction, self.decay_fraction, self.cooldown, self.time_scale,
        )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Ramp(Checked):
    """A batch size that grows to `train.batch_size` in equal steps.

    Attributes:
      first: rows of a step at the beginning.
      num_stages: sizes on the way, both ends included; each is compiled for.
      num_steps: after which `train.batch_size` is reached.
    """

    first: Count = 8
    num_stages: Several = 4
    num_steps: Count = 100


@dataclasses.dataclass(frozen=True)
class Train(Checked):
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
      max_grad_norm: gradients are scaled down to this norm; none or 0 for never.
      peak_tflops: of a device, for MFU where the chip is not known; 0 for the table's figure.
      seed: of the initial weights.
    """

    num_steps: Count = may_change(300, NEW_SCHEDULE)
    batch_size: Count = may_change(16, new_statistics=True)
    ramp: Ramp | None = None
    sequence_length: Count = 256
    num_micro_batches: Count = may_change(1)
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    remat: Remat = may_change("none")
    attention: Implementation | None = may_change(None)
    unroll: bool = may_change(False)
    z_loss: NonNegative = 0.0
    max_grad_norm: NonNegative | None = 1.0
    peak_tflops: NonNegative = may_change(0.0)
    seed: Seed = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Training(Checked):
    """What every training program's configuration has."""

    mesh: MeshShape = may_change(MeshShape(fsdp=-1))
    sharding: Sharding = may_change(Sharding())
    optimizer: AdamW | Muon | Adafactor | Lion | Soap = AdamW()
    learning_rate: LearningRate = LearningRate()
    train: Train = Train()
    stability: Stability | None = Stability()
    rewind: Rewind | None = may_change(Rewind())
    ema: Ema | None = None
    checkpoints: Checkpointing = may_change(Checkpointing())
    intervals: Intervals = may_change(Intervals())


@dataclasses.dataclass(frozen=True)
class Sampling(Checked):
    """What the model is asked to go on with at the end."""

    prompts: tuple[str, ...] = ("def main(argv):\n", "Return the number of ", "The most important ")
    max_new_tokens: Count = 96
    temperature: NonNegative = 0.8

"""Configuration of a question about a machine that is not here."""

from __future__ import annotations

import dataclasses
from typing import Literal

from lm.config.fields import Checked, Count, Positive
from lm.kernels.attention import Implementation
from lm.kernels.cross_entropy import Implementation as Loss
from lm.model import ModelConfig
from lm.model.remat import Remat
from lm.sharding import MeshShape, Sharding
from lm.train.optimizers import Adafactor, AdamW, Lion, Muon, Soap

Name = Literal["train", "prefill", "decode"]


@dataclasses.dataclass(frozen=True)
class Train(Checked):
    """The training step.

    Attributes:
      rows_per_device: rows per step and device; a fraction where a row is split over several.
      sequence_length: tokens per row; None for the model's, at most 8,192.
      num_micro_batches: parts in which a step takes its rows.
      dtype: of compute; weights and their updates are float32.
      remat: see `lm.model.remat`.
      attention: implementation; None for what `lm.kernels.attention` chooses for the platform.
      loss: implementation of the cross-entropy; None chooses by its size.
      packed: rows hold several documents, so that attention masks segments.
    """

    rows_per_device: Positive = 1.0
    sequence_length: Count | None = None
    num_micro_batches: Count = 1
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    remat: Remat = "full"
    attention: Implementation | None = None
    loss: Loss | None = None
    packed: bool = True


@dataclasses.dataclass(frozen=True)
class Serve(Checked):
    """Prefill and decode.

    Attributes:
      rows_per_device: rows at once, per device.
      prompt_length: tokens per prompt; None for half of the cache.
      cache_length: positions of the cache; None for the model's, at most 4,096.
      dtype: of weights, compute and cache.
      zero: 3 also shards the weights over `fsdp`, and gathers them one layer at a time.
    """

    rows_per_device: Positive = 1.0
    prompt_length: Count | None = None
    cache_length: Count | None = None
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    zero: Literal[0, 3] = 0


@dataclasses.dataclass(frozen=True)
class Aot(Checked):
    """A model, how it is sharded, and what it does."""

    model: ModelConfig
    mesh: MeshShape = MeshShape(fsdp=-1)
    sharding: Sharding = Sharding()
    optimizer: AdamW | Muon | Adafactor | Lion | Soap = AdamW()
    train: Train = Train()
    serve: Serve = Serve()

    def of(self, name: Name) -> Train | Serve:
        """Settings of the program."""
        return self.train if name == "train" else self.serve

    @property
    def sequence_length(self) -> int:
        """Tokens of a training row."""
        asked = self.train.sequence_length
        return min(self.model.max_length, 8192) if asked is None else asked

    @property
    def cache_length(self) -> int:
        """Positions of the cache."""
        asked = self.serve.cache_length
        return min(self.model.max_length, 4096) if asked is None else asked

    @property
    def prompt_length(self) -> int:
        """Tokens of a prompt."""
        asked = self.serve.prompt_length
        return self.cache_length // 2 if asked is None else asked

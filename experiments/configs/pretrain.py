"""Configurations of `experiments.pretrain`.

Each is a function returning a frozen dataclass; a new one replaces fields of the nearest.
"""

from __future__ import annotations

import dataclasses

from experiments.configs.common import Data, LearningRate, Sampling, Train, Training
from lm.config.changes import may_change
from lm.model import Attention, FeedForward, Layer, ModelConfig, Norm, Rope, Stack
from lm.run.loop import Intervals
from lm.train.ema import Ema
from lm.train.optimizers import Muon


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pretrain(Training):
    """A pre-training run."""

    model: ModelConfig
    data: Data = Data()
    sampling: Sampling = may_change(Sampling())


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
    """One to two minutes on two cores: about a million parameters, 6 MB of local text.

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

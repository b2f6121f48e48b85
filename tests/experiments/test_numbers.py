"""Every number of every configuration has a range, and what is out of it is refused at once."""

from __future__ import annotations

import dataclasses
import json
import typing
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from experiments import pretrain as pretrain_program
from experiments.configs import aot, pretrain, sft
from experiments.configs.common import LearningRate
from experiments.configs.pretrain import Pretrain
from experiments.configs.sft import Sft
from lm.aot.question import Aot
from lm.config import codec, fields, sweep
from lm.config import command_line as config_lib
from lm.config.command_line import ConfigError
from lm.run.trainer import slips
from tests.refuses import refuses

CLASSES = (Pretrain, Sft, Aot)
PROGRAMS = {
    "pretrain": pretrain_program.CONFIGS,
    "sft": {"quicktest": sft.quicktest, "full": sft.full, "lora": sft.lora},
    "aot": aot.CONFIGS,
}


def groups(annotation: Any, seen: set[type]) -> Iterator[type]:
    """Every dataclass that a value of the annotation may hold."""
    for member in fields.members(annotation):
        if fields.is_dataclass(member) and member not in seen:
            seen.add(member)
            yield member
            for each in fields.hints(member).values():
                yield from groups(each, seen)
        for argument in typing.get_args(member):
            yield from groups(argument, seen)


GROUPS = sorted(groups(CLASSES[0] | CLASSES[1] | CLASSES[2], set()), key=lambda cls: cls.__name__)


def has_plain_number(annotation: Any) -> bool:
    """Whether a number stands in the annotation without a rule."""
    if typing.get_origin(annotation) in (typing.Annotated, typing.Literal):
        return False
    return annotation in (int, float) or any(map(has_plain_number, typing.get_args(annotation)))


def test_every_number_of_every_group_has_a_range() -> None:
    assert len(GROUPS) > 30
    for cls in GROUPS:
        assert issubclass(cls, fields.Checked), f"{cls} is not checked when it is made"
        for name, annotation in fields.hints(cls).items():
            assert not has_plain_number(annotation), f"{cls.__name__}.{name} has no range"


@pytest.mark.parametrize("program", PROGRAMS)
def test_every_configuration_there_is_is_in_range(program: str) -> None:
    for name, make in PROGRAMS[program].items():
        config = make()
        assert codec.from_dict(codec.to_dict(config), type(config)) == config, name


def keys(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys of the numbers in a configuration."""
    if dataclasses.is_dataclass(value):
        for name in fields.hints(type(value)):
            yield from keys(getattr(value, name), f"{path}.{name}" if path else name)
    elif isinstance(value, tuple):
        for i, item in enumerate(value):
            yield from keys(item, f"{path}.{i}")
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield path, value


SMALL = dataclasses.replace(pretrain.quicktest(), model=pretrain.llama(64, 32, 1, 4, 2, 64))
BAD = ["nan", "-inf", "1e400", "-99", "99999999999999999999x", "true", "0x1g", ""]


@pytest.mark.parametrize("text", BAD)
def test_no_number_takes_this(text: str) -> None:
    for key, _ in keys(SMALL):
        refuses(lambda k=key: config_lib.override(SMALL, {k: text}), key, error=ConfigError)


OTHER = [
    ("train.max_grad_norm", "-1"), ("checkpoints.keep", "-1"), ("checkpoints.keep", "0"),
    ("checkpoints.keep_every", "0"), ("checkpoints.save_minutes", "0"), ("train.num_steps", "0"),
    ("optimizer.adam.b2", "1.0"), ("optimizer.adam.b2", "0.999999999"),
    ("optimizer.adam.eps", "0"), ("train.remat", "ful"), ("train.remat", "save:que"),
    ("train.seed", "4294967296"), ("train.attention", "fast"), ("train.ramp.first", "0"),
    ("train.ramp.num_stages", "1"), ("model.stacks.0.num_repeats", "0"), ("model.embed_dim", "0"),
    ("model.stacks", ""), ("data.max_held_out_tokens", "0"), ("data.held_out", "1"),
    ("ema.decay", "1"), ("mesh.tensor", "0"), ("mesh.data", "-2"), ("stability.window", "1"),
    ("rewind.learning_rate", "0"), ("learning_rate.decay", "cosin"), ("optimizer.dtype", "int8"),
    ("model.stacks.0.pattern.0.attention.window", "0"), ("intervals.log", "0"),
]  # fmt: skip


@pytest.mark.parametrize(("key", "text"), OTHER)
def test_out_of_range(key: str, text: str) -> None:
    refuses(lambda: config_lib.override(SMALL, {key: text}), f"config.{key}", error=ConfigError)
    values = sweep.parse(f"{key}={text}") if text else ({key: text},)
    refuses(lambda: sweep.named_runs(SMALL, values), f"config.{key}", error=ConfigError)


OPTIMIZERS = {
    "AdamW": ["b1=1", "b2=nan", "eps=-1", "weight_decay=-0.1"],
    "Lion": ["b1=1", "b2=-1", "weight_decay=inf"],
    "Muon": ["momentum=1", "steps=0", "weight_decay=-1", "adam.b1=1"],
    "Soap": ["b1=1", "stats_decay=1", "frequency=0", "max_precond_dim=-1", "eps=0", "adam.eps=0"],
    "Adafactor": ["decay_rate=-1", "clip_threshold=0", "momentum=1", "min_scale=-1", "eps=0"],
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers(name: str) -> None:
    for edit in OPTIMIZERS[name]:
        key, _, text = edit.partition("=")
        edits = {"optimizer": name, f"optimizer.{key}": text}
        refuses(
            lambda e=edits: config_lib.override(SMALL, e), f"optimizer.{key}", error=ConfigError
        )


def test_legitimate_values_are_still_taken() -> None:
    edits = {
        "train.max_grad_norm": "none", "checkpoints.keep": "3", "mesh.fsdp": "-1",
        "optimizer.weight_decay": "0", "train.seed": "4294967295", "train.z_loss": "1e-4",
        "data.held_out": "0", "data.max_megabytes": "0", "train.remat": "save:up+offload:input",
        "rewind": "none", "stability": "none", "train.num_steps": "1_0", "train.batch_size": "1e3",
    }  # fmt: skip
    config = config_lib.override(SMALL, edits)
    assert codec.from_dict(json.loads(json.dumps(codec.to_dict(config))), Pretrain) == config


def test_slips_are_said() -> None:
    def said(max_grad_norm: float | None, warmup_steps: int) -> list[str]:
        schedule = LearningRate(warmup_steps=warmup_steps).schedule(100)
        run = SimpleNamespace(max_grad_norm=max_grad_norm, schedule=schedule, num_steps=100)
        return slips(run)  # pyright: ignore[reportArgumentType]

    assert said(1.0, 50) == []
    assert ["not clipped" in line for line in said(None, 0)] == [True]
    assert ["warmup_steps=51" in line for line in said(1.0, 51)] == [True]


def test_samples_that_leave_no_room_for_a_prompt(tmp_path) -> None:
    edits = {"sampling.max_new_tokens": "64", "model.max_length": "64"}
    config = config_lib.override(SMALL, edits)
    words = "sampling.max_new_tokens=64", "model.max_length=64", "at most 63"
    refuses(lambda: pretrain_program.main(config, tmp_path / "run"), *words, error=ConfigError)
    assert not (tmp_path / "run").exists()

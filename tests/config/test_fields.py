"""Values fit the annotations of their fields, as text, in JSON, and made in Python."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Literal

import numpy as np
import pytest
from absl import flags

from lm.config import codec, fields, program
from lm.config import command_line as config_lib
from lm.config.command_line import ConfigError
from lm.config.fields import (
    BelowOne,
    Checked,
    Count,
    FieldError,
    Fraction,
    NonNegative,
    Positive,
    PositiveFraction,
    Seed,
    Several,
    Whole,
)
from tests.refuses import refuses


@dataclasses.dataclass(frozen=True)
class Rates(Checked):
    peak: Positive = 1e-3
    decay: BelowOne | None = None
    plain: float = 0.0
    factors: tuple[Positive, ...] = ()


@dataclasses.dataclass(frozen=True)
class Settings(Checked):
    steps: Count = 1
    axis: Literal[-1] | Count = 1
    seed: Seed = 0
    rates: Rates = Rates()
    stages: tuple[Rates, ...] = (Rates(),)


HUGE = "9" * 5000
NOT_INTS = ["", "true", "0x10", "1.5", "1e400", "nan", "inf", HUGE, "-"]
TEXTS = {  # annotation: (texts it takes, texts it refuses)
    Count: (["1", "1_000", "1e3", "+5", "2147483647"], ["0", "-1", "2147483648", *NOT_INTS]),
    Whole: (["0", "-0"], ["-1", *NOT_INTS]),
    Several: (["2"], ["1", *NOT_INTS]),
    Seed: (["0", "4294967295"], ["-1", "4294967296", "99999999999999999999", *NOT_INTS]),
    Positive: (["1e-30", "3"], ["0", "-0.0", "-1", "1e-50", "1e39", "1e400", "nan", "inf", ""]),
    NonNegative: (["0", "-0.0", "1e38"], ["-1e-9", "1e39", "-inf", "nan", "true", HUGE]),
    Fraction: (["0", "1"], ["-0.1", "1.1", "nan"]),
    PositiveFraction: (["1e-3", "1"], ["0", "1.1", "nan"]),
    # In float32 the last of these is 1, and an average with that decay never moves.
    BelowOne: (["0", "0.999999"], ["1", "-0.1", "nan", "0.999999999"]),
    float: (["-1", "0"], ["nan", "-inf", "1e39", "0x10", "1,5"]),
    Count | None: (["none", "7"], ["0", "nope"]),
    Literal[-1] | Count: (["-1", "8"], ["0", "-2"]),
    tuple[Positive, ...]: (["", "1,2"], ["1,nan", "1,,2", "0"]),
}


@pytest.mark.parametrize("annotation", TEXTS, ids=fields.type_name)
def test_texts(annotation):
    good, bad = TEXTS[annotation]
    for text in good:
        assert fields.fits(fields.parse(text, annotation), annotation)
    for text in bad:
        error = refuses(lambda text=text: fields.parse(text, annotation), "is not ")
        assert fields.expected(annotation) in str(error) and len(str(error)) < 250


WRONG = {  # the dotted key that is named: values by JSON's types
    "steps": [0, -5, True, 1.0, 10**30, "5", None],
    "axis": [0, -2],
    "seed": [2**64],
    "rates.peak": [0, math.nan, math.inf, "NaN", True, 10**400],
    "rates.decay": [1, -0.1],
    "rates.plain": [math.nan, "Infinity"],
    "rates.factors": [[1.0, 0.0], [math.nan]],
    "stages.1.decay": [2],
}


def edited(key, value):
    """JSON of settings with one value changed."""
    values = codec.to_dict(Settings(stages=(Rates(), Rates())))
    *above, last = key.split(".")
    node = values
    for part in above:
        node = node[int(part)] if isinstance(node, list) else node[part]
    node[last] = value
    return json.dumps(values)


@pytest.mark.parametrize("key", WRONG)
def test_files_edited_by_hand(tmp_path, key):
    path = tmp_path / "config.json"
    for value in WRONG[key]:
        path.write_text(edited(key, value))
        load = lambda: codec.load(path, Settings)  # noqa: E731
        refuses(load, str(path), f"config.{key}", "is not ", error=ConfigError)
    path.write_text(edited("rates.peak", 1e-3).replace("0.001", "1e400"))
    refuses(lambda: codec.load(path, Settings), "config.rates.peak=inf", error=ConfigError)


def test_the_command_line_names_key_range_and_an_example():
    parse = lambda flag: config_lib.parse(["p", flag], {"base": Settings}, "base")  # noqa: E731
    words = "config.steps: '0' is not an int in [1, 2147483647]; for example --config.steps=1"
    refuses(lambda: parse("--config.steps=0"), words, error=ConfigError)
    assert parse("--config.axis=-1")[0].axis == -1
    refuses(lambda: parse("--config.stages.0.decay=1"), "config.stages.0.decay", error=ConfigError)


def test_configurations_of_functions():
    """A bad default, or a bad argument of `--config=NAME:ARGUMENT`, is a mistake of the input."""

    def sized(steps: Count) -> Settings:
        return Settings(steps)

    configs = {"bad": lambda: Settings(steps=0), "sized": sized}
    sized.__annotations__["steps"] = Count  # a name that only this test has
    for spec in ("bad", "sized:0", "sized:nan", "sized:0x10", "sized:"):
        refuses(
            lambda s=spec: config_lib.choose(configs, s), f"--config={spec}: ", error=ConfigError
        )
    assert config_lib.choose(configs, "sized:1e3") == Settings(1000)


def test_made_in_python():
    for make in (lambda: Settings(steps=0), lambda: Settings(steps="5"), lambda: Rates(math.nan)):
        refuses(make, " is not ", error=FieldError)
    refuses(lambda: dataclasses.replace(Rates(), factors=(0.0,)), "factors=", error=FieldError)
    same = Settings(np.int64(3), -1, rates=Rates(np.float32(0.5), factors=(1, 2.0)))
    assert same == Settings(3, -1, rates=Rates(0.5, factors=(1, 2)))


@pytest.mark.parametrize("text", ["nan", "-1", "", "1e400", "true", "0x10"])
def test_flags(text):
    values = flags.FlagValues()
    flags.DEFINE(program.Number(NonNegative), "rate", 0.5, "A rate.", flag_values=values)
    assert values(["p"]) == ["p"] and values.rate == 0.5
    refuses(lambda: values(["p", f"--rate={text}"]), "--rate", "of at least 0", error=flags.Error)

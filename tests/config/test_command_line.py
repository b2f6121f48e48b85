"""The command line edits what it names and nothing else; mistakes get one clear message."""

from __future__ import annotations

import dataclasses
import enum
import json
import math
import pathlib
import subprocess
import sys
import types
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lm.config import codec
from lm.config import command_line as config_lib
from lm.config.command_line import ConfigError
from tests.refuses import refuses

ROOT = pathlib.Path(__file__).parents[2]


class Remat(enum.Enum):
    NONE = "none"
    FULL = "full"


@dataclasses.dataclass(frozen=True)
class Moe:
    num_experts: int = 8
    top_k: int = 2

    def __post_init__(self):
        if self.top_k > self.num_experts:
            raise ValueError(f"top_k={self.top_k} exceeds num_experts={self.num_experts}")


@dataclasses.dataclass(frozen=True)
class Stack:
    num_repeats: int
    moe: Moe | None = None


@dataclasses.dataclass(frozen=True)
class Model:
    stacks: tuple[Stack, ...] = (Stack(2), Stack(4))
    rope: Literal["plain", "yarn"] = "plain"
    window: int | None = None
    remat: Remat = Remat.NONE


@dataclasses.dataclass(frozen=True)
class AdamW:
    learning_rate: float = 3e-4
    betas: tuple[float, float] = (0.9, 0.95)


@dataclasses.dataclass(frozen=True)
class Muon(AdamW):
    pass


@dataclasses.dataclass(frozen=True)
class Config:
    model: Model = dataclasses.field(default_factory=Model)
    optimizer: AdamW | Muon = dataclasses.field(default_factory=AdamW)
    num_steps: int = 100
    shuffle: bool = True
    name: str = "run"
    shape: tuple[int, ...] = (1, 2)


def small() -> Config:
    """The default."""
    return Config()


def sized(num_steps: int) -> Config:
    return Config(num_steps=num_steps)


CONFIGS = {"small": small, "sized": sized}


def edited(*flags: str) -> Config:
    config, rest = config_lib.parse(["program", "--config=small", *flags], CONFIGS)
    assert rest == ["program"]
    return config


def replaced(config, keys, value):
    head, *tail = keys
    value = replaced(getattr(config, head), tail, value) if tail else value
    return dataclasses.replace(config, **{head: value})


@pytest.mark.parametrize(
    ("flag", "path", "value"),
    [
        ("num_steps=1_000", "num_steps", 1000),
        ("num_steps=2e3", "num_steps", 2000),
        ("num_steps=-3", "num_steps", -3),
        ("shuffle=false", "shuffle", False),
        ("shuffle=True", "shuffle", True),
        ("name=a=b c", "name", "a=b c"),
        ("name=", "name", ""),
        ("shape=4,5,6", "shape", (4, 5, 6)),
        ("shape=7", "shape", (7,)),
        ("shape=(7,)", "shape", (7,)),
        ("shape=", "shape", ()),
        ("shape.1=9", "shape", (1, 9)),
        ("model.window=128", "model.window", 128),
        ("model.window=None", "model.window", None),
        ("model.rope=yarn", "model.rope", "yarn"),
        ("model.remat=FULL", "model.remat", Remat.FULL),
        ("model.remat=full", "model.remat", Remat.FULL),
        ("optimizer.learning_rate=1e-3", "optimizer.learning_rate", 1e-3),
        ("optimizer.learning_rate=1", "optimizer.learning_rate", 1.0),
        ("optimizer.betas=0.8,0.99", "optimizer.betas", (0.8, 0.99)),
        ("model.stacks.1.num_repeats=7", "model.stacks", (Stack(2), Stack(7))),
        ("model.stacks.0.moe.top_k=1", "model.stacks", (Stack(2, Moe(top_k=1)), Stack(4))),
    ],
)
@pytest.mark.parametrize("separate", [False, True])
def test_flag_changes_exactly_its_field(flag, path, value, separate):
    text = f"--config.{flag}"
    config = edited(*text.split("=", 1)) if separate else edited(text)
    expected = replaced(small(), path.split("."), value)
    assert config == expected
    assert repr(config) == repr(expected)  # 1 and 1.0, which compare equal, stay apart


def test_edits_of_one_dataclass_are_applied_together():
    # Each of these alone breaks Moe's own check.
    base = edited("--config.model.stacks.0.moe.num_experts=8")
    edits = {"model.stacks.0.moe.num_experts": "64", "model.stacks.0.moe.top_k": "16"}
    assert config_lib.override(base, edits).model.stacks[0].moe == Moe(64, 16)


@pytest.mark.parametrize(
    ("flag", "words"),
    [
        ("--config.num_step=3", ["config.num_step;", "did you mean config.num_steps?", "shuffle"]),
        ("--config.learning_rate=3", ["did you mean config.optimizer.learning_rate?"]),
        ("--config.zzz=1", ["config.zzz", "the keys of config are model, optimizer"]),
        ("--config.num_steps=1.5", ["config.num_steps", "'1.5'", "an int", "config.num_steps=100"]),
        ("--config.num_steps=1e999999999", ["an int"]),
        ("--config.shuffle=maybe", ["'maybe'", "true or false", "--config.shuffle=true"]),
        ("--config.model.rope=linear", ["'linear'", "one of plain, yarn"]),
        ("--config.model.remat=half", ["'half'", "one of NONE, FULL"]),
        ("--config.model.window=x", ["'x'", "an int or None", "--config.model.window=8"]),
        ("--config.optimizer.betas=0.9", ["tuple[float, float]", "--config.optimizer.betas=0.9,"]),
        ("--config.optimizer=Lion", ["group of keys"]),
        ("--config.model=x", ["group of keys", "--config.model.stacks=VALUE", "rope"]),
        ("--config.model.stacks.2.num_repeats=1", ["no index '2'", "from 0 to 1"]),
        ("--config.num_steps.x=1", ["config.num_steps is '100'", "no key 'x'"]),
        ("--config.model.window.x=1", ["config.model.window is None"]),
        ("--config.num_steps", ["--config.num_steps needs a value"]),
        ("--config.model.stacks.0.moe.top_k=16", ["top_k=16 exceeds num_experts=8", "moe.top_k"]),
        ("--config=smal", ["--config=smal", "did you mean small?", "small, sized"]),
        ("--config=small:3", ["takes no argument"]),
        ("--config=sized", ["--config=sized:NUM_STEPS"]),
        ("--config=sized:x", ["'x' is not an int"]),
    ],
)
def test_mistakes_name_thing_value_and_remedy(flag, words):
    refuses(lambda: edited(flag), *words, error=ConfigError)


def test_choosing():
    assert config_lib.choose(CONFIGS, "sized:7").num_steps == 7
    module = types.ModuleType("some_configs")
    exec("def tiny(): return 1\ndef _hidden(): return 2\nfrom json import loads", module.__dict__)
    assert config_lib.choose(module, "tiny") == 1
    for name in ("_hidden", "loads"):
        refuses(lambda name=name: config_lib.choose(module, name), "the choices are tiny")
    refuses(
        lambda: config_lib.parse(["program"], CONFIGS), "give --config=NAME, one of small, sized"
    )
    assert config_lib.parse(["program"], CONFIGS, default="small")[0] == small()
    argv = ["program", "--workdir=W", "--", "--config.num_steps=3"]
    assert config_lib.parse(argv, CONFIGS, "small") == (small(), argv)


finite = st.floats(allow_nan=False)
configs = st.builds(
    Config,
    model=st.builds(
        Model,
        stacks=st.lists(
            st.builds(Stack, st.integers(), st.none() | st.builds(Moe, st.integers(2, 9))),
            max_size=3,
        ).map(tuple),
        rope=st.sampled_from(["plain", "yarn"]),
        window=st.none() | st.integers(),
        remat=st.sampled_from(Remat),
    ),
    optimizer=st.one_of(st.builds(cls, finite, st.tuples(finite, finite)) for cls in (AdamW, Muon)),
    num_steps=st.integers(),
    shuffle=st.booleans(),
    name=st.text(),
    shape=st.lists(st.integers()).map(tuple),
)


@given(configs)
def test_json_round_trip_is_exact(tmp_path_factory, config):
    path = tmp_path_factory.mktemp("config") / "config.json"
    codec.save(config, path)
    loaded = codec.load(path, Config)
    assert loaded == config
    assert repr(loaded) == repr(config)  # -0.0 and 0, which compare equal, stay apart
    assert codec.difference(config, json.loads(path.read_text())) == []


@given(configs, configs)
def test_difference_is_empty_only_between_equals(a, b):
    assert (codec.difference(a, b) == []) == (a == b)


def test_difference_names_path_old_and_new():
    new = edited(
        "--config.num_steps=5", "--config.shape=3", "--config.model.stacks.1.num_repeats=1"
    )
    assert codec.difference(small(), new) == [
        "model.stacks.1.num_repeats: 4 -> 1",
        "num_steps: 100 -> 5",
        "shape: 1,2 -> 3",
    ]
    muon = dataclasses.replace(small(), optimizer=Muon())
    assert codec.difference(small(), muon) == ["optimizer.class: AdamW -> Muon"]


def test_nan_round_trips(tmp_path):
    optimizer = AdamW(math.nan, (math.inf, -math.inf))
    config = dataclasses.replace(small(), optimizer=optimizer)
    codec.save(config, tmp_path / "config.json")

    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    json.loads((tmp_path / "config.json").read_text(), parse_constant=refuse)
    loaded = codec.load(tmp_path / "config.json", Config)
    assert math.isnan(loaded.optimizer.learning_rate)
    assert loaded.optimizer.betas == (math.inf, -math.inf)
    assert codec.difference(config, loaded) == []


UNFIT = {
    "unknown configuration key config.extra": lambda v: v.update(extra=1),
    "config.model.rope='x' is not one of plain": lambda v: v["model"].update(rope="x"),
    "config.num_steps=True is not an int": lambda v: v.update(num_steps=True),
    "config.num_steps=1.0 is not an int": lambda v: v.update(num_steps=1.0),
    "config.optimizer.class='SGD' is not one of AdamW, Muon": lambda v: v["optimizer"].update(
        {"class": "SGD"}
    ),
    "missing configuration key config.model.stacks.1.num_repeats": lambda v: v["model"]["stacks"][
        1
    ].clear(),
}


@pytest.mark.parametrize("words", UNFIT)
def test_load_names_what_does_not_fit(tmp_path, words):
    values = codec.to_dict(small())
    UNFIT[words](values)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(values))
    refuses(lambda: codec.load(path, Config), words, str(path), error=ConfigError)


def test_a_group_changes_its_class_by_name():
    assert edited("--config.optimizer=Muon").optimizer == Muon()
    both = edited("--config.optimizer.learning_rate=1", "--config.optimizer=Muon").optimizer
    assert both == Muon(learning_rate=1.0)


CONFIG_JSON = """{
 "model": {
  "stacks": [{"num_repeats": 2, "moe": null}, {"num_repeats": 3, "moe": {"num_experts": 4}}],
  "rope": "yarn",
  "remat": "FULL"
 },
 "optimizer": {"class": "Muon", "learning_rate": "Infinity", "betas": [0.5, 1]},
 "shape": []
}"""


def test_a_config_json_of_old_is_read(tmp_path):
    """The format is what files hold; fields younger than the file take their defaults."""
    (tmp_path / "config.json").write_text(CONFIG_JSON)
    model = Model((Stack(2), Stack(3, Moe(4))), "yarn", remat=Remat.FULL)
    expected = Config(model, Muon(math.inf, (0.5, 1)), shape=())
    assert codec.load(tmp_path / "config.json", Config) == expected


def test_load_of_no_file_and_of_no_json(tmp_path):
    refuses(lambda: codec.load(tmp_path / "none.json", Config), "No such file", error=ConfigError)
    (tmp_path / "bad.json").write_text("{")
    refuses(lambda: codec.load(tmp_path / "bad.json", Config), "bad.json", error=ConfigError)


def test_what_json_cannot_hold_is_refused_on_saving(tmp_path):
    config, path = dataclasses.replace(small(), name=b"bytes"), tmp_path / "config.json"
    refuses(lambda: codec.save(config, path), "config.name holds a bytes", error=TypeError)
    assert not path.exists()


PROGRAM = '''"""Counts to num_steps."""
import dataclasses
from lm.config import command_line as config, program

@dataclasses.dataclass(frozen=True)
class Config:
    num_steps: int = 3
    rate: float | None = None

def quick() -> Config:
    """About a second."""
    return Config()

def main(config_, workdir):
    if config_.num_steps > 5:
        with config.input_errors():
            raise ValueError(f"num_steps={config_.num_steps} is too many; use 5 or fewer")
    print("ran", config_, workdir.name)
    return {"not": "an exit status"}

if __name__ == "__main__":
    program.run(main, configs={"quick": quick}, workdir=True)
'''


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    path = tmp_path_factory.mktemp("program") / "count.py"
    path.write_text(PROGRAM)

    def call(*flags):
        return subprocess.run(
            [sys.executable, str(path), *flags],
            capture_output=True,
            text=True,
            timeout=60,
            env={"PYTHONPATH": str(ROOT), "PATH": ""},
        )

    return call


def test_program_runs(program):
    done = program("--config", "quick", "--workdir=W", "--config.num_steps", "4")
    assert (done.returncode, done.stdout) == (0, "ran Config(num_steps=4, rate=None) W\n")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--config.num_stepz=1"], "did you mean config.num_steps?"),
        (["--config.rate=high"], "'high' is not a finite float32 or None"),
        (["--config.num_steps=9"], "error: num_steps=9 is too many; use 5 or fewer"),
        (["extra"], "unexpected argument 'extra'"),
        (["--workdri=W"], "Unknown command line flag 'workdri'. Did you mean: workdir"),
    ],
)
def test_program_reports_mistakes_without_a_traceback(program, flags, message):
    failed = program("--config=quick", "--workdir=W", *flags)
    assert failed.returncode in (1, 2)
    assert message in failed.stderr + failed.stdout
    assert "Traceback" not in failed.stderr


def test_program_needs_a_workdir(program):
    failed = program("--config=quick")
    assert failed.returncode == 2
    assert failed.stderr == "error: no folder for the run; give one with --workdir=FOLDER\n"


def test_help_lists_configurations_keys_types_and_values(program):
    shown = program("--help")
    assert shown.returncode == 0
    for words in ("Counts to num_steps", "--config=quick", "About a second", "--workdir"):
        assert words in shown.stdout
    lines = [line.split() for line in shown.stdout.splitlines()]
    assert ["--config.num_steps=3", "int"] in lines
    assert ["--config.rate=None", "float", "|", "None"] in lines

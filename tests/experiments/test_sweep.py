"""Sweeps: what they compose, how runs are named, and running, skipping and ranking them."""

import dataclasses
import json
import sys

import pytest

from experiments import sweep as sweep_lib
from experiments.configs import pretrain
from lm.config import codec
from lm.config import command_line as config_lib
from lm.config.command_line import ConfigError
from lm.config.sweep import chain, named_runs, param, product, zipped
from lm.train.optimizers import AdamW
from tests.commands import ROOT, apart, command
from tests.refuses import refuses

BASE = pretrain.quicktest()


def configurations(base, sweep):
    return {name: config for name, (config, _) in named_runs(base, sweep).items()}


def test_product_zip_and_chain_compose():
    a, b, c = param("a", 1, 2), param("b", 0.5, 1.5), param("c", True, None)
    assert product(a, b) == (
        {"a": "1", "b": "0.5"}, {"a": "1", "b": "1.5"}, {"a": "2", "b": "0.5"},
        {"a": "2", "b": "1.5"},
    )  # fmt: skip
    assert zipped(a, c) == ({"a": "1", "c": "true"}, {"a": "2", "c": "None"})
    assert len(product(a, zipped(b, c))) == 4 and len(chain(product(a, b), c)) == 6
    assert chain(product(a, b), c)[4:] == c
    assert product() == ({},) and product(a) == zipped(a) == chain(a) == a


@pytest.mark.parametrize(
    ("text", "same"),
    [
        ("a=1,2; b=3,4", product(param("a", 1, 2), param("b", 3, 4))),
        ("a=1,2 & b=3,4; c=5", product(zipped(param("a", 1, 2), param("b", 3, 4)), param("c", 5))),
        ("a=1; b=3,4 | b=5", chain(product(param("a", 1), param("b", 3, 4)), param("b", 5))),
        ("a=(1,2),(3,4) ;b = x y", product(param("a", "(1,2)", "(3,4)"), param("b", "x y"))),
        ("a=()", param("a", "()")),
    ],
)
def test_the_text_says_the_same(text, same):
    assert sweep_lib.parse(text) == same


def test_bad_texts():
    for text, message in (
        ("a=1,2 & b=3,4,5", "cannot pair a, b: they have 2, 3 values"),
        ("a=1; a=2", "a is swept twice at once"),
        ("a=1 & a=2", "a is swept twice at once"),
        ("a=1;", "'' in --sweep is not key=value,value"),
        ("a=", "'a=' in --sweep"),
        ("=3", "'=3' in --sweep"),
    ):
        refuses(lambda text=text: sweep_lib.parse(text), message)


def test_configurations_are_the_base_with_typed_edits():
    sweep = product(param("train.num_steps", "1e2", 200), param("optimizer.weight_decay", 0))
    found = configurations(BASE, sweep)
    assert list(found) == [f"optimizer.weight_decay=0.0,train.num_steps={n}" for n in (100, 200)]
    for (_, config), n in zip(found.items(), (100, 200), strict=True):
        assert config.train == dataclasses.replace(BASE.train, num_steps=n)
        assert type(config.optimizer.weight_decay) is float
        assert config.model == BASE.model
    for base, key, words in (
        (BASE, "train.num_stesp", "did you mean config.train.num_steps"),
        (dataclasses.replace(BASE, optimizer=AdamW()), "optimizer.momentum", "optimizer.momentum"),
    ):
        refuses(lambda b=base, k=key: configurations(b, param(k, 1)), words, error=ConfigError)


def test_names_depend_on_keys_and_values_alone():
    def name(*parts):
        (only,) = configurations(BASE, product(*parts))
        return only

    a, b = param("train.num_steps", 100), param("optimizer.weight_decay", "0.10")
    assert name(a, b) == name(param("optimizer.weight_decay", 0.1), param("train.num_steps", "1e2"))
    assert len(configurations(BASE, chain(a, param("train.num_steps", "1_00")))) == 1
    # A name is one folder, whatever the value.
    odd = [name(param("data.files", f)) for f in ("a/../b*", "a/..?b*", "x" * 300, "x" * 301)]
    assert len(set(odd)) == 4
    assert all("/" not in each and len(each) < 200 for each in odd)
    assert name() == "base"


def test_index_keys_reach_into_tuples():
    ((name, config),) = configurations(BASE, param("model.stacks.0.num_repeats", 2)).items()
    assert name == "model.stacks.0.num_repeats=2" and config.model.num_layers == 2


SCRIPT = """
import json, pathlib, sys
sys.path.insert(0, {root!r})
workdir = pathlib.Path(sys.argv[-1].removeprefix("--workdir="))
starts = workdir / "starts"
starts.write_text(starts.read_text() + "+" if starts.exists() else "+")
steps = int(next(a for a in sys.argv if "num_steps" in a).rpartition("=")[2])
if steps == 3:
    print("it began")
    sys.exit("and broke")
config = json.loads((workdir / "wanted.json").read_text())
(workdir / "config.json").write_text(json.dumps(config))
score = abs(steps - 20) + 1.0
(workdir / "summary.json").write_text(json.dumps({{"held_out": {{"bits_per_byte": score}}}}))
"""


def planned(tmp_path, base=BASE, text="train.num_steps=30,3,18,20"):
    """A sweep whose experiment is a script that writes a summary, or fails, at once."""
    runs = sweep_lib.plan("pretrain", base, [], sweep_lib.parse(text), tmp_path)
    for run in runs:
        script = SCRIPT.format(root=str(ROOT))
        run.command[1:3] = ["-c", script]
        run.workdir.mkdir(parents=True, exist_ok=True)
        (run.workdir / "wanted.json").write_text(json.dumps(codec.to_dict(run.config)))
    return runs


def starts(runs):
    return [len((run.workdir / "starts").read_text()) for run in runs]


@pytest.mark.parametrize("jobs", [1, 3])
def test_runs_are_ranked_and_only_unfinished_ones_start_again(tmp_path, jobs, capsys):
    runs = planned(tmp_path)
    sweep_lib.execute(runs, jobs)
    rows = sweep_lib.rank(runs, tmp_path)
    assert [row["bits_per_byte"] for row in rows] == [1.0, 3.0, 11.0, None]
    assert rows[0]["edits"] == {"train.num_steps": "20"} and rows[-1]["error"] == "and broke"
    assert json.loads((tmp_path / "sweep.json").read_text()) == {"runs": rows}
    lines = sweep_lib.table(rows).splitlines()
    assert lines[1].split() == ["1.0000", "train.num_steps=20"]
    assert lines[4].split() == ["failed", "train.num_steps=3"]
    assert "it began" in (tmp_path / "train.num_steps=3" / "sweep.log").read_text()
    assert starts(runs) == [1, 1, 1, 1]

    again = planned(tmp_path)
    sweep_lib.execute(again, jobs)
    assert starts(again) == [1, 2, 1, 1]
    assert "num_steps=20: finished before" in capsys.readouterr().out
    # Another base configuration is another run, however equal the name.
    other = planned(tmp_path, config_lib.override(BASE, {"intervals.log": "7"}))
    assert set(other[0].scores().values()) == {None}
    sweep_lib.execute(other, jobs)
    assert starts(other) == [2, 3, 2, 2]


def test_a_dry_run_prints_commands_that_pretrain_reads_as_the_sweep_does(tmp_path):
    sweep, shared = "train.num_steps=5,6; data.files='*.py'", "--config.train.batch_size=8"
    out = command(
        "sweep", "--experiment=pretrain", "--config=quicktest", shared, f"--sweep={sweep}",
        f"--workdir={tmp_path / 'sweep'}", "--dry_run",
    )  # fmt: skip
    assert not (tmp_path / "sweep").exists()
    base = config_lib.override(BASE, {"train.batch_size": "8"})
    expected = configurations(base, sweep_lib.parse(sweep)).items()
    for line, (name, config) in zip(out.splitlines(), expected, strict=True):
        (argv,) = [sweep_lib.shlex.split(line)]
        assert argv[:3] == [sys.executable, "-m", "experiments.pretrain"]
        found, rest = config_lib.parse(argv[3:], pretrain)
        assert found == config and rest == [f"--workdir={tmp_path / 'sweep' / name}"]


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--experiment=pretrian", "--experiment=pretrian: No module named"),
        ("--sweep=a", "'a' in --sweep is not key=value"),
        ("surplus", "unexpected argument 'surplus'"),
    ],
)
def test_bad_flags(argument, message):
    flags = ("--config=quicktest", "--sweep=train.num_steps=1", "--workdir=x", "--dry_run")
    (error,) = command("sweep", *flags, argument, status=2).splitlines()
    assert error.startswith(f"error: {message}")


@pytest.mark.slow
def test_a_sweep_of_pretraining(tmp_path):
    text = "\n\n".join(
        f"Line {i} of a small text, of which {i * i} is a number." for i in range(999)
    )
    for i in range(20):
        (tmp_path / f"{i}.txt").write_text(text[i * 1000 : i * 1000 + 4000])
    arguments = [
        "--config=quicktest", f"--config.data.files={tmp_path}/*.txt",
        f"--config.data.directory={tmp_path / 'data'}", "--config.model.vocab_size=300",
        "--config.train.batch_size=8", "--config.train.sequence_length=32",
        f"--workdir={tmp_path / 'sweep'}", "--sweep=train.num_steps=2,8",
    ]  # fmt: skip
    apart("sweep", *arguments, timeout=500)
    best, worst = json.loads((tmp_path / "sweep" / "sweep.json").read_text())["runs"]
    assert best["edits"] == {"train.num_steps": "8"}
    assert 0 < best["bits_per_byte"] < worst["bits_per_byte"] < 9
    assert command("sweep", *arguments).count("finished before") == 2

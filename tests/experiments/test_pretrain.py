"""`experiments.pretrain` as a user runs it: what it writes, how it resumes, what it refuses."""

from __future__ import annotations

import dataclasses
import functools
import json
import pathlib
import sysconfig

import pytest

from data_pipelines.documents import DataSource, ValidationSet
from experiments import pretrain
from lm.checkpoints import Checkpoints
from lm.config import command_line as config_lib
from lm.config.command_line import ConfigError
from lm.run import metrics as metrics_lib
from tests.commands import apart, command
from tests.experiments import survival
from tests.refuses import refuses

GROUPS = ("data", "model", "train", "mesh", "sampling")
SMALL = {k: v for k, v in survival.SETTINGS.items() if k.split(".")[0] in GROUPS}
SMALL |= {"train.batch_size": "8", "train.num_steps": "20"}
small = functools.partial(survival.config_of, pretrain.configs.quicktest(), SMALL)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """The workdir of a whole small run; its corpus is in `data`."""
    workdir = tmp_path_factory.mktemp("finished")
    pretrain.main(small(), workdir)
    return workdir


def losses(workdir: pathlib.Path, name: str = "loss") -> dict[int, float]:
    rows = [row for row in metrics_lib.read(workdir / "metrics.jsonl") if "loss" in row]
    assert len({row["step"] for row in rows}) == len(rows), "a step appears twice"
    return {row["step"]: row[name] for row in rows}


def test_a_run_writes_what_others_rely_on(finished: pathlib.Path) -> None:
    rows = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    rows = [row for row in rows if "event" not in row]
    for row in rows:
        assert isinstance(row["step"], int) and row["tokens_per_second"] > 0
        assert float(repr(row["loss"])) == row["loss"]
    assert rows[-1]["step"] == 20 and rows[-1]["loss"] < rows[0]["loss"]
    assert json.loads((finished / "config.json").read_text())["train"]["num_steps"] == 20
    saved = sorted(int(path.name) for path in (finished / "checkpoints").iterdir())
    assert saved == list(range(2, 21, 2))
    summary = json.loads((finished / "summary.json").read_text())
    assert 0 < summary["held_out"]["bits_per_byte"] < 8
    assert len(summary["samples"]) == 3
    for made in summary["files"]:
        assert pathlib.Path(made["path"]).exists()
    assert list((finished / "tensorboard").iterdir())


def test_an_interrupted_run_goes_on_bit_for_bit(
    finished: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    workdir = survival.interrupted(finished, tmp_path / "resumed", 10)
    with (workdir / "metrics.jsonl").open("a") as file:
        file.write('{"step": 21, "los')  # torn by a crash
    pretrain.main(small(finished / "data"), workdir)
    assert losses(workdir) == losses(finished)
    assert survival.events(workdir, "resumed") == [{"event": "resumed", "step": 10}]
    ours, theirs = (json.loads((w / "summary.json").read_text()) for w in (workdir, finished))
    assert ours["held_out"] == theirs["held_out"] and ours["samples"] == theirs["samples"]


def test_a_finished_run_trains_no_further(finished: pathlib.Path) -> None:
    before = losses(finished)
    pretrain.main(small(), finished)
    assert losses(finished) == before


@pytest.mark.parametrize(
    "changes",
    [
        # Rows split in zigzag order.
        {"mesh__context": "2", "mesh__fsdp": "2", "mesh__tensor": "2",
         "sharding__sequence_parallel": "true", "sharding__zero_axes": "fsdp,context"},
        pytest.param(
            {"mesh__data": "2", "mesh__fsdp": "2", "mesh__tensor": "2", "sharding__zero": "1"},
            marks=pytest.mark.slow,
        ),
    ],
    ids=["context, tensor and two axes", "zero 1"],
)  # fmt: skip
def test_a_run_goes_on_with_another_mesh(
    finished: pathlib.Path, tmp_path: pathlib.Path, changes: dict[str, str]
) -> None:
    workdir = survival.interrupted(finished, tmp_path / "mesh", 10)
    pretrain.main(small(finished / "data", **changes), workdir)
    ours, theirs = losses(workdir), losses(finished)
    assert ours.keys() == theirs.keys()
    assert max(abs(ours[step] - theirs[step]) for step in ours) < 0.05  # bfloat16 compute
    assert losses(workdir, "tokens") == losses(finished, "tokens")


def test_a_mixture_with_named_validation_sets_and_another_batch_size_later(
    tmp_path: pathlib.Path,
) -> None:
    library = sysconfig.get_path("stdlib")
    documents = [path.read_text() for path in sorted(pathlib.Path(library, "json").glob("*.py"))]
    (tmp_path / "json.jsonl").write_text("".join(json.dumps({"body": d}) + "\n" for d in documents))
    sources = (
        DataSource("email", (f"{library}/email/*.py",), weight=3.0),
        DataSource("json", (f"{tmp_path}/json.jsonl",), "jsonl", "body", max_epochs=0.5),
    )
    config = small(train__ramp__first="4", train__ramp__num_steps="6", train__ramp__num_stages="2")
    data = dataclasses.replace(
        config.data, files="", sources=sources,
        validation=(ValidationSet("wsgi", (f"{library}/wsgiref/*.py",)),),
    )  # fmt: skip
    config = dataclasses.replace(config, data=data)
    workdir = tmp_path / "run"
    pretrain.main(config_lib.override(config, {"train.num_steps": "10"}), workdir)
    (last,) = (row for row in metrics_lib.read(workdir / "metrics.jsonl") if row["step"] == 10
               and "event" not in row)  # fmt: skip
    sets = {name.split("/")[1] for name in last if name.startswith("held_out_loss/")}
    assert "held_out_loss" in last and sets == {"json", "wsgi"}
    by_name = Checkpoints(workdir / "checkpoints").metadata(10)["data"]
    assert [stage["batch_size"] for stage in by_name["stages"]] == [4, 8]
    changed = config_lib.override(config, {"train.num_steps": "14", "train.batch_size": "16"})
    pretrain.main(changed, workdir)
    rows = metrics_lib.read(workdir / "metrics.jsonl")
    (event,) = survival.events(workdir, "changed")
    assert event["step"] == 10 and "train.batch_size: 8 -> 16" in event["changes"]
    sigma = {row["step"]: row["loss_sigma"] for row in rows if "event" not in row}
    assert sigma[10] > 0 == sigma[11]  # statistics of another batch size begin anew
    stages = Checkpoints(workdir / "checkpoints").metadata(14)["data"]["stages"]
    assert [(stage["first_step"], stage["batch_size"]) for stage in stages[-1:]] == [(10, 16)]
    tokens = {row["step"]: row["tokens"] for row in rows if "event" not in row}
    assert tokens[3] < 1.1 * 4 * 64 < 8 * 50 < tokens[9] < 1.1 * 8 * 64 < 16 * 50 < tokens[14]


def refused(config: pretrain.Pretrain, workdir: pathlib.Path, *words: str) -> None:
    refuses(lambda: pretrain.main(config, workdir), *words, error=ConfigError)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mesh__tensor": "3"}, "'tensor'=3 does not divide"),
        ({"mesh__fsdp": "3"}, "'fsdp'=3 does not divide"),
        ({"mesh__context": "3"}, "'context'=3 does not divide"),
        ({"sharding__zero_axes": "fsdp,tensor"}, "zero_axes=('fsdp', 'tensor')"),
        ({"train__num_micro_batches": "3"}, "num_micro_batches=3 does not divide"),
        ({"train__sequence_length": "65"}, "is not between 1 and model.max_length=64"),
        ({"data__files": "nothing/*.txt"}, "nothing/*.txt"),
        ({"model__vocab_size": "400000"}, "400000"),
    ],
)
def test_bad_configurations_are_refused(
    changes: dict[str, str], message: str, tmp_path: pathlib.Path
) -> None:
    refused(small(**changes), tmp_path / "w", message)


def test_bad_text_is_refused(tmp_path: pathlib.Path) -> None:
    text = tmp_path / "latin1.txt"
    for i, (content, words) in enumerate([(b"caf\xe9 " * 1000, ("latin1.txt", "byte", "UTF-8")),
                                          (b"", ("empty",))]):  # fmt: skip
        text.write_bytes(content)
        refused(small(data__files=f"{tmp_path}/*.txt"), tmp_path / f"w{i}", *words)


def test_the_workdir_or_corpus_of_another_run_is_refused(
    finished: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    refused(small(train__seed="1"), finished, "another run: ", "train.seed: 0 -> 1", "--workdir")
    refused(small(model__vocab_size="256"), finished, "model.vocab_size: 512 -> 256")
    refused(small(finished / "data", model__vocab_size="256"), tmp_path / "w", "vocab_size")


def test_a_bad_flag_is_one_message(tmp_path: pathlib.Path) -> None:
    flags = ("--config=quicktest", "--config.train.nun_steps=5", f"--workdir={tmp_path}/w")
    error = command("pretrain", *flags, status=2)
    assert all(words in error for words in ("train.nun_steps", "did you mean", "num_steps"))


def test_the_command_line_reshapes_the_run(finished: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """As a user types it, and with two tensor shards on a machine with one device."""
    edits = SMALL | {"data.directory": str(finished / "data"), "mesh.tensor": "2"}
    flags = [f"--config.{key}={value}" for key, value in edits.items()]
    out = apart("pretrain", "--config=quicktest", f"--workdir={tmp_path}/w", *flags)
    assert "mesh tensor=2" in out and "held-out bits per byte" in out
    ours, theirs = losses(tmp_path / "w"), losses(finished)
    assert max(abs(ours[step] - theirs[step]) for step in ours) < 0.05


@pytest.mark.slow
def test_quicktest_beats_an_order_3_byte_ngram(tmp_path: pathlib.Path) -> None:
    apart("pretrain", "--config=quicktest", f"--workdir={tmp_path}/w", timeout=560)
    held_out = json.loads((tmp_path / "w" / "summary.json").read_text())["held_out"]
    assert held_out["bits_per_byte"] < held_out["ngram_bits_per_byte"]

"""`experiments.sft`: what it learns, what it leaves alone, and how it goes on."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import pathlib
import shutil

import jax
import numpy as np
import pytest

from experiments import sft
from lm.adapters import remove, trains
from lm.checkpoints import open_checkpoint
from lm.config.command_line import ConfigError
from lm.data.conversations import PLAIN_TEMPLATE
from lm.formats import load_pretrained
from lm.model import stack
from lm.run.finetune import pretrained
from lm.run.metrics import read
from lm.weights import path_name
from tests.experiments import survival

SHARED = {
    "train.sequence_length": "64",
    "train.batch_size": "8",
    "train.unroll": "false",
    "intervals.log": "1",
    "intervals.evaluate": "5",
    "mesh.fsdp": "1",
}
SMALL = {"model.stacks.0.num_repeats": "1", "model.max_length": "64", "train.num_steps": "30"}


def run(workdir: pathlib.Path, settings: dict[str, str] = SMALL, **changes: str) -> pathlib.Path:
    base = sft.configs.quicktest()
    sft.main(survival.config_of(base, SHARED | settings, **changes), workdir)
    return workdir


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A small model trained from scratch."""
    return run(tmp_path_factory.mktemp("sft") / "full")


def lora(full: pathlib.Path, workdir: pathlib.Path, **changes: str) -> pathlib.Path:
    """Adapters over that model, which learn from other conversations."""
    lines = [
        {"messages": [{"role": "user", "content": f"What is {i} plus 1?"},
                      {"role": "assistant", "content": f"{i} + 1 = {i + 2}"}]}
        for i in range(200)
    ]  # fmt: skip
    data = full.parent / "wrong.jsonl"
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    adapters = {
        "model": str(full), "data.files": str(data), "data.held_out": "0.1", "lora.rank": "4",
        "train.num_steps": "20",
    }  # fmt: skip
    return run(workdir, adapters, **changes)


@pytest.fixture(scope="module")
def adapted(full: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return lora(full, tmp_path_factory.mktemp("lora") / "lora")


@pytest.fixture(scope="module")
def longer(
    full: pathlib.Path, adapted: pathlib.Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[pathlib.Path, str]:
    """That run, started again for four steps more, and what it printed."""
    workdir = tmp_path_factory.mktemp("longer") / "lora"
    shutil.copytree(adapted, workdir)
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        lora(full, workdir, train__num_steps="24")
    return workdir, printed.getvalue()


def rows(workdir: pathlib.Path, name: str) -> dict[int, float]:
    found = [row for row in read(workdir / "metrics.jsonl") if "event" not in row]
    assert len({row["step"] for row in found}) == len(found)
    return {row["step"]: row[name] for row in found if name in row}


def weights(workdir: pathlib.Path) -> dict[str, np.ndarray]:
    params, _ = open_checkpoint(workdir)
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return {path_name(path): np.asarray(x) for path, x in leaves}


def files(directory: pathlib.Path) -> dict[str, str]:
    paths = (path for path in directory.rglob("*") if path.is_file())
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def test_it_lowers_the_held_out_loss(full: pathlib.Path, adapted: pathlib.Path) -> None:
    for workdir, share in ((full, 0.4), (adapted, 0.9)):
        before, (first, *_, last) = (
            rows(workdir, "loss")[1],
            rows(workdir, "held_out_loss").values(),
        )
        assert last < first and last < share * before
        summary = json.loads((workdir / "summary.json").read_text())
        assert summary["held_out"]["loss"] == last
    # The assistant's are about 10 of the 43 tokens of a conversation, and most rows hold one.
    assert all(0.1 < tokens / (8 * 64) < 0.3 for tokens in rows(full, "tokens").values())


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_an_interrupted_run_goes_on_bit_for_bit(
    full: pathlib.Path, adapted: pathlib.Path, tmp_path: pathlib.Path, kind: str
) -> None:
    finished = full if kind == "full" else adapted
    middle = max(rows(finished, "loss")) // 2
    workdir = survival.interrupted(finished, tmp_path / "resumed", middle, without="")
    run(workdir) if kind == "full" else lora(full, workdir)
    assert survival.events(workdir, "resumed")
    for name in ("loss", "grad_norm", "held_out_loss"):
        assert rows(workdir, name) == rows(finished, name)
    ours, theirs = weights(workdir), weights(finished)
    assert ours.keys() == theirs.keys()
    assert all(ours[name].tobytes() == theirs[name].tobytes() for name in ours)


def test_adapters_leave_the_base_as_it_is(
    full: pathlib.Path, adapted: pathlib.Path, longer: tuple[pathlib.Path, str]
) -> None:
    """It is stored once, and what opens by the run's path is that model with adapters over it."""
    params, config = open_checkpoint(adapted)
    beneath, _ = open_checkpoint(full)
    for x, y in zip(*map(jax.tree.leaves, (remove(params), beneath)), strict=True):
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()
    begun, trained = weights(adapted / "base"), weights(adapted)
    assert begun.keys() == trained.keys()
    changed = {name for name in begun if begun[name].tobytes() != trained[name].tobytes()}
    assert changed == {name for name in begun if trains(name)}
    stored = list((adapted / "checkpoints").glob("*/weights/*"))
    assert stored and not any("frozen" in path.name for path in stored)
    workdir, _ = longer
    assert [*files(workdir / "base").values()] == [*files(adapted / "base").values()]
    served = load_pretrained(workdir)
    assert stack(served.params, served.config) is not None and served.config == config
    assert "default" in served.tokenizer.chat_templates


def test_a_longer_run_says_that_its_schedule_changed(longer: tuple[pathlib.Path, str]) -> None:
    workdir, printed = longer
    (event,) = survival.events(workdir, "changed")
    assert event["changes"] == ["train.num_steps: 20 -> 24"]
    assert "learning-rate schedule" in event["notes"][0]
    assert event["notes"][0] in printed
    assert rows(workdir, "loss_sigma")[21] > 0  # its statistics go on


def test_a_base_model_without_a_template_takes_the_plain_one(
    full: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    base = shutil.copytree(full, tmp_path / "base")
    (base / "data" / "chat_template.jinja").unlink()
    assert not load_pretrained(str(base)).tokenizer.chat_templates
    opened = pretrained(str(base), "", tmp_path / "data")
    assert opened.tokenizer.chat_templates == {"default": PLAIN_TEMPLATE}
    assert (tmp_path / "data" / "chat_template.jinja").read_text() == PLAIN_TEMPLATE


def test_nothing_is_held_out(tmp_path: pathlib.Path) -> None:
    workdir = run(tmp_path / "w", SMALL | {"train.num_steps": "2"}, data__held_out="0")
    assert len(rows(workdir, "loss")) == 2 and not rows(workdir, "held_out_loss")


def test_a_bad_line_is_named(tmp_path: pathlib.Path) -> None:
    good = '{"messages": [{"role": "assistant", "content": "a"}]}\n'
    (tmp_path / "a.jsonl").write_text(good + '{"messages": [{"role": "robot"}]}\n')
    with pytest.raises(ConfigError, match=r"a\.jsonl', line 2: messages\.0\.role is 'robot'"):
        run(tmp_path / "w", data__files=f"{tmp_path}/*.jsonl")
    with pytest.raises(ConfigError, match="no files match"):
        run(tmp_path / "w", data__files=f"{tmp_path}/none*.jsonl")


def test_a_run_that_has_begun_needs_no_other_file(
    tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It goes on with its copies of the conversations and the chat template, and says so."""
    data, chat, workdir = tmp_path / "chats [1].jsonl", tmp_path / "t.jinja", tmp_path / "w"
    turn = {"role": "assistant", "content": "caf\u00e9"}
    data.write_text("".join(json.dumps({"messages": [turn] * n}) + "\n" for n in range(1, 30)))
    chat.write_text("own")
    settings = {"data.files": str(data), "data.held_out": "0.3", "data.template": str(chat)}
    config = survival.config_of(sft.configs.quicktest(), settings)
    found = sft.conversations(config, workdir)
    assert all(found) and sum(map(len, found)) == 29
    (workdir / "checkpoints" / "5").mkdir(parents=True)
    (workdir / "data" / "chat_template.jinja").write_text("own")

    def goes_on() -> bool:
        kept = sft.conversations(config, workdir)
        assert [[e.content for e in part] for part in kept] == [
            [e.content for e in part] for part in found
        ]
        assert sft.template_of(config, workdir / "data") == "own"
        said = "goes on with its" in caplog.text
        caplog.clear()
        return said

    assert not goes_on()
    data.write_text(data.read_text() * 2)
    assert goes_on()
    data.unlink()
    chat.unlink()
    assert goes_on()
    with pytest.raises(ConfigError, match="no files match"):
        sft.assemble(config, tmp_path / "new")

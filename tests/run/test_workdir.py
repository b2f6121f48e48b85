"""Which changes a run may go on with, and which of them end its statistics."""

import pathlib
import socket
import subprocess
import sys

import pytest

from experiments.configs.pretrain import quicktest
from lm.config import codec
from lm.config.changes import changes
from lm.config.codec import ConfigError
from lm.config.command_line import override
from lm.run import workdir as workdirs
from lm.run.workdir import check_path, claim_workdir, owned
from tests.commands import ROOT
from tests.refuses import refuses


@pytest.mark.parametrize(
    ("key", "value", "statistics_hold"),
    [
        ("mesh.tensor", "2", True),
        ("sharding.zero", "1", True),
        ("intervals.log", "3", True),
        ("sampling.temperature", "0.5", True),
        ("rewind.patience", "5", True),
        ("rewind", "none", True),
        ("checkpoints.keep", "2", True),
        ("data.directory", "elsewhere", True),
        ("train.num_steps", "7", True),
        ("train.num_micro_batches", "2", True),
        ("train.remat", "full", True),
        ("train.batch_size", "8", False),
        ("train.seed", "3", None),
        ("train.sequence_length", "64", None),
        ("train.z_loss", "0.1", None),
        ("learning_rate.peak", "0.1", None),
        ("optimizer", "Lion", None),
        ("model.vocab_size", "512", None),
        ("data.seed", "1", None),
    ],
)
def test_what_may_change(tmp_path: pathlib.Path, key: str, value: str, statistics_hold) -> None:
    """None: it is another run."""
    begun, now = quicktest(), override(quicktest(), {key: value})
    assert claim_workdir(now, tmp_path) == []  # nothing has begun here
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(ConfigError, match=r"no config\.json"):
        claim_workdir(begun, tmp_path)
    codec.save(begun, tmp_path / "config.json")
    assert claim_workdir(begun, tmp_path) == []
    if statistics_hold is None:
        with pytest.raises(ConfigError, match=f"holds another run: {key}"):
            claim_workdir(now, tmp_path)
        return
    found = claim_workdir(now, tmp_path)
    assert found == changes(begun, now) and all(c.text.startswith(key) for c in found)
    assert all(c.allowed and c.allowed.new_statistics != statistics_hold for c in found)
    assert any(c.allowed and c.allowed.note for c in found) == (key == "train.num_steps")


@pytest.mark.parametrize(
    ("path", "words"), [("gs://bucket/run", "gcsfuse"), ("a\\b", "backslash"), ("\udcff", "UTF-8")]
)
def test_a_path_that_cannot_be_written_to_is_refused(path: str, words: str) -> None:
    refuses(lambda: check_path(pathlib.Path(path)), words, error=ConfigError)


def own(workdir: pathlib.Path) -> None:
    with owned(workdir):
        pass


OWN = """
import pathlib, sys, time
from lm.run.workdir import owned
with owned(pathlib.Path(sys.argv[1])):
    print("OWNED", flush=True)
    time.sleep(300)
"""


def test_a_workdir_has_one_owner_and_a_killed_one_leaves_it_free(tmp_path: pathlib.Path) -> None:
    workdir = tmp_path / "runs" / "[lr=1]"
    command = [sys.executable, "-c", OWN, str(workdir)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE) as process:
        assert process.stdout and process.stdout.readline() == b"OWNED\n"
        who = f"is in use by pid {process.pid} on {socket.gethostname()} since 20"
        for _ in range(2):
            refuses(lambda: own(workdir), str(workdir), who, "--workdir", error=ConfigError)
        process.kill()
        process.wait()
    with owned(workdir):
        refuses(lambda: own(workdir), "in use by pid", error=ConfigError)
        (workdir / "config.json").touch()
    own(workdir)
    assert [path.name for path in workdir.iterdir()] == ["config.json"]


def test_a_workdir_that_nothing_was_written_to_is_gone_again(tmp_path: pathlib.Path) -> None:
    (tmp_path / "theirs").mkdir()
    for name in ("new", "theirs"):
        own(tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == ["theirs"]
    (tmp_path / "file").touch()
    refuses(lambda: own(tmp_path / "file"), "cannot be written to", error=ConfigError)


def test_a_file_system_without_locks_is_said_to_have_none(tmp_path, monkeypatch, capsys) -> None:
    def flock(file, operation):
        raise OSError(workdirs.errno.ENOLCK, "No locks available")

    monkeypatch.setattr(workdirs.fcntl, "flock", flock)
    own(tmp_path)
    assert "no lock keeps a second run out" in capsys.readouterr().out

"""Which changes a run may go on with, and which of them end its statistics."""

import pathlib

import pytest

from experiments.configs.pretrain import quicktest
from lm.config import codec
from lm.config.changes import changes
from lm.config.codec import ConfigError
from lm.config.command_line import override
from lm.run.workdir import claim_workdir


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


def test_an_address_is_refused() -> None:
    with pytest.raises(ConfigError, match="gcsfuse"):
        claim_workdir(quicktest(), pathlib.Path("gs://bucket/run"))

"""`experiments.replay`: the batch that was trained on, and the losses it had, through a rewind."""

from __future__ import annotations

import json

import numpy as np
import pytest

from experiments.replay import row_to_text, to_text
from lm.config.command_line import ConfigError
from lm.data.corpus import open_corpus
from lm.run.metrics import to_json
from lm.run.replay import attempts, replay
from tests.commands import command
from tests.experiments.conftest import FIRST_BAD, NUM_BAD, Spiked

BAD = range(FIRST_BAD, FIRST_BAD + NUM_BAD)


def assert_is_batch(found: dict, batch: dict[str, np.ndarray]) -> None:
    assert [row["row"] for row in found["rows"]] == list(range(len(batch["ids"])))
    for row, ids, targets in zip(found["rows"], batch["ids"], batch["targets"], strict=True):
        first = [piece["token_ids"][0] for piece in row["documents"]]
        starts = [piece["position"] for piece in row["documents"]]
        assert ids[starts].tolist() == first
        rest = [i for piece in row["documents"] for i in piece["token_ids"][1:]]
        assert targets[: row["num_tokens"]].tolist() == rest
        assert not targets[row["num_tokens"] :].any()


def test_the_run_went_back_once(spiked: Spiked) -> None:
    (event,) = spiked.events("rewound")
    assert (event["step"], event["from_step"]) == (FIRST_BAD - 1, FIRST_BAD - 1 + NUM_BAD)
    assert [row["step"] for row in spiked.events("skipped")] == list(BAD)


@pytest.mark.parametrize("step", [1, 7, FIRST_BAD, FIRST_BAD + 2, 24])
def test_the_last_time_a_step_was_taken(spiked: Spiked, step: int) -> None:
    found = replay(spiked.run, step)
    assert found["num_attempts"] == found["attempt"] == (2 if step in BAD else 1)
    assert_is_batch(found, spiked.read[step][-1])
    # There is a checkpoint of every step, so the weights are those the step had.
    assert found["weights"]["steps_done"] == step - 1
    row = spiked.row(step)
    assert found["recorded"]["loss"] == row["loss"]
    np.testing.assert_allclose(found["loss"], row["loss"], rtol=1e-5)
    assert sum(row["num_tokens"] for row in found["rows"]) == row["tokens"]


@pytest.mark.parametrize("step", BAD)
def test_the_first_time_of_a_step_that_was_taken_again(spiked: Spiked, step: int) -> None:
    found = replay(spiked.run, step, attempt=1, num_worst=5)
    assert (found["attempt"], found["num_attempts"]) == (1, 2)
    assert_is_batch(found, spiked.read[step][0])
    # Steps skipped left the weights of the last checkpoint before them.
    assert found["weights"]["steps_done"] == FIRST_BAD - 1
    (skipped,) = found["recorded"]["times_skipped"]
    assert "loss" not in found["recorded"]
    np.testing.assert_allclose(found["loss"], skipped["loss"], rtol=1e-5)
    assert {worst["token_id"] for worst in found["worst"]} == {3}


def test_losses_are_of_each_token(spiked: Spiked) -> None:
    found = replay(spiked.run, 9, num_worst=7)
    losses = [x for row in found["rows"] for piece in row["documents"] for x in piece["losses"]]
    np.testing.assert_allclose(np.mean(losses), found["loss"], rtol=1e-6)
    assert [worst["loss"] for worst in found["worst"]] == sorted(losses, reverse=True)[:7]
    batch = spiked.read[9][-1]
    for worst in found["worst"]:
        assert batch["targets"][worst["row"], worst["position"]] == worst["token_id"]
    one = replay(spiked.run, 9, row=4, num_worst=3)
    assert one["rows"] == [found["rows"][4]] and one["loss"] == found["loss"]
    assert {worst["row"] for worst in one["worst"]} == {4}


def test_documents_are_the_corpus_text(spiked: Spiked) -> None:
    documents = list(open_corpus(spiked.run.data).texts("train"))
    whole = [
        piece
        for row in replay(spiked.run, 3)["rows"]
        for piece in row["documents"]
        if "\ufffd" not in piece["text"]
    ]
    assert len(whole) > 10
    for piece in whole:
        text = piece["text"].removeprefix("<s>").removesuffix("</s>")
        assert text in documents[piece["document"]]


def test_another_checkpoint(spiked: Spiked) -> None:
    path = str(spiked.workdir / "checkpoints" / "20")
    found = replay(spiked.run, 3, checkpoint=path)
    assert found["weights"] == {"steps_done": None, "source": path}
    assert found["loss"] < replay(spiked.run, 3)["loss"] - 0.3


def test_what_people_read(spiked: Spiked) -> None:
    found = replay(spiked.run, FIRST_BAD, row=2, attempt=1, num_worst=4)
    text = to_text(found)
    assert f"step {FIRST_BAD}, attempt 1 of 2" in text
    assert f"loss {found['loss']:.4f}" in text and "recorded as skipped: loss" in text
    tokens = row_to_text(spiked.run, found["rows"][0]).splitlines()
    numbered = [line for line in tokens if line[:4].strip().isdigit()]
    assert len(numbered) == found["rows"][0]["num_tokens"] + len(found["rows"][0]["documents"])


def test_attempts_through_rewinds_kills_and_lost_skips() -> None:
    def rewound(step: int, from_step: int, rows: int) -> dict:
        return {"event": "rewound", "step": step, "from_step": from_step, "skipped_rows": rows}

    def skips(step: int, recorded: list, rows: list) -> list:
        return [list(a.skips) for a in attempts(step, {"skips": recorded}, rows)]

    first, second = rewound(10, 15, 80), rewound(12, 20, 128)
    rows = [first, second]
    both = [[10, 80], [12, 128]]
    assert skips(9, both, rows) == [[(10, 80), (12, 128)]]
    assert skips(11, both, rows) == [[], [(10, 80), (12, 128)]]
    assert skips(14, both, rows) == [[], [(10, 80)], [(10, 80), (12, 128)]]
    assert skips(18, both, rows) == [[(10, 80)], [(10, 80), (12, 128)]]
    assert skips(21, both, rows) == [[(10, 80), (12, 128)]]
    assert [a.last_checkpoint for a in attempts(14, {"skips": both}, rows)] == [10, 12, 13]
    # No checkpoint since the second rewind has recorded it; it is in force all the same,
    assert skips(14, [[10, 80]], rows) == skips(14, both, rows)
    # until the run is started again from the checkpoint that does not know of it.
    resumed = {"event": "resumed", "step": 12}
    assert skips(14, [[10, 80]], [*rows, resumed]) == [[], [(10, 80)]]
    again = [*rows, resumed, rewound(12, 19, 112)]
    assert skips(14, [[10, 80], [12, 112]], again)[-1] == [(10, 80), (12, 112)]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"step": 0}, r"--step=0 is none of the run's; give 1 to 24"),
        ({"step": 25}, r"--step=25 is none of the run's"),
        ({"step": 9, "attempt": 2}, r"--attempt=2: step 9 was taken 1 times; give 1 to 1"),
        ({"step": 9, "row": 16}, r"--row=16: the batch of step 9 has 0 to 15"),
        ({"step": 9, "checkpoint": "no/such"}, r"no/such holds no checkpoint"),
    ],
)
def test_what_there_is_not(spiked: Spiked, values: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        replay(spiked.run, **values)


def test_the_command(spiked: Spiked) -> None:
    workdir = f"--workdir={spiked.workdir}"
    found = json.loads(command("replay", workdir, "--step=20", "--format=json", "--worst=3"))
    expected = to_json(replay(spiked.run, 20, num_worst=3))
    assert found["rows"][0]["documents"][0]["text"] == expected["rows"][0]["documents"][0]["text"]
    np.testing.assert_allclose(found["loss"], expected["loss"], rtol=1e-5)
    assert [w["position"] for w in found["worst"]] == [w["position"] for w in expected["worst"]]
    error = command("replay", workdir, "--step=99", status=2).strip()
    assert error.endswith("error: --step=99 is none of the run's; give 1 to 24")

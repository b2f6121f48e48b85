"""Runs that are killed, told to go, or given bad data, and go on as if nothing had happened."""

from __future__ import annotations

import math
import pathlib
import random
import signal
import time
from collections.abc import Callable, Container
from unittest import mock

import numpy as np
import psutil
import pytest

from experiments import pretrain
from lm.data.batches import Batches
from lm.distributed.preemption import PreemptionNotice
from tests.experiments import survival
from tests.experiments.survival import NUM_STEPS, SETTINGS, course, digest, last_step


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """The workdir of a run that nothing happened to."""
    workdir = tmp_path_factory.mktemp("survival") / "finished"
    pretrain.main(survival.config_of(pretrain.configs.quicktest(), SETTINGS), workdir)
    assert list(course(workdir)) == list(range(1, NUM_STEPS + 1))
    return workdir


def settings(finished: pathlib.Path, **changes: str) -> dict[str, str]:
    """Of a run on the same corpus."""
    edits = {key.replace("__", "."): value for key, value in changes.items()}
    return SETTINGS | {"data.directory": str(finished / "data")} | edits


def test_told_to_go_and_killed_while_saving_it_ends_the_same(
    finished: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    """Told to go, it saves at once: no checkpoint is due by its interval then."""
    workdir, ours = tmp_path / "run", settings(finished)
    process = survival.start(workdir, ours | {"intervals.save": "1000"})
    code = survival.stop_when(process, lambda: last_step(workdir) > 6, signal.SIGTERM)
    assert code == PreemptionNotice.EXIT, pathlib.Path(f"{workdir}.log").read_text()[-2000:]
    (event,) = survival.events(workdir, "preempted")
    assert (workdir / "checkpoints" / str(event["step"])).is_dir()
    assert 6 < last_step(workdir) == event["step"] < NUM_STEPS

    process = survival.start(workdir, ours)
    saving = lambda: last_step(workdir) > event["step"] and survival.is_saving(workdir)  # noqa: E731
    assert survival.stop_when(process, saving) == -signal.SIGKILL
    run(finished, workdir)
    assert course(workdir) == course(finished)
    assert digest(workdir, NUM_STEPS) == digest(finished, NUM_STEPS)
    first, second = (row["step"] for row in survival.events(workdir, "resumed"))
    assert first == event["step"] <= second


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_twenty_kills(finished: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """At random moments of a run, from its start-up on, every other one while it saves."""
    rng = random.Random(1)
    done = 0
    while done < 20:
        workdir = tmp_path / f"killed-{done}"
        ours = settings(finished)
        for _ in range(4):
            process = survival.start(workdir, ours)
            target = last_step(workdir) + rng.randrange(0, 16)
            pause = rng.uniform(0, 0.1)

            def happens(workdir=workdir, target=target, saves=done % 2, pause=pause) -> bool:
                if last_step(workdir) < target or (saves and not survival.is_saving(workdir)):
                    return False
                time.sleep(pause)
                return True

            code = survival.stop_when(process, happens)
            done += code == -signal.SIGKILL
            if code == 0:
                break
        survival.finish(workdir, ours)
        assert course(workdir) == course(finished)
        assert digest(workdir, NUM_STEPS) == digest(finished, NUM_STEPS)


@pytest.mark.slow
def test_a_killed_host_ends_all_and_two_hosts_go_on_as_one_did(
    finished: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    """One host of 8 devices, two of 4, or one of one: the same tokens, losses up to rounding."""
    workdir = tmp_path / "hosts"
    launcher = ["scripts/run_local.py", "--num_processes=2", "--devices=4", "--grace=60", "--"]
    ours = settings(finished, mesh__fsdp="4", mesh__tensor="2")
    process = survival.start(workdir, ours, launcher)

    def workers() -> list[psutil.Process]:
        children = psutil.Process(process.pid).children(recursive=True)
        return [p for p in children if "experiments.pretrain" in " ".join(p.cmdline())]

    def hit() -> bool:
        if last_step(workdir) < 20:
            return False
        workers()[1].kill()
        return True

    code = survival.stop_when(process, hit, number=0)
    assert code != 0
    log = pathlib.Path(f"{workdir}.log").read_text()
    assert "was killed or crashed; the run ends. Start the same command again" in log, log[-3000:]
    survival.finish(workdir, ours, launcher)
    one = tmp_path / "one"
    survival.finish(one, settings(finished, mesh__fsdp="4", mesh__tensor="2"))
    for other in (one, finished):
        theirs, found = course(other), course(workdir)
        assert theirs.keys() == found.keys()
        for step, values in theirs.items():
            assert found[step][3] == values[3], "other tokens"
            np.testing.assert_allclose(found[step][0], values[0], atol=0.03)


Spoil = Callable[[dict[str, np.ndarray]], None]


def poison(monkeypatch: pytest.MonkeyPatch, bad: Container[int], spoil: Spoil) -> None:
    """Spoil the batches whose first global row is in `bad`."""
    read = Batches.host_batch

    def spoiled(stream: Batches, step: int, rows=None) -> dict[str, np.ndarray]:
        batch = read(stream, step, rows)
        if stream.timeline.first_row(step) in bad:
            spoil(batch)
        return batch

    monkeypatch.setattr(Batches, "host_batch", spoiled)


def not_a_number(batch: dict[str, np.ndarray]) -> None:
    batch["weights"][:] = np.nan


def noise(batch: dict[str, np.ndarray]) -> None:
    """Targets that the text never has, and so a loss far above the usual."""
    batch["targets"][:] = 3


def run(finished: pathlib.Path, workdir: pathlib.Path, **changes: str) -> pathlib.Path:
    config = survival.config_of(
        pretrain.configs.quicktest(), SETTINGS, finished / "data", **changes
    )
    with mock.patch.object(pretrain, "summarize") as summarize:
        pretrain.main(config, workdir)
    assert summarize.call_count == 1, "it did not finish"
    return workdir


@pytest.mark.parametrize("spoil", [not_a_number, noise])
def test_spikes_are_skipped_and_three_rewind_past_their_data_and_lower_the_rate(
    finished: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, spoil: Spoil
) -> None:
    """Step 18 is bad, and from step 31 on all are; the last checkpoint is of 28."""
    poison(monkeypatch, [17 * 16, *range(30 * 16, 36 * 16)], spoil)
    workdir = run(finished, tmp_path / "spikes")
    assert 18 in [row["step"] for row in survival.events(workdir, "skipped")]
    (event,) = survival.events(workdir, "rewound")
    assert (event["step"], event["from_step"]) == (28, 33)
    assert event["skipped_rows"] == (5 + 4) * 16
    steps = {row["step"]: row for row in survival.rows(workdir) if "event" not in row}
    assert list(steps) == list(range(1, NUM_STEPS + 1))
    assert [steps[step]["skipped_total"] for step in (17, 18, 30)] == [0, 1, 1]
    assert (steps[18]["loss"] == "NaN") == (spoil is not_a_number)
    assert steps[30]["loss"] < steps[17]["loss"]
    rates = [steps[step]["learning_rate"] for step in range(27, 36)]
    assert rates == [*rates[:2], *[rates[0] / 2] * 4, *[rates[0]] * 3]
    assert not any(steps[step]["skipped"] for step in range(29, NUM_STEPS + 1))
    assert all(math.isfinite(row["loss"]) for step, row in steps.items() if step != 18)
    if spoil is noise:  # started again from the checkpoint before, it comes the same way
        again = survival.interrupted(workdir, tmp_path / "again", 24)
        run(finished, again)
        assert course(again) == course(workdir)
        assert digest(again, NUM_STEPS) == digest(workdir, NUM_STEPS)


def test_it_does_not_go_back_for_ever(
    finished: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    poison(monkeypatch, range(10 * 16, 10**6), not_a_number)
    with pytest.raises(FloatingPointError, match="gone back 2 times"):
        run(finished, tmp_path / "lost", rewind__limit="2")
    assert [row["step"] for row in survival.events(tmp_path / "lost", "rewound")] == [8, 8]


def saved(workdir: pathlib.Path) -> list[int]:
    return sorted(int(path.name) for path in (workdir / "checkpoints").iterdir())


def test_told_to_end_inside_a_spike_it_goes_back_as_if_nothing_had_happened(
    finished: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps 38 and 39 are bad. One checkpoint is kept, and a newer one from inside the spike."""
    poison(monkeypatch, [37 * 16, 38 * 16], not_a_number)
    changes = {"rewind__patience": "2", "checkpoints__keep": "1"}
    workdir = run(finished, survival.interrupted(finished, tmp_path / "whole", 32), **changes)
    (event,) = survival.events(workdir, "rewound")
    assert (event["step"], event["from_step"]) == (36, 40)
    for stop, left in ((38, [36, 38]), (39, [36])):
        again = survival.interrupted(finished, tmp_path / f"told-at-{stop}", 32)
        with monkeypatch.context() as patch:
            patch.setattr(PreemptionNotice, "agreed", lambda _, step, stop=stop: step == stop)
            with pytest.raises(SystemExit) as ended:
                run(finished, again, **changes)
        assert ended.value.code == PreemptionNotice.EXIT and saved(again) == left
        run(finished, again, **changes)
        assert saved(again) == saved(workdir) == [NUM_STEPS]
        assert course(again) == course(workdir)
        assert digest(again, NUM_STEPS) == digest(workdir, NUM_STEPS)


def test_a_spike_in_the_last_steps_is_gone_back_from_or_told_of(
    finished: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    """Steps 39 and 40 are bad."""
    poison(monkeypatch, [38 * 16, 39 * 16], not_a_number)
    workdir = survival.interrupted(finished, tmp_path / "run", 32)
    run(finished, workdir, rewind__patience="3")
    assert "the weights are those of step 38" in capsys.readouterr().out
    assert not survival.events(workdir, "rewound")
    survival.interrupted(workdir, workdir, 36)
    run(finished, workdir, rewind__patience="2")
    (event,) = survival.events(workdir, "rewound")
    assert (event["step"], event["from_step"]) == (36, 40)
    assert "the weights are those of step" not in capsys.readouterr().out


def test_a_newer_checkpoint_on_the_hosts_own_disk_is_the_one_to_go_on_from(
    finished: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    workdir = tmp_path / "local"
    changes = {"checkpoints__local": str(tmp_path / "disk"), "checkpoints__local_steps": "3"}
    run(finished, workdir, **changes)
    theirs = course(workdir), digest(workdir, NUM_STEPS)
    survival.interrupted(workdir, workdir, 28)
    run(finished, workdir, **changes)
    (event,) = survival.events(workdir, "resumed")
    assert event["step"] == 39  # step 40 was due on the shared disk too
    assert (course(workdir), digest(workdir, NUM_STEPS)) == theirs


def test_a_damaged_checkpoint_is_passed_over(
    finished: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    workdir = survival.interrupted(finished, tmp_path / "damaged", NUM_STEPS)
    newest = workdir / "checkpoints" / str(NUM_STEPS)
    largest = max((p for p in newest.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    data = bytearray(largest.read_bytes())
    data[len(data) // 2] ^= 4
    largest.write_bytes(data)
    run(finished, workdir)
    assert course(workdir) == course(finished)
    assert largest.name in survival.events(workdir, "checkpoint_skipped")[-1]["message"]
    assert survival.events(workdir, "resumed")[-1]["step"] == NUM_STEPS - 4
    assert digest(workdir, NUM_STEPS) == digest(finished, NUM_STEPS)


def test_a_full_disk_costs_a_checkpoint_not_the_run(
    finished: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk is full from the third checkpoint on, for two of them."""
    from lm.checkpoints import arrays

    real, calls = arrays.start, []

    def start(writer, directory, leaves):
        calls.append(int(pathlib.Path(directory).name))
        if len(calls) in (3, 4):
            raise OSError(28, "No space left on device", str(directory))
        return real(writer, directory, leaves)

    monkeypatch.setattr(arrays, "start", start)
    workdir = run(finished, tmp_path / "full")
    failed = survival.events(workdir, "save_failed")
    assert [row["step"] for row in failed] == [12, 16]
    assert all("No space left" in row["error"] for row in failed)
    assert saved(workdir) == [step for step in range(4, NUM_STEPS + 1, 4) if step not in (12, 16)]
    assert course(workdir) == course(finished)

import concurrent.futures
import json
import os
import random
import signal
import subprocess
import sys
import threading

import numpy as np
import pytest

from data_pipelines import local_text
from data_pipelines.local_text import build, open_corpus
from lm.data import HeldOut
from lm.data.corpus import CorpusError

TEXT = (
    "the a model reads text and learns words from many rows of tokens while its loss falls "
    "slowly over steps because every gradient moves weights toward better guesses caf\u00e9 42"
)
WORDS = TEXT.split()


def write_files(directory, num_files=40, num_words=150, seed=0):
    rng = random.Random(seed)
    texts = {}
    for i in range(num_files):
        path = directory / "text" / f"part{i % 3}" / f"{i}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        words = [rng.choice(WORDS) + ("\n" if rng.random() < 0.1 else "") for _ in range(num_words)]
        texts[path] = " ".join(words)
        path.write_text(texts[path])
    return f"{directory}/text/**/*.txt", texts


def quiet_build(output, files, **changes):
    return build(output, files, **{"vocab_size": 400, "progress": False, **changes})


def splits_of(built, name="local_text"):
    return built.summary["sources"][name]["splits"]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    directory = tmp_path_factory.mktemp("corpus")
    pattern, texts = write_files(directory)
    return quiet_build(directory / "out", pattern, held_out=0.1), texts, pattern


def test_every_document_is_in_one_split_and_comes_back_whole(corpus):
    built, texts, _ = corpus
    splits = {s: sorted(built.texts(s)) for s in ("train", "validation")}
    assert sorted(splits["train"] + splits["validation"]) == sorted(texts.values())
    assert 0 < len(splits["validation"]) < len(splits["train"])
    for split, documents in splits.items():
        about = splits_of(built)[split]
        assert about["documents"] == len(documents)
        assert about["bytes"] == sum(len(d.encode()) for d in documents)
        assert about["tokens"] == built.source(split).lengths.sum()


def test_documents_carry_bos_and_eos(corpus):
    built, _, _ = corpus
    tokenizer, source = built.tokenizer(), built.source("train")
    for d in range(len(source)):
        ids = source.read(d).tolist()
        assert (ids[0], ids[-1]) == (tokenizer.bos_id, tokenizer.eos_id)
        assert not {tokenizer.bos_id, tokenizer.eos_id} & set(ids[1:-1])


def test_held_out_batches_read_the_validation_text(corpus):
    built, _, _ = corpus
    source = built.source("validation")
    held_out = HeldOut(built.packed("validation", 64), 4)
    assert held_out.num_bytes == splits_of(built)["validation"]["bytes"]
    targets = [int(t) for b in held_out for t in b["targets"][b["weights"] > 0]]
    expected = [int(t) for d in range(len(source)) for t in source.read(d)[1:]]
    assert sorted(targets) == sorted(expected)


def test_built_again_it_is_reused(corpus):
    built, _, pattern = corpus
    before = {p: p.stat().st_mtime_ns for p in built.directory.rglob("*")}
    again = quiet_build(built.directory, pattern, held_out=0.1)
    assert again.summary == built.summary == open_corpus(built.directory).summary
    assert {p: p.stat().st_mtime_ns for p in built.directory.rglob("*")} == before


def test_the_result_depends_on_text_and_seed_alone(corpus, tmp_path):
    built, _, _ = corpus
    pattern, _ = write_files(tmp_path)
    same = quiet_build(tmp_path / "same", pattern, held_out=0.1)
    assert splits_of(same) == splits_of(built)
    assert same.summary["tokenizer"] == built.summary["tokenizer"]
    other = quiet_build(tmp_path / "other", pattern, held_out=0.1, seed=1)
    assert splits_of(other) != splits_of(built)


def test_other_parameters_are_refused(corpus):
    built, _, pattern = corpus
    with pytest.raises(CorpusError, match=r"other parameters: vocab_size=401 \(there: 400\)"):
        quiet_build(built.directory, pattern, held_out=0.1, vocab_size=401)
    with pytest.raises(CorpusError, match=r"seed=3 \(there: 0\); choose another output, delete"):
        quiet_build(built.directory, pattern, held_out=0.1, seed=3)


def test_changed_files_are_noticed(tmp_path):
    pattern, texts = write_files(tmp_path)
    quiet_build(tmp_path / "out", pattern)
    next(iter(texts)).write_text("changed and so of another size")
    with pytest.raises(CorpusError, match=r"files of .* changed since .* was built"):
        quiet_build(tmp_path / "out", pattern)


def test_an_interrupted_build_is_redone(tmp_path, monkeypatch):
    pattern, _ = write_files(tmp_path)
    with monkeypatch.context() as patch:

        def interrupt(*args, **kwargs):
            raise KeyboardInterrupt

        patch.setattr(local_text, "write_dataset", interrupt)
        with pytest.raises(KeyboardInterrupt):
            quiet_build(tmp_path / "out", pattern)
    assert not (tmp_path / "out").exists()
    with pytest.raises(CorpusError, match=r"no corpus at .*corpus\.json is missing"):
        open_corpus(tmp_path / "out")
    (tmp_path / ".out.partial" / "local_text").mkdir(parents=True)  # what a kill leaves
    built = quiet_build(tmp_path / "out", pattern)
    fresh = quiet_build(tmp_path / "fresh", pattern)
    assert built.summary == fresh.summary
    assert not list(tmp_path.glob(".*"))
    assert not list((tmp_path / "out").glob(".*"))


def test_one_file_splits_into_sections(tmp_path):
    rng = random.Random(0)
    text = " ".join(rng.choice(WORDS) + str(rng.randrange(999)) for _ in range(8000))
    (tmp_path / "book.txt").write_text(text)
    built = quiet_build(tmp_path / "out", str(tmp_path / "book.txt"))
    validation = splits_of(built)["validation"]
    assert 0 < validation["bytes"] < 0.3 * len(text)
    assert validation["bytes"] + splits_of(built)["train"]["bytes"] == len(text.encode())


def test_held_out_is_the_share_asked_for(tmp_path):
    pattern, _ = write_files(tmp_path, num_files=90, num_words=40)
    small, large = (
        set(quiet_build(tmp_path / f"{share}", pattern, held_out=share).texts("validation"))
        for share in (0.2, 0.6)
    )
    assert 0.08 * 90 < len(small) < 0.35 * 90
    assert 0.45 * 90 < len(large) < 0.75 * 90
    assert small < large


def test_max_bytes_bounds_the_text(tmp_path):
    pattern, texts = write_files(tmp_path)
    longest = max(len(t.encode()) for t in texts.values())
    built = quiet_build(tmp_path / "out", pattern, max_bytes=15_000)
    total = sum(s["bytes"] for s in splits_of(built).values())
    assert 15_000 <= total < 15_000 + longest


def test_the_system_has_text(tmp_path):
    built = build(tmp_path / "out", max_bytes=700_000, vocab_size=1024, progress=False)
    kinds = built.summary["sources"]["local_text"]["bytes_by_kind"]
    assert kinds["source"] / sum(kinds.values()) == pytest.approx(0.7, abs=0.1)
    assert splits_of(built)["train"]["bytes_per_token"] > 1.8
    assert "def " in "".join(built.texts("train"))
    ((_, plan),) = built.packed("train", 256).shards
    assert plan.waste < 0.01
    assert np.all(built.source("train").lengths > 2)


def test_no_file_matches(tmp_path):
    with pytest.raises(CorpusError, match=r"no files match '.*nowhere/\*\.txt'.*quote"):
        quiet_build(tmp_path / "out", f"{tmp_path}/nowhere/*.txt")


def test_a_file_that_is_not_utf8(tmp_path):
    pattern, _ = write_files(tmp_path, num_files=5)
    bad = tmp_path / "text" / "latin.txt"
    bad.write_bytes(b"0123456789 caf\xe9 au lait")
    with pytest.raises(
        CorpusError, match=r"latin\.txt' is not UTF-8: byte 0xe9 at offset 14.*iconv"
    ):
        quiet_build(tmp_path / "out", pattern)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["text"]


def test_an_empty_corpus(tmp_path):
    for i in range(3):
        (tmp_path / f"{i}.txt").write_text(" \n" * i)
    (tmp_path / "zero.txt").write_bytes(b"\0" * 9)
    with pytest.raises(CorpusError, match=r"'local_text' is empty.*3 empty, 1 binary"):
        quiet_build(tmp_path / "out", f"{tmp_path}/*.txt")


def test_a_corpus_too_small(tmp_path):
    pattern, _ = write_files(tmp_path)
    with pytest.raises(CorpusError, match=r"vocab_size=5000 is too large .* at most \d+; lower"):
        quiet_build(tmp_path / "out", pattern, vocab_size=5000)
    (tmp_path / "one.md").write_text("a single short file")
    with pytest.raises(CorpusError, match=r"1 document of 19 bytes.* held-out .*add text"):
        quiet_build(tmp_path / "out", f"{tmp_path}/one.md")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"held_out": 0.0}, "held_out=0.0"),
        ({"held_out": 1.0}, "held_out=1.0"),
        ({"prose_fraction": 1.5}, "prose_fraction=1.5"),
        ({"max_bytes": 0}, "max_bytes=0"),
    ],
)
def test_bad_parameters(tmp_path, changes, message):
    with pytest.raises(CorpusError, match=message):
        quiet_build(tmp_path / "out", None, **changes)


def test_an_output_of_something_else(tmp_path):
    pattern, _ = write_files(tmp_path)
    with pytest.raises(CorpusError, match=r"exists and is not a corpus.*another output"):
        quiet_build(tmp_path, pattern)


KILLED = """
import os, signal, sys
from data_pipelines import local_text
at = sys.argv[1]
whole = getattr(local_text, at)
def killed(*args, **kwargs):
    if at == "write_dataset":
        whole(*args, **kwargs)  # the dataset is there, the rest is not
    os.kill(os.getpid(), signal.SIGKILL)
setattr(local_text, at, killed)
local_text.build(sys.argv[2], sys.argv[3], vocab_size=400, progress=False)
"""


@pytest.mark.parametrize("at", ["train_sentencepiece", "write_dataset"])
def test_a_killed_build_is_never_taken_for_whole(tmp_path, at):
    pattern, _ = write_files(tmp_path)
    command = [sys.executable, "-c", KILLED, at, str(tmp_path / "out"), pattern]
    done = subprocess.run(command, timeout=120, env=os.environ, check=False)
    assert done.returncode == -signal.SIGKILL
    assert (tmp_path / ".out.partial").is_dir()
    with pytest.raises(CorpusError, match="no corpus"):
        open_corpus(tmp_path / "out")
    built = quiet_build(tmp_path / "out", pattern)
    assert built.summary == quiet_build(tmp_path / "fresh", pattern).summary
    assert not list(tmp_path.glob(".*"))


def test_two_builds_of_one_output_make_it_once(tmp_path, monkeypatch):
    pattern, _ = write_files(tmp_path)
    written = []
    write_dataset = local_text.write_dataset
    monkeypatch.setattr(
        local_text,
        "write_dataset",
        lambda *args, **kwargs: written.append(args[0]) or write_dataset(*args, **kwargs),
    )
    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        futures = [pool.submit(quiet_build, tmp_path / "out", pattern) for _ in range(3)]
        summaries = [future.result(60).summary for future in futures]
    assert summaries[0] == summaries[1] == summaries[2]
    assert len(written) == 1
    assert not list(tmp_path.glob(".*"))


def test_one_host_builds_and_the_others_wait(tmp_path):
    pattern, _ = write_files(tmp_path)
    barrier = threading.Barrier(3)

    def host(index):
        # The files are on the first host alone.
        files = pattern if index == 0 else "/nowhere/*.txt"
        return quiet_build(
            tmp_path / "out", files, process_index=index, wait=lambda _: barrier.wait(60)
        )

    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        first, *others = (f.result(60) for f in [pool.submit(host, i) for i in range(3)])
    assert all(other.summary == first.summary for other in others)


def test_a_build_that_fails_on_the_first_host_keeps_no_other_waiting(tmp_path):
    barrier = threading.Barrier(2)

    def host(index):
        return quiet_build(
            tmp_path / "out", "/nowhere/*.txt", process_index=index, wait=lambda _: barrier.wait(60)
        )

    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        first, other = (pool.submit(host, i) for i in range(2))
        with pytest.raises(CorpusError, match="no files match"):
            first.result(60)
        with pytest.raises(CorpusError, match=r"host 1 finds no corpus .* share, or copy host 0's"):
            other.result(60)


def test_command_line(tmp_path):
    pattern, _ = write_files(tmp_path)
    command = [sys.executable, "-m", "data_pipelines.local_text", f"--files={pattern}"]

    def run(*arguments):
        return subprocess.run(
            [*command, *arguments], capture_output=True, text=True, timeout=120, env=os.environ
        )

    done = run(f"--output={tmp_path / 'out'}", "--vocab_size=400", "--held_out=0.1")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout[: done.stdout.rindex("}") + 1])["tokenizer"]["vocab_size"] == 400
    assert f"tokenizer: {tmp_path / 'out' / 'tokenizer.model'}" in done.stdout
    assert "B/s" in done.stderr  # a rate
    failed = run(f"--output={tmp_path / 'out'}", "--vocab_size=500")
    assert failed.returncode == 1
    assert failed.stderr.startswith("error: ")
    assert "Traceback" not in failed.stderr
    assert "vocab_size=500 (there: 400)" in failed.stderr

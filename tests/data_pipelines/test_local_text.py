import concurrent.futures
import functools
import json
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import threading
from unittest.mock import Mock

import numpy as np
import pytest

from data_pipelines import local_text
from data_pipelines.local_text import build, open_corpus
from lm.data import HeldOut
from lm.data.corpus import CorpusError
from tests.refuses import refuses

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


def refused(output, files, *words, **changes):
    refuses(lambda: quiet_build(output, files, **changes), *words, error=CorpusError)


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
    refused(
        built.directory, pattern, "other parameters: vocab_size=401 (there: 400), seed=3 (there: 0)"
        "; choose another output, delete", held_out=0.1, vocab_size=401, seed=3,
    )  # fmt: skip


def test_changed_files_are_noticed(tmp_path):
    pattern, texts = write_files(tmp_path)
    quiet_build(tmp_path / "out", pattern)
    next(iter(texts)).write_text("changed and so of another size")
    refused(tmp_path / "out", pattern, "the files of [", "changed since", "was built")


def test_the_content_of_the_text_counts_and_it_may_go(corpus, tmp_path, caplog):
    """Touched, copied or deleted text changes nothing; `begun`, no other text or tokenizer does."""
    built, texts, pattern = corpus
    reopen = functools.partial(quiet_build, built.directory, held_out=0.1)
    again, others = pattern.replace("/text/", "/again/"), pattern.replace("/text/", "/others/")
    for i, (path, text) in enumerate(texts.items()):
        os.utime(path, (i, i))
        for target, content in ((again, text), (others, text + "!")):
            copy = pathlib.Path(target.split("/**")[0], *path.parts[-2:])
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_text(content)
    assert reopen(pattern).summary == reopen(again).summary == built.summary
    refuses(lambda: reopen(others), "the files of [", "changed since", error=CorpusError)
    refuses(lambda: reopen("/nowhere/*"), "no files match", error=CorpusError)
    assert not caplog.messages
    for files, more, words in (
        (others, {}, "has changed and is not read again"),
        ("/nowhere/*", {}, "is not read again: the tokens in"),
        (again, {"tokenizer": "/nowhere/t.model"}, "has a vocab_size of its own (400)"),
    ):
        assert reopen(files, begun=True, **more).summary == built.summary
        assert words in caplog.text
        caplog.clear()
    refuses(lambda: reopen(again, begun=True, seed=3), "seed=3 (there: 0)", error=CorpusError)
    for path in texts:
        path.rename(path.with_suffix(".moved"))
    try:
        assert reopen(pattern).summary == built.summary
    finally:
        for path in texts:
            path.with_suffix(".moved").rename(path)


@pytest.fixture(scope="module")
def lossy(tmp_path_factory):
    """Models as of T5 and GPT: text normalized, unknown characters, and one without BOS."""
    import sentencepiece

    folder = tmp_path_factory.mktemp("lossy")
    for bos in (3, -1):
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter([TEXT] * 20), model_prefix=str(folder / f"bos{bos}"),
            vocab_size=60, model_type="unigram", normalization_rule_name="nmt_nfkc",
            hard_vocab_limit=False, minloglevel=2, pad_id=0, eos_id=1, unk_id=2, bos_id=bos,
        )  # fmt: skip
    return folder


@pytest.mark.parametrize("bos", [3, -1])
def test_what_the_tokens_lack_is_counted(lossy, tmp_path, caplog, bos):
    """And bits per byte is of the text that they hold, for a model and an n-gram alike."""
    import sentencepiece

    oracle = sentencepiece.SentencePieceProcessor(model_file=str(lossy / f"bos{bos}.model"))
    (tmp_path / "text").mkdir()
    unknown = changed = 0
    for i in range(30):
        text = f"the  model \u2460 reads\u4e2d {TEXT[:i]}" if i < 4 else TEXT[i:].strip()
        (tmp_path / "text" / f"{i}.txt").write_text(text)
        ids = oracle.encode(text)
        unknown += ids.count(2)
        changed += oracle.decode(ids) != text
    pattern, model = str(tmp_path / "text" / "*.txt"), str(lossy / f"bos{bos}.model")
    built = quiet_build(tmp_path / "out", pattern, tokenizer=model, held_out=0.3)
    about = built.summary["sources"]["local_text"]
    assert (about["unknown_tokens"], about["documents_changed"]) == (unknown, changed)
    total = sum(split["documents"] for split in about["splits"].values())
    words = f"{unknown} unknown tokens, and {changed} of {total} documents do not come back"
    assert words in caplog.text and unknown > 3 <= changed
    assert ("no BOS token" in caplog.text) == (bos < 0)
    for split in ("train", "validation"):
        held = sum(len(text.encode()) for text in built.texts(split))
        assert built.source(split).num_bytes.sum() == held
        first = built.source(split).read(0)[0]
        assert (first == bos) == (bos >= 0)
    caplog.clear()
    quiet_build(tmp_path / "out", pattern, tokenizer=model, held_out=0.3)
    assert words in caplog.text  # each time


def test_nothing_is_held_out(tmp_path):
    pattern, texts = write_files(tmp_path)
    built = quiet_build(tmp_path / "out", pattern, held_out=0.0)
    assert list(splits_of(built)) == ["train"] and not built.validation_names
    assert sorted(built.texts("train")) == sorted(texts.values())


def test_damaged_tokens_are_refused_and_whole_copies_will_do(tmp_path):
    pattern, _ = write_files(tmp_path)
    built = quiet_build(tmp_path / "out", pattern)
    whole = built.source("train")
    (built.directory / "local_text").rename(tmp_path / "away")
    assert open_corpus(built.directory).source("train").fingerprint == whole.fingerprint
    other = quiet_build(tmp_path / "other", pattern, seed=1)
    (other.directory / "local_text").rename(built.directory / "local_text")
    shutil.rmtree(built.directory / "token_cache")
    words = "are not those it was built with", "copy it again"
    refuses(lambda: open_corpus(built.directory).source("train"), *words, error=CorpusError)
    (built.directory / "corpus.json").write_text("{")
    refuses(lambda: open_corpus(built.directory), "is damaged", error=CorpusError)


def test_an_interrupted_build_leaves_nothing(tmp_path, monkeypatch):
    pattern, _ = write_files(tmp_path)
    monkeypatch.setattr(local_text, "write_dataset", Mock(side_effect=KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        quiet_build(tmp_path / "out", pattern)
    assert [path.name for path in tmp_path.iterdir()] == ["text"]


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


def test_the_system_has_text(small_system, tmp_path):
    built = build(tmp_path / "out", max_bytes=250_000, vocab_size=700, progress=False)
    kinds = built.summary["sources"]["local_text"]["bytes_by_kind"]
    assert kinds["source"] / sum(kinds.values()) == pytest.approx(0.7, abs=0.1)
    assert splits_of(built)["train"]["bytes_per_token"] > 1.8
    assert "def " in "".join(built.texts("train"))
    ((_, plan),) = built.packed("train", 256).shards
    assert plan.waste < 0.01
    assert np.all(built.source("train").lengths > 2)


def test_text_that_does_not_do(tmp_path):
    out = tmp_path / "out"
    refused(out, f"{tmp_path}/nowhere/*.txt", "no files match", "nowhere/*.txt", "quote")
    pattern, _ = write_files(tmp_path)
    refused(out, pattern, "vocab_size=5000 is too large", "at most", "lower", vocab_size=5000)
    refused(tmp_path, pattern, "exists and is not a corpus", "another output")
    (tmp_path / "one.md").write_text("a single short file")
    refused(out, f"{tmp_path}/one.md", "1 document of 19 bytes", "held-out split; add text")
    for name, content in {"a": b"", "b": b" \n", "c": b" \n" * 2, "zero": b"\0" * 9}.items():
        (tmp_path / f"{name}.txt").write_bytes(content)
    refused(out, f"{tmp_path}/*.txt", "'local_text' is empty", "3 empty, 1 binary")
    (tmp_path / "text" / "latin.txt").write_bytes(b"0123456789 caf\xe9 au lait")
    words = ("latin.txt', line 1: not UTF-8, byte 0xe9 at byte 15", "iconv")
    refused(out, pattern, *words)
    assert not out.exists() and not list(tmp_path.glob(".*"))


def test_bad_parameters(tmp_path):
    for changes in (
        {"held_out": -0.1}, {"held_out": 1.0}, {"prose_fraction": 1.5}, {"max_bytes": 0}
    ):  # fmt: skip
        ((name, value),) = changes.items()
        refused(tmp_path / "out", None, f"{name}={value}", **changes)


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
    words = ("no corpus at", "corpus.json is missing")
    refuses(lambda: open_corpus(tmp_path / "out"), *words, error=CorpusError)
    built = quiet_build(tmp_path / "out", pattern)
    assert built.summary == quiet_build(tmp_path / "fresh", pattern).summary
    assert not list(tmp_path.glob(".*"))


def test_two_builds_of_one_output_make_it_once(tmp_path, monkeypatch):
    pattern, _ = write_files(tmp_path)
    write = Mock(side_effect=local_text.write_dataset)
    monkeypatch.setattr(local_text, "write_dataset", write)
    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        futures = [pool.submit(quiet_build, tmp_path / "out", pattern) for _ in range(3)]
        summaries = [future.result(60).summary for future in futures]
    assert summaries[0] == summaries[1] == summaries[2]
    assert write.call_count == 1
    assert not list(tmp_path.glob(".*"))


def on_hosts(output, *files):
    """What each of several hosts finds that builds one corpus, each of its own files."""
    barrier = threading.Barrier(len(files))
    with concurrent.futures.ThreadPoolExecutor(len(files)) as pool:
        return [
            pool.submit(
                quiet_build, output, pattern, process_index=i, wait=lambda _: barrier.wait(60)
            )
            for i, pattern in enumerate(files)
        ]


def test_one_host_builds_and_the_others_wait(tmp_path):
    """The files are on the first host alone; if it fails, it keeps no other waiting."""
    pattern, _ = write_files(tmp_path)
    hosts = on_hosts(tmp_path / "out", pattern, "/nowhere/*.txt", "/nowhere/*.txt")
    first, *others = (host.result(60).summary for host in hosts)
    assert others == [first, first]
    first, other = on_hosts(tmp_path / "none", "/nowhere/*.txt", "/nowhere/*.txt")
    refuses(lambda: first.result(60), "no files match", error=CorpusError)
    words = ("host 1 finds no corpus", "share, or copy host 0's")
    refuses(lambda: other.result(60), *words, error=CorpusError)


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
    for arguments, words in (
        (["--vocab_size=500"], "vocab_size=500 (there: 400)"),
        (["--tokenizer=/nowhere/t.model"], "/nowhere/t.model"),
    ):
        failed = run(f"--output={tmp_path / 'out'}", *arguments)
        assert failed.returncode == 2 and words in failed.stderr
        assert failed.stderr.splitlines()[-1].startswith("error: ")
        assert "Traceback" not in failed.stderr

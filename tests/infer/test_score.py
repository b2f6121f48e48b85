"""Log-probabilities of given text against softmax; windows by what they promise."""

import math

import jax
import numpy as np
import pytest

from lm.infer.score import Scorer, make_windows, perplexity
from lm.model import Tokens, forward, make_head
from tests.infer.test_generate import CONFIG, params  # noqa: F401
from tests.refuses import refuses


def test_logprobs_are_those_of_the_model(params):  # noqa: F811
    rng = np.random.default_rng(0)
    rows = [rng.integers(0, 61, n).tolist() for n in (40, 3, 1, 17, 40)]
    found = Scorer(params, CONFIG, batch_size=2).logprobs(rows)
    for row, logprobs in zip(rows, found, strict=True):
        hidden = forward(params, Tokens.of(np.array([row])), CONFIG).hidden
        whole = jax.nn.log_softmax(make_head(params, CONFIG).logits(hidden)[0, :, :61])
        expected = [whole[i, token] for i, token in enumerate(row[1:])]
        np.testing.assert_allclose(logprobs, expected, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize(("num", "window", "stride"), [(100, 16, 4), (33, 16, 16), (9, 16, 5)])
def test_windows_score_each_token_once(num, window, stride):
    """All but the first; with overlap each has at least window - stride tokens before it."""
    scored = []
    for w in make_windows(num, window, stride, "transformers"):
        assert w.start % stride == 0
        assert w.stop - w.start <= window
        scored += range(w.first, w.stop)
        if stride < window:
            assert w.first - w.start >= min(window - stride, w.first)
    first_tokens = set(range(0, num, window)) if stride == window else {0}
    assert scored == [i for i in range(num) if i not in first_tokens]


def test_windows_of_llama_cpp_score_their_second_half():
    windows = list(make_windows(2100, 512, None, "llama.cpp"))
    assert [w.start for w in windows] == [0, 512, 1024, 1536]
    assert all(w.stop - w.first == 255 for w in windows)


class Letters:
    add_bos, bos_id = True, 2

    def decode_bytes(self, ids, continuation=False):
        return b"xy" * len(ids)


def test_perplexity_adds_up(params):  # noqa: F811
    ids = np.random.default_rng(3).integers(0, 61, 70).tolist()
    scorer = Scorer(params, CONFIG, batch_size=3)
    found = perplexity(scorer, Letters(), ids, 32, 8)
    rows = [(ids[:32], 1), *((ids[s : s + 32], 24) for s in (8, 16, 24, 32)), (ids[40:70], 24)]
    # The last window of 30 begins at 40, where 64 tokens have been scored.
    total = [scorer.logprobs([row])[0][first - 1 :] for row, first in rows]
    nats = -np.concatenate(total).astype(np.float64)
    assert found.tokens == len(nats) == 69
    assert found.nats_per_token == pytest.approx(nats.mean(), rel=1e-6)
    assert found.perplexity == pytest.approx(math.exp(nats.mean()), rel=1e-6)
    assert found.bits_per_byte == pytest.approx(nats.mean() / math.log(2) / 2, rel=1e-6)


def test_bos_takes_the_first_place_in_windows_of_llama_cpp(params):  # noqa: F811
    ids = np.random.default_rng(3).integers(0, 61, 40).tolist()
    scorer = Scorer(params, CONFIG)
    found = perplexity(scorer, Letters(), ids, 16, convention="llama.cpp")
    rows = [[2, *ids[1:16]], [2, *ids[17:32]]]
    nats = -np.concatenate([row[8:] for row in scorer.logprobs(rows)])
    assert (found.tokens, found.windows) == (14, 2)
    assert found.nats_per_token == pytest.approx(nats.mean(), rel=1e-5)


def test_refusals(params):  # noqa: F811
    def windows(num: int, window: int, stride: int | None, convention):
        return lambda: list(make_windows(num, window, stride, convention))

    for call, words in (
        (windows(100, 1, None, "transformers"), "window=1"),
        (windows(100, 16, 17, "transformers"), "stride=17; use 1 to the window, 16"),
        (windows(1, 16, None, "transformers"), "1 tokens; perplexity needs"),
        (windows(100, 16, 8, "llama.cpp"), "do not overlap"),
        (windows(15, 16, None, "llama.cpp"), "less than one window of 16"),
        (lambda: Scorer(params, CONFIG).logprobs([[1] * 97]), "97 tokens do not fit the model's"),
        (lambda: Scorer(params, CONFIG).logprobs([[0, 61]]), "ids 0 to 61; vocab_size is 61"),
        (lambda: Scorer(params, CONFIG, batch_size=0), "batch_size=0"),
    ):
        refuses(call, words)

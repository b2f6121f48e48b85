"""Logits, loss and the gradient of every weight equal those of `transformers`, each family."""

from __future__ import annotations

import copy
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm.formats import from_huggingface, from_tensors, to_tensors
from lm.model import Tokens, forward, make_head, num_params
from lm.model.decoder import embed
from tests.model.huggingface_oracle import CASES, make_oracle

pytestmark = pytest.mark.oracle

T = 13
# Lengths of the documents of each row: one whole, three packed (one of a single token), one padded.
ROWS = ((T,), (5, 1, 7), (9,))


def make_batch(vocab_size: int) -> tuple[Tokens, np.ndarray, np.ndarray, list[tuple[int, slice]]]:
    """Packed rows, targets, which of them count, and where each document is."""
    rng = np.random.default_rng(0)
    ids = rng.integers(0, vocab_size, (len(ROWS), T), dtype=np.int32)
    positions, segments, targets = np.zeros((3, *ids.shape), np.int32)
    counted = np.zeros(ids.shape, bool)
    documents = []
    for row, lengths in enumerate(ROWS):
        start = 0
        for number, length in enumerate(lengths, 1):
            here = slice(start, start + length)
            positions[row, here] = np.arange(length)
            segments[row, here] = number
            targets[row, start : start + length - 1] = ids[row, start + 1 : start + length]
            counted[row, start : start + length - 1] = True
            documents.append((row, here))
            start += length
    return Tokens(ids, positions, segments), targets, counted, documents


def oracle_results(model, ids, documents, total):
    """Logits of each document run alone, the mean loss, and gradients left in the model."""
    torch = pytest.importorskip("torch")
    model.zero_grad()
    logits, loss = [], 0.0
    for row, here in documents:
        tokens = torch.from_numpy(ids[row, here]).long()[None]
        length = tokens.shape[1]
        out = model(input_ids=tokens, labels=tokens if length > 1 else None, use_cache=False)
        logits.append(out.logits[0].detach().numpy())
        if length > 1:
            term = out.loss * (length - 1) / total
            term.backward()
            loss += term.item()
    return logits, loss


@pytest.mark.parametrize("case", CASES)
def test_equals_transformers(case):
    oracle = make_oracle(case)
    config = from_huggingface(oracle.json)
    params = from_tensors(oracle.arrays(), config)
    assert num_params(config) == sum(p.numel() for p in oracle.model.parameters())
    tokens, targets, counted, documents = make_batch(config.vocab_size)

    @jax.jit
    @functools.partial(jax.value_and_grad, has_aux=True)
    def run(params):
        hidden = forward(params, tokens, config).hidden
        head = make_head(params, config)
        logprobs, _ = head.logprobs(hidden, targets)
        return -jnp.sum(logprobs * counted) / counted.sum(), head.logits(hidden)

    (loss, logits), gradients = run(params)
    logits = np.asarray(logits)
    want_logits, want_loss = oracle_results(oracle.model, tokens.ids, documents, counted.sum())
    assert 0.3 < np.std(want_logits[0]) < 3, (
        "logits of order one make the tolerances mean something"
    )
    for (row, here), want in zip(documents, want_logits, strict=True):
        got = logits[row, here, : config.vocab_size]
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(loss, want_loss, rtol=1e-5)
    want_gradients = oracle.arrays(gradient=True)
    got_gradients = dict(to_tensors(gradients, config))
    assert got_gradients.keys() == want_gradients.keys()
    for name, want in want_gradients.items():
        largest = np.max(np.abs(want))
        assert largest > 0, name
        np.testing.assert_allclose(
            got_gradients[name], want, rtol=1e-4, atol=1e-4 * largest, err_msg=name
        )


@pytest.mark.parametrize("case", ["gemma2", "gemma3"])
def test_scaled_embedding_in_bfloat16(case):
    """The factor itself is rounded: sqrt(48) is 6.9375 in bfloat16."""
    torch = pytest.importorskip("torch")
    oracle = make_oracle(case)
    config = from_huggingface(oracle.json)
    params = from_tensors(oracle.arrays(), config, dtype=jnp.bfloat16)
    tokens, *_ = make_batch(config.vocab_size)
    layer = copy.deepcopy(oracle.model.get_input_embeddings()).to(torch.bfloat16)
    want = layer(torch.from_numpy(tokens.ids).long()).float().detach().numpy()
    got = np.asarray(embed(params, tokens, config, jnp.bfloat16), np.float32)
    np.testing.assert_array_equal(got, want)
    unrounded = np.asarray(params.embed, np.float32)[tokens.ids] * np.float32(48**0.5)
    assert np.any(want != np.asarray(jnp.asarray(unrounded, jnp.bfloat16), np.float32))

"""The local engine against recomputing everything."""

import dataclasses
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm.infer import Grammar, Messages, Request, Sample, programs
from lm.infer.generate import LocalSampler
from lm.infer.score import Scorer
from lm.model import (
    Attention,
    FeedForward,
    Layer,
    ModelConfig,
    Stack,
    Tokens,
    forward,
    make_head,
    param_specs,
    unstack,
)
from lm.sharding import Layout, MeshShape, make_mesh, make_rules
from lm.weights import Int8, shardings
from tests.model.drawn import dequantize, weights

LAYER = Layer(Attention(4, 2, 8), FeedForward(48))
CONFIG = ModelConfig(61, 32, (Stack((LAYER,), 2),), vocab_multiple=64, max_length=96)
PROMPTS = [[5, 3, 8], [1], [9, 9, 2, 60, 4, 4, 7, 1, 0, 3, 2, 1, 5, 6, 7, 8, 9, 2, 3], [7, 7]]


def spell(ids) -> str:
    return "".join(chr(48 + i) for i in ids)


class Letters:
    """A tokenizer whose tokens are one character each."""

    def __init__(self, *eos_ids):
        self.eos_ids, self.special_tokens = eos_ids, {}

    def stream(self, *, continuation):
        assert continuation
        return self

    def push(self, token_id):
        return spell([token_id])

    def finish(self):
        return ""


@pytest.fixture(scope="module")
def params():
    """Random weights whose logits are far enough apart that rounding decides no argmax."""
    return weights(CONFIG, matrices=4.0, others=0.02)


@pytest.fixture(scope="module")
def sampler(params):
    return LocalSampler(params, CONFIG, max_batch=4)


@jax.jit
def all_logits(params, ids):
    hidden = forward(params, Tokens.of(ids), CONFIG).hidden
    return make_head(params, CONFIG).logits(hidden)


@pytest.mark.parametrize("temperature", [0.0, 1.3])
def test_log_probabilities_are_those_of_the_model(params, sampler, temperature):
    """Against the whole forward pass over prompt and sample: those of the new tokens, which are the
    likeliest where greedy, and the likeliest of every position."""
    requests = [
        Request(prompt=p, max_new_tokens=9, temperature=temperature, seed=i, logprobs=True,
                top_logprobs=k)
        for i, (p, k) in enumerate(zip(PROMPTS, (3, 0, 1, 2), strict=True))
    ]  # fmt: skip
    samples = sampler.sample(requests)
    for request, sample in zip(requests, samples, strict=True):
        ids = [*sample.prompt_token_ids, *sample.token_ids]
        rows = jax.nn.log_softmax(all_logits(params, jnp.array([ids + [0] * (48 - len(ids))])))[0]
        rows = np.asarray(rows[len(request.prompt) - 1 : len(ids) - 1])
        assert (sample.prompt_token_ids, sample.finish_reason) == (request.prompt, "length")
        assert len(sample.token_ids) == 9
        assert temperature or sample.token_ids == tuple(rows.argmax(-1))
        expected = rows[np.arange(9), sample.token_ids]
        np.testing.assert_allclose(sample.logprobs, expected, atol=1e-4)
        assert (sample.top_logprobs is None) == (not request.top_logprobs)
        for row, top in zip(rows, sample.top_logprobs or (), strict=False):
            best = np.argsort(-row)[: request.top_logprobs]
            assert [token for token, _ in top] == best.tolist()
            np.testing.assert_allclose([value for _, value in top], row[best], atol=1e-4)
    assert len({s.token_ids for s in samples}) == len(samples)


def test_a_sample_depends_on_its_request_alone(sampler):
    """Alone, in another order, among other requests, across several batches: the same."""
    requests = [
        Request(prompt=p, max_new_tokens=n, temperature=t, seed=i, logprobs=True)
        for i, (p, n, t) in enumerate(
            zip(PROMPTS, (9, 30, 12, 1), (1.0, 0.0, 0.7, 2.0), strict=True)
        )
    ]
    alone = [sampler.sample([request])[0] for request in requests]
    others = [Request(prompt=[i] * 20, max_new_tokens=40, temperature=1) for i in range(3)]
    together = sampler.sample([*others, *reversed(requests)])[:2:-1]
    for one, other in zip(alone, together, strict=True):
        assert one.token_ids == other.token_ids
        assert one.finish_reason == other.finish_reason
        np.testing.assert_allclose(one.logprobs, other.logprobs, atol=2e-5)


def test_stop_ids_and_end_of_sequence(params, sampler):
    request = Request(prompt=PROMPTS[0], max_new_tokens=30)
    (free,) = sampler.sample([request])
    at = next(i for i in range(2, 30) if free.token_ids[i] not in free.token_ids[:i])
    stop = free.token_ids[at]
    stopping = Request(prompt=PROMPTS[0], max_new_tokens=30, stop_ids=[59, stop])
    stopped, unaffected = sampler.sample([stopping, request])
    assert stopped.token_ids == free.token_ids[: at + 1]
    assert stopped.finish_reason == "stop"
    assert unaffected.token_ids == free.token_ids
    assert free.finish_reason == unaffected.finish_reason == "length"
    (by_eos,) = LocalSampler(params, CONFIG, eos_ids=[stop]).sample([request])
    assert by_eos == stopped


def test_a_first_token_may_stop_or_be_the_last(sampler):
    (first,) = sampler.sample([Request(prompt=[5], max_new_tokens=1)])
    assert (len(first.token_ids), first.finish_reason, first.logprobs) == (1, "length", None)
    (same,) = sampler.sample([Request(prompt=[5], max_new_tokens=9, stop_ids=first.token_ids)])
    assert same == Sample(prompt_token_ids=(5,), token_ids=first.token_ids, finish_reason="stop")


def test_the_context_ends_a_sample(params, sampler):
    (free,) = sampler.sample([Request(prompt=[3] * 15, max_new_tokens=5)])
    sample, other = LocalSampler(params, CONFIG, max_length=20).sample(
        [Request(prompt=[3] * 15, max_new_tokens=50), Request(prompt=[3] * 19, max_new_tokens=50)]
    )
    assert sample == free
    assert (len(other.token_ids), sample.finish_reason) == (1, "length")


def test_text_leaves_the_stop_token_out(params, sampler):
    request = Request(prompt=[5], max_new_tokens=6)
    tokens = sampler.sample([request])[0].token_ids
    absent = next(i for i in range(61) if i not in tokens)
    at = tokens.index(tokens[-1])
    (free,) = LocalSampler(params, CONFIG, tokenizer=Letters(absent)).sample([request])
    assert (free.text, free.finish_reason) == (spell(tokens), "length")
    ends = Letters(59, tokens[at])
    (stopped,) = LocalSampler(params, CONFIG, tokenizer=ends).sample([request])
    assert (stopped.text, stopped.finish_reason) == (spell(tokens[:at]), "stop")


def test_weights_of_any_form(params):
    """Stacked or not; quantized leaves are those of their dequantized arrays."""
    request = Request(prompt=PROMPTS[0], max_new_tokens=10)
    (stacked,) = LocalSampler(params, CONFIG).sample([request])
    (unstacked,) = LocalSampler(unstack(params), CONFIG).sample([request])
    assert stacked == unstacked
    quantized = jax.tree.map(lambda w: Int8.quantize(w) if w.ndim == 3 else w, params)
    (sample,) = LocalSampler(quantized, CONFIG).sample([request])
    (expected,) = LocalSampler(dequantize(quantized), CONFIG).sample([request])
    assert sample.token_ids == expected.token_ids


def test_no_shape_is_compiled_twice(params):
    sampler = LocalSampler(params, CONFIG)
    sampler.sample([Request(prompt=[1] * 3, max_new_tokens=5)])
    compiled = programs.prefill._cache_size(), programs.decode._cache_size()
    for length in (1, 9, 16):
        sampler.sample([Request(prompt=[1] * length, max_new_tokens=40 - length, temperature=0.5)])
    assert (programs.prefill._cache_size(), programs.decode._cache_size()) == compiled


def test_a_sampler_that_cannot_be(params, sampler):
    for fields, message in (
        ({"max_batch": 0}, "max_batch=0"),
        ({"max_length": 1}, "max_length=1"),
        ({"layout": fake_layout(start=1)}, "weights are on .* place the weights by the layout"),
    ):
        with pytest.raises(ValueError, match=message):
            LocalSampler(params, CONFIG, **fields)
    with pytest.raises(ValueError, match="needs a tokenizer"):
        sampler.sample([Request(prompt=[1])], print)
    assert sampler.sample([]) == []


FAILING = {
    "prompt's 96 tokens leave no room .* use at most 95": {"prompt": [1] * 96},
    "token id 61 is outside vocab_size=61": {"prompt": [1, 61]},
    "token id 70 is outside": {"logit_bias": {70: 1.0}},
    "top_logprobs=62; there are 61": {"top_logprobs": 62},
    "adapter=0; the model has 0": {"adapter": 0},
    "stop texts need a tokenizer": {"stop": ["a"]},
    "prompt is text; give token ids, or wrap the sampler in Tokenized": {"prompt": "hi"},
    "prompt is messages": {"prompt": Messages([{"role": "user", "content": "hi"}])},
    "presence_penalty=0.5 is not implemented": {"presence_penalty": 0.5},
    "frequency_penalty=0.5 is not": {"frequency_penalty": 0.5},
    "repetition_penalty=1.2 is not": {"repetition_penalty": 1.2},
    r"grammar=Grammar\(.* is not": {"grammar": Grammar("regex", "a+")},
}


def test_a_request_that_fails_harms_no_other(params, sampler):
    """Each is a sample that says why, in its place; one with a row of NaN weights too."""
    good = Request(prompt=[5, 3, 8], max_new_tokens=4)
    failing = [Request(**{"prompt": [1], **fields}) for fields in FAILING.values()]
    samples = sampler.sample([good, *failing, good])
    (alone,) = sampler.sample([good])
    assert samples[0] == samples[-1] == alone
    for message, sample in zip(FAILING, samples[1:-1], strict=True):
        assert sample.finish_reason == "error"
        assert re.search(message, sample.error), sample.error
    broken = dataclasses.replace(params, embed=params.embed.at[60].set(jnp.nan))
    found = LocalSampler(broken, CONFIG).sample([good, Request(prompt=[60], max_new_tokens=4)])
    assert found[0] == alone
    assert re.match("log-probabilities are not finite in float32", found[1].error)


def test_several_samples_of_one_prompt(sampler):
    """`n` are the samples of as many seeds, one after another."""
    request = Request(prompt=[5, 3], max_new_tokens=6, temperature=1.0, seed=2**32 - 1, n=2)
    other = Request(prompt=[7], max_new_tokens=3, priority=1)
    one, two, last = sampler.sample([request, other])[:2] + sampler.sample([other])
    ones = [dataclasses.replace(request, n=1, seed=seed) for seed in (2**32 - 1, 0)]
    assert [one, two] == sampler.sample(ones)
    assert sampler.sample([request, other])[2] == last


def test_log_probabilities_of_a_prompt_and_of_the_draws(params, sampler):
    """A prompt's are the Scorer's, without a new token too; a draw's of what was left to draw."""
    scored = Scorer(params, CONFIG).logprobs(PROMPTS)
    requests = [
        Request(prompt=p, max_new_tokens=n, prompt_logprobs=True, logprobs=True, temperature=0.7,
                min_p=0.999, logit_bias={9: 100.0} if n == 3 else {})
        for p, n in zip(PROMPTS, (0, 2, 3, 0), strict=True)
    ]  # fmt: skip
    for request, sample, expected in zip(requests, sampler.sample(requests), scored, strict=True):
        np.testing.assert_allclose(sample.prompt_logprobs, expected, atol=1e-4)
        assert len(sample.token_ids) == request.max_new_tokens
        np.testing.assert_allclose(sample.sampling_logprobs, 0, atol=2e-5)  # one token is left
        if request.max_new_tokens == 3:
            assert sample.token_ids == (9, 9, 9)
            assert max(sample.logprobs) < -0.1


def fake_layout(start: int = 0, **axes: int) -> Layout:
    shape = MeshShape(**axes)
    devices = jax.devices()[start : start + math.prod(dataclasses.astuple(shape))]
    return Layout(make_mesh(shape, devices), make_rules())


def test_a_mesh_generates_and_scores_what_one_device_does(params, sampler):
    """Weights over a mesh give its layout by themselves; rows that do not divide are padded."""
    requests = [
        Request(prompt=p, max_new_tokens=8, temperature=t, logprobs=True)
        for p, t in zip(PROMPTS[:3], (0.0, 1.0, 0.0), strict=True)
    ]
    scored = Scorer(params, CONFIG, batch_size=3).logprobs(PROMPTS)
    layout = fake_layout(data=2, fsdp=2, tensor=2)
    placed = jax.device_put(params, shardings(param_specs(CONFIG), layout.rules, layout.mesh))
    meshed = LocalSampler(placed, CONFIG)
    assert meshed.layout == layout
    for kind in ("sliding", "paged"):
        meshed.cache = meshed.cache._replace(kind=kind)
        for one, other in zip(sampler.sample(requests), meshed.sample(requests), strict=True):
            assert one.token_ids == other.token_ids
            np.testing.assert_allclose(one.logprobs, other.logprobs, atol=2e-5)
    for one, other in zip(
        scored, Scorer(placed, CONFIG, batch_size=3).logprobs(PROMPTS), strict=True
    ):
        np.testing.assert_allclose(one, other, atol=2e-5)


def test_two_layouts_are_two_programs(params):
    """And equal ones, of samplers of their own, are one."""
    request = Request(prompt=[5] * 40, max_new_tokens=2)
    before = programs.prefill._cache_size()
    for start, new in ((0, 1), (1, 1), (1, 0), (0, 0)):
        layout = fake_layout(start)
        placed = jax.device_put(params, layout.mesh.devices.flat[0])
        LocalSampler(placed, CONFIG, max_length=80, layout=layout).sample([request])
        assert programs.prefill._cache_size() == (before := before + new)


def test_a_text_stops_a_sample(params):
    """The tokens end with the one that completes it, whatever else runs in the batch."""
    sampler = LocalSampler(params, CONFIG, tokenizer=Letters(), max_batch=4)
    requests = [Request(prompt=p, max_new_tokens=30) for p in PROMPTS]
    free = sampler.sample(requests)
    stop = free[2].text[10:12]
    at = free[2].text.index(stop)
    heard: dict[int, str] = {}
    found = sampler.sample(
        [*requests[:2], Request(prompt=PROMPTS[2], max_new_tokens=30, stop=[stop])],
        lambda i, text: heard.update({i: heard.get(i, "") + text}),
    )
    assert found[:2] == free[:2]
    assert found[2].text == free[2].text[:at]
    assert found[2].token_ids == free[2].token_ids[: at + 2]
    assert found[2].finish_reason == "stop"
    assert heard == {i: sample.text for i, sample in enumerate(found)}

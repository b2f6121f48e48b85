"""Requests and samples: validation, and loading without JAX."""

import pathlib
import subprocess
import sys

import numpy as np
import pytest

from lm.infer import Messages, Request, Sample
from lm.infer.tokenized import Tokenized
from lm.tokenizers import ChatTemplate

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent


def test_loads_without_jax():
    """What agents, evals and servers import: `lm.infer`, its requests and text."""
    module = "lm.infer.tokenized"
    code = f"import sys, {module}; sys.exit(any(m in sys.modules for m in ('jax', 'flax')))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=120).returncode == 0


def test_any_iterable_of_integers_becomes_a_tuple():
    request = Request(
        prompt=np.array([3, 1]), stop_ids=[2], max_new_tokens=np.int64(5), logit_bias={4: -1}
    )
    same = Request(prompt=(3, 1), stop_ids=(2,), max_new_tokens=5, logit_bias=[(4, -1.0)])
    assert request == same
    assert type(request.prompt[0]) is int
    assert hash(request) == hash(same)


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"prompt": []}, ValueError, "prompt is empty; give at least one"),
        ({"prompt": [1, -2]}, ValueError, r"prompt\[1\]=-2; token ids are 0"),
        ({"prompt": [1.5]}, TypeError, r"prompt\[0\]=1.5 is not an integer"),
        ({"stop_ids": [-1]}, ValueError, r"stop_ids\[0\]=-1"),
        ({"stop": "hi"}, TypeError, "stop='hi' is one text"),
        ({"max_new_tokens": 0}, ValueError, "max_new_tokens=0; use 1 or more, or ask for prompt_l"),
        ({"max_new_tokens": 2.0}, TypeError, "max_new_tokens=2.0 is not an integer"),
        ({"n": 0}, ValueError, "n=0; use 1 or more"),
        ({"temperature": -0.5}, ValueError, "temperature=-0.5; use 0 for greedy"),
        ({"temperature": float("nan")}, ValueError, "temperature=nan"),
        ({"min_p": 1.0}, ValueError, "min_p=1.0; use 0 for all tokens, or less than 1"),
        ({"repetition_penalty": 0}, ValueError, "repetition_penalty=0; use 1 for none"),
        ({"logit_bias": {-1: 2}}, ValueError, r"logit_bias\[0\]=-1"),
        ({"logit_bias": {1: float("inf")}}, ValueError, "logit_bias=.*; use finite numbers"),
        ({"seed": 2**32}, ValueError, "seed=4294967296; use 0 to 4294967295"),
    ],
)
def test_bad_requests(fields, error, message):
    with pytest.raises(error, match=message):
        Request(**{"prompt": [1], **fields})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"finish_reason": "eos"}, "finish_reason='eos'; use 'stop', 'length', 'error'"),
        ({"finish_reason": "error"}, "with error=None; give a message"),
        ({"finish_reason": "stop", "error": "no"}, "with error='no'"),
        ({"finish_reason": "stop", "token_ids": (2, 3), "logprobs": (-0.1,)}, "logprobs has 1 val"),
    ],
)
def test_bad_samples(fields, message):
    with pytest.raises(ValueError, match=message):
        Sample(**fields)
    with pytest.raises(ValueError, match=r'messages\[0\]=.* has no "role"'):
        Messages([{"content": "hi"}])


class Characters:
    """A tokenizer of one id per character, and BOS."""

    add_bos, bos_id, eos_id, eos_ids, special_tokens = True, 1, 2, (2,), {}

    def encode_prompt(self, text, opened=False):
        return [self.bos_id, *map(ord, text)]

    def stream(self, *, continuation):
        return self

    def push(self, token_id):
        return chr(token_id)

    def finish(self):
        return ""


class Echo:
    """A sampler that answers the prompt's own ids, and with `n` only one."""

    def sample(self, requests):
        assert all(r.n == 1 for r in requests)
        return [Sample(finish_reason="stop", token_ids=(*r.prompt[1:], 2)) for r in requests]


def test_text_and_messages_are_encoded_and_samples_decoded():
    """Ids stay as they are; a prompt that cannot be rendered fails alone, each of its `n`."""
    template = ChatTemplate(
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{{ tools | length }}>"
    )
    refusing = Messages([{"role": "user", "content": "x"}])
    chat = Messages([{"role": "user", "content": "hi"}], tools=[{"type": "function"}])
    sampler = Tokenized(Echo(), Characters(), template)
    requests = [Request(prompt=p) for p in ("abc", chat, [7, 65, 66])]
    texts = [sample.text for sample in sampler.sample(requests)]
    assert texts == ["abc", "<user>hi1>", "AB"]
    sampler.template = ChatTemplate("{{ raise_exception('no users') }}")
    found = sampler.sample([Request(prompt=refusing, n=2), Request(prompt="ok", stop=["k"])])
    assert [sample.finish_reason for sample in found] == ["error", "error", "stop"]
    assert "no users" in found[0].error
    assert found[2].text == "o"

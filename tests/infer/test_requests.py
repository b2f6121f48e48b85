"""Requests and samples: validation, and loading without JAX."""

import dataclasses
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from lm.infer import Request, Sample

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent


@pytest.mark.parametrize("module", ["lm.infer.requests", "lm.infer"])
def test_loads_without_jax(module):
    code = f"import sys, {module}; sys.exit(any(m in sys.modules for m in ('jax', 'flax')))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=120).returncode == 0


def test_any_iterable_of_integers_becomes_a_tuple():
    request = Request(prompt_token_ids=np.array([3, 1]), stop_ids=[2], max_new_tokens=np.int64(5))
    assert request == Request(prompt_token_ids=(3, 1), stop_ids=(2,), max_new_tokens=5)
    assert type(request.prompt_token_ids[0]) is int
    assert hash(request) == hash(dataclasses.replace(request))


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"prompt_token_ids": []}, ValueError, "prompt_token_ids is empty; give at least one"),
        ({"prompt_token_ids": [1, -2]}, ValueError, r"prompt_token_ids\[1\]=-2; token ids are 0"),
        ({"prompt_token_ids": [1.5]}, TypeError, r"prompt_token_ids\[0\]=1.5 is not an integer"),
        ({"prompt_token_ids": "hi"}, TypeError, "'hi' is text; encode it"),
        ({"stop_ids": [-1]}, ValueError, r"stop_ids\[0\]=-1"),
        ({"max_new_tokens": 0}, ValueError, "max_new_tokens=0; use 1 or more"),
        ({"max_new_tokens": 2.0}, TypeError, "max_new_tokens=2.0 is not an integer"),
        ({"temperature": -0.5}, ValueError, "temperature=-0.5; use 0 for greedy"),
        ({"temperature": float("nan")}, ValueError, "temperature=nan"),
        ({"seed": -1}, ValueError, "seed=-1; use 0 to 4294967295"),
        ({"seed": 2**32}, ValueError, "seed=4294967296"),
    ],
)
def test_bad_requests(fields, error, message):
    with pytest.raises(error, match=message):
        Request(**{"prompt_token_ids": [1], **fields})


def test_bad_samples():
    with pytest.raises(ValueError, match="finish_reason='eos'; use 'stop' or 'length'"):
        Sample(prompt_token_ids=(1,), token_ids=(2,), finish_reason="eos")
    with pytest.raises(ValueError, match="logprobs has 1 values for 2 token_ids"):
        Sample(prompt_token_ids=(1,), token_ids=(2, 3), finish_reason="stop", logprobs=(-0.1,))

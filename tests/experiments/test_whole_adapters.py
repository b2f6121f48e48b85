"""Adapters with embeddings of their own, as commands open and convert them."""

from __future__ import annotations

import json

import numpy as np
import pytest
from absl import flags
from absl.testing import flagsaver
from safetensors.numpy import load_file

from experiments import model_flags
from experiments.convert import convert
from lm.config.command_line import ConfigError
from lm.formats import load_pretrained, save_huggingface
from tests.formats.test_open import write_words
from tests.formats.test_peft_whole import D, V, by_hand, tied_by_hand
from tests.refuses import refuses

TABLES = {
    "model.embed_tokens.weight": np.full((V + 1, D), 2, np.float32),
    "lm_head.weight": np.full((V + 1, D), 3, np.float32),
}


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """A tied model, an adapter with tables of one token more and their tokenizer, a plain one."""
    root = tmp_path_factory.mktemp("adapters")
    save_huggingface(*tied_by_hand(), root / "model")
    write_words(root / "model", V)
    by_hand(root / "whole", TABLES)
    write_words(root / "whole", V + 1)
    by_hand(root / "plain", {"a.weight": np.zeros(1, np.float32)}, new_key=1)
    return root


def test_convert_writes_the_tables_of_an_adapter(places, tmp_path):
    """And the tokenizer that came with them, unless another is named."""
    model, out = places / "model", tmp_path / "out"
    convert(model, out, adapter=places / "whole")
    config = json.loads((out / "config.json").read_text())
    assert (config["vocab_size"], config["tie_word_embeddings"]) == (V + 1, False)
    written = load_file(out / "model.safetensors")
    for name, table in TABLES.items():
        np.testing.assert_array_equal(written[name], table)
    query = "model.layers.0.self_attn.q_proj.weight"
    before = load_file(model / "model.safetensors")[query]
    np.testing.assert_allclose(written[query], before + 2, atol=1e-6)
    again = load_pretrained(out)
    assert again.tokenizer.vocab_size == V + 1 and not again.config.tied
    convert(model, tmp_path / "other", adapter=places / "whole", tokenizer=model)
    other = load_pretrained(tmp_path / "other").tokenizer
    assert f"<{V}>" not in other.special_tokens and other.decode([V]) == ""


def test_flags(places):
    """Tables of one's own cannot be one of several; keys can be passed over."""
    model = f"--model={places / 'model'}"
    with flagsaver.flagsaver():
        flags.FLAGS(["", model, f"--adapter=a={places / 'whole'}", f"--adapter=b={places}/plain"])
        words = "--adapter=a=", "replaces the embedding or the output", "experiments.convert"
        refuses(model_flags.open_with_adapters, *words, error=ConfigError)
        flags.FLAGS(["", model, f"--adapter={places / 'whole'}"])
    with flagsaver.flagsaver():
        flags.FLAGS(["", model, f"--adapter={places / 'plain'}", "--ignore_config_keys=x,new_key"])
        words = "a.weight [1] is not in this model"
        refuses(model_flags.model_from_flags, words, error=ConfigError)

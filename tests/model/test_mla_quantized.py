"""Quantized directories of latent attention: rotated columns are put in our order as they lie."""

from __future__ import annotations

import pytest

from lm.formats import load_quantized
from lm.model import Latent
from tests.formats.test_quantized import assert_is, leaves_of, quantized_model


@pytest.mark.parametrize(
    ("form", "query_rank", "count"), [("gptq_act_order", 32, 16), ("awq", None, 14)]
)
def test_quantized_latent_attention_is_read(form, query_rank, count, tmp_path):
    """Per layer: down and up of queries (or one matrix) and of keys and values, out, and three."""
    latent = Latent(32, 8, 8, 16, query_rank)
    changes = {"num_kv_heads": 4, "latent": latent}
    expected, config = quantized_model(tmp_path, "deepseek_v2", form, **changes)
    params, found = load_quantized(tmp_path)
    assert found == config and len(leaves_of(params)) == count
    assert_is(params, expected, config)

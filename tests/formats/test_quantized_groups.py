"""Groups of rows of which the last is short: ceil(in / group_size) of them, by the formula."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from lm.files import FormatError
from lm.formats.quantized.layouts import formats_of
from tests.formats.test_quantized import compressed, words
from tests.refuses import refuses

OUT, ROWS, GROUP = 16, 72, 32  # groups of 32, 32 and 8 rows
OWNERS = np.arange(ROWS) // GROUP
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "sym": False}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": GROUP}
PACKED = compressed("pack-quantized", weights={"group_size": GROUP})
INT8 = compressed("int-quantized", weights={"group_size": GROUP})


def numbers(bits: int, owners: np.ndarray = OWNERS):
    """Codes [in, out], scales and zero points [groups, out], and scale (code - zero) [in, out]."""
    rng = np.random.default_rng(bits)
    codes = rng.integers(0, 1 << bits, (ROWS, OUT))
    scales = rng.uniform(0.01, 0.02, (3, OUT)).astype(np.float16)
    zeros = rng.integers(1, (1 << bits) - 1, (3, OUT))
    return codes, scales, zeros, scales[owners].astype(np.float64) * (codes - zeros[owners])


def gptq(bits: int, owners: np.ndarray = OWNERS):
    codes, scales, zeros, matrix = numbers(bits, owners)
    files = {"qweight": np.ascontiguousarray(words(codes.T, bits).T), "scales": scales,
             "qzeros": words(zeros - 1, bits), "g_idx": owners.astype(np.int32)}  # fmt: skip
    return files, matrix


def awq():
    order = [0, 2, 4, 6, 1, 3, 5, 7]
    codes, scales, zeros, matrix = numbers(4)
    files = {"qweight": words(codes, 4, order), "qzeros": words(zeros, 4, order), "scales": scales}
    return files, matrix


def packed():
    codes, scales, zeros, matrix = numbers(4)
    return {
        "weight_packed": words(codes.T, 4), "weight_scale": scales.T,
        "weight_shape": np.array([OUT, ROWS]), "weight_zero_point": words(zeros, 4).T,
    }, matrix  # fmt: skip


def int8():
    codes, scales, _, _ = numbers(8)
    values = (codes - 128).astype(np.int8)
    return {"weight": values.T, "weight_scale": scales.T}, scales[OWNERS].astype(float) * values


SHUFFLED = np.random.default_rng(0).permutation(OWNERS)
CASES = {
    "gptq": (GPTQ, *gptq(4)),
    "gptq_act_order": (GPTQ | {"desc_act": True}, *gptq(4, SHUFFLED)),
    "gptq_8bit": (GPTQ | {"bits": 8}, *gptq(8)),
    "awq": (AWQ, *awq()),
    "packed": (PACKED, *packed()),
    "int8": (INT8, *int8()),
}
CODES = {"int32": "I32", "float16": "F16", "int64": "I64", "int8": "I8"}


@pytest.mark.parametrize("name", CASES)
def test_the_last_group_may_be_short(name):
    q, arrays, matrix = CASES[name]
    present = {end: (x.shape, CODES[str(x.dtype)]) for end, x in arrays.items()}
    form = next(f for f in formats_of(q) if f.marker in arrays)
    for end, (shape, dtypes) in form.wanted((OUT, ROWS), present).items():
        assert shape in (None, present[end][0]) and present[end][1] in dtypes
    leaf = form.leaf(arrays, (OUT, ROWS))
    np.testing.assert_allclose(leaf.dequantize(jnp.float32), matrix, rtol=1e-6)


def test_groups_that_cannot_be():
    arrays, _ = gptq(4, np.where(OWNERS == 2, 1, OWNERS))
    refuses(lambda: formats_of(GPTQ)[0].leaf(arrays, (OUT, ROWS)), "g_idx does not divide 72 rows",
            error=FormatError)  # fmt: skip
    wanted = formats_of(GPTQ | {"desc_act": True})[0].wanted((OUT, ROWS), {})
    assert "g_idx" in wanted
    for q in (GPTQ, AWQ):
        for size in (0, "128", None):
            refuses(lambda q=q, s=size: formats_of(q | {"group_size": s}), f"group_size={size!r}")
    arrays, _ = packed()
    present = {end: (x.shape, CODES[str(x.dtype)]) for end, x in arrays.items()}
    other = formats_of(compressed("pack-quantized", weights={"group_size": 16}))[0]
    words = "3 groups of in=72 are not of group_size=(16,)"
    refuses(lambda: other.wanted((OUT, ROWS), present), words, error=FormatError)

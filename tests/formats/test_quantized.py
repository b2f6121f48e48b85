"""Quantized files of others, packed here number by number from the formats' descriptions."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from lm.files import FormatError
from lm.formats import from_tensors, save_huggingface
from lm.formats.families import make_config
from lm.formats.quantized.io import load_quantized
from lm.formats.quantized.layouts import AWQ, formats_of, unpack
from lm.model import stack
from lm.sharding import Layout, MeshShape, make_mesh, make_rules
from lm.weights import (
    NF4,
    Fp8,
    Int4,
    Int8,
    Int8Groups,
    StructuredWeight,
    is_structured,
    path_name,
)
from tests.formats.directories import edit, logits
from tests.model import drawn
from tests.refuses import refuses

SIZES = {"vocab_size": 136, "embed_dim": 64, "hidden_dim": 96, "num_layers": 2, "num_heads": 4}
IDS = jnp.asarray(np.random.default_rng(0).integers(0, 136, (2, 7)), jnp.int32)
GROUP = 32


def rng_of(name: str) -> np.random.Generator:
    return np.random.default_rng(list(name.encode()))


def words(values: np.ndarray, bits: int, order=None) -> np.ndarray:
    """int32 words along the last dimension, one number at a time."""
    per = 32 // bits
    order = list(range(per)) if order is None else order
    out = np.zeros((*values.shape[:-1], values.shape[-1] // per), np.uint64)
    for word in range(out.shape[-1]):
        for place in range(per):
            number = values[..., word * per + order[place]].astype(np.uint64)
            out[..., word] |= number << np.uint64(bits * place)
    return out.astype(np.uint32).view(np.int32)


def numbers(name, out, rows, bits, groups, middle, act_order=False):
    """A random module: codes [in, out], scales and zero points [groups, out], the group of each row
    [in], and the matrix [out, in] that they are."""
    rng = rng_of(name)
    codes = rng.integers(0, 1 << bits, (rows, out))
    scales = rng.uniform(0.01, 0.02, (groups, out)).astype(np.float16)
    scales *= np.float16(16 / 2**bits)
    zeros = np.full((groups, out), 1 << (bits - 1))
    if not middle:
        zeros = rng.integers(1, (1 << bits) - 1, (groups, out))
    g_idx = np.arange(rows) // (rows // groups)
    if act_order:
        g_idx = rng_of(name).permutation(g_idx)
    weight = scales[g_idx].astype(np.float64) * (codes - zeros[g_idx])
    return codes, scales, zeros, g_idx, weight.T


def gptq(name, out, rows, *, bits=4, group=GROUP, version=1, symmetric=True, act_order=False):
    groups = 1 if group == -1 else rows // group
    codes, scales, zeros, g_idx, weight = numbers(
        name, out, rows, bits, groups, symmetric, act_order
    )
    files = {
        "qweight": np.ascontiguousarray(words(codes.T, bits).T),
        "qzeros": words(zeros - (2 - version), bits),
        "scales": scales,
        "g_idx": g_idx.astype(np.int32),
    }
    return files, weight


def awq(name, out, rows):
    codes, scales, zeros, _, weight = numbers(name, out, rows, 4, rows // GROUP, False)
    order = [0, 2, 4, 6, 1, 3, 5, 7]
    files = {"qweight": words(codes, 4, order), "qzeros": words(zeros, 4, order), "scales": scales}
    return files, weight


def packed(name, out, rows, *, bits=4, symmetric=True, act_order=False):
    codes, scales, zeros, g_idx, weight = numbers(
        name, out, rows, bits, rows // GROUP, symmetric, act_order
    )
    files = {
        "weight_packed": words(codes.T, bits),
        "weight_scale": scales.T,
        "weight_shape": np.array([out, rows]),
    }
    if not symmetric:
        files["weight_zero_point"] = words(zeros, bits).T
    if act_order:
        files["weight_g_idx"] = g_idx.astype(np.int32)
    return files, weight


def plain(name, out, rows, *, dtype="int8", per="channel"):
    rng = rng_of(name)
    if dtype == "int8":
        values = rng.integers(-127, 128, (out, rows)).astype(np.int8)
    else:
        values = rng.normal(size=(out, rows)).astype(ml_dtypes.float8_e4m3fn)
    shape = {"channel": (out, 1), "tensor": (1,), "group": (out, rows // GROUP)}[per]
    size = 0.001 if dtype == "int8" else 0.1
    scale = rng.uniform(size, 2 * size, shape).astype(ml_dtypes.bfloat16)
    spread = np.repeat(scale, GROUP, 1) if per == "group" else scale
    weight = values.astype(np.float64) * spread.astype(np.float64)
    return {"weight": values, "weight_scale": scale}, weight


def nf4(name, out, rows, *, double=True):
    """What bitsandbytes quantizes; decoded by its description, and where it can by itself.

    Its dequantization on CPUs is wrong where 64 does not divide a row.
    """
    torch = pytest.importorskip("torch")
    functional = pytest.importorskip("bitsandbytes.functional")
    weight = torch.from_numpy(rng_of(name).normal(size=(out, rows)).astype(np.float32)) / 8
    codes, state = functional.quantize_4bit(
        weight, blocksize=64, quant_type="nf4", compress_statistics=double
    )
    files = {"weight": codes.numpy()}
    files |= {f"weight.{k}": v.numpy() for k, v in state.as_dict(packed=True).items()}
    absmax = state.absmax
    if double:
        absmax = functional.dequantize_blockwise(absmax, state.state2) + state.offset
    halves = np.stack([codes.numpy().reshape(-1) >> 4, codes.numpy().reshape(-1) & 15], -1)
    levels = state.code.numpy()[halves.reshape(-1)]
    decoded = (levels * np.repeat(absmax.numpy(), 64)[: out * rows]).reshape(out, rows)
    if rows % 64 == 0:
        theirs = functional.dequantize_4bit(codes, state).numpy()
        np.testing.assert_allclose(decoded, theirs, rtol=1e-6, atol=1e-7)
    return files, decoded


GROUPED = {"type": "int", "strategy": "group", "group_size": GROUP}
SCHEMES = {
    "w4a16": GROUPED | {"num_bits": 4},
    "w4a16_asymmetric": GROUPED | {"num_bits": 4, "symmetric": False},
    "w8a16": GROUPED | {"num_bits": 8},
    "w8": {"num_bits": 8, "type": "int", "strategy": "channel"},
    "fp8": {"num_bits": 8, "type": "float", "strategy": "tensor"},
    "fp8_channel": {"num_bits": 8, "type": "float", "strategy": "channel"},
}


def by_the_library(name, out, rows, *, scheme):
    """Tensors that compressed-tensors makes, and what it makes of them again."""
    torch = pytest.importorskip("torch")
    compressors = pytest.importorskip("compressed_tensors.compressors")
    quantization = pytest.importorskip("compressed_tensors.quantization")
    arguments = SCHEMES[scheme]
    how = quantization.QuantizationScheme(
        targets=["Linear"], weights=quantization.QuantizationArgs(**arguments)
    )
    kind = "pack-quantized" if arguments.get("group_size") else "naive-quantized"
    compressor = compressors.BaseCompressor.get_value_from_registry(kind)
    rng = rng_of(name)
    shape = {"group": (out, rows // GROUP), "channel": (out, 1), "tensor": (1,)}
    size = 0.02 if arguments["num_bits"] == 4 else 0.002
    scale = rng.uniform(size, 2 * size, shape[arguments["strategy"]]).astype(np.float32)
    weights = {
        "weight": torch.from_numpy(rng.normal(size=(out, rows)).astype(np.float32) / 8),
        "weight_scale": torch.from_numpy(scale),
    }
    if arguments.get("symmetric") is False:
        zeros = rng.integers(-8, 8, scale.shape).astype(np.int8)
        weights["weight_zero_point"] = torch.from_numpy(zeros)
    files = compressor.compress(weights, how)
    again = compressor.decompress(dict(files), how)["weight"]
    arrays = {}
    for key, tensor in files.items():
        if tensor.dtype == torch.float8_e4m3fn:
            arrays[key] = tensor.view(torch.uint8).numpy().view(ml_dtypes.float8_e4m3fn)
        else:
            arrays[key] = tensor.numpy()
    return arrays, again.float().numpy()


def gptq_config(**keys):
    return {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "sym": True, **keys}


def compressed(kind, **group):
    groups = {"group_0": {"targets": ["Linear"], **group}}
    return {"quant_method": "compressed-tensors", "format": kind, "config_groups": groups}


INT8_ROWS = {"num_bits": 8, "type": "int", "dynamic": True, "strategy": "token"}
AWQ_CONFIG = {"quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True}
NF4_CONFIG = {
    "quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4",
}  # fmt: skip
ACT_ORDER = {"symmetric": False, "act_order": True}
PACKED = compressed("pack-quantized")
FLOAT = compressed("float-quantized")
FORMATS = {
    "gptq": (gptq, {}, gptq_config(), Int4),
    "gptq_v2": (gptq, {"version": 2}, gptq_config(checkpoint_format="gptq_v2"), Int4),
    # It says v1 and is v2: symmetric zero points show which.
    "gptq_mislabeled": (gptq, {"version": 2}, gptq_config(checkpoint_format="gptq"), Int4),
    "gptq_asymmetric": (gptq, {"symmetric": False}, gptq_config(sym=False), Int4),
    "gptq_act_order": (gptq, ACT_ORDER, gptq_config(sym=False, desc_act=True), Int4),
    "gptq_column": (gptq, {"group": -1}, gptq_config(group_size=-1), Int4),
    "gptq_8bit": (gptq, {"bits": 8}, gptq_config(bits=8), Int8Groups),
    "gptq_8bit_asymmetric": (
        *(gptq, {"bits": 8, **ACT_ORDER}, gptq_config(bits=8, sym=False, desc_act=True)),
        Int8Groups,
    ),
    "awq": (awq, {}, AWQ_CONFIG, Int4),
    "packed": (packed, {}, PACKED, Int4),
    "packed_asymmetric": (packed, ACT_ORDER, PACKED, Int4),
    "packed_8bit": (packed, {"bits": 8}, PACKED, Int8Groups),
    "int8": (plain, {}, compressed("int-quantized"), Int8),
    "int8_groups": (plain, {"per": "group"}, compressed("naive-quantized"), Int8Groups),
    "fp8": (plain, {"dtype": "fp8"}, FLOAT, Fp8),
    "fp8_tensor": (plain, {"dtype": "fp8", "per": "tensor"}, FLOAT, Fp8),
    "nf4": (nf4, {"double": False}, NF4_CONFIG, NF4),
    "nf4_double": (nf4, {}, NF4_CONFIG, NF4),
}
NAIVE = compressed("naive-quantized")
LIBRARY = {
    f"library_{name}": (by_the_library, {"scheme": name}, NAIVE, StructuredWeight)
    for name in SCHEMES
}


def quantized_model(directory, family, form, *, with_head=False, **changes):
    """A model whose layers' matrices are packed; the dense tensors they stand for, its config."""
    make, keys, quantization, _ = (FORMATS | LIBRARY)[form]
    sizes = SIZES | ({} if family == "gpt_neox" else {"num_kv_heads": 2}) | changes
    config = make_config(family, **sizes)
    save_huggingface(drawn.weights(config), config, directory)
    dense = load_file(directory / "model.safetensors")
    files, expected = {}, {}
    for name, array in dense.items():
        stem = name.removesuffix(".weight")
        inside = ".layers." in name or (with_head and stem in ("lm_head", "embed_out"))
        if array.ndim != 2 or not inside or stem == name:
            files[name] = expected[name] = array
            continue
        parts, weight = make(stem, *array.shape, **keys)
        files |= {f"{stem}.{end}": np.ascontiguousarray(part) for end, part in parts.items()}
        expected[name] = weight.astype(np.float32)
    save_file(files, directory / "model.safetensors")
    requantize(directory, quantization)
    return expected, config


def requantize(directory, quantization):
    """Write another `quantization_config`."""
    data = json.loads((directory / "config.json").read_text())
    data["quantization_config"] = quantization
    (directory / "config.json").write_text(json.dumps(data))


def leaves_of(params):
    found = jax.tree_util.tree_leaves_with_path(params, is_leaf=is_structured)
    return {path_name(path): w for path, w in found if isinstance(w, StructuredWeight)}


@jax.jit
def dequantized(params):
    return jax.tree.map(
        lambda w: w.dequantize(jnp.float32) if isinstance(w, StructuredWeight) else w,
        params,
        is_leaf=is_structured,
    )


def assert_is(params, expected, config, tolerance=1e-6):
    """Every weight is that of the dense tensors."""
    dense = from_tensors(expected, config)
    found = stack(dequantized(params), config)
    assert jax.tree.structure(found) == jax.tree.structure(dense)
    for (path, x), y in zip(
        jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(dense), strict=True
    ):
        np.testing.assert_allclose(x, y, rtol=tolerance, atol=1e-7, err_msg=path_name(path))
    return dense


@pytest.mark.parametrize("form", FORMATS)
def test_every_format_is_read(form, tmp_path):
    expected, config = quantized_model(tmp_path, "llama", form)
    params, found = load_quantized(tmp_path)
    assert found == config
    leaves = leaves_of(params)
    assert len(leaves) == 14 and all(type(w) is FORMATS[form][3] for w in leaves.values())
    dense = assert_is(params, expected, config)
    if form == "gptq_act_order":
        np.testing.assert_allclose(
            logits(params, IDS, config), logits(dense, IDS, config), rtol=1e-3, atol=1e-4
        )


@pytest.mark.parametrize(
    ("family", "form"),
    [("phi3", "gptq_act_order"), ("phi3", "nf4_double"), ("gpt_neox", "awq"), ("gpt_neox", "fp8"),
     ("qwen3", "packed_asymmetric"), ("gemma2", "gptq")],
)  # fmt: skip
def test_modules_that_hold_several_weights(family, form, tmp_path):
    """Fused and interleaved projections, and a vocabulary that is padded."""
    changes = {"hidden_dim": 128} if "nf4" in form else {}
    expected, config = quantized_model(tmp_path, family, form, with_head=True, **changes)
    params, _ = load_quantized(tmp_path)
    assert len(leaves_of(params)) >= 12
    assert_is(params, expected, config)


@pytest.mark.parametrize(("bits", "order"), [(4, None), (8, None), (4, AWQ.order)])
def test_any_words_round_trip(bits, order):
    x = np.random.default_rng(0).integers(-(2**31), 2**31, (3, 5), np.int64).astype(np.int32)
    np.testing.assert_array_equal(words(unpack(x, bits, 1, order), bits, order), x)
    np.testing.assert_array_equal(words(unpack(x.T, bits, 0, order).T, bits, order), x)


def test_activations_in_int8(tmp_path):
    quantized_model(tmp_path, "llama", "int8")
    requantize(tmp_path, compressed("int-quantized", input_activations=INT8_ROWS))
    params, _ = load_quantized(tmp_path)
    assert all(w.dynamic for w in leaves_of(params).values())


def test_placed_on_a_mesh(tmp_path):
    expected, config = quantized_model(tmp_path, "llama", "gptq_asymmetric", hidden_dim=128)
    layout = Layout(make_mesh(MeshShape(tensor=2)), make_rules())
    params, _ = load_quantized(tmp_path, layout=layout, dtype=jnp.float32)
    query = params.stacks[0].layers[0].attention.query
    assert query.values.addressable_shards[0].data.shape == (32, 32)
    assert query.scale.addressable_shards[0].data.shape == (2, 32)
    assert_is(params, expected, config)
    (tmp_path / "odd").mkdir()
    quantized_model(tmp_path / "odd", "llama", "gptq")
    words = "feed_forward/down: ", "blocks of 32 along ffn=3; use 1"
    refuses(lambda: load_quantized(tmp_path / "odd", layout=layout), *words)


def test_exactly_what_is_wrong_is_named(tmp_path):
    quantized_model(tmp_path, "llama", "gptq")
    q = "model.layers.0.self_attn.q_proj"

    def change(files):
        del files[f"{q}.scales"]
        files["model.layers.1.self_attn.k_proj.qzeros"] = np.zeros((2, 5), np.int32)
        files["model.layers.1.mlp.up_proj.qweight"] = np.zeros((8, 96), np.float32)
        del files["model.layers.1.mlp.down_proj.qweight"]
        files["model.layers.2.mlp.up_proj.scales"] = np.zeros((2, 96), np.float16)
        files[f"{q}.bias"] = np.zeros(64, np.float16)  # of zeros, as old files have it

    edit(tmp_path, change)
    error = refuses(
        lambda: load_quantized(tmp_path),
        f"{q}.scales [2, 64] is missing",
        "layers.1.self_attn.k_proj.qzeros is [2, 5], the model wants [2, 4]",
        "layers.1.mlp.up_proj.qweight is of dtype F32; expected I32",
        "layers.1.mlp.down_proj.weight [64, 96] is missing, and so is qweight in its place",
        "layers.2.mlp.up_proj.scales [2, 96] is not in this model",
        error=FormatError,
    )
    assert "bias" not in str(error)


def test_damaged_numbers_are_refused(tmp_path):
    quantized_model(tmp_path, "llama", "gptq_act_order")

    def one_group(files):
        files["model.layers.0.self_attn.q_proj.g_idx"][:] = 0

    edit(tmp_path, one_group)
    words = "q_proj.weight: g_idx does not divide 64 rows"
    refuses(lambda: load_quantized(tmp_path), words, error=FormatError)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"quant_method": "hqq"}, "quant_method 'hqq' is not read; use one of gptq"),
        (gptq_config(bits=3), "bits=3 is not read; use 4 or 8"),
        (gptq_config(checkpoint_format="marlin"), "'marlin' is not read"),
        (gptq_config(dynamic={"-:x": {}}), "dynamic"),
        ({**AWQ_CONFIG, "version": "gemv"}, "version='gemv'"),
        ({**NF4_CONFIG, "load_in_4bit": False}, "only load_in_4bit"),
        ({**NF4_CONFIG, "bnb_4bit_quant_storage": "bfloat16"}, "use uint8"),
        (compressed("marlin-24"), "format 'marlin-24' is not read"),
        ({**compressed("dense"), "transform_config": {"a": 1}}, "transform_config is not read"),
    ],
)
def test_what_is_not_read(config, message):
    refuses(lambda: formats_of(config), message)


def test_not_quantized(tmp_path):
    config = make_config("llama", **SIZES)
    save_huggingface(drawn.weights(config), config, tmp_path)
    refuses(lambda: load_quantized(tmp_path), "is not quantized", error=FormatError)


@pytest.mark.oracle
@pytest.mark.parametrize("scheme", SCHEMES)
def test_files_of_compressed_tensors(scheme, tmp_path):
    """Tensors that the library itself compresses, and its own decompression of them."""
    pytest.importorskip("compressed_tensors")
    expected, config = quantized_model(tmp_path, "llama", f"library_{scheme}")
    params, _ = load_quantized(tmp_path)
    assert len(leaves_of(params)) == 14
    assert_is(params, expected, config, tolerance=1e-5)

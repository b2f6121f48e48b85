"""Models out of GGUF files, against the models of transformers they were converted from."""

import tracemalloc

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm.files import FormatError, read_gguf
from lm.formats import load_gguf, load_pretrained, read_gguf_config
from lm.sharding import Layout, MeshShape, make_mesh, make_rules
from lm.weights import GGUFBlocks, is_structured
from tests.formats.directories import logits
from tests.formats.tiny_gguf import write_tiny
from tests.model.huggingface_oracle import BASE, CASES, GQA, YARN, build_oracle
from tests.refuses import refuses

GEMMA3_ROPE = {
    "rope_parameters": {
        "full_attention": {"rope_type": "linear", "rope_theta": 1e5, "factor": 8.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e3},
    }
}
CAPS = {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0}
LINEAR = {"rope.scaling.type": "linear"}
# transformers' model and what the converter writes besides sizes, norms and rotary base.
MODELS = {
    "llama": (*CASES["llama"], "llama", {}),
    "llama3": (*CASES["llama3"], "llama", {}),
    "smollm2": (*CASES["smollm2"], "llama", {}),
    "linear": (*CASES["llama_linear"], "llama", LINEAR | {"rope.scaling.factor": 2.5}),
    "qwen2": (
        "qwen2",
        GQA | YARN,
        "qwen2",
        {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0}
        | {"rope.scaling.original_context_length": 32},
    ),
    "qwen3": ("qwen3", GQA | {"head_dim": 16, "tie_word_embeddings": True}, "qwen3", {}),
    "gemma2": (
        "gemma2",
        GQA
        | {"num_hidden_layers": 5, "head_dim": 12, "query_pre_attn_scalar": 12}
        | {"sliding_window": 4}
        | CAPS,
        "gemma2",
        {"attention.sliding_window": 4} | CAPS,
    ),
    "gemma3": (
        "gemma3_text",
        BASE
        | {"num_hidden_layers": 8, "num_attention_heads": 3, "num_key_value_heads": 1}
        | {"head_dim": 20, "query_pre_attn_scalar": 20, "sliding_window": 4}
        | {"sliding_window_pattern": 6}
        | GEMMA3_ROPE,
        "gemma3",
        LINEAR
        | {"attention.sliding_window": 4, "rope.scaling.factor": 8.0}
        | {"rope.freq_base": 1e5, "rope.freq_base_swa": 1e3},
    ),
    "olmo2": (*CASES["olmo2"], "olmo2", {}),
    "phi3": (*CASES["phi3"], "phi3", {"attention.sliding_window": 6}),
    "gpt_neox": (*CASES["gpt_neox"], "gptneox", {"use_parallel_residual": True}),
}


def write_model(path, oracle, arch, more):
    """Convert as llama.cpp's convert_hf_to_gguf.py does, names and keys by gguf-py."""
    c = oracle.json
    neox = arch == "gptneox"
    heads = c["num_attention_heads"]
    head_dim = c.get("head_dim") or c["hidden_size"] // heads
    writer = gguf.GGUFWriter(str(path), arch)
    writer.add_context_length(c["max_position_embeddings"])
    writer.add_embedding_length(c["hidden_size"])
    writer.add_block_count(c["num_hidden_layers"])
    writer.add_feed_forward_length(c["intermediate_size"])
    writer.add_head_count(heads)
    if neox:
        writer.add_layer_norm_eps(c["layer_norm_eps"])
    else:
        writer.add_head_count_kv(c["num_key_value_heads"])
        writer.add_layer_norm_rms_eps(c["rms_norm_eps"])
        writer.add_key_length(head_dim)
        writer.add_value_length(head_dim)
    parameters = c["rope_parameters"]
    if "rope.freq_base" not in more:
        writer.add_rope_freq_base(parameters["rope_theta"])
    fraction = parameters.get("partial_rotary_factor", 1.0)
    writer.add_rope_dimension_count(int(head_dim * fraction))
    for key, value in more.items():
        add = {str: writer.add_string, bool: writer.add_bool, float: writer.add_float32}
        add.get(type(value), writer.add_uint32)(f"{arch}.{key}", value)
    code = next(a for a, name in gguf.MODEL_ARCH_NAMES.items() if name == arch)
    names = gguf.get_tensor_name_map(code, c["num_hidden_layers"])
    for name, array in oracle.arrays().items():
        array = convert(name, array, arch, heads, c)
        writer.add_tensor(names.get_name(name, (".weight", ".bias")), np.ascontiguousarray(array))
    if parameters.get("rope_type") == "llama3":
        writer.add_tensor("rope_freqs.weight", llama3_divisors(parameters, head_dim))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def convert(name, array, arch, heads, c):
    if arch == "llama" and (".q_proj." in name or ".k_proj." in name):
        n = heads if ".q_proj." in name else c["num_key_value_heads"]
        pairs = array.reshape(n, 2, array.shape[0] // n // 2, *array.shape[1:])
        return pairs.swapaxes(1, 2).reshape(array.shape)
    if arch.startswith("gemma") and name.endswith("norm.weight"):
        return array + 1
    if "query_key_value" in name:
        parts = array.reshape(heads, 3, -1, *array.shape[1:])
        return parts.swapaxes(0, 1).reshape(array.shape)
    return array


def llama3_divisors(parameters, head_dim):
    """As `LlamaModel.generate_extra_tensors` of the converter."""
    low = parameters["original_max_position_embeddings"] / parameters["low_freq_factor"]
    high = parameters["original_max_position_embeddings"] / parameters["high_freq_factor"]
    divisors = []
    for frequency in parameters["rope_theta"] ** -(np.arange(0, head_dim, 2) / head_dim):
        wavelength = 2 * np.pi / frequency
        if wavelength < high:
            divisors.append(1.0)
        elif wavelength > low:
            divisors.append(parameters["factor"])
        else:
            smooth = parameters["original_max_position_embeddings"] / wavelength
            smooth -= parameters["low_freq_factor"]
            smooth /= parameters["high_freq_factor"] - parameters["low_freq_factor"]
            divisors.append(1 / ((1 - smooth) / parameters["factor"] + smooth))
    return np.array(divisors, np.float32)


@pytest.mark.oracle
@pytest.mark.parametrize("case", MODELS)
def test_logits_equal_those_of_the_converted_model(tmp_path, case):
    torch = pytest.importorskip("torch")
    model_type, arguments, arch, more = MODELS[case]
    if case == "llama3":  # the bounds that all published models have, which files leave out
        parameters = arguments["rope_parameters"] | {"original_max_position_embeddings": 8192}
        arguments = arguments | {"rope_parameters": parameters}
    oracle = build_oracle(model_type, arguments)
    path = tmp_path / "model.gguf"
    write_model(path, oracle, arch, more)
    params, config = load_gguf(path)
    ids = np.random.default_rng(0).integers(0, config.vocab_size, (2, 23))
    with torch.no_grad():
        expected = oracle.model(torch.tensor(ids)).logits.numpy()
    np.testing.assert_allclose(logits(params, ids, config), expected, atol=2e-4)
    assert config.tied == oracle.json["tie_word_embeddings"]


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A Llama of blocks whose layers differ in type."""
    path = tmp_path_factory.mktemp("gguf") / "small.gguf"
    return write_tiny(path, kinds=("Q8_0", "Q4_1", "F16", "Q5_0"), tied=False)


def test_blocks_are_kept_and_compute_the_same(small):
    """Rows of queries and keys are put in order as rows of blocks; the vocabulary is padded."""
    params, config = load_gguf(small)
    kept, _ = load_gguf(small, keep_quantized=True)
    leaves = jax.tree.leaves(kept, is_leaf=is_structured)
    blocks = [leaf for leaf in leaves if isinstance(leaf, GGUFBlocks)]
    assert len(blocks) == sum(info.type[0] == "Q" for info in read_gguf(small).tensors.values())
    assert config.padded_vocab_size == 768
    ids = np.random.default_rng(0).integers(0, 700, (1, 20))
    np.testing.assert_allclose(
        logits(kept, ids, config), logits(params, ids, config), rtol=1e-4, atol=1e-4
    )
    assert not np.asarray(params.embed[700:]).any()
    query, dense = (x.stacks[0].layers[0].attention.query for x in (kept, params))
    assert isinstance(query, GGUFBlocks)
    np.testing.assert_array_equal(query.dequantize(jnp.float32), dense)


@pytest.mark.parametrize("keep_quantized", [False, True])
def test_shards_are_those_of_the_whole(small, keep_quantized):
    whole, _ = load_gguf(small, keep_quantized=keep_quantized)
    layout = Layout(make_mesh(MeshShape(tensor=2), jax.devices()[:2]), make_rules(zero=0))
    shards, _ = load_gguf(small, keep_quantized=keep_quantized, layout=layout)
    split = [leaf for leaf in jax.tree.leaves(shards) if not leaf.sharding.is_fully_replicated]
    assert len(split) >= 2 + 2 * 7
    for ours, theirs in zip(jax.tree.leaves(shards), jax.tree.leaves(whole), strict=True):
        np.testing.assert_array_equal(np.asarray(ours), np.asarray(theirs))


def test_dtypes(small):
    params, _ = load_gguf(small, dtype=jnp.bfloat16)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(params)} == {"bfloat16"}


def test_every_fault_of_the_tensors_is_named(tmp_path):
    changes = {
        "blk.1.attn_q.weight": None,
        "blk.0.ffn_up.weight": np.zeros((95, 64), np.float32),
        "blk.0.attn_sinks.weight": np.zeros(4, np.float32),
        "output_norm.weight": np.zeros(64, np.int32),
    }
    path = write_tiny(tmp_path / "model.gguf", tensors=changes)
    refuses(
        lambda: load_gguf(path),
        "model.gguf does not fit a 'llama' model of 2 layers, 4 faults",
        "blk.1.attn_q.weight [64, 64] is missing",
        "blk.0.ffn_up.weight is [95, 64], the model wants [128, 64]",
        "blk.0.attn_sinks.weight [4] is not in this model",
        "output_norm.weight is of type I32",
        error=FormatError,
    )


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"general.architecture": "lama"}, "'lama', which is not supported; did you mean 'llama'"),
        ({"general.architecture": None}, "general.architecture is None"),
        ({"llama.block_count": None}, "llama.block_count is missing"),
        ({"llama.block_count": 0}, "llama.block_count is 0"),
        ({"llama.attention.layer_norm_rms_epsilon": None}, "layer_norm_rms_epsilon is missing"),
        ({"llama.expert_count": 8}, "llama.expert_count=8, which is not supported"),
        ({"llama.rope.scaling.type": "longrope"}, "rope.scaling.type is 'longrope'; supported"),
        ({"llama.attention.head_count": np.array([4, 2])}, "one positive integer"),
        ({"llama.rope.freq_base": "high"}, "rope.freq_base is 'high', not a number"),
    ],
)
def test_metadata_that_cannot_be(tmp_path, metadata, message):
    path = write_tiny(tmp_path / "model.gguf", metadata)
    refuses(lambda: read_gguf_config(path), message, error=FormatError)


def test_not_a_gguf_file(tmp_path):
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGML and the rest of it")
    refuses(lambda: load_gguf(path), "magic", error=FormatError)


def test_stretchings_that_are_not_llama3s(tmp_path):
    factors = {"rope_freqs.weight": np.linspace(1, 9, 8, dtype=np.float32)}
    path = write_tiny(tmp_path / "model.gguf", tensors=factors)
    refuses(lambda: read_gguf_config(path), "not Llama 3's", error=FormatError)


def test_the_configuration_alone_is_that_of_the_model(small):
    """And a float is read as it was written."""
    config = read_gguf_config(small)
    assert config == load_gguf(small)[1]
    assert config.norm.eps == 1e-5 and config.max_length == 128


@pytest.mark.parametrize("size", [10**9, 2**40])
@pytest.mark.parametrize(
    "key", ["block_count", "embedding_length", "attention.head_count", "attention.key_length"]
)
def test_sizes_that_lie_are_refused_before_anything_is_made_of_them(tmp_path, key, size):
    path = write_tiny(tmp_path / "model.gguf", changes={f"llama.{key}": size})
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=r"block_count|wants|dimension_count|head_dim"):
            load_gguf(path)
        assert tracemalloc.get_traced_memory()[1] < 64 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    "changes",
    [
        {"tokenizer.ggml.tokens": 3},
        {"tokenizer.ggml.merges": 3},
        {"tokenizer.ggml.pre": [1]},
        {"tokenizer.ggml.bos_token_id": [1]},
        {"general.architecture": ["llama"]},
        {"llama.rope.freq_base": "x"},
    ],
)
def test_values_of_another_kind_are_one_clear_error(tmp_path, changes):
    path = write_tiny(tmp_path / "model.gguf", changes=changes)
    with pytest.raises(ValueError, match=r"model.gguf") as refused:
        load_pretrained(path)
    assert len(str(refused.value)) < 400

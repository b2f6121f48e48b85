"""Safetensors of every family, in and out, bit for bit, and what is wrong with a file."""

from __future__ import annotations

import functools
import json
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file

from lm.files import FormatError
from lm.formats import load_huggingface, save_huggingface, to_tensors
from lm.formats.families import FAMILIES, make_config
from lm.model import Latent, ModelConfig, ModelWeights, param_specs, unstack
from lm.sharding import MeshShape, make_mesh, make_rules
from lm.weights import Int8, shardings
from tests.formats.directories import assert_same_tree, edit
from tests.model import drawn
from tests.model.huggingface_oracle import CASES, make_oracle
from tests.refuses import refuses

SIZES = {"vocab_size": 139, "embed_dim": 24, "hidden_dim": 20, "num_layers": 4, "num_heads": 3}


def tiny(family: str, **changes) -> ModelConfig:
    """Seven layers of Gemma 3 are a pattern and a remainder; its biases are on, as Llama's."""
    biases = {"attention_bias": True, "attention_out_bias": True}
    grouped = {"head_dim": 6, "num_kv_heads": 1}
    own = {
        "llama": biases | {"mlp_bias": True},
        "gemma3": grouped | biases | {"num_layers": 7},
        "deepseek_v2": biases | {"latent": Latent(8, 5, 4, 6, 10)},
        "deepseek_v3": biases | {"latent": Latent(8, 5, 4, 6, None)},
        "gpt_neox": {},
    }
    return make_config(family, **SIZES | own.get(family, grouped) | changes)


def random_weights(config: ModelConfig, dtype=jnp.float32) -> ModelWeights:
    """Noise in every weight, biases and norms too, and zeros in the vocabulary's padding."""
    params = jax.tree.map(lambda x: x.astype(dtype), drawn.weights(config, others=1.0))
    params = params.replace(embed=params.embed.at[config.vocab_size :].set(0))
    if params.output is not None:
        params = params.replace(output=params.output.at[:, config.vocab_size :].set(0))
    return params


def assert_same_files(got, want) -> None:
    """The same names, dtypes, shapes and bits, whatever the files are called."""
    tensors = []
    for directory in (got, want):
        tensors.append({})
        for file in directory.glob("*.safetensors"):
            tensors[-1] |= load_file(file)
    assert tensors[0].keys() == tensors[1].keys()
    for name, array in tensors[0].items():
        other = tensors[1][name]
        assert array.dtype == other.dtype and array.shape == other.shape, name
        assert array.tobytes() == other.tobytes(), name


@pytest.mark.parametrize(
    ("family", "dtype"),
    [(family, jnp.float32) for family in dict.fromkeys(f.name for f in FAMILIES.values())]
    + [(family, jnp.bfloat16) for family in ("gemma2", "phi3", "gpt_neox")],
)
def test_round_trip_is_exact(family, dtype, tmp_path):
    config = tiny(family)
    params = random_weights(config, dtype)
    save_huggingface(params, config, tmp_path / "once")
    again, config_again = load_huggingface(tmp_path / "once")
    assert config_again == config
    assert_same_tree(again, params)
    save_huggingface(unstack(again), config, tmp_path / "twice")
    assert_same_files(tmp_path / "twice", tmp_path / "once")
    texts = [(tmp_path / name / "config.json").read_text() for name in ("once", "twice")]
    assert texts[0] == texts[1]


@pytest.mark.oracle
@pytest.mark.parametrize("case", CASES)
def test_files_of_transformers(case, tmp_path):
    """What transformers writes comes back bit-equal, and it reads what is written here."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    model = make_oracle(case).model
    model.save_pretrained(tmp_path / "theirs", max_shard_size="40KB")
    assert len(list((tmp_path / "theirs").glob("*.safetensors"))) > 1
    params, config = load_huggingface(tmp_path / "theirs")
    save_huggingface(params, config, tmp_path / "ours", max_shard_size=50_000)
    assert_same_files(tmp_path / "ours", tmp_path / "theirs")
    read, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "ours", output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    state = model.state_dict()
    for name, tensor in read.state_dict().items():
        assert torch.equal(tensor, state[name]), name
    transformers.AutoConfig.from_pretrained(tmp_path / "ours")


def test_shards_and_their_index(tmp_path):
    config = tiny("llama")
    params = random_weights(config)
    save_huggingface(params, config, tmp_path / "one")
    save_huggingface(
        params, config, tmp_path / "many", max_shard_size=10_000, extra={"eos_token_id": 3}
    )
    index = json.loads((tmp_path / "many/model.safetensors.index.json").read_text())
    sizes = {}
    for file in (tmp_path / "many").glob("*.safetensors"):
        with safe_open(file, "np") as handle:
            assert handle.metadata() == {"format": "pt"}
            names = set(handle.keys())
        assert names == {name for name, where in index["weight_map"].items() if where == file.name}
        sizes[file.name] = (sum(a.nbytes for a in load_file(file).values()), len(names))
    assert len(sizes) > 2
    assert all(size <= 10_000 or count == 1 for size, count in sizes.values())
    assert index["metadata"]["total_size"] == sum(size for size, _ in sizes.values())
    assert json.loads((tmp_path / "many/config.json").read_text())["eos_token_id"] == 3
    assert_same_files(tmp_path / "many", tmp_path / "one")
    assert_same_tree(load_huggingface(tmp_path / "many")[0], params)


def test_dtypes(tmp_path):
    config = tiny("qwen2")
    params = random_weights(config)
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    save_huggingface(params, config, tmp_path / "half", dtype=jnp.bfloat16)
    assert json.loads((tmp_path / "half/config.json").read_text())["torch_dtype"] == "bfloat16"
    assert_same_tree(load_huggingface(tmp_path / "half")[0], half)
    save_huggingface(params, config, tmp_path / "whole")
    assert_same_tree(load_huggingface(tmp_path / "whole", dtype=jnp.bfloat16)[0], half)
    widened = jax.tree.map(lambda x: x.astype(jnp.float32), half)
    assert_same_tree(load_huggingface(tmp_path / "half", dtype=jnp.float32)[0], widened)


def test_vocabulary_is_padded_and_trimmed(tmp_path):
    config = tiny("llama")
    params = random_weights(config)
    params = params.replace(embed=params.embed.at[config.vocab_size :].set(9.0))
    save_huggingface(params, config, tmp_path)
    with safe_open(tmp_path / "model.safetensors", "np") as handle:
        assert handle.get_slice("model.embed_tokens.weight").get_shape() == [139, 24]
        assert handle.get_slice("lm_head.weight").get_shape() == [139, 24]
    again, config = load_huggingface(tmp_path, vocab_multiple=100)
    assert config.padded_vocab_size == 200
    assert again.embed.shape == (200, 24) and again.output.shape == (24, 200)
    assert not np.any(again.embed[139:]) and not np.any(again.output[:, 139:])
    assert np.array_equal(again.embed[:139], params.embed[:139])


@pytest.mark.parametrize("family", ["llama", "phi3", "gpt_neox"])
def test_straight_to_shardings(family, tmp_path):
    config = tiny(family, num_heads=4, **({} if family == "gpt_neox" else {"num_kv_heads": 2}))
    params = random_weights(config)
    save_huggingface(params, config, tmp_path)
    mesh = make_mesh(MeshShape(fsdp=2, tensor=2, data=2))
    wanted = shardings(param_specs(config), make_rules(zero=3), mesh)
    got, _ = load_huggingface(tmp_path, shardings=wanted)
    assert_same_tree(got, params)
    for array, sharding in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        assert array.sharding == sharding
    query = got.stacks[0].layers[0].attention.query
    assert query.addressable_shards[0].data.size * 4 == query.size
    save_huggingface(got, config, tmp_path / "again")
    assert_same_files(tmp_path / "again", tmp_path)


def test_host_memory_is_that_of_a_tensor(tmp_path):
    config = make_config(
        "llama", vocab_size=64, embed_dim=256, hidden_dim=1024, num_layers=12, num_heads=4
    )
    largest = 256 * 1024 * 4
    save_huggingface(random_weights(config), config, tmp_path, max_shard_size=4 * largest)
    load_huggingface(tmp_path)  # compile first: the compiler's memory is not the point
    tracemalloc.start()
    params, _ = load_huggingface(tmp_path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    total = sum(x.nbytes for x in jax.tree.leaves(params))
    assert total > 40 * largest
    assert peak < 5 * largest


def test_every_fault_is_named_at_once(tmp_path):
    config = tiny("llama")
    save_huggingface(random_weights(config), config, tmp_path)

    def change(tensors):
        del tensors["model.norm.weight"]
        for i in range(4):
            del tensors[f"model.layers.{i}.self_attn.q_proj.weight"]
        tensors["model.layers.1.mlp.experts.weight"] = np.zeros((2, 3), np.float32)
        tensors["model.layers.2.mlp.up_proj.weight"] = np.zeros((19, 24), np.float32)
        tensors["model.layers.3.mlp.down_proj.weight"] = np.zeros((24, 20), np.int8)

    edit(tmp_path, change)
    refuses(
        lambda: load_huggingface(tmp_path),
        "8 faults",
        "model.norm.weight [24] is missing",
        "model.layers.{0,1,2,3}.self_attn.q_proj.weight [24, 24] is missing",
        "model.layers.1.mlp.experts.weight [2, 3] is not in this model",
        "model.layers.2.mlp.up_proj.weight is [19, 24], the model wants [20, 24]",
        "model.layers.3.mlp.down_proj.weight is of dtype I8",
        error=FormatError,
    )


def test_vocabulary_that_does_not_match(tmp_path):
    config = tiny("gemma2")
    save_huggingface(random_weights(config), config, tmp_path)
    wrong = tiny("gemma2", vocab_size=140)
    words = "is [139, 24], the model wants [140, 24] (vocab_size=140)"
    refuses(lambda: load_huggingface(tmp_path, wrong), words, error=FormatError)


def test_mixed_dtypes_in_a_stack_need_one(tmp_path):
    config = tiny("llama")
    params = random_weights(config)
    save_huggingface(params, config, tmp_path)
    name = "model.layers.2.mlp.up_proj.weight"
    edit(tmp_path, lambda t: t.update({name: t[name].astype(np.float16)}))
    words = "layers.2.mlp.up_proj.weight is F16 but ", "give a dtype"
    refuses(lambda: load_huggingface(tmp_path), *words, error=FormatError)
    assert load_huggingface(tmp_path, dtype=jnp.float32)[0].embed.dtype == jnp.float32


def test_known_surplus_is_passed_over(tmp_path):
    tied = tiny("smollm2")
    params = random_weights(tied)
    save_huggingface(params, tied, tmp_path / "tied")

    def change(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(4, np.float32)

    edit(tmp_path / "tied", change)
    assert_same_tree(load_huggingface(tmp_path / "tied")[0], params)

    neox = tiny("gpt_neox")
    params = random_weights(neox)
    save_huggingface(params, neox, tmp_path / "neox")

    def rename(tensors):
        tensors["lm_head.weight"] = tensors.pop("embed_out.weight")
        tensors["gpt_neox.layers.0.attention.masked_bias"] = np.float32([-1e9])

    edit(tmp_path / "neox", rename)
    assert_same_tree(load_huggingface(tmp_path / "neox")[0], params)


def test_what_is_not_a_model_directory(tmp_path):
    load = functools.partial(load_huggingface, tmp_path)
    refuses(load, "config.json does not exist; give a Hugging Face", error=FormatError)
    (tmp_path / "config.json").write_text("{")
    refuses(load, "is not JSON", error=FormatError)
    load = functools.partial(load, tiny("llama"))
    refuses(load, "has no model.safetensors; a model's directory", error=FileNotFoundError)
    (tmp_path / "model.safetensors").write_bytes(b"PK\x03\x04 something else")
    refuses(load, "model.safetensors: header is", error=FormatError)


def test_a_wrong_index(tmp_path):
    config, load = tiny("llama"), functools.partial(load_huggingface, tmp_path)
    save_huggingface(random_weights(config), config, tmp_path, max_shard_size=20_000)
    file = tmp_path / "model.safetensors.index.json"
    weight_map = json.loads(file.read_text())["weight_map"]
    first = next(iter(weight_map.values()))
    file.write_text(json.dumps({"weight_map": weight_map | {"x.weight": first}}))
    refuses(load, "of 'x.weight' is ", "a file that holds that tensor", error=FormatError)
    (tmp_path / first).unlink()
    refuses(load, f"is '{first}'; expected a file that exists", error=FormatError)


def test_save_does_not_overwrite_unasked(tmp_path):
    config = tiny("llama")
    params = random_weights(config)
    save_huggingface(params, config, tmp_path, max_shard_size=20_000)
    words = "exists; use another directory, or overwrite=True"
    refuses(lambda: save_huggingface(params, config, tmp_path), words, error=FormatError)
    save_huggingface(params, config, tmp_path, overwrite=True)
    assert [f.name for f in tmp_path.glob("*.safetensors*")] == ["model.safetensors"]
    assert_same_tree(load_huggingface(tmp_path)[0], params)


def test_save_refuses_what_it_cannot_write(tmp_path):
    config = tiny("llama")
    params = random_weights(config)
    wider = tiny("llama", hidden_dim=28)
    words = "feed_forward/up is [24, 20], the configuration wants [24, 28]"
    refuses(lambda: save_huggingface(params, wider, tmp_path), words)
    layer = params.stacks[0].layers[0]
    up = Int8.quantize(layer.feed_forward.up)
    quantized = layer.replace(feed_forward=layer.feed_forward.replace(up=up))
    stacks = (params.stacks[0].replace(layers=(quantized,)),)
    params = params.replace(stacks=stacks)
    words = "feed_forward/up is a Int8; dequantize it first"
    refuses(lambda: save_huggingface(params, config, tmp_path), words)
    assert not list(tmp_path.iterdir())


def test_fused_rows_by_hand():
    """Where a query, a key and a value of each head lie in the fused matrices."""
    config = tiny("gpt_neox")
    params = random_weights(config)
    attention = params.stacks[0].layers[0].attention
    fused = dict(to_tensors(params, config))["gpt_neox.layers.1.attention.query_key_value.weight"]
    head, row = 2, 5
    for part, weight in enumerate((attention.query, attention.key, attention.value)):
        column = np.asarray(weight[1][:, head * 8 + row])
        assert np.array_equal(fused[head * 24 + part * 8 + row], column)

    config = tiny("phi3")
    params = random_weights(config)
    attention = params.stacks[0].layers[0].attention
    fused = dict(to_tensors(params, config))["model.layers.3.self_attn.qkv_proj.weight"]
    assert np.array_equal(fused[18 + 2], np.asarray(attention.key[3][:, 2]))
    assert np.array_equal(fused[18 + 6 + 1], np.asarray(attention.value[3][:, 1]))

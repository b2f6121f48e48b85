"""Adapters in PEFT's directories: the logits of PEFT, both ways, and what is wrong with a file."""

from __future__ import annotations

import copy
import functools
import json
import re
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from lm.adapters import add_lora
from lm.files import FormatError
from lm.formats import from_huggingface, from_tensors
from lm.formats.families import make_config
from lm.formats.peft.config import parse_adapter_config
from lm.formats.peft.io import load_peft, save_peft
from lm.model import unstack
from lm.weights import Int8, LoRA, is_structured, path_name
from tests.formats.directories import assert_same_tree, logits
from tests.model import drawn
from tests.model.huggingface_oracle import make_oracle
from tests.refuses import refuses

IDS = np.random.default_rng(0).integers(0, 139, (2, 9), dtype=np.int32)
CONFIG = make_config("llama", vocab_size=139, embed_dim=24, hidden_dim=20, num_layers=3,
                     num_heads=4, num_kv_heads=2)  # fmt: skip
MINIMAL = {
    "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 8,
    "target_modules": ["q_proj", "v_proj"],
}  # fmt: skip
SIZES = {"q_proj": (24, 24), "v_proj": (24, 12)}


@functools.cache
def base():
    return drawn.weights(CONFIG)


def tensors(rank=4, layers=range(3), seed=0):
    rng = np.random.default_rng(seed)
    found = {}
    for i in layers:
        for module, (rows, columns) in SIZES.items():
            stem = f"base_model.model.model.layers.{i}.self_attn.{module}"
            found[f"{stem}.lora_A.weight"] = rng.normal(size=(rank, rows)).astype(np.float32)
            found[f"{stem}.lora_B.weight"] = rng.normal(size=(columns, rank)).astype(np.float32)
    return found


def write(directory, files, **keys):
    directory.mkdir(exist_ok=True)
    save_file(files, directory / "adapter_model.safetensors")
    (directory / "adapter_config.json").write_text(json.dumps(MINIMAL | keys))
    return directory


def adapters(params) -> dict[str, LoRA]:
    leaves = jax.tree_util.tree_leaves_with_path(params, is_leaf=is_structured)
    return {path_name(path): w for path, w in leaves if isinstance(w, LoRA)}


def test_the_documented_layout(tmp_path):
    """y = W x + alpha / r B A x, with the names of the documentation; any leaf beneath."""
    files = tensors()
    write(tmp_path, files)
    for under in (base(), unstack(base())):
        adapted, _ = load_peft(tmp_path, under, CONFIG)
        found = adapters(adapted)
        assert len(found) == (2 if under is base() else 6)
        served = unstack(adapted)
        for i in range(3):
            for name, module in (("query", "q_proj"), ("value", "v_proj")):
                weight = getattr(served.stacks[0].layers[i].attention, name)
                stem = f"base_model.model.model.layers.{i}.self_attn.{module}"
                A, B = (files[f"{stem}.lora_{x}.weight"] for x in "AB")
                W = np.asarray(weight.base).T + 2.0 * B @ A
                np.testing.assert_allclose(weight.dequantize(jnp.float32), W.T, atol=1e-5)
    query = base().stacks[0].layers[0].attention.query
    layer = base().stacks[0].layers[0]
    over = base().replace(stacks=(base().stacks[0].replace(layers=(layer.replace(
        attention=layer.attention.replace(query=Int8.quantize(query))),)),))  # fmt: skip
    adapted, _ = load_peft(tmp_path, over, CONFIG, dtype=jnp.bfloat16)
    weight = adapted.stacks[0].layers[0].attention.query
    assert isinstance(weight.base, Int8) and weight.a.dtype == jnp.bfloat16


def test_a_round_trip_keeps_every_tensor(tmp_path):
    """Ranks and scales by pattern, and layers without an adapter, through the stacked form."""
    first, last = tensors(4, (0,)), tensors(6, (2,), seed=1)
    files = {name: x for name, x in (first | last).items() if "2.self_attn.v" not in name}
    keys = {
        "rank_pattern": {r"layers\.2\.self_attn\.q_proj": 6},
        "alpha_pattern": {r"2\.self_attn\.q_proj": 3},
        "target_modules": r".*\.0\.self_attn\.(q|v)_proj|.*\.2\.self_attn\.q_proj",
    }
    write(tmp_path / "in", files, **keys)
    adapted, _ = load_peft(tmp_path / "in", base(), CONFIG)
    query = adapted.stacks[0].layers[0].attention.query
    np.testing.assert_array_equal(query.scale, [2.0, 1.0, 0.5])
    assert query.a.shape == (3, 24, 6)
    for name, params in (("stacked", adapted), ("unstacked", unstack(adapted))):
        save_peft(params, CONFIG, tmp_path / name, base_model="some/llama")
        again = load_file(tmp_path / name / "adapter_model.safetensors")
        assert again.keys() == files.keys()
        for key, value in files.items():
            np.testing.assert_array_equal(again[key], value)
        config = json.loads((tmp_path / name / "adapter_config.json").read_text())
        assert config["base_model_name_or_path"] == "some/llama"
        assert (config["r"], config["lora_alpha"]) == (4, 8)
        assert config["rank_pattern"] == {"model.layers.2.self_attn.q_proj": 6}
        assert config["alpha_pattern"] == {"model.layers.2.self_attn.q_proj": 3}
        assert_same_tree(load_peft(tmp_path / name, base(), CONFIG)[0], adapted)


def test_exactly_what_is_wrong_is_named(tmp_path):
    files = tensors()
    stem = "base_model.model.model.layers.{}.self_attn.{}"
    del files[stem.format(1, "q_proj") + ".lora_B.weight"]
    files[stem.format(2, "q_proj") + ".lora_A.weight"] = np.zeros((4, 25), np.float32)
    files[stem.format(0, "v_proj") + ".lora_B.weight"] = np.zeros((12, 4), np.int32)
    files[stem.format(3, "q_proj") + ".lora_A.weight"] = np.zeros((4, 24), np.float32)
    write(tmp_path, files)
    refuses(
        lambda: load_peft(tmp_path, base(), CONFIG),
        "not an adapter for this 'llama' model of 3 layers, 4 faults",
        "layers.1.self_attn.q_proj.lora_B.weight [24, 4] is missing",
        "layers.2.self_attn.q_proj.lora_A.weight is [4, 25], the model wants [4, 24]",
        "layers.0.self_attn.v_proj.lora_B.weight is of dtype I32",
        "layers.3.self_attn.q_proj.lora_A.weight [4, 24] is not in this model",
        error=FormatError,
    )


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"init_lora_weights": "pissa"}, "'init_lora_weights' is 'pissa'"),
        ({"alora_invocation_tokens": [3]}, "'alora_invocation_tokens'=[3] is not supported"),
        ({"lora_bias": True}, "'lora_bias'=True"),
        ({"layer_replication": [[0, 2]]}, "'layer_replication'"),
        ({"r": 0}, "has rank 0"),
        ({"target_modules": ["c_attn"]}, "target_modules ('c_attn',) names no module"),
        ({"peft_type": "IA3"}, "peft_type 'IA3'; only 'LORA' is read"),
        ({"use_dora": True}, "q_proj.lora_magnitude_vector [24] is missing"),
        ({"r": 8}, "q_proj.lora_A.weight is [4, 24], the model wants [8, 24]"),
    ],
)
def test_what_is_not_read(tmp_path, keys, message):
    write(tmp_path, tensors(), **keys)
    refuses(lambda: load_peft(tmp_path, base(), CONFIG), message)


def test_what_is_not_there(tmp_path):
    load = lambda params=None: load_peft(tmp_path, params or base(), CONFIG)  # noqa: E731
    refuses(load, "adapter_config.json does not exist", error=FormatError)
    write(tmp_path, tensors())
    adapted, _ = load()
    refuses(lambda: load(adapted), "attention/query has an adapter already")
    words = "exists; use another directory, or overwrite"
    refuses(lambda: save_peft(adapted, CONFIG, tmp_path), words, error=FormatError)
    save_peft(adapted, CONFIG, tmp_path, overwrite=True)
    nothing = "no weight of the model has an adapter"
    refuses(lambda: save_peft(base(), CONFIG, tmp_path / "none"), nothing)
    (tmp_path / "adapter_model.safetensors").write_bytes(b"not that")
    refuses(load, "adapter_model.safetensors", error=FormatError)
    (tmp_path / "adapter_model.safetensors").unlink()
    refuses(load, "adapter_model.safetensors does not exist", error=FormatError)
    (tmp_path / "adapter_config.json").write_text("{")
    refuses(load, "is not JSON", error=FormatError)


def test_an_adapted_embedding_that_the_output_is_tied_to_is_not_written(tmp_path):
    config = make_config("llama", vocab_size=139, embed_dim=24, hidden_dim=20, num_layers=1,
                         num_heads=4, tied=True)  # fmt: skip
    params = drawn.weights(config)
    adapted = add_lora(params, config, jax.random.key(1), targets="embed".__eq__)
    refuses(lambda: save_peft(adapted, config, tmp_path), "output is tied")


def test_which_modules_are_meant():
    """Names, ends of names, expressions, layers and exclusions, as PEFT reads them."""

    def chosen(**keys):
        config = parse_adapter_config(MINIMAL | keys)
        names = [f"model.layers.{i}.self_attn.{m}_proj" for i in (0, 1, 11) for m in "qv"]
        names += ["model.embed_tokens", "lm_head"]
        flags = [(n == "lm_head", n.endswith("tokens")) for n in names]
        return [
            n.removeprefix("model.").replace("self_attn.", "").replace("_proj", "")
            for n, where in zip(names, flags, strict=True)
            if config.targets(n, *where)
        ]

    linear = [f"layers.{i}.{m}" for i in (0, 1, 11) for m in "qv"]
    assert chosen() == linear
    assert chosen(target_modules="all-linear") == linear == chosen(target_modules=["all-linear"])
    assert chosen(target_modules=["proj"]) == []
    assert chosen(target_modules=["lm_head", "embed_tokens"]) == ["embed_tokens", "lm_head"]
    assert chosen(target_modules=r".*\.1\..*q_proj") == ["layers.1.q"]
    assert chosen(layers_to_transform=1) == ["layers.1.q", "layers.1.v"]
    assert chosen(layers_to_transform=[0, 11], layers_pattern="layers")[::2] == [
        "layers.0.q",
        "layers.11.q",
    ]
    assert chosen(layers_to_transform=[0], layers_pattern=["blocks"]) == []
    assert chosen(exclude_modules=["v_proj"]) == linear[::2]
    assert chosen(target_modules=["lm_head", "q_proj"], modules_to_save=["lm_head"]) == linear[::2]


# With PEFT itself.


def peft_model(case: str, **keys):
    """A model of PEFT with noise in every adapter, its configuration, and our weights beneath."""
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")

    oracle = make_oracle(case)
    config = from_huggingface(oracle.json)
    arrays = {name: array.copy() for name, array in oracle.arrays().items()}
    beneath = copy.deepcopy(oracle.model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(beneath, peft.LoraConfig(task_type="CAUSAL_LM", **keys)).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model, config, from_tensors(arrays, config)


def their_logits(model) -> np.ndarray:
    torch = pytest.importorskip("torch")
    with torch.no_grad():
        return model(input_ids=torch.from_numpy(IDS).long(), use_cache=False).logits.numpy()


ALL = "all-linear"
LATENT = r".*self_attn\.(q_proj|q_a_proj|q_b_proj|kv_a_proj_with_mqa|kv_b_proj|o_proj)"
CASES = {
    "llama": ("llama", {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]}),
    "patterns": (
        "llama",
        {"r": 4, "lora_alpha": 8, "target_modules": ALL, "use_rslora": True,
         "rank_pattern": {"o_proj": 2, "model.layers.1.mlp.up_proj": 7},
         "alpha_pattern": {"down_proj": 3}},
    ),
    "dora": ("qwen2", {"r": 3, "target_modules": ALL, "use_dora": True}),
    "embeddings": (
        "mistral",
        {"r": 4, "target_modules": ["embed_tokens", "lm_head", "k_proj"], "lora_alpha": 6},
    ),
    "embeddings_dora": (
        "llama", {"r": 4, "target_modules": ["embed_tokens", "lm_head"], "use_dora": True},
    ),
    "modules": ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
    "fused": ("phi3", {"r": 4, "target_modules": ALL}),
    "fused_dora": ("phi3", {"r": 4, "target_modules": ["qkv_proj"], "use_dora": True}),
    "interleaved": ("gpt_neox", {"r": 4, "target_modules": ["query_key_value", "dense"]}),
    "latent_dora": ("deepseek_v2", {"r": 4, "target_modules": LATENT, "use_dora": True}),
    "latent": ("deepseek_v2_plain_queries", {"r": 4, "target_modules": LATENT}),
    "layers": (
        "gemma3",
        {"r": 4, "target_modules": r".*layers\.[1267]\.(self_attn|mlp)\.(q|k|up)_proj"},
    ),
}  # fmt: skip


@pytest.mark.oracle
@pytest.mark.parametrize("name", CASES)
def test_logits_of_peft_both_ways(name, tmp_path):
    """Theirs read here, and written again and read there: the same logits three times."""
    peft = pytest.importorskip("peft")

    case, keys = CASES[name]
    model, config, params = peft_model(case, **keys)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(tmp_path / "theirs")
    expected = their_logits(model)
    assert np.abs(expected - their_logits(make_oracle(case).model)).max() > 0.01
    adapted, _ = load_peft(tmp_path / "theirs", params, config)
    np.testing.assert_allclose(logits(adapted, IDS, config), expected, rtol=0, atol=1e-5)
    if "modules_to_save" in keys:
        return
    save_peft(adapted, config, tmp_path / "ours")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a missing or surplus tensor
        warnings.simplefilter("ignore", FutureWarning)
        again = peft.PeftModel.from_pretrained(
            copy.deepcopy(make_oracle(case).model), tmp_path / "ours"
        ).eval()
    np.testing.assert_allclose(their_logits(again), expected, rtol=0, atol=1e-5)
    theirs = load_file(tmp_path / "theirs/adapter_model.safetensors")
    ours = load_file(tmp_path / "ours/adapter_model.safetensors")
    beneath = {key for key in theirs if re.search(r"base_layer", key)}
    assert ours.keys() == theirs.keys() - beneath
    for key, value in ours.items():
        np.testing.assert_array_equal(value, theirs[key], err_msg=key)


@pytest.mark.oracle
@pytest.mark.parametrize("case", ["phi3", "gpt_neox"])
def test_weights_of_one_module_trained_apart(case, tmp_path):
    """Their adapters become one of the sum of the ranks, which PEFT reads as the same model."""
    peft = pytest.importorskip("peft")

    model, config, params = peft_model(case, r=4, target_modules="all-linear")
    del model
    rng = np.random.default_rng(0)

    def adapt(path, weight):
        if not re.search(r"attention/(query|value)$|up$", path_name(path)):
            return weight
        *stack, rows, columns = weight.shape
        rank = 2 if "query" in path_name(path) else 3
        a, b = (0.1 * rng.normal(size=(*stack, *s)) for s in ((rows, rank), (rank, columns)))
        scale = np.full(stack, rank / 2)
        return LoRA(weight, *(jnp.asarray(x, jnp.float32) for x in (a, b, scale)))

    adapted = jax.tree_util.tree_map_with_path(adapt, params)
    save_peft(adapted, config, tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["rank_pattern"]
    again = peft.PeftModel.from_pretrained(copy.deepcopy(make_oracle(case).model), tmp_path).eval()
    expected = logits(adapted, IDS, config)
    np.testing.assert_allclose(their_logits(again), expected, rtol=0, atol=1e-5)
    back, _ = load_peft(tmp_path, params, config)
    np.testing.assert_allclose(logits(back, IDS, config), expected, rtol=0, atol=1e-5)

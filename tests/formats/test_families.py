"""Sizes and arithmetic of the known models, and what `make_config` refuses."""

from __future__ import annotations

import ast
import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lm.formats
from lm.formats import from_huggingface
from lm.formats.families import FAMILIES, make_config
from lm.formats.known import KNOWN, known_model
from lm.kernels.attention import Scores, View, mask
from lm.model import forward_flops, num_params, param_specs, train_flops
from lm.weights import is_spec
from tests.model.huggingface_oracle import make_oracle
from tests.refuses import refuses

# Parameters as the model cards or papers give them (a file's count where the output matrix is
# tied and stored once; Gemma 3 from 4B on less the vision tower's 416,866,032 and its projector).
PUBLISHED = {
    "llama2_7b": 6_738_415_616,
    "llama2_13b": 13_015_864_320,
    "llama2_70b": 68_976_648_192,
    "llama3_8b": 8_030_261_248,
    "llama3_70b": 70_553_706_496,
    "llama3_1_8b": 8_030_261_248,
    "llama3_1_70b": 70_553_706_496,
    "llama3_405b": 405_853_388_800,
    "llama3_2_1b": 1_235_814_400,
    "llama3_2_3b": 3_212_749_824,
    "mistral_7b": 7_241_732_096,
    "mistral_7b_v0_3": 7_248_023_552,
    "qwen2_5_0_5b": 494_032_768,
    "qwen2_5_1_5b": 1_543_714_304,
    "qwen2_5_3b": 3_085_938_688,
    "qwen2_5_7b": 7_615_616_512,
    "qwen2_5_14b": 14_770_033_664,
    "qwen2_5_32b": 32_763_876_352,
    "qwen2_5_72b": 72_706_203_648,
    "qwen3_0_6b": 596_049_920,
    "qwen3_1_7b": 1_720_574_976,
    "qwen3_4b": 4_022_468_096,
    "qwen3_8b": 8_190_735_360,
    "qwen3_14b": 14_768_307_200,
    "qwen3_32b": 32_762_123_264,
    "gemma2_2b": 2_614_341_888,
    "gemma2_9b": 9_241_705_984,
    "gemma2_27b": 27_227_128_320,
    "gemma3_270m": 268_098_176,
    "gemma3_1b": 999_885_952,
    "gemma3_4b": 4_300_079_472 - 416_866_032 - 1152 * (2560 + 1),
    "gemma3_12b": 12_187_325_040 - 416_866_032 - 1152 * (3840 + 1),
    "gemma3_27b": 27_432_406_640 - 416_866_032 - 1152 * (5376 + 1),
    "smollm2_135m": 134_515_008,
    "smollm2_360m": 361_821_120,
    "smollm2_1_7b": 1_711_376_384,
    "olmo2_1b": 1_484_916_736,
    "olmo2_7b": 7_298_617_344,
    "olmo2_13b": 13_716_198_400,
    "olmo2_32b": 32_234_279_936,
    "phi3_mini": 3_821_079_552,
    "phi3_medium": 13_960_238_080,
    "phi4": 14_659_507_200,
    "pythia_70m": 70_426_624,
    "pythia_160m": 162_322_944,
    "pythia_410m": 405_334_016,
    "pythia_1b": 1_011_781_632,
    "pythia_1_4b": 1_414_647_808,
    "pythia_2_8b": 2_775_208_960,
    "pythia_6_9b": 6_857_302_016,
    "pythia_12b": 11_846_072_320,
    "neox_20b": 20_554_567_680,
}


@pytest.mark.parametrize("name", KNOWN)
def test_parameters_are_the_published_ones(name):
    assert num_params(known_model(name)) == PUBLISHED[name]


@pytest.mark.parametrize("name", ["llama3_8b", "mistral_7b", "gemma2_2b", "gemma3_1b", "pythia_1b"])
@pytest.mark.parametrize("length", [1, 700])
def test_flops_from_matrices_and_masks(name, length):
    """Two a weight of every matrix, and four a head dimension for every pair the mask lets see."""
    config = known_model(name)
    specs = param_specs(config)
    leaves = jax.tree.leaves(specs.stacks, is_leaf=is_spec)
    matrices = sum(math.prod(spec.shape) for spec in leaves if len(spec.shape) == 3)
    total = 2 * (matrices + config.vocab_size * config.embed_dim)
    positions = jnp.arange(length)[None]
    pairs = {
        window: int(np.sum(mask(View(positions, positions), Scores(1.0, window=window))))
        for window in {layer.attention.window for layer in config.layers}
    }
    for layer in config.layers:
        a = layer.attention
        total += 4 * a.num_heads * a.head_dim * pairs[a.window] / length
    assert forward_flops(config, length) == pytest.approx(total, rel=1e-12)
    assert train_flops(config, length) == pytest.approx(3 * total, rel=1e-12)


@pytest.mark.oracle
@pytest.mark.parametrize(
    "case",
    ["llama", "mistral", "gemma3", "olmo2", "phi3", "gpt_neox", "deepseek_v2_plain_queries"]
    + ["deepseek_v3"],
)
def test_flops_as_torch_counts_them(case):
    """PyTorch's counter, on a row of one token: there its attention is causal too."""
    torch = pytest.importorskip("torch")
    from torch.utils.flop_counter import FlopCounterMode

    oracle = make_oracle(case)
    with FlopCounterMode(display=False) as counter:
        oracle.model(input_ids=torch.zeros((1, 1), dtype=torch.long), use_cache=False)
    assert counter.get_total_flops() == forward_flops(from_huggingface(oracle.json), 1)


def test_patterns_repeat_and_leave_a_remainder():
    stacks = known_model("gemma3_1b").stacks
    assert [(len(stack.pattern), stack.num_repeats) for stack in stacks] == [(6, 4), (1, 2)]
    windows = [layer.attention.window for layer in known_model("gemma3_1b").layers]
    assert windows == [None if i % 6 == 5 else 512 for i in range(26)]
    thetas = {a.window: a.rope.theta for a in (x.attention for x in stacks[0].pattern) if a.rope}
    assert thetas == {None: 1e6, 512: 1e4}
    assert [len(s.pattern) for s in known_model("llama3_8b").stacks] == [1]


SIZES = {"vocab_size": 97, "embed_dim": 30, "hidden_dim": 48, "num_layers": 4, "num_heads": 3}


def test_traits_override_the_family():
    config = make_config("gemma2", **SIZES, tied=False, window=None, head_dim=8)
    assert not config.tied and config.family == "gemma2"
    assert {layer.attention.window for layer in config.layers} == {None}
    assert config.layers[0].attention.head_dim == 8


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_has_weights(family):
    config = make_config(family, **SIZES)
    assert config.family == FAMILIES[family].name
    assert num_params(config) > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"family": "lama2"}, "family 'lama2' is unknown; did you mean 'llama2'"),
        ({"windows": 3}, "'windows' is not a trait of a family; did you mean 'window'"),
        ({"num_heads": 4}, "num_heads=4 does not divide embed_dim=30; give head_dim"),
        ({"num_kv_heads": 2}, "num_kv_heads=2 does not divide num_heads=3"),
        ({"kinds": ["local"]}, "for each of 4 layers"),
    ],
)
def test_refuses(arguments, message):
    refuses(lambda: make_config(**({"family": "llama"} | SIZES | arguments)), message)


def names_compared(source: str) -> list[str]:
    """Comparisons and look-ups by the name of a family, its model type or its architecture."""
    names = set()
    for family in FAMILIES.values():
        names |= {family.name, family.huggingface.model_type}
        names |= set(family.gguf.architectures if family.gguf else ())
    found = []
    for node in ast.walk(ast.parse(source)):
        # `FAMILIES["gemma3"].rope` is a comparison in disguise.
        inside = node.slice if isinstance(node, ast.Subscript) else node
        if isinstance(node, ast.Compare | ast.MatchValue | ast.Subscript):
            values = [x.value for x in ast.walk(inside) if isinstance(x, ast.Constant)]
            found += [ast.unparse(node)] if names & set(values) else []
    return found


def test_no_code_asks_for_a_familys_name():
    """What is special about a family is said by its traits alone."""
    root = pathlib.Path(lm.formats.__file__).parents[1]
    files = [path for folder in ("formats", "model") for path in (root / folder).rglob("*.py")]
    assert len(files) > 30
    assert [hit for path in files for hit in names_compared(path.read_text())] == []
    assert names_compared('x = f.family in ("gemma2", "gemma3")')
    assert names_compared('x = TABLE["llama"]')


def test_unknown_model_names_the_nearest():
    refuses(lambda: known_model("llama38b"), "did you mean 'llama3_8b'")

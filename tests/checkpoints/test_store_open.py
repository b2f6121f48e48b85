"""A checkpoint opens by its path alone, whatever its weights are; frozen ones may lie elsewhere."""

import dataclasses
import json
import shutil
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm.checkpoints import (
    CheckpointError,
    Checkpoints,
    Reference,
    model_json,
    open_checkpoint,
    read_weights,
    register,
    weight_names,
)
from lm.checkpoints.names import flatten
from lm.checkpoints.reference import digest
from lm.model import Norm, Rope, RopeScaling
from lm.train.state import TrainState, abstract_state, partition
from lm.weights import Int8, StructuredWeight
from tests.checkpoints.states import (
    ADAM,
    SPECS,
    assert_same_bits,
    every_dtype,
    layout,
    make_state,
    structs,
)
from tests.refuses import refuses
from tests.train.tiny import UNTIED


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run's folder with two checkpoints of a model with averages, and the last state."""
    workdir = tmp_path_factory.mktemp("run")
    state = make_state(layout(3, fsdp=8), ema=True)
    with Checkpoints(workdir / "checkpoints", config=UNTIED) as checkpoints:
        checkpoints.save(1, dataclasses.replace(state, step=state.step * 0), {})
        checkpoints.save(2, state, {}, wait=True)
        assert checkpoints.failures() == []
    return workdir, jax.device_get(state)


@pytest.mark.parametrize("below", ["", "checkpoints", "checkpoints/2"])
def test_a_path_is_all_that_opening_needs(run, below, monkeypatch):
    workdir, state = run
    monkeypatch.chdir(workdir.parent)
    params, config = open_checkpoint(f"{workdir.name}/{below}")
    assert config == UNTIED
    assert_same_bits(params, state.params)
    averages, _ = open_checkpoint(workdir / below, ema=True)
    assert_same_bits(averages, state.ema)


def test_opening_into_a_layout(run):
    workdir, state = run
    where = layout(3, fsdp=2, tensor=4)
    params, _ = open_checkpoint(workdir, where)
    assert_same_bits(params, state.params)
    like = abstract_state(SPECS, ADAM, where)
    for x, y in zip(*map(jax.tree.leaves, (params, like.trainable)), strict=True):
        assert x.sharding.is_equivalent_to(y.sharding, x.ndim)


def test_only_weights_are_read(run, tmp_path):
    """Without the optimizer's state on disk at all, the model still opens."""
    step = shutil.copytree(run[0] / "checkpoints" / "2", tmp_path / "2")
    shutil.rmtree(step / "state")
    shutil.rmtree(step / "ema")
    params, _ = open_checkpoint(step)
    assert_same_bits(params, run[1].params)
    name = "stacks/0/layers/0/attention/query"
    assert name in weight_names(step)
    read = read_weights(step, [name])
    assert list(read) == [name] and isinstance(read[name], np.ndarray)
    assert_same_bits(read[name], flatten(run[1].trainable)[name])


def test_a_model_without_averages_says_so(run, tmp_path):
    with Checkpoints(tmp_path, config=UNTIED) as checkpoints:
        checkpoints.save(1, dataclasses.replace(run[1], ema=None), {}, wait=True)
    read = lambda: open_checkpoint(tmp_path, ema=True)  # noqa: E731
    refuses(read, "has no averaged weights", error=CheckpointError)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(2, {"x": jnp.ones(3)}, {}, wait=True)
    refuses(lambda: open_checkpoint(tmp_path), "holds no model", error=CheckpointError)


@flax.struct.dataclass
class Packed(StructuredWeight):
    """A leaf such as a block format: arrays of several dtypes, static fields, a leaf inside."""

    codes: Any
    inner: Any
    offset: Any = None
    block: int = flax.struct.field(pytree_node=False, default=32)
    layout: tuple[Any, ...] = flax.struct.field(pytree_node=False, default=("a", 1, 0.1, None))
    dtype_of_scale: Any = flax.struct.field(pytree_node=False, default=jnp.dtype("bfloat16"))


def quantized(params):
    """Some weights as leaves of other kinds."""
    layer = params.stacks[0].layers[0]
    bits = every_dtype()
    attention = dataclasses.replace(
        layer.attention,
        query=Int8.quantize(layer.attention.query),
        key=Packed(bits["uint4"], Int8(bits["int8"], bits["bfloat16"]), block=64),
        value=Packed(bits["float8_e4m3fn"], bits["uint8"], offset=bits["float16"], layout=()),
    )
    layer = dataclasses.replace(layer, attention=attention)
    stack = dataclasses.replace(params.stacks[0], layers=(layer, *params.stacks[0].layers[1:]))
    return dataclasses.replace(params, stacks=(stack, *params.stacks[1:]))


def test_leaves_of_any_kind_come_back(run, tmp_path):
    params = quantized(jax.tree.map(jnp.asarray, run[1].trainable))
    trainable, frozen = partition(params, lambda path: "norm" in path)
    state = TrainState(jnp.int32(4), trainable, frozen, {})
    with Checkpoints(tmp_path, config=UNTIED) as checkpoints:
        checkpoints.save(4, state, {}, wait=True)
        assert checkpoints.failures() == []
    found, _ = open_checkpoint(tmp_path)
    assert_same_bits(found, params)
    assert found.stacks[0].layers[0].attention.key.block == 64


def test_a_class_that_is_not_known_is_named(tmp_path, monkeypatch):
    @flax.struct.dataclass
    class Adapter:
        down: Any

    tree = (Adapter(jnp.ones(3)),)
    words = "weights/0: checkpoints do not know the class"
    refuses(lambda: model_json.encode_tree(tree), words, error=CheckpointError)
    monkeypatch.setattr(model_json, "_registered", dict(model_json._registered))
    register(Adapter)
    written = model_json.encode_tree(tree)
    assert isinstance(model_json.decode_tree(written)[0], Adapter)
    del model_json._registered["Adapter"]
    words = "class 'Adapter' is not known here; ", "register"
    refuses(lambda: model_json.decode_tree(written), *words, error=CheckpointError)


def test_configurations_come_back_equal():
    scaling = RopeScaling("yarn", 4.0, attention_factor=0.1)
    layer = dataclasses.replace(
        UNTIED.stacks[0].pattern[0],
        norm=Norm("layer", 1e-6, bias=True),
        attention=dataclasses.replace(
            UNTIED.stacks[0].pattern[0].attention, rope=Rope(5e5, 0.25, scaling), window=7
        ),
    )
    stack = dataclasses.replace(UNTIED.stacks[0], pattern=(layer, *UNTIED.stacks[0].pattern))
    for config in (UNTIED, dataclasses.replace(UNTIED, stacks=(stack, *UNTIED.stacks), tied=True)):
        assert model_json.decode(model_json.encode(config)) == config


def test_a_configuration_of_another_version_of_the_code():
    """A field it lacks takes its default; one that is not known is an error that names it."""
    written = model_json.encode(UNTIED)
    del written["logit_softcap"], written["stacks"][0]["pattern"][0]["attention"]["window"]
    assert model_json.decode(written) == UNTIED
    written["stacks"][0]["pattern"][0]["attention"]["latent_dim"] = 64
    words = "unknown configuration key config.stacks.0.pattern.0.attention.latent_dim; open"
    refuses(lambda: model_json.decode(written), words, error=CheckpointError)


MODEL_JSON = """{
 "version": 2,
 "config": {"class": "ModelConfig", "vocab_size": 500, "embed_dim": 32, "stacks": [
  {"class": "Stack", "num_repeats": 2, "pattern": [{"class": "Layer",
   "attention": {"class": "Attention", "num_heads": 8, "num_kv_heads": 8, "head_dim": 4,
    "rope": {"class": "Rope", "theta": 10000.0}, "window": null},
   "feed_forward": {"class": "FeedForward", "hidden_dim": 64},
   "norm": {"class": "Norm", "kind": "rms"}}]}]},
 "weights": [{"class": "Int8", "static": {"dynamic": false},
   "fields": {"values": "int8[4,8]", "scale": "float32[1,8]"}},
  {"class": "Packed", "fields": {"codes": "uint4[8]"},
   "static": {"block": 64, "layout": ["a", [1, 0.1]], "dtype_of_scale": {"dtype": "bfloat16"}}}],
 "frozen": null,
 "arrays": {"trainable/0/values": "int8[4,8]"}
}"""


def test_a_model_json_of_old_is_read():
    """The format stands as files hold it, not as this code happens to write it."""
    values = json.loads(MODEL_JSON)
    model = model_json.from_dict(values, "model.json")
    assert model.config == UNTIED
    assert model.arrays == {"trainable/0/values": "int8[4,8]"}
    int8, packed = model_json.decode_tree(model.weights)
    assert isinstance(int8, Int8) and int8.values == jax.ShapeDtypeStruct((4, 8), jnp.int8)
    assert packed.codes == jax.ShapeDtypeStruct((8,), jnp.uint4)
    assert (packed.block, packed.layout) == (64, ("a", (1, 0.1)))
    assert packed.dtype_of_scale == jnp.bfloat16
    assert model_json.encode_tree((int8, packed)) == values["weights"]
    old = {"class": "Int4", "static": {"along": "out"}, "fields": {"values": "uint8[4,8]"}}
    assert model_json.decode_tree(old).block_axis == "out"


def test_a_digest_depends_on_bits_and_names_but_not_on_the_mesh():
    some = ("bfloat16", "uint4", "float32")
    arrays = {name: np.asarray(x) for name, x in every_dtype().items()}
    whole = digest({name: arrays[name] for name in some})
    sharded = every_dtype(8)
    assert whole == digest({name: sharded[name] for name in reversed(some)})
    seen = {digest(arrays)}
    for name, x in arrays.items():
        changes = ("bit", "order", "shape", "name") if name in some else ("bit",)
        for change in changes:
            other, y = dict(arrays), x.copy()
            if change == "bit":
                y.reshape(-1).view(np.uint8)[-1] ^= 1
            elif change == "order":
                y = np.roll(y.reshape(-1), 1).reshape(y.shape)
            elif change == "shape":
                y = y.reshape(6, 8)
            other[name] = y
            if change == "name":
                other[name + "_"] = other.pop(name)
            seen.add(digest(other))
    assert len(seen) == 1 + len(arrays) + 3 * len(some)


@pytest.fixture
def adapters(run, tmp_path):
    """A checkpoint that trains norms on the frozen rest of the run's model."""
    base = shutil.copytree(run[0] / "checkpoints", tmp_path / "base")
    trainable, frozen = partition(run[1].trainable, lambda path: "norm" in path)
    trainable = jax.tree.map(lambda x: x + 1, trainable)
    state = TrainState(jnp.int32(9), trainable, frozen, {"count": jnp.int32(3)})
    with Checkpoints(tmp_path / "run", config=UNTIED) as checkpoints:
        checkpoints.save(9, state, {}, frozen=Reference.of("../../base/2", frozen), wait=True)
        assert checkpoints.failures() == []
    return tmp_path, base, state


def test_frozen_weights_are_not_written_again(adapters):
    path, base, state = adapters
    size = lambda folder: sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())  # noqa: E731
    assert size(path / "run" / "9" / "weights") < size(base / "2" / "weights") / 5
    checkpoints = Checkpoints(path / "run")
    assert_same_bits(checkpoints.restore_last(structs(state)).state, state)
    params, config = open_checkpoint(path / "run")
    assert config == UNTIED
    assert_same_bits(params, state.params)
    name = "stacks/0/layers/0/attention/query"
    assert_same_bits(read_weights(path / "run", [name])[name], flatten(state.frozen)[name])


def test_frozen_weights_that_are_gone_moved_or_others(adapters):
    path, base, state = adapters
    like, checkpoints = structs(state), Checkpoints(path / "run")
    moved = base.rename(path / "moved")
    lost = "weights stored in", "base/2, which cannot be", "give their new path"
    for read in (lambda: checkpoints.restore(9, like), lambda: open_checkpoint(path / "run")):
        refuses(read, *lost, error=CheckpointError)
    assert_same_bits(checkpoints.restore(9, like, frozen=str(moved / "2")), state)
    assert_same_bits(checkpoints.restore(9, like, frozen=state.frozen), state)
    other = jax.tree.map(lambda x: x.copy(), state.frozen)
    other.embed[7, 3] += 1
    wrong = "on frozen weights with digest", "; those in "
    read = lambda: checkpoints.restore(9, like, frozen=other)  # noqa: E731
    refuses(read, *wrong, "the tree given have", error=CheckpointError)
    with Checkpoints(path / "base", config=UNTIED) as changed:
        changed.save(2, dataclasses.replace(state, frozen=other), {}, wait=True)
    refuses(lambda: checkpoints.restore(9, like), *wrong, "base/2 have", error=CheckpointError)

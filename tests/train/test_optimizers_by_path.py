"""Rules by path: against PyTorch's parameter groups, and what they refuse."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from lm.config import codec
from lm.config import command_line as config_lib
from lm.model import param_specs
from lm.train.optimizers import Adafactor, AdamW, Lion, Muon, PathRule, Soap, make_optimizer
from lm.weights import ParamSpec, path_name
from tests.train.tiny import UNTIED
from tests.train.trajectories import (
    GRADIENTS,
    SPECS,
    assert_close,
    flat,
    on_tree,
    random_tree,
    scheduled,
    torch_trajectory,
    trajectory,
)

ALL = [AdamW(), Muon(), Adafactor(), Lion(), Soap()]
each = pytest.mark.parametrize("config", ALL, ids=lambda config: type(config).__name__)


@pytest.mark.oracle
def test_rules_equal_pytorchs_parameter_groups():
    torch = pytest.importorskip("torch")
    rules = (
        PathRule("^embed$", 3.0, 0.0),
        PathRule("square|norm", 0.5),
        PathRule("bias", weight_decay=0.7),
        PathRule("stacks", 9.0, 9.0),
    )
    expected = {  # factor, weight decay: the first rule that fits, the optimizer's where it is mute
        "embed": (3.0, 0.0), "stacks/square": (0.5, 0.3), "norm/scale": (0.5, 0.0),
        "up_bias": (1.0, 0.7), "stacks/up": (9.0, 9.0), "stacks/down": (9.0, 9.0),
    }  # fmt: skip

    def make(params):
        groups = [
            {"params": [params[name]], "factor": factor, "weight_decay": decay}
            for name, (factor, decay) in expected.items()
        ]
        return [torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-8)]

    config = AdamW(weight_decay=0.3, rules=rules)
    ours = trajectory(scheduled(on_tree(config)), random_tree(0), GRADIENTS)
    assert_close(ours, torch_trajectory(make, GRADIENTS))


@each
def test_every_optimizer_takes_factor_and_decay_from_the_rules(config):
    """A factor of 0 holds a weight still; decay adds decay * weight to the direction."""
    rules = (PathRule("up$", 0.0), PathRule("down", 2.0, 5.0), PathRule("scale", 1.0, 5.0))
    params, gradient = random_tree(0), GRADIENTS[0]

    def directions(config, rounds=2):
        optimizer = on_tree(config)
        state, update = optimizer.init(params), jax.jit(optimizer.update)
        for _ in range(rounds):
            found, state = update(gradient, state, params)
        return flat(found)

    plain, ruled = (directions(dataclasses.replace(config, rules=r)) for r in ((), rules))
    weights = flat(params)
    assert not np.any(ruled["stacks/up"]) and np.any(plain["stacks/up"])
    own = config.decay(SPECS["stacks"]["down"])
    for name, factor, decay in (("stacks/down", 2.0, own), ("norm/scale", 1.0, 0.0)):
        expected = factor * (plain[name] + (5.0 - decay) * weights[name])
        np.testing.assert_allclose(ruled[name], expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(plain["stacks/square"], ruled["stacks/square"])


@each
def test_decay_is_of_matrices_alone_by_default(config):
    kinds = "matrix", "embedding", "vector"
    specs = [ParamSpec((3, 4), (None, None), kind=kind) for kind in kinds]
    assert [config.decay(spec) > 0 for spec in specs] == [True, True, False]


@each
def test_a_pattern_that_fits_nothing_names_the_nearest_paths(config):
    ruled = dataclasses.replace(config, rules=(PathRule("attention/qurey"),))
    optimizer = make_optimizer(ruled, param_specs(UNTIED))
    params = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype), param_specs(UNTIED))
    for make in (lambda: jax.eval_shape(optimizer.init, params), lambda: optimizer.specs(params)):
        with pytest.raises(ValueError, match=r"'attention/qurey' is found in no.*attention/query"):
            make()


def test_a_pattern_for_a_frozen_weight_fits_nothing():
    params = random_tree(0) | {"embed": None}
    with pytest.raises(ValueError, match="'embed' is found in no weight that trains"):
        on_tree(AdamW(rules=(PathRule("embed"),))).init(params)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PathRule("(up"), r"pattern '\(up' is not a regular expression"),
        (lambda: Muon(adam=AdamW(rules=(PathRule("up"),))), "adam.rules are not read here"),
        (lambda: Soap(adam=AdamW(rules=(PathRule("up"),))), "adam.rules are not read here"),
    ],
)
def test_bad_settings(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@dataclasses.dataclass(frozen=True)
class Config:
    optimizer: AdamW | Muon | Adafactor | Lion | Soap


@each
def test_a_configuration_survives_its_file_and_the_command_line(config):
    config = Config(
        dataclasses.replace(config, rules=(PathRule("embed", 2.0, 0.0), PathRule("up")))
    )
    text = json.dumps(codec.to_dict(config))
    assert codec.from_dict(json.loads(text), Config) == config
    edits = {"optimizer.rules.1.learning_rate": "0.5", "optimizer.weight_decay": "0.25"}
    edited = config_lib.override(config, edits)
    assert edited.optimizer.rules == (PathRule("embed", 2.0, 0.0), PathRule("up", 0.5))
    assert edited.optimizer.weight_decay == 0.25


def test_frozen_weights_have_no_state_and_no_direction():
    params, gradient = (tree | {"embed": None} for tree in (random_tree(0), GRADIENTS[0]))
    for config in ALL:
        optimizer = on_tree(config)
        state = jax.eval_shape(optimizer.init, params)
        directions, state = jax.eval_shape(optimizer.update, gradient, state, params)
        assert directions["embed"] is None
        assert jax.tree.structure(directions) == jax.tree.structure(params)
        paths = [path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(state)]
        assert not any("embed" in path.split("/") for path in paths)

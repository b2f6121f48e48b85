"""What tests of directories share: edit a file of tensors, compare trees, logits of a model."""

from __future__ import annotations

import functools
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from safetensors.numpy import load_file, save_file

from lm.model import ModelConfig, ModelWeights, Tokens, forward, make_head
from lm.weights import path_name


def edit(directory: pathlib.Path, change: Callable[[dict[str, np.ndarray]], Any]) -> None:
    """Rewrite the only file of a directory with its tensors changed."""
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors")


def assert_same_tree(got: Any, want: Any) -> None:
    """The same structure, dtypes, shapes and numbers."""
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(want), strict=True
    ):
        assert a.dtype == b.dtype and a.shape == b.shape, path_name(path)
        assert np.array_equal(np.asarray(a), np.asarray(b)), path_name(path)


@functools.partial(jax.jit, static_argnames="config")
def logits(params: ModelWeights, ids: Any, config: ModelConfig) -> jax.Array:
    """[*ids, vocabulary]."""
    hidden = forward(params, Tokens.of(ids), config).hidden
    return make_head(params, config).logits(hidden)[..., : config.vocab_size]

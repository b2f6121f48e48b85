"""Round-to-nearest quantization of the matrices of a tree, chosen by their paths."""

from __future__ import annotations

import fnmatch
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax

from lm.weights.fp8 import Fp8
from lm.weights.gguf import GGUFBlocks
from lm.weights.int4 import Int4
from lm.weights.int8 import Int8
from lm.weights.leaf import StructuredWeight
from lm.weights.nf4 import NF4
from lm.weights.specs import path_name

Tree = Any
Format = str | Callable[[jax.Array], StructuredWeight]

FORMATS: Mapping[str, Callable[[jax.Array], StructuredWeight]] = {
    "int8": Int8.quantize,
    "w8a8": functools.partial(Int8.quantize, dynamic=True),
    "int4": Int4.quantize,
    "nf4": NF4.quantize,
    "fp8": Fp8.quantize,
    **{
        kind.lower(): functools.partial(GGUFBlocks.quantize, kind=kind)
        for kind in ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "TQ2_0", "MXFP4")
    },
}
# Endings of the names of arrays that are not matrices, however many dimensions a stack gives them.
_VECTORS = ("bias", "norm", "scale")


def rtn(params: Tree, formats: Mapping[str, Format]) -> Tree:
    """The tree with matrices in quantized formats.

    An embedding table that rows are taken from wants blocks along its rows:
    `{"*/feed_forward/*": "int4", "embed": functools.partial(NF4.quantize, block_axis="out")}`.

    Args:
      params: the weights. Weights that are not plain arrays stay as they are.
      formats: from a pattern of paths (`stacks/0/layers/*/query`; `*` is anything, slashes too) to
        a name in `FORMATS` or a function from a matrix [*stack, in, out] to a `StructuredWeight`.
        The first pattern that a path matches decides; norms and biases never match.

    Raises:
      ValueError: there is no such format, a pattern matches nothing, or a matrix does not fit its
        format; the message names it.
    """
    for name in formats.values():
        if isinstance(name, str) and name not in FORMATS:
            raise ValueError(f"no format {name!r}; use one of {', '.join(FORMATS)}, or a function")
    unused = set(formats)

    def quantize(path: tuple[Any, ...], weight: Any) -> Any:
        name = path_name(path)
        if isinstance(weight, StructuredWeight) or weight.ndim < 2 or name.endswith(_VECTORS):
            return weight
        pattern = next((p for p in formats if fnmatch.fnmatchcase(name, p)), None)
        if pattern is None:
            return weight
        unused.discard(pattern)
        chosen = formats[pattern]
        try:
            return (FORMATS[chosen] if isinstance(chosen, str) else chosen)(weight)
        except ValueError as error:
            raise ValueError(f"{name} {list(weight.shape)}: {error}") from None

    is_leaf = lambda x: isinstance(x, StructuredWeight)  # noqa: E731
    quantized = jax.tree_util.tree_map_with_path(quantize, params, is_leaf=is_leaf)
    if unused:
        some = [path_name(p) for p, _ in jax.tree_util.tree_leaves_with_path(params)][:3]
        raise ValueError(
            f"no matrix matches {', '.join(map(repr, sorted(unused)))}; paths here are as "
            f"{', '.join(some)}"
        )
    return quantized

"""What the backward pass keeps and what it computes again.

Policies: `none` keeps everything; `full` keeps a layer's input only; `matmuls` keeps the results of
matrix products with weights; `save:query,key,...` keeps the named values and a layer's input.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

NAMES = ("query", "key", "value", "attention", "up", "gate")


def policy(name: str) -> Any:
    """The JAX checkpoint policy of that name (None for `full`).

    Raises:
      ValueError: there is no such policy.
    """
    if name == "full":
        return None
    if name == "matmuls":
        return jax.checkpoint_policies.dots_with_no_batch_dims_saveable
    if name.startswith("save:"):
        names = [n for n in name.removeprefix("save:").split(",") if n]
        unknown = [n for n in names if n not in NAMES]
        if names and not unknown:
            return jax.checkpoint_policies.save_only_these_names(*names)
    raise ValueError(
        f"remat={name!r} is unknown; use none, full, matmuls, or save: and some of "
        f"{','.join(NAMES)}"
    )


def checkpointed(f: Callable[..., Any], remat: str, scanned: bool) -> Callable[..., Any]:
    """`f` with its intermediate values kept or computed again as `remat` says.

    Inside a scan the loop itself keeps XLA from merging the two computations, so that no barrier
    is needed there.
    """
    if remat == "none":
        return f
    return jax.checkpoint(f, policy=policy(remat), prevent_cse=not scanned)

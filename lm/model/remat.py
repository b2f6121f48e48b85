"""What the backward pass keeps and what it computes again.

Policies: `none` keeps everything; `full` keeps a layer's input only; `matmuls` keeps the results of
matrix products with weights; `save:query,key,...` keeps the named values and a layer's input;
`offload:input,...` keeps them in the host's memory, and so nothing on the device where `input` is
among them; `save:attention+offload:input` does both.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

import jax

from lm.config.fields import Rule

NAMES = ("input", "query", "key", "value", "attention", "up", "gate")
POLICIES = (
    f"none, full, matmuls, or save: or offload: (both joined by +) and some of {','.join(NAMES)}"
)


def policy(name: str) -> Any:
    """The JAX checkpoint policy of that name (None for `full`).

    Raises:
      ValueError: there is no such policy.
    """
    if name == "full":
        return None
    if name == "matmuls":
        return jax.checkpoint_policies.dots_with_no_batch_dims_saveable
    saved, offloaded = named(name)
    if not offloaded:
        return jax.checkpoint_policies.save_only_these_names(*saved)
    return jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=saved,
        names_which_can_be_offloaded=offloaded,
        offload_src="device",
        offload_dst="pinned_host",
    )


def named(name: str) -> tuple[list[str], list[str]]:
    """The values that `save:` and `offload:` name: kept on the device, and on the host.

    Raises:
      ValueError: there is no such policy.
    """
    found: dict[str, list[str]] = {"save": [], "offload": []}
    for part in name.split("+"):
        where, _, listed = part.partition(":")
        names = [n for n in listed.split(",") if n]
        taken = found["save"] + found["offload"]
        if where not in found or not names or not {*names} <= {*NAMES} or {*names} & {*taken}:
            raise ValueError(f"remat={name!r} is unknown; use {POLICIES}")
        found[where] += names
    return found["save"], found["offload"]


def is_policy(name: str) -> bool:
    """Whether `checkpointed` knows it."""
    try:
        return name in ("none", "full") or bool(policy(name))
    except ValueError:
        return False


Remat = Annotated[str, Rule(is_policy, f"of the form {POLICIES}")]


def checkpointed(f: Callable[..., Any], remat: str, scanned: bool) -> Callable[..., Any]:
    """`f` with its intermediate values kept or computed again as `remat` says.

    Inside a scan the loop itself keeps XLA from merging the two computations, so that no barrier
    is needed there.
    """
    if remat == "none":
        return f
    return jax.checkpoint(f, policy=policy(remat), prevent_cse=not scanned)

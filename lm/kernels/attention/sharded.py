"""Kernels on arrays sharded over the layout's mesh by batch and heads."""

from __future__ import annotations

import functools
from typing import Any

import jax
from jax.experimental.pallas.ops.tpu import splash_attention as splash
from jax.sharding import PartitionSpec

from lm.hardware.chips import chip_of
from lm.kernels.attention.common import declared, kernel_flops, num_scores
from lm.kernels.attention.flash import flash_attention, flash_attention_backward
from lm.kernels.attention.flash_gpu import flash_attention_gpu
from lm.kernels.attention.reference import View
from lm.kernels.attention.scores import Scores
from lm.sharding import Layout, current_layout, is_local, map_devices, partition_spec

HOPPER = ("H100", "H200", "GH200")


def target() -> Any:
    """A device with `platform` and `device_kind` of those compiled for, or None if unknown.

    It is the layout's, or, where there is none, that of the `jax.shard_map` being traced.
    """
    layout = current_layout()
    if layout is not None:
        return layout.mesh.devices.flat[0]
    mesh = jax.sharding.get_abstract_mesh()
    return mesh.abstract_device if not mesh.empty and is_local(mesh) else None


def on_tpu() -> bool:
    """Whether what is traced is known to run on TPUs."""
    device = target()
    return device is not None and device.platform == "tpu"


def sharded_flash(
    q, k, v, view: View, scores: Scores, *, sinks: Any, return_lse: bool, kernel: Any = None
) -> Any:
    """`flash_attention`, or another kernel, of each device's part."""
    kernel = kernel or functools.partial(flash_attention, **_where())

    def run(q, k, v, view: View, sinks: Any) -> Any:
        return kernel(q, k, v, view, scores, sinks=sinks, return_lse=return_lse)

    outputs = ("queries", "by_head") if return_lse else "queries"
    return _on_each_device(run, outputs, q, k, v, view, heads=sinks)


def sharded_flash_gpu(q, k, v, view: View, scores: Scores, **options: Any) -> Any:
    """`flash_attention_gpu` of each device's part.

    Raises:
      ValueError: the target is known not to be Hopper GPUs; else as `sharded_flash`.
    """
    device = target()
    if device is not None and not any(chip in device.device_kind for chip in HOPPER):
        raise ValueError(
            f"mosaic_gpu attention is for Hopper GPUs ({', '.join(HOPPER)}), the mesh is of "
            f"{device.device_kind} devices; use implementation='flash' on TPUs, else 'blocked'"
        )
    return sharded_flash(q, k, v, view, scores, **options, kernel=flash_attention_gpu)


def sharded_flash_backward(q, k, v, view: View, scores: Scores, out, lse, dout, *, dlse) -> Any:
    """`flash_attention_backward` of each device's part."""
    kernel = functools.partial(flash_attention_backward, **_where())

    def run(q, k, v, view: View, queries: Any, by_head: Any) -> Any:
        (out, dout), (lse, dlse) = queries, by_head
        return kernel(q, k, v, view, scores, out, lse, dout, dlse=dlse)

    outputs = ("queries", "keys", "keys")
    return _on_each_device(run, outputs, q, k, v, view, queries=(out, dout), by_head=(lse, dlse))


def _on_each_device(kernel: Any, outputs: Any, q, k, v, view: View, **more: Any) -> Any:
    """`kernel(q, k, v, view, *more)` of each device's part.

    Args:
      outputs: names of `_specs`, as a tree of the results.
      more: further arguments, each by the name of its spec.

    Raises:
      ValueError: see `_specs`.
    """
    layout = current_layout()
    if layout is None or is_local(layout.mesh):
        return kernel(q, k, v, view, *more.values())
    specs = _specs(layout, q, k)
    given = [specs[name] for name in ("queries", "keys", "keys", "rows", *more)]
    results = jax.tree.map(specs.__getitem__, outputs)
    return map_devices(kernel, tuple(given), results, layout.mesh)(q, k, v, view, *more.values())


def sharded_splash(q, k, v, view: View, scores: Scores) -> jax.Array:
    """JAX's own splash attention; what it cannot do is refused by `attention`."""
    T, S = q.shape[1], k.shape[1]
    if T % 128 or S % 128:
        raise ValueError(
            f"splash attention needs lengths that 128 divides, got {T}; use implementation='flash'"
        )
    if scores.window is not None:
        behind = scores.window - 1
        one = splash.LocalMask((T, S), (behind, 0 if scores.causal else behind), 0)
    else:
        one = splash.CausalMask((T, S)) if scores.causal else splash.FullMask((T, S))
    interpret = _where()["interpret"]
    if interpret is None:
        raise ValueError("splash attention needs a layout, to know where it runs")

    def kernel(q, k, v, view: View) -> jax.Array:
        attend = splash.make_splash_mha(
            splash.MultiHeadMask([one] * q.shape[2]),
            head_shards=1, q_seq_shards=1, attn_logits_soft_cap=scores.softcap,
            interpret=interpret,
        )  # fmt: skip
        segments = None
        if view.query_segments is not None:
            segments = splash.SegmentIds(view.query_segments, view.key_segments)
        heads_first = (x.swapaxes(1, 2) for x in (q * scores.scale, k, v))
        counted = q.shape[0] * q.shape[2] * num_scores(T, S, scores), q.shape[3], v.shape[3]
        kernels = {"fwd": "forward", "dq": "dq", "dkv": "dkv"}
        flops = {name: kernel_flops(kernel, *counted) for name, kernel in kernels.items()}
        with declared(**flops):
            out: Any = jax.vmap(attend)(*heads_first, segments)
        return out.swapaxes(1, 2)

    return _on_each_device(kernel, "queries", q, k, v, view)


def _where() -> dict[str, Any]:
    """The chip, and whether to interpret.

    Raises:
      ValueError: the target is neither TPUs nor CPUs.
    """
    device = target()
    if device is None:
        return {"chip": None, "interpret": None}
    if device.platform not in ("tpu", "cpu"):
        raise ValueError(
            f"flash attention is a TPU kernel (interpreted on CPUs), the mesh is of "
            f"{device.platform} devices; use implementation='cudnn' or 'blocked'"
        )
    chip = chip_of(device.device_kind)
    return {"chip": chip.name if chip else None, "interpret": device.platform == "cpu"}


def _specs(layout: Layout, q, k) -> dict[str, PartitionSpec]:
    """PartitionSpecs of queries, keys, positions, log-sum-exp and sinks.

    Raises:
      ValueError: the mesh does not divide batch or heads, splits the sequence, or splits queries
        and keys differently.
    """
    table, mesh = layout.rules.activations, layout.mesh
    queries = partition_spec(table, ("batch", "sequence", "heads", None), mesh, q.shape)
    keys = partition_spec(table, ("batch", "sequence", "kv_heads", None), mesh, k.shape)
    if queries[1] is not None:
        raise ValueError(
            f"this attention sees a whole sequence, the layout splits it over {queries[1]!r}; give "
            "the forward pass a context-parallel attention (ring or Ulysses)"
        )
    if queries[2] != keys[2]:
        raise ValueError(
            f"the rules split heads over {queries[2]!r} and kv_heads over {keys[2]!r}; "
            "they must be split alike"
        )
    batch, _, heads, _ = queries
    return {
        "queries": queries, "keys": keys, "rows": PartitionSpec(batch, None),
        "by_head": PartitionSpec(batch, None, heads), "heads": PartitionSpec(heads),
    }  # fmt: skip

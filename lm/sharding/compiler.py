"""Compiler options of a sharded training step, by platform."""

from __future__ import annotations

from jax.sharding import Mesh

# A reduce-scatter over one dimension of a torus stays one, in the layout its result rests in.
_SCATTERS: dict[str, bool | int] = {
    "xla_tpu_assign_all_reduce_scatter_layout": True,
    "xla_tpu_relayout_group_size_threshold_for_reduce_scatter": 1,
    "xla_tpu_use_minor_sharding_for_major_trivial_input": True,
}
# On the sparse cores, beside the matrix products. Not all-reduces, of some of which libtpu 0.0.42
# dies (on TPU7x unless switched off).
_BESIDE: dict[str, bool | int] = {
    "xla_tpu_enable_sparse_core_collective_offload_all_gather": True,
    "xla_tpu_enable_sparse_core_collective_offload_reduce_scatter": True,
    "xla_tpu_enable_sparse_core_collective_offload_all_reduce": False,
}
_WITH_SPARSE_CORES = ("TPU v5", "TPU v5p", "TPU v6 lite", "TPU v6e", "TPU7x")
_SCATTER_ALONE = ("TPU v6 lite", "TPU v6e", "TPU7x")


def step_options(mesh: Mesh) -> dict[str, bool | int]:
    """XLA options for `jax.jit(..., compiler_options=)` of a step on this mesh.

    TPUs only, and only where there is something to send. They change what is sent when and in which
    layout, never a result.
    """
    device = mesh.devices.flat[0]
    if device.platform != "tpu" or mesh.size == 1:
        return {}
    options = _BESIDE if device.device_kind in _WITH_SPARSE_CORES else {}
    # With sparse cores TPU v6e makes the better scatters without these options.
    return options if device.device_kind in _SCATTER_ALONE else options | _SCATTERS

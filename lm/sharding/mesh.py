"""Device meshes. Every mesh has all seven axes, in one order, so that a rule never has to ask."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
from collections.abc import Sequence
from typing import Any, Literal

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from lm.config.fields import Checked, Count

AXES = ("slice", "stage", "data", "fsdp", "expert", "context", "tensor")
Axis = Literal[-1] | Count


@dataclasses.dataclass(frozen=True)
class MeshShape(Checked):
    """Devices along each mesh axis. At most one may be -1, for all remaining devices.

    Attributes:
      slice: replicas across the data-centre network (several TPU slices).
      stage: pipeline stages.
      data: replicas that share a batch.
      fsdp: replicas that share a batch and, by ZeRO stage, optimizer state, gradients, weights.
      expert: shards of the experts of a mixture.
      context: shards of the sequence inside attention.
      tensor: shards of heads, feed-forward and vocabulary.
    """

    slice: Axis = 1
    stage: Axis = 1
    data: Axis = 1
    fsdp: Axis = 1
    expert: Axis = 1
    context: Axis = 1
    tensor: Axis = 1

    def sizes(self, num_devices: int) -> tuple[int, ...]:
        """Axis sizes with -1 filled in.

        Raises:
          ValueError: more than one -1, or a product that is not `num_devices`.
        """
        sizes = [getattr(self, axis) for axis in AXES]
        free = [i for i, size in enumerate(sizes) if size == -1]
        if len(free) > 1:
            names = " and ".join(repr(AXES[i]) for i in free)
            raise ValueError(f"mesh axes {names} are both -1; only one can be what is left")
        fixed = math.prod(size for size in sizes if size != -1)
        if free:
            if num_devices % fixed:
                raise ValueError(
                    f"the mesh fixes {fixed} devices, which does not divide the {num_devices} "
                    "present; change an axis"
                )
            sizes[free[0]] = num_devices // fixed
        elif fixed != num_devices:
            shape = " x ".join(
                f"{axis}={size}" for axis, size in zip(AXES, sizes, strict=True) if size > 1
            )
            raise ValueError(
                f"the mesh {shape or '(all axes 1)'} needs {fixed} devices, {num_devices} present; "
                "change an axis, set one to -1 to take what is left, or make fewer devices visible"
            )
        return tuple(sizes)


def make_mesh(shape: MeshShape, devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh of `shape` over `devices` (default: all), laid out for their interconnect.

    Axes are of type Auto: sharding is stated by constraints and by jit's in and out shardings.
    CPU devices are a pretence, so a smaller mesh takes the first ones of a single process. A mesh
    that would leave accelerators idle is refused, unless those to use are given.

    Raises:
      ValueError: the shape does not fit the devices.
    """
    if devices is None:
        devices = jax.devices()
        wanted = [getattr(shape, axis) for axis in AXES]
        if devices[0].platform == "cpu" and jax.process_count() == 1 and min(wanted) > 0:
            devices = devices[: math.prod(wanted)]
    sizes = shape.sizes(len(devices))
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if slices != sizes[0] and devices[0].platform == "tpu":
        raise ValueError(
            f"mesh axis 'slice'={sizes[0]}, and the devices are in {slices} slice"
            f"{'s' * (slices > 1)}; use slice={slices} and let the other axes divide the "
            f"{len(devices) // slices} devices of one"
        )
    if slices == sizes[0] > 1:
        grid = mesh_utils.create_hybrid_device_mesh(
            (1, *sizes[1:]), (sizes[0],) + (1,) * (len(sizes) - 1), devices,
            allow_split_physical_axes=True,
        )  # fmt: skip
    elif devices[0].platform == "cpu":
        grid = np.asarray(devices).reshape(sizes)
    else:
        grid = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def pretend_cpu_devices(shape: MeshShape) -> None:
    """Creates enough CPU devices for `shape`. No effect on GPU or TPU.

    Nor once JAX has used a device, where `--xla_force_host_platform_device_count` is given, or for
    more than a thousand, which would take minutes; `make_mesh` says then that they are missing.
    """
    sizes = [size for size in dataclasses.astuple(shape) if size > 0]
    wanted = math.prod(sizes)
    forced = "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", "")
    if 1 < wanted <= 1024 and not forced:
        with contextlib.suppress(RuntimeError):  # the backend is up already
            jax.config.update("jax_num_cpu_devices", wanted)

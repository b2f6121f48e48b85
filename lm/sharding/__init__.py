"""Meshes with named axes, rules from logical to mesh axes, the layout in force."""

from lm.sharding.compiler import step_options
from lm.sharding.layout import (
    Layout,
    constrain,
    constrain_both,
    current_layout,
    gather_weight,
    is_local,
    map_devices,
    named_sharding,
    reshard,
    use_layout,
)
from lm.sharding.mesh import AXES, MeshShape, make_mesh, pretend_cpu_devices
from lm.sharding.rules import (
    Rules,
    Sharding,
    check_divides,
    make_rules,
    mesh_axes,
    partition_spec,
    sizes,
)

__all__ = [
    "AXES",
    "Layout",
    "MeshShape",
    "Rules",
    "Sharding",
    "check_divides",
    "constrain",
    "constrain_both",
    "current_layout",
    "gather_weight",
    "is_local",
    "make_mesh",
    "make_rules",
    "map_devices",
    "mesh_axes",
    "named_sharding",
    "partition_spec",
    "pretend_cpu_devices",
    "reshard",
    "sizes",
    "step_options",
    "use_layout",
]

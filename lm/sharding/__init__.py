"""Meshes with named axes, rules from logical to mesh axes, the layout in force while tracing."""

from lm.sharding.layout import (
    Layout,
    constrain,
    current_layout,
    named_sharding,
    reshard,
    use_layout,
)
from lm.sharding.mesh import AXES, MeshShape, make_mesh, pretend_cpu_devices
from lm.sharding.rules import Rules, check_divides, make_rules, partition_spec

__all__ = [
    "AXES",
    "Layout",
    "MeshShape",
    "Rules",
    "check_divides",
    "constrain",
    "current_layout",
    "make_mesh",
    "make_rules",
    "named_sharding",
    "partition_spec",
    "pretend_cpu_devices",
    "reshard",
    "use_layout",
]

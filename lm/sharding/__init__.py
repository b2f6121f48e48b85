"""Meshes with named axes, rules from logical to mesh axes, the layout in force, several hosts."""

from lm.sharding.cluster import ClusterError
from lm.sharding.compiler import step_options
from lm.sharding.distributed import (
    PreemptionNotice,
    barrier,
    broadcast,
    fetch,
    is_first_process,
    say,
    start,
)
from lm.sharding.layout import (
    Layout,
    constrain,
    constrain_both,
    current_layout,
    gather_weight,
    named_sharding,
    reshard,
    use_layout,
)
from lm.sharding.mesh import AXES, MeshShape, make_mesh, pretend_cpu_devices
from lm.sharding.rules import Rules, check_divides, make_rules, partition_spec

__all__ = [
    "AXES",
    "ClusterError",
    "Layout",
    "MeshShape",
    "PreemptionNotice",
    "Rules",
    "barrier",
    "broadcast",
    "check_divides",
    "constrain",
    "constrain_both",
    "current_layout",
    "fetch",
    "gather_weight",
    "is_first_process",
    "make_mesh",
    "make_rules",
    "named_sharding",
    "partition_spec",
    "pretend_cpu_devices",
    "reshard",
    "say",
    "start",
    "step_options",
    "use_layout",
]

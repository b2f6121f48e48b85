"""Several hosts: start-up, who is there, who hangs, preemption; broadcast, fetch, barrier."""

from lm.distributed.cluster import ClusterError
from lm.distributed.collectives import barrier, broadcast, fetch, is_first_process, print_once
from lm.distributed.preemption import PreemptionNotice
from lm.distributed.startup import start

__all__ = [
    "ClusterError",
    "PreemptionNotice",
    "barrier",
    "broadcast",
    "fetch",
    "is_first_process",
    "print_once",
    "start",
]

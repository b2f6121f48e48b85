"""Several hosts: start-up, who is there, who hangs, preemption; broadcast, fetch, barrier."""

from lm.distributed.cluster import ClusterError
from lm.distributed.collectives import barrier, broadcast, fetch, is_first_process, print_once
from lm.distributed.preemption import PreemptionNotice
from lm.distributed.startup import agree, reached, start, waits

__all__ = [
    "ClusterError",
    "PreemptionNotice",
    "agree",
    "barrier",
    "broadcast",
    "fetch",
    "is_first_process",
    "print_once",
    "reached",
    "start",
    "waits",
]

"""Several hosts: start-up, who is there, who hangs, preemption; broadcast, fetch, barrier."""

from lm.distributed.cluster import ClusterError
from lm.distributed.start import (
    PreemptionNotice,
    barrier,
    broadcast,
    fetch,
    is_first_process,
    say,
    start,
)

__all__ = [
    "ClusterError",
    "PreemptionNotice",
    "barrier",
    "broadcast",
    "fetch",
    "is_first_process",
    "say",
    "start",
]

"""Which processes make up a run: from settings, or as JAX's own cluster detection finds them."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Iterator, Mapping

from jax._src import clusters

SETTINGS = {
    "coordinator": "LM_COORDINATOR",
    "num_processes": "LM_NUM_PROCESSES",
    "process_id": "LM_PROCESS_ID",
}


class ClusterError(ValueError):
    """Settings of a run over several processes that do not fit together."""


@dataclasses.dataclass(frozen=True)
class Cluster:
    """One process's place among those of a run.

    Attributes:
      coordinator: "host:port" that process 0 listens on, as the other hosts reach it.
      num_processes: of the run.
      process_id: of this process, from 0.
      local_device_ids: GPUs of this process where several share a host; None for all devices.
    """

    coordinator: str
    num_processes: int
    process_id: int
    local_device_ids: tuple[int, ...] | None = None

    @property
    def address(self) -> tuple[str, int]:
        """The coordinator's host and port."""
        host, _, port = self.coordinator.rpartition(":")
        return host.strip("[]"), int(port)


def find_cluster(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    timeout: float = 300.0,
) -> Cluster | None:
    """The cluster this process belongs to, or None where it is alone.

    Found in this order: the arguments; LM_COORDINATOR, LM_NUM_PROCESSES and LM_PROCESS_ID; what
    JAX detects (Open MPI, Slurm, TPU pods on Kubernetes and on Google Cloud, Kubernetes jobs).

    Raises:
      ClusterError: some settings without the others, values that cannot be, or a detection that
        fails (a host of several must not run as if it were alone).
    """
    given = {"coordinator": coordinator, "num_processes": num_processes, "process_id": process_id}
    cluster = _from_settings(given) or _detected(timeout)
    return cluster if cluster is not None and cluster.num_processes > 1 else None


def _from_settings(given: Mapping[str, object]) -> Cluster | None:
    values = {k: os.environ.get(SETTINGS[k]) if v in (None, "") else v for k, v in given.items()}
    missing = [name for name, value in values.items() if value in (None, "")]
    if len(missing) == len(values):
        return None
    if missing:
        have = ", ".join(f"{k}={v}" for k, v in values.items() if k not in missing)
        lack = " and ".join(f"{k} (--{k} or {SETTINGS[k]})" for k in missing)
        raise ClusterError(f"{have} is set, but not {lack}; set all three, or none for one process")
    n, i = (_number(name, values[name]) for name in ("num_processes", "process_id"))
    if n < 1:
        raise ClusterError(f"num_processes={n}; use 1 or more")
    if not 0 <= i < n:
        raise ClusterError(
            f"process_id={i} is out of range; with num_processes={n} use 0 to {n - 1}"
        )
    address = str(values["coordinator"])
    if not re.fullmatch(r".+:\d{1,5}", address):
        raise ClusterError(f"coordinator={address!r} is not host:port; for example 10.0.0.2:8476")
    return Cluster(address, n, i)


def _number(name: str, value: object) -> int:
    try:
        return int(str(value))
    except ValueError:
        raise ClusterError(
            f"{name}={value!r} is not a whole number; correct --{name} or {SETTINGS[name]}"
        ) from None


def _kinds() -> Iterator[type[clusters.ClusterEnv]]:
    """JAX's detections that may apply here, in JAX's order."""
    yield from (clusters.OmpiCluster, clusters.SlurmCluster)
    platforms = os.environ.get("JAX_PLATFORMS", "")
    if not platforms or "tpu" in platforms.split(","):
        yield from (clusters.GkeTpuCluster, clusters.GceTpuCluster)
    if "JOB_COMPLETION_INDEX" in os.environ:  # other pods are alone, and may not ask Kubernetes
        yield clusters.K8sCluster


def _detected(timeout: float) -> Cluster | None:
    kind = None
    try:
        kind = next((kind for kind in _kinds() if kind.is_env_present()), None)
        if kind is None or (n := kind.get_process_count()) == 1:
            return None
        port = os.environ.get("JAX_COORDINATOR_PORT")
        address = kind.get_coordinator_address(int(timeout), port)
        i, local = kind.get_process_id(), kind.get_local_process_id()
        # A task that has its host for itself takes all its GPUs; JAX would give it but one.
        if kind is clusters.SlurmCluster:
            shares = int(os.environ.get("SLURM_STEP_NUM_NODES", n)) < n
        else:
            shares = os.environ.get("OMPI_COMM_WORLD_LOCAL_SIZE", "1") != "1"
    except Exception as error:
        name = "a cluster" if kind is None else kind.__name__
        raise ClusterError(
            f"JAX's detection of {name} fails: {error!r}; set {', '.join(SETTINGS.values())}"
        ) from error
    return Cluster(address, n, i, (local,) if shares and local is not None else None)

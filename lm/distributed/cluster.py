"""Which processes make up a run: from settings, Slurm or a TPU VM's own description."""

from __future__ import annotations

import dataclasses
import glob
import os
import re
import time
import urllib.error
import urllib.request
from collections.abc import Mapping

TPU_PORT = 8482
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
    environ: Mapping[str, str] = os.environ,
) -> Cluster | None:
    """The cluster this process belongs to, or None where it is alone.

    Looked for in this order: the arguments; LM_COORDINATOR, LM_NUM_PROCESSES and LM_PROCESS_ID;
    the variables of a Slurm step; those of a TPU pod on Kubernetes; a TPU VM's metadata.

    Raises:
      ClusterError: some settings without the others, or values that cannot be.
    """
    given = {"coordinator": coordinator, "num_processes": num_processes, "process_id": process_id}
    cluster = _from_settings(given, environ) or _from_slurm(environ)
    if cluster is None and _has_tpu(environ):
        cluster = _from_tpu_variables(environ) or _from_tpu_metadata(environ)
    return cluster if cluster is not None and cluster.num_processes > 1 else None


def _from_settings(given: Mapping[str, object], environ: Mapping[str, str]) -> Cluster | None:
    values = {k: environ.get(SETTINGS[k]) if v in (None, "") else v for k, v in given.items()}
    missing = [name for name, value in values.items() if value in (None, "")]
    if len(missing) == len(values):
        return None
    if missing:
        have = ", ".join(f"{k}={v}" for k, v in values.items() if k not in missing)
        lack = " and ".join(f"{k} (--{k} or {SETTINGS[k]})" for k in missing)
        raise ClusterError(f"{have} is set, but not {lack}; set all three, or none for one process")
    n = _number("num_processes", SETTINGS["num_processes"], values["num_processes"])
    i = _number("process_id", SETTINGS["process_id"], values["process_id"])
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


def _number(name: str, variable: str, value: object) -> int:
    try:
        return int(str(value))
    except ValueError:
        raise ClusterError(
            f"{name}={value!r} is not a whole number; correct --{name} or {variable}"
        ) from None


def _from_slurm(environ: Mapping[str, str]) -> Cluster | None:
    """A step of srun: the first node is the coordinator, its port follows from the job's number."""
    needed = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID")
    if any(name not in environ for name in needed):
        return None
    job, nodes, n, i = (environ[name] for name in needed)
    first = re.match(r"([^,\[]+)(?:\[([^,\-\]]+))?", nodes)
    if first is None:
        raise ClusterError(f"SLURM_STEP_NODELIST={nodes!r} names no node")
    port = 65535 - 2**12 + 1 + int(job) % 2**12
    shared = int(n) > int(environ.get("SLURM_STEP_NUM_NODES", n))
    local = (int(environ["SLURM_LOCALID"]),) if shared and "SLURM_LOCALID" in environ else None
    return Cluster(f"{first[1]}{first[2] or ''}:{port}", int(n), int(i), local)


def _has_tpu(environ: Mapping[str, str]) -> bool:
    """Whether this machine has TPU chips that JAX may use."""
    platforms = environ.get("JAX_PLATFORMS", "")
    if platforms and "tpu" not in platforms.split(","):
        return False
    return bool(glob.glob("/dev/accel[0-9]*") or glob.glob("/dev/vfio/[0-9]*"))


def _from_tpu_variables(environ: Mapping[str, str]) -> Cluster | None:
    """A TPU pod on Kubernetes, which sets variables in every container."""
    hosts = environ.get("TPU_PROCESS_ADDRESSES") or environ.get("TPU_WORKER_HOSTNAMES")
    if not hosts:
        return None
    workers = hosts.split(",")
    slices = environ.get("MEGASCALE_NUM_SLICES", "1")
    if len(workers) * int(slices) > 1 and "TPU_WORKER_ID" not in environ:
        raise ClusterError(
            f"TPU_WORKER_HOSTNAMES names {len(workers)} hosts, but TPU_WORKER_ID is not set; set "
            "it to this host's place among them, from 0"
        )
    return _of_tpu(workers, int(environ.get("TPU_WORKER_ID", "0")), environ)


def _from_tpu_metadata(environ: Mapping[str, str]) -> Cluster | None:
    """A TPU VM: its metadata server knows the workers; `tpu-env` the slices, if several."""
    if "TPU_SKIP_MDS_QUERY" in environ:
        return None
    worker = _metadata("agent-worker-number", environ)
    endpoints = _metadata("worker-network-endpoints", environ)
    if worker is None or endpoints is None:
        return None
    # An endpoint is a host, or name:id:address.
    workers = [endpoint.split(":")[-1] for endpoint in endpoints.split(",")]
    lines = (line.split(":", 1) for line in (_metadata("tpu-env", environ) or "").splitlines())
    described = {key.strip(): value[0].strip().strip("'") for key, *value in lines if value}
    return _of_tpu(workers, int(worker), described | dict(environ))


def _of_tpu(workers: list[str], worker: int, variables: Mapping[str, str]) -> Cluster:
    num_slices = int(variables.get("MEGASCALE_NUM_SLICES") or 1)
    slice_id = int(variables.get("MEGASCALE_SLICE_ID") or 0)
    coordinator = (variables.get("MEGASCALE_COORDINATOR_ADDRESS") or workers[0]).split(":")[0]
    return Cluster(
        f"{coordinator}:{TPU_PORT}", len(workers) * num_slices, slice_id * len(workers) + worker
    )


def _metadata(key: str, environ: Mapping[str, str]) -> str | None:
    """An attribute of this Google Cloud machine; None where there is none, or no such machine."""
    host = environ.get("GCE_METADATA_IP", "metadata.google.internal")
    request = urllib.request.Request(
        f"http://{host}/computeMetadata/v1/instance/attributes/{key}",
        headers={"Metadata-Flavor": "Google"},
    )
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    for _ in range(4):  # the server is known to fail now and then
        try:
            with opener.open(request, timeout=5) as response:
                return response.read().decode()
        except urllib.error.HTTPError as error:
            if error.code == 404:
                return None
        except OSError:
            pass
        time.sleep(0.5)
    return None

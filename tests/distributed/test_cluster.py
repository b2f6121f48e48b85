"""Who belongs to a run, against JAX's own detection; and the rendezvous, with what can go wrong."""

from __future__ import annotations

import http.server
import json
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from lm.distributed import cluster as cluster_lib
from lm.distributed.cluster import Cluster, ClusterError, find_cluster
from lm.distributed.rendezvous import rendezvous
from scripts.run_local import free_port

SLURM = {
    "SLURM_JOB_ID": "4711",
    "SLURM_NTASKS": "4",
    "SLURM_PROCID": "2",
    "SLURM_LOCALID": "0",
    "SLURM_STEP_NUM_NODES": "4",
}


@pytest.fixture
def on_tpu(monkeypatch):
    from jax._src.clusters import cloud_tpu_cluster

    monkeypatch.setattr(cluster_lib, "_has_tpu", lambda environ: True)
    monkeypatch.setattr(cloud_tpu_cluster, "running_in_cloud_tpu_vm", True)
    monkeypatch.delenv("TPU_SKIP_MDS_QUERY", raising=False)
    return cloud_tpu_cluster


def detected(kind) -> Cluster:
    """What JAX's detection makes of the environment."""
    assert kind.is_env_present()
    address = kind.get_coordinator_address(timeout_secs=5, override_coordinator_port=None)
    return Cluster(address, kind.get_process_count(), kind.get_process_id())


def set_variables(monkeypatch, variables: dict[str, str]) -> dict[str, str]:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    return variables


@pytest.mark.parametrize(
    "nodes", ["node001", "node001,host2", "node[001-0015],host2", "node[001,007-015],host2"]
)
def test_slurm_as_jax_sees_it(monkeypatch, nodes):
    from jax._src.clusters.slurm_cluster import SlurmCluster

    variables = set_variables(monkeypatch, {**SLURM, "SLURM_STEP_NODELIST": nodes})
    assert find_cluster(environ=variables) == detected(SlurmCluster)


def test_slurm_tasks_that_share_a_node_take_a_gpu_each():
    variables = {**SLURM, "SLURM_STEP_NODELIST": "n1", "SLURM_STEP_NUM_NODES": "1"}
    found = find_cluster(environ={**variables, "SLURM_LOCALID": "2"})
    assert found is not None and found.local_device_ids == (2,)
    assert find_cluster(environ={**variables, "SLURM_NTASKS": "1"}) is None


@pytest.mark.parametrize("slices", [{}, {
    "MEGASCALE_COORDINATOR_ADDRESS": "127.0.0.1:8080", "MEGASCALE_NUM_SLICES": "2",
    "MEGASCALE_SLICE_ID": "1",
}])  # fmt: skip
def test_tpu_pod_on_kubernetes_as_jax_sees_it(monkeypatch, on_tpu, slices):
    monkeypatch.setattr(on_tpu, "get_tpu_env_value_from_metadata", lambda key: None)
    variables = {"TPU_WORKER_HOSTNAMES": "localhost,t1,t2,t3", "TPU_WORKER_ID": "3"}
    variables = set_variables(monkeypatch, variables | slices)
    assert find_cluster(environ=variables) == detected(on_tpu.GkeTpuCluster)


@pytest.mark.parametrize("endpoints", ["127.0.0.1,10.0.0.2", "a:1:127.0.0.1,b:2:10.0.0.2"])
@pytest.mark.parametrize("slices", ["", "MEGASCALE_NUM_SLICES: '2'\nMEGASCALE_SLICE_ID: '1'\n"])
def test_tpu_vm_as_jax_sees_it(monkeypatch, on_tpu, endpoints, slices):
    pytest.importorskip("requests", reason="JAX's own detection needs it")
    attributes = {
        "agent-worker-number": "1",
        "worker-network-endpoints": endpoints,
        "tpu-env": "ACCELERATOR_TYPE: 'v5litepod-8'\n" + slices,
    }

    class Metadata(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            value = attributes.get(self.path.rpartition("/")[2])
            known = self.headers["Metadata-Flavor"] == "Google" and value is not None
            self.send_response(200 if known else 404)
            self.end_headers()
            self.wfile.write((value or "").encode())

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Metadata) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            address = {"GCE_METADATA_IP": f"127.0.0.1:{server.server_port}", "NO_PROXY": "*"}
            variables = set_variables(monkeypatch, address)
            found = find_cluster(environ=variables)
            assert found == detected(on_tpu.GceTpuCluster)
            assert found is not None and found.num_processes == (4 if slices else 2)
            attributes.clear()
            assert find_cluster(environ=variables) is None  # a TPU VM of no pod
        finally:
            server.shutdown()


def test_arguments_come_before_variables():
    variables = {**SLURM, "SLURM_STEP_NODELIST": "n1", "LM_COORDINATOR": "a:1"}
    variables |= {"LM_NUM_PROCESSES": "3", "LM_PROCESS_ID": "0"}
    assert find_cluster(environ=variables) == Cluster("a:1", 3, 0)
    assert find_cluster("b:2", 5, 0, environ=variables) == Cluster("b:2", 5, 0)
    assert find_cluster(process_id=2, environ=variables) == Cluster("a:1", 3, 2)
    assert find_cluster("b:2", 1, 0, environ={}) is None
    assert find_cluster(environ={}) is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"LM_PROCESS_ID": "1"}, r"process_id=1 is set, but not coordinator .*LM_COORDINATOR.*all"),
        (
            {"LM_COORDINATOR": "a:1", "LM_NUM_PROCESSES": "2"},
            r"not process_id \(--process_id or LM_PROCESS_ID\)",
        ),
        (
            {"LM_COORDINATOR": "a:1", "LM_NUM_PROCESSES": "2", "LM_PROCESS_ID": "2"},
            r"process_id=2 is out of range; with num_processes=2 use 0 to 1",
        ),
        (
            {"LM_COORDINATOR": "a:1", "LM_NUM_PROCESSES": "two", "LM_PROCESS_ID": "0"},
            r"num_processes='two' is not a whole number; correct .* LM_NUM_PROCESSES",
        ),
        (
            {"LM_COORDINATOR": "host", "LM_NUM_PROCESSES": "2", "LM_PROCESS_ID": "0"},
            r"coordinator='host' is not host:port; for example",
        ),
    ],
)
def test_settings_that_do_not_fit(settings, message):
    with pytest.raises(ClusterError, match=message):
        find_cluster(environ=settings)


def call(*places: tuple[int, int], port: int | None = None, timeout: float = 2.0) -> list:
    """The rendezvous of processes (id, num_processes) as threads: results or errors."""
    port = port or free_port()

    def one(place: tuple[int, int]):
        cluster = Cluster(f"127.0.0.1:{port}", place[1], place[0])
        try:
            return rendezvous(cluster, 999 if place[0] == 0 else None, timeout)
        except ClusterError as error:
            return str(error)

    with ThreadPoolExecutor(len(places)) as pool:
        return list(pool.map(one, places))


def test_rendezvous_of_all():
    results = call((2, 3), (0, 3), (1, 3), timeout=30.0)
    assert results == [([socket.gethostname()] * 3, 999)] * 3


@pytest.mark.parametrize(
    ("places", "message"),
    [
        (((0, 4), (2, 4)), "processes 1, 3 of 4 did not come to coordinator=127.0.0.1:"),
        (((1, 2),), "process 1 of 2 found no process 0 at coordinator=127.0.0.1:"),
        (((0, 3), (1, 3), (1, 3)), "process_id=1 was given twice: to pid "),
        (((0, 2), (1, 3)), "was started with num_processes=3, process 0 with 2; give all the same"),
    ],
)
def test_rendezvous_says_who_is_missing(places, message):
    results = call(*places)
    assert all(isinstance(result, str) and message in result for result in results), results


def test_rendezvous_where_something_else_listens():
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]

        def answer():
            while True:
                try:
                    connection, _ = other.accept()
                except OSError:
                    return
                with connection:
                    connection.sendall(b"\x00\x00\x12\x04 not JSON\n")

        threading.Thread(target=answer, daemon=True).start()
        (result,) = call((1, 2), port=port)
        assert "something else answers there, perhaps an earlier run" in result
        other.shutdown(socket.SHUT_RDWR)


def report(port: int, process_id: int) -> socket.socket:
    """A connection on which a process of three, on a host named x, has reported."""
    while True:
        try:
            connection = socket.create_connection(("127.0.0.1", port), timeout=5)
            break
        except OSError:
            time.sleep(0.01)
    message = {"word": "rendezvous", "id": process_id, "num": 3, "host": "x", "pid": 1}
    connection.sendall(json.dumps(message).encode() + b"\n")
    return connection


def test_a_process_started_again_takes_its_place():
    port, here = free_port(), socket.gethostname()
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(rendezvous, Cluster(f"127.0.0.1:{port}", 3, 0), 999, 120.0)
        report(port, 1).close()
        with report(port, 2) as other:
            other.settimeout(1.0)
            with pytest.raises(TimeoutError):  # all reported, but one is gone: nobody starts
                other.recv(1)
            (again,) = call((1, 3), port=port, timeout=120.0)
            assert again == ([here, here, "x"], 999)
            assert json.loads(other.recv(1000)) == {"hosts": again[0], "watch": 999}
        assert first.result(120) == again


def test_rendezvous_counts_no_process_that_is_gone():
    port = free_port()
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(rendezvous, Cluster(f"127.0.0.1:{port}", 3, 0), 999, 2.0)
        report(port, 1).close()
        with report(port, 2), pytest.raises(ClusterError, match="process 1 of 3 did not come"):
            first.result(120)

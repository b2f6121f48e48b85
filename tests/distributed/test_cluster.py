"""Who belongs to a run; how the processes meet, and what happens to strangers who come along."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import socket
import subprocess
import sys
import time

import pytest
from jax._src.clusters import cloud_tpu_cluster

from lm.distributed import start, watchdog
from lm.distributed.cluster import Cluster, ClusterError, find_cluster
from scripts.run_local import free_port
from tests.refuses import refuses

LM = {"LM_COORDINATOR": "a:1", "LM_NUM_PROCESSES": "3", "LM_PROCESS_ID": "0"}
SLURM = {
    "SLURM_JOB_ID": "4711", "SLURM_NTASKS": "4", "SLURM_PROCID": "2", "SLURM_LOCALID": "0",
    "SLURM_STEP_NUM_NODES": "4", "SLURM_STEP_NODELIST": "node[001,007-015],host2",
}  # fmt: skip
SHARED = {"SLURM_STEP_NODELIST": "n1", "SLURM_STEP_NUM_NODES": "1", "SLURM_LOCALID": "2"}
GKE = {"TPU_WORKER_HOSTNAMES": "127.0.0.1,t1,t2,t3", "TPU_WORKER_ID": "3"}
SLICES = {
    "MEGASCALE_COORDINATOR_ADDRESS": "127.0.0.1:8080", "MEGASCALE_NUM_SLICES": "2",
    "MEGASCALE_SLICE_ID": "1",
}  # fmt: skip
VM = {"agent-worker-number": "1", "worker-network-endpoints": "a:1:127.0.0.1,b:2:10.0.0.2"}


@pytest.mark.parametrize(
    ("variables", "metadata", "expected"),
    [
        ({}, {}, None),
        (SLURM, {}, Cluster("node001:62055", 4, 2)),
        (SLURM | SHARED, {}, Cluster("n1:62055", 4, 2, (2,))),
        (SLURM | {"SLURM_NTASKS": "1"}, {}, None),
        (GKE, VM, Cluster("127.0.0.1:8482", 4, 3)),
        (GKE | SLICES, VM, Cluster("127.0.0.1:8482", 8, 7)),
        ({}, VM, Cluster("127.0.0.1:8482", 2, 1)),
        (SLICES, VM, Cluster("127.0.0.1:8482", 4, 3)),
        ({"JAX_PLATFORMS": "cpu"}, VM, None),
        (SLURM | LM, {}, Cluster("a:1", 3, 0)),
        (LM | {"LM_NUM_PROCESSES": "1"}, VM, None),
    ],
)
def test_where_a_cluster_is_found(monkeypatch, variables, metadata, expected):
    for name in (*LM, *SLURM, *GKE, *SLICES, "TPU_SKIP_MDS_QUERY", "JAX_PLATFORMS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(cloud_tpu_cluster, "running_in_cloud_tpu_vm", bool(metadata))
    monkeypatch.setattr(
        cloud_tpu_cluster, "get_metadata", lambda k: (metadata.get(k, ""), 200 if k in VM else 404)
    )
    assert find_cluster() == expected
    assert find_cluster("b:2", 5, 0) == Cluster("b:2", 5, 0)
    if variables.keys() >= LM.keys() and expected:
        assert find_cluster(process_id=2) == Cluster("a:1", 3, 2)


def test_settings_that_do_not_fit(monkeypatch):
    for variables, *words in (
        ({"LM_PROCESS_ID": "1"}, "process_id=1 is set, but not coordinator", "LM_COORDINATOR"),
        (
            LM | {"LM_PROCESS_ID": "3"},
            "process_id=3 is out of range",
            "use 0 to 2",
        ),
        (LM | {"LM_NUM_PROCESSES": "two"}, "'two' is not a whole number", "LM_NUM_PROCESSES"),
        (LM | {"LM_COORDINATOR": "host"}, "coordinator='host' is not host:port; for example"),
        (SLURM | {"SLURM_NTASKS": "x"}, "detection of SlurmCluster fails", "set LM_COORDINATOR"),
    ):
        with monkeypatch.context() as patch:
            for name, value in variables.items():
                patch.setenv(name, value)
            refuses(find_cluster, *words, error=ClusterError)


class Process:
    """A watchdog and the pipe of the process it belongs to."""

    def __init__(
        self, port: int, id: int, num: int, timeout: float = 60.0, token: str = "",
        host: str = "h", silence: float = 60.0, remind: float = 60.0,
    ) -> None:  # fmt: skip
        settings = watchdog.Settings(
            id, num, host, 1, token, ("127.0.0.1", port), 4000 + id, silence, timeout, remind
        )
        self.process = subprocess.Popen(
            [sys.executable, "-I", watchdog.__file__],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        self.send(**dataclasses.asdict(settings))

    def send(self, **message) -> None:
        assert self.process.stdin
        self.process.stdin.write(json.dumps(message).encode() + b"\n")
        self.process.stdin.flush()

    def answer(self) -> dict:
        assert self.process.stdout
        return json.loads(self.process.stdout.readline())

    def end(self) -> str:
        """Its process ends well; what the watchdog printed."""
        self.send(done=True)
        return self.process.communicate(timeout=60)[1].decode()


@pytest.fixture
def launch():
    started: list[Process] = []

    def launch(*args, **kwargs) -> Process:
        started.append(Process(*args, **kwargs))
        return started[-1]

    yield launch
    for process in started:
        process.process.kill()
        process.process.communicate()


def connect(port: int, data: bytes) -> socket.socket:
    """A connection that has sent `data`, as soon as something listens."""
    while True:
        try:
            connection = socket.create_connection(("127.0.0.1", port), timeout=30)
            break
        except OSError:
            time.sleep(0.01)
    connection.sendall(data)
    return connection


def report(id: int, token: str = "") -> bytes:
    return json.dumps({"id": id, "num": 3, "host": "x", "pid": 1, "token": token}).encode() + b"\n"


def test_all_meet_and_hear_of_a_failure(launch):
    port = free_port()
    run = [launch(port, i, 3, host=f"h{i}") for i in (2, 0, 1)]
    assert [p.answer() for p in run] == [{"names": ["h0", "h1", "h2"], "port": 4000}] * 3
    with pytest.raises(OSError, match="refused"):  # a run under way can be reached by nobody
        socket.create_connection(("127.0.0.1", port))
    run[0].send(raised="KeyError: 'x'")
    assert [p.answer() for p in run] == [
        {"failure": "host 2 of 3 (h2) ended with KeyError: 'x'"}
    ] * 3


def test_those_that_waited_long_for_the_last_are_not_dead(launch):
    port = free_port()
    first = launch(port, 0, 3, silence=3.0)
    with connect(port, report(1)):
        time.sleep(4.0)
        last = launch(port, 2, 3, silence=3.0)
        assert [p.answer()["port"] for p in (first, last)] == [4000] * 2
        before = time.monotonic()
        assert first.answer() == {"failure": "host 1 of 3 (x) stopped answering"}
        assert time.monotonic() - before > 2.0  # silence counts from here


@pytest.mark.parametrize(
    ("places", "message"),
    [
        (((0, 4), (2, 4)), "processes 1, 3 of 4 did not come to coordinator=127.0.0.1:"),
        (((1, 2),), "process 1 of 2 found no process 0 at coordinator=127.0.0.1:"),
        (((0, 3), (1, 3), (1, 3)), "process_id=1 was given twice: to pid "),
        (((0, 2), (1, 3)), "was started with num_processes=3, process 0 with 2; give all the same"),
    ],
)
def test_those_that_came_hear_what_is_wrong(launch, places, message):
    port = free_port()
    errors = [p.answer()["error"] for p in [launch(port, *place, 3.0) for place in places]]
    assert all(message in error for error in errors), errors


def test_something_else_that_listens_is_not_process_0(launch):
    with socket.create_server(("127.0.0.1", 0)) as other:
        process = launch(other.getsockname()[1], 1, 2, 2.0)
        other.settimeout(2.0)
        with contextlib.suppress(TimeoutError):
            while True:
                with other.accept()[0] as connection:
                    connection.sendall(b"\x00\x00\x12\x04 not JSON\n")
        assert "something else answers there, perhaps" in process.answer()["error"]


def test_a_process_that_reported_and_ended_is_not_there(launch):
    """Nobody starts without it; started again, it takes its place."""
    port = free_port()
    first = launch(port, 0, 3)
    connect(port, report(1)).close()
    with connect(port, report(2)) as other:
        other.settimeout(1.0)
        with pytest.raises(TimeoutError):
            other.recv(1)
        again = launch(port, 1, 3)
        expected = {"names": ["h", "h", "x"], "port": 4000}
        assert again.answer() == expected == first.answer() == json.loads(other.recv(1000))


STRANGERS = [
    b'{"fault": "x"}\n', b'{"failure": "x"}\n', b"GET / HTTP/1.1\r\n\r\n", b"\x00\xff\n", b"[1]\n",
    b"7\n", b"[" * 10**5 + b"\n", report(9), report(-1), report(1, "guess"), report(1, "\u00e9"),
    b'{"id": 1}\n', b"",
]  # fmt: skip


def test_strangers_change_nothing_and_are_reported_once(launch):
    port = free_port()
    first = launch(port, 0, 3, token="secret")
    silent = connect(port, b"")
    for data in STRANGERS:
        with connect(port, data) as stranger:
            if data:
                while stranger.recv(1000):  # it is hung up on
                    pass
    others = [launch(port, i, 3, token="secret") for i in (1, 2)]
    assert [p.answer()["names"] for p in (first, *others)] == [["h"] * 3] * 3
    silent.close()
    printed = [p.end() for p in (*others, first)]
    assert printed[:2] == ["", ""]
    assert printed[2].count("\n") == 1 and "it and any other such is ignored" in printed[2]


def test_start_raises_what_the_rendezvous_found():
    run = start(f"127.0.0.1:{free_port()}", 2, 1, start_timeout=1.0)
    refuses(run.__enter__, "process 1 of 2 found no process 0", error=ClusterError)


def test_another_token_is_named(launch):
    port = free_port()
    first, other = launch(port, 0, 2, 3.0, token="one"), launch(port, 1, 2, 3.0, token="two")
    assert "LM_RUN_TOKEN is not that of process 0" in other.answer()["error"]
    assert "process 1 of 2 did not come" in first.answer()["error"]


def test_the_interface_is_known_where_the_address_is():
    assert watchdog.bind_address("127.0.0.1") == "127.0.0.1"
    assert [watchdog.bind_address(host) for host in ("localhost", "192.0.2.1")] == ["", ""]


def at(point: str, **facts) -> dict:
    return {"point": point, "facts": facts, "folders": {}}


def test_what_hosts_say_at_a_point_is_compared_and_late_ones_are_named(launch):
    port = free_port()
    run = [launch(port, i, 3, host=f"h{i}", remind=0.1) for i in range(3)]
    assert all(p.answer()["port"] == 4000 for p in run)
    for p in run[:2]:
        p.send(**at("one", seed=1))
    text = "one waits for host 2 of 3 (h2)"
    assert run[0].answer() == {"waits": "one", "text": text}
    run[2].send(**at("one", seed=2))
    while "waits" in (answer := run[0].answer()):
        pass
    assert [answer, run[1].answer(), run[2].answer()] == [answer] * 3
    assert answer["error"].startswith("hosts differ in seed: host 0 of 3 (h0) has 1, host 2 of 3 ")
    for p in run:  # the same point once more
        p.send(**at("one", seed=1))
    while "waits" in (answer := run[0].answer()):
        pass
    assert answer == {"point": "one", "error": ""}
    for p in run[1:]:
        p.end()
    assert f"{text}: " in run[0].end()


def test_a_refusal_of_one_host_is_final_for_all(launch):
    port = free_port()
    run = [launch(port, i, 2, host=f"h{i}") for i in range(2)]
    assert all(p.answer()["port"] == 4000 for p in run)
    run[1].send(raised="ConfigError: no such file", status=2)
    failure = {"failure": "host 1 of 2 (h1) ended with ConfigError: no such file", "status": 2}
    assert [p.answer() for p in run] == [failure] * 2
    assert watchdog.sentence(**failure).endswith("no such file; the run ends")

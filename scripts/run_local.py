"""Run a program as several processes on this machine, each with its own fake CPU devices.

    python scripts/run_local.py --num_processes=2 --devices=4 -- \\
        python -m experiments.pretrain --config=quicktest --workdir=runs/two --config.mesh.fsdp=8

What several hosts do, on one: each process knows of the others by LM_COORDINATOR,
LM_NUM_PROCESSES, LM_PROCESS_ID and LM_RUN_TOKEN (`lm.distributed.start`). Output is prefixed with
the process's number. When a process fails, the others have `--grace` seconds to end by themselves.
SIGTERM and Ctrl-C go to all. The exit status is that of the first process that failed.
"""

from __future__ import annotations

import argparse
import os
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from typing import IO


def environment(
    process: int, num_processes: int, devices: int, port: int, environ: Mapping[str, str]
) -> dict[str, str]:
    """The variables of one process."""
    flags = [
        flag
        for flag in environ.get("XLA_FLAGS", "").split()
        if not flag.startswith("--xla_force_host_platform_device_count")
    ]
    flags.append(f"--xla_force_host_platform_device_count={devices}")
    return {
        **environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": " ".join(flags),
        "PYTHONUNBUFFERED": "1",
        "LM_COORDINATOR": f"127.0.0.1:{port}",
        "LM_NUM_PROCESSES": str(num_processes),
        "LM_PROCESS_ID": str(process),
    }


def free_port() -> int:
    """A port that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def prefix(process: int, stream: IO[bytes]) -> None:
    """Print the lines of a stream, each after the process's number."""
    for line in stream:
        sys.stdout.buffer.write(b"[%d] " % process + line)
        sys.stdout.buffer.flush()


def run(command: list[str], num_processes: int, devices: int, grace: float) -> int:
    """Run `command` to the end in every process; the first exit status that is not 0."""
    processes: list[subprocess.Popen[bytes]] = []

    def forward(number: int, frame: object) -> None:
        for process in processes:
            if process.poll() is None:
                process.send_signal(number)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, forward)
    port, readers = free_port(), []
    environ = {**os.environ, "LM_RUN_TOKEN": secrets.token_hex(16)}
    for i in range(num_processes):
        process = subprocess.Popen(
            command,
            env=environment(i, num_processes, devices, port, environ),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        processes.append(process)
        readers.append(threading.Thread(target=prefix, args=(i, process.stdout), daemon=True))
        readers[-1].start()
    status, deadline = 0, float("inf")
    while None in (statuses := [process.poll() for process in processes]):
        time.sleep(0.05)
        failed = [code for code in statuses if code]
        if failed and not status:
            status, deadline = failed[0], time.monotonic() + grace
        if time.monotonic() > deadline:
            for process in processes:
                process.kill()
    status = status or next((code for code in statuses if code), 0)
    for reader in readers:
        reader.join(10.0)
    return 128 - status if status < 0 else status


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--num_processes", type=int, default=2, help="processes, like hosts")
    parser.add_argument("--devices", type=int, default=4, help="fake devices of each process")
    parser.add_argument("--grace", type=float, default=60.0, help="seconds for the others to end")
    parser.add_argument("command", nargs="+", help="after --: the program and its arguments")
    args = parser.parse_args()
    if args.num_processes < 1 or args.devices < 1:
        parser.error(
            f"--num_processes={args.num_processes} and --devices={args.devices} must be at least 1"
        )
    sys.exit(run(args.command, args.num_processes, args.devices, args.grace))


if __name__ == "__main__":
    main()

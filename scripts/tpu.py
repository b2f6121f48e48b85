"""Batch jobs on TPU VMs: create, copy, set up, run, watch, tear down.

    python scripts/tpu.py watch --name=llama --zone=us-east5-a --accelerator_type=v6e-64 --spot \\
        -- python -m experiments.pretrain --config=quicktest --workdir=/mnt/BUCKET/llama

`watch` does all there is to do: creates the TPU if there is none, copies this checkout, installs
the pinned packages, starts the command on every worker, shows the log's last line, and when the TPU
is preempted deletes it and begins again. The command is the same each time, so its workdir, in a
bucket, must be what it resumes from. `watch` may be ended and started again; the run goes on.

    create    a queued resource (or, with --direct, a TPU VM at once), and wait until it is there
    copy      this checkout, as it is, without what .gitignore names
    setup     .venv with the pinned packages on every worker
    run       the command on every worker, detached; ends an earlier one first
    status    the state, and the last lines of every worker's log
    teardown  delete it

Several slices with --num_slices. `--dry_run` prints the gcloud commands and runs none. gcloud has
to be installed and logged in.
"""

from __future__ import annotations

import argparse
import dataclasses
import pathlib
import re
import secrets
import shlex
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Sequence

ROOT = pathlib.Path(__file__).resolve().parent.parent
FOLDER = "lm"  # of the checkout on a worker, in the home folder
ARCHIVE = "lm.tar.gz"

VERSIONS = {  # runtime images by the accelerator type's beginning
    "v2-": "tpu-ubuntu2204-base",
    "v3-": "tpu-ubuntu2204-base",
    "v4-": "tpu-ubuntu2204-base",
    "v5litepod-": "v2-alpha-tpuv5-lite",
    "v5p-": "v2-alpha-tpuv5",
    "v6e-": "v2-alpha-tpuv6e",
}
READY = {"READY", "ACTIVE"}
LOST = {"PREEMPTED", "TERMINATED", "STOPPED", "SUSPENDING", "SUSPENDED", "FAILED", "ABSENT"}
USAGE_ERROR = 2  # a command that refuses its arguments will refuse them again
STEADY_SECONDS = 600.0  # a run that lasted this long does not count as a failed attempt

SETUP = f"""\
set -e
cd {FOLDER}
new_enough() {{ python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))'; }}
if [ ! -x .venv/bin/python ] && ! {{ new_enough && python3 -m venv .venv; }}; then
  python3 -m pip install --quiet --user uv
  python3 -m uv venv --seed --python 3.12 --clear .venv
fi
.venv/bin/python -m pip install --quiet --no-input -c constraints.txt -e '.[tpu]'
"""

# The process group of run.pid is the run's, unless the number now names another process.
STOP = """\
pid=$(cat run.pid 2>/dev/null || true)
if [ -n "$pid" ] && [ "$(readlink /proc/$pid/cwd)" = "$(pwd -P)" ]; then
  kill -s TERM -- -$pid || true
  for i in $(seq 60); do pgrep -g $pid > /dev/null || break; sleep 0.5; done
  pkill -KILL -g $pid || true
fi
rm -f run.pid run.status
"""

PROBE = f"""\
cd {FOLDER} 2>/dev/null || {{ echo none; exit 0; }}
if [ -s run.status ]; then echo "ended $(cat run.status)"
elif [ -s run.pid ] && kill -0 $(cat run.pid) 2>/dev/null; then echo running
elif [ -s run.pid ]; then echo 'ended killed'
else echo none; fi
if [ -e logs/latest ]; then tail -c 2000 logs/latest | tr '\\r' '\\n' | grep . | tail -n 1; fi
"""


def run_script(command: Sequence[str], token: str) -> str:
    """What a worker does to start `command`: it outlives the connection, and leaves its status.

    `token` is what the processes of the run know each other by (lm.distributed.watchdog).
    """
    inner = (
        f'echo $$ > run.pid; export PATH="$PWD/.venv/bin:$PATH" LM_RUN_TOKEN={token}; '
        f"{shlex.join(command)}; echo $? > run.status"
    )
    return (
        f"set -e\ncd {FOLDER}\n{STOP}"
        "mkdir -p logs\n"
        "log=$(date -u +%Y%m%dT%H%M%S).log\n"
        "ln -sfn $log logs/latest\n"
        f"setsid nohup bash -c {shlex.quote(inner)} > logs/$log 2>&1 < /dev/null &\n"
        "for i in $(seq 100); do [ -s run.pid ] && break; sleep 0.1; done\n"
    )


class TpuError(RuntimeError):
    """Something that needs a person."""


@dataclasses.dataclass(frozen=True)
class Tpu:
    """One TPU, as gcloud commands.

    A single slice's queued resource and its node have one name; several are NAME-0, NAME-1, ...
    """

    name: str
    zone: str
    accelerator_type: str = ""
    version: str = ""
    project: str = ""
    spot: bool = False
    num_slices: int = 1
    direct: bool = False

    def gcloud(self, group: str, verb: str, *args: str) -> list[str]:
        project = [f"--project={self.project}"] if self.project else []
        everywhere = [f"--zone={self.zone}", *project, "--quiet"]
        return ["gcloud", "compute", "tpus", group, verb, *args, *everywhere]

    @property
    def group(self) -> str:
        return "tpu-vm" if self.direct else "queued-resources"

    def create(self) -> list[str]:
        kind = [f"--accelerator-type={self.accelerator_type}"]
        spot = ["--spot"] if self.spot else []
        if self.direct:
            return self.gcloud(
                "tpu-vm", "create", self.name, *kind, f"--version={self.version}", *spot
            )
        if self.num_slices == 1:
            nodes = [f"--node-id={self.name}"]
        else:
            nodes = [f"--node-count={self.num_slices}", f"--node-prefix={self.name}"]
        version = f"--runtime-version={self.version}"
        return self.gcloud("queued-resources", "create", self.name, *nodes, *kind, version, *spot)

    def describe(self) -> list[str]:
        field = "state" if self.direct else "state.state"
        return self.gcloud(self.group, "describe", self.name, f"--format=value({field})")

    def delete(self) -> list[str]:
        force = [] if self.direct else ["--force"]
        return self.gcloud(self.group, "delete", self.name, *force)

    def ssh(self, script: str, first: bool = False) -> list[str]:
        """`script` on every worker, or on the first alone."""
        group, where = self._where(first)
        return self.gcloud(group, "ssh", self.name, *where, f"--command={script}")

    def scp(self, file: pathlib.Path) -> list[str]:
        """`file` to every worker's home folder."""
        group, where = self._where(first=False)
        return self.gcloud(group, "scp", str(file), f"{self.name}:{ARCHIVE}", *where)

    def _where(self, first: bool) -> tuple[str, list[str]]:
        workers = "--worker=0" if first else "--worker=all"
        if self.num_slices == 1:
            return "tpu-vm", [workers]
        return "queued-resources", ["--node=0" if first else "--node=all", workers]


class Job:
    """A command's life on a TPU."""

    def __init__(self, tpu: Tpu, dry_run: bool, interval: float) -> None:
        self.tpu, self.dry_run, self.interval = tpu, dry_run, interval

    def execute(self, command: list[str], *, quiet: bool = False) -> str:
        """The standard output; of a dry run, which prints the command, nothing.

        Raises:
          TpuError: the command fails.
        """
        if self.dry_run:
            print(shlex.join(command))
            return ""
        try:
            result = subprocess.run(
                command, text=True, check=False, stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE, stderr=subprocess.PIPE if quiet else None,
            )  # fmt: skip
        except FileNotFoundError:
            raise TpuError(
                "gcloud is not installed; see https://cloud.google.com/sdk/docs/install, then "
                "`gcloud auth login`"
            ) from None
        if result.returncode:
            shown = shlex.join(command[:6]) + " ..."
            raise TpuError(f"{shown} failed ({result.returncode}): {(result.stderr or '').strip()}")
        return result.stdout

    def state(self) -> str:
        """As gcloud calls it; ABSENT where there is no such TPU."""
        try:
            return self.execute(self.tpu.describe(), quiet=True).strip() or "UNKNOWN"
        except TpuError as error:
            if re.search("NOT_FOUND|not found|was not found", str(error)):
                return "ABSENT"
            raise

    def create(self) -> None:
        self.execute(self.tpu.create())
        shown = ""
        while not self.dry_run and (state := self.state()) not in READY:
            if state in LOST - {"ABSENT"}:
                raise TpuError(f"{self.tpu.name} is {state} instead of being created")
            if state != shown:
                log(f"{self.tpu.name}: {state}")
                shown = state
            time.sleep(self.interval)

    def copy(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            archive = pathlib.Path(folder) / ARCHIVE
            if not self.dry_run:
                pack(archive)
            self.execute(self.tpu.scp(archive))
        self.execute(self.tpu.ssh(f"mkdir -p {FOLDER} && tar -xzf {ARCHIVE} -C {FOLDER}"))

    def setup(self) -> None:
        self.execute(self.tpu.ssh(SETUP))

    def run(self, command: Sequence[str]) -> None:
        self.execute(self.tpu.ssh(run_script(command, secrets.token_hex(16))))

    def probe(self) -> tuple[str, str]:
        """(`running`, `ended STATUS` or `none`; the log's last line) of the first worker."""
        output = self.execute(self.tpu.ssh(PROBE, first=True), quiet=True)
        what, _, line = output.partition("\n")
        return what.strip(), line.strip()

    def status(self) -> None:
        state, probes = self.state(), self.execute(self.tpu.ssh(PROBE))
        if not self.dry_run:
            log(f"{self.tpu.name}: {state}\n{probes}")

    def teardown(self) -> None:
        self.execute(self.tpu.delete())

    def begin(self, command: Sequence[str], state: str) -> None:
        """From whatever there is to a running command."""
        if state in LOST:
            if state != "ABSENT":
                self.teardown()
            self.create()
        elif state not in READY:
            log(f"{self.tpu.name} is {state}; waiting")
            while (state := self.state()) not in READY:
                if state in LOST:
                    return self.begin(command, state)
                time.sleep(self.interval)
        self.copy()
        self.setup()
        self.run(command)

    def watch(self, command: Sequence[str], max_restarts: int) -> None:
        """Until the command has ended well.

        Raises:
          TpuError: it failed `max_restarts` times in a row, or refuses its arguments.
        """
        if self.dry_run:
            self.execute(self.tpu.describe())
            self.begin(command, "PREEMPTED")
            self.execute(self.tpu.ssh(PROBE, first=True))
            return
        failures, shown, started, trouble = 0, "", time.monotonic(), 0
        while True:
            reason = ""
            try:
                state = self.state()
                what, line = self.probe() if state in READY else (state, "")
                trouble = 0
                if what in ("ended 0", f"ended {USAGE_ERROR}"):
                    log(line)
                    if what != "ended 0":
                        raise SystemExit(f"the command refused its arguments: {line}")
                    return
                if what == "running":
                    if line and line != shown:
                        log(line)
                    shown = line
                else:
                    reason = f"{self.tpu.name} is {state}" if state not in READY else f"run {what}"
            except TpuError as error:
                # A connection fails now and then, and always while a TPU is going away.
                trouble += 1
                log(f"no answer ({trouble}): {error}")
                if trouble >= 10:
                    reason = "ten times no answer"
            if not reason:
                time.sleep(self.interval)
                continue
            if time.monotonic() - started > STEADY_SECONDS:
                failures = 0
            if failures > max_restarts:
                raise TpuError(f"{reason} after {failures} starts in a row; not started again")
            if failures:
                pause = min(self.interval * 2**failures, 1800.0)
                log(f"{reason}; starting again in {pause:.0f} s")
                time.sleep(pause)
            else:
                log(f"{reason}; starting")
            failures, started = failures + 1, time.monotonic()
            try:
                self.begin(command, self.state())
            except TpuError as error:
                log(str(error))


def log(text: str) -> None:
    for line in text.strip().splitlines():
        print(f"# {line}", flush=True)


def pack(archive: pathlib.Path) -> None:
    """The checkout's files, changed and new ones too, but nothing that .gitignore names."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, check=True, capture_output=True,
    )  # fmt: skip
    with tarfile.open(archive, "w:gz") as tar:
        for name in sorted(set(listed.stdout.decode().split("\0")) - {""}):
            if (ROOT / name).exists():
                tar.add(ROOT / name, name, recursive=False)


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    verbs = ["create", "copy", "setup", "run", "watch", "status", "teardown"]
    parser.add_argument("verb", choices=verbs)
    parser.add_argument("--name", required=True, help="of the TPU")
    parser.add_argument("--zone", required=True)
    parser.add_argument("--project", default="", help="default: gcloud's own")
    parser.add_argument("--accelerator_type", default="", help="for example v5litepod-16, v6e-64")
    parser.add_argument("--version", default="", help="runtime image; default: the type's usual")
    parser.add_argument("--spot", action="store_true", help="cheaper, and preempted at any time")
    parser.add_argument("--num_slices", type=int, default=1)
    parser.add_argument("--direct", action="store_true", help="a TPU VM without the queue")
    parser.add_argument("--interval", type=float, default=60.0, help="seconds between polls")
    parser.add_argument("--max_restarts", type=int, default=8, help="in a row, before giving up")
    parser.add_argument("--dry_run", action="store_true", help="print the commands, run none")
    parser.epilog = "After -- comes the command that run and watch start."
    cut = list(argv).index("--") if "--" in argv else len(argv)
    args = parser.parse_args(argv[:cut])
    args.command = list(argv[cut + 1 :])
    if not re.fullmatch(r"[a-z]([a-z0-9-]{0,61}[a-z0-9])?", args.name):
        parser.error(
            f"--name={args.name}: use lower-case letters, digits and -, beginning with a letter"
        )
    if args.num_slices < 1 or (args.direct and args.num_slices > 1):
        parser.error(
            f"--num_slices={args.num_slices}: use 1 or more, and several only without --direct"
        )
    if args.verb in ("create", "watch"):
        if not args.accelerator_type:
            parser.error(f"{args.verb} needs --accelerator_type, for example v5litepod-16")
        known = [v for k, v in VERSIONS.items() if args.accelerator_type.startswith(k)]
        if not (args.version or known):
            parser.error(
                f"no usual runtime image for {args.accelerator_type}; give --version "
                f"(`gcloud compute tpus tpu-vm versions list --zone={args.zone}`)"
            )
        args.version = args.version or known[0]
    if args.verb in ("run", "watch") and not args.command:
        parser.error(f"{args.verb} needs a command; give it after --")
    if args.verb not in ("run", "watch") and args.command:
        parser.error(f"{args.verb} takes no command; remove what follows --")
    return args


def main(argv: Sequence[str]) -> None:
    args = parse(argv)
    fields = {field.name: getattr(args, field.name) for field in dataclasses.fields(Tpu)}
    job = Job(Tpu(**fields), args.dry_run, args.interval)
    inputs = {"run": [args.command], "watch": [args.command, args.max_restarts]}
    try:
        getattr(job, args.verb)(*inputs.get(args.verb, []))
    except TpuError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main(sys.argv[1:])
